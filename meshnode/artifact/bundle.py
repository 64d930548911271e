"""A bundle `x.mesh`: an artifact and the signed manifest that says how to call it.

    CBOR [sealed mesh-manifest/1, export bytes]

Written by `mesh artifact build` and the client, read by whoever runs it. Bounds come before
decoding, and what is decoded is held against itself: the signature, the digest, the size. Whether
the bytes are code that may run is for the validator, in a process of its own; nothing here loads
jax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import ArtifactRefused, RemoteProtocolError
from ..protocol.codec import decode, encode
from ..protocol.identity import KeySigner
from ..protocol.objects import T_MANIFEST, ArgRole, Manifest, ManifestArg, Numerics, Steps
from ..protocol.reasons import Reason
from ..protocol.sealed import Sealed, seal, unseal
from ..protocol.types import (
    ARTIFACT_BYTES_MAX,
    SEALED_BYTES_MAX,
    STEP_COUNT,
    ArraySpec,
    Digest,
    NetworkId,
    array_bytes,
)

BUNDLE_BYTES_MAX: Final = ARTIFACT_BYTES_MAX + SEALED_BYTES_MAX + 16
SUFFIX: Final = ".mesh"
# Of the largest output, in 1e-9: what two honest cars of a class may differ by.
TOLERANCES_NANO: Final = {
    Numerics.EXACT: 0,
    Numerics.F32_HIGHEST: 10_000,
    Numerics.TF32: 3_000_000,
    Numerics.BF16: 20_000_000,
}


@dataclass(frozen=True, slots=True)
class Bundle:
    manifest: Manifest
    sealed: Sealed
    content: bytes  # the artifact: what `jax.export` wrote, stripped


@dataclass(frozen=True, slots=True)
class Exported:
    """What export tells about artifact bytes, without their code."""

    args: tuple[ArraySpec, ...]
    outs: tuple[ArraySpec, ...]
    x64: bool
    jax: str
    calling_convention: int
    platforms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a maker says of an artifact beyond its shapes. 0 sets no limit."""

    name: str
    roles: tuple[ArgRole, ...]  # of the arguments in calling order; n of a stepped one has none
    numerics: Numerics = Numerics.F32_HIGHEST
    tolerance_nano: int | None = None  # the class's own
    unit_wall_ms_max: int = 0
    memory_mb_max: int = 0
    steps: Steps | None = None


def make_manifest(
    content: bytes, exported: Exported, terms: Terms, network: NetworkId, maker: bytes, now_ms: int
) -> Manifest:
    """The manifest of an artifact; ArtifactRefused if the terms do not fit its shapes."""
    args = exported.args
    if terms.steps is not None:
        if not args or args[-1] != STEP_COUNT:
            text = "a stepped function takes its number of steps last: n, an int32[]"
            raise ArtifactRefused(Reason.ARTIFACT_MANIFEST, text)
        args = args[:-1]
    if len(args) != len(terms.roles):
        text = f"{len(terms.roles)} argument specs for {len(args)} arguments"
        raise ArtifactRefused(Reason.ARTIFACT_MANIFEST, text)
    tolerance = terms.tolerance_nano
    try:
        return Manifest(
            version=1,
            network=network,
            maker=maker,
            name_of_object="manifest",
            name=terms.name,
            artifact=Digest(hashlib.sha256(content).digest()),
            size=len(content),
            args=tuple(ManifestArg(r, a) for r, a in zip(terms.roles, args, strict=True)),
            outs=exported.outs,
            x64=int(exported.x64),
            numerics=terms.numerics,
            tolerance_nano=TOLERANCES_NANO[terms.numerics] if tolerance is None else tolerance,
            unit_wall_ms_max=terms.unit_wall_ms_max,
            memory_mb_max=terms.memory_mb_max,
            result_bytes_max=_result_bytes(exported.outs, terms.steps),
            jax=exported.jax,
            calling_convention=exported.calling_convention,
            platforms=exported.platforms,
            made_ms=now_ms,
            steps=terms.steps,
        )
    except ValueError as error:
        raise ArtifactRefused(Reason.ARTIFACT_MANIFEST, str(error)) from None


def _result_bytes(outs: Sequence[ArraySpec], steps: Steps | None) -> int:
    """Bytes that a unit sends back: of a stepped one its result, not all of its state."""
    chosen = range(len(outs)) if steps is None else steps.result
    return sum(array_bytes(outs[index]) for index in chosen if index < len(outs))


def write_bundle(manifest: Manifest, content: bytes, signer: KeySigner) -> bytes:
    """The bytes of `x.mesh`, the manifest signed by `signer`, whom it names as its maker."""
    sealed = seal(manifest, T_MANIFEST, manifest.maker, signer.sign)
    return encode([sealed.wire, content])


def is_bundle(wire: bytes) -> bool:
    """Whether bytes set out to be a bundle: an array of two whose first is a sealed object.

    Bare `jax.export` bytes begin with a flatbuffer's offset, which has a zero in its first four.
    """
    return wire[:1] == b"\x82" and wire[1:2] in (b"\x58", b"\x59")


def read_bundle(wire: bytes) -> Bundle:
    """Strictly: RemoteProtocolError for another form, VerificationFailed for a signature that does
    not hold, ArtifactRefused if manifest and artifact are not of each other."""
    value = decode(wire, bytes_max=BUNDLE_BYTES_MAX)
    if type(value) is not list or len(value) != 2 or not all(type(v) is bytes for v in value):
        raise RemoteProtocolError("a bundle is an array of a sealed manifest and an artifact")
    envelope, content = value
    assert isinstance(envelope, bytes) and isinstance(content, bytes)
    if len(content) > ARTIFACT_BYTES_MAX:
        raise RemoteProtocolError(f"an artifact of {len(content)} bytes")
    sealed = unseal(envelope)
    manifest = sealed.open(Manifest, T_MANIFEST)
    if sealed.kid != manifest.maker:
        raise RemoteProtocolError("the manifest is signed by another than its maker")
    if manifest.size != len(content) or manifest.artifact != hashlib.sha256(content).digest():
        text = "the artifact is not the one whose digest and size the manifest signs"
        raise ArtifactRefused(Reason.ARTIFACT_MANIFEST, text)
    return Bundle(manifest, sealed, content)
