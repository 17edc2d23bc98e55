// Nexus's own pages: shapes, methods, order, states.
import { RawClient, assert, assert_error, free_port, get, group, pair, parse_metrics, post, request, run_nexus, start_backend, start_nexus, test, until } from './harness.mjs';

const proxied = ['/v1/chat/completions', '/v1/completions', '/v1/embeddings'];
const own = ['/v1/models', '/v1/models/m1', '/health'];

group('endpoints', () => {
  test('GET /health tells status, version, uptime, backends and models', async (t) => {
    const { nexus } = await pair(t, { models: ['m1', 'm2'] });
    const r = await get(nexus.port, '/health');
    assert.equal(r.status, 200);
    assert.match(r.headers.get('content-type'), /^application\/json/);
    const page = r.json;
    assert.equal(page.status, 'healthy');
    assert.equal((await run_nexus(['--version'])).stdout.split(' ')[1], page.version);
    assert.ok(Number.isInteger(page.uptime_seconds) && page.uptime_seconds >= 0 && page.uptime_seconds < 60);
    assert.deepEqual(page.backends, { total: 1, healthy: 1, unhealthy: 0 });
    assert.equal(page.models, 2);
  });

  test('/health is degraded when some backends are down, unhealthy when all are', async (t) => {
    const up = await start_backend(t, { models: ['m1'] });
    const down = await start_backend(t, { models: ['m2'] });
    await down.stop();
    const nexus = await start_nexus(t, { backends: [{ name: 'up', mock: up }, { name: 'down', mock: down }], health: { interval: '200ms', failures: 1 } }, { ready: 'up' });
    await until(async () => (await get(nexus.port, '/health')).json.status === 'degraded', 'status degraded');
    const page = (await get(nexus.port, '/health')).json;
    assert.deepEqual(page.backends, { total: 2, healthy: 1, unhealthy: 1 });
    await up.stop();
    await until(async () => (await get(nexus.port, '/health')).json.status === 'unhealthy', 'status unhealthy');
    assert.equal((await get(nexus.port, '/health')).json.models, 0);
  });

  test('GET /v1/models lists each model of the healthy backends once, by id, and each alias', async (t) => {
    const a = await start_backend(t, { models: ['zeta', 'm/with/slash', 'alpha'] });
    const b = await start_backend(t, { kind: 'ollama', models: ['llama3:70b', 'alpha', 'Ünïcode'] });
    const down = await start_backend(t, { models: ['never'] });
    await down.stop();
    const nexus = await start_nexus(t, { backends: [{ name: 'two', mock: b }, { name: 'one', mock: a }, { name: 'zero', mock: down }], aliases: { short: 'zeta', lost: 'never' } }, { ready: 'up' });
    await until(async () => (await get(nexus.port, '/health')).json.backends.healthy === 2, 'two healthy backends');
    const r = await get(nexus.port, '/v1/models');
    assert.equal(r.status, 200);
    assert.equal(r.json.object, 'list');
    const list = r.json.data.map((m) => [m.id, m.owned_by]);
    assert.deepEqual(list, [['alpha', 'two'], ['llama3:70b', 'two'], ['m/with/slash', 'one'], ['short', 'one'], ['zeta', 'one'], ['Ünïcode', 'two']]);
    for (const m of r.json.data) {
      assert.equal(m.object, 'model');
      assert.ok(Number.isInteger(m.created));
    }
  });

  test("a model's entry is the preferred backend's own, byte for byte; an alias has the entry of its model", async (t) => {
    const own = '{ "id":"m", "created":17.0, "owned_by":"vllm", "max_model_len":32768, "meta":{"n_ctx":[1, 2]} }';
    const listing = (text) => (_, reply) => reply.body(200, `{"data":[null,${text}]}`, { 'Content-Type': 'application/json' });
    const a = await start_backend(t, { probe: listing('{"id":"m","max_model_len":1}') });
    const b = await start_backend(t, { probe: listing(own) });
    const nexus = await start_nexus(t, { backends: [{ name: 'a', mock: a, priority: 60 }, { name: 'b', mock: b, priority: 40 }], aliases: { gpt: 'm' }, health: { interval: '200ms', failures: 1 } });
    const renamed = own.replace('"m"', '"gpt"');
    assert.equal((await get(nexus.port, '/v1/models')).text, `{"object":"list","data":[${renamed},${own}]}`);
    assert.equal((await get(nexus.port, '/v1/models/m')).text, own);
    assert.equal((await get(nexus.port, '/v1/models/gpt')).text, renamed);
    await nexus.logged(/model list incomplete backend=a why=.*1 entries/);
    await b.stop();
    await until(async () => (await get(nexus.port, '/v1/models/m')).text === '{"owned_by":"a","id":"m","max_model_len":1}', "the other backend's entry", 15_000);
  });

  test('GET /v1/models/{id} finds ids with slashes and colons, plain or encoded', async (t) => {
    const { nexus } = await pair(t, { models: ['org/model-7B', 'llama3:70b', 'a b', 'Ü', 'x%2Fy'] });
    for (const [path, id] of [['org/model-7B', 'org/model-7B'], ['org%2Fmodel-7B', 'org/model-7B'], ['org%2fmodel-7B', 'org/model-7B'], ['llama3:70b', 'llama3:70b'],
                              ['llama3%3A70b', 'llama3:70b'], ['a%20b', 'a b'], ['%C3%9C', 'Ü'], ['x%252Fy', 'x%2Fy']]) {
      const r = await get(nexus.port, `/v1/models/${path}`);
      assert.equal(r.status, 200, `${path}: ${r.text}`);
      assert.equal(r.json.id, id);
      assert.equal(r.json.object, 'model');
      assert.equal(r.json.owned_by, 'b1');
    }
    const error = assert_error(await get(nexus.port, '/v1/models/org/other'), 404, 'model_not_found');
    assert.match(error.message, /org\/other/);
  });

  test('HEAD answers as GET does, without the body', async (t) => {
    const { nexus } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (const path of [...own, '/nowhere', '/v1/models/none']) {
      client.send('HEAD', path);
      const head = await client.response();
      client.send('GET', path);
      const full = await client.response();
      assert.equal(head.status, full.status, path);
      assert.equal(head.body.length, 0);
      assert.equal(head.headers.get('content-type'), full.headers.get('content-type'));
      // uptime_seconds may gain a digit between the two
      if (path !== '/health') assert.equal(head.headers.get('content-length'), full.headers.get('content-length'), path);
    }
  });

  test('a wrong method is 405 with Allow, and the connection goes on', async (t) => {
    const { nexus, backend } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    const rows = [...proxied.flatMap((p) => ['GET', 'PUT', 'DELETE', 'PATCH'].map((m) => [m, p, ['OPTIONS', 'POST']])),
                  ...own.flatMap((p) => ['POST', 'PUT', 'DELETE'].map((m) => [m, p, ['GET', 'HEAD', 'OPTIONS']]))];
    for (const [method, path, allowed] of rows) {
      client.send(method, path);
      const r = await client.response();
      assert_error(r, 405);
      assert.deepEqual(r.headers.get('allow').split(/, */).sort(), allowed, `${method} ${path}`);
    }
    assert.equal(backend.requests.length, 0);
  });

  test('an unknown path is 404 in the OpenAI shape, whatever the method', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const [method, path] of [['GET', '/index.html'], ['POST', '/v1'], ['GET', '/v1'], ['POST', '/v1/chat/completionsx'], ['POST', '/v1/chat/completions/'], ['GET', '/V1/models'], ['POST', '/v1/audio/speach'],
                                  ['GET', '/healthz'], ['DELETE', '/nowhere']]) {
      const error = assert_error(await request(nexus.port, method, path), 404);
      assert.notEqual(error.code, 'model_not_found', path);
    }
    assert.equal(backend.requests.length, 0);
  });

  test('a request for an unknown path is counted, logged at most once a second, and told the nearest known path', async (t) => {
    const { nexus } = await pair(t);
    const nearest = { '/chat/completion': '/v1/chat/completions', '//v1/chat/completions': '/v1/chat/completions', '/v1/v1/chat/completions': '/v1/chat/completions', '/models': '/v1/models' };
    for (const [path, known] of Object.entries(nearest)) {
      const error = assert_error(await request(nexus.port, 'POST', path), 404, 'not_found');
      assert.ok(error.message.includes(` ${known}.`), error.message);
    }
    const nothing = assert_error(await get(nexus.port, '/favicon.ico'), 404, 'not_found');
    assert.ok(!nothing.message.includes('nearest'), nothing.message);
    await nexus.logged(/ info "?unknown path"? client=\S+ method=POST path=\/chat\/completion$/m);
    for (const method of ['PUT', 'BREW', 'QUERY']) await request(nexus.port, method, proxied[0]);
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.value('nexus_http_rejections_total', { reason: 'unknown_path' }), 5);
    assert.equal(page.value('nexus_http_rejections_total', { reason: 'method' }), 3);
    assert.equal(page.sum('nexus_requests_total'), 0);
  });

  test('every response has one Date; a backend’s own is kept', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const reply of [await get(nexus.port, '/health'), await get(nexus.port, '/nowhere'), await get(nexus.port, '/metrics'), await post(nexus.port, proxied[0], { model: 'm1' }),
                         await post(nexus.port, proxied[0], { model: 'none' }), await request(nexus.port, 'OPTIONS', '/health')]) {
      const dates = reply.headers.all('date');
      assert.equal(dates.length, 1);
      assert.match(dates[0], /^(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z][a-z] \d{4} \d\d:\d\d:\d\d GMT$/);
      assert.ok(Math.abs(Date.parse(dates[0]) - Date.now()) < 60_000, dates[0]);
    }
    backend.answer = (_, reply) => reply.json({}, 200, { date: 'Sun, 06 Nov 1994 08:49:37 GMT' });
    assert.deepEqual((await post(nexus.port, proxied[0], { model: 'm1' })).headers.all('date'), ['Sun, 06 Nov 1994 08:49:37 GMT']);
  });

  test('a method that Nexus does not know is 501, another version 505, a target over the limit 414, and OPTIONS 204', async (t) => {
    const { nexus } = await pair(t);
    const answer = async (bytes) => {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.write(bytes);
      return client.response();
    };
    const host = 'Host: x\r\n\r\n';
    const unknown = await answer(`QUERY ${proxied[0]} HTTP/1.1\r\n${host}`);
    assert_error(unknown, 501, 'unknown_method');
    assert.match(unknown.json.error.message, /GET, HEAD, POST, DELETE and OPTIONS/);
    assert.match((await answer(`OPTIONS * HTTP/1.1\r\n${host}`)).headers.get('allow'), /DELETE/);
    assert_error(await answer(`CONNECT a:443 HTTP/1.1\r\n${host}`), 405, 'method_not_allowed');
    assert_error(await answer(`GET /health HTTP/2.0\r\n${host}`), 505, 'http_version');
    assert_error(await answer(`GET /${'x'.repeat(20_000)} HTTP/1.1\r\n${host}`), 414, 'target_too_long');
    assert.equal((await answer(`GET http://other/v1/models HTTP/1.2\r\n${host}`)).status, 200);
    for (const target of ['*', proxied[0], '/v1/models']) {
      const r = await answer(`OPTIONS ${target} HTTP/1.1\r\n${host}`);
      assert.equal(r.status, 204);
      assert.ok(r.headers.get('allow').includes('OPTIONS'));
      assert.ok(!r.headers.get('content-length'), 'RFC 9110 8.6');
    }
  });

  test('a query string does not change which page is meant', async (t) => {
    const { nexus } = await pair(t);
    assert.equal((await get(nexus.port, '/health?verbose=1')).status, 200);
    assert.equal((await get(nexus.port, '/v1/models?')).status, 200);
    assert.equal((await post(nexus.port, '/v1/chat/completions?api-version=1', { model: 'm1', messages: [] })).status, 200);
  });

  test('with metrics_listen the own pages of an operator stand there and only there', async (t) => {
    const port = await free_port();
    const { nexus } = await pair(t, {}, { server: { metrics_listen: `127.0.0.1:${port}` } }, { ready: 'no' });
    await until(async () => (await get(port, '/health')).json.status === 'healthy', '/health on the metrics address');
    for (const path of ['/health', '/metrics', '/v1/stats']) {
      const elsewhere = await get(nexus.port, path);
      assert_error(elsewhere, 404);
      assert.match(elsewhere.json.error.message, /served at the address of metrics_listen/);
    }
    for (const path of ['/v1/models', '/v1/models/m1', '/api/tags']) assert.match((await get(port, path)).text, /served at the address of listen/);
    assert.equal((await get(nexus.port, '/v1/models')).status, 200);
    assert.equal((await post(nexus.port, '/v1/chat/completions', { model: 'm1' })).status, 200);
    assert_error(await post(port, '/v1/chat/completions', { model: 'm1' }), 404);
  });

  test('every answer of its own carries a request id, taken over or made', async (t) => {
    const { nexus } = await pair(t);
    for (const path of ['/health', '/v1/models', '/nowhere']) {
      assert.equal((await get(nexus.port, path, { headers: { 'X-Request-Id': 'mine-42' } })).headers.get('x-request-id'), 'mine-42');
      assert.match((await get(nexus.port, path)).headers.get('x-request-id'), /^[\w-]{8,}$/);
    }
  });
});
