// fleet.mjs
// Owns:     several backends with one daemon in front of them, for the tests of routing, queueing and failures.
// Promises: when the test ends, nothing is pending or queued, and the counts of requests, access log lines, attempts and
//           arrivals at the backends agree exactly.
// Leaves:   the requests, and the expected responses, to the tests.
import { fork } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { RawClient, answer_plainly, chat, chat_chunk, get, page_after, parse_metrics, post, request_bytes, settings, sleep, sse, start_backend, start_nexus, until, within } from './harness.mjs';

export const completions = '/v1/chat/completions';
const here = path.dirname(new URL(import.meta.url).pathname);

// A backend that follows members of the request's body: waits `wait_ms` before its first byte; streams `pieces`, one every
// `every_ms`; with `held` it holds a response (or a stream, after its first piece) until its `gate` opens; with `held_back`
// it does not begin a stream before that.
export async function act(request, reply, backend) {
  const ask = request.json;
  if (ask.wait_ms) await sleep(ask.wait_ms);
  if (!ask.stream || !ask.pieces) {
    if (ask.held) await backend.gate;
    return answer_plainly(request, reply, backend);
  }
  if (ask.held_back) await backend.gate;
  reply.stream();
  for (let i = 0; i < ask.pieces; i++) {
    reply.piece(sse(chat_chunk(ask.model, `p${i} `, {}, i === 0)));
    if (i === 0 && ask.held) await backend.gate;
    if (i + 1 < ask.pieces) await sleep(ask.every_ms ?? 0);
  }
  reply.piece(sse('[DONE]'));
  reply.finish();
  return undefined;
}

export const fails_with = (status, headers = {}) => (request, reply) => reply.json({ error: { message: `made up ${status}` } }, status, headers);

// Adds a gate for `held` responses.
export function add_gate(backend) {
  backend.gate = new Promise((done) => { backend.open_gate = done; });
  return backend;
}

// Wraps a backend's `answer` so that `running` counts the responses in progress, and `most` is their maximum.
export function count_running(backend) {
  const answer = backend.answer;
  Object.assign(backend, { running: 0, most: 0 });
  backend.answer = async (request, reply, self) => {
    // A connection that was reset before this request came is told of in the same turn of this process, or its end.
    for (let turn = 0; turn < 2; turn++) await new Promise(setImmediate);
    backend.most = Math.max(backend.most, ++backend.running);
    try {
      await Promise.race([answer(request, reply, self), request.connection.ended]);   // a client that hangs up needs no response
    } finally {
      backend.running--;
    }
  };
  return backend;
}

