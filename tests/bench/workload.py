"""The same work for every system of `bench overhead`: two kernels, jitted from the same bytes.

The mesh runs the committed `jax.export` artifacts; Ray and Dask workers deserialise and jit the
very same bytes, so what differs is only what carries the work there and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

UNITS = 2_000
QUICK_UNITS = 400
CHUNK = 64
CHUNKED_UNITS = 64 * 400
QUICK_CHUNKED_UNITS = 64 * 100
CALLS = 300
QUICK_CALLS = 60
GAP_S = 0.02
SPIN_UNITS = 400
QUICK_SPIN_UNITS = 80
SPIN_MS = 10.0
WORKERS = 2


@cache
def jitted(kernel: str) -> Callable[..., Any]:
    """The kernel's own artifact, jitted; compiled by its first call."""
    import jax
    import jax.export

    from jaxkernels import registry

    exported = jax.export.deserialize(bytearray(registry.artifact_bytes(kernel)))
    return jax.jit(exported.call)


def noop(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(jitted("bench.noop@1")(x)[0])


def noop_chunk(xs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A chunk unit by unit, as a worker of the mesh does."""
    return np.stack([noop(x) for x in xs])


def spin(iterations: int) -> float:
    return float(np.asarray(jitted("bench.spin@1")(np.array([iterations], np.int32))[0])[0])


def spent_twice_s(work: Callable[[], object]) -> tuple[float, float]:
    """The first time, while a mesh still compiles a loop over units, and the second."""
    times: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times[0], times[1]


def noop_inputs(units: int) -> np.ndarray[Any, Any]:
    return np.arange(units * 16, dtype=np.float32).reshape(units, 16)


def calibrated_iterations() -> int:
    """Iterations of bench.spin that last SPIN_MS in this process, alone."""
    from jaxkernels.bench_spin.host import calibrate

    spin(1024)

    def measure(iterations: int) -> float:
        start = time.perf_counter()
        spin(iterations)
        return time.perf_counter() - start

    return round(calibrate(measure, SPIN_MS) * SPIN_MS)
