// Hard caps and the queue: no backend is ever given more than it can take, and those who wait are served in their turn.
import { assert, assert_error, group, settings, sleep, test, until } from './harness.mjs';
import { act, add_gate, count_running, fails_with, scaled, served_by, start_fleet, tally } from './fleet.mjs';

const gated = (fleet) => {
  for (const mock of Object.values(fleet.mocks)) add_gate(count_running(mock));
  return fleet;
};
const open_all = (fleet) => Object.values(fleet.mocks).forEach((mock) => mock.open_gate());
const capped = (cap, more = {}) => ({ conf: { max_pending: cap, ...more } });
const start_gated = async (t, backends, conf) => gated(await start_fleet(t, backends, conf));
const running = (fleet) => Object.values(fleet.mocks).reduce((n, mock) => n + mock.running, 0);
const retry_after = (answer) => assert.match(answer.headers.get('retry-after'), /^[1-9]\d*$/, 'with Retry-After');

// Sends requests one after the other, each in the queue before the next is sent; `number` tells them apart.
async function line_up(fleet, count, more = {}, first = 0) {
  const before = await fleet.gauge('nexus_queue_depth');
  const clients = [];
  for (let i = 0; i < count; i++) {
    clients.push(await fleet.send('m1', { number: first + i, ...more }));
    await fleet.queued(before + i + 1);
  }
  return clients;
}

async function finish(clients, status = 200) {
  for (const client of clients) {
    const answer = await client.response(15_000);
    assert.equal(answer.status, status, answer.text);
    assert.ok(answer.complete);
    client.close();
  }
}

