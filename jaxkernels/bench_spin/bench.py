"""`python -m jaxkernels.bench_spin.bench`: calibrates on this machine, then spins 10 ms units."""

from __future__ import annotations

import time

import numpy as np

from ..timing import Figures, compile_kernel, print_figures, time_calls
from .api import INFO, MS_DEFAULT
from .host import calibrate


def measure() -> Figures:
    run, compile_s = compile_kernel(INFO)

    def measure_s(iterations: int) -> float:
        start = time.perf_counter()
        run(np.array([iterations], dtype=np.int32))[0].block_until_ready()
        return time.perf_counter() - start

    per_ms = calibrate(measure_s)
    args = (np.array([round(per_ms * MS_DEFAULT)], dtype=np.int32),)
    figures = time_calls(INFO, run, args, calls=20)
    return {"compile_s": compile_s, "iterations_per_ms": per_ms, **figures}


if __name__ == "__main__":
    print_figures(INFO, measure())
