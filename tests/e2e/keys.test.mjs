// Clients' keys by their names: in the log, in the metrics, in the queue.
import fs from 'node:fs';
import path from 'node:path';
import { RawClient, assert, chat, get, group, pair, parse_metrics, post, settings, sleep, test, until } from './harness.mjs';

const chat_path = '/v1/chat/completions';
const keys = { alice: 'sk-alice-0123456789', bob: 'sk-bob-0123456789' };
const as = (name) => ({ headers: { Authorization: `Bearer ${keys[name] ?? name}` } });
const file_of = (t, options = {}) => t.file('keys', Object.entries(keys).map(([name, key]) => `${name} ${key} ${options[name] ?? ''}\n`).join(''));
const page_of = async (nexus) => parse_metrics((await get(nexus.port, '/metrics', as('alice'))).text);

group('names of keys', () => {
  test('the log has the name and never the key, and the sum over the keys is that of all requests', async (t) => {
    const log = path.join(t.dir(), 'access.log');
    const { nexus } = await pair(t, {}, { server: { api_keys_file: file_of(t) }, log: { access: log, format: 'json' } });
    const asked = ['alice', 'alice', 'bob', 'sk-wrong-0123456789'];
    for (const name of asked) await post(nexus.port, chat_path, chat(), as(name));
    await post(nexus.port, chat_path, chat('gone'), as('bob'));
    let page;
    await until(async () => (page = await page_of(nexus)).sum('nexus_requests_total') === 5, 'five requests counted');
    assert.equal(page.sum('nexus_key_requests_total'), 5);
    const of = (key, status) => page.value('nexus_key_requests_total', { key, status });
    assert.deepEqual([of('alice', '2xx'), of('bob', '2xx'), of('bob', '4xx'), of('none', '4xx'), of('other', '2xx')], [2, 1, 1, 1, 0]);
    assert.equal(page.sum('nexus_key_tokens_total', { type: 'prompt' }), page.sum('nexus_tokens_total_sum', { type: 'prompt' }));
    assert.equal(page.sum('nexus_key_tokens_total', { type: 'completion' }), page.sum('nexus_tokens_total_sum', { type: 'completion' }));
    assert.equal(page.sum('nexus_key_pending'), 0);
    let lines = [];
    await until(() => (lines = fs.readFileSync(log, 'utf8').split('\n').filter(Boolean)).length === 5, 'five lines');
    assert.deepEqual(lines.map((line) => JSON.parse(line).key), ['alice', 'alice', 'bob', '', 'bob']);
    const stats = (await get(nexus.port, '/v1/stats', as('bob'))).json;
    assert.deepEqual(stats.keys.map((k) => [k.name, k.requests, k.errors, k.pending]), [['alice', 2, 0, 0], ['bob', 2, 1, 0], ['none', 1, 1, 0]]);
    for (const text of [...lines, JSON.stringify(stats), (await get(nexus.port, '/metrics', as('bob'))).text]) assert.ok(!/sk-(alice|bob)/.test(text), text);
  });

  test('[metrics] keys bounds the names that are shown, and the rest count together', async (t) => {
    const { nexus } = await pair(t, {}, { server: { api_keys_file: file_of(t) }, metrics: { keys: 1 } });
    for (const name of ['alice', 'bob', 'bob']) assert.equal((await post(nexus.port, chat_path, chat(), as(name))).status, 200);
    await until(async () => (await page_of(nexus)).sum('nexus_requests_total') === 3, 'three requests counted');
    const page = await page_of(nexus);
    assert.equal(page.value('nexus_key_requests_total', { key: 'alice', status: '2xx' }), 1);
    assert.equal(page.value('nexus_key_requests_total', { key: 'other', status: '2xx' }), 2);
    assert.equal(page.select('nexus_key_requests_total', { key: 'bob' }).length, 0);
  });

  test('without a file of keys there are no families of keys', async (t) => {
    const { nexus } = await pair(t);
    await post(nexus.port, chat_path, chat());
    assert.ok(!(await get(nexus.port, '/metrics')).text.includes('nexus_key_'));
  });
});

// Sends requests one after the other until over().
async function keep_asking(nexus, who, over, { headers = {}, from } = {}, on_sent = () => {}) {
  const client = await RawClient.connect(nexus.port, { from });
  while (!over()) {
    on_sent();
    client.send('POST', chat_path, { 'Content-Type': 'application/json', ...headers }, chat('m1', { user: who }));
    const answer = await client.response(20_000);
    assert.equal(answer.status, 200, answer.text);
  }
  client.close();
}

// 64 clients that never pause, and one who asks 20 times; returns how many requests of the others began between each of
// his and its beginning at the backend.
async function overtaken(t, { nexus, backend }, many, one) {
  const started = [];
  const answer = backend.answer;
  backend.answer = async (request, ...rest) => {
    started.push(request.json.user);
    await sleep(15 * settings.slow);
    return answer(request, ...rest);
  };
  let asked = 0;
  const sent_at = [];
  const over = () => asked >= 20;
  const crowd = Array.from({ length: 64 }, () => keep_asking(nexus, 'many', over, many));
  await until(() => started.length > 20, 'a crowd');
  await keep_asking(nexus, 'one', over, one, () => { asked += 1; sent_at.push(started.length); });
  await Promise.all(crowd);
  const began_at = started.flatMap((who, at) => (who === 'one' ? [at] : []));
  return sent_at.map((at, i) => began_at[i] - at).sort((a, b) => a - b);
}
const places = 4;
const crowded = { queue: { size: 200, timeout: '20s' }, backend: { max_pending: places } };

group('the queue is shared between keys', () => {
  test('beside a key with 64 connections, the one request of another waits at most one service time', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, server: { api_keys_file: file_of(t) } });
    const waits = await overtaken(t, fleet, as('alice'), as('bob'));
    assert.ok(waits[10] <= places, `half of its requests were overtaken by ${waits[10]} or more`);
    assert.ok(waits.at(-1) <= 3 * places, `one was overtaken by ${waits.at(-1)}`);   // requests on their way are in no queue yet
  });

  test('a key of a lower priority number goes first', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, server: { api_keys_file: file_of(t, { bob: 'priority=10 weight=1' }) } });
    const waits = await overtaken(t, fleet, as('alice'), as('bob'));
    assert.ok(waits[10] <= 2, `half of its requests were overtaken by ${waits[10]} or more`);
  });

  test('fair_by = address shares it between the addresses of clients without a key', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, keys: { fair_by: 'address' } });
    const waits = await overtaken(t, fleet, {}, { from: '127.0.0.2' });
    assert.ok(waits[10] <= places, `half of its requests were overtaken by ${waits[10]} or more`);
    const all = await overtaken(t, await pair(t, {}, crowded), {}, { from: '127.0.0.2' });
    assert.ok(all[10] > 30, `without it the order is that of arrival (${all[10]})`);
  });
});
