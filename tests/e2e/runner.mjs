// runner.mjs
// Owns:     the list of end-to-end tests and how they are run: several at once, each with a limit of its own.
// Promises: one line per failure with its reason; the last line is `N passed, N failed[, N skipped]`; what a test
//           started is stopped before its verdict, and a daemon that does not stop cleanly fails the test that started it.
// Leaves:   starting daemons and mock backends to daemon.mjs and backend.mjs.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';

const tests = [];
let current_group = '';

export const settings = {
  nexus: '',          // path of the binary under test
  slow: 1,            // how much longer everything may take: 1, or more for a sanitised build
  sanitised: false,
  tls: process.env.NEXUS_TEST_TLS === '1',   // clients and backends of the tests speak TLS
  verbose: false,
};

export function group(name, declare) {
  current_group = name;
  declare();
  current_group = '';
}

// options.limit_ms: when the test is given up; options.serial: run with no other test beside it; options.calm: mostly
// waits for what goes by times of its own (a Prometheus, say), so run with one other of its kind beside it.
export function test(name, options, run) {
  if (typeof options === 'function') [options, run] = [{}, options];
  tests.push({ name: current_group ? `${current_group}: ${name}` : name, run, limit_ms: 20_000, serial: false, calm: false, ...options });
}

class Skip extends Error {}

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// Rejects with `what` if `promise` is not settled after `ms` (times the slowness of the build). Timers come before sockets
// where this process was held up, so what has come meanwhile is looked at before the verdict.
export function within(ms, promise, what) {
  let timer;
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => {
      timer = setTimeout(() => fail(new Error(`${typeof what === 'function' ? what() : what}: not within ${ms * settings.slow} ms`)), 20);
    }, ms * settings.slow);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// Calls `probe` until it returns something true; what it last threw is part of the reason when time is up.
export async function until(probe, what, ms = 5_000) {
  const end = Date.now() + ms * settings.slow;
  let last = '';
  for (let pause = 2; ; pause = Math.min(pause * 2, 50)) {
    try {
      const value = await probe();
      if (value) return value;
      last = '';
    } catch (error) {
      last = ` (${error.message})`;
    }
    if (Date.now() > end) throw new Error(`${typeof what === 'function' ? what() : what}: not within ${ms * settings.slow} ms${last}`);
    await sleep(pause);
  }
}

// The folders of tests under way, for a run that ends before they do.
const folders = new Set();
process.on('exit', () => { for (const folder of folders) fs.rmSync(folder, { recursive: true, force: true }); });

// What a test is given: a folder of its own, and a list of what to undo when it ends.
class Context {
  constructor(name) {
    this.name = name;
    this.undo = [];
    this.notes = [];   // asked for when the test failed: each returns a line of explanation or ''
    this.folder = '';
  }
  dir() {
    if (!this.folder) {
      this.folder = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-e2e-'));
      folders.add(this.folder);
      this.undo.unshift(() => {
        fs.rmSync(this.folder, { recursive: true, force: true });
        folders.delete(this.folder);
      });
    }
    return this.folder;
  }
  file(name, text) {
    const full = path.join(this.dir(), name);
    fs.writeFileSync(full, text);
    return full;
  }
  after(fn) { this.undo.push(fn); }
  skip(reason) { throw new Skip(reason); }
}

async function run_one(t) {
  const context = new Context(t.name);
  const delay = monitorEventLoopDelay({ resolution: 10 });
  delay.enable();
  let failure = null;
  let skipped = null;
  const started = Date.now();
  try {
    await within(t.limit_ms, Promise.resolve().then(() => t.run(context)), 'the whole test');
  } catch (error) {
    if (error instanceof Skip) skipped = error.message;
    else failure = error;
  }
  delay.disable();
  if (delay.max > 100e6) context.notes.push(() => `the tests' own process was held up for up to ${Math.round(delay.max / 1e6)} ms`);
  const notes = failure ? context.notes.map((note) => note()).filter(Boolean) : [];
  for (const undo of context.undo.reverse()) {
    try {
      await undo();
    } catch (error) {
      failure ??= error;
    }
  }
  return { name: t.name, failure, skipped, notes, ms: Date.now() - started };
}

function report(result) {
  if (result.skipped !== null) {
    console.log(`SKIP ${result.name}: ${result.skipped}`);
  } else if (result.failure) {
    const reason = String(result.failure.message ?? result.failure).replace(/\s*\n\s*/g, ' | ').slice(0, 1500);
    console.log(`FAIL ${result.name}: ${reason}`);
    for (const note of result.notes) console.log(`     ${note}`);
    if (settings.verbose && result.failure.stack) console.log(result.failure.stack);
  } else if (settings.verbose) {
    console.log(`ok   ${result.name} (${result.ms} ms)`);
  }
}

// A promise that a failed test left behind may still reject; in a run where all passed it is a failure of its own.
const strays = [];
process.on('unhandledRejection', (error) => strays.push(error));

// Runs the tests whose names contain `only`: `jobs` at a time, then the calm ones two at a time, then the serial ones. Those
// with the longest limits begin first, so that none of them is waited for alone. Returns the exit code.
export async function run_all({ only = '', jobs = 4 } = {}) {
  const chosen = tests.filter((t) => t.name.includes(only)).sort((a, b) => b.limit_ms - a.limit_ms);
  const results = [];
  const run_beside = async (queue, width) => {
    const worker = async () => {
      for (let t = queue.shift(); t; t = queue.shift()) {
        const result = await run_one(t);
        results.push(result);
        report(result);
      }
    };
    await Promise.all(Array.from({ length: width }, worker));
  };
  await run_beside(chosen.filter((t) => !t.serial && !t.calm), jobs);
  await run_beside(chosen.filter((t) => t.calm), Math.min(jobs, 2));
  await run_beside(chosen.filter((t) => t.serial), 1);
  if (strays.length && !results.some((r) => r.failure)) {
    results.push({ name: 'the run itself: no promise is left rejected', failure: strays[0], skipped: null, notes: [] });
    report(results.at(-1));
  }
  const failed = results.filter((r) => r.failure).length;
  const skipped = results.filter((r) => r.skipped !== null && !r.failure).length;
  const passed = results.length - failed - skipped;
  if (chosen.length === 0) console.log(`FAIL no test has "${only}" in its name`);
  console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ''}`);
  return failed === 0 && chosen.length > 0 ? 0 : 1;
}

export const list_names = () => tests.map((t) => t.name);
