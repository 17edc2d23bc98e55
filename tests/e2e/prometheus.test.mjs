// A real Prometheus scrapes a running Nexus, and the queries that the README shows answer with the right numbers.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { assert, chat, chat_answer, free_port, get, group, histograms, kill_at_end, page_after, pair, post, sleep, start_backend, start_nexus, test, until, within } from './harness.mjs';
import { alert_names } from './alerts.mjs';
import { repository_file, run_to_end } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const repository = path.resolve(path.dirname(new URL(import.meta.url).pathname), '../..');
const find = (name) => [...(process.env.PATH ?? '').split(':'), '/usr/bin', '/usr/local/bin'].map((d) => path.join(d, name)).find((p) => fs.existsSync(p));

// The README's queries: in its ```promql blocks, each under a comment that says what it answers.
function readme_queries(text) {
  const out = [];
  for (const [, block] of text.matchAll(/```promql\n([\s\S]*?)```/g)) {
    for (const part of block.split(/^(?=#)/m)) {
      const [comment, ...lines] = part.trim().split('\n');
      const query = lines.join(' ').trim();
      if (comment.startsWith('#') && query) out.push({ what: comment.replace(/^#\s*/, ''), query });
    }
  }
  return out;
}

// What each must be about, to be told apart by its comment.
const wanted = [['request rate', /request.*rate|requests (a|per) second/i], ['error rate', /error/i], ['p95', /p95|95th/i], ['fallback rate', /fallback/i], ['tokens per second', /tokens?/i]];

async function start_prometheus(t, nexus) {
  const binary = find('prometheus');
  if (!binary) t.skip('prometheus is not installed (apt-get install prometheus)');
  const port = await free_port();
  const file = t.file('prometheus.yml', `global: { scrape_interval: 200ms, scrape_timeout: 200ms }
scrape_configs:
  - job_name: nexus
    static_configs: [ { targets: [ "127.0.0.1:${nexus.port}" ] } ]
`);
  const child = spawn(binary, [`--config.file=${file}`, `--storage.tsdb.path=${t.dir()}/tsdb`, `--web.listen-address=127.0.0.1:${port}`, '--log.level=warn'], { cwd: t.dir(), stdio: ['ignore', 'ignore', 'pipe'] });
  kill_at_end(child);
  let log = '';
  child.stderr.on('data', (d) => { log += d; });
  const exited = new Promise((done) => child.on('close', done));
  t.after(async () => {
    child.kill('SIGTERM');
    await within(10_000, exited, 'prometheus to end').catch(() => child.kill('SIGKILL'));
  });
  const query = async (q) => {
    const r = await get(port, `/api/v1/query?query=${encodeURIComponent(q)}`);
    assert.equal(r.json.status, 'success', `${q}: ${r.text}`);
    return r.json.data.result;
  };
  await until(async () => (await query('up')).some((s) => s.value[1] === '1'), () => `prometheus scraping; its log: ${log.slice(-500)}`, 20_000);
  return { port, query, log: () => log };
}

// histogram_quantile() over the difference of two scrapes, all series together.
function quantile(q, before, after, name) {
  const totals = new Map();
  for (const [page, sign] of [[before, -1], [after, 1]]) {
    for (const h of histograms(name, page.families.get(name)).values()) for (const [le, n] of h.buckets) totals.set(le, (totals.get(le) ?? 0) + sign * n);
  }
  const buckets = [...totals].sort((a, b) => a[0] - b[0]);
  const rank = q * buckets.at(-1)[1];
  const at = buckets.findIndex(([, n]) => n >= rank);
  if (buckets[at][0] === Infinity) return buckets[at - 1][0];
  const [low, below] = at > 0 ? buckets[at - 1] : [0, 0];
  return low + (buckets[at][0] - low) * ((rank - below) / (buckets[at][1] - below));
}

const close_to = (got, expected, tolerance, what) => assert.ok(Math.abs(got - expected) <= tolerance * Math.abs(expected) + 1e-9, `${what}: ${got}, expected ${expected}`);

group('prometheus', () => {
  test('every alert has a severity, a description and a section of the runbook, and every section an alert', async () => {
    const rules = repository_file('contrib/prometheus/nexus-alerts.yml').split(/^ {6}- alert: /m).slice(1);
    const sections = [...repository_file('docs/runbook.md').matchAll(/^## (\w+)$/gm)].map(([, name]) => name);
    const names = rules.map((rule) => /^\w+/.exec(rule)[0]);
    assert.deepEqual([...names].sort(), [...sections].sort());
    rules.forEach((rule, i) => {
      for (const part of [/^ {8}for: \d+[mh]$/m, /severity: (page|ticket)/, /description: '.{30,}'/, new RegExp(`runbook_url: '.*/runbook\\.md#${names[i].toLowerCase()}'`)]) assert.match(rule, part, names[i]);
    });
  });

  test('each alert has a case in which it fires, one in which it does not, and is silent while clients make mistakes', () => {
    const cases = ['alerts', 'slo'].flatMap((part) => repository_file(`contrib/prometheus/nexus-${part}.test.yml`).split(/^ {2}- name: /m).slice(1));
    const mistakes = cases.find((one) => one.startsWith('mistakes of clients raise nothing at all'));
    const about = (text, name) => [...text.matchAll(new RegExp(`alertname: ${name}\\b,?\\s+exp_alerts:(?<silent> \\[\\])?`, 'g'))].map((m) => (m.groups.silent ? 'silent' : 'fires'));
    for (const name of alert_names()) {
      const seen = cases.flatMap((one) => (one === mistakes ? [] : about(one, name)));
      assert.ok(seen.includes('fires') && seen.includes('silent'), `${name}: ${seen}`);
      assert.deepEqual(about(mistakes, name), ['silent', 'silent'], name);
    }
  });

  test('scrapes Nexus without an error, and the README’s queries answer with the right numbers', { calm: true, limit_ms: 60_000 }, async (t) => {
    if (!find('prometheus')) t.skip('prometheus is not installed (apt-get install prometheus)');
    const readme = path.join(repository, 'README.md');
    const queries = fs.existsSync(readme) ? readme_queries(fs.readFileSync(readme, 'utf8')) : [];
    const named = Object.fromEntries(wanted.map(([name, pattern]) => [name, queries.find((q) => pattern.test(q.what))?.query]));
    for (const [name, query] of Object.entries(named)) assert.ok(query, `the README has no promql block with a comment about the ${name}`);

    const main = await start_backend(t, { models: ['llama3:70b'] });
    const spare = await start_backend(t, { models: ['small'] });
    const lost = await start_backend(t, { models: ['big'] });
    await lost.stop();
    const answer = async (request, reply) => {
      const { n } = request.json;
      await sleep(n % 10 === 0 ? 130 : 1);
      if (n % 5 === 4) return reply.json({ error: {} }, 500);
      return reply.json(chat_answer('x', 'x', { prompt_tokens: 100, completion_tokens: 40, total_tokens: 140 }));
    };
    main.answer = answer;
    spare.answer = answer;
    const nexus = await start_nexus(t, { backends: [{ name: 'main', mock: main }, { name: 'spare', mock: spare }, { name: 'lost', url: lost.url, type: 'generic', models: 'big' }], fallbacks: { big: 'small' }, aliases: { 'gpt-4': 'big' }, health: { failures: 1, interval: '300ms' } }, { ready: 'up' });
    await until(async () => (await get(nexus.port, '/health')).json.backends.healthy === 2, 'two healthy backends');
    // Every series exists before the first scrape: a counter's first value is no increase to Prometheus.
    for (const model of ['llama3:70b', 'big', 'gpt-4']) for (const n of [4, 1]) await post(nexus.port, endpoint, chat(model, { n }));
    const prometheus = await start_prometheus(t, nexus);
    await sleep(700);
    const before = await page_after(6, nexus.port);
    // Of those that ask for `big` by one name or the other, all fall back: more ask for it by its alias.
    for (let n = 0; n < 60; n++) await post(nexus.port, endpoint, chat(n % 3 ? 'llama3:70b' : n % 9 ? 'gpt-4' : 'big', { n }));
    const after = await page_after(66, nexus.port);
    await sleep(900);

    const targets = (await get(prometheus.port, '/api/v1/targets')).json.data.activeTargets;
    assert.equal(targets[0].health, 'up');
    assert.equal(targets[0].lastError, '');
    assert.doesNotMatch(prometheus.log(), /error|warn.*scrape|append failed/i);
    // The same number by both ways: read by us, and stored by Prometheus.
    const stored = await prometheus.query('sum by (model, backend, status) (nexus_requests_total)');
    for (const s of stored) assert.equal(Number(s.value[1]), after.value('nexus_requests_total', s.metric), JSON.stringify(s.metric));
    assert.equal(stored.length, after.select('nexus_requests_total').length);

    const delta = (name, labels) => after.sum(name, labels) - before.sum(name, labels);
    const range = /\[(\d+)([sm])\]/.exec(named['request rate']);
    const window = Number(range[1]) * (range[2] === 'm' ? 60 : 1);
    const value = async (name) => (await prometheus.query(named[name]));
    const total = (result) => result.reduce((sum, s) => sum + Number(s.value[1]), 0);
    // rate() stretches what it saw by up to an interval on each side: 20 % covers that.
    close_to(total(await value('request rate')) * window, delta('nexus_requests_total'), 0.2, 'request rate');
    const errors = await value('error rate');
    const error_share = delta('nexus_errors_total') / delta('nexus_requests_total');
    if (errors.length === 1 && Number(errors[0].value[1]) <= 1 && /\//.test(named['error rate'])) close_to(Number(errors[0].value[1]), error_share, 0.05, 'error rate');
    else close_to(total(errors) * window, delta('nexus_errors_total'), 0.2, 'error rate');
    const p95 = await value('p95');
    const p95_of = (filter) => quantile(0.95, only(before, filter), only(after, filter), 'nexus_request_duration_seconds');
    for (const s of p95) close_to(Number(s.value[1]), p95_of(s.metric), 0.05, `p95 of ${JSON.stringify(s.metric)}`);
    assert.ok(p95.length > 0);
    const fallbacks = await value('fallback rate');
    assert.equal(delta('nexus_fallbacks_total'), 20);
    for (const [model, count] of [['big', 7], ['gpt_4', 13]]) {
      assert.equal(delta('nexus_fallbacks_total', { from_model: model }), count, model);
      const share = fallbacks.find((s) => Object.values(s.metric).includes(model));
      assert.ok(share, `the fallback rate is told per model: ${JSON.stringify(fallbacks)}`);
      close_to(Number(share.value[1]), 1, 0.05, `fallback rate of ${model}`);
    }
    const token_result = await value('tokens per second');
    const token_type = /type="(\w+)"/.exec(named['tokens per second']);
    close_to(total(token_result) * window, delta('nexus_tokens_total_sum', token_type ? { type: token_type[1] } : {}), 0.2, 'tokens per second');
    for (const { what, query } of queries) assert.ok((await prometheus.query(query)).length >= 0, what);
  });

  test('promtool has no remark on the exposition but the two that the seed’s names draw', async (t) => {
    const promtool = find('promtool');
    if (!promtool) t.skip('promtool is not installed (apt-get install prometheus)');
    const { nexus, backend } = await pair(t);
    await post(nexus.port, endpoint, chat());
    backend.answer = (_, reply) => reply.json({}, 500);
    await post(nexus.port, endpoint, chat());
    const { text } = await get(nexus.port, '/metrics');
    const r = await run_to_end(promtool, ['check', 'metrics'], { input: text });
    const remarks = r.output.split('\n').filter((l) => l.trim() && !/^nexus_(tokens_total|backends_total) /.test(l));
    assert.deepEqual(remarks, []);
  });

  test('the rules in contrib/prometheus pass promtool', { limit_ms: 180_000 }, async (t) => {
    const promtool = find('promtool');
    const dir = path.join(repository, 'contrib/prometheus');
    if (!promtool) t.skip('promtool is not installed (apt-get install prometheus)');
    if (!fs.existsSync(dir)) t.skip('there is no contrib/prometheus');
    const files = fs.readdirSync(dir).filter((f) => /\.ya?ml$/.test(f));
    const tests = files.filter((f) => /test/.test(f));
    const rules = files.filter((f) => !/test|scrape|prometheus\.ya?ml/.test(f));
    assert.ok(rules.length && tests.length, `rules and their tests in ${files}`);
    for (const [verb, names] of [['check', rules], ['test', tests]]) {
      const r = await run_to_end(promtool, [verb, 'rules', ...names], { cwd: dir, ms: 150_000 });
      assert.equal(r.status, 0, `${verb} rules: ${r.output}`);
    }
  });
});

// The page with only those histogram series whose labels include `labels`.
function only(page, labels) {
  const family = page.families.get('nexus_request_duration_seconds');
  const samples = family.samples.filter((s) => Object.entries(labels).every(([k, v]) => s.labels[k] === v));
  return { families: new Map([['nexus_request_duration_seconds', { ...family, samples }]]) };
}
