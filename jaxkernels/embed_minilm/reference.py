"""embed.minilm@1 in NumPy, float64 throughout, written for reading; see `api` for the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..host import Array
from .api import (
    BATCH,
    HEADS,
    INFO,
    INNER,
    LAYER_NORM_EPSILON,
    LAYERS,
    POSITIONS,
    TOKENS,
    VECTOR_WIDTH,
    VOCABULARY,
    WIDTH,
)

HEAD_WIDTH = WIDTH // HEADS


def _norm(x: Array, scale: Array, shift: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + LAYER_NORM_EPSILON) * scale + shift)


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _attend(x: Array, w: Array, b: Array) -> Array:
    q, k, v = np.split(x @ w + b, 3, axis=-1)
    out = np.empty_like(q)
    for head in range(HEADS):
        at = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        scores = q[:, at] @ k[:, at].T / math.sqrt(HEAD_WIDTH)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, at] = weights / weights.sum(-1, keepdims=True) @ v[:, at]
    return out


def _embed_passage(ids: Array, mask: Array, weights: Sequence[Array]) -> Array:
    """One passage, padding taken out: what is not there needs no mask."""
    word, place, qkv, mix, up, down, vectors = weights
    (real,) = np.nonzero(mask)
    if not len(real):
        return np.zeros(WIDTH)  # a row of padding
    x = word[ids[real]].astype(np.float64) + place[real]
    x = _norm(x, place[POSITIONS], place[POSITIONS + 1])
    ends = np.cumsum([3 * WIDTH, WIDTH, WIDTH, WIDTH, INNER, WIDTH, WIDTH])
    for i in range(LAYERS):
        b_qkv, b_mix, scale1, shift1, b_up, b_down, scale2, shift2 = np.split(vectors[i], ends)
        x = _norm(x + _attend(x, qkv[i], b_qkv) @ mix[i] + b_mix, scale1, shift1)
        inner = x @ up[i] + b_up
        inner = inner * 0.5 * (1 + _erf(inner / math.sqrt(2)))
        x = _norm(x + inner @ down[i] + b_down, scale2, shift2)
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def reference(*args: Array) -> tuple[Array, ...]:
    *weights, ids, mask = args
    wide = [weights[0], *(w.astype(np.float64) for w in weights[1:])]
    return (np.stack([_embed_passage(i, m, wide) for i, m in zip(ids, mask, strict=True)]),)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """Random weights of the size that trained ones have; passages of all lengths, one empty."""
    args: list[Array] = [
        rng.standard_normal(arg.shape, dtype=np.float32) * np.float32(0.05)
        for arg in INFO.args
        if not arg.mapped
    ]
    args[1][POSITIONS] += 1
    scales = np.zeros(VECTOR_WIDTH, dtype=np.float32)
    for start in (4 * WIDTH, VECTOR_WIDTH - 2 * WIDTH):
        scales[start : start + WIDTH] = 1
    args[6] += scales
    lengths = rng.integers(1, TOKENS + 1, BATCH)
    lengths[0], lengths[-1] = TOKENS, 0
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, VOCABULARY, (BATCH, TOKENS), dtype=np.int32) * mask
    return (*args, ids, mask)


def error(outs: Sequence[Array], *args: Any) -> float:
    """Largest absolute difference of a coordinate; vectors have length 1."""
    return float(np.max(np.abs(outs[0].astype(np.float64) - reference(*args)[0])))
