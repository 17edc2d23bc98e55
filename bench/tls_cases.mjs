// tls_cases.mjs
// Owns:     the part of the proxy benchmark over TLS: requests and streams in TLS, also with a TLS backend; handshakes;
//           memory.
// Promises: each proxy has the same certificate (ECDSA P-256), its own defaults for versions and ciphers, one thread, and
//           keep-alive on both sides; processes of its own, so that the other parts are not touched.
// Leaves:   processes and load to rig.mjs.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import tls from 'node:tls';
import { setTimeout as sleep } from 'node:timers/promises';
import { configure, cpu_seconds, dir, free_port, healthy, median, most_connections, resident_kb, run, start, stop, wrk } from './rig.mjs';

const names = ['nexus', 'nginx', 'haproxy'];

function make_certificate() {
  const [pem, key, both] = ['tls.pem', 'tls.key', 'tls-both.pem'].map((name) => path.join(dir, name));
  execFileSync('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', key, '-out', pem, '-days', '30',
    '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'], { stdio: 'ignore' });
  fs.writeFileSync(both, fs.readFileSync(pem, 'utf8') + fs.readFileSync(key, 'utf8'));
  return { pem, key, both };
}

const files = { nexus: 'tls-nexus.conf', nginx: 'tls-nginx.conf', haproxy: 'tls-haproxy.cfg' };
const commands = { nexus: (binary, file) => [binary, '-c', file], nginx: (_, file) => ['nginx', '-c', file], haproxy: (_, file) => ['haproxy', '-db', '-f', file] };

// Ports by the kind of traffic: `small`, `stream`, and `secure`, whose backend speaks TLS. Nexus has one port for all.
async function start_tls_proxy(name, { nexus, backends, certificate, secure_backend }) {
  const small = await free_port();
  const [stream, secure] = name === 'nexus' ? [small, small] : [await free_port(), await free_port()];
  const clear = await free_port();
  const file = configure(files[name], { ...backends, ...certificate, small, stream, secure, clear, secure_backend });
  const child = await start(commands[name](nexus, file), small, { cores: '0' });
  if (name === 'nexus') await healthy(clear);
  return { name, small, stream, secure, child };
}

// CPU microseconds of the proxy for each of what `load` did.
async function with_cpu(proxy, load, counted) {
  const before = cpu_seconds(proxy.child.pid);
  const result = await load();
  return { ...result, cpu_us: ((cpu_seconds(proxy.child.pid) - before) / result[counted]) * 1e6, rate: result[counted] / result.seconds };
}

// With TLS 1.3, s_time would not wait for a ticket to resume with.
async function handshakes(proxy, seconds, resumed) {
  const out = await run(['openssl', 's_time', '-connect', `127.0.0.1:${proxy.small}`, ...(resumed ? ['-reuse', '-tls1_2'] : ['-new']), '-time', String(seconds)]);
  const [, count, real] = /(\d+) connections in (\d+) real seconds/.exec(out);
  return { count: Number(count), seconds: Number(real) };
}

// Kilobytes of the proxy for each of `count` connections that rest after one request.
async function idle_memory(proxy, count) {
  const open = (index) => new Promise((done, fail) => {
    const socket = tls.connect({ port: proxy.small, host: '127.0.0.1', rejectUnauthorized: false, servername: 'localhost' }, () => socket.write(`GET /v1/models HTTP/1.1\r\nHost: h${index}\r\n\r\n`));
    socket.once('data', () => done(socket));
    socket.once('error', fail);
  });
  const first = [];
  for (let i = 0; i < 50; ++i) first.push(await open(i));
  const before = resident_kb(proxy.child.pid);
  const sockets = [];
  for (let i = 0; i < count; i += 50) sockets.push(...await Promise.all(Array.from({ length: 50 }, (_, j) => open(i + j))));
  await sleep(200);
  const each = (resident_kb(proxy.child.pid) - before) / count;
  for (const socket of [...first, ...sockets]) socket.destroy();
  return each;
}

// Calls `measure` with the proxies, and stops them.
async function with_proxies(context, measure) {
  const certificate = make_certificate();
  const secure_backend = await free_port();
  const secure = await start(['nginx', '-c', configure('backend-tls-nginx.conf', { ...certificate, backend: secure_backend })], secure_backend);
  const proxies = [];
  for (const name of names) proxies.push(await start_tls_proxy(name, { ...context, certificate, secure_backend }));
  const rows = await measure(proxies);
  for (const child of [secure, ...proxies.map((proxy) => proxy.child)]) await stop(child);
  return rows;
}

export const over_tls = (context) => with_proxies(context, async (proxies) => {
  const { rounds, seconds } = context;
  const rows = [];
  const add = async (label, unit, key, wanted, measure) => {
    const all = Object.fromEntries(names.map((name) => [name, []]));
    for (let round = 0; round < rounds; ++round) {
      context.progress(`${label}, round ${round + 1} of ${rounds}`, seconds * names.length);
      for (const proxy of proxies) all[proxy.name].push(await measure(proxy));
    }
    const values = Object.fromEntries(names.map((name) => [name, median(all[name].map((r) => r[key]))]));
    const note = `Nexus ÷ nginx ${(values.nexus / values.nginx).toFixed(2)}, Nexus ÷ HAProxy ${(values.nexus / values.haproxy).toFixed(2)}`;
    rows.push({ label, unit, wanted, values, note });
  };
  const requests = (port, more) => (proxy) => with_cpu(proxy, () => wrk(proxy[port], { connections: 64, seconds, tls: true, ...more }), 'requests');
  const best = 'Nexus ≤ 0.95 × the better peer';
  await add('TLS in, 230-byte requests, 64 connections: CPU', 'µs', 'cpu_us', best, requests('small', {}));
  await add('TLS in and out, 230-byte requests, 64 connections: CPU', 'µs', 'cpu_us', best, requests('secure', { model: 'bench-tls' }));
  await add('TLS in, 16 streams of 200 chunks, flat out: CPU a chunk', 'µs', 'cpu_us', best, (proxy) => with_cpu(proxy, async () => {
    const result = await wrk(proxy.stream, { connections: 16, seconds, tls: true, model: 'bench-stream', stream_chunks: 200 });
    return { ...result, chunks: result.requests * 200 };
  }, 'chunks'));
  await add('TLS handshakes, full: CPU', 'µs', 'cpu_us', 'no worse than either peer', (proxy) => with_cpu(proxy, () => handshakes(proxy, seconds, false), 'count'));
  await add('TLS handshakes, resumed: CPU', 'µs', 'cpu_us', 'no worse than either peer', (proxy) => with_cpu(proxy, () => handshakes(proxy, seconds, true), 'count'));
  return rows;
});

// As many as each proxy has descriptors for, with one to the backend for each; below Nexus's max_connections.
export const idle_tls = (context) => with_proxies(context, async (proxies) => {
  const count = context.quick ? 500 : Math.min(9_900, Math.floor(most_connections / 2));
  const memory = { label: `${count.toLocaleString('en')} idle TLS connections: resident memory each`, unit: 'kB', wanted: 'Nexus ≤ 20 kB', values: {} };
  for (const proxy of proxies) {
    context.progress(`${count} idle TLS connections: ${proxy.name}`, count / 1000);
    memory.values[proxy.name] = await idle_memory(proxy, count);
  }
  return [memory];
});
