"""linalg.matmul@1 in NumPy, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..host import Array
from .api import COLUMNS, INNER, ROWS


def reference(a: Array, b: Array) -> tuple[Array, ...]:
    return (a.astype(np.float64) @ b.astype(np.float64),)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """Elements of the product have variance 1."""
    scale = np.float32(INNER**-0.5)
    return (
        rng.standard_normal((ROWS, INNER), dtype=np.float32) * scale,
        rng.standard_normal((INNER, COLUMNS), dtype=np.float32),
    )


def error(outs: Sequence[Array], a: Array, b: Array) -> float:
    """Largest absolute error of an element, over the largest element."""
    exact = reference(a, b)[0]
    return float(np.abs(outs[0] - exact).max() / np.abs(exact).max())
