// Every error of Nexus's own: its status, its shape, its words, and that nothing reached a backend that should not.
import { RawClient, answer_plainly, assert, assert_error, chat, get, group, pair, pending_is, post, request_bytes, seeded, sleep, start_backend, start_nexus, test, until, within } from './harness.mjs';

const path = '/v1/chat/completions';

const bad_bodies = [
  ['no body', ''],
  ['white space', '  \n'],
  ['no JSON', 'model=m1'],
  ['JSON cut short', '{"model":"m1"'],
  ['text behind the object', '{"model":"m1"} x'],
  ['two objects', '{"model":"m1"}{"model":"m1"}'],
  ['an array', '["m1"]'],
  ['a string', '"m1"'],
  ['null', 'null'],
  ['no model', '{"messages":[]}'],
  ['a nested model alone', '{"metadata":{"model":"m1"}}'],
  ['a model that is a number', '{"model":1}'],
  ['a model that is null', '{"model":null}'],
  ['an empty model', '{"model":""}'],
  ['a trailing comma', '{"model":"m1",}'],
  ['a comment', '{"model":"m1"/* */}'],
  ['single quotes', "{'model':'m1'}"],
  ['bytes that are no UTF-8', Buffer.from('{"model":"m1","x":"\xff\xfe"}', 'latin1')],
  ['a raw control byte in a string', '{"model":"m1","x":"a\u0001b"}'],
  ['deep nesting', `{"model":"m1","x":${'['.repeat(100_000)}${']'.repeat(100_000)}}`],
];

group('bad requests', () => {
  for (const [what, body] of bad_bodies) {
    test(`a body with ${what} is 400, nothing reaches a backend, and the connection goes on`, async (t) => {
      const { nexus, backend } = await pair(t);
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('POST', path, { 'Content-Type': 'application/json' }, body);
      assert_error(await client.response(), 400, 'invalid_request_error');
      client.send('POST', path, {}, chat());
      assert.equal((await client.response()).status, 200);
      assert.equal(backend.requests.length, 1);
    });
  }

  test('the 400 for a missing model names the field', async (t) => {
    const { nexus } = await pair(t);
    const error = assert_error(await post(nexus.port, path, '{"messages":[]}'), 400);
    assert.equal(error.param, 'model');
    assert.match(error.message, /model/);
  });

  test('bytes that are no HTTP are 400 and the connection closes', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const bytes of ['NONSENSE\r\n\r\n', 'GET / HTTP/x.0\r\nHost: x\r\n\r\n', 'POST /v1/chat/completions HTTP/1.1\r\n\r\n', 'POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n',
                         'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 'GET /health HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n']) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.write(bytes);
      assert_error(await client.response(), 400);
      await client.ended(3_000);
    }
    assert.equal(backend.requests.length, 0);
  });
});

group('models', () => {
  test('an unknown model is 404 model_not_found and the message lists what is there', async (t) => {
    const { nexus, backend } = await pair(t, { models: ['llama3:70b', 'qwen2:72b'] });
    for (const endpoint of [path, '/v1/completions', '/v1/embeddings']) {
      const error = assert_error(await post(nexus.port, endpoint, chat('gpt-5')), 404, 'model_not_found');
      for (const word of ['gpt-5', 'llama3:70b', 'qwen2:72b']) assert.ok(error.message.includes(word), error.message);
    }
    assert.equal(backend.requests.length, 0);
  });

  test('a model name with odd characters comes back escaped in the error', async (t) => {
    const { nexus } = await pair(t);
    const name = 'a"b\\c\n<é>';
    const error = assert_error(await post(nexus.port, path, JSON.stringify({ model: name })), 404, 'model_not_found');
    assert.ok(error.message.includes('<é>'), error.message);
  });

  test('a model name of a megabyte does not make an error of a megabyte', async (t) => {
    const { nexus } = await pair(t);
    const r = await post(nexus.port, path, JSON.stringify({ model: 'x'.repeat(1 << 20) }));
    assert.ok(r.status === 404 || r.status === 400);
    assert.ok(r.body.length < 10_000, `${r.body.length} bytes`);
  });
});

