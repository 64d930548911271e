"""What must be refused, and as what: CBOR, sealed objects and frames with one thing wrong each.

`wire` is hex; where `fill` stands, [byte, count] follows it, so that an oversize vector is short.
`as` says what a reader takes it for, and so where it must stop: "cbor", "envelope", "sealed" (the
envelope is good, and is then opened as `typ`), or "frame".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import cbor2

from meshnode.protocol import messages, objects, papers
from meshnode.protocol.codec import encode
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.rule import encode_map
from meshnode.protocol.types import CBOR_DEPTH_MAX, FRAME_BYTES_MAX, SEALED_BYTES_MAX

from .samples import sample

REMOTE, VERIFY = "RemoteProtocolError", "VerificationFailed"
KEY = KeySigner(hashlib.sha256(b"bad vectors").digest())
_CBOR = {
    "nothing at all": "",
    "integer in more bytes than it needs": "1805",
    "integer in two bytes that fits one": "190017",
    "length in more bytes than it needs": "580100",
    "map length in more bytes than it needs": "b8010000",
    "key twice": "a200010002",
    "keys out of order": "a201000000",
    "byte left over": "0000",
    "byte string cut short": "4401",
    "array cut short": "8201",
    "array that claims 2^62 items": "9b4000000000000000",
    "indefinite array": "9f01ff",
    "indefinite map": "bf0001ff",
    "indefinite byte string": "5f4101ff",
    "indefinite text": "7f6161ff",
    "half float": "f93c00",
    "single float": "fa3f800000",
    "double float": "fb3ff0000000000000",
    "not a number": "f97e00",
    "true": "f5",
    "true as a key": "a1f500",
    "text as a key": "a1616100",
    "negative key": "a12000",
    "null as a key": "a1f600",
    "undefined": "f7",
    "simple value": "f820",
    "reserved head": "1c",
    "break alone": "ff",
    "tag inside": "81c100",
    "bignum that fits an integer": "c24101",
    "bignum": "c249010000000000000000",
    "2^63": "1b8000000000000000",
    "-2^63 - 1": "3b8000000000000000",
    "text that is not UTF-8": "61ff",
    "text with a surrogate": "63eda080",
    "shared references": "82d81c8101d81d00",
    "string reference": "d9010082444141414141d81900",
    "regular expression": "d823612e",
    "big decimal": "c4821b00ffffffffffffff01",
}


def fields_of(obj: Any) -> dict[int, Any]:
    """The map of an object, to be broken."""
    return {**encode_map(obj)}


def _sealed(protected: Any, payload: bytes, unprotected: Any = None, *, tag: str = "d2") -> bytes:
    """An envelope with a good signature, whatever stands in it."""
    head = protected if isinstance(protected, bytes) else cbor2.dumps(protected, canonical=True)
    signature = KEY.sign(encode(["Signature1", head, b"", payload]))
    body = [head, {} if unprotected is None else unprotected, payload, signature]
    return bytes.fromhex(tag) + cbor2.dumps(body, canonical=True)


def _envelopes() -> Iterator[tuple[str, bytes, str]]:
    token = sample(objects.Token, random.Random(1), full=True)
    fields = encode_map(token)
    payload, typ, kid = encode(fields), objects.T_TOKEN, KEY.peer
    head: dict[int, Any] = {1: -19, 4: kid, 16: typ}
    good = _sealed(head, payload)
    yield "algorithm -8 (EdDSA)", _sealed({**head, 1: -8}, payload), REMOTE
    yield "algorithm -7 (ES256)", _sealed({**head, 1: -7}, payload), REMOTE
    yield "algorithm as text", _sealed({**head, 1: "Ed25519"}, payload), REMOTE
    yield "a header label more", _sealed({**head, 3: 0}, payload), REMOTE
    yield "no typ", _sealed({1: -19, 4: kid}, payload), REMOTE
    yield "no kid", _sealed({1: -19, 16: typ}, payload), REMOTE
    yield "kid of 37 bytes", _sealed({**head, 4: kid[:-1]}, payload), REMOTE
    yield "kid with another prefix", _sealed({**head, 4: b"\1" + kid[1:]}, payload), REMOTE
    yield "typ of 33 bytes", _sealed({**head, 16: "x" * 33}, payload), REMOTE
    yield "header out of order", _sealed(bytes.fromhex("a2101161044161"), payload), REMOTE
    yield "header is no map", _sealed([1], payload), REMOTE
    yield "unprotected not empty", _sealed(head, payload, {4: kid}), REMOTE
    yield "unprotected is no map", _sealed(head, payload, b""), REMOTE
    yield "no tag", _sealed(head, payload, tag=""), REMOTE
    yield "tag 18 in two bytes", _sealed(head, payload, tag="d812"), REMOTE
    yield "tag 98 (COSE_Sign)", _sealed(head, payload, tag="d862"), REMOTE
    yield "tag twice", b"\xd2" + good, REMOTE
    yield "byte left over", good + b"\0", REMOTE
    yield "one byte short", good[:-1], REMOTE
    short: list[Any] = [encode(head), {}, payload, bytes(63)]
    yield "signature of 63 bytes", b"\xd2" + encode(short), VERIFY
    for name, at in (("payload", good.index(payload) + 20), ("signature", len(good) - 30)):
        yield (
            f"flipped bit in the {name}",
            good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :],
            VERIFY,
        )
    yield "signature of another key", good.replace(kid, KeySigner(bytes(32)).peer), VERIFY


def _payloads() -> Iterator[tuple[str, bytes]]:
    """Good envelopes around something that is not the object their typ names."""
    fields = fields_of(sample(objects.Token, random.Random(1), full=True))
    head: dict[int, Any] = {1: -19, 4: KEY.peer, 16: objects.T_TOKEN}
    lease = {**head, 16: objects.T_LEASE}
    yield "typ of another object", _sealed(lease, encode(fields))
    yield "unknown key in a signed object", _sealed(head, encode({**fields, 99: 0}))
    yield "field missing", _sealed(head, encode({k: v for k, v in fields.items() if k != 5}))
    yield "another version", _sealed(head, encode({**fields, 0: 2}))
    yield "name of another object", _sealed(head, encode({**fields, 4: "lease"}))
    yield "network of 7 bytes", _sealed(head, encode({**fields, 1: bytes(7)}))
    yield "text where a number belongs", _sealed(head, encode({**fields, 3: "3"}))
    yield "number over its bound", _sealed(head, encode({**fields, 10: 2}))
    yield "negative where unsigned", _sealed(head, encode({**fields, 3: -1}))
    yield "payload is no map", _sealed(head, encode([1]))
    yield "payload is not CBOR", _sealed(head, b"\xff")
    yield "payload with a float", _sealed(head, cbor2.dumps({**fields, 3: 1.5}))
    yield "payload in another order", _sealed(head, _reversed(fields))


def _reversed(fields: dict[int, Any]) -> bytes:
    return cbor2.dumps(dict(sorted(fields.items(), reverse=True)))


def _rules() -> Iterator[tuple[str, str, Any]]:
    """Objects whose fields are well each for itself but not together."""
    rng = random.Random(3)
    offer = fields_of(sample(objects.Offer, rng, full=False))
    first, size = offer[6]
    yield "run outside its task", objects.T_OFFER, {**offer, 8: [first + 2 * size, 1]}
    yield "run of nothing", objects.T_OFFER, {**offer, 8: [first, 0]}
    yield "task outside its job", objects.T_OFFER, {**offer, 6: [first, 1 << 32]}
    yield "run of 4097 units", objects.T_OFFER, {**offer, 8: [first, 4097]}
    job = {**offer[5], 99: 0}
    yield "unknown key in a nested rule", objects.T_OFFER, {**offer, 5: job}
    consent = fields_of(sample(papers.Consent, rng, full=False))
    account = bytes(32)
    yield "shares of 9999 parts", papers.T_CONSENT, {**consent, 8: [[account, 0, 9999]]}
    yield "no shares", papers.T_CONSENT, {**consent, 8: []}
    agreement = fields_of(sample(objects.Agreement, rng, full=False))
    yield "rate per 0", objects.T_AGREEMENT, {**agreement, 8: [[0, 1, 0]]}
    yield "currency of 4 letters", objects.T_AGREEMENT, {**agreement, 7: "EURO"}
    advert = fields_of(sample(objects.Advert, rng, full=False))
    yield "17 addresses", objects.T_ADVERT, {**advert, 15: ["/ip4/127.0.0.1/tcp/1"] * 17}
    yield "unknown reason code", objects.T_ADVERT, {**advert, 13: [0, 0, 0, 0, 1, 65535]}
    yield "text over its bound in UTF-8", objects.T_ADVERT, {**advert, 5: "é" * 33}
    receipt = fields_of(sample(objects.Receipt, rng, full=False))
    meters = {k: v for k, v in receipt[10].items() if k != 8}
    yield "a meter missing", objects.T_RECEIPT, {**receipt, 10: meters}
    yield "a meter more", objects.T_RECEIPT, {**receipt, 10: {**receipt[10], 9: 0}}
    for what, fields in _manifests(random.Random(4)):
        yield what, objects.T_MANIFEST, fields


def _manifests(rng: random.Random) -> Iterator[tuple[str, Any]]:
    plain = fields_of(sample(objects.Manifest, rng, full=False))
    stepped = fields_of(sample(objects.Manifest, rng, full=True))
    array, state = plain[9][0], stepped[9][0]
    yield "state of an artifact that is not stepped", {**plain, 8: [[2, array]]}
    yield "a role that is none", {**plain, 8: [[3, array]]}
    yield "a maker of 33 bytes", {**plain, 2: bytes(33)}
    yield "a manifest of no result", {**plain, 9: []}
    yield "a manifest of no platform", {**plain, 18: []}
    yield "an artifact over 16 MiB", {**plain, 7: (16 << 20) + 1}
    yield "a stepped artifact without state", {**stepped, 8: [[0, state]]}
    yield "a stepped artifact that returns more than its state", {**stepped, 9: [state, state]}
    yield "a result that is no state array", {**stepped, 20: [[1], [], 100, 10]}
    yield "a stepped artifact without result", {**stepped, 20: [[], [0], 100, 10]}
    yield "indices that do not rise", {**stepped, 20: [[0, 0], [], 100, 10]}
    yield "a slice of no steps", {**stepped, 20: [[0], [], 100, 0]}


def _frames() -> Iterator[tuple[str, bytes]]:
    beat = messages.unpack(messages.pack(sample(messages.Heartbeat, random.Random(4), full=True)))
    fields = {0: 6, **fields_of(beat)}
    yield "no number", encode({k: v for k, v in fields.items() if k})
    yield "number as text", encode({**fields, 0: "6"})
    yield "array", encode([6])
    yield "field missing", encode({0: 6})
    yield "null in an optional field", encode({**fields, 4: None})
    yield "lease id of 15 bytes", encode({**fields, 1: bytes(15)})
    yield "more units than a lease has", encode({**fields, 2: 4097})
    yield "part of nothing", encode({0: 4, 1: bytes(16), 2: 0, 3: []})
    yield "piece of one number", encode({0: 4, 1: bytes(16), 2: 0, 3: [b""], 4: [0]})
    yield "hello of no version", encode({0: 1, 1: [], 2: 0, 3: bytes(8), 4: None, 5: 0, 6: 0})


def bad() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [
        {"what": what, "as": "cbor", "wire": wire, "error": REMOTE} for what, wire in _CBOR.items()
    ]
    deep = "81" * (CBOR_DEPTH_MAX + 1) + "00"
    out.append({"what": "17 arrays deep", "as": "cbor", "wire": deep, "error": REMOTE})
    long = (f"5a{FRAME_BYTES_MAX:08x}", FRAME_BYTES_MAX, "cbor")
    huge = ("d2", SEALED_BYTES_MAX, "envelope")
    for wire, count, kind in (long, huge):
        out.append(
            {
                "what": "more than 64 KiB",
                "as": kind,
                "wire": wire,
                "fill": [0, count],
                "error": REMOTE,
            }
        )
    for what, envelope, error in _envelopes():
        out.append(
            {
                "what": what,
                "as": "envelope",
                "wire": envelope.hex(),
                "error": error,
            }
        )
    for what, envelope in _payloads():
        out.append(
            {
                "what": what,
                "as": "sealed",
                "typ": objects.T_TOKEN,
                "wire": envelope.hex(),
                "error": REMOTE,
            }
        )
    for what, typ, fields in _rules():
        signed = _sealed({1: -19, 4: KEY.peer, 16: typ}, encode(fields))
        out.append(
            {"what": what, "as": "sealed", "typ": typ, "wire": signed.hex(), "error": REMOTE}
        )
    out += [
        {"what": what, "as": "frame", "wire": frame.hex(), "error": REMOTE}
        for what, frame in _frames()
    ]
    return out
