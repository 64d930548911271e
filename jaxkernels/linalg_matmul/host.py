"""Submitter's side of linalg.matmul@1: two matrices -> blocks, and blocks -> their product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import COLUMNS, INFO, INNER, ROWS

# Each block travels once for each unit that it is in; this bounds what a job lays on the disk.
STACKED_BYTES_MAX = 8 << 30


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: {"a": float32[m, k], "b": float32[k, n]}."""
    if not isinstance(inputs, Mapping) or set(inputs) != {"a", "b"}:
        raise BadInput(f"{INFO.spec} takes a table of `a` and `b`.")
    a, b = _check("a", inputs["a"]), _check("b", inputs["b"])
    if a.shape[1] != b.shape[0]:
        raise BadInput(f"`a` {a.shape} and `b` {b.shape} have no common inner dimension.")
    rows, inner, columns = blocks = (
        -(-a.shape[0] // ROWS),
        -(-a.shape[1] // INNER),
        -(-b.shape[1] // COLUMNS),
    )
    units = rows * columns * inner
    if units * INFO.mapped_bytes_per_unit > STACKED_BYTES_MAX:
        most = STACKED_BYTES_MAX // INFO.mapped_bytes_per_unit
        raise BadInput(f"The product is {units} blocks of {INFO.spec}; at most {most} fit a job.")
    stacks = (
        # [row block, column block, inner block]: the parts of one sum lie side by side
        np.broadcast_to(_cut(a, ROWS, INNER)[:, None], (rows, columns, inner, ROWS, INNER)),
        np.broadcast_to(
            _cut(b, INNER, COLUMNS).swapaxes(0, 1)[None], (rows, columns, inner, INNER, COLUMNS)
        ),
    )
    args = tuple(
        make_arg(arg, stack.reshape(units, *arg.shape), units)
        for arg, stack in zip(INFO.args, stacks, strict=True)
    )
    context = {"shape": [a.shape[0], b.shape[1]], "blocks": list(blocks)}
    return Prepared(INFO.spec, units, args, context)


def finish(outputs: Sequence[Array], context: Context) -> Array:
    """float32[m, n]; partial products along the inner dimension are added in float64."""
    rows, inner, columns = (int(count) for count in context["blocks"])
    parts = outputs[0].reshape(rows, columns, inner, ROWS, COLUMNS)
    whole = parts[:, :, 0] if inner == 1 else parts.sum(axis=2, dtype=np.float64)
    m, n = (int(length) for length in context["shape"])
    product = whole.transpose(0, 2, 1, 3).reshape(rows * ROWS, columns * COLUMNS)[:m, :n]
    return product.astype(np.float32)


def _cut(matrix: Array, height: int, width: int) -> Array:
    """[down, across, height, width], zeros where the matrix ends inside a block."""
    down, across = (-(-matrix.shape[0] // height), -(-matrix.shape[1] // width))
    if matrix.shape != (down * height, across * width):
        padded = np.zeros((down * height, across * width), dtype=np.float32)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        matrix = padded
    return matrix.reshape(down, height, across, width).swapaxes(1, 2)


def _check(name: str, given: Any) -> Array:
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise BadInput(f"`{name}` is not an array: {error}.") from error
    if array.ndim != 2 or 0 in array.shape:
        raise BadInput(f"`{name}` must be a matrix of at least one element, not {array.shape}.")
    if array.dtype != np.float32:
        raise BadInput(f"`{name}` must be float32, not {array.dtype}.")
    return array
