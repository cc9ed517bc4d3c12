// A second, independent check of Plait bundles (docs/protocol.md): for the browser page
// verify.html and for Node. Web Crypto only; it opens no connection and loads nothing.
//
//   const { verifyBundle, parseNetworkFile } = require("./verify.js");
//   const report = await verifyBundle(bytes, parseNetworkFile(tomlText));
//
// It names its claims as `plait verify` does and must come to the same result for any bytes.
"use strict";

(function (root) {

// ---------------------------------------------------------------- errors and bytes

class Fault extends Error {} // the evidence is false
class Absent extends Error {} // optional evidence is missing: neither true nor false

function ensure(condition, reason) {
  if (!condition) throw new Fault(reason);
}

const U32_MAX = 2 ** 32 - 1;
const U64_MAX = 2n ** 64n - 1n;
const encoder = new TextEncoder();

function utf8(bytes, what) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new Fault(`${what} is not UTF-8`);
  }
}

function concat(...parts) {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    joined.set(part, offset);
    offset += part.length;
  }
  return joined;
}

function equalBytes(a, b) {
  return a.length === b.length && a.every((byte, index) => byte === b[index]);
}

function toHex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function fromHex(text, length, what) {
  ensure(typeof text === "string" && text.length === 2 * length && /^[0-9a-f]*$/.test(text),
    `${what} is not ${length} bytes of lower-case hex`);
  return Uint8Array.from({ length }, (_, index) => parseInt(text.slice(2 * index, 2 * index + 2), 16));
}

function toBase64(bytes) {
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary);
}

function fromBase64(text, what) {
  ensure(typeof text === "string", `${what} is not a string`);
  let bytes;
  try {
    bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  } catch {
    throw new Fault(`${what} is not base64`);
  }
  ensure(toBase64(bytes) === text, `${what} is not canonical base64`);
  return bytes;
}

function bigEndian(value, width) {
  const bytes = new Uint8Array(width);
  let rest = BigInt(value);
  for (let index = width - 1; index >= 0; index--, rest >>= 8n) bytes[index] = Number(rest & 255n);
  return bytes;
}

function littleEndianNumber(bytes) {
  let value = 0n;
  for (let index = bytes.length - 1; index >= 0; index--) value = (value << 8n) | BigInt(bytes[index]);
  return value;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0n);
}

async function sha256(...parts) {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", concat(...parts)));
}

// Equality of the plain values used here: numbers, strings, bytes, arrays, objects.
function same(a, b) {
  if (a instanceof Uint8Array) return b instanceof Uint8Array && equalBytes(a, b);
  if (a === null || typeof a !== "object") return a === b;
  if (b === null || typeof b !== "object") return false;
  const names = Object.keys(a);
  return names.length === Object.keys(b).length && names.every((name) => same(a[name], b[name]));
}

// ---------------------------------------------------------------- keys and signatures

const FIELD_PRIME = 2n ** 255n - 19n;
const GROUP_ORDER = 2n ** 252n + 27742317777372353535851937790883648493n;
const SIGN_BIT_CLEAR = 2n ** 255n - 1n;
const LOW_ORDER_Y = new Set([
  0n,
  1n,
  FIELD_PRIME - 1n,
  2707385501144840649318225287225658788936804267575313519463743609750303402022n,
  55188659117513257062467267217118295137698188065244968500265048394206261417927n,
]);
const importedKeys = new Map();

function canonicalPoint(encoded) {
  const y = littleEndianNumber(encoded) & SIGN_BIT_CLEAR;
  return y < FIELD_PRIME && !LOW_ORDER_Y.has(y);
}

async function importKey(publicKey) {
  const name = toHex(publicKey);
  if (!importedKeys.has(name)) {
    importedKeys.set(name, await crypto.subtle.importKey("raw", publicKey, "Ed25519", false, ["verify"]));
  }
  return importedKeys.get(name);
}

// Strict Ed25519: what any two libraries could disagree about is refused first.
async function verifySignature(publicKey, signature, message) {
  ensure(publicKey.length === 32 && signature.length === 64, "key or signature has the wrong length");
  ensure(canonicalPoint(publicKey), "public key is low-order or not canonical");
  ensure(canonicalPoint(signature.subarray(0, 32)), "R is low-order or not canonical");
  ensure(littleEndianNumber(signature.subarray(32)) < GROUP_ORDER, "S is not canonical");
  let valid = false;
  try {
    valid = await crypto.subtle.verify("Ed25519", await importKey(publicKey), signature, message);
  } catch (error) {
    // Only DataError speaks of the key; a browser without Ed25519 must not look like a forgery.
    if (error.name === "NotSupportedError") throw error;
  }
  ensure(valid, "signature does not match");
}

const BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const PEER_ID_PREFIX = Uint8Array.of(0x00, 0x24, 0x08, 0x01, 0x12, 0x20);

// The public key inside a peer id, in its one spelling.
function publicKeyOf(peerId) {
  ensure(peerId.length === 52 && peerId[0] === "1" && peerId[1] !== "1", "not an Ed25519 peer id");
  let value = 0n;
  for (const character of peerId) {
    const digit = BASE58.indexOf(character);
    ensure(digit >= 0, "not an Ed25519 peer id");
    value = value * 58n + BigInt(digit);
  }
  const raw = bigEndian(value, 38);
  ensure(value < 1n << 304n && equalBytes(raw.subarray(0, 6), PEER_ID_PREFIX), "not an Ed25519 peer id");
  return raw.subarray(6);
}

// ---------------------------------------------------------------- canonical JSON (RFC 8785)

const DEPTH_MAX = 16;

function encodeCanonical(value, depth = DEPTH_MAX) {
  ensure(depth > 0, "nested too deeply");
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") {
    ensure(value.isWellFormed(), "a string has a lone surrogate");
    return JSON.stringify(value);
  }
  if (typeof value === "number") {
    ensure(Number.isSafeInteger(value), "a number is not an integer up to 2^53 - 1");
    return String(value);
  }
  if (Array.isArray(value)) {
    return `[${value.map((item) => encodeCanonical(item, depth - 1)).join(",")}]`;
  }
  const members = Object.keys(value).sort().map((name) => {
    ensure(/^[\x00-\x7f]*$/.test(name), "a member name is ASCII text");
    return `${JSON.stringify(name)}:${encodeCanonical(value[name], depth - 1)}`;
  });
  return `{${members.join(",")}}`;
}

function decodeCanonical(bytes) {
  const text = utf8(bytes, "the bundle");
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Fault("not JSON");
  }
  ensure(encodeCanonical(value) === text, "not canonical JSON: it does not re-encode to itself");
  return value;
}

// ---------------------------------------------------------------- protobuf, strictly

// A schema maps field numbers to [name, kind]; "*" marks a repeated field. Kinds: u32, s32
// (zigzag), u64, bool, enum, string, bytes, or another schema. u64 values are BigInts.
const PRICES = {
  1: ["prompt", "u64"], 2: ["cached_prompt", "u64"], 3: ["output", "u64"],
  4: ["rejected_draft", "u64"], 5: ["replayed", "u64"],
};
const ENVELOPE = {
  1: ["payload_type", "string"], 2: ["payload", "bytes"], 3: ["signer", "bytes"],
  4: ["signature", "bytes"],
};
const NETWORK_FILE_DIGEST = { 1: ["network_id", "string"], 2: ["sha256", "bytes"] };
const BUNDLE_SEAL = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["sha256", "bytes"],
  4: ["sealed_ms", "u64"],
};
const NODE_KEY_CERT = {
  1: ["network_id", "string"], 2: ["peer_id", "string"], 3: ["ledger_key", "bytes"],
  4: ["not_before_ms", "u64"], 5: ["expires_ms", "u64"], 6: ["serial", "u64"],
};
const COUNTS = {
  1: ["prompt", "u64"], 2: ["output", "u64"], 3: ["cached_prompt", "u64"], 4: ["rejected_draft", "u64"],
};
const ROUTE_STAGE = {
  1: ["peer_id", "string"], 2: ["start_layer", "u32"], 3: ["end_layer", "u32"],
  4: ["offer_digest", "bytes"], 5: ["priced_layers", "u32"], 6: ["prices", PRICES],
  7: ["entered_epoch", "u32"], 8: ["base", COUNTS], 9: ["carried_microcredits", "u64"],
  10: ["replayed_tokens", "u32"], 11: ["rebuilt", "bool"],
};
const ROUTE_PLAN = { 1: ["model_digest", "bytes"], 2: ["stages*", ROUTE_STAGE] };
const LOGIT_BIAS = { 1: ["id", "u32"], 2: ["micros", "s32"] };
const GRAMMAR = { 1: ["json_schema", "string"], 2: ["regex", "string"], 3: ["lark", "string"] };
const SAMPLING = {
  1: ["temperature_micros", "u32"], 2: ["top_p_micros", "u32"], 3: ["top_k", "u32"],
  4: ["seed", "u64"], 5: ["end_ids*", "u32"], 6: ["min_p_micros", "u32"],
  7: ["presence_penalty_micros", "s32"], 8: ["frequency_penalty_micros", "s32"],
  9: ["repetition_penalty_micros", "u32"], 10: ["logit_bias*", LOGIT_BIAS],
  11: ["top_logprobs", "u32"], 12: ["grammar?", GRAMMAR],
};
const SESSION_OPEN = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["client_peer_id", "string"], 5: ["route", ROUTE_PLAN], 6: ["sampling", SAMPLING],
  7: ["prompt_tokens", "u32"], 8: ["max_tokens", "u32"], 9: ["chunk_tokens", "u32"],
  10: ["prefill_chunk_tokens", "u32"], 11: ["wire_dtype", "enum"], 12: ["handoff_salt", "bytes"],
  13: ["issued_ms", "u64"], 14: ["expires_ms", "u64"], 15: ["resume_position", "u32"],
  16: ["qos", "enum"], 17: ["start", COUNTS], 18: ["audit_commit", "bytes"],
};
const ENERGY = { 1: ["millijoules_per_token_layer", "u64"], 2: ["grams_co2_per_kwh", "u64"] };
const OFFER = {
  1: ["network_id", "string"], 2: ["model_digest", "bytes"], 3: ["start_layer", "u32"],
  4: ["end_layer", "u32"], 5: ["incarnation", "u64"], 6: ["sequence", "u64"],
  7: ["issued_ms", "u64"], 8: ["expires_ms", "u64"], 9: ["state", "enum"],
  10: ["evidence", "enum"], 11: ["prices", PRICES], 12: ["numeric_class", "string"],
  13: ["region", "string"], 14: ["kv_tokens_total", "u64"], 15: ["kv_tokens_free", "u64"],
  16: ["sessions_active", "u32"], 17: ["decode_us", "u64"], 18: ["prefill_us_per_token", "u64"],
  19: ["public_address", "string"], 20: ["peer_address", "string"], 21: ["certificate", "bytes"],
  22: ["multiaddrs*", "string"], 23: ["energy", ENERGY],
};
const TENSOR = {
  1: ["name", "string"], 2: ["dtype", "string"], 3: ["shape*", "u64"], 4: ["sha256", "bytes"],
};
const MANIFEST = {
  1: ["name", "string"], 2: ["architecture", "string"], 3: ["layers", "u32"],
  4: ["hidden_size", "u32"], 5: ["vocabulary_size", "u32"], 6: ["context_length", "u32"],
  7: ["embedding_cost_layers", "u32"], 8: ["head_cost_layers", "u32"],
  9: ["tokenizer_sha256", "bytes"], 10: ["config_sha256", "bytes"], 11: ["tensors*", TENSOR],
  12: ["tensor_root", "bytes"],
};
const PAYEE_AMOUNT = { 1: ["payee", "string"], 2: ["microcredits", "u64"] };
const RESERVATION = {
  1: ["network_id", "string"], 2: ["account", "string"], 3: ["lane", "u32"],
  4: ["sequence", "u64"], 5: ["session_id", "bytes"], 6: ["epoch", "u32"], 7: ["amount", "u64"],
  8: ["caps*", PAYEE_AMOUNT], 9: ["route_digest", "bytes"], 10: ["issued_ms", "u64"],
  11: ["expires_ms", "u64"], 12: ["sub_account", "string"],
};
const GRANT = {
  1: ["network_id", "string"], 2: ["reservation_digest", "bytes"], 3: ["account", "string"],
  4: ["session_id", "bytes"], 5: ["amount", "u64"], 6: ["granted_ms", "u64"],
  7: ["expires_ms", "u64"], 8: ["merge_delay_ms", "u64"],
};
const COMMITTEE_GRANT = { 1: ["grants*", ENVELOPE] };
const RECEIPT = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["stage_index", "u32"], 5: ["chunk", "u32"], 6: ["start_layer", "u32"],
  7: ["end_layer", "u32"], 8: ["model_digest", "bytes"], 9: ["numeric_class", "string"],
  10: ["traversal", "u64"], 11: ["prompt_tokens", "u64"], 12: ["output_tokens", "u64"],
  13: ["input_commit", "bytes"], 14: ["output_commit", "bytes"], 15: ["previous_digest", "bytes"],
  16: ["issued_ms", "u64"], 17: ["cached_prompt_tokens", "u64"],
  18: ["rejected_draft_tokens", "u64"], 19: ["replayed_tokens", "u64"],
  20: ["state_commit", "bytes"],
};
const DRAWS = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["traversal", "u64"], 5: ["output_commit", "bytes"],
};
const VOUCHER = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["sequence", "u64"], 5: ["account", "string"], 6: ["prompt_tokens", "u64"],
  7: ["output_tokens", "u64"], 8: ["transcript", "bytes"], 9: ["amounts*", PAYEE_AMOUNT],
  10: ["issued_ms", "u64"], 11: ["cached_prompt_tokens", "u64"],
  12: ["rejected_draft_tokens", "u64"], 13: ["epoch_close", "bool"],
};
const LINE = { 1: ["account", "string"], 2: ["debit", "u64"], 3: ["credit", "u64"] };
const ACCOUNT_LIMIT = { 1: ["account", "string"], 2: ["credit_limit", "u64"] };
const SUB_ACCOUNT_TERMS = {
  1: ["account", "string"], 2: ["name", "string"], 3: ["sequence", "u64"], 4: ["limit", "u64"],
  5: ["period", "enum"], 6: ["period_limit", "u64"], 7: ["closed", "bool"],
};
const ENTRY = {
  1: ["network_id", "string"], 2: ["index", "u64"], 3: ["kind", "enum"],
  4: ["session_id", "bytes"], 5: ["cause_digest", "bytes"], 6: ["lines*", LINE],
  7: ["posted_ms", "u64"], 8: ["limit?", ACCOUNT_LIMIT], 9: ["terms?", SUB_ACCOUNT_TERMS],
  10: ["sub_account", "string"],
};

