"""Reads a safetensors file: eight bytes of header length, a JSON header, then raw tensors.

Flow: `models` opens a downloaded weight file with it, a kernel's `weights` picks tensors by name.
Format: https://huggingface.co/docs/safetensors. Everything is checked against the file's length
before a tensor is handed out, because the header comes from a file that others made.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelRefused
from .mapped import MappedTensors

HEADER_BYTES_MAX = 1 << 20
TENSORS_MAX = 10_000
RANK_MAX = 8
DTYPES = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1", "BOOL": "|b1"}


class SafeTensors(MappedTensors[tuple[np.dtype[Any], tuple[int, ...], int]]):
    """A mapped file of named tensors; tensors are read-only views and must not outlive it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 8, "safetensors")
        try:
            self._rows = _parse_header(self._map, self._size, path.name)
        except BaseException:
            self._map.close()
            raise

    def __getitem__(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        dtype, shape, offset = self._row(name)
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)


def _parse_header(
    content: mmap.mmap, size: int, label: str
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
    header_bytes = int.from_bytes(content[:8], "little")
    if not 2 <= header_bytes <= min(HEADER_BYTES_MAX, size - 8):
        raise ModelRefused(f"{label}: a header of {header_bytes} bytes does not fit.")
    try:
        header = json.loads(content[8 : 8 + header_bytes])
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{label}: the header is not JSON.") from error
    if not isinstance(header, dict) or len(header) > TENSORS_MAX:
        raise ModelRefused(f"{label}: the header is not a table of at most {TENSORS_MAX} tensors.")
    header.pop("__metadata__", None)
    start, rows = 8 + header_bytes, {}
    for name, row in header.items():
        try:
            code, shape, (first, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
            dtype = np.dtype(DTYPES[code])
            sound = (
                len(shape) <= RANK_MAX
                and all(type(n) is int and n >= 0 for n in (*shape, first, end))
                and first <= end <= size - start
                and end - first == dtype.itemsize * math.prod(shape)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelRefused(
                f"{label}: tensor {name!r} is not described as it must be."
            ) from error
        if not sound:
            raise ModelRefused(f"{label}: tensor {name!r} does not lie inside the file.")
        rows[name] = (dtype, shape, start + first)
    return rows
