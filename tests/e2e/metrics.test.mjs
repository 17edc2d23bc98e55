// What is counted, and how it reads at /metrics and /v1/stats: one group a user story.
import { RawClient, answer_plainly, answer_probe, assert, assert_error, chat, chat_answer, free_port, get, group, histograms, median, pair, parse_metrics, pending_is, post, request, settings, sleep, sse, start_backend, start_nexus,
         test, until } from './harness.mjs';

const path = '/v1/chat/completions';
const scrape = async (nexus) => parse_metrics((await get(nexus.port, '/metrics')).text);
const stats = async (nexus) => (await get(nexus.port, '/v1/stats')).json;

// Counts settle a moment after the client has its last byte.
async function scrape_when(nexus, condition, what) {
  let page;
  let last;
  await until(async () => { page = await scrape(nexus); last = condition(page); return last; }, what);
  return page;
}
const requests_are = (nexus, n) => scrape_when(nexus, (s) => s.sum('nexus_requests_total') === n, `nexus_requests_total at ${n}`);

const seconds = ['0.1', '0.25', '0.5', '1', '2.5', '5', '10', '30', '60', '120', '300', '+Inf'];
const tokens = ['10', '50', '100', '500', '1000', '2000', '4000', '8000', '16000', '32000', '64000', '128000', '+Inf'];
const first_token = ['0.001', '0.005', '0.01', '0.02', '0.04', '0.06', '0.08', '0.1', '0.25', '0.5', '0.75', '1', '2.5', '5', '7.5', '10', '20', '40', '80', '160', '640', '+Inf'];
const per_token = ['0.001', '0.0025', '0.005', '0.01', '0.025', '0.05', '0.075', '0.1', '0.15', '0.2', '0.3', '0.5', '1', '2.5', '+Inf'];
const overhead = ['0.00001', '0.000025', '0.00005', '0.0001', '0.00025', '0.0005', '0.001', '0.0025', '0.005', '0.01', '0.05', '0.1', '+Inf'];

// family, type, labels (without le), buckets of a histogram.
const families = [
  ['nexus_requests_total', 'counter', ['backend', 'model', 'status']],
  ['nexus_errors_total', 'counter', ['error_type', 'model']],
  ['nexus_request_duration_seconds', 'histogram', ['backend', 'model'], seconds],
  ['nexus_backend_latency_seconds', 'histogram', ['backend'], seconds],
  ['nexus_tokens_total', 'histogram', ['backend', 'model', 'type'], tokens],
  ['nexus_backends_total', 'gauge', []],
  ['nexus_backends_healthy', 'gauge', []],
  ['nexus_models_available', 'gauge', []],
  ['nexus_pending_requests', 'gauge', ['backend']],
  ['nexus_time_to_first_token_seconds', 'histogram', ['backend', 'model'], first_token],
  ['nexus_time_per_output_token_seconds', 'histogram', ['backend', 'model'], per_token],
  ['nexus_overhead_seconds', 'histogram', [], overhead],
  ['nexus_backend_attempts_total', 'counter', ['backend', 'outcome']],
  ['nexus_client_disconnects_total', 'counter', ['phase']],
  ['nexus_responses_without_usage_total', 'counter', ['backend']],
  ['nexus_prompt_tokens_cached_total', 'counter', ['backend', 'model']],
  ['nexus_endpoint_requests_total', 'counter', ['endpoint', 'status']],
  ['nexus_queue_depth', 'gauge', ['backend']],
  ['nexus_queue_capacity', 'gauge', []],
  ['nexus_queue_rejected_total', 'counter', ['reason']],
  ['nexus_backend_in_flight', 'gauge', ['backend']],
  ['nexus_limit_rejections_total', 'counter', ['limit']],
  ['nexus_http_rejections_total', 'counter', ['reason']],
  ['nexus_affinity_total', 'counter', ['outcome']],
  ['nexus_spans_exported_total', 'counter', []],
  ['nexus_spans_dropped_total', 'counter', ['reason']],
  ['nexus_backend_up', 'gauge', ['backend']],
  ['nexus_backend_ejected', 'gauge', ['backend']],
  ['nexus_client_connections', 'gauge', []],
  ['nexus_backend_connections', 'gauge', ['backend']],
  ['nexus_tls_handshakes_total', 'counter', ['outcome', 'side']],
  ['nexus_build_info', 'gauge', ['tls_library', 'version']],
  ['nexus_config_last_reload_successful', 'gauge', []],
  ['nexus_config_last_reload_success_timestamp_seconds', 'gauge', []],
  ['process_cpu_seconds_total', 'counter', []],
  ['process_resident_memory_bytes', 'gauge', []],
  ['process_virtual_memory_bytes', 'gauge', []],
  ['process_open_fds', 'gauge', []],
  ['process_max_fds', 'gauge', []],
  ['process_start_time_seconds', 'gauge', []],
];

