// TLS towards clients and towards backends: who is believed, what is told when something is wrong, and how the ends of
// responses look. tls_peers.test.mjs has programs of others on the other side.
import fs from 'node:fs';
import tls from 'node:tls';
import net from 'node:net';
import { RawClient, assert, authority, certificate, chat, chat_answer, chat_chunk, expired, fingerprint, free_port, get, group, has_openssl, make_authority, make_certificate,
         page_after, parse_metrics, post, run_nexus, sse, start_backend, start_nexus, test, until, within } from './harness.mjs';

const path = '/v1/chat/completions';
const if_openssl = (t) => { if (!has_openssl) t.skip('openssl is not installed'); };

// A daemon with a TLS port in front of a backend in clear, or (secure) over TLS.
async function over_tls(t, { server = {}, backend_options = {}, backend = {}, more = {}, ready } = {}) {
  if_openssl(t);
  const mock = await start_backend(t, backend_options);
  const port = await free_port();
  const conf = {
    ...more,
    server: { tls_listen: `127.0.0.1:${port}`, tls_certificate: certificate().pem, tls_key: certificate().key, ...server },
    backends: [{ name: 'b1', mock, ...backend }],
  };
  const nexus = await start_nexus(t, conf, { ready: ready ?? 'all' });
  const secure = { secure: {} };
  return { nexus, port, mock, conf, secure };
}
const handshakes = async (nexus, side, outcome) => parse_metrics((await get(nexus.port, '/metrics')).text).value('nexus_tls_handshakes_total', { side, outcome });

// The handshake's failure, or '' if it succeeds.
const shake = (port, options) => within(5_000, new Promise((done) => {
  const socket = tls.connect({ port, host: '127.0.0.1', ca: fs.readFileSync(authority().pem), servername: 'localhost', ...options });
  socket.on('error', (error) => done(error.message || String(error.code)));
  // With TLS 1.3 a refused certificate is told after the client's own handshake.
  socket.on('secureConnect', () => socket.write('GET /health HTTP/1.1\r\nHost: h\r\n\r\n'));
  socket.on('data', () => { done(''); socket.destroy(); });
  socket.on('end', () => done('ended'));
}), 'a handshake');

