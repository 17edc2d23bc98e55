// The status page at /: what it is without a script, and what a browser makes of it.
import { Browser, chromium } from './browser.mjs';
import { assert, chat, free_port, get, group, post, request, sleep, start_backend, start_nexus, test, until } from './harness.mjs';

const hostile = ['<img src=x onerror=alert(1)>', '</script><script>alert(2)</script>', '"\'&amp;', 'a\u001b[2J\u202eb', '123 -gpt', '模型🦙'];

// Hostile names shown as the page shows them.
const shown = (name) => name.replace('\u001b', '\\u001b').replace('\u202e', '\\u202e');

async function fleet(t, conf = {}) {
  const first = await start_backend(t, { models: ['m1', ...hostile] });
  const second = await start_backend(t, { models: ['m1', 'm2'] });
  const down = await free_port();
  const nexus = await start_nexus(t, {
    health: { interval: '500ms' }, ...conf,
    backends: [{ name: 'first', mock: first }, { name: 'second:1', mock: second }, { name: 'gone', url: `http://127.0.0.1:${down}`, type: 'generic', models: 'm9' }],
  }, { ready: 'up' });
  await until(async () => (await get(nexus.port, '/health')).json.backends.healthy === 2, 'two backends healthy');
  return nexus;
}

async function load(nexus, count) {
  const models = ['m1', 'm2', ...hostile, 'nobody'];
  await Promise.all(Array.from({ length: count }, (_, i) => post(nexus.port, '/v1/chat/completions', chat(models[i % models.length], { stream: i % 2 === 0 }))));
}

// What the page shows, as text.
const page_texts = `(() => {
  const text = (id) => document.getElementById(id).textContent;
  const rows = (id) => [...document.getElementById(id).rows].map((row) => ({
    name: row.querySelector('bdi').textContent, state: row.querySelector('.state')?.textContent ?? '',
    cells: Object.fromEntries([...row.cells].slice(1).map((cell) => [cell.dataset.title, cell.querySelector('b').textContent])),
    lines: row.querySelectorAll('svg').length,
  }));
  const table = (id) => (document.getElementById(id).checkVisibility() ? rows(id) : null);
  return { title: document.title, state: text('state'), total: text('total'), success: text('success'), errors: text('errors'),
           live: text('live'), models: text('model_count'), backends: rows('backends'), rows: rows('models'), keys: table('keys'),
           images: document.images.length, scripts: document.scripts.length, wide: document.documentElement.scrollWidth };
})()`;

function assert_equals_stats(page, stats) {
  assert.deepEqual([page.total, page.success, page.errors].map(Number), [stats.requests.total, stats.requests.success, stats.requests.errors]);
  const row = (e) => ({ name: shown(e.id ?? e.name), requests: e.requests, errors: e.errors });
  const of_page = (r) => ({ name: r.name, requests: Number(r.cells.Requests), errors: Number(r.cells.Errors) });
  assert.deepEqual(page.backends.map(of_page), stats.backends.map(row));
  assert.deepEqual(page.rows.map(of_page), stats.models.map(row));
  assert.deepEqual(page.backends.map((r) => [r.name, r.state.replace(/ (\d+[dhms] ?)+$/, '')]), stats.backends.map((b) => [b.id, b.healthy ? 'up' : 'down']));
  assert.deepEqual(page.backends.map((r) => r.cells.Pending), stats.backends.map((b) => String(b.pending)));
}

const down = { name: 'down', url: 'http://127.0.0.1:1' };