group('US1 basic request tracking', () => {
  test('T016 /metrics is the Prometheus text format, every family of the contract with its type, labels and buckets', async (t) => {
    const { nexus, backend } = await pair(t, { kind: 'vllm', models: ['llama3:70b'] });
    await post(nexus.port, path, chat('llama3:70b'));
    await post(nexus.port, path, chat('llama3:70b', { stream: true }));
    backend.answer = (_, reply) => reply.json({ no: 'usage' }, 500);
    await post(nexus.port, path, chat('llama3:70b'));
    await requests_are(nexus, 3);
    const r = await get(nexus.port, '/metrics');
    assert.equal(r.status, 200);
    assert.equal(r.headers.get('content-type'), 'text/plain; version=0.0.4; charset=utf-8');
    const page = parse_metrics(r.text);
    for (const [name, type, labels, buckets] of families) {
      const family = page.families.get(name);
      assert.ok(family, `${name} is missing`);
      assert.equal(family.type, type, name);
      assert.ok(family.samples.length > 0, `${name} has no sample`);
      for (const s of family.samples) assert.deepEqual(Object.keys(s.labels).filter((l) => l !== 'le').sort(), labels, name);
      if (buckets) for (const h of histograms(name, family).values()) assert.deepEqual(h.les, buckets, name);
    }
    assert.equal(page.value('nexus_requests_total', { model: 'llama3_70b', backend: 'b1', status: 200 }), 2);
    assert.equal(page.value('nexus_requests_total', { model: 'llama3_70b', backend: 'b1', status: 500 }), 1);
  });

  test('series that are known to exist are there from the start, at 0', async (t) => {
    const { nexus } = await pair(t);
    const page = await scrape(nexus);
    assert.equal(page.value('nexus_pending_requests', { backend: 'b1' }), 0);
    assert.equal(page.value('nexus_backend_up', { backend: 'b1' }), 1);
    for (const outcome of ['ok', 'connect_error', 'timeout', 'bad_response', 'truncated', 'status_429', 'status_5xx', 'cancelled']) {
      assert.equal(page.value('nexus_backend_attempts_total', { backend: 'b1', outcome }), 0, outcome);
    }
    for (const phase of ['request', 'waiting', 'streaming']) assert.equal(page.value('nexus_client_disconnects_total', { phase }), 0, phase);
    for (const reason of ['malformed', 'header_timeout', 'header_too_large', 'unknown_path', 'method']) assert.equal(page.value('nexus_http_rejections_total', { reason }), 0, reason);
    assert.ok(page.select('nexus_backend_latency_seconds_count', { backend: 'b1' }).length === 1);
    assert.equal(page.sum('nexus_requests_total'), 0);
  });

  test('HEAD works on both pages, and other methods are 405', async (t) => {
    const { nexus } = await pair(t);
    for (const p of ['/metrics', '/v1/stats']) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('HEAD', p);
      const head = await client.response();
      assert.equal(head.status, 200);
      assert.equal(head.body.length, 0);
      client.send('POST', p, {}, '');
      const wrong = await client.response();
      assert_error(wrong, 405);
      assert.deepEqual(wrong.headers.get('allow').split(/, */).sort(), ['GET', 'HEAD', 'OPTIONS']);
    }
  });

  test('T017 /v1/stats has the fields of the contract, in order, with one decimal place', async (t) => {
    const backends = [await start_backend(t, { models: ['m-b', 'm-a'] }), await start_backend(t, { models: ['m-c'] })];
    const nexus = await start_nexus(t, { backends: [{ name: 'zulu:1', mock: backends[0] }, { name: 'alpha', mock: backends[1] }] });
    const before = await get(nexus.port, '/v1/stats');
    assert.equal(before.status, 200);
    assert.match(before.headers.get('content-type'), /^application\/json/);
    check_stats(before);
    assert.deepEqual(before.json.backends.map((b) => b.id), ['alpha', 'zulu:1']);
    assert.deepEqual(before.json.models.map((m) => m.name), ['m-a', 'm-b', 'm-c']);
    for (const model of ['m-c', 'm-c', 'm-b', 'none']) await post(nexus.port, path, chat(model));
    await requests_are(nexus, 4);
    const after = await get(nexus.port, '/v1/stats');
    check_stats(after);
    assert.deepEqual(after.json.requests, { total: 4, success: 3, errors: 1 });
    assert.deepEqual(after.json.models.slice(0, 2).map((m) => [m.name, m.requests]), [['m-c', 2], ['m-b', 1]]);
    assert.equal(after.json.backends.find((b) => b.id === 'zulu:1').requests, 1);
  });

  test('T018 each completion moves nexus_requests_total by one, on every endpoint, plain and streamed', async (t) => {
    const { nexus } = await pair(t);
    let n = 0;
    for (const endpoint of ['/v1/chat/completions', '/v1/completions', '/v1/embeddings']) {
      for (const stream of [false, true]) {
        await post(nexus.port, endpoint, chat('m1', { stream: stream && endpoint !== '/v1/embeddings', prompt: 'x', input: 'x' }));
        n++;
        const page = await requests_are(nexus, n);
        assert.equal(page.value('nexus_requests_total', { model: 'm1', backend: 'b1', status: 200 }), n);
        assert.equal(page.sum('nexus_errors_total'), 0);
      }
    }
  });

  test('reading pages, wrong methods and unknown paths are no requests', async (t) => {
    const { nexus } = await pair(t);
    for (const [method, p] of [['GET', '/metrics'], ['GET', '/v1/stats'], ['GET', '/v1/models'], ['GET', '/v1/models/m1'], ['GET', '/health'], ['GET', path], ['POST', '/nowhere'], ['POST', '/health']]) {
      await request(nexus.port, method, p);
    }
    await sleep(50);
    const page = await scrape(nexus);
    assert.equal(page.sum('nexus_requests_total'), 0);
    assert.equal(page.sum('nexus_errors_total'), 0);
    assert.equal(page.sum('nexus_request_duration_seconds_count'), 0);
    assert.equal((await stats(nexus)).requests.total, 0);
  });

  // what, what to do with (nexus, backend), then: status, error type, model and backend labels.
  const errors = [
    ['an unknown model', (n) => post(n.port, path, chat('nobody-has-this')), 404, 'no_backend', 'unknown', 'none'],
    ['bad JSON', (n) => post(n.port, path, '{"model'), 400, 'bad_request', 'unknown', 'none'],
    ['a body without model', (n) => post(n.port, path, '{}'), 400, 'bad_request', 'unknown', 'none'],
    ['a body over max_body', (n) => post(n.port, path, chat('m1', { pad: 'x'.repeat(5000) })), 413, 'bad_request', 'unknown', 'none'],
    ['a 400 of the backend', (n, b) => { b.answer = (_, r) => r.json({ error: {} }, 400); return post(n.port, path, chat()); }, 400, 'bad_request', 'm1', 'b1'],
    ['a 500 of the backend', (n, b) => { b.answer = (_, r) => r.json({ error: {} }, 500); return post(n.port, path, chat()); }, 500, 'backend_error', 'm1', 'b1'],
    ['a 429 of the backend', (n, b) => { b.answer = (_, r) => r.json({ error: {} }, 429); return post(n.port, path, chat()); }, 429, 'backend_error', 'm1', 'b1'],
    ['a backend that refuses', async (n, b) => { await b.stop(); return post(n.port, path, chat()); }, 502, 'backend_error', 'm1', 'b1'],
    ['a backend that resets', (n, b) => { b.answer = (_, r) => r.reset(); return post(n.port, path, chat()); }, 502, 'backend_error', 'm1', 'b1'],
    ['a backend that speaks no HTTP', (n, b) => { b.answer = (_, r) => r.raw('220 smtp ready\r\n\r\n'); return post(n.port, path, chat()); }, 502, 'parse_error', 'm1', 'b1'],
    ['a backend that is silent', (n, b) => { b.answer = () => {}; return post(n.port, path, chat()); }, 504, 'timeout', 'm1', 'b1'],
    ['a stream that breaks', (n, b) => { b.answer = (_, r) => { r.stream(); r.piece('data: x\n\n'); setTimeout(() => r.reset(), 30); }; return post(n.port, path, chat('m1', { stream: true })); }, 200, 'backend_error', 'm1', 'b1'],
    ['a plain body cut short', (n, b) => { b.answer = (_, r) => { r.raw('HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{'); setTimeout(() => r.fin(), 30); }; return post(n.port, path, chat()); }, 200, 'backend_error', 'm1', 'b1'],
    ['a client that leaves while waiting', async (n, b) => { b.answer = () => {}; const c = await RawClient.connect(n.port); c.send('POST', path, {}, chat()); await b.request(); c.close(); }, 499, 'client_closed', 'm1', 'b1'],
    ['a client that leaves a stream', async (n, b) => { b.answer = (_, r) => { r.stream(); r.piece('data: x\n\n'); }; const c = await RawClient.connect(n.port); c.send('POST', path, {}, chat('m1', { stream: true })); await c.head(); await c.piece(); c.close(); }, 200, 'client_closed', 'm1', 'b1'],
    ['a client that leaves its own body unfinished', async (n) => { const c = await RawClient.connect(n.port); c.send('POST', path, { 'Content-Length': 500 }); c.write('{'); await sleep(20); c.close(); }, 499, 'client_closed', 'unknown', 'none'],
  ];
  for (const [what, act, status, error_type, model, backend_label] of errors) {
    test(`${what} is one request with status ${status} and one error of type ${error_type}`, async (t) => {
      const { nexus, backend } = await pair(t, {}, { server: { max_body: '4k' }, upstream: { first_byte_timeout: '1s' } });
      await act(nexus, backend);
      const page = await requests_are(nexus, 1);
      assert.equal(page.value('nexus_requests_total', { model, backend: backend_label, status }), 1, JSON.stringify(page.select('nexus_requests_total')));
      assert.equal(page.value('nexus_errors_total', { error_type, model }), 1, JSON.stringify(page.select('nexus_errors_total')));
      assert.equal(page.sum('nexus_errors_total'), 1);
      assert.equal(page.sum('nexus_request_duration_seconds_count'), backend_label === 'none' || what === 'a backend that refuses' ? 0 : 1, 'what reached a backend has a duration, and nothing else');
      const { requests } = await stats(nexus);
      assert.deepEqual(requests, { total: 1, success: 0, errors: 1 });
      await pending_is(nexus, 0);
    });
  }

  test('no healthy backend is one request with status 503 under the model’s own name', async (t) => {
    const { nexus, backend } = await pair(t, {}, { health: { interval: '100ms', failures: 1 } });
    await backend.stop();
    await scrape_when(nexus, (s) => s.value('nexus_backends_healthy') === 0, 'no healthy backend');
    assert.equal((await post(nexus.port, path, chat())).status, 503);
    const page = await requests_are(nexus, 1);
    assert.equal(page.value('nexus_requests_total', { model: 'm1', backend: 'none', status: 503 }), 1, JSON.stringify(page.select('nexus_requests_total')));
    assert.equal(page.value('nexus_errors_total', { error_type: 'no_healthy_backend', model: 'm1' }), 1);
  });

  test('a refused key is one request with status 401', async (t) => {
    const { nexus } = await pair(t, {}, { server: { api_keys_file: t.file('keys', 'alice sk-alice-0123456789\n') } });
    await post(nexus.port, path, chat());
    let page;
    await until(async () => {
      page = parse_metrics((await get(nexus.port, '/metrics', { headers: { Authorization: 'Bearer sk-alice-0123456789' } })).text);
      return page.sum('nexus_requests_total') === 1;
    }, 'one request counted');
    assert.equal(page.value('nexus_requests_total', { model: 'unknown', backend: 'none', status: 401 }), 1);
    assert.equal(page.value('nexus_errors_total', { error_type: 'bad_request', model: 'unknown' }), 1);
  });

  test('what ends before its head could be read is no request, and counted as a rejection alone', async (t) => {
    const { nexus } = await pair(t, {}, { server: { header_timeout: '200ms', max_header: '2k' } });
    for (const [reason, bytes] of [['malformed', 'NONSENSE\r\n\r\n'], ['header_timeout', 'POST /v1/chat'], ['header_too_large', `POST ${path} HTTP/1.1\r\nX: ${'y'.repeat(5000)}\r\n`]]) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.write(bytes);
      await client.ended(5_000);
      const page = await scrape_when(nexus, (s) => s.value('nexus_http_rejections_total', { reason }) === 1, `${reason} at 1`);
      assert.equal(page.sum('nexus_requests_total'), 0);
    }
  });

  test('clients that leave are counted by the phase in which they left', async (t) => {
    const { nexus, backend } = await pair(t);
    const leave = async (phase, begin) => {
      const client = await RawClient.connect(nexus.port);
      await begin(client);
      client.close();
      await scrape_when(nexus, (s) => s.value('nexus_client_disconnects_total', { phase }) === 1, `phase ${phase} at 1`);
    };
    await leave('request', async (c) => { c.send('POST', path, { 'Content-Length': 100 }); c.write('{"mo'); await sleep(30); });
    backend.answer = () => {};
    await leave('waiting', async (c) => { c.send('POST', path, {}, chat()); await backend.request(1); });
    backend.answer = (_, r) => { r.stream(); r.piece('data: x\n\n'); };
    await leave('streaming', async (c) => { c.send('POST', path, {}, chat('m1', { stream: true })); await c.head(); await c.piece(); });
    const page = await scrape(nexus);
    assert.equal(page.sum('nexus_client_disconnects_total'), 3);
  });

  test('a client cannot make series: a hundred unknown names are one', async (t) => {
    const { nexus } = await pair(t);
    for (let i = 0; i < 100; i++) await post(nexus.port, path, chat(`invented-${i}`));
    const page = await requests_are(nexus, 100);
    assert.equal(page.select('nexus_requests_total').length, 1);
    assert.equal(page.value('nexus_requests_total', { model: 'unknown', backend: 'none', status: 404 }), 100);
    assert.ok(!(await stats(nexus)).models.some((m) => m.name.startsWith('invented')));
  });

  test('T015 names are sanitised to the letter of the rule, and names that collide are one series', async (t) => {
    const names = [['llama3:70b', 'llama3_70b'], ['123model', '_123model'], ['org/Mod-el.v1', 'org_Mod_el_v1'], ['Grüße', 'Gr__e'], ['漢字', '__'], ['gpt-4', 'gpt_4'], ['gpt_4', 'gpt_4'], ['gpt.4', 'gpt_4']];
    const backend = await start_backend(t, { models: names.map(([n]) => n) });
    const nexus = await start_nexus(t, { backends: [{ name: 'ollama-local:11434', mock: backend }] });
    for (const [name] of names) assert.equal((await post(nexus.port, path, chat(name))).status, 200, name);
    const page = await requests_are(nexus, names.length);
    for (const [name, label] of names) {
      assert.equal(page.value('nexus_requests_total', { model: label, backend: 'ollama_local_11434', status: 200 }), label === 'gpt_4' ? 3 : 1, name);
    }
    assert.equal(page.value('nexus_tokens_total_count', { model: 'gpt_4', backend: 'ollama_local_11434', type: 'prompt' }), 3);
    for (const family of page.families.values()) for (const s of family.samples) for (const [k, v] of Object.entries(s.labels)) {
      if (k === 'model' || k === 'backend') assert.match(v, /^[a-zA-Z_][a-zA-Z0-9_]*$/);
    }
    const listed = (await stats(nexus)).models.map((m) => m.name).sort();
    assert.deepEqual(listed, names.map(([n]) => n).sort(), 'stats keeps the names as they are');
  });

  test('labels = raw writes names as they are, escaped', async (t) => {
    const names = ['gpt-4', 'gpt_4', 'a"b\\c', 'Grüße'];
    const { nexus } = await pair(t, { models: names }, { metrics: { labels: 'raw' } });
    for (const name of names) await post(nexus.port, path, chat(name));
    const page = await requests_are(nexus, names.length);
    for (const name of names) assert.equal(page.value('nexus_requests_total', { model: name, backend: 'b1', status: 200 }), 1, name);
  });

  test('a request under an alias is counted under the name that the client asked for', async (t) => {
    const { nexus } = await pair(t, {}, { aliases: { 'gpt-4': 'm1' } });
    await post(nexus.port, path, chat('gpt-4'));
    const page = await requests_are(nexus, 1);
    assert.equal(page.value('nexus_requests_total', { model: 'gpt_4', backend: 'b1', status: 200 }), 1);
    assert.equal(page.sum('nexus_fallbacks_total'), 0);
  });

  test('counts survive the removal of their backend and every reload', async (t) => {
    const { nexus, backend } = await pair(t);
    for (let i = 0; i < 5; i++) await post(nexus.port, path, chat());
    await requests_are(nexus, 5);
    const other = await start_backend(t, { models: ['m2'] });
    nexus.reload({ backends: [{ name: 'b2', url: other.url, type: 'generic' }] });
    await until(async () => (await post(nexus.port, path, chat('m2'))).status === 200, 'the new backend');
    const page = await scrape(nexus);
    assert.equal(page.value('nexus_requests_total', { model: 'm1', backend: 'b1', status: 200 }), 5);
    assert.equal(page.value('nexus_request_duration_seconds_count', { model: 'm1', backend: 'b1' }), 5);
    assert.equal(page.value('nexus_backends_total'), 1);
    assert.equal(page.value('nexus_config_last_reload_successful'), 1);
    const { backends, removed_backends } = await stats(nexus);
    assert.deepEqual(backends.map((b) => [b.id, b.requests >= 1]), [['b2', true]]);
    assert.deepEqual(removed_backends.map((b) => [b.id, b.requests]), [['b1', 5]]);
    nexus.reload({ backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
    await until(async () => (await post(nexus.port, path, chat())).status === 200, 'the old backend again');
    await scrape_when(nexus, (s) => s.value('nexus_requests_total', { model: 'm1', backend: 'b1', status: 200 }) === 6, 'it counts on from where it was');
    nexus.reload('[server]\nnonsense = 1\n');
    await scrape_when(nexus, (s) => s.value('nexus_config_last_reload_successful') === 0, 'a failed reload told');
  });

  test('T068 with metrics off both pages are 503 metrics_unavailable and proxying goes on', async (t) => {
    const { nexus } = await pair(t, {}, { metrics: { enabled: 'no' } });
    for (const p of ['/metrics', '/v1/stats']) {
      const error = assert_error(await get(nexus.port, p), 503, 'metrics_unavailable');
      assert.equal(error.type, 'service_unavailable');
      assert.equal(error.code, 'metrics_unavailable');
    }
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    assert.equal((await get(nexus.port, '/health')).status, 200);
  });

  test('with metrics_listen the pages stand there alone', async (t) => {
    const port = await free_port();
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { server: { metrics_listen: `127.0.0.1:${port}` }, backends: [{ name: 'b1', mock: backend }] }, { ready: 'no' });
    await until(async () => (await post(nexus.port, path, chat())).status === 200, 'serving');
    await until(async () => parse_metrics((await get(port, '/metrics')).text).value('nexus_requests_total', { model: 'm1', backend: 'b1', status: 200 }) === 1, 'counted there');
    assert.equal((await get(port, '/v1/stats')).status, 200);
    for (const p of ['/metrics', '/v1/stats']) assert.equal((await get(nexus.port, p)).status, 404);
  });
});

