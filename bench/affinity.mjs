// affinity.mjs
// Owns:     the benchmark of sessions that stay where their cache is: scripted replicas with a cache of prompts, clients
//           that talk in turns, Nexus with and without affinity, and HAProxy's consistent hash as the peer; and that of
//           two keys that share a backend.
// Promises: a replica works on one prompt at a time, for a time by each token that it has not in its cache; what is
//           cached is told in `usage`, as vLLM does; "best" is the share of a cache that all replicas had in common.
// Leaves:   the processes to rig.mjs, the cost of a request to instructions.mjs.
// usage: node bench/affinity.mjs --nexus PATH [--quick]
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { dir, free_port, healthy, start, stop } from './rig.mjs';

const option = (name) => process.argv[process.argv.indexOf(name) + 1];
const quick = process.argv.includes('--quick');
const binary = option('--nexus');

// ---- replicas --------------------------------------------------------------------------------------------------------

const kReplicas = 4, kTurns = 8;
const kBlockBytes = 64, kTokensPerBlock = 16; // as llm-d counts: 4 bytes a token
const kCacheBlocks = 8_000;                   // of one replica: 16 sessions to their end, and a quarter more
const kPrefillMs = 0.04;                      // a token that is not cached
const kDecodeMs = 25;                         // behind the first token, beside others
const kSystemBytes = 6_000, kTurnBytes = 1_500;

// Blocks by a hash of all that is before them, the least recently used first.
class Cache {
  constructor(most) { this.most = most; this.blocks = new Map(); }
  // → the tokens of the prompt and how many of them were here; they are all here then.
  take(prompt) {
    let state = 0, cached = 0, whole = true;
    const blocks = Math.floor(prompt.length / kBlockBytes);
    for (let i = 0; i < blocks; i++) {
      state = hash(state, prompt, i * kBlockBytes);
      const known = this.blocks.delete(state);
      whole &&= known;
      cached += whole ? 1 : 0;
      this.blocks.set(state, true);
    }
    for (const oldest of this.blocks.keys()) {
      if (this.blocks.size <= this.most) break;
      this.blocks.delete(oldest);
    }
    return { tokens: blocks * kTokensPerBlock, cached: cached * kTokensPerBlock };
  }
}

function hash(state, text, at) {
  let [a, b] = [state >>> 0 ^ 0x9e3779b9, Math.floor(state / 2 ** 21) ^ 0x85ebca6b];
  for (let i = at; i < at + kBlockBytes; i++) {
    a = Math.imul(a ^ text.charCodeAt(i), 0x01000193);
    b = Math.imul(b ^ text.charCodeAt(i), 0x5bd1e995) ^ a >>> 15;
  }
  return (a >>> 0) * 2 ** 21 + (b >>> 0) % 2 ** 21;
}

class Replica {
  constructor(name) { this.name = name; this.clear(); }
  clear() { this.cache = new Cache(kCacheBlocks); this.free_at = 0; this.served = 0; }
  async begin(port) {
    this.port = port ?? await free_port();
    this.server = http.createServer({ keepAlive: true }, (request, response) => this.answer(request, response));
    this.server.keepAliveTimeout = 600_000;
    await new Promise((done) => this.server.listen(this.port, '127.0.0.1', done));
  }
  // Its process ends: what is in flight is reset, and what it had cached is gone.
  lose() { this.server.closeAllConnections(); this.server.close(); this.clear(); }

  answer(request, response) {
    if (request.method === 'GET') return response.end(JSON.stringify({ object: 'list', data: [{ id: 'bench-7b' }] }));
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', async () => {
      const { tokens, cached } = this.cache.take(JSON.parse(Buffer.concat(parts)).messages.map((m) => m.content).join('\n'));
      this.served += 1;
      const now = performance.now();
      this.free_at = Math.max(this.free_at, now) + (tokens - cached) * kPrefillMs;
      await sleep(this.free_at - now);
      response.writeHead(200, { 'Content-Type': 'text/event-stream', 'X-Replica': this.name });
      response.write(`data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n`);
      await sleep(kDecodeMs);
      const usage = { prompt_tokens: tokens, completion_tokens: 8, prompt_tokens_details: { cached_tokens: cached } };
      response.end(`data: ${JSON.stringify({ id: '1', choices: [], usage })}\n\ndata: [DONE]\n\n`);
    });
    response.on('error', () => {});
  }
}

// ---- what stands before them -----------------------------------------------------------------------------------------

