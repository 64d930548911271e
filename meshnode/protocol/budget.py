"""What this car may spend now: the owner's policy applied to the vehicle's readings. Pure.

Readings come from `meshnode.vehicle` through `node.vehicle_watch`; out comes a `BudgetRead` for
the machine. Integers only: mWh, W, per mille, 0.1 degC. It fails closed: what is unknown or stale
counts against running. Energies are those at the terminals of the battery, as `watt_max` and
`awake_w` are; a charger's loss comes on top of what is paid for.

    spendable = max(0, min(what is left of the day, battery or plug term))
    battery term = stored - floor - reserve of the next departure
    plug term    = hours to departure x charger W x its efficiency - what is still to charge

A lease is as long as the energy lasts at full power and as the car stays (`forecast`): until its
departure, or where none is named as long as nine of ten such cars.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from .events import BudgetRead
from .forecast import KINDS, LEASE_PROBABILITY, Parking, Stay
from .papers import Policy
from .reasons import Reason
from .types import Now
from .upkeep import Upkeep

ChargingState = Literal["no", "charging", "complete", "discharging"]

FRESH_MS: Final = {
    "moving": 5_000,
    "ignition": 5_000,
    "soc_permille": 300_000,
    "pack_temp_dc": 300_000,
}  # older than this a reading is no reading
RESUME_SOC_PERMILLE: Final = 20  # past the floor, if the policy names no thresholds of its own
RESUME_TEMP_DC: Final = 10
RESUME_LOW_MV: Final = 100  # a 12 V battery recovers by so much when its load ends
RESUME_WORK_S: Final = 900
"""A car that had nothing left to spend goes on when battery or plug give so much full load, or 2 %
of its battery, if that is less: one step of a gauge would start it and stop it for hours."""
LEASE_S_MAX: Final = 24 * 3600
RESERVE_AHEAD_S: Final = 24 * 3600  # departures within it have their energy reserved
LATE_S: Final = 2 * 3600  # and so do those whose hour has passed, while the driver may just be late
PRICED_AHEAD_S: Final = 900
"""A run has the price that held when it began: dearer hours that begin within so long are in it."""
CHARGER_PERMILLE: Final = 900
"""From the wall to the battery, of an onboard charger; what the battery gives was charged once."""
_WEEK_MIN: Final = 7 * 1440
_UNBOUNDED_MWH: Final = 1 << 62
_SURPLUS: Final = ("charging", "complete")

OffsetAt = Callable[[int], int]
"""Minutes that local time is ahead of UTC at a unix time in milliseconds."""


def _utc(_unix_ms: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class VehicleState:
    """Every reading is optional; None is unknown. No position, no VIN, nothing to write to.

    `ages_ms` says per reading how old it was at `at_ms`; one that needs an age and has none is
    too old.
    """

    at_ms: int  # unix
    soc_permille: int | None = None  # physical, not displayed
    usable_wh: int | None = None  # in the battery now
    capacity_wh: int | None = None
    plugged: bool | None = None
    charging: ChargingState | None = None
    pack_power_w: int | None = None  # positive is into the battery, as in VSS
    charge_limit_permille: int | None = None
    pack_temp_dc: tuple[int, int] | None = None  # lowest and highest cell
    ambient_dc: int | None = None
    low_voltage_mv: int | None = None
    moving: bool | None = None
    ignition: Literal["off", "acc", "on"] | None = None
    departure_ms: int | None = None  # unix
    parking: Parking | None = None  # what kind of place, never which
    parked_s: int | None = None  # how long it stands there
    tariff_nano_per_kwh: int | None = None
    ages_ms: Mapping[str, int] = field(default_factory=dict)


class Link(NamedTuple):
    """How this node reaches the others."""

    kind: Literal["wired", "wifi", "cellular"] | None  # None: not known, and taken for cellular
    metered_bytes: int = 0  # that went over a mobile link this local day, both ways


_RANGES: Final = {
    "at_ms": (0, 1 << 53),
    "soc_permille": (0, 1_000),
    "usable_wh": (0, 10_000_000),
    "capacity_wh": (1, 10_000_000),
    "pack_power_w": (-10_000_000, 10_000_000),
    "charge_limit_permille": (0, 1_000),
    "ambient_dc": (-1_000, 1_000),
    "low_voltage_mv": (0, 100_000),
    "departure_ms": (0, 1 << 53),
    "parked_s": (0, 1 << 40),
    "tariff_nano_per_kwh": (-(10**13), 10**13),
}
_WORDS: Final = {
    "charging": ("no", "charging", "complete", "discharging"),
    "ignition": ("off", "acc", "on"),
    "parking": KINDS,
    "plugged": (True, False),
    "moving": (True, False),
}


def sound(state: VehicleState) -> VehicleState:
    """The state without the readings that no car has: of another type, not a number, out of range.

    Adapters are others' code too, and what they read comes from outside: what is not sound is
    unknown. A state without a time is as old as time.
    """
    kept: dict[str, Any] = {"at_ms": state.at_ms if _within("at_ms", state.at_ms) else 0}
    for name in _RANGES.keys() - {"at_ms"}:
        value = getattr(state, name)
        kept[name] = value if _within(name, value) else None
    for name, words in _WORDS.items():
        value = getattr(state, name)
        known = type(value) in (bool, str) and value in words and type(value) is type(words[0])
        kept[name] = value if known else None
    temp: Any = state.pack_temp_dc
    whole = type(temp) is tuple and len(temp) == 2 and all(type(each) is int for each in temp)
    kept["pack_temp_dc"] = temp if whole and -1_000 <= temp[0] <= temp[1] <= 2_000 else None
    ages: Any = state.ages_ms
    kept["ages_ms"] = {
        name: age
        for name, age in (ages.items() if isinstance(ages, Mapping) else ())
        if type(age) is int and 0 <= age < 1 << 53
    }
    return VehicleState(**kept)


def _within(name: str, value: object) -> bool:
    low, high = _RANGES[name]
    return type(value) is int and low <= value <= high


def driver_is_back(state: VehicleState) -> bool:
    """Known to move or switched on: stop at once. However old the reading, it is the last one."""
    return state.moving is True or state.ignition in ("acc", "on")


def spendable(
    state: VehicleState | None,
    policy: Policy,
    now: Now,
    *,
    spent_today_mwh: int = 0,
    offset_at: OffsetAt = _utc,
    previous: BudgetRead | None = None,
    still_s: int = 0,
    at_any_hour: bool = False,
    upkeep: Upkeep | None = None,
    provides: Collection[str] = tuple(FRESH_MS),
    held: Collection[Reason] = (),
    link: Link | None = None,
) -> BudgetRead:
    """The budget that holds until the next reading, or until one that it needs is too old.

    `offset_at` places the policy's hours, tariff bands and departures (Monday is weekday 0); it is
    asked for the offset at the departure too, which a change of the clocks may come before.
    `still_s` is how long the car was seen to stand, where it does not say so itself;
    `at_any_hour` is the owner's word that quiet hours and the wait after parking do not count now;
    `upkeep` is what waiting has cost and work has not paid for yet.
    `previous` and `held` give the hysteresis: what stopped at a limit goes on only past the resume
    threshold. `held` are the limits that still hold (`limits_held`), whatever was told last.
    `provides` are the readings that the adapter can give at all. One that it cannot is missing like
    any other, unless the policy calls the machine stationary.
    `link` is None where bytes cost nobody anything, as in a simulation.
    """
    if previous is not None and not previous.may_run:
        held = {*held, previous.reason}
    if state is None:
        return stopped(Reason.READINGS)
    reason = _in_the_way(state, policy, now, held, provides)
    if reason is Reason.OK and not at_any_hour:
        reason = _bad_hour(state, policy, now, offset_at, still_s)
    if reason is Reason.OK and link is not None and _costs_bytes(policy, link):
        reason = Reason.METERED
    if reason is not Reason.OK:
        return stopped(reason)
    departs_s, departs_wh = _next_departure(state, policy, now, offset_at)
    late_wh = _late_wh(state, policy, now, offset_at)
    reserve_mwh = 1000 * max(policy.reserve_wh, departs_wh, late_wh or 0)
    day_mwh = policy.day_wh * 1000 - spent_today_mwh
    due_s = departs_s if late_wh is None else 0  # in which the charger may still catch up
    term_mwh = _term_mwh(state, policy, reserve_mwh, due_s, provides)
    if term_mwh is None:
        return stopped(Reason.READINGS)
    load_w, spend_mwh = policy.watt_max + policy.awake_w, min(day_mwh, term_mwh)
    least_mwh = _resume_mwh(state, policy) if Reason.BUDGET in held else 0
    if policy.watt_max <= 0 or day_mwh <= 0 or term_mwh <= least_mwh:
        return stopped(Reason.BUDGET)
    lease_s = min(LEASE_S_MAX, spend_mwh * 18 // (5 * load_w))  # mWh / W in seconds
    stay_s = LEASE_S_MAX
    if departs_s is not None or not policy.stationary:  # what stands for good leaves by its owner
        stay_s = stay_of(state, now, departs_s).lease_s_at(LEASE_PROBABILITY, LEASE_S_MAX)
    lease_s = min(lease_s, stay_s)
    if lease_s == 0:
        about_to_leave = departs_s is not None and departs_s == 0
        return stopped(Reason.DRAINING if about_to_leave else Reason.BUDGET)
    floor = floor_nano_per_s(state, policy, now, offset_at)
    if upkeep is not None:
        floor += upkeep.nano_per_s(floor)
    return BudgetRead(True, Reason.OK, spend_mwh, policy.watt_max, lease_s, floor, stay_s, load_w)


def stay_of(state: VehicleState, now: Now, departs_s: int | None) -> Stay:
    """What the readings say of the car's stay; the time since they were taken counts."""
    parked_s = state.parked_s
    if parked_s is not None:
        age_ms = state.ages_ms.get("parked_s", 0)
        parked_s += max(0, now.unix_ms - state.at_ms + age_ms) // 1000
    return Stay(state.parking, parked_s, departs_s)


