// TLS with programs of others on the other side: curl, openssl, Python, nginx, HAProxy, and the OpenAI SDK.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { assert, authority, certificate, chat_answer, free_port, get, group, has_openssl, kill_at_end, parse_metrics, post, start_backend, start_nexus, test,
         until, within } from './harness.mjs';

const endpoint = '/v1/chat/completions';
const has = (command, ...args) => !spawnSync(command, args).error;

// Runs a command to its end with `input` on its standard input.
function run(command, args, { input = '', env = {} } = {}) {
  const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: ['pipe', 'pipe', 'pipe'] });
  kill_at_end(child);
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => { output += data; });
  child.stdin.on('error', () => {});
  child.stdin.end(input);
  return within(10_000, new Promise((done) => child.on('close', (status) => done({ status, output }))), () => `${command}: ${output}`);
}

async function front(t, { threads = 1, server = {} } = {}) {
  if (!has_openssl) t.skip('openssl is not installed');
  const port = await free_port();
  const mock = await start_backend(t, { secure: {} });
  const { pem, key } = certificate();
  const nexus = await start_nexus(t, { server: { threads, tls_listen: `127.0.0.1:${port}`, tls_certificate: pem, tls_key: key, ...server }, backends: [{ name: 'b1', mock }] });
  const count = async (outcome, side = 'client') => parse_metrics((await get(nexus.port, '/metrics')).text).value('nexus_tls_handshakes_total', { side, outcome });
  return { nexus, port, mock, count };
}

// A program that serves until the test ends.
async function serve(t, command, args, ready) {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  kill_at_end(child);
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => { output += data; });
  const exited = new Promise((done) => child.on('close', done));
  t.after(async () => {
    child.kill('SIGTERM');
    await within(5_000, exited, `${command} to end`);
  });
  await until(ready, () => `${command}: ${output}`);
}

