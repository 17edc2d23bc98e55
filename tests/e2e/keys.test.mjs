// Clients' keys by their names: in the log, in the metrics, in the queue.
import fs from 'node:fs';
import path from 'node:path';
import { assert, chat, get, group, pair, parse_metrics, post, test, until } from './harness.mjs';

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
