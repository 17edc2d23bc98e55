// Streams: pieces at once, cuts made visible, clients that leave, clients that are slow.
import { RawClient, assert, chat, chat_chunk, get, group, median, pair, parse_metrics, pending, pending_is, post, settings, sleep, sse, sse_events, start_backend, start_nexus, test, until, within } from './harness.mjs';

const path = '/v1/chat/completions';
const streaming = chat('m1', { stream: true });

// A backend whose pieces the test hands out one at a time.
function stepped(backend, headers) {
  const steps = { reply: null };
  steps.begun = new Promise((done) => {
    backend.answer = (_, reply) => {
      steps.reply = reply;
      reply.stream(headers);
      done();
    };
  });
  return steps;
}

async function begin(t, nexus, body = streaming) {
  const client = await RawClient.connect(nexus.port);
  t.after(() => client.close());
  client.send('POST', path, { 'Content-Type': 'application/json' }, body);
  return client;
}

// Reads until `wanted` more body bytes came; returns them.
async function take(client, wanted) {
  const parts = [];
  for (let n = 0; n < wanted;) {
    const piece = await client.piece(5_000);
    assert.ok(piece, 'the stream goes on');
    parts.push(piece);
    n += piece.length;
  }
  return Buffer.concat(parts);
}

group('streams', () => {
  test('each piece leaves the moment it arrives, whatever its size: the next is sent only when the client has the last', async (t) => {
    const { nexus, backend } = await pair(t);
    const steps = stepped(backend);
    const client = await begin(t, nexus);
    await steps.begun;
    const head = await client.head();   // the head alone comes through, before any piece
    assert.equal(head.status, 200);
    assert.match(head.headers.get('content-type'), /^text\/event-stream/);
    const event = sse(chat_chunk('m1', 'é'));
    const pieces = [event, 'd', 'ata', ': {"cut', '":"here"}\n', '\n', ': a comment\n\n', sse(chat_chunk('m1', 'x'.repeat(100_000))), '\n', 'data: [DONE]\n\n'];
    for (const piece of pieces) {
      steps.reply.piece(piece);
      assert.equal((await take(client, Buffer.byteLength(piece))).toString(), piece);
    }
    steps.reply.finish();
    assert.equal(await client.piece(), null);
    assert.ok(client.body.done, 'the final chunk came');
  });

  test('small pieces are not held back by Nagle: 100 turns of ping-pong in well under 40 ms each', async (t) => {
    const { nexus, backend } = await pair(t);
    const steps = stepped(backend);
    const client = await begin(t, nexus);
    await steps.begun;
    await client.head();
    const times = [];
    for (let i = 0; i < 100; i++) {
      const start = performance.now();
      steps.reply.piece('data: x\n\n');
      await take(client, 9);
      times.push(performance.now() - start);
    }
    steps.reply.finish();
    assert.ok(median(times) < 20 * settings.slow, `median ${median(times)} ms`);
  });

  test('a stream comes back byte for byte when a backend cuts it anywhere', async (t) => {
    const { nexus, backend } = await pair(t);
    const text = Buffer.from(sse(chat_chunk('m1', 'Grüße 😀')) + ': ping\r\n\r\n' + 'event: x\ndata: a\ndata: b\n\n' + sse(chat_chunk('m1', null)) + sse('[DONE]'));
    for (const size of [1, 2, 3, 7, 64, 10_000]) {
      backend.answer = (_, reply) => {
        reply.stream();
        for (let at = 0; at < text.length; at += size) reply.piece(text.subarray(at, at + size));
        reply.finish();
      };
      const r = await post(nexus.port, path, streaming);
      assert.ok(r.complete);
      assert.equal(r.how, 'chunked');
      assert.ok(r.body.equals(text), `pieces of ${size}`);
    }
  });

  test('chunk framing of the backend may be split at any byte', async (t) => {
    const { nexus, backend } = await pair(t);
    const body = sse(chat_chunk('m1', 'word')) + sse('[DONE]');
    const wire = Buffer.from(`HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n${Buffer.byteLength(body).toString(16)};ext=1\r\n${body}\r\n0\r\nX-Trailer: t\r\n\r\n`);
    for (let at = 1; at < wire.length; at += 5) {
      backend.answer = async (_, reply) => {
        reply.raw(wire.subarray(0, at));
        await sleep(1);
        reply.raw(wire.subarray(at));
      };
      const r = await post(nexus.port, path, streaming);
      assert.ok(r.complete, `split at ${at}`);
      assert.equal(r.text, body, `split at ${at}`);
    }
  });

  test('a stream that only the end of the connection ends comes through as a whole one', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => {
      reply.head(200, { 'Content-Type': 'text/event-stream' });
      reply.raw(sse('one') + sse('[DONE]'));
      reply.fin();
    };
    const r = await post(nexus.port, path, streaming);
    assert.equal(r.text, sse('one') + sse('[DONE]'));
    assert.ok(r.complete);
  });
});

