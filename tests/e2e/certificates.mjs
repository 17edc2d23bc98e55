// certificates.mjs
// Owns:     certificates for the tests: one authority a run, and what it signs; made with the openssl command.
// Promises: all files are in a folder that goes with the run; what is not said is valid for a hundred days, for localhost and
//           127.0.0.1.
// Leaves:   using them to the tests; without the command such a test is skipped.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const found = spawnSync('openssl', ['version']);
export const has_openssl = found.status === 0;

let folder;
let count = 0;

function openssl(...args) {
  const run = spawnSync('openssl', args, { encoding: 'utf8' });
  if (run.status !== 0) throw new Error(`openssl ${args.join(' ')}: ${run.stderr}`);
  return run.stdout;
}

function place(name) {
  if (!folder) {
    folder = fs.mkdtempSync(path.join(os.tmpdir(), 'nexus-certificates-'));
    fs.chmodSync(folder, 0o755);
    process.on('exit', () => fs.rmSync(folder, { recursive: true, force: true }));
  }
  return path.join(folder, name);
}

const new_key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'];

// An authority, or a certificate that is signed by itself. → { pem, key }: paths.
export function make_authority(name = 'Nexus test authority', names = []) {
  const at = `authority-${count++}`;
  const [key, pem] = [place(`${at}.key`), place(`${at}.pem`)];
  const alternatives = names.length ? ['-addext', `subjectAltName=${names.join(',')}`] : [];
  const usage = ['-addext', 'keyUsage=critical,digitalSignature,keyCertSign']; // Python 3.13 wants it
  openssl('req', '-x509', ...new_key, '-keyout', key, '-out', pem, '-days', '100', '-subj', `/CN=${name}`, ...usage, ...alternatives);
  return { pem, key };
}

// The usual two are shared with processes that a test starts.
const shared = (name, make) => {
  const known = process.env[name];
  if (known) return JSON.parse(known);
  const made = make();
  process.env[name] = JSON.stringify(made);
  return made;
};

let usual;
export const authority = () => (usual ??= shared('NEXUS_TEST_AUTHORITY', make_authority));

// `valid`: the first and the last day; `openssl x509` takes none before version 3.4, and no past one from there on, so it is
// `openssl ca`. → { pem, key, both }: paths; `both` has the certificate, its issuer and the key in one file.
export function make_certificate({ name = 'localhost', names = ['DNS:localhost', 'IP:127.0.0.1'], days = 100, valid, by = authority() } = {}) {
  const at = `certificate-${count++}`;
  const [key, pem, both, request, conf, index] = ['key', 'pem', 'both', 'csr', 'conf', 'index'].map((kind) => place(`${at}.${kind}`));
  const [first, last] = valid ?? [new Date(Date.now() - 60_000), new Date(Date.now() + days * 86_400_000)];
  const stamp = (date) => new Date(date).toISOString().replace(/[-:T]|\.\d+/g, '');
  fs.writeFileSync(index, '');
  fs.writeFileSync(conf, `[ca]\ndefault_ca = a\n[a]\ndatabase = ${index}\nnew_certs_dir = ${path.dirname(index)}\nrand_serial = yes\n` +
    'default_md = sha256\npolicy = p\nx509_extensions = e\nunique_subject = no\n[p]\ncommonName = supplied\n[e]\n' +
    'basicConstraints = CA:FALSE\nsubjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n' + // Python 3.13 wants them
    (names.length ? `subjectAltName = ${names.join(',')}\n` : ''));
  openssl('req', ...new_key, '-keyout', key, '-out', request, '-subj', `/CN=${name}`);
  openssl('ca', '-batch', '-notext', '-config', conf, '-in', request, '-cert', by.pem, '-keyfile', by.key, '-out', pem,
          '-startdate', stamp(first), '-enddate', stamp(last));
  fs.writeFileSync(both, [pem, by.pem, key].map((file) => fs.readFileSync(file, 'utf8')).join(''));
  return { pem, key, both };
}

export const expired = { valid: ['2020-01-01', '2020-12-31'] };
export const not_yet_valid = { valid: ['2049-01-01', '2049-12-31'] };

// The one that tests use which do not care.
let common;
export const certificate = () => (common ??= shared('NEXUS_TEST_CERTIFICATE', make_certificate));

export const fingerprint = (pem) => openssl('x509', '-in', pem, '-noout', '-fingerprint', '-sha256').trim().split('=')[1];
