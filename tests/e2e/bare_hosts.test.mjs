// Hosts that lack what a program is used to: standard descriptors, /proc, /dev, a writable root, a name for the uid, a parent.
import { spawn, spawnSync } from 'node:child_process';
import dgram from 'node:dgram';
import fs from 'node:fs';
import path from 'node:path';
import { assert, chat, conf_text, free_port, get, group, kill_at_end, parse_metrics, post, settings, start_backend, test, until, within } from './harness.mjs';

// Runs `script` in a shell, where $NEXUS and $CONF are the daemon and its file, and waits until it serves. In `root`, a folder,
// they are /nexus and /nexus.conf.
async function serve(t, script, { root, server = {}, log = {}, more = [] } = {}) {
  const backend = await start_backend(t);
  const port = await free_port();
  const text = conf_text({ server: { listen: `127.0.0.1:${port}`, threads: 2, ...server }, log, backends: [{ name: 'b1', mock: backend }, ...more] });
  const conf = root ? path.join(root, 'nexus.conf') : t.file('nexus.conf', text);
  if (root) {
    fs.writeFileSync(conf, text);
    fs.copyFileSync(settings.nexus, path.join(root, 'nexus'));
    fs.chmodSync(path.join(root, 'nexus'), 0o755);
  }
  const env = { ...process.env, ROOT: root, NEXUS: root ? '/nexus' : settings.nexus, CONF: root ? '/nexus.conf' : conf };
  const child = spawn('sh', ['-c', script], { env, stdio: ['ignore', 'pipe', 'pipe'] });
  kill_at_end(child);
  const host = { child, port, backend, stderr: '', exited: new Promise((done) => child.on('close', (code) => done(code))) };
  child.stderr.on('data', (d) => { host.stderr += d; });
  t.after(() => child.kill('SIGKILL'));
  t.notes.push(() => `log: ${host.stderr.slice(-700).replace(/\n/g, ' | ')}`);
  await until(async () => (await get(port, '/health')).json.backends.healthy === 1, 'the daemon up');
  // Below `unshare --fork` it is a child.
  const [below] = fs.readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8').split(' ').filter(Boolean);
  host.pid = Number(below ?? child.pid);
  return host;
}

async function serves_and_stops({ port, pid, exited }) {
  for (let i = 0; i < 3; i++) assert.equal((await post(port, '/v1/chat/completions', chat())).status, 200);
  await until(async () => parse_metrics((await get(port, '/metrics')).text).sum('nexus_requests_total') === 3, 'three requests counted');
  assert.equal((await get(port, '/v1/stats')).status, 200);
  process.kill(pid, 'SIGTERM');
  assert.equal(await within(10_000, exited, 'the end'), 0);
}

// A folder that anybody may enter, for a root directory.
function new_root(t) {
  if (settings.sanitised) t.skip('a sanitised build is not static');
  if (process.getuid() !== 0) t.skip('only root may change the root directory');
  if (spawnSync('unshare', ['--mount', '--pid', '--fork', 'true']).status !== 0) t.skip('no namespaces here');
  const root = t.dir();
  for (let at = root; at.startsWith('/tmp/'); at = path.dirname(at)) fs.chmodSync(at, 0o755);
  return root;
}

const descriptors = (pid) => [0, 1, 2].map((fd) => fs.readlinkSync(`/proc/${pid}/fd/${fd}`));

