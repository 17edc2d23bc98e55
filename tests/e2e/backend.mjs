// backend.mjs
// Owns:     a backend on a bare socket that sends exactly the bytes that a test wants.
// Promises: it keeps every request with its exact bytes, and the end of every connection; it answers health probes from
//           `models`, without the test.
// Leaves:   the responses to the test's `answer(request, reply)`.
import fs from 'node:fs';
import net from 'node:net';
import tls from 'node:tls';
import { certificate } from './certificates.mjs';
import { parse_header_lines } from './client.mjs';
import { settings, sleep, within } from './runner.mjs';

export const chat_answer = (model, text = 'Hello there.', usage = { prompt_tokens: 9, completion_tokens: 12, total_tokens: 21 }) => ({
  id: 'chatcmpl-1', object: 'chat.completion', created: 1700000000, model,
  choices: [{ index: 0, message: { role: 'assistant', content: text, refusal: null }, logprobs: null, finish_reason: 'stop' }],
  usage,
});

export const chat_chunk = (model, content, extra = {}, first = false) => ({
  id: 'chatcmpl-2', object: 'chat.completion.chunk', created: 1700000000, model,
  choices: [{ index: 0, delta: content === null ? {} : first ? { role: 'assistant', content } : { content }, logprobs: null, finish_reason: content === null ? 'stop' : null }], ...extra,
});

export const sse = (value) => `data: ${typeof value === 'string' ? value : JSON.stringify(value)}\n\n`;

// Listens on a port that the kernel chooses, unless one is given. options: kind, models, answer, probe; secure: options of
// tls.createServer(), for a backend that speaks TLS.
export class Backend {
  constructor({ kind = 'generic', models = ['m1'], answer = null, probe = null, secure = settings.tls ? {} : null } = {}) {
    this.secure = secure;
    this.kind = kind;
    this.models = models;
    this.answer = answer ?? answer_plainly;
    this.probe = probe;          // (request, reply) → answers a health probe instead of the list of models
    this.requests = [];          // proxied requests, in the order in which their bodies became complete
    this.probes = [];
    this.connections = [];       // all connections, including those without a byte
    this.raws = new Set();       // sockets below TLS
    this.violations = [];        // bytes that a proxy must not send
    this.port = 0;
  }
  get url() { return `${this.secure ? 'https' : 'http'}://127.0.0.1:${this.port}`; }
  get open() { return this.connections.filter((c) => !c.ended_at).length; }

  start() {
    if (this.secure) {
      const shown = this.secure.cert ? {} : { key: fs.readFileSync(certificate().key), cert: fs.readFileSync(certificate().pem) };
      this.context = tls.createSecureContext({ ...shown, ...this.secure });
    }
    this.server = net.createServer({ noDelay: true, allowHalfOpen: true }, (socket) => this.secure ? this.shake(socket) : this.accept(socket));
    return new Promise((done, fail) => {
      this.server.once('error', fail);
      this.server.listen(this.port, '127.0.0.1', 2048, () => {
        this.port = this.server.address().port;
        done(this);
      });
    });
  }

  // Closes all connections and refuses new ones. start() listens on the same port again.
  async stop() {
    const closed = new Promise((done) => this.server.close(done));
    for (const c of this.connections) c.socket.destroy();
    for (const raw of this.raws) raw.destroy();
    await closed;
  }

  shake(raw) {
    const options = { requestCert: false, ALPNProtocols: ['http/1.1'], ...this.secure };
    const socket = new tls.TLSSocket(raw, { isServer: true, secureContext: this.context, allowHalfOpen: true, ...options });
    socket.raw = raw;
    this.raws.add(raw);
    raw.on('close', () => { this.raws.delete(raw); socket.destroy(); });
    raw.on('error', () => {});
    socket.on('error', () => {});
    socket.once('secure', () => this.accept(socket));
  }

  accept(socket) {
    const connection = { socket, requests: 0, ended_at: 0, received: [], number: this.connections.length };
    connection.ended = new Promise((done) => {
      const end = () => {
        if (!connection.ended_at) connection.ended_at = performance.now();
        done();
      };
      socket.on('end', end);
      socket.on('close', end);
      socket.raw?.on('close', end); // Node 18 does not tell it of the TLS socket
    });
    socket.setMaxListeners(0);   // each waiting request adds one or two
    this.connections.push(connection);
    socket.on('error', () => {});
    socket.on('end', () => socket.end());
    const reader = new RequestReader((request) => this.serve(connection, request), (why) => {
      this.violations.push(why);
      socket.destroy();
    });
    socket.on('data', (data) => reader.feed(data));
  }

