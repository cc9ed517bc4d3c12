// Reads {network_toml, bundles: [base64]} from stdin and writes a report for each, as JSON:
// the check of docs/verify.js over many bundles in one process.
"use strict";
const { verifyBundle, parseNetworkFile, verifySignature } = require("../../docs/verify.js");

async function main(input) {
  const network = parseNetworkFile(input.network_toml);
  const reports = [];
  for (const bundle of input.bundles) reports.push(await verifyBundle(Buffer.from(bundle, "base64"), network));
  const signatures = [];
  for (const parts of input.signatures ?? []) {
    const [key, signature, message] = parts.map((part) => new Uint8Array(Buffer.from(part, "hex")));
    signatures.push(await verifySignature(key, signature, message).then(() => "", (error) => error.message));
  }
  process.stdout.write(JSON.stringify({ reports, signatures }));
}

let text = "";
process.stdin.setEncoding("utf8").on("data", (part) => (text += part)).on("end", () => main(JSON.parse(text)));