group('limits', () => {
  test('a head that does not end within header_timeout is 408 and the connection closes', async (t) => {
    // (Long beside what this process may be held by other tests between connecting and writing.)
    const { nexus } = await pair(t, {}, { server: { header_timeout: '1500ms' } });
    const started = performance.now();
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.write('POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Sl');
    assert_error(await client.response(5_000), 408);
    assert.ok(performance.now() - started > 1_400);
    await client.ended(2_000);
  });

  test('a head that trickles in is cut at the same limit, however lively it is', async (t) => {
    const { nexus } = await pair(t, {}, { server: { header_timeout: '1500ms' } });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.write('GET /health HTTP/1.1\r\n');
    const drip = setInterval(() => client.socket.writable && client.write('X-A: b\r\n'), 40);
    t.after(() => clearInterval(drip));
    assert_error(await client.response(5_000), 408);
    clearInterval(drip);
  });

  test('a body that does not come within body_timeout is 408', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { body_timeout: '300ms' } });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', path, { 'Content-Length': 100 });
    client.write('{"model"');
    assert_error(await client.response(5_000), 408);
    await client.ended(2_000);
    assert.equal(backend.requests.length, 0);
  });

  test('an idle kept-alive connection is closed after idle_timeout, without a word', async (t) => {
    const { nexus } = await pair(t, {}, { server: { idle_timeout: '300ms' } });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('GET', '/health');
    assert.equal((await client.response()).status, 200);
    assert.equal((await client.ended(5_000)).length, 0);
  });

  test('max_body: one byte below and at the limit pass, one above is 413, with a length and chunked', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { max_body: '4k' } });
    const body = (n) => { const s = JSON.stringify(chat('m1', { pad: '' })); return s.replace('"pad":""', `"pad":"${'x'.repeat(n - s.length)}"`); };
    let passed = 0;
    for (const chunked of [false, true]) {
      for (const n of [4095, 4096, 4097, 100_000]) {
        const client = await RawClient.connect(nexus.port);
        t.after(() => client.close());
        const bytes = Buffer.from(body(n));
        assert.equal(bytes.length, n);
        if (chunked) {
          client.send('POST', path, { 'Transfer-Encoding': 'chunked' });
          client.write(`${n.toString(16)}\r\n`);
          client.write(bytes);
          client.write('\r\n0\r\n\r\n');
        } else {
          client.send('POST', path, {}, bytes);
        }
        const r = await client.response();
        if (n <= 4096) {
          assert.equal(r.status, 200, `${n} bytes: ${r.text}`);
          passed++;
        } else {
          const error = assert_error(r, 413);
          assert.match(error.message, /max_body/, 'the message names the limit');
        }
      }
    }
    assert.equal(backend.requests.length, passed);
  });

  test('max_header: a head within it passes, one over it is 431 and the connection closes', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { max_header: '4k' } });
    assert.equal((await post(nexus.port, path, chat(), { headers: { 'X-Long': 'x'.repeat(3500) } })).status, 200);
    for (const headers of [{ 'X-Long': 'x'.repeat(5000) }, Object.fromEntries(Array.from({ length: 400 }, (_, i) => [`X-${i}`, 'yyyyyy']))]) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('POST', path, headers, chat());
      assert_error(await client.response(), 431);
      await client.ended(3_000);
    }
    assert.equal(backend.requests.length, 1);
  });

  test('an endless head is refused at the limit, not at its end', async (t) => {
    const { nexus } = await pair(t);
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.write('GET /health HTTP/1.1\r\nX-Endless: ' + 'x'.repeat(64 << 10));
    assert_error(await client.response(), 431);
  });

  test('bodies over body_memory together are 503 with Retry-After, and pass again when memory is given back', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { max_body: '1M', body_memory: '1500k' } });
    const pad = (n) => JSON.stringify(chat('m1', { pad: 'x'.repeat(n) }));
    const holder = await RawClient.connect(nexus.port);
    t.after(() => holder.close());
    holder.send('POST', path, { 'Content-Length': 1_000_000 });
    holder.write('{"model":"m1","x":"' + 'x'.repeat(950_000));
    await until(async () => (await post(nexus.port, path, pad(900_000))).status === 503, 'a second big body refused');
    const r = await post(nexus.port, path, pad(900_000));
    assert_error(r, 503, 'service_unavailable');
    assert.match(r.headers.get('retry-after'), /^\d+$/);
    assert.equal((await post(nexus.port, path, pad(1000))).status, 200, 'a small one still fits');
    holder.close();
    await until(async () => (await post(nexus.port, path, pad(900_000))).status === 200, 'memory given back');
    assert.ok(backend.requests.every((x) => x.body.length < 1_000_000));
  });

  test('many big bodies never take more memory than body_memory allows', { limit_ms: 60_000 }, async (t) => {
    const { nexus } = await pair(t, {}, { server: { max_body: '4M', body_memory: '16M' } });
    const before = nexus.rss_bytes();
    const body = Buffer.from(JSON.stringify(chat('m1', { pad: 'x'.repeat(3 << 20) })));
    const seen = await Promise.all(Array.from({ length: 40 }, async () => {
      const r = await post(nexus.port, path, body, { ms: 30_000 }).catch((error) => ({ status: error.message }));
      return r.status;
    }));
    assert.ok(seen.every((s) => s === 200 || s === 503), `${[...new Set(seen)]}`);
    assert.ok(seen.includes(200));
    const grown = nexus.rss_bytes() - before;
    assert.ok(grown < 200 << 20, `grew by ${grown >> 20} MB`);
  });

  test('over max_connections a client is not left without an answer or a close', async (t) => {
    const { nexus } = await pair(t, {}, { server: { max_connections: 8, threads: 1 } });
    const held = [];
    for (let i = 0; i < 8; i++) {
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      held.push(client);
      client.send('GET', '/health');
      assert.equal((await client.response()).status, 200);
    }
    const extra = await RawClient.connect(nexus.port);
    t.after(() => extra.close());
    extra.send('GET', '/health');
    const got = await extra.response().then((r) => r.status, () => 'closed');   // while all of the others are held
    assert.ok([503, 'closed'].includes(got), `${got}`);
    for (const client of held) {
      client.send('GET', '/health');
      assert.equal((await client.response()).status, 200, 'who is in is served on');
      client.close();
    }
    await until(async () => (await get(nexus.port, '/health')).status === 200, 'served again');
  });
});

