// Token counts of streams: asked for where the backend understands it, and taken out again where the client had not asked.
import { RawClient, assert, chat, chat_chunk, get, group, pair, parse_metrics, post, sleep, sse, test, until } from './harness.mjs';

const path = '/v1/chat/completions';
const usage = { prompt_tokens: 31, completion_tokens: 2, total_tokens: 33 };
const usage_event = (more = {}) => sse({ id: 'chatcmpl-2', object: 'chat.completion.chunk', created: 1700000000, model: 'm1', choices: [], usage, ...more });
const words = sse(chat_chunk('m1', 'One', { usage: null })) + sse(chat_chunk('m1', ' {"usage":{"prompt_tokens":1},"choices":[]}', { usage: null })) + sse(chat_chunk('m1', null, { usage: null }));
const done = sse('[DONE]');

// A backend that streams `text` in pieces of `size` bytes, as if asked for usage.
const streams = (text, size = text.length) => (_, reply) => {
  const bytes = Buffer.from(text);
  reply.stream();
  for (let at = 0; at < bytes.length; at += size) reply.piece(bytes.subarray(at, at + size));
  reply.finish();
};

const tokens_are = (nexus, type, count, sum) => until(async () => {
  const page = parse_metrics((await get(nexus.port, '/metrics')).text);
  return page.sum('nexus_tokens_total_count', { type }) === count && page.sum('nexus_tokens_total_sum', { type }) === sum;
}, `${count} ${type} counts with the sum ${sum}`);