const PAYLOAD_TYPES = new Map([
  [NODE_KEY_CERT, "node-key-cert"], [NETWORK_FILE_DIGEST, "network-file"], [OFFER, "offer"],
  [SESSION_OPEN, "session-open"], [RESERVATION, "reservation"], [GRANT, "grant"],
  [RECEIPT, "receipt"], [DRAWS, "draws"], [VOUCHER, "voucher"], [BUNDLE_SEAL, "bundle-seal"],
]);

const DEFAULTS = { u32: 0, s32: 0, u64: 0n, bool: false, enum: 0, string: "", bytes: new Uint8Array() };
const SCALARS = ["u32", "s32", "u64", "bool", "enum"];

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.offset = 0;
  }

  get done() {
    return this.offset === this.bytes.length;
  }

  // A varint in its shortest form, up to 64 bits.
  varint() {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      ensure(!this.done, "a varint is cut off");
      const byte = this.bytes[this.offset++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) {
        ensure((byte !== 0 || shift === 0n) && value <= U64_MAX, "a varint is not in its one form");
        return value;
      }
    }
    throw new Fault("a varint is too long");
  }

  chunk() {
    const length = this.varint();
    ensure(length <= BigInt(this.bytes.length - this.offset), "a field is cut off");
    const start = this.offset;
    this.offset += Number(length);
    return this.bytes.subarray(start, this.offset);
  }

  scalar(kind) {
    const value = this.varint();
    if (kind === "u64") return value;
    if (kind === "bool") {
      ensure(value <= 1n, "a flag is 0 or 1");
      return value === 1n;
    }
    if (kind === "s32") {
      ensure(value <= BigInt(U32_MAX), "a number is too large");
      return Number(value & 1n ? -((value + 1n) >> 1n) : value >> 1n);
    }
    if (kind === "enum" && value >= U64_MAX - 2n ** 31n + 1n) return Number(value - U64_MAX - 1n);
    ensure(value <= (kind === "enum" ? 2n ** 31n - 1n : BigInt(U32_MAX)), "a number is too large");
    return Number(value);
  }
}

// Decode the one canonical encoding: fields in order, none unknown, no default written out.
function decode(schema, bytes) {
  const reader = new Reader(bytes);
  const message = emptyMessage(schema);
  let last = 0;
  while (!reader.done) {
    const tag = reader.varint();
    const number = Number(tag >> 3n);
    ensure(Object.hasOwn(schema, number), "an unknown field");
    const [label, kind] = schema[number];
    const repeated = label.endsWith("*");
    const name = label.replace(/[*?]/, "");
    const isScalar = SCALARS.includes(kind);
    ensure(Number(tag & 7n) === (isScalar && !repeated ? 0 : 2), `${name} has another wire type`);
    const again = number === last && repeated && !isScalar;
    ensure(number > last || again, "fields are out of order or twice");
    last = number;
    if (repeated && isScalar) message[name] = decodePacked(reader.chunk(), kind);
    else if (repeated) message[name].push(decodeOne(reader, kind));
    else message[name] = decodeOne(reader, kind);
    const empty = !message[name] || message[name].length === 0;
    ensure(!empty, `${name} is written out though it has its default`);
  }
  return message;
}

function emptyMessage(schema) {
  const message = {};
  for (const [label, kind] of Object.values(schema)) {
    if (label.endsWith("*")) message[label.slice(0, -1)] = [];
    else if (label.endsWith("?")) message[label.slice(0, -1)] = null; // told from an empty one
    else message[label] = typeof kind === "string" ? DEFAULTS[kind] : emptyMessage(kind);
  }
  return message;
}

function decodeOne(reader, kind) {
  if (kind === "string") return utf8(reader.chunk(), "a string");
  if (kind === "bytes") return reader.chunk().slice();
  if (typeof kind === "string") return reader.scalar(kind);
  return decode(kind, reader.chunk());
}

function decodePacked(bytes, kind) {
  const reader = new Reader(bytes);
  const values = [];
  while (!reader.done) values.push(reader.scalar(kind));
  return values;
}

function encodeVarint(value) {
  const bytes = [];
  for (let rest = BigInt(value); ; rest >>= 7n) {
    if (rest < 128n) return Uint8Array.from([...bytes, Number(rest)]);
    bytes.push(Number(rest & 127n) | 128);
  }
}

// Encode a message without packed fields; used for the route that a reservation commits to.
function encode(schema, message) {
  const parts = [];
  const chunk = (number, bytes) => parts.push(encodeVarint(number * 8 + 2), encodeVarint(bytes.length), bytes);
  for (const [number, [label, kind]] of Object.entries(schema)) {
    const values = label.endsWith("*") ? message[label.slice(0, -1)] : [message[label]];
    for (const value of values) {
      if (typeof kind === "object") chunk(Number(number), encode(kind, value));
      else if (kind === "string" && value !== "") chunk(Number(number), encoder.encode(value));
      else if (kind === "bytes" && value.length) chunk(Number(number), value);
      else if (["u32", "u64", "bool"].includes(kind) && BigInt(value)) parts.push(encodeVarint(Number(number) * 8), encodeVarint(value));
    }
  }
  return concat(...parts);
}

// Verify a signed envelope and decode its payload; without a signer any key may have signed.
async function openEnvelope(envelope, schema, signer = null) {
  const type = `application/vnd.plait.${PAYLOAD_TYPES.get(schema)}.v1`;
  ensure(envelope.payload_type === type, `expected ${type}`);
  ensure(signer === null || equalBytes(envelope.signer, signer), `${type} is signed by another key`);
  const head = `DSSEv1 ${type.length} ${type} ${envelope.payload.length} `;
  await verifySignature(envelope.signer, envelope.signature, concat(encoder.encode(head), envelope.payload));
  return decode(schema, envelope.payload);
}

// ---------------------------------------------------------------- the network file

// The subset of TOML that Plait writes: [network], [[tables]], and on each line a name with a
// JSON-like string, an unsigned integer, or a list of strings.
function parseToml(text) {
  const document = { network: null, authority: [], bootstrap: [], witness: [] };
  let table = null;
  for (const line of text.split(/\r?\n/)) {
    const array = /^\[\[(authority|bootstrap|witness)\]\]$/.exec(line);
    const pair = /^([a-z_]+) = (.*)$/.exec(line);
    if (line === "" || line.startsWith("#")) continue;
    if (line === "[network]" && document.network === null) table = document.network = {};
    else if (array) document[array[1]].push((table = {}));
    else {
      ensure(pair && table && !Object.hasOwn(table, pair[1]), `network file: cannot read ${line.slice(0, 60)}`);
      table[pair[1]] = parseTomlValue(pair[2]);
    }
  }
  ensure(document.network !== null, "network file: the table [network] is missing");
  return document;
}

function parseTomlValue(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Fault(`network file: cannot read the value ${text.slice(0, 60)}`);
  }
  const strings = Array.isArray(value) && value.every((item) => typeof item === "string");
  ensure(typeof value === "string" || Number.isSafeInteger(value) || strings, "network file: an unexpected value");
  return value;
}

// Read network.toml as `plait` writes it; throws for anything else.
function parseNetworkFile(text) {
  const { network: head, authority, witness } = parseToml(text);
  const texts = [head.id, head.founder, head.admission].every((item) => typeof item === "string");
  ensure(texts && ["open", "invite", "allowlist"].includes(head.admission), "network file: id, founder or admission");
  publicKeyOf(head.founder);
  const network = {
    id: head.id,
    founder: head.founder,
    admission: head.admission,
    issuerKey: fromHex(head.issuer_key, 32, "issuer_key"),
    allowedPeers: new Set(head.allowed_peers ?? []),
    authorities: authority.map((item) => ({
      peer: item.peer,
      ledgerKey: fromHex(item.ledger_key, 32, "ledger_key"),
      logKey: fromHex(item.log_key, 32, "log_key"),
      logOrigin: item.log_origin,
    })),
    witnesses: witness.map((item) => ({ name: item.name, key: fromHex(item.key, 32, "key") })),
    witnessQuorum: head.witness_quorum ?? 0,
  };
  const names = new Set(network.witnesses.map((item) => item.name));
  const keys = new Set(network.witnesses.map((item) => toHex(item.key)));
  for (const item of network.authorities) ensure(!keys.has(toHex(item.logKey)), "network file: a log witnesses itself");
  const distinct = names.size === network.witnesses.length && keys.size === network.witnesses.length;
  ensure(distinct, "network file: two witnesses have one name or key");
  ensure(network.witnessQuorum >= 0 && network.witnessQuorum <= names.size, "network file: witness_quorum");
  return network;
}

// Check network.toml.sig; throws unless the founder signed exactly these bytes.
async function checkNetworkSignature(tomlBytes, signatureText, network) {
  const envelope = decode(ENVELOPE, fromBase64(signatureText.trim(), "the network file's signature"));
  const statement = await openEnvelope(envelope, NETWORK_FILE_DIGEST, publicKeyOf(network.founder));
  ensure(statement.network_id === network.id && equalBytes(statement.sha256, await sha256(tomlBytes)),
    "the signature is for another network file");
}

// ---------------------------------------------------------------- reading a bundle

