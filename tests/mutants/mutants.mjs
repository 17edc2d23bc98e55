// mutants.mjs: small wrong changes of the code, and whether the tests notice them.
//   node tests/mutants/mutants.mjs apply DIRECTORY     writes the changes into the copy of the project in DIRECTORY
//   node tests/mutants/mutants.mjs run DIRECTORY [--only TEXT] [--parts unit,sim,e2e] [--all-parts]
// Each file tests/mutants/*.txt is a list of changes. A row is separated from the next by an empty line:
//   ## nexus/proxy/attempt.h              the file of the rows that follow
//   why: the places are not given back    why the change is wrong, in one line
//   - places_.reset();                    lines of the file, each without its indentation; they must occur once
//   + if (!$M) places_.reset();           their replacement; $M is true if this mutant is on
// `run` stops at the first part that notices a mutant, unless --all-parts; it writes DIRECTORY/../results.json.
// Only texts and runs are here: tests/mutants.mk builds the mutated programs once, with every change in them.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const here = path.dirname(new URL(import.meta.url).pathname);

function read_table() {
  const rows = [];
  for (const name of fs.readdirSync(here).filter((n) => n.endsWith('.txt')).sort()) {
    let file = '';
    let row = null;
    const lines = fs.readFileSync(path.join(here, name), 'utf8').split('\n');
    for (const [index, line] of lines.entries()) {
      if (line.startsWith('## ')) file = line.slice(3).trim();
      else if (line.startsWith('why: ')) {
        row = { number: rows.length + 1, table: `${name}:${index + 1}`, file, why: line.slice(5), find: [], put: [] };
        rows.push(row);
      } else if (line.startsWith('- ')) row.find.push(line.slice(2).trim());
      else if (line.startsWith('+ ')) row.put.push(line.slice(2));
      else if (line.trim() !== '' && !line.startsWith('# ')) throw new Error(`${name}:${index + 1}: not a line of a row`);
    }
  }
  return rows;
}

const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

// The places of a row's text in its file, as [start, end).
function places(text, row) {
  const pattern = new RegExp(row.find.map(escape).join('[ \\t]*\\n[ \\t]*'), 'g');
  return [...text.matchAll(pattern)].map((found) => [found.index, found.index + found[0].length]);
}

function apply(directory) {
  const rows = read_table();
  const wrong = [];
  for (const file of new Set(rows.map((row) => row.file))) {
    const where = path.join(directory, file);
    if (!fs.existsSync(where)) {
      wrong.push(`${file}: no such file`);
      continue;
    }
    let text = fs.readFileSync(where, 'utf8');
    const changes = [];
    for (const row of rows.filter((one) => one.file === file)) {
      const found = row.find.length === 0 ? [] : places(text, row);
      if (found.length !== 1) wrong.push(`${row.table}: its lines occur ${found.length} times in ${file}`);
      else if (!row.put.join('\n').includes('$M')) wrong.push(`${row.table}: no $M in its replacement`);
      else changes.push({ row, start: found[0][0], end: found[0][1] });
    }
    changes.sort((a, b) => b.start - a.start);
    for (const [index, change] of changes.entries()) {
      if (index > 0 && change.end > changes[index - 1].start) wrong.push(`${change.row.table}: overlaps with ${changes[index - 1].row.table}`);
      text = text.slice(0, change.start) + change.row.put.join('\n').replaceAll('$M', `nexus_mutant(${change.row.number})`) + text.slice(change.end);
    }
    fs.writeFileSync(where, text);
  }
  for (const line of wrong) console.error(line);
  console.log(`${rows.length} mutants in ${new Set(rows.map((row) => row.file)).size} files`);
  return wrong.length === 0 ? 0 : 1;
}

// Each part: a name, and its commands in order; one that fails, crashes or does not end in time has noticed the mutant.
function parts_of(directory) {
  const build = path.join(directory, 'build');
  return {
    unit: [[240, `${build}/unit_tests`, '--abort-after=1', '--no-intro']],
    sim: [[120, `${build}/sim`, '1..100'], [300, `${build}/sim`, '--test']],
    e2e: [[600, process.execPath, 'tests/e2e/run.mjs', '--nexus', `${build}/nexus`]],
  };
}

function runs_well([seconds, program, ...args], number, directory) {
  return new Promise((resolve) => {
    const env = { ...process.env, NEXUS_MUTANT: String(number) };
    const child = spawn(program, args, { cwd: directory, env, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
    let last = '';
    const keep = (bytes) => (last = (last + bytes).slice(-4000));
    child.stdout.on('data', keep);
    child.stderr.on('data', keep);
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      try {
        process.kill(-child.pid, 'SIGKILL');
      } catch {} // it has just ended
    }, seconds * 1000);
    child.on('close', (status) => {
      clearTimeout(timer);
      resolve({ well: status === 0, last: late ? `not ended after ${seconds} s` : last });
    });
  });
}

async function part_notices(commands, number, directory) {
  for (const command of commands) {
    const { well, last } = await runs_well(command, number, directory);
    if (!well) return last.trim().split('\n').slice(-12).join('\n') || 'ended with a failure';
  }
  return '';
}

async function run(directory, options) {
  const all = parts_of(directory);
  const names = options.parts.split(',');
  const rows = read_table().filter((row) => `${row.number} ${row.file} ${row.why}`.includes(options.only));
  for (const name of names) {
    const why = await part_notices(all[name], 0, directory);
    if (why !== '') throw new Error(`${name} fails without any mutant:\n${why}`);
  }
  // A part at a time, over all mutants: end-to-end tests run alone, for their time is real.
  for (const name of names) {
    const left = rows.filter((row) => options.all || row.noticed_by === undefined);
    const workers = name === 'e2e' ? 1 : os.cpus().length;
    await Promise.all(Array.from({ length: workers }, async () => {
      for (let row = left.shift(); row !== undefined; row = left.shift()) {
        const why = await part_notices(all[name], row.number, directory);
        if (why === '') continue;
        row.noticed_by = [...(row.noticed_by ?? []), name];
        row.message = why;
      }
    }));
    const noticed = rows.filter((row) => row.noticed_by?.includes(name)).length;
    console.log(`${name}: noticed ${noticed} of ${rows.length}`);
  }
  const passed = rows.filter((row) => row.noticed_by === undefined);
  for (const row of passed) console.log(`not noticed: ${row.number} ${row.table} ${row.file}: ${row.why}`);
  const share = (100 * (rows.length - passed.length)) / rows.length;
  console.log(`noticed ${rows.length - passed.length} of ${rows.length} mutants (${share.toFixed(1)} %)`);
  fs.writeFileSync(path.join(directory, '..', 'results.json'), JSON.stringify(rows, null, 1));
  return passed.length * 20 <= rows.length ? 0 : 1;
}

const [command, directory, ...rest] = process.argv.slice(2);
const option = (name, without) => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : without);
if (command === 'apply') process.exit(apply(directory));
else if (command === 'run')
  process.exit(await run(path.resolve(directory), { only: option('--only', ''), parts: option('--parts', 'unit,sim,e2e'), all: rest.includes('--all-parts') }));
else {
  console.error('usage: mutants.mjs apply DIRECTORY | run DIRECTORY [--only TEXT] [--parts unit,sim,e2e] [--all-parts]');
  process.exit(2);
}
