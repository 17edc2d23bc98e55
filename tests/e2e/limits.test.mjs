// What Nexus bears from clients, backends and the host that go too far: each limit refuses with a count of its own, and
// everybody else is served on.
import { execFileSync, fork } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { RawClient, answer_plainly, assert, assert_error, chat, get, group, median, pair, parse_metrics, post, settings, sleep, start_backend, test, until } from './harness.mjs';
import { completions, scaled } from './fleet.mjs';

const here = path.dirname(new URL(import.meta.url).pathname);
const ms = (n) => `${n * settings.slow}ms`;

const hits = async (page, limit) => (await page()).value('nexus_limit_rejections_total', { limit });
const page_of = (nexus) => async () => parse_metrics((await get(nexus.port, '/metrics')).text);

// What the kernel gives all sockets before it begins to save, where it tells it: not within a container.
function socket_memory_bytes() {
  try {
    return Number(fs.readFileSync('/proc/sys/net/ipv4/tcp_mem', 'latin1').split(/\s+/)[0]) * 4096;
  } catch {
    return os.totalmem() / 16;   // as the kernel's own default, in tcp_init_mem()
  }
}

// User and system time of a process, in ms; the kernel counts it in hundredths of a second.
function cpu_ms(pid) {
  const fields = fs.readFileSync(`/proc/${pid}/stat`, 'latin1').replace(/^.*\) /s, '').split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

// Asks on kept connections until `over()`; the time of every answer, each of which must be right.
async function good_traffic(port, clients, over) {
  const times = [];
  await Promise.all(Array.from({ length: clients }, async () => {
    const client = await RawClient.connect(port);
    while (!over()) {
      const began = performance.now();
      client.send('POST', completions, { 'Content-Type': 'application/json' }, chat());
      const answer = await client.response();
      times.push(performance.now() - began);
      assert.equal(answer.status, 200, answer.text);
      assert.ok(answer.complete && answer.json.choices.length === 1);
      await sleep(10);
    }
    client.close();
  }));
  return times.sort((a, b) => a - b);
}

const piece = Buffer.from(`data: {"choices":[{"index":0,"delta":{"content":"${'x'.repeat(65_000)}"}}]}\n\n`);

// More than all buffers on the way hold, as long as it is taken; anything else is answered at once.
async function flood_or_answer(request, reply, backend) {
  if (!request.json.flood) return answer_plainly(request, reply, backend);
  reply.stream();
  while (!reply.gone && reply.socket.writable) {
    reply.piece(piece);
    await reply.drained();
    if (!request.connection.ended_at) request.taken_at = performance.now();
    await reply.wait(2);   // the good ones are answered by this process as well
  }
  return undefined;
}

