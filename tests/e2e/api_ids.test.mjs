// Stored responses: by their id they are asked for where they are, also after Nexus has forgotten them.
import { answer_of } from './api_shapes.mjs';
import { Ledger, totals } from './ledger.mjs';
import { assert, group, request, start_backend, start_nexus, test } from './harness.mjs';

const OpenAI = await import('openai').then((m) => m.default, () => null);

// A server that stores responses, as OpenAI's does: its own ids alone are known to it.
function storing(name) {
  const stored = new Map();
  const missing = (id) => ({ error: { message: `Response with id '${id}' not found.`, type: 'invalid_request_error', param: null, code: null } });
  return (request, reply) => {
    const [, , , id, part] = request.path.replace(/\?.*/, '').split('/');
    if (!id) {
      const { previous_response_id: previous, stream } = request.json;
      if (previous && !stored.has(previous)) return reply.json(missing(previous), 400);
      const made = `resp_${name}_${stored.size}`;
      const text = answer_of('OpenAI', '/v1/responses', stream === true).text.replaceAll('resp_1', made);
      stored.set(made, JSON.parse(answer_of('OpenAI', '/v1/responses', false).text.replaceAll('resp_1', made)));
      return reply.body(200, text, { 'Content-Type': stream ? 'text/event-stream' : 'application/json' });
    }
    if (!stored.has(id)) return reply.json(missing(id), 404);
    if (request.method === 'DELETE') {
      stored.delete(id);
      return reply.json({ id, object: 'response', deleted: true });
    }
    if (part === 'input_items') return reply.json({ object: 'list', data: [{ id: `item_of_${id}`, type: 'message', role: 'user', content: [] }], has_more: false, first_id: null, last_id: null });
    return reply.json({ ...stored.get(id), ...(part === 'cancel' && { status: 'cancelled' }) });
  };
}

async function stores(t) {
  if (!OpenAI) t.skip('npm package openai is not installed (cd tests && npm ci)');
  const backends = [];
  for (const name of ['a', 'b', 'c']) backends.push({ name, mock: await start_backend(t, { answer: storing(name) }) });
  const begin = async () => {
    const nexus = await start_nexus(t, { routing: { strategy: 'round_robin' }, backends: backends.map((b) => ({ ...b })) });
    const ledger = new Ledger(nexus);
    await ledger.read(0);
    return { nexus, ledger, client: new OpenAI({ baseURL: `http://127.0.0.1:${nexus.port}/v1`, apiKey: 'sk-test', maxRetries: 0 }) };
  };
  // How many requests each backend has got so far.
  const got = () => backends.map(({ mock }) => mock.requests.length);
  return { backends, begin, got };
}

const holder = (id) => id.split('_')[1];

group('api ids', () => {
  test('openai: a stored response is read, listed, cancelled, continued and deleted where it was made', async (t) => {
    const { begin, got } = await stores(t);
    const { client, ledger, nexus } = await begin();
    const ids = [];
    for (let i = 0; i < 6; i++) {
      if (i % 2 === 0) ids.push((await client.responses.create({ model: 'm1', input: 'Hi' })).id);
      else for await (const event of await client.responses.create({ model: 'm1', input: 'Hi', stream: true })) if (event.type === 'response.created') ids.push(event.response.id);
    }
    assert.equal(new Set(ids.map(holder)).size, 3, 'each backend has some');
    await ledger.read(6);
    for (const id of ids) {
      const before = got();
      assert.equal((await client.responses.retrieve(id)).id, id);
      for await (const item of client.responses.inputItems.list(id)) assert.equal(item.id, `item_of_${id}`);
      assert.equal((await client.responses.cancel(id)).status, 'cancelled');
      const next = await client.responses.create({ model: 'm1', input: 'And?', previous_response_id: id });
      assert.equal(holder(next.id), holder(id));
      await client.responses.delete(id);
      assert.deepEqual(got().map((n, i) => n - before[i]), ['a', 'b', 'c'].map((name) => (name === holder(id) ? 5 : 0)), 'nobody else was asked');
      const added = await ledger.read(5);
      assert.deepEqual(added.endpoints, { _v1_responses__id_: 2, _v1_responses__id__input_items: 1, _v1_responses__id__cancel: 1, _v1_responses: 1 });
      assert.deepEqual([added.errors, added.prompt.told, added.without_usage], [undefined, 1, undefined]);
      assert.equal((await request(nexus.port, 'GET', `/v1/responses/${id}`)).status, 404);
      await ledger.read(1);
    }
    assert.equal(totals(await ledger.page()).requests, ledger.sent);
  });

  test('openai: an id that Nexus does not know is asked for at each backend in turn', async (t) => {
    const { begin, got } = await stores(t);
    const first = await begin();
    const ids = [];
    for (let i = 0; i < 6; i++) ids.push((await first.client.responses.create({ model: 'm1', input: 'Hi' })).id);
    await first.nexus.stop();
    const { client, ledger } = await begin();
    for (const id of ids) assert.equal((await client.responses.retrieve(id)).id, id);
    const before = got();
    await assert.rejects(client.responses.retrieve('resp_nobody_1'), (e) => e instanceof OpenAI.NotFoundError && /resp_nobody_1/.test(e.message));
    assert.deepEqual(got().map((n, i) => n - before[i]), [1, 1, 1]);
    const added = await ledger.read(7);
    assert.deepEqual(added, { requests: 7, endpoints: { _v1_responses__id_: 7 }, errors: { bad_request: 1 } });
    assert.equal((await ledger.page()).sum('nexus_backend_ejected'), 0);
    await client.responses.delete(ids[0]);
    await assert.rejects(client.responses.retrieve(ids[0]), OpenAI.NotFoundError);
  });
});