// How a backend breaks a stream after its 200 and the first event.
const breaks = [
  ['resets', (reply) => reply.reset()],
  ['closes without the final chunk', (reply) => reply.close()],
  ['ends in the middle of a chunk', (reply) => { reply.raw('400\r\ndata: {"cut"'); reply.fin(); }],
  ['ends in the middle of an event', (reply) => { reply.piece('data: {"half'); reply.fin(); }],
  ['ends behind the first line of an event', (reply) => { reply.piece('data: {"half":1}\n'); reply.fin(); }],
  ['sends a chunk that is none', (reply) => { reply.raw('zz\r\nboo\r\n'); }],
];

group('broken answers', () => {
  for (const [what, break_it] of breaks) {
    test(`a backend that ${what} is shown as an SSE error event, then a cut without final chunk or [DONE]`, async (t) => {
      const { nexus, backend } = await pair(t);
      const steps = stepped(backend);
      const client = await begin(t, nexus);
      await steps.begun;
      await client.head();
      const first = sse(chat_chunk('m1', 'one'));
      steps.reply.piece(first);
      let text = (await take(client, first.length)).toString();
      break_it(steps.reply);
      for (let p = await client.piece(); p !== null; p = await client.piece()) text += p;
      assert.equal(client.body.done, false, 'no final chunk');
      const { data, events, rest } = sse_events(text);
      assert.equal(rest, '', `it ends with a whole event: ${text}`);
      assert.equal(`${events[0]}\n\n`, first);
      assert.ok(!data.includes('[DONE]'));
      const { error } = JSON.parse(data.at(-1));
      assert.equal(typeof error.message, 'string');
      assert.equal(typeof error.type, 'string');
      assert.deepEqual(Object.keys(error).sort(), ['code', 'message', 'param', 'type']);
      await pending_is(nexus, 0);
    });
  }

  test('a body with Content-Length that breaks off is simply cut short', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const end of ['reset', 'fin', 'close']) {
      backend.answer = async (_, reply) => {
        reply.head(200, { 'Content-Type': 'application/json', 'Content-Length': 1000 });
        reply.raw('{"half": "');
        await sleep(30);
        reply[end]();
      };
      const r = await post(nexus.port, path, chat());
      assert.equal(r.status, 200);
      assert.equal(r.headers.get('content-length'), '1000');
      assert.equal(r.complete, false);
      assert.equal(r.text, '{"half": "', end);
    }
  });

  test('a chunked body that is no SSE and breaks off is cut without the final chunk', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = async (_, reply) => {
      reply.head(200, { 'Content-Type': 'application/json', 'Transfer-Encoding': 'chunked' });
      reply.piece('{"half": "');
      await sleep(30);
      reply.reset();
    };
    const r = await post(nexus.port, path, chat());
    assert.equal(r.complete, false);
    assert.equal(r.text, '{"half": "');
  });

  test('a stream that stalls longer than stall_timeout is shown as broken', async (t) => {
    const { nexus, backend } = await pair(t, {}, { upstream: { stall_timeout: '300ms' } });
    const steps = stepped(backend);
    const client = await begin(t, nexus);
    await steps.begun;
    steps.reply.piece('data: one\n\n');
    const r = await client.response();
    assert.equal(r.complete, false);
    const { data } = sse_events(r.text);
    assert.equal(data[0], 'one');
    assert.equal(typeof JSON.parse(data.at(-1)).error.message, 'string');
    await within(1_000, steps.reply.request.connection.ended, 'the backend connection closed');
    await pending_is(nexus, 0);
  });

  test('a stream longer than request_timeout is cut, one that keeps within it is not', async (t) => {
    const { nexus, backend } = await pair(t, {}, { upstream: { request_timeout: '500ms' } });
    backend.answer = async (request, reply) => {
      reply.stream();
      for (let i = 0; i < request.json.pieces && !reply.gone; i++) {
        reply.piece('data: x\n\n');
        await sleep(50);
      }
      reply.finish();
    };
    const short = await post(nexus.port, path, { ...streaming, pieces: 2 });
    assert.ok(short.complete);
    const long = await post(nexus.port, path, { ...streaming, pieces: 40 });
    assert.equal(long.complete, false);
    assert.match(long.text, /"error"/);
  });
});

