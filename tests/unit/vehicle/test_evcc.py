"""What an answer of evcc says, field by field; whatever it holds, nothing false comes out of it."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.protocol.budget import ChargingState, VehicleState
from meshnode.vehicle import evcc
from meshnode.vehicle.evcc import EvccVehicle, readings_of
from meshnode.vehicle.state import READINGS, Source, VehicleLost

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
POINT: dict[str, Any] = {
    "name": "lp-1",
    "title": "Carport",
    "connected": True,
    "charging": True,
    "enabled": True,
    "chargePower": 11040.5,
    "vehicleName": "ev1",
    "vehicleTitle": "Our car",
    "vehicleSoc": 52.3,
    "effectiveLimitSoc": 80,
    "vehicleLimitSoc": 90,
    "effectivePlanTime": "2026-01-01T07:00:00+01:00",
    "planTime": None,
    "chargerFeatureHeating": False,
}
STATE: dict[str, Any] = {
    "loadpoints": [POINT],
    "vehicles": {"ev1": {"title": "Our car", "capacity": 58.5}},
    "tariffGrid": 0.287,
    "currency": "EUR",
}
HEAT_PUMP: dict[str, Any] = {
    "title": "Heat pump",
    "connected": True,
    "charging": False,
    "vehicleSoc": 48,
    "chargerFeatureHeating": True,
}


def state_with(site: dict[str, Any] | None = None, **point: Any) -> dict[str, Any]:
    whole = copy.deepcopy(STATE) | (site or {})
    whole["loadpoints"][0] |= point
    return whole


def read(state: object, **options: str) -> VehicleState:
    return readings_of(state, NOW_MS, **options)


def test_a_car_that_charges() -> None:
    expected = VehicleState(
        at_ms=NOW_MS,
        soc_permille=523,
        capacity_wh=58_500,
        plugged=True,
        charging="charging",
        pack_power_w=11_040,
        charge_limit_permille=800,
        departure_ms=NOW_MS + 6 * 3_600_000,
        tariff_nano_per_kwh=287_000_000,
        ages_ms=dict.fromkeys(EvccVehicle.provides, 0),
    )
    assert read(STATE) == expected
    assert read({"result": STATE}) == expected  # until August 2025
    known = {name for name in READINGS if getattr(expected, name) is not None}
    assert known == EvccVehicle.provides


@pytest.mark.parametrize(
    ("point", "charging"),
    [
        ({"charging": False}, "no"),
        ({"charging": False, "vehicleSoc": 80}, "complete"),
        ({"charging": False, "vehicleSoc": 79.9}, "no"),
        # At its own limit evcc switches the charger off: the battery carries the load.
        ({"charging": False, "vehicleSoc": 80, "enabled": False}, "no"),
        ({"charging": False, "vehicleSoc": 80, "enabled": None}, "no"),
        # The car's own limit, below the loadpoint's.
        ({"charging": False, "vehicleSoc": 70, "vehicleLimitSoc": 70}, "complete"),
        ({"charging": False, "vehicleSoc": 0}, "no"),
        ({"charging": None}, None),
        ({"charging": 1}, None),
    ],
)
def test_what_charging_means(point: dict[str, Any], charging: str | None) -> None:
    state = read(state_with(**point))
    assert (state.plugged, state.charging) == (True, charging)
    assert state.pack_power_w is None


def test_a_car_that_is_away() -> None:
    """evcc goes on showing what it last knew of it."""
    state = read(state_with(connected=False, charging=False))
    assert (state.plugged, state.charging) == (False, "no")
    assert state.tariff_nano_per_kwh == 287_000_000
    rest = EvccVehicle.provides - {"plugged", "charging", "tariff_nano_per_kwh"}
    assert {name for name in rest if getattr(state, name) is not None} == set()
    assert read(state_with(connected=False)).charging is None  # charging what?
    state = read(state_with(connected="yes"))
    assert (state.plugged, state.charging, state.soc_permille) == (None, None, None)


def test_a_guest_is_not_this_car() -> None:
    assert read(STATE, vehicle="ev1").soc_permille == 523
    assert read(STATE, vehicle="Our car").soc_permille == 523
    for other in ("ev2", "", None, ["ev1"]):
        state = read(state_with(vehicleName=other, vehicleTitle=other), vehicle="ev1")
        assert (state.plugged, state.charging, state.soc_permille) == (None, None, None)
        assert state.tariff_nano_per_kwh == 287_000_000


@pytest.mark.parametrize(
    ("reading", "site", "point"),
    [
        ("soc_permille", {}, {"vehicleSoc": 0}),
        ("soc_permille", {}, {"vehicleSoc": 0.8}),  # a fraction of one?
        ("soc_permille", {}, {"vehicleSoc": 1}),
        ("soc_permille", {}, {"vehicleSoc": 100.1}),
        ("soc_permille", {}, {"vehicleSoc": -5}),
        ("soc_permille", {}, {"vehicleSoc": math.nan}),
        ("soc_permille", {}, {"vehicleSoc": 10**400}),
        ("soc_permille", {}, {"vehicleSoc": "52"}),
        ("soc_permille", {}, {"vehicleSoc": True}),
        ("soc_permille", {}, {"vehicleSoc": None}),
        ("pack_power_w", {}, {"chargePower": 11.04}),  # kW
        ("pack_power_w", {}, {"chargePower": -3000}),
        ("pack_power_w", {}, {"chargePower": math.inf}),
        ("pack_power_w", {}, {"chargePower": 1e12}),
        ("capacity_wh", {"vehicles": {"ev1": {"capacity": 58500}}}, {}),  # Wh
        ("capacity_wh", {"vehicles": {"ev1": {"capacity": 0}}}, {}),
        ("capacity_wh", {"vehicles": {"ev1": {}}}, {}),
        ("capacity_wh", {"vehicles": {}}, {}),
        ("capacity_wh", {"vehicles": ["Our car"]}, {}),
        ("capacity_wh", {}, {"vehicleName": ""}),
        ("capacity_wh", {}, {"vehicleName": {}}),
        ("capacity_wh", {"vehicles": {"ev1": {"capacity": True}}}, {}),
        ("tariff_nano_per_kwh", {"tariffGrid": None}, {}),
        ("tariff_nano_per_kwh", {"tariffGrid": False}, {}),
        ("tariff_nano_per_kwh", {"tariffGrid": math.nan}, {}),
        ("tariff_nano_per_kwh", {"tariffGrid": 1001}, {}),
        ("tariff_nano_per_kwh", {"tariffGrid": -math.inf}, {}),
        ("charge_limit_permille", {}, {"effectiveLimitSoc": 0, "vehicleLimitSoc": 0.8}),
        ("departure_ms", {}, {"effectivePlanTime": "2026-01-01T07:00:00"}),  # whose seven?
        ("departure_ms", {}, {"effectivePlanTime": "0001-01-01T00:00:00Z"}),
        ("departure_ms", {}, {"effectivePlanTime": "2025-12-31T23:59:59Z"}),
        ("departure_ms", {}, {"effectivePlanTime": "9999-12-31T23:59:59-23:59"}),
        ("departure_ms", {}, {"effectivePlanTime": NOW_MS + 1}),
    ],
)
def test_what_cannot_be_is_unknown_and_the_rest_stands(
    reading: str, site: dict[str, Any], point: dict[str, Any]
) -> None:
    state = read(state_with(site, **point))
    rest = EvccVehicle.provides - {reading}
    assert getattr(state, reading) is None
    assert {name for name in rest if getattr(state, name) is None} == set()


def test_old_and_odd_answers() -> None:
    assert read(state_with({"vehicles": {}}, vehicleCapacity=40)).capacity_wh == 40_000
    assert read(state_with({"tariffGrid": -0.05})).tariff_nano_per_kwh == -50_000_000
    assert read(state_with(effectiveLimitSoc=100, vehicleLimitSoc=0)).charge_limit_permille == 1000


def test_a_price_in_another_currency_is_no_price() -> None:
    assert read(STATE, currency="EUR").tariff_nano_per_kwh == 287_000_000
    assert read(STATE, currency="CHF").tariff_nano_per_kwh is None
    assert read(state_with({"currency": None}), currency="EUR").tariff_nano_per_kwh is None


def test_the_next_plan_is_the_departure() -> None:
    def departs_h(plan: str | None = None, **point: Any) -> float | None:
        car = {"capacity": 58.5, "plan": {"soc": 80, "time": plan}}
        at_ms = read(state_with({"vehicles": {"ev1": car}}, **point)).departure_ms
        return None if at_ms is None else (at_ms - NOW_MS) / 3_600_000

    gone = {"effectivePlanTime": None}
    assert departs_h("2026-01-01T05:00:00.5Z", **gone) == pytest.approx(5, abs=0.001)
    assert departs_h("2026-01-01T09:00:00Z") == 6
    assert departs_h(planTime="2026-01-01T02:30:00Z") == 2.5
    assert departs_h("2026-02-02T00:00:00Z", **gone) is None  # in 32 days
    assert departs_h(**gone) is None


# ---- which loadpoint


GARAGE = {"title": "Garage", "name": "lp-2", "connected": True, "vehicleSoc": 90}


@pytest.mark.parametrize("wanted", ["Garage", "lp-2", "2"])
def test_a_loadpoint_by_title_name_or_number(wanted: str) -> None:
    points = [HEAT_PUMP, POINT, GARAGE]
    assert read({"loadpoints": points}, loadpoint=wanted).soc_permille == 900
    # A title that is a number is a title.
    named = [{**GARAGE, "title": wanted}, POINT, {**POINT, "title": "last"}]
    assert read({"loadpoints": named}, loadpoint=wanted).soc_permille == 900


def test_a_heat_pump_is_no_car() -> None:
    assert read({"loadpoints": [HEAT_PUMP, POINT]}).soc_permille == 523
    for wanted in ("0", "Heat pump"):
        with pytest.raises(VehicleLost, match=r"no loadpoint for cars is called '.*: 'Carport'$"):
            read({"loadpoints": [HEAT_PUMP, POINT]}, loadpoint=wanted)
    with pytest.raises(VehicleLost, match="no loadpoint is one for cars"):
        read({"loadpoints": [HEAT_PUMP]})


def test_none_is_guessed() -> None:
    odd = {**POINT, "title": "\x1b[31m\n" + "x" * 999}
    with pytest.raises(VehicleLost) as caught:
        read({"loadpoints": [POINT, GARAGE, odd, *[GARAGE] * 99]})
    text = str(caught.value)
    assert text.startswith("set the option loadpoint to one of: 'Carport', 'Garage', ")
    assert text.isprintable() and len(text) < 300
    with pytest.raises(VehicleLost, match="several loadpoints are called 'Garage'"):
        read({"loadpoints": [GARAGE, GARAGE]}, loadpoint="Garage")
    for wanted in ("3", "-1", "9" * 50, "²", "garage"):
        with pytest.raises(VehicleLost, match="no loadpoint for cars is called"):
            read({"loadpoints": [POINT, GARAGE]}, loadpoint=wanted)


@pytest.mark.parametrize(
    "state",
    [None, [], "", 0, {}, {"result": None}, {"loadpoints": {}}, {"loadpoints": [1, None, {}]}],
)
def test_no_loadpoint_is_a_lost_source(state: object) -> None:
    with pytest.raises(VehicleLost, match="names no loadpoint"):
        read(state)


# ---- anything

numbers = st.integers() | st.floats() | st.sampled_from([0.5, 1, 42, 99.9, 100, 7200, 10**400])
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=8)
    | st.sampled_from(["ev1", "2026-01-02T03:04:05Z", "0001-01-01T00:00:00+23:59"])
)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner)
)
keys_of_points = (*POINT, "vehicleCapacity", "chargerFeatureIntegratedDevice")
points = st.fixed_dictionaries({}, optional=dict.fromkeys(keys_of_points, leaves | anything))
cars = st.fixed_dictionaries({}, optional={"capacity": leaves, "plan": anything})
sites = st.fixed_dictionaries(
    {"loadpoints": st.lists(points | anything, max_size=3) | anything},
    optional={
        "vehicles": st.dictionaries(st.just("ev1"), cars | anything) | anything,
        "tariffGrid": leaves,
        "currency": leaves,
        "result": anything,
    },
)


def check(state: object, loadpoint: str, car: str) -> None:
    """Either a lost source in one line, or readings that can be."""
    try:
        told = read(state, loadpoint=loadpoint, vehicle=car)
    except VehicleLost as error:
        told = VehicleState(at_ms=NOW_MS)
        why = str(error)
        assert why.isprintable()
    for name, least, most in (
        ("soc_permille", 10, 1000),
        ("charge_limit_permille", 10, 1000),
        ("pack_power_w", evcc.CHARGE_W_LEAST, evcc.CHARGE_W_MAX),
        ("capacity_wh", 1000, evcc.CAPACITY_KWH_MAX * 1000),
        ("departure_ms", NOW_MS, NOW_MS + evcc.DEPARTURE_S_MAX * 1000),
        ("tariff_nano_per_kwh", -evcc.TARIFF_MAX * 10**9, evcc.TARIFF_MAX * 10**9),
    ):
        value = getattr(told, name)
        assert value is None or (type(value) is int and least <= value <= most)
    assert told.plugged in (None, True, False)
    assert told.charging in (None, *get_args(ChargingState))
    others = READINGS - EvccVehicle.provides
    assert {name for name in others if getattr(told, name) is not None} == set()


@given(anything | sites, st.sampled_from(["", "0", "1", "Carport"]), st.sampled_from(["", "ev1"]))
def test_whatever_comes_nothing_false_goes_out(state: object, loadpoint: str, car: str) -> None:
    check(state, loadpoint, car)


@given(points)
def test_a_loadpoint_with_odd_fields(point: dict[str, Any]) -> None:
    check(state_with(**point), "", "")


# ---- the address and the options


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://evcc.local:7070", "http://evcc.local:7070/api/state"),
        ("https://house.example/evcc/", "https://house.example/evcc/api/state"),
        ("192.0.2.1:7070", "http://192.0.2.1:7070/api/state"),
        ("[2001:db8::1]:7070", "http://[2001:db8::1]:7070/api/state"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert EvccVehicle(Source(address=address))._url == url


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ftp://evcc.local",
        "http://",
        "http://evcc:port",
        "http://evcc:0",
        "http://evcc:99999",
        "http://me:secret@evcc",
        "http://@evcc",
        "http://evcc/?jq=.",
        "http://evcc/#a",
        "http://ev cc",
        "http://evcc\r\nHost: other",
        "http://évcc",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match=r"^vehicle.address .*http://evcc.local:7070$"):
        EvccVehicle(Source(address=address))


def test_an_option_without_a_meaning() -> None:
    with pytest.raises(UsageError, match="no option lodpoint; it has loadpoint, vehicle, currency"):
        EvccVehicle(Source(address="evcc:7070", options={"lodpoint": "1"}))


def test_who_has_no_evcc_loads_no_http() -> None:
    code = "import sys, meshnode.vehicle.evcc; assert 'httpx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