  async serve(connection, request) {
    request.connection = connection;
    request.number_on_connection = connection.requests++;
    const reply = new Reply(connection.socket, request);
    const is_probe = request.method === 'GET' && !request.path.includes('/responses/');
    (is_probe ? this.probes : this.requests).push(request);
    if (!is_probe) for (const wake of this.waiting?.splice(0) ?? []) wake();
    try {
      await (is_probe ? (this.probe ?? answer_probe) : this.answer)(request, reply, this);
    } catch (error) {
      this.violations.push(`the backend's script failed: ${error.stack}`);
      connection.socket.destroy();
    }
  }

  // Waits until `n` proxied requests have arrived; returns the n-th.
  async request(n = 1, ms = 5_000) {
    while (this.requests.length < n) {
      await within(ms, new Promise((done) => (this.waiting ??= []).push(done)), `request ${n} at the backend (${this.requests.length} came)`);
    }
    return this.requests[n - 1];
  }
}

// Reads a connection's requests. Strict: bytes that a gateway must not send are a violation.
class RequestReader {
  constructor(on_request, on_violation) {
    this.buffer = Buffer.alloc(0);
    this.late = [];        // received after `buffer`; joined once `need` bytes are there
    this.length = 0;
    this.need = 0;
    this.on_request = on_request;
    this.on_violation = on_violation;
  }
  feed(data) {
    this.late.push(data);
    this.length += data.length;
    if (this.length < this.need) return;
    this.buffer = this.buffer.length ? Buffer.concat([this.buffer, ...this.late]) : this.late.length > 1 ? Buffer.concat(this.late) : this.late[0];
    this.late = [];
    while (this.one());
    this.length = this.buffer.length;
  }
  one() {
    const end = this.buffer.indexOf('\r\n\r\n');
    if (end < 0) return false;
    const text = this.buffer.subarray(0, end + 2).toString('latin1');
    const line = text.slice(0, text.indexOf('\r\n'));
    const m = /^([A-Z]+) (\S+) HTTP\/1\.1$/.exec(line);
    let headers;
    try {
      if (!m) throw new Error(`not a request line: ${JSON.stringify(line)}`);
      headers = parse_header_lines(text.slice(line.length + 2));
      for (const once of ['host', 'content-length', 'transfer-encoding', 'content-type', 'authorization']) {
        if (headers.all(once).length > 1) throw new Error(`${once} came ${headers.all(once).length} times`);
      }
      if (!headers.has('host')) throw new Error('no Host');
      if (headers.has('content-length') && headers.has('transfer-encoding')) throw new Error('two framings');
    } catch (error) {
      this.on_violation(error.message);
      return false;
    }
    const start = end + 4;
    const body = headers.has('transfer-encoding') ? read_chunked(this.buffer, start) : read_sized(this.buffer, start, headers);
    if (!body) {
      this.need = start + Number(headers.get('content-length') || 0);
      return false;
    }
    // Nothing of a large body is copied or parsed twice: other tests run in this process.
    const request = { method: m[1], path: m[2], headers, body: body.bytes, raw: this.buffer.subarray(0, body.end), at: performance.now() };
    let json;
    Object.defineProperty(request, 'json', { get: () => (json ??= JSON.parse(request.body.toString())) });
    this.buffer = this.buffer.subarray(body.end);
    this.need = 0;
    this.on_request(request);
    return this.buffer.length > 0;
  }
}

function read_sized(buffer, start, headers) {
  const length = Number(headers.get('content-length') || 0);
  if (buffer.length < start + length) return null;
  return { bytes: buffer.subarray(start, start + length), end: start + length };
}

function read_chunked(buffer, start) {
  const parts = [];
  for (let at = start; ;) {
    const line_end = buffer.indexOf('\r\n', at);
    if (line_end < 0) return null;
    const size = parseInt(buffer.subarray(at, line_end).toString('latin1'), 16);
    at = line_end + 2;
    if (buffer.length < at + size + 2) return null;
    parts.push(buffer.subarray(at, at + size));
    at += size + 2;
    if (size === 0) return { bytes: Buffer.concat(parts), end: at };
  }
}

