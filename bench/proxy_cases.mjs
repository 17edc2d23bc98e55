// proxy_cases.mjs
// Owns:     what the proxy benchmark measures: one function a part of the table.
// Promises: the proxies take turns within a round, and a ratio to the floor is one of the same round; what is reported is
//           the median over the rounds. Rounds go on until Nexus's ratio is known to 3 %, or the row says that it is not.
// Leaves:   processes and load to rig.mjs and fleet.mjs, the table to proxy_report.mjs.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { kNames, start_page_server, start_proxy, start_wide_nexus } from './fleet.mjs';
import { growth, memory, start_and_size } from './growth_cases.mjs';
import { count_calls, cpu_seconds, median, resident_kb, run, sleep, spread_of_median, stop, streams, thread_cpu_seconds, wrk } from './rig.mjs';
import { idle_tls, over_tls } from './tls_cases.mjs';

const others = kNames.filter((name) => name !== 'floor');
const kSteady = 0.03; // the spread of a ratio that is known well enough
const kMoreRounds = 2; // times the rounds that are asked for, at most

// The ratios of a proxy to the floor, round by round.
const ratios_of = (all, name, key) => all[name].map((r, i) => r[key] / all.floor[i][key]);

// Takes turns: measure(name) for every name, `rounds` times, and with `key` on until Nexus's ratio to the floor is steady in it.
// By name: a list of results.
async function in_turns(context, label, names, rounds, seconds, measure, key = '') {
  const all = Object.fromEntries(names.map((name) => [name, []]));
  const most = key && !context.quick ? kMoreRounds * rounds : rounds;
  for (let round = 0; round < most; ++round) {
    if (round >= rounds && spread_of_median(ratios_of(all, 'nexus', key)) < kSteady) break;
    context.progress(`${label}, round ${round + 1} of ${round < rounds ? rounds : `at most ${most}`}`, round < rounds ? seconds * names.length : 0);
    for (const name of names) all[name].push(await measure(name));
  }
  return all;
}

// A row of the table from the rounds' results. `ratio`: also, for each proxy, the median of its ratio to the floor.
function row(label, unit, all, key, { wanted = '', ratio = true, minus } = {}) {
  const values = {};
  for (const [name, results] of Object.entries(all)) values[name] = median(results.map((r, i) => r[key] - (minus ? all[minus][i][key] : 0)));
  if (minus) delete values[minus];
  const out = { label, unit, wanted, values };
  if (ratio && all.floor) {
    out.ratios = Object.fromEntries(others.filter((name) => all[name]).map((name) => [name, median(ratios_of(all, name, key))]));
    out.spread = spread_of_median(ratios_of(all, 'nexus', key));
    if (out.spread >= kSteady) out.note = `unsteady: Nexus ÷ floor is known to ± ${Math.round(100 * out.spread)} % after ${all.nexus.length} rounds`;
  }
  return out;
}

// CPU microseconds of `pid` for each of what `load` did.
async function with_cpu(pid, load, counted) {
  const before = cpu_seconds(pid);
  const result = await load();
  const used = cpu_seconds(pid) - before;
  return { ...result, cpu_us: (used / result[counted]) * 1e6, busy: used / result.seconds, rate: result[counted] / result.seconds };
}

// ---- requests ----

// Nexus with the README's configuration in the place of the shortest one.
async function readme_requests(context) {
  const proxies = { ...context.proxies, nexus: await start_proxy('nexus', { ...context, conf: 'README.md' }) };
  const rows = [];
  for (const connections of [64, 512]) rows.push((await requests({ ...context, proxies }, connections, `README's configuration, ${connections} connections`))[0]);
  await proxies.nexus.stop();
  return rows;
}

async function small_requests(context) {
  const rows = [];
  for (const connections of [1, 64, 256, 512, 2000]) {
    rows.push(...await requests(context, connections, `230-byte requests, ${connections.toLocaleString('en')} ${connections === 1 ? 'connection' : 'connections'}`));
  }
  return rows;
}

