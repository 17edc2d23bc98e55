// The rig itself: what is meant to notice a fault is shown one, and must notice it.
import net from 'node:net';
import { RawClient, assert, group, parse_metrics, post, sse_events, start_backend, test, chat, chunked_bytes, request_bytes, within } from './harness.mjs';

// A server that answers whatever comes with these bytes, then closes.
async function canned(t, bytes, end = 'end') {
  const server = net.createServer((s) => { s.on('error', () => {}); s.once('data', () => { s.write(bytes, () => s[end]()); }); });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  t.after(() => server.close());
  return server.address().port;
}

const head = '# HELP a_total x\n# TYPE a_total counter\n';
const histogram = (count, inf, half = 1) => `# HELP h x\n# TYPE h histogram\nh_bucket{le="1"} ${half}\nh_bucket{le="+Inf"} ${inf}\nh_sum 1.5\nh_count ${count}\n`;

group('the rig', () => {
  const bad_pages = [
    ['no line feed at its end', `${head}a_total 1`], ['a sample without its family', 'a_total 1\n'], ['a series twice', `${head}a_total{x="1"} 1\na_total{x="1"} 2\n`],
    ['a series twice, labels turned about', `${head}a_total{x="1",y="2"} 1\na_total{y="2",x="1"} 2\n`], ['a family twice', `${head}a_total 1\n${head}`],
    ['a family torn apart', `${head}a_total{x="1"} 1\n# HELP b x\n# TYPE b gauge\nb 1\na_total{x="2"} 1\n`], ['no number', `${head}a_total one\n`], ['an open quote', `${head}a_total{x="1} 1\n`],
    ['a _count that is not +Inf', histogram(3, 2)], ['buckets that fall', histogram(2, 2, 3)], ['a negative counter', `${head}a_total -1\n`], ['TYPE without HELP', '# TYPE a_total counter\na_total 1\n'],
  ];
  for (const [what, text] of bad_pages) test(`the reader of /metrics refuses ${what}`, () => assert.throws(() => parse_metrics(text)));

  test('the reader of /metrics reads a good page', () => {
    const page = parse_metrics(`${head}a_total{x="a\\"b\\\\c\\nd"} 3\n${histogram(2, 2)}`);
    assert.equal(page.value('a_total', { x: 'a"b\\c\nd' }), 3);
    assert.equal(page.value('h_count'), 2);
  });

  const cuts = [
    ['a body shorter than its length', 'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345', false], ['chunks without the last', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n', false],
    ['chunks cut within the last', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n', false], ['a whole chunked body', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n', true],
    ['a body that the end of the connection ends', 'HTTP/1.1 200 OK\r\n\r\nabc', true],
  ];
  for (const [what, bytes, complete] of cuts) {
    test(`the client tells ${complete ? 'as whole' : 'as cut'} ${what}`, async (t) => {
      const r = await post(await canned(t, bytes), '/', {});
      assert.equal(r.complete, complete);
    });
  }

  test('the client refuses a response with two framings, a bad chunk size, or no HTTP', async (t) => {
    for (const bytes of ['HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n', 'HTTP/1.1 200 OK\r\nX : y\r\n\r\n', 'hello\r\n\r\n']) {
      await assert.rejects(post(await canned(t, bytes), '/', {}));
    }
  });

  test('the mock backend keeps the exact bytes of a request, chunked or not, and says when its connection ended', async (t) => {
    const backend = await start_backend(t);
    const client = await RawClient.connect(backend.port);
    const sent = [request_bytes('POST', '/v1/chat/completions', { 'X-A': 'b' }, chat()),
                  Buffer.concat([request_bytes('POST', '/v1/chat/completions', { 'Transfer-Encoding': 'chunked' }), chunked_bytes(Buffer.from(JSON.stringify(chat())), [5, 1], { extension: ';x' })])];
    for (const bytes of sent) {
      client.write(bytes.subarray(0, 40));
      await new Promise((done) => setTimeout(done, 5));
      client.write(bytes.subarray(40));
      assert.equal((await client.response()).status, 200);
    }
    assert.ok(backend.requests[0].raw.equals(sent[0]));
    assert.ok(backend.requests[1].raw.equals(sent[1]));
    assert.deepEqual(backend.requests[1].json, chat());
    const left = performance.now();
    client.reset();
    await within(1_000, backend.connections[0].ended, 'the end seen');
    assert.ok(backend.connections[0].ended_at >= left);
  });

  test('events are cut at blank lines, and what none ended is the rest', () => {
    assert.deepEqual(sse_events('data: a\n\n: c\r\n\r\ndata: b').data, ['a', '']);
    assert.equal(sse_events('data: a\n\ndata: b').rest, 'data: b');
  });
});