// The JSON against the contract's schema; averages have exactly one decimal place in the text itself.
function check_stats(response) {
  const page = response.json;
  assert.ok(Number.isInteger(page.uptime_seconds) && page.uptime_seconds >= 0);
  for (const key of ['total', 'success', 'errors']) assert.ok(Number.isInteger(page.requests[key]) && page.requests[key] >= 0, key);
  assert.equal(page.requests.errors, page.requests.total - page.requests.success);
  for (const b of page.backends) {
    assert.equal(typeof b.id, 'string');
    assert.ok(Number.isInteger(b.requests) && Number.isInteger(b.pending));
    assert.equal(typeof b.average_latency_ms, 'number');
  }
  for (const m of page.models) {
    assert.equal(typeof m.name, 'string');
    assert.ok(Number.isInteger(m.requests));
    assert.equal(typeof m.average_duration_ms, 'number');
  }
  const averages = [...response.text.matchAll(/"average_(?:latency|duration)_ms"\s*:\s*([^,}\s]+)/g)].map((m) => m[1]);
  assert.equal(averages.length, page.backends.length + page.models.length);
  for (const text of averages) assert.match(text, /^\d+\.\d$/);
  const ids = page.backends.map((b) => b.id);
  assert.deepEqual(ids, [...ids].sort());
  const order = page.models.map((m) => [m.requests, m.name]);
  assert.deepEqual(order, [...order].sort((a, b) => b[0] - a[0] || (a[1] < b[1] ? -1 : 1)));
}

