"""`bench kernels`, our side: committed artifacts, called as a worker calls them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkernels import registry, timing
from jaxkernels.host import Array

from .kernels_side import MD_STEPS, Task, pricing, sample, search

VERSION = jax.__version__


def _arrays(outs: Any) -> list[Array]:
    return [np.asarray(out) for out in outs]


def _paged(array: Array) -> Array:
    """A copy that begins at a page, as blobs do that a worker maps: XLA CPU reads it in place."""
    if not array.shape:
        return array
    pages = np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
    pages[...] = array
    return pages


def _artifact(spec: str, args: Sequence[Array], per_call: int = 1) -> Task:
    info = registry.get(spec)
    run, _ = timing.compile_kernel(info)
    placed = [
        _paged(array) if arg.mapped else jax.device_put(array)
        for arg, array in zip(info.artifact_args, args, strict=True)
    ]
    return Task(lambda: _arrays(run(*placed)), lambda outs: list(outs), per_call)


def _minilm() -> Task:
    return _artifact("embed.minilm@1", sample("embed.minilm@1"))


def _knn() -> Task:
    return _artifact("vec.knn@1", search())


def _mdlj() -> Task:
    args = (*sample("md.lj@1")[:-1], np.array(MD_STEPS, np.int32))
    task = _artifact("md.lj@1", args, MD_STEPS)
    return task._replace(answer=lambda outs: outs[:9])


def _matmul() -> Task:
    return _artifact("linalg.matmul@1", sample("linalg.matmul@1"))


def _pricing(dates: int) -> Task:
    task = _artifact("mc.pricing@1", pricing(dates))
    return task._replace(answer=lambda outs: [out.mean(dtype=np.float64) for out in outs])


def _render() -> Task:
    return _artifact("render.sdf@1", sample("render.sdf@1"))


def _product() -> Task:
    x = jnp.ones((2048, 2048), jnp.float32)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return Task(lambda: multiply(x).block_until_ready(), lambda out: [np.asarray(out)])


TASKS = {
    "product": _product,
    "minilm": _minilm,
    "knn": _knn,
    "mdlj": _mdlj,
    "matmul": _matmul,
    "mc": lambda: _pricing(1),
    "mc_asian": lambda: _pricing(16),
    "render": _render,
}
