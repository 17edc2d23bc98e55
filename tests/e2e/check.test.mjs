// nexus check: one table of what each backend is, and an exit code that a script can go by.
import net from 'node:net';
import { networkInterfaces } from 'node:os';
import { assert, conf_text, free_port, group, run_nexus, start_backend, start_nexus, test } from './harness.mjs';

// The lines of the table by the backend's name.
function rows_of(stdout) {
  const rows = new Map();
  for (const line of stdout.trimEnd().split('\n').slice(1, -1)) rows.set(line.split(/\s+/)[0], line);
  return rows;
}

const check = (t, conf, options) => run_nexus(['check', '-c', t.file('nexus.conf', typeof conf === 'string' ? conf : conf_text(conf))], options);

group('nexus check', () => {
  test('backends that are as configured give exit code 0, with their models and latency', async (t) => {
    const ollama = await start_backend(t, { kind: 'ollama', models: ['llama3:70b', 'mistral'] });
    const vllm = await start_backend(t, { kind: 'vllm', models: ['qwen2'] });
    const r = await check(t, { backends: [{ name: 'a', mock: ollama }, { name: 'b', mock: vllm }, { name: 'c', type: 'echo' }] });
    assert.equal(r.code, 0, r.stdout + r.stderr);
    assert.equal(r.stderr, '');
    const rows = rows_of(r.stdout);
    assert.match(rows.get('a'), /^a +ollama +yes +yes +\d+\.\d ms +2: llama3:70b, mistral/);
    assert.match(rows.get('b'), /^b +vllm +yes +yes +\d+\.\d ms +1: qwen2/);
    assert.match(rows.get('c'), /^c +echo +yes +yes .*built in/);
    assert.match(r.stdout, /\n3 of 3 backends are good\n$/);
  });

  test('an alias to a model that nobody has, and a url that ends in an endpoint’s path, are named', async (t) => {
    const vllm = await start_backend(t, { kind: 'vllm', models: ['qwen2'] });
    const r = await check(t, { aliases: { 'gpt-4': 'llama3:70b', good: 'qwen2' }, backends: [{ name: 'a', mock: vllm }] });
    assert.equal(r.code, 1);
    assert.match(r.stdout, /\n1 of 1 backends are good\nalias gpt-4: no backend lists llama3:70b\n$/);
    const wrong = await check(t, { backends: [{ name: 'a', url: `${vllm.url}/v1/chat/completions`, type: 'vllm' }] });
    assert.equal(wrong.code, 1);
    assert.match(wrong.stdout, /its url ends in \/chat\/completions, which Nexus adds itself: remove that/);
  });

  test('each kind of trouble has its remark, and the exit code is 1', async (t) => {
    const keyed = await start_backend(t, { probe: (_, reply) => reply.json({ error: { message: 'no' } }, 401) });
    const ollama = await start_backend(t, { kind: 'ollama', models: ['llama3:latest'] });
    const short = await start_backend(t, { models: ['m1'] });
    const silent = await start_backend(t, { probe: () => {} });
    const r = await check(t, {
      health: { timeout: '300ms' },
      backends: [
        { name: 'down', url: `http://127.0.0.1:${await free_port()}`, type: 'vllm' },
        { name: 'nowhere', url: 'http://nexus-check.invalid:8000', type: 'vllm' },
        { name: 'keyed', url: keyed.url, type: 'openai' },
        { name: 'other', url: ollama.url, type: 'llamacpp' },
        { name: 'lacking', url: short.url, type: 'generic', models: 'm1, m2' },
        { name: 'silent', url: silent.url, type: 'generic' },
      ],
    }, { ms: 25_000 });
    assert.equal(r.code, 1, r.stdout + r.stderr);
    const rows = rows_of(r.stdout);
    assert.match(rows.get('down'), /vllm +no +no .*Connection refused/);
    assert.match(rows.get('nowhere'), /no +no .*DNS lookup failed for nexus-check\.invalid: /);
    assert.match(rows.get('keyed'), /yes +no .*it requires an API key \(401\)/);
    assert.match(rows.get('other'), /yes +no .*type = ollama/);
    assert.match(rows.get('lacking'), /yes +yes .*it has no model m2/);
    assert.match(rows.get('silent'), /yes +no .*no answer in time/);
    assert.match(r.stdout, /\n0 of 6 backends are good\n$/);
  });

  test('a list of models that answers 404 is told with its path and the remedy', async (t) => {
    const bare = await start_backend(t, { probe: (_, reply) => reply.json({ error: {} }, 404) });
    const r = await check(t, { backends: [{ name: 'bare', url: `${bare.url}/api`, type: 'openai' }] });
    assert.equal(r.code, 1);
    assert.match(rows_of(r.stdout).get('bare'), /it answered 404 to GET \/api\/v1\/models: if it has no list of models, set models = NAME/);
  });

  test('a Nexus as a backend is not taken for another kind', async (t) => {
    const ollama = await start_backend(t, { kind: 'ollama', models: ['llama3:70b'] });
    const inner = await start_nexus(t, { backends: [{ name: 'b', mock: ollama }] });
    for (const type of ['openai', 'generic', 'vllm']) {
      const r = await check(t, { backends: [{ name: 'inner', url: `http://127.0.0.1:${inner.port}`, type }] });
      assert.equal(r.code, 0, r.stdout + r.stderr);
      assert.doesNotMatch(r.stdout, /set type/);
    }
  });

  test('an own address of this host, which a wildcard listens at, is told as a loop', async (t) => {
    const own = Object.values(networkInterfaces()).flat().find((one) => one.family === 'IPv4' && !one.internal);
    if (!own) t.skip('this host has no address but loopback');
    const nexus = await start_nexus(t, '[server]\nlisten = 0.0.0.0:@PORT@\n[backend e]\ntype = echo\n');
    const conf = (listen) => `[server]\nlisten = ${listen}:${nexus.port}\n[backend self]\nurl = http://${own.address}:${nexus.port}\n`;
    const loop = await check(t, conf('*'));
    assert.equal(loop.code, 1);
    assert.match(rows_of(loop.stdout).get('self'), /yes +no .*routing loop: Nexus itself listens at this address/);
    assert.equal((await check(t, conf('127.0.0.1'))).code, 0, 'another process may listen there');
  });

  test('a server of TLS behind an http url, which answers 400 or closes the connection, is told so', async (t) => {
    const answers = { answers: 'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n', closes: '' };
    const backends = [];
    for (const [name, answer] of Object.entries(answers)) {
      const server = net.createServer((socket) => socket.on('error', () => {}).once('data', () => socket.end(answer)));
      await new Promise((done) => server.listen(0, '127.0.0.1', done));
      t.after(() => server.close());
      backends.push({ name, url: `http://127.0.0.1:${server.address().port}` });
    }
    const rows = rows_of((await check(t, { backends })).stdout);
    assert.match(rows.get('answers'), /it answered 400: if it speaks TLS on this port, use https:\/\//);
    assert.match(rows.get('closes'), /its answer was cut short: if it speaks TLS on this port, use https:\/\//);
  });

  test('a key is sent, and never printed', async (t) => {
    let seen = '';
    const keyed = await start_backend(t, {
      probe: (request, reply) => {
        seen = request.headers.get('authorization') ?? '';
        reply.json({ error: {} }, 403);
      },
    });
    const r = await check(t, { backends: [{ name: 'a', mock: keyed, api_key_env: 'CHECK_KEY' }] }, { env: { CHECK_KEY: 'sk-very-secret' } });
    assert.equal(r.code, 1);
    assert.equal(seen, 'Bearer sk-very-secret');
    assert.match(r.stdout, /it rejects the API key \(403\)/);
    assert.ok(!(r.stdout + r.stderr).includes('very-secret'));
  });

  test('a model cannot write to the terminal by its name', async (t) => {
    const hostile = await start_backend(t, { models: ['\u001b]0;owned\u0007\u001b[2J', 'two\nlines'] });
    const r = await check(t, { backends: [{ name: 'a', mock: hostile }] });
    assert.equal(r.code, 0, r.stdout + r.stderr);
    assert.doesNotMatch(r.stdout, /[\u0000-\u0009\u000b-\u001f\u007f]/);
    assert.equal(r.stdout.split('\n').length, 4, r.stdout);
  });

  test('a configuration that is wrong, and words that are not understood, give exit code 2', async (t) => {
    const bad = await check(t, '[server]\nthread = 1\n');
    assert.equal(bad.code, 2);
    assert.match(bad.stderr, /nexus\.conf:2/);
    const words = await run_nexus(['check', '--all']);
    assert.equal(words.code, 2);
    assert.match(words.stderr, /--all/);
  });
});
