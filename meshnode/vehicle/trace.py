"""A week of a car: where it stands, until when, with which charger, and what the drives take.

A TOML file, `week.toml` beside this one where none is named. Read by `car.TracedCar`. It says what
kind of place, never which; nobody's own trace leaves the machine that it is on.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from meshnode.errors import UsageError
from meshnode.protocol.forecast import KINDS, Parking

from .battery import PackSpec

WEEK_MIN: Final = 7 * 1440
TRACE_BYTES_MAX: Final = 1 << 20
STAYS_MAX: Final = 1_000
SHIPPED: Final = Path(__file__).with_name("week.toml")
WEEKDAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


class Stay(NamedTuple):
    """Minutes since Monday 00:00, local; the drive that ends the stay is after `until_min`."""

    kind: Parking
    from_min: int
    until_min: int
    charger_w: int  # at the wall; 0: not plugged in
    drive_wh: int
    drive_min: int


@dataclass(frozen=True, slots=True)
class Trace:
    """It repeats each week; the first stay begins on Monday at 00:00, or in the drive before it."""

    name: str
    pack: PackSpec
    soc_permille: int  # on the first Monday
    ambient_dc: tuple[int, int]  # of each day, at 04:00 and at 16:00
    stays: tuple[Stay, ...]


def load_trace(path: Path = SHIPPED) -> Trace:
    """UsageError, in one line, for a file that is no trace."""
    try:
        with path.open("rb") as file:
            text = file.read(TRACE_BYTES_MAX + 1)
        if len(text) > TRACE_BYTES_MAX:
            raise UsageError(f"{path} has more than {TRACE_BYTES_MAX} bytes")
        return _trace(tomllib.loads(text.decode()))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path} is no trace: {said}") from None


def minute_of_week(text: Any) -> int:
    """`Mon 07:30` is 450; ValueError otherwise."""
    day, _, clock = str(text).partition(" ")
    hours, colon, minutes = clock.partition(":")
    if day not in WEEKDAYS or not colon or not (hours.isdigit() and minutes.isdigit()):
        raise ValueError(f"{text!r} is no time such as 'Mon 07:30'")
    if int(hours) > 23 or int(minutes) > 59:
        raise ValueError(f"{text!r} is no time of the day")
    return WEEKDAYS.index(day) * 1440 + int(hours) * 60 + int(minutes)


def _trace(found: dict[str, Any]) -> Trace:
    _only(
        found, {"name", "capacity_wh", "charge_limit_percent", "soc_percent", "ambient_c", "stay"}
    )
    coldest, warmest = (_whole(each, "ambient_c", -60, 60) * 10 for each in found["ambient_c"])
    rows = found["stay"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= STAYS_MAX:
        raise ValueError(f"it takes 1 to {STAYS_MAX} stays")
    stays: list[Stay] = []
    at_min = 0
    for row in rows:
        stay = _stay(row, at_min)
        stays.append(stay)
        at_min = stay.until_min + stay.drive_min
    if at_min > WEEK_MIN:
        # The last drive may go on into Monday; then the first stay begins so much later.
        stays[0] = stays[0]._replace(from_min=at_min - WEEK_MIN)
    elif at_min < WEEK_MIN:
        home = stays[0]
        stays.append(home._replace(from_min=at_min, until_min=WEEK_MIN, drive_wh=0, drive_min=0))
    pack = PackSpec(
        _whole(found["capacity_wh"], "capacity_wh", 1_000, 1_000_000),
        _whole(found["charge_limit_percent"], "charge_limit_percent", 1, 100) * 10,
    )
    soc = _whole(found["soc_percent"], "soc_percent", 0, 100) * 10
    return Trace(str(found["name"]), pack, soc, (coldest, warmest), tuple(stays))


def _stay(row: Any, from_min: int) -> Stay:
    if not isinstance(row, dict):
        raise ValueError("a stay is a table")
    _only(row, {"at", "until", "charger_w", "drive_wh", "drive_min"})
    kind = next((each for each in KINDS if each == row["at"]), None)
    if kind is None:
        raise ValueError(f"at is one of {', '.join(KINDS)}, not {row['at']!r}")
    until_min = minute_of_week(row["until"])
    if until_min < from_min:
        raise ValueError(f"the stay until {row['until']} ends before it begins")
    return Stay(
        kind,
        from_min,
        until_min,
        _whole(row.get("charger_w", 0), "charger_w", 0, 1_000_000),
        _whole(row["drive_wh"], "drive_wh", 0, 1_000_000),
        _whole(row["drive_min"], "drive_min", 1, 1_440),
    )


def _only(found: dict[str, Any], names: set[str]) -> None:
    for name in found:
        if name not in names:
            raise ValueError(f"{name} is nothing that a trace says")


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is a whole number from {low} to {high}, not {value!r}")
    return value
