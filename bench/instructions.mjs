// instructions.mjs: node bench/instructions.mjs --nexus PATH --bin DIRECTORY [--seconds N] [--check | --write]
// Prints the instructions that Nexus executes for a request of 230 bytes, in all and for each source file, for a chunk of a
// stream, for a prompt of 100 kB and for a line of /metrics, with one worker thread. Callgrind counts those of user space. Two
// runs of different length are subtracted, so that the start, the connections and the stop cancel out. The sources' names need
// a binary with line numbers (-g1), not stripped.
// --check fails if a figure is 2 % above that of bench/instructions.json; --write sets them. They are those of a processor with
// AVX2, for which the libraries have other code than for one without: there nothing is compared.
import fs from 'node:fs';
import path from 'node:path';
import { configure, dir, free_port, healthy, start, stop, streams, wrk } from './rig.mjs';

const options = { nexus: 'build/bench/nexus', bin: 'build/bench', seconds: '12' };
const args = process.argv.slice(2).filter((arg) => arg !== '--check' && arg !== '--write');
while (args.length) {
  const name = args.shift().replace(/^--/, '');
  if (!(name in options) || !args.length) {
    console.error('usage: node instructions.mjs --nexus PATH --bin DIRECTORY [--seconds N] [--check | --write]');
    process.exit(2);
  }
  options[name] = args.shift();
}

// The source file, by its path in the project, or the library that a file or, without one, a function belongs to.
function module_of(file, fn) {
  const own = /(?:^|\/)(nexus\/(?:\w+\/)?\w+\.h|nexus\.cpp)$/.exec(file);
  if (own) return own[1];
  if (/simdjson/.test(file + fn)) return 'simdjson';
  if (/llhttp/.test(file + fn)) return 'llhttp';
  if (/\/c\+\+\/|^std::|^operator /.test(file + fn)) return 'libstdc++';
  if (/malloc|^free$|^_int_free|calloc|realloc|unlink_chunk/.test(fn)) return 'libc: malloc';
  if (/^_*(mem|str|wmem)[a-z]+(_|$)/.test(fn)) return 'libc: mem*, str*';
  return /^nexus|\?\?\?|^0x/.test(fn) ? 'without line numbers' : 'libc: other';
}

// Instructions by module, from a file in callgrind's format (see "Callgrind Format Specification"). A name follows its number
// where it comes first. A line behind calls= is the cost of the called function, which is listed itself.
function read_profile(file) {
  const names = { file: {}, fn: {} };
  const resolve = (kind, text) => {
    const [, id, name] = /^\((\d+)\)(?: (.*))?$/.exec(text);
    if (name !== undefined) names[kind][id] = name;
    return names[kind][id];
  };
  const modules = new Map();
  let current = { file: '', fn: '' };
  let of_call = false;
  for (const line of fs.readFileSync(file, 'utf8').split('\n')) {
    const [, key, value] = /^(\w+)=(.*)$/.exec(line) ?? [];
    if (key === 'fl' || key === 'fi' || key === 'fe') current.file = resolve('file', value);
    else if (key === 'cfi' || key === 'cfl') resolve('file', value);
    else if (key === 'fn') current.fn = resolve('fn', value);
    else if (key === 'cfn') resolve('fn', value);
    else if (key === 'calls') of_call = true;
    else if (/^[+*\d-]/.test(line)) {
      if (!of_call) {
        const module = module_of(current.file, current.fn);
        modules.set(module, (modules.get(module) ?? 0) + Number(line.split(' ')[1]));
      }
      of_call = false;
    }
  }
  return modules;
}

// What is counted: a load of so many seconds on a port; how many there were of it.
// Chunks come so slowly that each has a turn of its own, also on a slow machine.
const loads = {
  request: async (port, seconds) => (await wrk(port, { connections: 64, seconds })).requests,
  'SSE chunk': async (port, seconds) => (await streams(options.bin, port, { count: 16, chunks: 25, pace_us: 40_000, seconds })).chunks,
  'prompt of 100 kB': async (port, seconds) => (await wrk(port, { connections: 8, seconds, prompt_bytes: 100_000 })).requests,
  'line of /metrics': async (port, seconds) => {
    const page = await (await fetch(`http://127.0.0.1:${port}/metrics`, { headers: { Connection: 'close' } })).text();
    return (await wrk(port, { connections: 1, seconds, page: '/metrics' })).requests * (page.split('\n').length - 1);
  },
};

async function run(kind, seconds, backend) {
  const port = await free_port();
  const profile = path.join(dir, `callgrind.${port}`);
  const conf = configure('nexus.conf', { small: port, threads: 1, backend, stream_backend: backend });
  const valgrind = ['valgrind', '-q', '--tool=callgrind', `--callgrind-out-file=${profile}`];
  const nexus = await start([...valgrind, path.resolve(options.nexus), '-c', conf], port, { cores: '0' });
  await healthy(port);
  const count = await loads[kind](port, seconds);
  await stop(nexus);
  return { count, modules: read_profile(profile) };
}

// Instructions for each, by module.
async function cost_of(kind, backend) {
  const seconds = Number(options.seconds);
  const short = await run(kind, Math.max(1, Math.round(seconds / 4)), backend);
  const long = await run(kind, seconds, backend);
  const count = long.count - short.count;
  const rows = [...long.modules].map(([module, instructions]) => [module, (instructions - (short.modules.get(module) ?? 0)) / count]);
  return { count, rows, total: rows.reduce((sum, [, instructions]) => sum + instructions, 0) };
}

const backend = await free_port();
await start([path.join(path.resolve(options.bin), 'sse_backend'), String(backend)], backend);

const { count, rows, total } = await cost_of('request', backend);
const print = (module, instructions) => console.log(`${module.padEnd(34)} ${instructions.toFixed(0).padStart(8)} ${(100 * instructions / total).toFixed(1).padStart(6)} %`);
const small = total / 200;
console.log(`${options.nexus}: instructions per request, from ${count} requests of 230 bytes over 64 connections`);
for (const [module, instructions] of rows.filter((row) => row[1] >= small).sort((a, b) => b[1] - a[1])) print(module, instructions);
print('(files below 0.5 %)', rows.filter((row) => row[1] < small).reduce((sum, [, instructions]) => sum + instructions, 0));
print('in all', total);

const figures = { request: Math.round(total) };
for (const kind of Object.keys(loads).slice(1)) {
  const cost = await cost_of(kind, backend);
  figures[kind] = Math.round(cost.total);
  console.log(`${`a ${kind}`.padEnd(34)} ${String(figures[kind]).padStart(8)}   (from ${cost.count})`);
}

const committed = path.join(path.dirname(new URL(import.meta.url).pathname), 'instructions.json');
if (process.argv.includes('--write')) fs.writeFileSync(committed, `${JSON.stringify(figures, null, 2)}\n`);
const has_avx2 = /^flags.* avx2 /m.test(fs.readFileSync('/proc/cpuinfo', 'utf8'));
if (process.argv.includes('--check') && !has_avx2) console.log('skipped: the comparison, which needs a processor with AVX2');
else if (process.argv.includes('--check')) {
  const before = JSON.parse(fs.readFileSync(committed, 'utf8'));
  const above = Object.keys(figures).filter((kind) => figures[kind] > 1.02 * before[kind]);
  for (const kind of above) console.log(`FAILED: a ${kind} takes ${figures[kind]} instructions, 2 % above the ${before[kind]} of bench/instructions.json`);
  if (above.length > 0) process.exit(1);
}
process.exit(0);