const replicas = Array.from({ length: kReplicas }, (_, i) => new Replica(`r${i}`));

// `routing` and `server`: lines of these sections; `more`: lines behind those of the backends.
async function nexus(routing, among = replicas, { server = '', more = '' } = {}) {
  const port = await free_port(), file = path.join(dir, `affinity-${port}.conf`);
  const backends = among.map((r) => `[backend ${r.name}]\nurl = http://127.0.0.1:${r.port}\ntype = vllm\n`);
  fs.writeFileSync(file, `[server]\nlisten = 127.0.0.1:${port}\n${server}[routing]\n${routing}\n[log]\naccess = off\n${backends.join('')}${more}`);
  const child = await start([binary, '-c', file], port, { cores: '0' });
  await healthy(port);
  return { port, stop: () => stop(child) };
}

async function haproxy() {
  const port = await free_port(), file = path.join(dir, `affinity-${port}.cfg`);
  const servers = replicas.map((r) => `  server ${r.name} 127.0.0.1:${r.port} check inter 500 fall 2 rise 1\n`);
  fs.writeFileSync(file, `global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 2s\n  timeout client 60s\n  timeout server 60s\n` +
    `  option redispatch\n  retries 2\nfrontend f\n  bind 127.0.0.1:${port}\n  default_backend b\nbackend b\n  balance hdr(x-session-id)\n` +
    `  hash-type consistent\n  hash-balance-factor 125\n${servers.join('')}`);
  const child = await start(['haproxy', '-f', file], port, { cores: '0' });
  return { port, stop: () => stop(child) };
}

// A strategy of Nexus, and the beginning of a row of the tables.
const plain = (strategy) => ({ name: `Nexus, ${strategy}`, begin: () => nexus(`strategy = ${strategy}`) });
const sticky = (affinity, strategy) => ({ name: `Nexus, ${strategy}, affinity = ${affinity}`, begin: () => nexus(`strategy = ${strategy}\naffinity = ${affinity}`) });
const peer = { name: 'HAProxy, consistent hash, factor 125', begin: haproxy };

// ---- clients ---------------------------------------------------------------------------------------------------------

const agent = new http.Agent({ keepAlive: true, maxSockets: 512 });

// → { status, ttft_ms, cached, tokens, replica }
function ask(port, messages, session) {
  const body = JSON.stringify({ model: 'bench-7b', stream: true, stream_options: { include_usage: true }, messages });
  const headers = { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body), ...(session ? { 'x-session-id': session } : {}) };
  const began = performance.now();
  return new Promise((done) => {
    const request = http.request({ agent, port, host: '127.0.0.1', method: 'POST', path: '/v1/chat/completions', headers }, (response) => {
      const answer = { status: response.statusCode, replica: response.headers['x-replica'] };
      let text = '';
      response.on('data', (part) => {
        answer.ttft_ms ??= performance.now() - began;
        text += part;
      });
      response.on('error', () => done({ status: 0 }));
      response.on('end', () => {
        const usage = /"usage":(\{.*?\}\})/.exec(text);
        if (usage) Object.assign(answer, { tokens: JSON.parse(usage[1]).prompt_tokens, cached: JSON.parse(usage[1]).prompt_tokens_details.cached_tokens });
        else answer.status = 0;
        done(answer);
      });
    });
    request.on('error', () => done({ status: 0 }));
    request.end(body);
  });
}

// The same texts for every system.
function words(seed, bytes) {
  let state = seed * 2654435761 >>> 0, out = '';
  while (out.length < bytes) {
    state = Math.imul(state, 1664525) + 1013904223 >>> 0;
    out += state.toString(36) + ' ';
  }
  return out.slice(0, bytes);
}

class Tally {
  constructor() { this.ttft = []; this.tokens = this.cached = this.possible = this.failed = 0; this.common = new Cache(Infinity); }
  note(answer, messages) {
    if (answer.status !== 200) return void (this.failed += 1);
    this.ttft.push(answer.ttft_ms);
    this.tokens += answer.tokens;
    this.cached += answer.cached;
    this.possible += this.common.take(messages.map((m) => m.content).join('\n')).cached;
  }
  at(share) { const all = this.ttft.toSorted((a, b) => a - b); return all[Math.min(all.length - 1, Math.floor(share * all.length))]; }
}