group('queue', () => {
  test('300 streams fight for 3 × 4 places on 2 threads: never more, none idle, all served, first come first served', { limit_ms: 40_000 }, async (t) => {
    const fleet = await start_gated(t, { a: capped(4), b: capped(4), c: capped(4) }, { queue: { size: 300, timeout: `${20 * settings.slow}s` } });
    const total = scaled(300, 108);
    const wave = 48;
    const clients = [];
    const started = [];   // numbers in the order in which they came to a backend
    for (const mock of Object.values(fleet.mocks)) {
      const answer = mock.answer;
      mock.answer = (request, ...rest) => {
        started.push(request.json.number);
        return answer(request, ...rest);
      };
    }
    // In waves, each in the queue as a whole before the next is sent, so that it is known who came first.
    const stream = { stream: true, pieces: 3, every_ms: 4, held: true };
    for (let sent = 0; sent < total;) {
      const until_now = sent === 0 ? 12 : Math.min(total, sent + wave);
      clients.push(...await Promise.all(Array.from({ length: until_now - sent }, (_, i) => fleet.send('m1', { ...stream, number: sent + i }))));
      sent = until_now;
      await fleet.pending(sent);
      await fleet.queued(sent - 12);
    }
    await until(() => running(fleet) === 12, '12 at the backends');
    open_all(fleet);
    await finish(clients);
    for (const [name, mock] of Object.entries(fleet.mocks)) {
      assert.equal(mock.most, 4, `the most at once on ${name}`);
      assert.ok(mock.requests.length > total / 6, `${name} had ${mock.requests.length}`);
    }
    assert.equal(new Set(started).size, total);
    const wave_of = (n) => (n < 12 ? 0 : 1 + Math.floor((n - 12) / wave));
    // At most as many as there are places may be seen to start before one that came before them: threads carry them there.
    started.forEach((n, at) => {
      const later = started.slice(0, at).filter((m) => wave_of(m) > wave_of(n)).length;
      assert.ok(later <= 12, `${later} of a later wave came before ${n}`);
    });
    await fleet.reaches('nexus_queue_wait_seconds_count', total - 12);
  });

  test('300 streams for 3 × 4 places and a queue of 100: all are served or refused at once with 429 and Retry-After', { limit_ms: 40_000 }, async (t) => {
    const fleet = await start_gated(t, { a: capped(4), b: capped(4), c: capped(4) }, { queue: { size: 100, timeout: `${20 * settings.slow}s` } });
    const clients = await Promise.all(Array.from({ length: 300 }, () => fleet.send('m1', { stream: true, pieces: 2, held: true })));
    const began = performance.now();
    const answers = clients.map((client) => client.response(15_000));
    let refused = 0;
    for (const answer of answers) answer.then((a) => { if (a.status === 429) refused += 1; }, () => {});
    await until(() => refused === 188, () => `188 refused (${refused})`);
    assert.ok(performance.now() - began < 3_000 * settings.slow);
    await fleet.queued(100);
    await until(() => running(fleet) === 12, '12 at the backends');
    open_all(fleet);
    const done = await Promise.all(answers);
    assert.deepEqual(tally(done, (a) => a.status), { 200: 112, 429: 188 });
    for (const answer of done.filter((a) => a.status === 429)) {
      assert_error(answer, 429, 'queue_full');
      retry_after(answer);
    }
    for (const answer of done.filter((a) => a.status === 200)) assert.ok(answer.complete && /\[DONE\]/.test(answer.text));
    for (const mock of Object.values(fleet.mocks)) assert.equal(mock.most, 4);
    await fleet.reaches('nexus_queue_rejected_total', 188, { reason: 'full' });
    for (const client of clients) client.close();
  });

  test('caps hold while plain requests, streams, failures and leaving clients come and go on 2 threads', { limit_ms: 30_000 }, async (t) => {
    const broken = async (request, reply, backend) => {
      const { number } = request.json;
      await sleep(number % 7);
      if (number % 5 === 0) return reply.reset();
      if (number % 5 === 1) return fails_with(503)(request, reply);
      return act(request, reply, backend);
    };
    const fleet = await start_gated(t, { a: { answer: broken, ...capped(3) }, b: { answer: broken, ...capped(2) } }, { queue: { size: 100, timeout: '20s' }, health: { eject_after: 1000 } });
    let number = 0;
    const answers = [];
    const end = performance.now() + 1_200;
    const leaving = (async () => {
      while (performance.now() < end) {
        const client = await fleet.send('m1', { number: 2, stream: true, pieces: 3, every_ms: 20 });
        await sleep(number % 12);
        client.close();
      }
    })();
    await fleet.load(24, () => performance.now() > end, () => ['m1', { number: number++, stream: number % 3 === 0, pieces: 2, every_ms: 3 }], (answer) => answers.push(answer));
    await leaving;
    fleet.moved = true;   // a connection that is reset when it is used again is tried once more, on a new one
    assert.ok(answers.length > 20, `${answers.length} answers`);
    for (const answer of answers) assert.ok([200, 502, 503].includes(answer.status), `${answer.status} ${answer.text}`);
    assert.ok(fleet.mocks.a.most <= 3 && fleet.mocks.b.most <= 2, `${fleet.mocks.a.most} and ${fleet.mocks.b.most}`);
  });

  test('those who wait are served strictly in the order in which they came, whatever thread they are on', async (t) => {
    const fleet = await start_gated(t, { a: capped(1) }, { queue: { size: 50 } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    const waiting = await line_up(fleet, 16);
    fleet.mocks.a.open_gate();
    await finish([first, ...waiting]);
    assert.deepEqual(fleet.mocks.a.requests.slice(1).map((r) => r.json.number), Array.from({ length: 16 }, (_, i) => i));
    assert.equal(fleet.mocks.a.most, 1);
  });

  test('a newcomer does not overtake those who wait', async (t) => {
    const fleet = await start_gated(t, { a: capped(1) }, { queue: { size: 50 } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    const waiting = await line_up(fleet, 6, { wait_ms: 5 });
    fleet.mocks.a.open_gate();
    const late = [];
    for (let i = 0; i < 6; i++) late.push(await fleet.send('m1', { number: 100 + i }));
    await finish([first, ...waiting, ...late]);
    assert.deepEqual(fleet.mocks.a.requests.slice(1, 7).map((r) => r.json.number), [0, 1, 2, 3, 4, 5]);
  });

  test('models that have backends of their own do not wait for each other', async (t) => {
    const fleet = await start_gated(t, { a: { models: ['m1'], ...capped(1) }, b: { models: ['m2'], ...capped(1) } }, { queue: { size: 10 } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    const waiting = await line_up(fleet, 3);
    for (const answer of [await fleet.ask('m2'), await fleet.ask('m2')]) assert.equal(answer.status, 200);
    assert.equal(await fleet.gauge('nexus_queue_depth'), 3);
    open_all(fleet);
    await finish([first, ...waiting]);
  });

  test('a request that waits takes the first place that is free on any of its backends', async (t) => {
    const fleet = await start_gated(t, { a: capped(1), b: capped(1) }, { queue: { size: 10 } });
    const held = [await fleet.send('m1', { held: true }), await fleet.send('m1', { held: true })];
    await until(() => running(fleet) === 2, 'both full');
    const [waiting] = await line_up(fleet, 1);
    fleet.mocks.b.open_gate();
    const answer = await waiting.response();
    assert.equal(served_by(answer), 'b');
    waiting.close();
    fleet.mocks.a.open_gate();
    await finish(held);
  });

  test('a backend without a cap is used where the capped one is full', async (t) => {
    const fleet = await start_gated(t, { a: capped(1, { priority: 1 }), b: {} }, { routing: { strategy: 'priority' }, queue: { size: 10 } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    for (const answer of await fleet.ask_many(3)) assert.equal(served_by(answer), 'b');
    open_all(fleet);
    await finish([first]);
    assert.equal(served_by(await fleet.ask()), 'a');
  });

  test('without a queue a request that finds all full is refused at once, with 429 and Retry-After', async (t) => {
    const fleet = await start_gated(t, { a: capped(2) });
    const held = [await fleet.send('m1', { held: true, stream: true, pieces: 2 }), await fleet.send('m1', { held: true })];
    await until(() => running(fleet) === 2, 'full');
    for (const stream of [false, true]) {
      const began = performance.now();
      const answer = await fleet.ask('m1', { stream });
      assert.ok(performance.now() - began < 500 * settings.slow, 'at once');
      assert_error(answer, 429, 'backends_full');
      assert.match(answer.json.error.message, /no queue/);
      retry_after(answer);
    }
    await fleet.reaches('nexus_limit_rejections_total', 2, { limit: 'backend_max_pending' });
    assert.equal(await fleet.gauge('nexus_queue_rejected_total'), 0, 'no queue has refused them');
    open_all(fleet);
    await finish(held);
    assert.equal((await fleet.ask()).status, 200);
  });

  test('a wait over the queue\'s timeout is answered 503 with Retry-After, neither early nor late', async (t) => {
    const timeout = 300;
    const fleet = await start_gated(t, { a: capped(1) }, { queue: { size: 10, timeout: `${timeout}ms` } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    const waits = await Promise.all([0, 1, 2].map(async () => {
      const began = performance.now();
      const answer = await fleet.ask();
      assert_error(answer, 503, 'queue_timeout');
      retry_after(answer);
      return performance.now() - began;
    }));
    for (const ms of waits) assert.ok(ms >= timeout - 5 && ms < timeout + 600 * settings.slow, `${ms} ms`);
    await fleet.reaches('nexus_queue_rejected_total', 3, { reason: 'timeout' });
    open_all(fleet);
    await finish([first]);
    assert.equal(fleet.mocks.a.requests.length, 1, 'none of them reached the backend');
    assert.equal((await fleet.ask()).status, 200);
  });

  test('a client that leaves while it waits leaves the queue, and the next in line moves up', async (t) => {
    const fleet = await start_gated(t, { a: capped(1) }, { queue: { size: 4 } });
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.a.request(1);
    const waiting = await line_up(fleet, 4);
    assert.equal((await fleet.ask()).status, 429, 'the queue is full');
    waiting[0].close();
    waiting[2].reset();
    await fleet.queued(2);
    const more = await line_up(fleet, 2, {}, 10);
    fleet.mocks.a.open_gate();
    await finish([first, waiting[1], waiting[3], ...more]);
    assert.deepEqual(fleet.mocks.a.requests.slice(1).map((r) => r.json.number), [1, 3, 10, 11]);
    const page = await fleet.page_of_all();
    assert.equal(page.sum('nexus_client_disconnects_total', { phase: 'waiting' }), 2);
    assert.equal(page.sum('nexus_requests_total', { status: '499' }), 2);
  });

  test('a place is free again at once when its stream ends, its client leaves or its backend breaks off', async (t) => {
    const breaks = async (request, reply, backend) => {
      if (!request.json.breaks) return act(request, reply, backend);
      reply.stream();
      reply.piece('data: {}\n\n');
      await backend.gate;
      return reply.reset();
    };
    const fleet = await start_gated(t, { a: { answer: breaks, ...capped(1) } }, { queue: { size: 4, timeout: '10s' }, health: { eject_after: 1000 } });
    for (const [more, how] of [[{ stream: true, pieces: 2, held: true }, 'ends'], [{ stream: true, pieces: 2, held: true }, 'leaves'], [{ stream: true, breaks: true }, 'breaks']]) {
      add_gate(fleet.mocks.a);
      const holder = await fleet.send('m1', more);
      await holder.head();
      await holder.piece();
      const waiting = await line_up(fleet, 1);
      if (how === 'leaves') holder.close();
      else fleet.mocks.a.open_gate();
      await finish(waiting);
      fleet.mocks.a.open_gate();
      holder.close();
    }
    assert.equal(fleet.mocks.a.violations.length, 0);
  });

  test('a higher cap lets those who wait in at once; a lower one ends nothing and is kept to from then on', async (t) => {
    const fleet = await start_gated(t, { a: capped(2) }, { queue: { size: 20, timeout: '10s' } });
    const held = [await fleet.send('m1', { held: true }), await fleet.send('m1', { held: true })];
    await fleet.mocks.a.request(2);
    const waiting = await line_up(fleet, 6, { held: true });
    const with_cap = (cap) => ({ ...fleet.conf, backends: [{ name: 'a', mock: fleet.mocks.a, max_pending: cap }] });
    fleet.reload(with_cap(5));
    await fleet.mocks.a.request(5);
    await fleet.queued(3);
    fleet.reload(with_cap(1));
    await fleet.nexus.logged(/reload/i).catch(() => {});
    await sleep(100);
    assert.equal(fleet.mocks.a.running, 5);
    // One at a time from now on, but for the five that run.
    let most_of_late = 0;
    const late = await line_up(fleet, 2, { late: true });
    const watch = setInterval(() => { if (fleet.mocks.a.requests.length > 5) most_of_late = Math.max(most_of_late, fleet.mocks.a.running); }, 1);
    fleet.mocks.a.open_gate();
    await finish([...held, ...waiting, ...late]);
    clearInterval(watch);
    assert.ok(fleet.mocks.a.most <= 5, `${fleet.mocks.a.most}`);
    assert.ok(most_of_late <= 1, `${most_of_late} at once under a cap of 1`);
  });

  test('a capped backend that fails at once does not drain the queue: those who wait are served by the good one', { limit_ms: 30_000 }, async (t) => {
    const slowly = async (request, reply, backend) => {
      await sleep(30);
      return act(request, reply, backend);
    };
    const fleet = await start_fleet(t, { bad: { answer: fails_with(500), ...capped(4) }, good: { answer: slowly, ...capped(4) } },
                                    { queue: { size: 300, timeout: `${15 * settings.slow}s` }, health: { eject_after: 3, eject_time: '30s' } });
    const answers = await Promise.all(Array.from({ length: 120 }, (_, i) => fleet.ask('m1', { number: i })));
    assert.deepEqual(tally(answers, (a) => a.status), { 200: 120 });
    assert.ok(fleet.mocks.bad.requests.length <= 20, `${fleet.mocks.bad.requests.length} of 120 were sent to the backend that fails`);
  });

  // `sick` holds a request that will fail, and so eject it; `full` holds one that lasts; the rest wait for either.
  async function sick_and_full(t, queue, waiting) {
    const answer = async (request, reply, backend) => {
      await backend.gate;
      return fails_with(500)(request, reply);
    };
    const fleet = await start_gated(t, { sick: { answer, ...capped(1, { priority: 1 }) }, full: capped(1, { priority: 2 }) },
                                    { routing: { strategy: 'priority' }, queue, health: { eject_after: 1, eject_time: '60s' } });
    const doomed = await fleet.send('m1', { number: -2 });
    await fleet.mocks.sick.request(1);
    const lasting = await fleet.send('m1', { number: -1, held: true });
    await fleet.mocks.full.request(1);
    return { fleet, doomed, lasting, clients: await line_up(fleet, waiting) };
  }

  test('a place on a backend that was ejected meanwhile does not begin the wait anew', async (t) => {
    const timeout = 2_000 * settings.slow;
    const { fleet, doomed, lasting, clients } = await sick_and_full(t, { size: 10, timeout: `${timeout}ms` }, 1);
    const began = performance.now();
    await sleep(timeout / 2);
    fleet.mocks.sick.open_gate();
    assert_error(await clients[0].response(), 503, 'queue_timeout');
    const waited = performance.now() - began;
    assert.ok(waited < timeout * 1.3, `${Math.round(waited)} ms, where ${timeout} are the most`);
    await doomed.response();
    fleet.mocks.full.open_gate();
    await finish([lasting]);
    for (const client of [doomed, ...clients]) client.close();
  });

  test('nobody who waits is refused because a backend was ejected meanwhile', async (t) => {
    const { fleet, doomed, lasting, clients } = await sick_and_full(t, { size: 3, timeout: `${10 * settings.slow}s` }, 3);
    fleet.mocks.sick.open_gate();
    await fleet.reaches('nexus_backend_attempts_total', 1, { backend: 'sick' });
    await sleep(100);
    fleet.mocks.full.open_gate();
    await finish([lasting, ...clients]);
    assert.deepEqual(fleet.mocks.full.requests.map((r) => r.json.number).filter((n) => n >= 0), [0, 1, 2]);
    await doomed.response();   // its retry found the queue with or without a place
    doomed.close();
  });

  test('those who wait get the places of a backend that was ejected as soon as it is in order again', { limit_ms: 30_000 }, async (t) => {
    let good = false;
    const answer = (...args) => (good ? act(...args) : fails_with(500)(...args));
    const fleet = await start_fleet(t, { sick: { answer, ...capped(1, { priority: 1 }) }, held: capped(1, { priority: 2 }) },
                                    { routing: { strategy: 'priority' }, queue: { size: 50, timeout: `${10 * settings.slow}s` }, health: { eject_after: 1, eject_time: `${1_500 * settings.slow}ms` } });
    add_gate(fleet.mocks.held);
    const first = await fleet.send('m1', { held: true });   // fails on `sick`, which is ejected for it
    await fleet.mocks.held.request(1);
    const waiting = await line_up(fleet, 3);
    good = true;
    await until(() => fleet.mocks.sick.requests.length > 1, 'a trial');
    await finish(waiting);
    assert.deepEqual(fleet.mocks.sick.requests.slice(1).map((r) => r.json.number).sort(), [0, 1, 2]);
    fleet.mocks.held.open_gate();
    await finish([first]);
  });

  test('those who wait for a backend that dies go to the other one', async (t) => {
    const fleet = await start_fleet(t, { dying: { child: {}, ...capped(2, { priority: 1 }) }, good: { ...capped(2, { priority: 2 }) } },
                                    { queue: { size: 100, timeout: '15s' }, routing: { strategy: 'priority' } });
    add_gate(fleet.mocks.good);
    const held = await Promise.all(Array.from({ length: 4 }, () => fleet.send('m1', { held: true })));
    await fleet.mocks.good.request(2);
    await fleet.pending(2, { backend: 'dying' });
    const waiting = await line_up(fleet, 20);
    fleet.mocks.dying.kill('SIGKILL');
    await sleep(50);
    fleet.mocks.good.open_gate();
    await finish([...held, ...waiting]);
  });
});

group('queue: [server] max_pending', () => {
  test('over it a request is answered 503 at once, whatever the backend, and a place that is given back is taken again', async (t) => {
    const fleet = await start_gated(t, { a: {}, b: {} }, { server: { max_pending: 3, threads: 2 } });
    const held = [];
    for (let i = 0; i < 3; i++) held.push(await fleet.send('m1', { held: true, number: i }));
    await until(() => running(fleet) === 3, 'three at the backends');
    const refused = await (await fleet.send('m1', { number: 9 })).response(15_000);
    assert_error(refused, 503, 'overloaded');
    retry_after(refused);
    await fleet.reaches('nexus_limit_rejections_total', 1, { limit: 'max_pending' });
    open_all(fleet);
    await finish(held);
    await finish([await fleet.send('m1', { number: 10 })]);
  });
});