group('US2 performance', () => {
  test('T031 requests of known length fall into the right duration buckets', { limit_ms: 30_000 }, async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (request, reply) => { await sleep(request.json.ms); reply.json(chat_answer('m1')); };
    const delays = [0, 0, 0, 150, 150, 300, 650, 650, 1300];
    const measured = await Promise.all(delays.map(async (ms) => {
      const start = performance.now();
      await post(nexus.port, path, chat('m1', { ms }));
      return performance.now() - start;
    }));
    const page = await requests_are(nexus, delays.length);
    const [h] = [...histograms('nexus_request_duration_seconds', page.families.get('nexus_request_duration_seconds')).values()];
    const at = (le) => h.buckets.find(([bound]) => bound === le)[1];
    // A duration lies between the backend's delay and what the client measured, so each bucket does between those counts.
    for (const le of [0.1, 0.25, 0.5, 1, 2.5]) {
      const most = delays.filter((ms) => ms <= le * 1000).length;
      const least = measured.filter((ms) => ms <= le * 1000).length;
      assert.ok(at(le) >= least && at(le) <= most, `le=${le}: ${at(le)}, of ${least} to ${most}`);
    }
    assert.equal(h.count, delays.length);
    const total = delays.reduce((a, b) => a + b) / 1000;
    const seen = measured.reduce((a, b) => a + b) / 1000;
    assert.ok(h.sum >= total - 0.02 && h.sum <= seen, `sum ${h.sum} s for ${total} s of waiting, ${seen} s as the clients saw it`);
  });

  test('T032 each successful health check is one observation of the backend’s latency; failed ones are none', async (t) => {
    let good = true;
    let answered = 0;
    const probe = async (request, reply, backend) => {
      await sleep(130);
      if (!good) return reply.json({}, 500);
      answered++;
      return answer_probe(request, reply, backend);
    };
    const { nexus } = await pair(t, { probe }, { health: { interval: '200ms', failures: 1 } });
    const seen = (s) => s.value('nexus_backend_latency_seconds_count', { backend: 'b1' });
    const page = await scrape_when(nexus, (s) => seen(s) >= 3, 'three checks');
    assert.ok(seen(page) <= answered);
    assert.equal(page.value('nexus_backend_latency_seconds_bucket', { backend: 'b1', le: '0.1' }), 0, 'none took under 0.1 s');
    if (!settings.sanitised) assert.ok(page.value('nexus_backend_latency_seconds_bucket', { backend: 'b1', le: '0.5' }) >= 2);
    assert.ok(page.value('nexus_backend_latency_seconds_sum', { backend: 'b1' }) >= 0.125 * seen(page));
    good = false;
    await scrape_when(nexus, (s) => s.value('nexus_backend_up', { backend: 'b1' }) === 0, 'down');
    const stopped = seen(await scrape(nexus));
    await sleep(700);
    assert.equal(seen(await scrape(nexus)), stopped);
  });

  test('T033 /v1/stats averages are duration sum over count, in milliseconds, rounded to one decimal', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['fast', 'slow'] });
    backend.answer = async (request, reply) => { await sleep(request.json.model === 'slow' ? 120 : 5); reply.json(chat_answer('m')); };
    for (const model of ['fast', 'fast', 'fast', 'slow', 'slow']) await post(nexus.port, path, chat(model));
    const page = await requests_are(nexus, 5);
    const answer = await stats(nexus);
    for (const name of ['fast', 'slow']) {
      const wanted = (page.value('nexus_request_duration_seconds_sum', { model: name, backend: 'b1' }) / page.value('nexus_request_duration_seconds_count', { model: name, backend: 'b1' })) * 1000;
      const told = answer.models.find((m) => m.name === name).average_duration_ms;
      assert.ok(Math.abs(told - wanted) <= 0.0501, `${name}: ${told}, from /metrics ${wanted}`);
    }
    assert.ok(answer.models.find((m) => m.name === 'slow').average_duration_ms >= 115);
    const wanted = (page.sum('nexus_request_duration_seconds_sum', { backend: 'b1' }) / 5) * 1000;
    assert.ok(Math.abs(answer.backends[0].average_latency_ms - wanted) <= 0.0501);
  });

  test('a duration is within 5 ms of what the client measured', { serial: true }, async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (request, reply) => { await sleep(request.json.ms); reply.json(chat_answer('m1')); };
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    const differences = [];
    let before = 0;
    for (let i = 1; i <= 9; i++) {
      const body = chat('m1', { ms: 20 * i });
      const start = performance.now();
      client.send('POST', path, {}, body);
      await client.response();
      const measured = performance.now() - start;
      const page = await requests_are(nexus, i);
      const sum = page.sum('nexus_request_duration_seconds_sum') * 1000;
      differences.push(Math.abs(measured - (sum - before)));
      before = sum;
    }
    assert.ok(median(differences) < 5 * settings.slow, `${differences.map((d) => d.toFixed(1))} ms`);
  });

  test('time to the first token is that of streams, from the request to the first body byte', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (request, reply) => {
      if (!request.json.stream) return reply.json(chat_answer('m1'));
      reply.stream();          // the head at once, the first byte later
      await sleep(160);
      reply.piece('data: x\n\n');
      await sleep(200);
      reply.piece('data: [DONE]\n\n');
      return reply.finish();
    };
    await post(nexus.port, path, chat());
    await post(nexus.port, path, chat('m1', { stream: true }));
    const page = await requests_are(nexus, 2);
    const labels = { model: 'm1', backend: 'b1' };
    assert.equal(page.value('nexus_time_to_first_token_seconds_count', labels), 1);
    const sum = page.value('nexus_time_to_first_token_seconds_sum', labels);
    assert.ok(sum > 0.155 && sum < 0.155 + 0.1 * settings.slow, `${sum} s`);
  });

  test('time per output token is (last byte − first byte) / (completion tokens − 1) of streams with usage', async (t) => {
    const { nexus, backend } = await pair(t);
    let first;
    let last;
    backend.answer = async (_, reply) => {
      reply.stream();
      first = performance.now();
      for (let i = 0; i < 6; i++) {
        last = performance.now();
        reply.piece(sse({ choices: [{ index: 0, delta: { content: 'x' } }] }));
        if (i < 5) await sleep(60);
      }
      reply.piece(sse({ choices: [], usage: { prompt_tokens: 5, completion_tokens: 6, total_tokens: 11 } }));
      reply.piece('data: [DONE]\n\n');
      reply.finish();
    };
    await post(nexus.port, path, chat('m1', { stream: true }));
    const page = await requests_are(nexus, 1);
    const labels = { model: 'm1', backend: 'b1' };
    assert.equal(page.value('nexus_time_per_output_token_seconds_count', labels), 1);
    const sum = page.value('nexus_time_per_output_token_seconds_sum', labels);
    const sent = (last - first) / 1000 / 5;
    assert.ok(Math.abs(sum - sent) < 0.01 * settings.slow, `${sum} s, sent at ${sent} s a token`);
  });

  test('the time that Nexus itself keeps a request does not contain the backend’s', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (_, reply) => { await sleep(100); reply.json(chat_answer('m1')); };
    for (let i = 0; i < 5; i++) await post(nexus.port, path, chat());
    const page = await requests_are(nexus, 5);
    assert.equal(page.value('nexus_overhead_seconds_count'), 5);
    assert.ok(page.value('nexus_overhead_seconds_sum') < 0.05 * settings.slow, `${page.value('nexus_overhead_seconds_sum')} s`);
  });
});

