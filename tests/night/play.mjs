// play.mjs
// Owns:     one fault of the night from its beginning to its end, judged by the alerts that fire.
// Promises: it begins when no alert fires or is about to. All that it must raise fires, goes on firing while the fault lasts and
//           ends after it; whatever else fires, at any time until then, is wrong. The fault lasts until all alerts but that
//           with the longest `for` have had the time to fire. Nothing is slept: each wait has a bound, or is that time.
// Leaves:   the faults to faults.mjs, showing the result to its callers.
import { until } from '../e2e/harness.mjs';
import { longest_ms } from '../e2e/alerts.mjs';

const quiet_bound_ms = 60_000;
const clear_bound_ms = 60_000;
const usual_bound_ms = 40_000;

const without = (list, other) => list.filter((one) => !other.includes(one));
const seconds = (ms) => (ms / 1000).toFixed(1);

// What fired when, in seconds of the fault: for the reader of a failure.
const course = (watch, began) => [...watch.past.filter((one) => one.to > began), ...[...watch.firing].map(([title, from]) => ({ title, from, to: null }))]
  .map(({ title, from, to }) => `${title} ${seconds(from - began)} to ${to === null ? 'now' : seconds(to - began)}`).join(', ');

// → { name, expected, fired, fired_ms, cleared_ms, wrong: what must not be }. `last`: the longest `for` that is waited for.
export async function play(scene, fault, { last = '15m' } = {}) {
  const { watch, factor } = scene;
  const expected = Object.keys(fault.fires).sort();
  const wrong = [];
  const note = async (promise) => { await promise.catch((error) => wrong.push(error.message)); };
  await until(() => watch.quiet, () => `no alert before "${fault.name}", but ${[...watch.titles(), ...watch.pending]}`, quiet_bound_ms);

  const began = Date.now();
  scene.acting = true;
  await fault.begin(scene);
  const all_fired = () => without(expected, watch.fired_since(began)).length === 0;
  await note(until(all_fired, () => `did not fire: ${without(expected, watch.fired_since(began))}`, fault.bound_ms ?? usual_bound_ms));
  const fired_ms = expected.length && all_fired() ? watch.last_start(expected, began) - began : null;
  const enough = began + longest_ms(factor, last) + 1_000;
  await until(() => Date.now() >= enough, 'the time in which anything else would fire', enough - began + 1_000);
  const ended_early = fault.passes || !all_fired() ? [] : without(expected, watch.titles());
  if (ended_early.length) wrong.push(`ended while the fault lasted: ${ended_early}`);
  if (fault.proof) await note(fault.proof(scene));

  scene.acting = false;
  const ended = Date.now();
  await fault.end(scene);
  await scene.disperse();
  await note(until(() => watch.firing.size === 0, () => `still firing: ${watch.titles()}`, clear_bound_ms));
  const fired = watch.fired_since(began);
  const cleared_ms = fired.length && watch.firing.size === 0 ? Math.max(0, watch.last_end(began) - ended) : null;
  const more = without(fired, expected);
  if (more.length) wrong.push(`fired, but must not: ${more}`);
  if (wrong.length) wrong.push(`the course: ${course(watch, began) || 'nothing fired'}`);
  return { name: fault.name, expected, fired, fired_ms, cleared_ms, wrong };
}

// The titles with what they are about behind each alert: NexusBackendDown (one, two).
export function grouped(titles) {
  const by_alert = new Map();
  for (const title of titles) {
    const [alert, ...about] = title.split(' ');
    by_alert.set(alert, [...(by_alert.get(alert) ?? []), about.join(' ')].filter(Boolean));
  }
  return [...by_alert].map(([alert, about]) => (about.length ? `${alert} (${about.join(', ')})` : alert));
}

// Lines of a table.
export function table(results) {
  const column = (ms, width) => (ms === null ? '-' : `${seconds(ms)} s`).padStart(width);
  const width = Math.max(...results.map(({ name }) => name.length));
  const row = ({ name, expected, fired_ms, cleared_ms, wrong }) =>
    [name.padEnd(width), column(fired_ms, 11), column(cleared_ms, 13), grouped(expected).join(', ') || 'nothing', wrong.length ? 'WRONG' : ''].join('  ').trimEnd();
  return [`${'fault'.padEnd(width)}  fired after  cleared after  expected`, ...results.map(row)];
}
