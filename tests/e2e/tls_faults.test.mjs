// Faults of TLS: handshakes that stop, break or wait, certificates that the other side wants, ends without close_notify
// on idle connections, and records of any size.
import fs from 'node:fs';
import net from 'node:net';
import tls from 'node:tls';
import { RawClient, assert, authority, certificate, chat, chat_chunk, free_port, get, group, has_openssl, make_authority, make_certificate,
         not_yet_valid, page_after, parse_metrics, post, run_nexus, seeded, sse, start_backend, start_nexus, test, until, within } from './harness.mjs';

const path = '/v1/chat/completions';
const secure = { secure: {} };
const show = ({ pem, key }) => ({ cert: fs.readFileSync(pem), key: fs.readFileSync(key) });

// A daemon with a TLS port in front of `backends`: name → options of Backend, or a row of nexus.conf with a url.
async function front(t, backends = { b1: {} }, { server = {}, more = {}, rows = {}, ready = 'all' } = {}) {
  if (!has_openssl) t.skip('openssl is not installed');
  const port = await free_port();
  const mocks = {};
  const list = [];
  for (const [name, options] of Object.entries(backends)) {
    if (options.url) { list.push({ name, ...options }); continue; }
    mocks[name] = await start_backend(t, { secure: {}, ...options });
    list.push({ name, mock: mocks[name], ...rows[name] });
  }
  const { pem, key } = certificate();
  const conf = { ...more, server: { threads: 1, tls_listen: `127.0.0.1:${port}`, tls_certificate: pem, tls_key: key, ...server }, backends: list };
  const nexus = await start_nexus(t, conf, { ready });
  const page = async () => parse_metrics((await get(nexus.port, '/metrics')).text);
  const shaken = async (side, outcome) => (await page()).value('nexus_tls_handshakes_total', { side, outcome });
  const attempts = async (outcome, backend = 'b1') => (await page()).value('nexus_backend_attempts_total', { backend, outcome }) ?? 0;
  return { nexus, port, mocks, conf, page, shaken, attempts };
}

