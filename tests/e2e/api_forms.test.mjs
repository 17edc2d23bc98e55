// Forms with files: the model is found wherever it stands, an alias replaces it and nothing else, and all is counted.
import { Ledger, label_of } from './ledger.mjs';
import { RawClient, assert, assert_error, group, pair, post, request_bytes, test } from './harness.mjs';

const boundary = '----WebKitFormBoundary7MA4YWxkTrZu0gW';
const type = `multipart/form-data; boundary=${boundary}`;
const field = (name, value) => Buffer.from(`--${boundary}\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n${value}\r\n`);
const file = (bytes, name = 'file') => Buffer.concat([Buffer.from(`--${boundary}\r\nContent-Disposition: form-data; name="${name}"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n`), bytes, Buffer.from('\r\n')]);
const form = (...parts) => Buffer.concat([...parts, Buffer.from(`--${boundary}--\r\n`)]);
const send = (nexus, path, body, content_type = type) => post(nexus.port, path, body, { headers: { 'Content-Type': content_type } });

// What looks like a part, a boundary or a model within a file.
const sly_sound = Buffer.from(`RIFF\r\n--${boundary}x\r\n--almost\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n--${boundary.slice(0, -1)}\r\n\0\x01\xff{"model":"other"}`, 'latin1');

const event = (data) => `event: ${data.type}\ndata: ${JSON.stringify(data)}\n\n`;
const token_usage = { type: 'tokens', input_tokens: 14, input_token_details: { text_tokens: 0, audio_tokens: 14 }, output_tokens: 45, total_tokens: 59 };
// [name, type, text, told]: what servers answer to a transcription.
const answers = [
  ['OpenAI', 'application/json', JSON.stringify({ text: 'Hello.', usage: token_usage }), { prompt: 14, completion: 45 }],
  ['vLLM, whisper', 'application/json', '{"text":"Hello.","usage":{"type":"duration","seconds":9}}', {}],
  ['OpenAI, verbose', 'application/json', '{"task":"transcribe","language":"english","duration":8.4,"text":"Hello.","segments":[{"id":0,"tokens":[1,2]}],"usage":{"type":"duration","seconds":9}}', {}],
  ['as text', 'text/plain; charset=utf-8', 'Hello.\n', {}],
  ['streamed', 'text/event-stream', event({ type: 'transcript.text.delta', delta: 'Hel' }) + event({ type: 'transcript.text.delta', delta: 'lo.' }) + event({ type: 'transcript.text.done', text: 'Hello.', usage: token_usage }), { prompt: 14, completion: 45, streams: true }],
  ['vLLM, streamed', 'text/event-stream', event({ object: 'transcription.chunk', choices: [{ delta: { content: 'Hello.' } }] }) + event({ object: 'transcription.chunk', choices: [], usage: { prompt_tokens: 200, total_tokens: 212, completion_tokens: 12 } }) + 'data: [DONE]\n\n', { prompt: 200, completion: 12, streams: true }],
  ['streamed, without its end', 'text/event-stream', event({ type: 'transcript.text.delta', delta: 'Hel' }), { streams: true, ends: false }],
];

async function counting(t, conf = {}, headers = {}) {
  const { nexus, backend } = await pair(t, {}, conf);
  const ledger = new Ledger(nexus, { headers });
  await ledger.read(0);
  backend.answer = (_, reply) => reply.json({ text: 'Hello.', usage: token_usage });
  return { nexus, backend, ledger };
}

