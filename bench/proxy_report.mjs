// proxy_report.mjs
// Owns:     the proxy benchmark's figures as text: the table on the terminal and the page bench/RESULTS.md.
// Promises: both show the same numbers; the machine, versions and date stand with them.
// Leaves:   the chart to chart.mjs.
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { kNames } from './fleet.mjs';
import { conf_text, run } from './rig.mjs';

export function machine() {
  const cpu = os.cpus()[0]?.model.trim() ?? 'unknown CPU';
  return `${cpu}, ${os.cpus().length} cores, ${Math.round(os.totalmem() / 2 ** 30)} GB; Linux ${os.release()}`;
}

// How late a process that sleeps on the proxies' core wakes, in µs: on a quiet machine few, and the 99th percentile not many more.
export async function quietness(bin) {
  const [wake, wake_p99] = (await run([path.join(bin, 'wake_time'), '2'], { cores: '0' })).trim().split(' ');
  return { wake, wake_p99 };
}

export function versions(nexus) {
  const first = (command, args, pattern) => {
    const result = spawnSync(command, args, { encoding: 'utf8' });
    return pattern.exec(`${result.stdout}${result.stderr}`)?.[1] ?? 'unknown';
  };
  const commit = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).stdout?.trim() || 'no git';
  return {
    nexus: `${first(nexus, ['--version'], /(\d[\w.-]*)/)} (${commit})`,
    nginx: first('nginx', ['-v'], /nginx\/(\S+)/),
    haproxy: first('haproxy', ['-v'], /version (\d[\d.]*)/),
    wrk: first('wrk', ['-v'], /wrk (?:debian\/)?(\S+)/),
    compiler: execFileSync(process.env.CXX || 'g++', ['--version'], { encoding: 'utf8' }).split('\n')[0],
  };
}

export function number(value, digits) {
  if (value === undefined) return '';
  if (value === Infinity) return '> 1 s';
  if (digits !== undefined) return value.toFixed(digits);
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString('en');
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

const header = ['', 'unit', 'floor', 'Nexus', 'nginx', 'HAProxy', 'Nexus ÷ floor', 'nginx ÷ floor', 'HAProxy ÷ floor', 'wanted'];

function cells(row) {
  return [
    row.label, row.unit, ...kNames.map((name) => number(row.values[name], row.digits)),
    ...kNames.slice(1).map((name) => number(row.ratios?.[name], 2) + (name === 'nexus' && row.spread !== undefined ? ` ± ${(100 * row.spread).toFixed(1)} %` : '')), row.wanted ?? '',
  ];
}

function columns(lines) {
  const widths = lines[0].map((_, i) => Math.max(...lines.map((line) => line[i].length)));
  const left = (i) => i < 2 || i === lines[0].length - 1;
  return lines.map((line) => line.map((cell, i) => (left(i) ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join('  ').trimEnd());
}

const about = (r) => `load average before: ${r.busy.toFixed(1)}; a process that sleeps wakes ${r.quiet.map((q) => `${q.wake} µs (p99 ${q.wake_p99})`).join(' late before, ')} late after; nexus ${r.versions.nexus}, nginx ${r.versions.nginx}, HAProxy ${r.versions.haproxy}, wrk ${r.versions.wrk}, ${r.versions.compiler}`;

export function table(results) {
  const lines = columns([header, ...results.parts.flatMap((part) => part.rows.map(cells))]);
  const out = ['', `${results.date}  ${results.machine}`, about(results), `medians of ${results.rounds} rounds of ${results.seconds} s or more${results.quick ? ' (QUICK: a smoke run, not a measurement)' : ''}`, '', lines.shift()];
  for (const part of results.parts) {
    out.push(`-- ${part.title}`);
    for (const row of part.rows) {
      out.push(lines.shift());
      if (row.note) out.push(`     ${row.note}`);
    }
  }
  return out.join('\n');
}

export function page(results) {
  const out = [
    '# Results of `make bench-proxy`', '',
    `${results.date}. ${results.machine}. ${about(results)}.`, '',
    `Medians of ${results.rounds} rounds of ${results.seconds} s each, in which the proxies take turns; a ratio is the median of those within one round. A ratio`,
    `of CPU gets up to ${2 * results.rounds} rounds, until its median is known to 3 % (± is half of its 95 % confidence interval). The proxy process`,
    'is pinned to core 0 with one thread for traffic, wrk and the backends to core 1; keep-alive on both sides. CPU is user and system',
    'time of the whole process, from /proc. *Floor* is `bench/blind.cpp`: it moves bytes and reads nothing. Added latency is what is over the same load',
    'without a proxy. Large prompts and streams have `bench/sse_backend.cpp` as their backend (nginx answers before it has read a body).', '',
    '![CPU time and ratios](results.svg)', '',
  ];
  for (const part of results.parts) {
    out.push(`## ${part.title}`, '', `| ${header.join(' | ')} |`, `|---|---|${'--:|'.repeat(7)}---|`);
    for (const row of part.rows) out.push(`| ${cells(row).join(' | ')} |`);
    out.push('');
    for (const row of part.rows) if (row.note) out.push(`- ${row.label}: ${row.note}`);
    if (part.rows.some((row) => row.note)) out.push('');
  }
  out.push('## Configurations that were measured', '', "`@` marks the benchmark's own addresses. Nexus, with the README's configuration:", '');
  out.push('```ini', conf_text('README.md').trimEnd(), '```', '', "Nexus, elsewhere; then the peers', with the upstream keep-alive that their manuals recommend:", '');
  for (const [name, language] of [['nexus.conf', 'ini'], ['nginx.conf', 'nginx'], ['haproxy.cfg', 'haproxy']]) out.push(`\`\`\`${language}`, conf_text(name).trimEnd(), '```', '');
  return `${out.join('\n').trimEnd()}\n\n${remarks()}`;
}

// What people add to the figures of the machine that they were last measured on.
function remarks() {
  return fs.readFileSync(new URL('REMARKS.md', import.meta.url), 'utf8');
}
