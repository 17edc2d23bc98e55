// The answers of real servers, byte for byte: what a client gets, and what is counted of them.
import path from 'node:path';
import { Ledger } from './ledger.mjs';
import { answers } from './api_shapes.mjs';
import { RawClient, assert, group, pair, post, test } from './harness.mjs';

// Sends a row's answer: whole with its length, or in chunks of `size` bytes; `crlf`: with CRLF at the end of each line.
const sends = (row, { size = 0, crlf = false } = {}) => (_, reply) => {
  const bytes = Buffer.from(crlf ? row.text.replaceAll('\n', '\r\n') : row.text, 'latin1');
  if (!size) return reply.body(200, bytes, { 'Content-Type': row.type });
  reply.head(200, { 'Content-Type': row.type, 'Transfer-Encoding': 'chunked' });
  for (let at = 0; at < bytes.length; at += size) reply.piece(bytes.subarray(at, at + size));
  reply.finish();
  return undefined;
};
const bytes_of = (row, { crlf = false } = {}) => (crlf ? row.text.replaceAll('\n', '\r\n') : row.text);

async function counting(t, conf = {}) {
  const log_path = path.join(t.dir(), 'access.log');
  const { nexus, backend } = await pair(t, {}, { ...conf, log: { format: 'json', access: log_path } });
  return { nexus, backend, ledger: new Ledger(nexus, { log_path }) };
}

group('api counts', () => {
  test('each server’s answers pass byte for byte, and their tokens, ends and errors are counted however the bytes are cut', { limit_ms: 60_000 }, async (t) => {
    const { nexus, backend, ledger } = await counting(t);
    await ledger.read(0);
    const sent = [];
    const wrong = [];
    for (const row of answers) {
      const ways = row.streams ? [{ size: 100_000 }, { size: 7 }, { size: 61, crlf: true }] : [{}, { size: 11 }];
      for (const way of ways) {
        const note = `${row.name} ${JSON.stringify(way)}`;
        backend.answer = sends(row, way);
        const r = await post(nexus.port, row.path, JSON.stringify(row.ask), { headers: { 'X-Request-Id': `r${sent.length}` } });
        assert.equal(r.status, 200, `${note}: ${r.text}`);
        assert.equal(r.headers.get('content-type'), row.type, note);
        assert.equal(r.body.toString('latin1'), bytes_of(row, way), note);
        assert.equal(backend.requests.at(-1).body.toString(), JSON.stringify(row.ask), `${note}: the request is not changed`);
        await ledger.expect(row.path, row, note).catch((error) => wrong.push(error.message));
        sent.push({ row, note, bytes: r.body.length });
      }
    }
    assert.deepEqual(wrong, []);
    const log = await ledger.log();
    assert.equal(log.length, sent.length);
    for (const line of log) {
      const { row, note, bytes } = sent[Number(line.request_id.slice(1))];
      const seen = { path: line.path, status: line.status, error: line.error_type ?? undefined, prompt: line.prompt_tokens ?? undefined, completion: line.completion_tokens ?? undefined, bytes: line.bytes, cut: line.cut };
      assert.deepEqual(seen, { path: row.path, status: 200, error: row.error, prompt: row.prompt, completion: row.completion, bytes, cut: false }, note);
    }
  });

  test('an answer with nothing in it is an error, whatever the API, and its bytes are the client’s', async (t) => {
    const { nexus, backend, ledger } = await counting(t, { upstream: { head_delay: '0' }, health: { eject_after: 1000 }, routing: { retries: 0 } });
    await ledger.read(0);
    const rows = [['/v1/responses', 'text/event-stream', ''], ['/v1/responses', 'text/event-stream', ': keep-alive\n\n'], ['/v1/messages', 'text/event-stream', '\r\n\r\n'], ['/v1/messages', 'application/json', ''],
                  ['/api/chat', 'application/x-ndjson', ''], ['/api/chat', 'application/x-ndjson', '\n'], ['/v1/rerank', 'application/json', ''], ['/v1/audio/speech', 'audio/mpeg', ''], ['/completion', 'text/event-stream', '']];
    for (const [path, type, text] of rows) {
      backend.answer = (_, reply) => {
        reply.head(200, { 'Content-Type': type, 'Transfer-Encoding': 'chunked' });
        reply.piece(text);
        reply.finish();
      };
      const note = `${path} ${type} ${JSON.stringify(text)}`;
      const r = await post(nexus.port, path, { model: 'm1', stream: type !== 'application/json' });
      assert.equal(r.text, text, note);
      assert.equal(r.status, 200, note);
      assert.deepEqual((await ledger.read()).errors, { backend_error: 1 }, note);
    }
  });

  test('a stream that the end of its connection ends is whole, and is counted', async (t) => {
    const { nexus, backend, ledger } = await counting(t);
    await ledger.read(0);
    for (const row of answers.filter((r) => r.streams)) {
      backend.answer = (_, reply) => {
        reply.head(200, { 'Content-Type': row.type, Connection: 'close' });
        reply.raw(row.text);
        reply.fin();
      };
      const r = await post(nexus.port, row.path, JSON.stringify(row.ask));
      assert.equal(r.text, row.text, row.name);
      await ledger.expect(row.path, row, row.name);
    }
  });

  test('every event and every line is passed on as it comes, none waits for the next', async (t) => {
    const { nexus, backend } = await counting(t);
    for (const row of answers.filter((r) => r.streams && !r.error)) {
      for (const crlf of [false, true]) {
        const text = bytes_of(row, { crlf });
        const parts = row.type === 'application/x-ndjson' ? text.match(/.*?\n/gs) : text.match(/.*?\n\r?\n/gs);
        assert.equal(parts.join(''), text, row.name);
        let reply;
        const begun = new Promise((resolve) => { backend.answer = (_, r) => { reply = r; resolve(); }; });
        const client = await RawClient.connect(nexus.port);
        client.send('POST', row.path, { 'Content-Type': 'application/json' }, JSON.stringify(row.ask));
        await begun;
        reply.head(200, { 'Content-Type': row.type, 'Transfer-Encoding': 'chunked' });
        for (const [i, part] of parts.entries()) {
          reply.piece(part);
          if (i === 0) await client.head();
          let got = 0;
          while (got < part.length) got += (await client.piece(3_000)).length;
          assert.equal(got, part.length, `${row.name}, part ${i}`);
        }
        reply.finish();
        assert.equal(await client.piece(), null);
        client.close();
      }
    }
  });
});
