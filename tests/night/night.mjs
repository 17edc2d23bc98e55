// night.mjs: node tests/night/night.mjs --nexus build/nexus [--only TEXT]
// Owns:     a night in ten minutes: fault after fault against the real binary, under the eyes of a real Prometheus that has the
//           recording rules and the alerts of contrib/prometheus.
// Promises: exit code 0 only if each fault raised exactly the alerts that faults.mjs names, and all ended after it.
//           Time is scaled: a minute of the rules takes a second. Every `for` and every range in the rules, the intervals of
//           scrapes and of evaluation (15 s, here 250 ms), and the checks of Nexus are divided by 60; thresholds stay as they
//           are, and so do the seconds in which Nexus measures. A rate therefore sees 5 s of requests where it sees five
//           minutes of them by day: the load is made for that.
// Leaves:   the faults to faults.mjs, the scene to scene.mjs, playing and judging to play.mjs.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { has_openssl, settings } from '../e2e/harness.mjs';
import { alert_names } from '../e2e/alerts.mjs';
import { find_program } from '../e2e/prometheus.mjs';
import { faults } from './faults.mjs';
import { play, table } from './play.mjs';
import { start_scene } from './scene.mjs';

const factor = 60;
const args = Object.fromEntries(process.argv.slice(2).join(' ').split('--').filter(Boolean).map((a) => [a.trim().split(' ')[0], a.trim().split(' ').slice(1).join(' ')]));
settings.nexus = path.resolve(args.nexus ?? 'build/nexus');
const chosen = faults.filter((fault) => fault.name.includes(args.only ?? ''));
if (!find_program('prometheus') || !has_openssl) {
  console.log('night: prometheus and openssl are needed (make deps-peers)');
  process.exit(1);
}
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-night-'));
process.on('exit', () => fs.rmSync(folder, { recursive: true, force: true }));
const undo = [];
const t = {
  dir: () => folder, after: (fn) => undo.push(fn), notes: [],
  file: (name, text) => { fs.writeFileSync(path.join(folder, name), text); return path.join(folder, name); },
};

const began = Date.now();
const results = [];
const wrong = [];
try {
  const scene = await start_scene(t, { factor });
  for (const fault of chosen) {
    const result = await play(scene, fault);
    results.push(result);
    console.log(`night: ${((Date.now() - began) / 1000).toFixed(0)} s, ${results.length} of ${chosen.length}: ${fault.name}: ${result.wrong.length ? result.wrong.join('; ') : 'as it must be'}`);
  }
  wrong.push(...await scene.prometheus.rules_with_errors());
} catch (error) {
  wrong.push(error.stack);
}
for (const fn of undo.reverse()) await Promise.resolve(fn()).catch((error) => wrong.push(error.message));

const raised = new Set(results.flatMap((r) => r.fired.map((title) => title.split(' ')[0])));
console.log(`\n${table(results).join('\n')}\n`);
for (const one of wrong) console.log(`night: ${one}`);
console.log(`night: ${results.length} faults in ${((Date.now() - began) / 60_000).toFixed(1)} minutes raised ${raised.size} of ${alert_names().length} alerts`);
const failed = wrong.length > 0 || results.length < chosen.length || results.some((r) => r.wrong.length > 0);
console.log(failed ? 'night: FAILED' : 'night: passed');
process.exit(failed ? 1 : 0);
