// What passes through: bodies byte for byte, headers by the rules, connections kept.
import crypto from 'node:crypto';
import { Headers, RawClient, assert, assert_error, chat, chat_answer, chunked_bytes, get, group, pair, post, request, request_bytes, seeded, sse_events, start_backend, start_nexus,
         test, until } from './harness.mjs';

// name, body. The model is m1 in all of them.
const bodies = [
  ['the least', '{"model":"m1"}'],
  ['white space everywhere', ' \r\n\t{ "model" :\n\t"m1"  ,\r\n "messages" : [ ] }\n\n '],
  ['the model last', '{"messages":[{"role":"user","content":"x"}],"temperature":0.70,"model":"m1"}'],
  ['unknown fields', '{"x_unknown":{"deep":[1,2,{"y":null}]},"model":"m1","another":true}'],
  ['tool calls', JSON.stringify({ model: 'm1', messages: [{ role: 'assistant', tool_calls: [{ id: 'c1', type: 'function', function: { name: 'f', arguments: '{"a":"\\"q\\""}' } }] }, { role: 'tool', tool_call_id: 'c1', content: '42' }], tools: [{ type: 'function', function: { name: 'f', parameters: { type: 'object', properties: { model: { type: 'string' } } } } }], tool_choice: 'auto' })],
  ['escapes of every kind', '{"model":"m1","content":"\\u00e9\\ud83d\\ude00\\/\\b\\f\\n\\r\\t\\"\\\\ \\u0000"}'],
  ['a lone surrogate, escaped', '{"model":"m1","content":"\\ud83d!"}'],
  ['emoji and far planes', '{"model":"m1","content":"😀 𝕏 é 漢字 \u{10FFFF} \u200d\u202e"}'],
  ['numbers as they were written', '{"model":"m1","a":1.0,"b":1e2,"c":-0,"d":0.1000000000000000055511151231257827,"e":123456789012345678901234567890}'],
  ['a nested model', '{"metadata":{"model":"other"},"messages":[{"model":"third"}],"model":"m1"}'],
  ['an unknown key twice', '{"model":"m1","x":1,"x":2}'],
  ['a large image', JSON.stringify({ model: 'm1', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'data:image/png;base64,' + 'QUJD'.repeat(700_000) } }] }] })],
];

