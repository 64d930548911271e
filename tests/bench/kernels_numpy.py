"""`bench kernels`, NumPy's side: float32, whole arrays, results written into arrays that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxkernels.host import Array
from jaxkernels.mc_pricing.api import LANES
from jaxkernels.render_sdf.api import TILE
from jaxkernels.vec_knn.api import ROWS, TOP

from .kernels_scene import Ops, render
from .kernels_side import MD_STEPS, Task, pricing, sample, search

VERSION = np.__version__


def _outs(outs: Any) -> list[Array]:
    return list(outs)


def _knn() -> Task:
    queries, corpus, _ = search()

    def call() -> tuple[Array, ...]:
        scores = (corpus @ queries.T).T  # queries first: a third slower
        some = np.argpartition(scores, ROWS - TOP, axis=1)[:, -TOP:]
        best = np.take_along_axis(scores, some, axis=1)
        order = np.argsort(-best, axis=1, kind="stable")
        return np.take_along_axis(best, order, 1), np.take_along_axis(some, order, 1)

    return Task(call, _outs)


def _mdlj() -> Task:
    system, *state, _ = sample("md.lj@1")
    box, cutoff, dt = (np.float32(value) for value in system)
    atoms = len(state[0])
    d = [np.empty((atoms, atoms), np.float32) for _ in range(3)]
    r2, part = np.empty_like(d[0]), np.empty_like(d[0])

    def forces(place: list[Array]) -> list[Array]:
        for x, out in zip(place, d, strict=True):
            np.subtract(x[:, None], x[None], out=out)
            np.multiply(out, 1 / box, out=part)
            np.rint(part, out=part)
            np.multiply(part, box, out=part)
            np.subtract(out, part, out=out)
        np.multiply(d[0], d[0], out=r2)
        for out in d[1:]:
            np.multiply(out, out, out=part)
            np.add(r2, part, out=r2)
        np.fill_diagonal(r2, np.inf)
        r2[r2 >= cutoff * cutoff] = np.inf
        np.divide(1, r2, out=r2)
        np.multiply(r2, r2, out=part)
        np.multiply(part, r2, out=part)  # r^-6
        np.multiply(r2, part, out=r2)
        np.multiply(part, 48, out=part)
        np.subtract(part, 24, out=part)
        np.multiply(r2, part, out=r2)
        return [np.einsum("ij,ij->i", r2, out) for out in d]

    def call() -> list[Array]:
        place, speed, force = (list(state[i : i + 3]) for i in (0, 3, 6))
        for _ in range(MD_STEPS):
            speed = [v + dt / 2 * f for v, f in zip(speed, force, strict=True)]
            place = [x + dt * v for x, v in zip(place, speed, strict=True)]
            force = forces(place)
            speed = [v + dt / 2 * f for v, f in zip(speed, force, strict=True)]
        return [*place, *speed, *force]

    return Task(call, _outs, MD_STEPS)


def _matmul() -> Task:
    a, b = sample("linalg.matmul@1")
    return Task(lambda: a @ b, lambda out: [out])


def _pricing(dates: int) -> Task:
    """The same antithetic estimator with NumPy's own generator."""
    terms, _ = pricing(dates)
    spot, strike, drift, volatility, discount, _ = terms
    rng = np.random.default_rng(7)
    z, x = np.empty(LANES, np.float32), np.empty(LANES, np.float32)

    def call() -> list[Array]:
        walk, up, down = (np.zeros(LANES, np.float32) for _ in range(3))
        for date in range(1, dates + 1):
            rng.standard_normal(LANES, dtype=np.float32, out=z)
            np.add(walk, z, out=walk)
            np.multiply(walk, volatility, out=z)
            trend = np.float32(drift * date)
            np.add(z, trend, out=x)
            np.add(up, np.exp(x, out=x), out=up)
            np.subtract(trend, z, out=x)
            np.add(down, np.exp(x, out=x), out=down)
        for total in (up, down):
            np.multiply(total, np.float32(1 / dates), out=total)
            np.subtract(total, strike, out=total)
            np.maximum(total, 0, out=total)
        np.add(up, down, out=up)
        np.multiply(up, np.float32(0.5 * discount * spot), out=up)
        return [np.asarray(up.mean(dtype=np.float64)), np.asarray(np.square(up).mean())]

    return Task(call, _outs)


def _render() -> Task:
    ops = Ops(
        xp=np,
        where=np.where,
        maximum=np.maximum,
        minimum=np.minimum,
        clip=np.clip,
        full=lambda value: np.full((TILE, TILE), value, np.float32),
        pixels=np.arange(TILE, dtype=np.float32),
        to_bytes=lambda x: np.stack([np.rint(c * 255) for c in x], axis=-1).astype(np.uint8),
    )
    args = [arg.astype(np.float32) for arg in sample("render.sdf@1")]
    return Task(lambda: render(ops, *args), lambda out: [out])


def _product() -> Task:
    x = np.ones((2048, 2048), np.float32)
    return Task(lambda: x @ x, lambda out: [out])


def _copy() -> Task:
    source = np.ones(64 << 20, np.float32)
    target = np.empty_like(source)

    def call() -> Array:
        np.copyto(target, source)
        return target[:8]

    return Task(call, lambda out: [out])


TASKS: dict[str, Callable[[], Task]] = {
    "product": _product,
    "copy": _copy,
    "knn": _knn,
    "mdlj": _mdlj,
    "matmul": _matmul,
    "mc": lambda: _pricing(1),
    "mc_asian": lambda: _pricing(16),
    "render": _render,
}
