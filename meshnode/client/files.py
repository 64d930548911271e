"""The files in which large arrays go between a program and its node, in the home's `tmp`.

Used by both `Mesh`es; blocking, so the trio twin calls it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from meshnode.errors import LocalResource

from .orders import Array


def write_input(home: Path, content: memoryview) -> Path:
    """A new file for the node to read; whoever asked for it removes it. LocalResource if full."""
    folder = home / "tmp"
    path: Path | None = None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # A name of its own: connections of one process count their requests each for itself.
        number, name = tempfile.mkstemp(prefix=f"in-{os.getpid()}-", dir=folder)
        path = Path(name)
        with open(number, "wb") as file:
            file.write(content)
    except OSError as error:
        if path is not None:
            remove(path)
        raise LocalResource(f"cannot write into {folder}: {error.strerror}") from None
    return path


def read_outputs(answer: dict[str, Any]) -> bytes | Array:
    """The packed outputs of an answer: inline, or the content of a file that becomes ours."""
    path = answer.get("path")
    if path is None:
        outputs: bytes = answer["outputs"]
        return outputs
    try:
        return np.fromfile(path, dtype=np.uint8)
    finally:
        remove(Path(path))


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