async function requests(context, connections, label) {
  const { proxies, backends, rounds, seconds } = context;
  const wanted = `below both peers, ≤ ${connections === 1 ? '1.15' : '1.12'} × floor`;
  const rows = [];
  const names = connections === 1 ? ['direct', ...kNames] : kNames;
  const all = await in_turns(context, label, names, rounds, seconds, (name) => {
    const load = { connections, seconds };
    if (name === 'direct') return wrk(backends.small, load);
    return with_cpu(proxies[name].pid(), () => wrk(proxies[name].small, load), 'requests');
  }, 'cpu_us');
  const { direct, ...proxied } = all;
  rows.push(row(`${label}: CPU`, 'µs', proxied, 'cpu_us', { wanted }));
  if (connections === 1) {
    rows.push(row(`${label}: added p50`, 'µs', all, 'p50_us', { minus: 'direct', ratio: false }));
    rows.push(row(`${label}: added p99`, 'µs', all, 'p99_us', { minus: 'direct', ratio: false, wanted: 'no worse than the peers' }));
    return rows;
  }
  rows.push(row(`${label}: throughput`, '1/s', proxied, 'rate', { ratio: false, wanted: connections === 64 ? 'Nexus ≥ 1.2 × HAProxy' : '' }));
  rows.at(-1).note = `Nexus ÷ HAProxy ${median(all.nexus.map((r, i) => r.rate / all.haproxy[i].rate)).toFixed(2)}; CPU of the proxy's core in use: ` +
    kNames.map((name) => `${name} ${Math.round(100 * median(all[name].map((r) => r.busy)))} %`).join(', ');
  rows.push(row(`${label}: p50 at saturation`, 'µs', proxied, 'p50_us', { ratio: false }));
  rows.push(row(`${label}: p99 at saturation`, 'µs', proxied, 'p99_us', { ratio: false, wanted: 'no worse than the peers' }));
  return rows;
}

// Every connection rests 2 ms between two requests: about half of what a proxy can do.
async function half_load(context) {
  const { proxies, backends, rounds, seconds } = context;
  const label = '230-byte requests, 64 connections, 2 ms between two';
  const load = { connections: 64, seconds, pause_ms: 2 };
  const all = await in_turns(context, label, ['direct', ...kNames], rounds, seconds, (name) => wrk(name === 'direct' ? backends.small : proxies[name].small, load));
  return ['p50', 'p99'].map((q) => row(`${label}: added ${q}`, 'µs', all, `${q}_us`, { minus: 'direct', ratio: false, wanted: q === 'p99' ? 'no worse than the peers' : '' }));
}

async function large_prompts(context) {
  const { proxies, rounds, seconds } = context;
  const rows = [];
  for (const [prompt_bytes, name_of_size, connections, wanted] of [[100_000, '100 kB', 16, ''], [5_000_000, '5 MB', 4, 'Nexus ≤ 1.3 × floor']]) {
    const label = `${name_of_size} prompts, ${connections} connections`;
    const load = { connections, seconds, prompt_bytes, model: 'bench-stream' };
    const all = await in_turns(context, label, kNames, rounds, seconds, (name) =>
      with_cpu(proxies[name].pid('stream'), () => wrk(proxies[name].stream, load), 'requests'), 'cpu_us');
    rows.push(row(`${label}: CPU`, 'µs', all, 'cpu_us', { wanted }));
    rows.push(row(`${label}: throughput`, '1/s', all, 'rate', { ratio: false }));
  }
  return rows;
}

// ---- streams ----

