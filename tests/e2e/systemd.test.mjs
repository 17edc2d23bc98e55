// Sockets that a service manager passes on. The manager is a shell: it holds the listening sockets as descriptors 3 and
// up, and starts the daemon with them, again and again. What the daemon tells its manager is tests/notify_test.cpp's.
import { spawn } from 'node:child_process';
import net from 'node:net';
import { assert, get, group, settings, sleep, test, until, within } from './harness.mjs';

// Listening sockets that this process does not accept from once the shell has them.
async function listen(count) {
  const servers = [];
  for (let i = 0; i < count; i++) {
    const server = net.createServer();
    await new Promise((done) => server.listen(0, '127.0.0.1', done));
    servers.push(server);
  }
  return servers;
}

const backend = '[backend b]\nurl = http://127.0.0.1:1\n';

// Runs `script` in a shell that has the sockets; `start` in it is the daemon with them.
function manage(t, servers, names, conf, script) {
  const file = t.file('nexus.conf', conf + backend);
  const start = `start() { LISTEN_FDS=${servers.length} LISTEN_FDNAMES=${names} exec sh -c 'LISTEN_PID=$$ exec "$0" -c "$1"' '${settings.nexus}' '${file}'; }`;
  const child = spawn('sh', ['-c', `${start}\n${script}`], { detached: true, stdio: ['pipe', 'pipe', 'pipe', ...servers.map((s) => s._handle.fd)] });
  const ports = servers.map((s) => s.address().port);
  for (const server of servers) server.close();
  child.stdin.on('error', () => {});
  const run = { child, ports, stderr: '' };
  child.stderr.on('data', (d) => { run.stderr += d; });
  run.exited = new Promise((done) => child.on('close', (code) => done(code)));
  t.after(() => {
    try {
      process.kill(-child.pid, 'SIGKILL');   // the shell and what it started
    } catch {
      // all ended, as they should
    }
  });
  t.notes.push(() => `log: ${run.stderr.slice(-700).replace(/\n/g, ' | ')}`);
  return run;
}

group('socket activation', () => {
  test('passed sockets stand in for listen and, by name, for metrics_listen', async (t) => {
    const run = manage(t, await listen(2), 'nexus:metrics', '[server]\nlisten = 127.0.0.1:1\nmetrics_listen = 127.0.0.1:2\nthreads = 2\n',
      'start & child=$!; trap "kill $child" TERM; wait $child; wait $child');
    const [port, metrics_port] = run.ports;
    await until(async () => (await get(metrics_port, '/health')).status === 503, 'the daemon up');
    assert.equal((await get(metrics_port, '/metrics')).status, 200);
    assert.equal((await get(port, '/metrics')).status, 404);
    assert.equal((await get(port, '/v1/models')).status, 200);
    run.child.kill('SIGTERM');
    assert.equal(await within(10_000, run.exited, 'the daemon to stop'), 0);
  });

  test('a restart refuses no connection: those made meanwhile are answered by the next process', { limit_ms: 40_000 }, async (t) => {
    const restarts = 4;
    const run = manage(t, await listen(1), 'nexus', '[server]\nlisten = 127.0.0.1:1\nthreads = 2\n',
      `for i in $(seq ${restarts}); do start & child=$!; read -r go; kill $child; wait $child || echo "ended with $?" >&2; sleep 0.1; done; start & child=$!; trap "kill $child" TERM; wait $child; wait $child`);
    const [port] = run.ports;
    const failures = [];
    let asked = 0, done = false;
    const client = async () => {
      while (!done) {
        asked += 1;
        await get(port, '/v1/models', { ms: 15_000 }).then((r) => r.status === 200 || failures.push(`status ${r.status}`), (e) => failures.push(e.message));
        await sleep(2);
      }
    };
    const clients = Array.from({ length: 4 }, client);
    // Each process has served before it is stopped, however slowly it starts.
    for (let starts = 1; starts <= restarts + 1; starts++) {
      await until(() => run.stderr.split(' listening ').length > starts, `start ${starts}`, 10_000);
      const before = asked;
      await until(() => asked >= before + 20, `requests after start ${starts}`, 10_000);
      if (starts <= restarts) run.child.stdin.write('go\n');
    }
    done = true;
    await Promise.all(clients);
    assert.deepEqual(failures, []);
    assert.ok(asked > 50, `${asked} requests`);
    run.child.kill('SIGTERM');
    assert.equal(await within(10_000, run.exited, 'the daemon to stop'), 0);
    assert.doesNotMatch(run.stderr, /ended with/);
  });

  test('a socket for the metrics without metrics_listen is refused in one line', async (t) => {
    const run = manage(t, await listen(1), 'metrics', '[server]\nlisten = 127.0.0.1:1\n', 'start');
    assert.equal(await within(10_000, run.exited, 'the refusal'), 1);
    assert.match(run.stderr, /^nexus: .*metrics_listen.*\n$/);
  });

  test('what is no listening socket is refused in one line', async (t) => {
    const run = manage(t, [], 'nexus', '[server]\nlisten = 127.0.0.1:1\n',
      `LISTEN_FDS=1 sh -c 'LISTEN_PID=$$ exec "$0" -c "$1"' '${settings.nexus}' '${t.file('other.conf', backend)}' 3</dev/null`);
    assert.equal(await within(10_000, run.exited, 'the refusal'), 1);
    assert.match(run.stderr, /^nexus: descriptor 3 was passed.*TCP.*\n$/);
  });
});