group('api forms', () => {
  test('the model is found before, between and behind the files, and the form goes on byte for byte', async (t) => {
    const { nexus, backend, ledger } = await counting(t);
    const model = field('model', 'm1');
    const forms = [form(model, file(sly_sound)), form(file(sly_sound), model), form(file(sly_sound), model, field('language', 'en'), file(Buffer.alloc(0), 'other')), form(file(sly_sound), field('prompt', 'model'), model)];
    for (const path of ['/v1/audio/transcriptions', '/v1/audio/translations', '/v1/images/edits']) {
      for (const [i, body] of forms.entries()) {
        const r = await send(nexus, path, body);
        assert.equal(r.status, 200, `${path} ${i}: ${r.text}`);
        assert.ok(backend.requests.at(-1).body.equals(body), `${path} ${i}`);
        assert.equal(backend.requests.at(-1).headers.get('content-type'), type);
        await ledger.expect(path, { prompt: 14, completion: 45 });
      }
      // In chunks, of any size.
      for (const size of [1, 7, 100]) {
        const client = await RawClient.connect(nexus.port);
        t.after(() => client.close());
        client.write(request_bytes('POST', path, { 'Content-Type': type, 'Transfer-Encoding': 'chunked' }));
        for (let at = 0; at < forms[1].length; at += size) {
          const piece = forms[1].subarray(at, at + size);
          client.write(Buffer.concat([Buffer.from(`${piece.length.toString(16)}\r\n`), piece, Buffer.from('\r\n')]));
        }
        client.write('0\r\n\r\n');
        assert.equal((await client.response()).status, 200);
        assert.ok(backend.requests.at(-1).body.equals(forms[1]), `${path}, chunks of ${size}`);
        await ledger.expect(path, { prompt: 14, completion: 45 });
      }
    }
  });

  test('an edit of an image may come as JSON too, of any size', async (t) => {
    const { nexus, backend, ledger } = await counting(t, { aliases: { 'gpt-image-1': 'm1' } });
    for (const bytes of [10, 300_000]) {
      const ask = { images: [{ image_url: `data:image/png;base64,${'A'.repeat(bytes)}` }], model: 'm1', prompt: 'a hat' };
      const r = await send(nexus, '/v1/images/edits', JSON.stringify({ ...ask, model: 'gpt-image-1' }), 'application/json; charset=utf-8');
      assert.equal(r.status, 200, r.text);
      assert.equal(backend.requests.at(-1).body.toString(), JSON.stringify(ask));
      await ledger.expect('/v1/images/edits', { prompt: 14, completion: 45 });
    }
    const r = await send(nexus, '/v1/images/edits', '{"prompt":', 'application/json');
    assert_error(r, 400, 'invalid_json');
  });

  test('an alias and a fallback replace the value of that field, and nothing else', async (t) => {
    const { nexus, backend } = await counting(t, { aliases: { 'whisper-1': 'm1' }, fallbacks: { gone: 'm1' } });
    for (const name of ['whisper-1', 'm1']) {
      for (const make of [(m) => form(m, file(sly_sound)), (m) => form(file(sly_sound), m, field('prompt', 'whisper-1'))]) {
        const r = await send(nexus, '/v1/audio/transcriptions', make(field('model', name)));
        assert.equal(r.status, 200, r.text);
        assert.ok(backend.requests.at(-1).body.equals(make(field('model', 'm1'))), backend.requests.at(-1).body.toString('latin1'));
      }
    }
  });

  test('each server’s transcription passes as it is, and is counted', async (t) => {
    const { nexus, backend, ledger } = await counting(t);
    for (const [name, content_type, text, told] of answers) {
      for (const crlf of told.streams ? [false, true] : [false]) {
        const sent = crlf ? text.replaceAll('\n', '\r\n') : text;
        backend.answer = (_, reply) => reply.body(200, sent, { 'Content-Type': content_type });
        const r = await send(nexus, '/v1/audio/transcriptions', form(file(sly_sound), field('model', 'm1'), ...(told.streams ? [field('stream', 'true')] : [])));
        assert.equal(r.text, sent, name);
        await ledger.expect('/v1/audio/transcriptions', told, name);
      }
    }
  });

  test('a form without a model, with two, with an unknown one, no form at all, and a wrong key', async (t) => {
    const key = 'sk-alice-0123456789';
    const { nexus, backend, ledger } = await counting(t, { server: { api_keys_file: t.file('keys', `alice ${key}\n`) } }, { 'x-api-key': key });
    const path = '/v1/audio/transcriptions';
    const rows = [[form(file(sly_sound)), 400, 'bad_request'], [form(field('model', 'm1'), file(sly_sound), field('model', 'other')), 400, 'bad_request'], [form(file(sly_sound), field('model', 'nobody')), 404, 'no_backend'],
                  [Buffer.from('{"model":"m1"}'), 400, 'bad_request'], [form(field('model', 'm1')).subarray(0, -8), 400, 'bad_request']];
    for (const [i, [body, status, error]] of rows.entries()) {
      const r = await post(nexus.port, path, body, { headers: { 'Content-Type': type, 'x-api-key': key } });
      assert_error(r, status);
      assert.deepEqual(await ledger.read(), { requests: 1, endpoints: { [label_of(path)]: 1 }, errors: { [error]: 1 } }, `row ${i}`);
    }
    assert_error(await send(nexus, path, form(field('model', 'm1'))), 401, 'invalid_api_key');
    assert_error(await post(nexus.port, path, '{"model":"m1"}', { headers: { 'x-api-key': key } }), 400);
    assert.equal(backend.requests.length, 0);
  });

  test('a long file passes in bounded memory, and one over max_body is 413', async (t) => {
    const { nexus, backend, ledger } = await counting(t, { server: { max_body: '24m', body_memory: '64m' } });
    const long = form(file(Buffer.alloc(16 << 20, 'a')), field('model', 'm1'));
    assert.equal((await send(nexus, '/v1/audio/transcriptions', long)).status, 200);
    assert.ok(backend.requests.at(-1).body.equals(long));
    await ledger.expect('/v1/audio/transcriptions', { prompt: 14, completion: 45 });
    assert.ok(nexus.rss_bytes() < 100 << 20, `${nexus.rss_bytes()} bytes resident`);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.write(request_bytes('POST', '/v1/audio/transcriptions', { 'Content-Type': type, 'Content-Length': String(100 << 20) }));
    client.method = 'POST';
    assert_error(await client.response(), 413, 'body_too_large');
    assert.deepEqual(await ledger.read(), { requests: 1, endpoints: { _v1_audio_transcriptions: 1 }, errors: { bad_request: 1 } });
  });

  test('openai: transcriptions, plain and streamed, translations, and edits of an image', async (t) => {
    const OpenAI = await import('openai').then((m) => m, () => null);
    if (!OpenAI) t.skip('npm package openai is not installed (cd tests && npm ci)');
    globalThis.File ??= (await import('node:buffer')).File; // the SDK wants it there, and Node 18 does not have it there
    const { nexus, backend, ledger } = await counting(t);
    const client = new OpenAI.default({ baseURL: `http://127.0.0.1:${nexus.port}/v1`, apiKey: 'sk-test', maxRetries: 0 });
    const sound = () => OpenAI.toFile(sly_sound, 'a.wav', { type: 'audio/wav' });
    assert.equal((await client.audio.transcriptions.create({ file: await sound(), model: 'm1' })).text, 'Hello.');
    await ledger.expect('/v1/audio/transcriptions', { prompt: 14, completion: 45 });
    assert.ok(backend.requests.at(-1).body.includes(sly_sound));
    assert.equal((await client.audio.translations.create({ file: await sound(), model: 'm1' })).text, 'Hello.');
    await ledger.expect('/v1/audio/translations', { prompt: 14, completion: 45 });
    const streamed = answers.find(([name]) => name === 'streamed');
    backend.answer = (_, reply) => reply.body(200, streamed[2], { 'Content-Type': streamed[1] });
    const events = [];
    for await (const e of await client.audio.transcriptions.create({ file: await sound(), model: 'm1', stream: true })) events.push(e.type);
    assert.deepEqual(events, ['transcript.text.delta', 'transcript.text.delta', 'transcript.text.done']);
    await ledger.expect('/v1/audio/transcriptions', streamed[3]);
    backend.answer = (_, reply) => reply.json({ created: 1, data: [{ b64_json: 'aGVsbG8=' }], usage: { total_tokens: 100, input_tokens: 50, output_tokens: 50 } });
    assert.equal((await client.images.edit({ image: await OpenAI.toFile(sly_sound, 'a.png', { type: 'image/png' }), prompt: 'a hat', model: 'm1' })).data[0].b64_json, 'aGVsbG8=');
    await ledger.expect('/v1/images/edits', { prompt: 50, completion: 50 });
  });
});
