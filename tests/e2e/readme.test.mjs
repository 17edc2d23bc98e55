// The README is run: every block of commands as it stands, every example of a client, the configuration, the samples.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { assert, chat, free_port, get, group, kill_at_end, parse_metrics, post, settings, start_backend, start_nexus, test, until, within } from './harness.mjs';
import { find_program, need_program, repository, repository_file, run_to_end, with_replaced } from './prometheus.mjs';

const pages = ['README.md', 'CONTRIBUTING.md'];
const known_languages = ['sh', 'ini', 'text', 'json', 'yaml', 'promql', 'python', 'js'];
const blocks_of = (page) => [...repository_file(page).matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)].map(([, language, body]) => ({ language, body }));
const one_block = (language) => {
  const found = blocks_of('README.md').filter((block) => block.language === language);
  assert.equal(found.length, 1, `the README has one block of ${language}`);
  return found[0].body;
};

const example_address = '127.0.0.1:8000';
const demo_conf = { backends: [{ name: 'demo', type: 'echo', models: 'echo', token_delay: '5ms' }] };

// ---- standing in for what a test may not do to the machine -----------------------------------------------------------

// `make` is looked through instead of run; `systemctl` does to the process what the unit file says; `nexus -c FILE`, which
// would serve until stopped, is stopped once it answers. Each writes what it was asked to $CALLS.
const stand_ins = {
  make: `
    plan=$("$REAL_MAKE" -n -C "$REPOSITORY" "$@") || exit 1
    case $1 in
      run) printf '%s' "$plan" | grep -q 'nexus --demo$' && exec curl -sSf -o "$CALLS.health" "http://127.0.0.1:$DEMO_PORT/health" ;;
      test) printf '%s' "$plan" | grep -q 'tests/run.sh' ;;
      *) exit 1 ;;
    esac`,
  systemctl: `
    [ "$2" = nexus ] || exit 1
    case $1 in
      reload) MAINPID=$SERVICE_PID; eval "$(sed -n 's,^ExecReload=/usr/bin/nexus,"$NEXUS",p' "$REPOSITORY/contrib/systemd/nexus.service")" ;;
      stop) ! grep -q ^KillSignal "$REPOSITORY/contrib/systemd/nexus.service" && kill -TERM "$SERVICE_PID" ;;
      *) exit 1 ;;
    esac`,
  nexus: `
    [ "$1" = -c ] || exec "$NEXUS" "$@"
    "$NEXUS" "$@" & pid=$!
    for i in $(seq 100); do curl -sf -o /dev/null "http://127.0.0.1:$CONF_PORT/health" && break; sleep 0.1; done
    kill -TERM $pid
    wait $pid`,
};

function write_stand_ins(t) {
  const dir = path.join(t.dir(), 'bin');
  fs.mkdirSync(dir);
  for (const [name, body] of Object.entries(stand_ins)) {
    fs.writeFileSync(path.join(dir, name), `#!/bin/bash\nset -u\necho "${name} $*" >>"$CALLS"\n${body}\n`, { mode: 0o755 });
  }
  return dir;
}

const may_run = ['make', 'curl', 'nexus', 'systemctl', 'systemd-analyze', 'export', 'jq'];
const may_lack = ['systemd-analyze', 'jq'];

