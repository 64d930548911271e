"""The drawn fleets: the shape that docstrings state, and the same for the same seed."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from testnet.sim.network import (
    CELL_CARS_MAX,
    CONTINENTS,
    JITTER,
    LAST_MILE_MEDIAN_US,
    METRO_CORE_US,
    MODELS,
    SEA_US,
    draw,
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cars", [1, 2, 700, 12_000])
def test_every_car_stands_in_one_cell_of_bounded_size(model: str, cars: int) -> None:
    network = draw(model, cars, seed=3)
    assert len(network.places) == len(network) == cars
    assert sorted(car for cell in network.cells.values() for car in cell) == list(range(cars))
    assert max(map(len, network.cells.values())) <= CELL_CARS_MAX
    for cell, members in network.cells.items():
        assert {network.places[car].cell for car in members} == {cell}


def test_models_differ_in_reach() -> None:
    metro, region, world = (draw(model, 10_000, seed=1) for model in MODELS)
    assert len(metro.cells) > 4 and len(region.cells) > 10
    assert {place.continent for place in region.places} == {2}
    assert {place.continent for place in world.places} == set(range(len(CONTINENTS)))
    assert metro.rtt_us(0, 9_999) < 500_000
    first, last = 0, 9_999
    assert world.rtt_us(first, last) > min(row for row in SEA_US[0] if row)


def test_the_round_trip_is_two_last_miles_and_a_core() -> None:
    network = draw("continents", 5_000, seed=2)
    a, b = next(iter(network.cells.values()))[:2]
    miles = [network.places[car].last_mile_us for car in (a, b)]
    assert network.rtt_us(a, b) == network.rtt_us(b, a) == sum(miles) + METRO_CORE_US
    rng = random.Random(1)
    for other in (b, 4_999):
        ways = [network.one_way_us(a, other, rng) for _ in range(500)]
        half = network.rtt_us(a, other) / 2
        assert half * (1 - JITTER) - 1 <= min(ways) < half < max(ways) <= half * (1 + JITTER)


def test_last_miles_are_the_stated_mix() -> None:
    miles = draw("region", 200_000, seed=5).arrays()["last_mile_us"]
    # the quantiles of the mix of three log-normals, by a second way: a big sample of each
    rng = np.random.default_rng(0)
    parts = [
        median * np.exp(0.4 * rng.standard_normal(count))
        for median, count in zip(LAST_MILE_MEDIAN_US, (70_000, 70_000, 60_000), strict=True)
    ]
    for share in (0.1, 0.5, 0.9):
        expected = np.quantile(np.concatenate(parts), share)
        assert np.quantile(miles, share) == pytest.approx(expected, rel=0.03)


def test_neighbours_are_other_cells_the_nearest_first() -> None:
    network = draw("continents", 20_000, seed=4)
    cells = list(network.cells)
    near = network.neighbours(cells[7], 12)
    assert len(near) == 12 and cells[7] not in near
    rows = [network.core_us(7, cells.index(name)) for name in near]
    assert rows == sorted(rows)
    left = [network.core_us(7, n) for n in range(len(cells)) if n != 7 and cells[n] not in near]
    assert rows[-1] <= min(left)
    assert network.neighbours(cells[7], 3) == near[:3]
    assert len(network.neighbours(cells[7], 10_000)) == len(cells) - 1
    for cell, row in zip(cells, network.nearest_cells(12), strict=True):
        assert [cells[other] for other in row] == network.neighbours(cell, 12)


def test_the_same_seed_draws_the_same_fleet_whatever_the_hash_seed() -> None:
    program = (
        "import hashlib; from testnet.sim.network import draw; n = draw('continents', 3000, 9);"
        "print(hashlib.sha256(repr((n.places, n.neighbours(n.places[0].cell, 9))).encode())"
        ".hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert draw("metro", 100, 1).places != draw("metro", 100, 2).places


@pytest.mark.parametrize(("model", "cars"), [("planet", 10), ("metro", 0)])
def test_bad_input_is_named(model: str, cars: int) -> None:
    with pytest.raises(ValueError, match="network"):
        draw(model, cars, seed=1)
