// metrics.mjs
// Owns:     reading the Prometheus text format, strictly.
// Promises: parse_metrics() throws on text that a scraper would refuse or misread: a sample outside its family, a duplicate
//           series, a histogram that is not cumulative or whose _count differs from its +Inf bucket.
// Leaves:   the correct numbers to the tests.
const sample_line = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$/;
const label_pair = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)/y;

export class Scrape {
  constructor() {
    this.families = new Map();   // name → { type, help, samples }
    this.series = new Map();     // name{labels as written} → value
  }
  // Samples of one name whose labels include `labels`.
  select(name, labels = {}) {
    const out = [];
    for (const family of this.families.values()) {
      for (const s of family.samples) {
        if (s.name === name && Object.entries(labels).every(([k, v]) => s.labels[k] === String(v))) out.push(s);
      }
    }
    return out;
  }
  sum(name, labels = {}) { return this.select(name, labels).reduce((total, s) => total + s.value, 0); }
  // The one sample with these labels exactly, or undefined.
  value(name, labels = {}) {
    const found = this.select(name, labels).filter((s) => Object.keys(s.labels).length === Object.keys(labels).length);
    return found[0]?.value;
  }
}

function parse_labels(text, line) {
  const labels = {};
  label_pair.lastIndex = 0;
  while (text && label_pair.lastIndex < text.length) {
    const m = label_pair.exec(text);
    if (!m) throw new Error(`labels that do not parse: ${line}`);
    if (m[1] in labels) throw new Error(`a label twice: ${line}`);
    labels[m[1]] = m[2].replace(/\\(.)/g, (_, c) => (c === 'n' ? '\n' : c));
    if (label_pair.lastIndex === 0) break;
  }
  return labels;
}

function family_of(name, families) {
  if (families.has(name)) return name;
  const base = name.replace(/_(bucket|sum|count)$/, '');
  return ['histogram', 'summary'].includes(families.get(base)?.type) ? base : null;
}

export function parse_metrics(text) {
  if (!text.endsWith('\n')) throw new Error('the exposition does not end in a line feed');
  const scrape = new Scrape();
  let current = null;
  for (const line of text.slice(0, -1).split('\n')) {
    let m;
    if ((m = /^# HELP (\S+) (.+)$/.exec(line))) {
      if (scrape.families.has(m[1])) throw new Error(`HELP of ${m[1]} twice`);
      scrape.families.set(m[1], { help: m[2], type: null, samples: [] });
      current = m[1];
    } else if ((m = /^# TYPE (\S+) (counter|gauge|histogram|summary)$/.exec(line))) {
      if (current !== m[1]) throw new Error(`TYPE of ${m[1]} without its HELP just before`);
      const family = scrape.families.get(m[1]);
      if (family.type || family.samples.length) throw new Error(`TYPE of ${m[1]} in the wrong place`);
      family.type = m[2];
    } else if ((m = sample_line.exec(line))) {
      const family = family_of(m[1], scrape.families);
      if (family === null || family !== current) throw new Error(`a sample away from its family: ${line}`);
      const labels = parse_labels(m[2] ?? '', line);
      const value = m[3] === '+Inf' ? Infinity : Number(m[3]);
      if (Number.isNaN(value)) throw new Error(`not a value: ${line}`);
      const key = `${m[1]}{${Object.keys(labels).sort().map((k) => `${k}=${JSON.stringify(labels[k])}`).join()}}`;
      if (scrape.series.has(key)) throw new Error(`a series twice: ${line}`);
      scrape.series.set(key, value);
      scrape.families.get(family).samples.push({ name: m[1], labels, value });
    } else {
      throw new Error(`not a line of the format: ${JSON.stringify(line)}`);
    }
  }
  for (const [name, family] of scrape.families) check_family(name, family);
  return scrape;
}

function check_family(name, family) {
  if (!family.type) throw new Error(`${name} has no TYPE`);
  if (family.type === 'counter') {
    for (const s of family.samples) if (!(s.value >= 0)) throw new Error(`${name} is negative`);
  }
  if (family.type !== 'histogram') return;
  for (const [key, h] of histograms(name, family)) {
    const les = h.buckets.map(([le]) => le);
    if (les.at(-1) !== Infinity) throw new Error(`${name}{${key}} has no +Inf bucket at its end`);
    for (let i = 1; i < les.length; i++) {
      if (!(les[i] > les[i - 1])) throw new Error(`${name}{${key}} has buckets out of order`);
      if (h.buckets[i][1] < h.buckets[i - 1][1]) throw new Error(`${name}{${key}} is not cumulative`);
    }
    if (h.count === undefined || h.sum === undefined) throw new Error(`${name}{${key}} lacks _sum or _count`);
    if (h.count !== h.buckets.at(-1)[1]) throw new Error(`${name}{${key}}: _count ${h.count}, +Inf ${h.buckets.at(-1)[1]}`);
  }
}

// A histogram family as label text → { buckets: [[le, cumulative], …], sum, count, labels }.
export function histograms(name, family) {
  const out = new Map();
  for (const s of family.samples) {
    const { le, ...labels } = s.labels;
    const key = Object.keys(labels).sort().map((k) => `${k}="${labels[k]}"`).join();
    if (!out.has(key)) out.set(key, { buckets: [], labels, les: [] });
    const h = out.get(key);
    if (s.name === `${name}_bucket`) {
      h.buckets.push([le === '+Inf' ? Infinity : Number(le), s.value]);
      h.les.push(le);
    } else if (s.name === `${name}_sum`) h.sum = s.value;
    else if (s.name === `${name}_count`) h.count = s.value;
    else throw new Error(`an odd sample of a histogram: ${s.name}`);
  }
  return out;
}
