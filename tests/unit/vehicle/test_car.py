"""The simulated car: its pack by hand, its trace, and what its sensors say along a week."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.vehicle.battery import Pack, PackSpec
from meshnode.vehicle.car import TracedCar
from meshnode.vehicle.trace import SHIPPED, WEEK_MIN, load_trace, minute_of_week

SPEC = PackSpec(60_000, 800)
WEEK = load_trace()


def pack(soc_permille: int) -> Pack:
    return Pack(SPEC, 60_000 * soc_permille)


# ---- the pack


def test_charging_by_hand() -> None:
    car = pack(500)
    car.run(3_600, 11_000, 0)
    assert car.charging == "charging" and car.power_w == 9_900  # 90 % of the wall's
    assert car.stored_mwh == 30_000_000 + 9_900_000
    assert car.grid_mwh == 11_000_000
    car.run(3 * 3_600, 11_000, 0)
    assert (car.soc_permille, car.charging, car.power_w) == (800, "complete", 0)


def test_a_load_is_carried_by_the_plug_first_then_by_the_pack() -> None:
    car = pack(800)
    car.run(3_600, 11_000, 900)
    assert (car.load_from_plug_mwh, car.load_from_pack_mwh) == (900_000, 0)
    assert (car.charging, car.soc_permille, car.grid_mwh) == ("complete", 800, 1_000_000)
    car.run(3_600, 500, 900)  # a weak plug: the pack gives the rest
    assert car.load_from_pack_mwh == 450_000 and car.charging == "discharging"
    car = pack(800)
    car.run(3_600, 0, 900)
    assert car.stored_mwh == 48_000_000 - 900_000 and car.power_w == -900


def test_a_full_pack_takes_little_and_an_empty_one_gives_nothing() -> None:
    full = Pack(PackSpec(60_000, 1_000), 60_000 * 990)
    full.run(60, 150_000, 0)
    assert full.power_w < 60_000 * 75 // 1_000
    empty = pack(0)
    empty.run(3_600, 0, 900)
    assert (empty.stored_mwh, empty.load_from_pack_mwh) == (0, 0)
    assert empty.drive(5) == 5  # what a trip wants and is not there


@given(
    st.integers(0, 1_000),
    st.lists(
        st.tuples(st.integers(1, 7_200), st.integers(0, 150_000), st.integers(0, 5_000)),
        max_size=6,
    ),
)
def test_no_energy_comes_from_nowhere(soc: int, steps: list[tuple[int, int, int]]) -> None:
    car = pack(soc)
    before_mwh = car.stored_mwh
    for seconds, charger_w, load_w in steps:
        car.run(seconds, charger_w, load_w)
        assert 0 <= car.stored_mwh <= car.capacity_mwh
    wall_mwh = car.grid_mwh * 900 // 1_000
    gone_mwh = car.load_from_pack_mwh + car.load_from_plug_mwh
    # A watt of the wall's power is rounded up in each step.
    rounding_mwh = 3 + sum(seconds for seconds, _, _ in steps) // 3
    assert abs(before_mwh + wall_mwh - gone_mwh - car.stored_mwh) <= rounding_mwh


# ---- the trace


def test_the_shipped_week_is_whole() -> None:
    assert WEEK.name == "commuter"
    stays = WEEK.stays
    for before, after in pairwise(stays):
        assert before.until_min + before.drive_min == after.from_min
    assert stays[-1].until_min == WEEK_MIN
    assert 16 <= sum(stay.drive_wh > 0 for stay in stays) <= 20
    driven_min = sum(stay.drive_min for stay in stays)
    assert 0.94 <= 1 - driven_min / WEEK_MIN <= 0.97  # parked for so much of it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("capacity_wh = 60000", "capacity_wh = 60"), "capacity_wh is a whole number from 1000"),
        (("capacity_wh = 60000", ""), "'capacity_wh' is missing"),
        (('at = "work"', 'at = "office"'), "at is one of home, public, work"),
        (('until = "Mon 17:05"', 'until = "Mon 07:05"'), "ends before it begins"),
        (('until = "Mon 17:05"', 'until = "Mon 25:05"'), "no time of the day"),
        (('until = "Mon 17:05"', 'until = "Mo 17:05"'), "no time such as 'Mon 07:30'"),
        (("drive_wh = 3400", "drive_wh = nan"), "drive_wh is a whole number"),
        (("drive_wh = 3400", "place = 5\ndrive_wh = 3400"), "place is nothing that a trace says"),
        (("ambient_c = [6, 14]", "ambient_c = [6]"), "is no trace"),
        (("name = ", "name "), "is no trace"),
    ],
)
def test_a_trace_that_is_none_is_one_line(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = tmp_path / "trace.toml"
    path.write_text(SHIPPED.read_text().replace(*change, 1))
    with pytest.raises(UsageError) as caught:
        load_trace(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_minutes_of_the_week() -> None:
    assert minute_of_week("Mon 00:00") == 0
    assert minute_of_week("Sun 23:59") == WEEK_MIN - 1


# ---- the car


def test_a_monday_of_the_commuter() -> None:
    car = TracedCar(WEEK)
    night = car.state(0)
    assert (night.parking, night.plugged, night.moving, night.ignition) == (
        "home",
        True,
        False,
        "off",
    )
    assert car.next_drive() == (7 * 3_600 + 1_800, 3_400)
    car.advance(7 * 3_600 + 1_800)
    driving = car.state(0)
    assert (driving.moving, driving.ignition, driving.plugged) == (True, "on", False)
    assert driving.parking is None and driving.parked_s is None
    car.advance(28 * 60)
    assert car.pack.soc_permille == (48_000 - 3_400) * 1_000 // 60_000
    work = car.state(0)
    assert (work.parking, work.plugged, work.moving, work.parked_s) == ("work", False, False, 0)
    car.advance(3_600, 500)
    assert car.state(0).pack_power_w == -500
    assert car.state(0).parked_s == 3_600


def test_weeks_repeat_and_steps_of_any_length_lead_to_the_same() -> None:
    one, other = TracedCar(WEEK), TracedCar(WEEK)
    one.advance(2 * WEEK_MIN * 60)
    for _ in range(2 * 7 * 24 * 4):
        other.advance(900)
    assert one.at_s == other.at_s == 2 * WEEK_MIN * 60
    assert abs(one.pack.stored_mwh - other.pack.stored_mwh) <= 200
    assert one.short_wh == other.short_wh == 0
    assert one.state(0).parking == other.state(0).parking == "home"
