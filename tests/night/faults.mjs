// faults.mjs
// Owns:     the faults of a night: how each begins and ends, and which alerts it raises, each with its reason.
// Promises: each alert of nexus-alerts.yml is raised by one of them, or is in `not_played` with its reason.
// Leaves:   the place to scene.mjs, the waiting and the judging to play.mjs.
import fs from 'node:fs';
import { answer_plainly, assert, chat, chat_chunk, make_certificate, sleep, sse, until } from '../e2e/harness.mjs';
import { fails_with } from '../e2e/fleet.mjs';
import { good, hasty } from './scene.mjs';

const all_backends = ['one', 'two', 'small', 'big', 'narrow'];
const all_models = ['m1', 'gpt_4', 'small', 'big', 'narrow'];
const each = (alert, labels, why) => Object.fromEntries(labels.map((label) => [`${alert} ${label}`, why]));

export const not_played = {
  NexusSloBurnsFast: 'its windows are five minutes and an hour: with the time to clear, longer than all the rest of the night',
  NexusSloBurnsSlowly: 'its windows are half an hour and six hours: longer than the night',
  NexusLoopStalls: 'it takes a host without processor time, which cannot be had without disturbing Prometheus and this program',
};

// Sends a part of a stream, and no end.
async function break_off(request, reply) {
  reply.stream();
  reply.piece(sse(chat_chunk(request.json.model, 'One', {}, true)));
  await sleep(20);
  reply.fin();
}