async function event_streams(context) {
  const { proxies, backends, bin, rounds, seconds } = context;
  const rows = [];
  const backend_pid = backends.children[1].pid;
  const measure = (load) => async (name) => {
    if (name === 'direct') return streams(bin, backends.stream, load);
    const before = cpu_seconds(backend_pid);
    const result = await with_cpu(proxies[name].pid('stream'), () => streams(bin, proxies[name].stream, load), 'chunks');
    return { ...result, load_us: ((cpu_seconds(backend_pid) - before + result.client_cpu_seconds) / result.chunks) * 1e6 };
  };
  const paced = { count: 64, chunks: 200, pace_us: 4000, seconds };
  let all = await in_turns(context, '64 streams of 200 chunks, one each 4 ms', kNames, rounds, seconds + 0.8, measure(paced), 'cpu_us');
  rows.push(row('64 streams of 200 chunks, 16,000 chunks/s: CPU a chunk', 'µs', all, 'cpu_us', { wanted: 'Nexus ≤ 1.10 × floor' }));
  // Half of Nexus's core, unless the load's own core can't make so many: then what takes 70 % of that one.
  const per_chunk_us = Math.max(median(all.nexus.map((r) => r.cpu_us)) / 0.5, median(all.nexus.map((r) => r.load_us)) / 0.7);

  all = await in_turns(context, '16 streams of 200 chunks, flat out', kNames, rounds, seconds, measure({ count: 16, chunks: 200, pace_us: 0, seconds }), 'cpu_us');
  rows.push(row('16 streams of 200 chunks, flat out: CPU a chunk', 'µs', all, 'cpu_us'));
  rows.push(row('16 streams of 200 chunks, flat out: throughput', 'chunks/s', all, 'rate', { ratio: false }));

  const count = 256;
  const pace_us = Math.max(2000, Math.round(count * per_chunk_us));
  const label = `${count} streams, a chunk each ${(pace_us / 1000).toFixed(1)} ms`;
  const half = { count, chunks: 200, pace_us, seconds };
  all = await in_turns(context, label, ['direct', ...kNames], rounds, seconds + 200 * pace_us / 1e6, measure(half));
  const rate = Math.round(count / pace_us * 1e6);
  rows.push(row(`${label}: added p50`, 'µs', all, 'p50_us', { minus: 'direct', ratio: false }));
  rows.push(row(`${label}: added p99`, 'µs', all, 'p99_us', { minus: 'direct', ratio: false, wanted: 'Nexus < 100 µs' }));
  const [wake, wake_p99] = (await run([path.join(bin, 'wake_time'), '3'], { cores: '0' })).trim().split(' ');
  rows.at(-1).note = `${rate.toLocaleString('en')} chunks/s: Nexus's core is ${Math.round(100 * median(all.nexus.map((r) => r.busy)))} % in use; direct p99 ${Math.round(median(all.direct.map((r) => r.p99_us)))} µs; a process that sleeps on that core wakes ${wake} µs late, p99 ${wake_p99}`;
  return rows;
}

// ---- what a request takes beside time ----

async function system_calls(context) {
  const { proxies } = context;
  const seconds = context.quick ? 1 : 2;
  const kinds = {
    'reads': /^(recv|read|recvfrom|recvmsg|readv)$/,
    'writes': /^(send|write|sendto|sendmsg|writev|sendfile)$/,
    'epoll_wait': /^epoll_p?wait2?$/,
  };
  const rows = [...Object.keys(kinds), 'all others'].map((kind) => ({ label: `system calls a request, 64 connections: ${kind}`, unit: '', values: {}, digits: 3 }));
  rows[0].wanted = rows[1].wanted = 'Nexus 2';
  const named = [];
  for (const name of kNames) {
    context.progress(`system calls: ${name}`, seconds + 0.5);
    const result = await count_calls(proxies[name].pid(), () => wrk(proxies[name].small, { connections: 64, seconds }));
    const left = [];
    const sums = [0, 0, 0, 0];
    for (const [call, count] of Object.entries(result.calls)) {
      const kind = Object.values(kinds).findIndex((pattern) => pattern.test(call));
      sums[kind < 0 ? 3 : kind] += count;
      if (kind < 0 && count / result.requests >= 0.001) left.push(`${call} ${(count / result.requests).toFixed(3)}`);
    }
    sums.forEach((sum, i) => { rows[i].values[name] = sum / result.requests; });
    named.push(`${name}: ${left.join(', ') || 'none'}`);
  }
  rows[3].note = `opening and closing the 64 connections included; ${named.join('; ')}`;
  return rows;
}

// ---- Nexus alone ----

// Generator and backend run in the same two cores, so throughput tells little: CPU a request must stay what it was.
async function two_threads(context) {
  const { rounds, seconds, bin, backends } = context;
  const everywhere = { cores: '0,1' };
  const nexus = { one: await start_proxy('nexus', { ...context, ...everywhere, threads: 1 }), two: await start_proxy('nexus', { ...context, ...everywhere, threads: 2 }) };
  const all = await in_turns(context, 'Nexus with one thread and two, cores shared with the load', ['one', 'two'], rounds, seconds, (name) =>
    with_cpu(nexus[name].pid(), () => wrk(nexus[name].small, { connections: 64, seconds, ...everywhere }), 'requests'));
  const ratio = (key) => median(all.two.map((r, i) => r[key] / all.one[i][key]));
  const cpu = { label: 'two threads: CPU a request, two ÷ one', unit: '', wanted: '≤ 1.1 (flat)', values: { nexus: ratio('cpu_us') }, digits: 2 };
  cpu.note = `throughput ${ratio('rate').toFixed(2)} × with the load on the same two cores`;

  context.progress('Nexus with two threads: 200 long streams', seconds + 1);
  const before = thread_cpu_seconds(nexus.two.pid(), 'nexus-worker');
  await streams(bin, nexus.two.stream, { count: 200, chunks: Math.round(seconds * 100), pace_us: 10_000, seconds: 0 });
  const used = thread_cpu_seconds(nexus.two.pid(), 'nexus-worker').map((s, i) => s - before[i]);
  const balance = { label: 'two threads, 200 long streams: the idler thread ÷ the busier', unit: '', wanted: 'near 1', values: { nexus: Math.min(...used) / Math.max(...used) }, digits: 2 };
  await nexus.one.stop();
  await nexus.two.stop();
  return [cpu, balance];
}

