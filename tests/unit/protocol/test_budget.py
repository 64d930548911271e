"""What a car may spend: fails closed, never below the floor, more charge is never less budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.budget import (
    FRESH_MS,
    LEASE_S_MAX,
    OffsetAt,
    VehicleState,
    driver_is_back,
    floor_nano_per_s,
    fresh_ms_left,
    limits_held,
    spendable,
)
from meshnode.protocol.events import BudgetRead
from meshnode.protocol.forecast import KINDS
from meshnode.protocol.papers import (
    AdmitRule,
    Band,
    Caps,
    Departure,
    Policy,
    Quiet,
    Resume,
    Submitters,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, NetworkId, Now

MONDAY_NOON_MS = 1_767_614_400_000  # 2026-01-05 12:00 UTC
NOW = Now(5_000_000, MONDAY_NOON_MS)
READINGS = tuple(FRESH_MS)

POLICY = Policy(
    version=1,
    network=NetworkId(bytes(8)),
    account=Account(bytes(32)),
    name_of_object="policy",
    soc_floor_permille=300,
    reserve_wh=10_000,
    day_wh=5_000,
    watt_max=300,
    plugged_rule=1,
    temp_dc=(50, 400),
    low_voltage_mv=12_600,
    wear_nano_per_kwh=50_000_000,
    tariff=(Band(360, 1319, 300_000_000), Band(1320, 359, 200_000_000)),
    efficiency_permille=900,
    awake_w=250,
    submitters=AdmitRule(Submitters.FLEET, ()),
    caps=Caps(0, 0, 0),
)

UNPLUGGED = VehicleState(
    at_ms=MONDAY_NOON_MS,
    soc_permille=500,
    capacity_wh=60_000,
    plugged=False,
    charging="no",
    pack_temp_dc=(200, 220),
    moving=False,
    ignition="off",
    departure_ms=MONDAY_NOON_MS + 48 * 3_600_000,  # so that the energy is what bounds a lease
    ages_ms=dict.fromkeys(READINGS, 0),
)
CHARGING = replace(
    UNPLUGGED, plugged=True, charging="charging", pack_power_w=7_000, charge_limit_permille=800
)


def zone(minutes: int) -> OffsetAt:
    """A zone that is so many minutes ahead of UTC all year."""
    return lambda _unix_ms: minutes


def budget(state: VehicleState | None, policy: Policy = POLICY, **more: Any) -> BudgetRead:
    return spendable(state, policy, NOW, **more)


def reason(state: VehicleState | None, policy: Policy = POLICY, **more: Any) -> Reason:
    read = budget(state, policy, **more)
    assert read.may_run is (read.reason is Reason.OK)
    if not read.may_run:
        assert read == BudgetRead(False, read.reason, 0, 0, 0, 0)
    return read.reason


def test_the_battery_term_by_hand() -> None:
    # 60 kWh at 50 % is 30 kWh; floor 18 kWh, reserve 10 kWh: 2 kWh; at 300 + 250 W 13,090 s.
    read = budget(UNPLUGGED)
    assert (read.may_run, read.spendable_mwh, read.watt_max) == (True, 2_000_000, 300)
    assert (read.load_w, read.lease_s_max) == (550, 13_090)
    assert budget(replace(UNPLUGGED, usable_wh=45_000)) == read  # the careful one of two readings
    assert budget(replace(UNPLUGGED, usable_wh=29_000)).spendable_mwh == 1_000_000
    # (300 + 250 W) / 0.9 at the wall, at 0.30 + 0.05 a kWh, for a second: 612 x 0.35 / 3.6e6
    assert read.floor_nano_per_s == -(-612 * 350_000_000 // 3_600_000)


def test_the_day_bounds_it() -> None:
    assert budget(UNPLUGGED, spent_today_mwh=4_000_000).spendable_mwh == 1_000_000
    assert reason(UNPLUGGED, spent_today_mwh=5_000_000) is Reason.BUDGET
    assert reason(UNPLUGGED, replace(POLICY, day_wh=0)) is Reason.BUDGET
    assert reason(UNPLUGGED, replace(POLICY, watt_max=0)) is Reason.BUDGET


def test_the_plug_term_by_hand() -> None:
    generous = replace(POLICY, day_wh=100_000)
    # 80 % of 60 kWh is 18 kWh away; 3 h x 7 kW x 0.9 is 18.9 kWh: 900 Wh are left over.
    in_3_h = replace(CHARGING, departure_ms=MONDAY_NOON_MS + 3 * 3_600_000)
    assert budget(in_3_h, generous).spendable_mwh == 900_000
    assert budget(in_3_h, generous).lease_s_max == 5_890  # 900 Wh at 550 W
    in_2_h = replace(CHARGING, departure_ms=MONDAY_NOON_MS + 2 * 3_600_000)
    assert reason(in_2_h, generous) is Reason.BUDGET
    assert budget(CHARGING, generous).spendable_mwh == 100_000_000
    assert budget(CHARGING, generous).lease_s_max == LEASE_S_MAX
    # The cable is in and nothing flows: it is the battery that pays.
    for idle in (
        replace(CHARGING, charging="no"),
        replace(CHARGING, charging="discharging"),
        replace(CHARGING, pack_power_w=None),
        replace(CHARGING, pack_power_w=-300),
    ):
        assert budget(idle, generous).spendable_mwh == 2_000_000


def test_departures_of_the_policy_reserve_and_end_leases() -> None:
    parked = replace(UNPLUGGED, departure_ms=None)
    monday_13 = Departure(0, 13 * 60, 11_500)
    tuesday_8 = Departure(1, 8 * 60, 0)
    read = budget(parked, replace(POLICY, departures=(tuesday_8, monday_13)))
    assert read.spendable_mwh == 500_000  # 30 - 18 - 11.5 kWh
    assert (read.stay_s, read.lease_s_max) == (3_600, 3_272)  # 500 Wh at 550 W
    # An hour west of Greenwich it is 11:00: two hours are left.
    policy = replace(POLICY, departures=(monday_13,))
    assert budget(parked, policy, offset_at=zone(-60)).stay_s == 7_200
    assert budget(parked, policy, offset_at=zone(30)).lease_s_max == 1_800
    assert reason(parked, policy, offset_at=zone(60)) is Reason.DRAINING
    assert budget(parked, policy, offset_at=zone(61)).lease_s_max == 3_272  # in a week
    past = replace(parked, departure_ms=MONDAY_NOON_MS - 1)
    assert budget(past) == budget(parked)


def test_where_no_departure_is_named_the_forecast_ends_leases() -> None:
    """At work for 9 h one car in ten leaves within 8 minutes; its battery would last 400."""
    at_work = replace(UNPLUGGED, departure_ms=None, parking="work", parked_s=9 * 3_600)
    read = budget(at_work)
    assert read.lease_s_max == read.stay_s == 480
    assert read.spendable_mwh == budget(UNPLUGGED).spendable_mwh
    # The time since the reading counts: 8 h, an hour ago.
    old = {**at_work.ages_ms, "parked_s": 3_600_000}
    assert budget(replace(at_work, parked_s=8 * 3_600)).stay_s == 1_080
    assert budget(replace(at_work, parked_s=8 * 3_600, ages_ms=old)) == read
    # The owner's own departure wins, and so does a battery that lasts less.
    named = replace(at_work, departure_ms=MONDAY_NOON_MS + 3 * 3_600_000)
    assert budget(named).lease_s_max == budget(named).stay_s == 10_800
    little = replace(POLICY, day_wh=10)
    assert (budget(at_work, little).lease_s_max, budget(at_work, little).stay_s) == (65, 480)
    # Of what nobody knows the careful guess is made.
    nothing = replace(UNPLUGGED, departure_ms=None)
    assert budget(nothing).stay_s == min(
        budget(replace(nothing, parking=kind)).stay_s or 0 for kind in KINDS
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"moving": True}, Reason.DRIVING),
        ({"ignition": "acc"}, Reason.DRIVING),
        ({"ignition": "on"}, Reason.DRIVING),
        ({"moving": None}, Reason.READINGS),
        ({"ignition": None}, Reason.READINGS),
        ({"soc_permille": None}, Reason.READINGS),
        ({"pack_temp_dc": None}, Reason.READINGS),
        ({"capacity_wh": None}, Reason.READINGS),
        ({"ages_ms": {}}, Reason.READINGS),
        ({"at_ms": MONDAY_NOON_MS + 6_000}, Reason.READINGS),
        ({"at_ms": MONDAY_NOON_MS - 6_000}, Reason.READINGS),
        ({"pack_temp_dc": (49, 200)}, Reason.TEMPERATURE),
        ({"pack_temp_dc": (200, 401)}, Reason.TEMPERATURE),
        ({"low_voltage_mv": 12_599}, Reason.LOW_VOLTAGE),
        ({"low_voltage_mv": 12_600}, Reason.OK),
        ({"soc_permille": 300}, Reason.CHARGE_FLOOR),
        ({"soc_permille": 0}, Reason.CHARGE_FLOOR),
        ({"soc_permille": 300, "plugged": True, "charging": "complete"}, Reason.CHARGE_FLOOR),
        ({"soc_permille": 400}, Reason.BUDGET),  # above the floor, within the reserve
        ({"usable_wh": 28_000}, Reason.BUDGET),  # the careful one of two readings
        ({"moving": True, "ages_ms": {}, "soc_permille": None}, Reason.DRIVING),
    ],
)
def test_what_stands_in_the_way(change: dict[str, Any], expected: Reason) -> None:
    assert reason(replace(UNPLUGGED, **change)) is expected


def test_no_state_at_all() -> None:
    assert reason(None) is Reason.READINGS


@pytest.mark.parametrize("name", READINGS)
def test_every_reading_that_must_be_fresh(name: str) -> None:
    for age_ms, expected in ((FRESH_MS[name], Reason.OK), (FRESH_MS[name] + 1, Reason.READINGS)):
        state = replace(UNPLUGGED, ages_ms={**UNPLUGGED.ages_ms, name: age_ms})
        assert reason(state) is expected
    aged = replace(UNPLUGGED, at_ms=MONDAY_NOON_MS - 3_000)
    motion = {"moving": 2_001, "ignition": 2_001}.get(name)
    if motion is not None:  # the age at reading and the time since add up
        state = replace(aged, ages_ms={**UNPLUGGED.ages_ms, name: motion})
        assert reason(state) is Reason.READINGS


def test_how_long_the_needed_readings_stay_fresh() -> None:
    ages = {"moving": 1_000, "ignition": 0, "soc_permille": 0, "pack_temp_dc": 0}
    state = replace(UNPLUGGED, at_ms=MONDAY_NOON_MS - 500, ages_ms=ages)
    left_ms = fresh_ms_left(state, POLICY, NOW, READINGS)
    assert left_ms == 5_000 - 1_500 + 1
    then = Now(0, NOW.unix_ms + left_ms)
    assert spendable(state, POLICY, then).reason is Reason.READINGS
    assert spendable(state, POLICY, then._replace(unix_ms=then.unix_ms - 1)).may_run
    assert not fresh_ms_left(None, POLICY, NOW, READINGS)
    assert not fresh_ms_left(replace(state, moving=None), POLICY, NOW, READINGS)


def test_only_the_owner_can_say_that_what_cannot_be_read_does_not_matter() -> None:
    """A laptop has no ignition: that is no proof that nobody drives it, until its owner says so."""
    laptop = ("soc_permille", "plugged", "charging")
    state = replace(UNPLUGGED, moving=None, ignition=None, pack_temp_dc=None)
    still = replace(POLICY, stationary=1)
    assert reason(state, provides=laptop) is Reason.READINGS
    assert reason(state, still, provides=laptop) is Reason.OK
    # What it does provide must be there, fresh, and past its limits as anywhere.
    assert reason(state, still) is Reason.READINGS
    assert reason(replace(state, soc_permille=None), still, provides=laptop) is Reason.READINGS
    assert reason(replace(state, soc_permille=300), still, provides=laptop) is Reason.CHARGE_FLOOR
    assert reason(replace(state, moving=True), still, provides=laptop) is Reason.DRIVING


def test_a_stationary_machine_without_a_battery_runs_from_the_mains() -> None:
    nothing = VehicleState(at_ms=MONDAY_NOON_MS, departure_ms=MONDAY_NOON_MS + 7_200_000)
    plugged_only = replace(POLICY, plugged_rule=0)
    assert reason(nothing, plugged_only, provides=()) is Reason.READINGS
    read = budget(nothing, replace(plugged_only, stationary=1), provides=())
    assert (read.may_run, read.spendable_mwh, read.lease_s_max) == (True, 5_000_000, 7_200)
    still = replace(plugged_only, stationary=1)
    # What stands for good does not leave as parked cars do.
    assert budget(replace(nothing, departure_ms=None), still, provides=()).stay_s == LEASE_S_MAX
    # With a cable or a battery to read of, it is these that count.
    assert reason(nothing, still, provides=("plugged",)) is Reason.UNPLUGGED
    assert reason(nothing, replace(still, plugged_rule=2), provides=()) is Reason.UNPLUGGED


@pytest.mark.parametrize(
    ("quiet", "shift_min", "expected"),
    [
        (Quiet(0b1, 720, 720), 0, Reason.QUIET_HOURS),  # Monday 12:00, that minute
        (Quiet(0b1, 720, 720), 1, Reason.OK),
        (Quiet(0b10, 720, 720), 0, Reason.OK),  # Tuesday's
        (Quiet(0b1, 1_320, 360), 11 * 60, Reason.QUIET_HOURS),  # Monday 23:00, from 22:00
        (Quiet(0b1, 1_320, 360), 18 * 60, Reason.QUIET_HOURS),  # Tuesday 6:00, of Monday's night
        (Quiet(0b1, 1_320, 360), 18 * 60 + 1, Reason.OK),
        (Quiet(0b1, 1_320, 360), -6 * 60, Reason.OK),  # Monday 6:00 belongs to Sunday's night
        (Quiet(0b1000000, 1_320, 360), -6 * 60, Reason.QUIET_HOURS),
    ],
)
def test_quiet_hours(quiet: Quiet, shift_min: int, expected: Reason) -> None:
    policy = replace(POLICY, quiet=(Quiet(0b100, 0, 1), quiet))
    assert reason(UNPLUGGED, policy, offset_at=zone(shift_min)) is expected


def test_a_car_that_has_just_parked_waits() -> None:
    policy = replace(POLICY, idle_s=180)
    assert reason(UNPLUGGED, policy) is Reason.JUST_PARKED
    assert reason(UNPLUGGED, policy, still_s=179) is Reason.JUST_PARKED
    assert reason(UNPLUGGED, policy, still_s=180) is Reason.OK
    assert reason(replace(UNPLUGGED, parked_s=180), policy) is Reason.OK


def test_half_past_seven_stays_so_when_the_clocks_change() -> None:
    """Central European time goes from +60 to +120 on 29 March 2026 at 01:00 UTC."""
    change_ms = 1_774_746_000_000

    def berlin(unix_ms: int) -> int:
        return 120 if unix_ms >= change_ms else 60

    saturday_22 = Now(0, change_ms - 4 * 3_600_000)  # 22:00 in Berlin
    sunday_730 = replace(POLICY, departures=(Departure(6, 450, 0),))
    parked = replace(UNPLUGGED, at_ms=saturday_22.unix_ms, departure_ms=None, usable_wh=None)
    assert spendable(parked, sunday_730, saturday_22, offset_at=zone(60)).stay_s == 34_200
    # From two o'clock it is three: an hour of that night never is.
    assert spendable(parked, sunday_730, saturday_22, offset_at=berlin).stay_s == 30_600


def test_plugged_rules() -> None:
    only, either, surplus = (replace(POLICY, plugged_rule=rule) for rule in range(3))
    unknown = replace(UNPLUGGED, plugged=None)
    idle = replace(CHARGING, charging="no")
    for state, expected in (
        (UNPLUGGED, (Reason.UNPLUGGED, Reason.OK, Reason.UNPLUGGED)),
        (unknown, (Reason.UNPLUGGED, Reason.OK, Reason.UNPLUGGED)),
        (idle, (Reason.BUDGET, Reason.OK, Reason.UNPLUGGED)),
        (CHARGING, (Reason.OK, Reason.OK, Reason.OK)),
    ):
        assert tuple(reason(state, policy) for policy in (only, either, surplus)) == expected


def test_what_stopped_at_a_limit_goes_on_only_past_the_threshold() -> None:
    policy = replace(POLICY, reserve_wh=0)
    at = [replace(UNPLUGGED, soc_permille=soc) for soc in (300, 301, 320, 321)]
    stopped = budget(at[0], policy)
    assert stopped.reason is Reason.CHARGE_FLOOR
    fresh = [reason(state, policy) for state in at]
    assert fresh == [Reason.CHARGE_FLOOR, Reason.OK, Reason.OK, Reason.OK]
    after = [reason(state, policy, previous=stopped) for state in at]
    assert after == [Reason.CHARGE_FLOOR] * 3 + [Reason.OK]
    own = replace(policy, resume=Resume(301, 100, 300))
    assert reason(at[1], own, previous=stopped) is Reason.OK
    hot = budget(replace(UNPLUGGED, pack_temp_dc=(200, 401)))
    cooler = replace(UNPLUGGED, pack_temp_dc=(200, 395))
    cool = replace(UNPLUGGED, pack_temp_dc=(200, 390))
    assert reason(cooler) is Reason.OK
    assert reason(cooler, previous=hot) is Reason.TEMPERATURE
    assert reason(cool, previous=hot) is Reason.OK
    assert reason(cool, replace(POLICY, resume=Resume(0, 100, 300)), previous=hot) is (
        Reason.TEMPERATURE
    )


def test_a_car_with_nothing_left_to_spend_goes_on_with_a_quarter_of_an_hour() -> None:
    # 18 kWh of floor and 10 of reserve in 60 kWh: 28 kWh; 137.5 Wh are 900 s at 550 W.
    at = [replace(UNPLUGGED, capacity_wh=30_000 + wh * 2) for wh in (0, 50, 137, 140)]
    policy = replace(POLICY, soc_floor_permille=0, reserve_wh=15_000)
    stopped = budget(at[0], policy)
    assert stopped.reason is Reason.BUDGET
    assert [reason(state, policy) for state in at] == [Reason.BUDGET] + [Reason.OK] * 3
    after = [reason(state, policy, previous=stopped) for state in at]
    assert after == [Reason.BUDGET] * 3 + [Reason.OK]
    assert reason(at[1], policy, held=(Reason.BUDGET,)) is Reason.BUDGET  # a pause lay between
    # What the day has left only falls until midnight: that flickers by itself.
    day = replace(policy, day_wh=100)
    full = replace(UNPLUGGED, capacity_wh=60_000)
    assert reason(full, day, previous=stopped, spent_today_mwh=99_000) is Reason.OK
    assert reason(full, day, previous=stopped, spent_today_mwh=100_000) is Reason.BUDGET


def test_the_energy_of_a_late_departure_is_kept() -> None:
    parked = replace(UNPLUGGED, departure_ms=None, capacity_wh=80_000)  # 40 kWh, floor 24
    eleven, next_day = Departure(0, 11 * 60, 15_500), Departure(1, 8 * 60, 0)
    policy = replace(POLICY, departures=(eleven, next_day))
    assert budget(parked, policy).spendable_mwh == 500_000  # an hour late
    assert budget(replace(parked, parked_s=7_200), policy).spendable_mwh == 500_000
    away = replace(parked, parked_s=1_800)  # it came back half an hour ago
    assert budget(away, policy).spendable_mwh == 5_000_000  # the day's
    hour_east = {"offset_at": zone(60)}
    assert budget(parked, policy, **hour_east).spendable_mwh == 5_000_000  # nobody comes any more
    # The charger has no time left to catch up.
    charging = replace(CHARGING, departure_ms=None, capacity_wh=80_000)
    assert reason(charging, policy) is Reason.BUDGET
    assert reason(replace(charging, parked_s=1_800), policy) is Reason.OK


def test_limits_stay_held_through_readings_that_are_lost() -> None:
    every = {Reason.TEMPERATURE, Reason.LOW_VOLTAGE, Reason.CHARGE_FLOOR}
    bad = replace(UNPLUGGED, soc_permille=300, pack_temp_dc=(200, 401), low_voltage_mv=12_500)
    assert limits_held(bad, POLICY, ()) == every
    lost = replace(bad, soc_permille=None, pack_temp_dc=None, low_voltage_mv=None)
    assert limits_held(lost, POLICY, every) == every
    assert limits_held(lost, POLICY, ()) == set()
    edge = replace(bad, soc_permille=320, pack_temp_dc=(200, 391), low_voltage_mv=12_699)
    assert limits_held(edge, POLICY, every) == every
    assert limits_held(edge, POLICY, ()) == set()
    past = replace(bad, soc_permille=321, pack_temp_dc=(200, 390), low_voltage_mv=12_700)
    assert limits_held(past, POLICY, every) == set()
    assert reason(edge, replace(POLICY, reserve_wh=0), held=every) is Reason.TEMPERATURE


def test_the_neediest_trip_of_the_day_is_reserved_whichever_comes_first() -> None:
    errand, trip = Departure(0, 13 * 60, 0), Departure(0, 14 * 60, 11_500)
    parked = replace(UNPLUGGED, departure_ms=MONDAY_NOON_MS + 600_000)
    read = budget(parked, replace(POLICY, departures=(errand, trip)))
    assert (read.spendable_mwh, read.stay_s) == (500_000, 600)


def test_the_floor_price_follows_band_tariff_and_plug() -> None:
    def price(state: VehicleState, **more: Any) -> int:
        return floor_nano_per_s(state, POLICY, NOW, **more)

    noon, night = price(CHARGING), price(CHARGING, offset_at=zone(11 * 60))
    assert noon == -(-612 * 300_000_000 // 3_600_000)
    assert night == -(-612 * 200_000_000 // 3_600_000)
    assert price(CHARGING, offset_at=zone(17 * 60 + 44)) == night  # 05:44
    assert price(CHARGING, offset_at=zone(17 * 60 + 45)) == noon  # a run of now may see 06:00
    assert price(CHARGING, offset_at=zone(18 * 60)) == noon
    assert price(UNPLUGGED) > noon  # wear
    assert price(replace(CHARGING, tariff_nano_per_kwh=0)) == 0
    gap = replace(POLICY, tariff=(Band(0, 1, 100), Band(2, 3, 900_000_000)))
    dearest = floor_nano_per_s(CHARGING, gap, NOW)
    assert dearest == -(-612 * 900_000_000 // 3_600_000)


def test_who_is_back() -> None:
    assert not driver_is_back(UNPLUGGED)
    assert not driver_is_back(replace(UNPLUGGED, moving=None, ignition=None))
    assert driver_is_back(replace(UNPLUGGED, moving=True))
    assert driver_is_back(replace(UNPLUGGED, ignition="acc", ages_ms={}))


def maybe(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), of)


STATES = st.builds(
    VehicleState,
    at_ms=st.integers(MONDAY_NOON_MS - 20_000, MONDAY_NOON_MS + 20_000),
    soc_permille=maybe(st.integers(0, 1000)),
    usable_wh=maybe(st.integers(0, 100_000)),
    capacity_wh=maybe(st.integers(0, 100_000)),
    plugged=maybe(st.booleans()),
    charging=maybe(st.sampled_from(["no", "charging", "complete", "discharging"])),
    pack_power_w=maybe(st.integers(-5_000, 250_000)),
    charge_limit_permille=maybe(st.integers(0, 1000)),
    pack_temp_dc=maybe(st.tuples(st.integers(-300, 600), st.integers(-300, 600))),
    low_voltage_mv=maybe(st.integers(10_000, 15_000)),
    moving=maybe(st.booleans()),
    ignition=maybe(st.sampled_from(["off", "acc", "on"])),
    departure_ms=maybe(st.integers(MONDAY_NOON_MS - 10_000, MONDAY_NOON_MS + 10**9)),
    tariff_nano_per_kwh=maybe(st.integers(-(10**8), 10**9)),
    ages_ms=st.dictionaries(st.sampled_from(READINGS), st.integers(0, 600_000)),
)
# Mostly in order, so that the arithmetic is reached and not only the refusals.
SOUND = st.builds(
    VehicleState,
    at_ms=st.just(MONDAY_NOON_MS),
    soc_permille=st.integers(0, 1000),
    usable_wh=maybe(st.integers(0, 100_000)),
    capacity_wh=st.integers(1_000, 100_000),
    plugged=maybe(st.booleans()),
    charging=maybe(st.sampled_from(["no", "charging", "complete", "discharging"])),
    pack_power_w=maybe(st.integers(-5_000, 250_000)),
    charge_limit_permille=maybe(st.integers(0, 1000)),
    pack_temp_dc=st.just((200, 210)),
    moving=st.just(False),
    ignition=st.just("off"),
    departure_ms=maybe(st.integers(MONDAY_NOON_MS, MONDAY_NOON_MS + 10**9)),
    ages_ms=st.just(dict.fromkeys(READINGS, 0)),
)
POLICIES = st.builds(
    replace,
    st.just(POLICY),
    soc_floor_permille=st.integers(0, 1000),
    reserve_wh=st.integers(0, 50_000),
    day_wh=st.integers(0, 50_000),
    watt_max=st.integers(0, 2_000),
    plugged_rule=st.integers(0, 2),
    efficiency_permille=st.integers(0, 1000),
    departures=maybe(
        st.lists(
            st.builds(Departure, st.integers(0, 6), st.integers(0, 1439), st.integers(0, 40_000)),
            min_size=1,
            max_size=3,
        ).map(tuple)
    ),
)


@given(st.one_of(STATES, SOUND), POLICIES, st.integers(0, 50_000_000), st.sampled_from(Reason))
def test_a_budget_is_within_every_limit(
    state: VehicleState, policy: Policy, spent_mwh: int, held_by: Reason
) -> None:
    previous = BudgetRead(False, held_by, 0, 0, 0, 0)
    read = budget(state, policy, spent_today_mwh=spent_mwh, previous=previous)
    assert read.may_run == (read.reason is Reason.OK) == (read.spendable_mwh > 0)
    if not read.may_run:
        assert (read.spendable_mwh, read.watt_max, read.lease_s_max) == (0, 0, 0)
        return
    assert state.soc_permille is not None
    assert state.soc_permille > policy.soc_floor_permille
    assert not driver_is_back(state)
    assert read.spendable_mwh <= policy.day_wh * 1000 - spent_mwh
    assert 0 < read.lease_s_max <= LEASE_S_MAX
    assert read.watt_max == policy.watt_max
    # A lease of full length at full power stays within the energy, and ends before the departure.
    assert read.watt_max * read.lease_s_max * 1000 <= read.spendable_mwh * 3600
    if state.departure_ms is not None and state.departure_ms > MONDAY_NOON_MS:
        assert read.lease_s_max * 1000 <= state.departure_ms - MONDAY_NOON_MS
    if state.plugged is not True and state.capacity_wh is not None:
        left_mwh = state.capacity_wh * (state.soc_permille - policy.soc_floor_permille)
        assert read.spendable_mwh <= left_mwh - policy.reserve_wh * 1000
    assert read.floor_nano_per_s >= 0


@given(SOUND, POLICIES, st.integers(0, 1000), st.integers(0, 50_000_000))
def test_more_charge_is_never_less_budget(
    state: VehicleState, policy: Policy, other_permille: int, spent_mwh: int
) -> None:
    assert state.soc_permille is not None
    fuller = replace(state, soc_permille=max(state.soc_permille, other_permille))
    less = budget(state, policy, spent_today_mwh=spent_mwh)
    more = budget(fuller, policy, spent_today_mwh=spent_mwh)
    assert more.spendable_mwh >= less.spendable_mwh
    assert more.lease_s_max >= less.lease_s_max
    assert more.may_run >= less.may_run


@given(SOUND, POLICIES, st.sampled_from(READINGS))
def test_losing_a_reading_never_helps(state: VehicleState, policy: Policy, name: str) -> None:
    stale = replace(state, ages_ms={**state.ages_ms, name: FRESH_MS[name] + 1})
    unknown: dict[str, Any] = {name: None}
    gone = replace(state, **unknown)
    assert not budget(stale, policy).may_run
    assert not budget(gone, policy).may_run
