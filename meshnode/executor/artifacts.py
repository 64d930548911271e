"""Which artifacts this node runs: for now those of the release, by SHA-256, and nothing else.

Asked by `supervisor` before anything is spawned. A source that also holds strangers' artifacts
takes the place of `BuiltinArtifacts`; the worker's path is the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from meshnode.protocol.types import ArraySpec, Digest, Stepped

from .wire import LoadArg


@dataclass(frozen=True, slots=True)
class Artifact:
    """`jax.export` bytes, and what is known of them without running them."""

    exported: bytes
    flop_per_unit: int = 0  # of a step, if stepped; 0: unknown, the compiler's count is taken
    args: tuple[LoadArg, ...] | None = None  # None: only the worker can tell
    outs: tuple[ArraySpec, ...] | None = None
    stepped: Stepped | None = None  # as the release has it; says nothing if `args` is None


class ArtifactSource(Protocol):
    def artifact(self, digest: Digest) -> Artifact:
        """KeyError if this node does not run it."""
        ...


class BuiltinArtifacts:
    """The kernels of jaxkernels, by the digest list of the release."""

    def __init__(self) -> None:
        # Per object and not per module, so that a test may lay out another list.
        self._cached = cache(self._read)

    def artifact(self, digest: Digest) -> Artifact:
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
        )
