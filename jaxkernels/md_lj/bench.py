"""`python -m jaxkernels.md_lj.bench`: steps per second of one process."""

from __future__ import annotations

import numpy as np

from ..timing import Figures, compile_kernel, print_figures, sample_args, time_calls
from .api import INFO, STEPS

CALL_STEPS = 100


def measure() -> Figures:
    run, compile_s = compile_kernel(INFO)
    args = (*sample_args(INFO)[:-1], np.int32(CALL_STEPS))
    figures = time_calls(INFO, run, args, calls=10)
    return {"compile_s": compile_s, **figures, "step_ms": figures["unit_ms_p50"] / STEPS}


if __name__ == "__main__":
    print_figures(INFO, measure())