group('tls for clients', () => {
  test('plain and streamed requests are served on tls_listen, and are counted as on listen', async (t) => {
    const { nexus, port, secure } = await over_tls(t);
    assert.equal((await get(port, '/v1/models', secure)).json.data[0].id, 'm1');
    const answer = await post(port, path, chat(), secure);
    assert.equal(answer.status, 200);
    assert.equal(answer.json.usage.completion_tokens, 12);
    const stream = await post(port, path, chat('m1', { stream: true }), secure);
    assert.ok(stream.complete && stream.text.endsWith('data: [DONE]\n\n'));
    await page_after(2, nexus.port);
    assert.equal(await handshakes(nexus, 'client', 'full'), 3);
  });

  test('20 MB go up and come back byte for byte, to a client that reads slowly', async (t) => {
    const big = Buffer.alloc(20 << 20, 'abcdefghijklmnopqrstuvwxyz 0123456789\n'.repeat(31));
    const { port, mock } = await over_tls(t, { backend_options: { secure: {} } });
    mock.answer = (request, reply) => reply.body(200, big, { 'Content-Type': 'text/plain' });
    const client = await RawClient.connect(port, { secure: {} });
    t.after(() => client.close());
    const body = Buffer.from(JSON.stringify(chat('m1', { pad: big.toString() })));
    client.send('POST', path, {}, body);
    const request = await mock.request(1, 20_000);
    assert.ok(request.body.equals(body), 'the request is unchanged');
    const head = await client.head(20_000);
    assert.equal(head.status, 200);
    const parts = [];
    for (let piece = await client.piece(); piece !== null; piece = await client.piece()) {
      parts.push(piece);
      client.socket.pause();
      await new Promise(setImmediate);
      client.socket.resume();
    }
    assert.ok(Buffer.concat(parts).equals(big), 'the response is unchanged');
  });

  test('pipelined requests in one record are all answered, and a request of one byte a record too', async (t) => {
    const { port } = await over_tls(t);
    const client = await RawClient.connect(port, { secure: {} });
    t.after(() => client.close());
    const one = 'GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n';
    client.write(one.repeat(20));
    for (let i = 0; i < 20; i++) assert.equal((await client.response()).status, 200, `answer ${i}`);
    for (const byte of one) client.write(byte);
    assert.equal((await client.response()).status, 200);
  });

  test('a request in clear is told that this port speaks TLS, and a hello on the other port is refused', async (t) => {
    const { nexus, port } = await over_tls(t);
    const told = await get(port, '/v1/models', { secure: null });
    assert.equal(told.status, 400);
    assert.equal(told.json.error.code, 'tls_expected');
    assert.match(await shake(nexus.port, {}), /wrong version|packet length|ECONNRESET|ended|http request/i);
    await until(async () => await handshakes(nexus, 'client', 'closed') === 1, 'the failed handshake counted');
  });

  test('nexus top and the status page are seen over https', async (t) => {
    const { port, secure } = await over_tls(t);
    const page = await get(port, '/', secure);
    assert.match(page.headers.get('content-type'), /^text\/html/);
    const top = await run_nexus(['top', `https://127.0.0.1:${port}`], { env: { SSL_CERT_FILE: authority().pem } });
    assert.equal(top.code, 0, top.stderr);
    assert.match(top.stdout, /b1/);
    const stranger = await run_nexus(['top', `https://127.0.0.1:${port}`], { env: { SSL_CERT_FILE: make_authority('Other').pem } });
    assert.notEqual(stranger.code, 0);
    assert.match(stranger.stderr + stranger.stdout, /the issuer of its certificate is unknown/);
  });

  test('a handshake that never ends is cut at header_timeout and disturbs nobody', async (t) => {
    const { nexus, port, secure } = await over_tls(t, { server: { header_timeout: '300ms' } });
    const idle = await Promise.all(Array.from({ length: 50 }, () => RawClient.connect(port, { secure: null })));
    for (const one of idle) one.write(Buffer.from([22, 3, 1, 2, 0, 1]));
    assert.equal((await post(port, path, chat(), secure)).status, 200);
    for (const one of idle) await one.ended();
    for (const one of idle) one.close();
    await until(async () => await handshakes(nexus, 'client', 'timeout') === 50, 'all of them counted');
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.value('nexus_limit_rejections_total', { limit: 'header_timeout' }), 50);
    assert.equal(page.sum('nexus_requests_total'), 1);
  });

  test('the certificate is chosen by the name that is asked for; old versions and other protocols are refused', async (t) => {
    if_openssl(t);
    const other = make_certificate({ name: 'other', names: ['DNS:gpu.example.org', 'DNS:*.lab.example.org'] });
    const names = await over_tls(t, { server: { tls_certificate: [certificate().both, other.both], tls_key: undefined } });
    const shown = (servername) => within(5_000, new Promise((done, fail) => {
      const socket = tls.connect({ port: names.port, host: '127.0.0.1', servername, rejectUnauthorized: false }, () => {
        done(socket.getPeerCertificate().fingerprint256);
        socket.destroy();
      });
      socket.on('error', fail);
    }), 'a certificate');
    assert.equal(await shown('gpu.example.org'), fingerprint(other.pem));
    assert.equal(await shown('a.lab.example.org'), fingerprint(other.pem));
    assert.equal(await shown('a.b.lab.example.org'), fingerprint(certificate().pem));
    assert.equal(await shown('localhost'), fingerprint(certificate().pem));
    assert.equal(await shake(names.port, { ALPNProtocols: ['h2', 'http/1.1'] }), '');
    assert.match(await shake(names.port, { ALPNProtocols: ['h2'] }), /no application protocol/i);
    assert.notEqual(await shake(names.port, { minVersion: 'TLSv1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' }), '');
    assert.equal(await shake(names.port, { maxVersion: 'TLSv1.2' }), '');
    names.nexus.reload({ ...names.conf, server: { ...names.conf.server, tls_min_version: '1.3' } });
    await names.nexus.logged(/ info reloaded changed=/);
    assert.match(await shake(names.port, { maxVersion: 'TLSv1.2' }), /version/i);
    assert.equal(await shake(names.port, {}), '');
  });

  test('tls_client_ca lets in who has a certificate by it, and one named as a key needs no key', async (t) => {
    if_openssl(t);
    const clients = make_authority('Clients');
    const show = ({ pem, key }) => ({ cert: fs.readFileSync(pem), key: fs.readFileSync(key) });
    const alice = show(make_certificate({ name: 'alice', names: [], by: clients }));
    const bob = show(make_certificate({ name: 'bob', names: [], by: clients }));
    const stranger = show(make_certificate({ name: 'alice', names: [] }));
    const keys = t.file('keys', 'alice sk-of-alice-12345\n');
    const { nexus, port } = await over_tls(t, { server: { tls_client_ca: clients.pem, api_keys_file: keys } });
    assert.match(await shake(port, {}), /certificate required|handshake failure/i);
    assert.match(await shake(port, stranger), /unknown ca|certificate unknown|bad certificate/i);
    assert.equal((await post(port, path, chat(), { secure: alice })).status, 200);
    assert.equal((await get(port, '/v1/models', { secure: alice })).status, 200);
    assert.equal((await post(port, path, chat(), { secure: bob })).status, 401);
    assert.equal((await post(port, path, chat(), { secure: bob, headers: { 'x-api-key': 'sk-of-alice-12345' } })).status, 200);
    const admin = { secure: null, headers: { Authorization: 'Bearer sk-of-alice-12345' } };
    const page = async () => parse_metrics((await get(nexus.port, '/metrics', admin)).text);
    await until(async () => (await page()).value('nexus_tls_handshakes_total', { side: 'client', outcome: 'certificate' }) === 2, 'two refused certificates');
  });
});

