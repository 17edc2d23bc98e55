// /metrics in OpenMetrics 1.0: which scrapers get it, that it says the same as 0.0.4, and that the reference parser and a real
// Prometheus read it, with its exemplars.
import fs from 'node:fs';
import http from 'node:http';
import { assert, chat, free_port, get, group, page_after, pair, parse_metrics, post, request, start_backend, start_nexus, test, until } from './harness.mjs';
import { find_program, need_program, run_to_end, start_prometheus } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const om = 'application/openmetrics-text;version=1.0.0';
const on = { metrics: { openmetrics: 'yes' } };
const types = { text: 'text/plain; version=0.0.4; charset=utf-8', openmetrics: 'application/openmetrics-text; version=1.0.0; charset=utf-8' };
const page_of = (port, accept) => get(port, '/metrics', { headers: accept === null ? {} : { Accept: accept } });
const trace = (n) => n.toString(16).padStart(32, 'a');
const traced = (n, flags = '01') => ({ headers: { traceparent: `00-${trace(n)}-00f067aa0ba902b7-${flags}` } });

// What scrapers send, and a few neighbours.
const protobuf = 'application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited';
const rows = [
  ['nothing', null, types.text],
  ['curl', '*/*', types.text],
  ['a browser', 'text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8', types.text],
  ['Prometheus 2.42', `${om},application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1`, types.openmetrics],
  ['Prometheus 2.42 with native histograms', `${protobuf},${om};q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1`, types.openmetrics],
  ['Prometheus 3', `${om};escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2`, `${types.openmetrics}; escaping=allow-utf-8`],
  ['Prometheus 3 with native histograms', `${protobuf};escaping=allow-utf-8;q=0.6,${om};escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1`, `${types.openmetrics}; escaping=allow-utf-8`],
  ['vmagent', 'text/plain;version=0.0.4;q=1,*/*;q=0.1', types.text],
  ['a scheme of escaping that nobody knows', `${om};escaping="x\t; y"`, types.openmetrics],
  ['another version', 'application/openmetrics-text;version=2.0.0', types.text],
  ['something else', 'application/json', types.text],
];

// A few requests that move most families: with two models, a failure, streams, a trace.
async function some_load(nexus, backend) {
  const answer = backend.answer;
  for (let n = 0; n < 6; n++) await post(nexus.port, endpoint, chat('m1', { stream: n % 2 === 0 }), traced(n, n === 5 ? '00' : '01'));
  backend.answer = (_, reply) => reply.json({ error: {} }, 500);
  await post(nexus.port, endpoint, chat('m"2\\', { stream: true }));
  backend.answer = answer;
  await post(nexus.port, endpoint, chat('nobody'));
  return page_after(8, nexus.port);
}
// One check, at the start: with checks off, a backend is called healthy before its models are known.
const everything = { ...on, slo: { ttft: '2s', tpot: '100ms' }, health: { interval: '1h' } };

// The samples of a page by name and labels, as the reference parser reads them. Bounds are numbers there and here.
const reader = `
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
out = {"families": {}, "samples": []}
for family in text_string_to_metric_families(sys.stdin.read()):
    out["families"][family.name] = [family.type, family.unit, family.documentation]
    for s in family.samples:
        e = s.exemplar
        out["samples"].append([s.name, s.labels, s.value, e and [e.labels, e.value, float(e.timestamp)]])
print(json.dumps(out))
`;
async function read_by_reference(t, text) {
  const python = ['/usr/bin/python3', find_program('python3')].find(fs.existsSync) ?? t.skip('python3 is not installed');   // Debian's own has the package
  const end = await run_to_end(python, ['-c', reader], { input: text });
  if (/No module named/.test(end.output)) t.skip('python3-prometheus-client is not installed (apt-get install python3-prometheus-client)');
  assert.equal(end.status, 0, end.output.slice(-1500));
  return JSON.parse(end.output);
}
const key_of = (name, labels) => `${name} ${JSON.stringify(Object.keys(labels).sort().map((k) => [k, k === 'le' ? Number(labels[k].replace('+Inf', 'Infinity')) : labels[k]]))}`;
// What differs between two scrapes at rest.
const moves = /^(process_|nexus_loop_stall_seconds|nexus_client_connections)/;

