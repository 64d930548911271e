"""Runs kernels in child processes and keeps them in bounds; the node's only way to compute.

Flow: the driver calls `Executor.admit/start/stop/probe` with the machine's effects and reads
`Executor.events`. `supervisor` decides which worker runs what, `forks` talks to the zygote,
`wire` is the format, `artifacts` knows the release's kernels. Never imports jax.

Names are resolved on use, because the worker processes import `executor.wire` and need no trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifacts import Artifact, ArtifactSource, BuiltinArtifacts, NodeArtifacts
    from .bounds import BlobFiles, ExecutorConfig
    from .supervisor import Executor, open_executor

__all__ = [
    "Artifact",
    "ArtifactSource",
    "BlobFiles",
    "BuiltinArtifacts",
    "Executor",
    "ExecutorConfig",
    "NodeArtifacts",
    "open_executor",
]

_HOMES = {
    "Artifact": "artifacts",
    "ArtifactSource": "artifacts",
    "BuiltinArtifacts": "artifacts",
    "BlobFiles": "bounds",
    "ExecutorConfig": "bounds",
    "Executor": "supervisor",
    "NodeArtifacts": "artifacts",
    "open_executor": "supervisor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
