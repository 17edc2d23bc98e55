// A real OpenAI client library against Nexus: each call behaves as it does against the backend itself.
import { assert, chat_answer, chat_chunk, group, pair, pending_is, sse, test, until, within } from './harness.mjs';

const OpenAI = await import('openai').then((m) => m.default, () => null);
const messages = [{ role: 'user', content: 'Hi' }];

// The same call straight to the backend and through Nexus.
async function both(t, backend_options, conf) {
  if (!OpenAI) t.skip('npm package openai is not installed (cd tests && npm ci)');
  const { nexus, backend } = await pair(t, backend_options, conf);
  const make = (port) => new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: 'sk-test', maxRetries: 0, timeout: 10_000 });
  return { nexus, backend, direct: make(backend.port), through: make(nexus.port) };
}

const plain = (value) => JSON.parse(JSON.stringify(value));

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(plain(chunk));
  return chunks;
}

// Where Nexus asked for usage the backend puts `"usage": null` into every other event, and those bytes are its own.
const without_null_usage = ({ usage, ...chunk }) => (usage ? { usage, ...chunk } : chunk);

group('openai sdk', () => {
  test('a plain completion', async (t) => {
    const { direct, through, backend } = await both(t);
    const call = (c) => c.chat.completions.create({ model: 'm1', messages, temperature: 0.2 });
    assert.deepEqual(plain(await call(through)), plain(await call(direct)));
    assert.equal(backend.requests[0].headers.get('authorization'), 'Bearer sk-test');
    assert.equal(backend.requests[0].body.toString(), backend.requests[1].body.toString());
  });

  test('a legacy completion', async (t) => {
    const { direct, through } = await both(t);
    const call = (c) => c.completions.create({ model: 'm1', prompt: 'Once' });
    assert.deepEqual(plain(await call(through)), plain(await call(direct)));
  });

  test('a streamed completion, with and without usage', async (t) => {
    const { direct, through } = await both(t, { kind: 'vllm' });
    for (const options of [{}, { stream_options: { include_usage: true } }]) {
      const call = (c) => c.chat.completions.create({ model: 'm1', messages, stream: true, ...options });
      assert.deepEqual((await collect(await call(through))).map(without_null_usage), (await collect(await call(direct))).map(without_null_usage));
    }
  });

  test('the stream helper puts the message together', async (t) => {
    const { through } = await both(t);
    const stream = through.chat.completions.stream({ model: 'm1', messages });
    assert.equal((await stream.finalChatCompletion()).choices[0].message.content, 'One two three');
  });

  test('embeddings', async (t) => {
    const { direct, through } = await both(t);
    const call = (c) => c.embeddings.create({ model: 'm1', input: ['a', 'b'], encoding_format: 'float' });
    assert.deepEqual(plain(await call(through)), plain(await call(direct)));
  });

  test('the list of models, and one of them', async (t) => {
    const { through } = await both(t, { models: ['org/m1', 'm2'] });
    const list = [];
    for await (const model of through.models.list()) list.push(model.id);
    assert.deepEqual(list, ['m2', 'org/m1']);
    assert.equal((await through.models.retrieve('org/m1')).id, 'org/m1');
  });

  test('a tool call, plain and streamed', async (t) => {
    const tool_calls = [{ id: 'call_1', type: 'function', function: { name: 'weather', arguments: '{"city":"Zürich"}' } }];
    const answer = (request, reply) => {
      if (!request.json.stream) {
        const value = chat_answer('m1', null);
        value.choices[0] = { index: 0, finish_reason: 'tool_calls', logprobs: null, message: { role: 'assistant', content: null, tool_calls, refusal: null } };
        return reply.json(value);
      }
      reply.stream();
      for (const delta of [{ role: 'assistant', tool_calls: [{ index: 0, id: 'call_1', type: 'function', function: { name: 'weather', arguments: '' } }] },
                           { tool_calls: [{ index: 0, function: { arguments: '{"city":' } }] }, { tool_calls: [{ index: 0, function: { arguments: '"Zürich"}' } }] }]) {
        reply.piece(sse({ ...chat_chunk('m1', ''), choices: [{ index: 0, delta, finish_reason: null }] }));
      }
      reply.piece(sse({ ...chat_chunk('m1', ''), choices: [{ index: 0, delta: {}, finish_reason: 'tool_calls' }] }));
      reply.piece(sse('[DONE]'));
      reply.finish();
    };
    const { direct, through, backend } = await both(t, { answer });
    const tools = [{ type: 'function', function: { name: 'weather', parameters: { type: 'object', properties: { city: { type: 'string' } } } } }];
    const call = (c) => c.chat.completions.create({ model: 'm1', messages, tools });
    assert.deepEqual(plain(await call(through)), plain(await call(direct)));
    assert.deepEqual(backend.requests[0].json.tools, tools);
    const final = await through.chat.completions.stream({ model: 'm1', messages, tools }).finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, '{"city":"Zürich"}');
  });

  test('an error of the backend is the same exception', async (t) => {
    const answer = (_, reply) => reply.json({ error: { message: 'too long', type: 'invalid_request_error', param: 'messages', code: 'context_length_exceeded' } }, 400);
    const { direct, through } = await both(t, { answer });
    const failure = (c) => c.chat.completions.create({ model: 'm1', messages }).then(() => null, (e) => e);
    const [a, b] = [await failure(through), await failure(direct)];
    assert.equal(a.constructor.name, b.constructor.name);
    assert.ok(a instanceof OpenAI.BadRequestError);
    assert.deepEqual([a.status, a.code, a.param, a.type, a.message], [b.status, b.code, b.param, b.type, b.message]);
  });

  test('an error of Nexus’s own is the exception that a client of OpenAI expects', async (t) => {
    const { through } = await both(t);
    const error = await through.chat.completions.create({ model: 'gpt-9', messages }).then(() => null, (e) => e);
    assert.ok(error instanceof OpenAI.NotFoundError, `${error}`);
    assert.equal(error.code, 'model_not_found');
    assert.ok(error.requestID, 'the request id is where the library looks for it');
  });

  test('a stream that the backend breaks is an exception, not a short answer', async (t) => {
    const answer = (_, reply) => {
      reply.stream();
      reply.piece(sse(chat_chunk('m1', 'One')));
      setTimeout(() => reply.reset(), 50);
    };
    const { through } = await both(t, { answer });
    const seen = [];
    const failed = await (async () => {
      for await (const chunk of await through.chat.completions.create({ model: 'm1', messages, stream: true })) seen.push(chunk.choices[0].delta.content);
    })().then(() => null, (e) => e);
    assert.deepEqual(seen, ['One']);
    assert.ok(failed, 'the iteration throws');
  });

  test('a stream that the client cancels is closed at the backend', async (t) => {
    const answer = (_, reply) => {
      reply.stream();
      reply.piece(sse(chat_chunk('m1', 'One')));
    };
    const { through, backend, nexus } = await both(t, { answer });
    const stream = await through.chat.completions.create({ model: 'm1', messages, stream: true });
    for await (const chunk of stream) {
      assert.equal(chunk.choices[0].delta.content, 'One');
      break;
    }
    stream.controller.abort();
    await within(2_000, backend.requests[0].connection.ended, 'the backend connection closed');
    await pending_is(nexus, 0);
  });

  test('50 calls at once on one client', async (t) => {
    const { through, backend } = await both(t);
    const answers = await Promise.all(Array.from({ length: 50 }, (_, i) => (i % 2 ? through.chat.completions.create({ model: 'm1', messages })
      : through.chat.completions.create({ model: 'm1', messages, stream: true }).then(collect))));
    for (const [i, a] of answers.entries()) assert.equal(i % 2 ? a.choices[0].message.content : a.length, i % 2 ? 'Hello there.' : 4);
    await until(() => backend.requests.length === 50, 'all there');
  });
});

