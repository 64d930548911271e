"""GGUF: what a file says is read exactly, and a file that lies is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxkernels.errors import ModelRefused
from jaxkernels.gguf import ARRAY_MAX, KEYS_MAX, TENSORS_MAX, TEXT_BYTES_MAX, Gguf

from .gguf_file import f32, gguf_bytes, quantised, text, typed

METADATA = {
    "general.architecture": "llama",
    "a.number": 7,
    "a.share": 0.5,
    "a.switch": True,
    "a.list": ["x", "", "é"],
    "numbers": [1, 2, 3],
}


def opened(path: Path, content: bytes) -> Gguf:
    path.write_bytes(content)
    return Gguf(path)


def refused(path: Path, content: bytes, match: str) -> None:
    with pytest.raises(ModelRefused, match=match) as caught:
        opened(path, content)
    assert "\n" not in str(caught.value)


def test_metadata_and_plain_tensors_are_read_as_written(tmp_path: Path) -> None:
    half = np.arange(6, dtype="<f2").reshape(2, 3)
    tensors = {"a": f32(1, 2, 3), "b": ("F16", half.shape, half.tobytes())}
    with opened(tmp_path / "a.gguf", gguf_bytes(METADATA, tensors)) as file:
        assert file.metadata == METADATA
        assert file.names() == ["a", "b"] and "a" in file and "c" not in file
        assert file.blocks("a", "F32").tolist() == [1, 2, 3]
        assert np.array_equal(file.blocks("b", "F16"), half)
        assert file.dequantised("b").dtype == np.float32
        with pytest.raises(ModelRefused, match="no tensor 'c'"):
            file.blocks("c", "F32")
        with pytest.raises(ModelRefused, match="'a' of the weight file is F32, not Q8_0"):
            file.blocks("a", "Q8_0")


def test_blocks_follow_ggmls_layout(tmp_path: Path) -> None:
    # One block of each, written by hand: 20 bytes of Q4_1, 34 of Q8_0.
    q4 = struct.pack("<ee16B", 0.5, -1.0, *((15 - i) << 4 | i for i in range(16)))
    q8 = struct.pack("<e32b", 0.25, *range(-16, 16))
    tensors = {"q4": ("Q4_1", (1, 32), q4), "q8": ("Q8_0", (1, 32), q8)}
    with opened(tmp_path / "a.gguf", gguf_bytes({}, tensors)) as file:
        low, high = np.arange(16) * 0.5 - 1, (15 - np.arange(16)) * 0.5 - 1
        assert file.dequantised("q4").tolist() == [[*low, *high]]
        assert file.dequantised("q8").tolist() == [[i * 0.25 for i in range(-16, 16)]]


def test_rows_of_several_blocks_keep_their_order(tmp_path: Path) -> None:
    content = quantised(np.random.default_rng(0), "Q8_0", (3, 64))
    with opened(tmp_path / "a", gguf_bytes({}, {"w": ("Q8_0", (3, 64), content)})) as file:
        items, weights = file.blocks("w", "Q8_0"), file.dequantised("w")
        assert (items.shape, weights.shape) == ((3, 2), (3, 64))
        assert weights[2, 40] == np.float32(items["d"][2, 1]) * items["qs"][2, 1, 8]


def test_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    tensors = {"a": f32(1, 2, 3), "b": f32(4)}
    content = gguf_bytes({"general.alignment": 64}, tensors, alignment=64)
    with opened(tmp_path / "a", content) as file:
        assert file.blocks("b", "F32").tolist() == [4]
    refused(tmp_path / "a", gguf_bytes({"general.alignment": 0}, tensors), "alignment 0")
    refused(tmp_path / "a", gguf_bytes({"general.alignment": True}, tensors), "alignment True")


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def one_key(code: int, content: bytes) -> bytes:
    return header(keys=1) + text("k") + struct.pack("<I", code) + content


def one_tensor(rank: int, *dims: int, code: int = 0, offset: int = 0) -> bytes:
    described = struct.pack(f"<I{len(dims)}QIQ", rank, *dims, code, offset)
    out = header(tensors=1) + text("t") + described
    return out + bytes(-len(out) % 32) + bytes(64)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "too short"),
        (b"GGU", "too short"),
        (b"GGML" + header()[4:], "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(version=1 << 31), "version"),
        (header(keys=1), "unpack_from"),
        (header(keys=KEYS_MAX + 1), "4097 keys"),
        (header(tensors=TENSORS_MAX + 1), "10001 tensors"),
        (one_key(8, struct.pack("<Q", TEXT_BYTES_MAX + 1)), "bytes of text"),
        (one_key(8, struct.pack("<Q", 5) + b"abc"), "outside the file"),
        (one_key(8, struct.pack("<Q", 2) + b"\xff\xff"), "decode"),
        (one_key(9, struct.pack("<IQ", 4, ARRAY_MAX + 1)), "values in an array"),
        (one_key(9, struct.pack("<IQ", 9, 1)), "type 9"),
        (one_key(13, b""), "type 13"),
        (header(keys=2) + 2 * (text("k") + struct.pack("<I", 7) + b"\1"), "'k' twice"),
        (one_tensor(5, 1, 1, 1, 1, 1), "5 dimensions"),
        (one_tensor(0), "empty"),
        (one_tensor(1, 0), "empty"),
        (one_tensor(1, 17), "inside the file"),  # 68 bytes in 64
        (one_tensor(1, 4, offset=64), "inside the file"),
        (one_tensor(1, 4, offset=4), "inside the file"),  # not aligned
        (one_tensor(2, 1 << 63, 1 << 63), "inside the file"),
        (one_tensor(1, 33, code=8), "inside the file"),  # not whole blocks
        (one_tensor(1, 32, code=2), "ggml type 2"),  # Q4_0 is not read here
    ],
)
def test_unsound_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(tmp_path / "a.gguf", content, match)


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    row = text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)
    out = header(tensors=2) + row + row
    refused(tmp_path / "a", out + bytes(-len(out) % 32 + 32), "'t' twice")


SOUND = gguf_bytes(
    METADATA,
    {"a": f32(1, 2), "q": ("Q4_1", (2, 32), quantised(np.random.default_rng(1), "Q4_1", (2, 32)))},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, len(SOUND)),
    flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
)
def test_whatever_the_bytes_reading_ends_in_a_file_or_a_refusal(
    tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(SOUND)
    for at, value in flips:
        content[at] = value
    try:
        with opened(tmp_path / "a.gguf", bytes(content[:cut])) as file:
            for name in file.names():
                file.dequantised(name)
    except ModelRefused:
        pass


VALUES: Any = st.integers(0, 2**32 - 1) | st.booleans() | st.text(max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.text(max_size=20), VALUES | st.lists(st.text(max_size=5))))
def test_any_metadata_comes_back(tmp_path: Path, metadata: dict[str, Any]) -> None:
    if type(metadata.get("general.alignment", 32)) is int:
        with opened(tmp_path / "a.gguf", gguf_bytes(metadata, {"a": f32(1)})) as file:
            assert file.metadata == metadata
            assert {k: typed(v)[0] for k, v in file.metadata.items()} == {
                k: typed(v)[0] for k, v in metadata.items()
            }
