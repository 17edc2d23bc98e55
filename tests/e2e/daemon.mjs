// daemon.mjs
// Owns:     starting the real binary with a configuration of the test's, watching it, and stopping it.
// Promises: a started daemon answers /health; when the test ends it gets SIGTERM and must exit 0 with no sanitizer's report.
// Leaves:   what is in the configuration to the test.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { Backend } from './backend.mjs';
import { authority, certificate } from './certificates.mjs';
import { get, tls_ports } from './client.mjs';
import { settings, sleep, until, within } from './runner.mjs';

// Below the kernel's ephemeral range, so that no outgoing connection can hold the port between our look and the daemon's bind.
let next_port = 10_000 + Math.floor(Math.random() * 20_000);

export async function free_port(host = '127.0.0.1') {
  for (;;) {
    next_port = next_port >= 32_000 ? 10_000 : next_port + 1;
    const port = next_port;
    const server = net.createServer();
    const ok = await new Promise((done) => {
      server.once('error', () => done(false));
      server.listen(port, host, () => server.close(() => done(true)));
    });
    if (ok) return port;
  }
}

// { server: {…}, backends: [{ name, … }], aliases: {…} } → the text of nexus.conf. An array of values repeats the key.
export function conf_text(conf) {
  const lines = [];
  const section = (title, values) => {
    lines.push(`[${title}]`);
    for (const [key, value] of Object.entries(values)) {
      for (const one of Array.isArray(value) ? value : [value]) if (one !== undefined) lines.push(`${key} = ${one}`);
    }
    lines.push('');
  };
  for (const [title, values] of Object.entries(conf)) {
    if (title === 'backends') continue;
    section(title, values);
  }
  for (const { name, ...values } of conf.backends ?? []) {
    if (values.mock) {
      values.url ??= values.mock.url;
      values.type ??= values.mock.kind;
      if (values.url.startsWith('https:') && values.tls_verify === undefined) values.tls_ca ??= authority().pem;
      delete values.mock;
    }
    section(`backend ${name}`, values);
  }
  return lines.join('\n');
}

// In a run over TLS: `conf` with a port for TLS beside that in clear, which the tests' clients use then.
function over_tls(conf, port) {
  const { pem, key } = certificate();
  const trusting = (one) => (String(one.url).startsWith('https:') ? { tls_ca: authority().pem, ...one } : one);
  const backends = (conf.backends ?? []).map(trusting);
  const sections = Object.fromEntries(Object.entries(conf).map(([title, one]) => [title, title.startsWith('backend ') ? trusting(one) : one]));
  const server = { tls_listen: `127.0.0.1:${tls_ports.get(port)}`, tls_certificate: pem, tls_key: key, ...conf.server };
  return { ...sections, server, backends };
}

// Runs the binary to its end; for -t, --version and the like.
export function run_nexus(args, { ms = 10_000, env = {}, cwd } = {}) {
  const child = spawn(settings.nexus, args, { env: { ...process.env, ...env }, cwd, stdio: ['ignore', 'pipe', 'pipe'] });
  const out = { stdout: '', stderr: '' };
  child.stdout.on('data', (d) => { out.stdout += d; });
  child.stderr.on('data', (d) => { out.stderr += d; });
  const done = new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, ...out }));
  });
  return within(ms, done, `nexus ${args.join(' ')}`).catch((error) => {
    child.kill('SIGKILL');
    throw error;
  });
}

// Whatever ends the run, a crash of it too: no daemon that it started is left behind.
const running = new Set();
process.on('exit', () => { for (const child of running) child.kill('SIGKILL'); });
export function kill_at_end(child) {
  running.add(child);
  child.on('close', () => running.delete(child));
}

const sanitizer_report = /ERROR: (Address|Leak)Sanitizer|runtime error:|WARNING: ThreadSanitizer|Sanitizer:DEADLYSIGNAL/;

export class Nexus {
  constructor(t, conf) {
    this.t = t;
    this.conf = conf;
    this.stderr = '';
    this.stdout = '';
    this.stopped = false;
  }

  get pid() { return this.child.pid; }

