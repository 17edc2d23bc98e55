// Reconciliation over all endpoints at once: after a seeded mix of every API's answers, errors and broken streams,
// nexus_requests_total, nexus_endpoint_requests_total, the access log and the clients agree to the unit, tokens too.
import path from 'node:path';
import { answers, unknown_path } from './api_shapes.mjs';
import { Ledger, label_of, totals } from './ledger.mjs';
import { RawClient, assert, get, group, request_bytes, seeded, settings, start_backend, start_nexus, test, until } from './harness.mjs';

const model_of = (row) => row.ask.model;
// Rows whose first event tells no count: a stream that breaks behind it has told none.
const breakable = answers.filter((r) => r.streams && !['/v1/messages', '/completion', '/infill'].includes(r.path) && !r.name.startsWith('vLLM, counts in each chunk'));

// Requests that a backend has, and the streams that it breaks once the client has got their beginning; by request id.
const held = new Set();
const broken = new Map();

// A backend's part of the plan is in the request's fields.
async function act(request, reply) {
  const row = answers[Number(request.headers.get('x-row'))];
  const size = Number(request.headers.get('x-size'));
  const text = request.headers.get('x-crlf') === 'yes' ? row.text.replaceAll('\n', '\r\n') : row.text;
  const bytes = Buffer.from(text, 'latin1');
  switch (request.headers.get('x-do')) {
    case 'error': return reply.json({ error: { message: 'boom' } }, 500);
    case 'refuse': return reply.json({ error: { message: 'no' } }, 422);
    case 'reset': return reply.reset();
    case 'hang': held.add(request.headers.get('x-request-id')); return undefined;
    case 'break':
    case 'endless': {
      reply.head(200, { 'Content-Type': row.type, 'Transfer-Encoding': 'chunked' });
      reply.piece((row.type === 'application/x-ndjson' ? /^.*?\n/s : /^.*?\n\r?\n/s).exec(text)[0]);
      if (request.headers.get('x-do') === 'break') broken.set(request.headers.get('x-request-id'), reply);
      return undefined;
    }
    default:
  }
  if (!size) return reply.body(200, bytes, { 'Content-Type': row.type });
  reply.head(200, { 'Content-Type': row.type, 'Transfer-Encoding': 'chunked' });
  for (let at = 0; at < bytes.length; at += size) reply.piece(bytes.subarray(at, at + size));
  return reply.finish();
}

function make_request(random, id) {
  const kinds = [[60, 'answer'], [5, 'error'], [4, 'refuse'], [3, 'reset'], [6, 'break'], [4, 'unknown'], [3, 'garbage'], [2, 'too large'], [4, 'leave waiting'], [4, 'leave streaming']];
  let at = random.below(kinds.reduce((sum, [weight]) => sum + weight, 0));
  const [, kind] = kinds.find(([weight]) => (at -= weight) < 0);
  const row = random.pick(['break', 'leave streaming'].includes(kind) ? breakable : answers);
  const does = { 'leave waiting': 'hang', 'leave streaming': 'endless' }[kind] ?? kind;
  const headers = { 'Content-Type': 'application/json', 'X-Request-Id': id, 'X-Row': String(answers.indexOf(row)), 'X-Size': String(random.pick(row.streams ? [5, 64, 4000] : [0, 9])), 'X-Crlf': row.streams && random.below(2) ? 'yes' : 'no', 'X-Do': does };
  let body = JSON.stringify(row.ask);
  if (kind === 'unknown') body = JSON.stringify({ ...row.ask, model: `invented-${random.below(50)}` });
  if (kind === 'garbage') body = random.pick(['{"model":', '[]', '', 'x']);
  if (kind === 'too large') body = JSON.stringify({ ...row.ask, pad: 'x'.repeat(70_000) });
  return { id, kind, row, body, path: row.path, headers };
}

// Sends it on `client`; returns what the client saw.
async function run_request(client, r) {
  client.method = 'POST';
  client.write(request_bytes('POST', r.path, r.headers, r.body));
  if (r.kind === 'leave waiting') {
    await until(() => held.has(r.id), 'a backend has it');
    client.close();
    return { status: 499, whole: false };
  }
  const head = await client.head(20_000);
  if (r.kind === 'leave streaming' && head.status === 200) {
    await client.piece(20_000);
    client.close();
    return { status: 200, whole: false };
  }
  let bytes = 0;
  for (let p = await client.piece(20_000); p !== null; p = await client.piece(20_000)) {
    bytes += p.length;
    broken.get(r.id)?.reset();
  }
  return { status: head.status, whole: client.body.done, bytes, backend: head.headers.get('x-nexus-backend'), closing: /close/i.test(head.headers.get('connection')) };
}

const tally = (rows, key) => {
  const out = {};
  for (const row of rows) out[key(row)] = (out[key(row)] ?? 0) + 1;
  return Object.fromEntries(Object.entries(out).sort());
};
const sum = (rows, of) => rows.reduce((n, row) => n + (of(row) ?? 0), 0);

