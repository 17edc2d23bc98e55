// docs/fleet.md: three Nexus behind HAProxy, in front of three backends, with sessions. One Nexus is killed under load: its own
// streams are lost and nothing else, sessions keep their backends, and the counts of the fleet are those of the clients.
import { RawClient, answer_plainly, assert, chat, free_port, get, group, parse_metrics, sleep, start_backend, start_nexus, test, until } from './harness.mjs';
import { need_program, repository_file, run_beside, with_replaced } from './prometheus.mjs';

const endpoint = '/v1/chat/completions';
const json = { 'Content-Type': 'application/json' };

// The number of a process in the Via field that its requests have at a backend.
const via_of = (request) => /nexus-([0-9a-f]{8})/.exec(request.headers.get('via'))[1];

async function start_fleet(t) {
  const arrived = [];   // { n, session, via, backend }, as the backends see it
  const held = [];
  const backends = [];
  for (const name of ['gpu-1', 'gpu-2', 'gpu-3']) {
    backends.push(await start_backend(t, { kind: 'vllm', models: ['m1'], answer: async (request, reply) => {
      const { n, session, hold } = request.json;
      arrived.push({ n, session, via: via_of(request), backend: name });
      if (!hold) {
        await sleep(n % 7);
        return answer_plainly(request, reply);
      }
      reply.stream();
      reply.piece('data: {"choices":[{"delta":{"content":"one"}}]}\n\n');
      held.push({ via: via_of(request), reply });
    } }));
  }
  const conf = () => ({ routing: { affinity: 'session', affinity_headers: 'x-session-id', affinity_slack: '1000%', retries: 0 }, health: { eject_after: 1000 },
                        backends: backends.map((mock, i) => ({ name: `gpu-${i + 1}`, mock })) });
  const fleet = [];
  for (let i = 0; i < 3; i++) fleet.push(await start_nexus(t, conf()));
  for (const [i, nexus] of fleet.entries()) {   // which number is whose
    await ask(nexus.port, { n: -1 - i });
    nexus.via = arrived.at(-1).via;
    nexus.counted_before = 1;
  }
  arrived.length = 0;
  return { fleet, backends, arrived, held };
}

// One request on a connection of its own. `whole`: the response is complete.
async function ask(port, more, session = null) {
  const client = await RawClient.connect(port);
  try {
    client.send('POST', endpoint, session === null ? json : { ...json, 'X-Session-Id': session }, chat('m1', { session, ...more }));
    const { status, complete } = await client.response(40_000);
    return { status, whole: complete };
  } catch (error) {
    return { status: 0, whole: false, error: error.message };
  } finally {
    client.close();
  }
}

group('a fleet', () => {
  test('one of three Nexus behind HAProxy is killed under load: its own streams are lost and nothing else', { calm: true, limit_ms: 60_000 }, async (t) => {
    const binary = need_program(t, 'haproxy');
    const { fleet, arrived, held } = await start_fleet(t);
    const port = await free_port();
    const file = t.file('haproxy.cfg', with_replaced(repository_file('contrib/haproxy/haproxy.cfg'), {
      'maxconn 20000': 'maxconn 500', '127.0.0.1:8080': `127.0.0.1:${port}`, '127.0.0.1:8001': `127.0.0.1:${fleet[0].port}`,
      '  server edge-2 127.0.0.1:8002': `  server edge-2 127.0.0.1:${fleet[1].port}\n  server edge-3 127.0.0.1:${fleet[2].port}` }));
    const proxy = run_beside(t, binary, ['-db', '-f', file]);
    await until(async () => (await get(port, '/health').catch(() => ({}))).status === 200, () => `haproxy up: ${proxy.log}`, 10_000);

    const streams = Array.from({ length: 9 }, (_, i) => ask(port, { n: 10_000 + i, hold: true, stream: true }, `held-${i}`));
    await until(() => held.length === 9, 'nine streams');
    const of_killed = () => held.filter(({ via }) => via === fleet[0].via).length;
    assert.ok(of_killed() > 0, 'some are on the one that is killed');

    let over = false;
    let next = 0;
    const seen = new Map();   // n → what its client saw
    const load = Array.from({ length: 6 }, async (_, who) => {
      while (!over) {
        const n = next++;
        seen.set(n, await ask(port, { n, stream: n % 2 === 0 }, `s${(who + n) % 12}`));
      }
    });
    await until(() => seen.size > 150, 'requests under way');
    fleet[0].child.kill('SIGKILL');
    fleet[0].stopped = true;
    const at_kill = seen.size;
    await until(() => seen.size > at_kill + 300, 'requests go on at the others', 30_000);
    over = true;
    await Promise.all(load);
    for (const { via, reply } of held) {
      if (via === fleet[0].via) continue;
      reply.piece('data: [DONE]\n\n');
      reply.finish();
    }

    // Streams: those of the killed one are cut, the others whole.
    const ends = await Promise.all(streams);
    ends.forEach((end, i) => {
      const via = arrived.filter(({ n }) => n === 10_000 + i).at(-1).via;
      assert.equal(end.whole, via !== fleet[0].via, `stream ${i}: ${JSON.stringify(end)}`);
    });
    assert.equal(ends.filter((end) => !end.whole).length, of_killed());

    // Requests that had got no byte went to another Nexus. One that was being streamed at that moment may have been cut.
    const last = new Map(arrived.map((one) => [one.n, one]));
    for (const [n, { status, whole }] of seen) {
      if (status === 200 && whole) continue;
      assert.equal(last.get(n).via, fleet[0].via, `request ${n}: ${status}, ${whole ? 'whole' : 'cut'}`);
      assert.equal(status, 200, `request ${n} was not cut within its stream`);
    }

    // The counts of the others, to the unit: what came from them to the backends is what they counted, and what their clients got.
    for (const nexus of fleet.slice(1)) {
      const mine = arrived.filter(({ via }) => via === nexus.via);
      const page = await until(async () => {
        const now = parse_metrics((await get(nexus.port, '/metrics')).text);
        return now.sum('nexus_pending_requests') === 0 && now;
      }, 'nothing pending');
      assert.equal(page.sum('nexus_requests_total', { status: 200 }), mine.length + nexus.counted_before);
      assert.equal(page.sum('nexus_requests_total'), mine.length + nexus.counted_before);
      assert.equal(page.sum('nexus_errors_total'), 0);
      for (const { n } of mine) assert.ok(n >= 10_000 || seen.get(n).whole, `request ${n}`);
    }

    // Each session had one backend, whichever Nexus it came through, before and after.
    const backends_of = new Map();
    for (const { session, backend, via } of arrived) {
      const so_far = backends_of.get(session) ?? { backends: new Set(), vias: new Set() };
      so_far.backends.add(backend);
      so_far.vias.add(via);
      backends_of.set(session, so_far);
    }
    for (const [session, { backends }] of backends_of) assert.equal(backends.size, 1, `${session} at ${[...backends]}`);
    assert.ok([...backends_of.values()].some(({ vias }) => vias.size === 3), 'sessions came through all three');
    assert.ok(new Set(arrived.map(({ backend }) => backend)).size > 1, 'sessions are spread');
  });
});
