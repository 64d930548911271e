"""Parking traces against the published figures that they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from testnet.sim import parking
from testnet.sim.parking import DAY_S, KINDS, Stays, draw, events, leaves_within

WITHIN_S = (60.0, 900.0, 3_600.0, 14_400.0)
# E[min(stay, t)] / E[stay] over ElaadNL's whole tables of 101 quantiles, not over our 24.
PUBLISHED = {
    "home": (0.0014, 0.021, 0.083, 0.30),
    "work": (0.0026, 0.038, 0.15, 0.50),
    "public": (0.0021, 0.031, 0.116, 0.365),
}
# How far the traces may be from them: see the docstring of testnet/sim/parking.py.
TOLERANCE = {"home": 0.12, "work": 0.12, "public": 0.35}


@pytest.fixture(scope="module")
def week() -> Stays:
    return draw(12_000, 7 * DAY_S, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_give_the_published_chances_of_leaving(kind: str) -> None:
    for within, expected in zip(WITHIN_S, PUBLISHED[kind], strict=True):
        assert leaves_within(kind, within) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_car_at_a_random_parked_instant_leaves_as_published(week: Stays, kind: str) -> None:
    mine = week.kind == KINDS.index(kind)
    left = np.zeros(len(WITHIN_S))
    seen = 0
    for at in np.random.default_rng(2).uniform(0, 6.8 * DAY_S, 250):
        rest = week.leave_s[mine & week.parked_at(at)] - at
        seen += len(rest)
        left += [(rest < within).sum() for within in WITHIN_S]
    assert left / seen == pytest.approx(PUBLISHED[kind], rel=TOLERANCE[kind])


def hours(week: Stays, kind: str, weekend: bool) -> list[int]:
    mine = (week.kind == KINDS.index(kind)) & (week.arrive_s >= 0)
    at = week.arrive_s[mine]
    at = at[(at // DAY_S >= 5) == weekend]
    counts: list[int] = np.bincount((at % DAY_S // 3600).astype(int), minlength=24).tolist()
    return counts


def test_arrivals_peak_when_published(week: Stays) -> None:
    home, work = hours(week, "home", False), hours(week, "work", False)
    assert 17 <= int(np.argmax(home)) <= 18  # published: 18:15
    assert int(np.argmax(work)) == 8  # published: 08:45
    assert sum(home[1:5]) < 0.1 * sum(home)
    assert sum(hours(week, "work", True)) < 0.01 * sum(work)


def test_cars_are_parked_and_driven_as_published(week: Stays) -> None:
    stood = np.minimum(week.leave_s, week.until_s) - np.maximum(week.arrive_s, 0.0)
    share = [stood[week.kind == kind].sum() / week.cars / week.until_s for kind in range(3)]
    assert sum(share) == pytest.approx(0.96, abs=0.01)
    assert share[0] == pytest.approx(0.73, abs=0.04)
    trips = (week.arrive_s >= 0).sum() / week.cars
    assert trips == pytest.approx(18, abs=1.5)
    assert week.plugged.mean() == pytest.approx(parking.PLUGGED_SHARE, abs=0.01)


def test_events_are_the_stays_in_order_and_each_car_alternates() -> None:
    stays = draw(300, 2 * DAY_S, seed=7, start_s=5 * DAY_S)
    told = list(events(stays))
    assert [at for at, *_ in told] == sorted(at for at, *_ in told)
    assert sum(what == "arrive" for _, _, what, _ in told) == len(stays.car)
    where: dict[int, str] = {}
    for at, car, what, kind in told:
        assert 0 <= at <= stays.until_s
        if what == "arrive":
            assert car not in where
            where[car] = kind
        else:
            assert where.pop(car) == kind
    assert len(where) == int(stays.parked_at(stays.until_s).sum())


def test_the_same_seed_gives_the_same_trace() -> None:
    first, again, other = (list(events(draw(50, DAY_S, seed))) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("cars", "until", "plugged"), [(0, 1.0, 0.1), (1, -1.0, 0.1), (1, 1.0, 2.0), (10**8, 1e6, 0.1)]
)
def test_bad_input_is_named(cars: int, until: float, plugged: float) -> None:
    with pytest.raises(ValueError, match="parking"):
        draw(cars, until, seed=1, plugged=plugged)