group('api reconciliation', () => {
  test('metrics, access log and clients of every API agree to the unit', { limit_ms: 60_000 }, async (t) => {
    const good = await start_backend(t, { answer: act });
    const also = await start_backend(t, { answer: act });
    let pathless = 0;
    const old = await start_backend(t, { answer: (request, reply) => {   // knows chat alone
      if (request.path.endsWith('/chat/completions')) return act(request, reply);
      pathless += 1;
      const [status, type, body] = Object.values(unknown_path(request.path))[pathless % 6];
      return reply.body(status, body, { 'Content-Type': type });
    } });
    const log_path = path.join(t.dir(), 'access.log');
    const nexus = await start_nexus(t, {
      server: { threads: 3, max_body: '64k' }, routing: { strategy: 'round_robin' }, health: { interval: '300ms', eject_after: 1000 }, log: { format: 'json', access: log_path },
      backends: [{ name: 'good', mock: good }, { name: 'also', mock: also, apis: 'all' }, { name: 'old', mock: old }],
    });
    const ledger = new Ledger(nexus, { log_path });
    const seen = [];
    await Promise.all(Array.from({ length: 24 }, async (_, c) => {
      const random = seeded(7000 + c);
      let client = null;
      for (let i = 0; i < (settings.sanitised ? 10 : 30); i++) {
        const r = make_request(random, `c${c}-r${i}`);
        if (!client || client.over || client.socket.destroyed) client = await RawClient.connect(nexus.port);
        const outcome = await run_request(client, r).catch((error) => {
          throw new Error(`${r.id} ${r.kind} ${r.row.name}: ${error.message}`);
        });
        seen.push({ ...r, ...outcome });
        if (!outcome.whole || outcome.closing) {
          client.close();
          client = null;
        }
      }
      client?.close();
    }));
    ledger.sent = seen.length;
    await until(async () => totals(await ledger.page()).requests >= seen.length, 'all counted').catch(() => {});
    const page = await ledger.page();
    const log = await ledger.log();
    const all = totals(page);

    // Clients and log, request by request.
    const by_id = new Map(log.map((line) => [line.request_id, line]));
    assert.deepEqual([log.length, by_id.size, all.requests, sum(Object.values(all.endpoints), (n) => n)], [seen.length, seen.length, seen.length, seen.length], 'lines, ids, requests, requests by endpoint');
    for (const s of seen) {
      const line = by_id.get(s.id);
      const note = `${s.id}, ${s.kind}, ${s.row.name}: ${JSON.stringify(line)}`;
      assert.equal(line.path, s.path, note);
      if (s.kind !== 'leave waiting') assert.equal(line.status, s.status, note);
      if (s.backend) assert.equal(line.backend, s.backend, note);
      if (s.whole) assert.equal(line.bytes, s.bytes, note);
      if (!s.whole) continue;
      const { row } = s;
      const told = s.kind === 'answer' ? [row.prompt, row.completion, row.error] : [undefined, undefined, line.error_type];
      assert.deepEqual([line.prompt_tokens ?? undefined, line.completion_tokens ?? undefined, line.error_type ?? undefined], told, note);
      assert.equal(s.status === 200, s.kind === 'answer', note);
    }

    // Log and metrics, label by label.
    const endpoints = Object.fromEntries(page.select('nexus_endpoint_requests_total').filter((s) => s.value).map((s) => [`${s.labels.endpoint} ${s.labels.status}`, s.value]).sort());
    assert.deepEqual(endpoints, tally(log, (l) => `${label_of(l.path)} ${l.status}`));
    const requests = Object.fromEntries(page.select('nexus_requests_total').filter((s) => s.value).map((s) => [`${s.labels.model} ${s.labels.backend} ${s.labels.status}`, s.value]).sort());
    assert.deepEqual(requests, tally(log, (l) => `${l.model === 'm1' ? 'm1' : 'unknown'} ${l.backend && l.backend !== '-' ? l.backend : 'none'} ${l.status}`));
    assert.deepEqual(all.errors, tally(log.filter((l) => l.error_type), (l) => l.error_type));
    for (const type of ['prompt', 'completion']) {
      const told = log.filter((l) => (l[`${type}_tokens`] ?? -1) >= 0);
      assert.deepEqual(all[type], { sum: sum(told, (l) => l[`${type}_tokens`]), told: told.length }, `${type} tokens`);
    }

    // What the clients know of their answers.
    const answered = seen.filter((s) => s.kind === 'answer').map((s) => s.row);
    assert.equal(all.prompt.sum, sum(answered, (r) => r.prompt), 'prompt tokens');
    assert.equal(all.completion.sum, sum(answered, (r) => r.completion), 'completion tokens');
    assert.equal(all.cached, sum(answered, (r) => r.cached), 'cached tokens');
    assert.equal(all.without_usage, answered.filter((r) => r.prompt === undefined && r.completion === undefined && !r.silent && !r.error).length, 'without usage');
    assert.equal(all.without_end, answered.filter((r) => r.streams && !r.ends && !r.error).length, 'without an end');
    const streams = seen.filter((r) => r.status === 200 && r.row.streams).length;
    assert.equal(page.sum('nexus_time_to_first_token_seconds_count'), streams, 'streams of which a first event came');
    const stats = (await get(nexus.port, '/v1/stats')).json;
    const errors = log.filter((l) => l.error_type).length;
    assert.deepEqual(stats.requests, { total: seen.length, success: seen.length - errors, errors });
    assert.equal(page.sum('nexus_backend_attempts_total'), sum(log, (l) => l.attempts), 'attempts, with those of a server that does not know the path');
    assert.ok(pathless >= 10, `${pathless} answers of a server that did not know the path`);
    for (const s of page.select('nexus_pending_requests')) assert.equal(s.value, 0, `pending of ${s.labels.backend}`);
    assert.ok(answered.some((r) => model_of(r) === undefined), 'the mix had requests without a model in it');
  });
});
