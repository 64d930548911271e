"""Runs `python -m meshnode.artifact.build` for the command line and reads its answer. No jax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..errors import ArtifactRefused, LocalResource, UsageError
from ..protocol.reasons import Reason
from ..protocol.types import ARTIFACT_BYTES_MAX, ArraySpec
from .bundle import Exported

HEAD_BYTES_MAX: Final = 1 << 20


def build_in_child(
    target: str, specs: Sequence[ArraySpec], folder: Path, *, x64: bool | None
) -> tuple[Exported, bytes]:
    """The artifact of `pkg.mod:fn`, whose module is looked for in `folder` first.

    Raises UsageError for a function that cannot be imported or traced, ArtifactRefused for one that
    cars would refuse.
    """
    read_fd, write_fd = os.pipe()
    request = {
        "target": target,
        "specs": [[spec.dtype, list(spec.shape)] for spec in specs],
        "folder": str(folder),
        "x64": x64,
        "answer_fd": write_fd,
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "meshnode.artifact.build"],
            stdin=subprocess.PIPE,
            pass_fds=(write_fd,),
        )
    finally:
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as answer, child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
        head = answer.readline(HEAD_BYTES_MAX)
        content = answer.read(ARTIFACT_BYTES_MAX + 1)
    if not head.endswith(b"\n"):
        raise LocalResource(f"the process that builds artifacts ended with {child.returncode}")
    told = json.loads(head)
    if not told["ok"]:
        if told["reason"] is None:
            raise UsageError(told["text"])
        raise ArtifactRefused(Reason[told["reason"]], told["text"])
    return _exported(told), content


def _exported(told: dict[str, object]) -> Exported:
    def arrays(rows: object) -> tuple[ArraySpec, ...]:
        assert isinstance(rows, list)
        return tuple(ArraySpec(dtype, tuple(shape)) for dtype, shape in rows)

    version, convention, platforms = told["jax"], told["calling_convention"], told["platforms"]
    assert isinstance(version, str) and isinstance(convention, int) and isinstance(platforms, list)
    return Exported(
        args=arrays(told["args"]),
        outs=arrays(told["outs"]),
        x64=bool(told["x64"]),
        jax=version,
        calling_convention=convention,
        platforms=tuple(platforms),
    )
