// Missing packages: what `make` says of them and does. tools/packages.sh runs beside stand-ins for apt-get and its like, in a
// PATH that has nothing else, so nothing is installed.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { assert, group, test } from './harness.mjs';
import { find_program, repository } from './prometheus.mjs';

const stand_ins = {
  id: 'echo "$WHO"',
  'apt-cache': 'case " $KNOWN " in *" $2 "*) exit 0 ;; esac; exit 100',
  'dpkg-query': 'for last; do :; done; case " $INSTALLED " in *" $last "*) printf installed ;; *) exit 1 ;; esac',
  'apt-get': 'echo "$*" >>"$CALLS"; case "$*" in *--assume-no*) echo "0 upgraded, 2 newly installed"; echo "Need to get 12.3 MB of archives." ;; *" $BROKEN"*) echo "E: no $BROKEN"; exit 100 ;; esac',
};

// Runs it with the packages given, and returns its exit code, its output, and the calls of apt-get.
function packages(t, args, { who = 0, known = args, installed = [], broken = 'none', without = [] } = {}) {
  const dir = fs.mkdtempSync(path.join(t.dir(), 'bin-'));
  for (const tool of ['sh', 'sed', 'grep', 'env', 'mktemp', 'rm', 'cat', 'tail']) fs.symlinkSync(find_program(tool), path.join(dir, tool));
  for (const [name, body] of Object.entries(stand_ins)) {
    if (!without.includes(name)) fs.writeFileSync(path.join(dir, name), `#!/bin/sh\n${body}\n`, { mode: 0o755 });
  }
  const calls = t.file('calls', '');
  const env = { PATH: dir, WHO: String(who), KNOWN: known.join(' '), INSTALLED: installed.join(' '), BROKEN: broken, CALLS: calls };
  const run = spawnSync(path.join(repository, 'tools/packages.sh'), args, { env, encoding: 'utf8', timeout: 10_000 });
  return { code: run.status, stdout: run.stdout, stderr: run.stderr, calls: fs.readFileSync(calls, 'utf8').trim().split('\n') };
}

group('missing packages', () => {
  test('a user gets one command for all of them, with the first name of each that this release has', (t) => {
    const run = packages(t, ['doctest-dev', 'libllhttp-dev|node-llhttp', 'npm'], { who: 1000, known: ['doctest-dev', 'node-llhttp', 'npm'] });
    assert.equal(run.code, 1);
    assert.match(run.stderr, /^ {4}sudo apt-get install --no-install-recommends doctest-dev node-llhttp npm$/m);
    assert.doesNotMatch(run.stderr, /update|#|\|/);
    assert.deepEqual(run.calls, [''], 'nothing was installed');
  });

  test('where the package lists are empty, the command to fetch them comes first', (t) => {
    const run = packages(t, ['g++', 'libllhttp-dev|node-llhttp'], { who: 1000, known: [] });
    assert.equal(run.code, 1);
    const commands = run.stderr.split('\n').filter((line) => line.startsWith('    '));
    assert.deepEqual(commands, ['    sudo apt-get update', '    sudo apt-get install --no-install-recommends g++ libllhttp-dev',
      '    # where there is no libllhttp-dev: node-llhttp']);
  });

  test('root has them installed, and is told how much comes and that make goes on', (t) => {
    const run = packages(t, ['g++', 'libllhttp-dev|node-llhttp'], { known: ['g++', 'node-llhttp'] });
    assert.equal(run.code, 0, run.stderr);
    assert.match(run.stdout, /^installing: g\+\+ node-llhttp$/m);
    assert.match(run.stdout, /2 newly installed\n.*12\.3 MB[^]*then make goes on/);
    assert.deepEqual(run.calls.map((call) => call.replace('-q --no-install-recommends ', '')),
      ['update', 'install --assume-no g++ node-llhttp', 'install -y g++ node-llhttp']);
  });

  test('a package that is installed already is never installed again: that would go on for ever', (t) => {
    for (const who of [0, 1000]) {
      const run = packages(t, ['npm', 'g++-14'], { who, installed: ['g++-14'] });
      assert.equal(run.code, 1);
      assert.match(run.stderr, /^g\+\+-14 is installed, but .*PATH.*CXX=/m);
      assert.ok(!run.calls.some((call) => call.includes('install -y')), run.calls.join());
    }
  });

  test('one that cannot be installed is an error with the words of apt; an optional one is named, and the others come', (t) => {
    const failed = packages(t, ['g++', 'nowhere'], { broken: 'nowhere' });
    assert.equal(failed.code, 1);
    assert.match(failed.stderr, /E: no nowhere/);
    const optional = packages(t, ['--optional', 'curl', 'nowhere'], { broken: 'nowhere' });
    assert.equal(optional.code, 0);
    assert.match(optional.stderr, /^nowhere can't be installed: the tests that need it are skipped$/m);
    assert.ok(optional.calls.at(-2).endsWith('install -y curl'), optional.calls.join());
  });

  test('on another system than Debian the names are all that is said', (t) => {
    const run = packages(t, ['g++', 'libllhttp-dev|node-llhttp'], { without: ['apt-get'] });
    assert.equal(run.code, 1);
    assert.match(run.stderr, /^ {4}g\+\+ libllhttp-dev or node-llhttp$/m);
    assert.deepEqual(packages(t, []).stdout, 'no package is missing\n');
  });

  test('make names the packages of the build and of the tests at once, by the compiler that was asked for', (t) => {
    const make = find_program('make');
    if (!make) t.skip('no make here');
    const plan = (...more) => spawnSync(make, ['-n', '-C', repository, 'deps', ...more], { encoding: 'utf8', env: { ...process.env, MAKEFLAGS: '' } }).stdout;
    assert.match(plan('CXX=g++-99', 'NODE=node-of-nobody'), /packages\.sh .*'g\+\+-99'.*'nodejs'/);
    assert.match(plan('CXX=/nowhere/clang++-99'), /packages\.sh .*'clang-99'/);
    assert.match(plan('CROSS=aarch64-linux-gnu', 'CXX=g++-of-nobody'), /packages\.sh .*'g\+\+-aarch64-linux-gnu'/);
  });
});
