"""Envelope, keys and frames: what the vectors do not say."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from meshnode.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from meshnode.protocol import fields, messages, objects
from meshnode.protocol.codec import decode, encode
from meshnode.protocol.identity import KeySigner, peer_of_text, peer_text, public_key, short, verify
from meshnode.protocol.merkle import root
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rule import Remark, Tstr
from meshnode.protocol.sealed import seal, unseal
from meshnode.protocol.types import (
    FRAME_BYTES_MAX,
    PART_BYTES_MAX,
    SEALED_BYTES_MAX,
    TEXT_BYTES_MAX,
    Account,
    Digest,
    LeaseId,
    Peer,
    TaskId,
)

from .samples import sample

KEY = KeySigner(bytes(range(32)))


def test_rfc_8032_vector() -> None:
    """Section 7.1, test 2: the signature of the byte 72."""
    signer = KeySigner(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    assert signer.account.hex() == (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    )
    assert signer.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_rfc_9162_roots() -> None:
    """The eight leaves of certificate-transparency's own test data, and their roots."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    leaves.append("606162636465666768696a6b6c6d6e6f")
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    for count, expected in roots.items():
        assert root([bytes.fromhex(leaf) for leaf in leaves[:count]]).hex() == expected


def test_the_peer_id_of_libp2ps_specification() -> None:
    """The Ed25519 key of libp2p/specs peer-ids.md; its text as py-libp2p 0.8.1 prints it."""
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    peer = Peer(bytes.fromhex("002408011220") + public)
    text = peer_text(peer)
    assert text == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    assert peer_of_text(text) == peer
    assert public_key(peer) == public


@pytest.mark.parametrize(
    "text",
    ["", "0", "1", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "l" * 52, "é", "2" * 65],
)
def test_what_is_no_ed25519_peer_id(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        peer_of_text(text)


def test_short_names() -> None:
    assert short(KEY.peer) == peer_text(KEY.peer)[-8:]
    assert short(Account(bytes(32))) == "00000000"


def test_accounts_and_peers_sign_alike_but_are_two_names() -> None:
    assert verify(KEY.peer, b"x", KEY.sign(b"x")) and verify(KEY.account, b"x", KEY.sign(b"x"))
    token = sample(objects.Token, random.Random(0), full=True)
    by_peer = seal(token, objects.T_TOKEN, KEY.peer, KEY.sign)
    by_account = seal(token, objects.T_TOKEN, KEY.account, KEY.sign)
    assert by_peer.digest == by_account.digest  # the payload names the object
    assert by_peer.wire != by_account.wire
    assert unseal(by_account.wire).kid == KEY.account


def test_a_small_order_key_verifies_nothing() -> None:
    """The identity point as key: 'signature' R = identity, s = 0 holds for any message in
    libraries that do not look."""
    identity = b"\1" + bytes(31)
    assert not verify(identity, b"any", identity + bytes(32))


def test_a_typ_is_a_domain() -> None:
    lease = sample(objects.Lease, random.Random(0), full=True)
    sealed = seal(lease, objects.T_LEASE, KEY.peer, KEY.sign)
    with pytest.raises(RemoteProtocolError):
        unseal(sealed.wire).open(objects.Lease, objects.T_OFFER)
    relabelled = sealed.wire.replace(b"mesh-lease/1", b"mesh-leasf/1")
    with pytest.raises(VerificationFailed):
        unseal(relabelled)


def test_an_envelope_ends_at_64_kib() -> None:
    head = encode({1: -19, 4: KEY.peer, 16: objects.T_TOKEN})

    def envelope(payload: bytes) -> bytes:
        signature = KEY.sign(encode(["Signature1", head, b"", payload]))
        return b"\xd2" + encode([head, {}, payload, signature])

    room = SEALED_BYTES_MAX - len(envelope(bytes(60_000))) + 60_000
    whole = envelope(bytes(room))
    assert len(whole) == SEALED_BYTES_MAX and unseal(whole).payload == bytes(room)
    with pytest.raises(RemoteProtocolError):
        unseal(envelope(bytes(room + 1)))


def test_what_is_too_large_is_our_own_fault() -> None:
    spans = tuple(fields.Span(1 << 31, 1 << 31) for _ in range(64))
    dispute = objects.Dispute(1 << 60, Reason.MISMATCH, 1 << 60, spans)
    fat = replace(
        sample(objects.Acceptance, random.Random(0), full=True), disputes=(dispute,) * 200
    )
    with pytest.raises(LocalProtocolError):
        seal(fat, objects.T_ACCEPT, KEY.peer, KEY.sign)
    part = messages.Part(LeaseId(bytes(16)), 0, (bytes(PART_BYTES_MAX),) * 2)
    with pytest.raises(LocalProtocolError):
        messages.pack(part)
    assert len(messages.pack(messages.Part(LeaseId(bytes(16)), 0, (bytes(PART_BYTES_MAX),)))) < (
        FRAME_BYTES_MAX
    )


def test_text_is_counted_in_bytes_and_ours_is_cut_at_a_character() -> None:
    assert Tstr(4).load("éé") == "éé"
    with pytest.raises(RemoteProtocolError):
        Tstr(3).load("éé")
    with pytest.raises(RemoteProtocolError):
        Tstr(3, size=3).load("€€€")
    assert Remark(3).dump("éé") == "é"
    refuse = messages.Refuse(TaskId(bytes(16)), 0, Reason.BUSY, "電" * 600 + "\ud800")
    read = messages.unpack(messages.pack(refuse))
    assert read.text == "電" * (TEXT_BYTES_MAX // 3)
    decline = messages.Decline(Digest(bytes(32)), Reason.PRICE, "\ud800")
    assert messages.unpack(messages.pack(decline)).text == "?"


def test_shared_references_cannot_unfold() -> None:
    """Some 200 bytes that cbor2's own decoders for tags 28 and 29 make into 8^8 items: ten seconds
    here, and eight times that with every level more."""
    levels, width = 8, 8
    items = [bytes.fromhex("d81c8101")]
    items += [
        bytes.fromhex("d81c") + bytes([0x80 | width]) + bytes([0xD8, 0x1D, level]) * width
        for level in range(levels)
    ]
    wire = bytes([0x80 | len(items)]) + b"".join(items)
    started = time.perf_counter()
    with pytest.raises(RemoteProtocolError):
        decode(wire)
    assert time.perf_counter() - started < 1


def test_depth_is_bounded_alike_for_arrays_and_maps() -> None:
    deepest = bytes.fromhex("81" * 16 + "00")
    assert encode(decode(deepest)) == deepest
    for head in ("81", "a100"):
        with pytest.raises(RemoteProtocolError):
            decode(bytes.fromhex(head * 17 + "00"))


def test_a_reason_is_a_number_with_a_sentence() -> None:
    assert decode(encode(int(Reason.BUSY))) == 32
    assert len({reason.text for reason in Reason}) == len(Reason)
    assert all(reason.text and "\n" not in reason.text for reason in Reason)
