"""What VSS paths mean: tables of values, and any value of any type on any path."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.budget import VehicleState
from meshnode.vehicle.vss import signals as vss
from meshnode.vehicle.vss.signals import has_our_unit, matched, readings

NOW_MS = 1_767_614_400_000  # 5 January 2026, 12:00 UTC
EVENING = "2026-01-05T18:30:00Z"
EVENING_MS = NOW_MS + (6 * 60 + 30) * 60_000


def reading(name: str, **values: Any) -> Any:
    """Of a car that has these signals; `CHARGE=80.0` for the path `vss.CHARGE`."""
    return readings({getattr(vss, key): value for key, value in values.items()}, NOW_MS)[name]


def test_what_is_provided_is_told_and_nothing_else() -> None:
    assert set(readings({}, NOW_MS)) == vss.PROVIDES
    assert set(readings({}, NOW_MS).values()) == {None}
    VehicleState(at_ms=NOW_MS, **readings({}, NOW_MS))


def test_no_path_tells_who_or_where() -> None:
    """Nor what the car did: a path that is not in the table is never asked for."""
    assert not [
        path
        for path in vss.PATHS
        for word in ("Location", "Identification", "VIN", "Distance", "Driver", "Evse", "Occupied")
        if word in path
    ]


@pytest.mark.parametrize(
    ("name", "path", "value", "meaning"),
    [
        ("soc_permille", "CHARGE", 80.0, 800),
        ("soc_permille", "CHARGE", 79.95999908447266, 800),  # a float of 32 bits
        ("soc_permille", "CHARGE", 0, 0),
        ("soc_permille", "CHARGE", 100, 1000),
        ("soc_permille", "CHARGE", 100.1, None),
        ("soc_permille", "CHARGE", -0.1, None),
        ("soc_permille", "CHARGE", math.nan, None),
        ("soc_permille", "CHARGE", math.inf, None),
        ("soc_permille", "CHARGE", True, None),
        ("soc_permille", "CHARGE", "80", None),
        ("soc_permille", "CHARGE", None, None),
        ("usable_wh", "ENERGY", 48.25, 48_250),
        ("usable_wh", "ENERGY", 48_250.0, None),  # Wh
        ("capacity_wh", "CAPACITY", 60, 60_000),
        ("capacity_wh", "CAPACITY", 0, None),
        ("capacity_wh", "CAPACITY", 60_000, None),  # Wh
        ("pack_power_w", "POWER", -310.4, -310),
        ("pack_power_w", "POWER", 2e6, None),
        ("charge_limit_permille", "CHARGE_LIMIT", 80, 800),
        ("charge_limit_permille", "CHARGE_LIMIT", 0.8, None),  # a fraction
        ("charge_limit_permille", "CHARGE_LIMIT", 0, None),
        ("ambient_dc", "AMBIENT", -12.34, -123),
        ("ambient_dc", "AMBIENT", 291.0, None),  # kelvin
        ("low_voltage_mv", "LOW_VOLTAGE", 12.65, 12_650),
        ("low_voltage_mv", "LOW_VOLTAGE", 12_650.0, None),  # mV
        ("plugged", "CABLE_4", True, True),
        ("plugged", "CABLE_5", False, False),
        ("plugged", "CABLE_5", 1, None),
        ("moving", "MOVING", True, True),
        ("moving", "MOVING", False, False),
        ("moving", "MOVING", 0, None),
        ("moving", "SPEED", 0.0, False),
        ("moving", "SPEED", 0.4, False),
        ("moving", "SPEED", 0.5, True),
        ("moving", "SPEED", -3.0, True),
        ("moving", "SPEED", math.nan, None),
        ("ignition", "IGNITION", "UNDEFINED", None),
        ("ignition", "IGNITION", "LOCK", "off"),
        ("ignition", "IGNITION", "OFF", "off"),
        ("ignition", "IGNITION", "ACC", "acc"),
        ("ignition", "IGNITION", "ON", "on"),
        ("ignition", "IGNITION", "START", "on"),
        ("ignition", "IGNITION", "off", None),
        ("ignition", "IGNITION", False, None),
        ("ignition", "IGNITION", 2, None),
    ],
)
def test_one_signal(name: str, path: str, value: Any, meaning: Any) -> None:
    assert reading(name, **{path: value}) == meaning


@pytest.mark.parametrize(
    ("moving", "speed", "meaning"),
    [
        (False, 30.0, True),  # either is enough to stop
        (True, 0.0, True),
        (False, 0.0, False),
        (False, math.nan, False),
        (None, 0.0, False),
        (None, 30.0, True),
    ],
)
def test_a_car_moves_if_anything_says_so(moving: Any, speed: float, meaning: bool) -> None:
    assert reading("moving", MOVING=moving, SPEED=speed) is meaning


@pytest.mark.parametrize(
    ("older", "newer", "meaning"),
    [(True, True, True), (False, True, None), (None, True, True), (False, "no", False)],
)
def test_a_cable_that_is_in_and_out_is_unknown(older: Any, newer: Any, meaning: Any) -> None:
    assert reading("plugged", CABLE_4=older, CABLE_5=newer) is meaning


FULL = {"CHARGING": False, "CABLE_5": True, "CHARGE": 79.6, "CHARGE_LIMIT": 80}


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        ({}, None),
        ({"DISCHARGING": False}, None),
        ({"CHARGING": True}, "charging"),
        ({"CHARGING": True, "DISCHARGING": False}, "charging"),
        ({"DISCHARGING": True}, "discharging"),
        ({"CHARGING": False, "DISCHARGING": True}, "discharging"),
        ({"CHARGING": True, "DISCHARGING": True}, None),
        ({"CHARGING": False}, "no"),
        (FULL, "complete"),
        (FULL | {"POWER": -40.0}, "complete"),
        (FULL | {"POWER": -300.0}, "no"),  # the battery feeds the car, not the plug
        (FULL | {"CABLE_5": False}, "no"),
        (FULL | {"CABLE_5": None}, "no"),
        (FULL | {"CHARGE": 78.9}, "no"),
        (FULL | {"CHARGE": math.nan}, "no"),
        (FULL | {"CHARGE_LIMIT": 0.8}, "no"),  # a limit that is none is no low limit
        (FULL | {"CHARGE_LIMIT": None, "CHARGE": 99.5}, "complete"),
        (FULL | {"DISCHARGING": True}, "discharging"),
    ],
)
def test_charging(values: dict[str, Any], meaning: str | None) -> None:
    assert reading("charging", **values) == meaning


@pytest.mark.parametrize(
    ("low", "high", "average", "meaning"),
    [
        (18.0, 22.5, 20.0, (180, 225)),
        (None, None, 20.0, (200, 200)),
        (math.nan, math.nan, 20.0, (200, 200)),
        (18.0, None, 20.0, None),
        (None, 22.5, 20.0, None),
        (22.5, 18.0, 20.0, None),
        (18.0, 300.0, 20.0, None),  # kelvin
        (None, None, 293.0, None),
    ],
)
def test_the_pack_is_as_cold_and_as_hot_as_its_cells(
    low: Any, high: Any, average: Any, meaning: Any
) -> None:
    assert reading("pack_temp_dc", COLDEST=low, HOTTEST=high, AVERAGE=average) == meaning


@pytest.mark.parametrize(
    ("energy", "capacity", "meaning"),
    [
        (48.0, 60, (48_000, 60_000)),
        (61.2, 60, (61_200, 60_000)),  # a capacity is in whole kWh, and ages
        (90.0, 60, (None, None)),
        (48.0, None, (48_000, None)),
    ],
)
def test_more_energy_than_fits_is_unknown_energy(energy: Any, capacity: Any, meaning: Any) -> None:
    of_car = {"ENERGY": energy, "CAPACITY": capacity}
    assert (reading("usable_wh", **of_car), reading("capacity_wh", **of_car)) == meaning


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        ({"TIMER": "END_TIME", "TIMER_TIME": EVENING}, EVENING_MS),
        ({"TIMER": "END_TIME", "TIMER_TIME": "2026-01-05T19:30+01:00"}, EVENING_MS),
        ({"TIMER": "END_TIME", "TIMER_TIME": "2026-01-05T18:30:00"}, EVENING_MS),  # VSS: in UTC
        ({"TIMER": "START_TIME", "TIMER_TIME": EVENING}, None),
        ({"TIMER": "INACTIVE", "TIMER_TIME": EVENING}, None),
        ({"TIMER_TIME": EVENING}, None),
        ({"TIMER": "END_TIME"}, None),
        ({"TIMER": "END_TIME", "TIMER_TIME": "2026-01-05T11:59:00Z"}, None),  # over
        ({"TIMER": "END_TIME", "TIMER_TIME": "0000-01-01T00:00Z"}, None),  # VSS's "no time"
        ({"TIMER": "END_TIME", "TIMER_TIME": "9999-12-31T23:59:59-14:00"}, 253_402_351_199_000),
        ({"TIMER": "END_TIME", "TIMER_TIME": "half past six"}, None),
        ({"TIMER": "END_TIME", "TIMER_TIME": EVENING + " " * 99}, None),
        ({"CONDITIONING": "DRIVING_PREPARATION", "CONDITIONING_TIME": EVENING}, EVENING_MS),
        ({"CONDITIONING": "FAST_CHARGING_PREPARATION", "CONDITIONING_TIME": EVENING}, None),
        (
            {
                "TIMER": "END_TIME",
                "TIMER_TIME": "2026-01-05T20:00:00Z",
                "CONDITIONING": "DRIVING_PREPARATION",
                "CONDITIONING_TIME": EVENING,
            },
            EVENING_MS,
        ),
        (
            {
                "TIMER": "END_TIME",
                "TIMER_TIME": "2026-01-05T07:00:00Z",  # of this morning: it hides nothing
                "CONDITIONING": "DRIVING_PREPARATION",
                "CONDITIONING_TIME": EVENING,
            },
            EVENING_MS,
        ),
    ],
)
def test_the_departure_is_the_next_time_that_the_car_is_to_be_ready(
    values: dict[str, Any], meaning: int | None
) -> None:
    assert reading("departure_ms", **values) == meaning


@pytest.mark.parametrize(
    ("path", "unit", "ours"),
    [
        (vss.CHARGE, "percent", True),
        (vss.CHARGE, "", True),
        (vss.CHARGE, "ratio", False),
        (vss.COLDEST, "celsius", True),
        (vss.COLDEST, "Celsius", True),  # VSS 6.0
        (vss.COLDEST, "fahrenheit", False),
        (vss.ENERGY, "kWh", True),
        (vss.ENERGY, "Wh", False),
        (vss.LOW_VOLTAGE, "mV", False),
        (vss.POWER, "kW", False),
        (vss.SPEED, "m/s", False),
        (vss.MOVING, "", True),
        (vss.TIMER_TIME, "iso8601", True),
    ],
)
def test_a_unit_that_is_not_ours_is_seen(path: str, unit: str, ours: bool) -> None:
    assert has_our_unit(path, unit) is ours


ALL = [vss.MOVING, vss.SPEED, vss.IGNITION]


@pytest.mark.parametrize(
    ("paths", "answer", "meaning"),
    [
        (ALL, [False, 0.0, "OFF"], {vss.MOVING: False, vss.SPEED: 0.0, vss.IGNITION: "OFF"}),
        (ALL, ["ON", 9.0, True], {vss.MOVING: True, vss.SPEED: 9.0, vss.IGNITION: "ON"}),
        (ALL, ["ON"], {vss.IGNITION: "ON"}),  # none has claimed the others
        (ALL, [], {}),
        (ALL, [None, 0, "OFF"], {vss.MOVING: None, vss.SPEED: 0, vss.IGNITION: "OFF"}),
        (ALL, [None, None, None], dict.fromkeys(ALL)),
        (ALL, ["OFF", 0.0, "OFF"], dict.fromkeys(ALL)),
        (ALL, [False, False], dict.fromkeys(ALL)),
        (ALL[:1], [False], {vss.MOVING: False}),
        (ALL[:1], ["no"], {vss.MOVING: "no"}),
        (ALL[:1], [], {}),
        (ALL[::2], [1.5, "OFF"], dict.fromkeys(ALL[::2])),  # a number was not asked for
    ],
)
def test_an_answer_in_any_order_is_put_in_place(
    paths: list[str], answer: list[Any], meaning: dict[str, Any]
) -> None:
    assert matched(paths, answer) == meaning


# ---- any value

ANY = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.floats(-100, 1100)
    | st.text(max_size=60)
    | st.sampled_from(["END_TIME", "DRIVING_PREPARATION", "ON", "LOCK", EVENING, "2026-W02"])
    | st.datetimes().map(lambda time: time.isoformat())
)
PLAUSIBLE: dict[str, tuple[int, int]] = {
    "soc_permille": (0, 1000),
    "usable_wh": (0, 1_000_000),
    "capacity_wh": (1_000, 1_000_000),
    "pack_power_w": (-1_000_000, 1_000_000),
    "charge_limit_permille": (200, 1000),
    "ambient_dc": (-700, 700),
    "low_voltage_mv": (0, 60_000),
    "departure_ms": (NOW_MS + 1, 253_402_387_140_000),
}
ONE_OF: dict[str, tuple[Any, ...]] = {
    "plugged": (True, False),
    "charging": ("no", "charging", "complete", "discharging"),
    "moving": (True, False),
    "ignition": ("off", "acc", "on"),
}


@given(st.dictionaries(st.sampled_from(sorted(vss.PATHS)), ANY))
def test_no_value_raises_or_reads_out_of_range(values: dict[str, Any]) -> None:
    known = readings(values, NOW_MS)
    assert set(known) == set(PLAUSIBLE) | set(ONE_OF) | {"pack_temp_dc"} == vss.PROVIDES
    for name, (least, most) in PLAUSIBLE.items():
        value = known[name]
        assert value is None or (type(value) is int and least <= value <= most), name
    for name, words in ONE_OF.items():
        assert known[name] is None or known[name] in words
    temp_dc = known["pack_temp_dc"]
    assert temp_dc is None or -600 <= temp_dc[0] <= temp_dc[1] <= 1200
    hash(VehicleState(at_ms=NOW_MS, **known).pack_temp_dc)


@given(st.lists(st.sampled_from(ALL), min_size=1, unique=True), st.lists(ANY, max_size=5))
def test_no_answer_raises_or_names_another_path(paths: list[str], answer: list[Any]) -> None:
    found = matched(paths, answer)
    assert found.keys() <= set(paths)
    assert all(value is None or value in answer or value != value for value in found.values())
