"""What holds for any object, any bytes and any tree, not only for the vectors."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshnode.errors import RemoteProtocolError, VerificationFailed
from meshnode.protocol import merkle, messages
from meshnode.protocol.codec import decode, encode
from meshnode.protocol.identity import KeySigner, peer_of_text, peer_text, verify
from meshnode.protocol.rule import decode_map, encode_map
from meshnode.protocol.sealed import seal, unseal

from ..unit.protocol.samples import SIGNED
from .kinds import rule

SIGNED_ANY = st.sampled_from(sorted(SIGNED)).flatmap(
    lambda typ: st.tuples(st.just(typ), rule(SIGNED[typ][0]))
)
FRAME_ANY = st.sampled_from(sorted(messages.NUMBERS)).flatmap(lambda n: rule(messages.NUMBERS[n]))
SEEDS = st.binary(min_size=32, max_size=32)
PROFILE = st.recursive(
    st.none()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.integers(0, (1 << 63) - 1), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(PROFILE)
def test_what_is_inside_the_profile_goes_out_and_in(value: Any) -> None:
    wire = encode(value)
    assert decode(wire) == value
    assert encode(decode(wire)) == wire


@given(st.binary(max_size=200))
def test_any_bytes_are_one_encoding_or_refused(wire: bytes) -> None:
    try:
        value = decode(wire)
    except RemoteProtocolError:
        return
    assert encode(value) == wire


@given(PROFILE, st.data())
def test_changed_bytes_never_decode_to_the_same_value(value: Any, data: st.DataObject) -> None:
    wire = encode(value)
    at = data.draw(st.integers(0, len(wire) - 1))
    other = wire[:at] + bytes([wire[at] ^ data.draw(st.integers(1, 255))]) + wire[at + 1 :]
    try:
        assert decode(other) != value
    except RemoteProtocolError:
        pass


@given(SIGNED_ANY, SEEDS)
def test_any_signed_object_goes_out_and_in(pair: tuple[str, Any], seed: bytes) -> None:
    typ, obj = pair
    signer = KeySigner(seed)
    sealed = seal(obj, typ, signer.peer, signer.sign)
    again = unseal(sealed.wire)
    assert again == sealed
    assert again.open(SIGNED[typ][0], typ) == obj


@given(SIGNED_ANY, st.data())
def test_a_sealed_object_with_a_changed_byte_never_verifies(
    pair: tuple[str, Any], data: st.DataObject
) -> None:
    typ, obj = pair
    signer = KeySigner(bytes(32))
    wire = seal(obj, typ, signer.peer, signer.sign).wire
    at = data.draw(st.integers(0, len(wire) - 1))
    flip = data.draw(st.integers(1, 255))
    with pytest.raises((RemoteProtocolError, VerificationFailed)):
        unseal(wire[:at] + bytes([wire[at] ^ flip]) + wire[at + 1 :])


@given(SIGNED_ANY, st.integers(0, 10**6))
def test_a_signed_object_with_an_unknown_key_is_refused(pair: tuple[str, Any], key: int) -> None:
    typ, obj = pair
    fields = encode_map(obj)
    assume(key > 32)
    with pytest.raises(RemoteProtocolError):
        decode_map(SIGNED[typ][0], {**fields, key: None}, closed=True)


@given(FRAME_ANY, st.integers(32, 10**6), PROFILE)
def test_any_frame_goes_out_and_in_whatever_a_newer_peer_adds(
    message: Any, key: int, extra: Any
) -> None:
    frame = messages.pack(message)
    assert messages.unpack(frame) == message
    fields = decode(frame)
    assert isinstance(fields, dict)
    assert messages.unpack(encode({**fields, key: extra})) == message


@given(
    st.sampled_from([*messages.NUMBERS.values(), *(r for r, _ in SIGNED.values())]),
    st.dictionaries(st.integers(0, 24), PROFILE, max_size=24),
)
def test_any_map_is_an_object_or_refused(rule_class: type, fields: dict[int, Any]) -> None:
    try:
        obj: Any = decode_map(rule_class, fields, closed=True)
    except RemoteProtocolError:
        return
    assert encode_map(obj) == fields


@given(FRAME_ANY, st.data())
def test_a_frame_with_changed_bytes_is_a_frame_or_refused(
    message: Any, data: st.DataObject
) -> None:
    frame = bytearray(messages.pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = messages.unpack(bytes(frame))
    except RemoteProtocolError:
        return
    if read is not None:  # else of a number that only a later version knows
        messages.pack(read)


@given(st.binary(max_size=300))
def test_any_bytes_as_frame_or_envelope_raise_only_what_they_may(wire: bytes) -> None:
    for envelope in (wire, b"\xd2" + wire):
        with pytest.raises((RemoteProtocolError, VerificationFailed)):
            unseal(envelope)
    try:
        messages.unpack(wire)
    except RemoteProtocolError:
        pass


@given(SEEDS, st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=70))
def test_signatures_hold_for_what_was_signed_alone(
    seed: bytes, message: bytes, other: bytes, noise: bytes
) -> None:
    signer = KeySigner(seed)
    signature = signer.sign(message)
    assert verify(signer.peer, message, signature)
    assert verify(signer.peer, other, signature) == (other == message)
    assert not verify(signer.peer, message, noise) or noise == signature


@given(SEEDS)
def test_peer_ids_go_to_text_and_back(seed: bytes) -> None:
    peer = KeySigner(seed).peer
    text = peer_text(peer)
    assert text.startswith("12D3KooW") and peer_of_text(text) == peer


@given(st.text(max_size=70))
def test_any_text_is_a_peer_id_or_refused(text: str) -> None:
    try:
        peer = peer_of_text(text)
    except RemoteProtocolError:
        return
    assert peer_text(peer) == text


LEAVES = st.lists(st.binary(max_size=40), max_size=40)


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1 word for word: the split at the largest power of two."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    left, right = recursive_root(leaves[:split]), recursive_root(leaves[split:])
    return hashlib.sha256(b"\1" + left + right).digest()


@given(LEAVES)
def test_the_root_is_the_rfcs(leaves: list[bytes]) -> None:
    assert merkle.root(leaves) == recursive_root(leaves)


@given(LEAVES.filter(bool), st.data())
def test_a_proof_holds_for_its_leaf_at_its_place_alone(
    leaves: list[bytes], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    tree, size = merkle.root(leaves), len(leaves)
    path = merkle.proof(leaves, index)
    assert merkle.included(leaves[index], index, size, path, tree)
    other = data.draw(st.binary(max_size=40))
    assert merkle.included(other, index, size, path, tree) == (other == leaves[index])
    place = data.draw(st.integers(0, size + 2))
    if place != index:
        held = merkle.included(leaves[index], place, size, path, tree)
        assert not held or leaves[place] == leaves[index]
    if path:
        assert not merkle.included(leaves[index], index, size, path[:-1], tree)
    assert not merkle.included(leaves[index], index, size, [*path, tree], tree)


@given(LEAVES.filter(bool))
def test_a_node_never_passes_as_a_leaf(leaves: list[bytes]) -> None:
    tree = merkle.root(leaves)
    assert tree != merkle.root([tree])
    if len(leaves) > 1:
        split = 1 << (len(leaves) - 1).bit_length() - 1
        inner = merkle.root(leaves[:split]) + merkle.root(leaves[split:])
        assert tree != merkle.root([inner])
