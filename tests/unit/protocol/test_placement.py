"""How many units a lease gets, how many leases wait at a car, and from when one is timed."""

from __future__ import annotations

import pytest

from meshnode.protocol.placement import (
    LEASE_MS_LEAST,
    TURN_MS,
    UNTIMED_UNITS_MAX,
    Need,
    queued_runs,
    run_units,
)


def need(units_left: int, unit_ms: float, *, most: int = 1024, workers: int = 2) -> Need:
    return Need(units_left, unit_ms, most, 4_000, workers, 2)


@pytest.mark.parametrize(
    ("unit_ms", "rtt_us", "queued"),
    [
        (0.0, 0, 1),  # not yet timed
        (0.05, 0, 3),  # a lease of such units lasts LEASE_MS_LEAST
        (LEASE_MS_LEAST, 0, 3),
        (TURN_MS, 0, 1),
        (10_000.0, 0, 1),
        (10.0, 50_000, 6),  # a far car needs more of them to stay busy
    ],
)
def test_what_waits_covers_the_way_there_and_back(unit_ms: float, rtt_us: int, queued: int) -> None:
    assert queued_runs(unit_ms, rtt_us, 7) == queued
    assert queued_runs(unit_ms, rtt_us, 1) == 1
    assert queued_runs(unit_ms, rtt_us, 0) == 0


def test_leases_get_smaller_towards_the_end() -> None:
    left, sizes = 400, []
    while left:
        sizes.append(run_units(need(left, 10.0)))
        left -= sizes[-1]
    assert sizes[0] == 50 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_a_lease_lasts_neither_too_long_nor_too_short() -> None:
    assert run_units(need(100_000, 100.0)) == 40
    assert run_units(need(20, 0.5)) == int(LEASE_MS_LEAST / 0.5)
    assert run_units(need(100_000, 0.0)) == UNTIMED_UNITS_MAX
    assert run_units(need(3, 0.01, most=2)) == 2
    assert run_units(need(1, 60_000.0)) == 1
