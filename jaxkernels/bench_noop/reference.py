"""bench.noop@1 in NumPy: y = x + 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..host import Array


def reference(x: Array) -> tuple[Array, ...]:
    return (x + np.float32(1),)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    return (rng.standard_normal(16).astype(np.float32),)


def error(outs: Sequence[Array], *args: Any) -> float:
    """Largest absolute difference from the reference."""
    return float(np.max(np.abs(outs[0].astype(np.float64) - reference(*args)[0])))
