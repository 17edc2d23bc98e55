// run.mjs: node tests/e2e/run.mjs --nexus build/nexus [--only SUBSTRING] [--jobs N] [--tls] [--verbose] [--list]
// --tls: the tests' clients and backends speak TLS, where a test does not say otherwise.
// Starts the real binary again and again and talks to it over sockets. Exit code 0 only if every test passed.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { authority, certificate, has_openssl } from './certificates.mjs';
import { list_names, run_all, settings } from './runner.mjs';

const usage = 'usage: node run.mjs --nexus PATH [--only SUBSTRING] [--jobs N] [--tls] [--verbose] [--list]';
const options = { nexus: 'build/nexus', only: '', jobs: '4' };
const args = process.argv.slice(2);
while (args.length) {
  const name = args.shift().replace(/^--/, '');
  if (name === 'verbose' || name === 'list' || name === 'tls') options[name] = true;
  else if (name in options && args.length) options[name] = args.shift();
  else {
    console.error(usage);
    process.exit(2);
  }
}

settings.nexus = path.resolve(options.nexus);
settings.verbose = options.verbose === true;
settings.tls = options.tls === true;
if (settings.tls && !has_openssl) {
  console.log('SKIP the tests over TLS: openssl is not installed\n0 passed, 0 failed, 1 skipped');
  process.exit(0);
}
if (settings.tls) {   // in the environment, for the processes that tests start
  process.env.NEXUS_TEST_TLS = '1';
  authority();
  certificate();
}

const here = path.dirname(new URL(import.meta.url).pathname);
for (const name of fs.readdirSync(here).filter((n) => n.endsWith('.test.mjs')).sort()) await import(path.join(here, name));

if (options.list) {
  for (const name of list_names()) console.log(name);
  process.exit(0);
}
if (!fs.existsSync(settings.nexus)) {
  console.error(`no binary at ${settings.nexus}: build it first (make)`);
  process.exit(2);
}
const binary = fs.readFileSync(settings.nexus);
settings.sanitised = ['__asan_init', '__tsan_init', '__ubsan_handle'].some((name) => binary.includes(name));
settings.slow = settings.sanitised ? 6 : 1;
// A copy: a build that goes on beside the tests must not change what they test.
const copy = path.join(fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-e2e-')), 'nexus');
fs.copyFileSync(settings.nexus, copy);
fs.chmodSync(copy, 0o755);
settings.nexus = copy;
process.on('exit', () => fs.rmSync(path.dirname(copy), { recursive: true, force: true }));
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));
process.setMaxListeners(0);
process.exit(await run_all({ only: options.only, jobs: Number(options.jobs) }));