def floor_nano_per_s(
    state: VehicleState, policy: Policy, now: Now, offset_at: OffsetAt = _utc
) -> int:
    """What a second of full load costs the owner: energy, and wear unless the plug carries it.

    The awake draw is in it: it is larger than that of one inference chip (250 against 36 W).
    """
    rate = tariff_nano_per_kwh(state, policy, now, offset_at)
    if state.tariff_nano_per_kwh is None:
        minute = _minute_of_week(now, offset_at) % 1440
        for band in policy.tariff:
            if (band.first_minute - minute) % 1440 <= PRICED_AHEAD_S // 60:
                rate = max(rate, band.nano_per_kwh)
    load_w = _up((policy.watt_max + policy.awake_w) * 1000, CHARGER_PERMILLE)
    if not (state.plugged is True and state.charging in _SURPLUS):
        rate += policy.wear_nano_per_kwh
    return _up(load_w * max(0, rate), 3_600_000)


def tariff_nano_per_kwh(
    state: VehicleState | None, policy: Policy, now: Now, offset_at: OffsetAt = _utc
) -> int:
    """What a kWh costs now: as the source says, else by the policy's bands."""
    if state is not None and state.tariff_nano_per_kwh is not None:
        return state.tariff_nano_per_kwh
    minute = _minute_of_week(now, offset_at) % 1440
    rates = [b.nano_per_kwh for b in policy.tariff if _in_band(minute, b[0], b[1])]
    # A minute that no band covers costs the dearest: never below the owner's cost.
    return max(rates or [band.nano_per_kwh for band in policy.tariff])