group('tls with other clients', () => {
  test('curl: HTTP/1.1 by ALPN, a stream, 20 requests on one connection; its own check of the certificate', async (t) => {
    if (!has('curl', '--version')) t.skip('curl is not installed');
    const { port, count } = await front(t);
    const url = `https://localhost:${port}`;
    const trusts = ['-sS', '--cacert', authority().pem, '--resolve', `localhost:${port}:127.0.0.1`];
    const one = await run('curl', [...trusts, '-w', '%{http_version} %{http_code}', '-o', '/dev/null', `${url}/v1/models`]);
    assert.equal(one.output, '1.1 200');
    const stream = await run('curl', [...trusts, '-N', `${url}${endpoint}`, '-d', '{"model":"m1","stream":true}']);
    assert.match(stream.output, /data: \[DONE\]/);
    const many = await run('curl', [...trusts, '-w', '%{num_connects}', ...Array(20).fill(`${url}/v1/models`).flatMap((u) => ['-o', '/dev/null', u])]);
    assert.equal(many.output, '1' + '0'.repeat(19));
    const strict = await run('curl', ['-sS', `${url}/v1/models`, '--resolve', `localhost:${port}:127.0.0.1`]);
    assert.notEqual(strict.status, 0);
    await until(async () => await count('full') === 3 && await count('certificate') === 1, 'three handshakes, and a refusal');
  });

  test('openssl s_client: versions 1.2 and 1.3, resumption with a ticket in both, and http/1.1 by ALPN', async (t) => {
    const { port, count } = await front(t, { threads: 2 });
    const ask = 'GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n';
    const common = ['s_client', '-connect', `127.0.0.1:${port}`, '-servername', 'localhost', '-CAfile', authority().pem, '-verify_return_error', '-alpn', 'http/1.1', '-ign_eof'];
    for (const [i, version] of ['-tls1_2', '-tls1_3'].entries()) {
      const session = t.file(`session${version}`, '');
      const first = await run('openssl', [...common, version, '-sess_out', session], { input: ask });
      assert.match(first.output, /HTTP\/1\.1 200 OK/);
      assert.match(first.output, /ALPN protocol: http\/1\.1/);
      assert.match(first.output, /Verify return code: 0 \(ok\)/);
      const second = await run('openssl', [...common, version, '-sess_in', session], { input: ask });
      assert.match(second.output, /Reused, TLSv1/);
      assert.match(second.output, /HTTP\/1\.1 200 OK/);
      await until(async () => await count('resumed') === i + 1, 'a resumed handshake');
    }
    assert.equal(await count('full'), 2);
    const compressed = await run('openssl', [...common, '-tls1_2', '-comp'], { input: ask });
    assert.match(compressed.output, /Compression: NONE/);
    assert.match(compressed.output, /Secure Renegotiation IS supported/);
    const again = await run('openssl', ['s_client', '-connect', `127.0.0.1:${port}`, '-tls1_2'], { input: 'R\n' });
    assert.match(again.output, /no renegotiation|handshake failure|renegotiat/i);
  });

  test('Python\'s ssl: a request with its own verification', async (t) => {
    if (!has('python3', '-c', 'import ssl')) t.skip('python3 is not installed');
    const { port } = await front(t);
    const script = `
import http.client, json, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
connection = http.client.HTTPSConnection("localhost", int(sys.argv[2]), context=context)
for i in range(3):
    connection.request("POST", "${endpoint}", json.dumps({"model": "m1"}), {"Content-Type": "application/json"})
    print(connection.getresponse().status, end=" ") if False else None
    answer = connection.getresponse()
    print(answer.status, len(json.load(answer)["choices"]), connection.sock.version())
`.replace('    print(connection.getresponse().status, end=" ") if False else None\n', '');
    const r = await run('python3', ['-c', script, authority().pem, String(port)]);
    assert.equal(r.output.trim(), '200 1 TLSv1.3\n'.repeat(3).trim());
  });

  test('the OpenAI SDK with NODE_EXTRA_CA_CERTS: plain and streamed', async (t) => {
    const modules = path.join(path.dirname(new URL(import.meta.url).pathname), '..', 'node_modules', 'openai');
    if (!fs.existsSync(modules)) t.skip('npm package openai is not installed (cd tests && npm ci)');
    const { nexus, port } = await front(t);
    const script = `
      const { default: OpenAI } = await import(${JSON.stringify(path.join(modules, 'index.mjs'))});
      const client = new OpenAI({ baseURL: 'https://localhost:${port}/v1', apiKey: 'k', maxRetries: 0 });
      const messages = [{ role: 'user', content: 'Hi' }];
      const plain = await client.chat.completions.create({ model: 'm1', messages });
      console.log(plain.usage.total_tokens);
      let events = 0;
      for await (const event of await client.chat.completions.create({ model: 'm1', messages, stream: true })) events += event.choices.length;
      console.log(events > 1);`;
    const file = t.file('sdk.mjs', script);
    const r = await run(process.execPath, [file], { env: { NODE_EXTRA_CA_CERTS: authority().pem } });
    assert.match(r.output, /^\d+\ntrue\n$/);
    await until(async () => parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total') === 2, 'two requests counted');
  });
});

group('tls with other servers', () => {
  test('nginx as a TLS backend, and as a TLS client in front of Nexus: 50 requests each, byte for byte', async (t) => {
    const binary = ['/usr/sbin/nginx', '/usr/bin/nginx'].find((p) => fs.existsSync(p));
    if (!binary) t.skip('nginx is not installed (apt-get install nginx-light)');
    if (!has_openssl) t.skip('openssl is not installed');
    const dir = t.dir();
    fs.chmodSync(dir, 0o755);
    const [secure, forward, tls_port] = [await free_port(), await free_port(), await free_port()];
    const { pem, key } = certificate();
    const completion = JSON.stringify(chat_answer('file-model', 'From a file. ' + 'ü'.repeat(20_000)));
    t.file('completion.json', completion);
    t.file('models.json', JSON.stringify({ object: 'list', data: [{ id: 'file-model', object: 'model' }] }));
    const temps = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((n) => `${n}_temp_path ${dir}/tmp_${n};`).join(' ');
    const conf = t.file('nginx.conf', `
daemon off; master_process off; pid ${dir}/nginx.pid; error_log ${dir}/error.log; ${process.getuid() === 0 ? 'user root;' : ''}
events { worker_connections 512; }
http {
  access_log off; root ${dir}; ${temps} types { application/json json; }
  upstream nexus { server 127.0.0.1:${tls_port}; keepalive 4; }
  server {
    listen 127.0.0.1:${secure} ssl; ssl_certificate ${pem}; ssl_certificate_key ${key}; keepalive_requests 7;
    location = /v1/models { try_files /models.json =404; }
    location = ${endpoint} { error_page 405 =200 /completion.json; try_files /completion.json =404; }
  }
  server {
    listen 127.0.0.1:${forward};
    location / { proxy_pass https://nexus; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_ssl_verify on; proxy_ssl_trusted_certificate ${authority().pem}; proxy_ssl_name localhost; proxy_ssl_server_name on; }
  }
}
`);
    const nexus = await start_nexus(t, { server: { threads: 1, tls_listen: `127.0.0.1:${tls_port}`, tls_certificate: pem, tls_key: key },
      health: { interval: '100ms' }, backends: [{ name: 'ngx', url: `https://localhost:${secure}`, tls_ca: authority().pem, type: 'openai' }] }, { ready: 'up' });
    await serve(t, binary, ['-p', dir, '-c', conf], async () => (await get(forward, '/v1/models/file-model')).status === 200);
    for (let i = 0; i < 50; i++) {
      const answer = await post(forward, endpoint, { model: 'file-model' });
      assert.equal(answer.status, 200, `request ${i}: ${answer.text.slice(0, 200)}`);
      assert.equal(answer.text, completion);
    }
    await until(async () => parse_metrics((await get(nexus.port, '/metrics')).text).sum('nexus_requests_total') === 50, '50 requests counted');
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.ok(page.value('nexus_tls_handshakes_total', { side: 'backend', outcome: 'resumed' }) >= 5, 'nginx closes after 7 requests: later connections resume');
    assert.ok(page.value('nexus_tls_handshakes_total', { side: 'client', outcome: 'full' }) <= 5, 'nginx keeps its connections to Nexus');
  });

  test('HAProxy as a TLS backend, and as a TLS client in front of Nexus', async (t) => {
    const binary = ['/usr/sbin/haproxy', '/usr/bin/haproxy'].find((p) => fs.existsSync(p));
    if (!binary) t.skip('HAProxy is not installed (apt-get install haproxy)');
    if (!has_openssl) t.skip('openssl is not installed');
    const [secure, forward, tls_port] = [await free_port(), await free_port(), await free_port()];
    const mock = await start_backend(t, { secure: null });
    const { pem, key, both } = certificate();
    const conf = t.file('haproxy.cfg', `
global
  maxconn 500
defaults
  mode http
  timeout connect 5s
  timeout client 20s
  timeout server 20s
frontend secure
  bind 127.0.0.1:${secure} ssl crt ${both} alpn http/1.1
  default_backend mock
backend mock
  server mock 127.0.0.1:${mock.port}
frontend clear
  bind 127.0.0.1:${forward}
  default_backend nexus
backend nexus
  server nexus 127.0.0.1:${tls_port} ssl verify required ca-file ${authority().pem} sni str(localhost) verifyhost localhost check
`);
    await start_nexus(t, { server: { threads: 1, tls_listen: `127.0.0.1:${tls_port}`, tls_certificate: pem, tls_key: key }, health: { interval: '100ms' },
      backends: [{ name: 'hap', url: `https://localhost:${secure}`, tls_ca: authority().pem }] }, { ready: 'up' });
    await serve(t, binary, ['-db', '-f', conf], async () => (await get(forward, '/v1/models/m1')).status === 200);
    for (let i = 0; i < 30; i++) {
      const answer = await post(forward, endpoint, { model: 'm1', stream: i % 2 === 1, messages: [{ role: 'user', content: 'x'.repeat(i * 3000) }] });
      assert.equal(answer.status, 200, `request ${i}: ${answer.text.slice(0, 200)}`);
      assert.ok(answer.complete);
      assert.match(answer.text, i % 2 ? /data: \[DONE\]/ : /"usage"/);
    }
    assert.equal(mock.requests.length, 30);
  });
});
