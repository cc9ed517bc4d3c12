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

// A schema maps field numbers to [name, kind]; "*" marks a repeated field. Kinds: u32, u64,
// enum, string, bytes, or another schema. u64 values are BigInts.
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
const ROUTE_STAGE = {
  1: ["peer_id", "string"], 2: ["start_layer", "u32"], 3: ["end_layer", "u32"],
  4: ["offer_digest", "bytes"], 5: ["priced_layers", "u32"], 6: ["prices", PRICES],
};
const ROUTE_PLAN = { 1: ["model_digest", "bytes"], 2: ["stages*", ROUTE_STAGE] };
const SAMPLING = {
  1: ["temperature_micros", "u32"], 2: ["top_p_micros", "u32"], 3: ["top_k", "u32"],
  4: ["seed", "u64"], 5: ["end_ids*", "u32"],
};
const SESSION_OPEN = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["client_peer_id", "string"], 5: ["route", ROUTE_PLAN], 6: ["sampling", SAMPLING],
  7: ["prompt_tokens", "u32"], 8: ["max_tokens", "u32"], 9: ["chunk_tokens", "u32"],
  10: ["prefill_chunk_tokens", "u32"], 11: ["wire_dtype", "enum"], 12: ["handoff_salt", "bytes"],
  13: ["issued_ms", "u64"], 14: ["expires_ms", "u64"],
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
  11: ["expires_ms", "u64"],
};
const GRANT = {
  1: ["network_id", "string"], 2: ["reservation_digest", "bytes"], 3: ["account", "string"],
  4: ["session_id", "bytes"], 5: ["amount", "u64"], 6: ["granted_ms", "u64"],
  7: ["expires_ms", "u64"], 8: ["merge_delay_ms", "u64"],
};
const RECEIPT = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["stage_index", "u32"], 5: ["chunk", "u32"], 6: ["start_layer", "u32"],
  7: ["end_layer", "u32"], 8: ["model_digest", "bytes"], 9: ["numeric_class", "string"],
  10: ["traversal", "u64"], 11: ["prompt_tokens", "u64"], 12: ["output_tokens", "u64"],
  13: ["input_commit", "bytes"], 14: ["output_commit", "bytes"], 15: ["previous_digest", "bytes"],
  16: ["issued_ms", "u64"],
};
const VOUCHER = {
  1: ["network_id", "string"], 2: ["session_id", "bytes"], 3: ["epoch", "u32"],
  4: ["sequence", "u64"], 5: ["account", "string"], 6: ["prompt_tokens", "u64"],
  7: ["output_tokens", "u64"], 8: ["transcript", "bytes"], 9: ["amounts*", PAYEE_AMOUNT],
  10: ["issued_ms", "u64"],
};
const LINE = { 1: ["account", "string"], 2: ["debit", "u64"], 3: ["credit", "u64"] };
const ENTRY = {
  1: ["network_id", "string"], 2: ["index", "u64"], 3: ["kind", "enum"],
  4: ["session_id", "bytes"], 5: ["cause_digest", "bytes"], 6: ["lines*", LINE],
  7: ["posted_ms", "u64"],
};

const PAYLOAD_TYPES = new Map([
  [NODE_KEY_CERT, "node-key-cert"], [NETWORK_FILE_DIGEST, "network-file"], [OFFER, "offer"],
  [SESSION_OPEN, "session-open"], [RESERVATION, "reservation"], [GRANT, "grant"],
  [RECEIPT, "receipt"], [VOUCHER, "voucher"], [BUNDLE_SEAL, "bundle-seal"],
]);

const DEFAULTS = { u32: 0, u64: 0n, enum: 0, string: "", bytes: new Uint8Array() };

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
    const name = label.replace("*", "");
    const isScalar = ["u32", "u64", "enum"].includes(kind);
    ensure(Number(tag & 7n) === (isScalar && !repeated ? 0 : 2), `${name} has another wire type`);
    const again = number === last && repeated && !isScalar;
    ensure(number > last || again, "fields are out of order or twice");
    last = number;
    if (repeated && isScalar) message[name] = decodePacked(reader.chunk(), kind);
    else if (repeated) message[name].push(decodeOne(reader, kind));
    else message[name] = decodeOne(reader, kind);
    const empty = message[name] === 0 || message[name] === 0n || message[name].length === 0;
    ensure(!empty, `${name} is written out though it has its default`);
  }
  return message;
}