group('bodies', () => {
  for (const [name, text] of bodies) {
    test(`a request with ${name} reaches the backend byte for byte`, async (t) => {
      const { nexus, backend } = await pair(t);
      const body = Buffer.from(text);
      const r = await post(nexus.port, '/v1/chat/completions', body);
      assert.equal(r.status, 200, r.text);
      assert.ok(backend.requests[0].body.equals(body), `got ${backend.requests[0].body.toString().slice(0, 200)}`);
      assert.equal(backend.requests[0].path, '/v1/chat/completions');
    });

    test(`an alias changes nothing but the model value in a request with ${name}`, async (t) => {
      const { nexus, backend } = await pair(t, {}, { aliases: { 'gpt-4': 'm1' } });
      // The model's own value is the one at depth 1: in every row the last `"model"…"m1"`.
      const at = text.lastIndexOf('"m1"');
      const sent = Buffer.from(`${text.slice(0, at)}"gpt-4"${text.slice(at + 4)}`);
      const r = await post(nexus.port, '/v1/chat/completions', sent);
      assert.equal(r.status, 200, r.text);
      assert.ok(backend.requests[0].body.equals(Buffer.from(text)), `got ${backend.requests[0].body.toString().slice(0, 200)}`);
    });
  }

  test('a streaming request to a generic backend is left as it is too', async (t) => {
    const { nexus, backend } = await pair(t);
    const body = '{"stream" : true, "model":"m1", "messages":[]}';
    assert.equal((await post(nexus.port, '/v1/chat/completions', body)).status, 200);
    assert.equal(backend.requests[0].body.toString(), body);
  });

  test('all three proxied endpoints reach the backend under their own path', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const path of ['/v1/chat/completions', '/v1/completions', '/v1/embeddings']) {
      const r = await post(nexus.port, path, { model: 'm1', input: 'x', prompt: 'x' });
      assert.equal(r.status, 200);
      assert.equal(backend.requests.at(-1).path, path);
    }
  });

  test('the path of a backend url goes before the endpoint', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', url: `${backend.url}/some/prefix/`, type: 'generic' }] });
    assert.equal(backend.probes[0].path, '/some/prefix/v1/models');
    assert.equal((await post(nexus.port, '/v1/chat/completions', chat())).status, 200);
    assert.equal(backend.requests[0].path, '/some/prefix/v1/chat/completions');
  });

  test('a chunked request arrives whole, however it was cut', async (t) => {
    const { nexus, backend } = await pair(t);
    const body = Buffer.from(JSON.stringify(chat('m1', { text: 'é'.repeat(3000) })));
    const rows = [[[1], {}], [[7, 1, 300], {}], [[100_000], {}], [[64], { extension: ';a=b' }], [[512], { trailers: 'X-Late: yes\r\n' }]];
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (const [sizes, options] of rows) {
      client.send('POST', '/v1/chat/completions', { 'Transfer-Encoding': 'chunked', 'Content-Type': 'application/json' });
      client.write(chunked_bytes(body, sizes, options));
      assert.equal((await client.response()).status, 200);
      const got = backend.requests.at(-1);
      assert.ok(got.body.equals(body), 'the body');
      assert.ok(!got.headers.has('x-late'), 'a trailer never becomes a header');
      assert.equal(got.headers.all('transfer-encoding').length + got.headers.all('content-length').length, 1);
    }
  });

  test('a request sent byte by byte is served like one sent whole', async (t) => {
    const { nexus, backend } = await pair(t);
    const bytes = request_bytes('POST', '/v1/chat/completions', { 'X-Mark': 'slow' }, chat());
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (const byte of bytes) {
      client.write(Buffer.from([byte]));
      await new Promise((done) => setImmediate(done));
    }
    assert.equal((await client.response()).status, 200);
    assert.equal(backend.requests[0].headers.get('x-mark'), 'slow');
  });

  test('a status and body of the backend come back unchanged', async (t) => {
    const { nexus, backend } = await pair(t);
    const odd = Buffer.concat([Buffer.from('{"odd": "'), Buffer.from([0xff, 0xfe, 0x80]), Buffer.from('"}\n\n')]);
    for (const [status, type, body] of [[200, 'application/json', odd], [201, 'application/json', '{}'], [400, 'application/json', '{"error":{"message":"context too long","code":"context_length_exceeded"}}'],
                                        [401, 'text/plain', 'no'], [404, 'text/html', '<h1>gone</h1>'], [418, 'application/x-tea', Buffer.from([0, 1, 2])], [422, 'application/json', '[]'],
                                        [500, 'application/json', '{"error":"boom"}'], [200, 'application/json', '']]) {
      backend.answer = (_, reply) => reply.body(status, body, { 'Content-Type': type });
      const r = await post(nexus.port, '/v1/chat/completions', chat());
      assert.equal(r.status, status);
      assert.ok(r.body.equals(Buffer.from(body)), r.text);
      assert.equal(r.headers.get('content-type'), type);
      assert.ok(r.complete);
    }
  });

  test('a large answer comes back byte for byte', async (t) => {
    const { nexus, backend } = await pair(t);
    const random = seeded(3);
    const body = crypto.randomBytes(3_000_000);
    for (const how of ['length', 'chunked', 'close']) {
      backend.answer = async (_, reply) => {
        if (how === 'length') return reply.body(200, body);
        reply.head(200, how === 'chunked' ? { 'Transfer-Encoding': 'chunked' } : {});
        for (let at = 0; at < body.length;) {
          const piece = body.subarray(at, at + 1 + random.below(90_000));
          how === 'chunked' ? reply.piece(piece) : reply.raw(piece);
          at += piece.length;
        }
        how === 'chunked' ? reply.finish() : reply.fin();
      };
      const r = await post(nexus.port, '/v1/chat/completions', chat());
      assert.equal(r.status, 200);
      assert.ok(r.complete, `${how}: whole`);
      assert.ok(r.body.equals(body), `${how}: ${r.body.length} bytes of ${body.length}`);
      if (how === 'length') assert.equal(r.how, 'length');
    }
  });

  test('informational answers of a backend do not stand for the final one', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => {
      reply.raw('HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n');
      reply.json(chat_answer('m1'));
    };
    const r = await post(nexus.port, '/v1/chat/completions', chat());
    assert.equal(r.status, 200);
    assert.equal(r.json.choices[0].message.content, 'Hello there.');
    assert.ok(!r.headers.has('link'));
  });

  test('an answer without a body (204) is passed on as one', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => reply.head(204, { 'X-Empty': 'yes' });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (let i = 0; i < 2; i++) {
      client.send('POST', '/v1/chat/completions', {}, chat());
      const r = await client.response();
      assert.equal(r.status, 204);
      assert.equal(r.headers.get('x-empty'), 'yes');
    }
  });
});

