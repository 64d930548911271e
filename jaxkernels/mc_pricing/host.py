"""Submitter's side of mc.pricing@1: options on a stock -> units of paths, and back to prices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import UNITS_MAX, Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import DATES_MAX, GROUPS, INFO, KINDS, LANES, PATHS

# What one option of a list may say for itself; the rest holds for the whole job.
TERMS = ("kind", "spot", "strike", "rate", "dividend", "volatility", "years", "dates")


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: a number of paths of the option that `options` describes, or a list of tables.

    A table sets what it names (`TERMS`), and `options` the rest. Units of one option lie side by
    side; each has its own number, so that all draw different numbers.
    """
    if isinstance(inputs, int) and not isinstance(inputs, bool):
        book: Sequence[Mapping[str, Any]] = [{}]
        paths = inputs
    elif isinstance(inputs, list) and inputs and all(isinstance(row, Mapping) for row in inputs):
        book, paths = inputs, options["paths"]
    else:
        raise BadInput(f"{INFO.spec} takes a number of paths or a list of tables, one an option.")
    seed = options["seed"]
    if not -(2**31) <= seed < 2**31:
        raise BadInput(f"Option seed must be a 32-bit integer, not {seed}.")
    each = -(-paths // PATHS)
    if each < 1 or each * len(book) > UNITS_MAX:
        raise BadInput(f"{paths} paths of {len(book)} options are not 1 to {UNITS_MAX} units.")
    rows = [_terms(number, row, options) for number, row in enumerate(book)]
    units = each * len(book)
    terms = np.repeat(np.array([row[0] for row in rows], dtype=np.float32), each, axis=0)
    draw = np.zeros((units, 3), dtype=np.int32)
    draw[:, 0] = np.repeat([row[1] for row in rows], each)
    draw[:, 1] = seed
    draw[:, 2] = np.arange(units)
    args = tuple(make_arg(arg, a, units) for arg, a in zip(INFO.args, (terms, draw), strict=True))
    return Prepared(INFO.spec, units, args, {"units_each": each})


def finish(outputs: Sequence[Array], context: Context) -> dict[str, Array]:
    """`price` and `standard_error`, float64[options], in the order of the options."""
    each = int(context["units_each"])
    mean, square = (
        out.astype(np.float64).reshape(-1, each * GROUPS).mean(axis=1) for out in outputs
    )
    # Of the means of pairs: two paths of a pair are not independent, two pairs are.
    count = each * LANES
    variance = np.maximum(square - mean * mean, 0) * count / (count - 1)
    return {"price": mean, "standard_error": np.sqrt(variance / count)}


def _terms(number: int, row: Mapping[str, Any], options: Options) -> tuple[list[float], int]:
    """One option's arguments, computed in float64 and rounded once; and its number of dates."""
    for name, value in row.items():
        if name not in TERMS:
            raise BadInput(f"Row {number} has {name!r}; it may have: {', '.join(TERMS)}.")
        types = str if name == "kind" else int if name == "dates" else (int, float)
        if isinstance(value, bool) or not isinstance(value, types):
            raise BadInput(f"Row {number}: {name} cannot be {value!r}.")
    given = {name: row.get(name, options[name]) for name in TERMS}
    kind, dates = given["kind"], given["dates"]
    if kind not in KINDS:
        raise BadInput(f"Row {number}: kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    spot, strike, rate, dividend, volatility, years = (float(given[name]) for name in TERMS[1:7])
    bounds = {"spot": (spot, 1e-6, 1e9), "strike": (strike, spot / 1e3, spot * 1e3)}
    bounds |= {"rate": (rate, -1, 1), "dividend": (dividend, -1, 1)}
    bounds |= {"volatility": (volatility, 1e-4, 5), "years": (years, 1e-4, 100)}
    bounds |= {"dates": (dates, 1, DATES_MAX)}
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:  # false for NaN, too
            raise BadInput(f"Row {number}: {name} must be {least:g} to {most:g}, not {value}.")
    if kind.startswith("european"):
        dates = 1
    step = years / dates
    drift = (rate - dividend - volatility**2 / 2) * step
    spread = volatility * math.sqrt(step)
    # its exponential, squared, has to stay inside float32, for all of 6 standard deviations
    if abs(drift * dates) + 6 * volatility * math.sqrt(years) > 20:
        raise BadInput(f"Row {number}: volatility and rates over {years} years are too large.")
    sign = 1.0 if kind.endswith("call") else -1.0
    return [spot, strike / spot, drift, spread, math.exp(-rate * years), sign], dates