group('US3 routing intelligence', () => {
  test('T041 a request served under another model is one fallback from the one to the other', async (t) => {
    const big = await start_backend(t, { models: ['big:70b'] });
    const small = await start_backend(t, { models: ['small:7b'] });
    const nexus = await start_nexus(t, { backends: [{ name: 'big', mock: big }, { name: 'small', mock: small }], fallbacks: { 'big:70b': 'small:7b' }, health: { interval: '100ms', failures: 1 }, aliases: { best: 'big:70b' } });
    assert.equal((await post(nexus.port, path, chat('big:70b'))).headers.get('x-nexus-backend'), 'big');
    await big.stop();
    await scrape_when(nexus, (s) => s.value('nexus_backends_healthy') === 1, 'one backend down');
    for (const model of ['big:70b', 'best']) {
      const r = await post(nexus.port, path, chat(model));
      assert.equal(r.status, 200, r.text);
      assert.equal(r.headers.get('x-nexus-fallback-model'), 'small:7b');
    }
    assert.equal(small.requests[0].json.model, 'small:7b');
    const page = await requests_are(nexus, 3);
    for (const asked of ['big_70b', 'best']) assert.equal(page.value('nexus_fallbacks_total', { from_model: asked, to_model: 'small_7b' }), 1, asked);
    assert.equal(page.sum('nexus_fallbacks_total'), 2);
    assert.equal(page.value('nexus_requests_total', { model: 'big_70b', backend: 'small', status: 200 }), 1, 'counted under the model that was asked for');
  });

  test('T042 the tokens of plain answers, embeddings and streams are recorded as the backend told them', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['m1', 'e1'] });
    const usage = (p, c) => ({ prompt_tokens: p, completion_tokens: c, total_tokens: p + c });
    backend.answer = (request, reply) => {
      const ask = request.json;
      if (request.path.endsWith('embeddings')) return reply.json({ data: [], usage: { prompt_tokens: 700, total_tokens: 700 } });
      if (!ask.stream) return reply.json({ choices: [], usage: usage(ask.p, ask.c) });
      reply.stream();
      reply.piece(sse({ choices: [{ delta: { content: 'x' } }], usage: usage(ask.p, 1) }));
      reply.piece(sse({ choices: [{ delta: { content: '"usage":{"prompt_tokens":999999}' } }], usage: null }));
      reply.piece(sse({ choices: [], usage: usage(ask.p, ask.c) }));
      reply.piece(sse('[DONE]'));
      return reply.finish();
    };
    await post(nexus.port, path, chat('m1', { p: 10, c: 11 }));
    await post(nexus.port, path, chat('m1', { p: 130_000, c: 0 }));
    await post(nexus.port, path, chat('m1', { p: 60, c: 501, stream: true }));
    await post(nexus.port, '/v1/embeddings', { model: 'e1', input: 'x' });
    const page = await requests_are(nexus, 4);
    const of = (type, model = 'm1') => histograms('nexus_tokens_total', page.families.get('nexus_tokens_total')).get(`backend="b1",model="${model}",type="${type}"`);
    assert.deepEqual([of('prompt').count, of('prompt').sum], [3, 130_070]);
    assert.deepEqual([of('completion').count, of('completion').sum], [3, 512]);
    assert.deepEqual(of('prompt').buckets.map(([, n]) => n), [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]);
    assert.deepEqual(of('completion').buckets.map(([, n]) => n), [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
    assert.deepEqual([of('prompt', 'e1').count, of('prompt', 'e1').sum], [1, 700]);
    assert.equal(of('completion', 'e1')?.count ?? 0, 0);
    assert.equal(page.value('nexus_responses_without_usage_total', { backend: 'b1' }), 0);
  });

  test('answers that tell no usage, or nonsense, are counted as such and record no tokens', async (t) => {
    const { nexus, backend } = await pair(t);
    const bodies = ['{}', '{"usage":null}', '{"usage":{}}', '{"usage":{"prompt_tokens":-5,"completion_tokens":"7"}}', 'no json at all'];
    for (const body of [...bodies, '']) {   // an empty one is an error in disguise
      backend.answer = (_, reply) => reply.body(200, body);
      assert.equal((await post(nexus.port, path, chat())).text, body);
    }
    backend.answer = (_, reply) => { reply.stream(); reply.piece(sse('[DONE]')); reply.finish(); };
    await post(nexus.port, path, chat('m1', { stream: true }));
    backend.answer = (_, reply) => reply.json({}, 404);
    await post(nexus.port, path, chat());
    const page = await requests_are(nexus, bodies.length + 3);
    assert.equal(page.value('nexus_responses_without_usage_total', { backend: 'b1' }), bodies.length + 1);
    assert.equal(page.sum('nexus_errors_total', { error_type: 'backend_error' }), 1);
    assert.equal(page.sum('nexus_tokens_total_count'), 0);
  });

  test('T043 nexus_pending_requests is what is in flight now, on /metrics and /v1/stats alike', async (t) => {
    const { nexus, backend } = await pair(t);
    const replies = [];
    backend.answer = (_, reply) => { replies.push(reply); };
    const answers = [];
    for (let n = 1; n <= 7; n++) {
      answers.push(post(nexus.port, path, chat('m1', { stream: n % 2 === 0 })));
      await backend.request(n);
      await pending_is(nexus, n);
      assert.equal((await stats(nexus)).backends[0].pending, n);
    }
    assert.equal((await scrape(nexus)).sum('nexus_requests_total'), 0, 'what runs is counted nowhere else');
    for (const [i, reply] of replies.entries()) {
      reply.json({});
      await pending_is(nexus, 6 - i);
    }
    await Promise.all(answers);
    await requests_are(nexus, 7);
  });

  test('each try at a backend is one attempt with its outcome', async (t) => {
    const { nexus, backend } = await pair(t, {}, { upstream: { first_byte_timeout: '1s' }, routing: { retries: 0 } });
    const rows = [
      ['ok', (_, r) => r.json({})], ['status_5xx', (_, r) => r.json({}, 503)], ['status_429', (_, r) => r.json({}, 429)], ['timeout', () => {}],
      ['bad_response', (_, r) => r.raw('nonsense\r\n\r\n')], ['truncated', (_, r) => { r.raw('HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{'); setTimeout(() => r.fin(), 20); }],
    ];
    for (const [outcome, answer] of rows) {
      backend.answer = answer;
      await post(nexus.port, path, chat());
      await scrape_when(nexus, (s) => s.value('nexus_backend_attempts_total', { backend: 'b1', outcome }) === 1, `${outcome} at 1`);
    }
    backend.answer = () => {};
    const client = await RawClient.connect(nexus.port);
    client.send('POST', path, {}, chat());
    await backend.request(rows.length + 1);
    client.close();
    await scrape_when(nexus, (s) => s.value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'cancelled' }) === 1, 'cancelled at 1');
    await backend.stop();
    await post(nexus.port, path, chat());
    const page = await scrape_when(nexus, (s) => s.value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'connect_error' }) === 1, 'connect_error at 1');
    assert.equal(page.sum('nexus_backend_attempts_total'), rows.length + 2);
  });
});

