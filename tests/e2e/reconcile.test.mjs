// Reconciliation: after a seeded storm of everything that can happen, three accounts of it agree to the unit:
// nexus_requests_total, the access log, and what the clients saw; and no scrape in between ever went backwards.
import fs from 'node:fs';
import path from 'node:path';
import { RawClient, answer_plainly, assert, chat, get, group, histograms, parse_metrics, request_bytes, seeded, settings, sleep, sse, start_backend, start_nexus, test, until } from './harness.mjs';

const endpoint = '/v1/chat/completions';
const sanitize = (s) => (/^\d/.test(s) ? '_' : '') + s.replace(/[^a-zA-Z0-9_]/gu, '_');

// What a backend does with a request, by the request's own `do`.
async function act(request, reply, backend) {
  const ask = request.json;
  switch (ask.do) {
    case 'error': return reply.json({ error: { message: 'boom' } }, ask.status);
    case 'reset': return reply.reset();
    case 'hang': return undefined;
    case 'garbage': return reply.raw('what is this\r\n\r\n');
    case 'cut': {
      reply.stream();
      reply.piece(sse('one'));
      await sleep(ask.ms);
      return reply.reset();
    }
    case 'endless': {
      reply.stream();
      reply.piece(sse('one'));
      return undefined;
    }
    default:
      if (ask.ms) await sleep(ask.ms);
      return answer_plainly(request, reply, backend);
  }
}

// One random request: its bytes, and how the client behaves. `leave` is after what the client goes away.
function make_request(random, id) {
  const models = ['m1', 'm2', 'llama3:70b', 'best', 'only-on-bad', 'down-with-fallback'];
  const model = random.pick(models);
  const plain = (more, stream = random.below(2) === 1) => ({ path: endpoint, body: JSON.stringify(chat(model, { stream, ...more })), model });
  const kinds = [
    [50, () => plain({ do: 'answer', ms: random.below(4) * 3 })],
    [6, () => ({ path: '/v1/embeddings', body: JSON.stringify({ model, input: ['a'], do: 'answer' }), model })],
    [4, () => ({ path: '/v1/completions', body: JSON.stringify({ model, prompt: 'a', do: 'answer' }), model })],
    [6, () => plain({ do: 'error', status: random.pick([400, 404, 422, 429, 500, 503]) })],
    [4, () => plain({ do: 'reset' })],
    [2, () => plain({ do: 'garbage' })],
    [3, () => plain({ do: 'cut', ms: random.below(20) }, true)],
    [1, () => plain({ do: 'hang', note: 'timeout' })],
    [4, () => ({ ...plain({ do: 'hang' }), leave: 'waiting' })],
    [4, () => ({ ...plain({ do: 'endless' }, true), leave: 'streaming' })],
    [3, () => ({ ...plain({ do: 'answer' }), leave: 'request' })],
    [3, () => ({ path: endpoint, body: random.pick(['{"model":', '[]', '', 'x', '{"messages":[]}']), model: null })],
    [3, () => ({ path: endpoint, body: JSON.stringify(chat(`invented-${random.below(1000)}`)), model: 'invented' })],
    [2, () => ({ path: endpoint, body: JSON.stringify(chat(model, { pad: 'x'.repeat(70_000) })), model: null })],
  ];
  let at = random.below(kinds.reduce((sum, [weight]) => sum + weight, 0));
  const [, make] = kinds.find(([weight]) => (at -= weight) < 0);
  return { id, ...make() };
}

// Sends it on `client`; resolves to the status that the client saw and whether it was served whole.
async function run_request(client, r) {
  const bytes = request_bytes('POST', r.path, { 'Content-Type': 'application/json', 'X-Request-Id': r.id }, r.body);
  client.method = 'POST';
  if (r.leave === 'request') {
    client.write(bytes.subarray(0, bytes.length - 3));
    await sleep(15);
    client.close();
    return { status: 499, whole: false };
  }
  client.write(bytes);
  if (r.leave === 'waiting') {
    await sleep(25);
    client.close();
    return { status: 499, whole: false };
  }
  const head = await client.head(20_000);
  if (r.leave === 'streaming' && head.status === 200) {
    await client.piece(20_000);
    client.close();
    return { status: 200, whole: false };
  }
  let text = '';
  for (let p = await client.piece(20_000); p !== null; p = await client.piece(20_000)) text += p.toString('latin1');
  return { status: head.status, whole: client.body.done, backend: head.headers.get('x-nexus-backend'), closing: /close/i.test(head.headers.get('connection')), text };
}

