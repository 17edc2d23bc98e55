// scene.mjs
// Owns:     the place where a night is played: one Nexus before five scripted backends, a steady load of good requests, and
//           a hurried Prometheus that scrapes it.
// Promises: the load goes on whatever happens, and comes back when Nexus does; a fault that is over leaves nothing behind.
// Leaves:   the faults and what they raise to faults.mjs, the judging to night.mjs.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { RawClient, answer_plainly, chat, free_port, get, make_certificate, parse_metrics, sleep, start_backend, start_nexus, until } from '../e2e/harness.mjs';
import { AlertWatch, start_hurried_prometheus } from '../e2e/alerts.mjs';
import { completions } from '../e2e/fleet.mjs';

const keys = { alice: 'sk-alice-0123456789', hasty: 'sk-hasty-0123456789 rpm=1', prometheus: 'sk-prometheus-0123456' };
const headers_of = (name) => ({ 'Content-Type': 'application/json', Authorization: `Bearer ${keys[name].split(' ')[0]}` });
export const good = headers_of('alice');
export const hasty = headers_of('hasty');

// Which backend has which models. `m1` has two; `big` may fall back to `small`; `narrow` takes four requests at once.
const fleet = [['one', ['m1']], ['two', ['m1']], ['small', ['small']], ['big', ['big']], ['narrow', ['narrow'], { max_pending: 4 }]];
// The steady load: most of it asks for `m1`, half of these by its alias, half of them streams. Some 35 requests a second.
const steady = [
  { model: 'm1', pause_ms: 120 }, { model: 'm1', more: { stream: true }, pause_ms: 120 }, { model: 'gpt-4', more: { stream: true }, pause_ms: 120 },
  { model: 'small', pause_ms: 240 }, { model: 'big', pause_ms: 240 }, { model: 'narrow', pause_ms: 240 },
];

export class Scene {
  constructor(t, factor) {
    this.t = t;
    this.factor = factor;
    this.backends = {};
    this.resting = new Set();   // models that the steady load leaves alone
    this.crowd = new Set();     // connections of a fault
    this.tasks = [];            // and its loops
    this.acting = false;
    this.over = false;
  }

  get port() { return this.nexus.port; }

  // ---- Nexus ----

  async restart() {
    await this.kill();
    await this.bring_up();
  }
  async kill() {
    this.nexus.child.kill('SIGKILL');
    await this.nexus.exited;
  }
  async bring_up() {
    this.nexus.spawn(['-c', this.nexus.conf_path]);
    await this.nexus.ready(false);
  }
  reload_good() { this.nexus.reload(this.conf); }
  set_certificate(files) {
    fs.copyFileSync(files.both, this.certificate);
    this.reload_good();
  }
  descriptors() { return fs.readdirSync(`/proc/${this.nexus.pid}/fd`).length; }
  limit_descriptors(soft) { execFileSync('prlimit', ['--pid', String(this.nexus.pid), `--nofile=${soft}:`]); }

  // ---- backends ----

  // Lets a backend answer by `script` until heal().
  script(name, script) { this.backends[name].script = script; }
  async down(...names) { for (const name of names) await this.backends[name].stop(); }
  async up(...names) { for (const name of names) await this.backends[name].start(); }
  close_gate(name) {
    const backend = this.backends[name];
    backend.gate = new Promise((done) => { backend.open_gate = done; });
    this.script(name, async (request, reply) => {
      if (request.json.held) await backend.gate;
      return answer_plainly(request, reply);
    });
  }
  heal(name) {
    this.backends[name].open_gate?.();
    this.backends[name].script = null;
  }

  // ---- clients ----

