// Backends that die, stop, lie and come and go under load. What had not begun is not lost, and what had is visibly cut.
import { assert, get, group, settings, sleep, start_backend, test, until } from './harness.mjs';
import { act, add_gate, fails_with, reason_of, scaled, served_by, start_fleet, tally } from './fleet.mjs';

const ms = (n) => `${n * settings.slow}ms`;
const visibly_cut = (answer) => !answer.complete || /"error"/.test(answer.text);

group('chaos', () => {
  test('a backend killed with SIGKILL under 500 requests: only the streams that had begun are lost, and they are visibly cut', { limit_ms: 60_000, serial: true }, async (t) => {
    const fleet = await start_fleet(t, { victim: { child: {} }, survivor: {} }, { routing: { strategy: 'round_robin' }, upstream: { connect_timeout: '20s' } });
    const { victim, survivor } = fleet.mocks;
    add_gate(survivor);
    const total = scaled(500, 200);
    // In turn: a stream that begins at once, an answer that is not ready, a stream that has not begun.
    const kinds = [{ stream: true, pieces: 3, held: true }, { held: true }, { stream: true, pieces: 3, held_back: true }];
    const clients = [];
    for (let i = 0; i < total; i += 20) {
      clients.push(...await Promise.all(Array.from({ length: Math.min(20, total - i) }, async (_, j) => {
        const kind = (i + j) % 3;
        return { client: await fleet.send('m1', kinds[kind]), kind };
      })));
    }
    await fleet.pending(total);
    const streams = clients.filter((c) => c.kind === 0);
    for (const c of streams) {
      c.head = await c.client.head();
      assert.match((await c.client.piece()).toString(), /p0/);
    }
    const on_victim = await fleet.gauge('nexus_pending_requests', { backend: 'victim' });
    assert.ok(on_victim > total * 0.4, `${on_victim} of ${total} are on the victim`);
    victim.kill('SIGKILL');
    const before = survivor.requests.length;
    await until(() => survivor.requests.length > before + on_victim / 3, 'requests that move to the survivor');
    survivor.open_gate();

    const results = [];
    for (const c of clients) {
      if (c.kind !== 0) {
        const answer = await c.client.response(30_000);
        results.push({ kind: c.kind, answer });
        continue;
      }
      let text = '';
      for (let p = await c.client.piece(30_000); p !== null; p = await c.client.piece(30_000)) text += p;
      results.push({ kind: 0, answer: { ...c.head, text, complete: c.client.body.done } });
    }
    for (const c of clients) c.client.close();
    let cut = 0;
    for (const { kind, answer } of results) {
      assert.equal(answer.status, 200, answer.text);
      const by = served_by(answer);
      if (kind !== 0) {
        assert.equal(by, 'survivor');
        assert.ok(answer.complete && !/"error"/.test(answer.text), answer.text);
        if (kind === 2) assert.match(answer.text, /\[DONE\]/);
      } else if (by === 'survivor') {
        assert.ok(answer.complete && /\[DONE\]/.test(answer.text) && !/"error"/.test(answer.text), answer.text);
      } else {
        cut += 1;
        assert.ok(!answer.complete, 'it must not end like a whole answer');
        assert.match(answer.text, /"error"/);
        assert.doesNotMatch(answer.text, /\[DONE\]/);
      }
    }
    assert.ok(cut > total * 0.1, `${cut} streams were cut`);
    const moved = results.filter(({ answer }) => /retry after truncated/.test(reason_of(answer))).length;
    assert.equal(moved, on_victim - cut, 'all others of the victim\'s were moved');
    const page = await fleet.page_of_all();
    assert.equal(page.sum('nexus_errors_total', { error_type: 'backend_error' }), cut);
    for (const answer of await fleet.ask_many(20)) assert.equal(answer.status, 200, 'and later requests do not notice');
  });

  for (const strategy of ['smart', 'round_robin', 'least_pending']) {
    test(`${strategy}: a backend that answers 500 in a millisecond beside a slow good one gets under 5 % after the first second`, { limit_ms: 30_000 }, async (t) => {
      const slowly = async (request, reply, backend) => {
        await sleep(40);
        return act(request, reply, backend);
      };
      const fleet = await start_fleet(t, { bad: { answer: fails_with(500) }, good: { answer: slowly } }, { routing: { strategy }, health: { eject_time: '200ms' } });
      const { bad, good } = fleet.mocks;
      const began = performance.now();
      const answers = [];
      const late = (mock) => mock.requests.filter((r) => r.at - began > 1_000).length;
      await fleet.load(12, () => performance.now() - began > 1_800 && late(good) > 20, () => ['m1', {}], (answer) => answers.push(answer));
      assert.deepEqual(tally(answers, (a) => `${a.status} ${served_by(a)}`), { '200 good': answers.length }, 'no client saw a 500');
      assert.ok(late(bad) < 0.05 * (late(good) + late(bad)), `${late(bad)} at the bad one, ${late(good)} at the good one`);
      assert.ok(bad.requests.length >= 3, 'it had its chance');
    });
  }

  test('a backend that was ejected is tried with one request, and is back when that succeeds', async (t) => {
    let good = false;
    let at_once = 0;
    let most = 0;
    const answer = async (...args) => {
      most = Math.max(most, ++at_once);
      await sleep(60 * settings.slow);
      at_once -= 1;
      return good ? act(...args) : fails_with(502)(...args);
    };
    const fleet = await start_fleet(t, { a: { answer, conf: { priority: 1 } }, b: {} }, { routing: { strategy: 'priority' }, health: { eject_after: 1, eject_time: ms(150) } });
    assert.equal(served_by(await fleet.ask()), 'b');
    const first = fleet.mocks.a.requests.length;
    most = 0;
    const began = performance.now();
    const answers = [];
    await fleet.load(8, () => performance.now() - began > 500 * settings.slow, () => ['m1', {}], (got) => answers.push(got));
    assert.deepEqual(tally(answers, served_by), { b: answers.length });
    const tries = fleet.mocks.a.requests.length - first;
    assert.ok(tries >= 1 && tries <= 3, `${tries} trials, at doubling distances`);
    assert.equal(most, 1, 'one request a trial');
    good = true;
    await until(async () => served_by(await fleet.ask()) === 'a', 'back again');
    for (const got of await fleet.ask_many(5)) assert.equal(served_by(got), 'a');
  });

  for (const status of [429, 503]) {
    test(`a ${status} with Retry-After is kept to: no request goes there before, and one does after`, async (t) => {
      let refusing = true;
      const answer = (...args) => (refusing ? fails_with(status, { 'Retry-After': '1' })(...args) : act(...args));
      const fleet = await start_fleet(t, { a: { answer, conf: { priority: 1 } }, b: {} }, { routing: { strategy: 'priority' }, health: { eject_after: 5, eject_time: '60s' } });
      const first = await fleet.ask();
      assert.equal(reason_of(first), `retry after ${status === 429 ? 'status_429' : 'status_5xx'}, priority`);
      refusing = false;
      const answers = [];
      await fleet.load(3, () => fleet.mocks.a.requests.length > 4, () => ['m1', { wait_ms: 5 }], (got) => answers.push(got));
      for (const got of answers) assert.equal(got.status, 200);
      const [at, next] = fleet.mocks.a.requests.map((r) => r.at);
      assert.ok(next - at >= 995, `asked again after ${next - at} ms`);
      assert.ok(next - at < 1_300 + 700 * settings.slow, `asked again after ${next - at} ms`);
    });
  }

  test('a 429 with Retry-After of the only backend goes to the client with it, and the next request is tried none the less', async (t) => {
    let refusing = true;
    const answer = (...args) => (refusing ? fails_with(429, { 'Retry-After': '9' })(...args) : act(...args));
    const fleet = await start_fleet(t, { a: { answer } });
    const got = await fleet.ask();
    assert.equal(got.status, 429);
    assert.equal(got.headers.get('retry-after'), '9');
    refusing = false;
    assert.equal((await fleet.ask()).status, 200);
  });

  test('a backend that stops (SIGSTOP) under load loses no request that had not begun, and serves again when it goes on', { limit_ms: 40_000 }, async (t) => {
    const fleet = await start_fleet(t, { stops: { child: {} }, good: {} }, {
      routing: { strategy: 'round_robin' }, upstream: { first_byte_timeout: ms(300), stall_timeout: ms(300) },
      health: { interval: ms(100), timeout: ms(400), failures: 2, recoveries: 1, eject_after: 3, eject_time: ms(150) },
    });
    fleet.moved = true;
    // A stream on each, begun.
    add_gate(fleet.mocks.good);
    const streams = [];
    for (let i = 0; i < 4; i++) {
      const client = await fleet.send('m1', { stream: true, pieces: 2, held: true });
      const head = await client.head();
      await client.piece();
      streams.push({ client, on: served_by(head) });
    }
    assert.ok(streams.some((s) => s.on === 'stops') && streams.some((s) => s.on === 'good'));
    const answers = [];
    let over = false;
    const load = fleet.load(8, () => over, () => ['m1', { wait_ms: 3 }], (answer) => answers.push(answer));
    await until(() => answers.some((a) => served_by(a) === 'stops'), 'both serve');
    fleet.mocks.stops.kill('SIGSTOP');
    await until(async () => (await get(fleet.port, '/health')).json.backends.unhealthy === 1, 'unhealthy');
    for (const { client, on } of streams.filter((s) => s.on === 'stops')) {
      let text = '';
      for (let p = await client.piece(); p !== null; p = await client.piece()) text += p;
      assert.ok(!client.body.done && /"error"/.test(text), `a stream on ${on} that stalls is cut: ${text}`);
    }
    const before = answers.length;
    await until(() => answers.length > before + 20, 'service goes on');
    fleet.mocks.stops.kill('SIGCONT');
    await until(async () => (await get(fleet.port, '/health')).json.backends.healthy === 2, 'healthy again');
    const from = answers.length;
    await until(() => answers.slice(from).some((a) => served_by(a) === 'stops'), 'it serves again');
    over = true;
    await load;
    fleet.mocks.good.open_gate();
    for (const { client } of streams.filter((s) => s.on === 'good')) {
      for (let p = await client.piece(); p !== null; p = await client.piece());
    }
    for (const { client } of streams) client.close();
    assert.deepEqual(tally(answers, (a) => `${a.status} ${a.complete}`), { '200 true': answers.length });
    assert.ok(answers.some((a) => reason_of(a) === 'retry after timeout, round robin'), 'some were moved');
  });

  for (const capped of [false, true]) {
    test(`reloads that add and remove backends under load lose nothing${capped ? ', with caps and a queue' : ''}`, { limit_ms: 60_000 }, async (t) => {
      const cap = capped ? { max_pending: 3 } : {};
      const conf = { queue: { size: 100, timeout: '20s' }, routing: { strategy: 'least_pending' } };
      const fleet = await start_fleet(t, { a: { conf: cap }, b: { conf: cap } }, conf);
      fleet.mocks.c = await start_backend(t, { answer: act });
      fleet.mocks.d = await start_backend(t, { answer: act });
      fleet.moved = true;
      const answers = [];
      let over = false;
      let number = 0;
      const load = fleet.load(24, () => over, () => {
        number += 1;
        return ['m1', number % 3 ? { wait_ms: number % 9 } : { stream: true, pieces: 3, every_ms: number % 7 }];
      }, (answer) => answers.push(answer));
      let last = ['a', 'b'];
      const turns = [['b', 'c'], ['c', 'd', 'a'], ['d'], ['a', 'd'], ['a', 'b', 'c', 'd'], ['c'], ['b', 'a']];
      for (const names of turns) {
        fleet.reload({ ...conf, backends: names.map((name) => ({ name, mock: fleet.mocks[name], ...cap })) });
        await fleet.has_backends(names);
        const before = Object.fromEntries(names.map((name) => [name, fleet.mocks[name].requests.length]));
        await until(() => names.every((name) => fleet.mocks[name].requests.length > before[name] + 3), `all of ${names} at work`);
        // What was removed may be switched off as soon as it has nothing left to do.
        for (const name of last.filter((n) => !names.includes(n))) {
          await until(() => fleet.mocks[name].open === 0, `no connection to ${name}, which was removed`);
        }
        last = names;
      }
      over = true;
      await load;
      assert.deepEqual(tally(answers, (a) => `${a.status} ${a.complete}`), { '200 true': answers.length });
      assert.ok(answers.length > 100, `${answers.length} answers`);
      for (const answer of answers) assert.doesNotMatch(reason_of(answer), /retry/);
    });
  }

  test('those who wait for a place on a backend that a reload removes are served by the others', async (t) => {
    const conf = { queue: { size: 100, timeout: '10s' } };
    const fleet = await start_fleet(t, { old: { conf: { max_pending: 1 } } }, conf);
    fleet.mocks.fresh = await start_backend(t, { answer: act });
    add_gate(fleet.mocks.old);
    const held = await fleet.send('m1', { held: true });
    await fleet.mocks.old.request(1);
    const waiting = await Promise.all(Array.from({ length: 8 }, () => fleet.send('m1')));
    await fleet.queued(8);
    fleet.reload({ ...conf, backends: [{ name: 'fresh', mock: fleet.mocks.fresh, max_pending: 2 }] });
    await fleet.has_backends(['fresh']);
    await fleet.mocks.old.request(1);
    fleet.mocks.old.open_gate();
    for (const client of [held, ...waiting]) {
      assert.equal((await client.response()).status, 200);
      client.close();
    }
  });

  test('a backend that is killed again and again under load, and comes back each time, costs only streams that had begun', { limit_ms: 60_000 }, async (t) => {
    const breaking = await start_backend(t, { answer: act });
    const fleet = await start_fleet(t, { good: {} }, { health: { interval: ms(100), timeout: ms(5_000), failures: 1, recoveries: 1, eject_time: '50ms' }, routing: { strategy: 'round_robin' },
                                                       'backend breaking': { url: breaking.url, type: 'generic' } });
    fleet.moved = true;
    const answers = [];
    let over = false;
    let number = 0;
    const load = fleet.load(16, () => over, () => ['m1', number++ % 2 ? { wait_ms: number % 9 } : { stream: true, pieces: 4, every_ms: 4 }], (answer) => answers.push(answer));
    for (let i = 0; i < 4; i++) {
      const from = answers.length;
      await until(() => answers.slice(from).some((a) => served_by(a) === 'breaking'), 'it serves');
      await breaking.stop();
      const before = answers.length;
      await until(() => answers.length >= before + 30, 'the others go on without it');
      await breaking.start();
    }
    over = true;
    await load;
    const lost = answers.filter((a) => a.status !== 200 || visibly_cut(a));
    for (const answer of lost) {
      assert.equal(answer.status, 200, answer.text);
      assert.equal(served_by(answer), 'breaking');
      assert.match(answer.text, /p0/, 'a stream that had begun');
    }
    for (const answer of answers.filter((a) => !lost.includes(a) && /event-stream/.test(a.headers.get('content-type')))) assert.match(answer.text, /\[DONE\]/);
    assert.ok(answers.length - lost.length > 100);
  });
});