group('US4 fleet state', () => {
  test('T051 nexus_backends_total follows the configuration', async (t) => {
    const mocks = [await start_backend(t), await start_backend(t), await start_backend(t)];
    const of = (n) => mocks.slice(0, n).map((m, i) => ({ name: `b${i}`, url: m.url, type: 'generic' }));
    const nexus = await start_nexus(t, { backends: of(1) });
    assert.equal((await scrape(nexus)).value('nexus_backends_total'), 1);
    for (const n of [3, 2]) {
      nexus.reload({ backends: of(n) });
      await scrape_when(nexus, (s) => s.value('nexus_backends_total') === n, `${n} backends`);
      await scrape_when(nexus, (s) => s.select('nexus_pending_requests').length === n && s.value('nexus_backends_healthy') === n, `gauges of ${n} backends`);
    }
  });

  test('T052 nexus_backends_healthy and nexus_backend_up follow health, both ways', async (t) => {
    const a = await start_backend(t, { models: ['a'] });
    const b = await start_backend(t, { models: ['b'] });
    const nexus = await start_nexus(t, { backends: [{ name: 'a', mock: a }, { name: 'b', mock: b }], health: { interval: '100ms', failures: 1, recoveries: 1 } });
    assert.equal((await scrape(nexus)).value('nexus_backends_healthy'), 2);
    await b.stop();
    const page = await scrape_when(nexus, (s) => s.value('nexus_backends_healthy') === 1, 'one healthy');
    assert.equal(page.value('nexus_backend_up', { backend: 'b' }), 0);
    assert.equal(page.value('nexus_backend_up', { backend: 'a' }), 1);
    assert.equal(page.value('nexus_backends_total'), 2);
    await b.start();
    await scrape_when(nexus, (s) => s.value('nexus_backends_healthy') === 2, 'healthy again');
  });

  test('T053 nexus_models_available is the number of distinct models over the healthy backends', async (t) => {
    const a = await start_backend(t, { models: ['shared', 'a1'] });
    const b = await start_backend(t, { models: ['shared', 'b1', 'b2'] });
    const nexus = await start_nexus(t, { backends: [{ name: 'a', mock: a }, { name: 'b', mock: b }], health: { interval: '100ms', failures: 1 } });
    assert.equal((await scrape(nexus)).value('nexus_models_available'), 4);
    a.models = ['shared', 'a1', 'a2', 'a3'];
    await scrape_when(nexus, (s) => s.value('nexus_models_available') === 6, 'two more models');
    await b.stop();
    await scrape_when(nexus, (s) => s.value('nexus_models_available') === 4, 'the models of the healthy one');
  });

  test('T054 /v1/stats shows every backend and model, idle ones at zero', async (t) => {
    const mocks = [await start_backend(t, { models: ['m1', 'idle-model'] }), await start_backend(t, { models: ['m2'] }), await start_backend(t, { models: ['gone'] })];
    await mocks[2].stop();
    const nexus = await start_nexus(t, { backends: mocks.map((mock, i) => ({ name: `b${i}`, mock })), health: { failures: 1 } }, { ready: 'up' });
    await scrape_when(nexus, (s) => s.value('nexus_backends_healthy') === 2, 'two healthy');
    for (let i = 0; i < 3; i++) await post(nexus.port, path, chat('m2'));
    await post(nexus.port, path, chat('m1'));
    await requests_are(nexus, 4);
    const r = await get(nexus.port, '/v1/stats');
    check_stats(r);
    assert.deepEqual(r.json.backends.map((b) => [b.id, b.requests]), [['b0', 1], ['b1', 3], ['b2', 0]]);
    assert.deepEqual(r.json.models.map((m) => [m.name, m.requests]), [['m2', 3], ['m1', 1], ['idle-model', 0]]);
    assert.equal(r.json.backends[2].average_latency_ms, 0);
    assert.match(r.text, /"average_duration_ms"\s*:\s*0\.0/);
  });

  test('connections of clients and to backends are told', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = () => {};
    const clients = await Promise.all(Array.from({ length: 5 }, () => RawClient.connect(nexus.port)));
    for (const c of clients) c.send('POST', path, {}, chat());
    await backend.request(5);
    const page = await scrape_when(nexus, (s) => s.value('nexus_client_connections') >= 6, 'six clients');
    assert.ok(page.value('nexus_backend_connections', { backend: 'b1' }) >= 5);
    for (const c of clients) c.close();
    await scrape_when(nexus, (s) => s.value('nexus_client_connections') === 1, 'only the scraper left');
  });

  test('the process tells of itself', async (t) => {
    const { nexus } = await pair(t);
    const page = await scrape(nexus);
    assert.ok(Math.abs(page.value('process_resident_memory_bytes') - nexus.rss_bytes()) < 8 << 20);
    assert.ok(Math.abs(page.value('process_start_time_seconds') - Date.now() / 1000) < 60);
    assert.ok(page.value('process_open_fds') > 3 && page.value('process_max_fds') >= page.value('process_open_fds'));
    assert.equal(page.sum('nexus_build_info'), 1);
  });
});

