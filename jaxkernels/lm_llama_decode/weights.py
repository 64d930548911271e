"""SmolLM2's published blocks -> the kernel's twelve constant arguments and a tokenizer file.

Flow: `models.install` calls both once. Quantised weights stay the bytes that they are, only in
another order: tiles of 64 outputs side by side (see `api`), all layers in one array, so that a car
fetches twelve blobs, not 272.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ModelRefused
from ..gguf import Gguf
from ..host import Array
from .api import LANES, NORM_EPSILON, ROPE_BASE, SMOLLM2, Shape
from .text import make_tokenizer


def convert(tensors: Gguf, shape: Shape = SMOLLM2) -> Iterator[tuple[str, Array]]:
    """(name, array) in the kernel's order, one at a time."""
    check_metadata(tensors, shape)
    yield from _word(tensors.blocks("token_embd.weight", "Q8_0"))

    def stack(name: str, *parts: str) -> Iterator[tuple[str, Array]]:
        layers = [
            np.concatenate([_rows(tensors, layer, part, shape) for part in parts])
            for layer in range(shape.layers)
        ]
        yield name, np.stack([_tiles(layer["qs"]) for layer in layers])
        # float16 to float32 is exact.
        scales = [[_tiles(layer[part]) for part in ("d", "m")] for layer in layers]
        yield f"{name}_scale", np.array(scales, dtype=np.float32)

    yield from stack("qkv", "attn_q", "attn_k", "attn_v")
    yield from stack("mix", "attn_output")
    yield from stack("up", "ffn_gate", "ffn_up")
    yield from stack("down", "ffn_down")
    names = [f"blk.{i}.{part}_norm.weight" for i in range(shape.layers) for part in ("attn", "ffn")]
    norms = [tensors.blocks(name, "F32") for name in (*names, "output_norm.weight")]
    yield "norms", np.stack(norms)
    yield "rope", rope_table(shape)


def tokenizer_json(tensors: Gguf) -> str:
    text: str = make_tokenizer(tensors.metadata).to_str()
    return text


def check_metadata(tensors: Gguf, shape: Shape) -> None:
    """The file's own word on what the kernel has fixed: another network would give nonsense."""
    wanted: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.embedding_length": shape.width,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.rope.dimension_count": shape.head_width,
        "llama.feed_forward_length": shape.inner,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(NORM_EPSILON)),
    }
    for key, value in wanted.items():
        found = tensors.metadata.get(key)
        if found != value:
            raise ModelRefused(f"{key} of the weight file is {found!r}, not {value!r}.")
    if "output.weight" in tensors:
        raise ModelRefused("The weight file has an output matrix beside the word table.")


def rope_table(shape: Shape) -> Array:
    """float32[context, 2, head_width / 2]: cos and sin of position / base ** (2 i / head_width)."""
    frequency = ROPE_BASE ** (-np.arange(0, shape.head_width, 2) / shape.head_width)
    angles = np.arange(shape.context)[:, None] * frequency
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _rows(tensors: Gguf, layer: int, part: str, shape: Shape) -> Array:
    """[outputs, blocks] of a layer's matrix; queries and keys in the kernel's order of components.

    GGUF's llama turns components 2i and 2i + 1 of a head together, the kernel i and i + half, which
    are slices. A product of a query and a key is the same in either order.
    """
    blocks = tensors.blocks(f"blk.{layer}.{part}.weight", "Q4_1")
    if part not in ("attn_q", "attn_k"):
        return blocks
    pairs = blocks.reshape(-1, shape.head_width // 2, 2, blocks.shape[-1])
    return pairs.swapaxes(1, 2).reshape(blocks.shape)


def _tiles(blocks: Array) -> Array:
    """[outputs, blocks(, rows)] -> [tiles, blocks(, rows), LANES]"""
    tiles = blocks.reshape(-1, LANES, *blocks.shape[1:])
    return np.moveaxis(tiles, 1, -1)


def _word(blocks: Array) -> Iterator[tuple[str, Array]]:
    yield "word", np.ascontiguousarray(_tiles(blocks["qs"])).view(np.uint8)
    yield "word_scale", _tiles(blocks["d"]).astype(np.float32)
