// proxy_bench.mjs: node bench/proxy_bench.mjs --nexus build/nexus --bin build/bench [--quick] [--write] [--only PART[,PART…]] [--rounds N] [--seconds N]
// Measures Nexus beside a blind TCP forwarder, nginx and HAProxy in one run, and prints one table. The results go to
// BIN/results.json; with --write also to bench/RESULTS.md and bench/results.svg.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { draw } from './chart.mjs';
import { kNames, start_backends, start_proxy } from './fleet.mjs';
import { kParts } from './proxy_cases.mjs';
import { machine, page, quietness, table, versions } from './proxy_report.mjs';
import { dir } from './rig.mjs';

const here = path.dirname(new URL(import.meta.url).pathname);
const usage = 'usage: node proxy_bench.mjs --nexus PATH --bin DIRECTORY [--quick] [--write] [--only PART,…] [--rounds N] [--seconds N]';

function read_options() {
  const options = { nexus: 'build/nexus', bin: 'build/bench', only: '', rounds: '', seconds: '' };
  const args = process.argv.slice(2);
  while (args.length) {
    const name = args.shift().replace(/^--/, '');
    if (name === 'quick' || name === 'write') options[name] = true;
    else if (name in options && args.length) options[name] = args.shift();
    else {
      console.error(usage);
      process.exit(2);
    }
  }
  return options;
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.round(seconds % 60)).padStart(2, '0')}`;

// One line a step on stderr, with the time that is likely left.
function progress_of(context, parts) {
  const total = parts.reduce((sum, part) => sum + part.cost(context), 0);
  const began = performance.now();
  let planned = 0; // seconds of the steps begun so far
  return (label, seconds) => {
    const elapsed = (performance.now() - began) / 1000;
    const slow = planned > 0 ? Math.max(elapsed / planned, 0.5) : 1.1;
    const left = Math.max(total - planned, seconds) * slow;
    planned += seconds;
    console.error(`[${clock(elapsed)}, about ${clock(left)} left] ${label}`);
  };
}

const options = read_options();
if (os.cpus().length < 2) {
  console.error('The benchmark needs two cores: one for the proxy, one for the load.');
  process.exit(1);
}
const busy = os.loadavg()[0];
if (busy > 0.5) console.error(`The machine is busy (load average ${busy.toFixed(1)}): the figures will be too high, and the ratios unsteady.`);
const quick = options.quick === true;
const parts = kParts.filter((part) => options.only === '' || options.only.split(',').includes(part.name));
const nexus = path.join(dir, 'nexus'); // a copy: a build that goes on beside must not change what is measured
fs.copyFileSync(options.nexus, nexus);
const context = {
  quick,
  nexus,
  bin: path.resolve(options.bin),
  rounds: Number(options.rounds || (quick ? 1 : 5)),
  seconds: Number(options.seconds || (quick ? 1 : 2)),
};
context.progress = progress_of(context, parts);
context.backends = await start_backends(context.bin);
context.proxies = {};
for (const name of kNames) context.proxies[name] = await start_proxy(name, context);

const results = { date: new Date().toISOString().slice(0, 16).replace('T', ' '), machine: machine(), versions: versions(nexus), quick, busy, quiet: [await quietness(context.bin)], rounds: context.rounds, seconds: context.seconds, parts: [] };
// A part that fails is told of, and costs neither the others nor the page.
for (const part of parts) {
  const failed = (error) => [{ label: 'not measured', unit: '', values: {}, note: error.message }];
  results.parts.push({ name: part.name, title: part.title, rows: await part.run(context).catch(failed) });
  fs.writeFileSync(path.join(context.bin, 'results.json'), JSON.stringify(results, null, 1));
}
results.quiet.push(await quietness(context.bin));
fs.writeFileSync(path.join(context.bin, 'results.json'), JSON.stringify(results, null, 1));
console.log(table(results));
if (options.write) {
  fs.writeFileSync(path.join(here, 'RESULTS.md'), page(results));
  fs.writeFileSync(path.join(here, 'results.svg'), draw(results));
  console.log('\nwritten: bench/RESULTS.md, bench/results.svg');
}
process.exit(0);
