// Which backend gets a request: one that serves its API, and another one after a server that does not know the path.
import { answer_of, unknown_path } from './api_shapes.mjs';
import { Ledger, label_of } from './ledger.mjs';
import { assert, assert_error, get, group, parse_metrics, post, request, start_backend, start_nexus, test, until } from './harness.mjs';

const asks = Object.fromEntries([['OpenAI', '/v1/responses'], ['Anthropic', '/v1/messages'], ['Anthropic', '/v1/messages/count_tokens'], ['vLLM', '/v1/rerank'], ['vLLM', '/rerank'], ['Cohere', '/v2/rerank'],
  ['vLLM', '/v1/score'], ['vLLM', '/tokenize'], ['OpenAI', '/v1/moderations'], ['a speech server', '/v1/audio/speech'], ['OpenAI', '/v1/images/generations'], ['llama.cpp', '/completion'], ['Ollama', '/api/chat'], ['Ollama', '/api/generate'],
  ['Ollama', '/api/show']].map(([server, path]) => {
  const streams = path === '/api/generate';
  return [path, answer_of(server, path, streams)];
}));
const answer_row = (request, reply) => {
  const row = asks[request.path];
  reply.body(200, Buffer.from(row.text, 'latin1'), { 'Content-Type': row.type });
};
const ask = (nexus, path) => post(nexus.port, path, JSON.stringify(asks[path].ask));
const served_by = (r) => r.headers.get('x-nexus-backend');

// Two backends of all models: `old` is preferred, `new` knows all paths.
async function old_and_new(t, conf = {}, old_conf = {}) {
  const old = await start_backend(t, { answer: answer_row });
  const fresh = await start_backend(t, { answer: answer_row });
  const nexus = await start_nexus(t, { routing: { strategy: 'priority', retries: 0 }, ...conf,
                                       backends: [{ name: 'old', mock: old, priority: 1, ...old_conf }, { name: 'new', mock: fresh, priority: 9 }] });
  return { nexus, old, fresh, ledger: new Ledger(nexus) };
}

