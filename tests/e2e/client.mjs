// client.mjs
// Owns:     a client on bare sockets: it sends any bytes, and is the end-to-end tests' only reader of HTTP responses.
// Promises: it reads strictly; a response says how it was framed and if it is complete; nothing is retried or hidden.
// Leaves:   judging the responses to the tests.
import fs from 'node:fs';
import net from 'node:net';
import tls from 'node:tls';
import { authority } from './certificates.mjs';
import { within } from './runner.mjs';

const CRLF2 = Buffer.from('\r\n\r\n');

export class Headers {
  constructor(lines) { this.list = lines; }   // [[name as written, value], …] in order
  all(name) { return this.list.filter(([n]) => n.toLowerCase() === name.toLowerCase()).map(([, v]) => v); }
  get(name) { return this.all(name).join(', '); }
  has(name) { return this.all(name).length > 0; }
  names() { return this.list.map(([n]) => n.toLowerCase()); }
}

export function parse_header_lines(text) {
  return new Headers(text.split('\r\n').filter(Boolean).map((line) => {
    const m = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*$/s.exec(line);
    if (!m) throw new Error(`not a header line: ${JSON.stringify(line)}`);
    return [m[1], m[2]];
  }));
}

// In a run over TLS (run.mjs --tls): the port for TLS of the daemon that has this one in clear.
export const tls_ports = new Map();

export class RawClient {
  // `secure`: options of tls.connect(); then the connection speaks TLS.
  static connect(port, { host = '127.0.0.1', from, pause = false, secure = tls_ports.has(port) ? {} : null } = {}) {
    const raw = net.connect({ port: tls_ports.get(port) ?? port, host, localAddress: from, noDelay: true, allowHalfOpen: true });
    const trusts = () => ({ ca: fs.readFileSync(authority().pem), servername: 'localhost' });
    const socket = secure ? tls.connect({ socket: raw, allowHalfOpen: true, ...trusts(), ...secure }) : raw;
    return within(5_000, new Promise((done, fail) => {
      socket.once(secure ? 'secureConnect' : 'connect', () => {
        const client = new RawClient(socket, pause);
        client.raw = raw;
        done(client);
      });
      for (const one of [raw, socket]) one.on('error', fail); // the one below TLS tells its end for itself
    }), `connect to ${host}:${port}`);
  }

  constructor(socket, pause) {
    this.socket = socket;
    this.parts = [];       // received, not read yet
    this.length = 0;
    this.received = 0;     // bytes in all
    this.over = false;     // the peer's FIN or reset has arrived
    this.was_reset = false;
    this.wake = [];
    this.method = 'GET';   // of the request that belongs to the next response
    socket.on('error', () => { this.was_reset = true; });
    socket.on('end', () => this.finish());
    socket.on('close', () => this.finish());
    if (!pause) this.resume();
  }

  resume() {
    if (!this.flowing) {
      this.flowing = true;
      this.socket.on('data', (data) => {
        this.parts.push(data);
        this.length += data.length;
        this.received += data.length;
        this.notify();
      });
    }
    this.socket.resume();
  }

  finish() { this.over = true; this.notify(); }
  notify() { for (const wake of this.wake.splice(0)) wake(); }
  more(ms, what) {
    if (this.over) return Promise.resolve();
    return within(ms, new Promise((done) => this.wake.push(done)),
                  () => `${what}, having ${JSON.stringify(this.peek().toString('latin1').slice(0, 300))}`);
  }
  peek() {
    if (this.parts.length > 1) this.parts = [Buffer.concat(this.parts)];
    return this.parts[0] ?? Buffer.alloc(0);
  }
  take(n) {
    const all = this.peek();
    this.parts = n < all.length ? [all.subarray(n)] : [];
    this.length -= n;
    return all.subarray(0, n);
  }

