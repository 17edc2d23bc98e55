// Three in the morning: when something fails, the log, the statistics, the status page, `nexus top` and the access log say
// what, since when, why, and what to do.
import { RawClient, assert, assert_error, chat, free_port, get, group, parse_metrics, post, run_nexus, settings, start_backend, start_nexus, test, until } from './harness.mjs';
import { start_child_backend } from './fleet.mjs';

const completions = '/v1/chat/completions';
const of = (stats, name) => stats.backends.find((b) => b.id === name);

// Each view of a backend, by name.
async function views(nexus, name) {
  const stats = (await get(nexus.port, '/v1/stats')).json;
  const page = (await get(nexus.port, '/')).text;
  const top = (await run_nexus(['top', `http://127.0.0.1:${nexus.port}`])).stdout;
  const row = new RegExp(`<bdi>${name}</bdi>(.*?)</th>`, 's').exec(page)?.[1] ?? '';
  const lines = top.split('\n');
  const at = lines.findIndex((line) => line.startsWith(`${name} `));
  return { stats: of(stats, name), page: row.replace(/<[^>]+>/g, ' '), title: /<title>(.*?)<\/title>/.exec(page)[1], top: `${lines[at]} ${lines[at + 1]}`, all: stats };
}

group('why', () => {
  test('a backend is killed under load: within two seconds everything says which and why', { limit_ms: 40_000 }, async (t) => {
    const victim = await start_child_backend(t), other = await start_backend(t);
    const nexus = await start_nexus(t, {
      health: { interval: '500ms', failures: 2 }, log: { access: 'off' },
      backends: [{ name: 'victim', mock: victim, models: 'm1' }, { name: 'other', mock: other, models: 'm1' }],
    });
    let running = true;
    const load = Array.from({ length: 4 }, async () => { while (running) assert.equal((await post(nexus.port, completions, chat('m1'))).status, 200); });
    victim.kill('SIGKILL');
    const killed = performance.now();
    let seen = {};
    await until(async () => {
      seen.stats = of((await get(nexus.port, '/v1/stats')).json, 'victim');
      return seen.stats.state !== 'up' && /Connection refused|connect_error/.test(seen.stats.why);
    }, () => `the statistics: ${JSON.stringify(seen.stats)}`);
    const took = performance.now() - killed;
    running = false;
    await Promise.all(load);
    assert.ok(took < 2000 * settings.slow, `it took ${Math.round(took)} ms`);
    assert.ok(['down', 'ejected'].includes(seen.stats.state), seen.stats.state);
    assert.match((await get(nexus.port, '/')).text, /<title>Nexus: (1 of 2 healthy|2 of 2 healthy, 1 ejected)<\/title>/);
    await nexus.logged(/backend=victim why="?connect/);
    await until(async () => (seen = await views(nexus, 'victim')).stats.state === 'down', 'the checks fail');
    assert.match(seen.stats.why, /Connection refused: is it running, and on this port\?/);
    assert.ok(seen.stats.failed_attempts.connect_error > 0 || seen.stats.failed_attempts.closed > 0 || Object.keys(seen.stats.failed_attempts).length > 0);
    assert.match(seen.page, /down \d+s .*Connection refused: is it running, and on this port\? .*checked \d+s ago, next in \d+s/s);
    assert.equal(seen.title, 'Nexus: 1 of 2 healthy');
    assert.match(seen.top, /^victim +DOWN \d+s .*Connection refused: is it running/);
    await nexus.logged(/backend is unhealthy backend=victim why=".*Connection refused: is it running, and on this port\?"/);
  });

  test('a wrong key, type, path and name, and a dead port, each read differently and say what to do', async (t) => {
    const keyed = await start_backend(t, { probe: (_, reply) => reply.json({ error: { message: 'no' } }, 401) });
    const plain = await start_backend(t, { models: ['m1'], probe: (request, reply) => reply.json({}, 404) });
    const nexus = await start_nexus(t, {
      health: { interval: '500ms' },
      backends: [
        { name: 'keyed', url: keyed.url, type: 'openai' },
        { name: 'mistyped', url: plain.url, type: 'ollama' },
        { name: 'path', url: `${plain.url}/v1/chat/completions`, type: 'vllm' },
        { name: 'nowhere', url: 'http://nexus-why.invalid:8000', type: 'vllm' },
        { name: 'dead', url: `http://127.0.0.1:${await free_port()}`, type: 'vllm' },
      ],
    }, { ready: 'up' });
    const expected = {
      keyed: /^it requires an API key \(401\): set api_key_env or api_key_file$/,
      mistyped: /^it answered 404: is type = ollama right\? `nexus check` finds it out$/,
      path: /its url ends in \/chat\/completions, which Nexus adds itself: remove that$/,
      nowhere: /^host name not resolved: /,
      dead: /Connection refused: is it running, and on this port\?$/,
    };
    let stats;
    await until(async () => {
      stats = (await get(nexus.port, '/v1/stats')).json;
      return Object.entries(expected).every(([name, why]) => of(stats, name).state === 'down' && why.test(of(stats, name).why));
    }, () => JSON.stringify(stats.backends.map(({ id, state, why }) => [id, state, why])));
    assert.equal(of(stats, 'keyed').url, keyed.url);
    assert.equal(of(stats, 'keyed').type, 'openai');
    assert.ok(of(stats, 'keyed').next_check_seconds >= 0);
  });

  test('backends that share one label in the metrics are warned of, and one that is down shows in their series', async (t) => {
    const live = await start_backend(t);
    const nexus = await start_nexus(t, {
      health: { interval: '300ms', failures: 1 },
      backends: [{ name: 'gpu-1', mock: live }, { name: 'gpu_1', url: `http://127.0.0.1:${await free_port()}` }],
    }, { ready: 'up' });
    await nexus.logged(/ warning "?these backends share one label in the metrics.* backends="?gpu-1, gpu_1/);
    await until(async () => parse_metrics((await get(nexus.port, '/metrics')).text).value('nexus_backends_healthy') === 1, 'one of them healthy');
    assert.equal(parse_metrics((await get(nexus.port, '/metrics')).text).value('nexus_backend_up', { backend: 'gpu_1' }), 0);
  });

  test('a full queue reads as full: in the response, the statistics, top and the log', async (t) => {
    const slow = await start_backend(t, { answer: () => {} });
    const nexus = await start_nexus(t, { log: { access: 'off' }, queue: { size: 1 }, backends: [{ name: 'small', mock: slow, models: 'm1', max_pending: 1 }] });
    const held = [];
    const gauge = async (name) => parse_metrics((await get(nexus.port, '/metrics')).text).sum(name);
    for (const name of ['nexus_backend_in_flight', 'nexus_queue_depth']) {
      const client = await RawClient.connect(nexus.port);
      client.send('POST', completions, { 'Content-Type': 'application/json' }, chat('m1'));
      held.push(client);
      await until(async () => (await gauge(name)) === 1, name);
    }
    const refused = await post(nexus.port, completions, chat('m1'), { headers: { 'X-Request-Id': 'full-1' } });
    assert_error(refused, 429, 'queue_full');
    const { stats, top, all } = await views(nexus, 'small');
    assert.deepEqual([stats.state, stats.in_flight, stats.queued, stats.max_pending], ['up', 1, 1, 1]);
    assert.deepEqual([all.failures[0].status, all.failures[0].error_type, all.failures[0].request_id], [429, 'overloaded', 'full-1']);
    assert.match(top, /^small +up/);
    await nexus.logged(/request failed request_id=full-1 .*status=429 error_type=overloaded/);
    for (const client of held) client.close();
  });

  test('the last failures are listed with time, model, backend, status, type and id, and not the clients that left', async (t) => {
    const backend = await start_backend(t, { answer: (request, reply) => reply.json({ error: { message: 'made up' } }, 500) });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] });
    const broken = await post(nexus.port, completions, chat('m1'), { headers: { 'X-Request-Id': 'night-1' } });
    const unknown = await post(nexus.port, completions, chat('nobody'), { headers: { 'X-Request-Id': 'night-2' } });
    assert.deepEqual([broken.status, unknown.status], [500, 404]);
    const { failures } = (await get(nexus.port, '/v1/stats')).json;
    assert.deepEqual(failures.map(({ model, backend: at, status, request_id }) => [model, at, status, request_id]), [['nobody', '', 404, 'night-2'], ['m1', 'b1', 500, 'night-1']]);
    for (const { time, error_type } of failures) {
      assert.ok(Math.abs(new Date(time) - Date.now()) < 60_000, time);
      assert.match(error_type, /^\w+$/);
    }
    assert.match((await get(nexus.port, '/')).text, /<td>m1<\/td><td>b1<\/td><td>night-1<\/td>/);
    await nexus.logged(/request failed request_id=night-1 key=\S+ model=m1 status=500 error_type=\w+ tries="?b1:status_5xx:\d+"? duration_ms=\d+ left_out=0/);
  });

  test('a line of the access log says why a request was slow: queue, connection, each attempt, and the trace', async (t) => {
    const broken = await start_backend(t, { answer: (request, reply) => reply.json({ error: { message: 'made up' } }, 503) });
    const good = await start_backend(t);
    const nexus = await start_nexus(t, {
      log: { access: 'stderr', format: 'json' }, routing: { strategy: 'priority' },
      backends: [{ name: 'broken', mock: broken, priority: 1 }, { name: 'good', mock: good, priority: 2 }],
    });
    const trace = '4bf92f3577b34da6a3ce929d0e0e4736';
    const answer = await post(nexus.port, completions, chat('m1'), { headers: { 'X-Request-Id': 'slow-1', traceparent: `00-${trace}-00f067aa0ba902b7-01` } });
    assert.equal(answer.status, 200);
    await nexus.logged(/"request_id":"slow-1".*"tries"/);
    const line = JSON.parse(nexus.stderr.split('\n').find((text) => text.includes('"request_id":"slow-1"') && text.includes('"tries"')));
    assert.match(line.tries, /^broken:status_5xx:\d+ good:ok:\d+$/);
    assert.equal(line.trace_id, trace);
    assert.equal(line.endpoint, 'chat');
    assert.equal(line.stream, false);
    assert.match(line.route, /^retry after .*, priority$/);
    assert.equal(line.request_bytes, JSON.stringify(chat('m1')).length);
    assert.equal(line.queue_ms, 0);
    assert.ok(line.connect_ms >= 0 && line.connect_ms <= line.duration_ms);
    assert.ok('cached_tokens' in line);
    for (const bad of ['garbage', `00-${trace.toUpperCase()}-00f067aa0ba902b7-01`, `00-${trace}`]) {
      await post(nexus.port, completions, chat('m1'), { headers: { 'X-Request-Id': `bad-${bad.length}`, traceparent: bad } });
      await nexus.logged(new RegExp(`"request_id":"bad-${bad.length}".*"tries"`));
      assert.equal(JSON.parse(nexus.stderr.split('\n').find((text) => text.includes(`"request_id":"bad-${bad.length}"`) && text.includes('"tries"'))).trace_id, null, bad);
    }
  });

  test('a reload says what has changed, and a new list of models which', async (t) => {
    const backend = await start_backend(t, { models: ['m1', 'm2'] });
    const conf = (more) => ({ health: { interval: '500ms' }, ...more, backends: [{ name: 'b1', mock: backend }, ...(more.backends ?? [])] });
    const nexus = await start_nexus(t, conf({}));
    nexus.write_conf(conf({ routing: { strategy: 'priority' }, backends: [{ name: 'echo', type: 'echo' }] }));
    nexus.child.kill('SIGHUP');
    await nexus.logged(/info reloaded changed="\[backend echo\] added; \[routing\] strategy"/);
    nexus.write_conf(conf({}));
    nexus.child.kill('SIGHUP');
    await nexus.logged(/info reloaded changed="\[backend echo\] removed; \[routing\] strategy"/);
    backend.models = ['m2', 'm3'];
    await nexus.logged(/backend models changed backend=b1 .*changed="-m1, \+m3"/);
  });
});