async function converse(port, tally, number, { shared }, pause) {
  const messages = [{ role: 'system', content: words(shared ? 1 : 1000 + number, kSystemBytes) }];
  await sleep(pause());
  for (let turn = 0; turn < kTurns; turn++) {
    messages.push({ role: 'user', content: words(100_000 + number * 100 + turn, kTurnBytes) });
    tally.note(await ask(port, messages, `session-${number}`), messages);
    messages.push({ role: 'assistant', content: `answer ${number} ${turn}` });
    await sleep(pause());
  }
}

let dice = 12345;
const pause = () => { dice = Math.imul(dice, 1103515245) + 12345 >>> 0; return 20 + dice / 2 ** 32 * 180; };

async function talk(port, sessions, how) {
  for (const replica of replicas) replica.clear();
  dice = 12345;
  const tally = new Tally();
  await Promise.all(Array.from({ length: sessions }, (_, i) => converse(port, tally, i, how, pause)));
  return tally;
}

// One prompt, asked by all, at once and again; no session is named.
async function hot(port, clients) {
  for (const replica of replicas) replica.clear();
  const tally = new Tally();
  const messages = [{ role: 'system', content: words(7, 4 * kSystemBytes) }, { role: 'user', content: 'the same' }];
  await Promise.all(Array.from({ length: clients }, async () => {
    for (let i = 0; i < 6; i++) tally.note(await ask(port, messages), messages);
  }));
  tally.spread = replicas.filter((r) => r.served > 0).length;
  return tally;
}

// ---- tables ----------------------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const ms = (value) => (value === undefined ? '-' : value.toFixed(0));
const row = (cells) => console.log(`| ${cells.join(' | ')} |`);

async function conversations(systems, counts) {
  for (const shared of [false, true]) {
    console.log(`\n### Sessions of ${kTurns} turns, ${shared ? 'one system prompt for all' : 'a system prompt each'}\n`);
    row(['', ...counts.map((n) => `${n} sessions: cached of best, TTFT p50, p99 ms`)]);
    row(['---', ...counts.map(() => '--:')]);
    for (const system of systems) {
      const cells = [];
      for (const sessions of counts) {
        const front = await system.begin();
        const tally = await talk(front.port, sessions, { shared });
        await front.stop();
        cells.push(`${percent(tally.cached / tally.possible)}, ${ms(tally.at(0.5))}, ${ms(tally.at(0.99))}${tally.failed ? `, ${tally.failed} failed` : ''}`);
      }
      row([system.name, ...cells]);
    }
  }
}

async function hot_prompt(systems) {
  console.log('\n### One hot prompt of 24 kB, 32 clients, without a session\n');
  row(['', 'TTFT p50 ms', 'p99 ms', 'replicas used']);
  row(['---', '--:', '--:', '--:']);
  for (const system of systems) {
    const front = await system.begin();
    const tally = await hot(front.port, 32);
    await front.stop();
    row([system.name, ms(tally.at(0.5)), ms(tally.at(0.99)), tally.spread]);
  }
}

async function lost_replica(systems, sessions) {
  console.log(`\n### ${sessions} sessions, and a replica that is lost in their middle and comes back empty\n`);
  row(['', 'cached of best', 'TTFT p50 ms', 'p99 ms', 'requests failed']);
  row(['---', '--:', '--:', '--:', '--:']);
  for (const system of systems) {
    const front = await system.begin();
    const over = talk(front.port, sessions, { shared: false });
    await sleep(1000);
    replicas[1].lose();
    await sleep(1500);
    await replicas[1].begin(replicas[1].port);
    const tally = await over;
    await front.stop();
    row([system.name, percent(tally.cached / tally.possible), ms(tally.at(0.5)), ms(tally.at(0.99)), tally.failed]);
  }
}

// Where each of `keys` sessions goes, asked one after the other.
async function places(port, keys) {
  const at = [];
  for (let i = 0; i < keys; i++) at.push((await ask(port, [{ role: 'user', content: `${i}` }], `key-${i}`)).replica);
  return at;
}

async function agreement(keys) {
  const routing = 'affinity = session', fronts = [await nexus(routing), await nexus(routing), await nexus(routing, replicas.slice(1))];
  const [one, two, fewer] = await Promise.all(fronts.map((front) => places(front.port, keys)));
  for (const front of fronts) await front.stop();
  const differ = one.filter((at, i) => at !== two[i]).length, moved = one.filter((at, i) => at !== fewer[i]).length;
  const each = replicas.map((r) => one.filter((at) => at === r.name).length);
  console.log(`\n${keys} sessions one after the other: ${each.join(', ')} on each replica; two Nexus choose differently for ${differ}; without one of ` +
    `${kReplicas} replicas ${moved} move (${percent(moved / keys)}), ${one.filter((at, i) => at !== fewer[i] && at !== replicas[0].name).length} of them from another one.`);
}

