// harness.mjs: everything that a file of tests imports, from one place.
import assert from 'node:assert/strict';
import { get } from './client.mjs';
import { parse_metrics } from './metrics.mjs';
import { until } from './runner.mjs';

export { assert };
export * from './backend.mjs';
export * from './certificates.mjs';
export * from './client.mjs';
export * from './daemon.mjs';
export * from './metrics.mjs';
export { group, settings, sleep, test, until, within } from './runner.mjs';

// Insists on one of Nexus's own errors: the status, the OpenAI shape, and a message fit for a person. `name` is what a
// program goes by: its `code`, or its `type` where that is the general word (503 has a code for each cause).
export function assert_error(response, status, name) {
  assert.equal(response.status, status, `status ${response.status}, body ${response.text.slice(0, 300)}`);
  assert.match(response.headers.get('content-type'), /^application\/json/);
  const { error } = response.json;
  assert.deepEqual(Object.keys(error).sort(), ['code', 'message', 'param', 'type']);
  assert.equal(typeof error.message, 'string');
  assert.ok(error.message.length >= 15, `too short a message: ${error.message}`);
  assert.equal(typeof error.type, 'string');
  if (name !== undefined) assert.ok(error.code === name || error.type === name, `neither code nor type is ${name}: ${response.text}`);
  assert.ok(response.complete, 'the error answer is whole');
  return error;
}

// Numbers that look random and come again with the same seed.
export function seeded(seed) {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
  return { next, below: (n) => Math.floor(next() * n), pick: (list) => list[Math.floor(next() * list.length)] };
}

// The page of the Nexus at `port` once it counts as many requests as were answered: a client may have the last byte of
// its answer a moment before the request is counted.
export async function page_after(requests, port) {
  let page;
  await until(async () => (page = parse_metrics((await get(port, '/metrics')).text)).sum('nexus_requests_total') === requests,
              () => `${requests} requests counted (${page?.sum('nexus_requests_total')})`);
  return page;
}

export const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];

export const chat = (model = 'm1', more = {}) => ({ model, messages: [{ role: 'user', content: 'Hi' }], ...more });