group('headers', () => {
  test('end-to-end headers of a request pass, in any number, and hop-by-hop ones do not', async (t) => {
    const { nexus, backend } = await pair(t);
    await request(nexus.port, 'POST', '/v1/chat/completions', {
      headers: [['Content-Type', 'application/json; charset=utf-8'], ['X-Custom', 'one'], ['X-Custom', 'two'], ['OpenAI-Organization', 'org-1'], ['User-Agent', 'test/1'], ['X-Empty', ''],
                ['Cookie', 'a=b; c=d'], ['Connection', 'keep-alive, X-Hop'], ['X-Hop', 'gone'], ['Keep-Alive', 'timeout=5'], ['TE', 'trailers'], ['Proxy-Authorization', 'Basic x'],
                ['Proxy-Connection', 'keep-alive'], ['Upgrade', 'websocket']],
      body: chat(),
    });
    const got = backend.requests[0].headers;
    assert.deepEqual(got.get('x-custom'), 'one, two');
    assert.equal(got.get('openai-organization'), 'org-1');
    assert.equal(got.get('user-agent'), 'test/1');
    assert.equal(got.get('cookie'), 'a=b; c=d');
    assert.equal(got.get('content-type'), 'application/json; charset=utf-8');
    assert.equal(got.get('host'), `127.0.0.1:${backend.port}`);
    for (const name of ['x-hop', 'keep-alive', 'te', 'proxy-authorization', 'proxy-connection', 'upgrade', 'expect', 'trailer']) assert.ok(!got.has(name), `${name} reached the backend`);
    assert.ok(!/x-hop/i.test(got.get('connection')));
  });

  test('Connection cannot make Nexus drop a header that matters', async (t) => {
    const { nexus, backend } = await pair(t);
    const r = await request(nexus.port, 'POST', '/v1/chat/completions', {
      headers: { Connection: 'close, Authorization, X-Request-Id, Content-Length, Content-Type, Host', Authorization: 'Bearer mine', 'X-Request-Id': 'keep-me', 'Content-Type': 'application/json' }, body: chat(),
    });
    assert.equal(r.status, 200);
    assert.equal(r.headers.get('x-request-id'), 'keep-me');
    assert.equal(backend.requests[0].headers.get('authorization'), 'Bearer mine');
    assert.equal(backend.requests[0].headers.get('content-type'), 'application/json');
  });

  test('end-to-end headers of a response pass in order and number, hop-by-hop ones and those that Connection names do not', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => reply.body(200, '{}', [['Content-Type', 'application/json'], ['Set-Cookie', 'a=1'], ['X-Ratelimit-Remaining-Requests', '59'], ['Set-Cookie', 'b=2'], ['openai-processing-ms', '12'],
      ['Server', 'uvicorn'], ['Date', 'Mon, 01 Jan 2024 00:00:00 GMT'], ['Connection', 'keep-alive, X-Hop-Only'], ['X-Hop-Only', 'x'], ['Keep-Alive', 'timeout=5'], ['Proxy-Connection', 'keep-alive'],
      ['Upgrade', 'h2c'], ['X-Odd', 'tab\there  and spaces'], ['X-Empty', '']]);
    const { headers, status } = await post(nexus.port, '/v1/chat/completions', chat());
    assert.equal(status, 200);
    assert.deepEqual(headers.all('set-cookie'), ['a=1', 'b=2']);
    assert.equal(headers.get('x-ratelimit-remaining-requests'), '59');
    assert.equal(headers.get('openai-processing-ms'), '12');
    assert.deepEqual(headers.all('server'), ['uvicorn']);
    assert.deepEqual(headers.all('date'), ['Mon, 01 Jan 2024 00:00:00 GMT']);
    assert.equal(headers.get('x-odd'), 'tab\there  and spaces');
    assert.deepEqual(headers.all('x-empty'), ['']);
    for (const name of ['x-hop-only', 'keep-alive', 'proxy-connection', 'upgrade']) assert.ok(!headers.has(name), `${name} came through`);
    assert.deepEqual(headers.all('content-length'), ['2']);
  });

  test('a response names its backend, and a request id is taken over or made', async (t) => {
    const { nexus, backend } = await pair(t);
    const mine = await post(nexus.port, '/v1/chat/completions', chat(), { headers: { 'X-Request-Id': 'req_abc-123.~' } });
    assert.equal(mine.headers.get('x-nexus-backend'), 'b1');
    assert.deepEqual(mine.headers.all('x-request-id'), ['req_abc-123.~']);
    assert.equal(backend.requests[0].headers.get('x-request-id'), 'req_abc-123.~');
    const ids = new Set();
    for (let i = 0; i < 20; i++) {
      const r = await post(nexus.port, '/v1/chat/completions', chat());
      assert.match(r.headers.get('x-request-id'), /^[\w-]{8,128}$/);
      ids.add(r.headers.get('x-request-id'));
    }
    assert.equal(ids.size, 20);
  });

  test('a backend cannot speak for Nexus: its own X-Nexus-Backend and X-Request-Id do not double', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => reply.json({}, 200, { 'X-Nexus-Backend': 'liar', 'X-Request-Id': 'backend-1' });
    const r = await post(nexus.port, '/v1/chat/completions', chat(), { headers: { 'X-Request-Id': 'client-1' } });
    assert.deepEqual(r.headers.all('x-nexus-backend'), ['b1']);
    assert.deepEqual(r.headers.all('x-request-id'), ['client-1']);
  });

  test('a name with an underscore never stands beside its dashed twin', async (t) => {
    const { nexus, backend } = await pair(t);
    const r = await post(nexus.port, '/v1/chat/completions', chat(), { headers: { X_Request_Id: 'evil', Content_Length: '5' } });
    assert.ok(r.status === 200 || r.status === 400, `status ${r.status}`);
    if (r.status === 200) {
      assert.notEqual(r.headers.get('x-request-id'), 'evil');
      assert.ok(!backend.requests[0].headers.has('x_request_id') && !backend.requests[0].headers.has('content_length'));
    }
  });
});

