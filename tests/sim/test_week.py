"""Hours of cars with batteries on the real machines: floors hold, energy adds up, work pays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from meshnode.vehicle.trace import WEEK_MIN
from testnet.sim import parking
from testnet.sim.week import simulate_week, trace_of
from tests import json_shape


def test_hours_of_cars_with_batteries() -> None:
    found = simulate_week(8, 0.6, 3, 0.15)
    assert found.done == found.tasks > 40
    assert (found.below_floor_min, found.reserve_missed, found.short_wh) == (0, 0, 0)
    # What receipts say, and what the driver ended, is what the packs and plugs gave: a mWh a
    # channel may wait for its next receipt.
    assert 0 <= found.work_mwh - found.receipts_mwh - found.unpaid_mwh <= 8 + found.recalls
    assert found.income_permille_least >= 970  # a tariff that rises within a run is not foreseen
    assert abs(sum(found.shares.values()) - 1) < 0.01
    assert {"version": 1, **found.fields()}.keys() == json_shape.schema_of("testnet-sim-vehicles")[
        "properties"
    ].keys()


def test_the_same_seed_is_the_same_week() -> None:
    one, other, third = (simulate_week(6, 0.5, seed, 0.05) for seed in (5, 5, 6))
    assert one.digest == other.digest != third.digest
    assert one.cost_nano == other.cost_nano


@pytest.mark.long
@pytest.mark.parametrize(("load", "days"), [(0.1, 0.5), (0.8, 0.08)])
def test_hours_of_cars_at_little_and_at_much_load(load: float, days: float) -> None:
    found = simulate_week(8, load, 7, days)
    assert (found.below_floor_min, found.reserve_missed, found.short_wh) == (0, 0, 0)
    assert found.done >= 0.98 * found.tasks
    assert 0 <= found.work_mwh - found.receipts_mwh - found.unpaid_mwh <= 8 + found.recalls


def test_a_drawn_week_becomes_a_trace_without_gaps() -> None:
    stays = parking.draw(8, 7 * parking.DAY_S, 1, plugged=0.4)
    for number in range(8):
        rows = trace_of(number, stays).stays
        assert rows[0].from_min == 0 and rows[-1].until_min == WEEK_MIN and not rows[-1].drive_min
        for before, after in pairwise(rows):
            assert before.until_min + before.drive_min == after.from_min
        drawn = np.flatnonzero(stays.car == number)
        assert len(rows) == len(drawn) or abs(len(rows) - len(drawn)) <= 1
