// ledger.mjs
// Owns:     what Nexus has counted of API requests so far, as one flat object, and the difference to the last look.
// Promises: read() returns only once as many requests are counted as were sent; of an access log, one line for each.
// Leaves:   the expected numbers to the tests.
import fs from 'node:fs';
import { assert, get, parse_metrics, until } from './harness.mjs';

// The totals of a page. `endpoints` and `errors` hold what is not zero.
export function totals(page) {
  const by = (name, label) => {
    const out = {};
    for (const s of page.select(name)) if (s.value) out[s.labels[label]] = (out[s.labels[label]] ?? 0) + s.value;
    return out;
  };
  const tokens = (type) => ({ sum: page.sum('nexus_tokens_total_sum', { type }), told: page.sum('nexus_tokens_total_count', { type }) });
  return {
    requests: page.sum('nexus_requests_total'), endpoints: by('nexus_endpoint_requests_total', 'endpoint'), errors: by('nexus_errors_total', 'error_type'),
    prompt: tokens('prompt'), completion: tokens('completion'), cached: page.sum('nexus_prompt_tokens_cached_total'),
    without_usage: page.sum('nexus_responses_without_usage_total'), without_end: page.sum('nexus_streams_without_end_total'),
  };
}

// A name as a label's value.
export const label_of = (name) => (/^\d/.test(name) ? '_' : '') + name.replace(/[^a-zA-Z0-9_]/gu, '_');

// What was added: members that did not change are left out.
export function difference(before, after) {
  if (typeof after === 'number') return after - (before ?? 0);
  const out = {};
  for (const [key, value] of Object.entries(after)) {
    const d = difference(before?.[key], value);
    if (typeof d === 'number' ? d !== 0 : Object.keys(d).length > 0) out[key] = d;
  }
  return out;
}

export class Ledger {
  // options.headers: of the requests for /metrics.
  constructor(nexus, { log_path = null, headers = {} } = {}) {
    Object.assign(this, { nexus, log_path, headers });
    this.sent = 0;
    this.last = null;
  }
  async page() { return parse_metrics((await get(this.nexus.port, '/metrics', { headers: this.headers })).text); }
  // What was counted since the last look, when `sent` more requests have been answered.
  async read(sent = 1) {
    this.last ??= totals(await this.page());
    this.sent += sent;
    let now;
    await until(async () => (now = totals(await this.page())).requests === this.sent, () => `${this.sent} requests counted (${now?.requests})`);
    const added = difference(this.last, now);
    this.last = now;
    return added;
  }
  // Insists on the counts of one request that `endpoint` answered; `told`: as a row of api_shapes.mjs.
  async expect(endpoint, { prompt, completion, cached, streams, ends = true, error, silent }, note) {
    const wanted = { requests: 1, endpoints: { [label_of(endpoint)]: 1 } };
    if (error) wanted.errors = { [error]: 1 };
    for (const [type, count] of Object.entries({ prompt, completion })) if (count !== undefined) wanted[type] = { ...(count && { sum: count }), told: 1 };
    if (cached) wanted.cached = cached;
    if (prompt === undefined && completion === undefined && !silent && !error) wanted.without_usage = 1;
    if (streams && !ends && !error) wanted.without_end = 1;
    assert.deepEqual(await this.read(), wanted, note);
  }
  async log() {
    let lines = [];
    await until(() => (lines = fs.readFileSync(this.log_path, 'utf8').split('\n').filter(Boolean)).length >= this.sent, () => `${this.sent} lines in the access log (${lines.length})`);
    return lines.map((line) => JSON.parse(line));
  }
}