group('status page', () => {
  test('GET / is one HTML document with a strict policy, under 40 kB', async (t) => {
    const nexus = await start_nexus(t, { backends: [down] }, { ready: 'up' });
    const page = await get(nexus.port, '/');
    assert.equal(page.status, 200);
    assert.equal(page.headers.get('content-type'), 'text/html; charset=utf-8');
    const policy = page.headers.get('content-security-policy');
    assert.match(policy, /default-src 'none'/);
    assert.doesNotMatch(policy, /unsafe|\*/);
    assert.equal(page.headers.get('cache-control'), 'no-store');
    assert.equal(page.headers.get('x-content-type-options'), 'nosniff');
    assert.ok(Buffer.byteLength(page.text) < 40_000, `${Buffer.byteLength(page.text)} bytes`);
    assert.match(page.text, /^<!doctype html>/);
    const head = await request(nexus.port, 'HEAD', '/');
    assert.equal(head.status, 200);
    assert.equal(head.text, '');
  });

  test('it is served where /metrics is, and requires a key if that does', async (t) => {
    const metrics_port = await free_port();
    const apart = await start_nexus(t, { server: { metrics_listen: `127.0.0.1:${metrics_port}` }, backends: [down] }, { ready: 'no' });
    await until(async () => (await get(metrics_port, '/health')).status > 0, 'nexus up');
    assert.equal((await get(metrics_port, '/')).status, 200);
    assert.equal((await get(apart.port, '/')).status, 404);
    const keyed = await start_nexus(t, { server: { api_keys_file: t.file('keys', 'me sk-status-key\n') }, backends: [down] }, { ready: 'up' });
    assert.equal((await get(keyed.port, '/')).status, 401);
    const off = await start_nexus(t, { metrics: { enabled: 'no' }, backends: [down] }, { ready: 'up' });
    assert.equal((await get(off.port, '/')).status, 503);
  });

  test('reading it counts as no request', async (t) => {
    const nexus = await start_nexus(t, { backends: [down] }, { ready: 'up' });
    for (let i = 0; i < 3; i++) await get(nexus.port, '/');
    assert.equal((await get(nexus.port, '/v1/stats')).json.requests.total, 0);
  });

  test('in a browser its numbers equal /v1/stats, hostile names are text, and the console stays empty', { limit_ms: 90_000 }, async (t) => {
    if (!chromium()) t.skip('chromium is not installed');
    const nexus = await fleet(t);
    await load(nexus, 27);
    const browser = await Browser.start(t);
    await browser.view({ width: 1280 });
    await browser.open(`http://127.0.0.1:${nexus.port}/`);
    assert_equals_stats(await browser.evaluate(page_texts), (await get(nexus.port, '/v1/stats')).json);   // as it came
    await load(nexus, 9);
    await until(async () => (await browser.evaluate(page_texts)).total === '36', 'the page drawn anew', 15_000);
    const page = await browser.evaluate(page_texts);
    assert_equals_stats(page, (await get(nexus.port, '/v1/stats')).json);
    assert.equal(page.state, '2 of 3 backends healthy');
    assert.equal(page.title, 'Nexus: 2 of 3 healthy');
    assert.match(page.live, /^live/);
    assert.ok(page.backends.every((row) => row.lines === 8) && page.rows.every((row) => row.lines === 6), 'each number has its line');
    const first = page.backends.find((row) => row.name === 'first');
    assert.match(first.cells.p50, /ms|s$/, 'quantiles of the last seconds');
    assert.match(await browser.evaluate("document.getElementById('all_own').textContent"), /^\d+(\.\d+)? ms$/, 'what Nexus itself took');
    assert.equal(await browser.evaluate("document.getElementById('all_waited').textContent"), '-', 'nobody waited');
    assert.deepEqual([page.images, page.scripts], [0, 1]);
    assert.deepEqual(browser.complaints, []);
    for (const width of [1280, 390]) {
      await browser.view({ width });
      assert.ok(await browser.evaluate('document.documentElement.scrollWidth') <= width, `it scrolls sideways at ${width}`);
    }
  });

  test('with named keys it has a table of what each uses, with scripts and without', { limit_ms: 90_000 }, async (t) => {
    if (!chromium()) t.skip('chromium is not installed');
    const keys = { alice: 'sk-alice-0123456789', bob: 'sk-bob-0123456789' };
    const file = t.file('keys', Object.entries(keys).map((pair) => pair.join(' ') + '\n').join(''));
    const pages = await free_port();   // where a browser needs no key
    const nexus = await start_nexus(t, { server: { api_keys_file: file, metrics_listen: `127.0.0.1:${pages}` }, queue: { size: 9 }, backends: [{ name: 'e', type: 'echo', max_pending: 1 }] }, { ready: 'no' });
    await until(async () => (await get(pages, '/health').catch(() => ({}))).status === 200, 'a healthy backend');
    const ask = async (name) => assert.equal((await post(nexus.port, '/v1/chat/completions', chat('echo'), { headers: { Authorization: `Bearer ${keys[name]}` } })).status, 200);
    const browser = await Browser.start(t);
    await browser.view({ width: 1280, scripts: false });
    const url = `http://127.0.0.1:${pages}/`;
    const stats = async () => (await get(pages, '/v1/stats')).json.keys;
    const shows = async (what) => {
      const expected = (await stats()).map((k) => [k.name, k.pending, k.requests, k.errors].map(String));
      const read = async () => ((await browser.evaluate(page_texts)).keys ?? []).map((r) => [r.name, r.cells.Pending, r.cells.Requests, r.cells.Errors]);
      await until(async () => JSON.stringify(await read()) === JSON.stringify(expected), what, 15_000);
    };
    const open = async (scripts) => {
      await browser.view({ width: 1280, scripts });
      await browser.open(url);
    };
    await open(true);
    assert.equal((await browser.evaluate(page_texts)).keys, null, 'no table before the first request');
    await Promise.all(['alice', 'alice', 'alice', 'bob'].map(ask));   // on one place: three wait
    await until(async () => (await stats()).reduce((sum, k) => sum + k.requests, 0) === 4, 'four requests counted');
    await shows('the table drawn');
    const waits = (await stats()).filter((k) => k.queued > 0).map((k) => k.name);
    assert.ok(waits.length > 0);
    const mean = async (name) => (await browser.evaluate(page_texts)).keys.find((r) => r.name === name).cells['Mean wait'];
    for (const name of waits) assert.match(await mean(name), /^[\d.]+ m?s$/);
    assert.ok((await browser.evaluate(page_texts)).keys.every((row) => row.lines === 4), 'each number has its line');
    assert.deepEqual(browser.complaints, []);
    await browser.view({ width: 1280, scripts: false });
    await browser.open(url);
    await sleep(300);
    await browser.view({ width: 1280, scripts: true });   // to be asked; the page's own has not run
    await shows('the table as it came');
    for (const name of waits) assert.match(await mean(name), /^[\d.]+ m?s$/);
    await browser.view({ width: 390 });
    assert.ok(await browser.evaluate('document.documentElement.scrollWidth') <= 390, 'it scrolls sideways at 390');
  });

  test('its policy lets no other script run, and it says when the server is gone', { limit_ms: 90_000 }, async (t) => {
    if (!chromium()) t.skip('chromium is not installed');
    const nexus = await start_nexus(t, { backends: [{ name: 'e', type: 'echo' }] });
    const browser = await Browser.start(t);
    await browser.open(`http://127.0.0.1:${nexus.port}/`);
    const ran = await browser.evaluate(`(() => {
      const script = document.createElement('script');
      script.textContent = 'window.intruder = 1';
      document.body.append(script);
      return 'intruder' in window;
    })()`);
    assert.equal(ran, false);
    await until(() => browser.complaints.some((c) => /Content Security Policy/.test(c)), 'the refusal on the console');
    await nexus.stop();
    await until(async () => /^no data since/.test(await browser.evaluate("document.getElementById('live').textContent")), 'the page saying so', 15_000);
  });

  test('with scripts off it is a table with the totals of /v1/stats', { limit_ms: 60_000 }, async (t) => {
    if (!chromium()) t.skip('chromium is not installed');
    const nexus = await fleet(t, { metrics: { labels: 'raw' } });
    await load(nexus, 18);
    const browser = await Browser.start(t);
    await browser.view({ width: 1280, scripts: false });
    await browser.open(`http://127.0.0.1:${nexus.port}/`);
    await sleep(300);
    await browser.view({ width: 1280, scripts: true });   // to be asked; the page's own has not run
    const page = await browser.evaluate(page_texts);
    const stats = (await get(nexus.port, '/v1/stats')).json;
    assert_equals_stats(page, stats);
    assert.equal(page.live, '');
    const tokens = (rows) => rows.map((r) => Number(r.cells['Tokens out']));
    assert.deepEqual(tokens(page.backends), stats.backends.map((b) => b.completion_tokens));
    assert.deepEqual(tokens(page.rows), stats.models.map((m) => m.completion_tokens));
    assert.ok(tokens(page.rows).some((count) => count > 0));
    await browser.view({ width: 390 });
    assert.ok(await browser.evaluate('document.documentElement.scrollWidth') <= 390, 'it scrolls sideways at 390');
    assert.ok(page.rows.some((row) => row.name === hostile[0]));
    assert.deepEqual(browser.complaints, []);
  });
});
