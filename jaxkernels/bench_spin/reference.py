"""bench.spin@1 without spinning: n steps of the generator at once, in O(log n).

n steps are x * a^n + c * (1 + a + ... + a^(n-1)); both follow from squaring the affine map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..host import Array
from .api import INCREMENT, MULTIPLIER

MODULUS = 1 << 32


def state_after(steps: int) -> int:
    factor, term = 1, 0  # the identity map
    step_factor, step_term = MULTIPLIER, INCREMENT
    while steps > 0:
        if steps & 1:
            factor, term = (
                factor * step_factor % MODULUS,
                (term * step_factor + step_term) % MODULUS,
            )
        step_factor, step_term = (
            step_factor * step_factor % MODULUS,
            (step_term * step_factor + step_term) % MODULUS,
        )
        steps >>= 1
    return term


def reference(iterations: Array) -> tuple[Array, ...]:
    return (np.array([state_after(int(iterations[0])) >> 8], dtype=np.float32),)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    return (rng.integers(1, 100_000, size=1, dtype=np.int32),)


def error(outs: Sequence[Array], *args: Any) -> float:
    """Largest absolute difference from the reference."""
    return float(np.max(np.abs(outs[0].astype(np.float64) - reference(*args)[0])))