  // Calls `run` again and again, each `pause_ms` after its end, until the fault is over; what it throws is the fault's.
  repeat(pause_ms, run, first_ms = 0) {
    const loop = async () => {
      await sleep(first_ms);
      for (; this.acting; await sleep(pause_ms)) await run().catch(() => {});
    };
    this.tasks.push(loop());
  }
  async connect() {
    const client = await RawClient.connect(this.port);
    this.crowd.add(client);
    return client;
  }
  leave(client) {
    this.crowd.delete(client);
    client.close();
  }
  // One request on a connection of its own; with `body` a text, that as it is.
  async ask(body, { headers = good, url = completions, ms = 120_000 } = {}) {
    const client = await this.connect();
    try {
      client.send('POST', url, headers, body);
      return await client.response(ms);
    } finally {
      this.leave(client);
    }
  }
  // A connection that has asked once and is kept; null where Nexus refuses it.
  async idle() {
    const client = await this.connect();
    try {
      client.send('GET', '/health');
      if ((await client.response(5_000)).status === 200) return client;
    } catch {
      // refused: it is closed like one that got a 503
    }
    this.leave(client);
    return null;
  }
  async page() { return parse_metrics((await get(this.port, '/metrics', { headers: good })).text); }
  rest(model) { this.resting.add(model); }

  // Ends what a fault has started, but for what its own end() must undo.
  async disperse() {
    this.acting = false;
    this.resting.clear();
    for (const client of [...this.crowd]) this.leave(client);
    await Promise.all(this.tasks.splice(0));
  }

  async keep_asking({ model, more, pause_ms }) {
    let client = null;
    for (; !this.over; await sleep(pause_ms)) {
      if (this.resting.has(model)) continue;
      try {
        if (!client || client.over) client = await RawClient.connect(this.port);
        client.send('POST', completions, good, chat(model, more));
        const answer = await client.response(120_000);
        if (!answer.complete || /close/i.test(answer.headers.get('connection'))) client = client.close();
      } catch {
        client = client?.close();   // Nexus is down or was killed
      }
    }
    client?.close();
  }
}

async function follow(request, reply, backend) {
  backend.requests.length = 0;   // ten minutes of them are of no use
  return (backend.script ?? answer_plainly)(request, reply, backend);
}

// Starts the scene: `factor` is that of the Prometheus. With `full`, also what only the whole night needs.
export async function start_scene(t, { factor, full = true }) {
  const scene = new Scene(t, factor);
  const backends = [];
  for (const [name, models, more] of fleet) {
    scene.backends[name] = await start_backend(t, { models, answer: follow });
    backends.push({ name, mock: scene.backends[name], ...more });
  }
  const server = { max_connections: 300, api_keys_file: t.file('keys', Object.entries(keys).map((pair) => `${pair.join(' ')}\n`).join('')) };
  if (full) {
    scene.certificate = path.join(t.dir(), 'gateway.pem');
    fs.copyFileSync(make_certificate().both, scene.certificate);
    Object.assign(server, { tls_listen: `127.0.0.1:${await free_port()}`, tls_certificate: scene.certificate });
  }
  const minute_ms = 60_000 / factor;
  scene.conf = {
    server, backends, aliases: { 'gpt-4': 'm1' }, fallbacks: { big: 'small' }, queue: { size: 10, timeout: '120s' },
    health: { interval: `${Math.round(minute_ms / 2)}ms`, timeout: '400ms', eject_time: `${Math.round(minute_ms / 12)}ms` },
  };
  scene.nexus = await start_nexus(t, scene.conf);
  const load = steady.map((row) => scene.keep_asking(row));
  t.after(async () => {
    scene.over = true;
    await scene.disperse();
    for (const name of Object.keys(scene.backends)) scene.heal(name);
    await Promise.all(load);
  });
  scene.prometheus = await start_hurried_prometheus(t, { port: scene.port, key: keys.prometheus, factor });
  await until(async () => (await scene.prometheus.query('fleet:nexus_requests:rate5m > 10')).length === 1, 'the load, as Prometheus sees it', 30_000);
  scene.watch = new AlertWatch(t, scene.prometheus);
  return scene;
}