// How a client leaves.
const leavings = [['closes', (c) => c.close()], ['resets', (c) => c.reset()], ['sends its FIN', (c) => c.half_close()]];

group('a client that leaves', () => {
  for (const [how, leave] of leavings) {
    test(`while waiting for the first byte (${how}): the backend connection is closed within 100 ms`, async (t) => {
      const { nexus, backend } = await pair(t);
      backend.answer = () => {};
      const times = [];
      for (let i = 1; i <= 5; i++) {
        const client = await begin(t, nexus, i % 2 ? streaming : chat());
        const { connection } = await backend.request(i);
        await sleep(10);
        const left = performance.now();
        leave(client);
        await within(3_000, connection.ended, 'the backend connection closed');
        times.push(connection.ended_at - left);
      }
      assert.ok(median(times) < 100 * settings.slow, `${times.map(Math.round)} ms`);
      await pending_is(nexus, 0);
    });

    test(`in the middle of a stream (${how}): the backend connection is closed within 100 ms`, async (t) => {
      const { nexus, backend } = await pair(t);
      backend.answer = (_, reply) => {
        reply.stream();
        reply.piece('data: one\n\n');
      };
      const times = [];
      for (let i = 1; i <= 5; i++) {
        const client = await begin(t, nexus);
        const { connection } = await backend.request(i);
        await client.head();
        await client.piece();
        const left = performance.now();
        leave(client);
        await within(3_000, connection.ended, 'the backend connection closed');
        times.push(connection.ended_at - left);
      }
      assert.ok(median(times) < 100 * settings.slow, `${times.map(Math.round)} ms`);
      await pending_is(nexus, 0);
    });
  }

  test('in the middle of its own body: nothing reaches a backend and nothing stays counted', async (t) => {
    const { nexus, backend } = await pair(t);
    for (const [, leave] of leavings) {
      const client = await RawClient.connect(nexus.port);
      client.send('POST', path, { 'Content-Length': 5000 });
      client.write('{"model":"m1"');
      await sleep(30);
      leave(client);
      t.after(() => client.close());
    }
    await sleep(100);
    assert.equal(backend.requests.length, 0);
    await pending_is(nexus, 0);
  });

  test('in the middle of a plain answer: the backend connection is closed', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (_, reply) => {
      reply.head(200, { 'Content-Length': 100_000 });
      reply.raw('x'.repeat(1000));
    };
    const client = await begin(t, nexus, chat());
    const { connection } = await backend.request();
    await client.head();
    await client.piece();
    client.close();
    await within(1_000, connection.ended, 'the backend connection closed');
    await pending_is(nexus, 0);
  });

  test('behind a pipelined pair: the running one ends and the waiting one is never sent', async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = () => {};
    const client = await RawClient.connect(nexus.port);
    client.send('POST', path, {}, chat());
    client.send('POST', path, {}, chat());
    const { connection } = await backend.request(1);
    client.close();
    await within(1_000, connection.ended, 'the backend connection closed');
    await sleep(50);
    assert.equal(backend.requests.length, 1);
    await pending_is(nexus, 0);
  });

  test('pending counts go up while a request is under way', async (t) => {
    const { nexus, backend } = await pair(t);
    if ((await pending(nexus)) === null) t.skip('/metrics is not there');
    backend.answer = () => {};
    const clients = [await begin(t, nexus), await begin(t, nexus)];
    await backend.request(2);
    await pending_is(nexus, 2);
    clients[0].close();
    await pending_is(nexus, 1);
    clients[1].close();
    await pending_is(nexus, 0);
  });
});

