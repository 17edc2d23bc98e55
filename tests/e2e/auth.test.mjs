// Authorization: keys of clients, keys of backends, and where each is sent.
import fs from 'node:fs';
import { assert, assert_error, chat, free_port, get, group, pair, post, run_nexus, start_backend, start_nexus, test, until } from './harness.mjs';

const path = '/v1/chat/completions';
const bearer = (key) => ({ headers: { Authorization: `Bearer ${key}` } });

group('authorization', () => {
  test('without keys of its own Nexus passes the client’s Authorization on as it is', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const value of ['Bearer sk-client', 'Basic dXNlcjpwYXNz', 'odd  spacing kept']) {
      assert.equal((await post(nexus.port, path, chat(), { headers: { Authorization: value } })).status, 200);
      assert.deepEqual(backend.requests.at(-1).headers.all('authorization'), [value]);
    }
    await post(nexus.port, path, chat());
    assert.ok(!backend.requests.at(-1).headers.has('authorization'));
  });

  test('a backend’s key from a file takes the place of the client’s, on requests and probes', async (t) => {
    const backend = await start_backend(t);
    const file = t.file('backend.key', 'sk-backend-file\n');
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend, api_key_file: file }] });
    await post(nexus.port, path, chat(), bearer('sk-client'));
    await post(nexus.port, path, chat());
    for (const r of [...backend.requests, ...backend.probes]) assert.deepEqual(r.headers.all('authorization'), ['Bearer sk-backend-file']);
    assert.ok(backend.requests.every((r) => !r.raw.includes('sk-client')));
  });

  test('a backend’s key from the environment does the same', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend, api_key_env: 'E2E_BACKEND_KEY' }] }, { env: { E2E_BACKEND_KEY: 'sk-from-env' } });
    await post(nexus.port, path, chat(), bearer('sk-client'));
    assert.deepEqual(backend.requests[0].headers.all('authorization'), ['Bearer sk-from-env']);
  });

  test('with api_keys_file only a valid bearer is served, and no other', async (t) => {
    const file = t.file('keys', '# who may ask\nalice sk-alice-0123456789\n\nbob sk-bob-0123456789\n');
    const { nexus, backend } = await pair(t, {}, { server: { api_keys_file: file } });
    const refused = [undefined, 'Bearer', 'Bearer ', 'Bearer wrong', 'Bearer sk-alice-012345678', 'Bearer sk-alice-01234567890', 'Bearer SK-ALICE-0123456789', 'Basic sk-alice-0123456789', 'sk-alice-0123456789', 'Bearer alice',
                     'Bearer sk-alice-0123456789 x', 'Bearer alice sk-alice-0123456789'];
    for (const value of refused) {
      const headers = value === undefined ? {} : { Authorization: value };
      const r = await post(nexus.port, path, chat(), { headers });
      const error = assert_error(r, 401, 'invalid_api_key');
      assert.ok(!error.message.includes('sk-alice'), 'a key is never told');
    }
    assert.equal(backend.requests.length, 0);
    for (const key of ['sk-alice-0123456789', 'sk-bob-0123456789']) {
      assert.equal((await post(nexus.port, path, chat(), bearer(key))).status, 200);
    }
    assert.equal((await post(nexus.port, path, chat(), { headers: { authorization: 'bearer sk-bob-0123456789' } })).status, 200, 'the scheme has no case');
  });

  test('x-api-key and api-key are the bearer’s equals, and none of the three reaches a backend', async (t) => {
    const key = 'sk-alice-0123456789';
    const { nexus, backend } = await pair(t, {}, { server: { api_keys_file: t.file('keys', `alice ${key}\n`) } });
    const all = [{ 'x-api-key': key }, { 'API-Key': key }, { 'x-api-key': key, Authorization: 'Bearer other' }, { 'X_Api_Key': 'x', 'api-key': 'y', Authorization: `Bearer ${key}` }];
    for (const headers of all) {
      assert.equal((await post(nexus.port, path, chat(), { headers })).status, 200, JSON.stringify(headers));
      assert.ok(!/sk-alice|other|api.key/i.test(backend.requests.at(-1).raw), backend.requests.at(-1).raw);
    }
    for (const headers of [{ 'x-api-key': `Bearer ${key}` }, { 'x-api-key': 'wrong' }, { 'api-key': '' }]) assert_error(await post(nexus.port, path, chat(), { headers }), 401, 'invalid_api_key');
    const open = await pair(t);
    await post(open.nexus.port, path, chat(), { headers: { 'x-api-key': 'theirs', 'api-key': 'own' } });
    assert.deepEqual(open.backend.requests[0].headers.all('x-api-key'), ['theirs'], 'where no keys are checked it is the backend’s');
    assert.deepEqual(open.backend.requests[0].headers.all('api-key'), ['own']);
  });

  test('with api_keys_file a client’s key never reaches a backend, with and without a key of its own', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\n');
    const own = await start_backend(t, { models: ['own'] });
    const bare = await start_backend(t, { models: ['bare'] });
    const nexus = await start_nexus(t, { server: { api_keys_file: file }, backends: [{ name: 'own', mock: own, api_key_file: t.file('k', 'sk-own\n') }, { name: 'bare', mock: bare }] });
    for (const model of ['own', 'bare']) assert.equal((await post(nexus.port, path, chat(model), bearer('sk-alice-0123456789'))).status, 200);
    assert.deepEqual(own.requests[0].headers.all('authorization'), ['Bearer sk-own']);
    assert.ok(!bare.requests[0].headers.has('authorization'));
    for (const r of [...own.requests, ...bare.requests, ...own.probes, ...bare.probes]) assert.ok(!r.raw.includes('sk-alice'));
    assert.ok(!nexus.log().includes('sk-alice') && !nexus.log().includes('sk-own'), 'nor is it logged');
  });

  test('keys guard every proxied endpoint, /v1/models, /metrics and /v1/stats, not /health', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\n');
    const { nexus } = await pair(t, {}, { server: { api_keys_file: file } });
    for (const p of ['/v1/chat/completions', '/v1/completions', '/v1/embeddings']) assert_error(await post(nexus.port, p, chat()), 401, 'invalid_api_key');
    for (const p of ['/v1/models', '/v1/models/m1', '/metrics', '/v1/stats']) {
      assert_error(await get(nexus.port, p), 401, 'invalid_api_key');
      assert.notEqual((await get(nexus.port, p, bearer('sk-alice-0123456789'))).status, 401);
    }
    assert.equal((await get(nexus.port, '/health')).status, 200);
  });

  test('a key without admin is served and reads no metrics; one with admin=1 and the metrics address do', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\nops sk-ops-0123456789 admin=1\n');
    const { nexus } = await pair(t, {}, { server: { api_keys_file: file }, keys: { admin: 0 } });
    assert.equal((await post(nexus.port, path, chat(), bearer('sk-alice-0123456789'))).status, 200);
    assert.equal((await get(nexus.port, '/v1/models', bearer('sk-alice-0123456789'))).status, 200);
    for (const p of ['/metrics', '/v1/stats', '/']) {
      assert_error(await get(nexus.port, p, bearer('sk-alice-0123456789')), 403, 'admin_only');
      assert.equal((await get(nexus.port, p, bearer('sk-ops-0123456789'))).status, 200);
      assert.equal((await get(nexus.port, p)).status, 401);
    }
  });

  test('a browser without a key gets a page that says how to reach the status page, and a script gets JSON', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\n');
    const { nexus } = await pair(t, {}, { server: { api_keys_file: file } });
    const page = await get(nexus.port, '/', { headers: { Accept: 'text/html,application/xhtml+xml,*/*;q=0.8' } });
    assert.equal(page.status, 401);
    assert.match(page.headers.get('content-type'), /^text\/html/);
    assert.match(page.text, /metrics_listen = 127\.0\.0\.1:8001/);
    assert_error(await get(nexus.port, '/'), 401, 'invalid_api_key');
    assert_error(await get(nexus.port, '/metrics', { headers: { Accept: 'text/html' } }), 401, 'invalid_api_key');
  });

  test('a file of keys that every user of the host can read is warned of at the start', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\n');
    for (const [mode, warns] of [[0o644, true], [0o640, false]]) {
      fs.chmodSync(file, mode);
      const { nexus } = await pair(t, {}, { server: { api_keys_file: file } });
      if (warns) await nexus.logged(/a file with keys can be read by every user of this host: chmod o-r file=\S+keys/);
      else assert.ok(!nexus.log().includes('chmod o-r'), nexus.log());
    }
  });

  test('the metrics address asks for no key', async (t) => {
    const file = t.file('keys', 'alice sk-alice-0123456789\n');
    const port = await free_port();
    await pair(t, {}, { server: { api_keys_file: file, metrics_listen: `127.0.0.1:${port}` } }, { ready: 'no' });
    await until(async () => (await get(port, '/health')).status === 200, '/health on the metrics address');
    assert.notEqual((await get(port, '/metrics')).status, 401);
  });

  test('an empty or malformed key file is refused at the start', async (t) => {
    for (const text of ['alice\n', 'alice sk-a b\n']) {
      const keys = t.file('keys', text);
      const r = await run_nexus(['-t', '-c', t.file('nexus.conf', `[server]\napi_keys_file = ${keys}\n[backend b]\nurl = http://127.0.0.1:1\n`)]);
      assert.equal(r.code, 1, JSON.stringify(text));
    }
  });
});