const BUNDLE_BYTES_MAX = 64 * 2 ** 20;
const BUNDLE_FORMAT = "plait.bundle.v3";
const BUNDLE_FORMATS_BEFORE = ["plait.bundle.v1", "plait.bundle.v2"];
const EPOCHS_MAX = 1000;
const MEMBERS = [
  "checkpoint", "client_cert", "entries", "epochs", "finish_reason", "format", "manifest",
  "network", "prompt_ids", "proofs", "seal", "sealed_ms", "text", "token_ids",
];
const EPOCH_MEMBERS = [
  "cut", "frames", "grant", "offers", "receipts", "reservation", "session_open", "stage_certs",
  "terms", "voucher",
];
const TERMS_MEMBERS = [
  "chunk_tokens", "client", "client_ledger_key", "epoch", "handoff_salt", "max_tokens",
  "model_digest", "prefill_chunk_tokens", "prompt_tokens", "qos", "resume_position", "session_id",
  "stages", "start",
];
const STAGE_MEMBERS = [
  "base", "carried", "end", "entered_epoch", "ledger_key", "numeric_class", "offer_digest", "peer",
  "priced_layers", "prices", "rebuilt", "replayed", "start",
];
const COUNTS_MEMBERS = ["cached_prompt", "output", "prompt", "rejected_draft"];
const QOS = [null, "interactive", "standard", "batch"]; // by number
const WIRE = [null, "fp32", "bf16", "int8"]; // by number
const PRICE_MEMBERS = ["cached_prompt", "output", "prompt", "rejected_draft", "replayed"];

function readMembers(value, what, names) {
  ensure(value !== null && typeof value === "object" && !Array.isArray(value), `${what} is not an object`);
  for (const name of names) ensure(Object.hasOwn(value, name), `${what} lacks the member ${name}`);
  ensure(Object.keys(value).length === names.length, `${what} has an unknown member`);
  return value;
}

function readU64(value, what) {
  if (typeof value === "number") {
    ensure(Number.isSafeInteger(value) && value >= 0, `${what} is not an unsigned integer`);
    return BigInt(value);
  }
  ensure(typeof value === "string" && /^[1-9][0-9]{0,19}$/.test(value), `${what} is not an unsigned integer`);
  const number = BigInt(value);
  ensure(number > BigInt(Number.MAX_SAFE_INTEGER) && number <= U64_MAX, `${what} is not written as it must be`);
  return number;
}

function readU32(value, what) {
  const number = readU64(value, what);
  ensure(number <= BigInt(U32_MAX), `${what} is too large`);
  return Number(number);
}

function readText(value, what) {
  ensure(typeof value === "string", `${what} is not a string`);
  return value;
}

function readFlag(value, what) {
  ensure(typeof value === "boolean", `${what} is not true or false`);
  return value;
}

function readItems(value, what, readItem) {
  ensure(Array.isArray(value), `${what} is not an array`);
  return value.map((item) => readItem(item, what));
}

function readEnvelope(value, what) {
  const members = readMembers(value, what, ["payload", "payload_type", "signature", "signer"]);
  return {
    payload: fromBase64(members.payload, what),
    payload_type: readText(members.payload_type, what),
    signature: fromBase64(members.signature, what),
    signer: fromBase64(members.signer, what),
  };
}

function readOptional(value, what) {
  return value === null ? null : readEnvelope(value, what);
}

function readCounts(value, what) {
  const members = readMembers(value, what, COUNTS_MEMBERS);
  return Object.fromEntries(COUNTS_MEMBERS.map((name) => [name, readU64(members[name], name)]));
}

function readStage(value) {
  const members = readMembers(value, "stage", STAGE_MEMBERS);
  const prices = readMembers(members.prices, "prices", PRICE_MEMBERS);
  const stage = {
    peer: readText(members.peer, "peer"),
    ledgerKey: fromHex(members.ledger_key, 32, "ledger_key"),
    start: readU32(members.start, "start"),
    end: readU32(members.end, "end"),
    pricedLayers: readU32(members.priced_layers, "priced_layers"),
    prices: Object.fromEntries(PRICE_MEMBERS.map((name) => [name, readU64(prices[name], name)])),
    numericClass: readText(members.numeric_class, "numeric_class"),
    offerDigest: fromHex(members.offer_digest, 32, "offer_digest"),
    enteredEpoch: readU32(members.entered_epoch, "entered_epoch"),
    base: readCounts(members.base, "base"),
    carried: readU64(members.carried, "carried"),
    replayed: readU32(members.replayed, "replayed"),
    rebuilt: readFlag(members.rebuilt, "rebuilt"),
  };
  ensure(stage.start < stage.end, "a span is empty");
  return stage;
}

// Terms name what is on the wire only if it is not fp32.
function readTerms(value, networkId) {
  const lean = value !== null && typeof value === "object" && Object.hasOwn(value, "wire_dtype");
  const members = readMembers(value, "terms", lean ? [...TERMS_MEMBERS, "wire_dtype"] : TERMS_MEMBERS);
  ensure(!lean || (typeof members.wire_dtype === "string" && WIRE.indexOf(members.wire_dtype) > 1), "wire dtype");
  ensure(typeof members.qos === "string" && QOS.includes(members.qos), "an unknown class of service");
  return checkedTerms({
    networkId,
    sessionId: fromHex(members.session_id, 16, "session_id"),
    epoch: readU32(members.epoch, "epoch"),
    client: readText(members.client, "client"),
    clientLedgerKey: fromHex(members.client_ledger_key, 32, "client_ledger_key"),
    modelDigest: fromHex(members.model_digest, 32, "model_digest"),
    stages: readItems(members.stages, "stages", readStage),
    promptTokens: readU32(members.prompt_tokens, "prompt_tokens"),
    maxTokens: readU32(members.max_tokens, "max_tokens"),
    chunkTokens: readU32(members.chunk_tokens, "chunk_tokens"),
    prefillChunkTokens: readU32(members.prefill_chunk_tokens, "prefill_chunk_tokens"),
    handoffSalt: fromHex(members.handoff_salt, 32, "handoff_salt"),
    resumePosition: readU32(members.resume_position, "resume_position"),
    start: readCounts(members.start, "start"),
    qos: members.qos, wireDtype: lean ? members.wire_dtype : "fp32",
  });
}

// The class that an offer names, for fp32 on the wire, with what is on the session's wire.
function classOnWire(numericClass, wireDtype) {
  const parts = numericClass.split("/");
  if (wireDtype === "fp32" || parts.length < 4) return numericClass;
  parts[3] = wireDtype;
  return parts.join("/");
}

function checkedTerms(terms) {
  ensure(terms.wireDtype === "fp32" || !terms.stages.some((stage) => stage.numericClass.split("/")[1] === "fp32"),
    "what computes in fp32 takes fp32 from the wire");
  ensure(terms.sessionId.length === 16 && terms.handoffSalt.length === 32, "session id or salt");
  ensure(terms.stages.length > 0, "a session needs a stage");
  ensure(new Set(terms.stages.map((stage) => stage.peer)).size === terms.stages.length, "a peer serves one stage");
  ensure(terms.promptTokens >= 1 && terms.maxTokens >= 1, "prompt and answer have at least one token");
  for (const size of [terms.chunkTokens, terms.prefillChunkTokens]) {
    ensure(size >= 1 && size <= 256, "a chunk has 1 to 256 tokens");
  }
  checkStart(terms);
  for (const stage of terms.stages) checkStint(terms, stage);
  return terms;
}

// The session's counts when a position is the next to be fed.
function countsAt(terms, position, cached = 0n, rejected = 0n) {
  const prompt = BigInt(Math.min(position, terms.promptTokens)) - cached;
  return {
    prompt: prompt > 0n ? prompt : 0n,
    output: BigInt(Math.max(position - terms.promptTokens + 1, 0)),
    cached_prompt: cached,
    rejected_draft: rejected,
  };
}

function checkStart(terms) {
  const { epoch, resumePosition, start } = terms;
  ensure(epoch >= 1, "the first epoch is 1");
  const fresh = resumePosition === 0 && start.cached_prompt === 0n && start.rejected_draft === 0n;
  ensure(epoch > 1 || fresh, "the first epoch starts from nothing");
  ensure(BigInt(resumePosition) >= start.cached_prompt, "a session resumes behind what it took from caches");
  ensure(same(start, countsAt(terms, resumePosition, start.cached_prompt, start.rejected_draft)),
    "the counts at the start do not fit the resume position");
  ensure(start.output < BigInt(terms.maxTokens), "nothing is left to draw");
}

function checkStint(terms, stage) {
  const { epoch } = terms;
  ensure(stage.enteredEpoch >= 1 && stage.enteredEpoch <= epoch, "a stage entered in an epoch that has not been");
  if (stage.enteredEpoch === epoch) {
    ensure(same(stage.base, terms.start), "a stage that enters begins where the epoch does");
    ensure(epoch === 1 || (stage.rebuilt && stage.replayed === terms.resumePosition),
      "a stage that enters is rebuilt up to the resume position");
  }
  const fromNothing = stage.carried === 0n && stage.replayed === 0 && stage.base.prompt === 0n;
  ensure(stage.enteredEpoch > 1 || fromNothing, "a stage of the first epoch begins from nothing");
  ensure(epoch > 1 || !stage.rebuilt, "there is nothing to rebuild in the first epoch");
}

function readFrame(value) {
  ensure(Array.isArray(value) && value.length === 7, "a frame has seven items");
  return {
    traversal: readU64(value[0], "traversal"),
    firstPosition: readU32(value[1], "first position"),
    rows: readU32(value[2], "rows"),
    drafts: readItems(value[3], "drafts", readU32),
    sample: readFlag(value[4], "sample"),
    closeChunk: readFlag(value[5], "close_chunk"),
    replay: readFlag(value[6], "replay"),
  };
}

function readCut(value) {
  const members = readMembers(value, "cut", ["draws", "receipts", "traversal"]);
  return {
    traversal: readU64(members.traversal, "traversal"),
    receipts: readItems(members.receipts, "cut: receipts", readOptional),
    draws: readOptional(members.draws, "cut: draws"),
  };
}

function readEpoch(value, networkId) {
  const members = readMembers(value, "epoch", EPOCH_MEMBERS);
  return {
    terms: readTerms(members.terms, networkId),
    sessionOpen: readEnvelope(members.session_open, "session_open"),
    stageCerts: readItems(members.stage_certs, "stage_certs", readEnvelope),
    offers: readItems(members.offers, "offers", readEnvelope),
    frames: readItems(members.frames, "frames", readFrame),
    reservation: readOptional(members.reservation, "reservation"),
    grant: readOptional(members.grant, "grant"),
    receipts: readItems(members.receipts, "receipts", readEnvelope),
    cut: members.cut === null ? null : readCut(members.cut),
    voucher: readOptional(members.voucher, "voucher"),
  };
}

function readProof(value) {
  const members = readMembers(value, "proof", ["hashes", "index"]);
  return {
    index: readU64(members.index, "proof: index"),
    hashes: readItems(members.hashes, "proof: hashes", fromBase64),
  };
}

async function readBundle(bytes) {
  ensure(bytes.length <= BUNDLE_BYTES_MAX, `a bundle is at most ${BUNDLE_BYTES_MAX} bytes`);
  const members = readMembers(decodeCanonical(bytes), "the bundle", MEMBERS);
  ensure(!BUNDLE_FORMATS_BEFORE.includes(members.format),
    `${members.format} is the format of an earlier Plait; this one reads ${BUNDLE_FORMAT}`);
  ensure(members.format === BUNDLE_FORMAT, `the format is not ${BUNDLE_FORMAT}`);
  const { seal, ...body } = members;
  const networkId = readText(members.network, "network");
  const epochs = readItems(members.epochs, "epochs", (item) => readEpoch(item, networkId));
  ensure(epochs.length > 0 && epochs.length <= EPOCHS_MAX, `a bundle has 1 to ${EPOCHS_MAX} epochs`);
  return {
    networkId,
    terms: epochs[0].terms, // what all epochs have in common is in them
    epochs,
    clientCert: readEnvelope(members.client_cert, "client_cert"),
    manifest: members.manifest === null ? null : fromBase64(members.manifest, "manifest"),
    promptIds: readItems(members.prompt_ids, "prompt_ids", readU32),
    tokenIds: readItems(members.token_ids, "token_ids", readU32),
    text: readText(members.text, "text"),
    finishReason: readText(members.finish_reason, "finish_reason"),
    entries: readItems(members.entries, "entries", fromBase64),
    proofs: readItems(members.proofs, "proofs", readProof),
    checkpoint: members.checkpoint === null ? null : readText(members.checkpoint, "checkpoint"),
    sealedMs: readU64(members.sealed_ms, "sealed_ms"),
    seal: readEnvelope(seal, "seal"),
    bodyDigest: await sha256(encoder.encode(encodeCanonical(body))),
  };
}

