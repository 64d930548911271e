"""What the VSS paths of a car say about its readings. Pure: values in, readings out.

Between `adapter`, which keeps the newest value of every path, and `VehicleState`. Paths, types and
units as in the VSS releases 4.0, 5.1 and 6.0; a car has those of its release.

It never raises and never guesses. A value of the wrong type, NaN, infinite or outside of what a car
can have is unknown, and so is a signal whose unit the broker names and we do not expect. Where a
broker names no unit, the ranges below tell Wh from kWh, mV from V and kelvin from Celsius. They
cannot tell a fraction from a percentage: a charge of 0.8 reads as 0.8 %, an empty battery, which
stops the car. A charge limit of 0.8 is unknown, because a low limit would let a car work more.

Position, VIN and odometer have no line here, so nobody asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from meshnode.vehicle.state import READINGS, ChargingState

Value = bool | int | float | str | None
"""Of one path; None where the broker has none."""

_BATTERY: Final = "Vehicle.Powertrain.TractionBattery"
CHARGE: Final = f"{_BATTERY}.StateOfCharge.Current"
ENERGY: Final = f"{_BATTERY}.StateOfCharge.CurrentEnergy"
CAPACITY: Final = f"{_BATTERY}.NetCapacity"
POWER: Final = f"{_BATTERY}.CurrentPower"
COLDEST: Final = f"{_BATTERY}.Temperature.Min"
HOTTEST: Final = f"{_BATTERY}.Temperature.Max"
AVERAGE: Final = f"{_BATTERY}.Temperature.Average"
CHARGING: Final = f"{_BATTERY}.Charging.IsCharging"
DISCHARGING: Final = f"{_BATTERY}.Charging.IsDischarging"
CHARGE_LIMIT: Final = f"{_BATTERY}.Charging.ChargeLimit"
CABLE_4: Final = f"{_BATTERY}.Charging.IsChargingCableConnected"
CABLE_5: Final = f"{_BATTERY}.Charging.ChargingPort.AnyPosition.IsChargingCableConnected"
TIMER: Final = f"{_BATTERY}.Charging.Timer.Mode"
TIMER_TIME: Final = f"{_BATTERY}.Charging.Timer.Time"
CONDITIONING: Final = f"{_BATTERY}.BatteryConditioning.RequestedMode"
CONDITIONING_TIME: Final = f"{_BATTERY}.BatteryConditioning.TargetTime"
AMBIENT: Final = "Vehicle.Exterior.AirTemperature"
LOW_VOLTAGE: Final = "Vehicle.LowVoltageBattery.CurrentVoltage"
MOVING: Final = "Vehicle.IsMoving"
SPEED: Final = "Vehicle.Speed"
IGNITION: Final = "Vehicle.LowVoltageSystemState"

PROVIDES: Final = READINGS - {"parking", "parked_s", "tariff_nano_per_kwh"}


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A number, and what a car can have of it; both in the unit of VSS."""

    units: tuple[str, ...]  # in lower case
    least: float
    most: float
    scale: int  # of our unit, to one of VSS's


_PERCENT: Final = ("percent", "%")
_CELSIUS: Final = ("celsius", "degc", "°c")
_NUMBERS: Final[Mapping[str, _Quantity]] = {
    CHARGE: _Quantity(_PERCENT, 0, 100, 10),
    ENERGY: _Quantity(("kwh",), 0, 1000, 1000),
    CAPACITY: _Quantity(("kwh",), 1, 1000, 1000),
    POWER: _Quantity(("w",), -1_000_000, 1_000_000, 1),
    COLDEST: _Quantity(_CELSIUS, -60, 120, 10),
    HOTTEST: _Quantity(_CELSIUS, -60, 120, 10),
    AVERAGE: _Quantity(_CELSIUS, -60, 120, 10),
    CHARGE_LIMIT: _Quantity(_PERCENT, 20, 100, 10),
    AMBIENT: _Quantity(_CELSIUS, -70, 70, 10),
    LOW_VOLTAGE: _Quantity(("v",), 0, 60, 1000),
    SPEED: _Quantity(("km/h",), -250, 500, 1000),
}
_TRUTHS: Final = (CHARGING, DISCHARGING, CABLE_4, CABLE_5, MOVING)
_WORDS: Final = (TIMER, TIMER_TIME, CONDITIONING, CONDITIONING_TIME, IGNITION)

PATHS: Final = frozenset((*_NUMBERS, *_TRUTHS, *_WORDS))
"""All that is ever asked for."""

MOTION: Final[Mapping[str, str]] = {MOVING: "truth", SPEED: "number", IGNITION: "word"}
"""What is asked for again and again, and what each is: no two the same, see `matched`."""

STILL_M_PER_H: Final = 500  # slower than this is the noise of a sensor
LIMIT_NEAR_PERMILLE: Final = 10  # cars stop charging about a point below their limit
DRAIN_W: Final = 100  # more than this out of the battery is not carried by the plug
ROUNDED_WH: Final = 1000  # a capacity is in whole kWh
TIME_CHARACTERS_MAX: Final = 40

_IGNITION: Final[Mapping[str, Literal["off", "acc", "on"]]] = {
    "LOCK": "off",
    "OFF": "off",
    "ACC": "acc",
    "ON": "on",
    "START": "on",
}


def has_our_unit(path: str, unit: str) -> bool:
    """Whether a signal is in the unit that we read it in; a broker may name none."""
    quantity = _NUMBERS.get(path)
    return not unit or quantity is None or unit.lower() in quantity.units


