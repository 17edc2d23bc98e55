// mutants.mjs: small wrong changes of the code, and whether the tests notice them.
//   node tests/mutants/mutants.mjs check DIRECTORY     tells which rows do not fit the project in DIRECTORY
//   node tests/mutants/mutants.mjs apply DIRECTORY     the same, and writes the changes into its files: use a copy
//   node tests/mutants/mutants.mjs run DIRECTORY [--only TEXT] [--every N] [--parts sim,unit,e2e] [--all-parts]
// Each file tests/mutants/*.txt is a list of changes. A row is separated from the next by an empty line:
//   ## nexus/proxy/attempt.h              the file of the rows that follow
//   why: the places are not given back    why the change is wrong, in one line
//   - places_.reset();                    lines of the file without their indentation, the first and the last may be
//                                         parts of lines; they must occur once, and rows must not overlap
//   + if (!$M) places_.reset();           their replacement; $M is true if this mutant is on. The compiler evaluates
//                                         it as false: change a constexpr table where it is read
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

function source_files(directory) {
  const folders = fs.readdirSync(path.join(directory, 'nexus'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
  const files = ['nexus', ...folders.map((folder) => `nexus/${folder.name}`)].map((folder) =>
    fs.readdirSync(path.join(directory, folder)).filter((name) => name.endsWith('.h')).map((name) => `${folder}/${name}`));
  return files.flat();
}

// Where else the lines of a row stand, for a row whose code was moved.
function elsewhere(directory, row) {
  const found = source_files(directory).filter((file) => places(fs.readFileSync(path.join(directory, file), 'utf8'), row).length === 1);
  return found.length > 0 ? `; they occur in ${found.join(', ')}` : '';
}

// The text of `file` with its rows' changes; adds to `wrong` what does not fit.
function changed(directory, file, rows, wrong) {
  let text = fs.readFileSync(path.join(directory, file), 'utf8');
  const changes = [];
  for (const row of rows) {
    const found = row.find.length === 0 ? [] : places(text, row);
    if (found.length !== 1) wrong.push(`${row.table}: its lines occur ${found.length} times in ${file}${elsewhere(directory, row)}`);
    else if (!row.put.join('\n').includes('$M')) wrong.push(`${row.table}: no $M in its replacement`);
    else changes.push({ row, start: found[0][0], end: found[0][1] });
  }
  changes.sort((a, b) => b.start - a.start);
  for (const [index, { row, start, end }] of changes.entries()) {
    if (index > 0 && end > changes[index - 1].start) wrong.push(`${row.table}: overlaps with ${changes[index - 1].row.table}`);
    text = text.slice(0, start) + row.put.join('\n').replaceAll('$M', `nexus_mutant(${row.number})`) + text.slice(end);
  }
  return text;
}

function apply(directory, write) {
  const rows = read_table();
  const wrong = [];
  for (const file of new Set(rows.map((row) => row.file))) {
    const where = path.join(directory, file);
    const of_file = rows.filter((row) => row.file === file);
    if (!fs.existsSync(where)) {
      wrong.push(`${file}: no such file`, ...of_file.map((row) => `${row.table}: its file is gone${elsewhere(directory, row)}`));
      continue;
    }
    const text = changed(directory, file, of_file, wrong);
    if (write) fs.writeFileSync(where, text);
  }
  for (const line of wrong) console.error(line);
  console.log(`${rows.length} mutants in ${new Set(rows.map((row) => row.file)).size} files`);
  return wrong.length === 0 ? 0 : 1;
}

// Each part: a name, and its commands in order; one that fails, crashes or does not end in time has noticed the mutant.
function parts_of(directory) {
  const build = path.join(directory, 'build');
  return {
    sim: [[`${build}/sim`, '1..300'], [`${build}/sim`, '--test']],
    unit: [[`${build}/unit_tests`, '--abort-after=1', '--no-intro']],
    e2e: [[process.execPath, 'tests/e2e/run.mjs', '--nexus', `${build}/nexus`]],
  };
}

// Returns what a command with this mutant on said last, or an empty text if it ended well.
function complaint(command, number, directory, seconds) {
  return new Promise((resolve) => {
    const env = { ...process.env, NEXUS_MUTANT: String(number) };
    const child = spawn(command[0], command.slice(1), { cwd: directory, env, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
    let last = '';
    const keep = (bytes) => (last = (last + bytes).slice(-4000));
    child.stdout.on('data', keep);
    child.stderr.on('data', keep);
    const timer = setTimeout(() => {
      last = `not ended after ${seconds} s`;
      try {
        process.kill(-child.pid, 'SIGKILL');
      } catch {} // it has just ended
    }, seconds * 1000);
    child.on('close', (status) => {
      clearTimeout(timer);
      resolve(status === 0 ? '' : last.trim().split('\n').slice(-12).join('\n') || 'ended with a failure');
    });
  });
}

async function part_notices(commands, number, directory) {
  for (const { command, seconds } of commands) {
    const why = await complaint(command, number, directory, seconds);
    if (why !== '') return why;
  }
  return '';
}

// Runs a part without any mutant: a mutant has five times as long.
async function timed(commands, directory) {
  const all = [];
  for (const command of commands) {
    const began = Date.now();
    const why = await complaint(command, 0, directory, 3600);
    if (why !== '') throw new Error(`${command.join(' ')} fails without any mutant:\n${why}`);
    all.push({ command, seconds: 10 + Math.ceil((5 * (Date.now() - began)) / 1000) });
  }
  return all;
}

async function run(directory, options) {
  const names = options.parts.split(',');
  const rows = read_table()
    .filter((row) => `${row.number} ${row.table} ${row.file} ${row.why}`.includes(options.only))
    .filter((row, index) => index % options.every === options.every - 1);
  // A part at a time, over all mutants: end-to-end tests run alone, for their time is real.
  for (const name of names) {
    const commands = await timed(parts_of(directory)[name], directory);
    const left = rows.filter((row) => options.all || row.noticed_by === undefined);
    const workers = name === 'e2e' ? 1 : os.cpus().length;
    await Promise.all(Array.from({ length: workers }, async () => {
      for (let row = left.shift(); row !== undefined; row = left.shift()) {
        const why = await part_notices(commands, row.number, directory);
        if (why === '') continue;
        row.noticed_by = [...(row.noticed_by ?? []), name];
        row.message = why;
      }
    }));
    console.log(`${name}: noticed ${rows.filter((row) => row.noticed_by?.includes(name)).length} of ${rows.length}`);
    fs.writeFileSync(path.join(directory, '..', 'results.json'), JSON.stringify(rows, null, 1));
  }
  const passed = rows.filter((row) => row.noticed_by === undefined);
  for (const row of passed) console.log(`not noticed: ${row.number} ${row.table} ${row.file}: ${row.why}`);
  const share = rows.length === 0 ? 0 : (100 * (rows.length - passed.length)) / rows.length;
  console.log(`noticed ${rows.length - passed.length} of ${rows.length} mutants (${share.toFixed(1)} %)`);
  return passed.length * 20 <= rows.length ? 0 : 1;
}

const [command, directory, ...rest] = process.argv.slice(2);
const option = (name, without) => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : without);
if (command === 'apply' || command === 'check') process.exit(apply(directory, command === 'apply'));
else if (command === 'run')
  process.exit(await run(path.resolve(directory), { only: option('--only', ''), every: Number(option('--every', '1')), parts: option('--parts', 'sim,unit,e2e'), all: rest.includes('--all-parts') }));
else {
  console.error('usage: mutants.mjs check DIRECTORY | apply DIRECTORY | run DIRECTORY [--only TEXT] [--every N] [--parts sim,unit,e2e] [--all-parts]');
  process.exit(2);
}