// Starts slow_attackers.mjs; next(key) waits for its message with that key.
function start_attackers(t, options) {
  const child = fork(path.join(here, 'slow_attackers.mjs'), [JSON.stringify(options)], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
  const exited = new Promise((done) => child.once('exit', done));
  t.after(async () => {
    child.kill('SIGKILL');
    await exited;
  });
  const said = {};
  child.on('message', (message) => Object.assign(said, message));
  return { look: () => child.send('look'), next: (key, limit_ms) => until(() => said[key], `the attackers say "${key}"`, limit_ms) };
}

group('limits', () => {
  test('2,000 slow attackers beside good traffic: the good ones notice nothing, each attacker is gone at its deadline', { limit_ms: 60_000, serial: true }, async (t) => {
    const heads = scaled(980);
    const bodies = scaled(980);
    const readers = scaled(40);    // each makes its backend fill some megabytes of the kernel's buffers
    const pagers = scaled(Math.min(60, Math.floor(socket_memory_bytes() / 12e6)));   // each makes Nexus do so, with large pages of its own
    const models = ['m1', ...Array.from({ length: 3_000 }, (_, i) => `a-model-with-a-name-of-its-own-${i}`)];
    const limits = { header_timeout: 2_500, body_timeout: 3_000, write_timeout: 2_000 };
    const { nexus, backend } = await pair(t, { answer: flood_or_answer, models }, {
      server: Object.fromEntries(Object.entries(limits).map(([key, value]) => [key, ms(value)])),
    });
    const large = (await get(nexus.port, '/v1/models')).text.length;
    assert.ok(large > 200_000, `/v1/models has ${large} bytes`);
    const page = page_of(nexus);
    let over = false;
    const good = good_traffic(nexus.port, 8, () => over);
    const attackers = start_attackers(t, { port: nexus.port, heads, bodies, readers, pagers, drip_ms: 250 });
    assert.equal(await attackers.next('attacking', 8_000), heads + bodies + readers + pagers);
    const connected = performance.now();
    assert.ok((await page()).value('nexus_client_connections') >= readers + 8, 'the attackers are in');

    const dripping = await attackers.next('over', 12_000);
    assert.equal(dripping.length, heads + bodies);
    for (const a of dripping) {
      const deadline = limits[a.kind === 'head' ? 'header_timeout' : 'body_timeout'] * settings.slow;
      assert.equal(a.status, 408, `${a.kind}: ${a.text}`);
      assert.match(a.text, a.kind === 'head' ? /"code":"header_timeout"/ : /"code":"body_timeout"/);
      assert.ok(a.lasted_ms > deadline * 0.9 && a.lasted_ms < deadline + 1_500 * settings.slow, `a slow ${a.kind} was there for ${a.lasted_ms} ms`);
    }
    let cut;
    await until(async () => (cut = await hits(page, 'write_timeout')) === readers + pagers, () => `every one of ${readers + pagers} readers to be cut (${cut} are)`, 15_000);
    // Their time runs from the last byte that was taken, as the backend saw it.
    const floods = backend.requests.filter((request) => request.json.flood);
    assert.equal(floods.length, readers);
    await until(() => floods.every((request) => request.connection.ended_at), 'every flood to be ended at the backend');
    const stalls = floods.map((request) => request.connection.ended_at - request.taken_at);
    assert.ok(Math.max(...stalls) < (limits.write_timeout + 2_000) * settings.slow, `a reader was there for ${Math.max(...stalls)} ms after it took its last byte`);
    over = true;
    const times = await good;
    assert.ok(times.length > 8 * 20, `${times.length} good answers`);
    assert.ok(median(times) < 50 * settings.slow, `half of the good answers took over ${median(times)} ms`);
    assert.ok(times.at(-1) < 1_000 * settings.slow, `a good answer took ${times.at(-1)} ms`);

    attackers.look();
    for (const r of await attackers.next('readers', 8_000)) {
      assert.ok(r.bytes > 0);
      if (r.kind === 'reader') assert.notEqual(r.tail, '0\r\n\r\n', 'what was cut must not look whole');
      else assert.ok(r.bytes < 40 * large, `a reader of pages got ${r.bytes} bytes: all there were`);
    }
    assert.equal(await hits(page, 'header_timeout'), heads);
    assert.equal(await hits(page, 'body_timeout'), bodies);
    await until(async () => (await page()).value('nexus_client_connections') === 1, 'no connection but that of the scrape', 8_000);
    assert.equal((await page()).sum('nexus_pending_requests'), 0);
    if (settings.verbose) console.log(`     ${times.length} good answers, median ${median(times).toFixed(1)} ms, longest ${times.at(-1).toFixed(1)} ms; attackers gone ${Math.max(...dripping.map((a) => a.lasted_ms)).toFixed(0)} ms after they came, ${Math.max(...stalls).toFixed(0)} ms after their last byte`);
  });

  test('without a free descriptor who is in is served on, who waits is served later, and nothing spins', { limit_ms: 30_000, serial: true }, async (t) => {
    const { nexus } = await pair(t, {}, { health: { interval: '200ms', failures: 1 } });
    const kept = await RawClient.connect(nexus.port);
    const ask = async () => {
      kept.send('POST', completions, { 'Content-Type': 'application/json' }, chat());
      return kept.response();
    };
    const scrape = async () => {
      kept.send('GET', '/metrics');
      return parse_metrics((await kept.response()).text);
    };
    assert.equal((await ask()).status, 200);
    const open = fs.readdirSync(`/proc/${nexus.pid}/fd`).length;
    execFileSync('prlimit', ['--pid', String(nexus.pid), `--nofile=${open + 20}`]);
    const crowd = await Promise.all(Array.from({ length: 80 }, () => RawClient.connect(nexus.port)));
    await until(async () => (await hits(scrape, 'descriptors')) > 0, 'descriptors to run out');
    const began = { cpu: cpu_ms(nexus.pid), at: performance.now() };
    for (let i = 0; i < 15; i++) {
      assert.equal((await ask()).status, 200, 'who is in is served on');
      await sleep(100);
    }
    const wall = performance.now() - began.at;
    const cpu = cpu_ms(nexus.pid) - began.cpu;
    assert.ok(cpu < wall * 0.2, `${cpu} ms of CPU time in ${wall} ms: it spins`);
    assert.equal((await scrape()).value('nexus_backends_healthy'), 1, 'checks that could not be made say nothing');
    assert.equal(nexus.log().match(/cannot check backends/g).length, 1, 'one line');
    const counted = await hits(scrape, 'descriptors');
    assert.ok(counted < 200, `${counted} counted in ${wall} ms: it tries without a pause`);

    // Half of those who hold a place go; the others' turn comes, and whoever asked is answered.
    for (const client of crowd) client.send('POST', completions, { 'Content-Type': 'application/json' }, chat());
    const answers = await Promise.all(crowd.map(async (client) => {
      const answer = await client.response();
      client.close();
      return answer;
    }));
    assert.ok(answers.some((a) => a.status === 200));
    for (const answer of answers) if (answer.status !== 200) assert_error(answer, 503, 'no_descriptor');
    kept.close();
    await until(async () => (await post(nexus.port, completions, chat())).status === 200, 'a new client to be served');
  });

  test('an access log on a full disk: served on, the lines counted as dropped', { limit_ms: 20_000 }, async (t) => {
    if (!fs.existsSync('/dev/full')) t.skip('no /dev/full here');
    const { nexus } = await pair(t, {}, { log: { access: '/dev/full' } });
    const page = page_of(nexus);
    for (let i = 0; i < 50; i++) assert.equal((await post(nexus.port, completions, chat())).status, 200);
    await until(async () => (await page()).value('nexus_log_lines_dropped_total') >= 50, 'fifty lines to be counted as dropped', 8_000);
    assert.ok(await hits(page, 'log_volume') >= 1);
    const before = cpu_ms(nexus.pid);
    await sleep(500);
    assert.ok(cpu_ms(nexus.pid) - before < 200 * settings.slow, 'it tries on without a pause');
    assert.equal((await post(nexus.port, completions, chat())).status, 200);
  });

  test('a backend that lists a million models: the first ten thousand are kept, and the others are served', { limit_ms: 30_000, serial: true }, async (t) => {
    const total = scaled(1_000_000);
    const id = (i) => (i + 46_656).toString(36);   // of four or five digits, so that a million fit into an answer
    const list = Buffer.from(`{"data":[${Array.from({ length: total }, (_, i) => `{"id":"${id(i)}"}`).join()}]}`);
    const sane = await start_backend(t);
    const { nexus, backend } = await pair(t, { models: [], probe: (_, reply) => reply.body(200, list, { 'Content-Type': 'application/json' }) }, {
      backends: [{ name: 'sane', mock: sane }],
      health: { timeout: ms(5_000) },
    });
    const page = page_of(nexus);
    await until(async () => (await hits(page, 'models')) >= 1, 'the limit of models to be counted', 8_000);
    const listed = (await get(nexus.port, '/v1/models')).json.data.length;
    assert.equal(listed, 10_001, 'ten thousand of the one, and the other\'s own');
    assert.equal((await post(nexus.port, completions, chat('m1'))).status, 200);
    assert.equal((await post(nexus.port, completions, chat(id(9_999)))).status, 200);
    assert.equal(backend.requests.length, 1);
    assert_error(await post(nexus.port, completions, chat(id(10_000))), 404, 'model_not_found');
    assert.ok(nexus.rss_bytes() < (settings.sanitised ? 800 : 150) * 2 ** 20, `${nexus.rss_bytes()} bytes are held`);
    await nexus.logged(/too many models|models changed/);
  });

  test('each limit on a request refuses with an error and a count of its own', { limit_ms: 30_000 }, async (t) => {
    let open_gate;
    const gate = new Promise((done) => { open_gate = done; });
    const { nexus } = await pair(t, { answer: async (request, reply, self) => {
      if (request.json.held) await gate;
      return answer_plainly(request, reply, self);
    } }, {
      server: { max_body: '10k', body_memory: '16k', max_header: '2k', max_connections: 12, idle_timeout: ms(300) },
      backend: { max_pending: 1 },
      queue: { size: 1, timeout: ms(600) },
    });
    const kept = await RawClient.connect(nexus.port, {});
    kept.send('GET', '/health');
    assert.equal((await kept.response()).status, 200);
    const page = page_of(nexus);
    const rows = [
      ['max_header', 431, () => get(nexus.port, '/health', { headers: { 'X-Long': 'x'.repeat(3_000) } })],
      ['max_body', 413, () => post(nexus.port, completions, chat('m1', { user: 'x'.repeat(11_000) }))],
      ['json_depth', 400, () => post(nexus.port, completions, `{"model":"m1","messages":${'['.repeat(2_000)}${']'.repeat(2_000)}}`)],
    ];
    for (const [limit, status, ask] of rows) {
      const before = await hits(page, limit);
      assert_error(await ask(), status);
      assert.equal(await hits(page, limit), before + 1, limit);
    }
    await until(async () => (await hits(page, 'idle_timeout')) === 1, 'the idle connection to be counted');
    await kept.ended();

    // One in flight, one in the queue, and a third that finds it full; the second's time passes.
    const first = post(nexus.port, completions, chat('m1', { held: true }));
    await until(async () => (await page()).sum('nexus_pending_requests') === 1, 'the first in flight');
    const second = post(nexus.port, completions, chat());
    await until(async () => (await page()).sum('nexus_queue_depth') === 1, 'the second in the queue');
    assert_error(await post(nexus.port, completions, chat()), 429);
    assert.equal(await hits(page, 'queue_size'), 1);
    assert_error(await second, 503);
    assert.equal(await hits(page, 'queue_timeout'), 1);
    open_gate();
    assert.equal((await first).status, 200);

    // Two bodies of ten thousand bytes do not fit into 16k together.
    const holder = await RawClient.connect(nexus.port);
    holder.write('POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n{"a":"' + 'x'.repeat(9_000));
    await sleep(50);
    assert_error(await post(nexus.port, completions, chat('m1', { user: 'x'.repeat(9_500) })), 503);
    assert.equal(await hits(page, 'body_memory'), 1);
    holder.close();

    // Each connection is served or turned away, and the count of those is exact. The page's own connection may still
    // have a place when the crowd comes.
    await until(async () => (await page()).value('nexus_client_connections') === 1, 'only the page\'s own connection to be left');
    const before = await hits(page, 'max_connections');
    const crowd = await Promise.all(Array.from({ length: 20 }, () => RawClient.connect(nexus.port)));
    for (const c of crowd) c.send('GET', '/health');
    const served = (await Promise.all(crowd.map((c) => c.response().catch(() => null)))).filter((r) => r?.status === 200).length;
    assert.ok(served === 12 || served === 11, `served are ${served}`);
    for (const c of crowd) c.close();
    await until(async () => (await hits(page, 'max_connections')) >= before + 20 - served, 'connections over the limit to be counted');
    assert.equal(await hits(page, 'max_connections'), before + 20 - served);
  });
});
