// Sockets that a service manager passes on. The manager is a shell: it holds the listening sockets as descriptors 3 and
// up, and starts the daemon with them, again and again. What the daemon tells its manager is tests/notify_test.cpp's.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { RawClient, assert, chat, free_port, get, group, pair, run_nexus, settings, sleep, test, until, within } from './harness.mjs';
import { repository_file } from './prometheus.mjs';

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

  test('a reload that changes an address in place of which a socket was passed says that neither is in use', async (t) => {
    const lines = (port) => `[server]\nlisten = 127.0.0.1:${port}\nthreads = 2\n`;
    const run = manage(t, await listen(1), 'nexus', lines(1), 'start & child=$!; trap "kill $child" TERM; trap "kill -HUP $child" HUP; while kill -0 $child 2>/dev/null; do wait $child; done');
    await until(() => run.stderr.includes(' listening '), 'the daemon up');
    t.file('nexus.conf', lines(2) + backend);
    run.child.kill('SIGHUP');
    await until(() => /reloaded, except: listen \(not in use: the service manager passes its sockets\)/.test(run.stderr), () => `the reload in ${run.stderr}`);
    run.child.kill('SIGTERM');
    await within(10_000, run.exited, 'the daemon to stop');
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

// `nexus reload PID` is ExecReload of nexus.service.
group('reload for a service manager', () => {
  const unit_says = (key) => new RegExp(`^${key}=(.*)$`, 'm').exec(repository_file('contrib/systemd/nexus.service'))[1];
  const reload = (nexus) => run_nexus(['reload', String(nexus.pid)], { ms: 30_000 });
  const with_alias = (nexus, alias, server = {}) => nexus.write_conf({ ...nexus.conf, aliases: { [alias]: 'm1' }, server });
  const models = async (nexus) => (await get(nexus.port, '/v1/models')).json.data.map((m) => m.id);

  test('it returns when the new configuration is in force, and succeeds', async (t) => {
    const { nexus } = await pair(t);
    assert.equal(unit_says('ExecReload'), '/usr/bin/nexus reload $MAINPID');
    for (const alias of ['first', 'second']) {
      with_alias(nexus, alias);
      assert.deepEqual(await reload(nexus), { code: 0, signal: null, stdout: 'reloaded\n', stderr: '' });
      assert.ok((await models(nexus)).includes(alias), 'in force at once');
    }
    with_alias(nexus, 'third', { threads: 3 });
    assert.deepEqual(await reload(nexus),
      { code: 0, signal: null, stdout: 'reloaded, except: threads (needs a restart; still 2)\n', stderr: '' });
  });

  test('a refused file is its failure, with the error, and the daemon goes on', async (t) => {
    const { nexus } = await pair(t);
    nexus.write_conf('[server]\nlisten = 127.0.0.1:@PORT@\n[backend other]\nurl = http://127.0.0.1:1\ntype = abacus\n');
    const refused = await reload(nexus);
    assert.equal(refused.code, 1);
    assert.equal(refused.stdout, '');
    assert.match(refused.stderr, /^reload failed, keeping the old configuration: .*nexus-\d+\.conf:5: .*abacus.*\n$/);
    assert.ok((await models(nexus)).includes('m1'));
  });

  test('a file without errors that is not put into force is a failure too', { limit_ms: 60_000 }, async (t) => {
    const { nexus } = await pair(t);
    // 4,096 names of backends are all that a process takes over its life, and 256 are a fleet.
    for (let round = 1; ; round++) {
      assert.ok(round < 20, 'it took too many names');
      nexus.write_conf({ backends: Array.from({ length: 256 }, (_, i) => ({ name: `r${round}-${i}`, url: 'http://127.0.0.1:1', type: 'generic' })) });
      const outcome = await reload(nexus);
      if (outcome.code === 0) continue;
      assert.equal(outcome.code, 1);
      assert.equal(outcome.stderr, 'reload not in force yet, see the log\n');
      break;
    }
    assert.match(nexus.log(), /configuration not applied: too many names of backends/);
    await nexus.logged(/warning reload not in force yet: .* changed=/);
  });

  test('each of many at once has its answer: a signal that was merged with another one is sent again', { limit_ms: 60_000 }, async (t) => {
    const { nexus } = await pair(t);
    const outcomes = await Promise.all(Array.from({ length: 8 }, () => reload(nexus)));
    for (const outcome of outcomes) assert.deepEqual(outcome, { code: 0, signal: null, stdout: 'reloaded\n', stderr: '' });
  });

  test('while the daemon drains it fails and says so', async (t) => {
    const { nexus, backend } = await pair(t);
    const begun = new Promise((done) => { backend.answer = (_, reply) => done(reply); });
    const busy = await RawClient.connect(nexus.port);
    t.after(() => busy.close());
    busy.send('POST', '/v1/chat/completions', {}, chat());
    const reply = await begun;
    nexus.child.kill('SIGTERM');
    await nexus.logged(/ draining$/m);
    const { code, stderr } = await reload(nexus);
    assert.equal(code, 1);
    assert.match(stderr, /^draining: /);
    reply.json({});
    assert.equal((await busy.response()).status, 200);
  });

  test('without such a process it fails, and without a number it is refused', async () => {
    const gone = spawn('true');
    await new Promise((done) => gone.on('exit', done));
    const none = await run_nexus(['reload', String(gone.pid)]);
    assert.equal(none.code, 1);
    assert.match(none.stderr, /^nexus: process \d+: there is no such process: .*\n$/);
    for (const args of [[], ['0'], ['-1'], ['self'], ['99999999999']]) {
      const wrong = await run_nexus(['reload', ...args]);
      assert.equal(wrong.code, 2, args.join());
      assert.match(wrong.stderr, /process id|unknown argument: -1/);
    }
  });

  // Each of them goes on, and is ended by the test's own SIGTERM: SIGHUP's default action would have ended it before.
  for (const [what, command] of [['a process that is no nexus', ['sleep', '600']],
                                 ['one that ignores the signal', ['sh', '-c', 'trap "" HUP; exec sleep 600']]]) {
    test(`${what} gets no signal from reload, which fails and says so`, async (t) => {
      const [program, ...args] = command;
      const child = spawn(program, args, { stdio: 'ignore' });
      const exited = new Promise((done) => child.on('exit', (code, signal) => done({ code, signal })));
      t.after(() => child.kill('SIGKILL'));
      const refused = await run_nexus(['reload', String(child.pid)]);
      assert.equal(refused.code, 1);
      assert.match(refused.stderr, new RegExp(`^nexus: process ${child.pid}: it is no serving nexus, so it was sent no signal: .*\\n$`));
      child.kill('SIGTERM');
      assert.deepEqual(await within(10_000, exited, 'the end'), { code: null, signal: 'SIGTERM' });
    });
  }

  test('a nexus whose file has another name is reloaded', async (t) => {
    const copy = path.join(t.dir(), 'gateway-0.1');
    fs.copyFileSync(settings.nexus, copy);
    fs.chmodSync(copy, 0o755);
    const port = await free_port();
    const conf = t.file('nexus.conf', `[server]\nlisten = 127.0.0.1:${port}\n[backend e]\ntype = echo\n`);
    const child = spawn(copy, ['-c', conf], { stdio: ['ignore', 'ignore', 'ignore'] });
    const exited = new Promise((done) => child.on('exit', done));
    t.after(() => child.kill('SIGKILL'));
    await until(async () => (await get(port, '/health')).status === 200, 'the copy up');
    assert.deepEqual(await run_nexus(['reload', String(child.pid)]), { code: 0, signal: null, stdout: 'reloaded\n', stderr: '' });
    child.kill('SIGTERM');
    assert.equal(await within(10_000, exited, 'the copy to end'), 0);
  });

  test('all errors of a refused file are printed, each on its line', async (t) => {
    const { nexus } = await pair(t);
    nexus.write_conf('[server]\nlisten = 127.0.0.1:@PORT@\nthread = 1\n[health]\nfailures = x\n[nowhere]\n');
    const { code, stderr } = await reload(nexus);
    assert.equal(code, 1);
    const lines = stderr.trimEnd().split('\n');
    assert.equal(lines.length, 3, stderr);
    for (const [i, line] of [3, 5, 6].entries()) assert.match(lines[i], new RegExp(`nexus-\\d+\\.conf:${line}: `));
  });

  test('a bad configuration at the start has an exit code of its own, and the unit starts no such process again', async (t) => {
    const bad = await run_nexus(['-c', t.file('bad.conf', '[server]\nthreads = two\n')]);
    assert.equal(String(bad.code), unit_says('RestartPreventExitStatus'));
    assert.equal((await run_nexus(['-c', '/nonexistent/nexus.conf'])).code, bad.code);
    const { nexus } = await pair(t);   // its address is taken, which may change
    const taken = await run_nexus(['-c', t.file('taken.conf', `[server]\nlisten = 127.0.0.1:${nexus.port}\n${backend}`)]);
    assert.equal(taken.code, 1);
    assert.match(taken.stderr, /in use/);
  });
});