// ---------------------------------------------------------------- who, and on which terms

const CLOCK_SKEW_MS_MAX = 120_000n;

async function checkSeal(bundle) {
  const seal = await openEnvelope(bundle.seal, BUNDLE_SEAL, publicKeyOf(bundle.terms.client));
  ensure(equalBytes(seal.sha256, bundle.bodyDigest), "the contents are not those that were sealed");
  const matches = seal.network_id === bundle.networkId && seal.sealed_ms === bundle.sealedMs;
  ensure(matches && equalBytes(seal.session_id, bundle.terms.sessionId),
    "the seal is for another network, session or time");
}

function checkNetwork(bundle, network) {
  ensure(bundle.networkId === network.id, `the bundle is of ${bundle.networkId}, we trust ${network.id}`);
  if (network.admission !== "allowlist") return;
  const stages = bundle.epochs.flatMap((epoch) => epoch.terms.stages);
  for (const peer of [bundle.terms.client, ...stages.map((stage) => stage.peer)]) {
    ensure(network.allowedPeers.has(peer), `${peer} is not on the network's list`);
  }
}

// How tokens are drawn, with every value in its range.
function checkedSampling(message) {
  const within = (value, least, most, what) => ensure(value >= least && value <= most, `${what} is out of range`);
  const million = 1_000_000;
  const repetition = message.repetition_penalty_micros || million;
  within(message.temperature_micros, 0, 100 * million, "temperature");
  within(message.top_p_micros, 1, million, "top_p");
  within(message.min_p_micros, 0, million, "min_p");
  within(message.presence_penalty_micros, -2 * million, 2 * million, "presence_penalty");
  within(message.frequency_penalty_micros, -2 * million, 2 * million, "frequency_penalty");
  within(repetition, 1, 10 * million, "repetition_penalty");
  within(message.top_logprobs, 0, 20, "top_logprobs");
  within(message.logit_bias.length, 0, 300, "the number of biases");
  message.logit_bias.forEach(({ id, micros }, index) => {
    ensure(index === 0 || message.logit_bias[index - 1].id < id, "logit_bias is ascending by id");
    within(micros, -100 * million, 100 * million, "a logit bias");
  });
  if (message.grammar !== null) {
    const texts = Object.values(message.grammar).filter((text) => text !== "");
    ensure(texts.length === 1 && [...texts[0]].length <= 65_536, "a grammar is one text, of limited length");
  }
  return { ...message, repetition_penalty_micros: repetition };
}

async function checkTerms(epoch) {
  const { terms } = epoch;
  const opening = await openEnvelope(epoch.sessionOpen, SESSION_OPEN, terms.clientLedgerKey);
  const { route } = opening;
  const sampling = checkedSampling(opening.sampling);
  ensure(route.stages.length === terms.stages.length, "the signed opening has another number of stages");
  ensure(route.model_digest.length === 32 && opening.wire_dtype >= 1 && opening.wire_dtype <= 3, "model digest or wire dtype");
  ensure(opening.qos >= 1 && opening.qos <= 3, "an unknown class of service");
  let layer = 0;
  const stages = route.stages.map((stage, index) => {
    ensure(stage.start_layer === layer && stage.start_layer < stage.end_layer, "the stages do not abut from layer 0");
    ensure(stage.offer_digest.length === 32, "an offer digest is 32 bytes");
    layer = stage.end_layer;
    const { ledgerKey, numericClass } = terms.stages[index];
    return {
      peer: stage.peer_id, ledgerKey, start: stage.start_layer, end: stage.end_layer,
      pricedLayers: stage.priced_layers, prices: stage.prices, numericClass, offerDigest: stage.offer_digest,
      enteredEpoch: stage.entered_epoch, base: stage.base, carried: stage.carried_microcredits,
      replayed: stage.replayed_tokens, rebuilt: stage.rebuilt,
    };
  });
  const signed = checkedTerms({
    networkId: opening.network_id, sessionId: opening.session_id, epoch: opening.epoch,
    client: opening.client_peer_id, clientLedgerKey: terms.clientLedgerKey,
    modelDigest: route.model_digest, stages, promptTokens: opening.prompt_tokens,
    maxTokens: opening.max_tokens, chunkTokens: opening.chunk_tokens,
    prefillChunkTokens: opening.prefill_chunk_tokens, handoffSalt: opening.handoff_salt,
    resumePosition: opening.resume_position, start: opening.start, qos: QOS[opening.qos],
    wireDtype: WIRE[opening.wire_dtype],
  });
  ensure(same(signed, terms), "the signed opening has different terms");
  return { sampling, endIds: new Set(sampling.end_ids), openedMs: opening.issued_ms };
}

// Each epoch goes on with the session that the one before it left, on the same terms.
function checkSuccession(bundle, openings) {
  for (const [index, opening] of openings.entries()) {
    if (index === 0) continue;
    ensure(same(opening.sampling, openings[index - 1].sampling), "an epoch draws in another way than the one before");
    ensure(opening.openedMs >= openings[index - 1].openedMs, "an epoch was opened before the one before it");
  }
  ensure(bundle.terms.epoch === 1, "the first epoch is missing");
  const promised = new Map();
  let before = null;
  for (const epoch of bundle.epochs) {
    const { terms } = epoch;
    const own = ["epoch", "stages", "handoffSalt", "resumePosition", "start"];
    for (const name of Object.keys(terms)) {
      ensure(own.includes(name) || same(terms[name], bundle.terms[name]), `epoch ${terms.epoch}: its ${name} is not the session's`);
    }
    ensure(before === null || terms.epoch > before.epoch, `epoch ${terms.epoch}: epoch numbers do not rise`);
    for (const [index, stage] of terms.stages.entries()) {
      const what = `epoch ${terms.epoch}: stage ${index}`;
      if (stage.enteredEpoch === terms.epoch) {
        ensure(stage.carried === (promised.get(stage.peer) ?? 0n), `${what} does not carry what was promised before`);
        continue;
      }
      const old = before?.stages.find((one) => one.peer === stage.peer);
      ensure(old && same({ ...old, rebuilt: stage.rebuilt }, stage), `${what} has other terms than in the epoch before`);
    }
    before = terms;
    for (const [payee, amount] of promisedIn(epoch)) promised.set(payee, amount);
  }
}

// What the epoch's last voucher promises each payee in the session; unchecked.
function promisedIn(epoch) {
  if (epoch.voucher === null) return new Map();
  return new Map(decode(VOUCHER, epoch.voucher.payload).amounts.map((item) => [item.payee, item.microcredits]));
}

async function checkKeyCert(envelope, networkId, nowMs, peer, ledgerKey) {
  const cert = await openEnvelope(envelope, NODE_KEY_CERT);
  const peerKey = publicKeyOf(cert.peer_id);
  ensure(equalBytes(envelope.signer, peerKey), "the certificate is not signed by the peer it names");
  ensure(cert.peer_id === peer, `the certificate is not of ${peer}`);
  ensure(cert.network_id === networkId, "the certificate is for another network");
  const separate = cert.ledger_key.length === 32 && !equalBytes(cert.ledger_key, peerKey);
  ensure(separate, "the certificate names no separate ledger key");
  const valid = cert.not_before_ms - CLOCK_SKEW_MS_MAX <= nowMs && nowMs < cert.expires_ms;
  ensure(valid, "the certificate is not valid at this time");
  ensure(equalBytes(cert.ledger_key, ledgerKey), "the certificate names another ledger key");
}

async function checkStageCerts(epoch, openedMs) {
  const { stages, networkId } = epoch.terms;
  ensure(epoch.stageCerts.length === stages.length, "not one certificate for each stage");
  for (const [index, stage] of stages.entries()) {
    await checkKeyCert(epoch.stageCerts[index], networkId, openedMs, stage.peer, stage.ledgerKey);
  }
}

// Each stage had offered its span when it entered; openedByEpoch says when each epoch opened.
async function checkOffers(epoch, openedByEpoch) {
  const { terms } = epoch;
  ensure(epoch.offers.length === terms.stages.length, "not one offer for each stage");
  for (const [index, stage] of terms.stages.entries()) {
    const envelope = epoch.offers[index];
    const openedMs = openedByEpoch.get(stage.enteredEpoch) ?? 0n;
    const offer = await openEnvelope(envelope, OFFER, publicKeyOf(stage.peer));
    ensure(equalBytes(await sha256(envelope.payload), stage.offerDigest), `offer of stage ${index} is not the route's`);
    const matches = offer.network_id === terms.networkId && equalBytes(offer.model_digest, terms.modelDigest);
    ensure(matches, `offer of stage ${index} is for another network or model`);
    ensure(offer.start_layer < offer.end_layer && offer.start_layer <= stage.start && stage.end <= offer.end_layer,
      `offer of stage ${index} does not hold its layers`);
    ensure(same(offer.prices, stage.prices), `offer of stage ${index} has other prices`);
    ensure(offer.numeric_class === stage.numericClass, `offer of stage ${index} has another numeric class`);
    ensure(offer.state === 1, `the peer of stage ${index} was not ready`);
    const current = offer.issued_ms - CLOCK_SKEW_MS_MAX <= openedMs && openedMs <= offer.expires_ms + CLOCK_SKEW_MS_MAX;
    ensure(current, `offer of stage ${index} was not valid when the session opened`);
  }
}

async function checkManifest(bundle) {
  if (bundle.manifest === null) throw new Absent("the bundle has no manifest, so the number of layers is unknown");
  ensure(equalBytes(await sha256(bundle.manifest), bundle.terms.modelDigest), "the manifest's digest is not the model's");
  return decode(MANIFEST, bundle.manifest);
}

function checkRoute(epoch, manifest) {
  let position = 0;
  for (const [index, stage] of epoch.terms.stages.entries()) {
    ensure(stage.start === position, `stage ${index} starts at layer ${stage.start}, not ${position}`);
    position = stage.end;
  }
  if (manifest === null) return;
  ensure(position === manifest.layers, `the route ends at layer ${position}, the model has ${manifest.layers}`);
  for (const [index, stage] of epoch.terms.stages.entries()) {
    const embedding = stage.start === 0 ? manifest.embedding_cost_layers : 0;
    const head = stage.end === manifest.layers ? manifest.head_cost_layers : 0;
    const due = stage.end - stage.start + embedding + head;
    ensure(stage.pricedLayers === due, `stage ${index} is paid for ${stage.pricedLayers} layers`);
  }
}

function checkAnswer(bundle, opening, manifest) {
  const { tokenIds } = bundle;
  if (manifest !== null) {
    const known = [...bundle.promptIds, ...tokenIds].every((token) => token < manifest.vocabulary_size);
    ensure(known, "a token id is not in the vocabulary");
  }
  ensure(["stop", "length", "ended"].includes(bundle.finishReason), "unknown finish reason");
  const byLength = bundle.finishReason === "length";
  ensure(!byLength || tokenIds.length === bundle.terms.maxTokens, "it claims to have reached the limit, but is shorter");
  if (opening === null) return;
  ensure(!tokenIds.slice(0, -1).some((token) => opening.endIds.has(token)), "the answer goes on after an end id");
  ensure(tokenIds.length > 0 || !byLength, "there is no answer");
  ensure(!byLength || !opening.endIds.has(tokenIds.at(-1)), "it ended with an end id, not by length");
}

// ---------------------------------------------------------------- what went through

const DRAFTS_MAX = 16;
const PENDING_FRAMES_MAX = 1024;

// Which frame may follow in an epoch, and what it counts.
class Progress {
  constructor(terms, cached) {
    this.terms = terms;
    this.next = Math.max(terms.resumePosition, cached);
    this.replayed = 0;
    this.cached = terms.epoch === 1 ? BigInt(cached) : terms.start.cached_prompt;
    this.rejected = terms.start.rejected_draft;
    this.floor = terms.resumePosition - 1;
    this.live = false;
    this.ended = false;
  }