group('openmetrics', () => {
  test('each scraper gets the format that it prefers', async (t) => {
    const { nexus } = await pair(t, {}, on);
    for (const [who, accept, type] of rows) {
      const r = await page_of(nexus.port, accept);
      assert.equal(r.status, 200, who);
      assert.equal(r.headers.get('content-type'), type, who);
      assert.equal(r.headers.get('vary'), 'Accept', who);
      assert.equal(r.text.endsWith('\n# EOF\n'), type !== types.text, who);
      const head = await request(nexus.port, 'HEAD', '/metrics', { headers: accept === null ? {} : { Accept: accept } });
      assert.equal(head.headers.get('content-type'), type, `HEAD of ${who}`);
    }
    const two = await get(nexus.port, '/metrics', { headers: [['Accept', 'text/plain;q=0.5'], ['Accept', om]] });
    assert.equal(two.headers.get('content-type'), types.openmetrics, 'two fields are one list');
  });

  test('by default every scraper gets 0.0.4, whatever it asks for', async (t) => {
    const { nexus } = await pair(t);
    for (const [who, accept] of rows) {
      const r = await page_of(nexus.port, accept);
      assert.equal(r.headers.get('content-type'), types.text, who);
      assert.ok(!r.headers.has('vary'), who);
      assert.doesNotMatch(r.text, /# (EOF|UNIT)|trace_id/, who);
      parse_metrics(r.text);
    }
  });

  test('nothing is compressed, as nexus(8) says, and the page of a small fleet is as small as it says', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['m1', 'm"2\\'] });
    await some_load(nexus, backend);
    const r = await get(nexus.port, '/metrics', { headers: { 'Accept-Encoding': 'gzip' } });
    assert.ok(!r.headers.has('content-encoding'));
    assert.ok(r.body.length > 8_000 && r.body.length < 26_000, `${r.body.length} bytes`);
  });

  for (const labels of ['sanitize', 'raw']) {
    test(`the reference parser reads every page, and the same numbers as 0.0.4 has (labels = ${labels})`, async (t) => {
      const { nexus, backend } = await pair(t, { models: ['m1', 'm"2\\'] }, { ...everything, metrics: { openmetrics: 'yes', labels } });
      await read_by_reference(t, (await page_of(nexus.port, om)).text);   // before the first request
      await some_load(nexus, backend);
      const plain = parse_metrics((await page_of(nexus.port, null)).text);
      const page = await page_of(nexus.port, om);
      const read = await read_by_reference(t, page.text);

      const expected = new Map([...plain.families.values()].flatMap((f) => f.samples).map((s) => [key_of(s.name, s.labels), s.value]));
      const got = new Map(read.samples.map(([name, of, value]) => [key_of(name, of), value]));
      assert.deepEqual([...got.keys()].sort(), [...expected.keys()].sort());
      for (const [key, value] of expected) if (!moves.test(key)) assert.equal(got.get(key), value, key);

      for (const [name, { type, help }] of plain.families) {
        const base = type === 'counter' ? name.replace(/_total$/, '') : name.replace(/_info$/, '');
        const unit = /_(seconds|bytes)$/.exec(base)?.[1] ?? '';
        assert.deepEqual(read.families[base], [name.endsWith('_info') ? 'info' : type, unit, help], name);
      }
      for (const le of ['0.1', '1.0', '5.0', '300.0', '+Inf']) assert.match(page.text, new RegExp(`^nexus_request_duration_seconds_bucket\\{.*le="${le.replace(/[.+]/g, '\\$&')}"\\}`, 'm'));
      assert.match(page.text, /^nexus_overhead_seconds_bucket\{le="1e-05"\}/m);
      assert.match(page.text, /^nexus_tokens_total_bucket\{.*le="128000\.0"\}/m);

      // The five sampled requests; the last of each bucket is shown, where it was counted.
      const shown = read.samples.filter(([, , , exemplar]) => exemplar);
      assert.ok(shown.length >= 2);
      for (const [name, of, , [{ trace_id, ...more }, value, at]] of shown) {
        assert.match(name, /^nexus_(request_duration|time_to_first_token)_seconds_bucket$/);
        assert.deepEqual(more, {});
        assert.ok([0, 1, 2, 3, 4].map(trace).includes(trace_id), trace_id);
        assert.ok(value <= Number(of.le.replace('+Inf', 'Infinity')) && value > 0, `${value} in ${of.le}`);
        assert.ok(Math.abs(at * 1000 - Date.now()) < 60_000, `${at}`);
      }
    });
  }

  test('a real Prometheus reads the same values in both formats', { calm: true, limit_ms: 60_000 }, async (t) => {
    need_program(t, 'prometheus');
    const { nexus, backend } = await pair(t, { models: ['m1', 'm"2\\'] }, everything);
    await some_load(nexus, backend);
    // Prometheus 2 always prefers OpenMetrics: the second job goes through one that asks for 0.0.4 in its place.
    const between = http.createServer(async (_, reply) => {
      const r = await page_of(nexus.port, types.text);
      reply.writeHead(r.status, { 'Content-Type': r.headers.get('content-type') });
      reply.end(r.body);
    });
    const port = await free_port();
    await new Promise((done) => between.listen(port, '127.0.0.1', done));
    t.after(() => new Promise((done) => { between.close(done); between.closeAllConnections?.(); }));
    const prometheus = await start_prometheus(t, `global: { scrape_interval: 200ms, scrape_timeout: 200ms }
scrape_configs:
  - { job_name: openmetrics, static_configs: [ { targets: [ "127.0.0.1:${nexus.port}" ] } ] }
  - { job_name: text, static_configs: [ { targets: [ "127.0.0.1:${port}" ] } ] }
`);
    await until(async () => (await prometheus.query('up == 1')).length === 2, () => `both jobs are up; its log: ${prometheus.log}`, 20_000);
    const stored = async (job) => {
      const all = await prometheus.query(`{job="${job}",__name__=~"nexus_.*|process_.*"}`);
      return new Map(all.map(({ metric: { __name__, job: _, instance: __, ...labels }, value }) => [key_of(__name__, labels), value[1]]));
    };
    const [by_openmetrics, by_text] = [await stored('openmetrics'), await stored('text')];
    assert.ok(by_text.size > 100);
    assert.deepEqual([...by_openmetrics.keys()].sort(), [...by_text.keys()].sort());
    for (const [key, value] of by_text) if (!moves.test(key)) assert.equal(by_openmetrics.get(key), value, key);
    for (const target of (await prometheus.api('targets')).activeTargets) assert.equal(target.lastError, '');
    const { nexus_requests, nexus_build } = await prometheus.api('metadata');
    assert.equal(nexus_requests[0].type, 'counter');
    assert.equal(nexus_build[0].type, 'info');
  });

  test('the exemplars come back from Prometheus', { calm: true, limit_ms: 60_000 }, async (t) => {
    need_program(t, 'prometheus');
    const { nexus, backend } = await pair(t, { models: ['m1', 'm"2\\'] }, everything);
    await some_load(nexus, backend);
    const prometheus = await start_prometheus(t, `global: { scrape_interval: 200ms, scrape_timeout: 200ms }
scrape_configs: [ { job_name: nexus, static_configs: [ { targets: [ "127.0.0.1:${nexus.port}" ] } ] } ]
`, { features: ['exemplar-storage'] });
    const now = Date.now() / 1000;
    const stored = (name) => prometheus.api('query_exemplars', { query: `${name}_bucket`, start: now - 600, end: now + 600 });
    for (const [name, most] of [['nexus_request_duration_seconds', 5], ['nexus_time_to_first_token_seconds', 5]]) {
      const found = await until(async () => { const all = await stored(name); return all.length > 0 && all; }, () => `an exemplar of ${name}; ${prometheus.log}`, 20_000);
      for (const { seriesLabels, exemplars } of found) {
        assert.deepEqual([seriesLabels.model, seriesLabels.backend], ['m1', 'b1']);
        for (const { labels, value } of exemplars) {
          assert.ok([0, 1, 2, 3, 4].map(trace).includes(labels.trace_id), JSON.stringify(labels));
          assert.ok(Number(value) <= Number(seriesLabels.le.replace('+Inf', 'Infinity')));
        }
      }
      assert.ok(found.flatMap((s) => s.exemplars).length <= most);
    }
  });

  test('a client that asks for both in turn, and two at once, get each what they asked for', async (t) => {
    const { nexus } = await pair(t, {}, on);
    const both = await Promise.all(Array.from({ length: 20 }, (_, n) => page_of(nexus.port, n % 2 ? om : null)));
    both.forEach((r, n) => {
      assert.equal(r.headers.get('content-type'), n % 2 ? types.openmetrics : types.text);
      assert.equal(r.text.endsWith('# EOF\n'), n % 2 === 1);
    });
  });
});