// ---- two keys on one backend -----------------------------------------------------------------------------------------

const kPlaces = 4, kServiceMs = 50, kCrowd = 64;

// 64 clients of one key and one of another, none of which pauses, on a backend with four places: the requests that all
// had served in a second, and how long those of the one waited beyond their service.
async function beside_a_crowd(keys, seconds) {
  const server = http.createServer((request, response) => {
    request.on('end', async () => {
      await sleep(kServiceMs);
      response.end(JSON.stringify({ choices: [], usage: { prompt_tokens: 10, completion_tokens: 10 } }));
    }).resume();
  });
  server.keepAliveTimeout = 600_000;
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  const more = `max_pending = ${kPlaces}\nmodels = bench-7b\n[queue]\nsize = 200\ntimeout = 60s\n`;
  const names = { crowd: 'sk-crowd-0123456789', one: 'sk-one-0123456789' };
  const file = path.join(dir, 'keys');
  fs.writeFileSync(file, Object.entries(names).map((pair) => `${pair.join(' ')}\n`).join(''));
  const only = { name: 'only', port: server.address().port };
  const front = await nexus('', [only], { server: keys ? `api_keys_file = ${file}\n` : '', more });
  const until = performance.now() + seconds * 1000;
  const waits = [];
  let served = 0;
  const client = async (who) => {
    while (performance.now() < until) {
      const began = performance.now();
      const { status } = await plainly(front.port, names[who]);
      if (status !== 200) throw new Error(`${who}: ${status}`);
      served += performance.now() < until ? 1 : 0;
      if (who === 'one') waits.push(performance.now() - began - kServiceMs);
    }
  };
  await Promise.all([...Array.from({ length: kCrowd }, () => client('crowd')), client('one')]);
  await front.stop();
  server.close();
  waits.sort((a, b) => a - b);
  return { rate: served / seconds, waits };
}

function plainly(port, key) {
  const body = '{"model":"bench-7b","messages":[{"role":"user","content":"Hello"}]}';
  const headers = { Authorization: `Bearer ${key}`, 'Content-Type': 'application/json', 'Content-Length': body.length };
  return new Promise((done, fail) => {
    http.request({ agent, port, host: '127.0.0.1', method: 'POST', path: '/v1/chat/completions', headers }, (response) => {
      response.on('end', () => done({ status: response.statusCode })).resume();
    }).on('error', fail).end(body);
  });
}

async function two_keys(seconds) {
  console.log(`\n### ${kCrowd} clients beside one, on a backend with max_pending = ${kPlaces} that takes ${kServiceMs} ms\n`);
  row(['', 'requests/s of all', 'wait of the one: p50 ms', 'p99 ms']);
  row(['---', '--:', '--:', '--:']);
  for (const keys of [false, true]) {
    const { rate, waits } = await beside_a_crowd(keys, seconds);
    row([keys ? 'a key each' : 'no keys: the order of arrival', rate.toFixed(1), ms(waits[waits.length >> 1]), ms(waits[Math.floor(0.99 * waits.length)])]);
  }
}

for (const replica of replicas) await replica.begin();
const version = (command, args) => execFileSync(command, args, { encoding: 'utf8' }).split('\n')[0];
console.log(`${os.cpus()[0].model}, ${os.cpus().length} cores; ${version(binary, ['--version'])}; ${version('haproxy', ['-v'])}; Node ${process.version}`);
console.log(`${kReplicas} replicas, each with a cache of ${kCacheBlocks * kTokensPerBlock} tokens, ${kPrefillMs} ms a token that is not cached, ${kDecodeMs} ms to the end`);
const sessions = [sticky('session', 'smart'), peer];
const others = ['smart', 'least_pending', 'round_robin'].map(plain);
await conversations([...sessions, ...others], quick ? [8] : [4, 16, 64]);
await hot_prompt([sticky('session', 'least_pending'), plain('least_pending'), peer]);
await lost_replica([sessions[0], peer, plain('least_pending')], quick ? 8 : 32);
await agreement(quick ? 50 : 400);
await two_keys(quick ? 3 : 20);
for (const replica of replicas) replica.server.close();
process.exit(0);