group('connections', () => {
  test('Expect: 100-continue gets its 100 before the body is sent', async (t) => {
    const { nexus, backend } = await pair(t);
    const body = JSON.stringify(chat());
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (const framing of ['length', 'chunked']) {
      client.send('POST', '/v1/chat/completions', framing === 'length' ? { Expect: '100-continue', 'Content-Length': body.length } : { Expect: '100-Continue', 'Transfer-Encoding': 'chunked' });
      const go = await client.any_head(3_000);
      assert.equal(go.status, 100);
      client.write(framing === 'length' ? body : chunked_bytes(Buffer.from(body), [10]));
      assert.equal((await client.response()).status, 200);
      assert.ok(!backend.requests.at(-1).headers.has('expect'));
    }
  });

  test('with Expect: 100-continue a refusal comes in place of the 100', async (t) => {
    const { nexus } = await pair(t, {}, { server: { max_body: '1k' } });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', '/v1/chat/completions', { Expect: '100-continue', 'Content-Length': 5000 });
    const r = await client.response();
    assert.equal(r.informational.length, 0);
    assert_error(r, 413);
  });

  test('an expectation that is not 100-continue is 417', async (t) => {
    const { nexus, backend } = await pair(t);
    assert_error(await post(nexus.port, '/v1/chat/completions', chat(), { headers: { Expect: 'a-pony' } }), 417);
    assert.equal(backend.requests.length, 0);
  });

  test('100 requests on one connection use few connections to the backend', async (t) => {
    const { nexus, backend } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    const before = backend.connections.length;
    for (let i = 0; i < 100; i++) {
      client.send('POST', '/v1/chat/completions', {}, chat('m1', { n: i }));
      const r = await client.response();
      assert.equal(r.status, 200);
    }
    assert.equal(backend.requests.length, 100);
    assert.ok(backend.connections.length - before <= 2, `${backend.connections.length - before} connections`);
  });

  test('pipelined requests are answered in their order, the slow one first', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (request, reply) => {
      if (request.json.n === 0) await reply.wait(150);
      reply.json({ n: request.json.n });
    };
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    const all = [];
    for (let n = 0; n < 12; n++) {
      if (n === 5) all.push(request_bytes('GET', '/v1/models'));
      all.push(request_bytes('POST', '/v1/chat/completions', {}, chat('m1', { n })));
    }
    client.write(Buffer.concat(all));
    client.method = 'POST';
    const seen = [];
    for (let i = 0; i < 13; i++) {
      const r = await client.response();
      assert.equal(r.status, 200);
      seen.push(r.json.n ?? 'models');
    }
    assert.deepEqual(seen, [0, 1, 2, 3, 4, 'models', 5, 6, 7, 8, 9, 10, 11]);
  });

  test('a pipelined good request is answered before the bad one behind it is refused', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (_, reply) => { await reply.wait(50); reply.json({ good: true }); };
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.write(Buffer.concat([request_bytes('POST', '/v1/chat/completions', {}, chat()), Buffer.from('GARBAGE\x00 nonsense\r\n\r\n')]));
    const first = await client.response();
    assert.equal(first.status, 200);
    assert.equal(first.json.good, true);
    assert_error(await client.response(), 400);
    assert.equal((await client.ended()).length, 0);
  });

  test('an HTTP/1.0 client gets an unchunked answer and the connection closes', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const stream of [false, true]) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.write(request_bytes('POST', '/v1/chat/completions', {}, chat('m1', { stream }), '1.0'));
      const r = await client.response();
      assert.equal(r.status, 200);
      assert.ok(r.how === 'close' || r.how === 'length', r.how);
      assert.ok(r.complete);
      assert.ok(r.text.length > 50);
      if (stream) assert.equal(sse_events(r.text).data.at(-1), '[DONE]');
      assert.equal((await client.ended(3_000)).length, 0);
    }
    assert.equal(backend.requests.length, 2);
  });

  test('HTTP/1.0 with keep-alive is served again where the length is known', async (t) => {
    const { nexus } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (let i = 0; i < 2; i++) {
      client.write(request_bytes('POST', '/v1/chat/completions', { Connection: 'keep-alive' }, chat(), '1.0'));
      const r = await client.response();
      assert.equal(r.status, 200);
      assert.equal(r.how, 'length');
      if (!/keep-alive/i.test(r.headers.get('connection'))) {
        await client.ended(3_000);   // allowed: it says nothing, so it closes
        break;
      }
    }
  });

  test('Connection: close closes after the answer', async (t) => {
    const { nexus } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', '/v1/chat/completions', { Connection: 'close' }, chat());
    const r = await client.response();
    assert.equal(r.status, 200);
    assert.match(r.headers.get('connection'), /close/i);
    await client.ended(2_000);
  });

  test('the body of a refused request is never read as the next request', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { max_body: '2k' } });
    const smuggled = request_bytes('POST', '/v1/chat/completions', { 'X-Smuggled': 'yes' }, chat());
    for (const [path, body] of [['/nowhere', smuggled], ['/v1/chat/completions', Buffer.concat([smuggled, Buffer.alloc(4000, 0x20)])], ['/v1/models', smuggled]]) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('POST', path, {}, body);
      const r = await client.response();
      assert.ok(r.status >= 400, `status ${r.status}`);
      client.send('GET', '/health');
      const next = await client.response().catch(() => null);
      if (next) assert.equal(next.status, 200, `the answer behind it: ${next.text}`);
    }
    assert.equal(backend.requests.length, 0);
  });

  test('a kept-alive connection that the backend closes under a request is replaced unseen', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    backend.answer = (request, reply) => {
      if (request.number_on_connection > 0) return request.connection.number % 2 ? reply.reset() : reply.close();
      reply.json({ connection: request.connection.number });
    };
    const seen = new Set();
    for (let i = 0; i < 10; i++) {
      const r = await post(nexus.port, '/v1/chat/completions', chat('m1', { stream: i % 3 === 0 }));
      assert.equal(r.status, 200, `request ${i}: ${r.text}`);
      seen.add(r.json.connection);
    }
    assert.ok(backend.requests.length > 10, 'some requests met a closing connection');
  });

  test('a connection that the backend closed while idle is not used', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    backend.answer = (request, reply) => { reply.json({}); setTimeout(() => reply.fin(), 20); };
    for (let i = 0; i < 5; i++) {
      assert.equal((await post(nexus.port, '/v1/chat/completions', chat())).status, 200);
      await until(() => backend.connections.filter((c) => c.requests).every((c) => c.ended_at), 'the connection closed');
    }
    assert.equal(backend.requests.length, 5);
  });

  test('a connection that answers Connection: close is not used again', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    backend.answer = (_, reply) => reply.json({}, 200, { Connection: 'close' });
    for (let i = 0; i < 3; i++) assert.equal((await post(nexus.port, '/v1/chat/completions', chat())).status, 200);
    for (const r of backend.requests) assert.equal(r.number_on_connection, backend.requests[0].number_on_connection);
    await until(() => backend.requests.every((r) => r.connection.ended_at), 'Nexus closes them');
  });

  test('a connection with bytes behind its answer is thrown away', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    backend.answer = (_, reply) => reply.raw('HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n"evil"');
    for (let i = 0; i < 4; i++) {
      const r = await post(nexus.port, '/v1/chat/completions', chat());
      assert.equal(r.text, '{}');
    }
    for (const r of backend.requests) assert.equal(r.connection.requests, 1);
  });

  test('requests go to the backends of a model in turn', async (t) => {
    const backends = [await start_backend(t), await start_backend(t), await start_backend(t)];
    const nexus = await start_nexus(t, { server: { threads: 1 }, routing: { strategy: 'round_robin' }, backends: backends.map((mock, i) => ({ name: `b${i}`, mock })) });
    for (let i = 0; i < 30; i++) assert.equal((await post(nexus.port, '/v1/chat/completions', chat())).status, 200);
    assert.deepEqual(backends.map((b) => b.requests.length), [10, 10, 10]);
  });
});