# ---- what stands in the way


def stopped(reason: Reason) -> BudgetRead:
    """Nothing may be spent, and why."""
    return BudgetRead(False, reason, 0, 0, 0, 0)


def _on_the_plug(state: VehicleState, policy: Policy, provides: Collection[str]) -> bool:
    """A stationary machine that has neither battery nor cable to read of runs from the mains."""
    mains = policy.stationary and not {"plugged", "soc_permille"} & set(provides)
    return state.plugged is True or bool(mains)


def _needed(policy: Policy, provides: Collection[str]) -> list[str]:
    """The readings without which nothing runs."""
    return [name for name in FRESH_MS if name in provides or not policy.stationary]


def fresh_ms_left(
    state: VehicleState | None, policy: Policy, now: Now, provides: Collection[str]
) -> int:
    """How long the readings that work needs stay fresh, if nothing more is read; 0: one is not."""
    if state is None:
        return 0
    left_ms = [_fresh_ms_left(state, name, now) for name in _needed(policy, provides)]
    return min(left_ms, default=LEASE_S_MAX * 1000)


def limits_held(
    state: VehicleState, policy: Policy, before: Collection[Reason]
) -> frozenset[Reason]:
    """Which of the limits with a resume threshold hold now, if those of `before` did until now.

    For whoever watches the car: what is told is one reason at a time, and a pause or a drive in
    between must not make another limit forget that it had stopped the car.
    """
    found = set()
    if _outside_temperatures(state, policy, before):
        found.add(Reason.TEMPERATURE)
    if _low_voltage(state, policy, before):
        found.add(Reason.LOW_VOLTAGE)
    if _at_floor(state, policy, before):
        found.add(Reason.CHARGE_FLOOR)
    return frozenset(found)


