// The real clients of each API through Nexus: they get what the server sent, and each of their requests is counted.
import { answer_of, answers_as } from './api_shapes.mjs';
import { Ledger } from './ledger.mjs';
import { assert, get, group, pair, test } from './harness.mjs';

const module_of = (name, pick) => import(name).then(pick, () => null);
const OpenAI = await module_of('openai', (m) => m.default);
const Anthropic = await module_of('@anthropic-ai/sdk', (m) => m.default);
const Ollama = await module_of('ollama', (m) => m.Ollama);
const CohereClientV2 = await module_of('cohere-ai', (m) => m.CohereClientV2);

const makes = {
  openai: (port) => new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: 'sk-test', maxRetries: 0, timeout: 10_000 }),
  '@anthropic-ai/sdk': (port) => new Anthropic({ baseURL: `http://127.0.0.1:${port}`, apiKey: 'sk-ant-test', maxRetries: 0, timeout: 10_000 }),
  ollama: (port) => new Ollama({ host: `http://127.0.0.1:${port}` }),
  'cohere-ai': (port) => new CohereClientV2({ environment: `http://127.0.0.1:${port}`, token: 'co-test', maxRetries: 0, timeoutInSeconds: 10 }),
};
const installed = { openai: OpenAI, '@anthropic-ai/sdk': Anthropic, ollama: Ollama, 'cohere-ai': CohereClientV2 };

const plain = (value) => JSON.parse(JSON.stringify(value));
async function collect(stream) {
  const out = [];
  for await (const event of stream) out.push(plain(event));
  return out;
}

// A client of the package `name`, once straight to a backend that answers as `server`, once through Nexus.
async function both(t, name, server, { kind = 'generic' } = {}) {
  if (!installed[name]) t.skip(`npm package ${name} is not installed (cd tests && npm ci)`);
  const { nexus, backend } = await pair(t, { kind, answer: answers_as(server) });
  const ledger = new Ledger(nexus);
  await ledger.read(0);
  const clients = { direct: makes[name](backend.port), through: makes[name](nexus.port) };
  // The same call both ways: the results are equal, and the one through Nexus is counted as the row says.
  const same = async (path, streams, call) => {
    const row = answer_of(server, path, streams);
    const result = await call(clients.through);
    assert.deepEqual(result, await call(clients.direct), row.name);
    await ledger.expect(path, row, row.name);
    const [through, direct] = backend.requests.slice(-2);
    assert.equal(through.path, direct.path);
    assert.equal(through.body.toString(), direct.body.toString(), row.name);
    return result;
  };
  return { nexus, backend, ledger, ...clients, same };
}

const ask = { model: 'm1', input: 'Hi' };
const turn = { model: 'm1', max_tokens: 64, messages: [{ role: 'user', content: 'Hi' }] };

