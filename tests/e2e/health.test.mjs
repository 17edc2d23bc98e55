// Finding out what a backend is and has: every kind, every turn its health can take.
import { answer_probe, assert, chat, get, group, pair, parse_metrics, post, run_nexus, settings, sleep, start_backend, start_nexus, test, until } from './harness.mjs';

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

  test('a backend whose requests fail is ejected, and the log, /metrics, /v1/stats, the status page and top say so', async (t) => {
    const dying = await start_backend(t);
    const other = await start_backend(t);
    const nexus = await start_nexus(t, {
      backends: [{ name: 'dying', mock: dying, priority: 1 }, { name: 'other', mock: other, priority: 2 }],
      routing: { strategy: 'priority' }, health: { interval: '1h', eject_after: 3, eject_time: '60s' },
    });
    const seconds_of_dying = async () => (await get(nexus.port, '/v1/stats')).json.backends[0].state_seconds;
    await until(async () => (await seconds_of_dying()) >= 2, 'it has been up for two seconds');
    await dying.stop();
    for (let i = 0; i < 6; i++) assert.equal((await post(nexus.port, path, chat())).status, 200);
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.value('nexus_backend_ejected', { backend: 'dying' }), 1);
    assert.equal(page.value('nexus_backend_ejected', { backend: 'other' }), 0);
    assert.equal(page.value('nexus_backend_up', { backend: 'dying' }), 1, 'no health check is due');
    assert.equal(page.value('nexus_backend_attempts_total', { backend: 'dying', outcome: 'connect_error' }), 3);
    const [stats_of_dying, stats_of_other] = (await get(nexus.port, '/v1/stats')).json.backends;
    assert.equal(stats_of_dying.ejected.why, 'connect_error');
    assert.ok(stats_of_dying.ejected.seconds_left > 0 && stats_of_dying.ejected.seconds_left <= 60, JSON.stringify(stats_of_dying));
    assert.equal(stats_of_other.ejected, null);
    assert.equal(stats_of_dying.state, 'ejected');
    assert.ok(stats_of_dying.state_seconds < stats_of_other.state_seconds, `since the ejection: ${stats_of_dying.state_seconds} s`);
    assert.match((await get(nexus.port, '/')).text, /2 of 2 backends healthy, 1 ejected.*>ejected for (1m )?\d+s<\/span><small class=\"why\">its requests fail \(connect_error\): /s);
    const top = await run_nexus(['top', `http://127.0.0.1:${nexus.port}`]);
    assert.match(top.stdout, /backends 2 of 2 healthy, 1 ejected/);
    assert.match(top.stdout, /^dying +ejected (1m )?\d+s .*\n  its requests fail \(connect_error\): /m);
    const lines = await until(() => {
      const all = nexus.log().split('\n');
      return all.some((line) => /is ejected/.test(line)) && all;
    }, 'the ejection in the log');
    const failed = lines.filter((line) => /request to a backend failed/.test(line));
    assert.ok(failed.length >= 1 && failed.length <= 2, `rate-limited: ${failed}`);
    assert.match(failed[0], /warning .* backend=dying why=connect_error detail="Connection refused" state=connecting request_id=\w+/);
    assert.match(lines.find((line) => /is ejected/.test(line)), /warning .* backend=dying why=connect_error for_ms=60000/);
  });

  test('a backend that is ejected and works again gets requests again, which the log says', async (t) => {
    const first = await start_backend(t);
    const second = await start_backend(t);
    const nexus = await start_nexus(t, {
      backends: [{ name: 'first', mock: first, priority: 1 }, { name: 'second', mock: second, priority: 2 }],
      routing: { strategy: 'priority' }, health: { interval: '1h', eject_after: 1, eject_time: '20ms' },
    });
    await until(async () => (await health(nexus)).backends.healthy === 2, 'both healthy');
    const good = first.answer;
    first.answer = (_, reply) => reply.json({}, 500);
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    first.answer = good;
    await until(async () => (await post(nexus.port, path, chat())).headers.get('x-nexus-backend') === 'first', 'first is used again');
    await until(() => /info "?backend gets requests again.*backend=first/.test(nexus.log()), 'its return in the log');
    assert.match(nexus.log(), /request to a backend failed.*backend=first why=status_5xx detail=500/);
    assert.equal((await get(nexus.port, '/v1/stats')).json.backends[0].ejected, null);
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

  for (const [what, probe] of [['wants keys of its clients', (_, reply) => reply.json({ error: 'no key' }, 401)], ['has no list', (_, reply) => reply.json({}, 404)], ['sends an interim answer first', (request, reply, backend) => { reply.raw('HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n'); answer_probe(request, reply, backend); }]]) {
    test(`a backend with a fixed list is healthy though it ${what}`, async (t) => {
      const { nexus } = await pair(t, { kind: 'vllm', probe }, { backend: { models: 'm1' } });
      assert.equal((await post(nexus.port, path, chat('m1'))).status, 200);
    });
  }

  test('Ollama serves a model of the tag latest without its tag', async (t) => {
    const { nexus } = await pair(t, { kind: 'ollama', models: ['llama3:latest'] });
    assert.equal((await post(nexus.port, path, chat('llama3'))).status, 200);
    assert.equal((await get(nexus.port, '/v1/models/llama3')).json.id, 'llama3');
    assert.deepEqual(await models(nexus), ['llama3:latest']);
  });

  const boots = { health: { interval: '30s' } };

  test('the first request waits for the first check of the only backend', async (t) => {
    const probe = (request, reply, backend) => setTimeout(() => answer_probe(request, reply, backend), 400);
    const backend = await start_backend(t, { probe });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], ...boots }, { ready: 'up' });
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    const metrics = (await get(nexus.port, '/metrics')).text;
    assert.match(metrics, /nexus_requests_total\{model="m1",backend="b1",status="200"\} 1/);
    const [, overhead] = /^nexus_overhead_seconds_sum (\S+)$/m.exec(metrics);
    assert.ok(Number(overhead) < 0.2, `the wait is not Nexus's own work, of which there were ${overhead} s`);
  });

  test('a request waits no longer than connect_timeout for a first check', async (t) => {
    const backend = await start_backend(t, { probe: () => {} });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], upstream: { connect_timeout: '300ms' }, ...boots }, { ready: 'up' });
    const started = performance.now();
    const r = await post(nexus.port, path, chat());
    assert.equal(r.status, 503);
    assert.equal(r.headers.get('retry-after'), '1');
    assert.ok(performance.now() - started >= 290);
  });

  test('before its server runs a client gets 503 and Retry-After, never 404, and an answer within 1.5 s of the start', async (t) => {
    const backend = await start_backend(t);
    await backend.stop();
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], ...boots }, { ready: 'up' });
    await nexus.logged(/backend is unhealthy backend=b1/);
    const stopped_until = performance.now() + 4_000;
    while (performance.now() < stopped_until) {
      const r = await post(nexus.port, path, chat());
      assert.equal(r.status, 503);
      assert.equal(r.headers.get('retry-after'), '1');
      await sleep(50);
    }
    await backend.start();
    const started = performance.now();
    await until(async () => (await post(nexus.port, path, chat())).status === 200, 'an answer');
    assert.ok(performance.now() - started < 1_500 * settings.slow, `${Math.round(performance.now() - started)} ms`);
  });

  test('OpenAI clients that begin before their server get their answer by their own retries', async (t) => {
    const { default: OpenAI } = await import('openai');
    const backend = await start_backend(t);
    await backend.stop();
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], ...boots }, { ready: 'up' });
    const client = new OpenAI({ baseURL: `http://127.0.0.1:${nexus.port}/v1`, apiKey: 'k', maxRetries: 2 });
    const answer = client.chat.completions.create({ model: 'm1', messages: [{ role: 'user', content: 'hi' }] });
    await nexus.logged(/backend is unhealthy backend=b1/);
    await backend.start();
    assert.equal((await answer).choices[0].message.role, 'assistant');
  });

  test('failed requests lead to early checks: a backend that was killed is unhealthy long before the interval', async (t) => {
    const { nexus, backend } = await pair(t, {}, boots);
    await backend.stop();
    await until(async () => {
      await post(nexus.port, path, chat());
      return (await health(nexus)).status === 'unhealthy';
    }, 'unhealthy', 10_000 * settings.slow);
    await nexus.logged(/backend is unhealthy backend=b1/);
    await backend.start();
    await until(async () => (await post(nexus.port, path, chat())).status === 200, 'healthy again', 10_000 * settings.slow);
  });

  test('a name without an address makes its backend unhealthy: an unknown model is 404, and no reload waits', async (t) => {
    const backend = await start_backend(t);
    const config = { backends: [{ name: 'b1', mock: backend }, { name: 'lost', url: 'http://no-such-host.invalid:1', type: 'vllm' }], ...boots };
    const nexus = await start_nexus(t, config, { ready: 'up' });
    await nexus.logged(/backend is unhealthy backend=lost/, 15_000);
    assert.equal((await post(nexus.port, path, chat('unheard'))).status, 404);
    assert.equal((await post(nexus.port, path, chat())).status, 200);
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
