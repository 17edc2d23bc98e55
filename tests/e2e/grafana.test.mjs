// The dashboard in contrib/grafana: well formed, and every expression in it answers with data from a real Prometheus that
// scrapes a Nexus under a load in which everything happens that the dashboard shows.
import { RawClient, answer_plainly, assert, chat, get, group, parse_metrics, post, sleep, start_backend, start_nexus, test, until } from './harness.mjs';
import { close_to, need_program, only_value, repository_file, start_prometheus } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const keys = { alice: 'sk-alice-0123456789', bob: 'sk-bob-0123456789' };
const as = (name) => ({ headers: { Authorization: `Bearer ${keys[name]}` } });
const dashboard = () => JSON.parse(repository_file('contrib/grafana/nexus.json'));
const drawn = (d) => d.panels.filter((p) => p.type !== 'row');

// What Grafana puts in place of its variables; a name that it does not know it leaves alone, such as label_replace()'s $1.
const filled = (text, values) => text.replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
const all = { job: '.*', instance: '.*', backend: '.*', model: '.*', __rate_interval: '1m' };

// A load that moves every counter: plain and streamed answers, errors, fallbacks, a queue in which requests wait and from
// which they are turned away, clients that leave, a body over the limit, a head that is no HTTP.
async function one_round(nexus, n) {
  const ask = (model, more) => post(nexus.port, endpoint, chat(model, more), as(n % 2 ? 'bob' : 'alice'));
  await Promise.all([ask('m1', { n }), ask('m1', { n, stream: true }), ask('m1', { n, fail: true }), ask('big', { n, stream: true })]);
  await Promise.all(Array.from({ length: 6 }, () => ask('narrow', { slow: true })));
  await post(nexus.port, endpoint, 'x'.repeat(20_000), as('bob')).catch(() => {});
  const garbage = await RawClient.connect(nexus.port);
  garbage.write('GARBAGE\r\n\r\n');
  await garbage.ended().catch(() => {});
  garbage.close();
  const leaver = await RawClient.connect(nexus.port);
  leaver.send('POST', endpoint, as('bob').headers, chat('narrow', { slow: true, stream: true }));
  await sleep(5);
  leaver.reset();
}

async function start_load(t) {
  const answer = async (request, reply) => {
    if (request.json.slow) await sleep(30);
    if (request.json.fail) return reply.json({ error: { message: 'made up' } }, 500);
    return answer_plainly(request, reply);
  };
  const backends = [];
  for (const [name, models, more] of [['main', ['m1'], {}], ['spare', ['small'], {}], ['narrow', ['narrow'], { max_pending: 1 }]]) {
    backends.push({ name, mock: await start_backend(t, { kind: 'vllm', models, answer }), ...more });
  }
  const nexus = await start_nexus(t, {
    server: { max_body: '16k', api_keys_file: t.file('keys', Object.entries(keys).map((pair) => pair.join(' ') + '\n').join('')) }, backends, fallbacks: { big: 'small' }, queue: { size: 2, timeout: '5s' },
    routing: { retries: 0, affinity: 'session' }, health: { eject_after: 1000, interval: '300ms' },
  });
  let over = false;
  let rounds = 0;
  const done = (async () => { for (; !over; rounds++) await one_round(nexus, rounds); })();
  const stop = async () => { over = true; await done; };
  t.after(stop);
  return { nexus, stop, rounds: () => rounds };
}

const labels_in = (legend) => [...legend.matchAll(/\{\{\s*(\w+)\s*\}\}/g)].map(([, name]) => name);