group('aliases', () => {
  test('an alias is followed, and the model list does not suffer', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['llama3:70b'] }, { aliases: { 'gpt-4': 'llama3:70b' } });
    const r = await post(nexus.port, '/v1/chat/completions', chat('gpt-4'));
    assert.equal(r.status, 200);
    assert.equal(backend.requests[0].json.model, 'llama3:70b');
    assert.deepEqual(new Headers(backend.requests[0].headers.list).all('content-length'), [String(backend.requests[0].body.length)]);
    assert.ok((await get(nexus.port, '/v1/models')).json.data.some((m) => m.id === 'llama3:70b'));
  });

  test('an alias to a model that nobody has is model_not_found', async (t) => {
    const { nexus } = await pair(t, {}, { aliases: { 'gpt-4': 'nothing' } });
    assert_error(await post(nexus.port, '/v1/chat/completions', chat('gpt-4')), 404, 'model_not_found');
  });

  test('an alias whose new name needs escaping is written as JSON', async (t) => {
    const name = 'odd "quoted" \\ name é';
    const { nexus, backend } = await pair(t, { models: [name] }, { aliases: { plain: name } });
    const r = await post(nexus.port, '/v1/chat/completions', '{"model":"plain","x":1}');
    assert.equal(r.status, 200, r.text);
    assert.equal(backend.requests[0].json.model, name);
    assert.equal(backend.requests[0].json.x, 1);
  });
});

