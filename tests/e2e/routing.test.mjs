// Which backend gets a request, which gets it next when that one fails, and what the client is told of it.
import { assert, assert_error, chat, group, post, run_nexus, settings, sleep, test } from './harness.mjs';
import { act, add_gate, backend_message, burst, completions, fails_with, reason_of, scaled, served_by, start_fleet, tally } from './fleet.mjs';

const resets = (request, reply) => reply.reset();
const quiet = { health: { eject_after: 1000 } };   // for what is not about ejection
const failing_chain = (t, failures, conf = {}) => {
  // Backends a, b, c, … in the order of their priority, each failing as told; `null` serves.
  const backends = Object.fromEntries(failures.map((answer, i) => [
    String.fromCharCode(97 + i), answer === 'refuses' ? { refuses: true, conf: { priority: i, models: 'm1' } } : { answer: answer ?? act, conf: { priority: i, models: 'm1' } }]));
  return start_fleet(t, backends, { ...quiet, ...conf, health: { enabled: 'no', ...quiet.health }, routing: { strategy: 'priority', ...conf.routing } });
};
const tries = (fleet) => Object.fromEntries(Object.entries(fleet.mocks).map(([name, mock]) => [name, mock.requests.length]));

group('routing', () => {
  // ---- the spread ----

  const three = (conf = {}, kind = { light: true }) => ({ a: { conf: conf.a, ...kind }, b: { conf: conf.b, ...kind }, c: { conf: conf.c, ...kind } });
  const total = () => scaled(10_000, 2_000);

  test('round_robin: 10,000 requests are dealt evenly, to a few', { limit_ms: 30_000 }, async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { strategy: 'round_robin' } });
    const { by, not_ok } = await burst(fleet, chat('m1'), total());
    assert.equal(not_ok, 0);
    const counts = ['a', 'b', 'c'].map((name) => by[name]);
    assert.ok(Math.max(...counts) - Math.min(...counts) <= 2 * 2, `two threads deal ${counts}`);
    assert.equal(reason_of(await fleet.ask()), 'round robin');
  });

  test('priority: 10,000 requests go to the lowest, and equals share them', { limit_ms: 30_000 }, async (t) => {
    const fleet = await start_fleet(t, three({ a: { priority: 20 }, b: { priority: 10 }, c: { priority: 10 } }), { routing: { strategy: 'priority' } });
    const { by, not_ok } = await burst(fleet, chat('m1'), total());
    assert.equal(not_ok, 0);
    assert.equal(by.a, undefined, 'the one that is less preferred gets none');
    assert.ok(Math.abs(by.b - by.c) <= 2 * 2, `two threads deal ${by.b} and ${by.c}`);
    assert.equal(reason_of(await fleet.ask()), 'priority');
  });

  test('random: 10,000 requests spread as independent draws do', { limit_ms: 30_000 }, async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { strategy: 'random' } });
    const n = total();
    const { by, not_ok } = await burst(fleet, chat('m1'), n);
    assert.equal(not_ok, 0);
    const deviation = Math.sqrt(n * (1 / 3) * (2 / 3));
    const counts = ['a', 'b', 'c'].map((name) => by[name]);
    for (const count of counts) assert.ok(Math.abs(count - n / 3) < 5 * deviation, `${counts}`);
    assert.ok(counts.some((count) => Math.abs(count - n / 3) > deviation / 20), `${counts} are dealt, not drawn`);
    assert.equal(reason_of(await fleet.ask()), 'random');
  });

  test('least_pending: 10,000 requests go where the fewest are in flight, equals share them', { limit_ms: 30_000 }, async (t) => {
    const fleet = await start_fleet(t, three(), { routing: { strategy: 'least_pending' } });
    const n = total();
    const { by, not_ok } = await burst(fleet, chat('m1'), n);
    assert.equal(not_ok, 0);
    for (const name of ['a', 'b', 'c']) assert.ok(Math.abs(by[name] - n / 3) < n * 0.1, JSON.stringify(by));
  });

  test('least_pending: a backend that is twenty times as slow gets a small share, in proportion', async (t) => {
    const after = (ms) => async (request, reply, backend) => {
      await sleep(ms);
      return act(request, reply, backend);
    };
    const fleet = await start_fleet(t, { slow: { answer: after(200 * settings.slow) }, fast: { answer: after(10 * settings.slow) } }, { routing: { strategy: 'least_pending' } });
    const { by, not_ok } = await burst(fleet, chat('m1'), 300, { connections: 16, depth: 1 });
    assert.equal(not_ok, 0);
    assert.ok(by.slow >= 8 && by.slow < 300 * 0.25, JSON.stringify(by));
  });

  test('least_pending counts over both threads, and says how many there were', async (t) => {
    const fleet = await start_fleet(t, three({}, {}), { routing: { strategy: 'least_pending' } });
    for (const mock of Object.values(fleet.mocks)) add_gate(mock);
    const clients = [];
    for (let i = 0; i < 9; i++) {
      clients.push(await fleet.send('m1', { held: true }));
      await fleet.pending(i + 1);
    }
    for (const mock of Object.values(fleet.mocks)) {
      await mock.request(3);
      mock.open_gate();
    }
    const reasons = (await Promise.all(clients.map((c) => c.response()))).map(reason_of);
    assert.deepEqual(reasons, [0, 0, 0, 1, 1, 1, 2, 2, 2].map((n) => `least pending ${n}`));
    for (const client of clients) client.close();
  });

  test('smart: 10,000 requests are shared by equals, and the score is told', { limit_ms: 30_000 }, async (t) => {
    // Latency is left out: on a busy machine the three are not as fast as each other.
    const fleet = await start_fleet(t, three(), { routing: { weight_latency: 0 } });
    const n = total();
    const { by, not_ok } = await burst(fleet, chat('m1'), n);
    assert.equal(not_ok, 0);
    for (const name of ['a', 'b', 'c']) assert.ok(Math.abs(by[name] - n / 3) < n * 0.1, JSON.stringify(by));
    assert.match(reason_of(await fleet.ask()), /^smart [01]\.\d\d$/);
  });

  test('smart with weights 100/0/0 is pure priority', async (t) => {
    const fleet = await start_fleet(t, three({ a: { priority: 50 }, b: { priority: 49 }, c: { priority: 51 } }), { routing: { weight_priority: 100, weight_load: 0, weight_latency: 0 } });
    assert.deepEqual((await burst(fleet, chat('m1'), 500)).by, { b: 500 });
  });

  test('smart prefers the preferred until it is loaded, and the faster of two that are alike', async (t) => {
    const slowly = async (request, reply, backend) => {
      await sleep(300 * settings.slow);
      return act(request, reply, backend);
    };
    const fleet = await start_fleet(t, { near: { conf: { priority: 40 } }, far: { conf: { priority: 50 } } });
    for (const mock of Object.values(fleet.mocks)) add_gate(mock);
    const first = await fleet.send('m1', { held: true });
    await fleet.mocks.near.request(1);
    const second = await fleet.send('m1', { held: true });
    await fleet.mocks.far.request(1);   // 5 points of priority do not outweigh 30 of load
    for (const [client, name] of [[first, 'near'], [second, 'far']]) {
      fleet.mocks[name].open_gate();
      assert.equal(served_by(await client.response()), name);
      client.close();
    }
    const alike = await start_fleet(t, { slow: { answer: slowly }, fast: {} });
    await Promise.all([alike.ask(), alike.ask()]);   // one of each thread or both of one: it learns them soon
    await Promise.all(Array.from({ length: 6 }, () => alike.ask()));
    const later = tally(await alike.ask_many(20), served_by);
    assert.ok((later.slow ?? 0) <= 4, JSON.stringify(later));
  });

  // ---- why ----

  test('the route reason says: only candidate, alias, priority, round robin, fallback, retry after …', async (t) => {
    const fleet = await start_fleet(t, {
      one: { models: ['m1', 'both'], conf: { priority: 1 } },
      two: { models: ['both', 'broken'], answer: (request, reply, backend) => (request.json.model === 'broken' ? reply.json({}, 500) : act(request, reply, backend)) },
      off: { refuses: true, conf: { models: 'both', priority: 0 } },
    }, { ...quiet, aliases: { nick: 'm1' }, fallbacks: { broken: 'm1' }, routing: { strategy: 'priority' } }, { ready: 'up' });
    await fleet.reaches('nexus_backends_healthy', 2);
    assert.equal(reason_of(await fleet.ask('m1')), 'only candidate');
    assert.equal(reason_of(await fleet.ask('nick')), 'alias');
    assert.equal(reason_of(await fleet.ask('both')), 'priority');
    assert.equal(reason_of(await fleet.ask('broken')), 'retry after status_5xx, fallback');
  });

  for (const [what, failure, words] of [['a refused connection', 'refuses', 'connect_error'], ['a reset', resets, 'truncated'], ['a 500', fails_with(500), 'status_5xx'],
                                        ['a 429', fails_with(429), 'status_429'], ['what is no HTTP', (request, reply) => reply.raw('hello\r\n\r\n'), 'bad_response'],
                                        ['silence', () => {}, 'timeout']]) {
    test(`after ${what} the next backend serves, and the reason says so`, async (t) => {
      const fleet = await failing_chain(t, [failure, null], { upstream: { first_byte_timeout: `${settings.slow}s` } });
      const answer = await fleet.ask();
      assert.equal(answer.status, 200, answer.text);
      assert.equal(served_by(answer), 'b');
      assert.equal(reason_of(answer), `retry after ${words}, priority`);
      await fleet.reaches('nexus_backend_attempts_total', 1, { backend: 'a', outcome: words });
      await fleet.reaches('nexus_backend_attempts_total', 1, { backend: 'b', outcome: 'ok' });
      await fleet.reaches('nexus_requests_total', 1, { backend: 'b', status: '200' });   // one request, counted where it was served
      fleet.moved = failure === 'refuses';
    });
  }

  // ---- retries ----

  for (const retries of [0, 1, 2, 4]) {
    test(`retries = ${retries}: so many other backends are tried, none twice, and the last one's own answer is the client's`, async (t) => {
      const bodies = (n) => (request, reply) => reply.body(500 + n, `<p>answer of ${n}</p>`, { 'Content-Type': 'text/html', 'X-Mine': `b${n}` });
      const fleet = await failing_chain(t, [bodies(0), bodies(1), bodies(2), bodies(3), bodies(4), bodies(5)], { routing: { retries } });
      const answer = await fleet.ask();
      assert.equal(answer.status, 500 + retries);
      assert.equal(answer.text, `<p>answer of ${retries}</p>`);
      assert.equal(answer.headers.get('x-mine'), `b${retries}`);
      assert.equal(answer.headers.get('content-type'), 'text/html');
      assert.deepEqual(Object.values(tries(fleet)), [0, 1, 2, 3, 4, 5].map((n) => (n <= retries ? 1 : 0)));
    });
  }

  test('with one backend its failure is not tried again on it, and is the client\'s as it is', async (t) => {
    const fleet = await failing_chain(t, [fails_with(503, { 'Retry-After': '7', 'X-Mine': 'yes' })], { routing: { retries: 10 } });
    const answer = await fleet.ask();
    assert.equal(answer.status, 503);
    assert.equal(backend_message(answer), 'made up 503');
    assert.equal(answer.headers.get('retry-after'), '7');
    assert.equal(answer.headers.get('x-mine'), 'yes');
    assert.equal(fleet.mocks.a.requests.length, 1);
  });

  test('where the last one tried gave no answer it is a 502, or a 504 after silence', async (t) => {
    const upstream = { first_byte_timeout: `${200 * settings.slow}ms` };
    for (const [failures, status, name] of [[['refuses', 'refuses'], 502, 'bad_gateway'], [[resets, () => {}], 504, 'gateway_timeout'],
                                            [['refuses', (request, reply) => reply.raw('???\r\n\r\n')], 502, 'bad_gateway']]) {
      const fleet = await failing_chain(t, failures, { upstream });
      fleet.moved = true;
      assert_error(await fleet.ask(), status, name);
      assert.equal((await fleet.ask('m1', { stream: true })).status, status);
    }
  });

  test('where the last one tried gave no answer, the client gets the last answer that a backend gave', async (t) => {
    for (const last of ['refuses', resets]) {
      const fleet = await failing_chain(t, [fails_with(500), last]);
      fleet.moved = true;
      for (const more of [{}, { stream: true }]) {
        const answer = await fleet.ask('m1', more);
        assert.equal(answer.status, 500);
        assert.equal(backend_message(answer), 'made up 500');
      }
    }
  });

  test('every other 4xx goes to the client as it is, is tried once, and never counts against the backend', async (t) => {
    const statuses = [400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 422, 451];
    const answer = (request, reply, backend) => (request.json.status ? reply.json({ error: { message: `for ${request.json.status}` } }, request.json.status, { 'X-Mine': 'a' }) : act(request, reply, backend));
    const fleet = await start_fleet(t, { a: { answer, conf: { priority: 1 } }, b: {} }, { routing: { strategy: 'priority' }, health: { eject_after: 1, eject_time: '60s' } });
    for (const status of [...statuses, ...statuses]) {
      const got = await fleet.ask('m1', { status });
      assert.equal(got.status, status);
      assert.equal(backend_message(got), `for ${status}`);
      assert.equal(got.headers.get('x-mine'), 'a');
    }
    assert.equal(served_by(await fleet.ask()), 'a', 'it is not ejected');
    assert.equal(fleet.mocks.b.requests.length, 0);
  });

  test('a 4xx between failures ends the row of failures; without it the backend is left out', async (t) => {
    let plan = [];
    const answer = (request, reply, backend) => {
      const status = plan.shift();
      return status ? fails_with(status)(request, reply) : act(request, reply, backend);
    };
    const fleet = await start_fleet(t, { a: { answer, conf: { priority: 1 } }, b: {} }, { routing: { strategy: 'priority' }, health: { eject_after: 3, eject_time: '60s' }, server: { threads: 1 } });
    plan = [500, 500, 400, 500, 500];
    await fleet.ask_many(5);
    assert.equal(served_by(await fleet.ask()), 'a', 'never three in a row');
    plan = [500, 500, 500];
    await fleet.ask_many(3);
    assert.equal(served_by(await fleet.ask()), 'b', 'three in a row');
  });

  test('the last candidate is never ejected: it serves as soon as it can again', async (t) => {
    let good = false;
    const fleet = await start_fleet(t, { a: { answer: (...args) => (good ? act(...args) : fails_with(500)(...args)) } }, { health: { eject_after: 1, eject_time: '60s' } });
    for (const answer of await fleet.ask_many(6)) assert.equal(answer.status, 500);
    good = true;
    for (const answer of await fleet.ask_many(6)) assert.equal(answer.status, 200);
    assert.equal(fleet.mocks.a.requests.length, 12);
  });

  test('where all candidates are ejected they are tried none the less', async (t) => {
    let good = false;
    const answer = (...args) => (good ? act(...args) : fails_with(500)(...args));
    const fleet = await start_fleet(t, { a: { answer }, b: { answer } }, { health: { eject_after: 1, eject_time: '60s' } });
    for (const got of await fleet.ask_many(4)) assert.equal(got.status, 500);
    good = true;
    for (const got of await fleet.ask_many(4)) assert.equal(got.status, 200);
  });

  test('after the first byte went to the client nothing is retried, and the answer does not look whole', async (t) => {
    const breaks = async (request, reply) => {
      if (request.json.stream) {
        reply.stream();
        reply.piece('data: {"a":1}\n\n');
      } else {
        reply.head(200, { 'Content-Type': 'application/json', 'Content-Length': 100 });
        reply.raw('{"half":');
      }
      await sleep(20);
      reply.reset();
    };
    const fleet = await failing_chain(t, [breaks, null]);
    const plain = await fleet.ask();
    assert.ok(plain.status === 200 && !plain.complete);
    const stream = await fleet.ask('m1', { stream: true });
    assert.ok(!stream.complete || /"error"/.test(stream.text), stream.text);
    assert.equal(fleet.mocks.b.requests.length, 0);
  });

  // ---- names ----

  test('an alias of one, two and three hops leads to the model, and only the model\'s name changes in the body', async (t) => {
    const fleet = await start_fleet(t, { a: { models: ['org/real:70b'] } }, { aliases: { three: 'two', two: 'one', one: 'org/real:70b' } });
    for (const name of ['one', 'two', 'three']) {
      const body = `{ "temperature":0.10, "model" : "${name}","messages":[ {"role":"user","content":"\\u00e9 \\"model\\": \\"${name}\\""} ],\n\t"user":"ü" }`;
      fleet.asked += 1;
      const answer = await post(fleet.port, completions, body);
      assert.equal(answer.status, 200, answer.text);
      assert.equal(reason_of(answer), 'alias');
      assert.equal(answer.headers.get('x-nexus-fallback-model'), '');
      assert.equal(fleet.mocks.a.requests.at(-1).body.toString(), body.replace(`"model" : "${name}"`, '"model" : "org/real:70b"'));
    }
    assert.equal(await fleet.gauge('nexus_fallbacks_total'), 0, 'an alias is no fallback');
    await fleet.reaches('nexus_requests_total', 1, { model: 'three' });   // the name that was asked for
  });

  test('aliases that loop, or lead on for four hops, are errors of the configuration', async (t) => {
    for (const aliases of ['a = b\nb = a', 'a = a', 'a = b\nb = c\nc = d\nd = e']) {
      const result = await run_nexus(['-t', '-c', t.file('nexus.conf', `[backend x]\nurl = http://127.0.0.1:9\n[aliases]\n${aliases}\n`)]);
      assert.notEqual(result.code, 0, aliases);
    }
  });

  test('a model whose backends are all down is served by its fallback, under that name, which the answer tells', async (t) => {
    const fleet = await start_fleet(t, { a: { models: ['spare', 'other'] }, off: { refuses: true, conf: { models: 'big' } } },
                                    { aliases: { gpt: 'big' }, fallbacks: { big: 'missing, spare, other' } }, { ready: 'up' });
    await fleet.reaches('nexus_backends_healthy', 1);
    for (const name of ['big', 'gpt']) {
      const answer = await fleet.ask(name, { stream: true, pieces: 2 });
      assert.equal(answer.status, 200);
      assert.equal(reason_of(answer), 'fallback');
      assert.equal(answer.headers.get('x-nexus-fallback-model'), 'spare');
      assert.equal(fleet.mocks.a.requests.at(-1).json.model, 'spare');
    }
    const page = await fleet.page_of_all();
    assert.equal(page.sum('nexus_fallbacks_total', { to_model: 'spare' }), 2);
    assert.equal(page.sum('nexus_requests_total', { model: 'big', status: '200' }), 1);
    assert.equal(page.sum('nexus_requests_total', { model: 'gpt', status: '200' }), 1);
  });

  test('fallbacks are not followed on: a fallback of a fallback is not tried', async (t) => {
    const fleet = await start_fleet(t, { a: { models: ['last'] }, b: { models: ['middle'], answer: fails_with(500) }, off: { refuses: true, conf: { models: 'first' } } },
                                    { ...quiet, fallbacks: { first: 'middle', middle: 'last' } }, { ready: 'up' });
    await fleet.reaches('nexus_backends_healthy', 2);
    const answer = await fleet.ask('first');
    assert.equal(answer.status, 500);
    assert.equal(answer.headers.get('x-nexus-fallback-model'), 'middle');
    assert.equal(fleet.mocks.a.requests.length, 0);
    assert.equal((await fleet.ask('middle')).headers.get('x-nexus-fallback-model'), 'last');
  });

  test('retries first go to the model\'s other backends, then along the fallbacks in their order', async (t) => {
    const order = [];
    const failing = (name) => (request, reply) => {
      order.push(`${name}/${request.json.model}`);
      return reply.json({ error: { message: `of ${name}` } }, 500);
    };
    const row = (name, models, priority) => [name, { models, answer: failing(name), conf: { priority } }];
    const fleet = await start_fleet(t, Object.fromEntries([row('a', ['m1', 'm3'], 1), row('b', ['m1'], 2), row('c', ['m2'], 3), row('d', ['m3'], 0)]),
                                    { ...quiet, routing: { strategy: 'priority', retries: 2 }, fallbacks: { m1: 'm2, m3' } });
    const answer = await fleet.ask('m1');
    assert.deepEqual(order, ['a/m1', 'b/m1', 'c/m2', 'd/m3', 'a/m3']);
    assert.equal(backend_message(answer), 'of a');
    assert.equal(reason_of(answer), 'retry after status_5xx, fallback');
    assert.equal(answer.headers.get('x-nexus-fallback-model'), 'm3');
  });

  // ---- what a request needs ----

  test('a request goes only where its images, tools, JSON mode and length are taken', async (t) => {
    const fleet = await start_fleet(t, {
      plain: { conf: { priority: 0, vision: 'none', tools: 'none', json_mode: 'none', context_length: '200' } },
      eyes: { conf: { priority: 10, vision: '*', tools: 'none', json_mode: 'none', context_length: '200' } },
      hands: { conf: { priority: 10, vision: 'none', tools: 'm1', json_mode: 'none', context_length: '200' } },
      forms: { conf: { priority: 10, vision: 'none', tools: 'none', json_mode: 'm1', context_length: 'm1 200' } },
      long: { conf: { priority: 10, vision: 'none', tools: 'none', json_mode: 'none', context_length: 'other 10, * 32k' } },
    }, { routing: { strategy: 'priority' } });
    const image = [{ role: 'user', content: [{ type: 'text', text: 'what?' }, { type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }] }];
    const tools = [{ type: 'function', function: { name: 'f', parameters: {} } }];
    for (const [more, wanted] of [[{}, 'plain'], [{ messages: image }, 'eyes'], [{ tools }, 'hands'], [{ tools: [] }, 'plain'],
                                  [{ response_format: { type: 'json_object' } }, 'forms'], [{ response_format: { type: 'json_schema', json_schema: { name: 'x', schema: {} } } }, 'forms'],
                                  [{ response_format: { type: 'text' } }, 'plain'], [{ user: 'x'.repeat(4_000) }, 'long'],
                                  [{ messages: [{ role: 'user', content: 'what is an image_url?' }] }, 'plain']]) {
      const answer = await fleet.ask('m1', more);
      assert.equal(answer.status, 200, answer.text);
      assert.equal(served_by(answer), wanted, JSON.stringify(more).slice(0, 100));
    }
    const none = assert_error(await fleet.ask('m1', { tools, messages: image }), 400, 'model_not_capable');
    assert.match(none.message, /images|tools/);
    assert_error(await fleet.ask('m1', { user: 'x'.repeat(200_000) }), 400, 'model_not_capable');
  });

  test('what a model\'s backends lack is looked for among its fallbacks', async (t) => {
    const fleet = await start_fleet(t, { a: { models: ['blind'], conf: { vision: 'none' } }, b: { models: ['seeing'], conf: { vision: 'seeing' } } }, { fallbacks: { blind: 'seeing' } });
    const image = [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'https://example.org/a.png' } }] }];
    const answer = await fleet.ask('blind', { messages: image });
    assert.equal(answer.headers.get('x-nexus-fallback-model'), 'seeing');
    assert.equal(served_by(await fleet.ask('blind')), 'a');
  });

  // ---- a large body ----

  test('a 20 MB image prompt fails over like a small one, with its model changed in it', { limit_ms: 40_000, serial: true }, async (t) => {
    const url = `data:image/png;base64,${'iVBORw0KGgo0'.repeat(Math.ceil((20 << 20) / 12))}`;
    const more = { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }, { type: 'text', text: 'what is it?' }] }], max_tokens: 5 };
    // a: reads all, then 500. b: resets in the middle of the body. c: answers 429 without reading on. d, under another name: serves.
    const fleet = await start_fleet(t, {
      a: { models: ['big'], answer: fails_with(500), conf: { priority: 1 } },
      b: { models: ['big'], conf: { priority: 2 } },
      c: { models: ['big'], answer: fails_with(429), conf: { priority: 3 } },
      d: { models: ['spare'] },
    }, { ...quiet, routing: { strategy: 'priority' }, aliases: { gpt: 'big' }, fallbacks: { big: 'spare' } });
    const { server } = fleet.mocks.b;
    server.removeAllListeners('connection');
    server.on('connection', (socket) => {
      let got = 0;
      socket.on('error', () => {});
      socket.on('data', (data) => {
        got += data.length;
        if (got > 3 << 20) socket.resetAndDestroy();
      });
      socket.on('end', () => socket.destroy());   // of a health check, too
    });
    fleet.moved = true;
    const answer = await fleet.ask('gpt', more, { ms: 30_000 });
    assert.equal(answer.status, 200, answer.text.slice(0, 300));
    assert.equal(served_by(answer), 'd');
    assert.equal(reason_of(answer), 'retry after status_429, fallback');
    assert.equal(answer.headers.get('x-nexus-fallback-model'), 'spare');
    assert.ok(fleet.mocks.a.requests[0].body.equals(Buffer.from(JSON.stringify(chat('big', more)))), 'whole at the first, under the alias\'s model');
    assert.ok(fleet.mocks.d.requests[0].body.equals(Buffer.from(JSON.stringify(chat('spare', more)))), 'whole at the last, under the fallback\'s name');
  });

  test('many bodies fail over at once, each as it was', async (t) => {
    const fleet = await failing_chain(t, [fails_with(503), resets, null]);
    const bodies = Array.from({ length: 24 }, (_, i) => chat('m1', { user: String.fromCharCode(97 + i).repeat(300_000 + i) }));
    const answers = await Promise.all(bodies.map((body) => fleet.ask('m1', { user: body.user })));
    for (const answer of answers) assert.equal(answer.status, 200);
    const sent = new Set(bodies.map((body) => JSON.stringify(body)));
    for (const request of fleet.mocks.c.requests) assert.ok(sent.delete(request.body.toString()), 'a body that nobody sent, or one twice');
    assert.equal(sent.size, 0);
  });
});