group('tls and the end of a response', () => {
  // The kinds of the records that a client gets, seen by a relay in between: close_notify is an alert, which in TLS 1.2 has
  // a type of its own, 21.
  // `on_begun` is called when the client has got a first event.
  async function kinds_at_end(port, send, on_begun = () => {}) {
    const kinds = [];
    let rest = Buffer.alloc(0);
    let over;
    const ended = new Promise((done) => { over = done; });
    const relay = net.createServer((near) => {
      const far = net.connect(port, '127.0.0.1');
      near.on('data', (data) => far.write(data));
      far.on('data', (data) => {
        rest = Buffer.concat([rest, data]);
        for (; rest.length >= 5 && rest.length >= 5 + rest.readUInt16BE(3); rest = rest.subarray(5 + rest.readUInt16BE(3))) kinds.push(rest[0]);
        near.write(data);
      });
      far.on('close', () => { near.destroy(); over(); });
      for (const one of [near, far]) one.on('error', () => {});
    });
    await new Promise((done) => relay.listen(0, '127.0.0.1', done));
    const options = { ca: fs.readFileSync(authority().pem), servername: 'localhost', maxVersion: 'TLSv1.2' };
    const socket = tls.connect({ port: relay.address().port, host: '127.0.0.1', ...options }, () => socket.write(send));
    let text = '';
    socket.on('data', (data) => {
      text += data;
      if (text.includes('begun')) on_begun();
    });
    socket.on('error', () => {});
    await within(5_000, ended, 'the end of the connection');
    relay.close();
    return { kinds, alert: kinds.at(-1) === 21, text };
  }
  const ask = (more, version = '1.1') => {
    const body = JSON.stringify(chat('m1', more));
    return `POST ${path} HTTP/${version}\r\nHost: h\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
  };

  test('close_notify is sent after a whole response, and not after one that breaks off', async (t) => {
    const { port, mock } = await over_tls(t);
    const whole = await kinds_at_end(port, ask({}));
    assert.match(whole.text, /"usage"/);
    assert.ok(whole.alert, `the last record is an alert: ${JSON.stringify(whole.kinds)}`);
    let break_off;
    mock.answer = (request, reply) => {
      reply.stream();
      reply.piece(sse(chat_chunk('m1', 'begun', {}, true)));
      break_off = () => reply.reset();
    };
    const cut = await kinds_at_end(port, ask({ stream: true }), () => break_off());
    assert.match(cut.text, /begun/);
    assert.ok(!cut.alert, `no alert: ${JSON.stringify(cut.kinds)}`);
    const old = await kinds_at_end(port, ask({ stream: true }, '1.0'), () => break_off());
    assert.ok(!old.alert, 'a body that lasts until the end of the connection is cut without it');
  });

  test('a backend that closes without close_notify has broken off a response that lasts until then; with it, not', async (t) => {
    const { nexus, port, mock, secure } = await over_tls(t, { backend_options: { secure: {} } });
    const body = JSON.stringify(chat_answer('m1'));
    let notify = true;
    let framing = '';
    mock.answer = (request, reply) => {
      reply.raw(`HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n${framing}\r\n${body}`);
      if (notify) reply.fin();
      else reply.socket.write('', () => reply.socket.raw.end());   // once its bytes are gone
    };
    const outcomes = async () => parse_metrics((await get(nexus.port, '/metrics')).text);
    const good = await post(port, path, chat(), secure);
    assert.ok(good.complete && good.text === body);
    notify = false;
    const broken = await post(port, path, chat(), secure).catch((error) => ({ complete: false, error }));
    assert.ok(!broken.complete, 'the client sees that it is cut');
    await until(async () => (await outcomes()).value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'truncated' }) === 1, 'a truncated attempt');
    framing = `Content-Length: ${body.length}\r\n`;
    const sized = await post(port, path, chat(), secure);
    assert.ok(sized.complete && sized.text === body, 'a length is enough');
    await until(async () => (await outcomes()).value('nexus_backend_attempts_total', { backend: 'b1', outcome: 'ok' }) === 2, 'two whole attempts');
  });
});

group('tls to backends', () => {
  test('connections are kept, and new ones resume; both are counted', async (t) => {
    const { nexus, port, mock, secure } = await over_tls(t, { server: { threads: 1 }, backend_options: { secure: {} } });
    for (let i = 0; i < 5; i++) assert.equal((await post(port, path, chat(), secure)).status, 200);
    assert.equal(new Set(mock.requests.map((r) => r.connection.number)).size, 1);
    for (const c of mock.connections) c.socket.destroy();
    assert.equal((await post(port, path, chat(), secure)).status, 200);
    await until(async () => await handshakes(nexus, 'backend', 'resumed') === 1, 'one that resumed');
  });

  const faults = [
    ['expired', () => make_certificate(expired), /its certificate CN=localhost expired on \d{4}-\d\d-\d\d/],
    ['for another name', () => make_certificate({ names: ['DNS:gpu.example.org'] }), /its certificate is for gpu\.example\.org, not for 127\.0\.0\.1: set tls_name/],
    ['of an unknown issuer', () => make_certificate({ by: make_authority('Somebody else') }), /the issuer of its certificate is unknown: CN=Somebody else; set tls_ca/],
    ['self-signed', () => make_authority('alone', ['IP:127.0.0.1']), /its certificate is self-signed/],
  ];
  for (const [what, make, words] of faults) {
    test(`a certificate that is ${what}: check, log and counts say so, and no prompt is sent`, async (t) => {
      if_openssl(t);
      const { pem, key } = make();
      const shown = { cert: fs.readFileSync(pem), key: fs.readFileSync(key) };
      const { nexus, port, mock, secure } = await over_tls(t, { backend_options: { secure: shown }, ready: 'up' });
      await nexus.logged(/backend is unhealthy/);
      assert.match(nexus.log(), words);
      assert.equal((await post(port, path, chat(), secure)).status, 503);
      const check = await run_nexus(['check', nexus.conf_path]);
      assert.equal(check.code, 1);
      assert.match(check.stdout, words);
      assert.ok(await handshakes(nexus, 'backend', 'certificate') >= 1);
      assert.equal(mock.requests.length + mock.probes.length, 0);
      nexus.reload({ backends: [{ name: 'b1', url: mock.url, tls_verify: 'no' }] });
      await nexus.logged(/the backend's certificate is not verified \(tls_verify = no\)/);
      await until(async () => (await post(nexus.port, path, chat())).status === 200, 'it is served without verification');
    });
  }

  test('tls_name, the host\'s bundle (SSL_CERT_FILE), and a certificate for the backend', async (t) => {
    if_openssl(t);
    const named = make_certificate({ names: ['DNS:gpu.example.org'] });
    const show = ({ pem, key }) => ({ cert: fs.readFileSync(pem), key: fs.readFileSync(key) });
    const mock = await start_backend(t, { secure: { ...show(named), requestCert: true, rejectUnauthorized: false } });
    const client = make_certificate({ name: 'nexus', names: [] });
    const backend = { name: 'b1', url: mock.url, tls_name: 'gpu.example.org', tls_certificate: client.pem, tls_key: client.key };
    const nexus = await start_nexus(t, { backends: [backend] }, { env: { SSL_CERT_FILE: authority().pem } });
    assert.equal((await post(nexus.port, path, chat())).status, 200);
    const socket = mock.requests[0].connection.socket;
    assert.equal(socket.servername, 'gpu.example.org');
    assert.equal(socket.getPeerCertificate().subject.CN, 'nexus');
    assert.equal(mock.requests[0].headers.get('host'), `127.0.0.1:${mock.port}`);
  });

  test('a backend that speaks in clear on an https url, and one that speaks TLS on an http url, are told in words', async (t) => {
    if_openssl(t);
    const refuse = (answer) => new Promise((done) => {
      const server = net.createServer((socket) => socket.on('error', () => {}).once('data', () => socket.end(answer)));
      server.listen(0, '127.0.0.1', () => done(server));
      t.after(() => server.close());
    });
    const [clear, secure] = (await Promise.all([refuse('HTTP/1.1 400 Bad Request\r\n\r\n'), refuse('\x15\x03\x01\x00\x02\x02\x46')])).map((s) => s.address());
    const file = t.file('n.conf', `[backend clear]\nurl = https://127.0.0.1:${clear.port}\ntls_ca = ${authority().pem}\n[backend secure]\nurl = http://127.0.0.1:${secure.port}\n`);
    const check = await run_nexus(['check', file]);
    assert.equal(check.code, 1);
    assert.match(check.stdout, /clear .*it does not speak TLS on this port: use http:\/\/ if that is meant/);
    assert.match(check.stdout, /secure .*it speaks TLS on this port: use https:/);
  });
});

