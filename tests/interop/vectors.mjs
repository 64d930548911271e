// Reads docs/spec/vectors with nothing but Node's own crypto: no line of meshnode, no package.
// `node vectors.mjs DIR` prints one line of JSON with counts and exits 1 at the first thing that
// does not hold. A reader of the CBOR profile in forty lines is also the proof that it is small.
import { createHash, createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";

const dir = process.argv[2];
const load = (name) => JSON.parse(readFileSync(`${dir}/${name}.json`, "ascii"));
const hex = (text) => Buffer.from(text, "hex");
const sha256 = (...parts) => createHash("sha256").update(Buffer.concat(parts)).digest();
const check = (held, what) => {
  if (!held) throw new Error(what);
};

// ---- CBOR profile: unsigned and negative integers, strings, arrays, maps, null -----------------
function read(buf) {
  let at = 0;
  const head = () => {
    check(at < buf.length, "cut short");
    const first = buf[at++];
    const low = first & 31;
    if (low < 24) return [first >> 5, BigInt(low)];
    check(low < 28, "indefinite or reserved");
    const width = 1 << (low - 24);
    check(at + width <= buf.length, "cut short");
    let number = 0n;
    for (let i = 0; i < width; i++) number = (number << 8n) | BigInt(buf[at++]);
    check(number >= [24n, 256n, 65536n, 4294967296n][low - 24], "not the shortest form");
    return [first >> 5, number];
  };
  const value = (depth) => {
    if (buf[at] === 0xf6) return at++, null;
    const [major, number] = head();
    check(major < 6, "tag, float or simple value");
    if (major < 2) {
      check(number < 1n << 63n, "integer outside 64 bits");
      return major ? -1n - number : number;
    }
    check(number <= BigInt(buf.length - at), "cut short");
    const size = Number(number);
    if (major < 4) {
      const bytes = buf.subarray(at, (at += size));
      return major === 2 ? bytes : new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    }
    check(depth > 0, "nested too deep");
    if (major === 4) return Array.from({ length: size }, () => value(depth - 1));
    const map = new Map();
    let last = -1n;
    for (let i = 0; i < size; i++) {
      const key = value(depth - 1);
      check(typeof key === "bigint" && key > last, "key that is no unsigned integer, or out of order");
      map.set((last = key), value(depth - 1));
    }
    return map;
  };
  const whole = value(16);
  check(at === buf.length, "bytes left over");
  return whole;
}

function write(value) {
  const head = (major, number) => {
    const n = BigInt(number);
    const width = n < 24n ? 0 : n < 256n ? 1 : n < 65536n ? 2 : n < 4294967296n ? 4 : 8;
    const out = Buffer.alloc(1 + width);
    out[0] = (major << 5) | (width ? 24 + Math.log2(width) : Number(n));
    for (let i = 0, rest = n; i < width; i++, rest >>= 8n) out[width - i] = Number(rest & 255n);
    return out;
  };
  if (typeof value === "bigint") return head(0, value);
  if (typeof value === "number") return head(0, value);
  if (typeof value === "string") return Buffer.concat([head(3, Buffer.byteLength(value)), Buffer.from(value)]);
  if (Buffer.isBuffer(value)) return Buffer.concat([head(2, value.length), value]);
  return Buffer.concat([head(4, value.length), ...value.map(write)]);
}

// ---- the envelope --------------------------------------------------------------------------------
function unseal(wire) {
  check(wire.length <= 65536 && wire[0] === 0xd2, "not a sealed object");
  const parts = read(wire.subarray(1));
  check(Array.isArray(parts) && parts.length === 4, "not four parts");
  const [head, unprotected, payload, signature] = parts;
  check([head, payload, signature].every(Buffer.isBuffer), "not byte strings");
  check(unprotected instanceof Map && unprotected.size === 0, "unprotected is not empty");
  const labels = read(head);
  check(labels instanceof Map && labels.size === 3 && labels.get(1n) === -19n, "not Ed25519");
  const [kid, typ] = [labels.get(4n), labels.get(16n)];
  check(Buffer.isBuffer(kid) && typeof typ === "string" && typ.length <= 32, "no kid or typ");
  const peer = kid.length === 38 && kid.subarray(0, 6).equals(hex("002408011220"));
  check(peer || kid.length === 32, "kid is neither a peer nor an account");
  const key = createPublicKey({
    key: Buffer.concat([hex("302a300506032b6570032100"), kid.subarray(-32)]),
    format: "der",
    type: "spki",
  });
  const signed = write(["Signature1", head, Buffer.alloc(0), payload]);
  const held = signature.length === 64 && verify(null, signed, key, signature);
  if (!held) throw Object.assign(new Error("signature"), { name: "VerificationFailed" });
  return { kid, typ, payload, digest: sha256(payload), fields: read(payload) };
}

function root(leaves) {
  if (leaves.length === 0) return sha256(Buffer.alloc(0));
  if (leaves.length === 1) return sha256(Buffer.from([0]), leaves[0]);
  let split = 1;
  while (split * 2 < leaves.length) split *= 2;
  return sha256(Buffer.from([1]), root(leaves.slice(0, split)), root(leaves.slice(split)));
}

const counts = {};
const count = (what) => (counts[what] = (counts[what] ?? 0) + 1);

for (const entry of load("objects")) {
  const sealed = unseal(hex(entry.sealed));
  check(sealed.typ === entry.typ && sealed.kid.equals(hex(entry.kid)), `${entry.typ}: header`);
  check(sealed.payload.equals(hex(entry.payload)), `${entry.typ}: payload`);
  check(sealed.digest.equals(hex(entry.digest)), `${entry.typ}: digest`);
  check(sealed.fields.get(0n) === 1n, `${entry.typ}: version`);
  count("objects");
}
for (const entry of load("frames")) {
  check(read(hex(entry.frame)).get(0n) === BigInt(entry.number), `${entry.message}: number`);
  count("frames");
}
for (const entry of load("specs")) {
  const job = sha256(hex(entry.payload));
  const { first, count: units, replica } = entry.task;
  check(job.equals(hex(entry.job_digest)), "job digest");
  check(sha256(write([job, first, units, replica])).equals(hex(entry.task_digest)), "task digest");
  const run = sha256(write([job, entry.run.first, entry.run.count]));
  check(run.equals(hex(entry.input_root_of_blobs)), "input root");
  count("specs");
}
for (const { size, chunks, blob_id } of load("blobs")) {
  const content = Buffer.alloc(size);
  for (let i = 0; i < size; i++) content[i] = ((i % 251) * 7) % 251;
  const made = [];
  for (let i = 0; i < size; i += 1 << 20) made.push(sha256(content.subarray(i, i + (1 << 20))));
  check(made.every((chunk, i) => chunk.equals(hex(chunks[i]))), `chunks of ${size} bytes`);
  check(made.length === chunks.length, `number of chunks of ${size} bytes`);
  check(sha256(write([size, made])).equals(hex(blob_id)), `blob of ${size} bytes`);
  count("blobs");
}
for (const tree of load("merkle").trees) {
  check(root(tree.leaves.map(hex)).equals(hex(tree.root)), `tree of ${tree.leaves.length}`);
  count("trees");
}
for (const entry of load("bad")) {
  // what is wrong as an object of its rule is not this reader's business: it knows no rules
  if (entry.as !== "cbor" && entry.as !== "envelope") continue;
  const [byte, size] = entry.fill ?? [0, 0];
  const wire = Buffer.concat([hex(entry.wire), Buffer.alloc(size, byte)]);
  let thrown = null;
  try {
    if (entry.as === "cbor") check(wire.length <= 65536, "too long"), read(wire);
    else unseal(wire);
  } catch (error) {
    thrown = error;
  }
  check(thrown, `accepted: ${entry.what}`);
  const signature = thrown.name === "VerificationFailed";
  check(signature === (entry.error === "VerificationFailed"), `refused otherwise: ${entry.what}`);
  count("refused");
}

const story = load("story");
const receipts = [];
for (const step of story.steps.filter((s) => s.sealed)) {
  const sealed = unseal(hex(step.sealed));
  check(sealed.digest.equals(hex(step.digest)), `${step.what}: digest`);
  if (sealed.typ === "mesh-receipt/1") receipts.push(sealed);
  if (sealed.typ === "mesh-accept/1") {
    check(sealed.fields.get(4n).equals(receipts.at(-1).digest), "acceptance: receipt");
    count("acceptances");
  }
}
let next = 0;
let total = 0n;
receipts.forEach(({ fields }, i) => {
  const work = fields.get(9n);
  const [first, size] = work.get(1n).map(Number);
  const outputs = story.outputs.slice(first, first + size).map((output) => sha256(hex(output)));
  check(first === next, "receipt: units");
  check(work.get(5n).equals(root(outputs)), "receipt: output root");
  check(fields.get(7n) === BigInt(i), "receipt: seq");
  const previous = i ? fields.get(8n)?.equals(receipts[i - 1].digest) : fields.get(8n) === null;
  check(previous, "receipt: previous");
  total += fields.get(12n);
  check(fields.get(13n) === total, "receipt: total");
  next = first + size;
  count("receipts");
});
console.log(JSON.stringify(counts));