  // Returns the counts after the frame, and the outputs if every draft is accepted.
  take(frame) {
    const { firstPosition, rows, drafts, sample, closeChunk } = frame;
    ensure(!this.ended, "a frame follows the one that ended the answer");
    if (frame.replay) return this.takeReplay(frame);
    this.live = true;
    if (rows > 0 && firstPosition < this.terms.promptTokens) {
      ensure(drafts.length === 0 && closeChunk, "a frame of the prompt is a chunk of its own");
      return this.takePrompt(frame);
    }
    if (rows > 0) {
      const whole = sample && rows === 1 + drafts.length && !(closeChunk && drafts.length > 0);
      ensure(whole, "a decode frame has one row, and one for each draft");
      return this.takeDecode(frame);
    }
    ensure(!sample && drafts.length === 0 && closeChunk, "a frame without rows can only close a chunk");
    this.accept(firstPosition);
    this.next = firstPosition;
    this.ended = true;
    return this.counted(firstPosition, firstPosition);
  }

  takeReplay({ firstPosition, rows, drafts, sample, closeChunk }) {
    const plain = drafts.length === 0 && !sample && !closeChunk;
    ensure(plain && rows > 0 && !this.live, "a replay comes first, and draws and closes nothing");
    const follows = firstPosition === this.replayed && firstPosition + rows <= this.terms.resumePosition;
    ensure(follows, `no replay covers positions from ${firstPosition}`);
    this.replayed = firstPosition + rows;
    return { counts: this.terms.start, worst: this.terms.start.output };
  }

  takePrompt({ firstPosition, rows, sample }) {
    const { promptTokens, prefillChunkTokens } = this.terms;
    const end = firstPosition + rows;
    ensure(firstPosition === this.next, `a frame starts at position ${firstPosition}, not ${this.next}`);
    ensure(rows <= prefillChunkTokens && end <= promptTokens, `no frame covers positions ${firstPosition} to ${end}`);
    ensure(sample === (end === promptTokens), "only the frame that ends the prompt draws, and it must");
    this.next = end;
    this.floor = end - 1;
    return this.counted(end, end);
  }

  takeDecode({ firstPosition, drafts }) {
    ensure(drafts.length <= DRAFTS_MAX, `a frame has at most ${DRAFTS_MAX} drafts`);
    this.accept(firstPosition);
    this.next = firstPosition + 1 + drafts.length;
    const taken = this.counted(firstPosition + 1, this.next);
    ensure(taken.worst <= BigInt(this.terms.maxTokens), `no answer token is drawn at position ${firstPosition}`);
    return taken;
  }

  // The draws before a position were accepted, the rows from it on rejected.
  accept(firstPosition) {
    ensure(firstPosition >= this.terms.promptTokens, "the prompt has not ended");
    ensure(this.floor < firstPosition && firstPosition <= this.next, `a frame cannot start at position ${firstPosition}`);
    this.rejected += BigInt(this.next - firstPosition);
    this.floor = firstPosition;
  }

  counted(position, worst) {
    const counts = countsAt(this.terms, position, this.cached, this.rejected);
    return { counts, worst: countsAt(this.terms, worst).output };
  }

  // The session's counts if the epoch ends with this position as the next to feed.
  at(position) {
    const rejected = position >= this.terms.promptTokens ? this.rejected + BigInt(this.next - position) : this.rejected;
    return countsAt(this.terms, position, this.cached, rejected);
  }
}

// Every position in order, epoch after epoch; returns where the chunks of each ended.
function checkFrames(bundle) {
  const { terms, epochs } = bundle;
  ensure(bundle.promptIds.length === terms.promptTokens, "another number of prompt ids was agreed");
  ensure(bundle.tokenIds.length > 0, "nothing was drawn");
  const last = terms.promptTokens + bundle.tokenIds.length - 1;
  const found = epochs.map((epoch, index) =>
    epochFrames(bundle, epoch, index + 1 < epochs.length ? epochs[index + 1].terms.resumePosition : last));
  ensure(epochs.at(-1).frames.length > 0, "the last epoch has no frames");
  for (const [index, epoch] of epochs.entries()) {
    const follows = index === 0 || same(epoch.terms.start, found[index - 1].counts);
    ensure(follows, `epoch ${epoch.terms.epoch} does not count on from the one before`);
  }
  return found;
}

function epochFrames(bundle, epoch, end) {
  const { terms, frames } = epoch;
  const live = frames.filter((frame) => !frame.replay);
  const replays = frames.length - live.length;
  const progress = new Progress(terms, live.length > 0 && terms.epoch === 1 ? live[0].firstPosition : 0);
  const closes = [];
  const drawn = [];
  const ends = new Map();
  let draws = Number(terms.start.output);
  let began = terms.start.output;
  let seen = 0;
  for (const [number, frame] of frames.entries()) {
    const what = `epoch ${terms.epoch}: frame ${number}`;
    const due = frame.replay ? number : terms.resumePosition + number - replays;
    ensure(frame.traversal === BigInt(due), `${what} is traversal ${frame.traversal}, not ${due}`);
    const { counts, worst } = progress.take(frame);
    if (frame.replay) {
      drawn.push([]);
      continue;
    }
    seen++;
    const after = seen < live.length ? live[seen].firstPosition : end;
    const count = drawsOf(terms, frame, after);
    const most = frame.sample ? 1 + frame.drafts.length : 0;
    ensure(count >= Number(frame.sample) && count <= most, `${what}: ${count} ids drawn do not fit it`);
    const ids = bundle.tokenIds.slice(draws, draws + count);
    ensure(ids.slice(0, -1).every((id, index) => id === frame.drafts[index]), `${what}: an id was accepted that was not drafted`);
    draws += count;
    drawn.push(ids);
    ends.set(frame.traversal, after);
    ensure(worst - began <= BigInt(terms.chunkTokens), `${what}: a chunk has too many draws`);
    if (!frame.closeChunk) continue;
    closes.push({ chunk: closes.length, traversal: frame.traversal, counts });
    began = counts.output;
  }
  const replayDue = terms.stages[0].rebuilt && frames.length > 0 ? terms.resumePosition : 0;
  ensure(progress.replayed === replayDue, `${progress.replayed} positions were replayed to stage 0, not ${replayDue}`);
  ensure(BigInt(draws) === countsAt(terms, end).output, "the draws are miscounted");
  const counts = live.length > 0 ? progress.at(end) : terms.start;
  const cut = cutOf(epoch, closes, live, counts);
  return { closes: closes.filter((close) => cut === null || close.traversal < cut.traversal), cut, drawn, ends, counts };
}

// How many ids a frame drew, by where the next one starts.
function drawsOf(terms, frame, after) {
  const { firstPosition, rows, sample } = frame;
  if (firstPosition < terms.promptTokens) {
    ensure(after === firstPosition + rows, `what follows starts at position ${after}, not ${firstPosition + rows}`);
    return Number(sample);
  }
  return sample ? after - firstPosition : 0;
}

// The chunk that was cut short, if the epoch says so; null otherwise.
function cutOf(epoch, closes, live, counts) {
  const whole = Math.floor(epoch.receipts.length / epoch.terms.stages.length);
  const last = live.length > 0 ? live.at(-1).traversal : null;
  if (epoch.cut === null) {
    ensure(last === null || (closes.length > 0 && closes.at(-1).traversal === last),
      "the last frame does not close a chunk, and no cut is stated");
    return null;
  }
  ensure(epoch.cut.traversal === last, "the epoch is not cut after its last frame");
  ensure(whole <= closes.length && closes.length <= whole + 1, "chunks before the cut have no receipts");
  ensure(closes.length === whole || closes.at(-1).traversal === last, "a chunk that was closed before the cut has no receipts");
  return { chunk: whole, traversal: last, counts };
}

function checkReceiptsComplete(epoch, found) {
  const stages = epoch.terms.stages.length;
  const due = found.closes.length * stages;
  ensure(epoch.receipts.length === due, `${epoch.receipts.length} receipts, ${due} are due`);
  ensure(epoch.cut === null || epoch.cut.receipts.length === stages, "the cut does not say for each stage whether it signed");
  return due;
}

// The closes of an epoch, that of the cut included.
function allCloses(found) {
  return found.cut === null ? found.closes : [...found.closes, found.cut];
}

// A stage's receipts, chained; null for a cut that it did not sign.
async function checkStageReceipts(epoch, index, found) {
  const { terms } = epoch;
  const stage = terms.stages[index];
  const receipts = [];
  let previous = new Uint8Array();
  for (const close of allCloses(found)) {
    const envelope = close === found.cut
      ? epoch.cut.receipts[index] : epoch.receipts[close.chunk * terms.stages.length + index];
    if (envelope === null) {
      receipts.push(null);
      continue;
    }
    const receipt = await openEnvelope(envelope, RECEIPT, stage.ledgerKey);
    const expected = {
      network_id: terms.networkId, session_id: terms.sessionId, epoch: terms.epoch, stage_index: index,
      chunk: close.chunk, start_layer: stage.start, end_layer: stage.end, model_digest: terms.modelDigest,
      numeric_class: classOnWire(stage.numericClass, terms.wireDtype), traversal: close.traversal, prompt_tokens: close.counts.prompt,
      output_tokens: close.counts.output, cached_prompt_tokens: close.counts.cached_prompt,
      rejected_draft_tokens: close.counts.rejected_draft, replayed_tokens: BigInt(stage.replayed),
      previous_digest: previous,
    };
    for (const [name, value] of Object.entries(expected)) {
      ensure(same(receipt[name], value), `receipt of stage ${index} chunk ${close.chunk}: it states a different ${name}`);
    }
    ensure(receipt.input_commit.length === 32 && receipt.output_commit.length === 32, "a commitment is 32 bytes");
    const due = index === terms.stages.length - 1 ? 32 : 0;
    ensure(receipt.state_commit.length === due, `the commitment to what was drawn from is ${due} bytes`);
    receipts.push(receipt);
    previous = await sha256(envelope.payload);
  }
  return receipts;
}

function checkHandoffs(byStage, chunks) {
  for (let chunk = 0; chunk < chunks; chunk++) {
    for (let index = 1; index < byStage.length; index++) {
      const [upstream, downstream] = [byStage[index - 1][chunk], byStage[index][chunk]];
      const agreed = upstream === null || downstream === null || equalBytes(upstream.output_commit, downstream.input_commit);
      ensure(agreed, `hand-off from stage ${index - 1} to stage ${index}, chunk ${chunk}: they signed different data`);
    }
  }
}

// The running commitment to what crosses one boundary of an epoch.
class Chain {
  static async start(terms, boundary) {
    const chain = new Chain();
    const position = concat(bigEndian(terms.epoch, 4), bigEndian(boundary, 4));
    chain.commit = await sha256(encoder.encode("plait.handoff.v1\0"), terms.handoffSalt, terms.sessionId, position);
    chain.pending = 0;
    return chain;
  }

  async add(frame, rows, ids) {
    ensure(this.pending++ < PENDING_FRAMES_MAX, "a chunk has too many frames");
    const payload = new Uint8Array(4 * ids.length);
    const view = new DataView(payload.buffer);
    ids.forEach((id, index) => view.setUint32(4 * index, id, true));
    const numbers = concat(bigEndian(frame.traversal, 8), bigEndian(frame.firstPosition, 4), bigEndian(rows, 4));
    this.commit = await sha256(this.commit, numbers, await sha256(payload));
  }
}

// The commitments of the first and last boundary at the end of each chunk, and at the cut.
async function ringCommits(bundle, epoch, found) {
  const sequence = [...bundle.promptIds, ...bundle.tokenIds];
  const sent = await Chain.start(epoch.terms, 0);
  const drawn = await Chain.start(epoch.terms, epoch.terms.stages.length);
  const closed = new Set(allCloses(found).map((close) => close.traversal));
  const commits = [];
  for (const [number, frame] of epoch.frames.entries()) {
    const { firstPosition, rows, drafts } = frame;
    const known = sequence.slice(firstPosition, firstPosition + rows - drafts.length);
    await sent.add(frame, rows, [...known, ...drafts]);
    if (frame.replay) continue;
    await drawn.add(frame, found.drawn[number].length, found.drawn[number]);
    if (!closed.has(frame.traversal)) continue;
    commits.push({ sent: sent.commit, drawn: drawn.commit });
    sent.pending = drawn.pending = 0;
  }
  return commits;
}

