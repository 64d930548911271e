"""mc.pricing: known random bits, known prices, and units that share no number."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxkernels import host, registry, timing
from jaxkernels.errors import BadInput
from jaxkernels.mc_pricing.api import LANES, PATHS
from jaxkernels.mc_pricing.host import finish
from jaxkernels.mc_pricing.reference import black_scholes, normals, samples
from jaxkernels.threefry import threefry

MARKET = {"spot": 110.0, "rate": 0.05, "dividend": 0.02, "volatility": 0.25, "years": 0.75}


def test_normals_have_the_moments_of_normals() -> None:
    counter = np.arange(1 << 18, dtype=np.uint32)
    z = normals(*threefry((1, 2), counter, counter))
    error = 1 / math.sqrt(len(z))
    moments = [(z**power).mean() for power in (1, 2, 3, 4)]
    spreads = [1, math.sqrt(2), math.sqrt(15), math.sqrt(96)]
    for moment, exact, spread in zip(moments, (0, 1, 0, 3), spreads, strict=True):
        assert abs(moment - exact) < 5 * spread * error


@pytest.fixture(scope="module")
def price() -> Any:
    """Prices by the committed bytes, the context gone through JSON as in a journal."""
    run, _ = timing.compile_kernel(registry.get("mc.pricing@1"))

    def prices(inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
        prepared = host.prepare("mc.pricing@1", inputs, options)
        units = [run(*(arg.array[unit] for arg in prepared.args)) for unit in range(prepared.units)]
        outs = [np.stack(column) for column in zip(*units, strict=True)]
        found: dict[str, Any] = host.finish(
            "mc.pricing@1", outs, json.loads(json.dumps(prepared.context))
        )
        return found

    return prices


def test_european_options_cost_what_black_and_scholes_say(price: Any) -> None:
    book = [
        {"kind": f"european-{side}", "strike": strike}
        for side in ("call", "put")
        for strike in (80.0, 105.0, 130)
    ]
    found = price(book, {**MARKET, "paths": 2 * PATHS})
    exact = [
        black_scholes(strike=row["strike"], **MARKET)[row["kind"] == "european-put"]  # type: ignore[arg-type]
        for row in book
    ]
    off = (found["price"] - exact) / found["standard_error"]
    assert np.abs(off).max() < 4 and found["standard_error"].max() < 0.02
    # The error is told right: over six prices, not far below one standard deviation either.
    assert np.abs(off).max() > 0.1


def test_asian_options_keep_parity(price: Any) -> None:
    """call - put = discount * (mean of the forwards - strike), exactly known."""
    dates, strike = 7, 112.0
    book = [{"kind": "asian-call"}, {"kind": "asian-put"}, {"kind": "asian-call", "dates": 1}]
    found = price(book, {**MARKET, "strike": strike, "dates": dates, "paths": PATHS})
    call, put, one_date = found["price"]
    growth = (MARKET["rate"] - MARKET["dividend"]) * MARKET["years"]
    mean = MARKET["spot"] * np.exp(growth * np.arange(1, dates + 1) / dates).mean()
    exact = math.exp(-MARKET["rate"] * MARKET["years"]) * (mean - strike)
    error = math.hypot(*found["standard_error"][:2])
    assert abs(call - put - exact) < 4 * error
    european = black_scholes(strike=strike, **MARKET)[0]
    assert abs(one_date - european) < 4 * found["standard_error"][2]
    assert call < european - 1  # a mean varies less than its last term


def test_units_draw_apart_and_again_the_same() -> None:
    terms, _ = (arg.array[0] for arg in host.prepare("mc.pricing@1", PATHS).args)
    first, again, other, reseeded = (
        samples(terms, np.array([1, seed, unit], np.int32))
        for seed, unit in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert (first == again).all()
    for apart in (other, reseeded):
        assert abs(np.corrcoef(first, apart)[0, 1]) < 5 / math.sqrt(LANES)


def test_a_sum_of_a_million_keeps_its_digits() -> None:
    """Row by row in plain float32, a group of these is off by 2.8e-6."""
    from jaxkernels.mc_pricing.kernel import group_means

    x = (1 + np.random.default_rng(0).random(LANES) * 1e-3).astype(np.float32)
    means = np.asarray(group_means(jax.numpy.asarray(x)), dtype=np.float64)
    exact = x.reshape(-1, len(means)).mean(axis=0, dtype=np.float64)
    assert np.abs(means / exact - 1).max() < 1.2e-7


def test_standard_error_counts_pairs() -> None:
    mean, square = np.full((2, 128), 2.0, np.float32), np.full((2, 128), 5.0, np.float32)
    found = finish((mean, square), {"units_each": 2})
    assert found["price"].tolist() == [2.0]
    assert found["standard_error"][0] == pytest.approx(1 / math.sqrt(2 * LANES), rel=1e-5)


@pytest.mark.parametrize(
    ("inputs", "options", "word"),
    [
        (0, {}, "paths"),
        ([], {}, "list of tables"),
        ("call", {}, "list of tables"),
        ([{"strike": 1.0, "barrier": 2.0}], {}, "barrier"),
        ([{"strike": "low"}], {}, "strike"),
        ([{"strike": -5}], {}, "strike"),
        ([{"volatility": float("nan")}], {}, "volatility"),
        ([{"dates": 2.5}], {}, "dates"),
        ([{"kind": "bermudan"}], {}, "kind"),
        ([{}], {"volatility": 5.0, "years": 90.0}, "too large"),
        ([{}], {"seed": 1 << 31}, "seed"),
        ([{}], {"paths": 1 << 60}, "units"),
    ],
)
def test_bad_options_are_one_clear_line(inputs: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        host.prepare("mc.pricing@1", inputs, options)
    assert "\n" not in str(caught.value)
