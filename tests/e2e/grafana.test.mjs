// The dashboard in contrib/grafana: well formed, and every expression in it answers with data from a real Prometheus that
// scrapes a Nexus under a load in which everything happens that the dashboard shows.
import { RawClient, answer_plainly, assert, chat, chat_answer, free_port, get, group, has_openssl, make_certificate, parse_metrics, post, sleep, start_backend, start_nexus, test, until } from './harness.mjs';
import { start_hurried_prometheus } from './alerts.mjs';
import { close_to, need_program, only_value, repository_file } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const keys = { alice: 'sk-alice-0123456789', bob: 'sk-bob-0123456789' };
const as = (name) => ({ headers: { Authorization: `Bearer ${keys[name]}` } });
const dashboard = () => JSON.parse(repository_file('contrib/grafana/nexus.json'));
const drawn = (d) => d.panels.filter((p) => p.type !== 'row');

// What Grafana puts in place of its variables; a name that it does not know it leaves alone, such as label_replace()'s $1.
const filled = (text, values) => text.replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
const all = { job: '.*', instance: '.*', backend: '.*', model: '.*', objective: '99.5', __rate_interval: '1m', __range: '1m' };

// A load that moves every counter, before three backends that are well and one that is down: plain and streamed answers,
// errors, fallbacks, a queue in which requests wait and from which they are turned away, clients that leave, a body over
// the limit, a head that is no HTTP.
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
    if (request.json.stream) return answer_plainly(request, reply);
    return reply.json({ ...chat_answer(request.json.model), usage: { prompt_tokens: 9, completion_tokens: 3, total_tokens: 12, prompt_tokens_details: { cached_tokens: 4 } } });
  };
  const backends = [];
  for (const [name, models, more] of [['main', ['m1'], {}], ['spare', ['small'], {}], ['narrow', ['narrow'], { max_pending: 1 }]]) {
    backends.push({ name, mock: await start_backend(t, { kind: 'vllm', models, answer }), ...more });
  }
  const lost = await start_backend(t, { models: ['gone'] });
  await lost.stop();
  backends.push({ name: 'lost', url: lost.url, type: 'generic', models: 'gone' });
  const secure = { tls_listen: `127.0.0.1:${await free_port()}`, tls_certificate: make_certificate().both };
  const nexus = await start_nexus(t, {
    server: { ...secure, max_body: '16k', api_keys_file: t.file('keys', Object.entries(keys).map((pair) => pair.join(' ') + '\n').join('')) }, backends, fallbacks: { big: 'small' }, queue: { size: 2, timeout: '5s' },
    routing: { retries: 0, affinity: 'session' }, health: { eject_after: 1000, interval: '300ms' }, slo: { ttft: '20ms', tpot: '1s' },
  }, { ready: 'up' });
  await until(async () => (await get(nexus.port, '/health')).json.backends.healthy === 3, 'three healthy backends');
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

  test('its thresholds are those of the alerts, and those of what is up are shares of what is registered', () => {
    const rules = repository_file('contrib/prometheus/nexus-alerts.yml').split(/^ {6}- alert: /m).slice(1);
    const rule_of = (alert) => rules.find((rule) => rule.startsWith(`${alert}\n`));
    const panel = (title) => drawn(dashboard()).find((p) => p.title === title).fieldConfig.defaults;
    const last = (title) => panel(title).thresholds.steps.at(-1);
    for (const [alert, ...titles] of [['NexusQueueNearlyFull', 'Queue used', 'Queue, in percent of its size'], ['NexusBackendNearlyFull', 'Fullest backend', 'Backends, in percent of max_pending'],
                                      ['NexusLoopStalls', 'Loops held up'], ['NexusFaultRatioHigh', 'Faults']]) {
      for (const title of titles) {
        assert.equal(last(title).color, 'red');
        assert.match(rule_of(alert), new RegExp(`> ${last(title).value}\\b`), title);
      }
    }
    for (const title of ['Instances up', 'Backends healthy']) {
      assert.equal(panel(title).unit, 'percentunit');
      assert.deepEqual(last(title), { color: 'green', value: 1 }, title);
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
    if (!has_openssl) t.skip('openssl is not installed');
    const d = dashboard();
    const load = await start_load(t);
    await until(() => load.rounds() >= 3, 'three rounds of load', 20_000);   // every series is there before the first scrape
    const prometheus = await start_hurried_prometheus(t, { port: load.nexus.port, key: keys.bob, factor: 75 });
    await until(async () => (await prometheus.query('up == 1')).length === 1, 'scraped', 20_000);
    load.nexus.reload('nothing that is a configuration');
    const firing = async () => (await prometheus.query('ALERTS{alertstate="firing"}')).map((s) => s.metric.alertname);
    for (const name of ['NexusReloadFailed', 'NexusBackendDown']) await until(async () => (await firing()).includes(name), `${name} to fire`, 20_000);
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
        const mapped = panel.fieldConfig.defaults.mappings?.flatMap((one) => Object.keys(one.options));
        if (mapped) for (const s of result) assert.ok(mapped.includes(s.value[1]), `${panel.title} has a word for ${s.value[1]} of ${JSON.stringify(s.metric)}`);
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
    assert.equal(await shown('Instances up'), 1);
    assert.equal(await shown('Backends healthy'), 3 / 4);
    assert.equal(await shown('Backends registered'), 4);
    assert.equal(await shown('Last reload'), 0);
    assert.equal(await shown('Queue used'), 0);
    assert.equal(await shown('Fullest backend'), 0);
    assert.equal(await shown('Alerts firing'), (await firing()).length);
    const timeline = async (title) => (await prometheus.query(filled(drawn(d).find((p) => p.title === title).targets[0].expr, all)));
    assert.deepEqual((await timeline('Backends: up, ejected, down')).map((s) => [s.metric.backend, s.value[1]]).sort(), [['lost', '0'], ['main', '2'], ['narrow', '2'], ['spare', '2']]);
    const subjects = (await timeline('Alerts')).map((s) => `${s.metric.alertname} ${s.metric.subject}`);
    for (const one of ['NexusBackendDown lost', 'NexusReloadFailed all']) assert.ok(subjects.includes(one), `${one} in ${subjects}`);
    assert.equal(await shown('Models available'), 3);
    assert.equal(await shown('In flight'), 0);
    assert.equal(await shown('Waiting in the queue'), 0);
    const of_types = (types) => types.reduce((sum, error_type) => sum + page.sum('nexus_errors_total', { error_type }), 0);
    const faults = of_types(['timeout', 'backend_error', 'no_healthy_backend', 'parse_error', 'drain']);
    const failed = faults + of_types(['overloaded']);
    assert.ok(faults > 0 && failed > faults && failed < page.sum('nexus_errors_total'), 'some of each');
    close_to(await shown('Faults'), faults / page.sum('nexus_requests_total'), 0.1, 'the share of faults');
    const valid = page.sum('nexus_requests_total') - of_types(['bad_request', 'no_backend', 'client_closed']);
    close_to(await shown('Error budget left'), 1 - failed / valid / 0.005, 0.1, 'what is left of the error budget');
  });
});