async function scrape(port) {
  const began = performance.now();
  const answer = await fetch(`http://127.0.0.1:${port}/metrics`, { signal: AbortSignal.timeout(20_000) });
  const text = await answer.text();
  return { text, ms: performance.now() - began };
}

// Turns of the loops by their upper bound in seconds, from nexus_loop_stall_seconds.
function stalls(text) {
  const turns = new Map();
  let below = 0;
  for (const [, le, count] of text.matchAll(/^nexus_loop_stall_seconds_bucket\{le="([^"]+)"\} (\d+)$/gm)) {
    turns.set(le, Number(count) - below);
    below = Number(count);
  }
  return turns;
}

function longest(before, after) {
  let top = '0';
  for (const [le, count] of after) if (count > (before.get(le) ?? 0)) top = le;
  return top;
}

async function loop_stalls(context) {
  const { nexus, quick } = context;
  const wide = await start_wide_nexus({ ...context, backends_count: quick ? 10 : 56, models_each: 40 });
  context.progress('Nexus: filling series', quick ? 1 : 4);
  const post = (model, text = 'Hello.') => fetch(`http://127.0.0.1:${wide.small}/v1/chat/completions`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ model, messages: [{ role: 'user', content: text }] }),
  }).then(async (r) => { await r.arrayBuffer(); return r.status; });
  for (let i = 0; i < wide.models.length; i += 32) await Promise.all(wide.models.slice(i, i + 32).map((model) => post(model)));
  const first = await scrape(wide.small);
  const lines = first.text.split('\n').filter((line) => line && line[0] !== '#').length;

  const rows = [];
  const during = async (label, seconds, action) => {
    context.progress(`Nexus: longest turn of its loop: ${label}`, seconds);
    const before = stalls((await scrape(wide.small)).text);
    const loaded = wrk(wide.small, { connections: 16, seconds: Math.ceil(seconds) });
    await sleep(200);
    const note = await action();
    await loaded;
    const bound = longest(before, stalls((await scrape(wide.small)).text));
    rows.push({ label: `longest turn of the loop, under load: ${label}`, unit: 'ms, at most', wanted: '≤ 5 ms', values: { nexus: bound === '+Inf' ? Infinity : Number(bound) * 1000 }, note, digits: 2 });
  };
  const seconds = quick ? 1 : 3;
  await during('nothing else', seconds, async () => undefined);
  await during(`a scrape of ${lines.toLocaleString('en')} series, 5 times`, seconds, async () => {
    const times = [];
    for (let i = 0; i < 5; ++i) times.push((await scrape(wide.small)).ms);
    return `a scrape takes ${median(times).toFixed(0)} ms, load and reading it included`;
  });
  await during('a body of 60 MB', seconds, async () => {
    const status = await post('bench-stream', 'a'.repeat(60 << 20));
    if (status !== 200) throw new Error(`the 60 MB body was answered with ${status}`);
  });
  await during('3 reloads', seconds, async () => {
    for (let i = 0; i < 3; ++i) { process.kill(wide.pid(), 'SIGHUP'); await sleep(100); }
  });

  rows.push(...await scrapes(context, wide, first.text, lines));
  rows.push({ label: 'resident memory with these series', unit: 'MB', values: { nexus: resident_kb(wide.pid()) / 1024 } });
  await wide.stop();
  return rows;
}