  write(data) { return this.socket.write(data); }
  send(method, path, headers = {}, body = null) {
    this.method = method;
    if (!Buffer.isBuffer(body) || body.length < 100_000) return this.write(request_bytes(method, path, headers, body));
    this.write(request_bytes(method, path, headers, body, '1.1', false));   // avoids a copy of a large body
    return this.write(body);
  }
  half_close() { this.socket.end(); }
  reset() { this.raw.resetAndDestroy(); }
  close() { this.socket.destroy(); this.raw.destroy(); }

  // The bytes up to and including `mark`, or null if the connection ended before it.
  async read_through(mark, ms = 10_000) {
    for (;;) {
      const at = this.peek().indexOf(mark);
      if (at >= 0) return this.take(at + mark.length);
      if (this.over) return null;
      await this.more(ms, `waiting for ${JSON.stringify(mark.toString())}`);
    }
  }

  // The next head, 1xx included. Fails if the connection ends first.
  async any_head(ms = 10_000) {
    const bytes = await this.read_through(CRLF2, ms);
    if (bytes === null) {
      throw new Error(`the connection ended ${this.was_reset ? '(reset) ' : ''}before a whole head, after ` +
                      JSON.stringify(this.peek().toString('latin1').slice(0, 300)));
    }
    const text = bytes.toString('latin1');
    const m = /^HTTP\/(1\.[01]) (\d{3}) ?([^\r\n]*)\r\n/.exec(text);
    if (!m) throw new Error(`not a status line: ${JSON.stringify(text.slice(0, 200))}`);
    const head = { version: m[1], status: Number(m[2]), reason: m[3], raw: bytes };
    head.headers = parse_header_lines(text.slice(m[0].length));
    return head;
  }

  // The head of the next final response; 1xx before it are kept in head.informational.
  async head(ms = 10_000) {
    const informational = [];
    for (;;) {
      const head = await this.any_head(ms);
      if (head.status >= 200) {
        head.informational = informational;
        this.body = this.framing(head);
        return head;
      }
      informational.push(head);
    }
  }

  framing(head) {
    const lengths = head.headers.all('content-length');
    const codings = head.headers.all('transfer-encoding');
    if (lengths.length > 1 || (lengths.length && codings.length)) throw new Error('a response with two framings');
    if (this.method === 'HEAD' || head.status === 204 || head.status === 304) return { how: 'none', left: 0, done: true };
    if (codings.length) {
      if (codings.join().toLowerCase() !== 'chunked') throw new Error(`odd transfer coding ${codings}`);
      if (head.version === '1.0') throw new Error('chunked in a response of HTTP/1.0');
      return { how: 'chunked', left: 0, done: false, chunks: 0 };
    }
    if (lengths.length) {
      if (!/^\d+$/.test(lengths[0])) throw new Error(`odd Content-Length ${lengths[0]}`);
      return { how: 'length', left: Number(lengths[0]), done: lengths[0] === '0' };
    }
    return { how: 'close', left: Infinity, done: false };
  }

  // The next body bytes as soon as there are any; null at the end. body.done is true if the body is complete.
  async piece(ms = 10_000) {
    const b = this.body;
    for (;;) {
      if (b.done) return null;
      if (b.how === 'chunked' && b.left === 0) {
        const line = await this.read_through(Buffer.from('\r\n'), ms);
        if (line === null) return null;
        const size = /^([0-9a-fA-F]{1,12})\r\n$/.exec(line.toString('latin1'));
        if (!size) throw new Error(`not a chunk-size line: ${JSON.stringify(line.toString('latin1'))}`);
        b.left = parseInt(size[1], 16);
        b.chunks += 1;
        if (b.left === 0) {
          const end = await this.read_through(Buffer.from('\r\n'), ms);
          if (end === null) return null;
          if (end.length !== 2) throw new Error(`trailers: ${end}`);
          b.done = true;
          return null;
        }
      }
      if (this.length > 0) {
        const bytes = this.take(Math.min(b.left, this.length));
        b.left -= bytes.length;
        if (b.left === 0 && b.how === 'length') b.done = true;
        if (b.left === 0 && b.how === 'chunked') {
          while (this.length < 2 && !this.over) await this.more(ms, 'waiting for the end of a chunk');
          if (this.length >= 2 && this.take(2).toString() !== '\r\n') throw new Error('a chunk that does not end in CRLF');
        }
        return bytes;
      }
      if (this.over) {
        if (b.how === 'close' && !this.was_reset) b.done = true;
        return null;
      }
      await this.more(ms, 'waiting for body bytes');
    }
  }

