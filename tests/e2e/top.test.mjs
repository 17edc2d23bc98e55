// nexus top: one page of text where it is piped, a page that refreshes on a terminal, and never a terminal left behind.
import { spawn, spawnSync } from 'node:child_process';
import { assert, chat, free_port, get, group, pair, post, run_nexus, settings, start_backend, start_nexus, test, until, within } from './harness.mjs';

const hostile = '\u001b]0;owned\u0007<b>\nx';

group('nexus top', () => {
  test('piped, it prints one page whose numbers are those of /v1/stats', async (t) => {
    const backend = await start_backend(t, { models: ['m1', hostile] });
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] });
    for (let i = 0; i < 5; i++) await post(nexus.port, '/v1/chat/completions', chat('m1', { stream: i % 2 === 0 }));
    await post(nexus.port, '/v1/chat/completions', chat('nobody'));
    const r = await run_nexus(['top', `http://127.0.0.1:${nexus.port}`]);
    assert.equal(r.code, 0, r.stderr);
    const stats = (await get(nexus.port, '/v1/stats')).json;
    assert.match(r.stdout, new RegExp(`requests ${stats.requests.total} +errors ${stats.requests.errors} `));
    assert.match(r.stdout, /backends 1 of 1 healthy +models 2/);
    const line = r.stdout.split('\n').find((l) => l.startsWith('b1 '));
    assert.match(line, new RegExp(`^b1 +up +0 +0 .* ${stats.backends[0].requests} +${stats.backends[0].errors}$`));
    assert.doesNotMatch(r.stdout, /[\u0000-\u0009\u000b-\u001f\u007f]/, 'a name reached the terminal as it was');
    assert.ok(r.stdout.includes('\\u001b]0;owned\\u0007<b>\\nx'));
  });

  test('it shows the rate of what goes on meanwhile', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] });
    let running = true;
    const load = (async () => { while (running) await post(nexus.port, '/v1/chat/completions', chat()); })();
    const r = await run_nexus(['top', `http://localhost:${nexus.port}/`]);
    running = false;
    await load;
    assert.equal(r.code, 0, r.stderr);
    const rate = /^(\S+) req\/s/m.exec(r.stdout);
    assert.ok(Number(rate?.[1]) > 1, r.stdout);
  });

  test('with keys configured it takes one from NEXUS_API_KEY, and says so where it is missing', async (t) => {
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { server: { api_keys_file: t.file('keys', 'me sk-top-secret\n') }, backends: [{ name: 'b1', mock: backend }] });
    const url = `http://127.0.0.1:${nexus.port}`;
    assert.equal((await run_nexus(['top', url], { env: { NEXUS_API_KEY: 'sk-top-secret' } })).code, 0);
    assert.equal((await run_nexus(['top', url.slice('http://'.length)], { env: { NEXUS_API_KEY: 'sk-top-secret' } })).code, 0);
    const without = await run_nexus(['top', url]);
    assert.equal(without.code, 1);
    assert.match(without.stderr, /NEXUS_API_KEY/);
  });

  test('with named keys it has a table of what each uses, on a screen of 80 by 24 too', async (t) => {
    const backend = await start_backend(t);
    const keys = { alice: 'sk-alice-0123456789', bob: 'sk-bob-0123456789' };
    const file = t.file('keys', Object.entries(keys).map((pair) => pair.join(' ') + '\n').join(''));
    const nexus = await start_nexus(t, { server: { api_keys_file: file }, backends: [{ name: 'b1', mock: backend }] });
    const as = (name) => ({ headers: { Authorization: `Bearer ${keys[name]}` } });
    for (const name of ['alice', 'alice', 'bob']) assert.equal((await post(nexus.port, '/v1/chat/completions', chat(), as(name))).status, 200);
    const url = `http://127.0.0.1:${nexus.port}`, env = { NEXUS_API_KEY: keys.bob };
    const r = await run_nexus(['top', url], { env });
    const stats = (await get(nexus.port, '/v1/stats', as('bob'))).json;
    assert.match(r.stdout, /\nKEY +PENDING +REQ\/S +ERR\/S +WAIT +TOK\/S +REQUESTS +ERRORS +TOKENS\n/);
    for (const key of stats.keys) {
      const tokens = key.prompt_tokens + key.completion_tokens;
      assert.ok(tokens > 0);
      assert.match(r.stdout, new RegExp(`\\n${key.name} +0 .* - .* ${key.requests} +0 +${tokens}\\n`));
    }
    assert.deepEqual(stats.keys.map((key) => [key.name, key.requests]), [['alice', 2], ['bob', 1]]);
    if (spawnSync('script', ['--version']).error) t.skip('script(1), which makes a terminal, is not installed');
    const child = spawn('script', ['-qec', `stty rows 24 cols 80; exec '${settings.nexus}' top ${url}`, '/dev/null'], { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, ...env, TERM: 'xterm', SHELL: '/bin/sh' } });
    t.after(() => child.kill('SIGKILL'));
    let screen = '';
    child.stdout.on('data', (d) => { screen += d; });
    await until(() => /\n\s*bob .*J/s.test(screen), () => `the keys on ${JSON.stringify(screen)}`);
    child.stdin.write('q');
    const lines = screen.slice(screen.indexOf('\u001b[H')).split('\u001b[J')[0].replaceAll(/\u001b\[./g, '').split(/\r*\n/);
    assert.ok(lines.length <= 24 && lines.every((line) => line.length <= 80), JSON.stringify(lines));
  });

  test('where nobody answers, or other pages are, it says so and exits 1; a URL that is none exits 2', async (t) => {
    const r = await run_nexus(['top', `http://127.0.0.1:${await free_port()}`]);
    assert.equal(r.code, 1);
    assert.match(r.stderr, /refused/i);
    const pages = await free_port();
    const { nexus } = await pair(t, {}, { server: { metrics_listen: `127.0.0.1:${pages}` } }, { ready: 'no' });
    await until(async () => (await get(pages, '/health')).status === 200, 'the daemon up');
    const elsewhere = await run_nexus(['top', `127.0.0.1:${nexus.port}`]);
    assert.equal(elsewhere.code, 1);
    assert.match(elsewhere.stderr, /\/v1\/stats is not served here \(404\): where metrics_listen is set, give its address to nexus top/);
    assert.equal((await run_nexus(['top', `127.0.0.1:${pages}`])).code, 0);
    const bad = await run_nexus(['top', 'ftp://localhost:8000']);
    assert.equal(bad.code, 2);
    assert.match(bad.stderr, /http:\/\//);
  });

  test('on a terminal it takes the other screen, q gives the old one back', async (t) => {
    if (spawnSync('script', ['--version']).error) t.skip('script(1), which makes a terminal, is not installed');
    const backend = await start_backend(t);
    const nexus = await start_nexus(t, { backends: [{ name: 'b1', mock: backend }] });
    for (const [what, stop] of [['q', (child) => child.stdin.write('q')], ['Ctrl-C', (child) => child.stdin.write('\u0003')]]) {
      const child = spawn('script', ['-qec', `exec '${settings.nexus}' top http://127.0.0.1:${nexus.port}`, '/dev/null'], { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, TERM: 'xterm', SHELL: '/bin/sh' } });
      t.after(() => child.kill('SIGKILL'));
      let screen = '';
      child.stdout.on('data', (d) => { screen += d; });
      const exited = new Promise((done) => child.on('close', done));
      await until(() => screen.includes('backends 1 of 1 healthy'), () => `the page on ${JSON.stringify(screen)}`);
      assert.ok(screen.includes('\u001b[?1049h'));
      stop(child);
      assert.equal(await within(5_000, exited, `${what} to end it`), 0);
      assert.ok(screen.trimEnd().endsWith('\u001b[?1049l'), JSON.stringify(screen.slice(-80)));
    }
  });
});
