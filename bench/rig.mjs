// rig.mjs
// Owns:     the processes of the proxy benchmark: the backends, the floor, the peers, Nexus; the load on them; what they used.
// Promises: proxies run on core 0, load and backends on core 1; a process's CPU time is user and system time of all its
//           threads, from /proc; what was started is stopped, also after a failure or Ctrl-C; a load that saw an error is an error.
// Leaves:   what is measured to proxy_cases.mjs.
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const here = path.dirname(new URL(import.meta.url).pathname);
const ticks_per_second = Number(execFileSync('getconf', ['CLK_TCK']));
const children = new Set();
export const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-bench-'));
fs.chmodSync(dir, 0o755);

// Descriptors for the servers: 10,000 streams take two each. Root may raise the limit, others have what they have.
export const descriptors = (() => {
  for (const wanted of [65_536, 20_000, 8_192]) {
    const got = spawnSync('prlimit', [`--nofile=${wanted}:${wanted}`, 'bash', '-c', 'ulimit -n'], { encoding: 'utf8' });
    if (got.status === 0) return wanted;
  }
  return 1024;
})();

export const most_connections = Math.floor((descriptors - 200) / 2); // through a proxy, which has two sockets for each

let next_port = 12_000 + Math.floor(Math.random() * 15_000); // below the kernel's ephemeral range

export async function free_port() {
  for (;;) {
    const port = (next_port += 1);
    const server = net.createServer();
    const ok = await new Promise((done) => {
      server.once('error', () => done(false));
      server.listen(port, '127.0.0.1', () => server.close(() => done(true)));
    });
    if (ok) return port;
  }
}

// The example of README.md with the benchmark's addresses in it, and with the backend of streams.
function readme_conf() {
  const [, example] = /```ini\n(.*?)```/s.exec(fs.readFileSync(path.join(here, '..', 'README.md'), 'utf8'));
  return `${example.replace(/^listen = \S+/m, 'listen = 127.0.0.1:@small@').replace(/^url = \S+/gm, 'url = http://127.0.0.1:@backend@')}
[backend streams]
url = http://127.0.0.1:@stream_backend@
models = bench-stream
`;
}

export const conf_text = (name) => (name === 'README.md' ? readme_conf() : fs.readFileSync(path.join(here, 'proxy.conf.d', name), 'utf8'));

// A file of proxy.conf.d, or the example of README.md, with its @names@ filled in, and `more` behind it. The path of the result.
export function configure(name, values, more = '') {
  const all = { dir, descriptors, connections: most_connections, user: process.getuid() === 0 ? 'user root;' : '', ...values };
  const filled = (conf_text(name) + more).replace(/@(\w+)@/g, (_, key) => {
    if (!(key in all)) throw new Error(`${name}: no value for @${key}@`);
    return all[key];
  });
  const to = path.join(dir, `${values.small ?? values.backend}-${name}`);
  fs.writeFileSync(to, filled);
  return to;
}

function pinned(cores, command) {
  return ['taskset', '-c', cores, 'prlimit', `--nofile=${descriptors}:${descriptors}`, ...command];
}

// Starts a server and waits until its port takes connections.
export async function start(command, port, { cores = '1' } = {}) {
  const [file, ...args] = pinned(cores, command);
  const env = { ...process.env, GPU_BOX_KEY: 'sk-of-the-box' }; // for the example of README.md
  const child = spawn(file, args, { env, stdio: ['ignore', 'ignore', 'pipe'] });
  let said = '';
  child.stderr.on('data', (d) => { said = (said + d).slice(-4000); });
  children.add(child);
  let ended = false;
  child.on('close', () => { ended = true; children.delete(child); });
  for (let i = 0; i < 400; ++i) {
    if (await connects(port)) return child;
    if (ended) break;
    await sleep(25);
  }
  throw new Error(`${command.join(' ')} did not come up: ${said}`);
}

// Waits until this Nexus has found its backends healthy: before, requests are refused.
export async function healthy(port) {
  for (let i = 0; i < 400; ++i) {
    const answer = await fetch(`http://127.0.0.1:${port}/health`, { headers: { Connection: 'close' } });
    if ((await answer.json()).status === 'healthy') return;
    await sleep(25);
  }
  throw new Error(`the backends of port ${port} did not become healthy`);
}

function connects(port) {
  return new Promise((done) => {
    const socket = net.connect(port, '127.0.0.1', () => { socket.destroy(); done(true); });
    socket.on('error', () => done(false));
  });
}

export async function stop(child) {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const closed = new Promise((done) => child.once('close', done));
  child.kill('SIGTERM');
  const timer = setTimeout(() => child.kill('SIGKILL'), 3000);
  await closed;
  clearTimeout(timer);
}

process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  fs.rmSync(dir, { recursive: true, force: true });
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130));

// ---- what a process used ---------------------------------------------------------------------------------------------

function stat_fields(file) {
  const text = fs.readFileSync(file, 'latin1');
  return text.slice(text.lastIndexOf(')') + 2).split(' '); // [0] is the third field of proc(5)
}

const seconds_of = (fields) => (Number(fields[11]) + Number(fields[12])) / ticks_per_second;

// /proc/PID/task/*/schedstat tells the same time in ns where the kernel has it: what utime + stime are made from.
function task_seconds(pid, task) {
  try {
    return Number(fs.readFileSync(`/proc/${pid}/task/${task}/schedstat`, 'latin1').split(' ')[0]) / 1e9;
  } catch {
    return seconds_of(stat_fields(`/proc/${pid}/task/${task}/stat`));
  }
}

