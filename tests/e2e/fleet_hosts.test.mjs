// More than one host: Nexus shares nothing, so a fleet is many of them. Two processes stand for two hosts; a real
// Prometheus, the files of contrib/, and a Nexus behind a Nexus.
import net from 'node:net';
import { answer_plainly, assert, assert_error, chat, chat_answer, free_port, get, group, page_after, parse_metrics, post, sleep, sse_events, start_backend, start_nexus, test, until } from './harness.mjs';
import { close_to, need_program, only_value, repository, repository_file, run_beside, start_prometheus, with_replaced } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const fast = { 'scrape_interval: 15s': 'scrape_interval: 200ms\n  scrape_timeout: 200ms' };
const metrics_of = async (nexus) => parse_metrics((await get(nexus.pages ?? nexus.port, '/metrics')).text);
const alice = { headers: { Authorization: 'Bearer sk-alice-0123456789' } };

// A relay to the port that `port()` names when a connection comes: its url does not show to whom it leads.
async function relay(t, port) {
  const sockets = new Set();
  const server = net.createServer((from) => {
    const to = net.connect(port(), '127.0.0.1');
    for (const [one, other] of [[from, to], [to, from]]) {
      sockets.add(one);
      one.on('error', () => {}).on('close', () => other.destroy());
      one.pipe(other);
    }
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  t.after(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return `http://127.0.0.1:${server.address().port}`;
}

// Requests to each in turn, one of ten an error at the backend; two at once, of which one waits.
async function some_load(fleet, count) {
  for (let i = 0; i < count; i += 4) {
    await Promise.all([0, 1, 2, 3].map((j) => post(fleet[j % fleet.length].port, endpoint, chat('m1', { n: i + j, stream: j === 0 }), alice)));
  }
}

async function two_hosts(t) {
  const answer = async (incoming, reply) => {
    await sleep(incoming.json.n % 7);
    if (incoming.json.n % 10 === 9) return reply.json({ error: { message: 'made up' } }, 500);
    return answer_plainly(incoming, reply);
  };
  const backend = await start_backend(t, { kind: 'vllm', answer });
  const conf = (pages) => ({ server: { api_keys_file: t.file('keys', 'alice sk-alice-0123456789\n'), metrics_listen: `127.0.0.1:${pages}` }, queue: { size: 9 }, slo: { ttft: '1s' }, backends: [{ name: 'gpu', mock: backend, max_pending: 1 }], routing: { retries: 0 }, health: { eject_after: 1000, interval: '300ms' } });
  const start = async (pages) => Object.assign(await start_nexus(t, conf(pages), { ready: 'no' }), { pages });
  const fleet = [await start(await free_port()), await start(await free_port())];
  for (const { pages } of fleet) await until(async () => (await get(pages, '/health').catch(() => ({}))).json?.status === 'healthy', 'a healthy backend');
  await some_load(fleet, 20);   // every series is there before the first scrape
  return fleet;
}

const total_over = async (fleet, name, labels) => (await Promise.all(fleet.map(metrics_of))).reduce((sum, page) => sum + page.sum(name, labels), 0);

// What the rules recorded, against the pages of both: rate × window is the increase within it.
async function check_recorded(fleet, prometheus, before, labels) {
  const window = 300;
  const fields = Object.entries(labels).map(([k, v]) => `${k}="${v}"`).join();
  const recorded = async (name, more = '') => only_value(await prometheus.query(`${name}{${fields}${more}}`), name);
  const increase = async (name, of) => (await total_over(fleet, name, of)) - before.reduce((sum, page) => sum + page.sum(name, of), 0);
  const checks = [
    ['fleet:nexus_requests:rate5m', '', 'nexus_requests_total', {}],
    ['model:nexus_requests:rate5m', ',model="m1"', 'nexus_requests_total', { model: 'm1' }],
    ['backend:nexus_requests:rate5m', ',backend="gpu"', 'nexus_requests_total', { backend: 'gpu' }],
    ['fleet:nexus_errors:rate5m', '', 'nexus_errors_total', {}],
    ['key:nexus_requests:rate5m', ',key="alice"', 'nexus_key_requests_total', { key: 'alice' }],
    ['key_type:nexus_tokens:rate5m', ',key="alice",type="completion"', 'nexus_key_tokens_total', { key: 'alice', type: 'completion' }],
    ['type:nexus_tokens:rate5m', ',type="completion"', 'nexus_tokens_total_sum', { type: 'completion' }],
  ];
  for (const [rule, more, name, of] of checks) {
    const expected = await increase(name, of);
    assert.ok(expected > 0, `${name} moved`);
    // rate() stretches what it saw by up to an interval on each side: 20 % covers that.
    close_to((await recorded(rule, more)) * window, expected, 0.2, rule);
  }
  const waits = async (part) => increase(`nexus_key_queue_wait_seconds_${part}`, { key: 'alice' });
  close_to(await recorded('key:nexus_queue_wait_seconds:mean_rate5m', ',key="alice"'), (await waits('sum')) / (await waits('count')), 0.2, 'the mean wait');
  assert.equal(await recorded('key:nexus_refused:ratio_rate5m', ',key="alice"'), 0);
  close_to(await recorded('fleet:nexus_errors:ratio_rate5m'), 0.1, 0.1, 'the share of errors');
  assert.equal(await recorded('backend:nexus_backend_up:avg', ',backend="gpu"'), 1);
  assert.equal(await recorded('fleet:nexus_pending_requests:sum'), 0);
  const p95 = await recorded('model:nexus_request_duration_seconds:p95_rate5m', ',model="m1"');
  assert.ok(p95 > 0 && p95 <= 1, `p95 ${p95}`);
  // Nothing that the rules record is left out where two instances were there to add up.
  for (const [, name] of repository_file('contrib/prometheus/nexus-recording.yml').matchAll(/- record: (\S+)/g)) {
    const series = await prometheus.query(name);
    if (/fallbacks/.test(name)) continue;   // there are none here
    assert.ok(series.length > 0, `${name} recorded something`);
    for (const s of series) assert.equal(s.metric.instance, undefined, `${name} is of the fleet, not of an instance`);
  }
}

group('more than one host', () => {
  test('recording rules add two Nexus up, and no alert fires that should not', { calm: true, limit_ms: 90_000 }, async (t) => {
    need_program(t, 'prometheus');
    const fleet = await two_hosts(t);
    const config = with_replaced(repository_file('contrib/prometheus/prometheus.yml'), {
      ...fast,
      'evaluation_interval: 15s': 'evaluation_interval: 200ms',
      '- nexus-recording.yml': `- ${repository}/contrib/prometheus/nexus-recording.yml`,
      '- nexus-alerts.yml': `- ${repository}/contrib/prometheus/nexus-alerts.yml`,
      "['127.0.0.1:8000']": `[${fleet.map((n) => `'127.0.0.1:${n.pages}'`)}]`,
    });
    const prometheus = await start_prometheus(t, config);
    await until(async () => (await prometheus.query('up{job="nexus"} == 1')).length === 2, 'both scraped', 20_000);
    await sleep(700);
    const before = await Promise.all(fleet.map(metrics_of));
    await some_load(fleet, 100);
    await sleep(1_500);
    await check_recorded(fleet, prometheus, before, { job: 'nexus' });
    assert.equal(only_value(await prometheus.query('fleet:nexus_instances_up:sum')), 2);
    for (const { rules } of (await prometheus.api('rules')).groups) for (const rule of rules) assert.equal(rule.lastError ?? '', '', `${rule.name}: ${rule.lastError}`);
    // A tenth of the requests fail here, and that one alert is on its way.
    const alerts = (await prometheus.api('alerts')).alerts.map((a) => a.labels.alertname);
    assert.deepEqual([...new Set(alerts)], ['NexusFaultRatioHigh']);
    // One gone: it is missed, and the other's figures stay.
    await fleet[1].stop();
    await until(async () => (await prometheus.query('fleet:nexus_instances_up:sum')).some((s) => s.value[1] === '1'), 'one of two seen', 5_000);
    await until(async () => (await prometheus.api('alerts')).alerts.some((a) => a.labels.alertname === 'NexusDown' && a.labels.instance.endsWith(`:${fleet[1].pages}`)), 'NexusDown pending', 5_000);
  });

  test('an agent on each host writes to the site’s Prometheus, which records the same sums', { calm: true, limit_ms: 90_000 }, async (t) => {
    need_program(t, 'prometheus');
    const fleet = await two_hosts(t);
    const site = await start_prometheus(t, `global: { evaluation_interval: 200ms }
rule_files: [ ${repository}/contrib/prometheus/nexus-recording.yml, ${repository}/contrib/prometheus/nexus-fleet.yml ]
`, { receiver: true });
    for (const [i, nexus] of fleet.entries()) {
      await start_prometheus(t, with_replaced(repository_file('contrib/prometheus/agent/prometheus-agent.yml'), {
        ...fast,
        "['127.0.0.1:8000']": `['127.0.0.1:${nexus.pages}']`,
        'instance: edge-1': `instance: edge-${i + 1}`,
        'http://metrics.example:9090/': `http://127.0.0.1:${site.port}/`,
      }), { agent: true });
    }
    await until(async () => (await site.query('up{job="nexus"} == 1')).length === 2, 'both agents’ samples arrived', 30_000);
    await sleep(1_000);
    const before = await Promise.all(fleet.map(metrics_of));
    await some_load(fleet, 100);
    const all = 120;   // with those before the first scrape
    await until(async () => (await total_over(fleet, 'nexus_requests_total')) === all, 'every request counted');
    await until(async () => only_value(await site.query('sum(nexus_requests_total)')) === all, 'every request told to the site', 15_000);
    await sleep(500);
    const instances = (await site.query('nexus_requests_total')).map((s) => `${s.metric.site} ${s.metric.instance}`);
    assert.deepEqual([...new Set(instances)].sort(), ['cellar edge-1', 'cellar edge-2']);
    await check_recorded(fleet, site, before, { job: 'nexus', site: 'cellar' });
    // The rules by instance: each has served half, and nothing that they record is left out.
    for (const s of await site.query('instance:nexus_requests:share_rate5m')) close_to(Number(s.value[1]), 0.5, 0.2, `the share of ${s.metric.instance}`);
    for (const [, name] of repository_file('contrib/prometheus/nexus-fleet.yml').matchAll(/- record: (\S+)/g)) {
      const of = (await site.query(name)).map((s) => `${s.metric.site} ${s.metric.instance}`);
      const streams = /first_token/.test(name);   // all went to the first
      assert.deepEqual(of.sort(), streams ? ['cellar edge-1'] : ['cellar edge-1', 'cellar edge-2'], name);
    }
  });

  test('HAProxy in front: a Nexus is stopped under load and no request is lost', { calm: true, limit_ms: 60_000 }, async (t) => {
    const binary = need_program(t, 'haproxy');
    const backend = await start_backend(t);
    const conf = () => ({ backends: [{ name: 'gpu', mock: backend }] });
    const fleet = [await start_nexus(t, conf()), await start_nexus(t, conf())];
    const port = await free_port();
    const file = t.file('haproxy.cfg', with_replaced(repository_file('contrib/haproxy/haproxy.cfg'), {
      'maxconn 20000': 'maxconn 500', '127.0.0.1:8080': `127.0.0.1:${port}`, '127.0.0.1:8001': `127.0.0.1:${fleet[0].port}`, '127.0.0.1:8002': `127.0.0.1:${fleet[1].port}` }));
    const proxy = run_beside(t, binary, ['-db', '-f', file]);
    await until(async () => (await get(port, '/health')).status === 200, () => `haproxy up: ${proxy.log}`, 10_000);

    // Streams on both, held open over the stop; and plain requests all the while.
    const held = [];
    backend.answer = (incoming, reply) => {
      if (!incoming.json.stream) return reply.json(chat_answer('m1'));
      reply.stream();
      reply.piece('data: 1\n\n');
      held.push(reply);
    };
    const streams = Array.from({ length: 4 }, () => post(port, endpoint, chat('m1', { stream: true }), { ms: 40_000 }));
    await until(() => held.length === 4, 'four streams');
    let over = false;
    const statuses = [];
    const plain = Array.from({ length: 4 }, async () => {
      while (!over) {
        statuses.push((await post(port, endpoint, chat(), { ms: 40_000 })).status);
        await sleep(5);
      }
    });
    await until(() => statuses.length > 50, 'requests under way');
    fleet[0].child.kill('SIGTERM');
    await sleep(1_500);
    assert.equal(fleet[0].exit, null, 'it waits for its streams');
    const at_stop = statuses.length;
    for (const reply of held) {
      reply.piece('data: [DONE]\n\n');
      reply.finish();
    }
    assert.deepEqual((await fleet[0].exits()).code, 0);
    await until(() => statuses.length > at_stop + 50, 'requests go on at the other one');
    over = true;
    await Promise.all(plain);
    for (const stream of await Promise.all(streams)) assert.deepEqual(sse_events(stream.text).data, ['1', '[DONE]']);
    assert.deepEqual([...new Set(statuses)], [200]);
    assert.ok((await metrics_of(fleet[1])).sum('nexus_requests_total') >= 50);
  });

  test('a Nexus is another one’s backend: models, completions, streams with usage, embeddings, errors, counts on both', async (t) => {
    const backend = await start_backend(t, { kind: 'vllm', models: ['m1', 'm2'] });
    const inner = await start_nexus(t, { backends: [{ name: 'gpu', mock: backend }] });
    const outer = await start_nexus(t, { backends: [{ name: 'inner', url: `http://127.0.0.1:${inner.port}`, type: 'openai' }] });
    assert.deepEqual((await get(outer.port, '/v1/models')).json.data.map((m) => m.id), ['m1', 'm2']);

    const direct = await post(inner.port, endpoint, chat());
    const through = await post(outer.port, endpoint, chat());
    assert.equal(through.status, 200);
    assert.equal(through.text, direct.text);
    assert.equal(through.headers.get('x-nexus-backend'), 'inner', 'the name is the outer one’s, once');

    const stream = await post(outer.port, endpoint, chat('m1', { stream: true }));
    assert.equal(stream.text, (await post(inner.port, endpoint, chat('m1', { stream: true }))).text, 'no usage event that the client had not asked for');
    assert.equal((await post(outer.port, '/v1/embeddings', { model: 'm1', input: 'x' })).status, 200);
    assert.equal((await post(outer.port, endpoint, chat('unheard-of'))).status, 404);
    const ids = backend.requests.map((r) => r.headers.get('via').split(',').length);
    assert.deepEqual([...new Set(ids)].sort(), [1, 2], 'each Nexus on the way adds itself to Via');

    for (const nexus of [inner, outer]) {
      const page = await page_after(nexus === inner ? 5 : 4, nexus.port);
      assert.equal(page.sum('nexus_requests_total', { status: 200 }), nexus === inner ? 5 : 3);
      assert.equal(page.sum('nexus_requests_total', { status: 404 }), nexus === inner ? 0 : 1, 'the 404 is the outer one’s own');
      assert.equal(page.sum('nexus_tokens_total_count', { type: 'completion' }), nexus === inner ? 4 : 2, 'a stream’s usage is told to both');
    }
  });

  // A's backend is B, and B's is A. Health is not asked, or neither would ever have a model to tell the other.
  async function ring(t, length) {
    const ports = await Promise.all(Array.from({ length }, () => free_port()));
    const nodes = [];
    for (const i of ports.keys()) {
      const next = ports[(i + 1) % length];
      nodes.push(await start_nexus(t, {
        server: { listen: `127.0.0.1:${ports[i]}`, threads: 1 }, health: { enabled: 'no' }, routing: { retries: 0 },
        backends: [{ name: 'next', url: await relay(t, () => next), type: 'openai', models: 'm1' }],
      }, { ready: 'no' }));
      nodes[i].port = ports[i];
    }
    for (const node of nodes) await node.ready(true);
    return nodes;
  }

  for (const length of [1, 2, 3]) {
    test(`a request that comes round a ring of ${length} is recognised by Via and refused with 508, once`, async (t) => {
      const nodes = await ring(t, length);
      const answer = await post(nodes[0].port, endpoint, chat());
      assert_error(answer, 508, 'loop_detected');
      // Round once: A has the client’s request and its own again.
      for (const [i, node] of nodes.entries()) await page_after(i === 0 ? 2 : 1, node.port);
      assert.equal((await metrics_of(nodes[0])).sum('nexus_pending_requests'), 0);
      // The connections of the ring are usable still, and a stream is refused likewise.
      assert_error(await post(nodes[0].port, endpoint, chat('m1', { stream: true })), 508, 'loop_detected');
    });
  }

  test('a health check that comes back to its own Nexus fails, and says that it is a loop', async (t) => {
    for (const type of ['generic', 'ollama', 'llamacpp']) {
      const port = await free_port();
      const nexus = await start_nexus(t, {
        server: { listen: `127.0.0.1:${port}`, api_keys_file: t.file(`keys-${type}`, 'alice sk-alice-0123456789\n') },
        backends: [{ name: 'self', url: await relay(t, () => port), type }],
      }, { ready: 'no' });
      nexus.port = port;
      await nexus.logged(/ backend is unhealthy .*routing loop \(508\): its url leads back to this Nexus/);
    }
  });

  test('a Via of others, and of a Nexus that is not on the way back, is no loop', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'gpu', mock: backend }] });
    for (const via of ['1.1 nginx', '1.1 nexus-00000000', '1.0 fred, 1.1 p.example.net (squid)', 'x'.repeat(300)]) {
      const answer = await post(nexus.port, endpoint, chat(), { headers: { Via: via } });
      assert.equal(answer.status, 200, via);
      assert.ok(backend.requests.at(-1).headers.all('via').join(', ').startsWith(via), 'those before stay, in order');
    }
  });
});
