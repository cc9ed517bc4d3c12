// Plays docs/verify.html with a document of just what verify.js uses: files of the folder
// given are "chosen", and what the page would show is printed.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const folder = process.argv[2];

class Element {
  constructor(name) {
    const file = path.join(folder, name);
    this.children = [];
    this.files = fs.existsSync(file) ? [new Blob([fs.readFileSync(file)])] : [];
  }
  append(child) { this.children.push(child); }
  replaceChildren() { this.children = []; }
  addEventListener(_, listener) { this.listener = listener; }
}

const files = { bundle: "bundle", network: "network.toml", signature: "network.toml.sig", report: "nothing" };
const elements = Object.fromEntries(Object.entries(files).map(([id, name]) => [id, new Element(name)]));
globalThis.document = {
  getElementById: (id) => elements[id],
  createElement: () => new Element("nothing"),
};
require("../../docs/verify.js");
elements.bundle.listener().then(() => {
  for (const child of elements.report.children) console.log(child.textContent);
});