// Stage 0 was fed the prompt and what the last stage drew, and nothing else.
async function checkRing(bundle, epoch, found, byStage) {
  const commits = await ringCommits(bundle, epoch, found);
  const closes = allCloses(found);
  ensure(commits.length === closes.length, "chunks are miscounted");
  for (const [number, { chunk }] of closes.entries()) {
    const first = byStage[0][number], last = byStage.at(-1)[number];
    const { sent, drawn } = commits[number];
    ensure(first === null || equalBytes(first.input_commit, sent), `chunk ${chunk}: other ids were sent`);
    ensure(last === null || equalBytes(last.output_commit, drawn), `chunk ${chunk}: other ids were drawn`);
  }
}

// The last stage signed for the ids of the chunk that was cut; returns how.
async function checkDraws(bundle, epoch, found) {
  const { cut, terms } = epoch;
  if (cut.receipts.at(-1) !== null) return "by its receipt for the cut";
  if (cut.draws === null) throw new Absent("the last stage was lost, and its statement of the draws is not here");
  const { drawn } = (await ringCommits(bundle, epoch, found)).at(-1);
  const statement = await openEnvelope(cut.draws, DRAWS, terms.stages.at(-1).ledgerKey);
  const expected = {
    network_id: terms.networkId, session_id: terms.sessionId, epoch: terms.epoch,
    traversal: cut.traversal, output_commit: drawn,
  };
  ensure(same(statement, expected), "the last stage's statement is of other draws");
  return "by its statement";
}

// What a stage's peer has earned in the session; rounded up once, on the cumulative counts.
function priceOf(stage, counts) {
  const { prices, base } = stage;
  const work = COUNTS_MEMBERS.map((name) => [prices[name], counts[name] - base[name]]);
  ensure(work.every(([, tokens]) => tokens >= 0n), "a stage was not there at these counts");
  const tokens = sum(work.map(([price, tokens]) => price * tokens)) + prices.replayed * BigInt(stage.replayed);
  const amount = (BigInt(stage.pricedLayers) * tokens + 999_999n) / 1_000_000n;
  ensure(amount <= U64_MAX && stage.carried + amount <= U64_MAX, "a stage's price does not fit 64 bits");
  return stage.carried + amount;
}

// The client signed to pay each stage its price for exactly the receipted tokens; null if
// nothing is payable. `promised` is what earlier epochs promised.
async function checkVoucher(epoch, found, promised) {
  const { terms, cut } = epoch;
  const told = cut === null || cut.receipts.length === terms.stages.length;
  ensure(told, "the cut does not say for each stage whether it signed");
  const signed = cut === null ? [] : cut.receipts.filter((receipt) => receipt !== null);
  if (found.closes.length === 0 && signed.length === 0) {
    ensure(epoch.voucher === null, "it pays for work that nobody signed for");
    return null;
  }
  ensure(epoch.voucher !== null, "there is no voucher for the work that was signed for");
  const voucher = await openEnvelope(epoch.voucher, VOUCHER, terms.clientLedgerKey);
  let transcript = await sha256(encoder.encode("plait.transcript.v1\0"), terms.sessionId, bigEndian(terms.epoch, 4));
  for (const receipt of [...epoch.receipts, ...signed]) {
    transcript = await sha256(transcript, await sha256(receipt.payload));
  }
  const byCut = found.cut !== null && signed.length > 0;
  const close = byCut ? found.cut : found.closes.at(-1);
  const due = terms.stages.map((stage, index) => {
    if (!byCut || cut.receipts[index] !== null) return priceOf(stage, close.counts);
    if (found.closes.length > 0) return priceOf(stage, found.closes.at(-1).counts);
    const before = promised.get(stage.peer) ?? 0n;
    return before > stage.carried ? before : stage.carried;
  });
  ensure(byCut || sum(due) <= U64_MAX, "the session's price does not fit 64 bits");
  const expected = {
    network_id: terms.networkId, session_id: terms.sessionId, epoch: terms.epoch,
    sequence: BigInt(found.closes.length + Number(byCut)), account: terms.client,
    prompt_tokens: close.counts.prompt, output_tokens: close.counts.output,
    cached_prompt_tokens: close.counts.cached_prompt, rejected_draft_tokens: close.counts.rejected_draft,
    transcript, epoch_close: byCut,
    amounts: terms.stages.map((stage, index) => ({ payee: stage.peer, microcredits: due[index] })),
  };
  for (const [name, value] of Object.entries(expected)) {
    ensure(same(voucher[name], value), `its ${name} does not follow from the receipts and the prices`);
  }
  return voucher;
}

// Each layer was signed for at each position that the answer rests on. Only the end of an
// answer that was cut short may lack it.
function checkCoverage(bundle, found) {
  const last = bundle.terms.promptTokens + bundle.tokenIds.length - 1;
  const layers = bundle.terms.stages.at(-1).end;
  const spans = [];
  for (const [number, epoch] of bundle.epochs.entries()) {
    for (const [index, stage] of epoch.terms.stages.entries()) {
      const reach = reachOf(epoch, found[number], index);
      if (reach === null) continue;
      const begin = epoch.terms.epoch === 1 ? 0 : epoch.terms.resumePosition;
      // What was replayed when the stage entered is in each of its receipts.
      spans.push({ stage, positions: [[0, stage.replayed], [begin, reach]] });
    }
  }
  const borders = new Set([0, ...spans.flatMap(({ stage }) => [stage.start, stage.end])]);
  const end = found.at(-1);
  const whole = end.closes.length > 0 ? end.ends.get(end.closes.at(-1).traversal) : bundle.epochs.at(-1).terms.resumePosition;
  let short = "";
  for (const layer of [...borders].sort((a, b) => a - b)) {
    if (layer >= layers) break;
    const hosts = spans.filter(({ stage }) => stage.start <= layer && layer < stage.end);
    const gap = gapIn(hosts.flatMap(({ positions }) => positions), last);
    if (gap === null) continue;
    const what = `nobody signed for layer ${layer} at positions ${gap[0]} to ${gap[1]}`;
    ensure(end.cut !== null && gap[0] >= whole, what);
    short ||= `${what}: the answer was cut short there`;
  }
  if (short) throw new Absent(short);
  return true;
}

// The position up to which a stage signed receipts in an epoch; null if it signed none.
function reachOf(epoch, found, index) {
  if (found.cut !== null && (epoch.cut.receipts[index] ?? null) !== null) return found.ends.get(epoch.cut.traversal);
  return found.closes.length > 0 ? found.ends.get(found.closes.at(-1).traversal) : null;
}

function gapIn(intervals, last) {
  let reached = 0;
  for (const [start, end] of intervals.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (start > reached) return [reached, start];
    reached = Math.max(reached, end);
  }
  return reached < last ? [reached, last] : null;
}

// ---------------------------------------------------------------- credit

const RESERVE = 2, SETTLE = 3, VOID = 4, ESCROW = 7, MATURE = 8, FORFEIT = 9;
const COMMITTEE_GRANT_TYPE = "application/vnd.plait.committee-grant.v1";

function routeBytes(terms) {
  const stages = terms.stages.map((stage) => ({
    peer_id: stage.peer, start_layer: stage.start, end_layer: stage.end,
    offer_digest: stage.offerDigest, priced_layers: stage.pricedLayers, prices: stage.prices,
    entered_epoch: stage.enteredEpoch, base: stage.base, carried_microcredits: stage.carried,
    replayed_tokens: stage.replayed, rebuilt: stage.rebuilt,
  }));
  return encode(ROUTE_PLAN, { model_digest: terms.modelDigest, stages });
}

function enteredStages(terms) {
  return terms.stages.filter((stage) => stage.enteredEpoch === terms.epoch);
}

// The caps of the stages that enter, in their order.
function capsOf(reservation, terms) {
  const entered = enteredStages(terms);
  const payees = reservation.caps.map((cap) => cap.payee);
  ensure(same(payees, entered.map((stage) => stage.peer)), "the caps are not one for each stage that enters, in order");
  return entered.map((stage, index) => ({ stage, cap: reservation.caps[index].microcredits }));
}

function grantsIn(envelope) {
  if (envelope.payload_type !== COMMITTEE_GRANT_TYPE) return [envelope];
  ensure(envelope.signer.length === 0 && envelope.signature.length === 0, "a committee's grant is signed inside only");
  return decode(COMMITTEE_GRANT, envelope.payload).grants;
}

// The authorities that granted a reservation: of 3f + 1 at least 2f + 1, in the file's order.
async function grantersOf(grant, reservation, network) {
  const grants = grantsIn(grant);
  const order = grants.map((one) => network.authorities.findLastIndex((known) => equalBytes(known.ledgerKey, one.signer)));
  ensure(!order.includes(-1), "the grant is not signed by an authority of the network file");
  ensure(order.every((place, index) => index === 0 || order[index - 1] < place), "an authority granted twice, or they are not in order");
  const quorum = network.authorities.length - Math.floor((network.authorities.length - 1) / 3);
  ensure(order.length >= quorum, `${order.length} authorities granted, ${quorum} are needed`);
  for (const one of grants) {
    const { reservation_digest: of } = await openEnvelope(one, GRANT);
    ensure(equalBytes(of, await sha256(reservation.payload)), "the grant is for another reservation");
  }
  return order.map((place) => network.authorities[place]);
}

async function checkGrants(epoch, network, openedMs) {
  const { terms } = epoch;
  await grantersOf(epoch.grant, epoch.reservation, network);
  const reservation = await openEnvelope(epoch.reservation, RESERVATION, terms.clientLedgerKey);
  const ours = reservation.network_id === terms.networkId && reservation.account === terms.client
    && equalBytes(reservation.session_id, terms.sessionId) && reservation.epoch === terms.epoch;
  ensure(ours, "the reservation is for another network, account, session or epoch");
  ensure(equalBytes(reservation.route_digest, await sha256(routeBytes(terms))), "the reservation is for another route");
  ensure(sum(capsOf(reservation, terms).map(({ cap }) => cap)) <= reservation.amount, "the caps sum to more than the amount reserved");
  for (const one of grantsIn(epoch.grant)) {
    const grant = await openEnvelope(one, GRANT);
    const granted = grant.network_id === reservation.network_id && grant.account === reservation.account
      && equalBytes(grant.session_id, reservation.session_id) && grant.amount === reservation.amount;
    ensure(granted, "it grants something else than was reserved");
    ensure(openedMs < grant.expires_ms, "the grant has expired");
  }
}

// Returns the authority that granted; of a committee, the one whose log the checkpoint is of.
async function checkReservations(bundle, network, openedMs) {
  const [first] = bundle.epochs;
  ensure(first.grant !== null && first.reservation !== null, "the first epoch has no reservation or no grant");
  const granting = await grantersOf(first.grant, first.reservation, network);
  for (const [index, epoch] of bundle.epochs.entries()) {
    const what = `epoch ${epoch.terms.epoch}`;
    if (enteredStages(epoch.terms).length === 0) {
      ensure(epoch.reservation === null && epoch.grant === null, `${what} reserves, but no stage enters`);
      continue;
    }
    ensure(epoch.reservation !== null, `${what} has no reservation`);
    if (epoch.grant === null) throw new Absent(`the grant of ${what} is not here`);
    await checkGrants(epoch, network, openedMs[index]);
  }
  const [origin] = (bundle.checkpoint ?? "").split("\n");
  return network.authorities.find((authority) => authority.logOrigin === origin) ?? granting[0];
}

// No stage is promised more than was reserved for it in its stint.
function checkCaps(bundle) {
  const limits = new Map();
  const stint = (stage) => `${stage.enteredEpoch} ${stage.peer}`;
  for (const epoch of bundle.epochs) {
    if (epoch.reservation !== null) {
      const reservation = decode(RESERVATION, epoch.reservation.payload);
      for (const { stage, cap } of capsOf(reservation, epoch.terms)) limits.set(stint(stage), stage.carried + cap);
    }
    const promised = promisedIn(epoch);
    epoch.terms.stages.forEach((stage, index) => {
      const within = (promised.get(stage.peer) ?? 0n) <= (limits.get(stint(stage)) ?? 0n);
      ensure(within, `stage ${index} is promised more than its cap`);
    });
  }
}

