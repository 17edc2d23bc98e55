// soak.mjs: node tests/soak/soak.mjs --nexus build/nexus --minutes 10
// Owns:     one daemon before four backends, two of which fail in turn, under load, client aborts, reloads and scrapes.
// Promises: a request is lost unless it was answered as its case demands or was visibly cut; exit code 0 only if none
//           was, and neither descriptors nor memory grew after warm-up (a fifth of the time).
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { RawClient, answer_plainly, chat, chat_chunk, get, parse_metrics, seeded, settings, sleep, sse, start_backend, start_nexus, until } from '../e2e/harness.mjs';

const args = Object.fromEntries(process.argv.slice(2).join(' ').split('--').filter(Boolean).map((a) => a.trim().split(' ')));
settings.nexus = path.resolve(args.nexus ?? 'build/nexus');
const minutes = Number(args.minutes ?? 10);
const warm_up = 0.2;
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-soak-'));
const undo = [];
const t = { dir: () => folder, after: (fn) => undo.push(fn), notes: [] };
const random = seeded(2026);
const counts = { requests: 0, whole: 0, refused: 0, cut: 0, aborted: 0, faults: 0, reloads: 0, scrapes: 0 };
const lost = [];

async function stream(request, reply) {
  reply.stream();
  for (let i = 0; i < 10 && !reply.gone; i++) {
    reply.piece(sse(chat_chunk(request.json.model, `p${i} `, {}, i === 0)));
    await sleep(3);
  }
  reply.piece(sse('[DONE]'));
  reply.finish();
}

// `fault` is what a shaky backend does to requests at the moment.
async function answer(request, reply, backend) {
  backend.requests.length = 0;   // months of them would be this program's growth
  if (backend.connections.length > 500) backend.connections = backend.connections.filter((c) => !c.ended_at);
  if (backend.fault) counts.faults += 1;
  switch (backend.fault) {
    case 'reset': return reply.reset();
    case 'stall': return undefined;
    case 'error': return reply.json({ error: { message: 'made up' } }, 503);
    case 'break':
      reply.stream();
      reply.piece(sse(chat_chunk(request.json.model, 'p0 ', {}, true)));
      await sleep(2);
      return reply.reset();
    default: return request.json.stream ? stream(request, reply) : answer_plainly(request, reply, backend);
  }
}

