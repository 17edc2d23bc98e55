// growth_cases.mjs
// Owns:     the parts of the proxy benchmark about size: memory of connections that wait, and after a wave of them; the time of
//           a start; what more backends and more models cost.
// Promises: each figure is of a fresh process; configurations of different size take turns within a round.
// Leaves:   processes and load to rig.mjs and fleet.mjs.
import fs from 'node:fs';
import path from 'node:path';
import { kNames, cold_command, start_proxy, start_sized_nexus } from './fleet.mjs';
import { cpu_seconds, hold_streams, median, most_connections, resident_kb, rest_connections, run, sleep, spread_of_median, wrk } from './rig.mjs';

// Its memory in kB, 12 seconds later: Nexus gives memory back that was not needed for five.
async function settled_kb(pid) {
  await sleep(12_000);
  return resident_kb(pid);
}

// What a connection costs that waits for a chunk, or for its client's next request; and what stays when all have left.
export async function memory(context) {
  const { bin, quick } = context;
  const count = Math.min(quick ? 2_000 : 10_000, most_connections);
  const many = count.toLocaleString('en');
  const waiting = { label: `${many} idle streams: resident memory each`, unit: 'kB', wanted: 'Nexus ≤ 3.5 kB', values: {} };
  const idle = { label: `${many} connections after one request each: resident memory each`, unit: 'kB', wanted: 'Nexus ≤ 1 kB', values: {} };
  const at_rest = { label: 'resident memory at rest', unit: 'MB', wanted: 'Nexus < 6 MB', values: {}, note: 'after a second of requests on one connection' };
  const after = { label: 'resident memory after a wave ÷ at rest', unit: '', wanted: 'Nexus ≤ 1.2', values: {}, digits: 2,
    note: `a wave: ${many} streams at once, then 2,000 connections that ask again and again for 3 s; read 12 s later` };
  for (const name of kNames) {
    context.progress(`memory of ${name}`, quick ? 40 : 52);
    const proxy = await start_proxy(name, context);
    const pid = proxy.pid('stream');
    await wrk(name === 'floor' ? proxy.stream : proxy.small, { connections: 1, seconds: 1, model: name === 'floor' ? 'bench-stream' : 'bench-7b' });
    await sleep(100);
    const before = resident_kb(pid);
    at_rest.values[name] = before / 1024;
    let release = await rest_connections(bin, proxy.stream, count);
    idle.values[name] = (await settled_kb(pid) - before) / count;
    await release();
    release = await hold_streams(bin, proxy.stream, count);
    waiting.values[name] = (await settled_kb(pid) - before) / count;
    await release();
    // A peer may still hold the streams of clients that left, and then serve nobody.
    const refused = await wrk(proxy.stream, { connections: Math.min(count, 2_000), seconds: 3, model: 'bench-stream' }).then(() => '', (error) => error.message);
    if (refused && name === 'nexus') throw new Error(refused);
    if (refused) after.note += `; ${name} served none of them`;
    else after.values[name] = await settled_kb(pid) / before;
    await proxy.stop();
  }
  return [waiting, idle, at_rest, after];
}

export async function start_and_size(context) {
  const { bin, nexus, rounds } = context;
  const time_of = async (name, more) => {
    const times = [];
    for (let i = 0; i < rounds; ++i) {
      const { port, command } = await cold_command(name, { ...context, ...more });
      times.push(Number(await run([path.join(bin, 'start_time'), String(port), ...command], { cores: '0,1' })) / 1000);
    }
    return median(times);
  };
  const started = { label: 'start to first request served', unit: 'ms', wanted: 'Nexus ≤ 10 ms', values: {} };
  for (const name of kNames) {
    context.progress(`start: ${name}`, 0.3 * rounds);
    started.values[name] = await time_of(name, {});
  }
  context.progress('start with 100 backends', 0.3 * rounds);
  const many = { label: 'the same with 100 backends', unit: 'ms', wanted: 'Nexus ≤ 10 ms', values: { nexus: await time_of('nexus', { backends_count: 100 }) } };
  const size = { label: 'size of the binary', unit: 'MB', wanted: '', values: { nexus: fs.statSync(nexus).size / 2 ** 20 } };
  size.note = 'static, with OpenSSL and c-ares; the peers are linked with shared libraries';
  return [started, many, size];
}

// Requests of one model while the configuration grows: more backends that have it, or more models beside it.
const sizes = [
  { label: '1 backend, 1 model', backends_count: 1, models: 1 },
  { label: '16 backends, one with the model', backends_count: 16, with_model: 1, models: 1 },
  { label: '256 backends, one with the model', backends_count: 256, with_model: 1, models: 1 },
  { label: '3 backends with the model', backends_count: 3, models: 1 },
  { label: '16 backends with the model', backends_count: 16, models: 1 },
  { label: '256 backends with the model', backends_count: 256, models: 1 },
  { label: '1,000 models', backends_count: 1, models: 1_000 },
  { label: '10,000 models', backends_count: 1, models: 10_000 },
];

export async function growth(context) {
  const { rounds, seconds, quick } = context;
  for (const size of sizes) size.proxy = await start_sized_nexus(context, size);
  const cpu = sizes.map(() => []);
  const ratios = (i) => cpu[i].map((us, round) => us / cpu[0][round]);
  const steady = () => sizes.every((_, i) => i === 0 || spread_of_median(ratios(i)) < 0.03);
  for (let round = 0; round < (quick ? 1 : 2 * rounds) && (round < rounds || !steady()); ++round) {
    context.progress(`requests while the configuration grows, round ${round + 1}`, round < rounds ? seconds * sizes.length : 0);
    for (const [i, { proxy }] of sizes.entries()) {
      const before = cpu_seconds(proxy.pid());
      const { requests } = await wrk(proxy.small, { connections: 64, seconds });
      cpu[i].push((cpu_seconds(proxy.pid()) - before) / requests * 1e6);
    }
  }
  const rows = sizes.map(({ label }, i) => ({
    label: `${label}: CPU a request`, unit: 'µs', wanted: i === 0 ? '' : '≤ 1.05 × one', values: { nexus: median(cpu[i]) },
    note: i === 0 ? undefined : `${median(ratios(i)).toFixed(3)} × that of one (± ${(100 * spread_of_median(ratios(i))).toFixed(1)} %, ${cpu[i].length} rounds)`,
  }));
  for (const { label, proxy } of sizes) {
    context.progress(`pages: ${label}`, 2);
    for (const page of ['/metrics', '/v1/models']) {
      const bytes = (await (await fetch(`http://127.0.0.1:${proxy.small}${page}`, { headers: { Connection: 'close' } })).text()).length;
      const { p50_us } = await wrk(proxy.small, { connections: 1, seconds: 1, page });
      rows.push({ label: `${label}: ${page}, p50`, unit: 'ms', values: { nexus: p50_us / 1000 }, note: `${(bytes / 1000).toFixed(1)} kB` });
    }
    await proxy.stop();
  }
  return rows;
}