function readEntry(bundle, payload, number) {
  const entry = decode(ENTRY, payload);
  ensure(entry.kind >= 1 && entry.kind <= FORFEIT, `entry ${number} has an unknown kind`);
  const ours = entry.network_id === bundle.networkId && equalBytes(entry.session_id, bundle.terms.sessionId);
  ensure(ours, `entry ${number} is of another network or session`);
  ensure(entry.lines.every((line) => (line.debit === 0n) !== (line.credit === 0n)),
    `entry ${number}: a line is not either a debit or a credit`);
  const balanced = sum(entry.lines.map((line) => line.debit)) === sum(entry.lines.map((line) => line.credit));
  ensure(balanced, `entry ${number}: its debits and credits differ`);
  return entry;
}

async function checkJournal(bundle) {
  if (bundle.entries.length === 0) throw new Absent("the bundle has no journal entries");
  const entries = bundle.entries.map((payload, number) => readEntry(bundle, payload, number));
  entries.forEach((entry, number) => {
    ensure(number === 0 || entries[number - 1].index < entry.index, "the entries are not in the order of the journal");
  });
  await checkReserveEntries(bundle, entries);
  await checkPaid(bundle, entries, replay(bundle, entries));
}

function holdOf(epoch) {
  return `hold:${toHex(epoch.terms.sessionId)}:${epoch.terms.epoch}`;
}

// The hold of the session that a reserve entry fills, and by how much.
function filledHold(bundle, entry) {
  const credits = entry.lines.filter((line) => line.credit > 0n);
  const fills = credits.length === 1 && credits[0].account.startsWith(`hold:${toHex(bundle.terms.sessionId)}:`);
  ensure(fills, "a reserve entry does not fill one hold of the session");
  return credits[0];
}

// Each reservation was booked once. An epoch that was reserved for and never begun is not in
// the bundle; its hold is in the journal all the same.
async function checkReserveEntries(bundle, entries) {
  ensure(entries[0].kind === RESERVE, "the entries do not start with a reservation");
  const epochs = new Map(bundle.epochs.map((epoch) => [holdOf(epoch), epoch]));
  const booked = new Set();
  for (const entry of entries.filter((one) => one.kind === RESERVE)) {
    const { account, credit } = filledHold(bundle, entry);
    ensure(!booked.has(account), "an epoch was reserved for twice");
    booked.add(account);
    if (!epochs.has(account)) continue;
    const { reservation } = epochs.get(account);
    const caused = reservation !== null && equalBytes(entry.cause_digest, await sha256(reservation.payload));
    ensure(caused, "a reserve entry was caused by another reservation");
    const reserved = decode(RESERVATION, reservation.payload);
    ensure(credit === reserved.amount, "a reserve entry is of another amount");
    ensure(entry.sub_account === reserved.sub_account, "a reserve entry draws on another sub-account");
  }
  for (const [hold, epoch] of epochs) {
    ensure(epoch.grant === null || booked.has(hold), "a reservation was granted, but not booked");
  }
}

function sides(entry) {
  const debited = new Map(), credited = new Map();
  for (const { account, debit, credit } of entry.lines) {
    if (debit) debited.set(account, (debited.get(account) ?? 0n) + debit);
    if (credit) credited.set(account, (credited.get(account) ?? 0n) + credit);
  }
  return { debited, credited };
}

// A share of what was paid goes aside, and back to the payee or, forfeited, to the client.
function moveEscrow(entry, debited, credited, { paid, aside, prefix, onlyClient }) {
  const elsewhere = `entry ${entry.index} takes credit from elsewhere, or moves it there`;
  const [payees, escrow] = entry.kind === ESCROW ? [debited, credited] : [credited, debited];
  for (const account of escrow.keys()) ensure(account.startsWith(prefix), elsewhere);
  const amounts = new Map([...escrow].map(([account, amount]) => [account.slice(prefix.length), amount]));
  if (entry.kind === FORFEIT) ensure(onlyClient(credited), elsewhere);
  else ensure(payees.size === amounts.size && [...payees].every(([payee, amount]) => amounts.get(payee) === amount), elsewhere);
  for (const [payee, amount] of amounts) {
    const now = (aside.get(payee) ?? 0n) + (entry.kind === ESCROW ? amount : -amount);
    ensure(now >= 0n && now <= (paid.get(payee) ?? 0n), elsewhere);
    aside.set(payee, now);
  }
}

// Apply the entries to the session's holds; returns what each payee was paid.
function replay(bundle, entries) {
  const { client } = bundle.terms;
  const reserves = entries.filter((entry) => entry.kind === RESERVE);
  const held = new Map(reserves.map((entry) => [filledHold(bundle, entry).account, 0n]));
  const paid = new Map();
  const voided = new Set();
  const aside = new Map();
  const prefix = `escrow:${toHex(bundle.terms.sessionId)}:`;
  const allHeld = (accounts) => [...accounts.keys()].every((account) => held.has(account));
  const onlyClient = (accounts) => accounts.size === 1 && accounts.has(client);
  for (const entry of entries) {
    const { debited, credited } = sides(entry);
    ensure([RESERVE, SETTLE, VOID, ESCROW, MATURE, FORFEIT].includes(entry.kind), `entry ${entry.index} issues credit`);
    if (entry.kind >= ESCROW) {
      moveEscrow(entry, debited, credited, { paid, aside, prefix, onlyClient });
      continue;
    }
    let right = entry.kind === RESERVE ? onlyClient(debited) && allHeld(credited) : allHeld(debited);
    if (entry.kind === SETTLE) {
      right &&= [...credited.keys()].every((account) => account !== client && !held.has(account));
      for (const [account, amount] of credited) paid.set(account, (paid.get(account) ?? 0n) + amount);
    } else if (entry.kind === VOID) {
      right &&= onlyClient(credited);
      for (const account of debited.keys()) voided.add(account);
    }
    ensure(right, `entry ${entry.index} takes credit from elsewhere, or moves it there`);
    for (const account of held.keys()) {
      const now = held.get(account) + (credited.get(account) ?? 0n) - (debited.get(account) ?? 0n);
      ensure(now >= 0n, `entry ${entry.index} takes more than was reserved`);
      held.set(account, now);
    }
  }
  ensure([...voided].every((account) => held.get(account) === 0n), "credit is left in a hold that was voided");
  return paid;
}

// Nobody was paid more than promised; less only if the voucher was never presented.
async function checkPaid(bundle, entries, paid) {
  const best = new Map();
  for (const epoch of bundle.epochs) {
    for (const [payee, amount] of promisedIn(epoch)) {
      if (amount >= (best.get(payee)?.amount ?? 0n)) best.set(payee, { amount, voucher: epoch.voucher });
    }
  }
  for (const [payee, amount] of paid) ensure(amount <= (best.get(payee)?.amount ?? 0n), `${payee} was paid more than promised`);
  const causes = new Set(entries.map((entry) => toHex(entry.cause_digest)));
  const voids = entries.filter((entry) => entry.kind === VOID);
  const voided = new Set(voids.flatMap((entry) => entry.lines.filter((line) => line.debit > 0n).map((line) => line.account)));
  let waiting = "";
  for (const [payee, { amount, voucher }] of best) {
    if ((paid.get(payee) ?? 0n) === amount) continue;
    const presented = causes.has(toHex(await sha256(voucher.payload)));
    const over = holdsOf(bundle, payee).every((hold) => voided.has(hold));
    ensure(!presented && !over, `${payee} was paid less than promised`);
    waiting ||= `${payee} was paid less than promised: no entry settles that voucher yet`;
  }
  if (waiting) throw new Absent(waiting);
}

function holdsOf(bundle, payee) {
  const reserved = bundle.epochs.filter(({ reservation }) =>
    reservation !== null && decode(RESERVATION, reservation.payload).caps.some((cap) => cap.payee === payee));
  return reserved.map(holdOf);
}

// ---------------------------------------------------------------- the log and its witnesses

const LOG_KEY_TYPE = 0x01, COSIGNATURE_KEY_TYPE = 0x04;
// What Python's str.isspace() knows beyond the control characters, which are refused before.
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/;

async function noteKeyId(name, type, key) {
  return (await sha256(encoder.encode(`${name}\n`), Uint8Array.of(type), key)).subarray(0, 4);
}

// A signed note (c2sp.org/signed-note): its text, and its signature lines.
function parseNote(note) {
  const controls = [...note].some((character) => character < " " && character !== "\n");
  ensure([...note].length <= 16_384 && !controls && note.isWellFormed(), "the note is too long or holds characters it must not");
  const cut = note.lastIndexOf("\n\n");
  ensure(cut >= 0 && note.endsWith("\n") && note.length > cut + 2, "the note has no signatures");
  const lines = note.slice(cut + 2, -1).split("\n");
  ensure(lines.length <= 16, "the note has too many signatures");
  const signatures = lines.map((line) => {
    const match = /^— ([^ ]*) ([^ ]*)$/u.exec(line);
    ensure(match && match[1] !== "" && !match[1].includes("+") && !SPACE.test(match[1]), "a signature line is malformed");
    const raw = fromBase64(match[2], "a signature line");
    ensure(raw.length >= 5, "a signature line is malformed");
    return { name: match[1], id: raw.subarray(0, 4), signature: raw.subarray(4) };
  });
  return { text: note.slice(0, cut + 1), signatures };
}

async function signaturesBy(note, name, type, key) {
  const id = await noteKeyId(name, type, key);
  return note.signatures.filter((line) => line.name === name && equalBytes(line.id, id)).map((line) => line.signature);
}

async function openCheckpoint(text, origin, logKey) {
  const note = parseNote(text);
  const known = await signaturesBy(note, origin, LOG_KEY_TYPE, logKey);
  ensure(known.length === 1, `the note has ${known.length} signatures by ${origin}, not one`);
  await verifySignature(logKey, known[0], encoder.encode(note.text));
  const lines = note.text.split("\n");
  ensure(lines.length === 4 && lines[0] === origin, "the checkpoint is of another log or malformed");
  ensure(/^(0|[1-9][0-9]{0,19})$/.test(lines[1]), "the tree size is not a plain decimal number");
  const checkpoint = { size: BigInt(lines[1]), root: fromBase64(lines[2], "the root hash") };
  const emptyRoot = equalBytes(checkpoint.root, await sha256());
  ensure(checkpoint.root.length === 32 && (checkpoint.size === 0n) === emptyRoot, "the root hash is not one of this size");
  return checkpoint;
}

function bitLength(value) {
  return value === 0n ? 0 : value.toString(2).length;
}

// RFC 6962 inclusion; the number of hashes follows from index and size alone.
async function verifyInclusion(leaf, index, checkpoint, hashes) {
  ensure(index < checkpoint.size, `leaf ${index} is not in the tree`);
  ensure(hashes.every((hash) => hash.length === 32), "a hash is not 32 bytes long");
  const inner = bitLength(index ^ (checkpoint.size - 1n));
  const border = [...(index >> BigInt(inner)).toString(2)].filter((bit) => bit === "1").length;
  ensure(hashes.length === inner + border, `the inclusion proof has ${hashes.length} hashes, not ${inner + border}`);
  let digest = await sha256(Uint8Array.of(0), leaf);
  for (const [level, sibling] of hashes.entries()) {
    const onTheRight = level >= inner || (index >> BigInt(level)) & 1n;
    const [left, right] = onTheRight ? [sibling, digest] : [digest, sibling];
    digest = await sha256(Uint8Array.of(1), left, right);
  }
  ensure(equalBytes(digest, checkpoint.root), "the inclusion proof leads to another root");
}

async function checkLog(bundle, authority) {
  if (bundle.checkpoint === null) throw new Absent("the bundle has no checkpoint");
  const checkpoint = await openCheckpoint(bundle.checkpoint, authority.logOrigin, authority.logKey);
  ensure(bundle.proofs.length === bundle.entries.length, "not one proof for each entry");
  for (const [number, payload] of bundle.entries.entries()) {
    const entry = decode(ENTRY, payload);
    const { index, hashes } = bundle.proofs[number];
    ensure(entry.kind >= 1 && entry.kind <= FORFEIT, `entry ${number} has an unknown kind`);
    ensure(entry.index === index, `entry ${number}: its index is not that of its proof`);
    await verifyInclusion(payload, index, checkpoint, hashes);
  }
  return checkpoint;
}

