// fleet.mjs
// Owns:     who takes part in the proxy benchmark: backends on core 1, the four proxies and the peer of a scrape on core 0.
// Promises: each proxy has one thread for traffic, keep-alive on both sides, no access log, and the same two backends.
// Leaves:   loads and figures to proxy_cases.mjs.
import fs from 'node:fs';
import path from 'node:path';
import { configure, free_port, healthy, start, stop } from './rig.mjs';

export const kNames = ['floor', 'nexus', 'nginx', 'haproxy'];

export async function start_backends(bin) {
  const ports = { backend: await free_port(), stream_backend: await free_port() };
  const nginx = await start(['nginx', '-c', configure('backend-nginx.conf', ports)], ports.backend);
  const streams = await start([path.join(bin, 'sse_backend'), String(ports.stream_backend)], ports.stream_backend);
  return { ...ports, small: ports.backend, stream: ports.stream_backend, children: [nginx, streams] };
}

// `count` backend sections more, with models of their own, or all with the same ones.
function wide_sections(count, { backend, models_of = (i) => [`wide-${i}`] }) {
  return Array.from({ length: count }, (_, i) => `\n[backend wide-${i}]\nurl = http://127.0.0.1:${backend}\ntype = generic\nmodels = ${models_of(i).join(', ')}\n`).join('');
}

// The command of a proxy, for the ports that it is to take.
function command_of(name, bin, nexus, values) {
  switch (name) {
    case 'nexus': return [nexus, '-c', configure(values.conf ?? 'nexus.conf', values, wide_sections(values.backends_count ?? 0, values))];
    case 'nginx': return ['nginx', '-c', configure('nginx.conf', values)];
    case 'haproxy': return ['haproxy', '-db', '-f', configure('haproxy.cfg', values)];
  }
  throw new Error(`no proxy ${name}`);
}

export class Proxy {
  constructor(name, small, stream, parts) {
    Object.assign(this, { name, small, stream, parts });
  }
  // The process that serves this kind of traffic: the floor has one for each backend.
  pid(kind = 'small') {
    return (kind === 'stream' ? this.parts.at(-1) : this.parts[0]).pid;
  }
  async stop() {
    for (const child of this.parts) await stop(child);
  }
}

// `more`, for Nexus: `conf`, the configuration, and what wide_sections() is to add.
export async function start_proxy(name, { bin, nexus, backends, cores = '0', threads = 1, ...more }) {
  const small = await free_port();
  if (name === 'floor') {
    const stream = await free_port();
    const blind = path.join(bin, 'blind');
    return new Proxy(name, small, stream, [
      await start([blind, String(small), String(backends.backend)], small, { cores }),
      await start([blind, String(stream), String(backends.stream_backend)], stream, { cores }),
    ]);
  }
  const stream = name === 'nexus' ? small : await free_port(); // Nexus tells them apart by the model asked for
  const values = { ...backends, small, stream, threads, ...more };
  const child = await start(command_of(name, bin, nexus, values), small, { cores });
  if (name === 'nexus') await healthy(small);
  return new Proxy(name, small, stream, [child]);
}

// For start_time: a command that is not started here.
export async function cold_command(name, { bin, nexus, backends, ...more }) {
  const small = await free_port();
  if (name === 'floor') return { port: small, command: [path.join(bin, 'blind'), String(small), String(backends.backend)] };
  const values = { ...backends, small, stream: await free_port(), threads: 1, ...more };
  return { port: small, command: command_of(name, bin, nexus, values) };
}

// An nginx on Nexus's core that has `text` as the file /metrics.
export async function start_page_server(text) {
  const page = await free_port();
  const file = configure('page-nginx.conf', { backend: page, page });
  const folder = path.join(path.dirname(file), 'pages');
  fs.mkdirSync(folder, { recursive: true });
  fs.writeFileSync(path.join(folder, 'metrics'), text);
  return { port: page, child: await start(['nginx', '-c', file], page, { cores: '0' }) };
}

// A Nexus of `backends_count` × `models_each` models, each on one backend; they all are the same nginx.
export async function start_wide_nexus({ models_each, ...context }) {
  const models_of = (i) => Array.from({ length: models_each }, (_, j) => `wide-${i}-${j}`);
  const proxy = await start_proxy('nexus', { ...context, models_of });
  proxy.models = Array.from({ length: context.backends_count }, (_, i) => models_of(i)).flat();
  return proxy;
}

// A Nexus with so many backends, the first `with_model` of which have bench-7b, and the first `models` models in all.
export async function start_sized_nexus(context, { backends_count, models, with_model = backends_count }) {
  const models_of = (i) => (i === 0 ? Array.from({ length: models - 1 }, (_, j) => `wide-${j}`) : []).concat(i < with_model ? 'bench-7b' : `other-${i}`);
  return start_proxy('nexus', { ...context, conf: 'sized-nexus.conf', backends_count, models_of });
}