group('a slow client', () => {
  test('makes Nexus stop reading from the backend, in bounded memory, and still gets every byte', { limit_ms: 60_000 }, async (t) => {
    const { nexus, backend } = await pair(t);
    const total = settings.sanitised ? 40 << 20 : 200 << 20;
    const block = Buffer.alloc(1 << 20);
    for (let i = 0; i < block.length; i++) block[i] = (i * 7 + (i >> 8)) & 0xff;
    let sent = 0;
    backend.answer = async (_, reply) => {
      reply.head(200, { 'Content-Type': 'application/octet-stream', 'Content-Length': total });
      while (sent < total && !reply.gone) {
        reply.raw(block);
        sent += block.length;
        await reply.drained();
      }
    };
    const before = nexus.rss_bytes();
    const client = await RawClient.connect(nexus.port, { pause: true });
    t.after(() => client.close());
    client.send('POST', path, {}, chat());
    let last = -1;
    await until(() => { const still = last === sent && sent > 0; last = sent; return still ? sleep(300).then(() => sent === last) : false; }, 'the backend held back', 10_000);
    // What fits into the socket buffers of two connections may have gone; loopback grows them to some megabytes each.
    assert.ok(sent < 40 << 20 && sent < total, `${sent >> 20} MB went out to a client that reads nothing`);
    const grown = nexus.rss_bytes() - before;
    assert.ok(grown < (settings.sanitised ? 64 : 8) << 20, `memory grew by ${grown >> 10} kB`);
    client.resume();
    const head = await client.head();
    assert.equal(head.status, 200);
    let got = 0;
    for (let p = await client.piece(30_000); p !== null; p = await client.piece(30_000)) {
      assert.equal(p[0], block[got % block.length]);
      assert.equal(p[p.length - 1], block[(got + p.length - 1) % block.length]);
      got += p.length;
    }
    assert.equal(got, total);
    assert.ok(nexus.rss_bytes() - before < (settings.sanitised ? 128 : 16) << 20);
  });

  test('that takes nothing at all is cut after write_timeout, and its backend with it', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { write_timeout: '1s' } });
    backend.answer = async (_, reply) => {
      reply.stream();
      const piece = 'data: ' + 'x'.repeat(100_000) + '\n\n';
      while (!reply.gone) {
        reply.piece(piece);
        await reply.drained();
      }
    };
    const client = await RawClient.connect(nexus.port, { pause: true });
    t.after(() => client.close());
    client.send('POST', path, {}, streaming);
    const { connection } = await backend.request();
    await within(8_000, connection.ended, 'the backend connection closed');
    await pending_is(nexus, 0);
  });

  test('does not slow another client of the same thread', async (t) => {
    const { nexus, backend } = await pair(t, {}, { server: { threads: 1 } });
    backend.answer = async (request, reply) => {
      if (!request.json.flood) return reply.json({});
      reply.stream();
      while (!reply.gone) {
        reply.piece('x'.repeat(100_000));
        await reply.drained();
      }
    };
    const slow = await RawClient.connect(nexus.port, { pause: true });
    t.after(() => slow.close());
    slow.send('POST', path, {}, chat('m1', { flood: true, stream: true }));
    await backend.request();
    await sleep(100);
    for (let i = 0; i < 20; i++) assert.equal((await post(nexus.port, path, chat(), { ms: 2_000 })).status, 200);
  });
});