  spawn(args, env) {
    this.child = spawn(settings.nexus, args, { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
    this.child.stderr.on('data', (d) => { this.stderr += d; });
    this.child.stdout.on('data', (d) => { this.stdout += d; });
    this.exit = null;
    this.exited = new Promise((done) => {
      this.child.on('close', (code, signal) => done(this.exit = { code, signal }));
      this.child.on('error', (error) => done(this.exit = { code: null, signal: error.message }));
    });
    kill_at_end(this.child);
  }

  // Waits until /health answers, and with `all` until every backend was found healthy.
  async ready(all, ms = 5_000) {
    await until(async () => {
      if (this.exit) throw new Error(`nexus exited: ${JSON.stringify(this.exit)}`);
      const health = await get(this.port, '/health', { ms: 2_000 });
      return !all || health.json.backends.healthy === health.json.backends.total;
    }, () => 'nexus ready', ms).catch((error) => {
      throw new Error(`nexus did not come up: ${error.message} ${this.stderr.slice(-600)}`);
    });
  }

  write_conf(conf) {
    this.conf = conf;
    if (settings.tls && typeof conf !== 'string') conf = over_tls(conf, this.port);
    const text = typeof conf === 'string' ? conf.replaceAll('@PORT@', String(this.port))
                                          : conf_text({ ...conf, server: { listen: `127.0.0.1:${this.port}`, threads: 2, ...conf.server } });
    fs.writeFileSync(this.conf_path, text);
  }

  // Writes the new configuration and tells the daemon; the test waits for what it expects of it.
  reload(conf) {
    this.write_conf(conf);
    this.child.kill('SIGHUP');
  }

  log() { return this.stderr; }
  async logged(pattern, ms = 5_000) {
    return until(() => pattern.exec(this.stderr), `a log line like ${pattern} in ${JSON.stringify(this.stderr.slice(-600))}`, ms);
  }

  rss_bytes() { return proc_kilobytes(this.pid, 'VmRSS') * 1024; }

  async exits(ms = 10_000) {
    return within(ms, this.exited, () => `nexus to exit; its log ends ${JSON.stringify(this.stderr.slice(-400))}`);
  }

  check_report() {
    if (sanitizer_report.test(this.stderr)) {
      const at = this.stderr.search(sanitizer_report);
      throw new Error(`a sanitizer's report: ${this.stderr.slice(at, at + 1400)}`);
    }
  }

  // Stops as a service manager would, and insists on a clean end. A test that ended the daemon itself checks its exit itself.
  async stop() {
    if (this.stopped) return;
    this.stopped = true;
    const was_running = this.exit === null;
    if (was_running) this.child.kill('SIGTERM');
    try {
      const exit = await this.exits(8_000);
      this.check_report();
      if (was_running && (exit.code !== 0 || exit.signal)) throw new Error(`nexus ended with ${JSON.stringify(exit)}: ${this.stderr.slice(-600)}`);
      if (exit.signal && !['SIGKILL', 'SIGTERM', 'SIGINT'].includes(exit.signal)) throw new Error(`nexus died of ${exit.signal}: ${this.stderr.slice(-600)}`);
    } catch (error) {
      this.child.kill('SIGKILL');
      await this.exited;
      throw error;
    }
  }
}

export function proc_kilobytes(pid, field) {
  const m = new RegExp(`^${field}:\\s+(\\d+) kB`, 'm').exec(fs.readFileSync(`/proc/${pid}/status`, 'latin1'));
  return Number(m[1]);
}

// Starts a daemon for this test. options.ready: 'all' (backends healthy; with [health] enabled = no they are from the start, and
// only the models of their sections are known), 'up' (answers), 'no' (just spawned).
export async function start_nexus(t, conf, { ready = 'all', env = {} } = {}) {
  for (let attempt = 1; ; attempt++) {
    const nexus = new Nexus(t, conf);
    nexus.port = await free_port();
    if (settings.tls && typeof conf !== 'string') tls_ports.set(nexus.port, await free_port());
    nexus.conf_path = path.join(t.dir(), `nexus-${nexus.port}.conf`);
    nexus.write_conf(conf);
    nexus.spawn(['-c', nexus.conf_path], env);
    if (ready === 'no') {
      t.after(() => nexus.stop());
      return nexus;
    }
    try {
      await nexus.ready(ready === 'all');
    } catch (error) {
      nexus.child.kill('SIGKILL');
      if (attempt < 3 && /in use/i.test(nexus.stderr)) continue;
      throw error;
    }
    t.after(() => nexus.stop());
    t.notes.push(() => (nexus.exit && !nexus.stopped ? `nexus is gone: ${JSON.stringify(nexus.exit)}` : ''));
    t.notes.push(() => (nexus.stderr ? `log: ${nexus.stderr.trim().slice(-700).replace(/\n/g, ' | ')}` : ''));
    return nexus;
  }
}

export async function start_backend(t, options) {
  const backend = await new Backend(options).start();
  t.after(async () => {
    await backend.stop().catch(() => {});
    if (backend.violations.length) throw new Error(`at the backend: ${backend.violations[0]}`);
  });
  return backend;
}

// The usual pair: a daemon with one backend named `b1` of the given kind.
export async function pair(t, backend_options = {}, conf = {}, start_options) {
  const backend = await start_backend(t, backend_options);
  const { backend: extra = {}, ...rest } = conf;
  const nexus = await start_nexus(t, { ...rest, backends: [{ name: 'b1', mock: backend, ...extra }, ...(rest.backends ?? [])] }, start_options);
  return { nexus, backend };
}

// The value of nexus_pending_requests of a backend, or null where /metrics is off.
export async function pending(nexus, backend = 'b1', port = nexus.port) {
  const page = await get(port, '/metrics');
  if (page.status !== 200) return null;
  const m = new RegExp(`^nexus_pending_requests\\{backend="${backend}"\\} (\\S+)$`, 'm').exec(page.text);
  return m ? Number(m[1]) : NaN;
}

export async function pending_is(nexus, wanted, backend = 'b1') {
  let seen;
  await until(async () => (seen = await pending(nexus, backend)) === wanted || seen === null,
              `nexus_pending_requests{backend="${backend}"} at ${wanted}`, 3_000).catch((error) => {
    throw new Error(`${error.message}, it is ${seen}`);
  });
}

export { sleep };
