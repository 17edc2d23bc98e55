// alerts.mjs
// Owns:     the rules of contrib/prometheus on a faster clock, a real Prometheus that evaluates them, and the record of the
//           alerts that it has.
// Promises: one factor divides every duration in the rules (`for`, the ranges) and the intervals of Prometheus; names,
//           thresholds and labels stay. Whatever fires between two looks of AlertWatch is in its record.
// Leaves:   which alerts must fire to the tests.
import fs from 'node:fs';
import path from 'node:path';
import { assert, sleep } from './harness.mjs';
import { repository_file, start_prometheus } from './prometheus.mjs';

export const rule_files = ['nexus-recording.yml', 'nexus-alerts.yml'];
const alert_file = () => repository_file('contrib/prometheus/nexus-alerts.yml');
const unit_ms = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };
const duration = /((?:^| )for: |\[)(\d+)(ms|s|m|h|d)(?=\]|\s)/gm;

export const alert_names = () => [...alert_file().matchAll(/^ {6}- alert: (\w+)$/gm)].map(([, name]) => name);

// A text of rules in which one minute takes 60 / `factor` seconds.
export const hurried = (text, factor) =>
  text.replace(duration, (_, before, count, unit) => `${before}${Math.round(Number(count) * unit_ms[unit] / factor)}ms`);

// How long an alert may take to fire: the longest `for` that is at most `limit`, and the longest range behind it.
export function longest_ms(factor, limit = '15m') {
  const ms = ([, , count, unit]) => Number(count) * unit_ms[unit];
  const all = [...alert_file().matchAll(duration), ...repository_file('contrib/prometheus/nexus-recording.yml').matchAll(duration)];
  const most = ms([...` for: ${limit} `.matchAll(duration)][0]);
  const waits = all.filter(([, before]) => before !== '[').map(ms).filter((n) => n <= most);
  return (Math.max(...waits) + 5 * unit_ms.m) / factor;
}

// A Prometheus as contrib/prometheus/prometheus.yml has it, which scrapes the Nexus at `port`, `factor` times as fast.
export async function start_hurried_prometheus(t, { port, key, factor }) {
  for (const name of rule_files) t.file(name, hurried(repository_file(`contrib/prometheus/${name}`), factor));
  const targets = path.join(t.dir(), 'targets.json');
  const set_targets = (list) => {   // in one step: Prometheus looks at the file when it changes
    fs.writeFileSync(`${targets}.new`, JSON.stringify([{ targets: list }]));
    fs.renameSync(`${targets}.new`, targets);
  };
  const target = `127.0.0.1:${port}`;
  set_targets([target]);
  const interval = `${Math.round(15_000 / factor)}ms`;
  const prometheus = await start_prometheus(t, `global: { scrape_interval: ${interval}, scrape_timeout: ${interval}, evaluation_interval: ${interval} }
rule_files: [ ${rule_files.join(', ')} ]
scrape_configs:
  - job_name: nexus
    ${key ? `authorization: { credentials: ${key} }` : ''}
    file_sd_configs: [ { files: [ ${targets} ] } ]
`, { flags: [`--query.lookback-delta=${Math.round(unit_ms.m * 5 / factor)}ms`] });
  const health = async () => {
    const { groups } = await prometheus.api('rules');
    return groups.flatMap((group) => group.rules).filter((rule) => rule.health === 'err').map((rule) => `${rule.name}: ${rule.lastError}`);
  };
  return { ...prometheus, rules_with_errors: health, lose_target: () => set_targets([]), find_target: () => set_targets([target]) };
}

// `NexusBackendDown one`: the name of an alert and what it is about.
export const title_of = ({ alertname, backend, model, certificate }) => [alertname, backend, model, certificate].filter(Boolean).join(' ');

// Asks Prometheus again and again which alerts it has, and keeps when each fired and when it was over.
export class AlertWatch {
  constructor(t, prometheus) {
    this.prometheus = prometheus;
    this.firing = new Map();   // title → when it was first seen to fire
    this.pending = new Set();
    this.past = [];            // { title, from, to } of those that are over
    this.looks = 0;
    let over = false;
    const done = (async () => { for (; !over; await sleep(50)) await this.look(); })();
    t.after(async () => { over = true; await done; });
  }

  async look() {
    const { alerts } = await this.prometheus.api('alerts').catch(() => ({ alerts: null }));
    if (!alerts) return;
    const now = Date.now();
    const seen = new Set(alerts.filter((a) => a.state === 'firing').map((a) => title_of(a.labels)));
    for (const title of seen) if (!this.firing.has(title)) this.firing.set(title, now);
    for (const [title, from] of this.firing) {
      if (seen.has(title)) continue;
      this.firing.delete(title);
      this.past.push({ title, from, to: now });
    }
    this.pending = new Set(alerts.filter((a) => a.state === 'pending').map((a) => title_of(a.labels)));
    this.looks += 1;
  }

  // When the last of these began to fire, after `since`.
  last_start(titles, since) {
    const all = [...this.past.map((one) => [one.title, one.from]), ...this.firing];
    return Math.max(...all.filter(([title, from]) => from >= since && titles.includes(title)).map(([, from]) => from));
  }
  // When the last of those that are over ended.
  last_end(since) { return Math.max(since, ...this.past.map((one) => one.to)); }

  get quiet() { return this.looks > 0 && this.firing.size === 0 && this.pending.size === 0; }
  titles() { return [...this.firing.keys()].sort(); }
  // All that fired after `since`, or was firing then.
  fired_since(since) {
    const all = [...this.past.filter((one) => one.to > since).map((one) => one.title), ...this.firing.keys()];
    return [...new Set(all)].sort();
  }
}

// Insists that the hurried rules differ from the written ones in nothing but durations.
export function check_hurried(factor) {
  for (const name of rule_files) {
    const text = repository_file(`contrib/prometheus/${name}`);
    const still = text.replace(duration, '$1T');
    assert.equal(hurried(text, factor).replace(duration, '$1T'), still, name);
    assert.doesNotMatch(still, /\[\d|for: \d|interval:|offset/, `${name} has no duration that is left as it was`);
  }
}
