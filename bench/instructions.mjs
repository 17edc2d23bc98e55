// instructions.mjs: node bench/instructions.mjs --nexus PATH --bin DIRECTORY [--seconds N]
// Prints the instructions that Nexus executes for a request of 230 bytes, in all and for each source file, over 64 connections
// and with one worker thread. Callgrind counts those of user space. Two runs of different length are subtracted, so that the
// start, the connections and the stop cancel out. The sources' names need a binary with line numbers (-g1), not stripped.
import fs from 'node:fs';
import path from 'node:path';
import { configure, dir, free_port, healthy, start, stop, wrk } from './rig.mjs';

const options = { nexus: 'build/bench/nexus', bin: 'build/bench', seconds: '12' };
const args = process.argv.slice(2);
while (args.length) {
  const name = args.shift().replace(/^--/, '');
  if (!(name in options) || !args.length) {
    console.error('usage: node instructions.mjs --nexus PATH --bin DIRECTORY [--seconds N]');
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

async function run(name, seconds, backend) {
  const port = await free_port();
  const profile = path.join(dir, `callgrind.${name}`);
  const conf = configure('nexus.conf', { small: port, threads: 1, backend, stream_backend: backend });
  const valgrind = ['valgrind', '-q', '--tool=callgrind', `--callgrind-out-file=${profile}`];
  const nexus = await start([...valgrind, path.resolve(options.nexus), '-c', conf], port, { cores: '0' });
  await healthy(port);
  const load = await wrk(port, { connections: 64, seconds });
  await stop(nexus);
  return { requests: load.requests, modules: read_profile(profile) };
}

const backend = await free_port();
await start([path.join(path.resolve(options.bin), 'sse_backend'), String(backend)], backend);
const seconds = Number(options.seconds);
const short = await run('short', Math.max(1, Math.round(seconds / 4)), backend);
const long = await run('long', seconds, backend);

const requests = long.requests - short.requests;
const rows = [...long.modules].map(([module, count]) => [module, (count - (short.modules.get(module) ?? 0)) / requests]);
const total = rows.reduce((sum, [, count]) => sum + count, 0);
const print = (module, count) => console.log(`${module.padEnd(34)} ${count.toFixed(0).padStart(8)} ${(100 * count / total).toFixed(1).padStart(6)} %`);
const small = total / 200;
console.log(`${options.nexus}: instructions per request, from ${requests} requests of 230 bytes over 64 connections`);
for (const [module, count] of rows.filter((row) => row[1] >= small).sort((a, b) => b[1] - a[1])) print(module, count);
print('(files below 0.5 %)', rows.filter((row) => row[1] < small).reduce((sum, [, count]) => sum + count, 0));
print('in all', total);
process.exit(0);
