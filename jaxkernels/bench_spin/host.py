"""Submitter's side of bench.spin@1: how many units, how many ms each -> iterations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import UNITS_MAX, Array, Context, Options, Prepared, make_arg, stack_plain
from ..models import Model
from .api import INFO, ITERATIONS_MAX, ITERATIONS_PER_MS_HINT, MS_DEFAULT

CALIBRATE_ROUNDS_MAX = 24


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: a number of units that spin `ms` each, or the iterations as int32[units, 1]."""
    if not isinstance(inputs, int):
        return stack_plain(INFO, inputs)
    if not 1 <= inputs <= UNITS_MAX:
        raise BadInput(f"The number of units must be 1 to {UNITS_MAX}, not {inputs}.")
    ms = options["ms"]
    iterations = round(ms * options["iterations_per_ms"])
    if not 0 <= iterations <= ITERATIONS_MAX:
        raise BadInput(f"{ms} ms is {iterations} iterations; at most {ITERATIONS_MAX} fit a unit.")
    array = np.full((inputs, 1), iterations, dtype=np.int32)
    return Prepared(INFO.spec, inputs, (make_arg(INFO.args[0], array, inputs),), {})


def finish(outputs: Sequence[Array], context: Context) -> Array:
    return outputs[0][:, 0]


def calibrate(measure_s: Callable[[int], float], ms: float = MS_DEFAULT) -> float:
    """Iterations per ms of the machine behind `measure_s(iterations) -> seconds`.

    Doubles until a call lasts at least `ms`, then takes the slope between that call and one of half
    the length, so that the constant cost of a call does not count.
    """
    iterations = 1024
    for _ in range(CALIBRATE_ROUNDS_MAX):
        if measure_s(iterations) * 1e3 >= ms or iterations * 2 > ITERATIONS_MAX:
            break
        iterations *= 2
    whole_s = min(measure_s(iterations) for _ in range(3))
    half_s = min(measure_s(iterations // 2) for _ in range(3))
    slope_ms = (whole_s - half_s) * 1e3
    if slope_ms <= 0:
        return float(ITERATIONS_PER_MS_HINT)
    return (iterations - iterations // 2) / slope_ms