// A backend in a process of its own, which can be killed or stopped like a failing machine. It answers with act().
export async function start_child_backend(t, options = {}) {
  const child = fork(path.join(here, 'child_backend.mjs'), [JSON.stringify(options)], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
  const exited = new Promise((done) => child.once('exit', done));
  t.after(async () => {
    child.kill('SIGKILL');
    await exited;
  });
  const { port } = await within(5_000, new Promise((done) => child.once('message', done)), 'a child backend');
  return { kind: options.kind ?? 'generic', url: `${settings.tls ? 'https' : 'http'}://127.0.0.1:${port}`, in_child: true, kill: (signal) => child.kill(signal), exited };
}

let fleets = 0;

// A fast backend for tests with thousands of requests: it counts them and gives every one the same response.
class LightBackend {
  constructor(models = ['m1']) {
    this.kind = 'generic';
    this.requests = { length: 0 };
    const list = JSON.stringify({ object: 'list', data: models.map((id) => ({ id, object: 'model' })) });
    const page = (text) => Buffer.from(`HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ${text.length}\r\n\r\n${text}`);
    this.answers = { models: page(list), chat: page('{"usage":{"prompt_tokens":1,"completion_tokens":1}}') };
  }
  get url() { return `http://127.0.0.1:${this.server.address().port}`; }
  start() {
    this.server = net.createServer({ noDelay: true }, (socket) => {
      let text = '';
      socket.on('error', () => {});
      socket.on('data', (data) => {
        text += data.toString('latin1');
        const end = text.indexOf('\r\n\r\n');
        if (end < 0 || text.length < end + 4 + Number(/\r\nContent-Length: (\d+)/i.exec(text)?.[1] ?? 0)) return;
        const is_probe = text.startsWith('GET ');
        if (!is_probe) this.requests.length += 1;
        socket.write(is_probe ? this.answers.models : this.answers.chat);
        text = '';
      });
    });
    return new Promise((done) => this.server.listen(0, '127.0.0.1', 512, () => done(this)));
  }
}

async function start_light_backend(t) {
  const backend = await new LightBackend().start();
  t.after(() => backend.server.close());
  return backend;
}

class Fleet {
  constructor(t, mocks, conf) {
    this.mocks = mocks;         // name → the backend
    this.asked = 0;             // requests sent through this fleet; Nexus must count each once
    this.moved = false;         // a backend was stopped, so the number of requests that reached it is uncertain
    this.log_path = path.join(t.dir(), `access-${++fleets}.log`);
    this.conf = conf;
  }

  with_log(conf) { return { ...conf, log: { format: 'json', access: this.log_path, ...conf.log } }; }
  reload(conf) {
    this.reloads = this.count_reloads();
    this.nexus.reload(this.with_log(conf));
  }
  count_reloads() { return this.nexus.log().split('reloaded').length; }
  get port() { return this.nexus.port; }

  // One request on a connection of its own.
  ask(model, more, options = {}) {
    this.asked += 1;
    return post(this.port, completions, chat(model, more), { ms: 15_000, ...options });
  }
  async ask_many(count, model, more) {
    const answers = [];
    for (let i = 0; i < count; i++) answers.push(await this.ask(model, more));
    return answers;
  }
  // Sends a request and returns its client.
  async send(model, more) {
    const client = await RawClient.connect(this.port);
    this.asked += 1;
    client.send('POST', completions, { 'Content-Type': 'application/json' }, chat(model, more));
    return client;
  }
  // Each of `clients` sends one request after the other until `over()`; calls on_answer for each response.
  async load(clients, over, make, on_answer) {
    await Promise.all(Array.from({ length: clients }, async (_, c) => {
      let client = null;
      for (let i = 0; !over(); i++) {
        if (!client || client.over) client = await RawClient.connect(this.port);
        const [model, more] = make(c, i);
        this.asked += 1;
        client.send('POST', completions, { 'Content-Type': 'application/json' }, chat(model, more));
        const answer = await client.response(15_000);
        on_answer(answer);
        if (!answer.complete || /close/i.test(answer.headers.get('connection'))) {
          client.close();
          client = null;
        }
      }
      client?.close();
    }));
  }

  async page() { return parse_metrics((await get(this.port, '/metrics')).text); }
  // The metrics page, once all requests are counted.
  page_of_all() { return page_after(this.asked, this.port); }
  async gauge(name, labels = {}) { return (await this.page()).sum(name, labels); }
  queued(n) { return this.reaches('nexus_queue_depth', n); }
  pending(n, labels) { return this.reaches('nexus_pending_requests', n, labels); }
  async reaches(name, wanted, labels = {}) {
    let seen;
    await until(async () => (seen = await this.gauge(name, labels)) === wanted, () => `${name} at ${wanted} (it is ${seen})`, 5_000);
  }
  // Waits until the reload is in force, with exactly these backends.
  async has_backends(names) {
    await until(async () => (await this.page()).select('nexus_backend_up').map((s) => s.labels.backend).sort().join() === [...names].sort().join(), `backends ${names}`);
    await until(() => this.count_reloads() > this.reloads, 'the log to say reloaded');
  }

  log() { return fs.readFileSync(this.log_path, 'utf8').split('\n').filter(Boolean).map((line) => JSON.parse(line)); }

  // Checks that all counts agree, at the end.
  async balance() {
    let page;
    let why = '';
    await until(async () => {
      page = await this.page();
      const left = ['nexus_pending_requests', 'nexus_queue_depth'].flatMap((name) => page.select(name)).filter((s) => s.value !== 0);
      const counted = page.sum('nexus_requests_total');
      why = `${left.map((s) => `${s.name} of ${s.labels.backend} is ${s.value}, `).join('')}${counted} requests counted, ${this.asked} asked`;
      return left.length === 0 && counted === this.asked;
    }, () => `the books to balance: ${why}`, 3_000);
    await until(() => this.log().length >= this.asked, () => `${this.asked} lines in the access log (${this.log().length})`, 3_000);
    const log = this.log();
    const same = (what, a, b) => {
      if (a !== b) throw new Error(`the books: ${what}: ${a} and ${b}`);
    };
    same('lines of the access log, requests', log.length, this.asked);
    same('attempts in the log, nexus_backend_attempts_total', log.reduce((n, l) => n + l.attempts, 0), page.sum('nexus_backend_attempts_total'));
    const ended_well = log.filter((l) => l.attempts > 0 && !l.cut && l.status < 499 && l.status !== 429).length;
    same('answers passed on in the log, attempts that were ok', ended_well, page.sum('nexus_backend_attempts_total', { outcome: 'ok' }));
    for (const [name, mock] of Object.entries(this.mocks)) this.balance_backend(page, name, mock, same);
  }

  balance_backend(page, name, mock, same) {
    const attempts = (outcome) => page.sum('nexus_backend_attempts_total', outcome ? { backend: name, outcome } : { backend: name });
    const unsure = attempts('cancelled') + attempts('timeout');
    if (this.moved || mock.in_child || !mock.requests || unsure > 0) return;
    same(`requests at ${name}, attempts that could reach it`, mock.requests.length, attempts() - attempts('connect_error'));
  }
}

// backends: { name: { conf: {…its section}, …its kind } }: `light` is a LightBackend, `child` has a process of its own,
// `refuses` has a port that refuses connections; other members are passed to Backend.
export async function start_fleet(t, backends, conf = {}, start_options = {}) {
  const mocks = {};
  const rows = [];
  for (const [name, { conf: own = {}, child, refuses, light, ...options }] of Object.entries(backends)) {
    mocks[name] = child ? await start_child_backend(t, child) : light ? await start_light_backend(t) : await start_backend(t, { answer: act, ...options });
    if (refuses) await mocks[name].stop();
    rows.push({ name, mock: mocks[name], ...own });
  }
  const fleet = new Fleet(t, mocks, { ...conf, backends: rows });
  fleet.nexus = await start_nexus(t, fleet.with_log(fleet.conf), start_options);
  t.after(() => fleet.balance());
  return fleet;
}

export const tally = (rows, key) => {
  const out = {};
  for (const row of rows) out[key(row)] = (out[key(row)] ?? 0) + 1;
  return out;
};

export const served_by = (answer) => answer.headers.get('x-nexus-backend');
export const reason_of = (answer) => answer.headers.get('x-nexus-route-reason');
export const backend_message = (answer) => answer.json.error.message;

// Sends the same request `count` times, up to `depth` at once on each of `connections`.
// Resolves to { by: backend → responses, not_ok }.
export async function burst(fleet, body, count, { connections = 8, depth = 8 } = {}) {
  fleet.asked += count;
  const bytes = request_bytes('POST', completions, { 'Content-Type': 'application/json' }, body);
  const out = { by: {}, not_ok: 0 };
  let left = count;
  const run = async () => {
    const client = await RawClient.connect(fleet.port);
    for (let waiting = 0; waiting + left > 0; waiting -= 1) {
      const more = waiting <= depth / 2 ? Math.min(depth - waiting, left) : 0;
      left -= more;
      waiting += more;
      if (more > 0) client.write(Buffer.concat(Array(more).fill(bytes)));
      if (waiting === 0) break;
      const answer = await client.response(30_000);
      const name = served_by(answer) || 'none';
      out.by[name] = (out.by[name] ?? 0) + 1;
      if (answer.status !== 200) out.not_ok += 1;
    }
    client.close();
  };
  await Promise.all(Array.from({ length: connections }, run));
  return out;
}

// A smaller count if the build is a slow one.
export const scaled = (count, least = 1) => (settings.sanitised ? Math.max(least, Math.round(count / 5)) : count);
