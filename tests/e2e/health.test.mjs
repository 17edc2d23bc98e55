// Finding out what a backend is and has: every kind, every turn its health can take.
import { answer_probe, assert, chat, get, group, pair, post, settings, sleep, start_backend, start_nexus, test, until } from './harness.mjs';

const path = '/v1/chat/completions';
const health = async (nexus) => (await get(nexus.port, '/health')).json;
const models = async (nexus) => (await get(nexus.port, '/v1/models')).json.data.map((m) => m.id);

// kind, the page that tells its health, the page that lists its models.
const kinds = [['ollama', '/api/tags', '/api/tags'], ['vllm', '/v1/models', '/v1/models'], ['lmstudio', '/v1/models', '/v1/models'], ['openai', '/v1/models', '/v1/models'],
               ['exo', '/v1/models', '/v1/models'], ['generic', '/v1/models', '/v1/models'], ['llamacpp', '/health', '/v1/models']];

group('health', () => {
  for (const [kind, page, list] of kinds) {
    test(`a backend of type ${kind} is asked ${page}, and its models come from ${list}`, async (t) => {
      const { nexus, backend } = await pair(t, { kind, models: ['alpha:7b', 'beta'] });
      await until(async () => (await models(nexus)).length === 2, 'the models listed');
      assert.deepEqual(await models(nexus), ['alpha:7b', 'beta']);
      const asked = new Set(backend.probes.map((p) => p.path));
      assert.deepEqual([...asked].sort(), [...new Set([page, list])].sort());
      assert.equal((await post(nexus.port, path, chat('beta'))).status, 200);
    });
  }

  test('a fresh Nexus serves within a second', async (t) => {
    const backend = await start_backend(t);
    const started = performance.now();
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], health: { interval: '30s' } }, { ready: 'up' });
    await until(async () => (await post(nexus.port, path, chat())).status === 200, 'the first answer');
    assert.ok(performance.now() - started < 1_000 * settings.slow, `${Math.round(performance.now() - started)} ms`);
  });

  test('a backend becomes unhealthy after `failures` failed checks in a row and comes back after `recoveries` good ones', async (t) => {
    let good = true;
    const answers = [];
    const probe = (request, reply, backend) => {
      answers.push(good);
      return good ? answer_probe(request, reply, backend) : reply.json({ error: 'no' }, 500);
    };
    const { nexus } = await pair(t, { probe }, { health: { interval: '100ms', failures: 3, recoveries: 2 } });
    good = false;
    answers.length = 0;
    await until(async () => (await health(nexus)).status === 'unhealthy', 'unhealthy');
    const bad = answers.filter((a) => !a).length;
    assert.ok(bad >= 3 && bad <= 5, `${bad} failed checks`);
    good = true;
    answers.length = 0;
    await until(async () => (await health(nexus)).status === 'healthy', 'healthy again');
    const fine = answers.filter((a) => a).length;
    assert.ok(fine >= 2 && fine <= 4, `${fine} good checks`);
    const turns = await until(() => {
      const lines = nexus.log().split('\n').filter((l) => /\bb1\b/.test(l) && /healthy/.test(l));
      return lines.length >= 3 && lines;
    }, 'a line of the log a turn');
    assert.equal(turns.length, 3, `one line a turn: ${turns}`);
    assert.match(turns[1], /unhealthy.*500/, 'the log tells the turn and its reason');
    assert.doesNotMatch(turns[2], /unhealthy/);
  });

  test('one failed check between good ones changes nothing', async (t) => {
    let n = 0;
    const probe = (request, reply, backend) => (n++ % 3 === 1 ? reply.reset() : answer_probe(request, reply, backend));
    const { nexus } = await pair(t, { probe }, { health: { interval: '50ms', failures: 2, recoveries: 2 } });
    for (let i = 0; i < 30; i++) {
      assert.equal((await health(nexus)).status, 'healthy');
      await sleep(30);
    }
    assert.ok(n > 6, `${n} checks`);
  });

  for (const [what, probe] of [['never answers', () => {}], ['refuses', null], ['answers 503', (_, reply) => reply.json({ error: 'loading' }, 503)], ['speaks no HTTP', (_, reply) => { reply.raw('hello\r\n\r\n'); reply.fin(); }]]) {
    test(`a backend that ${what} from the start is unhealthy after its first check`, async (t) => {
      const backend = await start_backend(t, { probe });
      if (!probe) await backend.stop();
      const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend, type: 'generic' }], health: { interval: '30s', timeout: '300ms', failures: 3 } }, { ready: 'up' });
      await until(async () => (await health(nexus)).backends.unhealthy === 1, 'unhealthy', 3_000);
    });
  }

  test('llama.cpp that is still loading (503) is unhealthy until it answers ok', async (t) => {
    let loading = true;
    const probe = (request, reply, backend) => (loading && request.path === '/health' ? reply.json({ error: { message: 'Loading model' } }, 503) : answer_probe(request, reply, backend));
    const backend = await start_backend(t, { kind: 'llamacpp', probe });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], health: { interval: '100ms', recoveries: 1 } }, { ready: 'up' });
    await until(async () => (await health(nexus)).backends.unhealthy === 1, 'unhealthy');
    loading = false;
    await until(async () => (await health(nexus)).status === 'healthy', 'healthy');
    assert.equal((await post(nexus.port, path, chat())).status, 200);
  });

  test('the list of models is replaced as a whole, kept when it cannot be read, emptied when it is empty', async (t) => {
    let garbage = null;
    const probe = (request, reply, backend) => (garbage === null ? answer_probe(request, reply, backend) : reply.body(200, garbage, { 'Content-Type': 'application/json' }));
    const { nexus, backend } = await pair(t, { models: ['one', 'two'], probe }, { health: { interval: '80ms', failures: 100 } });
    assert.deepEqual(await models(nexus), ['one', 'two']);
    backend.models = ['two', 'three'];
    await until(async () => (await models(nexus)).join() === 'three,two', 'replaced');
    for (const text of ['not json', '{"data":"nope"}', '<html>', '{"data":[{"id":']) {
      garbage = text;
      const before = backend.probes.length;
      await until(() => backend.probes.length > before + 2, 'more checks');
      assert.deepEqual(await models(nexus), ['three', 'two'], `kept on ${text}`);
      assert.equal((await post(nexus.port, path, chat('two'))).status, 200);
    }
    garbage = null;
    backend.models = [];
    await until(async () => (await models(nexus)).length === 0, 'emptied');
    assert.equal((await post(nexus.port, path, chat('two'))).status, 404);
    backend.models = ['four'];
    await until(async () => (await models(nexus)).join() === 'four', 'filled again');
  });

  test('a fixed list of models stands, whatever the backend lists', async (t) => {
    const { nexus } = await pair(t, { models: ['listed'] }, { backend: { models: 'fixed-a, fixed-b' } });
    assert.deepEqual(await models(nexus), ['fixed-a', 'fixed-b']);
    assert.equal((await post(nexus.port, path, chat('fixed-a'))).status, 200);
    assert.equal((await post(nexus.port, path, chat('listed'))).status, 404);
  });

  test('a long list of models in many pieces is read whole', async (t) => {
    const names = Array.from({ length: 3000 }, (_, i) => `org-${i}/model-with-a-long-name-${i}`);
    const { nexus } = await pair(t, { models: names });
    assert.equal((await models(nexus)).length, 3000);
    assert.equal((await post(nexus.port, path, chat(names[2999]))).status, 200);
  });

  test('checks go on at the interval, and are spread over it when there are several backends', async (t) => {
    const backends = await Promise.all([1, 2, 3, 4].map(() => start_backend(t)));
    const interval = 400 * settings.slow;
    await start_nexus(t, { backends: backends.map((mock, i) => ({ name: `b${i}`, mock })), health: { interval: `${interval}ms` } });
    await sleep(0.75 * interval);
    for (const b of backends) b.probes.length = 0;
    await sleep(5 * interval);
    const counts = backends.map((b) => b.probes.length);
    assert.ok(counts.every((n) => n >= 3 && n <= 8), `${counts} checks in five intervals`);
    const phases = backends.map((b) => b.probes.at(-1).at % interval).sort((a, b) => a - b);
    assert.ok(phases.at(-1) - phases[0] > 0.15 * interval, `all within ${phases.at(-1) - phases[0]} ms`);
  });

  test('a backend may be given by host name', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', url: `http://localhost:${backend.port}`, type: 'generic' }] });
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    assert.equal(backend.requests[0].headers.get('host'), `localhost:${backend.port}`);
  });

  test('a host name that does not resolve makes that backend unhealthy and no other', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }, { name: 'lost', url: 'http://no-such-host.invalid:1', type: 'generic' }], health: { timeout: '1s', interval: '1s' } }, { ready: 'up' });
    await until(async () => (await health(nexus)).status === 'degraded', 'degraded', 8_000);
    await nexus.logged(/ warning DNS lookup failed backend=lost host=no-such-host\.invalid why=/);
    assert.equal((await post(nexus.port, path, chat())).status, 200);
  });

  test('probes do not count as requests and close or reuse their connections', async (t) => {
    const { nexus, backend } = await pair(t, {}, { health: { interval: '50ms' } });
    await until(() => backend.probes.length > 15, 'checks');
    await sleep(100);
    assert.ok(backend.open <= 3, `${backend.open} connections open`);
    const stats = await get(nexus.port, '/v1/stats');
    if (stats.status === 200) assert.equal(stats.json.requests.total, 0);
  });
});
