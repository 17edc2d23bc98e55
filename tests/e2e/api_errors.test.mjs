// Nexus's own errors, in the shape that the clients of each API read, also within a stream.
import { answer_of } from './api_shapes.mjs';
import { Ledger, label_of } from './ledger.mjs';
import { RawClient, assert, assert_error, group, pair, post, request, request_bytes, settings, test } from './harness.mjs';

const turn = { messages: [{ role: 'user', content: 'Hi' }] };
// One endpoint for each shape and framing; `stream`: the server whose stream is cut.
const endpoints = {
  '/v1/chat/completions': { shape: 'openai', ask: turn },
  '/v1/responses': { shape: 'openai', ask: { input: 'Hi' }, stream: 'OpenAI' },
  '/v1/messages': { shape: 'anthropic', ask: { max_tokens: 9, ...turn }, stream: 'Anthropic' },
  '/v1/messages/count_tokens': { shape: 'anthropic', ask: turn },
  '/v1/rerank': { shape: 'openai', ask: { query: 'q', documents: ['a'] } },
  '/api/chat': { shape: 'ollama', ask: turn, stream: 'Ollama, streams unasked' },
  '/api/generate': { shape: 'ollama', ask: { prompt: 'Hi' }, stream: 'Ollama' },
  '/completion': { shape: 'openai', ask: { prompt: 'Hi' }, stream: 'llama.cpp' },
};
const anthropic_types = { 400: 'invalid_request_error', 401: 'authentication_error', 404: 'not_found_error', 405: 'invalid_request_error', 413: 'request_too_large', 429: 'rate_limit_error', 501: 'api_error', 502: 'api_error', 503: 'overloaded_error', 504: 'timeout_error' };

// Behind the first event, or line, of an answer.
const first_of = ({ type, text }) => (type === 'application/x-ndjson' ? text.indexOf('\n') + 1 : text.indexOf('\n\n') + 2);

// Insists on an error of this status in the endpoint's shape; `code`: as clients of OpenAI's get it.
function assert_shaped(r, path, status, code) {
  const { shape } = endpoints[path];
  const note = `${path}: ${r.status} ${r.text}`;
  if (shape === 'openai') return assert_error(r, status, code).message;
  assert.equal(r.status, status, note);
  assert.match(r.headers.get('content-type'), /^application\/json/, note);
  assert.ok(r.complete, note);
  if (shape === 'ollama') {
    assert.deepEqual(Object.keys(r.json), ['error'], note);
    assert.ok(r.json.error.length >= 15, note);
    return r.json.error;
  }
  const { message } = r.json.error;
  assert.deepEqual(r.json, { type: 'error', error: { type: anthropic_types[status], message }, request_id: r.headers.get('x-request-id') }, note);
  assert.ok(message.length >= 15, note);
  return message;
}
const paths = Object.keys(endpoints);
const body_of = (path, model = 'm1', more = {}) => JSON.stringify({ ...(model !== null && { model }), ...endpoints[path].ask, ...more });

async function counting(t, conf = {}, headers = {}) {
  const { nexus, backend } = await pair(t, {}, conf);
  const ledger = new Ledger(nexus, { headers });
  await ledger.read(0);
  // Insists on one more request of this endpoint, ended as this type of error.
  const counted = async (path, error_type, note = '') =>
    assert.deepEqual(await ledger.read(), { requests: 1, endpoints: { [label_of(path)]: 1 }, errors: { [error_type]: 1 } }, `${path} ${note}`);
  return { nexus, backend, ledger, counted };
}

