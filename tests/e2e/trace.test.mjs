// Traces: a traceparent passes through, or is followed by spans of Nexus's own. A collector gets them in OpenTelemetry's own
// format, as its own schema reads it, and changes nothing for clients, whatever it does.
import fs from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import { RawClient, assert, chat, chat_chunk, free_port, get, group, parse_metrics, post, settings, sse, start_backend, start_nexus, test, until } from './harness.mjs';

const completions = '/v1/chat/completions';
const schema_path = new URL('../node_modules/@opentelemetry/otlp-transformer/build/src/generated/root.js', import.meta.url).pathname;
const schema = fs.existsSync(schema_path) ? createRequire(import.meta.url)(schema_path).opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest : null;
const trace_id = '4bf92f3577b34da6a3ce929d0e0e4736', client_span = '00f067aa0ba902b7';
const parent = (flags = '01') => `00-${trace_id}-${client_span}-${flags}`;

// A collector that keeps what is posted. `answer(response, text, count)` may do what it likes; it says 200 if there is none.
class Collector {
  constructor(answer) {
    this.posts = [];
    this.answer = answer ?? ((response) => response.writeHead(200, { 'Content-Type': 'application/json' }).end('{}'));
  }
  async start(t, port = 0) {
    this.server = http.createServer((request, response) => {
      const parts = [];
      request.on('data', (part) => parts.push(part));
      request.on('end', () => {
        const text = Buffer.concat(parts).toString();
        this.posts.push({ method: request.method, path: request.url, headers: request.headers, text });
        this.answer(response, text, this.posts.length);
      });
    });
    this.server.on('connection', (socket) => socket.on('error', () => {}));
    await new Promise((done) => this.server.listen(port, '127.0.0.1', done));
    this.port = this.server.address().port;
    t.after(() => this.stop());
    return this;
  }
  stop() {
    this.server.closeAllConnections();
    return new Promise((done) => this.server.close(done));
  }
  get url() { return `http://127.0.0.1:${this.port}`; }
  get spans() { return this.posts.flatMap((one) => read_spans(one.text)); }
}

const start_collector = (t, answer) => new Collector(answer).start(t);

// Reads a batch by OpenTelemetry's schema. Whatever that does not know, or knows as another type, is lost on the way through
// its binary form, and then the two differ.
function read_batch(text) {
  const binary_ids = (value) => {
    if (Array.isArray(value)) return value.map(binary_ids);
    if (typeof value !== 'object') return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => {
      if (!/^(trace|span|parentSpan)Id$/.test(key)) return [key, binary_ids(one)];
      assert.match(one, key === 'traceId' ? /^[0-9a-f]{32}$/ : /^[0-9a-f]{16}$/);   // in JSON: hex, not base64
      return [key, Buffer.from(one, 'hex').toString('base64')];
    }));
  };
  const sent = binary_ids(JSON.parse(text));
  const message = schema.fromObject(sent);
  const read = schema.toObject(schema.decode(schema.encode(message).finish()), { longs: String, bytes: String });
  assert.deepEqual(JSON.parse(JSON.stringify(read)), sent);
  return JSON.parse(text);
}

const value_of = ({ stringValue, intValue, boolValue, doubleValue }) => stringValue ?? boolValue ?? doubleValue ?? Number(intValue);
const attributes_of = (list) => Object.fromEntries(list.map(({ key, value }) => [key, value_of(value)]));

// The spans of a batch, each with its attributes as an object.
function read_spans(text) {
  const [of_resource] = read_batch(text).resourceSpans;
  const resource = attributes_of(of_resource.resource.attributes);
  return of_resource.scopeSpans[0].spans.map((span) => ({ ...span, resource, scope: of_resource.scopeSpans[0].scope, at: attributes_of(span.attributes) }));
}

const servers = (spans) => spans.filter((span) => span.kind === 2), clients = (spans) => spans.filter((span) => span.kind === 3);
const children = (spans, of) => clients(spans).filter((span) => span.parentSpanId === of.spanId).sort((a, b) => (a.startTimeUnixNano < b.startTimeUnixNano ? -1 : 1));