group('backend failures', () => {
  test('a backend that refuses connections is 502 bad_gateway', async (t) => {
    const { nexus, backend } = await pair(t);
    await backend.stop();
    const r = await post(nexus.port, path, chat());
    assert_error(r, 502, 'bad_gateway');
    await pending_is(nexus, 0);
  });

  const lies = [
    ['resets before a byte', (reply) => reply.reset()],
    ['closes before a byte', (reply) => reply.fin()],
    ['closes within the head', (reply) => { reply.raw('HTTP/1.1 200 OK\r\nContent-Le'); reply.fin(); }],
    ['speaks no HTTP', (reply) => { reply.raw('SSH-2.0-OpenSSH_9.2\r\n'); reply.fin(); }],
    ['speaks HTTP/2', (reply) => { reply.raw('HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n'); }],
    ['sends a status of four digits', (reply) => { reply.raw('HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n'); }],
    ['sends two lengths', (reply) => { reply.raw('HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}'); }],
    ['sends a length and chunks', (reply) => { reply.raw('HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n'); }],
    ['sends a length that is no number', (reply) => { reply.raw('HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}'); }],
    ['folds a header', (reply) => { reply.raw('HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 2\r\n\r\n{}'); }],
    ['ends lines with a bare LF', (reply) => { reply.raw('HTTP/1.1 200 OK\nContent-Length: 2\n\n{}'); }],
    ['never ends its head', (reply) => { reply.raw('HTTP/1.1 200 OK\r\n'); for (let i = 0; i < 4000; i++) reply.raw(`X-${i}: ${'y'.repeat(50)}\r\n`); }],
    ['switches protocols', (reply) => { reply.raw('HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n'); }],
  ];
  for (const [what, lie] of lies) {
    test(`a backend that ${what} is 502, and its connection is thrown away`, async (t) => {
      const { nexus, backend } = await pair(t);
      backend.answer = (_, reply) => lie(reply);
      const client = await RawClient.connect(nexus.port);
      t.after(() => client.close());
      client.send('POST', path, {}, chat());
      assert_error(await client.response(), 502, 'bad_gateway');
      for (const r of backend.requests) await within(2_000, r.connection.ended, 'the backend connection closed');
      backend.answer = (_, reply) => reply.json({ fine: true });
      client.send('POST', path, {}, chat());
      assert.equal((await client.response()).status, 200, 'the client connection goes on');
      await pending_is(nexus, 0);
    });
  }

  test('a fresh connection that is reset is not tried for ever', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => reply.reset();
    assert_error(await post(nexus.port, path, chat()), 502, 'bad_gateway');
    assert.ok(backend.requests.length <= 3, `${backend.requests.length} tries`);
  });

  test('no first byte within first_byte_timeout is 504 gateway_timeout, and the backend connection is closed', async (t) => {
    const { nexus, backend } = await pair(t, {}, { upstream: { first_byte_timeout: '300ms' } });
    backend.answer = () => {};
    for (const stream of [false, true]) {
      const started = performance.now();
      const r = await post(nexus.port, path, chat('m1', { stream }));
      assert_error(r, 504, 'gateway_timeout');
      assert.ok(performance.now() - started >= 280);
      const { connection } = await backend.request(stream ? 2 : 1);
      await within(1_000, connection.ended, 'the backend connection closed');
    }
    await pending_is(nexus, 0);
  });

  test('an unhealthy backend is 503 service_unavailable with Retry-After, not 404, for a model that it had', async (t) => {
    const { nexus, backend } = await pair(t, {}, { health: { interval: '100ms', failures: 1 } });
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    await backend.stop();
    await until(async () => (await get(nexus.port, '/health')).json.status === 'unhealthy', 'unhealthy');
    const r = await post(nexus.port, path, chat());
    assert_error(r, 503, 'service_unavailable');
    assert.match(r.headers.get('retry-after'), /^\d+$/);
  });

  test('with a fixed list of models and a backend that never came up it is 503 too', async (t) => {
    const backend = await start_backend(t);
    await backend.stop();
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', url: backend.url, type: 'generic', models: 'm1' }], health: { failures: 1 } }, { ready: 'up' });
    await until(async () => (await get(nexus.port, '/health')).json.status === 'unhealthy', 'unhealthy');
    assert_error(await post(nexus.port, path, chat()), 503, 'service_unavailable');
  });

  test('a backend that answers before the body is sent whole is passed on, and its connection is not used again', async (t) => {
    const backend = await start_backend(t);
    const body = Buffer.from(JSON.stringify(chat('m1', { pad: 'x'.repeat(8 << 20) })));
    const accept = backend.accept.bind(backend);
    let early = 0;
    backend.accept = (socket) => {
      // Reads the head alone, answers 413, and lets the rest be.
      socket.once('data', (data) => {
        if (data.toString('latin1').startsWith('POST')) {
          early++;
          socket.removeAllListeners('data');
          socket.resume();
          socket.write('HTTP/1.1 413 Too Large\r\nContent-Length: 6\r\n\r\n"big!"');
        }
      });
      accept(socket);
    };
    const nexus = await start_nexus(t, { server: { threads: 1 }, backends: [{ name: 'b1', url: backend.url, type: 'generic' }] });
    for (let i = 1; i <= 2; i++) {
      const r = await post(nexus.port, path, body);
      assert.equal(r.status, 413);
      assert.equal(r.text, '"big!"');
      assert.equal(early, i, 'a fresh connection each');
    }
  });

  test('an answer that comes before the body is sent whole tells no wrong latency: the fast backend stays preferred', async (t) => {
    const fast = await start_backend(t);
    const slow = await start_backend(t, { answer: async (request, reply, self) => { await sleep(500); return answer_plainly(request, reply, self); } });
    const body = Buffer.from(JSON.stringify(chat('m1', { pad: 'x'.repeat(8 << 20) })));
    const accept = fast.accept.bind(fast);
    let early = 0;
    fast.accept = (socket) => {
      socket.prependOnceListener('data', (data) => {
        const length = Number(/content-length: (\d+)/i.exec(data.toString('latin1'))?.[1] ?? 0);
        if (length < 1 << 20) return;
        early++;
        socket.removeAllListeners('data');
        socket.resume();
        socket.write('HTTP/1.1 413 Too Large\r\nContent-Length: 6\r\n\r\n"big!"');
      });
      accept(socket);
    };
    const nexus = await start_nexus(t, {
      server: { threads: 1 },
      backends: [{ name: 'fast', url: fast.url, type: 'generic', models: 'm1' }, { name: 'slow', url: slow.url, type: 'generic', models: 'm1' }],
      routing: { strategy: 'smart', weight_priority: 0, weight_load: 0, weight_latency: 100 },
    });
    for (let i = 0; early === 0; i++) {
      assert.ok(i < 20, 'the fast backend gets a large request');
      await post(nexus.port, path, body);
    }
    let by_fast = 0;
    for (let i = 0; i < 20; i++) {
      const r = await post(nexus.port, path, chat());
      assert.equal(r.status, 200);
      if (r.headers.get('x-nexus-backend') === 'fast') by_fast++;
    }
    assert.ok(by_fast >= 15, `the fast backend served ${by_fast} of 20`);
  });
});

