"""mc.pricing@1 in JAX: one loop over the dates, 2^19 lanes in each array.

Bits have to be the same whatever the compiler fuses. So the trend of a date comes in through a
factor, not a sum (in `a * b + c * d` either product may join the fused multiply-add), and the mean
over the dates is a product with the inverse (XLA may or may not make one of a quotient).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..threefry import threefry
from .api import DATES_MAX, GROUPS, LANES

SUM_LANES = (8192, GROUPS)  # of the two passes of `group_means`


def _centre(bits: jax.Array) -> jax.Array:
    """23 bits -> the middle of one of 2^23 equal parts of (0, 1), exact in float32."""
    centre: jax.Array = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return centre


def normals(first: jax.Array, second: jax.Array) -> jax.Array:
    """One standard normal for each pair of words (Box-Muller, the cosine's half).

    Two bits choose the quadrant and 23 the angle inside it, so that the cosine is a short Taylor
    series up to pi/4 (remainder under 3e-8) and needs no reduction of its argument: with XLA CPU's
    own cosine the normals take four times as long.
    """
    radius = jnp.sqrt(-2 * jnp.log(_centre(first >> 9)))
    quadrant = second >> 30
    t = (_centre((second >> 7) & jnp.uint32(0x7FFFFF)) - 0.5) * jnp.float32(math.pi / 2)
    t2 = t * t
    sine = t * (1 + t2 * (-1 / 6 + t2 * (1 / 120 + t2 * (-1 / 5040 + t2 * (1 / 362880)))))
    cosine = 1 + t2 * (-1 / 2 + t2 * (1 / 24 + t2 * (-1 / 720 + t2 * (1 / 40320))))
    value = jnp.where((quadrant & 1) == 1, sine, cosine)
    return radius * jnp.where((quadrant == 1) | (quadrant == 2), -value, value)


def group_means(x: jax.Array) -> jax.Array:
    """float32[LANES] -> the means of GROUPS interleaved groups, rows added with compensation.

    Two passes, 64 rows and 64 rows, so that either pass has few turns and short arrays.
    """
    for lanes in SUM_LANES:
        rows = x.reshape(-1, lanes)

        def add(state: tuple[jax.Array, jax.Array], row: jax.Array) -> Any:
            total, lost = state
            term = row - lost
            grown = total + term
            return (grown, (grown - total) - term), None

        (x, _), _ = jax.lax.scan(add, (jnp.zeros(lanes), jnp.zeros(lanes)), rows)
    means: jax.Array = x * jnp.float32(GROUPS / LANES)
    return means


def kernel(terms: jax.Array, draw: jax.Array) -> tuple[jax.Array, ...]:
    spot, strike, drift, volatility, discount, sign = (terms[i] for i in range(6))
    dates = jnp.clip(draw[0], 1, DATES_MAX)
    key = (draw[1].astype(jnp.uint32), draw[2].astype(jnp.uint32))
    lanes = jnp.arange(LANES, dtype=jnp.uint32)

    def turn(date: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        walk, up, down = state
        counter = jnp.broadcast_to(date.astype(jnp.uint32), (LANES,))
        walk = walk + normals(*threefry(key, counter, lanes))
        trend = jnp.exp(drift * (date + 1).astype(jnp.float32))
        up = up + trend * jnp.exp(volatility * walk)
        return walk, up, down + trend * jnp.exp(-volatility * walk)

    none = jnp.zeros(LANES, jnp.float32)
    _, up, down = jax.lax.fori_loop(0, dates, turn, (none, none, none))
    share = 1 / dates.astype(jnp.float32)

    def payoff(total: jax.Array) -> jax.Array:
        return jnp.maximum(sign * (total * share - strike), 0)

    sample = (payoff(up) + payoff(down)) * (0.5 * discount * spot)
    return group_means(sample), group_means(sample * sample)