// Counters and histogram series never go down and never vanish.
function check_monotonic(before, after) {
  for (const [name, family] of before.families) {
    if (family.type === 'gauge') continue;
    for (const s of family.samples) {
      const key = `${s.name}{${Object.keys(s.labels).sort().map((k) => `${k}=${JSON.stringify(s.labels[k])}`).join()}}`;
      const now = after.series.get(key);
      assert.ok(now !== undefined, `${key} vanished`);
      assert.ok(now >= s.value, `${key} went from ${s.value} to ${now} (${name})`);
    }
  }
}

const tally = (rows, key) => {
  const out = {};
  for (const row of rows) out[key(row)] = (out[key(row)] ?? 0) + 1;
  return Object.fromEntries(Object.entries(out).sort());
};

group('reconciliation', () => {
  for (const seed of [1, 20240607]) {
    test(`metrics, access log and clients agree to the unit after a storm on 3 threads (seed ${seed})`, { serial: true, limit_ms: 90_000 }, async (t) => {
      const good = await start_backend(t, { kind: 'vllm', models: ['m1', 'm2', 'llama3:70b'], answer: act });
      const also = await start_backend(t, { models: ['m1', 'llama3:70b'], answer: act });
      const bad = await start_backend(t, { models: ['only-on-bad', 'm2'], answer: (request, reply) => (request.json.do === 'answer' ? reply.json({}, 500) : act(request, reply, bad)) });
      const down = await start_backend(t, { models: ['down-with-fallback'] });
      await down.stop();
      const log_path = path.join(t.dir(), 'access.log');
      const nexus = await start_nexus(t, {
        server: { threads: 3, max_body: '64k' },
        upstream: { first_byte_timeout: `${700 * settings.slow}ms` },
        log: { format: 'json', access: log_path },
        aliases: { best: 'llama3:70b' },
        fallbacks: { 'down-with-fallback': 'm1' },
        backends: [{ name: 'good', mock: good }, { name: 'also', mock: also }, { name: 'bad', mock: bad }, { name: 'down', url: down.url, type: 'generic', models: 'down-with-fallback' }],
        health: { interval: '500ms' },
      }, { ready: 'up' });
      await until(async () => (await get(nexus.port, '/health')).json.backends.healthy === 3, 'three healthy backends');

      const known = new Set(['m1', 'm2', 'llama3:70b', 'best', 'only-on-bad', 'down-with-fallback']);
      const seen = [];
      let done = false;
      let scrapes = 0;
      const scraping = (async () => {
        let before = null;
        while (!done) {
          const page = parse_metrics((await get(nexus.port, '/metrics')).text);   // throws on _count ≠ +Inf, duplicates, …
          if (before) check_monotonic(before, page);
          before = page;
          scrapes++;
          await sleep(20);
        }
      })();
      const clients = 40;
      const each = settings.sanitised ? 15 : 40;
      await Promise.all(Array.from({ length: clients }, async (_, c) => {
        const random = seeded(seed * 1000 + c);
        let client = null;
        for (let i = 0; i < each; i++) {
          const r = make_request(random, `s${seed}-c${c}-r${i}`);
          if (!client || client.over || client.socket.destroyed) client = await RawClient.connect(nexus.port);
          const outcome = await run_request(client, r).catch((error) => {
            throw new Error(`${r.id} (${i} on its client) ${r.leave ?? ''} ${r.path} ${r.body.slice(0, 120)}: ${error.message}`);
          });
          seen.push({ ...r, ...outcome });
          if (r.leave || !outcome.whole || outcome.closing || random.below(10) === 0) {
            client.close();
            client = null;
          }
        }
        client?.close();
      }));
      await until(async () => parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total') >= seen.length, 'all counted').catch(() => {});
      done = true;
      await scraping;
      assert.ok(scrapes > 10, `${scrapes} scrapes`);

      let lines = [];
      await until(() => {
        lines = fs.readFileSync(log_path, 'utf8').split('\n').filter(Boolean);
        return lines.length >= seen.length;
      }, () => `${seen.length} lines in the access log (${lines.length})`, 3_000).catch(() => {});
      const log = lines.map((l) => JSON.parse(l));
      const page = parse_metrics((await get(nexus.port, '/metrics')).text);

      // Clients and log, request by request.
      assert.equal(log.length, seen.length, 'one line a request');
      const by_id = new Map(log.map((l) => [l.request_id, l]));
      assert.equal(by_id.size, log.length, 'no request twice in the log');
      for (const s of seen) {
        const l = by_id.get(s.id);
        assert.ok(l, `${s.id} is not in the log`);
        // A client that left while waiting may have been answered (an error, say) before it went.
        if (s.status === 499) assert.ok(l.status === 499 || s.leave === 'waiting', `${s.id}: the client left, the log says ${l.status}`);
        else assert.equal(l.status, s.status, `${s.id} (${s.body.slice(0, 200)})`);
        if (s.backend) assert.equal(l.backend, s.backend, s.id);
      }

      // Log and metrics, label by label.
      const label = (name) => (known.has(name) ? sanitize(name) : 'unknown');
      const log_backend = (l) => (!l.backend || l.backend === '-' ? 'none' : sanitize(l.backend));
      const metric_tally = (name, key) => Object.fromEntries(page.select(name).filter((s) => s.value).map((s) => [key(s.labels), s.value]).sort());
      assert.deepEqual(metric_tally('nexus_requests_total', (l) => `${l.model} ${l.backend} ${l.status}`), tally(log, (l) => `${label(l.model)} ${log_backend(l)} ${l.status}`));
      assert.deepEqual(metric_tally('nexus_errors_total', (l) => `${l.model} ${l.error_type}`), tally(log.filter((l) => l.error_type), (l) => `${label(l.model)} ${l.error_type}`));
      const successes = log.filter((l) => !l.error_type).length;
      const stats = (await get(nexus.port, '/v1/stats')).json;
      assert.deepEqual(stats.requests, { total: seen.length, success: successes, errors: seen.length - successes });
      assert.equal(seen.filter((s) => s.whole && s.status === 200).length, log.filter((l) => !l.error_type && !seen_left(seen, l)).length, 'successes as the clients saw them');

      // What else must add up.
      assert.equal(page.sum('nexus_backend_attempts_total'), log.reduce((n, l) => n + l.attempts, 0), 'attempts');
      for (const type of ['prompt', 'completion']) {
        const told = log.filter((l) => (l[`${type}_tokens`] ?? -1) >= 0 && !(l.status === 200 && l.error_type === 'never'));
        assert.equal(page.sum('nexus_tokens_total_sum', { type }), told.reduce((n, l) => n + l[`${type}_tokens`], 0), `${type} tokens`);
      }
      const durations = [...histograms('nexus_request_duration_seconds', page.families.get('nexus_request_duration_seconds')).values()].reduce((n, h) => n + h.count, 0);
      // A client may leave before its request has reached the backend that was chosen for it.
      const chosen = log.filter((l) => log_backend(l) !== 'none');
      const left = chosen.filter((l) => l.status === 499).length;
      assert.ok(durations <= chosen.length && durations >= chosen.length - left, `${durations} durations of ${chosen.length} requests that were sent on, ${left} of them left early`);
      for (const s of page.select('nexus_pending_requests')) assert.equal(s.value, 0, `pending of ${s.labels.backend}`);
      assert.ok(page.sum('nexus_fallbacks_total') > 0, 'the mix had fallbacks in it');
    });
  }
});

const seen_left = (seen, line) => seen.some((s) => s.id === line.request_id && s.leave);
