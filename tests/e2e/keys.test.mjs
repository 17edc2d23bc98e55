// Clients' keys by their names: in the log, in the metrics, in the queue.
import fs from 'node:fs';
import path from 'node:path';
import { RawClient, answer_probe, assert, assert_error, chat, get, group, pair, parse_metrics, post, settings, sleep, test, until } from './harness.mjs';

const OpenAI = await import('openai').then((m) => m.default, () => null);
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
    // The lines of two threads may come in another order.
    assert.deepEqual(lines.map((line) => JSON.parse(line).key).sort(), ['', 'alice', 'alice', 'bob', 'bob']);
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
async function overtaken(t, { nexus, backend }, many, one, answer = backend.answer) {
  const started = [];
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
const crowded = { queue: { size: 200, timeout: '50s' }, backend: { max_pending: places } };

group('the queue is shared between keys', () => {
  test('beside a key with 64 connections, the one request of another waits at most one service time', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, server: { api_keys_file: file_of(t) } });
    const waits = await overtaken(t, fleet, as('alice'), as('bob'));
    assert.ok(waits[10] <= places, `half of its requests were overtaken by ${waits[10]} or more`);
    assert.ok(waits.at(-1) <= 3 * places, `one was overtaken by ${waits.at(-1)}`);   // requests on their way are in no queue yet
  });

  test('a key of a lower priority number goes first', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, server: { api_keys_file: file_of(t, { bob: 'priority=10 weight=1' }) } });
    // Bob’s requests are so dear that by what was served he would come last.
    const dear = (request, reply) => reply.json({ choices: [], usage: { prompt_tokens: request.json.user === 'one' ? 500_000 : 1, completion_tokens: 0 } });
    const waits = await overtaken(t, fleet, as('alice'), as('bob'), dear);
    assert.ok(waits[10] <= places, `half of its requests were overtaken by ${waits[10]} or more`);
  });

  test('fair_by = address shares it between the addresses of clients without a key', { limit_ms: 60_000 }, async (t) => {
    const fleet = await pair(t, {}, { ...crowded, keys: { fair_by: 'address' } });
    const waits = await overtaken(t, fleet, {}, { from: '127.0.0.2' });
    assert.ok(waits[10] <= places, `half of its requests were overtaken by ${waits[10]} or more`);
    const all = await overtaken(t, await pair(t, {}, crowded), {}, { from: '127.0.0.2' });
    assert.ok(all[10] > 30, `without it the order is that of arrival (${all[10]})`);
  });
});