def matched(paths: Sequence[str], answer: Sequence[Value]) -> dict[str, Value]:
    """Which of the values that answer a GetValues belongs to which of the paths that it asked for.

    KUKSA promises the order of the request. But while a provider has claimed any signal, brokers
    0.6.0 to 0.7.0 answer in the order in which providers do, and leave out what none has claimed.
    So each value goes where its type belongs, and a path that was left out is not in the result.
    An answer that fits in no way makes all the paths unknown.
    """
    if len(paths) == 1:
        return dict(zip(paths, answer, strict=False))
    place = {MOTION[path]: path for path in paths}
    found: dict[str, Value] = {}
    for value in answer:
        if value is None:
            continue
        path = place.get(_kind(value))
        if path is None or path in found:
            return dict.fromkeys(paths)
        found[path] = value
    # As many as were asked for: those without a value are known to have none.
    return found if len(answer) < len(paths) else {path: found.get(path) for path in paths}


def readings(values: Mapping[str, Value], now_ms: int) -> dict[str, Any]:
    """The fields of `VehicleState` that the newest values of all paths give, for unix `now_ms`.

    All of `PROVIDES`, None where unknown.
    """
    car = _Car(values)
    soc_permille, limit_permille = car.number(CHARGE), car.number(CHARGE_LIMIT)
    plugged, power_w = _plugged(car), car.number(POWER)
    full = (
        plugged is True
        and soc_permille is not None
        and soc_permille >= (limit_permille or 1000) - LIMIT_NEAR_PERMILLE
        and (power_w is None or power_w >= -DRAIN_W)
    )
    usable_wh, capacity_wh = _energy(car)
    return {
        "soc_permille": soc_permille,
        "usable_wh": usable_wh,
        "capacity_wh": capacity_wh,
        "plugged": plugged,
        "charging": _charging(car, full),
        "pack_power_w": power_w,
        "charge_limit_permille": limit_permille,
        "pack_temp_dc": _pack_temp_dc(car),
        "ambient_dc": car.number(AMBIENT),
        "low_voltage_mv": car.number(LOW_VOLTAGE),
        "moving": _moving(car),
        "ignition": _IGNITION.get(car.word(IGNITION) or ""),
        "departure_ms": _departure_ms(car, now_ms),
    }


# ---- one value


class _Car:
    """The newest value of each path, of the type that the path has, or None."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def truth(self, path: str) -> bool | None:
        value = self._values.get(path)
        return value if isinstance(value, bool) else None

    def word(self, path: str) -> str | None:
        value = self._values.get(path)
        return value if isinstance(value, str) else None

    def number(self, path: str) -> int | None:
        """In our unit."""
        value, quantity = self._values.get(path), _NUMBERS[path]
        if value is None or isinstance(value, bool | str):
            return None
        if not quantity.least <= value <= quantity.most:  # so is NaN
            return None
        return round(value * quantity.scale)

    def time_ms(self, path: str) -> int | None:
        """Unix. VSS has these in UTC, so one that does not name its zone is in UTC too."""
        text = self.word(path) or ""
        if len(text) > TIME_CHARACTERS_MAX:
            return None
        try:
            time = datetime.fromisoformat(text)
            if time.tzinfo is None:
                time = time.replace(tzinfo=UTC)
            return int(time.timestamp() * 1000)
        except (ValueError, OverflowError):
            return None


def _kind(value: Value) -> str:
    if isinstance(value, bool):
        return "truth"
    return "word" if isinstance(value, str) else "number"


# ---- several values make one reading; where they disagree, the careful side holds


def _energy(car: _Car) -> tuple[int | None, int | None]:
    """Wh in the battery and Wh that fit in; neither, if more is in it than fits."""
    usable_wh, capacity_wh = car.number(ENERGY), car.number(CAPACITY)
    if usable_wh is not None and capacity_wh is not None:
        if usable_wh > capacity_wh * 11 // 10 + ROUNDED_WH:
            return None, None
    return usable_wh, capacity_wh


def _plugged(car: _Car) -> bool | None:
    """A broker may have the path of 4.0, of 5.1, or both for old readers."""
    known = {car.truth(CABLE_4), car.truth(CABLE_5)} - {None}
    return known.pop() if len(known) == 1 else None


def _charging(car: _Car, full: bool) -> ChargingState | None:
    charging, discharging = car.truth(CHARGING), car.truth(DISCHARGING)
    if charging and discharging:
        return None
    if discharging:
        return "discharging"
    if charging is None:
        return None
    if charging:
        return "charging"
    return "complete" if full else "no"


def _pack_temp_dc(car: _Car) -> tuple[int, int] | None:
    """Lowest and highest cell. One of them alone says nothing about the other end; an average
    stands for both only where a car has neither."""
    lowest, highest = car.number(COLDEST), car.number(HOTTEST)
    if lowest is None and highest is None:
        lowest = highest = car.number(AVERAGE)
    if lowest is None or highest is None or lowest > highest:
        return None
    return lowest, highest


def _moving(car: _Car) -> bool | None:
    """Moving if either says so. A park lock or a handbrake is no proof of standing: both may be
    engaged on a car that rolls, or is towed."""
    moving, speed = car.truth(MOVING), car.number(SPEED)
    rolls = None if speed is None else abs(speed) >= STILL_M_PER_H
    if moving or rolls:
        return True
    return rolls if moving is None else False


def _departure_ms(car: _Car, now_ms: int) -> int | None:
    """VSS has no departure. Charging that is to be over, or a battery that is to be ready for
    driving, at a time says that the car may leave then; the earliest that is still to come."""
    times: list[int | None] = []
    if car.word(TIMER) == "END_TIME":
        times.append(car.time_ms(TIMER_TIME))
    if car.word(CONDITIONING) == "DRIVING_PREPARATION":
        times.append(car.time_ms(CONDITIONING_TIME))
    return min((time for time in times if time is not None and time > now_ms), default=None)
