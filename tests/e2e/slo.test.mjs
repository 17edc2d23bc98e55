// [slo] on a running Nexus: each request for a stream is judged once, and the counts are those that the clients' own clocks and
// the access log say.
import fs from 'node:fs';
import { RawClient, assert, chat, chat_chunk, get, group, page_after, parse_metrics, post, sleep, sse, start_backend, start_nexus, test, until } from './harness.mjs';

const endpoint = '/v1/chat/completions';
const judged = (page, model) => ['yes', 'no'].map((met) => page.value('nexus_slo_requests_total', { model, met }) ?? null);

// A stream with `first_ms` before its first token, and then one every `each_ms`.
async function streamed(request, reply) {
  const { model, first_ms = 0, each_ms = 0, tokens = 4, counts = true, breaks = false, fails = 0 } = request.json;
  if (fails) return reply.json({ error: { message: 'made up' } }, fails);
  if (!request.json.stream) return reply.json({ id: 'x', model, choices: [], usage: { prompt_tokens: 1, completion_tokens: tokens } });
  reply.stream();
  await sleep(first_ms);
  for (let n = 0; n < tokens; n++) {
    if (n > 0) await sleep(each_ms);
    reply.piece(sse(chat_chunk(model, 'word')));
  }
  if (breaks) return reply.reset();
  if (counts) reply.piece(sse({ id: 'x', object: 'chat.completion.chunk', created: 1, model, choices: [], usage: { prompt_tokens: 1, completion_tokens: tokens } }));
  reply.piece(sse('[DONE]'));
  reply.finish();
}

async function start(t, conf = {}) {
  const backend = await start_backend(t, { kind: 'vllm', models: ['m1', 'm2'], answer: streamed });
  const log = t.file('access.log', '');
  const nexus = await start_nexus(t, { slo: { ttft: '300ms', tpot: '100ms' }, log: { access: log, format: 'json' }, routing: { retries: 0 }, health: { eject_after: 1000 },
                                       backends: [{ name: 'b1', mock: backend }], ...conf });
  const lines = () => fs.readFileSync(log, 'utf8').split('\n').filter(Boolean).map((line) => JSON.parse(line));
  return { nexus, backend, lines };
}

group('slo', () => {
  test('streams in time and too late, failures, mistakes and clients that leave', { calm: true, limit_ms: 30_000 }, async (t) => {
    const { nexus, lines } = await start(t);
    const rows = [
      ['in time', { stream: true }, 'yes'],
      ['begins too late', { stream: true, first_ms: 450 }, 'no'],
      ['comes too slowly', { stream: true, each_ms: 180 }, 'no'],
      ['comes slowly, without counts', { stream: true, each_ms: 180, counts: false }, 'yes'],
      ['a single token', { stream: true, tokens: 1 }, 'yes'],
      ['breaks off', { stream: true, breaks: true }, 'no'],
      ['fails', { stream: true, fails: 500 }, 'no'],
      ['is refused by the backend', { stream: true, fails: 422 }, null],
      ['is plain', {}, null],
      ['is plain, and fails', { fails: 500 }, null],
    ];
    const named = (id) => ({ headers: { 'X-Request-Id': String(id) } });   // lines of two threads may change places
    for (const [i, [, more]] of rows.entries()) await post(nexus.port, endpoint, chat('m1', more), named(i)).catch(() => {});
    await post(nexus.port, endpoint, chat('nobody', { stream: true }), named('nobody'));
    const leaver = await RawClient.connect(nexus.port);
    leaver.send('POST', endpoint, { 'Content-Type': 'application/json', 'X-Request-Id': 'leaver' }, chat('m2', { stream: true, first_ms: 600 }));
    await sleep(400);   // its first token is late already
    leaver.reset();

    const page = await page_after(rows.length + 2, nexus.port);
    const count = (met) => rows.filter(([, , expected]) => expected === met).length;
    assert.deepEqual(judged(page, 'm1'), [count('yes'), count('no')]);
    assert.deepEqual(judged(page, 'm2'), [null, null]);
    assert.equal(page.sum('nexus_slo_requests_total'), count('yes') + count('no'));
    await until(() => lines().length === rows.length + 2, 'all lines');
    const told = (id) => lines().find((line) => line.request_id === String(id)).slo;
    rows.forEach(([who, , expected], i) => assert.equal(told(i), expected, who));
    assert.deepEqual(['nobody', 'leaver'].map(told), [null, null]);
  });

  test('under load the counts are the sum of the lines, the streams that the clients saw in time and those that failed', { calm: true, limit_ms: 60_000 }, async (t) => {
    const { nexus, lines } = await start(t);
    const seen = { yes: 0, no: 0 };
    let asked = 0;
    await Promise.all(Array.from({ length: 8 }, async (_, client) => {
      for (let n = 0; n < 25; n++) {
        const kind = (client * 25 + n) % 5;
        const more = [{ stream: true }, { stream: true, first_ms: 450 }, { stream: true, fails: 503 }, {}, { stream: true, breaks: true }][kind];
        asked += 1;
        await post(nexus.port, endpoint, chat(client % 2 ? 'm1' : 'm2', more)).catch(() => {});
        if (kind === 0) seen.yes += 1;
        if (kind === 1 || kind === 2 || kind === 4) seen.no += 1;
      }
    }));
    const page = await page_after(asked, nexus.port);
    assert.equal(page.sum('nexus_slo_requests_total', { met: 'yes' }) + page.sum('nexus_slo_requests_total', { met: 'no' }), seen.yes + seen.no);
    await until(() => lines().length === asked, 'all lines');
    for (const met of ['yes', 'no']) {
      assert.equal(page.sum('nexus_slo_requests_total', { met }), lines().filter((line) => line.slo === met).length, `the log's ${met}`);
      assert.equal(page.sum('nexus_slo_requests_total', { met }), seen[met], `the clients' ${met}`);
    }
  });

  test('a reload sets, moves and removes the levels; what was counted stays', async (t) => {
    const { nexus, backend } = await start(t, { slo: {}, log: {} });
    const reload = async (slo) => {
      const before = nexus.log().length;
      nexus.reload({ ...nexus.conf, slo });
      await until(() => / reloaded/.test(nexus.log().slice(before)), 'reloaded');
    };
    const ask = (more) => post(nexus.port, endpoint, chat('m1', { stream: true, ...more }));
    const page = async () => parse_metrics((await get(nexus.port, '/metrics')).text);
    await ask({});
    assert.ok(!(await page_after(1, nexus.port)).families.has('nexus_slo_requests_total'));
    await reload({ ttft: '100ms' });
    assert.ok((await page()).families.has('nexus_slo_requests_total'));
    await ask({ first_ms: 200 });
    assert.deepEqual(judged(await page_after(2, nexus.port), 'm1'), [0, 1]);
    await reload({ ttft: '1h' });
    await ask({ first_ms: 200 });
    assert.deepEqual(judged(await page_after(3, nexus.port), 'm1'), [1, 1]);
    await reload({ tpot: '1h' });
    await ask({ tokens: 1 });   // nothing to judge it by
    assert.deepEqual(judged(await page_after(4, nexus.port), 'm1'), [1, 1]);
    await reload({});
    await ask({});
    assert.deepEqual(judged(await page_after(5, nexus.port), 'm1'), [1, 1]);
    assert.equal(backend.requests.length, 5);
  });
});
