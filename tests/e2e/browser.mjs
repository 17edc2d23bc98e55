// browser.mjs
// Owns:     a headless Chromium for a test, spoken to by the DevTools protocol over a pair of pipes.
// Promises: it asks nobody but the page's server; what the page logged, threw or was refused is kept; it is gone, with
//           its files, when the test ends.
// Leaves:   what a page should show to the test.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { find_program } from './prometheus.mjs';
import { within } from './runner.mjs';

// The name of an installed Chromium, or ''.
export const chromium = () => ['chromium', 'chromium-browser', 'google-chrome'].find(find_program) ?? '';

export class Browser {
  static async start(t, { width = 1280, height = 900 } = {}) {
    const browser = new Browser();
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-browser-'));
    browser.child = spawn(chromium(), [
      '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars', '--remote-debugging-pipe',
      `--user-data-dir=${folder}`, `--window-size=${width},${height}`, 'about:blank',
    ], { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'], detached: true }); // its helpers are of its group
    const exited = new Promise((done) => browser.child.on('close', done));
    t.after(async () => {
      if (browser.child.exitCode === null && browser.child.signalCode === null) process.kill(-browser.child.pid, 'SIGKILL');
      await exited;
      fs.rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 }); // its helpers may still be ending
    });
    browser.listen();
    const { targetInfos } = await browser.call('Target.getTargets');
    const { targetId } = targetInfos.find((info) => info.type === 'page');
    ({ sessionId: browser.session } = await browser.call('Target.attachToTarget', { targetId, flatten: true }));
    for (const domain of ['Page', 'Runtime', 'Log']) await browser.call(`${domain}.enable`);
    return browser;
  }

  constructor() {
    this.waiting = new Map();
    this.next_id = 1;
    this.complaints = [];   // errors on the console, exceptions, what the policy refused
    this.session = undefined;
    this.loaded = () => {};
  }

  listen() {
    let held = Buffer.alloc(0);
    this.child.stdio[3].on('error', () => {});
    this.child.stdio[4].on('data', (data) => {
      held = Buffer.concat([held, data]);
      for (let end = held.indexOf(0); end >= 0; end = held.indexOf(0)) {
        this.on_message(JSON.parse(held.subarray(0, end).toString()));
        held = held.subarray(end + 1);
      }
    });
  }

  on_message({ id, method, params, result, error }) {
    if (id) {
      const { done, fail } = this.waiting.get(id);
      this.waiting.delete(id);
      return error ? fail(new Error(error.message)) : done(result);
    }
    if (method === 'Runtime.exceptionThrown') this.complaints.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
    if (method === 'Runtime.consoleAPICalled' && ['error', 'warning', 'assert'].includes(params.type)) this.complaints.push(params.args.map((a) => a.value).join(' '));
    if (method === 'Log.entryAdded' && params.entry.level !== 'info' && params.entry.level !== 'verbose') this.complaints.push(`${params.entry.text} ${params.entry.url ?? ''}`);
    if (method === 'Page.javascriptDialogOpening') this.complaints.push(`a dialog: ${params.message}`);
    if (method === 'Page.loadEventFired') this.loaded();
  }

  call(method, params = {}) {
    const id = this.next_id++;
    const answer = new Promise((done, fail) => this.waiting.set(id, { done, fail }));
    this.child.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId: this.session })}\0`);
    return within(15_000, answer, `the browser's answer to ${method}`);
  }

  async open(url) {
    const loaded = new Promise((done) => { this.loaded = done; });
    const { errorText } = await this.call('Page.navigate', { url });
    if (errorText) throw new Error(`${url}: ${errorText}`);
    await within(15_000, loaded, `${url} to load`);
  }

  // The value of an expression on the page.
  async evaluate(expression) {
    const { result, exceptionDetails } = await this.call('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  }

  view({ width, height = 900, dark = false, scripts = true }) {
    return Promise.all([
      this.call('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile: width < 600 }),
      this.call('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: dark ? 'dark' : 'light' }] }),
      this.call('Emulation.setScriptExecutionDisabled', { value: !scripts }),
    ]);
  }

  async screenshot(file) {
    const { data } = await this.call('Page.captureScreenshot', { format: 'png', captureBeyondViewport: true });
    fs.writeFileSync(file, Buffer.from(data, 'base64'));
  }
}
