"""lm.llama_decode@1 in JAX: quantised weights are arguments, layers are one loop.

XLA's CPU dot wants float32 matrices, and unpacking 4-bit weights for it writes and reads 14 MB a
layer. So a product of a vector and a matrix is written out as sums over its blocks' rows with the
outputs innermost: one fusion reads the packed bytes once, in order, and is vectorised over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..threefry import threefry
from .api import BLOCK, END_TOKENS, NORM_EPSILON, SMOLLM2, Shape

MASKED = -1e30
CHAINS = 4  # of a block's products, that do not wait for one another


# Indices here are never negative; by default each is wrapped as Python's are: 250 operations.
_slice = partial(lax.dynamic_slice, allow_negative_indices=False)
_pick = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_update = partial(lax.dynamic_update_slice, allow_negative_indices=False)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x) + NORM_EPSILON) * scale


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


# What follows is jitted where it stands for one of many rows or blocks: the artifact then holds its
# code once, which a car's validator reads one operation after the other, and XLA inlines it before
# it optimises, with `row` and `block` as the constants that they are.


@jax.jit
def _add_block(total: jax.Array, sums: jax.Array, block: jax.Array | int) -> jax.Array:
    total = total + _pick(sums, block, axis=1)
    return total


def _join(sums: jax.Array) -> jax.Array:
    """sums[tile, block, lane] -> [outputs]"""
    total: jax.Array = _pick(sums, 0, axis=1)
    for block in range(1, sums.shape[1]):
        total = _add_block(total, sums, block)
    return total.reshape(-1)


@jax.jit
def _q4_row(
    chains: tuple[jax.Array, jax.Array],
    packed: jax.Array,
    layer: jax.Array,
    row: jax.Array | int,
    parts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Two chains [tile, block, lane], each with a product of one row of every block more."""
    _, tiles, blocks, rows, lanes = packed.shape
    # A slice of a slice is one array access too many for LLVM's vectoriser: 8 times slower.
    piece = _slice(packed, (layer, 0, 0, row, 0), (1, tiles, blocks, 1, lanes))
    pair = piece.reshape(tiles, blocks, lanes).astype(jnp.int32)
    low, high = (_slice(parts, (0, at), (blocks, 1)) for at in (row, row + rows))
    even, odd = chains
    even = even + (pair & 15).astype(jnp.float32) * low
    return even, odd + (pair >> 4).astype(jnp.float32) * high