function emptyMessage(schema) {
  const message = {};
  for (const [label, kind] of Object.values(schema)) {
    if (label.endsWith("*")) message[label.slice(0, -1)] = [];
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
      else if (kind.startsWith("u") && BigInt(value)) parts.push(encodeVarint(Number(number) * 8), encodeVarint(value));
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
const MEMBERS = [
  "checkpoint", "client_cert", "entries", "finish_reason", "format", "frames", "grant", "manifest",
  "network", "offers", "prompt_ids", "proofs", "receipts", "reservation", "seal", "sealed_ms",
  "session_open", "stage_certs", "terms", "text", "token_ids", "voucher",
];
const TERMS_MEMBERS = [
  "chunk_tokens", "client", "client_ledger_key", "epoch", "handoff_salt", "max_tokens",
  "model_digest", "prefill_chunk_tokens", "prompt_tokens", "session_id", "stages",
];
const STAGE_MEMBERS = [
  "end", "ledger_key", "numeric_class", "offer_digest", "peer", "priced_layers", "prices", "start",
];
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
  };
  ensure(stage.start < stage.end, "a span is empty");
  return stage;
}

function readTerms(value, networkId) {
  const members = readMembers(value, "terms", TERMS_MEMBERS);
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
  });
}

function checkedTerms(terms) {
  ensure(terms.sessionId.length === 16 && terms.handoffSalt.length === 32, "session id or salt");
  ensure(terms.stages.length > 0, "a session needs a stage");
  ensure(new Set(terms.stages.map((stage) => stage.peer)).size === terms.stages.length, "a peer serves one stage");
  ensure(terms.promptTokens >= 1 && terms.maxTokens >= 1, "prompt and answer have at least one token");
  for (const size of [terms.chunkTokens, terms.prefillChunkTokens]) {
    ensure(size >= 1 && size <= 256, "a chunk has 1 to 256 tokens");
  }
  return terms;
}