group('grafana', () => {
  test('the dashboard is laid out without overlap, each panel has a title, a unit and the chosen data source', () => {
    const d = dashboard();
    const ids = d.panels.map((p) => p.id);
    assert.equal(new Set(ids).size, ids.length, 'ids are unique');
    const cells = new Set();
    for (const panel of d.panels) {
      const { x, y, w, h } = panel.gridPos;
      assert.ok(x >= 0 && w > 0 && h > 0 && x + w <= 24, `${panel.title} lies within 24 columns`);
      for (let i = x; i < x + w; i++) {
        for (let j = y; j < y + h; j++) {
          assert.ok(!cells.has(`${i} ${j}`), `${panel.title} overlaps another at ${i}, ${j}`);
          cells.add(`${i} ${j}`);
        }
      }
    }
    for (const panel of drawn(d)) {
      assert.ok(panel.title && panel.fieldConfig.defaults.unit, `${panel.title} has a unit`);
      for (const where of [panel, ...panel.targets]) assert.deepEqual(where.datasource, { type: 'prometheus', uid: '${datasource}' });
      const refs = panel.targets.map((target) => target.refId);
      assert.equal(new Set(refs).size, refs.length, `${panel.title}: each query has a letter of its own`);
      for (const target of panel.targets) assert.ok(target.legendFormat || panel.type === 'table', `${panel.title} names its series`);
    }
  });

  test('the columns of its tables are its queries, each named once', () => {
    for (const panel of drawn(dashboard()).filter((p) => p.type === 'table')) {
      const named = panel.transformations.find((one) => one.id === 'organize').options.renameByName;
      const expected = panel.targets.map((target) => `Value #${target.refId}`).sort();
      assert.deepEqual(Object.keys(named).filter((key) => key.startsWith('Value')).sort(), expected, panel.title);
      const titles = Object.values(named);
      assert.equal(new Set(titles).size, titles.length, panel.title);
      for (const { matcher } of panel.fieldConfig.overrides) assert.ok(titles.includes(matcher.options), `${matcher.options} is a column of ${panel.title}`);
      assert.ok(titles.includes(panel.options.sortBy[0].displayName));
    }
  });

  test('every expression parses and answers with data while Nexus is under load, under the labels that are shown', { calm: true, limit_ms: 90_000 }, async (t) => {
    need_program(t, 'prometheus');
    const d = dashboard();
    const load = await start_load(t);
    await until(() => load.rounds() >= 3, 'three rounds of load', 20_000);   // every series is there before the first scrape
    const prometheus = await start_prometheus(t, `global: { scrape_interval: 200ms, scrape_timeout: 200ms }
scrape_configs: [ { job_name: nexus, authorization: { credentials: ${keys.bob} }, static_configs: [ { targets: [ "127.0.0.1:${load.nexus.port}" ] } ] } ]
`);
    await until(async () => (await prometheus.query('up == 1')).length === 1, 'scraped', 20_000);
    const begun = load.rounds();
    await sleep(3_000);
    await until(() => load.rounds() >= begun + 5, 'five rounds more', 20_000);

    const empty = [];
    for (const panel of drawn(d)) {
      for (const { expr, legendFormat, refId } of panel.targets) {
        const expression = filled(expr, all);
        assert.doesNotMatch(expression.replaceAll('"$1"', ''), /\$/, `a variable that is not defined, in ${panel.title}`);
        const result = await prometheus.query(expression);
        const numbers = result.map((s) => Number(s.value[1])).filter((n) => !Number.isNaN(n));
        if (numbers.length === 0) empty.push(`${panel.title} ${refId}: ${expression}`);
        for (const s of result) for (const label of labels_in(legendFormat)) assert.ok(label in s.metric, `${panel.title} shows the label ${label}, in ${JSON.stringify(s.metric)}`);
        if (panel.type === 'stat') assert.equal(result.length, 1, `${panel.title} shows one number`);
        if (panel.type === 'table') {
          const key = panel.transformations.find((one) => one.id === 'joinByField').options.byField;
          for (const s of result) assert.deepEqual(Object.keys(s.metric), [key], `${panel.title} ${refId} joins by ${key}`);
        }
      }
    }
    assert.deepEqual(empty, []);

    for (const variable of d.templating.list.filter((v) => v.type === 'query')) {
      const [, match, label] = /^label_values\((.+), (\w+)\)$/.exec(filled(variable.definition, all));
      const values = await prometheus.api(`label/${label}/values`, { 'match[]': match });
      assert.ok(values.length > 0, `${variable.name} has something to choose from`);
    }
    for (const note of d.annotations.list) await prometheus.query(filled(note.expr, all));
    // One backend, one model and one instance chosen narrow it down, and ask for nothing that is not there.
    const chosen = { ...all, backend: 'main', model: 'm1', instance: `127.0.0.1:${load.nexus.port}` };
    const requests = drawn(d).find((p) => p.title === 'Requests, by backend').targets[0].expr;
    assert.deepEqual((await prometheus.query(filled(requests, chosen))).map((s) => s.metric.backend), ['main']);

    // At rest, what stands there is what Nexus says.
    await load.stop();
    await sleep(700);
    const page = parse_metrics((await get(load.nexus.port, '/metrics', as('bob'))).text);
    const shown = async (title) => only_value(await prometheus.query(filled(drawn(d).find((p) => p.title === title).targets[0].expr, all)), title);
    assert.equal(await shown('Backends healthy'), 3);
    assert.equal(await shown('Backends registered'), 3);
    assert.equal(await shown('Models available'), 3);
    assert.equal(await shown('In flight'), 0);
    assert.equal(await shown('Waiting in the queue'), 0);
    close_to(await shown('Errors'), page.sum('nexus_errors_total') / page.sum('nexus_requests_total'), 0.1, 'the share of errors');
  });
});
