// child_backend.mjs: a backend in a process of its own, for tests that kill or stop it. Its argument is the options of
// Backend as JSON; it tells its parent the port, and ends with it. `held` answers never come.
import { Backend } from './backend.mjs';
import { act } from './fleet.mjs';

const backend = new Backend({ answer: act, ...JSON.parse(process.argv[2]) });
backend.gate = new Promise(() => {});
await backend.start();
process.on('disconnect', () => process.exit(0));
process.send({ port: backend.port });
