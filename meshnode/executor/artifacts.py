"""Which artifacts this node runs: those of the release by SHA-256, and strangers' by their blob.

Asked by `supervisor` before anything is spawned. The worker's path is the same for both; only the
release's may call into LAPACK and the like, which is unsafe on shapes that nobody has checked.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol

from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ARTIFACT_BYTES_MAX, ArraySpec, BlobRef, Digest, Stepped

from .admission import Refused
from .bounds import BlobFiles
from .wire import LoadArg

FOREIGN_BYTES_KEPT_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """`jax.export` bytes, and what is known of them without running them."""

    exported: bytes
    flop_per_unit: int = 0  # of a step, if stepped; 0: unknown, the validator counts it
    args: tuple[LoadArg, ...] | None = None  # None: only the worker can tell
    outs: tuple[ArraySpec, ...] | None = None
    stepped: Stepped | None = None  # as the release has it; says nothing if `args` is None
    builtin: bool = False  # of the release


class ArtifactSource(Protocol):
    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        """KeyError if this node does not run it; Refused if `code` is not here or not it."""
        ...


class BuiltinArtifacts:
    """The kernels of jaxkernels, by the digest list of the release."""

    def __init__(self) -> None:
        # Per object and not per module, so that a test may lay out another list.
        self._cached = cache(self._read)

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        return self._cached(digest)

    @staticmethod
    def _read(digest: Digest) -> Artifact:
        from jaxkernels import registry  # imports no jax

        info = registry.by_digest(digest)
        if info is None:
            raise KeyError(digest)
        args = (LoadArg(arg.mapped, ArraySpec(arg.dtype, arg.shape)) for arg in info.args)
        steps = info.stepped
        return Artifact(
            registry.artifact_bytes(info.spec),
            info.flops_per_unit // (steps.steps_default if steps else 1),
            tuple(args),
            tuple(ArraySpec(out.dtype, out.shape) for out in info.outs),
            Stepped(steps.result, steps.watch) if steps else None,
            builtin=True,
        )


class NodeArtifacts:
    """The release's kernels, and whatever a job brings along as a blob."""

    def __init__(self, blobs: BlobFiles) -> None:
        self._builtin = BuiltinArtifacts()
        self._blobs = blobs
        self._foreign: OrderedDict[Digest, Artifact] = OrderedDict()
        self._foreign_bytes = 0

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        try:
            return self._builtin.artifact(digest)
        except KeyError:
            if code is None:
                raise
        known = self._foreign.get(digest)
        if known is None:
            known = Artifact(self._read(digest, code))
            self._keep(digest, known)
        self._foreign.move_to_end(digest)
        return known

    def _read(self, digest: Digest, code: BlobRef) -> bytes:
        """The blob's bytes, if they are the artifact: receipts cite its digest, not the blob's."""
        if code.size > ARTIFACT_BYTES_MAX:
            raise Refused(Reason.TOO_LARGE, f"an artifact of {code.size} bytes")
        try:
            fd = self._blobs.open_blob(code.blob_id, 0, code.size)
        except (KeyError, OSError) as error:
            raise Refused(Reason.BLOB_MISSING, "the artifact's blob is not here") from error
        with os.fdopen(fd, "rb") as file:
            exported = file.read(code.size)
        if hashlib.sha256(exported).digest() != digest:
            raise Refused(Reason.KERNEL_SPEC, "the code does not hash to the artifact's digest")
        return exported

    def _keep(self, digest: Digest, artifact: Artifact) -> None:
        self._foreign[digest] = artifact
        self._foreign_bytes += len(artifact.exported)
        while self._foreign_bytes > FOREIGN_BYTES_KEPT_MAX and len(self._foreign) > 1:
            _, dropped = self._foreign.popitem(last=False)
            self._foreign_bytes -= len(dropped.exported)
