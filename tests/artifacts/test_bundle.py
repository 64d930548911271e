"""Bundles: what is written is read back, and nothing else is read. No jax."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from meshnode.artifact.bundle import (
    BUNDLE_BYTES_MAX,
    Exported,
    Terms,
    is_bundle,
    make_manifest,
    read_bundle,
    write_bundle,
)
from meshnode.errors import ArtifactRefused, MeshError, RemoteProtocolError, VerificationFailed
from meshnode.protocol.codec import encode
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.objects import T_MANIFEST, ArgRole, Manifest, Numerics, Steps
from meshnode.protocol.papers import T_POLICY
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import seal
from meshnode.protocol.types import ArraySpec, NetworkId

KEY = KeySigner(b"k" * 32)
CONTENT = b"\x18\0\0\0" + bytes(range(256))  # what it is, is the validator's to say
F32 = ArraySpec("float32", (4, 8))
EXPORTED = Exported((F32, F32), (F32,), False, "0.10.2", 10, ("cpu", "cuda", "tpu"))
TERMS = Terms("pkg.mod:fn", (ArgRole.MAPPED, ArgRole.CONSTANT))
NETWORK = NetworkId(b"network!")


def manifest(**changes: object) -> Manifest:
    made = make_manifest(CONTENT, EXPORTED, TERMS, NETWORK, KEY.account, 1_800_000_000_000)
    return replace(made, **changes) if changes else made  # type: ignore[arg-type]


def test_what_is_written_is_read_back() -> None:
    for maker in (KEY.account, KEY.peer):
        wire = write_bundle(manifest(maker=maker), CONTENT, KEY)
        bundle = read_bundle(wire)
        assert is_bundle(wire) and bundle.content == CONTENT
        assert bundle.manifest == manifest(maker=maker)
        assert bundle.manifest.artifact == hashlib.sha256(CONTENT).digest()
        assert (bundle.manifest.tolerance_nano, bundle.manifest.result_bytes_max) == (10_000, 128)


def test_any_flipped_bit_is_found() -> None:
    wire = write_bundle(manifest(), CONTENT, KEY)
    for at in range(len(wire)):
        hurt = bytearray(wire)
        hurt[at] ^= 1 << at % 8
        with pytest.raises(MeshError):
            read_bundle(bytes(hurt))


def test_another_artifact_under_a_good_manifest_is_refused() -> None:
    for content in (CONTENT + b"x", CONTENT[:-1] + b"x", b""):
        with pytest.raises(ArtifactRefused) as refused:
            read_bundle(write_bundle(manifest(), content, KEY))
        assert refused.value.reason is Reason.ARTIFACT_MANIFEST


def test_a_manifest_that_another_signed_is_refused() -> None:
    other = KeySigner(b"o" * 32)
    sealed = seal(manifest(), T_MANIFEST, other.account, other.sign)
    with pytest.raises(RemoteProtocolError, match="another than its maker"):
        read_bundle(encode([sealed.wire, CONTENT]))
    forged = seal(manifest(), T_MANIFEST, KEY.account, other.sign)
    with pytest.raises(VerificationFailed):
        read_bundle(encode([forged.wire, CONTENT]))


def test_another_object_in_the_manifests_place_is_refused() -> None:
    sealed = seal(manifest(), T_POLICY, KEY.account, KEY.sign)
    with pytest.raises(RemoteProtocolError, match="mesh-policy/1 where"):
        read_bundle(encode([sealed.wire, CONTENT]))


@pytest.mark.parametrize(
    "wire",
    [b"", b"\x80", encode([b""]), encode([b"", b"", b""]), encode(["a", b""]), CONTENT],
    ids=["nothing", "empty array", "one", "three", "text", "bare artifact"],
)
def test_other_forms_are_refused(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_bundle(wire)


def test_a_bundle_over_its_bound_is_not_decoded() -> None:
    with pytest.raises(RemoteProtocolError, match="bytes of CBOR"):
        read_bundle(bytes(BUNDLE_BYTES_MAX + 1))


def test_a_stepped_manifest_has_its_state_and_not_its_steps_as_arguments() -> None:
    n = ArraySpec("int32", ())
    exported = replace(EXPORTED, args=(F32, F32, F32, n), outs=(F32, F32))
    roles = (ArgRole.CONSTANT, ArgRole.STATE, ArgRole.STATE)
    terms = replace(TERMS, roles=roles, steps=Steps((1,), (0,), 100, 10), numerics=Numerics.EXACT)
    made = make_manifest(CONTENT, exported, terms, NETWORK, KEY.account, 0)
    assert [arg.role for arg in made.args] == list(roles)
    assert (made.tolerance_nano, made.result_bytes_max) == (0, 128)
    for broken, text in (
        (replace(exported, args=(F32, F32, F32)), "steps last"),
        (replace(exported, outs=(F32,)), "returns its state"),
        (replace(exported, args=(F32, F32, n)), "3 argument specs for 2"),
    ):
        with pytest.raises(ArtifactRefused, match=text) as refused:
            make_manifest(CONTENT, broken, terms, NETWORK, KEY.account, 0)
        assert refused.value.reason is Reason.ARTIFACT_MANIFEST