group('api paths', () => {
  for (const server of Object.keys(unknown_path(''))) {
    test(`a path that a server does not know, in the words of ${server}, moves on to the next, and is not asked there again`, async (t) => {
      const { nexus, old, ledger } = await old_and_new(t);
      old.answer = (request, reply) => {
        const [status, type, body] = unknown_path(request.path)[server];
        return reply.body(status, body, { 'Content-Type': type });
      };
      await ledger.read(0);
      for (const [path, row] of Object.entries(asks)) {
        for (let i = 0; i < 2; i++) {
          const r = await ask(nexus, path);
          assert.equal(r.status, 200, `${path}: ${r.text}`);
          assert.equal(served_by(r), 'new', path);
          assert.equal(r.body.toString('latin1'), row.text);
          await ledger.expect(path, row, path);
        }
      }
      assert.deepEqual(old.requests.map((r) => r.path), Object.keys(asks), 'each path once');
      const page = await ledger.page();
      assert.equal(page.sum('nexus_backend_ejected'), 0);
      assert.equal(page.sum('nexus_backend_attempts_total', { backend: 'old' }) - page.sum('nexus_backend_attempts_total', { backend: 'old', outcome: 'ok' }), 0, 'it is no failure');
      assert.equal(page.sum('nexus_requests_total', { backend: 'old' }), 0);
      assert.equal(page.sum('nexus_fallbacks_total'), 0);
      await nexus.logged(/backend does not serve this path.* backend=old/);
    });
  }

  test('after the next good health check the path is asked there again', async (t) => {
    const { nexus, old } = await old_and_new(t, { health: { interval: '200ms' } });
    old.answer = (_, reply) => reply.json({ detail: 'Not Found' }, 404);
    assert.equal(served_by(await ask(nexus, '/v1/rerank')), 'new');
    old.answer = answer_row;   // it was upgraded
    await until(async () => served_by(await ask(nexus, '/v1/rerank')) === 'old', 'the upgraded backend to be asked');
  });

  test('a 404 about a model goes to the client as it is', async (t) => {
    const { nexus, old, fresh, ledger } = await old_and_new(t);
    const bodies = { '/v1/responses': { error: { message: 'The model `m1` does not exist.', type: 'NotFoundError', param: 'model', code: 404 } },
                     '/v1/messages': { type: 'error', error: { type: 'not_found_error', message: 'model: m1' }, request_id: 'req_1' }, '/api/chat': { error: "model 'm1' not found" } };
    await ledger.read(0);
    for (const [path, body] of Object.entries(bodies)) {
      old.answer = (_, reply) => reply.json(body, 404);
      const r = await ask(nexus, path);
      assert.equal(r.status, 404);
      assert.equal(r.text, JSON.stringify(body));
      assert.equal(served_by(r), 'old');
      assert.deepEqual(await ledger.read(), { requests: 1, endpoints: { [label_of(path)]: 1 }, errors: { bad_request: 1 } });
    }
    assert.equal(fresh.requests.length, 0);
  });

  test('where no backend serves the API it is a 501 that names who has the model, and nobody is asked', async (t) => {
    const { nexus, old, fresh, ledger } = await old_and_new(t, {}, { apis: 'chat, messages' });
    await ledger.read(0);
    nexus.reload({ routing: { strategy: 'priority' }, backends: [{ name: 'old', mock: old, apis: 'chat' }, { name: 'new', mock: fresh, apis: 'chat, embeddings' }] });
    await nexus.logged(/reloaded/);
    const refused = await until(async () => {
      const r = await ask(nexus, '/v1/rerank');
      ledger.sent += 1;
      return r.status === 501 && r;
    }, 'the new configuration');
    assert_error(refused, 501, 'api_not_served');
    for (const path of Object.keys(asks)) {
      const before = ledger.sent;
      await ledger.read(0);
      const r = await ask(nexus, path);
      assert.equal(r.status, 501, `${path}: ${r.text}`);
      assert.match(r.text, /old, new/, path);
      assert.ok(r.text.includes(`POST ${path}`), r.text);
      assert.deepEqual(await ledger.read(), { requests: 1, endpoints: { [label_of(path)]: 1 }, errors: { no_backend: 1 } }, path);
      assert.equal(ledger.sent, before + 1);
    }
    assert.ok(![...old.requests, ...fresh.requests].some((r) => !['/v1/rerank'].includes(r.path)));
  });

  test('a backend’s type says what it serves, unless apis says it', async (t) => {
    const serves = {
      ollama: ['/v1/responses', '/v1/messages', '/api/chat', '/api/show'], vllm: ['/v1/responses', '/v1/messages', '/v1/rerank', '/v1/score', '/tokenize'],
      llamacpp: ['/v1/responses', '/v1/messages', '/v1/rerank', '/tokenize', '/completion'], lmstudio: ['/v1/responses', '/v1/messages'], openai: ['/v1/responses', '/v1/moderations', '/v1/audio/speech', '/v1/images/generations'],
      anthropic: ['/v1/messages'], generic: Object.keys(asks),
    };
    const some = ['/v1/responses', '/v1/messages', '/v1/rerank', '/v1/score', '/tokenize', '/v1/moderations', '/v1/audio/speech', '/v1/images/generations', '/completion', '/api/chat', '/api/show'];
    const backends = [];
    for (const kind of Object.keys(serves)) backends.push({ name: kind, mock: await start_backend(t, { kind, models: [`of-${kind}`] }) });
    const two = await start_backend(t, { kind: 'vllm', models: ['of-two'] });
    for (const { mock } of [...backends, { mock: two }]) mock.answer = answer_row;
    const nexus = await start_nexus(t, { backends: [...backends, { name: 'two', mock: two, apis: 'rerank, ollama' }] });
    for (const [kind, paths] of Object.entries({ ...serves, two: ['/v1/rerank', '/api/chat', '/api/show'] })) {
      for (const path of some) {
        const r = await post(nexus.port, path, { ...asks[path].ask, model: `of-${kind}` });
        assert.equal(r.status, paths.includes(path) ? 200 : 501, `${kind} ${path}: ${r.text.slice(0, 200)}`);
      }
    }
  });

  test('a request without a model goes to a backend that serves its API, and an alias and a fallback work for every API', async (t) => {
    const { nexus, old, fresh } = await old_and_new(t, { aliases: { claude: 'm1' }, fallbacks: { gone: 'm1' } }, { apis: 'chat' });
    for (const [path, body] of [['/tokenize', { content: 'Hi' }], ['/completion', { prompt: 'Once' }], ['/v1/moderations', { input: 'Hi' }]]) {
      const r = await post(nexus.port, path, body);
      assert.equal(r.status, 200, `${path}: ${r.text}`);
      assert.equal(fresh.requests.at(-1).body.toString(), JSON.stringify(body));
    }
    for (const path of Object.keys(asks)) {
      for (const name of ['claude', 'm1']) {
        const r = await post(nexus.port, path, { ...asks[path].ask, model: name });
        assert.equal(r.status, 200, `${path}: ${r.text}`);
        assert.deepEqual(fresh.requests.at(-1).json, { ...asks[path].ask, model: 'm1' }, path);
      }
    }
    assert.equal(old.requests.length, 0);
    assert.ok(parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total', { model: 'claude' }) > 0);
  });

  test('a WebSocket is a clear 501; HEAD / is 200', async (t) => {
    const { nexus, old, fresh } = await old_and_new(t);
    const upgrade = { Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Version': '13', 'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ==' };
    for (const path of ['/v1/realtime?model=m1', '/v1/responses']) assert_error(await request(nexus.port, 'GET', path, { headers: upgrade }), 501, 'websocket_not_supported');
    for (const method of ['HEAD', 'GET']) assert.equal((await request(nexus.port, method, '/')).status, 200);
    assert.equal(old.requests.length + fresh.requests.length, 0);
  });

  test('images, tools and JSON mode are found in each API’s body, and decide who gets it', async (t) => {
    const { nexus, fresh } = await old_and_new(t, {}, { vision: 'none', tools: 'none', json_mode: 'none' });
    const image = 'iVBORw0KGgo=';
    const said = (content) => ({ messages: [{ role: 'user', content }] });
    const tool = { type: 'function', name: 'f', function: { name: 'f', parameters: {} } };
    const needs = {
      '/v1/responses': [{ input: [{ role: 'user', content: [{ type: 'input_image', image_url: `data:image/png;base64,${image}` }] }] }, { input: 'Hi', tools: [tool] }, { input: 'Hi', text: { format: { type: 'json_schema', name: 's', schema: {} } } }],
      '/v1/messages': [said([{ type: 'image', source: { type: 'base64', media_type: 'image/png', data: image } }]), { ...said('Hi'), tools: [{ name: 'f', input_schema: {} }] }],
      '/api/chat': [{ messages: [{ role: 'user', content: 'Hi', images: [image] }] }, { ...said('Hi'), tools: [tool] }, { ...said('Hi'), format: 'json' }, { ...said('Hi'), format: { type: 'object' } }],
      '/api/generate': [{ prompt: 'Hi', images: [image] }, { prompt: 'Hi', format: 'json' }],
    };
    for (const [path, bodies] of Object.entries(needs)) {
      for (const body of bodies) {
        const r = await post(nexus.port, path, { model: 'm1', ...body });
        assert.equal(r.status, 200, r.text);
        assert.equal(served_by(r), 'new', `${path} ${JSON.stringify(body)}`);
        assert.deepEqual(fresh.requests.at(-1).json, { model: 'm1', ...body });
      }
      assert.equal(served_by(await ask(nexus, path)), 'old', `${path}: a request without these needs`);
    }
  });

  test('a server of type anthropic gets its key both ways, others as a bearer alone', async (t) => {
    const hosted = await start_backend(t, { kind: 'anthropic', models: ['claude-1'], answer: answer_row });
    const own = await start_backend(t, { kind: 'vllm', models: ['m1'], answer: answer_row });
    const nexus = await start_nexus(t, { backends: [{ name: 'hosted', mock: hosted, api_key_file: t.file('a', 'sk-ant-own\n') }, { name: 'own', mock: own, api_key_file: t.file('b', 'sk-vllm-own\n') }] });
    for (const model of ['claude-1', 'm1']) await post(nexus.port, '/v1/messages', { ...asks['/v1/messages'].ask, model }, { headers: { 'x-api-key': 'theirs', 'anthropic-version': '2023-06-01' } });
    assert.deepEqual(['authorization', 'x-api-key', 'anthropic-version'].map((f) => hosted.requests[0].headers.get(f)), ['Bearer sk-ant-own', 'sk-ant-own', '2023-06-01']);
    assert.deepEqual(['authorization', 'x-api-key'].map((f) => own.requests[0].headers.get(f)), ['Bearer sk-vllm-own', '']);
    for (const probe of hosted.probes) assert.deepEqual([probe.path, probe.headers.get('x-api-key'), probe.headers.get('anthropic-version')], ['/v1/models?limit=1000', 'sk-ant-own', '2023-06-01']);
  });
});
