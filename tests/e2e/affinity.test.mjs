// Requests of one session find the same backend, through any gateway, as long as it is there and not too busy.
import { RawClient, assert, chat, get, group, parse_metrics, post, start_nexus, test, until } from './harness.mjs';
import { add_gate, completions, fails_with, reason_of, served_by, start_fleet } from './fleet.mjs';

const on = { routing: { affinity: 'session', weight_latency: 0 } };
const three = () => ({ a: {}, b: {}, c: {} });
const in_session = (id, name = 'X-Session-Id') => ({ headers: { [name]: id } });
const sessions = Array.from({ length: 24 }, (_, i) => `session-${i}`);

// session → the backend of each of its requests; `times` requests each, one after the other.
async function homes_of(port, ask, times = 1) {
  const homes = {};
  for (let i = 0; i < times; i++) {
    for (const id of sessions) {
      (homes[id] ??= []).push(served_by(await ask(id)));
      // A new session goes to an idle backend: its own must not seem to be busy still.
      await until(async () => parse_metrics((await get(port, '/metrics')).text).sum('nexus_pending_requests') === 0, 'nothing in flight');
    }
  }
  return homes;
}
const outcomes = (page) => Object.fromEntries(['kept', 'moved_load', 'moved_health', 'no_key'].map((outcome) => [outcome, page.value('nexus_affinity_total', { outcome })]));