group('the whole', () => {
  test('T074 a hundred requests, then every metric is there with the right number', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['m1', 'm2'] });
    backend.answer = (request, reply, b) => {
      const n = request.json.n;
      if (n % 10 === 0) return reply.json({ error: {} }, 500);
      return n % 4 === 1 ? reply.json(chat_answer(request.json.model)) : answer_plainly(request, reply, b);
    };
    const seen = await Promise.all(Array.from({ length: 100 }, (_, n) => post(nexus.port, path, chat(n % 2 ? 'm1' : 'm2', { n, stream: n % 4 === 2 }))));
    const page = await requests_are(nexus, 100);
    assert.equal(page.sum('nexus_requests_total', { status: 200 }), seen.filter((r) => r.status === 200).length);
    assert.equal(page.sum('nexus_requests_total', { status: 500 }), 10);
    assert.equal(page.sum('nexus_requests_total', { model: 'm1' }), 50);
    assert.equal(page.value('nexus_errors_total', { error_type: 'backend_error', model: 'm2' }), 10);
    assert.equal(page.sum('nexus_request_duration_seconds_count'), 100);
    assert.equal(page.sum('nexus_backend_attempts_total'), 100);
    assert.equal(page.value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'ok' }), 90);
    assert.equal(page.value('nexus_pending_requests', { backend: 'b1' }), 0);
    const answer = await stats(nexus);
    assert.deepEqual(answer.requests, { total: 100, success: 90, errors: 10 });
    assert.deepEqual(answer.models.map((m) => [m.name, m.requests]), [['m1', 50], ['m2', 50]]);
  });

  test('T075 completions are the same bytes with metrics on, off and being scraped', async (t) => {
    const texts = [];
    for (const enabled of ['yes', 'no']) {
      const { nexus } = await pair(t, {}, { metrics: { enabled } });
      let stop = false;
      const scraping = (async () => { while (!stop) await get(nexus.port, '/metrics'); })();
      for (let i = 0; i < 20; i++) {
        const plain = await post(nexus.port, path, chat());
        const stream = await post(nexus.port, path, chat('m1', { stream: true }));
        assert.ok(plain.complete && stream.complete);
        texts.push(plain.text + stream.text);
      }
      stop = true;
      await scraping;
    }
    assert.equal(new Set(texts).size, 1);
  });
});