def _q4(x: jax.Array, layer: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    """x[inputs] times layer `layer` of a Q4_1 matrix: float32[outputs]."""
    _, tiles, blocks, rows, lanes = packed.shape
    parts = x.reshape(blocks, BLOCK)
    zero = jnp.zeros((tiles, blocks, lanes), jnp.float32)
    chains = [(zero, zero) for _ in range(CHAINS // 2)]
    for row in range(rows):
        which = row % len(chains)
        chains[which] = _q4_row(chains[which], packed, layer, row, parts)
    slope, least = (
        _slice(scale, (layer, part, 0, 0, 0), (1, 1, tiles, blocks, lanes))[0, 0] for part in (0, 1)
    )
    total = _sum([sums for chain in chains for sums in chain])
    return _join(total * slope + jnp.sum(parts, axis=1)[:, None] * least)


def _signed(piece: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(piece, jnp.int8).astype(jnp.int32).astype(jnp.float32)


@jax.jit
def _q8_row(chain: jax.Array, word: jax.Array, row: jax.Array | int, parts: jax.Array) -> jax.Array:
    return chain + _signed(_pick(word, row, axis=2)) * _slice(parts, (0, row), (len(parts), 1))


def _logits(x: jax.Array, word: jax.Array, scale: jax.Array) -> jax.Array:
    """x[width] times the Q8_0 word table: float32[vocabulary]."""
    parts = x.reshape(-1, BLOCK)
    chains = [jnp.zeros_like(scale) for _ in range(CHAINS)]
    for row in range(BLOCK):
        chains[row % CHAINS] = _q8_row(chains[row % CHAINS], word, row, parts)
    return _join(_sum(chains) * scale)


def _embed(token: jax.Array, word: jax.Array, scale: jax.Array) -> jax.Array:
    """The token's row of the word table: float32[width]."""
    _, blocks, rows, lanes = word.shape
    tile, lane = lax.div(token, lanes), lax.rem(token, lanes)
    column = _slice(word, (tile, 0, 0, lane), (1, blocks, rows, 1))
    scales = _slice(scale, (tile, 0, lane), (1, blocks, 1))
    return (_signed(column) * scales[:, :, None]).reshape(-1)


def _turn(heads: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary position: components i and i + half of each head turn by their angle."""
    first, second = jnp.split(heads, 2, axis=-1)
    cos, sin = angles
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.jit
def _head(query: jax.Array, seen: jax.Array, bias: jax.Array, head: jax.Array | int) -> jax.Array:
    # One 2-D product a head: XLA's CPU backend is slow at batched ones.
    mine = _pick(query, head) * (1 / math.sqrt(query.shape[-1]))
    keys, values = (_pick(_pick(seen, part, axis=1), head, axis=1) for part in (0, 1))
    scores = jnp.dot(mine, keys.T, precision="highest") + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    mixed = jnp.dot(weights, values, precision="highest")
    return mixed / jnp.sum(weights, axis=1, keepdims=True)


def _attend(query: jax.Array, seen: jax.Array, position: jax.Array, shape: Shape) -> jax.Array:
    """query[heads, head_width] over seen[context, 2, kv_heads, head_width]."""
    group = shape.heads // shape.kv_heads
    bias = jnp.where(jnp.arange(shape.context) <= position, 0.0, MASKED)
    query = query.reshape(shape.kv_heads, group, shape.head_width)
    return jnp.concatenate([_head(query, seen, bias, i) for i in range(shape.kv_heads)]).reshape(-1)


def _choose(
    logits: jax.Array, position: jax.Array, key: jax.Array, temperature: jax.Array
) -> jax.Array:
    """The likeliest token, or one drawn by its probability (the Gumbel-max trick)."""

    def draw() -> jax.Array:
        words = lax.bitcast_convert_type(key, jnp.uint32)
        counter = jnp.full(logits.shape, position, jnp.uint32)
        bits, _ = threefry((words[0], words[1]), counter, jnp.arange(len(logits), dtype=jnp.uint32))
        uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * (2.0**-23)
        return jnp.argmax(logits / temperature - jnp.log(-jnp.log(uniform))).astype(jnp.int32)

    def likeliest() -> jax.Array:
        return jnp.argmax(logits).astype(jnp.int32)

    token: jax.Array = lax.cond(temperature > 0, draw, likeliest)
    return token


def decode(shape: Shape, *args: jax.Array) -> tuple[jax.Array, ...]:
    """At most `n` steps; arguments as `constant_args` and `state_args` of `api` list them."""
    word, word_scale, qkv, qkv_scale, mix, mix_scale, up, up_scale, down, down_scale = args[:10]
    norms, rope, cache, tokens, cursor, key, temperature, n = args[10:]
    q_end, k_end = shape.heads, shape.heads + shape.kv_heads

    def forward(cache: jax.Array, token: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
        angles = _pick(rope, position)

        def layer(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, cache = carry
            before, after = (_pick(norms, 2 * i + k) for k in (0, 1))
            heads = _q4(_norm(x, before), i, qkv, qkv_scale).reshape(-1, shape.head_width)
            turned = _turn(heads[:k_end], angles)
            new = jnp.stack([turned[q_end:], heads[k_end:]])
            cache = _update(cache, new[None, None], (position, i, 0, 0, 0))
            seen = _pick(cache, i, axis=1)
            x = x + _q4(_attend(turned[:q_end], seen, position, shape), i, mix, mix_scale)
            inner = _q4(_norm(x, after), i, up, up_scale)
            gated = jax.nn.silu(inner[: shape.inner]) * inner[shape.inner :]
            return x + _q4(gated, i, down, down_scale), cache

        start = (_embed(token, word, word_scale), cache)
        out: tuple[jax.Array, ...] = lax.fori_loop(0, shape.layers, layer, start)
        return out

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        done, cache, tokens, cursor = carry
        position, start, length, limit, _ = cursor
        token = _pick(tokens, position)
        x, cache = forward(cache, token, position)

        def append() -> tuple[jax.Array, ...]:
            logits = _logits(_norm(x, norms[2 * shape.layers]), word, word_scale)
            token = _choose(logits, position, key, temperature[0])
            ended = _sum([(token == end).astype(jnp.int32) for end in END_TOKENS])
            ended = jnp.maximum(ended, (length + 1 >= limit).astype(jnp.int32))
            return _update(tokens, token[None], (length,)), length + 1, ended

        def read() -> tuple[jax.Array, ...]:
            return tokens, length, jnp.int32(0)

        # Most of a prompt's tokens need no logits, which are a fifth of a step.
        tokens, length, ended = lax.cond(position + 1 >= length, append, read)
        cursor = jnp.stack([position + 1, start, length, limit, ended])
        return done + 1, cache, tokens, cursor

    def more(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (carry[0] < n) & (carry[3][-1] == 0)

    # `ended` ends the loop and is no `cond` in it: that would copy the cache at each step.
    state: tuple[jax.Array, ...] = (jnp.int32(0), cache, tokens, cursor)
    _, cache, tokens, cursor = lax.while_loop(more, step, state)
    return cache, tokens, cursor, key, temperature


kernel = partial(decode, SMOLLM2)
