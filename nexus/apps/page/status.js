// status.js: reads /v1/stats and /metrics every two seconds, computes rates and quantiles, and draws them. The server's
// own tables, which hold totals alone, are what is seen without scripts. A name goes into the page as text only, and
// what is kept in memory is bounded.
'use strict';
(() => {
  const STEP_MS = 2000, WINDOW_MS = 10000, KEPT = 150, MOST_ROWS = 200;
  const element = (id) => document.getElementById(id);

  // ---- reading the two pages ----

  const blank = () => ({ requests: 0, errors: 0, tokens: 0, pending: 0, queue: 0, healthy: true, ejected: null, facts: null, duration: new Map(), first: new Map(), waited: new Map(), own: new Map(), waits: 0, wait_sum: 0 });
  const from_stats = (s) => ({ ...blank(), requests: s.requests, errors: s.errors, tokens: s.completion_tokens, pending: s.pending ?? 0, healthy: s.healthy ?? true, ejected: s.ejected ?? null, facts: s });

  // The label value of a name, unless labels are raw (see sanitize_label in labels.h).
  const sanitized = (name) => {
    const text = [...name].map((c) => (/^[a-zA-Z0-9_]$/.test(c) ? c : '_')).join('') || '_';
    return /^[0-9]/.test(text) ? '_' + text : text;
  };

  function index(entries) {
    const by_label = new Map();
    for (const [name, entry] of entries) {
      for (const label of new Set([name, sanitized(name)])) {
        if (!by_label.has(label)) by_label.set(label, []);
        by_label.get(label).push(entry);
      }
    }
    return by_label;
  }

  const LINE = /^nexus_(key_queue_wait_seconds_sum|key_queue_wait_seconds_count|(?:request_duration|time_to_first_token|queue_wait|overhead)_seconds_bucket|queue_depth|client_connections|models_available|backends_total|backends_healthy)(?:\{(.*)\})? (\S+)$/gm;
  const HISTOGRAMS = { request: 'duration', time: 'first', queue: 'waited', overhead: 'own' };
  const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
  const unescaped = (text) => text.replace(/\\(.)/g, (_, c) => (c === 'n' ? '\n' : c));

  function read_metrics(text, sample) {
    const backends = index(sample.backends), models = index(sample.models), keys = index(sample.keys);
    for (const [, family, labels = '', number] of text.matchAll(LINE)) {
      const value = Number(number);
      const label = {};
      for (const [, key, escaped] of labels.matchAll(LABEL)) label[key] = unescaped(escaped);
      const of_backend = backends.get(label.backend) ?? [];
      if (family === 'queue_depth') {
        sample.all.queue += value;
        for (const entry of of_backend) entry.queue += value;
      } else if (family.startsWith('key_')) {
        for (const entry of keys.get(label.key) ?? []) entry[family.endsWith('sum') ? 'wait_sum' : 'waits'] += value;
      } else if (family.endsWith('_bucket')) {
        const bound = label.le === '+Inf' ? Infinity : Number(label.le);
        const which = HISTOGRAMS[family.split('_')[0]];
        for (const entry of [sample.all, ...of_backend, ...(models.get(label.model) ?? [])]) {
          entry[which].set(bound, (entry[which].get(bound) ?? 0) + value);
        }
      } else {
        sample[family] = value;
      }
    }
  }

  async function text_of(path) {
    const answer = await fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(8000) });
    if (!answer.ok) throw new Error(answer.status === 401 ? '/v1/stats and /metrics need an API key' : `${path} returned ${answer.status}`);
    return answer.text();
  }

  async function take_sample() {
    const [stats_text, metrics] = await Promise.all([text_of('v1/stats'), text_of('metrics')]);
    const stats = JSON.parse(stats_text);
    const sample = { at: performance.now(), stats, all: blank(), backends: new Map(), models: new Map(), keys: new Map() };
    for (const b of stats.backends) sample.backends.set(b.id, from_stats(b));
    for (const m of stats.models) sample.models.set(m.name, from_stats(m));
    for (const k of stats.keys ?? []) sample.keys.set(k.name, from_stats(k));
    sample.all.requests = stats.requests.total;
    sample.all.errors = stats.requests.errors;
    for (const b of sample.backends.values()) {
      sample.all.pending += b.pending;
      sample.all.tokens += b.tokens;
    }
    read_metrics(metrics, sample);
    return sample;
  }

  // ---- rates and quantiles between two samples ----

  // Interpolated within its bucket, as histogram_quantile() does; null if nothing was observed.
  function quantile(before, after, q) {
    const bounds = [...after.keys()].sort((a, b) => a - b);
    const count = (bound) => after.get(bound) - (before.get(bound) ?? 0);
    const total = bounds.length ? count(bounds.at(-1)) : 0;
    if (!(total > 0)) return null;
    let lower = 0, below = 0;
    for (const bound of bounds) {
      const here = count(bound);
      if (here >= q * total && here > below) {
        return bound === Infinity ? Infinity : lower + (bound - lower) * (q * total - below) / (here - below);
      }
      lower = bound;
      below = here;
    }
    return null;
  }

  // The state at the start of the process, when every count was 0.
  const start_of = (sample) =>
    ({ at: sample.at - 1000 * Math.max(sample.stats.uptime_seconds, 1), all: blank(), backends: new Map(), models: new Map(), keys: new Map() });

  const numbers_of = (before, after, seconds) => ({
    rate: (after.requests - before.requests) / seconds,
    errors: (after.errors - before.errors) / seconds,
    pending: after.pending,
    queue: after.queue,
    p50: quantile(before.duration, after.duration, 0.5),
    p95: quantile(before.duration, after.duration, 0.95),
    first: quantile(before.first, after.first, 0.5),
    waited: quantile(before.waited, after.waited, 0.95),
    own: quantile(before.own, after.own, 0.95),
    tokens: (after.tokens - before.tokens) / seconds,
    wait: after.waits > before.waits ? (after.wait_sum - before.wait_sum) / (after.waits - before.waits) : null,
    sum: after.requests,
    failed: after.errors,
  });

  // ---- text ----

  const rate_text = (v) => (v < 0.005 ? '0' : v.toFixed(v < 9.995 ? 2 : v < 99.95 ? 1 : 0));
  const time_text = (v) => {
    if (v === null) return '-';
    if (v === Infinity) return '>5 min';
    return v < 0.9995 ? `${(v * 1000).toFixed(v < 0.00995 ? 1 : 0)} ms` : `${v.toFixed(v < 9.995 ? 2 : 1)} s`;
  };
  const first_token_text = (v) => (v === Infinity ? '>10 min' : time_text(v));
  const span_text = (s) => {
    const part = (unit, of) => Math.floor(s / unit) % of;
    if (s >= 86400) return `${Math.floor(s / 86400)}d ${part(3600, 24)}h`;
    if (s >= 3600) return `${part(3600, 24)}h ${part(60, 60)}m`;
    return s >= 60 ? `${part(60, 60)}m ${s % 60}s` : `${s}s`;
  };
  // Invisible characters, and those that change the direction of the text, are shown as escapes.
  const visible = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (c) => (c === '\n' ? '\\n' : '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0')));

  // Key, title, text, whether it has a line and a tile, the tile's title if that is another.
  const METRICS = [
    ['rate', 'Req/s', rate_text, true, 'Requests/s'], ['errors', 'Err/s', rate_text, true, 'Errors/s'], ['pending', 'Pending', String, true],
    ['queue', 'Queue', String, true], ['p50', 'p50', time_text, true], ['p95', 'p95', time_text, true],
    ['first', 'First token', first_token_text, true], ['tokens', 'Tokens/s', rate_text, true],
    ['sum', 'Requests', String, false], ['failed', 'Errors', String, false],
  ];
  // Slow model, full queue, or slow gateway?
  const OF_ALL = [...METRICS, ['waited', '', time_text, true, 'Queue p95'], ['own', '', time_text, true, 'Nexus p95']];
  const OF_MODELS = METRICS.filter(([key]) => key !== 'pending' && key !== 'queue');
  const OF_KEYS = [...METRICS.filter(([key]) => !/^(queue|p50|p95|first)$/.test(key)), ['wait', 'Mean wait', time_text, false]];

  // ---- drawing ----

  const make = (tag, content = '', name = '') => {
    const made = document.createElement(tag);
    made.textContent = content;
    if (name) made.className = name;
    return made;
  };

  function make_line() {
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    svg.setAttribute('viewBox', '0 0 100 20');
    svg.setAttribute('preserveAspectRatio', 'none');
    svg.setAttribute('aria-hidden', 'true');
    for (const name of ['area', 'edge']) {
      const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
      path.setAttribute('class', name);
      svg.append(path);
    }
    return svg;
  }

  // The newest value is at the right edge, the oldest step of all lines at the left; a missing value leaves a gap.
  function draw_line(svg, values) {
    const steps = Math.min(Math.max(step - 2, 30), KEPT - 1);
    const known = values.filter(Number.isFinite);
    const most = Math.max(...known, 1e-9);
    let edge = '', area = '', start = null, end = 0;
    const close = () => {
      if (start !== null) area += `V20H${start}Z`;
      start = null;
    };
    values.forEach((value, i) => {
      if (!Number.isFinite(value)) return close();
      end = 100 - (values.length - 1 - i) * 100 / steps;
      const point = `${end.toFixed(2)} ${(19.2 - 18.4 * value / most).toFixed(2)}`;
      edge += (start === null ? 'M' : 'L') + point;
      area += start === null ? `M${end.toFixed(2)} 20L${point}` : `L${point}`;
      start ??= end.toFixed(2);
    });
    close();
    svg.children[0].setAttribute('d', area);
    svg.children[1].setAttribute('d', edge);
  }

  function fill(cell, key, value, text, values) {
    cell.querySelector('b').textContent = text(value);
    cell.classList.toggle('bad', key === 'errors' && value > 0);
    if (values) draw_line(cell.querySelector('svg') ?? cell.appendChild(make_line()), values);
  }

  const histories = new Map();   // by row: the last KEPT values of each metric

  function remember(key, numbers) {
    if (!histories.has(key)) histories.set(key, {});
    const history = histories.get(key);
    history.seen = step;
    for (const [metric, , , has_line] of OF_ALL) {
      if (!has_line) continue;
      const values = (history[metric] ??= []);
      values.push(numbers[metric]);
      if (values.length > KEPT) values.shift();
    }
    return history;
  }

  function make_row(name, metrics) {
    const row = document.createElement('tr');
    const head = make('th');
    head.scope = 'row';
    head.append(make('bdi', visible(name)));
    row.append(head);
    for (const [, title] of metrics) {
      const cell = make('td');
      cell.dataset.title = title;
      cell.append(make('b'));
      row.append(cell);
    }
    return row;
  }

  function show_state(row, { healthy, ejected, facts }) {
    const head = row.firstChild;
    const text_in = (name, text, tag = 'small') => {
      const part = head.querySelector('.' + name) ?? head.appendChild(make(tag, '', name));
      part.textContent = visible(text);
      return part;
    };
    const word = facts.state ?? (healthy ? 'up' : 'down');
    const span = ejected ? ` for ${span_text(ejected.seconds_left)}` : facts.state_seconds === undefined ? '' : ` ${span_text(facts.state_seconds)}`;
    text_in('state', word + span, 'span').className = `state ${word === 'up' ? 'up' : word === 'down' || word === 'removed' ? 'down' : 'some'}`;
    text_in('why', facts.why ?? '');
    const details = [`${facts.type ?? ''} ${facts.url ?? ''}`.trim()];
    if (facts.max_pending) details.push(`at most ${facts.max_pending}`);
    if (facts.last_check_seconds != null) details.push(`checked ${span_text(facts.last_check_seconds)} ago`);
    if (facts.next_check_seconds != null) details.push(`next in ${span_text(facts.next_check_seconds)}`);
    for (const [outcome, count] of Object.entries(facts.failed_attempts ?? {})) details.push(`${count} × ${outcome}`);
    if (facts.cached_tokens) details.push(`${Math.round(100 * facts.cached_tokens / facts.prompt_tokens)} % of prompt tokens cached`);
    text_in('facts', details.filter((text) => text !== '').join(', '));
  }

  // Puts the columns and tiles of this script in the place of the server's tables.
  function take_over() {
    for (const [kind, metrics] of [['backends', METRICS], ['models', OF_MODELS], ['keys', OF_KEYS]]) {
      const row = make('tr');
      for (const title of ['Name', ...metrics.map(([, title]) => title)]) row.append(make('th', title));
      for (const head of row.children) head.scope = 'col';
      element(`${kind}_head`).replaceChildren(row);
      element(kind).replaceChildren();
    }
    for (const [key, title, , has_tile, tile_title = title] of OF_ALL) {
      if (!has_tile) continue;
      const value = make('dd');
      value.id = `all_${key}`;
      value.append(make('b'));
      const tile = make('div');
      tile.append(make('dt', tile_title), value);
      element('tiles').append(tile);
    }
  }

  const tables = { backends: new Map(), models: new Map(), keys: new Map() };   // rows by name

  function draw_table(kind, metrics, before, after, seconds) {
    const body = element(kind), rows = tables[kind];
    const names = [...after.keys()].slice(0, MOST_ROWS);
    for (const [name, row] of rows) {
      if (names.includes(name)) continue;
      row.remove();
      rows.delete(name);
    }
    names.forEach((name, i) => {
      if (!rows.has(name)) rows.set(name, make_row(name, metrics));
      const row = rows.get(name), entry = after.get(name);
      if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
      const numbers = numbers_of(before.get(name) ?? blank(), entry, seconds);
      const history = remember(`${kind} ${name}`, numbers);
      if (kind === 'backends') show_state(row, entry);
      metrics.forEach(([key, , text, has_line], at) => fill(row.children[at + 1], key, numbers[key], text, has_line && history[key]));
    });
    element(`${kind}_more`).textContent = after.size > names.length ? `and ${after.size - names.length} more` : '';
  }

  const local_time = (text) => (text ? new Date(text).toLocaleString() : '-');

  function draw_failures(failures) {
    element('failed').hidden = failures.length === 0;
    element('failures').replaceChildren(...failures.map((one) => {
      const row = make('tr');
      for (const text of [local_time(one.time), one.status, one.error_type, one.model, one.backend || '-', one.request_id]) row.append(make('td', visible(String(text))));
      return row;
    }));
  }

  // Lists faults of the configuration and of certificates.
  function notes_of({ configuration, certificates = [] }) {
    const notes = [];
    if (configuration && !configuration.last_reload_ok) notes.push('The last reload failed: see the log.');
    for (const { name, expires } of certificates) {
      const left = (new Date(expires) - Date.now()) / 1000;
      if (left <= 14 * 86400) notes.push(visible(`The certificate ${name} ${left <= 0 ? 'has expired' : `expires in ${span_text(Math.round(left))}`}.`));
    }
    return notes.join(' ');
  }

  function draw(before, after) {
    const seconds = (after.at - before.at) / 1000;
    const healthy = after.backends_healthy ?? 0, total = after.backends_total ?? 0;
    const ejected = [...after.backends.values()].filter((b) => b.healthy && b.ejected).length;
    const and_ejected = ejected ? `, ${ejected} ejected` : '';
    const state = element('state');
    state.textContent = `${healthy} of ${total} backends healthy${and_ejected}`;
    state.className = `state ${healthy === 0 ? 'down' : healthy < total || ejected ? 'some' : 'up'}`;
    document.title = `Nexus: ${healthy} of ${total} healthy${and_ejected}`;
    element('uptime').textContent = span_text(after.stats.uptime_seconds);
    element('model_count').textContent = after.models_available ?? 0;
    element('clients').textContent = after.client_connections ?? 0;
    for (const key of ['total', 'success', 'errors']) element(key).textContent = after.stats.requests[key];
    const numbers = numbers_of(before.all, after.all, seconds);
    const history = remember('all', numbers);
    OF_ALL.forEach(([key, , text, has_line]) => has_line && fill(element(`all_${key}`), key, numbers[key], text, history[key]));
    draw_table('backends', METRICS, before.backends, after.backends, seconds);
    draw_table('models', OF_MODELS, before.models, after.models, seconds);
    draw_table('keys', OF_KEYS, before.keys, after.keys, seconds);
    element('by_key').hidden = after.keys.size === 0;
    draw_failures(after.stats.failures ?? []);
    element('loaded').textContent = local_time(after.stats.configuration?.loaded);
    element('stalls').textContent = after.stats.loop_stalls ?? 0;
    element('notes').textContent = notes_of(after.stats);
    for (const [key, kept] of histories) if (kept.seen !== step) histories.delete(key);
    const minutes = Math.ceil(Math.min(Math.max(step - 2, 30), KEPT) * STEP_MS / 60000);
    element('span').textContent = `Rates and quantiles of the last ${Math.round(seconds)} s, lines of the last ${minutes} min.`;
  }

  // ---- every two seconds ----

  let samples = [], step = 0, failing_since = null;

  async function turn() {
    const live = element('live');
    try {
      const sample = await take_sample();
      // Nexus was restarted: the page of the new process may differ.
      if (samples.length && sample.stats.uptime_seconds < samples.at(-1).stats.uptime_seconds) return location.reload();
      samples.push(sample);
      while (samples.length > 2 && samples[1].at <= sample.at - WINDOW_MS) samples.shift();
      step += 1;
      if (step === 1) {
        take_over();
        draw(start_of(sample), sample);
        element('span').textContent = 'Rates and quantiles since the start.';
        histories.clear();   // a mean since the start is no point of a line
      } else {
        draw(samples[0], sample);
      }
      failing_since = null;
      live.textContent = `live, ${new Date().toLocaleTimeString()}`;
      live.className = '';
    } catch (error) {
      failing_since ??= new Date().toLocaleTimeString();
      live.textContent = `no data since ${failing_since}: ${error.message}`;
      live.className = 'late';
    }
    setTimeout(turn, STEP_MS);
  }
  turn();
})();
