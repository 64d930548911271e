"""mc.pricing@1 in NumPy, float64, on the same random bits; and what is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..host import Array
from ..threefry import threefry
from .api import GROUPS, LANES


def normals(first: Array, second: Array) -> Array:
    """Box-Muller: radius from the upper 23 bits of one word, angle from 25 bits of the other."""
    u = ((first >> np.uint32(9)) + 0.5) * 2.0**-23
    turn = (second >> np.uint32(30)) - 0.5
    turn = turn + (((second >> np.uint32(7)) & np.uint32(0x7FFFFF)) + 0.5) * 2.0**-23
    return np.asarray(np.sqrt(-2 * np.log(u)) * np.cos(turn * (math.pi / 2)))


def samples(terms: Array, draw: Array) -> Array:
    """float64[LANES]: the discounted mean payoff of each lane's two paths."""
    spot, strike, drift, volatility, discount, sign = (float(term) for term in terms)
    dates, *key = (int(word) for word in draw)
    lanes = np.arange(LANES, dtype=np.uint32)
    walk, up, down = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
    for date in range(dates):
        counter = np.full(LANES, date, dtype=np.uint32)
        walk += normals(*threefry((key[0] % 2**32, key[1] % 2**32), counter, lanes))
        up += np.exp((date + 1) * drift + volatility * walk)
        down += np.exp((date + 1) * drift - volatility * walk)
    payoffs = [np.maximum(sign * (total / dates - strike), 0) for total in (up, down)]
    return np.asarray((payoffs[0] + payoffs[1]) / 2 * discount * spot)


def reference(terms: Array, draw: Array) -> tuple[Array, ...]:
    sample = samples(terms, draw)
    return tuple(x.reshape(-1, GROUPS).mean(axis=0) for x in (sample, sample * sample))


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """A spot price near 1, so that errors are in units of it; one to six dates."""
    terms = [
        rng.uniform(0.8, 1.2),
        rng.uniform(0.8, 1.2),
        rng.uniform(-0.02, 0.02),
        rng.uniform(0.05, 0.3),
        rng.uniform(0.9, 1.0),
        rng.choice([-1.0, 1.0]),
    ]
    draw = [rng.integers(1, 7), rng.integers(-(2**31), 2**31), rng.integers(0, 1000)]
    return np.array(terms, dtype=np.float32), np.array(draw, dtype=np.int32)


def error(outs: Sequence[Array], terms: Array, draw: Array) -> float:
    """Largest error of a group's mean, in units of the spot price (of a square: of its square)."""
    spot = float(terms[0])
    mean, square = reference(terms, draw)
    return float(max(np.abs(outs[0] - mean).max() / spot, np.abs(outs[1] - square).max() / spot**2))


def black_scholes(
    spot: float, strike: float, rate: float, dividend: float, volatility: float, years: float
) -> tuple[float, float]:
    """(call, put) of a European option: Black and Scholes 1973, Merton 1973 for dividends."""
    spread = volatility * math.sqrt(years)
    forward = spot * math.exp((rate - dividend) * years)
    d1 = math.log(forward / strike) / spread + spread / 2

    def normal_cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    discount = math.exp(-rate * years)
    call = discount * (forward * normal_cdf(d1) - strike * normal_cdf(d1 - spread))
    return call, call - discount * (forward - strike)