// The counts of spans: { exported, queue_full, refused, unanswered }.
async function counts(nexus) {
  const page = parse_metrics((await get(nexus.port, '/metrics')).text);
  const of = Object.fromEntries(page.select('nexus_spans_dropped_total').map(({ labels, value }) => [labels.reason, value]));
  return { exported: page.value('nexus_spans_exported_total'), ...of };
}

// Makes this many requests, some at once; each must be answered as if there were no collector.
async function requests(nexus, count) {
  const each = async () => { while (count-- > 0) assert.equal((await post(nexus.port, completions, chat('m1'))).status, 200); };
  await Promise.all(Array.from({ length: 16 }, each));
}

const needs_schema = (t) => { if (!schema) t.skip('npm package @opentelemetry/otlp-transformer is not installed (cd tests && npm ci)'); };

// A daemon that sends its spans to a collector, which has them all once it has stopped.
async function traced(t, { backends, collector, trace = {}, env, ...conf } = {}) {
  needs_schema(t);
  collector ??= await start_collector(t);
  const backend = backends ? null : await start_backend(t, { kind: 'vllm' });
  const nexus = await start_nexus(t, { trace: { endpoint: collector.url, ...trace }, backends: backends ?? [{ name: 'b1', mock: backend }], ...conf }, { env });
  const spans = async () => {
    await nexus.stop();
    return collector.spans;
  };
  return { nexus, backend, collector, spans };
}

