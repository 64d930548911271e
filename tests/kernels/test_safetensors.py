"""The weight file's reader: what is written comes back, and no header makes it look outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxkernels.errors import ModelRefused
from jaxkernels.safetensors import HEADER_BYTES_MAX, SafeTensors

CODES = {"float32": "F32", "int64": "I64", "uint8": "U8"}


def pack(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def pack_arrays(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in arrays.items():
        end = len(body) + array.nbytes
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(body), end],
        }
        body += array.tobytes()
    return pack(header, body)


GOOD: dict[str, np.ndarray[Any, Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.arange(4, dtype=np.int64),
    "empty": np.zeros((0, 7), np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
}


def test_reads_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(pack_arrays(GOOD))
    with SafeTensors(tmp_path / "w") as tensors:
        assert tensors.names() == list(GOOD)
        for name, array in GOOD.items():
            assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
            assert tensors[name].tobytes() == array.tobytes()
        with pytest.raises(ModelRefused):
            tensors["absent"]


def row(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b" " * (HEADER_BYTES_MAX + 1),
        (9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        pack([]),
        pack({"a": 1}, bytes(8)),
        pack(row(dtype="F8"), bytes(8)),
        pack(row(dtype=["F32"]), bytes(8)),
        pack(row(shape=[3]), bytes(8)),
        pack(row(shape=[-1, -2]), bytes(8)),
        pack(row(shape=[2.0]), bytes(8)),
        pack(row(shape=[True, 2]), bytes(8)),
        pack(row(shape=[1 << 62, 4]), bytes(8)),
        pack(row(shape=[1] * 40 + [2]), bytes(8)),
        pack(row(shape=2), bytes(8)),
        pack(row(data_offsets=[0, 9]), bytes(9)),
        pack(row(data_offsets=[4, 12]), bytes(8)),
        pack(row(data_offsets=[-8, 0]), bytes(8)),
        pack(row(data_offsets=[8, 0]), bytes(8)),
        pack(row(data_offsets=[0]), bytes(8)),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelRefused):
        SafeTensors(tmp_path / "w")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_damaged_files_are_refused_or_stay_inside(
    tmp_path: Path, position: int, value: int, cut: int
) -> None:
    content = bytearray(pack_arrays(GOOD))
    content[position % len(content)] = value
    (tmp_path / "w").write_bytes(content[: len(content) - cut % 40])
    try:
        with SafeTensors(tmp_path / "w") as tensors:
            for name in tensors.names():
                assert tensors[name].nbytes <= len(content)
    except ModelRefused:
        pass