group('tls and reloads', () => {
  test('a new certificate is shown to new connections while a stream goes on; an unfit one is refused and named', async (t) => {
    if_openssl(t);
    const [first, second, old] = [make_certificate(), make_certificate(), make_certificate(expired)];
    const file = t.file('c.pem', fs.readFileSync(first.both));
    const { nexus, port, mock, conf } = await over_tls(t, { server: { tls_certificate: file, tls_key: undefined } });
    const seen = async () => within(5_000, new Promise((done, fail) => {
      const socket = tls.connect({ port, host: '127.0.0.1', ca: fs.readFileSync(authority().pem), servername: 'localhost' }, () => {
        done(socket.getPeerCertificate().fingerprint256);
        socket.destroy();
      });
      socket.on('error', fail);
    }), 'a certificate');
    let reply_of_stream;
    mock.answer = (request, reply) => {
      reply.stream();
      reply.piece(sse(chat_chunk('m1', 'first', {}, true)));
      reply_of_stream = reply;
    };
    const client = await RawClient.connect(port, { secure: {} });
    t.after(() => client.close());
    client.send('POST', path, {}, chat('m1', { stream: true }));
    await client.head();
    assert.match((await client.piece()).toString(), /first/);
    assert.equal(await seen(), fingerprint(first.pem));
    fs.writeFileSync(file, fs.readFileSync(second.both));
    nexus.reload(conf);
    await until(async () => await seen() === fingerprint(second.pem), 'the new certificate');
    reply_of_stream.piece(sse('[DONE]'));
    reply_of_stream.finish();
    assert.match((await client.piece()).toString(), /DONE/);
    for (const [text, words] of [[fs.readFileSync(old.both), /nexus-\d+\.conf:\d+: tls_certificate: \S*c\.pem: the certificate localhost expired on/],
                                 [Buffer.concat([fs.readFileSync(first.pem), fs.readFileSync(second.key)]), /certificate and private key do not belong together/],
                                 ['nothing', /expected PEM texts/]]) {
      fs.writeFileSync(file, text);
      nexus.reload(conf);
      await nexus.logged(words);
      assert.equal(await seen(), fingerprint(second.pem), 'the old one stays');
    }
    const page = parse_metrics((await get(nexus.port, '/metrics')).text);
    assert.equal(page.value('nexus_config_last_reload_successful'), 0);
    const expiry = page.value('nexus_tls_certificate_expiry_timestamp_seconds', { certificate: 'localhost' });
    assert.ok(Math.abs(expiry - Date.now() / 1000 - 100 * 86_400) < 86_400, `expires in 100 days: ${expiry}`);
  });

  test('a reload without tls_listen, which needs a restart, keeps its certificate: no port of TLS ever speaks in clear', async (t) => {
    if_openssl(t);
    const { nexus, port, conf } = await over_tls(t, { server: { tls_client_ca: authority().pem } });
    const in_clear = async () => (await get(port, '/v1/models')).status;
    assert.equal(await in_clear(), 400);
    for (let i = 0; i < 2; i++) {   // the second compares with what the first has kept
      nexus.stderr = '';
      nexus.reload({ ...conf, server: {}, aliases: { [`a${i}`]: 'm1' } });
      await nexus.logged(/reloaded, except: tls_listen \(needs a restart; still 127\.0\.0\.1:\d+\)/);
      assert.equal(await in_clear(), 400);
      const { both } = make_certificate({ name: 'alice' });
      const secure = { ca: fs.readFileSync(authority().pem), servername: 'localhost' };
      assert.equal((await get(port, '/v1/models', { secure: { ...secure, cert: fs.readFileSync(both), key: fs.readFileSync(both) } })).status, 200);
      await assert.rejects(get(port, '/v1/models', { secure }));   // a client needs its certificate as before
    }
  });

  test('a certificate\'s file that has the private key too must not be readable by everyone', async (t) => {
    if_openssl(t);
    const { both } = make_certificate();
    fs.chmodSync(both, 0o644);
    const { nexus } = await over_tls(t, { server: { tls_certificate: both, tls_key: undefined } });
    await nexus.logged(/a file with keys can be read by every user of this host: chmod o-r file=\S+/);
  });

  test('an expired certificate is used at the start, with a warning; nexus -t refuses it; one that expires soon is warned of', async (t) => {
    if_openssl(t);
    const old = make_certificate(expired);
    const soon = make_certificate({ days: 5, names: ['DNS:soon.example.org'] });
    const { nexus, port, conf } = await over_tls(t, { server: { tls_certificate: [old.both, soon.both], tls_key: undefined } });
    await nexus.logged(/a certificate of the listeners has expired.*certificate=localhost/);
    await nexus.logged(/a certificate of the listeners expires soon.*certificate=soon\.example\.org/);
    assert.equal((await get(port, '/health', { secure: { rejectUnauthorized: false } })).status, 200);
    const tested = await run_nexus(['-t', nexus.conf_path]);
    assert.equal(tested.code, 1);
    assert.match(tested.stderr, /the certificate localhost expired on/);
    nexus.reload({ ...conf, aliases: { other: 'm1' } });   // the one in use keeps nobody from changing the rest
    await nexus.logged(/reloaded.*changed="?\[aliases\] other/);
  });

  test('openssl.cnf is not read: one that would load a provider changes nothing', async (t) => {
    if_openssl(t);
    const conf = t.file('openssl.cnf', 'openssl_conf = a\n[a]\nproviders = p\n[p]\nlegacy = l\ndefault = d\n[l]\nactivate = 1\n[d]\nactivate = 1\n');
    const mock = await start_backend(t, { secure: {} });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock }] }, { env: { OPENSSL_CONF: conf } });
    assert.equal((await post(nexus.port, path, chat())).status, 200);
  });
});