function judge(ask, response) {
  const { text, status, complete } = response;
  if (status === 200 && complete && (ask.stream ? /data: \[DONE\]\n\n$/.test(text) : response.json.choices)) return 'whole';
  if (status === 200 && (!complete || /data: \{"error"/.test(text))) return 'cut';
  if ([429, 502, 503, 504].includes(status) && complete && response.json.error.message) return 'refused';
  return null;
}

async function load(port, over) {
  let client = null;
  while (!over()) {
    if (!client || client.over) client = await RawClient.connect(port);
    const ask = chat('m1', random.below(2) ? { stream: true } : {});
    counts.requests += 1;
    client.send('POST', '/v1/chat/completions', { 'Content-Type': 'application/json' }, ask);
    if (random.below(20) === 0) {
      await sleep(random.below(15));
      random.below(2) ? client.reset() : client.close();
      counts.aborted += 1;
      counts.faults += 1;
      client = null;
      continue;
    }
    try {
      const response = await client.response(20_000);
      const verdict = judge(ask, response);
      if (verdict) counts[verdict] += 1;
      else lost.push(`status ${response.status}, ${response.complete ? 'whole' : 'cut'}: ${response.text.slice(0, 200)}`);
      if (!response.complete || /close/i.test(response.headers.get('connection'))) client = client.close();
    } catch (error) {
      lost.push(error.message);
      client = client.close();
    }
    await sleep(random.below(10));
  }
  client?.close();
}

async function faults(backends, over) {
  while (!over()) {
    const backend = random.pick(backends);
    const kind = random.pick(['reset', 'stall', 'error', 'break', 'kill']);
    if (kind === 'kill') {
      counts.faults += 1;
      await backend.stop();
    } else backend.fault = kind;
    await sleep(200 + random.below(800));
    backend.fault = '';
    if (kind === 'kill') await backend.start();
    await sleep(200);
  }
}

const backends = [];
for (let i = 0; i < 4; i++) backends.push(await start_backend(t, { answer }));
const conf = (n) => ({
  server: { write_timeout: '2s' },
  upstream: { first_byte_timeout: '1s', stall_timeout: '1s', connect_timeout: '1s' },
  health: { interval: '500ms', timeout: '400ms', eject_time: '500ms' },
  routing: { strategy: ['smart', 'round_robin', 'least_pending'][n % 3] },
  log: { format: 'json', access: path.join(folder, 'access.log') },
  backends: backends.map((mock, i) => ({ name: `b${i}`, mock, priority: 10 + ((n + i) % 4) })),
});
const nexus = await start_nexus(t, conf(0));
const page = async () => parse_metrics((await get(nexus.port, '/metrics')).text);
const began = Date.now();
const length = minutes * 60_000;
const over = () => Date.now() - began >= length || nexus.exit;

// What the daemon holds, under load.
const samples = [];
async function holdings() {
  return { rss: nexus.rss_bytes(), fds: fs.readdirSync(`/proc/${nexus.pid}/fd`).length };
}
const measure = async () => {
  while (!over()) {
    const is_warm = Date.now() - began > length * warm_up;
    if (is_warm) samples.push(await holdings());
    await sleep(500);
  }
};
const repeat = async (pause, run) => { for (let n = 1; !over(); n++) { await sleep(pause); await run(n); } };
const say = () => {
  const spent = (Date.now() - began) / 1000;
  console.log(`soak: ${spent.toFixed(0)} of ${minutes * 60} s, ${Math.max(0, minutes * 60 - spent).toFixed(0)} s to go; ${counts.requests} requests, ${counts.faults} faults, ${lost.length} lost`);
};
const progress = setInterval(say, 30_000);
await Promise.all([
  ...Array.from({ length: 24 }, () => load(nexus.port, over)),
  faults(backends.slice(0, 2), over), measure(),
  repeat(2_000, (n) => { counts.reloads += 1; for (const b of backends) b.probes.length = 0; nexus.reload(conf(n)); }),
  repeat(250, async () => { counts.scrapes += 1; await page(); }),
]);
clearInterval(progress);

let failed = lost.length > 0 || nexus.exit;
let end;
try {
  await until(async () => (end = await page()).sum('nexus_pending_requests') === 0 && end.sum('nexus_client_connections') === 1, 'everything to come to rest', 10_000);
} catch (error) {
  failed = true;
  console.log(`soak: ${error.message}`);
}
const stalls = end.select('nexus_loop_stall_seconds_bucket').sort((a, b) => Number(a.labels.le) - Number(b.labels.le));
const turns = end.value('nexus_loop_stall_seconds_count');
const longest = stalls.find((s) => s.value === turns)?.labels.le;
// Early against late, both under the same load: halves of what was seen after warm-up.
const half = Math.floor(samples.length / 2);
const middle = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
const growth = (key) => middle(samples.slice(half).map((s) => s[key])) - middle(samples.slice(0, half).map((s) => s[key]));
const grown = { rss: growth('rss'), fds: growth('fds') };
if (grown.rss > 2 ** 20 || grown.fds > 16) failed = true;
console.log(`requests            ${counts.requests}: ${counts.whole} whole, ${counts.refused} refused, ${counts.cut} visibly cut, ${counts.aborted} aborted by the client`);
console.log(`faults injected     ${counts.faults}, beside ${counts.reloads} reloads and ${counts.scrapes} scrapes`);
console.log(`lost                ${lost.length}${lost.length ? `, the first: ${lost[0]}` : ''}`);
console.log(`longest loop stall  at most ${longest} s in ${turns} turns`);
console.log(`growth after warm-up  ${grown.fds} descriptors, ${(grown.rss / 1024).toFixed(0)} KiB (${((samples.at(-1)?.rss ?? 0) / 2 ** 20).toFixed(1)} MiB at the end)`);
for (const fn of undo.reverse()) await fn().catch((error) => { failed = true; console.log(`soak: ${error.message}`); });
fs.rmSync(folder, { recursive: true, force: true });
console.log(failed ? 'soak: FAILED' : 'soak: passed');
process.exit(failed ? 1 : 0);
