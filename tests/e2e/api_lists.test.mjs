// Ollama's lists over a fleet, as its clients read them: models, loaded models, the version; and who may change models.
import { Ledger } from './ledger.mjs';
import { answer_probe, assert, get, group, parse_metrics, request, start_backend, start_nexus, test } from './harness.mjs';

const Ollama = await import('ollama').then((m) => m.Ollama, () => null);

const entry = (name, size) => ({ name, model: name, modified_at: '2026-05-10T08:06:48.639712648-07:00', size, digest: `digest-of-${name}`, details: { parent_model: '', format: 'gguf', family: 'qwen2', families: ['qwen2'], parameter_size: '7.6B', quantization_level: 'Q4_K_M' } });
const loaded = (name) => ({ ...entry(name, 5), expires_at: '2026-06-04T14:38:31.83753-07:00', size_vram: 5137025024, context_length: 4096 });

// A server like Ollama: `pages` of GET requests; the rest are probes.
const ollama_pages = (pages) => (req, reply, backend) => (pages[req.path] ? reply.json(pages[req.path]) : answer_probe(req, reply, backend));

async function fleet(t, conf = {}) {
  if (!Ollama) t.skip('npm package ollama is not installed (cd tests && npm ci)');
  const one = await start_backend(t, { kind: 'ollama', models: ['llama3:8b'], probe: ollama_pages({ '/api/tags': { models: [entry('llama3:8b', 1)] }, '/api/ps': { models: [loaded('llama3:8b')] }, '/api/version': { version: '0.13.10' } }) });
  const two = await start_backend(t, { kind: 'ollama', models: ['qwen:7b'], probe: ollama_pages({ '/api/tags': { models: [entry('qwen:7b', 2)] }, '/api/ps': { models: [] }, '/api/version': { version: '0.13.9' } }) });
  const vllm = await start_backend(t, { kind: 'vllm', models: ['org/m1'] });
  const nexus = await start_nexus(t, { ...conf, aliases: { best: 'qwen:7b' }, backends: [{ name: 'one', mock: one }, { name: 'two', mock: two }, { name: 'gpu', mock: vllm }] });
  return { one, two, vllm, nexus, client: new Ollama({ host: `http://127.0.0.1:${nexus.port}` }) };
}

group('api lists', () => {
  test('ollama: list has every model of the fleet, with its server’s own entry where that is Ollama', async (t) => {
    const { client, nexus } = await fleet(t);
    const { models } = await client.list();
    const by_name = Object.fromEntries(models.map((m) => [m.name, m]));
    assert.deepEqual(Object.keys(by_name).sort(), ['best', 'llama3:8b', 'org/m1', 'qwen:7b']);
    assert.deepEqual(by_name['llama3:8b'], entry('llama3:8b', 1));
    for (const [name, m] of Object.entries(by_name)) assert.equal(m.model, name);
    assert.equal((await request(nexus.port, 'HEAD', '/api/tags')).status, 200);
    assert.equal(parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total'), 0, 'a list is no request');
  });

  test('ollama: ps joins what the servers have loaded, and version is the lowest', async (t) => {
    const { client, one, vllm } = await fleet(t);
    assert.deepEqual((await client.ps()).models.map((m) => m.name), ['llama3:8b']);
    assert.deepEqual((await client.version()).version, '0.13.9');
    assert.ok(!vllm.probes.some((p) => p.path.startsWith('/api/')), 'only servers of this API are asked');
    await one.stop();
    assert.deepEqual((await client.version()).version, '0.13.9');
    assert.deepEqual((await client.ps()).models, []);
  });

  test('ollama: changes of models are refused with 403, and counted', async (t) => {
    const { client, nexus, one, two } = await fleet(t);
    const ledger = new Ledger(nexus);
    await ledger.read(0);
    const refused = (e) => e.status_code === 403 && /ollama_admin/.test(e.message);
    await assert.rejects(client.pull({ model: 'x' }), refused);
    await assert.rejects(client.push({ model: 'x' }), refused);
    await assert.rejects(client.create({ model: 'x', from: 'y' }), refused);
    await assert.rejects(client.copy({ source: 'x', destination: 'y' }), refused);
    await assert.rejects(client.delete({ model: 'x' }), refused);
    assert.deepEqual(Object.keys((await request(nexus.port, 'POST', '/api/blobs/sha256:00', { body: 'x' })).json), ['error']);
    const added = await ledger.read(6);
    assert.deepEqual([added.requests, added.errors], [6, { bad_request: 6 }]);
    assert.equal(one.requests.length + two.requests.length, 0);
  });

  test('ollama: with ollama_admin that backend gets them', async (t) => {
    const { client, one, two } = await fleet(t, { server: { ollama_admin: 'two' } });
    const progress = [{ status: 'pulling manifest' }, { status: 'pulling', digest: 'sha256:1', total: 2, completed: 1 }, { status: 'success' }];
    two.answer = (_, reply) => {
      reply.head(200, { 'Content-Type': 'application/x-ndjson', 'Transfer-Encoding': 'chunked' });
      for (const line of progress) reply.piece(`${JSON.stringify(line)}\n`);
      reply.finish();
    };
    const seen = [];
    for await (const part of await client.pull({ model: 'nobody', stream: true })) seen.push(part);
    assert.deepEqual(seen, progress);
    two.answer = (_, reply) => reply.body(200, '', {});
    await client.delete({ model: 'qwen:7b' });
    assert.deepEqual(two.requests.map((r) => [r.method, r.path]), [['POST', '/api/pull'], ['DELETE', '/api/delete']]);
    assert.equal(one.requests.length, 0);
  });
});
