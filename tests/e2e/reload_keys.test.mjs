// What a reload does to the keys that need the whole daemon. The table of all keys, and a drive of each of the others, is
// tests/hostile/reload_keys.h; it has a row for each name below.
import fs from 'node:fs';
import { RawClient, assert, chat, get, group, pair, post, start_nexus, test, until } from './harness.mjs';
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
    for (const page of ['/metrics', '/v1/stats', '/', '/health']) {
      assert.equal((await get(nexus.port, page)).status, 404, page);
      assert.equal((await get(other, page)).status, 200, page);
    }
  });

  test('[server] drain_timeout: at once', async (t) => {
    const { nexus, backend, reload } = await reloadable(t, { server: { drain_timeout: '1h' } });
    backend.answer = () => {};
    const held = post(nexus.port, path, chat()).catch(() => null);
    await backend.request();
    reload({ server: { drain_timeout: '100ms' } });
    await nexus.logged(/ info reloaded$/m);
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
});