group('bare hosts', () => {
  test('closed standard descriptors are opened, and no client gets a line of the log', async (t) => {
    const host = await serve(t, 'exec "$NEXUS" -c "$CONF" <&- >&- 2>&-', { log: { access: 'stderr' } });
    assert.deepEqual(descriptors(host.pid), ['/dev/null', '/dev/null', '/dev/null']);
    await serves_and_stops(host);
  });

  test('those that are open stay what they are', async (t) => {
    const file = t.file('out', '');
    const host = await serve(t, `exec "$NEXUS" -c "$CONF" <&- >'${file}'`);
    const [input, output, error] = descriptors(host.pid);
    assert.deepEqual([input, output], ['/dev/null', file]);
    assert.match(error, /^(pipe|socket):/);
    await serves_and_stops(host);
    assert.match(host.stderr, / stopped$/m);
  });

  const rows = [
    ['no /proc and no /dev', 'exec chroot "$ROOT" /nexus -c /nexus.conf'],
    ['no /dev and closed standard descriptors', 'exec chroot "$ROOT" /nexus -c /nexus.conf <&- >&- 2>&-'],
    ['a read-only root', `exec unshare --mount sh -c 'mount --bind "$ROOT" "$ROOT" && mount -o remount,ro,bind "$ROOT" && exec chroot "$ROOT" /nexus -c /nexus.conf'`],
    ['a uid without a name', 'exec chroot --userspec=54321:54321 "$ROOT" /nexus -c /nexus.conf'],
    ['process 1 of its namespace', 'exec unshare --pid --fork --kill-child chroot "$ROOT" /nexus -c /nexus.conf'],
  ];
  for (const [name, script] of rows) {
    test(`${name}: it serves, counts and stops as elsewhere`, async (t) => {
      const host = await serve(t, script, { root: new_root(t) });
      if (name.startsWith('process 1')) assert.match(fs.readFileSync(`/proc/${host.pid}/status`, 'utf8'), /^NSpid:\s+\d+\s+1$/m);
      if (name.startsWith('a uid')) assert.match(fs.readFileSync(`/proc/${host.pid}/status`, 'utf8'), /^Uid:\s+54321\s/m);
      assert.equal(fs.existsSync(`/proc/${host.pid}/root/proc`), false);
      await serves_and_stops(host);
      if (!script.includes('2>&-')) {
        assert.match(host.stderr, / stopped$/m);
        assert.doesNotMatch(host.stderr, / error /);
      }
    });
  }

  test('no /dev/urandom: nobody can guess the number of a DNS query from an earlier start', async (t) => {
    const root = new_root(t);
    const server = dgram.createSocket('udp4');
    t.after(() => server.close());
    const bound = await new Promise((done) => server.once('error', () => done(false)).bind(53, '127.53.0.7', () => done(true)));
    if (!bound) t.skip('port 53 is taken');
    let heard = [];
    server.on('message', (query) => heard.push(query.readUInt16BE(0)));
    fs.mkdirSync(path.join(root, 'etc'));
    fs.writeFileSync(path.join(root, 'etc/resolv.conf'), 'nameserver 127.53.0.7\n');
    const starts = [];
    for (let i = 0; i < 3; i++) {
      heard = [];
      const host = await serve(t, rows[0][1], { root, more: [{ name: 'b2', url: 'http://backend.example:1', type: 'generic' }] });
      await until(() => heard.length > 0, 'a query');
      starts.push(heard[0]);
      await serves_and_stops(host);
    }
    assert.ok(new Set(starts).size > 1, starts.join());
  });

  test('an orphan of another process leaves no zombie below process 1', async (t) => {
    new_root(t);   // may it?
    const begin = t.file('begin', '');
    const host = await serve(t, `exec unshare --pid --fork --kill-child sh -c '( (while [ -e "${begin}" ]; do sleep 0.02; done) & ); exec "$NEXUS" -c "$CONF"'`);
    const children = () => fs.readFileSync(`/proc/${host.pid}/task/${host.pid}/children`, 'utf8').trim();
    assert.notEqual(children(), '', 'it has the orphan');
    fs.rmSync(begin);
    await until(() => children() === '', 'the orphan gone');
    await serves_and_stops(host);
  });

  test('a limit on descriptors below what the file may need is a warning at the start, with both numbers', async (t) => {
    for (const [limit, told] of [[300, true], [400, false]]) {
      const host = await serve(t, `ulimit -n ${limit}; exec "$NEXUS" -c "$CONF"`, { server: { max_connections: 150 } });
      const warning = / warning "?the limit on file descriptors is below what nexus\.conf may need.* needed=3\d\d limit=300 max_connections=150$/m;
      await until(() => host.stderr.includes(' listening '), 'the log of the start');   // which is later in it
      assert.equal(warning.test(host.stderr), told, host.stderr);
      await serves_and_stops(host);
    }
  });
});