def _in_the_way(
    state: VehicleState,
    policy: Policy,
    now: Now,
    held: Collection[Reason],
    provides: Collection[str],
) -> Reason:
    """The first limit that does not allow work, the driver's return before all."""
    if driver_is_back(state):
        return Reason.DRIVING
    if not fresh_ms_left(state, policy, now, provides):
        return Reason.READINGS
    if _outside_temperatures(state, policy, held):
        return Reason.TEMPERATURE
    if _low_voltage(state, policy, held):
        return Reason.LOW_VOLTAGE
    if policy.plugged_rule != 1 and not _on_the_plug(state, policy, provides):
        return Reason.UNPLUGGED
    if policy.plugged_rule == 2 and state.charging not in _SURPLUS:
        # A charger in surplus mode (evcc: "pv") delivers only while there is surplus.
        return Reason.UNPLUGGED
    return Reason.CHARGE_FLOOR if _at_floor(state, policy, held) else Reason.OK


def _at_floor(state: VehicleState, policy: Policy, held: Collection[Reason]) -> bool:
    """Also on the plug: below its floor the car charges first."""
    floor = policy.soc_floor_permille
    if Reason.CHARGE_FLOOR in held:
        resume = policy.resume
        floor = max(floor, resume.soc_permille - 1 if resume else floor + RESUME_SOC_PERMILLE)
    if state.soc_permille is None:
        return Reason.CHARGE_FLOOR in held  # what was low is not known to have risen
    return state.soc_permille <= floor


def _low_voltage(state: VehicleState, policy: Policy, held: Collection[Reason]) -> bool:
    least_mv = policy.low_voltage_mv + RESUME_LOW_MV * (Reason.LOW_VOLTAGE in held)
    if state.low_voltage_mv is None:
        return Reason.LOW_VOLTAGE in held
    return state.low_voltage_mv < least_mv


def _outside_temperatures(state: VehicleState, policy: Policy, held: Collection[Reason]) -> bool:
    if state.pack_temp_dc is None:
        return Reason.TEMPERATURE in held  # a stationary machine may have no thermometer at all
    lowest, highest = state.pack_temp_dc
    low, high = policy.temp_dc
    if Reason.TEMPERATURE in held:
        resume = policy.resume
        low = max(low, resume.temp_low_dc) if resume else low + RESUME_TEMP_DC
        high = min(high, resume.temp_high_dc) if resume else high - RESUME_TEMP_DC
    return lowest < low or highest > high


def _fresh_ms_left(state: VehicleState, name: str, now: Now) -> int:
    age_ms = state.ages_ms.get(name)
    if getattr(state, name) is None or age_ms is None:
        return 0
    # A reading from the future means that a clock jumped: then its age is not known.
    since_ms = now.unix_ms - state.at_ms
    if since_ms < -FRESH_MS["moving"]:
        return 0
    return max(0, FRESH_MS[name] + 1 - age_ms - max(0, since_ms))


def _costs_bytes(policy: Policy, link: Link) -> bool:
    """Whether work would spend bytes of a mobile link that its owner does not give."""
    if link.kind in ("wired", "wifi"):
        return False
    most = policy.metered_bytes_a_day
    return bool(policy.wifi_only) or (most is not None and link.metered_bytes >= most)


def _bad_hour(
    state: VehicleState, policy: Policy, now: Now, offset_at: OffsetAt, still_s: int
) -> Reason:
    """What the time says against work, of the day and since the car stands."""
    weekday, minute = divmod(_minute_of_week(now, offset_at), 1440)
    for quiet in policy.quiet or ():
        past_midnight = quiet.first_minute > quiet.last_minute >= minute
        began = (weekday - past_midnight) % 7
        if quiet.weekdays >> began & 1 and _in_band(minute, *quiet[1:]):
            return Reason.QUIET_HOURS
    stands_s = stay_of(state, now, None).parked_s or 0
    if max(stands_s, still_s) < (policy.idle_s or 0):
        return Reason.JUST_PARKED
    return Reason.OK


# ---- energy


