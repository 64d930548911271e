"""The published vectors are what the code makes, and the code judges them as they say."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pycddl
import pytest

from meshnode import errors
from meshnode.protocol import merkle, messages, objects, papers
from meshnode.protocol.codec import decode, digest_of, encode
from meshnode.protocol.identity import KeySigner, peer_of_text, peer_text
from meshnode.protocol.rule import decode_map, encode_map
from meshnode.protocol.sealed import seal, unseal

from . import cddl, make_vectors
from .samples import SIGNED
from .test_cddl import rule_name


def load(name: str) -> Any:
    return json.loads((make_vectors.DIR / name).read_text(encoding="ascii"))


def test_making_the_vectors_anew_gives_the_same_bytes() -> None:
    made = make_vectors.make()
    assert {path.name for path in make_vectors.DIR.glob("*.json")} == set(made)
    for name, content in made.items():
        # equality first, so that a failure does not print a hundred kilobytes
        same = (make_vectors.DIR / name).read_text(encoding="ascii") == content
        assert same, f"{name} differs: python -m tests.unit.protocol.make_vectors"


def test_every_signed_object_decodes_and_encodes_to_the_same_bytes() -> None:
    entries = load("objects.json")
    assert {entry["typ"] for entry in entries} == set(SIGNED)
    for entry in entries:
        rule_class, _ = SIGNED[entry["typ"]]
        sealed = unseal(bytes.fromhex(entry["sealed"]))
        assert sealed.kid.hex() == entry["kid"]
        assert sealed.payload.hex() == entry["payload"]
        assert sealed.digest.hex() == entry["digest"]
        assert hashlib.sha256(sealed.payload).hexdigest() == entry["digest"]
        obj = sealed.open(rule_class, entry["typ"])
        assert make_vectors.plain(obj) == entry["fields"]
        signer = KeySigner(bytes.fromhex(entry["seed"]))
        assert seal(obj, entry["typ"], sealed.kid, signer.sign).wire == sealed.wire


def test_every_frame_decodes_and_encodes_to_the_same_bytes() -> None:
    entries = load("frames.json")
    assert {entry["number"] for entry in entries} == set(messages.NUMBERS)
    for entry in entries:
        frame = bytes.fromhex(entry["frame"])
        message = messages.unpack(frame)
        assert type(message).__name__ == entry["message"]
        assert make_vectors.plain(message) == entry["fields"]
        assert messages.pack(message) == frame


def test_a_frame_with_an_unknown_key_is_read_without_it() -> None:
    for entry in load("frames.json"):
        frame = bytes.fromhex(entry["frame"])
        fields = decode(frame)
        assert isinstance(fields, dict)
        assert messages.unpack(encode({**fields, 4096: "new"})) == messages.unpack(frame)


def test_a_frame_of_a_later_version_is_no_message_and_no_error() -> None:
    assert messages.unpack(encode({0: max(messages.NUMBERS) + 1000, 1: b"what"})) is None


def test_a_foreign_checker_accepts_every_payload_and_refuses_a_key_more() -> None:
    entries = [(rule_name(entry["rule"]), entry["payload"]) for entry in load("objects.json")]
    entries += [("job-spec", entry["payload"]) for entry in load("specs.json")]
    entries += [(rule_name(entry["message"]), entry["frame"]) for entry in load("frames.json")]
    schemas = {rule: pycddl.Schema(cddl.schema(rule)) for rule, _ in entries}
    for rule, wire in entries:
        payload = bytes.fromhex(wire)
        schemas[rule].validate_cbor(payload)
        fields = decode(payload)
        assert isinstance(fields, dict)
        with pytest.raises(pycddl.ValidationError):
            schemas[rule].validate_cbor(encode({**fields, 99: 0}))


def wire_of(entry: dict[str, Any]) -> bytes:
    byte, count = entry.get("fill", (0, 0))
    tail: bytes = bytes([byte]) * count
    head: str = entry["wire"]
    return bytes.fromhex(head) + tail


def read(entry: dict[str, Any]) -> None:
    wire = wire_of(entry)
    if entry["as"] == "cbor":
        decode(wire)
    elif entry["as"] == "frame":
        messages.unpack(wire)
    elif entry["as"] == "envelope":
        unseal(wire)
    else:
        unseal(wire).open(SIGNED[entry["typ"]][0], entry["typ"])


@pytest.mark.parametrize("entry", load("bad.json"), ids=lambda e: f"{e['as']}: {e['what']}")
def test_what_is_bad_is_refused_as_the_vectors_say(entry: dict[str, Any]) -> None:
    with pytest.raises(errors.MeshError) as caught:
        read(entry)
    assert type(caught.value).__name__ == entry["error"]


def test_job_and_task_ids() -> None:
    for entry in load("specs.json"):
        payload = bytes.fromhex(entry["payload"])
        spec = decode_map(objects.JobSpec, decode(payload), closed=True)
        assert encode(encode_map(spec)) == payload
        job = hashlib.sha256(payload).digest()
        task = entry["task"]
        assert job.hex() == entry["job_digest"]
        assert entry["job_id"] == entry["job_digest"][:32]
        made = digest_of([job, task["first"], task["count"], task["replica"]])
        assert made.hex() == entry["task_digest"]
        assert entry["task_id"] == entry["task_digest"][:32]


def test_peers() -> None:
    for entry in load("peers.json"):
        signer = KeySigner(bytes.fromhex(entry["seed"]))
        assert (signer.peer.hex(), signer.account.hex()) == (entry["peer"], entry["account"])
        assert peer_text(signer.peer) == entry["text"]
        assert peer_of_text(entry["text"]) == signer.peer


def test_merkle_trees_and_proofs() -> None:
    content = load("merkle.json")
    for tree in content["trees"]:
        assert merkle.root([bytes.fromhex(leaf) for leaf in tree["leaves"]]).hex() == tree["root"]
    for entry in content["proofs"]:
        holds = merkle.included(
            bytes.fromhex(entry["leaf"]),
            entry["index"],
            entry["size"],
            [bytes.fromhex(node) for node in entry["path"]],
            bytes.fromhex(entry["root"]),
        )
        assert holds == entry["holds"], entry.get("what", "a proof that holds")
    assert {entry["holds"] for entry in content["proofs"]} == {True, False}


def test_the_story_holds_together() -> None:
    """What one object cites of another is that object's digest; roots are over what was sent."""
    content = load("story.json")
    wires = [(s["what"], s["sealed"]) for s in content["steps"] if "sealed" in s]
    sealed = [(typ, unseal(bytes.fromhex(wire))) for typ, wire in wires]
    opened = [(typ, s, s.open(SIGNED[typ][0], typ)) for typ, s in sealed]
    of = {typ: [(s, obj) for kind, s, obj in opened if kind == typ] for typ, _ in sealed}
    (genesis, _), *_ = of[papers.T_GENESIS]
    assert genesis.digest[:8].hex() == content["network"]
    assert all(obj.network == genesis.digest[:8] for _, _, obj in opened[1:])
    asked, answered = of[objects.T_AGREEMENT]
    assert asked[0].payload == answered[0].payload and asked[0].kid != answered[0].kid
    assert asked[0].digest.hex() == content["channel"]
    offer, lease = of[objects.T_OFFER][0], of[objects.T_LEASE][0]
    assert lease[1].offer == offer[0].digest
    assert digest_of(encode_map(offer[1].job)).hex() == content["job_digest"]
    assert hashlib.sha256(bytes.fromhex(content["inline"])).digest() == offer[1].input_root
    frames = [messages.unpack(bytes.fromhex(s["frame"])) for s in content["steps"] if "frame" in s]
    outputs = [o for part in frames if isinstance(part, messages.Part) for o in part.outputs]
    assert [o.hex() for o in outputs] == content["outputs"]
    previous, total = None, 0
    for seq, (receipt, obj) in enumerate(of[objects.T_RECEIPT]):
        units = obj.work.units
        leaves = [hashlib.sha256(o).digest() for o in outputs[units.first :][: units.size]]
        assert obj.work.output_root == merkle.root(leaves)
        assert (obj.seq, obj.previous) == (seq, previous)
        total += obj.amount_nano
        assert obj.total_nano == total
        previous = receipt.digest
    acceptance = of[objects.T_ACCEPT][0][1]
    assert acceptance.receipt == previous
    assert acceptance.total_nano == total - acceptance.disputes[0].withheld_nano