// The commands of a block, each by its first word; comments and continued lines put aside.
function commands_of(body) {
  const lines = body.replace(/\\\n/g, ' ').split('\n').map((line) => line.trim()).filter((line) => line && !line.startsWith('#'));
  return lines.flatMap((line) => line.replace(/\s+#.*$/, '').split(/\s*&&\s*/)).map((command) => command.split(' ')[0]);
}

// ---- what stands behind the commands ---------------------------------------------------------------------------------

// The same as `make run`, on a port that is free here.
async function start_demo(t) {
  const port = await free_port();
  const child = spawn(settings.nexus, ['--demo', '--port', String(port)], { cwd: t.dir(), stdio: 'ignore' });
  kill_at_end(child);
  const exited = new Promise((done) => child.on('close', done));
  t.after(async () => {
    child.kill('SIGTERM');
    assert.equal(await within(8_000, exited, 'the demo to end'), 0);
  });
  await until(async () => (await get(port, '/health')).json.status === 'healthy', 'the demo healthy');
  return port;
}

// The README's configuration, with backends that exist here.
async function real_conf(t, port) {
  const backends = {};
  for (const [name, kind, models] of [['ollama', 'ollama', ['llama3:70b']], ['gpu', 'vllm', ['qwen2:72b']], ['cellar', 'llamacpp', ['gemma']]]) {
    backends[name] = await start_backend(t, { kind, models });
  }
  return with_replaced(one_block('ini'), {
    [`listen = ${example_address}`]: `listen = 127.0.0.1:${port}`, 'http://127.0.0.1:11434': backends.ollama.url,
    'http://10.0.0.7:8000': backends.gpu.url, 'http://10.0.0.8:8080': backends.cellar.url,
  });
}

async function run_block(t, body, env) {
  const child = spawn('bash', ['-euo', 'pipefail', '-c', body], { cwd: env.WORK, env, stdio: ['ignore', 'pipe', 'pipe'] });
  kill_at_end(child);
  let [stdout, stderr] = ['', ''];
  child.stdout.on('data', (d) => { stdout += d; });
  child.stderr.on('data', (d) => { stderr += d; });
  const code = await within(20_000, new Promise((done) => child.on('close', done)), () => `the block ${body}; it said ${stdout.slice(-300)} ${stderr.slice(-300)}`);
  assert.equal(code, 0, `${body}\nended with ${code}: ${stdout.slice(-500)} ${stderr.slice(-500)}`);
  return stdout;
}

// The tests may be run by a make, whose options are not those of the makes here.
function outside_make() {
  const { MAKEFLAGS, MAKELEVEL, MFLAGS, ...env } = process.env;
  return env;
}

// Three requests of two users, one of them tried twice, in an access log.
async function log_a_night(t) {
  const file = path.join(t.dir(), 'access.log');
  const broken = await start_backend(t, { answer: (request, reply) => reply.json({}, 503) });
  const good = await start_backend(t);
  const nexus = await start_nexus(t, {
    server: { api_keys_file: t.file('clients', 'alice sk-alice-0123456789\nbob sk-bob-0123456789\n') }, log: { access: file, format: 'json' },
    routing: { strategy: 'priority' }, backends: [{ name: 'broken', mock: broken, models: 'm1', priority: 1 }, { name: 'good', mock: good, models: 'm1', priority: 2 }],
  });
  for (const [name, id] of [['alice', 'r-41'], ['alice', 'r-42'], ['bob', 'r-43']]) {
    const headers = { Authorization: `Bearer sk-${name}-0123456789`, 'X-Request-Id': id };
    assert.equal((await post(nexus.port, '/v1/chat/completions', chat('m1'), { headers })).status, 200);
  }
  await until(() => fs.readFileSync(file, 'utf8').split('\n').length === 4, 'three lines of the access log');
  return file;
}

function check_jq(output) {
  const [alice, bob, slow] = output.trim().split('\n');
  assert.match(alice, /^alice\tm1\t2\t[1-9]\d*$/);
  assert.match(bob, /^bob\tm1\t1\t[1-9]\d*$/);
  assert.equal(2 * Number(bob.split('\t')[3]), Number(alice.split('\t')[3]), 'each request has the same tokens');
  const found = JSON.parse(slow);
  assert.deepEqual(Object.keys(found), ['queue_ms', 'connect_ms', 'first_byte_ms', 'duration_ms', 'tries']);
  assert.match(found.tries, /^broken:status_5xx:\d+ good:ok:\d+$/);
}

const prompt_of = (text) => JSON.parse(/-d '(\{.*\})'/.exec(text)[1]).messages[0].content;

async function run_example(t, program, name, text) {
  const nexus = await start_nexus(t, demo_conf);
  const file = t.file(name, with_replaced(text, { [example_address]: `127.0.0.1:${nexus.port}` }));
  const child = spawn(program, [file], { cwd: t.dir(), stdio: ['ignore', 'pipe', 'pipe'] });
  kill_at_end(child);
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (d) => { output += d; });
  assert.equal(await within(20_000, new Promise((done) => child.on('close', done)), `${name} to end`), 0, output);
  return output.trim();
}

group('README', () => {
  test('is under 300 lines, its blocks are of kinds that are checked, its links lead to files and its make targets exist', { limit_ms: 60_000 }, async () => {
    assert.ok(repository_file('README.md').split('\n').length <= 300);
    const headers = new Set(fs.readdirSync(path.join(repository, 'nexus'), { recursive: true }).map((name) => path.basename(name)));
    for (const page of pages) {
      const text = repository_file(page);
      for (const { language } of blocks_of(page)) assert.ok(known_languages.includes(language), `${page}: a block of ${language || 'no language'}`);
      for (const [, target] of text.matchAll(/\]\(([^)#:]+)\)/g)) assert.ok(fs.existsSync(path.join(repository, target)), `${page}: ${target}`);
      for (const [, header] of text.matchAll(/`([a-z_]+\.h)`/g)) assert.ok(headers.has(header), `${page}: ${header}`);
      const targets = new Set([...text.matchAll(/(?:`|^)make ([a-z][a-z-]*)/gm)].map(([, name]) => name));
      const r = await run_to_end('make', ['-n', ...targets], { cwd: repository, env: outside_make() });
      assert.ok(r.status === 0 && !r.output.includes('Nothing to be done'), `${page}: make -n ${[...targets]}: ${r.output.slice(-300)}`);
    }
  });

  test('the versions of the clients that it names are those of the tests', () => {
    const { devDependencies } = JSON.parse(repository_file('tests/package.json'));
    const text = repository_file('README.md').replace(/\s+/g, ' ');
    const named = [...text.matchAll(/([@a-z/-]+) (\d+\.\d+\.\d+)(?= and |, |\. The)/g)];
    assert.equal(named.length, 4);
    for (const [, name, version] of named) assert.equal(devDependencies[name], version, name);
  });

  test('every block of commands runs as it stands and does what it says', { serial: true, limit_ms: 120_000 }, async (t) => {
    need_program(t, 'curl');
    const conf_port = await free_port();
    t.file('nexus.conf', await real_conf(t, conf_port));
    const demo_port = await start_demo(t);
    const service = await start_nexus(t, demo_conf);
    const calls = t.file('calls', '');
    const inherited = outside_make();
    const env = {
      ...inherited, PATH: `${write_stand_ins(t)}:${inherited.PATH}`, WORK: t.dir(), CALLS: calls, REPOSITORY: repository, REAL_MAKE: find_program('make') ?? 'make',
      NEXUS: settings.nexus, DEMO_PORT: String(demo_port), CONF_PORT: String(conf_port), SERVICE_PID: String(service.pid), GPU_BOX_KEY: 'sk-of-the-box',
    };
    const access_log = await log_a_night(t);
    let unable = '';
    for (const { body } of blocks_of('README.md').filter((block) => block.language === 'sh')) {
      const commands = commands_of(body);
      for (const command of commands) assert.ok(may_run.includes(command), `a command that this test does not know how to run: ${command}`);
      const lacking = may_lack.find((command) => commands.includes(command) && !find_program(command));
      if (lacking) {
        unable = `${lacking} is not installed`;
        continue;
      }
      const here = body.replaceAll(example_address, `127.0.0.1:${demo_port}`).replaceAll('/etc/nexus/nexus.conf', service.conf_path).replaceAll('/etc/nexus/environment', t.file('environment', '# none\n'))
                       .replaceAll(' contrib/', ` ${repository}/contrib/`).replaceAll('/var/log/nexus/access.log', access_log)
                       .replaceAll(/"2026-11-2\dT(\d\d)"/g, (_, hour) => JSON.stringify(hour === '18' ? '2000' : '3000'));
      const output = await run_block(t, here, env);
      assert.doesNotMatch(output, /"error":/, body);
      if (/chat\/completions/.test(body) && !/stream/.test(body)) assert.ok(output.includes(prompt_of(body)), `the echo of the prompt, in ${output}`);
      if (/"stream":true/.test(body)) assert.match(output, /data: \[DONE\]/);
      if (/nexus check/.test(body)) assert.match(output, /3 of 3 backends are good/);
      if (/jq/.test(body)) check_jq(output);
      if (/nexus top/.test(body)) assert.match(output, /^echo /m, 'the model’s line');
      if (/systemd-analyze/.test(body)) {
        const [, figure] = /Overall exposure level[^:]*: (\S+)/.exec(output);
        // Other versions of systemd weigh differently.
        const version = /systemd (\d+)/.exec(spawnSync('systemd-analyze', ['--version'], { encoding: 'utf8' }).stdout)[1];
        const told = /gives \[nexus\.service\]\S+ (\S+) \(OK, by\s+systemd (\d+)\)/.exec(repository_file('README.md'));
        assert.ok(told && Number(figure) < 2, `the README tells the figure; it is ${figure}`);
        if (told[2] === version) assert.equal(told[1], figure);
      }
    }
    const asked = fs.readFileSync(calls, 'utf8');
    for (const call of ['make run', 'make test', 'nexus -t', 'nexus check', 'nexus -c', 'nexus top', 'systemctl reload', 'systemctl stop']) {
      assert.ok(asked.includes(`${call}`), `${call} stands in the README; asked was ${asked}`);
    }
    assert.match(service.log(), /reload/, 'systemctl reload nexus reached it');
    assert.equal((await service.exits()).code, 0, 'systemctl stop nexus');
    if (unable) t.skip(`all but one block ran: ${unable}`);
  });

  test('the configuration serves: each backend’s models, the alias, the fallback', async (t) => {
    const port = await free_port();
    const nexus = await start_nexus(t, (await real_conf(t, '@PORT@')).replaceAll(`listen = 127.0.0.1:${port}`, 'listen = 127.0.0.1:@PORT@'), { env: { GPU_BOX_KEY: 'sk-of-the-box' } });
    assert.deepEqual((await get(nexus.port, '/v1/models')).json.data.map((m) => m.id).sort(), ['gemma', 'gpt-4', 'llama3:70b', 'qwen2:72b']);
    for (const [model, backend] of [['gemma', 'cellar'], ['gpt-4', 'ollama'], ['qwen2:72b', 'gpu-box']]) {
      const answer = await post(nexus.port, '/v1/chat/completions', chat(model));
      assert.equal(answer.status, 200);
      assert.equal(answer.headers.get('x-nexus-backend'), backend);
    }
  });

  test('the example for Node.js prints what the demo answers', { limit_ms: 60_000 }, async (t) => {
    const modules = path.join(repository, 'tests/node_modules');
    if (!fs.existsSync(path.join(modules, 'openai'))) t.skip('npm package openai is not installed (cd tests && npm ci)');
    fs.symlinkSync(modules, path.join(t.dir(), 'node_modules'));
    assert.equal(await run_example(t, process.execPath, 'client.mjs', one_block('js')), 'Hello, Nexus');
  });

  test('the example for Python prints what the demo answers', { limit_ms: 60_000 }, async (t) => {
    const python = need_program(t, 'python3');
    const compiles = await run_to_end(python, ['-c', 'compile(open(0).read(), "client.py", "exec")'], { input: one_block('python') });
    assert.equal(compiles.status, 0, compiles.output);
    if ((await run_to_end(python, ['-c', 'import openai'])).status !== 0) t.skip('the example compiles; to run it, the Python package openai is needed');
    assert.equal(await run_example(t, python, 'client.py', one_block('python')), 'One word at a time');
  });

  test('the samples of /metrics and /v1/stats are of the series and fields that Nexus gives, the scrape configuration is good', async (t) => {
    const nexus = await start_nexus(t, demo_conf);
    for (const stream of [false, false, false, true]) await post(nexus.port, '/v1/chat/completions', chat('echo', { stream }));
    const page = (await get(nexus.port, '/metrics')).text;
    parse_metrics(page);
    const there = new Set(page.split('\n').map((line) => (line.startsWith('#') ? line : line.replace(/ \S+$/, ''))));
    const sample = blocks_of('README.md').find((b) => b.language === 'text' && b.body.includes('# TYPE')).body;
    for (const line of sample.trim().split('\n')) assert.ok(there.has(line.startsWith('#') ? line : line.replace(/ \S+$/, '')), line);
    const shape = (value) => (Array.isArray(value) ? value.map(shape) : value && typeof value === 'object' ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, shape(v)])) : typeof value);
    assert.deepEqual(shape(JSON.parse(one_block('json'))), shape((await get(nexus.port, '/v1/stats')).json));
    const promtool = need_program(t, 'promtool', 'prometheus');
    const r = await run_to_end(promtool, ['check', 'config', t.file('prometheus.yml', one_block('yaml'))]);
    assert.equal(r.status, 0, r.output);
  });
});
