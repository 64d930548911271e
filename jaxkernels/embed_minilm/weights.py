"""MiniLM's published tensors -> the kernel's seven constant arguments. NumPy only.

Flow: `models.install` calls `convert` once. Matrices are transposed to [in, out] (the order in
which `x @ w` reads them) and stacked over layers, because the kernel scans over them; everything
that is only a vector shares one array per layer, so that a car fetches seven blobs, not 103.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..host import Array
from ..safetensors import SafeTensors
from .api import LAYERS, POSITIONS

# Tensor names below encoder.layer.N, in the order in which `vectors` joins them.
VECTORS = (
    "attention.self.query.bias",
    "attention.self.key.bias",
    "attention.self.value.bias",
    "attention.output.dense.bias",
    "attention.output.LayerNorm.weight",
    "attention.output.LayerNorm.bias",
    "intermediate.dense.bias",
    "output.dense.bias",
    "output.LayerNorm.weight",
    "output.LayerNorm.bias",
)


def convert(tensors: SafeTensors) -> Iterator[tuple[str, Array]]:
    """(name, array) in the kernel's order, one at a time: a few MB above the largest at once."""

    def layer(index: int, name: str) -> Array:
        return tensors[f"encoder.layer.{index}.{name}"]

    def stack(*names: str) -> Array:
        rows = [
            np.concatenate([layer(index, name).T for name in names], axis=1)
            for index in range(LAYERS)
        ]
        return np.stack(rows)

    yield "word", tensors["embeddings.word_embeddings.weight"]
    # Every token here is of type 0, so its type vector is added to the position's once and for all.
    place = tensors["embeddings.position_embeddings.weight"][:POSITIONS]
    place = place + tensors["embeddings.token_type_embeddings.weight"][0]
    scale, shift = (tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
    yield "place", np.concatenate([place, scale[None], shift[None]])
    yield "qkv", stack(*(f"attention.self.{part}.weight" for part in ("query", "key", "value")))
    yield "mix", stack("attention.output.dense.weight")
    yield "up", stack("intermediate.dense.weight")
    yield "down", stack("output.dense.weight")
    vectors = [np.concatenate([layer(i, name) for name in VECTORS]) for i in range(LAYERS)]
    yield "vectors", np.stack(vectors)
