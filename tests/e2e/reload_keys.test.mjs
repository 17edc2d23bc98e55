// What a reload does to the keys that need the whole daemon. The table of all keys, and a drive of each of the others, is
// tests/hostile/reload_keys.h; it has a row for each name below.
import fs from 'node:fs';
import { RawClient, assert, authority, certificate, chat, fingerprint, get, group, has_openssl, make_authority, make_certificate, pair, parse_metrics, post, start_backend, start_nexus, test, until } from './harness.mjs';
import { free_port } from './daemon.mjs';

const path = '/v1/chat/completions';
const lines_of = (file) => (fs.existsSync(file) ? fs.readFileSync(file, 'utf8').trim().split('\n').filter(Boolean) : []);
const refused = (port) => get(port, '/health', { ms: 1_000 }).then(() => false, () => true);

// A daemon that is reloaded with `server` and `log` sections of the test's; one request is made for each call of ask().
async function reloadable(t, conf = {}) {
  const { nexus, backend } = await pair(t, {}, conf);
  const reload = (next) => nexus.reload({ ...conf, ...next, backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
  const ask = async () => assert.equal((await post(nexus.port, path, chat())).status, 200);
  return { nexus, backend, reload, ask };
}

group('a reload of each key', () => {
  test('[server] listen: restart only', async (t) => {
    const { nexus, reload, ask } = await reloadable(t);
    const other = await free_port();
    reload({ server: { listen: `127.0.0.1:${other}` } });
    await nexus.logged(/reloaded, except: listen \(needs a restart; still 127\.0\.0\.1:\d+\)/);
    assert.ok(await refused(other));
    await ask();
  });

  test('[server] threads: restart only', async (t) => {
    const { nexus, reload, ask } = await reloadable(t);
    const threads = () => fs.readdirSync(`/proc/${nexus.pid}/task`).length;
    const before = threads();
    reload({ server: { threads: 5 } });
    await nexus.logged(/reloaded, except: threads \(needs a restart; still 2\)/);
    assert.equal(threads(), before);
    await ask();
  });

  test('[server] metrics_listen: restart only', async (t) => {
    // Added: the pages stay on the one address there is. Removed: they do not move to the public one.
    const other = await free_port();
    const without = await reloadable(t);
    without.reload({ server: { metrics_listen: `127.0.0.1:${other}` } });
    await without.nexus.logged(/reloaded, except: metrics_listen \(needs a restart; still none\)/);
    assert.ok(await refused(other));
    for (const page of ['/metrics', '/v1/stats', '/', '/health']) assert.equal((await get(without.nexus.port, page)).status, 200, page);

    const { nexus, backend } = await pair(t, {}, { server: { metrics_listen: `127.0.0.1:${other}` } }, { ready: 'no' });
    await nexus.logged(/ listening .*metrics/);
    nexus.reload({ backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
    await nexus.logged(new RegExp(`reloaded, except: metrics_listen \\(needs a restart; still 127\\.0\\.0\\.1:${other}\\)`));
    await until(async () => (await get(other, '/health')).status === 200, 'a healthy backend');
    for (const page of ['/metrics', '/v1/stats', '/', '/health']) {
      assert.equal((await get(nexus.port, page)).status, 404, page);
      assert.equal((await get(other, page)).status, 200, page);
    }
  });

  test('[server] tls_listen: restart only', async (t) => {
    if (!has_openssl) t.skip('openssl is not installed');
    const other = await free_port();
    const { nexus, reload, ask } = await reloadable(t);
    reload({ server: { tls_listen: `127.0.0.1:${other}`, tls_certificate: certificate().both } });
    await nexus.logged(/reloaded, except: tls_listen \(needs a restart; still none\)/);
    assert.ok(await refused(other));
    await ask();
  });

  // A daemon with a TLS port, and what a new connection to it sees.
  async function over_tls(t, server) {
    if (!has_openssl) t.skip('openssl is not installed');
    const port = await free_port();
    const keys = (own) => ({ server: { tls_listen: `127.0.0.1:${port}`, tls_certificate: certificate().pem, tls_key: certificate().key, ...own } });
    const { nexus, reload } = await reloadable(t, keys(server));
    const connect = async (secure = {}) => {
      const client = await RawClient.connect(port, { secure });
      client.send('GET', '/health');
      const { status } = await client.response();
      const shown = client.socket.getPeerCertificate().fingerprint256;
      client.close();
      return { status, shown };
    };
    const refuses = (secure) => connect(secure).then(() => false, () => true);
    return { nexus, connect, refuses, reload: (own) => reload(keys(own)) };
  }

  test('[server] tls_certificate: for new connections', async (t) => {
    const { connect, reload } = await over_tls(t, {});
    const other = make_certificate();
    assert.equal((await connect()).shown, fingerprint(certificate().pem));
    reload({ tls_certificate: other.both, tls_key: undefined });
    await until(async () => (await connect()).shown === fingerprint(other.pem), 'the other certificate');
  });

  test('[server] tls_key: for new connections', async (t) => {
    const { connect, reload } = await over_tls(t, { tls_certificate: certificate().both, tls_key: undefined });
    const other = make_certificate();
    assert.equal((await connect()).shown, fingerprint(certificate().pem));
    reload({ tls_certificate: other.pem, tls_key: other.key });
    await until(async () => (await connect()).shown === fingerprint(other.pem), 'the certificate with its key apart');
  });

  test('[server] tls_min_version: for new connections', async (t) => {
    const { connect, refuses, reload } = await over_tls(t, {});
    assert.equal((await connect({ maxVersion: 'TLSv1.2' })).status, 200);
    reload({ tls_min_version: '1.3' });
    await until(() => refuses({ maxVersion: 'TLSv1.2' }), 'version 1.2 refused');
  });

  test('[server] tls_client_ca: for new connections', async (t) => {
    const { connect, refuses, reload } = await over_tls(t, {});
    assert.equal((await connect()).status, 200);
    const { pem, key } = make_certificate({ name: 'alice', names: [] });
    reload({ tls_client_ca: authority().pem });
    await until(() => refuses({}), 'a client without a certificate refused');
    assert.equal((await connect({ cert: fs.readFileSync(pem), key: fs.readFileSync(key) })).status, 200);
  });

  // A daemon with a TLS backend: `reload` gives the backend other keys, `status` is that of a request then.
  async function to_tls(t, shown, own) {
    if (!has_openssl) t.skip('openssl is not installed');
    const { pem, key } = shown;
    const secure = { cert: fs.readFileSync(pem), key: fs.readFileSync(key), requestCert: true, rejectUnauthorized: false };
    const backend = await start_backend(t, { secure });
    const keys = (more) => ({ health: { interval: '100ms', failures: 1, recoveries: 1 }, backends: [{ name: 'b1', url: backend.url, ...more }] });
    const nexus = await start_nexus(t, keys(own), { ready: 'up' });
    const status = async () => (await post(nexus.port, path, chat())).status;
    return { backend, reload: (more) => nexus.reload(keys(more)), becomes: (wanted) => until(async () => await status() === wanted, `status ${wanted}`) };
  }

  test('[backend] tls_ca: at once', async (t) => {
    const other = make_authority('Other');
    const { reload, becomes } = await to_tls(t, certificate(), { tls_ca: other.pem });
    await becomes(503);
    reload({ tls_ca: authority().pem });
    await becomes(200);
    reload({ tls_ca: other.pem });   // also connections that are kept are not used any more
    await becomes(503);
  });

  test('[backend] tls_verify: at once', async (t) => {
    const { reload, becomes } = await to_tls(t, make_certificate({ by: make_authority('Other') }), { tls_ca: authority().pem });
    await becomes(503);
    reload({ tls_verify: 'no' });
    await becomes(200);
  });

  test('[backend] tls_name: at once', async (t) => {
    const { reload, becomes } = await to_tls(t, make_certificate({ names: ['DNS:gpu.example.org'] }), { tls_ca: authority().pem });
    await becomes(503);
    reload({ tls_ca: authority().pem, tls_name: 'gpu.example.org' });
    await becomes(200);
  });

  for (const [name, keys] of [['[backend] tls_certificate: at once', (one) => ({ tls_certificate: one.both })],
                              ['[backend] tls_key: at once', (one) => ({ tls_certificate: one.pem, tls_key: one.key })]]) {
    test(name, async (t) => {
      const { backend, reload, becomes } = await to_tls(t, certificate(), { tls_ca: authority().pem });
      await becomes(200);
      const shown = () => backend.requests.at(-1).connection.socket.getPeerCertificate().subject?.CN;
      assert.equal(shown(), undefined);
      reload({ tls_ca: authority().pem, ...keys(make_certificate({ name: 'nexus', names: [] })) });
      await until(async () => {
        await becomes(200);
        return shown() === 'nexus';
      }, 'the certificate');
    });
  }

  test('[server] drain_timeout: at once', async (t) => {
    const { nexus, backend, reload } = await reloadable(t, { server: { drain_timeout: '1h' } });
    backend.answer = () => {};
    const held = post(nexus.port, path, chat()).catch(() => null);
    await backend.request();
    reload({ server: { drain_timeout: '100ms' } });
    await nexus.logged(/ info reloaded changed=/);
    nexus.child.kill('SIGTERM');
    await nexus.exits(5_000);
    assert.match(nexus.log(), /drain_timeout reached/);
    await held;
  });

  test('[log] level: at once', async (t) => {
    const { nexus, backend, reload } = await reloadable(t, { log: { level: 'error' }, health: { interval: '50ms', failures: 100 } });
    backend.probe = (_, reply) => reply.json({}, 500);
    const failed = /health check failed/;
    await until(() => backend.probes.length > 3, 'checks');
    assert.doesNotMatch(nexus.log(), failed);
    reload({ log: { level: 'debug' } });
    await nexus.logged(failed);
  });

  test('[log] format: at once', async (t) => {
    const file = t.file('access.log', '');
    const { reload, ask } = await reloadable(t, { log: { access: file } });
    await ask();
    await until(() => lines_of(file).length === 1, 'a line of text');
    assert.throws(() => JSON.parse(lines_of(file)[0]));
    reload({ log: { access: file, format: 'json' } });
    await until(async () => {
      await ask();
      return lines_of(file).some((line) => line.startsWith('{'));
    }, 'a line of JSON');
  });

  test('[log] access: at once', async (t) => {
    const [first, second] = [t.file('first.log', ''), t.file('second.log', '')];
    const { reload, ask } = await reloadable(t, { log: { access: first } });
    await ask();
    await until(() => lines_of(first).length === 1, 'a line in the first file');
    reload({ log: { access: second } });
    await until(async () => {
      await ask();
      return lines_of(second).length > 0;
    }, 'a line in the second file');
  });

  test('[backend] token_delay: for new requests', async (t) => {
    const conf = (token_delay) => ({ backends: [{ name: 'e', type: 'echo', token_delay }] });
    const nexus = await start_nexus(t, conf('500ms'));
    const messages = [{ role: 'user', content: 'one two three four' }];
    const ask = (ms) => post(nexus.port, path, chat('echo', { messages }), { ms });
    const held = await RawClient.connect(nexus.port);
    held.send('POST', path, { 'Content-Type': 'application/json' }, JSON.stringify(chat('echo', { messages, stream: true })));
    await held.read_through(Buffer.from('data:'));   // the backend has begun it
    const began = performance.now();
    nexus.reload(conf('1ms'));
    await until(async () => (await ask(400).catch(() => ({}))).status === 200, 'the new delay');
    await held.read_through(Buffer.from('[DONE]'), 30_000);
    assert.ok(performance.now() - began > 2 * 500, 'the old request keeps its connection and its delay');
  });

  test('[keys] fair_by: for new requests', { limit_ms: 20_000 }, async (t) => {
    // One place, and three who wait: two of an address and then one of another, which goes second only if addresses take turns.
    const { nexus, backend } = await pair(t, {}, { queue: { size: 9 }, backend: { max_pending: 1 } });
    const order = async (number) => {
      const begun = [];
      let open_gate;
      const gate = new Promise((done) => { open_gate = done; });
      const answer = backend.answer;
      backend.answer = async (request, ...rest) => { begun.push(request.json.user); await gate; return answer(request, ...rest); };
      const clients = [];
      for (const [user, from] of [['held', '127.0.0.1'], ['a', '127.0.0.1'], ['b', '127.0.0.1'], ['c', '127.0.0.2']]) {
        const client = await RawClient.connect(nexus.port, { from });
        client.send('POST', path, { 'Content-Type': 'application/json' }, chat('m1', { user }));
        clients.push(client);
        await until(async () => (await page(nexus)).sum('nexus_pending_requests') === clients.length, `${clients.length} pending (${number})`);
      }
      open_gate();
      for (const client of clients) assert.equal((await client.response()).status, 200);
      backend.answer = answer;
      return begun.join(' ');
    };
    const page = async ({ port }) => parse_metrics((await get(port, '/metrics')).text);
    assert.equal(await order(1), 'held a b c');
    nexus.reload({ queue: { size: 9 }, keys: { fair_by: 'address' }, backends: [{ name: 'b1', url: backend.url, type: 'generic', max_pending: 1 }] });
    await nexus.logged(/ reloaded/);
    assert.equal(await order(2), 'held c a b');
  });
});