group('many', () => {
  test('1,000 concurrent streams, every byte compared at the client', { serial: true, limit_ms: 60_000 }, async (t) => {
    const streams = 1_000;
    const events = 20;
    const { nexus, backend } = await pair(t, {}, { server: { max_connections: 3000 } });
    const text = (n, i) => sse(chat_chunk('m1', `stream ${n} piece ${i} ${'ä'.repeat((n * 7 + i * 13) % 90)}`));
    let open = 0;
    let most = 0;
    let release;
    const all_there = new Promise((done) => { release = done; });
    backend.answer = async (request, reply) => {
      const { n } = request.json;
      most = Math.max(most, ++open);
      reply.stream();
      if (open === streams) release();
      await all_there;   // no stream goes on before all have begun
      for (let i = 0; i < events; i++) {
        reply.piece(text(n, i));
        await sleep((n * 31 + i * 17) % 40);
      }
      reply.piece(sse('[DONE]'));
      reply.finish();
      open--;
    };
    const one = async (n) => {
      const client = await RawClient.connect(nexus.port);
      try {
        client.send('POST', path, {}, chat('m1', { stream: true, n }));
        const r = await client.response(30_000);
        let wanted = '';
        for (let i = 0; i < events; i++) wanted += text(n, i);
        assert.equal(r.status, 200);
        assert.ok(r.complete, `stream ${n} whole`);
        assert.equal(r.text, wanted + sse('[DONE]'), `stream ${n}`);
      } finally {
        client.close();
      }
    };
    await Promise.all(Array.from({ length: streams }, (_, n) => one(n)));
    assert.equal(most, streams, 'all were open at once');
    await pending_is(nexus, 0);
  });

  test('the same through several threads and over kept-alive connections, 5,000 plain requests', { serial: true, limit_ms: 60_000 }, async (t) => {
    const { nexus, backend } = await pair(t);
    backend.answer = (request, reply) => reply.json({ n: request.json.n, echo: request.json.text });
    const worker = async (w) => {
      const client = await RawClient.connect(nexus.port);
      for (let i = 0; i < 100; i++) {
        const n = w * 100 + i;
        client.send('POST', path, {}, chat('m1', { n, text: 'é'.repeat(n % 500) }));
        const r = await client.response(20_000);
        assert.equal(r.status, 200);
        assert.equal(r.json.n, n);
        assert.equal(r.json.echo.length, n % 500);
      }
      client.close();
    };
    await Promise.all(Array.from({ length: 50 }, (_, w) => worker(w)));
    assert.equal(backend.requests.length, 5_000);
  });

  test('two clients on two threads with one backend never see each other’s answers', async (t) => {
    const nexus_pair = await pair(t, {}, { server: { threads: 4 } });
    nexus_pair.backend.answer = async (request, reply) => { await sleep(Math.random() * 5); reply.json({ n: request.json.n }); };
    await Promise.all(Array.from({ length: 200 }, async (_, n) => assert.equal((await post(nexus_pair.nexus.port, path, chat('m1', { n }))).json.n, n)));
  });

  // Servers send their head at once, long before the first token.
  const late = (ms, before = '') => async (request, reply) => {
    reply.stream();
    if (before) reply.piece(Buffer.from(before));
    await sleep(ms);
    for (const word of ['a', 'b', 'c', 'd', 'e']) reply.piece(Buffer.from(sse(chat_chunk('m1', word))));
    reply.piece(Buffer.from(sse({ ...chat_chunk('m1'), choices: [], usage: { prompt_tokens: 3, completion_tokens: 5, total_tokens: 8 } }) + sse('[DONE]')));
    reply.finish();
  };

  test('of two backends that send their head at once, the one with the earlier first event gets more requests', async (t) => {
    const fast = await start_backend(t, { answer: late(10) });
    const slow = await start_backend(t, { answer: late(300) });
    const nexus = await start_nexus(t, { backends: [{ name: 'fast', mock: fast }, { name: 'slow', mock: slow }] });
    for (let i = 0; i < 20; ++i) assert.equal((await post(nexus.port, '/v1/chat/completions', chat('m1', { stream: true }))).status, 200);
    assert.ok(fast.requests.length >= 15, `${fast.requests.length} of 20 went to the fast one`);
  });

  test('comments before the first event are no token: the time to the first token is that of the event', async (t) => {
    const { nexus } = await pair(t, { answer: late(400, ':\n\n: ping\n\n') });
    assert.equal((await post(nexus.port, '/v1/chat/completions', chat('m1', { stream: true }))).status, 200);
    let page;
    await until(async () => {
      page = parse_metrics((await get(nexus.port, '/metrics')).text);
      return page.sum('nexus_time_to_first_token_seconds_count') === 1;
    }, 'the stream to be counted');
    const first = page.sum('nexus_time_to_first_token_seconds_sum');
    assert.ok(first >= 0.39, `the first token after ${first} s`);
    const each = page.sum('nexus_time_per_output_token_seconds_sum');
    assert.ok(each < 0.09, `${each} s for each further token`);
  });
});

