"""lm.llama_decode@1 in NumPy, float64 between float32 weights, written for reading; see `api`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..host import Array
from ..threefry import threefry
from .api import END_TOKENS, NORM_EPSILON, SMOLLM2, Shape, constant_args, state_args

CONSTANTS = 12


def gumbel(key: Array, position: int, count: int) -> Array:
    """-log(-log(u)) of the first word of each counter (position, token)."""
    words = key.view(np.uint32)
    with np.errstate(over="ignore"):
        counter = np.full(count, position, np.uint32)
        bits, _ = threefry((words[0], words[1]), counter, np.arange(count, dtype=np.uint32))
    uniform = ((bits >> np.uint32(9)) + 0.5) * 2.0**-23
    return np.asarray(-np.log(-np.log(uniform)))


def _norm(x: Array, scale: Array) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x * x) + NORM_EPSILON) * scale)


def _turn(heads: Array, angles: Array) -> Array:
    half = heads.shape[-1] // 2
    turned = (heads[..., :half] + 1j * heads[..., half:]) * (angles[0] + 1j * angles[1])
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _flat(tiles: Array) -> Array:
    """[tile, block, row, lane] -> [inputs, outputs]"""
    return np.moveaxis(tiles, 0, 2).reshape(-1, tiles.shape[0] * tiles.shape[-1])


@dataclass(frozen=True, slots=True)
class Network:
    """The weights as plain matrices [inputs, outputs]; `layers` has four each."""

    word: Array
    layers: tuple[tuple[Array, ...], ...]
    norms: Array
    rope: Array


def unpack(constants: Sequence[Array]) -> Network:
    """Scale the quants up; float32 holds a 4-bit quant times a scale to 6e-8 of it."""

    def q4(packed: Array, scale: Array) -> Array:
        quants = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32)
        return _flat(quants * scale[0][:, :, None] + scale[1][:, :, None])

    word, word_scale, *matrices, norms, rope = constants
    layers = tuple(
        tuple(q4(matrices[i][layer], matrices[i + 1][layer]) for i in range(0, len(matrices), 2))
        for layer in range(len(matrices[0]))
    )
    table = _flat(word.view(np.int8).astype(np.float32) * word_scale[:, :, None])
    return Network(table, layers, norms, rope)


def forward(network: Network, shape: Shape, cache: Array, token: int, position: int) -> Array:
    """The last layer's output for this token, normed; its keys and values go into the cache."""
    angles = network.rope[position].astype(np.float64)
    x = network.word[:, token].astype(np.float64)
    for i, (qkv, mix, up, down) in enumerate(network.layers):
        heads = (_norm(x, network.norms[2 * i]) @ qkv).reshape(-1, shape.head_width)
        query, key, value = np.split(heads, (shape.heads, shape.heads + shape.kv_heads))
        cache[position, i] = _turn(key, angles), value
        seen = np.empty((shape.heads, shape.head_width))
        for head, q in enumerate(_turn(query, angles)):
            keys, values = cache[
                : position + 1, i, :, head * shape.kv_heads // shape.heads
            ].swapaxes(0, 1)
            scores = keys @ q / np.sqrt(shape.head_width)
            weights = np.exp(scores - scores.max())
            seen[head] = weights @ values / weights.sum()
        x = x + seen.reshape(-1) @ mix
        gate, inner = np.split(_norm(x, network.norms[2 * i + 1]) @ up, 2)
        x = x + gate / (1 + np.exp(-gate)) * inner @ down
    return _norm(x, network.norms[-1])


def reference(*args: Array, shape: Shape = SMOLLM2) -> tuple[Array, ...]:
    """The state after at most `n` steps, its cache in float64."""
    network, n = unpack(args[:CONSTANTS]), int(args[-1])
    cache, tokens, cursor, key, temperature = (array.copy() for array in args[CONSTANTS:-1])
    cache = cache.astype(np.float64)
    position, start, length, limit, ended = cursor.tolist()
    for _ in range(n):
        if ended:
            break
        hidden = forward(network, shape, cache, int(tokens[position]), position)
        if position + 1 >= length:
            logits = hidden @ network.word
            if temperature[0] > 0:
                logits = logits / temperature[0] + gumbel(key, position, len(logits))
            tokens[length] = logits.argmax()
            ended = int(tokens[length] in END_TOKENS or length + 1 >= limit)
            length += 1
        position += 1
    cursor[:] = position, start, length, limit, ended
    return cache, tokens, cursor, key, temperature


def sample_args(
    rng: np.random.Generator, shape: Shape = SMOLLM2, prompt: int = 2, steps: int = 3
) -> tuple[Array, ...]:
    """Random weights of the size that trained ones have, a prompt, and steps to go past it."""
    args: list[Array] = []
    for arg in constant_args(shape):
        array: Array
        if arg.dtype == "uint8":
            array = np.frombuffer(rng.bytes(arg.unit_bytes), np.uint8).reshape(arg.shape)
        elif arg.name == "word_scale":
            array = rng.uniform(0.0002, 0.0006, arg.shape)
        elif arg.name.endswith("_scale"):
            array = rng.uniform(0.006, 0.014, arg.shape)
            array[:, 1] *= -7.5  # the least: quants of 0 to 15 lie around 0
        elif arg.name == "norms":
            array = rng.uniform(0.5, 1.5, arg.shape)
        else:
            angles = rng.uniform(0, 2 * np.pi, (arg.shape[0], 1, arg.shape[2]))
            array = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        args.append(np.ascontiguousarray(array, dtype=arg.dtype))
    cache, tokens, cursor, key, temperature = (
        np.zeros(arg.shape, arg.dtype) for arg in state_args(shape)
    )
    tokens[:prompt] = rng.integers(max(END_TOKENS) + 1, shape.vocabulary, prompt)
    cursor[:] = 0, prompt, prompt, shape.context, 0
    key[:] = rng.integers(-(2**31), 2**31, 2)
    temperature[0] = rng.choice([0, 0.8])
    return (*args, cache, tokens, cursor, key, temperature, np.array(steps, np.int32))


def error(outs: Sequence[Array], *args: Any, shape: Shape = SMOLLM2) -> float:
    """Largest error of a key or value, as a share of the largest; infinite if a token differs."""
    cache, *rest = reference(*args, shape=shape)
    if not all(np.array_equal(a, b) for a, b in zip(outs[1:], rest, strict=True)):
        return float("inf")
    return float(np.max(np.abs(outs[0] - cache)) / np.max(np.abs(cache)))
