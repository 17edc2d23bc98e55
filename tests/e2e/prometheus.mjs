// prometheus.mjs
// Owns:     starting a real Prometheus (as a server or in agent mode) with a configuration of the test's, and asking it.
// Promises: it listens on loopback alone, is stopped when the test ends, and its log is at hand where it fails; a test is
//           skipped with a line where prometheus is not installed.
// Leaves:   what it scrapes, records and answers to the tests.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { assert, free_port, get, kill_at_end, until, within } from './harness.mjs';

export const repository = path.resolve(path.dirname(new URL(import.meta.url).pathname), '../..');
export const repository_file = (name) => fs.readFileSync(path.join(repository, name), 'utf8');
export const find_program = (name) =>
  [...(process.env.PATH ?? '').split(':'), '/usr/bin', '/usr/sbin', '/usr/local/bin'].map((d) => path.join(d, name)).find((p) => fs.existsSync(p));

export function need_program(t, name, packet = name) {
  return find_program(name) ?? t.skip(`${name} is not installed (apt-get install ${packet})`);
}

// Runs a program in the foreground until the test ends; its stderr is kept for the reason of a failure.
export function run_beside(t, binary, args) {
  const child = spawn(binary, args, { cwd: t.dir(), stdio: ['ignore', 'ignore', 'pipe'] });
  kill_at_end(child);
  const program = { child, log: '' };
  child.stderr.on('data', (d) => { program.log += d; });
  const exited = new Promise((done) => child.on('close', done));
  const name = path.basename(binary);
  t.notes.push(() => (program.log ? `${name}: ${program.log.trim().slice(-700).replace(/\n/g, ' | ')}` : ''));
  t.after(async () => {
    child.kill('SIGTERM');
    await within(10_000, exited, `${name} to end`).catch(() => child.kill('SIGKILL'));
  });
  return program;
}

// Runs a program to its end. Not by spawnSync, which would hold up every test beside this one.
export async function run_to_end(binary, args, { input = '', ms = 20_000, ...options } = {}) {
  const child = spawn(binary, args, { stdio: ['pipe', 'pipe', 'pipe'], ...options });
  kill_at_end(child);
  const end = { status: null, output: '' };
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (d) => { end.output += d; });
  child.stdin.on('error', () => {});   // it need not read
  child.stdin.end(input);
  const closed = new Promise((done) => child.on('close', done));
  end.status = await within(ms, closed, () => `${path.basename(binary)} ${args.join(' ')} to end`).catch((error) => {
    child.kill('SIGKILL');
    throw error;
  });
  return end;
}

let started = 0;

// `config` is the text of prometheus.yml. options.agent: agent mode; options.receiver: takes remote writes; options.features:
// that are switched on; options.flags: more of its command line.
export async function start_prometheus(t, config, { agent = false, receiver = false, features = [], flags = [] } = {}) {
  const binary = need_program(t, 'prometheus');
  const port = await free_port();
  const number = ++started;
  const file = t.file(`prometheus-${number}.yml`, config);
  const data = path.join(t.dir(), `prometheus-${number}`);
  const { child, ...program } = run_beside(t, binary, [
    `--config.file=${file}`, `--web.listen-address=127.0.0.1:${port}`, '--log.level=warn',
    ...[...(agent ? ['agent'] : []), ...features].map((feature) => `--enable-feature=${feature}`),
    agent ? `--storage.agent.path=${data}` : `--storage.tsdb.path=${data}`,
    ...(receiver ? ['--web.enable-remote-write-receiver'] : []), ...flags]);
  const api = async (what, parameters = {}) => {
    const r = await get(port, `/api/v1/${what}?${new URLSearchParams(parameters)}`);
    if (r.json?.status !== 'success') throw new Error(`${what} ${JSON.stringify(parameters)}: ${r.status} ${r.text.slice(0, 300)}`);
    return r.json.data;
  };
  await until(async () => (await get(port, '/-/ready')).status === 200, 'prometheus ready', 20_000);
  return { port, child, ...program, api, query: async (query) => (await api('query', { query })).result };
}

// The one value of a result with one series.
export function only_value(result, what = '') {
  assert.equal(result.length, 1, `${what}: ${JSON.stringify(result).slice(0, 400)}`);
  return Number(result[0].value[1]);
}

export const close_to = (got, expected, tolerance, what) =>
  assert.ok(Math.abs(got - expected) <= tolerance * Math.abs(expected) + 1e-9, `${what}: ${got}, expected ${expected}`);

// Replaces each key by its value in a text, and insists that it stood there: so that a test of a file notices its changes.
export function with_replaced(text, replacements) {
  for (const [from, to] of Object.entries(replacements)) {
    assert.ok(text.includes(from), `${from} stands in ${text.slice(0, 200)}`);
    text = text.replaceAll(from, to);
  }
  return text;
}