group('trace', () => {
  test('without a collector both fields pass through byte for byte, and none is added', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }], log: { access: 'stderr', format: 'json' } });
    const sent = [
      `traceparent: ${parent()}\r\ntracestate: rojo=1,congo=t61rcWkgMzE\r\n`,
      `TraceParent:${parent('00')}\r\n`,
      'traceparent: 00-zz-bad\r\ntracestate:   \r\n',
      'tracestate: alone=1\r\ntracestate: twice=2\r\n',
      `traceparent: ${parent()}\r\ntraceparent: ${parent()}\r\n`,
      '',
    ];
    const client = await RawClient.connect(nexus.port);
    for (const lines of sent) {
      const body = JSON.stringify(chat('m1'));
      client.method = 'POST';
      client.write(`POST ${completions} HTTP/1.1\r\nHost: a\r\n${lines}Content-Length: ${body.length}\r\n\r\n${body}`);
      assert.equal((await client.response()).status, 200);
      const head = backend.requests.at(-1).raw.toString('latin1').split('\r\n\r\n')[0];
      const arrived = head.split('\r\n').filter((line) => /^trace/i.test(line)).map((line) => `${line}\r\n`).join('');
      assert.equal(arrived, lines);
    }
    client.close();
    assert.deepEqual(await counts(nexus), { exported: 0, queue_full: 0, refused: 0, unanswered: 0 });
  });

  test('a field that Connection names is not passed on', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] });
    await post(nexus.port, completions, chat('m1'), { headers: { Connection: 'tracestate', tracestate: 'a=1', traceparent: parent() } });
    assert.ok(!backend.requests[0].headers.has('tracestate'));
    assert.equal(backend.requests[0].headers.get('traceparent'), parent());
  });

  test('a request has a span and its attempt one below it, field by field', async (t) => {
    const env = { OTEL_SERVICE_NAME: 'edge', OTEL_RESOURCE_ATTRIBUTES: 'deployment.environment=test,team=a%20b' };
    const { nexus, backend, collector, spans } = await traced(t, { env, log: { access: 'stderr', format: 'json' } });
    const before = BigInt(Date.now()) * 1_000_000n;
    const answer = await post(nexus.port, completions, chat('m1'), { headers: { 'X-Request-Id': 'one', 'Session-Id': 'conversation-7' } });
    assert.equal(answer.status, 200);
    await nexus.logged(/"request_id":"one".*"trace_id":"[0-9a-f]{32}"/);
    const line = JSON.parse(nexus.stderr.split('\n').find((text) => text.includes('"request_id":"one"')));
    const all = await spans();
    const after = BigInt(Date.now()) * 1_000_000n;
    assert.equal(all.length, 2);
    const [server] = servers(all), [client] = clients(all);

    const [sent] = collector.posts;
    assert.deepEqual([sent.method, sent.path, sent.headers['content-type']], ['POST', '/v1/traces', 'application/json']);
    assert.equal(server.resource['service.name'], 'edge');
    assert.match(server.resource['service.instance.id'], /^nexus-[0-9a-f]{8}$/);
    assert.equal(server.resource['deployment.environment'], 'test');
    assert.equal(server.resource.team, 'a b');
    assert.equal(server.scope.name, 'nexus');

    assert.equal(server.traceId, line.trace_id);
    assert.equal(client.traceId, server.traceId);
    assert.equal(server.parentSpanId, undefined);
    assert.equal(client.parentSpanId, server.spanId);
    assert.equal(backend.requests[0].headers.get('traceparent'), `00-${server.traceId}-${client.spanId}-01`);
    assert.deepEqual([server.flags, client.flags], [0x101, 0x101]);
    assert.deepEqual([server.name, client.name], ['POST /v1/chat/completions', 'chat m1']);
    assert.deepEqual([server.status, client.status], [{}, {}]);
    const times = [before, server.startTimeUnixNano, client.startTimeUnixNano, client.endTimeUnixNano, server.endTimeUnixNano, after].map(BigInt);
    for (let i = 1; i < times.length; i++) assert.ok(times[i - 1] <= times[i] + 2_000_000n, `${i}: ${times}`);   // Date.now() has whole ms

    const both = {
      'http.response.status_code': 200, 'gen_ai.operation.name': 'chat', 'gen_ai.provider.name': 'vllm', 'gen_ai.request.model': 'm1',
      'gen_ai.response.model': 'm1', 'gen_ai.request.stream': false, 'gen_ai.usage.input_tokens': 9, 'gen_ai.usage.output_tokens': 12, 'gen_ai.conversation.id': 'conversation-7',
    };
    assert.deepEqual(server.at, { ...both, 'http.request.method': 'POST', 'http.route': completions, 'nexus.request_id': 'one' });
    assert.deepEqual(client.at, { ...both, 'server.address': '127.0.0.1', 'server.port': backend.port, 'nexus.backend': 'b1' });
  });

  // What a backend answers to m1, and what the spans tell of it.
  const answers = [
    ['a completion', completions, (reply) => reply.json({ model: 'm1-2026', choices: [{ message: { content: '"model":"no"' } }],
      usage: { prompt_tokens: 9, completion_tokens: 12, prompt_tokens_details: { cached_tokens: 4 }, completion_tokens_details: { reasoning_tokens: 7 } } }), ['m1-2026', 4, 7]],
    ['a stream that begins with comments', completions, (reply) => {
      reply.stream();
      for (const piece of [': one\n\n', ': two\n\n', 'data: {"id":"1","model":"m1-2026","choices":[{"delta":{"content":"{"}}]}\n\n',
        'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":12,"completion_tokens_details":{"reasoning_tokens":7}}}\n\n', 'data: [DONE]\n\n']) reply.piece(piece);
      reply.finish();
    }, ['m1-2026', undefined, 7]],
    ['a response in events', '/v1/responses', (reply) => {
      reply.stream();
      reply.piece('event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1","model":"m1-2026"}}\n\n');
      reply.piece('event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_1","usage":{"input_tokens":9,"output_tokens":12,"output_tokens_details":{"reasoning_tokens":7}}}}\n\n');
      reply.finish();
    }, ['m1-2026', undefined, 7]],
    ['an answer without any of it', completions, (reply) => reply.json({ choices: [], usage: { prompt_tokens: 9, completion_tokens: 12 } }), [undefined, undefined, undefined]],
    ['more reasoning than there are tokens', completions, (reply) => reply.json({ model: '', usage: { completion_tokens: 2, completion_tokens_details: { reasoning_tokens: 3 } } }), [undefined, undefined, undefined]],
  ];
  for (const [what, path, answer, told] of answers) {
    test(`the spans tell the model that answered, and the cached and the reasoning tokens: ${what}`, async (t) => {
      needs_schema(t);
      const { nexus, backend, spans } = await traced(t);
      backend.answer = (_, reply) => answer(reply);
      const r = await post(nexus.port, path, path === completions ? chat('m1', { stream: /stream/.test(what) }) : { model: 'm1', input: 'x', stream: true });
      assert.equal(r.status, 200);
      const all = await spans();
      assert.equal(all.length, 2);
      for (const { at } of all) assert.deepEqual([at['gen_ai.response.model'], at['gen_ai.usage.cache_read.input_tokens'], at['gen_ai.usage.reasoning.output_tokens']], told);
    });
  }

  test('a retry, a fallback and a stream: each attempt is a child with its own outcome, and its backend has its id', async (t) => {
    needs_schema(t);
    const busy = await start_backend(t, { models: ['m1'], answer: (_, reply) => reply.json({ error: { message: 'no' } }, 503) });
    const gone = await free_port();
    const good = await start_backend(t, { kind: 'vllm', models: ['m2'] });
    const { nexus, spans } = await traced(t, {
      routing: { strategy: 'priority' }, health: { enabled: 'no' }, fallbacks: { m1: 'm2' },
      backends: [
        { name: 'busy', mock: busy, models: 'm1', priority: 1 },
        { name: 'gone', url: `http://127.0.0.1:${gone}`, models: 'm1', priority: 2 },
        { name: 'good', mock: good, models: 'm2', priority: 3 },
      ],
    });
    const answer = await post(nexus.port, completions, chat('m1', { stream: true }), { headers: { traceparent: parent(), tracestate: 'rojo=1' } });
    assert.equal(answer.status, 200);
    const all = await spans();
    assert.equal(all.length, 4);
    const [server] = servers(all), attempts = children(all, server);
    assert.ok(all.every((span) => span.traceId === trace_id));
    assert.equal(server.parentSpanId, client_span);
    assert.equal(server.flags, 0x301);
    assert.equal(server.at['gen_ai.request.model'], 'm1');
    assert.equal(server.at['http.response.status_code'], 200);
    assert.ok(server.at['gen_ai.response.time_to_first_chunk'] > 0);
    assert.deepEqual(attempts.map((span) => [span.at['nexus.backend'], span.name, span.at['http.response.status_code'], span.at['error.type'], span.status.code]), [
      ['busy', 'chat m1', 503, '503', 2],
      ['gone', 'chat m1', undefined, 'connect_error', 2],
      ['good', 'chat m2', 200, undefined, undefined],
    ]);
    const last = attempts[2];
    assert.equal(last.at['gen_ai.request.stream'], true);
    assert.ok(last.at['gen_ai.response.time_to_first_chunk'] > 0);
    assert.deepEqual([last.at['gen_ai.usage.input_tokens'], last.at['gen_ai.usage.output_tokens']], [9, 3]);
    assert.deepEqual([server, ...attempts].map((span) => span.at['gen_ai.response.model']), ['m2', undefined, undefined, 'm2']);
    assert.equal(busy.requests[0].headers.get('traceparent'), `00-${trace_id}-${attempts[0].spanId}-01`);
    assert.equal(good.requests[0].headers.get('traceparent'), `00-${trace_id}-${last.spanId}-01`);
    for (const backend of [busy, good]) assert.equal(backend.requests[0].headers.get('tracestate'), 'rojo=1');
  });

  test('errors of Nexus itself, cut streams and clients that leave have spans that say so', async (t) => {
    needs_schema(t);
    const backend = await start_backend(t, {
      models: ['m1'],
      answer: (request, reply) => {
        reply.stream();
        reply.piece(sse(chat_chunk('m1', 'One', {}, true)));
        if (request.json.user === 'cut') reply.reset();
      },
    });
    const { nexus, spans } = await traced(t, { backends: [{ name: 'b1', mock: backend }], server: { max_body: '2k' } });
    assert.equal((await post(nexus.port, completions, chat('nobody'))).status, 404);
    await post(nexus.port, completions, chat('m1', { stream: true, user: 'cut' })).catch(() => {});
    const leaver = await RawClient.connect(nexus.port);
    leaver.send('POST', completions, {}, JSON.stringify(chat('m1', { stream: true, user: 'leave' })));
    await leaver.read_through(Buffer.from('One'));
    leaver.close();
    await until(async () => parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total') === 3, 'three requests counted');
    const all = await spans();
    const of = (wanted) => servers(all).find(wanted);
    const unknown = of((span) => span.at['http.response.status_code'] === 404);
    assert.deepEqual(children(all, unknown), []);
    assert.equal(unknown.status.code, undefined);   // the client's mistake
    assert.ok(unknown.at['error.type']);
    const cut = of((span) => span.at['error.type'] === 'backend_error');
    assert.equal(cut.status.code, 2);
    assert.deepEqual(children(all, cut).map((span) => [span.at['error.type'], span.status.code]), [['truncated', 2]]);
    const left = of((span) => span.at['error.type'] === 'client_closed');
    assert.equal(left.status.code, undefined);
    assert.deepEqual(children(all, left).map((span) => [span.at['error.type'], span.status.code]), [['cancelled', undefined]]);
    assert.equal(all.length, 5);
  });

  test('a second signal does not wait for a collector that hangs', async (t) => {
    needs_schema(t);
    const backend = await start_backend(t, { answer: (_, reply) => { reply.stream(); reply.piece(sse(chat_chunk('m1', 'One', {}, true))); } });
    const { nexus } = await traced(t, { backends: [{ name: 'b1', mock: backend }], collector: await start_collector(t, () => {}) });
    const client = await RawClient.connect(nexus.port);
    client.send('POST', completions, {}, JSON.stringify(chat('m1', { stream: true })));
    await client.read_through(Buffer.from('One'));
    nexus.child.kill('SIGTERM');
    await nexus.logged(/draining/);
    const began = performance.now();
    nexus.child.kill('SIGTERM');
    assert.equal((await nexus.exits()).code, 0);
    assert.ok(performance.now() - began < 1_500, `${performance.now() - began} ms`);
    client.close();
  });

  test('a failure behind a 200 is an error of both spans', async (t) => {
    needs_schema(t);
    const failures = {
      empty: (reply) => reply.body(200, ''),
      event: (reply) => {
        reply.stream();
        reply.piece(sse(chat_chunk('m1', 'One', {}, true)));
        reply.piece(sse({ error: { message: 'CUDA' } }));
        reply.finish();
      },
    };
    const backend = await start_backend(t, { answer: (request, reply) => failures[request.json.user](reply) });
    const { nexus, spans } = await traced(t, { backends: [{ name: 'b1', mock: backend }] });
    for (const user of Object.keys(failures)) assert.equal((await post(nexus.port, completions, chat('m1', { user, stream: user === 'event' }))).status, 200);
    const all = await spans();
    assert.deepEqual(all.map((span) => [span.kind, span.status.code, span.at['error.type'], span.at['http.response.status_code']]).sort(), [
      [2, 2, 'backend_error', 200], [2, 2, 'backend_error', 200], [3, 2, 'bad_response', 200], [3, 2, 'bad_response', 200]]);
  });

  test('what the client says of sampling counts, and trace_ratio where it says nothing', async (t) => {
    const { nexus, backend, spans } = await traced(t, { trace: { trace_ratio: 0 } });
    const ask = async (headers) => {
      assert.equal((await post(nexus.port, completions, chat('m1'), { headers })).status, 200);
      const got = backend.requests.at(-1).headers;
      return [...got.get('traceparent').split('-'), got.get('tracestate')];
    };
    const [, trace, span, flags, state] = await ask({ traceparent: parent('00'), tracestate: 'a=1' });
    assert.deepEqual([trace, flags, state], [trace_id, '00', 'a=1']);
    assert.notEqual(span, client_span);
    assert.deepEqual((await ask({ traceparent: parent('01'), tracestate: 'a=1' }))[3], '01');
    const known = new Set([trace_id]);
    for (const headers of [{}, { traceparent: 'garbage', tracestate: 'a=1' }, { traceparent: `00-${'0'.repeat(32)}-${client_span}-01`, tracestate: 'a=1' },
                           { traceparent: `ff-${trace_id}-${client_span}-01` }, { tracestate: 'a=1' }]) {
      const [version, own, , own_flags, own_state] = await ask(headers);
      assert.deepEqual([version, own_flags, own_state], ['00', '00', '']);
      assert.match(own, /^[0-9a-f]{32}$/);
      assert.ok(!known.has(own));
      known.add(own);
    }
    assert.deepEqual((await ask({ traceparent: `cc-${trace_id}-${client_span}-01-more` })).slice(0, 2), ['00', trace_id]);
    const all = await spans();
    assert.equal(all.length, 4);   // of the two requests whose clients wanted it
    assert.ok(all.every((one) => one.traceId === trace_id));
  });

  test('nothing of a prompt, a response, a key or a field but the named ones is in what is sent', async (t) => {
    const secret = 'do-not-tell-4711';
    const backend = await start_backend(t, { answer: (request, reply) => reply.json({ error: { message: `${secret} in an error` }, choices: [{ message: { content: secret } }] }, request.json.user === 'x' ? 500 : 200) });
    const { nexus, collector, spans } = await traced(t, { backends: [{ name: 'b1', mock: backend }] });
    const headers = { Authorization: `Bearer ${secret}`, 'X-Custom': secret, Cookie: secret, tracestate: `a=${secret}`, traceparent: parent() };
    const body = chat('m1', { user: secret, metadata: { user_id: secret }, tools: [{ type: 'function', function: { name: secret } }], messages: [{ role: 'user', content: secret }] });
    await post(nexus.port, `${completions}?key=${secret}`, body, { headers });
    await post(nexus.port, completions, { ...body, user: 'x' }, { headers });
    assert.equal((await spans()).length, 4);
    assert.ok(!collector.posts.some(({ text }) => text.includes(secret)));
  });

  test('the variable names the collector, by a name too; an unfit one is told of, and Nexus serves', async (t) => {
    needs_schema(t);
    const collector = await start_collector(t), backend = await start_backend(t);
    const named = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] }, { env: { OTEL_EXPORTER_OTLP_ENDPOINT: `http://localhost:${collector.port}/prefix/` } });
    await requests(named, 1);
    await named.stop();
    assert.equal(collector.spans.length, 2);
    assert.equal(collector.posts[0].path, '/prefix/v1/traces');
    assert.equal(collector.posts[0].headers.host, `localhost:${collector.port}`);

    const unfit = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] }, { env: { OTEL_EXPORTER_OTLP_ENDPOINT: 'https://user:secret@a' } });
    await unfit.logged(/spans are not exported why="OTEL_EXPORTER_OTLP_ENDPOINT: expected http:/);
    assert.ok(!unfit.log().includes('secret'));
    await requests(unfit, 1);
    const off = await start_nexus(t, { trace: { endpoint: 'off' }, backends: [{ name: 'b1', mock: backend }] }, { env: { OTEL_EXPORTER_OTLP_ENDPOINT: collector.url } });
    await requests(off, 1);
    await off.stop();
    assert.equal(collector.posts.length, 1);
  });

  test('a span waits no longer than five seconds, and 512 do not wait', { limit_ms: 30_000 }, async (t) => {
    const { nexus, collector } = await traced(t);
    await requests(nexus, 1);
    const began = performance.now();
    await until(() => collector.spans.length === 2, 'the first two spans', 7_000);
    const waited = performance.now() - began;
    assert.ok(waited > 3_000, `${Math.round(waited)} ms`);
    await requests(nexus, 256);
    const full = performance.now();
    await until(() => collector.spans.length === 514, () => `${collector.spans.length} spans`, 3_000);
    assert.ok(performance.now() - full < 3_000 * settings.slow);
    assert.equal(read_spans(collector.posts[1].text).length, 512);
    await until(async () => (await counts(nexus)).exported === 514, 'all counted');
  });

  // What a collector does to 512 spans, and what becomes of them.
  const misdeeds = [
    ['answers 400', (response) => response.writeHead(400).end('{"code":3,"message":"no"}'), { refused: 512 }, 1],
    ['answers 500', (response) => response.writeHead(500).end(), { refused: 512 }, 1],
    ['refuses three in part', (response) => response.writeHead(200).end('{"partialSuccess":{"rejectedSpans":"3","errorMessage":"too old"}}'), { exported: 509, refused: 3 }, 1],
    ['claims to refuse more than it got', (response) => response.writeHead(200).end('{"partialSuccess":{"rejectedSpans":"99999999999"}}'), { refused: 512 }, 1],
    ['answers what is no JSON', (response) => response.writeHead(200).end('{"partialSuccess":[[[{'), { exported: 512 }, 1],
    ['answers what is no HTTP', (response) => response.socket.end('220 mail ESMTP\r\n'), { unanswered: 512 }, 1],
    ['closes within its answer', (response) => response.socket.end('HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{'), { unanswered: 512 }, 1],
    ['closes without an answer', (response) => response.socket.destroy(), { unanswered: 512 }, 1],
    ['answers without an end', (response) => { response.writeHead(200); response.write('x'.repeat(1 << 20)); }, { unanswered: 512 }, 1],
    ['is busy once', (response, _, count) => (count === 1 ? response.writeHead(503, { 'Retry-After': '1' }).end() : response.writeHead(200).end()), { exported: 512 }, 2],
    ['is slow', (response) => setTimeout(() => response.writeHead(200).end(), 1_500), { exported: 512 }, 1],
  ];
  for (const [what, answer, expected, posts] of misdeeds) {
    test(`a collector that ${what} changes nothing for clients, and each span is counted once`, { limit_ms: 40_000 }, async (t) => {
      const { nexus, collector } = await traced(t, { collector: await start_collector(t, answer) });
      await requests(nexus, 256);
      const wanted = { exported: 0, queue_full: 0, refused: 0, unanswered: 0, ...expected };
      let seen;
      await until(async () => JSON.stringify(seen = await counts(nexus)) === JSON.stringify(wanted), () => `${JSON.stringify(seen)}`, 8_000);
      assert.equal(collector.posts.length, posts);
      assert.ok(collector.posts.every(({ text }) => text === collector.posts[0].text));   // the same batch again
      if (!expected.exported || expected.refused) await nexus.logged(/spans are not exported collector=127\.0\.0\.1:\d+ why=/);
      await requests(nexus, 3);
    });
  }

  test('a collector that hangs costs no client anything: what finds no room is counted, and a drain does not wait for it', { limit_ms: 60_000 }, async (t) => {
    const { nexus } = await traced(t, { collector: await start_collector(t, () => {}) });
    await requests(nexus, 256);
    await until(async () => (await counts(nexus)).exported === 0, 'a page');
    await requests(nexus, 1_100);   // 2,712 spans in all: 512 are on their way, 2,048 wait
    const seen = await counts(nexus);
    assert.deepEqual([seen.exported, seen.queue_full], [0, 2_712 - 512 - 2_048]);
    const began = performance.now();
    await nexus.stop();
    assert.ok(performance.now() - began < 5_000 * settings.slow);
  });

  test('a collector that is dead, and then not: what fitted comes, and the log tells of both', { limit_ms: 40_000 }, async (t) => {
    needs_schema(t);
    const port = await free_port(), backend = await start_backend(t);
    const nexus = await start_nexus(t, { trace: { endpoint: `http://127.0.0.1:${port}` }, backends: [{ name: 'b1', mock: backend }] });
    await requests(nexus, 300);
    await nexus.logged(/spans are not exported collector=\S+ why="?connect: Connection refused/);
    const collector = await new Collector().start(t, port);
    await nexus.logged(/spans are exported again/, 8_000);
    assert.ok(collector.spans.length >= 512);
    await nexus.stop();
    assert.equal(new Set(collector.spans.map(({ spanId }) => spanId)).size, 600);
  });

  test('a reload moves the spans to another collector, and off ends them', async (t) => {
    const { nexus, backend, collector } = await traced(t);
    const other = await start_collector(t);
    const use = async (endpoint) => {
      const reloads = nexus.log().split('reloaded').length;
      nexus.reload({ ...nexus.conf, trace: { endpoint } });
      await until(() => nexus.log().split('reloaded').length > reloads, 'reloaded');
    };
    await use(other.url);
    await until(async () => {
      await requests(nexus, 1);
      return /-01$/.test(backend.requests.at(-1).headers.get('traceparent'));
    }, 'a request with the new settings');
    await use('off');
    await until(async () => {
      await requests(nexus, 1);
      return !backend.requests.at(-1).headers.has('traceparent');
    }, 'a request without spans');
    await nexus.stop();
    assert.equal(collector.posts.length, 0);
  });
});
