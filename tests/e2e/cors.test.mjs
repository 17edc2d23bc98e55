// Browser pages of other origins: each response says who may read it, and a backend has no say in that.
import { RawClient, answer_plainly, assert, assert_error, chat, get, group, pair, post, request, sse_events, test, until } from './harness.mjs';

const path = '/v1/chat/completions';
const page = 'https://chat.example';
const from = (origin, more = {}) => ({ headers: { Origin: origin, ...more } });
const allowed = (r) => r.headers.all('access-control-allow-origin');

// Backends that answer pages themselves, as vLLM and Ollama do; Ollama refuses an origin that it does not know.
function opinionated(request, reply) {
  if (request.headers.has('origin')) return reply.json({ error: 'no' }, 403, { 'Access-Control-Allow-Origin': 'https://other.example' });
  reply.json({ choices: [] }, 200, { 'Access-Control-Allow-Origin': '*', 'Access-Control-Max-Age': '5', Vary: 'Accept' });
}

group('cors', () => {
  test('without cors_origins a backend’s fields and the client’s Origin pass as they are, and Nexus adds none', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => reply.json({}, 200, { 'Access-Control-Allow-Origin': '*' });
    assert.deepEqual(allowed(await post(nexus.port, path, chat(), from(page))), ['*']);
    assert.deepEqual(backend.requests[0].headers.all('origin'), [page]);
    assert.deepEqual(allowed(await get(nexus.port, '/v1/models', from(page))), []);
    const preflight = await request(nexus.port, 'OPTIONS', path, from(page, { 'Access-Control-Request-Method': 'POST' }));
    assert.equal(preflight.status, 204);
    assert.deepEqual(allowed(preflight), []);
  });

  test('cors_origins = * allows every page on every response, errors, streams and proxied ones included', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { cors_origins: '*', max_header: '2k', api_keys_file: t.file('keys', 'a sk-a-0123456789\n') } });
    const key = { Authorization: 'Bearer sk-a-0123456789' };
    const preflight = await request(nexus.port, 'OPTIONS', path, from(page, { 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,x-stainless-os' }));
    assert.equal(preflight.status, 204, 'a preflight request has no key');
    assert.match(preflight.headers.get('access-control-allow-methods'), /POST/);
    assert.match(preflight.headers.get('access-control-allow-headers'), /\*, Authorization/);
    assert.match(preflight.headers.get('access-control-max-age'), /^\d+$/);
    backend.answer = opinionated;
    const proxied = await post(nexus.port, path, chat(), from(page, key));
    assert.equal(proxied.status, 200);
    assert.deepEqual(proxied.headers.all('access-control-max-age'), []);
    backend.answer = answer_plainly;
    const stream = await post(nexus.port, path, chat('m1', { stream: true }), from(page, key));
    assert.equal(sse_events(stream.text).data.at(-1), '[DONE]');
    const unknown = await post(nexus.port, path, chat('nobody'), from(page, key));
    assert_error(unknown, 404, 'model_not_found');
    const refused = await post(nexus.port, path, chat(), from(page));
    assert_error(refused, 401);
    const large = await get(nexus.port, '/health', from(page, { X: 'x'.repeat(3000) }));
    assert_error(large, 431);
    const all = [preflight, proxied, stream, unknown, refused, large, await get(nexus.port, '/health'), await get(nexus.port, '/nowhere'), await get(nexus.port, '/metrics', from(page, key)),
                 await get(nexus.port, '/', from(page, key)), await request(nexus.port, 'PUT', path)];
    for (const r of all) {
      assert.deepEqual(allowed(r), ['*'], `${r.status}`);
      assert.deepEqual(r.headers.all('access-control-expose-headers'), ['*']);
    }
  });

  test('a list allows its origins alone, and each response varies by Origin', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { cors_origins: `http://localhost:3000, ${page}` } });
    backend.answer = opinionated;
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (const [origin, answer, status] of [[page, [page], 200], ['http://localhost:3000', ['http://localhost:3000'], 200], ['https://evil.example', [], 403], [null, [], 200], [page, [page], 200]]) {
      client.send('POST', path, origin ? { Origin: origin } : {}, chat());
      const r = await client.response();
      assert.equal(r.status, status, 'the backend sees only an origin that is not allowed');
      assert.deepEqual(allowed(r), answer);
      assert.ok(r.headers.all('vary').includes('Origin'), origin);
    }
  });

  test('a reload changes who is allowed from the next request on', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { cors_origins: page } });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    const ask = async () => {
      client.send('GET', '/v1/models', { Origin: page });
      return allowed(await client.response());
    };
    assert.deepEqual(await ask(), [page]);
    nexus.reload({ backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
    await until(async () => (await ask()).length === 0, 'the old origin forgotten');
  });
});
