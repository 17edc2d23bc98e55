// The short night: a part of the faults of `make night`, each raising exactly its alerts in a real Prometheus; and that the whole
// night leaves out no alert without a reason.
import { assert, group, settings, test } from './harness.mjs';
import { alert_names, check_hurried, hurried, longest_ms } from './alerts.mjs';
import { need_program } from './prometheus.mjs';
import { faults, not_played } from '../night/faults.mjs';
import { grouped, play } from '../night/play.mjs';
import { start_scene } from '../night/scene.mjs';

group('the night', () => {
  test('rules on a faster clock differ from the written ones in durations alone', () => {
    assert.equal(hurried('    for: 15m\n    expr: rate(x_rate5m[5m]) > 10 and y[1h] > 14 * 86400\n', 60),
                 '    for: 15000ms\n    expr: rate(x_rate5m[5000ms]) > 10 and y[60000ms] > 14 * 86400\n');
    check_hurried(60);
    assert.equal(longest_ms(60), 20_000);
    assert.equal(longest_ms(60, '5m'), 10_000);
  });

  test('each alert is raised by a fault of the night, or has a reason why not', () => {
    const raised = faults.flatMap((fault) => Object.keys(fault.fires).map((title) => title.split(' ')[0]));
    assert.deepEqual([...new Set([...raised, ...Object.keys(not_played)])].sort(), alert_names().sort());
    for (const name of Object.keys(not_played)) assert.ok(!raised.includes(name), `${name} is played`);
    assert.deepEqual(grouped(['A x', 'A y', 'B']), ['A (x, y)', 'B']);
  });

  test('three faults raise exactly their alerts, and clients’ mistakes none', { calm: true, limit_ms: 90_000 }, async (t) => {
    need_program(t, 'prometheus');
    if (settings.sanitised) t.skip('a sanitised build is too slow for a clock that is sixty times as fast');
    const scene = await start_scene(t, { factor: 60, full: false });
    for (const fault of faults.filter((one) => one.short)) {
      const { wrong } = await play(scene, fault, { last: '5m' });
      assert.deepEqual(wrong, [], fault.name);
    }
    assert.deepEqual(await scene.prometheus.rules_with_errors(), []);
  });
});