  // The next final response. If the connection ends within it, `complete` is false.
  async response(ms = 10_000) {
    const head = await this.head(ms);
    const parts = [];
    for (let p = await this.piece(ms); p !== null; p = await this.piece(ms)) parts.push(p);
    return finish_response(head, Buffer.concat(parts), this.body);
  }

  // Waits for the peer to end the connection; returns the bytes that were not read.
  async ended(ms = 10_000) {
    while (!this.over) await this.more(ms, 'waiting for the connection to end');
    return this.peek();
  }
}

function finish_response(head, body, framing) {
  return {
    ...head, body, how: framing.how, complete: framing.done,
    text: body.toString(),
    get json() { return JSON.parse(body.toString()); },
  };
}

// headers: an object, or a list of [name, value] if order or repetition matters. Adds Host unless given (or null).
export function request_bytes(method, path, headers = {}, body = null, version = '1.1', with_body = true) {
  const list = Array.isArray(headers) ? [...headers] : Object.entries(headers);
  const names = list.map(([n]) => n.toLowerCase());
  if (!names.includes('host')) list.unshift(['Host', 'nexus.test']);
  const bytes = body === null ? Buffer.alloc(0) : Buffer.isBuffer(body) ? body : Buffer.from(typeof body === 'string' ? body : JSON.stringify(body));
  if (body !== null && !names.includes('content-length') && !names.includes('transfer-encoding')) {
    list.push(['Content-Length', String(bytes.length)]);
  }
  const lines = list.filter(([, v]) => v !== null).map(([n, v]) => `${n}: ${v}\r\n`).join('');
  const head = Buffer.from(`${method} ${path} HTTP/${version}\r\n${lines}\r\n`, 'latin1');
  return with_body ? Buffer.concat([head, bytes]) : head;
}

export function chunked_bytes(body, sizes, { extension = '', trailers = '' } = {}) {
  const out = [];
  for (let at = 0, i = 0; at < body.length; i++) {
    const piece = body.subarray(at, at + sizes[i % sizes.length]);
    out.push(Buffer.from(piece.length.toString(16) + extension + '\r\n'), piece, Buffer.from('\r\n'));
    at += piece.length;
  }
  out.push(Buffer.from(`0\r\n${trailers}\r\n`));
  return Buffer.concat(out);
}

// One request on a connection of its own.
export async function request(port, method, path, { headers = {}, body = null, ms = 10_000, host, secure } = {}) {
  const client = await RawClient.connect(port, { host, secure });
  try {
    client.send(method, path, headers, body);
    return await client.response(ms);
  } finally {
    client.close();
  }
}

export const get = (port, path, options) => request(port, 'GET', path, options);
export const post = (port, path, body, options) =>
  request(port, 'POST', path, { ...options, body, headers: { 'Content-Type': 'application/json', ...options?.headers } });

// The events of an SSE body: the texts between blank lines, including comments; `rest` is the text after the last one.
export function sse_events(text) {
  const parts = text.replace(/\r\n/g, '\n').split('\n\n');
  const rest = parts.pop();
  return { events: parts, rest, data: parts.map((e) => e.split('\n').filter((l) => l.startsWith('data:')).map((l) => l.slice(5).trimStart()).join('\n')) };
}
