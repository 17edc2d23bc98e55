// The command line: what a person types, what comes back, and with which exit code.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { assert, chat, conf_text, free_port, get, group, kill_at_end, post, run_nexus, settings, sse_events, start_backend, start_nexus, test, until, within } from './harness.mjs';
import { run_to_end } from './prometheus.mjs';

const repository = path.resolve(path.dirname(new URL(import.meta.url).pathname), '../..');

// Each: what is wrong, the text, and what the complaint must hold beside `file:line`. The line is that of the marker `#!`.
const bad_configs = [
  ['an unknown section', '[sever] #!\n', /sever/],
  ['an unknown key', '[server]\nlisten = 127.0.0.1:1\nthread = 2 #!\n', /thread/],
  ['a key twice', '[server]\nthreads = 1\nthreads = 2 #!\n', /threads/],
  ['a line that is no key', '[server]\nwhatever #!\n', /=/],
  ['a key before any section', 'threads = 1 #!\n', /section/i],
  ['a duration without a unit that exists', '[upstream]\nconnect_timeout = 2 parsecs #!\n', /duration|300ms|30s|unit/i],
  ['a size that is none', '[server]\nmax_body = lots #!\n', /size|64k|10M/i],
  ['a negative number', '[server]\nthreads = -1 #!\n', /threads|number|-1/i],
  ['a number with a tail', '[health]\nfailures = 3x #!\n', /number|failures/i],
  ['a number out of range', '[health]\nfailures = 0 #!\n', /failures|at least|range|1/i],
  ['an overflowing number', '[server]\nmax_connections = 99999999999999999999 #!\n', /number|range|between|at most/i],
  ['an address without a port', '[server]\nlisten = 127.0.0.1 #!\n', /port|host/i],
  ['a port out of range', '[server]\nlisten = 127.0.0.1:65536 #!\n', /port/i],
  ['a yes or no that is neither', '[health]\nenabled = perhaps #!\n', /yes|no/i],
  ['a word that is not in the list', '[log]\nlevel = shout #!\n', /info/],
  ['a backend of an unknown type', '[backend a]\nurl = http://127.0.0.1:1\ntype = abacus #!\n', /ollama/],
  ['a backend without url', '[backend a] #!\ntype = vllm\n', /url/],
  ['a backend twice', '[backend a]\nurl = http://127.0.0.1:1\ntype = vllm\n[backend a] #!\nurl = http://127.0.0.1:2\ntype = vllm\n', /\ba\b/],
  ['a key of TLS with a url in clear', '[backend a]\nurl = http://127.0.0.1:1\ntls_verify = no #!\n', /https/],
  ['a url that is none', '[backend a]\nurl = 127.0.0.1:1 #!\ntype = vllm\n', /http:\/\//],
  ['labels of an unknown mode', '[metrics]\nlabels = cooked #!\n', /sanitize/],
  ['a url that is Nexus itself', '[server]\nlisten = 127.0.0.1:8123\n[backend a]\nurl = http://127.0.0.1:8123/v1 #!\n', /url: 127\.0\.0\.1:8123 .*listen = 127\.0\.0\.1:8123 \(line 2\)/],
  ['a url that a wildcard listens at', '[server]\nlisten = *:8123\n[backend a]\nurl = http://localhost:8123 #!\n', /listen = \*:8123 \(line 2\)/],
  ['a url at the default of listen', '[backend a]\nurl = http://127.0.0.1:8000 #!\n', /listen = 127\.0\.0\.1:8000 \(the default\)/],
  ['two addresses that cannot both be listened at', '[server]\nlisten = 127.0.0.1:8123\nlisten = *:8123 #!\n', /0\.0\.0\.0:8123 and 127\.0\.0\.1:8123/],
  ['an access log without a directory', '[log]\naccess = /nonexistent/access.log #!\n', /access: cannot write this file: No such file or directory: create its directory/],
  ['an access log that is a directory', '[log]\naccess = /tmp #!\n', /access: cannot write this file: Is a directory/],
  ['a key file that does not exist', '[server]\napi_keys_file = /nonexistent/keys #!\n', /api_keys_file.*read/],
];

group('command line', () => {
  test('--version prints one line and exits 0', async () => {
    const r = await run_nexus(['--version']);
    assert.equal(r.code, 0);
    assert.match(r.stdout, /^nexus \d+\.\d+\.\d+ \((OpenSSL 3\.\d+\.\d+ .*|without TLS)\)\n$/);
    assert.equal(r.stderr, '');
  });

  test('--help names every option and exits 0', async () => {
    const r = await run_nexus(['--help']);
    assert.equal(r.code, 0);
    for (const option of ['-c', '-t', '--demo', '--version', '--help']) assert.ok(r.stdout.includes(option), `${option} is missing`);
  });

  test('an unknown option is refused, named, and points at --help', async () => {
    const r = await run_nexus(['--frobnicate']);
    assert.ok(r.code > 0, `exit code ${r.code}`);
    assert.match(r.stderr, /--frobnicate/);
    assert.match(r.stderr, /--help/);
  });

  test('a second file is refused, not checked in place of the first; each command has help', async (t) => {
    const [bad, good] = [t.file('bad.conf', 'nonsense\n'), t.file('good.conf', '[backend b]\ntype = echo\n')];
    for (const command of ['-t', 'check']) {
      const r = await run_nexus([command, bad, good]);
      assert.equal(r.code, 2);
      assert.ok(r.stderr.startsWith(`nexus: unknown argument: ${good}\n`), r.stderr);
    }
    for (const command of ['top', 'reload', 'check']) assert.match((await run_nexus([command, '--help'])).stdout, /^usage: nexus/);
  });

  test('-c without a file is refused', async () => {
    const r = await run_nexus(['-c']);
    assert.ok(r.code > 0);
    assert.match(r.stderr, /-c/);
  });

  test('a configuration file that does not exist is named in one line', async () => {
    for (const more of [[], ['-t']]) {
      const r = await run_nexus([...more, '-c', '/nonexistent/nexus.conf']);
      assert.ok(r.code > 0);
      assert.match(r.stderr, /^\/nonexistent\/nexus\.conf: cannot read/);
      assert.equal(r.stderr.trim().split('\n').length, 1, r.stderr);
    }
  });

  test('-t and check take the file as a bare argument too', async (t) => {
    const file = t.file('nexus.conf', '[backend e]\ntype = echo\n');
    assert.deepEqual(await run_nexus(['-t', file]), await run_nexus(['-t', '-c', file]));
    const checked = await run_nexus(['check', file]);
    assert.equal(checked.code, 0, checked.stderr);
    assert.match((await run_nexus(['-t', '/nonexistent'])).stderr, /^\/nonexistent: cannot read/);
    assert.match((await run_nexus([file])).stderr, /unknown argument/);
  });

  test('-t without a variable of the service names the remedy, and with its environment file it succeeds', async (t) => {
    const file = t.file('nexus.conf', '[backend b]\nurl = http://127.0.0.1:1\ntype = vllm\napi_key_env = E2E_KEY_OF_NOBODY\n');
    const bare = await run_nexus(['-t', file]);
    assert.equal(bare.code, 1);
    assert.match(bare.stderr, /nexus\.conf:4: api_key_env: the variable E2E_KEY_OF_NOBODY is not set/);
    assert.match(bare.stderr, /--env-file \/etc\/nexus\/environment/);
    const variables = t.file('environment', '# keys\nE2E_KEY_OF_NOBODY="sk-of-nobody"\n');
    assert.equal((await run_nexus(['-t', '--env-file', variables, file])).code, 0);
    const without = await run_nexus(['-t', '--env-file', t.file('empty', ''), file]);
    assert.equal(without.code, 1);
    assert.doesNotMatch(without.stderr, /etc/);
    assert.match((await run_nexus(['-t', '--env-file', '/nonexistent/env', file])).stderr, /^\/nonexistent\/env: cannot read/);
    assert.match((await run_nexus(['-t', '--env-file'])).stderr, /--env-file needs a file/);
  });

  test('-t creates no access log, and nexus check does not look at it', async (t) => {
    const log = path.join(t.dir(), 'access.log');
    assert.equal((await run_nexus(['-t', t.file('good.conf', `[log]\naccess = ${log}\n[backend e]\ntype = echo\n`)])).code, 0);
    assert.ok(!fs.existsSync(log));
    const none = t.file('none.conf', '[log]\naccess = /nonexistent/access.log\n[backend e]\ntype = echo\n');
    assert.equal((await run_nexus(['check', none])).code, 0);
    const started = await run_nexus(['-c', none]);
    assert.equal(started.code, 78, 'a restart does not help');
    assert.match(started.stderr, /none\.conf:2: access: cannot write this file/);
  });

  test('backends that share one label in the metrics are named by -t', async (t) => {
    const conf = (more) => t.file('nexus.conf', `[backend gpu-1]\ntype = echo\n[backend gpu_1]\ntype = echo\nmodels = other\n${more}`);
    const shared = await run_nexus(['-t', conf('')]);
    assert.equal(shared.code, 0);
    assert.match(shared.stdout, /nexus\.conf: warning: these backends share one label .*: gpu-1, gpu_1\n.*: ok\n$/);
    assert.doesNotMatch((await run_nexus(['-t', conf('[metrics]\nlabels = raw\n')])).stdout, /warning/);
  });

  test('-t accepts a configuration with every section and exits 0', async (t) => {
    const keys = t.file('keys', 'alice sk-alice\n');
    const key = t.file('backend.key', 'sk-backend\n');
    const file = t.file('nexus.conf', `# a comment
[server]
listen = 127.0.0.1:8000
listen = [::1]:8000
threads = 2
max_connections = 5000
max_body = 10M
body_memory = 128M
max_header = 16k
header_timeout = 10s
idle_timeout = 1m
drain_timeout = 600s
metrics_listen = 127.0.0.1:9100
api_keys_file = ${keys}

[upstream]
connect_timeout = 300ms
first_byte_timeout = 5m
stall_timeout = 120s
request_timeout = 0
idle_connections = 8
idle_timeout = 30s

[health]
enabled = yes
interval = 30s
timeout = 5s
failures = 3
recoveries = 2

[aliases]
gpt-4 = llama3:70b   # a comment behind a value

[metrics]
enabled = yes
labels = sanitize

[log]
level = info
format = json
access = off

[backend local]
url = http://127.0.0.1:11434
type = ollama
priority = 10

[backend big.example]
url = http://gpu.example:8000/prefix
type = vllm
models = llama3:70b, qwen2:72b
api_key_file = ${key}

[backend echo]
type = echo
`);
    const r = await run_nexus(['-t', '-c', file]);
    assert.equal(r.code, 0, r.stderr + r.stdout);
  });

  test('-t accepts the example configuration', async (t) => {
    const example = path.join(repository, 'nexus.conf.example');
    if (!fs.existsSync(example)) t.skip('there is no nexus.conf.example');
    const r = await run_nexus(['-t', '-c', example]);
    assert.equal(r.code, 0, r.stderr);
  });

  for (const [what, text, expected] of bad_configs) {
    test(`-t refuses ${what} with file:line and what was expected`, async (t) => {
      const line = text.split('\n').findIndex((l) => l.includes('#!')) + 1;
      const file = t.file('nexus.conf', text.replace(' #!', ''));
      const r = await run_nexus(['-t', '-c', file]);
      assert.equal(r.code, 1, `exit code ${r.code}: ${r.stdout}${r.stderr}`);
      const complaint = r.stderr.split('\n').find((l) => l.includes(`nexus.conf:${line}:`) || l.includes(`nexus.conf:${line} `));
      assert.ok(complaint, `no complaint about line ${line} in: ${r.stderr}`);
      assert.match(complaint.slice(complaint.indexOf('nexus.conf:')), expected);
    });
  }

  test('-t tells all errors of a file, not the first alone', async (t) => {
    const file = t.file('nexus.conf', '[server]\nthread = 1\n\n[health]\nfailures = x\n[nowhere]\n');
    const r = await run_nexus(['-t', '-c', file]);
    assert.equal(r.code, 1);
    for (const line of [2, 5, 6]) assert.match(r.stderr, new RegExp(`nexus\\.conf:${line}\\b`));
  });

  test('a bad configuration does not start, and says the same as -t', async (t) => {
    const file = t.file('nexus.conf', '[server]\nthread = 1\n');
    const checked = await run_nexus(['-t', '-c', file]);
    const started = await run_nexus(['-c', file]);
    assert.ok(started.code > 0);
    const complaint = checked.stderr.split('\n').find((l) => l.includes('nexus.conf:2'));
    assert.ok(started.stderr.includes(complaint.slice(complaint.indexOf('nexus.conf:2'))), started.stderr);
  });

  test('an https url is verified by the bundle of the host; without one, the error says how to get it', async (t) => {
    const file = t.file('nexus.conf', '[backend a]\nurl = https://api.openai.com\ntype = openai\n');
    const none = await run_nexus(['-t', '-c', file], { env: { SSL_CERT_FILE: '/nonexistent' } });
    assert.equal(none.code, 1);
    assert.match(none.stderr, /nexus\.conf:1: \[backend a\]: this host has no bundle of trusted certificates .*ca-certificates/);
    if (!fs.existsSync('/etc/ssl/certs/ca-certificates.crt')) return;
    assert.equal((await run_nexus(['-t', '-c', file])).code, 0);
  });

  test('a port held by another program gives one clear line', async (t) => {
    const holder = net.createServer();
    await new Promise((done) => holder.listen(0, '127.0.0.1', done));
    t.after(() => holder.close());
    const { port } = holder.address();
    const r = await run_nexus(['-c', t.file('nexus.conf', `[server]\nlisten = 127.0.0.1:${port}\n[backend b]\nurl = http://127.0.0.1:1\n`)]);
    assert.ok(r.code > 0 && r.signal === null, JSON.stringify(r));
    const errors = r.stderr.split('\n').filter((l) => l.includes(`127.0.0.1:${port}`));
    assert.equal(errors.length, 1, r.stderr);
    assert.match(errors[0], /in use/i);
    assert.doesNotMatch(r.stderr, /terminate|abort|what\(\)|#0/);
  });

  test('a port held by another nexus is refused too', async (t) => {
    const first = await start_nexus(t, { backends: [{ name: 'b', url: 'http://127.0.0.1:1' }] }, { ready: 'up' });
    const r = await run_nexus(['-c', t.file('second.conf', `[server]\nlisten = 127.0.0.1:${first.port}\n[backend b]\nurl = http://127.0.0.1:1\n`)]);
    assert.ok(r.code > 0 && r.signal === null, 'the second nexus must not share the port');
    assert.match(r.stderr, /in use/i);
    assert.equal((await get(first.port, '/health')).status > 0, true);
  });

  test('listens on several addresses, IPv6 too', async (t) => {
    const backend = await start_backend(t);
    const second = await free_port();
    const third = await free_port('::1').catch(() => 0);
    const extra = [`127.0.0.1:${second}`, `[::1]:${third}`];
    const nexus = await start_nexus(t, `[server]\nlisten = 127.0.0.1:@PORT@\n${extra.map((a) => `listen = ${a}\n`).join('')}[backend b1]\nurl = ${backend.url}\ntype = generic\n`);
    assert.equal((await get(nexus.port, '/health')).status, 200);
    assert.equal((await get(second, '/health')).status, 200);
    assert.equal((await get(third, '/health', { host: '::1' })).status, 200);
  });

  test('the binary is static, stripped and under 12 MB, or 4 MB without TLS', async (t) => {
    if (settings.sanitised) t.skip('a sanitised build is neither');
    const without_tls = (await run_nexus(['--version'])).stdout.includes('without TLS');
    assert.ok(fs.statSync(settings.nexus).size < (without_tls ? 4 : 12) << 20, `${fs.statSync(settings.nexus).size} bytes`);
    const ldd = spawnSync('ldd', [settings.nexus], { encoding: 'utf8' });
    if (!ldd.error) assert.match(ldd.stdout + ldd.stderr, /not a dynamic executable|statically linked/);
    const elf = fs.readFileSync(settings.nexus);
    assert.ok(!elf.includes('.symtab'), 'it has a symbol table');
  });
});

group('demo', () => {
  test('nexus --demo --tls answers on 127.0.0.1:8000 and 8443 with no file, and the curl lines that it prints work', { serial: true, limit_ms: 30_000 }, async (t) => {
    const taken = await new Promise((done) => {
      const s = net.createServer();
      s.once('error', () => done(true));
      s.listen(8000, '127.0.0.1', () => s.close(() => done(false)));
    });
    if (taken) t.skip('port 8000 is taken on this machine');
    const child = spawn(settings.nexus, ['--demo', '--tls'], { cwd: t.dir(), stdio: ['ignore', 'pipe', 'pipe'] });
    kill_at_end(child);
    let output = '';
    child.stdout.on('data', (d) => { output += d; });
    child.stderr.on('data', (d) => { output += d; });
    const exited = new Promise((done) => child.on('close', (code) => done(code)));
    t.after(() => child.kill('SIGKILL'));
    await until(async () => (await get(8000, '/health')).json.status === 'healthy', () => `the demo healthy; it printed ${output}`);
    // A curl line may be continued with backslashes.
    const curl_lines = () => output.replace(/\\\n\s*/g, ' ').split('\n').map((l) => l.trim().replace(/^\$ /, '')).filter((l) => l.startsWith('curl '));
    const lines = await until(() => curl_lines().length >= 4 && curl_lines(), () => `four curl lines in ${output}`);
    assert.equal(lines.length, 4, output);
    assert.match(output, /SHA-256 ([0-9A-F]{2}:){31}[0-9A-F]{2}\)/);
    if (spawnSync('curl', ['--version']).error) t.skip('curl is not installed');
    for (const line of lines) {
      const r = await run_to_end('sh', ['-c', line], { ms: 15_000 });
      assert.equal(r.status, 0, `${line}: ${r.output}`);
      assert.ok(r.output.length > 20 && !r.output.includes('"error"'), `${line} gave ${r.output}`);
    }
    child.kill('SIGTERM');
    assert.equal(await within(5_000, exited, 'the demo to end'), 0);
  });
});

group('demo on another port', () => {
  test('a port of the demo that is taken is named with the option that moves it, also that of TLS', async (t) => {
    const holder = net.createServer();
    await new Promise((done) => holder.listen(0, '127.0.0.1', done));
    t.after(() => holder.close());
    const { port } = holder.address();
    const plain = await run_nexus(['--demo', '--port', String(port)]);
    assert.equal(plain.code, 1);
    assert.match(plain.stderr, new RegExp(`^nexus: cannot listen on 127\\.0\\.0\\.1:${port}: .*use --port N, or stop it\\)\n$`));
    const secure = await run_nexus(['--demo', '--tls', '--port', String(port - 443)]);
    if (secure.stderr.includes(`${port - 443}: `)) t.skip(`port ${port - 443} is taken on this machine`);
    assert.match(secure.stderr, new RegExp(`^nexus: cannot listen on 127\\.0\\.0\\.1:${port}: .*use --port N, and TLS goes to N \\+ 443, or stop it\\)\n$`));
  });

  test('nexus --demo --tls --port 0 prints both ports that the kernel has chosen', async (t) => {
    const child = spawn(settings.nexus, ['--demo', '--tls', '--port', '0'], { cwd: t.dir(), stdio: ['ignore', 'pipe', 'pipe'] });
    kill_at_end(child);
    let output = '';
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (d) => { output += d; });
    const exited = new Promise((done) => child.on('close', done));
    t.after(() => child.kill('SIGKILL'));
    const [, port] = await until(() => /curl -k https:\/\/127\.0\.0\.1:(\d+)\//.exec(output), () => `a line for TLS in ${output}`);
    assert.equal((await get(port, '/health', { secure: { rejectUnauthorized: false } })).status, 200);
    child.kill('SIGTERM');
    assert.equal(await within(5_000, exited, 'the demo to end'), 0);
  });

  test('nexus --demo --port N serves there and prints that address; a port that is none is refused with status 2', async (t) => {
    const port = await free_port();
    const child = spawn(settings.nexus, ['--demo', '--port', String(port)], { cwd: t.dir(), stdio: ['ignore', 'pipe', 'pipe'] });
    kill_at_end(child);
    let output = '';
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (d) => { output += d; });
    const exited = new Promise((done) => child.on('close', done));
    await until(async () => (await get(port, '/health')).json.status === 'healthy', () => `the demo healthy; it printed ${output}`);
    const lines = await until(() => output.match(/curl .*/g), () => `curl lines in ${output}`);
    for (const line of lines) assert.ok(line.includes(`127.0.0.1:${port}/`), line);
    child.kill('SIGTERM');
    assert.equal(await within(5_000, exited, 'the demo to end'), 0);
    for (const wrong of ['65536', 'x', '-1', '']) {
      const refused = await run_nexus(['--demo', '--port', wrong]);
      assert.equal(refused.code, 2, wrong);
      assert.match(refused.stderr, /--port/);
    }
  });
});

