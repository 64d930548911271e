"""Writes docs/spec/vectors/*.json: `python -m tests.unit.protocol.make_vectors`.

Everything comes from fixed seeds, and Ed25519 signs the same way every time, so the files are the
same to the byte wherever they are made; a test makes them anew and compares. Another
implementation needs nothing but these files: docs/spec/meshnode.md section 13 says how to read
them.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from meshnode.protocol import merkle, messages, objects
from meshnode.protocol.codec import digest_of, encode
from meshnode.protocol.identity import KeySigner, peer_text
from meshnode.protocol.rule import encode_map
from meshnode.protocol.sealed import Sealed, seal
from meshnode.protocol.types import BLOB_BYTES_MAX, CHUNK_BYTES, PEER_BYTES

from .bad_vectors import bad
from .samples import SIGNED, sample
from .story import story

DIR = Path(__file__).parents[3] / "docs" / "spec" / "vectors"
SEED = 2026


def plain(value: Any) -> Any:
    """JSON of a field: byte strings as "0x" and hex, integers past 2^53 as {"int": "..."}."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"int": str(int(value))}
    return value


def signer_of(typ: str, index: int) -> tuple[bytes, KeySigner]:
    seed = hashlib.sha256(f"{typ} {index}".encode()).digest()
    return seed, KeySigner(seed)


def entry(typ: str, index: int) -> dict[str, Any]:
    rule_class, field = SIGNED[typ]
    seed, signer = signer_of(typ, index)
    obj = sample(rule_class, random.Random(SEED + index), full=bool(index % 2))
    kid: bytes = signer.peer
    if field:
        kid = signer.peer if len(getattr(obj, field)) == PEER_BYTES else signer.account
        values = {f.name: getattr(obj, f.name) for f in fields(obj)} | {field: kid}
        obj = rule_class(**values)
    sealed = seal(obj, typ, kid, signer.sign)
    return {
        "typ": typ,
        "rule": rule_class.__name__,
        "seed": seed.hex(),
        "fields": plain(obj),
        **envelope(sealed),
    }


def envelope(sealed: Sealed) -> dict[str, str]:
    return {
        "kid": sealed.kid.hex(),
        "payload": sealed.payload.hex(),
        "sealed": sealed.wire.hex(),
        "digest": sealed.digest.hex(),
    }


def objects_file() -> list[dict[str, Any]]:
    return [entry(typ, index) for typ in SIGNED for index in range(4)]


def frames_file() -> list[dict[str, Any]]:
    out = []
    for number, message in messages.NUMBERS.items():
        for index in range(4):
            value = sample(message, random.Random(SEED + index), full=bool(index % 2))
            frame = messages.pack(value)
            out.append(
                {
                    "message": message.__name__,
                    "number": number,
                    "fields": plain(value),
                    "frame": frame.hex(),
                }
            )
    return out


def specs_file() -> list[dict[str, Any]]:
    """Job specs, which are unsigned: the job digest and the ids that follow from it."""
    out = []
    for index in range(3):
        spec = sample(objects.JobSpec, random.Random(SEED + index), full=True)
        payload = encode(encode_map(spec))
        job = hashlib.sha256(payload).digest()
        task = digest_of([job, 24, 4096, 1])
        out.append(
            {
                "fields": plain(spec),
                "payload": payload.hex(),
                "job_digest": job.hex(),
                "job_id": job[:16].hex(),
                "task": {"first": 24, "count": 4096, "replica": 1},
                "task_digest": task.hex(),
                "task_id": task[:16].hex(),
                "run": {"first": 100, "count": 7},
                "input_root_of_blobs": digest_of([job, 100, 7]).hex(),
            }
        )
    return out


def peers_file() -> list[dict[str, str]]:
    out = []
    for index in range(4):
        seed, signer = signer_of("peer", index)
        out.append(
            {
                "seed": seed.hex(),
                "account": signer.account.hex(),
                "peer": signer.peer.hex(),
                "text": peer_text(signer.peer),
            }
        )
    return out


def blobs_file() -> list[dict[str, Any]]:
    """Blobs whose byte i is i * 7 mod 251, so that no two chunks are alike."""
    sizes = (0, 1, 251, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5)
    period = bytes(i * 7 % 251 for i in range(251))
    out = []
    for size in sizes:
        content = (period * (size // 251 + 1))[:size]
        chunks = [
            hashlib.sha256(content[at : at + CHUNK_BYTES]).digest()
            for at in range(0, size, CHUNK_BYTES)
        ]
        out.append(
            {
                "size": size,
                "chunks": [chunk.hex() for chunk in chunks],
                "blob_id": digest_of([size, list(chunks)]).hex(),
            }
        )
    assert sizes[-1] < BLOB_BYTES_MAX
    return out


def merkle_file() -> dict[str, Any]:
    trees, proofs = [], []
    for count in (0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 100):
        leaves = [hashlib.sha256(b"%d of %d" % (i, count)).digest() for i in range(count)]
        tree = merkle.root(leaves)
        trees.append({"leaves": [leaf.hex() for leaf in leaves], "root": tree.hex()})
        for index in sorted({0, count // 2, count - 1} & set(range(count))):
            path = merkle.proof(leaves, index)
            good: dict[str, Any] = {
                "leaf": leaves[index].hex(),
                "index": index,
                "size": count,
                "path": [node.hex() for node in path],
                "root": tree.hex(),
                "holds": True,
            }
            proofs.append(good)
            proofs += [
                {**good, "what": "another leaf", "leaf": tree.hex(), "holds": False},
                {**good, "what": "another root", "root": leaves[0].hex(), "holds": False},
                {**good, "what": "past the end", "index": count, "holds": False},
                {**good, "what": "a node more", "path": [*good["path"], "00" * 32], "holds": False},
            ]
            if path:
                short = {**good, "what": "a node less", "path": good["path"][:-1], "holds": False}
                proofs.append(short)
    one, two = (hashlib.sha256(name).digest() for name in (b"one", b"two"))
    pair, path = merkle.root([one, two]), merkle.proof([one, two], 1)
    for what, leaf, index, size, nodes, tree in (
        ("size 1 for the second of two", two, 0, 1, path, pair),
        ("size 2 for the only one", one, 0, 2, [], merkle.root([one])),
        ("size 2 for the only one, from its end", one, 1, 2, [], merkle.root([one])),
    ):
        proofs.append(
            {
                "what": what,
                "leaf": leaf.hex(),
                "index": index,
                "size": size,
                "path": [node.hex() for node in nodes],
                "root": tree.hex(),
                "holds": False,
            }
        )
    return {"trees": trees, "proofs": proofs}


def make() -> dict[str, str]:
    """File name to text."""
    files: dict[str, Any] = {
        "objects.json": objects_file(),
        "frames.json": frames_file(),
        "specs.json": specs_file(),
        "peers.json": peers_file(),
        "blobs.json": blobs_file(),
        "merkle.json": merkle_file(),
        "story.json": story(plain, envelope),
        "bad.json": bad(),
    }
    return {
        name: json.dumps(content, indent=1, ensure_ascii=True) + "\n"
        for name, content in files.items()
    }


if __name__ == "__main__":
    DIR.mkdir(parents=True, exist_ok=True)
    for name, content in make().items():
        (DIR / name).write_text(content, encoding="ascii")
        print(f"{name}: {len(content)} bytes")