// Writes a response. raw() sends bytes as they are; the others send common kinds of responses.
export class Reply {
  constructor(socket, request) {
    this.socket = socket;
    this.request = request;
  }
  get gone() { return this.socket.destroyed || !this.socket.writable; }   // nothing more can be sent
  raw(bytes) {
    if (!this.gone && this.socket.writable) return this.socket.write(bytes);
    return false;
  }
  head(status, headers = {}, reason = 'Whatever') {
    const list = Array.isArray(headers) ? headers : Object.entries(headers);
    this.raw(Buffer.from(`HTTP/1.1 ${status} ${reason}\r\n${list.map(([n, v]) => `${n}: ${v}\r\n`).join('')}\r\n`, 'latin1'));
  }
  body(status, bytes, headers = {}) {
    const list = Array.isArray(headers) ? headers : Object.entries(headers);
    const data = Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes);
    this.socket.cork();
    this.head(status, [...list, ['Content-Length', data.length]]);
    this.raw(data);
    this.socket.uncork();
  }
  json(value, status = 200, headers = {}) {
    this.body(status, JSON.stringify(value), { 'Content-Type': 'application/json', ...headers });
  }
  stream(headers = {}) {
    this.head(200, { 'Content-Type': 'text/event-stream; charset=utf-8', 'Cache-Control': 'no-cache', 'Transfer-Encoding': 'chunked', ...headers });
  }
  piece(text) {
    const data = Buffer.isBuffer(text) ? text : Buffer.from(text);
    if (data.length) this.raw(Buffer.concat([Buffer.from(`${data.length.toString(16)}\r\n`), data, Buffer.from('\r\n')]));
  }
  finish() { this.raw('0\r\n\r\n'); }
  fin() { this.socket.end(); }                       // sends a FIN
  close() { this.socket.destroy(); }
  reset() { (this.socket.raw ?? this.socket).resetAndDestroy(); }
  wait(ms) { return sleep(ms); }
  // Resolves once the kernel has taken everything written so far, but never synchronously: a script that waits for it in
  // a loop must not block the events of other sockets.
  drained() { return new Promise((done) => { this.socket.writableLength === 0 || this.gone ? setImmediate(done) : (this.socket.once('drain', done), this.socket.once('close', done)); }); }
}

// Answers like an OpenAI-compatible server, plain or streamed, with usage if requested.
export function answer_plainly(request, reply) {
  const ask = request.json;
  if (request.path.endsWith('/embeddings')) {
    const inputs = Array.isArray(ask.input) ? ask.input : [ask.input];
    return reply.json({ object: 'list', model: ask.model, data: inputs.map((_, index) => ({ object: 'embedding', index, embedding: [0.25, -0.5, 1] })),
                        usage: { prompt_tokens: 4, total_tokens: 4 } });
  }
  const chat = request.path.endsWith('/chat/completions');
  const usage = { prompt_tokens: 9, completion_tokens: 3, total_tokens: 12 };
  if (!ask.stream) {
    if (chat) return reply.json(chat_answer(ask.model));
    return reply.json({ id: 'cmpl-1', object: 'text_completion', created: 1700000000, model: ask.model, choices: [{ index: 0, text: ' once', finish_reason: 'stop', logprobs: null }], usage });
  }
  reply.stream();
  const with_usage = ask.stream_options?.include_usage === true;
  const extra = with_usage ? { usage: null } : {};
  for (const word of ['One', ' two', ' three']) {
    reply.piece(sse(chat ? chat_chunk(ask.model, word, extra, word === 'One') : { id: 'cmpl-2', object: 'text_completion', created: 1700000000, model: ask.model, choices: [{ index: 0, text: word, finish_reason: null, logprobs: null }], ...extra }));
  }
  if (chat) reply.piece(sse(chat_chunk(ask.model, null, extra)));
  if (with_usage) reply.piece(sse({ id: 'chatcmpl-2', object: 'chat.completion.chunk', created: 1700000000, model: ask.model, choices: [], usage }));
  reply.piece(sse('[DONE]'));
  reply.finish();
}

// Answers a health probe with the list of models, in the format of the backend's kind.
export function answer_probe(request, reply, backend) {
  const path = request.path.replace(/^.*(\/api\/tags|\/v1\/models|\/health)(\?.*)?$/, '$1');
  if (path === '/api/tags' && backend.kind === 'ollama') return reply.json({ models: backend.models.map((name) => ({ name, model: name, size: 1 })) });
  if (path === '/v1/models' && backend.kind === 'anthropic') {
    const data = backend.models.map((id) => ({ type: 'model', id, display_name: id, created_at: '2026-01-01T00:00:00Z' }));
    return reply.json({ data, has_more: false, first_id: backend.models[0] ?? null, last_id: backend.models.at(-1) ?? null });
  }
  if (path === '/v1/models') return reply.json({ object: 'list', data: backend.models.map((id) => ({ id, object: 'model', created: 1700000000 })) });
  if (path === '/health' && backend.kind === 'llamacpp') return reply.json({ status: 'ok' });
  reply.json({ error: { message: 'no such page' } }, 404);
}
