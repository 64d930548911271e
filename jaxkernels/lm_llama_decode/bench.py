"""`python -m jaxkernels.lm_llama_decode.bench`: tokens per second of one process, warm.

Time depends on how many positions there are, not on what is at them, nor on the weights' values.
"""

from __future__ import annotations

import jax
import numpy as np

from ..timing import Figures, compile_kernel, print_figures, sample_args, time_calls
from .api import INFO
from .host import LENGTH

STEPS = 16


def measure() -> Figures:
    """`tok_per_s` generates, `prompt_tok_per_s` reads a prompt, which needs no logits."""
    run, compile_s = compile_kernel(INFO)
    *args, _ = sample_args(INFO)
    args = [
        array if arg.mapped else jax.device_put(array)
        for arg, array in zip(INFO.args, args, strict=True)
    ]
    at = [arg.name for arg in INFO.args].index("cursor")
    figures: Figures = {"compile_s": compile_s}
    for name, length in (("tok_per_s", 1), ("prompt_tok_per_s", STEPS + 1)):
        args[at] = args[at].copy()
        args[at][LENGTH] = length
        found = time_calls(INFO, run, [*args, np.int32(STEPS)], calls=10)
        assert INFO.stepped is not None
        figures[name] = found["units_per_s"] * INFO.stepped.steps_default
    return figures


if __name__ == "__main__":
    print_figures(INFO, measure())