group('affinity', () => {
  test('sessions stay on their backends, spread over all, and every request is counted and logged by a hash', async (t) => {
    const fleet = await start_fleet(t, three(), on);
    const homes = await homes_of(fleet.port, (id) => fleet.ask('m1', {}, in_session(id)), 4);
    for (const served of Object.values(homes)) assert.equal(new Set(served).size, 1, `${served}`);
    assert.equal(new Set(Object.values(homes).flat()).size, 3);
    assert.equal(reason_of(await fleet.ask('m1', {}, in_session(sessions[0]))), 'affinity');
    assert.match(reason_of(await fleet.ask('m1')), /^smart /);
    const page = await fleet.page_of_all();
    assert.deepEqual(outcomes(page), { kept: 97, moved_load: 0, moved_health: 0, no_key: 1 });
    await fleet.balance();
    const hashes = new Map();
    for (const line of fleet.log()) {
      if (line.affinity === null) continue;
      assert.match(line.affinity, /^[0-9a-f]{8}$/);
      hashes.set(line.affinity, new Set([...(hashes.get(line.affinity) ?? []), line.backend]));
    }
    assert.equal(hashes.size, sessions.length);
    for (const backends of hashes.values()) assert.equal(backends.size, 1);
    assert.equal(fleet.log().filter((line) => line.affinity === null).length, 1);
    assert.ok(!JSON.stringify(fleet.log()).includes('session-'), 'no name of a session is in the log');
  });

  test('two gateways agree, and a lost backend moves its own sessions alone, which then come back', { limit_ms: 30_000 }, async (t) => {
    const fleet = await start_fleet(t, three(), { ...on, health: { interval: '100ms', failures: 1, recoveries: 1 } });
    const other = await start_nexus(t, { ...on, backends: [...fleet.conf.backends].reverse() });
    fleet.moved = true;   // not all requests at the backends are this gateway's
    const ask = (id) => fleet.ask('m1', {}, in_session(id));
    const before = await homes_of(fleet.port, ask);
    assert.deepEqual(await homes_of(other.port, (id) => post(other.port, completions, chat(), in_session(id))), before);
    await fleet.mocks.b.stop();
    await fleet.reaches('nexus_backend_up', 0, { backend: 'b' });
    const without = await homes_of(fleet.port, ask);
    for (const id of sessions) {
      if (before[id][0] === 'b') assert.notEqual(without[id][0], 'b');
      else assert.deepEqual(without[id], before[id], id);
    }
    const lost = sessions.filter((id) => before[id][0] === 'b').length;
    assert.ok(lost > 0 && lost < sessions.length);
    assert.equal(reason_of(await ask(sessions.find((id) => before[id][0] === 'b'))), 'affinity moved');
    await fleet.mocks.b.start();
    await fleet.reaches('nexus_backend_up', 1, { backend: 'b' });
    assert.deepEqual(await homes_of(fleet.port, ask), before);
    assert.deepEqual(outcomes(await fleet.page_of_all()), { kept: 3 * sessions.length - lost, moved_load: 0, moved_health: lost + 1, no_key: 0 });
  });

  test('a session goes to the next in its order if its backend has too much to do, and stays there; if that fails, it comes back', async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { ...on.routing, affinity_slack: '0%' }, health: { eject_after: 1000 } });
    const first = served_by(await fleet.ask('m1', {}, in_session('s')));
    const home = add_gate(fleet.mocks[first]);
    const held = [];
    for (let i = 0; i < 2; i++) {
      const client = await RawClient.connect(fleet.port);
      fleet.asked += 1;
      client.send('POST', completions, { 'Content-Type': 'application/json', 'X-Session-Id': 's' }, chat('m1', { held: true }));
      held.push(client);
      await home.request(2 + i);
    }
    const moved = await fleet.ask('m1', {}, in_session('s'));
    assert.notEqual(served_by(moved), first);
    assert.equal(reason_of(moved), 'affinity moved');
    home.open_gate();
    for (const client of held) assert.equal(served_by(await client.response()), first);
    for (const client of held) client.close();
    await fleet.pending(0);
    const next = fleet.mocks[served_by(moved)], answer = next.answer;
    const stays = await fleet.ask('m1', {}, in_session('s'));
    assert.equal(served_by(stays), served_by(moved), 'its prompt is in the cache there');
    assert.equal(reason_of(stays), 'affinity');
    next.answer = fails_with(500);
    const retried = await fleet.ask('m1', {}, in_session('s'));
    assert.equal(served_by(retried), first, 'the first in its order');
    assert.equal(reason_of(retried), 'retry after status_5xx, affinity moved');
    next.answer = answer;
    assert.equal(served_by(await fleet.ask('m1', {}, in_session('s'))), served_by(moved));
    assert.deepEqual(outcomes(await fleet.page_of_all()), { kept: 5, moved_load: 1, moved_health: 1, no_key: 0 });
  });

  test('a new session goes to an idle backend if its own is busy, and stays there', async (t) => {
    const fleet = await start_fleet(t, three(), on);
    const homes = await homes_of(fleet.port, (id) => fleet.ask('m1', {}, in_session(id)));
    const busy = add_gate(fleet.mocks.a);
    const held = await RawClient.connect(fleet.port);
    fleet.asked += 1;
    const at_a = sessions.find((id) => homes[id][0] === 'a');
    held.send('POST', completions, { 'Content-Type': 'application/json', 'X-Session-Id': at_a }, chat('m1', { held: true }));
    await fleet.pending(1, { backend: 'a' });
    assert.equal(served_by(await fleet.ask('m1', {}, in_session(at_a))), 'a', 'it is no new session');
    const news = Array.from({ length: 12 }, (_, i) => `new-${i}`);
    const placed = {};
    for (const id of news) {
      placed[id] = served_by(await fleet.ask('m1', {}, in_session(id)));
      assert.notEqual(placed[id], 'a');
      await fleet.pending(1);
    }
    busy.open_gate();
    assert.equal(served_by(await held.response()), 'a');
    held.close();
    await fleet.pending(0);
    for (const id of news) assert.equal(served_by(await fleet.ask('m1', {}, in_session(id))), placed[id]);
    const { kept, moved_load } = outcomes(await fleet.page_of_all());
    assert.ok(moved_load > 0 && kept + moved_load === sessions.length + 26, `${kept} kept, ${moved_load} moved`);
  });

  test('the list of header fields is configurable, a request id is never a session, and the body names one too', async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { ...on.routing, affinity_headers: 'x-mine, x-other' } });
    const reason = async (more, headers) => reason_of(await fleet.ask('m1', more, { headers })).replace(/ .*/, '');
    assert.equal(await reason({}, { 'X-Mine': 's' }), 'affinity');
    assert.equal(await reason({}, { 'x-other': 's' }), 'affinity');
    assert.equal(await reason({ prompt_cache_key: 's' }), 'affinity');
    assert.equal(await reason({ metadata: { user_id: 's' } }), 'affinity');
    for (const headers of [{ 'X-Session-Id': 's' }, { 'X-Request-Id': 's' }, { 'X-Mine': 's'.repeat(257) }, { 'X-Mine': '' }]) assert.equal(await reason({}, headers), 'smart');
    // A body that is read while it comes names the same session.
    const large = await fleet.ask('m1', { text: 'x'.repeat(300_000), prompt_cache_key: 's' });
    assert.equal(served_by(large), served_by(await fleet.ask('m1', {}, { headers: { 'X-Mine': 's' } })));
    assert.deepEqual(outcomes(await fleet.page_of_all()), { kept: 6, moved_load: 0, moved_health: 0, no_key: 4 });
  });

  test('session_prefix: without a name of a session the beginning of the conversation decides, in every turn', async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { ...on.routing, affinity: 'session_prefix' } });
    const opening = (i) => [{ role: 'system', content: 'You are terse. '.repeat(30) }, { role: 'user', content: `Question ${i}` }];
    const homes = [];
    for (let i = 0; i < 12; i++) {
      const messages = opening(i);
      const served = [];
      for (let turn = 0; turn < 3; turn++) {
        served.push(served_by(await fleet.ask('m1', { messages })));
        messages.push({ role: 'assistant', content: `Answer ${turn}` }, { role: 'user', content: 'x'.repeat(turn * 100_000) });   // the last comes in pieces
      }
      assert.equal(new Set(served).size, 1, `${served}`);
      homes.push(served[0]);
    }
    assert.equal(new Set(homes).size, 3);
    assert.equal(served_by(await fleet.ask('m1', { messages: opening(0) }, in_session('s'))), served_by(await fleet.ask('m1', {}, in_session('s'))));
    await fleet.ask('m1');   // too short to matter
    assert.deepEqual(outcomes(await fleet.page_of_all()), { kept: 38, moved_load: 0, moved_health: 0, no_key: 1 });
  });

  test('without affinity nothing is counted, and no line has a hash', async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { strategy: 'round_robin' } });
    for (let i = 0; i < 3; i++) assert.equal(reason_of(await fleet.ask('m1', {}, in_session('s'))), 'round robin');
    assert.deepEqual(outcomes(await fleet.page_of_all()), { kept: 0, moved_load: 0, moved_health: 0, no_key: 0 });
    await fleet.balance();
    for (const line of fleet.log()) assert.equal(line.affinity, null);
  });
});