def _term_mwh(
    state: VehicleState,
    policy: Policy,
    reserve_mwh: int,
    departs_s: int | None,
    provides: Collection[str],
) -> int | None:
    """The battery's or the plug's side of the minimum; None if the readings do not say."""
    if state.soc_permille is None:  # a stationary machine without a battery
        return _UNBOUNDED_MWH if _on_the_plug(state, policy, provides) else None
    capacity_mwh = _capacity_mwh(state)
    if capacity_mwh is None:
        return None
    stored_mwh = capacity_mwh * state.soc_permille // 1000
    if state.usable_wh is not None:
        stored_mwh = min(stored_mwh, state.usable_wh * 1000)  # the careful one of the two
    floor_mwh = _up(capacity_mwh * policy.soc_floor_permille, 1000)
    battery_mwh = stored_mwh - floor_mwh - reserve_mwh
    if state.plugged is not True:
        return battery_mwh
    if state.charging == "complete":
        return _UNBOUNDED_MWH  # the plug carries the load and nothing is owed to the battery
    if state.charging != "charging" or state.pack_power_w is None or state.pack_power_w <= 0:
        # The cable is in and nothing flows: the load drains the battery, if its owner lets it.
        return battery_mwh if policy.plugged_rule == 1 else 0
    if departs_s is None:
        return _UNBOUNDED_MWH
    limit = 1000 if state.charge_limit_permille is None else state.charge_limit_permille
    due_mwh = max(0, capacity_mwh * limit // 1000 - stored_mwh)
    # W x s / 3600 is Wh; x 1000 / 1000 for mWh and for a charger's efficiency in per mille: some
    # sources know the power at the wall only.
    flows_mwh = state.pack_power_w * departs_s * CHARGER_PERMILLE // 3600
    return flows_mwh - due_mwh


def _resume_mwh(state: VehicleState, policy: Policy) -> int:
    work_mwh = (policy.watt_max + policy.awake_w) * RESUME_WORK_S * 1000 // 3600
    capacity_mwh = _capacity_mwh(state)
    if capacity_mwh is None:
        return work_mwh
    return min(work_mwh, capacity_mwh * RESUME_SOC_PERMILLE // 1000)


def _capacity_mwh(state: VehicleState) -> int | None:
    if state.capacity_wh is not None:
        return state.capacity_wh * 1000
    if state.usable_wh is None or not state.soc_permille:
        return None
    return state.usable_wh * 1_000_000 // state.soc_permille


def _next_departure(
    state: VehicleState, policy: Policy, now: Now, offset_at: OffsetAt
) -> tuple[int | None, int]:
    """Seconds to the earliest departure that the car or the policy knows, and the Wh of the day's
    neediest."""
    known: list[tuple[int, int]] = []
    if state.departure_ms is not None and state.departure_ms > now.unix_ms:
        known.append(((state.departure_ms - now.unix_ms) // 1000, 0))
    minute = _minute_of_week(now, offset_at)
    into_minute_s = now.unix_ms // 1000 % 60
    for departure in policy.departures or ():
        ahead_min = (departure.weekday * 1440 + departure.minute - minute) % _WEEK_MIN
        # Half past seven is half past seven, also on the day after the clocks have changed.
        then_ms = now.unix_ms + ahead_min * 60_000
        ahead_min -= offset_at(then_ms) - offset_at(now.unix_ms)
        known.append((max(0, ahead_min * 60 - into_minute_s), departure.wh))
    if not known:
        return None, 0
    departs_s, first_wh = min(known)
    # Whichever comes first, the neediest trip of the day ahead must be in the battery.
    return departs_s, max(first_wh, *(wh for ahead_s, wh in known if ahead_s <= RESERVE_AHEAD_S), 0)


def _late_wh(state: VehicleState, policy: Policy, now: Now, offset_at: OffsetAt) -> int | None:
    """The Wh of departures whose hour has passed and that the driver may still come for; None if
    there are none. A car that has stood for less than that has been away since."""
    minute, into_minute_s = _minute_of_week(now, offset_at), now.unix_ms // 1000 % 60
    stood_s = stay_of(state, now, None).parked_s
    late = []
    for departure in policy.departures or ():
        since_min = (minute - departure.weekday * 1440 - departure.minute) % _WEEK_MIN
        since_s = since_min * 60 + into_minute_s
        if 0 < since_s < LATE_S and (stood_s is None or stood_s >= since_s):
            late.append(departure.wh)
    return max(late, default=None)


def _minute_of_week(now: Now, offset_at: OffsetAt) -> int:
    # 1 January 1970 was a Thursday, weekday 3.
    return (now.unix_ms // 60_000 + offset_at(now.unix_ms) + 3 * 1440) % _WEEK_MIN


def _in_band(minute: int, first: int, last: int) -> bool:
    """`last` included; a band may go past midnight."""
    return first <= minute <= last if first <= last else minute >= first or minute <= last


def _up(number: int, by: int) -> int:
    return -(-number // by)
