"""Times one kernel in one process, as its committed bytes: the yardstick for the mesh. Needs jax.

Flow: each kernel's `bench` calls it; `tests.bench` compares the mesh and the peers with it.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import export

from . import registry
from .host import Array
from .spec import KernelInfo

Figures: TypeAlias = dict[str, float]
Run: TypeAlias = Callable[..., Sequence[jax.Array]]


def sample_args(info: KernelInfo, seed: int = 0) -> tuple[Array, ...]:
    """All that the artifact is called with for one unit, as the kernel's reference draws it.

    For a stepped kernel that includes `n`, last.
    """
    reference = importlib.import_module(f"{__package__}.{info.package}.reference")
    args: tuple[Array, ...] = reference.sample_args(np.random.default_rng(seed))
    return args


def compile_kernel(info: KernelInfo) -> tuple[Run, float]:
    """The committed bytes as a compiled function, and the seconds from bytes to there."""
    start = time.perf_counter()
    exported = export.deserialize(bytearray(registry.artifact_bytes(info.spec)))
    # jax.jit around the call: a bare exported.call costs 310 us a dispatch instead of 59.
    run = jax.jit(exported.call).lower(*exported.in_avals).compile()
    return run, time.perf_counter() - start


def unit_share(info: KernelInfo, args: Sequence[Any]) -> float:
    """How much of a unit one call with these arguments does: 1, but of a stepped kernel n steps."""
    return 1.0 if info.stepped is None else int(args[-1]) / info.stepped.steps_default


def time_calls(info: KernelInfo, run: Run, args: Sequence[Any], calls: int) -> Figures:
    """Median and 99th percentile of warm calls, one after the other.

    A stepped kernel is called with the same state again and again: its time depends on the number
    of steps alone. Its figures are of a unit of `steps_default` steps.
    """
    jax.block_until_ready(run(*args))
    spans_ms = []
    share = unit_share(info, args)
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        spans_ms.append((time.perf_counter() - start) * 1e3 / share)
    spans_ms.sort()
    median_ms = statistics.median(spans_ms)
    return {
        "unit_ms_p50": median_ms,
        "unit_ms_p99": spans_ms[min(len(spans_ms) - 1, int(len(spans_ms) * 0.99))],
        "units_per_s": 1e3 / median_ms,
        "gflops": info.flops_per_unit / median_ms / 1e6,
    }


def measure_sample(info: KernelInfo, calls: int) -> Figures:
    """Compile and time a kernel on its sample; constants stay on the device, as on a car."""
    run, compile_s = compile_kernel(info)
    args = [
        array if arg.mapped else jax.device_put(array)
        for arg, array in zip(info.artifact_args, sample_args(info), strict=True)
    ]
    return {"compile_s": compile_s, **time_calls(info, run, args, calls)}


def print_figures(info: KernelInfo, figures: Figures) -> None:
    """Last line: the figures as JSON, as every bench here ends."""
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print(json.dumps({"bench": info.spec, "figures": rounded}))