// `fires`: title of an alert → why it is right that it fires. `proof`: fails if the fault did not do what its name says.
// `passes`: the fault is an event that does not last, so its alert may end by itself. `bound_ms`: until when its alerts must
// fire, where that is later than for others. `short`: also played by the end-to-end tests.
export const faults = [
  {
    name: 'clients make mistakes',
    short: true,
    fires: {},
    async begin(scene) {
      scene.repeat(100, () => scene.ask('{"model": "m1"'));                                           // 400
      scene.repeat(100, () => scene.ask(chat('gpt-5')));                                              // 404, no such model
      scene.repeat(100, () => scene.ask(chat(), { url: '/v1/chat/compleshuns' }));                    // 404, no such path
      scene.repeat(100, () => scene.ask(chat(), { headers: { 'Content-Type': 'application/json' } }));  // 401
      scene.repeat(100, () => scene.ask(chat(), { headers: hasty }));                                 // 429, over its key's rpm
      scene.repeat(100, async () => {                                                                 // no HTTP
        const client = await scene.connect();
        client.write('GARBAGE\r\n\r\n');
        await client.ended().finally(() => scene.leave(client));
      });
      scene.script('small', fails_with(422));                                                         // the backend says so
      scene.script('big', async (request, reply) => {                                                 // 499
        if (request.json.left) await sleep(200);
        return answer_plainly(request, reply);
      });
      scene.repeat(100, async () => {
        const client = await scene.connect();
        client.send('POST', '/v1/chat/completions', good, chat('big', { left: true }));
        await sleep(50);
        scene.leave(client);
      });
    },
    async proof(scene) {
      const page = await scene.page();
      for (const status of [400, 401, 404, 422, 429, 499]) assert.ok(page.sum('nexus_requests_total', { status }) >= 20, `${status} came often`);
      for (const reason of ['malformed', 'unknown_path']) assert.ok(page.sum('nexus_http_rejections_total', { reason }) >= 20, `${reason} came often`);
    },
    async end(scene) { for (const name of ['small', 'big']) scene.heal(name); },
  },
  {
    name: 'one of two backends is killed',
    short: true,
    fires: { 'NexusBackendDown one': 'its checks fail; the other one serves its model, so no request fails' },
    begin: (scene) => scene.down('one'),
    end: (scene) => scene.up('one'),
  },
  {
    name: 'a backend passes its checks, and fails its requests',
    fires: { 'NexusBackendEjected one': 'three failures in a row eject it; the requests are tried on the other one' },
    async begin(scene) { scene.script('one', fails_with(500)); },
    async end(scene) { scene.heal('one'); },
  },
  {
    name: 'one model fails, on a backend that is well otherwise',
    fires: { 'NexusModelFaultRatioHigh small': 'every third request for it fails, of all requests less than one in twenty' },
    async begin(scene) {
      let count = 0;
      scene.script('small', (request, reply) => (++count % 3 === 0 ? reply.json({ error: { message: 'made up' } }, 500) : answer_plainly(request, reply)));
    },
    async end(scene) { scene.heal('small'); },
  },
  {
    name: 'the only backend of a model is down, and the model has a fallback',
    fires: {
      'NexusBackendDown big': 'its checks fail',
      'NexusModelFallsBack big': 'all who ask for it get an answer of another model',
    },
    begin: (scene) => scene.down('big'),
    end: (scene) => scene.up('big'),
  },
  {
    name: 'all backends are down',
    fires: {
      NexusNoHealthyBackend: 'that is what it is for',
      ...each('NexusBackendDown', all_backends, 'each of them is down'),
      NexusFaultRatioHigh: 'every request gets a 503',
      ...each('NexusModelFaultRatioHigh', all_models, 'every request for it gets a 503; clients ask for `m1` by its alias too'),
    },
    begin: (scene) => scene.down(...all_backends),
    end: (scene) => scene.up(...all_backends),
  },
  {
    name: 'a wrong configuration is loaded, and repaired',
    short: true,
    fires: { NexusReloadFailed: 'the old one stays in force, so nothing else is wrong' },
    async begin(scene) { scene.nexus.reload('[server]\nlisten = nowhere\n'); },
    async end(scene) { scene.reload_good(); },
  },
  {
    name: 'a backend is at its cap, and nobody waits',
    fires: { 'NexusBackendNearlyFull narrow': 'it has four requests of four' },
    async begin(scene) {
      scene.rest('narrow');
      await until(async () => (await scene.page()).value('nexus_pending_requests', { backend: 'narrow' }) === 0, 'no other request there');
      scene.close_gate('narrow');
      for (let i = 0; i < 4; i++) scene.repeat(50, () => scene.ask(chat('narrow', { held: true })));
    },
    async end(scene) { scene.heal('narrow'); },
  },
  {
    name: 'the queue fills up',
    fires: {
      'NexusBackendNearlyFull narrow': 'who waits, waits for it',
      NexusRequestsWait: 'ten wait all the time',
      NexusQueueNearlyFull: 'there is room for ten',
      'NexusOverloaded narrow': 'the others who ask for it are refused',
    },
    async begin(scene) {
      scene.close_gate('narrow');
      for (let i = 0; i < 20; i++) scene.repeat(250, () => scene.ask(chat('narrow', { held: true })));
    },
    async end(scene) { scene.heal('narrow'); },
  },
  {
    name: 'a backend cuts streams',
    fires: { 'NexusStreamsCut one': 'every tenth of its streams; of all requests these are less than one in twenty' },
    async begin(scene) {
      let count = 0;
      scene.script('one', (request, reply) => (request.json.stream && ++count % 10 === 0 ? break_off(request, reply) : answer_plainly(request, reply)));
    },
    async end(scene) { scene.heal('one'); },
  },
  {
    name: 'first tokens are slow',
    fires: { 'NexusFirstTokenSlow small': 'its streams begin after 11 s, in true seconds; other answers of the same backend do not wait' },
    bound_ms: 60_000,
    async begin(scene) {
      scene.script('small', async (request, reply) => {
        if (request.json.stream) await sleep(11_000);
        return answer_plainly(request, reply);
      });
      // One begins every half second, and so does one of the answers.
      for (let i = 0; i < 22; i++) scene.repeat(500, () => scene.ask(chat('small', { stream: true })), i * 520);
    },
    async end(scene) { scene.heal('small'); },
  },
  {
    name: 'connections over the limit',
    fires: { NexusRefusesUnread: 'idle connections hold all places, and more come; who is connected is served' },
    async begin(scene) {
      await Promise.all(Array.from({ length: 330 }, () => scene.idle().catch(() => {})));
      scene.repeat(100, async () => { await scene.idle(); });
    },
    async end() {},
  },
  {
    name: 'descriptors run short',
    fires: { NexusDescriptorsShort: 'idle connections hold most of them; there is still one for each new connection' },
    async begin(scene) {
      await Promise.all(Array.from({ length: 150 }, () => scene.idle()));
      scene.soft_limit = /^Max open files\s+(\d+)/m.exec(fs.readFileSync(`/proc/${scene.nexus.pid}/limits`, 'latin1'))[1];
      scene.limit_descriptors(Math.floor(scene.descriptors() / 0.88));
    },
    async end(scene) { scene.limit_descriptors(scene.soft_limit); },
  },
  {
    name: 'Nexus is killed three times, and started again each time',
    fires: { NexusRestarts: 'it is up again before it counts as down' },
    passes: true,
    async begin(scene) {
      const started = async () => (await scene.prometheus.query('process_start_time_seconds{job="nexus"}'))[0]?.value[1];
      for (let i = 0; i < 3; i++) {
        const before = await started();
        await scene.restart();
        await until(async () => ![undefined, before].includes(await started()), 'the new process, as Prometheus sees it');
      }
    },
    async end() {},
  },
  {
    name: 'Nexus is down',
    fires: { NexusDown: 'it cannot be scraped; what it said last is not taken for true' },
    begin: (scene) => scene.kill(),
    end: (scene) => scene.bring_up(),
  },
  {
    name: 'Prometheus has lost its target',
    fires: { NexusAbsent: 'there is no target of this job, thus none that is down' },
    async begin(scene) { scene.prometheus.lose_target(); },
    async end(scene) { scene.prometheus.find_target(); },
  },
  {
    name: 'a certificate is about to expire',
    fires: { 'NexusCertificateExpires localhost': 'it is valid for five days more' },
    bound_ms: 120_000,
    async begin(scene) { scene.set_certificate(make_certificate({ days: 5 })); },
    async end(scene) { scene.set_certificate(make_certificate()); },
  },
];

