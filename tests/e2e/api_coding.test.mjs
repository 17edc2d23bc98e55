// Coding tools through Nexus, headless, with a scripted server behind it: Codex by the Responses API, Claude Code by the
// Messages API. They are large, so no test installs them: one is run if it is found in PATH, or where CODEX or CLAUDE says.
import { spawn } from 'node:child_process';
import { answer_of } from './api_shapes.mjs';
import { Ledger } from './ledger.mjs';
import { assert, group, kill_at_end, start_backend, start_nexus, test, within } from './harness.mjs';
import { find_program } from './prometheus.mjs';

const find_tool = (t, name, variable) => process.env[variable] ?? find_program(name) ?? t.skip(`${name} is not installed, and ${variable} does not say where it is`);

// Runs it to its end with nothing of this user's configuration in its environment.
async function run_tool(t, binary, args, env) {
  const child = spawn(binary, args, { cwd: t.dir(), env: { PATH: process.env.PATH, HOME: t.dir(), TMPDIR: t.dir(), NO_COLOR: '1', ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  kill_at_end(child);
  let [out, err] = ['', ''];
  child.stdout.on('data', (d) => { out += d; });
  child.stderr.on('data', (d) => { err += d; });
  t.notes.push(() => `stdout: ${out.slice(-1000)} stderr: ${err.slice(-1000)}`);
  const code = await within(50_000, new Promise((done, fail) => {
    child.on('close', done);
    child.on('error', fail);
  }), `${binary} to end`);
  assert.equal(code, 0, err.slice(-600));
  return out;
}

async function gateway(t, server, path, kind) {
  const backend = await start_backend(t, { kind });
  // A turn is streamed; what the tool may ask besides gets the plain answer.
  backend.answer = (request, reply) => {
    if (request.path.includes('count_tokens')) return reply.json({ input_tokens: 14 });
    const row = answer_of(server, path, request.json.stream === true);
    return reply.body(200, row.text, { 'Content-Type': row.type });
  };
  const nexus = await start_nexus(t, { aliases: { 'claude-nexus': 'm1' }, backends: [{ name: 'b1', mock: backend }] });
  return { nexus, backend, ledger: new Ledger(nexus) };
}

group('api coding tools', () => {
  test('codex exec runs a turn', { limit_ms: 60_000 }, async (t) => {
    const codex = find_tool(t, 'codex', 'CODEX');
    const { nexus, backend, ledger } = await gateway(t, 'OpenAI', '/v1/responses', 'vllm');
    t.file('config.toml', ['model = "m1"', 'model_provider = "nexus"', '[model_providers.nexus]', 'name = "nexus"', `base_url = "http://127.0.0.1:${nexus.port}/v1"`, 'wire_api = "responses"', 'env_key = "NEXUS_KEY"', ''].join('\n'));
    const out = await run_tool(t, codex, ['exec', '--skip-git-repo-check', 'Say two words.'], { CODEX_HOME: t.dir(), NEXUS_KEY: 'sk-test' });
    assert.match(out, /One two/);
    const turns = backend.requests.filter((r) => r.path === '/v1/responses');
    assert.ok(turns.length >= 1 && turns.every((r) => r.json.model === 'm1' && r.json.stream === true));
    assert.equal(turns[0].headers.get('authorization'), 'Bearer sk-test');
    ledger.last = {};
    const counted = await ledger.read(backend.requests.length);
    assert.equal(counted.errors, undefined);
    assert.deepEqual([counted.prompt.sum, counted.completion.sum, counted.cached], [36, 87, 12].map((n) => n * turns.length));
  });

  test('claude -p runs a turn', { limit_ms: 60_000 }, async (t) => {
    const claude = find_tool(t, 'claude', 'CLAUDE');
    const { nexus, backend, ledger } = await gateway(t, 'Anthropic, all counts twice', '/v1/messages', 'vllm');
    const out = await run_tool(t, claude, ['-p', 'Say two words.', '--model', 'claude-nexus'], {
      ANTHROPIC_BASE_URL: `http://127.0.0.1:${nexus.port}`, ANTHROPIC_AUTH_TOKEN: 'sk-test', CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: '1', DISABLE_AUTOUPDATER: '1', CLAUDE_CONFIG_DIR: t.dir(), IS_SANDBOX: '1',
    });
    assert.match(out, /One two/);
    const turns = backend.requests.filter((r) => r.path.startsWith('/v1/messages') && !r.path.includes('count_tokens'));
    assert.ok(turns.length >= 1 && turns.every((r) => r.json.model === 'm1' && r.json.stream === true), JSON.stringify(backend.requests.map((r) => [r.path, r.json.model, r.json.stream])));
    assert.ok(turns.every((r) => r.headers.has('anthropic-version') && r.headers.get('authorization') === 'Bearer sk-test'));
    ledger.last = {};
    const counted = await ledger.read(backend.requests.length);
    assert.equal(counted.errors, undefined);
    assert.deepEqual([counted.prompt.sum, counted.completion.sum, counted.cached], [525, 15, 400].map((n) => n * turns.length));
  });
});