// Cosignatures (c2sp.org/tlog-cosignature) by the network file's witnesses, each counted once.
async function checkWitnesses(bundle, network, authority) {
  if (bundle.checkpoint === null) throw new Absent("the bundle has no checkpoint");
  await openCheckpoint(bundle.checkpoint, authority.logOrigin, authority.logKey);
  const note = parseNote(bundle.checkpoint);
  let count = 0;
  for (const witness of network.witnesses) {
    const lines = await signaturesBy(note, witness.name, COSIGNATURE_KEY_TYPE, witness.key);
    for (const line of lines) {
      ensure(line.length === 72 && line[0] < 128, `the cosignature of ${witness.name} is malformed`);
      const time = [...line.subarray(0, 8)].reduce((value, byte) => (value << 8n) | BigInt(byte), 0n);
      const message = encoder.encode(`cosignature/v1\ntime ${time}\n${note.text}`);
      await verifySignature(witness.key, line.subarray(8), message);
    }
    count += Number(lines.length > 0);
  }
  if (count < network.witnessQuorum) {
    throw new Absent(`${count} witnesses have cosigned the checkpoint, ${network.witnessQuorum} are needed`);
  }
  return count;
}

// ---------------------------------------------------------------- the report

const NEVER_CHECKED = [
  "the computation: that each stage ran its layers on what it received (an audit replays it)",
  "the text: that it is what the model's tokenizer makes of the ids",
  "the draw: that the ids follow from the logits, seed and temperature",
  "the people: who operates these peers, and whether client and stages all collude",
  "the clocks: every date is the signer's own",
  "the revoked keys: no revocation is looked at, a certificate that its peer voided counts by its dates",
  "the publisher: the manifest is the model's by digest; who made the model is not proven",
];
const NOT_WITNESSED =
  "the log's other readers: no witness has cosigned, so another history could be shown to them";
const WITNESSED =
  "the log's other readers: another history could be shown to them if enough witnesses collude";

class Findings {
  claims = [];
  unchecked = [];

  async claim(name, check, detail) {
    try {
      const value = await check();
      this.claims.push({ name, ok: true, detail: detail(value) });
      return value ?? true;
    } catch (error) {
      if (error.name === "NotSupportedError") throw error;
      const known = error instanceof Fault || error instanceof Absent;
      const ok = error instanceof Absent ? null : false;
      this.claims.push({ name, ok, detail: known ? error.message : `internal: ${error.message}` });
      return null;
    }
  }

  blocked(name, by) {
    this.unchecked.push(`${name}: cannot be examined, because of: ${by}`);
  }

  report() {
    const states = this.claims.map((claim) => claim.ok);
    const outcome = states.includes(false) ? "false" : states.includes(null) ? "incomplete" : "verified";
    return { outcome, claims: this.claims, unchecked: this.unchecked };
  }
}

// How many leading positions of the prompt came from the stages' caches.
function cachedPositions(bundle) {
  const live = bundle.epochs[0].frames.filter((frame) => !frame.replay);
  return live.length ? live[0].firstPosition : 0;
}

function cachedNote(cached) {
  return (
    `the cache: that the stages had the first ${cached} positions cached, from the same model and the ` +
    "same ids; each signed that it did, and no audit can look (computing the answer again can)"
  );
}

// Check every claim that a bundle makes against the keys of a network file.
// Returns { outcome: "verified" | "false" | "incomplete", claims: [{ name, ok, detail }], unchecked }.
async function verifyBundle(bytes, network) {
  const findings = new Findings();
  const bundle = await findings.claim("encoding", () => readBundle(bytes), () => `canonical JSON, ${bytes.length} bytes`);
  if (bundle === null) findings.blocked("everything else", "the encoding");
  else await checkParts(findings, bundle, network);
  const cached = bundle === null ? 0 : cachedPositions(bundle);
  if (cached > 0) findings.unchecked.push(cachedNote(cached));
  findings.unchecked.push(...NEVER_CHECKED, network.witnessQuorum > 0 ? WITNESSED : NOT_WITNESSED);
  return findings.report();
}

// How a claim about one epoch is named: with its number if there are several.
function named(bundle, epoch, claim) {
  return bundle.epochs.length === 1 ? claim : `epoch ${epoch.terms.epoch}: ${claim}`;
}

async function checkParts(findings, bundle, network) {
  await findings.claim("seal", () => checkSeal(bundle), () => `by the client ${bundle.terms.client}`);
  await findings.claim("network", () => checkNetwork(bundle, network), () => network.id);
  const openedMs = await checkSession(findings, bundle);
  const found = await findings.claim("frames", () => checkFrames(bundle), (value) => {
    const frames = bundle.epochs.reduce((count, epoch) => count + epoch.frames.length, 0);
    const chunks = value.reduce((count, one) => count + allCloses(one).length, 0);
    return `${frames} frames cover every position in order, in ${chunks} chunks`;
  });
  let paidFor = found !== null;
  if (found === null) findings.blocked("receipts, hand-offs, ring and voucher", "the frames");
  else {
    const promised = new Map();
    for (const [index, epoch] of bundle.epochs.entries()) {
      await checkReceipts(findings, bundle, epoch, found[index]);
      const voucher = await findings.claim(named(bundle, epoch, "voucher"),
        () => checkVoucher(epoch, found[index], promised), voucherShown);
      if (voucher === null) paidFor = false;
      else for (const [payee, amount] of promisedIn(epoch)) promised.set(payee, amount);
    }
    await findings.claim("coverage", () => checkCoverage(bundle, found),
      () => "each layer is signed for at each position that the answer rests on");
  }
  await checkCredit(findings, bundle, network, openedMs, paidFor);
}

function voucherShown(voucher) {
  if (voucher === null) return "none, and none is due";
  return `${sum(voucher.amounts.map((item) => item.microcredits))} microcredits for ${voucher.prompt_tokens} ` +
    `prompt and ${voucher.output_tokens} output tokens, as offered`;
}

async function checkSession(findings, bundle) {
  const { terms, epochs } = bundle;
  const openings = [];
  for (const epoch of epochs) {
    openings.push(await findings.claim(named(bundle, epoch, "session terms"), () => checkTerms(epoch),
      () => `session ${toHex(terms.sessionId)}, signed by the client`));
  }
  const known = openings.filter((opening) => opening !== null);
  if (known.length < openings.length) findings.blocked("succession", "the session terms");
  else {
    await findings.claim("succession", () => checkSuccession(bundle, known), () => epochs.length === 1
      ? "one epoch, from the beginning to the end"
      : `${epochs.length} epochs, each going on where the one before was cut`);
  }
  const openedMs = openings.map((opening) => (opening === null ? bundle.sealedMs : opening.openedMs));
  await findings.claim("client certificate",
    () => checkKeyCert(bundle.clientCert, bundle.networkId, openedMs[0], terms.client, terms.clientLedgerKey),
    () => "the client delegated to its ledger key");
  const manifest = await findings.claim("manifest", () => checkManifest(bundle),
    (value) => `${value.name}, ${value.layers} layers`);
  const openedByEpoch = new Map(epochs.map((epoch, index) => [epoch.terms.epoch, openedMs[index]]));
  for (const [index, epoch] of epochs.entries()) {
    const { stages } = epoch.terms;
    await findings.claim(named(bundle, epoch, "stage certificates"), () => checkStageCerts(epoch, openedMs[index]),
      () => `${stages.length} stages delegated to their ledger keys`);
    await findings.claim(named(bundle, epoch, "offers"), () => checkOffers(epoch, openedByEpoch),
      () => `${stages.length} signed offers: span, prices and numeric class as in the route`);
    await findings.claim(named(bundle, epoch, "route"), () => checkRoute(epoch, manifest),
      () => `layers ${stages.map((stage) => `${stage.start}:${stage.end}`).join(" → ")}`);
  }
  await findings.claim("answer", () => checkAnswer(bundle, known[0] ?? null, manifest),
    () => `${bundle.tokenIds.length} ids drawn, ended by ${bundle.finishReason}`);
  return openedMs;
}

async function checkReceipts(findings, bundle, epoch, found) {
  const claim = (name, check, detail) => findings.claim(named(bundle, epoch, name), check, detail);
  const complete = await claim("receipts complete", () => checkReceiptsComplete(epoch, found),
    (count) => `${count}: one per stage and chunk`);
  if (complete === null) {
    findings.blocked("receipts, hand-offs and ring", "missing receipts");
    return;
  }
  const byStage = [];
  for (const [index, stage] of epoch.terms.stages.entries()) {
    byStage.push(await claim(`receipts of stage ${index}`, () => checkStageReceipts(epoch, index, found),
      (value) => `${value.filter((receipt) => receipt !== null).length} chunks by ${stage.peer}, layers ${stage.start}:${stage.end}`));
  }
  if (byStage.includes(null)) {
    findings.blocked("hand-offs and ring", "a receipt");
    return;
  }
  await claim("hand-offs", () => checkHandoffs(byStage, allCloses(found).length),
    () => "each stage received what the one before it sent");
  await claim("ring", () => checkRing(bundle, epoch, found, byStage),
    () => "what was fed to stage 0 is the prompt and what the last stage drew");
  if (epoch.cut === null) return;
  await claim("draws of the cut", () => checkDraws(bundle, epoch, found), (how) => `the last stage signed for them ${how}`);
}

async function checkCredit(findings, bundle, network, openedMs, paidFor) {
  const authority = await findings.claim("reservation and grant", () => checkReservations(bundle, network, openedMs),
    (value) => `granted by the ledger authority ${value.peer}`);
  const quorum = network.witnessQuorum;
  if (!paidFor || authority === null) {
    findings.blocked(quorum ? "caps, journal, log and witnesses" : "caps, journal and log", "the voucher or the grant");
    return;
  }
  await findings.claim("caps", () => checkCaps(bundle), () => "no stage is above its cap");
  await findings.claim("journal", () => checkJournal(bundle),
    () => "entries balance, and each payee was paid what the voucher says");
  await findings.claim("log", () => checkLog(bundle, authority),
    (value) => `${bundle.entries.length} entries in ${authority.logOrigin} at size ${value.size}`);
  if (quorum === 0) return;
  await findings.claim("witnesses", () => checkWitnesses(bundle, network, authority),
    (count) => `${count} of ${network.witnesses.length} witnesses saw this log only grow, ${quorum} are needed`);
}

const api = { verifyBundle, parseNetworkFile, checkNetworkSignature, verifySignature };
if (typeof module === "object" && module.exports) module.exports = api;

// ---------------------------------------------------------------- the page

async function chosenBytes(id) {
  const [file] = root.document.getElementById(id).files;
  return file ? new Uint8Array(await file.arrayBuffer()) : null;
}

function show(target, tag, text, className = "") {
  const element = root.document.createElement(tag);
  element.textContent = text; // never markup: the text is a stranger's
  element.className = className;
  target.append(element);
}

async function networkShown(target) {
  const toml = await chosenBytes("network");
  const signature = await chosenBytes("signature");
  const network = parseNetworkFile(utf8(toml, "the network file"));
  if (signature === null) {
    show(target, "p", "? network file: without network.toml.sig, you yourself vouch that it is the right one", "absent");
  } else {
    await checkNetworkSignature(toml, utf8(signature, "the signature"), network);
    show(target, "p", `✔ network file: signed by its founder ${network.founder}`, "true");
  }
  return network;
}

async function checkChosen() {
  const target = root.document.getElementById("report");
  target.replaceChildren();
  const bundle = await chosenBytes("bundle");
  if (bundle === null || !(await chosenBytes("network"))) return;
  try {
    const report = await verifyBundle(bundle, await networkShown(target));
    for (const { name, ok, detail } of report.claims) {
      const mark = ok === null ? "?" : ok ? "✔" : "✘";
      show(target, "p", `${mark} ${name}: ${detail}`, ok === null ? "absent" : String(ok));
    }
    show(target, "h2", "Not checked");
    for (const item of report.unchecked) show(target, "p", `– ${item}`);
    show(target, "h2", `Outcome: ${report.outcome}`, report.outcome);
  } catch (error) {
    const unsupported = error.name === "NotSupportedError";
    show(target, "p", `✘ ${unsupported ? "this browser's Web Crypto has no Ed25519" : error.message}`, "false");
  }
}

if (root.document) {
  for (const id of ["bundle", "network", "signature"]) {
    root.document.getElementById(id).addEventListener("change", checkChosen);
  }
}

})(globalThis);