group('echo backend', () => {
  const conf = { backends: [{ name: 'demo', type: 'echo' }] };

  test('a configured echo backend serves plain and streamed answers with usage that matches', async (t) => {
    const nexus = await start_nexus(t, conf);
    const { data } = (await get(nexus.port, '/v1/models')).json;
    assert.ok(data.length >= 1);
    const model = data[0].id;
    assert.equal(data[0].owned_by, 'nexus');
    const plain = (await post(nexus.port, '/v1/chat/completions', chat(model))).json;
    assert.equal(plain.object, 'chat.completion');
    assert.ok(plain.choices[0].message.content.length > 0);
    assert.equal(plain.usage.total_tokens, plain.usage.prompt_tokens + plain.usage.completion_tokens);
    const streamed = await post(nexus.port, '/v1/chat/completions', chat(model, { stream: true, stream_options: { include_usage: true } }));
    const { data: events, rest } = sse_events(streamed.text);
    assert.equal(rest, '');
    assert.equal(events.at(-1), '[DONE]');
    const chunks = events.slice(0, -1).map((e) => JSON.parse(e));
    const text = chunks.flatMap((c) => c.choices).map((c) => c.delta.content ?? '').join('');
    assert.equal(text, plain.choices[0].message.content, 'streamed and plain say the same');
    assert.deepEqual(chunks.at(-1).usage, plain.usage);
    const pieces = chunks.flatMap((c) => c.choices).filter((c) => c.delta.content).length;
    assert.equal(pieces, plain.usage.completion_tokens, 'one piece a completion token');
  });

  test('the configuration text of the tests is what a person would write', () => {
    assert.equal(conf_text({ server: { threads: 2 }, backends: [{ name: 'x', type: 'echo' }] }), '[server]\nthreads = 2\n\n[backend x]\ntype = echo\n');
  });
});
