"""Reads a GGUF file: metadata, a table of tensors, then their blocks, all little-endian.

Flow: `models` opens a downloaded weight file with it, a kernel's `weights` takes blocks by name.
Format: ggml's docs/gguf.md; block layouts: ggml's ggml-common.h. The header comes from a file that
others made: every count is bounded, and no tensor is handed out that does not lie inside the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from .errors import ModelRefused
from .mapped import MappedTensors

Value: TypeAlias = int | float | bool | str | list[Any]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)  # alike in what is read here; 1 had 32-bit counts
KEYS_MAX: Final = 4096
TENSORS_MAX: Final = 10_000
RANK_MAX: Final = 4  # GGML_MAX_DIMS
KEY_BYTES_MAX: Final = 1024
TEXT_BYTES_MAX: Final = 1 << 20  # the longest honest one is a chat template
ARRAY_MAX: Final = 1 << 20  # a vocabulary
ALIGNMENT_DEFAULT: Final = 32
ALIGNMENT_MAX: Final = 1 << 16

# gguf_metadata_value_type -> struct's letter; 8 is a string, 9 an array.
SCALARS: Final = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}
TEXT, ARRAY = 8, 9

BLOCK: Final = 32  # weights in a block of Q4_1 and Q8_0
# ggml_type -> its name, how many weights share one item, and that item.
KINDS: Final[dict[int, tuple[str, int, np.dtype[Any]]]] = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    # weight i of a block: d * (low half of qs[i]) + m; weight i + 16: the high half
    3: ("Q4_1", BLOCK, np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", BLOCK // 2)])),
    # weight i: d * qs[i]
    8: ("Q8_0", BLOCK, np.dtype([("d", "<f2"), ("qs", "i1", BLOCK)])),
}


class Gguf(MappedTensors[tuple[int, tuple[int, ...], int]]):
    """A mapped file of named tensors; what it hands out are read-only views, not to outlive it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, len(MAGIC), "GGUF")
        self.metadata: dict[str, Value] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, _Unsound) as error:
            self._map.close()
            raise ModelRefused(f"{path.name} is not a sound GGUF file: {error}.") from error
        except BaseException:
            self._map.close()
            raise

    def kind(self, name: str) -> str:
        """F32, F16, Q4_1 or Q8_0."""
        return KINDS[self._row(name)[0]][0]

    def blocks(self, name: str, kind: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor as [..., items of a row], which must be of this kind.

        Dimensions are in C order (GGUF's table has the innermost first). An item is a number of F32
        and F16, and a block of Q4_1 (fields d, m, qs) and Q8_0 (d, qs).
        """
        code, shape, offset = self._row(name)
        label, shared, dtype = KINDS[code]
        if label != kind:
            raise ModelRefused(f"Tensor {name!r} of the weight file is {label}, not {kind}.")
        items = (*shape[:-1], shape[-1] // shared)
        return np.frombuffer(self._map, dtype, math.prod(items), offset).reshape(items)

    def dequantised(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor's weights as float32, computed as ggml's dequantize_row_* do."""
        kind = self.kind(name)
        items = self.blocks(name, kind)
        if kind in ("F32", "F16"):
            return items.astype(np.float32)
        scale, quants = items["d"].astype(np.float32)[..., None], items["qs"]
        if kind == "Q4_1":
            quants = np.concatenate([quants & 15, quants >> 4], axis=-1)
        weights: np.ndarray[Any, np.dtype[np.float32]] = scale * quants.astype(np.float32)
        if kind == "Q4_1":
            weights += items["m"].astype(np.float32)[..., None]
        return weights.reshape(self._row(name)[1])

    def _parse(self) -> None:
        reader = _Reader(self._map)
        if self._map[: len(MAGIC)] != MAGIC:
            raise _Unsound("it does not begin with GGUF")
        reader.offset = len(MAGIC)
        version = reader.number("I")
        if version not in VERSIONS:
            raise _Unsound(f"version {version}")
        tensors = reader.count("Q", TENSORS_MAX, "tensors")
        keys = reader.count("Q", KEYS_MAX, "keys")
        for _ in range(keys):
            key = reader.text(KEY_BYTES_MAX)
            if key in self.metadata:
                raise _Unsound(f"key {key!r} twice")
            self.metadata[key] = reader.value()
        found = [reader.tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT_DEFAULT)
        if type(alignment) is not int or not 1 <= alignment <= ALIGNMENT_MAX:
            raise _Unsound(f"alignment {alignment!r}")
        start = -(-reader.offset // alignment) * alignment
        for name, code, shape, offset in found:
            _, shared, dtype = KINDS[code]
            size = dtype.itemsize * (math.prod(shape) // shared)
            if name in self._rows:
                raise _Unsound(f"tensor {name!r} twice")
            if shape[-1] % shared or offset % alignment or start + offset + size > len(self._map):
                raise _Unsound(f"tensor {name!r} does not lie inside the file")
            self._rows[name] = (code, shape, start + offset)


class _Unsound(Exception):
    """What is wrong with the file, for the one line that the user reads."""


class _Reader:
    """Takes numbers and texts from a mapped file; `struct.error` past its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.offset = 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.offset)
        self.offset += struct.calcsize(f"<{letter}")
        return value

    def count(self, letter: str, most: int, of: str) -> int:
        value = int(self.number(letter))
        if value > most:
            raise _Unsound(f"{value} {of}")
        return value

    def text(self, most: int) -> str:
        size = self.count("Q", most, "bytes of text")
        end = self.offset + size
        if end > len(self.content):
            raise _Unsound("a text ends outside the file")
        text = self.content[self.offset : end].decode("utf-8")
        self.offset = end
        return text

    def value(self) -> Value:
        kind = self.number("I")
        if kind != ARRAY:
            return self._one(kind)()
        one = self._one(self.number("I"))
        return [one() for _ in range(self.count("Q", ARRAY_MAX, "values in an array"))]

    def _one(self, kind: int) -> Callable[[], Value]:
        if kind == TEXT:
            return lambda: self.text(TEXT_BYTES_MAX)
        if kind not in SCALARS:  # an array in an array too: nobody writes one
            raise _Unsound(f"a value of type {kind}")
        return lambda: self.number(SCALARS[kind])

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.text(KEY_BYTES_MAX)
        rank = self.count("I", RANK_MAX, "dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(rank))[::-1]
        code, offset = int(self.number("I")), int(self.number("Q"))
        if code not in KINDS:
            raise _Unsound(f"tensor {name!r} is of ggml type {code}, which is not read here")
        if not shape or not all(shape):
            raise _Unsound(f"tensor {name!r} is empty")
        return name, code, shape, offset
