"""`bench kernels`, PyTorch's side: eager mode, its own fused functions where it has them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jaxkernels.embed_minilm.api import (
    BATCH,
    HEADS,
    LAYER_NORM_EPSILON,
    LAYERS,
    POSITIONS,
    TOKENS,
    WIDTH,
)
from jaxkernels.host import Array
from jaxkernels.mc_pricing.api import LANES
from jaxkernels.render_sdf.api import TILE
from jaxkernels.vec_knn.api import TOP

from .kernels_graph import layer_weights
from .kernels_scene import Ops, render
from .kernels_side import MD_STEPS, Task, pricing, sample, search

VERSION = torch.__version__
THREAD_TRIES = 3
torch.set_grad_enabled(False)


def _outs(outs: Any) -> list[Array]:
    return [out.numpy() for out in outs]


def _tensors(spec: str) -> list[Any]:
    return [torch.from_numpy(np.ascontiguousarray(arg)) for arg in sample(spec)]


def _minilm() -> Task:
    args = sample("embed.minilm@1")
    word, place = (torch.from_numpy(args[i]) for i in (0, 1))
    ids, mask = torch.from_numpy(args[7]).long(), torch.from_numpy(args[8])
    # torch keeps a linear layer's matrix as [out, in]
    layers = [
        {
            name: torch.from_numpy(np.ascontiguousarray(w.T if w.ndim == 2 else w))
            for name, w in layer_weights(args, index).items()
        }
        for index in range(LAYERS)
    ]

    def norm(x: Any, scale: Any, shift: Any) -> Any:
        return F.layer_norm(x, (WIDTH,), scale, shift, LAYER_NORM_EPSILON)

    def call() -> tuple[Any, ...]:
        hidden = ((1 - mask) * -1e30)[:, None, None]  # finite: a passage may be empty
        x = norm(F.embedding(ids, word) + place[:TOKENS], place[POSITIONS], place[POSITIONS + 1])
        for w in layers:
            heads = F.linear(x, w["qkv"], w["b_qkv"]).view(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            y = y.transpose(1, 2).reshape(BATCH, TOKENS, WIDTH)
            x = norm(x + F.linear(y, w["mix"], w["b_mix"]), w["scale1"], w["shift1"])
            y = F.gelu(F.linear(x, w["up"], w["b_up"]))
            x = norm(x + F.linear(y, w["down"], w["b_down"]), w["scale2"], w["shift2"])
        real = mask.float()[..., None]
        return (F.normalize((x * real).sum(1) / real.sum(1).clamp(min=1)),)

    return Task(call, _outs)


def _knn() -> Task:
    queries, corpus, _ = (torch.from_numpy(arg) for arg in search())

    def call() -> tuple[Any, ...]:
        best, rows = torch.topk((corpus @ queries.T).T, TOP)  # queries first: twice as slow
        return best, rows

    return Task(call, _outs)


def _mdlj() -> Task:
    system, *state, _ = _tensors("md.lj@1")
    box, cutoff, dt = (float(value) for value in system)
    own = torch.eye(len(state[0]), dtype=torch.bool)

    def forces(place: list[Any]) -> list[Any]:
        d = []
        for x in place:
            apart = x[:, None] - x[None]
            d.append(apart.sub_((apart * (1 / box)).round_().mul_(box)))
        r2 = (d[0] * d[0]).addcmul_(d[1], d[1]).addcmul_(d[2], d[2])
        r2.masked_fill_(own | (r2 >= cutoff * cutoff), float("inf"))
        i2 = r2.reciprocal_()
        i6 = i2 * i2 * i2
        over_r = (i6 * 48).sub_(24).mul_(i6).mul_(i2)
        return [(over_r * apart).sum(1) for apart in d]

    def call() -> list[Any]:
        place, speed, force = (list(state[i : i + 3]) for i in (0, 3, 6))
        for _ in range(MD_STEPS):
            speed = [v + dt / 2 * f for v, f in zip(speed, force, strict=True)]
            place = [x + dt * v for x, v in zip(place, speed, strict=True)]
            force = forces(place)
            speed = [v + dt / 2 * f for v, f in zip(speed, force, strict=True)]
        return [*place, *speed, *force]

    return Task(call, _outs, MD_STEPS)


def _matmul() -> Task:
    a, b = _tensors("linalg.matmul@1")
    return Task(lambda: a @ b, lambda out: [out.numpy()])


def _pricing(dates: int) -> Task:
    """The same antithetic estimator with PyTorch's own generator."""
    spot, strike, drift, volatility, discount, _ = (float(term) for term in pricing(dates)[0])
    generator = torch.Generator().manual_seed(7)
    z = torch.empty(LANES)

    def call() -> list[Any]:
        walk, up, down = (torch.zeros(LANES) for _ in range(3))
        for date in range(1, dates + 1):
            walk.add_(z.normal_(generator=generator))
            scaled = walk * volatility
            up.add_((scaled + drift * date).exp_())
            down.add_(scaled.neg_().add_(drift * date).exp_())
        for total in (up, down):
            total.mul_(1 / dates).sub_(strike).clamp_(min=0)
        up.add_(down).mul_(0.5 * discount * spot)
        return [up.mean(dtype=torch.float64), (up * up).mean(dtype=torch.float64)]

    return Task(call, _outs)


def _render() -> Task:
    def to_bytes(channels: list[Any]) -> Any:
        return torch.stack(channels, -1).mul_(255).round_().to(torch.uint8)

    ops = Ops(
        xp=torch,
        where=torch.where,
        maximum=torch.maximum,
        minimum=torch.minimum,
        clip=torch.clamp,
        full=lambda value: torch.full((TILE, TILE), value),
        pixels=torch.arange(TILE, dtype=torch.float32),
        to_bytes=to_bytes,
    )
    # Scalars as Python numbers: a tensor of no dimension costs an operation of its own.
    camera, scene, tile = (arg.tolist() for arg in sample("render.sdf@1"))
    return Task(lambda: render(ops, camera, scene, tile), lambda out: [out.numpy()])


def _product() -> Task:
    x = torch.ones(2048, 2048)
    return Task(lambda: x @ x, lambda out: [out.numpy()])


def _copy() -> Task:
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    return Task(lambda: target.copy_(source), lambda out: [out[:8].numpy()])


def _at_best_threads(build: Callable[[], Task]) -> Task:
    """With one thread or with all, whichever is faster here: small operations gain nothing by two,
    and beside other processes a team of threads waits for its slowest.
    """
    task = build()
    spent: dict[int, float] = {}
    for threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        task.call()
        start = time.perf_counter()
        for _ in range(THREAD_TRIES):
            task.call()
        spent[threads] = time.perf_counter() - start
    best = min(spent, key=lambda threads: spent[threads])

    def call() -> Any:
        torch.set_num_threads(best)
        return task.call()

    return task._replace(call=call)


BUILDERS: dict[str, Callable[[], Task]] = {
    "product": _product,
    "copy": _copy,
    "minilm": _minilm,
    "knn": _knn,
    "mdlj": _mdlj,
    "matmul": _matmul,
    "mc": lambda: _pricing(1),
    "mc_asian": lambda: _pricing(16),
    "render": _render,
}
TASKS: dict[str, Callable[[], Task]] = {
    name: partial(_at_best_threads, build) for name, build in BUILDERS.items()
}