group('limits of keys', () => {
  const start = (t, options, conf = {}, mock = {}) => pair(t, mock, { ...conf, server: { api_keys_file: file_of(t, options) } });
  const ask = (nexus, who, more, path_of = chat_path) => post(nexus.port, path_of, chat('m1', more), as(who));

  test('beyond rpm a request is 429, and says when to try again; others are not touched', async (t) => {
    const { nexus, backend } = await start(t, { alice: 'rpm=2' });
    for (const left of [1, 0]) {
      const answer = await ask(nexus, 'alice');
      assert.equal(answer.status, 200);
      assert.equal(answer.headers.get('x-ratelimit-limit-requests'), '2');
      assert.equal(answer.headers.get('x-ratelimit-remaining-requests'), String(left));
      assert.match(answer.headers.get('x-ratelimit-reset-requests'), /^(\d+m)?\d+s$/);
    }
    const refused = await ask(nexus, 'alice');
    const error = assert_error(refused, 429, 'rate_limit_exceeded');
    assert.match(error.message, /^Rate limit reached for key 'alice' on requests per minute: limit 2\. Try again in \d+s\.$/);
    assert.equal(error.type, 'requests');
    const ms = Number(refused.headers.get('retry-after-ms'));
    assert.ok(ms > 10_000 && ms <= 30_000, `${ms} ms`);
    assert.equal(refused.headers.get('retry-after'), String(Math.ceil(ms / 1000)));
    assert.equal(refused.headers.get('x-ratelimit-remaining-requests'), '0');
    assert.equal((await ask(nexus, 'bob')).status, 200);
    assert.ok(!(await ask(nexus, 'bob')).headers.has('x-ratelimit-limit-requests'));
    assert.equal(backend.requests.length, 4);
    await until(async () => (await page_of(nexus)).value('nexus_limit_rejections_total', { limit: 'key_requests' }) === 1, 'counted as a limit');
    assert.equal((await page_of(nexus)).value('nexus_key_requests_total', { key: 'alice', status: '429' }), 1);
  });

  test('tokens are taken by an estimate, and put right by the usage', async (t) => {
    const { nexus, backend } = await start(t, { alice: 'tpm=1000' });
    backend.answer = (_, reply) => reply.json({ choices: [], usage: { prompt_tokens: 700, completion_tokens: 900, total_tokens: 1600 } });
    const first = await ask(nexus, 'alice', { max_tokens: 10 });
    assert.equal(first.status, 200);
    assert.ok(Number(first.headers.get('x-ratelimit-remaining-tokens')) > 900);
    await until(async () => (await page_of(nexus)).sum('nexus_key_pending') === 0, 'settled');
    const refused = await ask(nexus, 'alice', { max_tokens: 10 });
    assert.equal(assert_error(refused, 429, 'rate_limit_exceeded').type, 'tokens');
    assert.ok(Number(refused.headers.get('retry-after-ms')) > 30_000, 'for what was used beyond the limit');
    assert.equal(refused.headers.get('x-ratelimit-remaining-tokens'), '0');
  });

  test('five requests at once near tpm pass it by at most what one of them uses beyond its estimate', async (t) => {
    const { nexus, backend } = await start(t, { alice: 'tpm=1000' });
    const used = 420;   // of which 400 are told by max_tokens
    backend.answer = async (_, reply) => { await sleep(50); reply.json({ choices: [], usage: { prompt_tokens: 20, completion_tokens: 400, total_tokens: used } }); };
    const answers = await Promise.all(Array.from({ length: 5 }, () => ask(nexus, 'alice', { max_tokens: 400 })));
    const served = answers.filter((a) => a.status === 200).length;
    assert.equal(served, 2, answers.map((a) => a.status).join(' '));
    assert.ok(served * used <= 1000 + used);
    assert.ok(answers.every((a) => [200, 429].includes(a.status)));
  });

  test('a key’s max_pending holds over all threads; more of it wait in the queue, or are 429', async (t) => {
    for (const queue of [0, 50]) {
      const { nexus, backend } = await start(t, { alice: 'max_pending=2' }, { queue: { size: queue } });
      let running = 0, most = 0;
      const answer = backend.answer;
      backend.answer = async (request, ...rest) => {
        if (request.json.user === 'alice') most = Math.max(most, ++running);
        await sleep(30);
        if (request.json.user === 'alice') running -= 1;
        return answer(request, ...rest);
      };
      const answers = await Promise.all([...Array.from({ length: 20 }, () => ask(nexus, 'alice', { user: 'alice' })), ...Array.from({ length: 5 }, () => ask(nexus, 'bob', { user: 'bob' }))]);
      const refused = answers.filter((a) => a.status === 429);
      assert.ok(answers.slice(20).every((a) => a.status === 200), 'another key is not touched');
      assert.equal(most, 2);
      assert.equal(answers.filter((a) => a.status === 200).length + refused.length, 25);
      if (queue > 0) assert.equal(refused.length, 0);
      else assert.ok(refused.length > 0 && refused.every((a) => assert_error(a, 429, 'key_concurrency')));
      await until(async () => (await page_of(nexus)).sum('nexus_key_pending') === 0, 'none is left');
      assert.equal((await ask(nexus, 'alice')).status, 200);
    }
  });

  test('a model that a key may not use is 404, and in none of its lists', async (t) => {
    const { nexus } = await start(t, { alice: 'models=m1,big:*' }, {}, { models: ['m1', 'm2', 'big:70b'] });
    const ids = async (who) => (await get(nexus.port, '/v1/models', as(who))).json.data.map((m) => m.id).sort();
    assert.deepEqual(await ids('alice'), ['big:70b', 'm1']);
    assert.deepEqual(await ids('bob'), ['big:70b', 'm1', 'm2']);
    assert.deepEqual((await get(nexus.port, '/api/tags', as('alice'))).json.models.map((m) => m.name).sort(), ['big:70b', 'm1']);
    assert.equal((await get(nexus.port, '/v1/models/m2', as('alice'))).status, 404);
    assert.equal((await get(nexus.port, '/v1/models/m1', as('alice'))).status, 200);
    const refused = await post(nexus.port, chat_path, chat('m2'), as('alice'));
    const error = assert_error(refused, 404, 'model_not_found');
    assert.ok(error.message.includes('m1') && error.message.includes('big:70b') && !/Available:.*m2/.test(error.message), error.message);
    assert.equal((await post(nexus.port, chat_path, chat('big:70b'), as('alice'))).status, 200);
    assert.equal((await post(nexus.port, chat_path, chat('m2'), as('bob'))).status, 200);
    await until(async () => (await page_of(nexus)).value('nexus_limit_rejections_total', { limit: 'key_model' }) === 1, 'counted as a limit');
  });

  test('the models that Ollama has loaded are told to a key if it may use them', async (t) => {
    const loaded = ['m1', 'm2', 'big:70b'].map((name) => ({ name, model: name, size_vram: 7 }));
    const probe = (req, reply, backend) => (req.path === '/api/ps' ? reply.json({ models: loaded }) : answer_probe(req, reply, backend));
    const { nexus } = await start(t, { alice: 'models=m1,big:*' }, {}, { kind: 'ollama', models: ['m1', 'm2', 'big:70b'], probe });
    // All at once, so that the backends are asked once for all of them.
    const names = await Promise.all(['alice', 'bob', 'alice'].map(async (who) => (await get(nexus.port, '/api/ps', as(who))).json.models.map((m) => m.name)));
    assert.deepEqual(names, [['m1', 'big:70b'], ['m1', 'm2', 'big:70b'], ['m1', 'big:70b']]);
    assert.equal((await get(nexus.port, '/api/version', as('alice'))).status, 200);
  });

  test('Anthropic’s API gets its own body and fields', async (t) => {
    const { nexus } = await start(t, { alice: 'rpm=1 tpm=100k' });
    const send = () => post(nexus.port, '/v1/messages', { model: 'm1', max_tokens: 5, messages: [{ role: 'user', content: 'x' }] }, { headers: { 'x-api-key': keys.alice, 'anthropic-version': '2023-06-01' } });
    await send();
    const refused = await send();
    assert.equal(refused.status, 429);
    assert.equal(refused.json.type, 'error');
    assert.equal(refused.json.error.type, 'rate_limit_error');
    assert.equal(refused.headers.get('anthropic-ratelimit-requests-limit'), '1');
    assert.equal(refused.headers.get('anthropic-ratelimit-requests-remaining'), '0');
    assert.match(refused.headers.get('anthropic-ratelimit-requests-reset'), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/);
    assert.equal(refused.headers.get('anthropic-ratelimit-tokens-limit'), '100000');
    assert.ok(Number(refused.headers.get('retry-after-ms')) > 0);
  });

  test('the SDK of OpenAI succeeds at its second try, after retry-after-ms', { limit_ms: 20_000 }, async (t) => {
    if (!OpenAI) t.skip('npm package openai is not installed (cd tests && npm ci)');
    const { nexus, backend } = await start(t, { alice: 'tpm=60000' });
    const usages = [{ prompt_tokens: 60_400, completion_tokens: 0, total_tokens: 60_400 }, { prompt_tokens: 5, completion_tokens: 5, total_tokens: 10 }];
    backend.answer = (_, reply) => reply.json({ id: 'x', object: 'chat.completion', model: 'm1', choices: [{ index: 0, message: { role: 'assistant', content: 'yes' }, finish_reason: 'stop' }], usage: usages.shift() });
    assert.equal((await ask(nexus, 'alice', { max_tokens: 10 })).status, 200);
    await until(async () => (await page_of(nexus)).sum('nexus_key_pending') === 0, 'settled');
    const client = new OpenAI({ baseURL: `http://127.0.0.1:${nexus.port}/v1`, apiKey: keys.alice, maxRetries: 2, timeout: 10_000 });
    const answer = await client.chat.completions.create({ model: 'm1', max_tokens: 10, messages: [{ role: 'user', content: 'x' }] });
    assert.equal(answer.choices[0].message.content, 'yes');
    await until(async () => (await page_of(nexus)).value('nexus_key_requests_total', { key: 'alice', status: '2xx' }) === 2, 'both counted');
    assert.equal((await page_of(nexus)).value('nexus_key_requests_total', { key: 'alice', status: '429' }), 1, 'one refusal before it');
  });
});