group('usage in streams', () => {
  test('the option is added for kinds that understand it, not for generic, and stream_usage overrides both', async (t) => {
    const rows = [['ollama', undefined, true], ['vllm', undefined, true], ['llamacpp', undefined, true], ['lmstudio', undefined, true], ['openai', undefined, true], ['generic', undefined, false], ['generic', 'ask', true], ['vllm', 'as_is', false]];
    for (const [kind, stream_usage, asked] of rows) {
      const { nexus, backend } = await pair(t, { kind }, { backend: { stream_usage } });
      const body = chat('m1', { stream: true, note: 'é' });
      await post(nexus.port, path, body);
      const { stream_options, ...rest } = backend.requests[0].json;
      assert.deepEqual(stream_options, asked ? { include_usage: true } : undefined, `${kind} ${stream_usage}`);
      assert.deepEqual(rest, body);
      if (!asked) assert.equal(backend.requests[0].body.toString(), JSON.stringify(body));
    }
  });

  test('plain requests are never touched, nor a client’s own wish', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    for (const body of ['{"model":"m1"}', '{"model":"m1", "stream":false}', '{"stream":true,"model":"m1","stream_options":{"include_usage":true}}']) {
      await post(nexus.port, path, body);
      assert.equal(backend.requests.at(-1).body.toString(), body);
    }
  });

  test('options that the client set stay beside the one that is added', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    for (const options of [{}, { include_usage: false }, { other: [1] }, { include_usage: false, other: 1 }, null]) {
      await post(nexus.port, path, chat('m1', { stream: true, stream_options: options }));
      assert.deepEqual(backend.requests.at(-1).json.stream_options, { ...options, include_usage: true }, JSON.stringify(options));
    }
  });

  test('a client that did not ask for usage but for continuous_usage_stats gets no usage', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    for (const options of [{ include_usage: false, continuous_usage_stats: true }, { continuous_usage_stats: true, x: 1 }]) {
      await post(nexus.port, path, chat('m1', { stream: true, stream_options: options }));
      assert.deepEqual(backend.requests.at(-1).json.stream_options, { ...options, include_usage: true, continuous_usage_stats: false });
    }
    const asked = { include_usage: true, continuous_usage_stats: true };
    await post(nexus.port, path, chat('m1', { stream: true, stream_options: asked }));
    assert.deepEqual(backend.requests.at(-1).json.stream_options, asked, 'the client’s own wish');
  });

  test('the extra event is taken out however the bytes are cut, every other byte stays, and the tokens are recorded', { limit_ms: 60_000 }, async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const sizes = [1, 2, 3, 5, 7, 16, 61, 333, 1_000_000];
    for (const size of sizes) {
      backend.answer = streams(words + usage_event() + done, size);
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.ok(r.complete);
      assert.equal(r.text, words + done, `pieces of ${size}`);
    }
    await tokens_are(nexus, 'prompt', sizes.length, 31 * sizes.length);
    await tokens_are(nexus, 'completion', sizes.length, 2 * sizes.length);
  });

  test('the extra event is taken out when the stream is cut in two at any place', { limit_ms: 60_000 }, async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const text = Buffer.from(sse(chat_chunk('m1', 'é', { usage: null })) + usage_event() + done);
    for (let at = 1; at < text.length; at += 2) {
      backend.answer = async (_, reply) => {
        reply.stream();
        reply.piece(text.subarray(0, at));
        await sleep(1);
        reply.piece(text.subarray(at));
        reply.finish();
      };
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.equal(r.text, sse(chat_chunk('m1', 'é', { usage: null })) + done, `cut at ${at}`);
    }
  });

  test('CRLF line ends, comments and other fields beside it stay', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const crlf = (s) => s.replaceAll('\n', '\r\n');
    backend.answer = streams(crlf(words) + ': ping\r\n\r\n' + crlf(usage_event()) + crlf(done), 9);
    assert.equal((await post(nexus.port, path, chat('m1', { stream: true }))).text, crlf(words) + ': ping\r\n\r\n' + crlf(done));
  });

  test('a client that asked for usage gets the event', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    backend.answer = streams(words + usage_event() + done, 50);
    const r = await post(nexus.port, path, chat('m1', { stream: true, stream_options: { include_usage: true } }));
    assert.equal(r.text, words + usage_event() + done);
    await tokens_are(nexus, 'prompt', 1, 31);
  });

  test('an event that carries usage and words too is not taken out', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const text = sse(chat_chunk('m1', 'One', { usage: { prompt_tokens: 31, completion_tokens: 1, total_tokens: 32 } })) + sse(chat_chunk('m1', null, { usage })) + done;
    backend.answer = streams(text, 11);
    assert.equal((await post(nexus.port, path, chat('m1', { stream: true }))).text, text);
    await tokens_are(nexus, 'completion', 1, 2);
  });

  test('with as_is a usage event that comes anyway stays and is read', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'generic' });
    backend.answer = streams(words + usage_event() + done, 13);
    assert.equal((await post(nexus.port, path, chat('m1', { stream: true }))).text, words + usage_event() + done);
    await tokens_are(nexus, 'prompt', 1, 31);
  });

  test('a backend that refuses stream_options is asked again without, once, and not with it any more; the client’s own are its own', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const refusal = { error: { message: "Extra inputs are not permitted: 'stream_options'", type: 'BadRequestError', code: 400 } };
    backend.answer = async (request, reply) => {
      if (request.json.stream_options) {
        await sleep(300);   // the backend's own time
        return reply.json(refusal, 400);
      }
      return streams(words + done, 30)(request, reply);
    };
    for (let i = 0; i < 3; ++i) {
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.equal(r.status, 200);
      assert.equal(r.text, words + done);
    }
    assert.deepEqual(backend.requests.map((r) => r.json.stream_options !== undefined), [true, false, false, false]);
    const own = await post(nexus.port, path, chat('m1', { stream: true, stream_options: { include_usage: true } }));
    assert.equal(own.status, 400);
    assert.deepEqual(own.json, refusal);
    await nexus.logged(/backend refuses stream_options/);
    assert.equal(nexus.log().match(/backend refuses stream_options/g).length, 1);
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.sum('nexus_backend_attempts_total', { outcome: 'ok' }), 5);
    assert.equal(page.sum('nexus_requests_total'), 4);
    assert.equal(page.sum('nexus_backend_ejected'), 0);
    const overhead = page.sum('nexus_overhead_seconds_sum');
    assert.ok(overhead < 0.2, `the backend's refusal is no work of Nexus, of which there were ${overhead} s`);
  });

  test('another refusal of a request that Nexus had added to goes to the client as it is', async (t) => {
    const refusal = { error: { message: 'max_tokens is too large', type: 'BadRequestError', code: 400 } };
    const { nexus, backend } = await pair(t, { kind: 'vllm', answer: async (_, reply) => reply.json(refusal, 400) });
    for (let i = 0; i < 2; ++i) {
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.equal(r.status, 400);
      assert.deepEqual(r.json, refusal);
    }
    assert.equal(backend.requests.length, 2);
  });

  test('a stream without Content-Type is read as one, and a plain answer without it is not', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    for (const size of [1, 4, 1_000_000]) {
      backend.answer = (request, reply) => {
        const bytes = Buffer.from(words + usage_event() + done);
        reply.head(200, { 'Transfer-Encoding': 'chunked' });
        for (let at = 0; at < bytes.length; at += size) reply.piece(bytes.subarray(at, at + size));
        reply.finish();
      };
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.ok(!r.headers.has('content-type'));
      assert.equal(r.text, words + done, `pieces of ${size}`);
    }
    await tokens_are(nexus, 'prompt', 3, 93);
    const plain = JSON.stringify({ choices: [], usage });
    backend.answer = (request, reply) => {
      reply.head(200, { 'Transfer-Encoding': 'chunked' });
      reply.piece(Buffer.from(plain));
      reply.finish();
    };
    const r = await post(nexus.port, path, chat('m1', { stream: true }));
    assert.equal(r.status, 200);
    assert.equal(r.text, plain);
    await tokens_are(nexus, 'prompt', 4, 124);
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.sum('nexus_errors_total'), 0);
    assert.equal(page.sum('nexus_time_to_first_token_seconds_count'), 3);
  });

  test('no other event is held back while Nexus looks for that one', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    let reply;
    const begun = new Promise((resolve) => { backend.answer = (_, r) => { reply = r; r.stream(); resolve(); }; });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', path, {}, chat('m1', { stream: true }));
    await begun;
    await client.head();
    for (const event of [sse(chat_chunk('m1', 'One', { usage: null })), ': ping\n\n', sse({ choices: [], prompt_filter_results: [] }), sse(chat_chunk('m1', null, { usage: null }))]) {
      reply.piece(event);
      let got = '';
      while (got.length < event.length) got += await client.piece(3_000);
      assert.equal(got, event);
    }
    reply.piece(usage_event());
    reply.piece(done);
    reply.finish();
    let rest = '';
    for (let p = await client.piece(); p !== null; p = await client.piece()) rest += p;
    assert.equal(rest, done);
  });

  test('a stream that breaks right behind the usage event has its tokens and its error', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    backend.answer = async (_, reply) => {
      reply.stream();
      reply.piece(words + usage_event());
      await sleep(30);
      reply.reset();
    };
    const r = await post(nexus.port, path, chat('m1', { stream: true }));
    assert.equal(r.complete, false);
    assert.ok(r.text.startsWith(words));
    assert.match(r.text, /"error"/);
    await tokens_are(nexus, 'prompt', 1, 31);
  });

  test('a stream that was asked for usage may be answered by plain JSON, an error, or nothing', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const answers = [[200, 'application/json', JSON.stringify({ choices: [], usage })], [400, 'application/json', '{"error":{"message":"no"}}'], [500, 'text/plain', 'boom'], [204, null, null], [200, 'text/event-stream', ''],
                     [400, 'text/event-stream', sse({ error: { message: 'no' } })]];
    for (const [status, type, body] of answers) {
      backend.answer = (_, reply) => (body === null ? reply.head(status) : reply.body(status, body, { 'Content-Type': type }));
      const r = await post(nexus.port, path, chat('m1', { stream: true }));
      assert.equal(r.status, status);
      assert.equal(r.text, body ?? '');
      assert.ok(r.complete);
    }
  });

  test('a body with a known length loses the usage event and is still framed right', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    backend.answer = (_, reply) => reply.body(200, words + usage_event() + done, { 'Content-Type': 'text/event-stream' });
    const r = await post(nexus.port, path, chat('m1', { stream: true }));
    assert.ok(r.complete);
    assert.equal(r.text, words + done);
  });

  test('an event far longer than any buffer passes', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm' });
    const long = sse(chat_chunk('m1', 'x'.repeat(3_000_000), { usage: null }));
    backend.answer = streams(long + usage_event() + done, 70_000);
    assert.equal((await post(nexus.port, path, chat('m1', { stream: true }))).text, long + done);
  });
});
