"""`python -m jaxkernels.mc_pricing.bench`: paths per second of one process, for 1 and 16 dates."""

from __future__ import annotations

import numpy as np

from ..timing import Figures, compile_kernel, print_figures, time_calls
from .api import INFO, PATHS

# spot, strike / spot, drift, volatility, discount, sign: a call at the money
TERMS = np.array([100.0, 1.0, 0.01, 0.2, 0.97, 1.0], dtype=np.float32)
DATES = 16


def draw(dates: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array([dates, 7, 0], dtype=np.int32)


def measure() -> Figures:
    run, compile_s = compile_kernel(INFO)
    figures = time_calls(INFO, run, (TERMS, draw(1)), calls=30)
    asian = time_calls(INFO, run, (TERMS, draw(DATES)), calls=10)
    return {
        "compile_s": compile_s,
        **figures,
        "paths_per_s": figures["units_per_s"] * PATHS,
        f"unit_ms_p50_{DATES}_dates": asian["unit_ms_p50"],
    }


if __name__ == "__main__":
    print_figures(INFO, measure())