export const cpu_seconds = (pid) => fs.readdirSync(`/proc/${pid}/task`).reduce((sum, task) => sum + task_seconds(pid, task), 0);

// By the threads' names, for those that start with `name`.
export function thread_cpu_seconds(pid, name) {
  const all = [];
  for (const task of fs.readdirSync(`/proc/${pid}/task`)) {
    if (!fs.readFileSync(`/proc/${pid}/task/${task}/comm`, 'utf8').startsWith(name)) continue;
    all.push(task_seconds(pid, task));
  }
  return all;
}

export function resident_kb(pid) {
  return Number(/VmRSS:\s+(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, 'utf8'))[1]);
}

// ---- load ------------------------------------------------------------------------------------------------------------

// Runs a command to its end; its stdout. Asynchronous, so that other load can go on beside it.
export function run(command, { cores = '1', env = {}, input } = {}) {
  const [file, ...args] = pinned(cores, command);
  const child = spawn(file, args, { env: { ...process.env, ...env }, stdio: ['pipe', 'pipe', 'pipe'] });
  children.add(child);
  const out = { stdout: '', stderr: '' };
  child.stdout.on('data', (d) => { out.stdout += d; });
  child.stderr.on('data', (d) => { out.stderr += d; });
  child.stdin.end(input);
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => {
      children.delete(child);
      if (code === 0) resolve(out.stdout);
      else reject(new Error(`${command.join(' ')}: ${out.stderr || out.stdout || `status ${code}`}`));
    });
  });
}

// wrk's summary: requests, seconds, p50_us, p99_us, … `page`: reads that path; `yields`: only with the time that others leave.
export async function wrk(port, { connections, seconds, prompt_bytes = 0, model = 'bench-7b', pause_ms = 0, page = '', stream_chunks = 0, tls = false, yields = false, cores = '1' }) {
  const env = { PROMPT_BYTES: String(prompt_bytes), MODEL: model, PAUSE_MS: String(pause_ms), PAGE: page, STREAM_CHUNKS: String(stream_chunks) };
  const command = [...(yields ? ['chrt', '-i', '0'] : []), 'wrk', '-t1', `-c${connections}`, `-d${seconds}s`, '--timeout', '10s', '-s', path.join(here, 'completion.lua'), `${tls ? 'https' : 'http'}://127.0.0.1:${port}`];
  const out = await run(command, { env, cores });
  const line = /^RESULT (.*)$/m.exec(out);
  if (!line) throw new Error(`wrk said: ${out}`);
  const result = JSON.parse(line[1]);
  if (result.bad_status + result.bad_socket > 0 || result.requests === 0) throw new Error(`port ${port}: ${line[1]}`);
  return result;
}

// Streams through `port`; the client's summary.
export async function streams(bin, port, { count, chunks, pace_us, seconds }) {
  return JSON.parse(await run([path.join(bin, 'sse_client'), ...[port, count, chunks, pace_us, seconds].map(String)]));
}

// `count` streams, open and silent after their first chunk, until release() is called.
export const hold_streams = (bin, port, count) => hold(bin, [port, count, 2, 3_600_000_000, 'hold']);

// `count` connections that rest after a request and its answer, until release() is called.
export const rest_connections = (bin, port, count) => hold(bin, [port, count, 1, 0, 'rest']);

async function hold(bin, load) {
  const [file, ...args] = pinned('1', [path.join(bin, 'sse_client'), ...load.map(String)]);
  const child = spawn(file, args, { stdio: ['pipe', 'pipe', 'inherit'] });
  children.add(child);
  child.stdin.on('error', () => {}); // it may have ended by itself
  const closed = new Promise((done) => child.once('close', done));
  await new Promise((done, failed) => {
    child.stdout.on('data', done);
    child.on('close', (code) => failed(new Error(`sse_client ended with ${code}`)));
  });
  return async () => {
    child.stdin.end();
    await closed;
    children.delete(child);
  };
}

// ---- system calls ----------------------------------------------------------------------------------------------------

// Calls by name while `load` ran, from `strace -f -c`.
export async function count_calls(pid, load) {
  const file = path.join(dir, `strace-${pid}`);
  const tracer = spawn('strace', ['-f', '-c', '-U', 'name,calls', '-o', file, '-p', String(pid)], { stdio: ['ignore', 'ignore', 'pipe'] });
  children.add(tracer);
  await new Promise((done, failed) => {
    tracer.stderr.on('data', (d) => { if (String(d).includes('attached')) done(); });
    tracer.on('close', () => failed(new Error('strace could not attach')));
  });
  await sleep(100);
  const result = await load();
  const closed = new Promise((done) => tracer.once('close', done));
  tracer.kill('SIGINT');
  await closed;
  children.delete(tracer);
  const calls = {};
  for (const line of fs.readFileSync(file, 'utf8').split('\n')) {
    const words = line.trim().split(/\s+/);
    const count = words.length >= 2 && words[0] !== 'total' ? Number(words[1]) : NaN;
    if (count > 0) calls[words[0]] = (calls[words[0]] ?? 0) + count;
  }
  return { ...result, calls };
}

export const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

// How well the median is known: half the width of its 95 % confidence interval (by order statistics, for any distribution of
// the values), relative to it. Of up to 5 values, half their range.
export function spread_of_median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const from = Math.max(0, Math.floor((sorted.length - 1.96 * Math.sqrt(sorted.length)) / 2));
  return (sorted.at(-1 - from) - sorted[from]) / 2 / median(sorted);
}

export { sleep };