group('odd sequences', () => {
  test('a good request split at every place is served the same', async (t) => {
    const { nexus } = await pair(t);
    const bytes = request_bytes('POST', path, { 'Content-Type': 'application/json' }, { model: 'm1' });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (let at = 1; at < bytes.length; at += 3) {
      client.write(bytes.subarray(0, at));
      await sleep(1);
      client.write(bytes.subarray(at));
      assert.equal((await client.response()).status, 200, `split at ${at}`);
    }
  });

  test('random bytes on 200 connections: Nexus says 400 or closes, and goes on', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { header_timeout: '1s' } });
    const random = seeded(11);
    const words = ['GET ', 'POST ', '/v1/chat/completions', ' HTTP/1.1', '\r\n', '\n', '\r', 'Host: x', 'Content-Length: ', 'Transfer-Encoding: chunked', '0', '5', '\0', ':', ' ', '\t', '\xff', '{"model":"m1"}', 'x'.repeat(300)];
    await Promise.all(Array.from({ length: 200 }, async () => {
      const client = await RawClient.connect(nexus.port);
      client.write(Buffer.from(Array.from({ length: 3 + random.below(20) }, () => random.pick(words)).join(''), 'latin1'));
      if (random.below(2)) client.half_close();
      await client.ended(8_000).catch(() => {});
      client.close();
    }));
    assert.equal((await get(nexus.port, '/health')).status, 200);
    for (const r of backend.requests) assert.equal(r.method, 'POST');
  });
});
