"""Token generation: lm.llama_decode@1 against torch eager, in one process, in turns.

Both decode greedily from the same weights (random ones of SmolLM2's shape: time depends on no
value), one token at a time behind a key-value cache, on as many threads. The mesh's side is the
committed artifact as a worker calls it, in slices with the state going through host memory between
them; torch's is what one writes in eager mode with float32 weights, fused where that is plain.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxkernels import registry, timing
from jaxkernels.host import Array
from jaxkernels.lm_llama_decode.api import CURSOR_FIELDS, NORM_EPSILON, SMOLLM2, Shape
from jaxkernels.lm_llama_decode.reference import CONSTANTS, Network, unpack

SPEC = "lm.llama_decode@1"
SLICE = 16
ROUNDS, QUICK_ROUNDS = 10, 3


class TorchLlama:
    """A Llama network in eager torch, float32, for one token at a time."""

    def __init__(self, network: Network, shape: Shape) -> None:
        import torch

        self.torch, self.shape = torch, shape
        # [outputs, inputs], as torch.nn.Linear has them.
        self.layers = [
            [torch.from_numpy(np.ascontiguousarray(matrix.T)) for matrix in layer]
            for layer in network.layers
        ]
        self.word = torch.from_numpy(np.ascontiguousarray(network.word.T))
        self.norms = [torch.from_numpy(norm.copy()) for norm in network.norms]
        self.rope = torch.from_numpy(network.rope.copy())
        size = (shape.layers, 2, shape.kv_heads, shape.context, shape.head_width)
        self.cache = torch.zeros(size)

    def weight_bytes(self) -> int:
        """What one token reads; the word table also is the output matrix."""
        matrices = [self.word, *(matrix for layer in self.layers for matrix in layer)]
        return sum(int(matrix.nbytes) for matrix in matrices)

    def logits(self, token: int, position: int) -> Any:
        """float32[vocabulary] after this token; its keys and values go into the cache."""
        functional, shape = self.torch.nn.functional, self.shape
        cos, sin = self.rope[position]
        q_end, k_end = shape.heads, shape.heads + shape.kv_heads

        def turn(heads: Any) -> Any:
            first, second = heads.chunk(2, dim=-1)
            return self.torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        def norm(x: Any, scale: Any) -> Any:
            return functional.rms_norm(x, scale.shape, scale, NORM_EPSILON)

        with self.torch.inference_mode():
            x = self.word[token]
            for i, (qkv, mix, up, down) in enumerate(self.layers):
                heads = functional.linear(norm(x, self.norms[2 * i]), qkv)
                heads = heads.view(-1, shape.head_width)
                turned = turn(heads[:k_end])
                self.cache[i, 0, :, position] = turned[q_end:]
                self.cache[i, 1, :, position] = heads[k_end:]
                keys, values = self.cache[i, :, None, :, : position + 1]
                seen = functional.scaled_dot_product_attention(
                    turned[None, :q_end, None], keys, values, enable_gqa=True
                )
                x = x + functional.linear(seen.reshape(-1), mix)
                gate, inner = functional.linear(norm(x, self.norms[2 * i + 1]), up).chunk(2)
                x = x + functional.linear(functional.silu(gate) * inner, down)
            return functional.linear(norm(x, self.norms[-1]), self.word)

    def generate(self, tokens: list[int], position: int, steps: int) -> None:
        """Do what `steps` steps of the kernel do: read at `position`, append once past the end."""
        for at in range(position, position + steps):
            logits = self.logits(tokens[at], at)
            if at + 1 == len(tokens):
                tokens.append(int(logits.argmax()))


class MeshLlama:
    """The committed bytes, their constants on the device, and a unit's state in host memory."""

    def __init__(self, args: tuple[Array, ...]) -> None:
        info = registry.get(SPEC)
        self.run, _ = timing.compile_kernel(info)
        self.constants = [jax.device_put(array) for array in args[:CONSTANTS]]
        self.start = args[CONSTANTS:-1]
        self.state = list(self.start)

    def generate(self, steps: int) -> None:
        out = self.run(*self.constants, *self.state, np.int32(steps))
        self.state = [np.asarray(array) for array in out]


def sample() -> tuple[Array, ...]:
    """Random weights and a prompt of one token, to be continued greedily."""
    args = timing.sample_args(registry.get(SPEC))
    cursor, _, temperature = args[CONSTANTS + 2 : -1]
    cursor[:] = [dict(start=1, length=1, limit=SMOLLM2.context).get(f, 0) for f in CURSOR_FIELDS]
    temperature[:] = 0
    return args


def _seconds(call: Callable[..., object], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def figures(quick: bool) -> dict[str, float]:
    """Tokens per second of both, medians of slices of 16 tokens taken in turns."""
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    args = sample()
    mesh, peer = MeshLlama(args), TorchLlama(unpack(args[:CONSTANTS]), SMOLLM2)
    tokens = [int(args[CONSTANTS + 1][0])]
    spans: tuple[list[float], list[float]] = ([], [])
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for turn in range(rounds + 1):  # the first warms both up
        position = turn * SLICE
        spent = (_seconds(mesh.generate, SLICE), _seconds(peer.generate, tokens, position, SLICE))
        if turn:
            for found, seconds in zip(spans, spent, strict=True):
                found.append(seconds)
    ours, theirs = (SLICE / statistics.median(found) for found in spans)
    constant_bytes = sum(array.nbytes for array in args[:CONSTANTS])
    generated = mesh.state[1][: len(tokens)].tolist()
    same = sum(a == b for a, b in zip(generated, tokens, strict=True))
    return {
        "lm_tok_per_s_mesh": ours,
        "lm_tok_per_s_torch": theirs,
        "lm_tokens_equal": same / len(tokens),
        # Every weight is read once a token, so this is the share of the memory's bandwidth in use.
        "lm_gbytes_per_s_mesh": ours * constant_bytes / 1e9,
        "lm_gbytes_per_s_torch": theirs * peer.weight_bytes() / 1e9,
    }