function readFrame(value) {
  ensure(Array.isArray(value) && value.length === 5, "a frame has five items");
  return {
    traversal: readU64(value[0], "traversal"),
    firstPosition: readU32(value[1], "first position"),
    rows: readU32(value[2], "rows"),
    sample: readFlag(value[3], "sample"),
    closeChunk: readFlag(value[4], "close_chunk"),
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
  ensure(members.format === "plait.bundle.v1", "the format is not plait.bundle.v1");
  const { seal, ...body } = members;
  const networkId = readText(members.network, "network");
  return {
    networkId,
    terms: readTerms(members.terms, networkId),
    sessionOpen: readEnvelope(members.session_open, "session_open"),
    clientCert: readEnvelope(members.client_cert, "client_cert"),
    stageCerts: readItems(members.stage_certs, "stage_certs", readEnvelope),
    offers: readItems(members.offers, "offers", readEnvelope),
    manifest: members.manifest === null ? null : fromBase64(members.manifest, "manifest"),
    promptIds: readItems(members.prompt_ids, "prompt_ids", readU32),
    tokenIds: readItems(members.token_ids, "token_ids", readU32),
    text: readText(members.text, "text"),
    finishReason: readText(members.finish_reason, "finish_reason"),
    frames: readItems(members.frames, "frames", readFrame),
    reservation: readEnvelope(members.reservation, "reservation"),
    grant: readEnvelope(members.grant, "grant"),
    receipts: readItems(members.receipts, "receipts", readEnvelope),
    voucher: readEnvelope(members.voucher, "voucher"),
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
  for (const peer of [bundle.terms.client, ...bundle.terms.stages.map((stage) => stage.peer)]) {
    ensure(network.allowedPeers.has(peer), `${peer} is not on the network's list`);
  }
}

async function checkTerms(bundle) {
  const { terms } = bundle;
  const opening = await openEnvelope(bundle.sessionOpen, SESSION_OPEN, terms.clientLedgerKey);
  const { sampling, route } = opening;
  ensure(sampling.temperature_micros <= 100_000_000, "temperature must be between 0 and 100");
  ensure(sampling.top_p_micros >= 1 && sampling.top_p_micros <= 1_000_000, "top_p must be in (0, 1]");
  ensure(route.stages.length === terms.stages.length, "the signed opening has another number of stages");
  ensure(route.model_digest.length === 32 && opening.wire_dtype === 1, "model digest or wire dtype");
  let layer = 0;
  const stages = route.stages.map((stage, index) => {
    ensure(stage.start_layer === layer && stage.start_layer < stage.end_layer, "the stages do not abut from layer 0");
    ensure(stage.offer_digest.length === 32, "an offer digest is 32 bytes");
    layer = stage.end_layer;
    const { ledgerKey, numericClass } = terms.stages[index];
    return {
      peer: stage.peer_id, ledgerKey, start: stage.start_layer, end: stage.end_layer,
      pricedLayers: stage.priced_layers, prices: stage.prices, numericClass, offerDigest: stage.offer_digest,
    };
  });
  const signed = checkedTerms({
    networkId: opening.network_id, sessionId: opening.session_id, epoch: opening.epoch,
    client: opening.client_peer_id, clientLedgerKey: terms.clientLedgerKey,
    modelDigest: route.model_digest, stages, promptTokens: opening.prompt_tokens,
    maxTokens: opening.max_tokens, chunkTokens: opening.chunk_tokens,
    prefillChunkTokens: opening.prefill_chunk_tokens, handoffSalt: opening.handoff_salt,
  });
  ensure(same(signed, terms), "the signed opening has different terms");
  return { endIds: new Set(sampling.end_ids), openedMs: opening.issued_ms };
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

async function checkStageCerts(bundle, openedMs) {
  const { stages } = bundle.terms;
  ensure(bundle.stageCerts.length === stages.length, "not one certificate for each stage");
  for (const [index, stage] of stages.entries()) {
    await checkKeyCert(bundle.stageCerts[index], bundle.networkId, openedMs, stage.peer, stage.ledgerKey);
  }
}

async function checkOffers(bundle, openedMs) {
  const { terms } = bundle;
  ensure(bundle.offers.length === terms.stages.length, "not one offer for each stage");
  for (const [index, stage] of terms.stages.entries()) {
    const envelope = bundle.offers[index];
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

function checkRoute(bundle, manifest) {
  let position = 0;
  for (const [index, stage] of bundle.terms.stages.entries()) {
    ensure(stage.start === position, `stage ${index} starts at layer ${stage.start}, not ${position}`);
    position = stage.end;
  }
  if (manifest === null) return;
  ensure(position === manifest.layers, `the route ends at layer ${position}, the model has ${manifest.layers}`);
  for (const [index, stage] of bundle.terms.stages.entries()) {
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
  ensure(["stop", "length"].includes(bundle.finishReason), "unknown finish reason");
  const byLength = bundle.finishReason === "length";
  ensure(!byLength || tokenIds.length === bundle.terms.maxTokens, "it claims to have reached the limit, but is shorter");
  if (opening === null) return;
  ensure(!tokenIds.slice(0, -1).some((token) => opening.endIds.has(token)), "the answer goes on after an end id");
  ensure(tokenIds.length > 0 || !byLength, "there is no answer");
  ensure(!byLength || !opening.endIds.has(tokenIds.at(-1)), "it ended with an end id, not by length");
}

// ---------------------------------------------------------------- what went through

// Cumulative counts once a frame is computed.
function countsAfter(terms, frame) {
  const end = frame.firstPosition + frame.rows;
  ensure(frame.rows > 0 || !frame.sample, "no frame draws without a row");
  if (frame.rows > 0 && !frame.sample) {
    ensure(end < terms.promptTokens, "a frame that ends the prompt or follows it must sample");
    return { prompt: end, output: 0 };
  }
  const output = end - terms.promptTokens + 1;
  ensure(output >= 1 && output <= terms.maxTokens, `no answer token is drawn at position ${end}`);
  return { prompt: terms.promptTokens, output };
}

function checkShape(frame, terms, isLast) {
  if (frame.rows === 0) ensure(isLast && frame.closeChunk, "a frame has no rows, but does not end the answer");
  else if (frame.firstPosition >= terms.promptTokens) ensure(frame.rows === 1, "a decode step has one row");
  else {
    ensure(frame.rows <= terms.prefillChunkTokens && frame.closeChunk,
      "a frame of the prompt is a chunk of its own, of limited size");
  }
}

// Every position once and in order; returns where each chunk ended.
function checkFrames(bundle) {
  const { terms, frames } = bundle;
  ensure(bundle.promptIds.length === terms.promptTokens, "another number of prompt ids was agreed");
  ensure(frames.length > 0 && frames.at(-1).closeChunk, "the last frame does not close a chunk");
  const closes = [];
  let position = 0;
  let draws = 0;
  for (const [index, frame] of frames.entries()) {
    const follows = frame.traversal === frames[0].traversal + BigInt(index) && frame.firstPosition === position;
    ensure(follows, `frame ${index} does not follow the one before`);
    const counts = countsAfter(terms, frame);
    draws += Number(frame.sample);
    checkShape(frame, terms, index === frames.length - 1);
    ensure(counts.output === draws, `frame ${index}: the draws are miscounted`);
    ensure(draws - (closes.at(-1)?.counts.output ?? 0) <= terms.chunkTokens, "a chunk has too many draws");
    position += frame.rows;
    if (frame.closeChunk) closes.push({ chunk: closes.length, traversal: frame.traversal, counts });
  }
  ensure(draws > 0 && draws === bundle.tokenIds.length, "there are not as many token ids as draws");
  return closes;
}

function checkReceiptsComplete(bundle, closes) {
  const due = closes.length * bundle.terms.stages.length;
  ensure(bundle.receipts.length === due, `${bundle.receipts.length} receipts, ${due} are due`);
  return due;
}

async function checkStageReceipts(bundle, index, closes) {
  const { terms } = bundle;
  const stage = terms.stages[index];
  const receipts = [];
  let previous = new Uint8Array();
  for (const close of closes) {
    const envelope = bundle.receipts[close.chunk * terms.stages.length + index];
    const receipt = await openEnvelope(envelope, RECEIPT, stage.ledgerKey);
    const expected = {
      network_id: terms.networkId, session_id: terms.sessionId, epoch: terms.epoch, stage_index: index,
      chunk: close.chunk, start_layer: stage.start, end_layer: stage.end, model_digest: terms.modelDigest,
      numeric_class: stage.numericClass, traversal: close.traversal, prompt_tokens: BigInt(close.counts.prompt),
      output_tokens: BigInt(close.counts.output), previous_digest: previous,
    };
    for (const [name, value] of Object.entries(expected)) {
      ensure(same(receipt[name], value), `receipt of stage ${index} chunk ${close.chunk}: it states a different ${name}`);
    }
    ensure(receipt.input_commit.length === 32 && receipt.output_commit.length === 32, "a commitment is 32 bytes");
    receipts.push(receipt);
    previous = await sha256(envelope.payload);
  }
  return receipts;
}

function checkHandoffs(byStage, closes) {
  for (const { chunk } of closes) {
    for (let index = 1; index < byStage.length; index++) {
      const agreed = equalBytes(byStage[index - 1][chunk].output_commit, byStage[index][chunk].input_commit);
      ensure(agreed, `hand-off from stage ${index - 1} to stage ${index}, chunk ${chunk}: they signed different data`);
    }
  }
}

function startOfChain(terms, boundary) {
  const position = concat(bigEndian(terms.epoch, 4), bigEndian(boundary, 4));
  return sha256(encoder.encode("plait.handoff.v1\0"), terms.handoffSalt, terms.sessionId, position);
}

async function linkOfChain(commit, frame, ids) {
  const payload = new Uint8Array(4 * ids.length);
  const view = new DataView(payload.buffer);
  ids.forEach((id, index) => view.setUint32(4 * index, id, true));
  const numbers = concat(bigEndian(frame.traversal, 8), bigEndian(frame.firstPosition, 4), bigEndian(ids.length, 4));
  return sha256(commit, numbers, await sha256(payload));
}

// Stage 0 was fed the prompt and what the last stage drew, and nothing else.
async function checkRing(bundle, byStage, closes) {
  const { terms } = bundle;
  const sequence = [...bundle.promptIds, ...bundle.tokenIds];
  let sent = await startOfChain(terms, 0);
  let drawn = await startOfChain(terms, terms.stages.length);
  let draws = 0;
  let chunk = 0;
  for (const frame of bundle.frames) {
    sent = await linkOfChain(sent, frame, sequence.slice(frame.firstPosition, frame.firstPosition + frame.rows));
    const ids = bundle.tokenIds.slice(draws, draws + Number(frame.sample));
    drawn = await linkOfChain(drawn, frame, ids);
    draws += ids.length;
    if (!frame.closeChunk) continue;
    ensure(equalBytes(byStage[0][chunk].input_commit, sent), `chunk ${chunk}: other ids were sent`);
    ensure(equalBytes(byStage.at(-1)[chunk].output_commit, drawn), `chunk ${chunk}: other ids were drawn`);
    chunk++;
  }
  ensure(chunk === closes.length, "chunks are miscounted");
}

// Rounded up once, on the cumulative counts.
function amountOf(stage, counts) {
  const { prompt, output } = stage.prices;
  const total = BigInt(stage.pricedLayers) * (prompt * BigInt(counts.prompt) + output * BigInt(counts.output));
  const amount = (total + 999_999n) / 1_000_000n;
  ensure(amount <= U64_MAX, "a stage's price does not fit 64 bits");
  return amount;
}

async function checkVoucher(bundle, closes) {
  const { terms } = bundle;
  const voucher = await openEnvelope(bundle.voucher, VOUCHER, terms.clientLedgerKey);
  let transcript = await sha256(encoder.encode("plait.transcript.v1\0"), terms.sessionId, bigEndian(terms.epoch, 4));
  for (const receipt of bundle.receipts) transcript = await sha256(transcript, await sha256(receipt.payload));
  const { counts } = closes.at(-1);
  const amounts = terms.stages.map((stage) => ({ payee: stage.peer, microcredits: amountOf(stage, counts) }));
  ensure(sum(amounts.map((item) => item.microcredits)) <= U64_MAX, "the session's price does not fit 64 bits");
  const expected = {
    network_id: terms.networkId, session_id: terms.sessionId, epoch: terms.epoch,
    sequence: BigInt(closes.length), account: terms.client, prompt_tokens: BigInt(counts.prompt),
    output_tokens: BigInt(counts.output), transcript, amounts,
  };
  for (const [name, value] of Object.entries(expected)) {
    ensure(same(voucher[name], value), `its ${name} does not follow from the receipts and the prices`);
  }
  return voucher;
}

// ---------------------------------------------------------------- credit

const RESERVE = 2, SETTLE = 3, VOID = 4;

function routeBytes(terms) {
  const stages = terms.stages.map((stage) => ({
    peer_id: stage.peer, start_layer: stage.start, end_layer: stage.end,
    offer_digest: stage.offerDigest, priced_layers: stage.pricedLayers, prices: stage.prices,
  }));
  return encode(ROUTE_PLAN, { model_digest: terms.modelDigest, stages });
}

function capsOf(reservation, terms) {
  const payees = reservation.caps.map((cap) => cap.payee);
  ensure(same(payees, terms.stages.map((stage) => stage.peer)), "the caps are not one for each stage, in order");
  return reservation.caps.map((cap) => cap.microcredits);
}

async function checkReservation(bundle, network, openedMs) {
  const { terms } = bundle;
  const authority = network.authorities.find((one) => equalBytes(one.ledgerKey, bundle.grant.signer));
  ensure(authority, "the grant is not signed by an authority of the network file");
  const reservation = await openEnvelope(bundle.reservation, RESERVATION, terms.clientLedgerKey);
  const ours = reservation.network_id === terms.networkId && reservation.account === terms.client
    && equalBytes(reservation.session_id, terms.sessionId) && reservation.epoch === terms.epoch;
  ensure(ours, "the reservation is for another network, account, session or epoch");
  ensure(equalBytes(reservation.route_digest, await sha256(routeBytes(terms))), "the reservation is for another route");
  ensure(sum(capsOf(reservation, terms)) <= reservation.amount, "the caps sum to more than the amount reserved");
  const grant = await openEnvelope(bundle.grant, GRANT);
  ensure(equalBytes(grant.reservation_digest, await sha256(bundle.reservation.payload)), "the grant is for another reservation");
  const granted = grant.network_id === reservation.network_id && grant.account === reservation.account
    && equalBytes(grant.session_id, reservation.session_id) && grant.amount === reservation.amount;
  ensure(granted, "it grants something else than was reserved");
  ensure(openedMs < grant.expires_ms, "the grant has expired");
  return { authority, reservation };
}

function checkCaps(terms, voucher, reservation) {
  capsOf(reservation, terms).forEach((cap, index) => {
    ensure(voucher.amounts[index].microcredits <= cap, `stage ${index} is promised more than its cap`);
  });
}

function readEntry(bundle, payload, number) {
  const entry = decode(ENTRY, payload);
  ensure(entry.kind >= 1 && entry.kind <= VOID, `entry ${number} has an unknown kind`);
  const ours = entry.network_id === bundle.networkId && equalBytes(entry.session_id, bundle.terms.sessionId);
  ensure(ours, `entry ${number} is of another network or session`);
  ensure(entry.lines.every((line) => (line.debit === 0n) !== (line.credit === 0n)),
    `entry ${number}: a line is not either a debit or a credit`);
  const balanced = sum(entry.lines.map((line) => line.debit)) === sum(entry.lines.map((line) => line.credit));
  ensure(balanced, `entry ${number}: its debits and credits differ`);
  return entry;
}

async function checkJournal(bundle, voucher, reservation) {
  if (bundle.entries.length === 0) throw new Absent("the bundle has no journal entries");
  const entries = bundle.entries.map((payload, number) => readEntry(bundle, payload, number));
  entries.forEach((entry, number) => {
    ensure(number === 0 || entries[number - 1].index < entry.index, "the entries are not in the order of the journal");
  });
  const [first] = entries;
  const reserves = entries.filter((entry) => entry.kind === RESERVE);
  ensure(first.kind === RESERVE && reserves.length === 1, "the entries do not start with the one reservation");
  const cause = await sha256(bundle.reservation.payload);
  ensure(equalBytes(first.cause_digest, cause), "the reserve entry was caused by another reservation");
  ensure(sum(first.lines.map((line) => line.credit)) === reservation.amount, "the reserve entry is of another amount");
  const { held, paid } = replay(bundle, entries);
  ensure(held === 0n || entries.at(-1).kind !== VOID, "credit is left in a hold that was voided");
  await checkPaid(bundle, entries, voucher, paid);
}

function replay(bundle, entries) {
  const { client, sessionId, epoch } = bundle.terms;
  const hold = `hold:${toHex(sessionId)}:${epoch}`;
  const paid = new Map();
  let held = 0n;
  for (const entry of entries) {
    const isReserve = entry.kind === RESERVE;
    const source = isReserve ? client : hold;
    ensure(entry.kind >= RESERVE, `entry ${entry.index} issues credit`);
    ensure(entry.lines.every((line) => line.debit === 0n || line.account === source),
      `entry ${entry.index} takes credit from elsewhere`);
    const credits = entry.lines.filter((line) => line.credit > 0n);
    ensure(credits.every((line) => line.account !== source), `entry ${entry.index} moves credit in a circle`);
    if (entry.kind === SETTLE) {
      for (const line of credits) paid.set(line.account, (paid.get(line.account) ?? 0n) + line.credit);
    } else {
      const target = isReserve ? hold : client;
      ensure(credits.length > 0 && credits.every((line) => line.account === target),
        `entry ${entry.index} moves credit to elsewhere`);
    }
    const total = sum(entry.lines.map((line) => line.debit));
    held += isReserve ? total : -total;
    ensure(held >= 0n, `entry ${entry.index} takes more than was reserved`);
  }
  return { held, paid };
}

async function checkPaid(bundle, entries, voucher, paid) {
  const promised = new Map(voucher.amounts.map((item) => [item.payee, item.microcredits]));
  for (const [payee, amount] of paid) {
    ensure(amount <= (promised.get(payee) ?? 0n), `${payee} was paid more than promised`);
  }
  const owed = [...promised].some(([payee, amount]) => (paid.get(payee) ?? 0n) < amount);
  if (!owed) return;
  const final = await sha256(bundle.voucher.payload);
  const done = entries.some((entry) => entry.kind === VOID || equalBytes(entry.cause_digest, final));
  ensure(!done, "a payee was paid less than promised");
  throw new Absent("no entry settles the voucher yet");
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
    ensure(entry.kind >= 1 && entry.kind <= VOID, `entry ${number} has an unknown kind`);
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

// Check every claim that a bundle makes against the keys of a network file.
// Returns { outcome: "verified" | "false" | "incomplete", claims: [{ name, ok, detail }], unchecked }.
async function verifyBundle(bytes, network) {
  const findings = new Findings();
  const bundle = await findings.claim("encoding", () => readBundle(bytes), () => `canonical JSON, ${bytes.length} bytes`);
  if (bundle === null) findings.blocked("everything else", "the encoding");
  else await checkParts(findings, bundle, network);
  findings.unchecked.push(...NEVER_CHECKED, network.witnessQuorum > 0 ? WITNESSED : NOT_WITNESSED);
  return findings.report();
}

async function checkParts(findings, bundle, network) {
  await findings.claim("seal", () => checkSeal(bundle), () => `by the client ${bundle.terms.client}`);
  await findings.claim("network", () => checkNetwork(bundle, network), () => network.id);
  const openedMs = await checkSession(findings, bundle);
  const closes = await findings.claim("frames", () => checkFrames(bundle),
    (value) => `${bundle.frames.length} frames cover every position once, in ${value.length} chunks`);
  let voucher = null;
  if (closes === null) findings.blocked("receipts, hand-offs, ring and voucher", "the frames");
  else {
    await checkReceipts(findings, bundle, closes);
    voucher = await findings.claim("voucher", () => checkVoucher(bundle, closes),
      (value) => `${sum(value.amounts.map((item) => item.microcredits))} microcredits for ${value.prompt_tokens} ` +
        `prompt and ${value.output_tokens} output tokens, as offered`);
  }
  await checkCredit(findings, bundle, network, openedMs, voucher);
}

async function checkSession(findings, bundle) {
  const { terms } = bundle;
  const stages = terms.stages.length;
  const opening = await findings.claim("session terms", () => checkTerms(bundle),
    () => `session ${toHex(terms.sessionId)}, signed by the client`);
  const openedMs = opening === null ? bundle.sealedMs : opening.openedMs;
  await findings.claim("client certificate",
    () => checkKeyCert(bundle.clientCert, bundle.networkId, openedMs, terms.client, terms.clientLedgerKey),
    () => "the client delegated to its ledger key");
  await findings.claim("stage certificates", () => checkStageCerts(bundle, openedMs),
    () => `${stages} stages delegated to their ledger keys`);
  await findings.claim("offers", () => checkOffers(bundle, openedMs),
    () => `${stages} signed offers: span, prices and numeric class as in the route`);
  const manifest = await findings.claim("manifest", () => checkManifest(bundle),
    (value) => `${value.name}, ${value.layers} layers`);
  await findings.claim("route", () => checkRoute(bundle, manifest),
    () => `layers ${terms.stages.map((stage) => `${stage.start}:${stage.end}`).join(" → ")}`);
  await findings.claim("answer", () => checkAnswer(bundle, opening, manifest),
    () => `${bundle.tokenIds.length} ids drawn, ended by ${bundle.finishReason}`);
  return openedMs;
}

async function checkReceipts(findings, bundle, closes) {
  const complete = await findings.claim("receipts complete", () => checkReceiptsComplete(bundle, closes),
    (count) => `${count}: one per stage and chunk`);
  if (complete === null) {
    findings.blocked("receipts, hand-offs and ring", "missing receipts");
    return;
  }
  const byStage = [];
  for (const [index, stage] of bundle.terms.stages.entries()) {
    byStage.push(await findings.claim(`receipts of stage ${index}`, () => checkStageReceipts(bundle, index, closes),
      (value) => `${value.length} chunks by ${stage.peer}, layers ${stage.start}:${stage.end}`));
  }
  if (byStage.includes(null)) {
    findings.blocked("hand-offs and ring", "a receipt");
    return;
  }
  await findings.claim("hand-offs", () => checkHandoffs(byStage, closes),
    () => "each stage received what the one before it sent");
  await findings.claim("ring", () => checkRing(bundle, byStage, closes),
    () => "what was fed to stage 0 is the prompt and what the last stage drew");
}

async function checkCredit(findings, bundle, network, openedMs, voucher) {
  const granted = await findings.claim("reservation and grant", () => checkReservation(bundle, network, openedMs),
    (value) => `granted by the ledger authority ${value.authority.peer}`);
  const quorum = network.witnessQuorum;
  if (voucher === null || granted === null) {
    findings.blocked(quorum ? "caps, journal, log and witnesses" : "caps, journal and log", "the voucher or the grant");
    return;
  }
  const { authority, reservation } = granted;
  await findings.claim("caps", () => checkCaps(bundle.terms, voucher, reservation), () => "no stage is above its cap");
  await findings.claim("journal", () => checkJournal(bundle, voucher, reservation),
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
