"""embed.minilm@1 in JAX: weights are arguments, layers are one scan.

A scan over stacked layers compiles 2.5 times faster than six layers written out and runs as fast;
precision='highest' is stored in the artifact, else an accelerator's default would round the inputs
of every product and results would leave the f32 class.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from .api import (
    BATCH,
    HEADS,
    INNER,
    LAYER_NORM_EPSILON,
    POSITIONS,
    TOKENS,
    WIDTH,
)

HEAD_WIDTH = WIDTH // HEADS
MASKED = -1e30  # finite: a row with no token at all gets even weights instead of NaN


def _norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale + shift


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision="highest")


def _split(vectors: jax.Array) -> list[jax.Array]:
    widths = (3 * WIDTH, WIDTH, WIDTH, WIDTH, INNER, WIDTH, WIDTH, WIDTH)
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return jnp.split(vectors, ends)


def _attend(qkv: jax.Array, bias: jax.Array) -> jax.Array:
    """`bias` [BATCH, TOKENS] hides the padding of each passage."""
    # One head of one passage at a time: its products are 2-D and its scores, 64 kB, stay in the L1
    # and L2 caches. Against one batched product over all heads, with the same bits: 472 ms of CPU
    # time a unit instead of 557 (interleaved medians, XLA CPU). Rows are divided by their sum
    # after the second product, where they are 32 wide instead of 128.
    parts = qkv.reshape(BATCH, TOKENS, 3, HEADS, HEAD_WIDTH).transpose(2, 0, 3, 1, 4)
    q, k, v = parts.reshape(3, BATCH * HEADS, TOKENS, HEAD_WIDTH)

    def head(one: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, hidden = one
        scores = _product("qd,kd->qk", q * (1 / math.sqrt(HEAD_WIDTH)), k) + hidden
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        return _product("qk,kd->qd", weights, v) / jnp.sum(weights, axis=-1, keepdims=True)

    seen: jax.Array = jax.lax.map(head, (q, k, v, jnp.repeat(bias, HEADS, axis=0)))
    seen = seen.reshape(BATCH, HEADS, TOKENS, HEAD_WIDTH)
    return seen.transpose(0, 2, 1, 3).reshape(BATCH * TOKENS, WIDTH)


def _gelu(x: jax.Array) -> jax.Array:
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def kernel(
    word: jax.Array,
    place: jax.Array,
    qkv: jax.Array,
    mix: jax.Array,
    up: jax.Array,
    down: jax.Array,
    vectors: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, ...]:
    real = mask.astype(jnp.float32)
    bias = (1 - real) * MASKED
    hidden = word[ids] + place[None, :TOKENS]
    hidden = _norm(hidden, place[POSITIONS], place[POSITIONS + 1]).reshape(BATCH * TOKENS, WIDTH)

    def layer(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        w_qkv, w_mix, w_up, w_down, packed = weights
        b_qkv, b_mix, scale1, shift1, b_up, b_down, scale2, shift2 = _split(packed)
        seen = _attend(_product("ti,io->to", x, w_qkv) + b_qkv, bias)
        x = _norm(x + _product("ti,io->to", seen, w_mix) + b_mix, scale1, shift1)
        inner = _gelu(_product("ti,io->to", x, w_up) + b_up)
        return _norm(x + _product("ti,io->to", inner, w_down) + b_down, scale2, shift2), None

    hidden, _ = jax.lax.scan(layer, hidden, (qkv, mix, up, down, vectors))
    total = _product("btw,bt->bw", hidden.reshape(BATCH, TOKENS, WIDTH), real)
    mean = total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1e-9)
    length = jnp.sqrt(jnp.sum(mean * mean, axis=1, keepdims=True))
    return (mean / jnp.maximum(length, 1e-12),)
