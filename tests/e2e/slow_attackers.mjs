// slow_attackers.mjs: slow clients in a process of their own, so that their work does not make Nexus look slow. Its
// argument is { port, heads, bodies, readers, pagers, drip_ms } as JSON. Heads and bodies send a byte every drip_ms; readers
// request a stream and pagers many pages, and neither reads. It sends its parent `attacking` once all are connected, `over`
// with the end of each dripping client once all have ended, and, after the message `look`, the state of each reader.
import net from 'node:net';

const { port, heads, bodies, readers, pagers, drip_ms } = JSON.parse(process.argv[2]);
const post = 'POST /v1/chat/completions HTTP/1.1\r\nHost: nexus.test\r\nContent-Type: application/json\r\n';
const stream = JSON.stringify({ model: 'm1', stream: true, flood: true, messages: [{ role: 'user', content: 'Hi' }] });
const opening = {
  head: `${post}X-Slow: `,
  body: `${post}Content-Length: 20000\r\n\r\n{"model":"m1","messages":"`,
  reader: `${post}Content-Length: ${stream.length}\r\n\r\n${stream}`,
  pager: 'GET /v1/models HTTP/1.1\r\nHost: nexus.test\r\n\r\n'.repeat(40),
};
const reads = (kind) => kind !== 'reader' && kind !== 'pager';

function attack(kind) {
  return new Promise((done) => {
    const attacker = { kind, began: 0, ended: 0, text: '', error: '' };
    const socket = net.connect({ port, host: '127.0.0.1', noDelay: true });
    attacker.socket = socket;
    socket.on('error', (error) => { attacker.error = error.code; });
    socket.on('connect', () => {
      attacker.began = performance.now();
      if (!reads(kind)) socket.pause();
      socket.write(opening[kind]);
      done(attacker);
    });
    attacker.over = new Promise((over) => {
      const end = () => {
        attacker.ended ||= performance.now();
        over();
      };
      socket.on('end', end);
      socket.on('close', end);
    });
    if (reads(kind)) socket.on('data', (data) => { attacker.text += data.toString('latin1'); });
  });
}

const kinds = [...Array(heads).fill('head'), ...Array(bodies).fill('body'), ...Array(readers).fill('reader'), ...Array(pagers).fill('pager')];
const attackers = [];
const drip = setInterval(() => {
  for (const a of attackers) if (reads(a.kind) && !a.ended) a.socket.write('x');
}, drip_ms);
for (let i = 0; i < kinds.length; i += 100) attackers.push(...await Promise.all(kinds.slice(i, i + 100).map(attack)));
process.send({ attacking: attackers.length });

const dripping = attackers.filter((a) => reads(a.kind));
await Promise.all(dripping.map((a) => a.over));
clearInterval(drip);
process.send({ over: dripping.map(({ kind, began, ended, text }) => ({ kind, lasted_ms: ended - began, status: Number(text.slice(9, 12)), text: text.slice(0, 600) })) });

process.on('message', async () => {
  const reading = attackers.filter((a) => !reads(a.kind));
  for (const a of reading) {
    a.bytes = 0;
    a.tail = '';
    a.socket.on('data', (data) => {
      a.bytes += data.length;
      a.tail = data.subarray(-5).toString('latin1');
    });
    a.socket.resume();
  }
  await Promise.all(reading.map((a) => a.over));
  process.send({ readers: reading.map(({ kind, error, bytes, tail }) => ({ kind, error, bytes, tail })) });
});
process.on('disconnect', () => process.exit(0));
