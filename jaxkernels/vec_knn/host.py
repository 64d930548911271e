"""Submitter's side of vec.knn@1: vectors and queries in, the closest rows of each query out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import UNITS_MAX, Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import INFO, QUERIES, ROWS, TOP, WIDTH


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: {"queries": float32[1..8, 384], "vectors": float32[n, 384]}."""
    if not isinstance(inputs, Mapping) or set(inputs) != {"queries", "vectors"}:
        raise BadInput(f"{INFO.spec} takes a table of `queries` and `vectors`.")
    top = options["top"]
    if not 1 <= top <= TOP:
        raise BadInput(f"Option top must be 1 to {TOP}, not {top!r}.")
    queries = _check("queries", inputs["queries"], QUERIES)
    vectors = _check("vectors", inputs["vectors"], UNITS_MAX * ROWS)
    units = -(-len(vectors) // ROWS)
    if len(vectors) == units * ROWS:
        corpus = vectors  # whole blocks need no copy
    else:
        corpus = np.zeros((units * ROWS, WIDTH), dtype=np.float32)
        corpus[: len(vectors)] = vectors
    filled = np.zeros((QUERIES, WIDTH), dtype=np.float32)
    filled[: len(queries)] = queries
    valid = np.full((units, 1), ROWS, dtype=np.int32)
    valid[-1, 0] = len(vectors) - (units - 1) * ROWS
    arrays = (filled, corpus.reshape(units, ROWS, WIDTH), valid)
    args = tuple(make_arg(arg, a, units) for arg, a in zip(INFO.args, arrays, strict=True))
    return Prepared(INFO.spec, units, args, {"queries": len(queries), "top": top})


def finish(outputs: Sequence[Array], context: Context) -> tuple[Array, Array]:
    """(scores, rows), each [queries, top] or fewer where the corpus is smaller; best first."""
    scores, indices = outputs
    units = len(scores)
    first = np.arange(units, dtype=np.int64)[:, None, None] * ROWS
    rows = np.where(indices >= 0, indices + first, -1)
    # [units, queries, TOP] -> [queries, units * TOP], in row order within equal scores
    flat_scores = scores.transpose(1, 0, 2).reshape(QUERIES, units * TOP)
    flat_rows = rows.transpose(1, 0, 2).reshape(QUERIES, units * TOP)
    count, top = int(context["queries"]), int(context["top"])
    order = np.argsort(-flat_scores, axis=1, kind="stable")[:count, :top]
    best = np.take_along_axis(flat_scores[:count], order, axis=1)
    named = np.take_along_axis(flat_rows[:count], order, axis=1)
    there = int((named[0] >= 0).sum())  # padding is last, and the same for each query
    return best[:, :there], named[:, :there]


def _check(name: str, given: Any, rows_max: int) -> Array:
    array = np.asarray(given)
    if array.ndim != 2 or array.shape[1] != WIDTH or not 1 <= len(array) <= rows_max:
        raise BadInput(f"`{name}` must be 1 to {rows_max} rows of {WIDTH}, not {array.shape}.")
    if array.dtype != np.float32:
        raise BadInput(f"`{name}` must be float32, not {array.dtype}.")
    if not np.isfinite(array).all():
        # A NaN would sort above every score and win.
        raise BadInput(f"`{name}` holds NaN or infinity.")
    return array
