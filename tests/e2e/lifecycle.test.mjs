// Reload and drain: nothing that runs is lost.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import { RawClient, assert, assert_error, chat, get, group, pair, pending_is, post, run_nexus, settings, sleep, sse_events, start_backend, start_nexus, test, until, within } from './harness.mjs';

const path = '/v1/chat/completions';
const ids = async (nexus) => (await get(nexus.port, '/v1/models')).json.data.map((m) => `${m.id}@${m.owned_by}`).join();

// A stream that the test steps through; returns { client, reply }.
async function open_stream(t, nexus, backend, model = 'm1') {
  const begun = new Promise((done) => {
    backend.answer = (_, reply) => {
      reply.stream();
      reply.piece('data: first\n\n');
      done(reply);
    };
  });
  const client = await RawClient.connect(nexus.port);
  t.after(() => client.close());
  client.send('POST', path, {}, chat(model, { stream: true }));
  const reply = await begun;
  await client.head();
  assert.equal((await client.piece()).toString(), 'data: first\n\n');
  return { client, reply };
}

async function finish_stream({ client, reply }) {
  reply.piece('data: [DONE]\n\n');
  reply.finish();
  let text = '';
  for (let p = await client.piece(); p !== null; p = await client.piece()) text += p;
  assert.ok(client.body.done, 'the stream ended whole');
  assert.equal(sse_events(text).data.at(-1), '[DONE]');
}

