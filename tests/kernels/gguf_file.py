"""Writes small GGUF files for the tests: any metadata, tensors, and a Llama of any shape."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkernels.gguf import KINDS
from jaxkernels.host import Array
from jaxkernels.lm_llama_decode.api import NORM_EPSILON, ROPE_BASE, Shape

CODES = {label: code for code, (label, _, _) in KINDS.items()}
KIND_OF = {bool: (7, "?"), int: (4, "I"), float: (6, "f"), str: (8, "")}


def text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def typed(value: Any) -> tuple[int, bytes]:
    """A metadata value's type code and bytes."""
    if isinstance(value, list):
        rows = [typed(one) for one in value]
        code = rows[0][0] if rows else 8
        return 9, struct.pack("<IQ", code, len(rows)) + b"".join(row for _, row in rows)
    code, letter = KIND_OF[type(value)]
    return code, text(value) if code == 8 else struct.pack(f"<{letter}", value)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    alignment: int = 32,
) -> bytes:
    """`tensors`: name -> kind, shape in C order, content."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        code, content = typed(value)
        out += text(key) + struct.pack("<I", code) + content
    offset, body = 0, b""
    for name, (kind, shape, content) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack("<IQ", CODES[kind], offset)
        body += content + bytes(-len(content) % alignment)
        offset = len(body)
    return out + bytes(-len(out) % alignment) + body


def quantised(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> bytes:
    """Random weights of about 0.05, as blocks."""
    _, shared, dtype = KINDS[CODES[kind]]
    items = np.zeros(int(np.prod(shape)) // shared, dtype)
    if dtype.names is None:
        items[:] = rng.uniform(0.5, 1.5, items.shape)
        return items.tobytes()
    items["qs"] = rng.integers(0, 256, items["qs"].shape, np.uint8).view(items["qs"].dtype)
    items["d"] = rng.uniform(0.006, 0.014, items.shape) / (20 if kind == "Q8_0" else 1)
    if "m" in dtype.names:
        items["m"] = -7.5 * items["d"].astype(np.float32)
    return items.tobytes()


# Byte-level BPE's names of the 256 bytes (GPT-2): printable ones as they are, others from U+0100.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [byte for byte in range(256) if byte not in _PLAIN]
BYTE_NAMES = {byte: chr(byte) for byte in _PLAIN} | {
    byte: chr(256 + i) for i, byte in enumerate(_MOVED)
}


def vocabulary(size: int, merges: Sequence[str] = ("h e", "l l", "he ll", "Ġ w")) -> dict[str, Any]:
    """Tokenizer metadata: three control tokens, all bytes, some merges, then unused tokens."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    control = len(tokens)
    tokens += [BYTE_NAMES[byte] for byte in range(256)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    assert len(tokens) == size
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * control + [1] * (size - control),
        "tokenizer.ggml.merges": list(merges),
    }


def llama_metadata(shape: Shape) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.embedding_length": shape.width,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.rope.dimension_count": shape.head_width,
        "llama.feed_forward_length": shape.inner,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPSILON,
        **vocabulary(shape.vocabulary),
    }


def llama_tensors(
    rng: np.random.Generator, shape: Shape
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    rows: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("Q8_0", (shape.vocabulary, shape.width)),
        "output_norm.weight": ("F32", (shape.width,)),
    }
    for i in range(shape.layers):
        rows |= {
            f"blk.{i}.attn_norm.weight": ("F32", (shape.width,)),
            f"blk.{i}.ffn_norm.weight": ("F32", (shape.width,)),
            f"blk.{i}.attn_q.weight": ("Q4_1", (queries, shape.width)),
            f"blk.{i}.attn_k.weight": ("Q4_1", (keys, shape.width)),
            f"blk.{i}.attn_v.weight": ("Q4_1", (keys, shape.width)),
            f"blk.{i}.attn_output.weight": ("Q4_1", (shape.width, queries)),
            f"blk.{i}.ffn_gate.weight": ("Q4_1", (shape.inner, shape.width)),
            f"blk.{i}.ffn_up.weight": ("Q4_1", (shape.inner, shape.width)),
            f"blk.{i}.ffn_down.weight": ("Q4_1", (shape.width, shape.inner)),
        }
    return {name: (kind, size, quantised(rng, kind, size)) for name, (kind, size) in rows.items()}


def write_llama(path: Path, shape: Shape, seed: int = 0) -> Path:
    tensors = llama_tensors(np.random.default_rng(seed), shape)
    path.write_bytes(gguf_bytes(llama_metadata(shape), tensors))
    return path


def f32(*values: float) -> tuple[str, tuple[int, ...], bytes]:
    array: Array = np.array(values, "<f4")
    return "F32", array.shape, array.tobytes()
