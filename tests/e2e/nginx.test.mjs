// A backend that this project did not write: nginx, answering from files, and as a proxy with habits of its own.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { RawClient, assert, chat, chat_answer, chat_chunk, free_port, get, group, kill_at_end, post, sse, start_backend, start_nexus, test, until, within } from './harness.mjs';

const binary = ['/usr/sbin/nginx', '/usr/bin/nginx', '/usr/local/sbin/nginx'].find((p) => fs.existsSync(p));
const endpoint = '/v1/chat/completions';
const completion = JSON.stringify(chat_answer('file-model', 'From a file. ' + 'ü'.repeat(5000)));
const stream_body = Array.from({ length: 400 }, (_, i) => sse(chat_chunk('sse-model', `piece ${i} `))).join('') + sse('[DONE]');

// One nginx with three faces: fixed files, a fixed event stream, and a proxy in front of `upstream`.
async function start_nginx(t, upstream) {
  if (!binary) t.skip('nginx is not installed (apt-get install nginx-light)');
  const dir = t.dir();
  fs.chmodSync(dir, 0o755);
  const list = (id) => JSON.stringify({ object: 'list', data: [{ id, object: 'model', created: 1, owned_by: 'nginx' }] });
  for (const [name, text] of [['completion.json', completion], ['models.json', list('file-model')], ['stream.sse', stream_body], ['sse-models.json', list('sse-model')]]) t.file(name, text);
  const ports = { files: await free_port(), events: await free_port(), proxy: await free_port() };
  const temps = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((n) => `${n}_temp_path ${dir}/tmp_${n};`).join(' ');
  // A static file answers GET alone: a POST to it is 405, which is then served from the file as 200.
  t.file('nginx.conf', `
daemon off; master_process off; pid ${dir}/nginx.pid; error_log ${dir}/error.log; ${process.getuid() === 0 ? 'user root;' : ''}
events { worker_connections 2048; }
http {
  access_log off; root ${dir}; ${temps} client_max_body_size 64m;
  types { application/json json; text/event-stream sse; }
  upstream behind { server 127.0.0.1:${upstream?.port ?? 1}; keepalive 8; }
  server {
    listen 127.0.0.1:${ports.files}; keepalive_requests 3; keepalive_timeout 1s;
    location = /v1/models { try_files /models.json =404; }
    location = ${endpoint} { error_page 405 =200 /completion.json; try_files /completion.json =404; }
  }
  server {
    listen 127.0.0.1:${ports.events};
    location = /v1/models { try_files /sse-models.json =404; }
    location = ${endpoint} { error_page 405 =200 /stream.sse; try_files /stream.sse =404; limit_rate 400k; limit_rate_after 1k; }
  }
  server {
    listen 127.0.0.1:${ports.proxy}; keepalive_requests 7;
    location / { proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 20s; }
  }
}
`);
  const check = spawnSync(binary, ['-t', '-p', dir, '-c', path.join(dir, 'nginx.conf')], { encoding: 'utf8' });
  if (check.status !== 0) throw new Error(`nginx refuses its configuration: ${check.stderr}`);
  const child = spawn(binary, ['-p', dir, '-c', path.join(dir, 'nginx.conf')], { stdio: 'ignore' });
  kill_at_end(child);
  const exited = new Promise((done) => child.on('close', done));
  t.after(async () => {
    child.kill('SIGTERM');
    await within(5_000, exited, 'nginx to end');
  });
  await until(async () => (await get(ports.files, '/v1/models')).status === 200, 'nginx up');
  return ports;
}

group('nginx as a backend', () => {
  test('its model is found and its fixed completion comes back byte for byte, 60 times over connections that it closes after 3', async (t) => {
    const ports = await start_nginx(t);
    const nexus = await start_nexus(t, { server: { threads: 1 }, backends: [{ name: 'ngx', url: `http://127.0.0.1:${ports.files}`, type: 'openai' }] });
    assert.equal((await get(nexus.port, '/v1/models/file-model')).json.owned_by, 'nginx');
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    for (let i = 0; i < 60; i++) {
      client.send('POST', endpoint, { 'Content-Type': 'application/json' }, chat('file-model'));
      const r = await client.response();
      assert.equal(r.status, 200, `request ${i}: ${r.text.slice(0, 200)}`);
      assert.equal(r.text, completion);
      assert.match(r.headers.get('server'), /^nginx/);
      assert.ok(r.headers.has('etag') && r.headers.has('last-modified'), 'end-to-end headers come through');
    }
  });

  test('its event stream comes through unchanged while it trickles', async (t) => {
    const ports = await start_nginx(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'ngx', url: `http://127.0.0.1:${ports.events}`, type: 'generic' }] });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', endpoint, {}, chat('sse-model', { stream: true }));
    await client.head();
    const parts = [];
    for (let p = await client.piece(); p !== null; p = await client.piece()) parts.push(p);
    assert.ok(client.body.done);
    assert.equal(Buffer.concat(parts).toString(), stream_body);
    assert.ok(parts.length > 1, 'in pieces');
  });

  test('an idle connection that nginx closed after its keepalive_timeout is not noticed by a client', async (t) => {
    const ports = await start_nginx(t);
    const nexus = await start_nexus(t, { server: { threads: 1 }, backends: [{ name: 'ngx', url: `http://127.0.0.1:${ports.files}`, type: 'openai' }] });
    for (let i = 0; i < 3; i++) {
      assert.equal((await post(nexus.port, endpoint, chat('file-model'))).text, completion);
      await new Promise((done) => setTimeout(done, 1_100));
    }
  });

  test('as a proxy in between it changes nothing: streams piece by piece, errors, 100 requests', async (t) => {
    const behind = await start_backend(t);
    const ports = await start_nginx(t, behind);
    const nexus = await start_nexus(t, { backends: [{ name: 'ngx', url: `http://127.0.0.1:${ports.proxy}`, type: 'generic' }] });
    for (let i = 0; i < 100; i++) assert.equal((await post(nexus.port, endpoint, chat('m1', { stream: i % 2 === 0 }))).status, 200);
    let reply;
    const begun = new Promise((done) => { behind.answer = (_, r) => { reply = r; r.stream(); done(); }; });
    const client = await RawClient.connect(nexus.port);
    t.after(() => client.close());
    client.send('POST', endpoint, {}, chat('m1', { stream: true }));
    await begun;
    reply.piece('data: 0\n\n'); // the head is held until then, or for head_delay
    await client.head();
    for (let i = 0; i < 20; i++) {
      if (i > 0) reply.piece(`data: ${i}\n\n`);
      let got = '';
      while (got.length < `data: ${i}\n\n`.length) got += await client.piece();
      assert.equal(got, `data: ${i}\n\n`);
    }
    reply.finish();
    assert.equal(await client.piece(), null);
    assert.ok(client.body.done);
    await behind.stop();
    const r = await post(nexus.port, endpoint, chat());
    assert.equal(r.status, 502);
    assert.match(r.text, /nginx/, 'it is nginx’s own 502 that comes through');
  });
});