group('reload', () => {
  test('adds a backend, removes one, and changes one, while a stream on the removed one lives on', async (t) => {
    const [a, b, c] = [await start_backend(t, { models: ['ma'] }), await start_backend(t, { models: ['mb'] }), await start_backend(t, { models: ['mc'] })];
    const nexus = await start_nexus(t, { backends: [{ name: 'a', mock: a }, { name: 'b', mock: b }] });
    const kept = await RawClient.connect(nexus.port);
    t.after(() => kept.close());
    kept.send('GET', '/health');
    await kept.response();
    const stream = await open_stream(t, nexus, a, 'ma');
    nexus.reload({ backends: [{ name: 'b', url: c.url, type: 'generic' }, { name: 'd', url: b.url, type: 'generic' }] });
    await until(async () => (await ids(nexus)) === 'mb@d,mc@b', 'the new models');
    assert_error(await post(nexus.port, path, chat('ma')), 404, 'model_not_found');
    assert.equal((await post(nexus.port, path, chat('mc'))).headers.get('x-nexus-backend'), 'b');
    // A client may have its answer a moment before the request is counted.
    const wanted = JSON.stringify([['a', 1], ['b', 0], ['d', 0]]);
    await until(async () => JSON.stringify((await get(nexus.port, '/v1/stats')).json.backends.map((b) => [b.id, b.pending])) === wanted, wanted);
    stream.reply.piece('data: still\n\n');
    assert.equal((await stream.client.piece()).toString(), 'data: still\n\n');
    await finish_stream(stream);
    kept.send('GET', '/v1/models');
    assert.equal((await kept.response()).status, 200, 'a kept-alive client connection goes on');
    const stats = async () => (await get(nexus.port, '/v1/stats')).json;
    await until(async () => (await stats()).backends.map((b) => b.id).join() === 'b,d', 'the removed one gone from the fleet, now that it is idle');
    assert.deepEqual((await stats()).removed_backends.map((b) => [b.id, b.requests]), [['a', 1]]);
    assert.doesNotMatch((await get(nexus.port, '/')).text, /<bdi>a<\/bdi>/);
    assert.deepEqual((await run_nexus(['top', `http://127.0.0.1:${nexus.port}`])).stdout.match(/^[abd] /gm), ['b ', 'd ']);
    assert.match((await get(nexus.port, '/metrics')).text, /^nexus_requests_total\{model="ma",backend="a",status="200"\} 1$/m, 'its counts stay');
    await until(() => a.open === 0, 'idle connections to the removed backend closed');
  });

  test('an unchanged backend keeps serving, without a moment of 404 or 503', async (t) => {
    const { nexus, backend } = await pair(t);
    const conf = (i) => ({ aliases: { [`alias${i}`]: 'm1' }, backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
    let stop = false;
    const seen = new Map();
    const load = Promise.all(Array.from({ length: 4 }, async () => {
      while (!stop) {
        const { status } = await post(nexus.port, path, chat());
        seen.set(status, (seen.get(status) ?? 0) + 1);
      }
    }));
    for (let i = 0; i < 10; i++) {
      nexus.reload(conf(i));
      await until(async () => (await post(nexus.port, path, chat(`alias${i}`))).status === 200, `alias ${i}`);
    }
    stop = true;
    await load;
    assert.deepEqual([...seen.keys()], [200], JSON.stringify([...seen]));
    assert_error(await post(nexus.port, path, chat('alias0')), 404, 'model_not_found');
  });

  test('takes new keys, limits and time limits', async (t) => {
    const keys = t.file('keys', 'alice sk-alice-0123456789\n');
    const { nexus, backend } = await pair(t);
    const backends = [{ name: 'b1', url: backend.url, type: 'generic' }];
    const status = async (key) => (await post(nexus.port, path, chat(), key ? { headers: { Authorization: `Bearer ${key}` } } : {})).status;
    assert.equal(await status(), 200);
    nexus.reload({ server: { api_keys_file: keys }, backends });
    await until(async () => (await status()) === 401, 'a key asked for');
    assert.equal(await status('sk-alice-0123456789'), 200);
    fs.writeFileSync(keys, 'bob sk-bob-0123456789\n');
    nexus.reload({ server: { api_keys_file: keys }, backends });
    await until(async () => (await status('sk-bob-0123456789')) === 200, 'the new key taken');
    assert.equal(await status('sk-alice-0123456789'), 401);
    nexus.reload({ server: { max_body: '1k' }, upstream: { first_byte_timeout: '200ms' }, backends });
    await until(async () => (await post(nexus.port, path, chat('m1', { pad: 'x'.repeat(2000) }))).status === 413, 'the new limit');
    backend.answer = () => {};
    assert_error(await post(nexus.port, path, chat()), 504, 'gateway_timeout');
  });

  test('a bad file is refused with its errors logged, and the old configuration stays', async (t) => {
    const { nexus, backend } = await pair(t);
    const stream = await open_stream(t, nexus, backend);
    nexus.reload('[server]\nlisten = 127.0.0.1:@PORT@\n[backend other]\nurl = http://127.0.0.1:1\ntype = abacus\n');
    await nexus.logged(/nexus-\d+\.conf:5\b.*/);
    await finish_stream(stream);
    backend.answer = (_, reply) => reply.json({});
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    fs.rmSync(nexus.conf_path);
    nexus.child.kill('SIGHUP');
    await sleep(200);
    assert.equal((await post(nexus.port, path, chat())).status, 200, 'a missing file changes nothing either');
  });

  test('a max_connections that the descriptors do not suffice for is told at a reload too', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { max_connections: 10 } });
    const told = /the limit on file descriptors is below what nexus\.conf may need.* needed=20000\d\d limit=\d+ max_connections=1000000/;
    const backends = [{ name: 'b1', url: backend.url, type: 'generic' }];
    nexus.reload({ server: { max_connections: 1_000_000 }, backends });
    await nexus.logged(/ reloaded changed=/);
    const enough = Number(/Max open files\s+(\d+)/.exec(fs.readFileSync(`/proc/${nexus.pid}/limits`, 'utf8'))[1]) > 2_000_099;
    assert.equal(told.test(nexus.log()), !enough, nexus.log());
  });

  test('an empty file is refused: a program may be about to write it', async (t) => {
    const { nexus } = await pair(t);
    nexus.reload('');
    await nexus.logged(/reload failed.*no \[backend NAME\] section/);
    assert.equal((await post(nexus.port, path, chat())).status, 200);
  });

  test('a key file that is a FIFO without a writer is refused, and keeps nobody from stopping Nexus', async (t) => {
    const { nexus } = await pair(t);
    const fifo = `${t.dir()}/fifo`;
    spawnSync('mkfifo', [fifo]);
    nexus.reload({ ...nexus.conf, server: { api_keys_file: fifo } });
    await nexus.logged(/reload failed.*fifo: expected at least one line/);
  });

  test('a rotated access log is opened again even if the file has an error', async (t) => {
    const file = t.file('access.log', '');
    const { nexus } = await pair(t, {}, { log: { access: file } });
    const ask = () => post(nexus.port, path, chat());
    const lines = (name) => (fs.existsSync(name) ? fs.readFileSync(name, 'utf8').split('\n').length - 1 : 0);
    await ask();
    await until(() => lines(file) === 1, 'the first line');
    fs.renameSync(file, `${file}.1`);
    nexus.reload('[server]\nthreads = two\n');
    await nexus.logged(/reload failed/);
    await ask();
    await until(() => lines(file) === 1, 'a line in the new file');
    assert.equal(lines(`${file}.1`), 1);
  });

  test('a reload with an access log that cannot be written is refused as a whole', async (t) => {
    const { nexus, backend } = await pair(t);
    const backends = [{ name: 'b1', url: backend.url, type: 'generic' }];
    nexus.reload({ aliases: { added: 'm1' }, log: { access: `${t.dir()}/none/access.log` }, backends });
    await nexus.logged(/ error "?reload failed, keeping the old configuration.*access: cannot write this file/);
    const models = (await get(nexus.port, '/v1/models')).json.data.map((m) => m.id);
    assert.ok(!models.includes('added'), models.join());
    assert.match((await get(nexus.port, '/metrics')).text, /^nexus_config_last_reload_successful 0$/m);
    // One that only its opening shows to be unfit.
    const fifo = `${t.dir()}/nobody-reads`;
    if (spawnSync('mkfifo', [fifo]).status !== 0) t.skip('there is no mkfifo');
    nexus.reload({ aliases: { added: 'm1' }, log: { access: fifo }, backends });
    await nexus.logged(/reload failed, keeping the old configuration.*access log \S*nobody-reads: No such device or address/);
    assert.ok(!(await get(nexus.port, '/v1/models')).text.includes('added'));
  });

  test('a setting that needs a restart is named in the log, with the value that stays in use', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 2 } });
    const backends = [{ name: 'b1', url: backend.url, type: 'generic' }];
    nexus.reload({ server: { threads: 3, metrics_listen: '127.0.0.1:1' }, backends });
    await nexus.logged(/ warning "?reloaded, except: metrics_listen \(needs a restart; still none\), threads \(needs a restart; still 2\)/);
    assert.equal((await get(nexus.port, '/metrics')).status, 200, 'the pages stay where they were');
    nexus.reload({ server: { threads: 2 }, backends });
    await nexus.logged(/ info reloaded changed=/);
  });

  test('a storm of reloads does no harm', async (t) => {
    const { nexus, backend } = await pair(t);
    const stream = await open_stream(t, nexus, backend);
    const backends = [{ name: 'b1', url: backend.url, type: 'generic' }];
    for (let i = 0; i < 50; i++) {
      nexus.reload({ aliases: { [`a${i}`]: 'm1' }, backends });
      await sleep(5);
    }
    await finish_stream(stream);
    backend.answer = (_, reply) => reply.json({});
    await until(async () => (await post(nexus.port, path, chat('a49'))).status === 200, 'the last one in force');
    await pending_is(nexus, 0);
  });
});

