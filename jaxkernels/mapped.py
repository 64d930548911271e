"""A weight file mapped into memory: what `safetensors` and `gguf` have in common.

What it hands out are read-only views of the mapping, which must not outlive it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from .errors import ModelRefused

Row = TypeVar("Row")


class MappedTensors(Generic[Row]):
    """Named tensors; `_rows` says where each lies, as its format has it."""

    def __init__(self, path: Path, least_bytes: int, format_name: str) -> None:
        with path.open("rb") as file:
            self._size = path.stat().st_size
            if self._size < least_bytes:
                raise ModelRefused(f"{path.name} is too short to be a {format_name} file.")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows: dict[str, Row] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still alive; the mapping goes with it

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def names(self) -> list[str]:
        return list(self._rows)

    def _row(self, name: str) -> Row:
        if name not in self._rows:
            raise ModelRefused(f"The weight file has no tensor {name!r}.")
        return self._rows[name]