// What a large page costs whom: its readers, and the requests beside them. The peer is nginx with the same bytes as a file,
// on the same core, while the load goes through Nexus as before: what that shows is the price of moving the bytes. The reader
// takes what time the load leaves it on their core.
async function scrapes(context, wide, text, lines) {
  const { quick } = context;
  const peer = await start_page_server(text);
  const series = `${lines.toLocaleString('en')} series`;
  const read = (port, page, pause_ms, seconds) => wrk(port, { connections: 1, seconds, page, pause_ms, yields: true });
  const rounds = quick ? 1 : 8;
  const seconds = quick ? 1 : 2;
  const rows = [];

  context.progress(`Nexus: reading ${series}`, 3 * seconds);
  const alone = { nexus: await read(wide.small, '/metrics', 50, seconds), nginx: await read(peer.port, '/metrics', 50, seconds) };
  const stats = await read(wide.small, '/v1/stats', 50, seconds);
  rows.push({ label: `/metrics of ${series}, read over HTTP, p50`, unit: 'ms', values: { nexus: alone.nexus.p50_us / 1000, nginx: alone.nginx.p50_us / 1000 }, note: `nginx: the same ${(text.length / 1e6).toFixed(1)} MB as a file; ${((alone.nexus.p50_us - alone.nginx.p50_us) * 1000 / lines).toFixed(0)} ns a line over that` });
  rows.push({ label: `/v1/stats of ${wide.models.length.toLocaleString('en')} models, read over HTTP, p50`, unit: 'ms', values: { nexus: stats.p50_us / 1000 } });

  const load = { connections: 16, seconds, pause_ms: 2 };
  const beside = async (port) => (await Promise.all([wrk(wide.small, load), read(port, '/metrics', 250, seconds)]))[0].p99_us;
  const p99 = { calm: [], nexus: [], nginx: [] };
  for (let round = 0; round < rounds; ++round) {
    context.progress(`Nexus: requests beside scrapes, round ${round + 1} of ${rounds}`, 3 * seconds);
    p99.calm.push((await wrk(wide.small, load)).p99_us);
    p99.nexus.push(await beside(wide.small));
    p99.nginx.push(await beside(peer.port));
  }
  const added = (name) => median(p99[name].map((us, i) => us - p99.calm[i]));
  const sorted = [...p99.calm].sort((a, b) => a - b);
  rows.push({
    label: `p99 of requests beside 4 scrapes a second of ${series}, added`, unit: 'µs', wanted: 'none above noise', values: { nexus: added('nexus'), nginx: added('nginx') },
    note: `nginx: the same bytes as a file, sent from the same core; without scrapes the p99 is ${median(sorted)} µs, and in ${rounds} rounds from ${sorted[0]} to ${sorted.at(-1)} µs`,
  });
  await stop(peer.child);
  return rows;
}

// In the order of the table. `cost(c)`: seconds that the part takes, for the estimate of what is left.
export const kParts = [
  { name: 'readme', title: "With the README's configuration", run: readme_requests, cost: (c) => c.rounds * c.seconds * 8 },
  { name: 'small', title: 'Small requests', run: small_requests, cost: (c) => c.rounds * c.seconds * 21 },
  { name: 'half', title: 'Latency below saturation', run: half_load, cost: (c) => c.rounds * c.seconds * 5 },
  { name: 'large', title: 'Large prompts', run: large_prompts, cost: (c) => c.rounds * c.seconds * 8 },
  { name: 'streams', title: 'Event streams', run: event_streams, cost: (c) => c.rounds * (c.seconds * 13 + 13) },
  { name: 'idle', title: 'Memory', run: memory, cost: (c) => (c.quick ? 160 : 208) },
  { name: 'calls', title: 'System calls', run: system_calls, cost: (c) => 4 * (c.quick ? 1.5 : 2.5) },
  { name: 'start', title: 'Start and size', run: start_and_size, cost: (c) => 1.5 * c.rounds },
  { name: 'growth', title: 'Growth', run: growth, cost: (c) => (c.rounds * c.seconds + 2) * 8 },
  { name: 'threads', title: 'Two threads', run: two_threads, cost: (c) => c.rounds * c.seconds * 2 + c.seconds + 1 },
  { name: 'tls', title: 'TLS', run: over_tls, cost: (c) => c.rounds * c.seconds * 15 },
  { name: 'tls-idle', title: 'TLS: memory', run: idle_tls, cost: (c) => (c.quick ? 5 : 60) },
  { name: 'stalls', title: 'Loop stalls', run: loop_stalls, cost: (c) => (c.quick ? 15 : 76) },
];