group('drain', () => {
  for (const signal of ['SIGTERM', 'SIGINT']) {
    test(`${signal} with nothing to do ends at once, kept-alive connections and all, with exit code 0`, async (t) => {
      const { nexus } = await pair(t);
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('POST', path, {}, chat());
      await client.response();
      nexus.child.kill(signal);
      assert.deepEqual(await nexus.exits(2_000), { code: 0, signal: null });
      nexus.check_report();
      assert.equal((await client.ended()).length, 0);
    });
  }

  test('a stream in flight is finished, new requests are turned away, then it ends with exit code 0', async (t) => {
    const { nexus, backend } = await pair(t);
    const stream = await open_stream(t, nexus, backend);
    const idle = await RawClient.connect(nexus.port);
    t.after(() => idle.close());
    idle.send('GET', '/health');
    await idle.response();
    nexus.child.kill('SIGTERM');
    const turned_away = async () => {
      try {
        const r = await get(nexus.port, '/health', { ms: 1_000 });
        return r.status === 503;
      } catch {
        return true;   // refused: it no longer accepts
      }
    };
    await until(turned_away, 'new connections turned away');
    const refused = await post(nexus.port, path, chat(), { ms: 1_000 }).catch(() => null);
    if (refused) {
      assert_error(refused, 503, 'service_unavailable');
      assert.match(refused.headers.get('retry-after'), /^\d+$/);
    }
    for (let i = 0; i < 5; i++) {
      stream.reply.piece(`data: ${i}\n\n`);
      assert.equal((await stream.client.piece()).toString(), `data: ${i}\n\n`);
      assert.equal(nexus.exit, null, 'it stays for the stream');
      await sleep(30);
    }
    await finish_stream(stream);
    assert.deepEqual(await nexus.exits(2_000), { code: 0, signal: null });
    nexus.check_report();
  });

  test('SIGHUP opens the access log again while it drains', async (t) => {
    const file = t.file('access.log', '');
    const { nexus, backend } = await pair(t, {}, { log: { access: file } });
    const stream = await open_stream(t, nexus, backend);
    nexus.child.kill('SIGTERM');
    await nexus.logged(/ draining$/m);
    fs.renameSync(file, `${file}.1`);
    nexus.child.kill('SIGHUP');
    await until(() => fs.existsSync(file), 'the file opened again');
    await finish_stream(stream);
    assert.deepEqual(await nexus.exits(5_000), { code: 0, signal: null });
    assert.match(fs.readFileSync(file, 'utf8'), /model=m1/);
    assert.equal(fs.readFileSync(`${file}.1`, 'utf8'), '');
  });

  test('a request that waits for its first byte is finished too', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (_, reply) => { await sleep(400); reply.json({ late: true }); };
    const answer = post(nexus.port, path, chat());
    await backend.request();
    nexus.child.kill('SIGTERM');
    const r = await answer;
    assert.equal(r.json.late, true);
    assert.deepEqual(await nexus.exits(2_000), { code: 0, signal: null });
  });

  test('an idle connection is closed at once, and a response that begins later says that its connection closes', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    const begun = new Promise((done) => { backend.answer = (_, reply) => done(reply); });
    const idle = await RawClient.connect(nexus.port);
    const busy = await RawClient.connect(nexus.port);
    t.after(() => [idle, busy].forEach((client) => client.close()));
    idle.send('GET', '/health');
    await idle.response();
    busy.send('POST', path, {}, chat());
    const reply = await begun;
    nexus.child.kill('SIGTERM');
    await idle.ended(900);
    assert.equal(nexus.exit, null, 'it stays for the other one');
    reply.json({ late: true });
    const r = await busy.response();
    assert.equal(r.status, 200);
    assert.equal(r.headers.get('connection'), 'close');
    assert.deepEqual(await nexus.exits(3_000), { code: 0, signal: null });
  });

  test('every connection that the kernel had accepted before SIGTERM is answered', async (t) => {
    const { nexus } = await pair(t, {}, { server: { threads: 2 } });
    nexus.child.kill('SIGSTOP');
    const clients = await Promise.all(Array.from({ length: 400 }, () => RawClient.connect(nexus.port)));
    t.after(() => clients.forEach((client) => client.close()));
    for (const client of clients) client.send('POST', path, {}, chat());
    nexus.child.kill('SIGTERM');
    nexus.child.kill('SIGCONT');
    const statuses = await Promise.all(clients.map((client) => client.response().then((r) => r.status, (error) => error.message)));
    // (200: its worker read the request before it heard of the drain.)
    assert.ok(statuses.every((status) => status === 503 || status === 200), [...new Set(statuses)].join());
    assert.deepEqual(await nexus.exits(5_000), { code: 0, signal: null });
  });

  test('drain_timeout ends what does not end', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { drain_timeout: '500ms' }, log: { access: 'stderr' } });
    const stream = await open_stream(t, nexus, backend);
    const started = performance.now();
    nexus.child.kill('SIGTERM');
    const exit = await nexus.exits(5_000);
    assert.equal(exit.signal, null);
    assert.ok(performance.now() - started > 400);
    nexus.check_report();
    assert.match(nexus.log(), /drain_timeout reached, closing remaining connections/);
    let rest = '';
    for (let piece; (piece = await stream.client.piece()) !== null;) rest += piece.toString();
    assert.equal(stream.client.body.done, false, 'the cut is visible');
    assert.match(rest, /data: {"error":{.*"shutting_down"/, 'the client is told why');
    assert.match(nexus.log(), /error_type=drain/);
  });

  test('a second signal ends it at once', async (t) => {
    const { nexus, backend } = await pair(t);
    await open_stream(t, nexus, backend);
    nexus.child.kill('SIGTERM');
    await sleep(150 * settings.slow);
    assert.equal(nexus.exit, null);
    const started = performance.now();
    nexus.child.kill('SIGTERM');
    const exit = await nexus.exits(2_000);
    assert.ok(performance.now() - started < 1_000 * settings.slow);
    assert.ok(!['SIGSEGV', 'SIGABRT', 'SIGKILL'].includes(exit.signal), JSON.stringify(exit));
    nexus.check_report();
    assert.match(nexus.log(), /second signal: stopping now/);
  });

  test('a client that leaves during the drain does not keep it from ending', async (t) => {
    const { nexus, backend } = await pair(t);
    const { client } = await open_stream(t, nexus, backend);
    nexus.child.kill('SIGTERM');
    await sleep(50);
    client.reset();
    assert.deepEqual(await nexus.exits(2_000), { code: 0, signal: null });
  });

  test('a client connected without a request does not keep it from ending', async (t) => {
    const { nexus } = await pair(t);
    const silent = await RawClient.connect(nexus.port);
    t.after(() => silent.close());
    const half = await RawClient.connect(nexus.port);
    t.after(() => half.close());
    half.write('POST /v1/chat');
    await sleep(50);
    nexus.child.kill('SIGTERM');
    assert.equal((await within(12_000, nexus.exited, 'the end')).code, 0);
  });
});