// A server on a bare socket: on_socket gets each connection. → its port.
async function bare_server(t, on_socket) {
  const sockets = new Set();
  const server = net.createServer({ allowHalfOpen: true }, (socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    socket.on('close', () => sockets.delete(socket));
    on_socket(socket);
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  t.after(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return server.address().port;
}

group('tls faults of clients', () => {
  test('200 handshakes that wait at once do not delay others, and those that a client ends are counted as closed', async (t) => {
    const { port, shaken } = await front(t);
    const begun = await Promise.all(Array.from({ length: 200 }, () => RawClient.connect(port, { secure: null })));
    for (const one of begun) one.write(Buffer.from([22, 3, 1, 2, 0, 1]));
    for (let i = 0; i < 20; i++) assert.equal((await post(port, path, chat(), { ...secure, ms: 3_000 })).status, 200);
    for (const [i, one] of begun.entries()) i % 2 ? one.close() : one.reset();
    await until(async () => await shaken('client', 'closed') === 200, 'all of them counted');
    assert.equal(await shaken('client', 'full'), 20);
  });

  test('a hello in pieces of a byte is answered', async (t) => {
    const { port, shaken } = await front(t);
    const relay = await bare_server(t, (near) => {
      const far = net.connect({ port, host: '127.0.0.1', noDelay: true });
      near.setNoDelay(true);
      const bytewise = (from, to) => from.on('data', (data) => { for (const byte of data) to.write(Buffer.from([byte])); });
      bytewise(near, far);
      bytewise(far, near);
      far.on('error', () => {});
      near.on('close', () => far.destroy());
    });
    const answer = await post(relay, path, chat(), secure);
    assert.equal(answer.status, 200);
    assert.ok(answer.complete);
    assert.equal(await shaken('client', 'full'), 1);
  });

  test('a client that says close_notify after its request has left, as one that sends a FIN in clear', async (t) => {
    const { nexus, port, mocks, page } = await front(t, { b1: {} });
    let held = 0;
    mocks.b1.answer = () => { held += 1; };
    const clients = [await RawClient.connect(nexus.port, { secure: null }), await RawClient.connect(port, secure)];
    for (const one of clients) {
      t.after(() => one.close());
      one.send('POST', path, {}, chat());
    }
    await until(() => held === 2, 'both requests at the backend');
    for (const one of clients) one.half_close();
    await until(async () => (await page()).value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'cancelled' }) === 2, 'both cancelled');
  });

  test('requests in records of random sizes, and responses to a client that reads slowly, are unchanged', async (t) => {
    const { port, mocks } = await front(t);
    const { next: random } = seeded(18);
    mocks.b1.answer = (request, reply) => reply.body(200, request.body, { 'Content-Type': 'application/json' });
    const client = await RawClient.connect(port, secure);
    t.after(() => client.close());
    for (let i = 1; i <= 8; i++) {
      const body = Buffer.from(JSON.stringify(chat('m1', { pad: 'ß€x'.repeat(Math.floor(random() * 300_000)) })));
      const bytes = Buffer.concat([Buffer.from(`POST ${path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n`), body]);
      for (let at = 0, size; at < bytes.length; at += size) {
        size = random() < 0.3 ? 1 + Math.floor(random() * 20) : 1 + Math.floor(random() * 60_000);
        client.write(bytes.subarray(at, at + size));
      }
      client.method = 'POST';
      const request = await mocks.b1.request(i, 15_000);
      assert.ok(request.body.equals(body), `request ${i} is unchanged`);
      client.socket.pause();
      await new Promise(setImmediate);
      client.socket.resume();
      const answer = await client.response(15_000);
      assert.equal(answer.status, 200);
      assert.equal(answer.text, body.toString(), `response ${i} is unchanged`);
    }
  });
});

group('tls faults of backends', () => {
  test('a certificate that is not valid yet: check and log say so, and ask for the clock', async (t) => {
    if (!has_openssl) t.skip('openssl is not installed');
    const { nexus, port, mocks } = await front(t, { b1: { secure: show(make_certificate(not_yet_valid)) } }, { ready: 'up' });
    await nexus.logged(/its certificate is not valid before 2049-01-01 00:00 UTC: is this host's clock right\?/);
    assert.equal((await post(port, path, chat(), secure)).status, 503);
    const check = await run_nexus(['check', nexus.conf_path]);
    assert.match(check.stdout, /is not valid before 2049-01-01/);
    assert.equal(mocks.b1.requests.length + mocks.b1.probes.length, 0);
  });

  test('a certificate for another address is told with both addresses', async (t) => {
    if (!has_openssl) t.skip('openssl is not installed');
    const { nexus } = await front(t, { b1: { secure: show(make_certificate({ name: 'gpu', names: ['IP:10.1.2.3', 'IP:2001:db8::7'] })) } }, { ready: 'up' });
    await nexus.logged(/its certificate is for 10\.1\.2\.3, 2001:db8:0:0:0:0:0:7, not for 127\.0\.0\.1: set tls_name/);
  });

  for (const version of ['TLSv1.2', 'TLSv1.3']) {
    test(`a backend that wants a certificate by another issuer is told in words (${version})`, async (t) => {
      if (!has_openssl) t.skip('openssl is not installed');
      const clients = make_authority('Clients');
      const wants = { requestCert: true, rejectUnauthorized: true, ca: fs.readFileSync(clients.pem), maxVersion: version };
      const { nexus, port, mocks, conf } = await front(t, { b1: { secure: { ...show(certificate()), ...wants } } }, { ready: 'up' });
      await nexus.logged(/backend is unhealthy/);
      const words = version === 'TLSv1.2' ? /it refuses the handshake: it wants a certificate \(tls_certificate\)/ : /it wants a certificate: set tls_certificate/;
      assert.match(nexus.log(), words);
      assert.equal((await post(port, path, chat(), secure)).status, 503);
      const check = await run_nexus(['check', nexus.conf_path]);
      assert.equal(check.code, 1);
      assert.match(check.stdout, words);
      const own = make_certificate({ name: 'nexus', names: [], by: clients });
      nexus.reload({ ...conf, backends: [{ name: 'b1', url: mocks.b1.url, tls_ca: authority().pem, tls_certificate: own.pem, tls_key: own.key }] });
      await until(async () => (await post(port, path, chat(), secure)).status === 200, 'it is served with the right one');
      assert.equal(mocks.b1.requests[0].connection.socket.getPeerCertificate().subject.CN, 'nexus');
    });
  }

  test('a handshake that a backend never answers ends at connect_timeout, and the request is served by another', async (t) => {
    if (!has_openssl) t.skip('openssl is not installed');
    let mute = false;
    const waiting = [];
    const inner = await start_backend(t, { secure: {} });
    const dead = await bare_server(t, (near) => {
      if (mute) return waiting.push(near);
      const far = net.connect(inner.port, '127.0.0.1');
      far.on('error', () => {});
      near.pipe(far);
      return far.pipe(near);
    });
    const { port, shaken, attempts, page } = await front(t, { b1: { url: `https://127.0.0.1:${dead}`, tls_ca: authority().pem }, b2: {} },
      { more: { upstream: { connect_timeout: '300ms' }, health: { interval: '1h' } } });
    mute = true;
    for (let i = 0; i < 4; i++) assert.equal((await post(port, path, chat(), secure)).status, 200);
    assert.ok(await attempts('connect_error') + await attempts('timeout') >= 1, 'an attempt at the mute one');
    assert.equal((await page()).sum('nexus_backend_attempts_total', { outcome: 'ok' }), 4);
    assert.ok(await shaken('backend', 'timeout') >= 1);
    assert.ok(waiting.length >= 1);
  });

  test('a backend that resets or ends the handshake: the request is served by another, once', async (t) => {
    if (!has_openssl) t.skip('openssl is not installed');
    let how = null;
    const inner = await start_backend(t, { secure: {} });
    const breaking = await bare_server(t, (near) => {
      const breaks = how; // as it is now: the next round may begin before the data comes
      if (breaks) return near.once('data', () => breaks(near));
      const far = net.connect(inner.port, '127.0.0.1');
      far.on('error', () => {});
      near.pipe(far);
      return far.pipe(near);
    });
    const alert = Buffer.from([21, 3, 3, 0, 2, 2, 40]);
    for (const [one, outcome] of [[(s) => s.resetAndDestroy(), 'closed'], [(s) => s.end(), 'closed'], [(s) => s.end(alert), 'failed'], [(s) => s.end('HTTP/1.1 400 No\r\n\r\n'), 'closed']]) {
      how = null;
      const f = await front(t, { b1: { url: `https://127.0.0.1:${breaking}`, tls_ca: authority().pem }, b2: {} }, { more: { health: { interval: '1h' } } });
      how = one;
      for (let i = 0; i < 4; i++) assert.equal((await post(f.port, path, chat(), secure)).status, 200);
      assert.equal(f.mocks.b2.requests.length + inner.requests.length, 4, 'no request came twice');
      assert.ok(await f.attempts('connect_error') >= 1);
      const failures = {};
      for (const name of ['closed', 'failed', 'certificate', 'timeout']) failures[name] = await f.shaken('backend', name) > 0;
      assert.deepEqual(failures, { closed: false, failed: false, certificate: false, timeout: false, [outcome]: true });
      inner.requests.length = 0;
    }
  });

  test('idle connections that a backend drops without close_notify are forgotten: no request fails and none is tried twice', async (t) => {
    const { port, mocks, page } = await front(t);
    for (let i = 0; i < 6; i++) {
      const answer = await post(port, path, chat('m1', { stream: i % 2 === 1 }), secure);
      assert.equal(answer.status, 200);
      for (const raw of [...mocks.b1.raws]) i % 3 ? raw.destroy() : raw.resetAndDestroy();
      await until(() => mocks.b1.open === 0, 'the backend has no connection');
    }
    await page_after(6, port).catch(() => {});
    const seen = await page();
    assert.equal(seen.value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'ok' }), 6);
    assert.equal(mocks.b1.requests.length, 6);
  });

  test('chunked responses need no close_notify, but their last chunk', async (t) => {
    const { port, mocks, attempts } = await front(t);
    let last = true;
    mocks.b1.answer = (request, reply) => {
      reply.stream();
      reply.piece(sse(chat_chunk('m1', 'one', {}, true)));
      if (last) reply.finish();
      reply.socket.write('', () => reply.socket.raw.end());   // once its bytes are gone
    };
    const whole = await post(port, path, chat('m1', { stream: true }), secure);
    assert.ok(whole.complete);
    await until(async () => await attempts('ok') === 1, 'a whole one');
    last = false;
    const cut = await post(port, path, chat('m1', { stream: true }), secure).catch(() => ({ complete: false }));
    assert.match(cut.text ?? '', /one/);
    await until(async () => await attempts('truncated') === 1, 'a truncated one');
  });

  test('a stream whose records have one byte each, and several events a record, arrive in order', async (t) => {
    const { port, mocks } = await front(t);
    const words = Array.from({ length: 300 }, (_, i) => `w${i} `);
    const text = words.map((w, i) => sse(chat_chunk('m1', w, {}, i === 0))).join('') + sse('[DONE]');
    mocks.b1.answer = (request, reply) => {
      reply.stream();
      const bytes = Buffer.from(`${text.length.toString(16)}\r\n${text}\r\n0\r\n\r\n`);
      for (let at = 0; at < 2_000; at++) reply.raw(bytes.subarray(at, at + 1));
      reply.raw(bytes.subarray(2_000));
    };
    const answer = await post(port, path, chat('m1', { stream: true }), secure);
    assert.ok(answer.complete);
    assert.equal(answer.text, text);
  });
});
