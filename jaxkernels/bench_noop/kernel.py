"""bench.noop@1 in JAX: y = x + 1."""

from __future__ import annotations

import jax


def kernel(x: jax.Array) -> tuple[jax.Array, ...]:
    return (x + 1.0,)
