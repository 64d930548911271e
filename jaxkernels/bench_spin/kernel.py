"""bench.spin@1 in JAX: one while loop whose trip count is data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .api import INCREMENT, MULTIPLIER


def kernel(iterations: jax.Array) -> tuple[jax.Array, ...]:
    def step(_: jax.Array, state: jax.Array) -> jax.Array:
        stepped: jax.Array = state * jnp.uint32(MULTIPLIER) + jnp.uint32(INCREMENT)
        return stepped

    state = jax.lax.fori_loop(0, iterations[0], step, jnp.zeros((1,), jnp.uint32))
    # The upper 24 bits: what float32 holds exactly, and the better ones of such a generator.
    return ((state >> 8).astype(jnp.float32),)
