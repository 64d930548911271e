"""Verifies docs/spec/vectors with python-cwt, which shares no code with meshnode.

Run by a Python that has `cwt==3.3.0` (it pins cbor2 < 6, so it cannot live beside meshnode):
`.venv-cwt/bin/python tests/interop/check_cwt.py docs/spec/vectors`. Prints one line of JSON with
counts; exits 1 at the first thing that does not hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cbor2
from cwt import COSE, COSEKey
from cwt.exceptions import VerifyError

ED25519 = -19  # RFC 9864


def key_of(kid: bytes) -> COSEKey:
    public = kid[-32:]
    return COSEKey.new({1: 1, -1: 6, -2: public, 2: kid, 3: ED25519, "key_ops": ["verify"]})


def payload_of(wire: bytes) -> bytes:
    """The payload, if the signature holds by the key in the kid."""
    protected = cbor2.loads(cbor2.loads(wire).value[0])
    if protected[1] != ED25519 or set(protected) != {1, 4, 16}:
        raise SystemExit("header")
    payload: bytes = COSE.new().decode(wire, key_of(protected[4]))
    return payload


def main(folder: Path) -> int:
    counts = {"verified": 0, "refused": 0}
    entries = json.loads((folder / "objects.json").read_text())
    steps = json.loads((folder / "story.json").read_text())["steps"]
    for entry in entries + [step for step in steps if "sealed" in step]:
        if payload_of(bytes.fromhex(entry["sealed"])).hex() != entry["payload"]:
            print(f"payload differs: {entry['digest']}")
            return 1
        counts["verified"] += 1
    for entry in json.loads((folder / "bad.json").read_text()):
        if entry["error"] != "VerificationFailed":
            continue
        try:
            payload_of(bytes.fromhex(entry["wire"]))
        except (VerifyError, ValueError):
            counts["refused"] += 1
        else:
            print(f"accepted: {entry['what']}")
            return 1
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