group('api errors', () => {
  test('an unknown model, no model, and a body that is no JSON', async (t) => {
    const { nexus, backend, counted } = await counting(t);
    for (const path of paths) {
      assert.match(assert_shaped(await post(nexus.port, path, body_of(path, 'nobody')), path, 404, 'model_not_found'), /nobody/);
      await counted(path, 'no_backend');
      assert_shaped(await post(nexus.port, path, '{"model":'), path, 400, 'invalid_json');
      await counted(path, 'bad_request');
      if (path === '/completion') continue;   // a model may be left out there
      assert_shaped(await post(nexus.port, path, body_of(path, null)), path, 400, 'missing_model');
      await counted(path, 'bad_request');
    }
    assert.equal(backend.requests.length, 0);
  });

  test('a wrong key, as Bearer, x-api-key or api-key, and none at all; a good one in any of them never reaches the backend', async (t) => {
    const key = 'sk-alice-0123456789';
    const { nexus, backend, counted, ledger } = await counting(t, { server: { api_keys_file: t.file('keys', `alice ${key}\n`) } }, { 'x-api-key': key });
    for (const path of paths) {
      for (const headers of [{}, { Authorization: 'Bearer sk-wrong' }, { 'x-api-key': 'sk-wrong' }, { 'api-key': 'sk-wrong' }]) {
        assert_shaped(await post(nexus.port, path, body_of(path), { headers }), path, 401, 'invalid_api_key');
        await counted(path, 'bad_request', JSON.stringify(headers));
      }
      for (const headers of [{ Authorization: `Bearer ${key}` }, { 'x-api-key': key }, { 'api-key': key }]) {
        backend.answer = (_, reply) => reply.json({ ok: true });
        assert.equal((await post(nexus.port, path, body_of(path), { headers })).status, 200);
        assert.ok(!backend.requests.at(-1).raw.includes(key), path);
        await ledger.read();
      }
    }
  });

  test('a wrong method is 405 with Allow, and is no request', async (t) => {
    const { nexus, ledger } = await counting(t);
    for (const path of paths.filter((p) => p !== '/v1/responses')) {
      const r = await request(nexus.port, 'PUT', path);
      assert_shaped(r, path, 405, 'method_not_allowed');
      assert.match(r.headers.get('allow'), /POST/);
    }
    assert.deepEqual(await ledger.read(0), {});
    assert.equal((await ledger.page()).value('nexus_http_rejections_total', { reason: 'method' }), paths.length - 1);
  });

  test('a body that is too large, whether its length is known or not', async (t) => {
    const { nexus, backend, counted } = await counting(t, { server: { max_body: '64k' } });
    for (const path of paths) {
      const body = Buffer.from(body_of(path, 'm1', { pad: 'x'.repeat(70_000) }));
      assert_shaped(await post(nexus.port, path, body), path, 413, 'body_too_large');
      await counted(path, 'bad_request', 'sized');
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.write(request_bytes('POST', path, { 'Transfer-Encoding': 'chunked' }, Buffer.from(`${body.length.toString(16)}\r\n${body}\r\n0\r\n\r\n`)));
      assert_shaped(await client.response(), path, 413, 'body_too_large');
      await counted(path, 'bad_request', 'chunked');
    }
    assert.equal(backend.requests.length, 0);
  });

  test('no backend that serves the API, a broken one, a silent one, and a full one', async (t) => {
    const { nexus, backend, counted, ledger } = await counting(t, { upstream: { first_byte_timeout: `${700 * settings.slow}ms` }, routing: { retries: 0 }, health: { eject_after: 1000 }, backend: { max_pending: 3 } });
    for (const path of paths) {
      backend.answer = (_, reply) => reply.reset();
      assert_shaped(await post(nexus.port, path, body_of(path)), path, 502, 'bad_gateway');
      await counted(path, 'backend_error');
      backend.answer = (_, reply) => reply.raw('what is this\r\n\r\n');
      assert_shaped(await post(nexus.port, path, body_of(path)), path, 502, 'bad_gateway');
      await counted(path, 'parse_error');
    }
    // The silent backend holds as many as it may; more are refused, and those that it holds time out.
    const shapes = ['/v1/messages', '/api/chat', '/v1/responses'];
    backend.answer = () => undefined;
    const before = backend.requests.length;
    const silent = shapes.map((path) => post(nexus.port, path, body_of(path)));
    await backend.request(before + shapes.length);
    for (const path of shapes) assert_shaped(await post(nexus.port, path, body_of(path)), path, 429, 'backends_full');
    for (const [i, path] of shapes.entries()) assert_shaped(await silent[i], path, 504, 'gateway_timeout');
    assert.deepEqual(await ledger.read(6), { requests: 6, endpoints: Object.fromEntries(shapes.map((path) => [label_of(path), 2])), errors: { overloaded: 3, timeout: 3 } });
    await backend.stop();
    for (const path of paths) {
      const r = await post(nexus.port, path, body_of(path));
      assert.ok([502, 503].includes(r.status), r.text);
      assert_shaped(r, path, r.status);
    }
  });

  test('no backend serves the API', async (t) => {
    const { nexus, backend, counted } = await counting(t, { backend: { apis: 'moderations' } });
    for (const path of paths) {
      assert.match(assert_shaped(await post(nexus.port, path, body_of(path)), path, 501, 'api_not_served'), /b1/);
      await counted(path, 'no_backend');
    }
    assert.equal(backend.requests.length, 0);
  });

  test('a backend’s own error passes as it is', async (t) => {
    const { nexus, backend, counted } = await counting(t, { routing: { retries: 0 }, health: { eject_after: 1000 } });
    const own = { openai: { error: { message: 'max_tokens is too large', type: 'BadRequestError', code: 400 } }, anthropic: { type: 'error', error: { type: 'invalid_request_error', message: 'max_tokens: required' } }, ollama: { error: 'invalid options' } };
    for (const path of paths) {
      for (const [status, type] of [[400, 'bad_request'], [529, 'backend_error']]) {
        const text = JSON.stringify(own[endpoints[path].shape]);
        backend.answer = (_, reply) => reply.body(status, text, { 'Content-Type': 'application/json', 'request-id': 'req_theirs' });
        const r = await post(nexus.port, path, body_of(path));
        assert.equal(r.status, status);
        assert.equal(r.text, text);
        assert.equal(r.headers.get('request-id'), 'req_theirs');
        await counted(path, type);
      }
    }
  });

  for (const how of ['stalls', 'breaks off']) {
    test(`a stream that ${how} ends with an error in its own framing, behind whole and behind cut events`, async (t) => {
      const { nexus, backend, ledger } = await counting(t, { upstream: { stall_timeout: '300ms' }, health: { eject_after: 1000 } });
      const wanted = how === 'stalls' ? 'timeout' : 'backend_error';
      const streams = Object.entries(endpoints).filter(([, e]) => e.stream);
      const cuts = streams.flatMap(([path, { stream, shape }]) => {
        const row = answer_of(stream, path, true);
        const first = first_of(row);
        return [first, first + 20].map((at) => ({ path, shape, sent: row.text.slice(0, at), whole: at === first }));
      });
      backend.answer = (request, reply) => {
        const { sent, shape } = cuts[Number(request.headers.get('x-cut'))];
        reply.head(200, { 'Content-Type': shape === 'ollama' ? 'application/x-ndjson' : 'text/event-stream', 'Transfer-Encoding': 'chunked' });
        reply.piece(sent);
        if (how === 'breaks off') setTimeout(() => reply.reset(), 30);
      };
      await Promise.all(cuts.map(async ({ path, shape, sent, whole }, i) => {
        const r = await post(nexus.port, path, body_of(path, 'm1', { stream: true }), { headers: { 'X-Cut': String(i), 'X-Request-Id': `cut-${i}` } });
        const note = `${path}, ${whole ? 'whole' : 'cut'}: ${JSON.stringify(r.text)}`;
        assert.equal(r.status, 200, note);
        assert.equal(r.complete, false, note);
        assert.ok(r.text.startsWith(sent), note);
        const tail = r.text.slice(sent.length);
        if (shape === 'ollama') {
          // Behind a whole line there is no empty one, which some clients cannot read.
          assert.ok(whole ? tail.startsWith('{') : tail.startsWith('\n{'), note);
          assert.ok(tail.endsWith('}\n'), note);
          assert.deepEqual(Object.keys(JSON.parse(tail)), ['error'], note);
          return;
        }
        const m = /^\n\n(?:event: (\w+)\n)?data: (\{.*\})\n\n$/.exec(tail);
        assert.ok(m, note);
        const data = JSON.parse(m[2]);
        if (path === '/completion') assert.deepEqual([m[1], Object.keys(data.error).sort()], [undefined, ['code', 'message', 'param', 'type']], note);
        else assert.deepEqual([m[1], data.type], ['error', 'error'], note);
        if (shape === 'anthropic') assert.deepEqual([data.error.type, data.request_id], [how === 'stalls' ? 'timeout_error' : 'api_error', `cut-${i}`], note);
        if (path === '/v1/responses') assert.deepEqual(Object.keys(data), ['type', 'code', 'message', 'param', 'sequence_number'], note);
      }));
      const added = await ledger.read(cuts.length);
      assert.deepEqual(added.errors, { [wanted]: cuts.length });
      assert.equal(added.without_end, undefined);
    });
  }

  test('the real clients throw what a cut stream and a refusal tell', async (t) => {
    const Anthropic = await import('@anthropic-ai/sdk').then((m) => m.default, () => null);
    const { Ollama } = await import('ollama').catch(() => ({}));
    const OpenAI = await import('openai').then((m) => m.default, () => null);
    if (!Anthropic || !Ollama || !OpenAI) t.skip('an npm package is not installed (cd tests && npm ci)');
    const { nexus, backend } = await pair(t, {}, { upstream: { stall_timeout: '300ms' } });
    backend.answer = (request, reply) => {
      const [path, stream] = [request.path, endpoints[request.path].stream];
      const row = answer_of(stream, path, true);
      reply.head(200, { 'Content-Type': row.type, 'Transfer-Encoding': 'chunked' });
      reply.piece(row.text.slice(0, first_of(row)));
    };
    const base = `http://127.0.0.1:${nexus.port}`;
    const anthropic = new Anthropic({ baseURL: base, apiKey: 'sk', maxRetries: 0 });
    const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: 'sk', maxRetries: 0 });
    const ollama = new Ollama({ host: base });
    let last;
    const drain = async (stream) => {
      for await (const event of await stream) last = event;
    };
    const ask = { model: 'm1', max_tokens: 9, ...turn };
    await Promise.all([
      assert.rejects(drain(anthropic.messages.create({ ...ask, stream: true })), /did not respond in time/),
      assert.rejects(drain(ollama.chat({ model: 'm1', ...turn, stream: true })), /did not respond in time/),
      assert.rejects(anthropic.messages.create({ ...ask, model: 'nobody' }), (e) => e instanceof Anthropic.NotFoundError && e.error.error.type === 'not_found_error' && /nobody/.test(e.message)),
      assert.rejects(openai.responses.create({ model: 'nobody', input: 'Hi' }), (e) => e instanceof OpenAI.NotFoundError && e.code === 'model_not_found'),
      assert.rejects(ollama.chat({ model: 'nobody', ...turn }), (e) => e.status_code === 404 && /nobody/.test(e.message)),
    ]);
    // This one hands out the error event before it throws.
    await assert.rejects(drain(openai.responses.create({ model: 'm1', input: 'Hi', stream: true })));
    assert.equal(last.type, 'error');
    assert.match(last.message, /did not respond in time/);
  });
});