group('api clients', () => {
  test('openai: responses, created and streamed, from each server', async (t) => {
    for (const server of ['OpenAI', 'vLLM']) {
      const { same } = await both(t, 'openai', server);
      const { usage } = answer_of(server, '/v1/responses', false).text.startsWith('{') ? JSON.parse(answer_of(server, '/v1/responses', false).text) : {};
      const made = await same('/v1/responses', false, async (c) => plain(await c.responses.create(ask)));
      assert.equal(made.output_text, 'One two');
      assert.deepEqual(made.usage, usage);
    }
    for (const server of ['OpenAI', 'vLLM', 'llama.cpp', 'Ollama']) {
      const { same } = await both(t, 'openai', server);
      const events = await same('/v1/responses', true, async (c) => collect(await c.responses.create({ ...ask, stream: true })));
      assert.equal(events.at(-1).type, 'response.completed');
      if (server === 'llama.cpp') continue;   // its events lack the numbers that stream() goes by
      const final = await same('/v1/responses', true, async (c) => plain(await c.responses.stream(ask).finalResponse()));
      assert.equal(final.output[0].content[0].text, 'One two');
    }
  });

  test('openai: images, moderations and speech', async (t) => {
    const { same, through, backend } = await both(t, 'openai', 'OpenAI');
    const picture = await same('/v1/images/generations', false, async (c) => plain(await c.images.generate({ model: 'm1', prompt: 'a cat' })));
    assert.equal(picture.data[0].b64_json, 'aGVsbG8=');
    assert.equal((await same('/v1/images/generations', true, async (c) => collect(await c.images.generate({ model: 'm1', prompt: 'a cat', stream: true })))).length, 2);
    assert.equal((await same('/v1/moderations', false, async (c) => plain(await c.moderations.create({ input: 'Hi' })))).results[0].flagged, false);
    const sse = await same('/v1/audio/speech', true, async (c) => (await c.audio.speech.create({ model: 'm1', input: 'Hi', voice: 'alloy', stream_format: 'sse' })).text());
    assert.ok(sse.includes('speech.audio.done'));
    backend.answer = answers_as('a speech server');
    const sound = Buffer.from(await (await through.audio.speech.create({ model: 'm1', input: 'Hi', voice: 'alloy' })).arrayBuffer());
    assert.equal(sound.toString('latin1'), answer_of('a speech server', '/v1/audio/speech', false).text);
  });

  test('anthropic: messages, created and streamed, and their tokens counted', async (t) => {
    const { same } = await both(t, '@anthropic-ai/sdk', 'Anthropic');
    const made = await same('/v1/messages', false, async (c) => plain(await c.messages.create(turn)));
    assert.equal(made.content[0].text, 'One two');
    assert.equal(made.usage.cache_read_input_tokens, 400);
    assert.deepEqual(await same('/v1/messages/count_tokens', false, async (c) => plain(await c.messages.countTokens({ model: 'm1', messages: turn.messages }))), { input_tokens: 14 });
    for (const server of ['Ollama, an estimate first', 'vLLM, first releases', 'vLLM, cached counts only at the end', 'llama.cpp', 'Anthropic, all counts twice']) {
      const { same: same_stream } = await both(t, '@anthropic-ai/sdk', server);
      if (server !== 'vLLM, first releases') {   // whose messages have no usage, on which stream() fails
        const final = await same_stream('/v1/messages', true, async (c) => plain(await c.messages.stream(turn).finalMessage()));
        assert.equal(final.content[0].text, 'One two', server);
      }
      const events = await same_stream('/v1/messages', true, async (c) => collect(await c.messages.create({ ...turn, stream: true })));
      assert.equal(events.at(-1).type, 'message_stop', server);
    }
  });

  test('anthropic: the headers, the beta query and the list of models are as its clients need them', async (t) => {
    const { nexus, backend, through, direct } = await both(t, '@anthropic-ai/sdk', 'Anthropic');
    for (const client of [through, direct]) await client.beta.messages.create({ ...turn, betas: ['context-1m-2025-08-07'] }, { query: { beta: 'true' } });
    const [got, sent] = backend.requests;
    assert.equal(got.path, '/v1/messages?beta=true');
    assert.equal(got.headers.get('anthropic-beta'), 'context-1m-2025-08-07');
    const own = ['host', 'connection', 'content-length', 'transfer-encoding', 'accept-encoding'];
    for (const [name, value] of sent.headers.list) if (!own.includes(name.toLowerCase())) assert.equal(got.headers.get(name), value, name);
    const list = [];
    for await (const model of through.models.list({ limit: 1000 })) list.push([model.id, model.type]);
    assert.deepEqual(list, [['m1', 'model']]);
    const page = await get(nexus.port, '/v1/models?limit=1000', { headers: { 'anthropic-version': '2023-06-01' } });
    assert.equal(page.json.has_more, false);
    assert.equal(page.json.first_id, 'm1');
    assert.equal(page.json.last_id, 'm1');
    assert.equal((await get(nexus.port, '/v1/models')).json.object, 'list');
    assert.equal((await through.models.retrieve('m1')).id, 'm1');
    await assert.rejects(through.models.retrieve('nobody'), (e) => e instanceof Anthropic.NotFoundError && e.error.error.type === 'not_found_error');
  });

  test('ollama: chat, generate, embed and show, plain and streamed', async (t) => {
    const { same } = await both(t, 'ollama', 'Ollama', { kind: 'ollama' });
    const chat = { model: 'm1', messages: [{ role: 'user', content: 'Hi' }] };
    assert.equal((await same('/api/chat', false, async (c) => plain(await c.chat(chat)))).message.content, 'One two');
    const words = await same('/api/generate', true, async (c) => collect(await c.generate({ model: 'm1', prompt: 'Hi', stream: true })));
    assert.deepEqual(words.map((w) => w.response), ['One', '']);
    assert.equal((await same('/api/embed', false, async (c) => plain(await c.embed({ model: 'm1', input: ['a', 'b'] })))).embeddings.length, 2);
    assert.deepEqual((await same('/api/embeddings', false, async (c) => plain(await c.embeddings({ model: 'm1', prompt: 'a' })))).embedding.length, 2);
    assert.deepEqual((await same('/api/show', false, async (c) => plain(await c.show({ model: 'm1' })))).capabilities, ['completion']);
    const { same: same_stream } = await both(t, 'ollama', 'Ollama, streams unasked', { kind: 'ollama' });
    const pieces = await same_stream('/api/chat', true, async (c) => collect(await c.chat({ ...chat, stream: true })));
    assert.deepEqual(pieces.map((p) => p.message.content), ['One', ' two', '']);
  });

  test('ollama: an error line within a stream is thrown, and counted as an error', async (t) => {
    const { through, ledger } = await both(t, 'ollama', 'Ollama, an error line', { kind: 'ollama' });
    await assert.rejects(async () => collect(await through.chat({ model: 'm1', messages: [], stream: true })), /an error was encountered while running the model/);
    await ledger.expect('/api/chat', answer_of('Ollama, an error line', '/api/chat', true));
  });

  test('cohere: rerank, answered by Cohere, and by vLLM', async (t) => {
    const rank = { model: 'm1', query: 'q', documents: ['a', 'b'] };
    const { same, backend, through, ledger } = await both(t, 'cohere-ai', 'Cohere');
    const ranked = await same('/v2/rerank', false, async (c) => plain(await c.rerank(rank)));
    assert.deepEqual(ranked.results, [{ index: 1, relevanceScore: 0.99 }]);
    assert.equal(backend.requests[0].headers.get('authorization'), 'Bearer co-test');
    backend.answer = (request, reply) => answers_as('vLLM')({ json: request.json, path: '/v1/rerank' }, reply);
    assert.equal((await through.rerank(rank)).results[0].relevanceScore, 0.99);
    await ledger.expect('/v2/rerank', answer_of('vLLM', '/v1/rerank', false));
  });
});
