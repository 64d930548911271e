"""An owner's policy as a TOML file: read and written. BOINC's names where BOINC has one.

    policy.toml -> read_policy -> PolicyTerms -> founding.draft_policy -> signed by the account
    policy.mesh -> written     -> the file that says the same

Between the CLI (`meshnode policy`) and `founding`. Money is decimal in the file and 1e-9 of the
network's currency from here on; temperatures are degrees Celsius, 0.1 from here on.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError
from ..protocol import sandbox
from ..protocol.papers import (
    PURPOSE_COMPUTE,
    PURPOSE_ENERGY_BATTERY,
    PURPOSE_ENERGY_PLUG,
    PURPOSE_NETWORK,
    PURPOSE_STATISTICS,
    Band,
    Caps,
    Departure,
    Policy,
    Quiet,
    Resume,
    Submitters,
)
from ..protocol.types import Account
from ..vehicle.trace import WEEKDAYS
from .founding import PolicyTerms

POLICY_BYTES_MAX: Final = 1 << 16
NANO: Final = 10**9
WEAR_NANO_PER_KWH: Final = {"nmc": 50_000_000, "lfp": 20_000_000}
"""Price of a kWh out of the pack: pack price x (1 - residual) / full cycles of life. At 128 $/kWh
(NMC) and 81 (LFP; BloombergNEF's survey of December 2025) over 3,000 and 4,000 cycles that is 0.043
and 0.020; rounded up for the owner, whom a new pack costs more than it costs a maker."""
PURPOSES: Final = {
    "compute": PURPOSE_COMPUTE,
    "network": PURPOSE_NETWORK,
    "plug": PURPOSE_ENERGY_PLUG,
    "battery": PURPOSE_ENERGY_BATTERY,
    "statistics": PURPOSE_STATISTICS,
}


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """What a file says, and on which line each of its keys stands."""

    terms: PolicyTerms
    purposes: int | None  # None: the file does not name any
    lines: Mapping[str, tuple[int, ...]]  # key or [[table]] -> its lines, from 1


# ---- reading


def read_policy(
    path: Path, base: PolicyTerms | None = None, only: Collection[str] | None = None
) -> PolicyFile:
    """What the file says; what it does not say stays as in `base`, or as the product has it.
    `only`: the keys that it may have, where not all of a policy's.
    UsageError, in one line with the place, for what is no policy."""
    base = base or PolicyTerms()
    try:
        with path.open("rb") as file:
            content = file.read(POLICY_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > POLICY_BYTES_MAX:
        raise UsageError(f"{path} has more than {POLICY_BYTES_MAX} bytes")
    try:
        text = content.decode()
        found = tomllib.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{path} is no TOML: {said}") from None
    lines = _lines(text)
    terms: dict[str, Any] = {}
    purposes: int | None = None
    for key, value in found.items():
        try:
            if only is not None and key not in only:
                raise ValueError(f"a fleet narrows only {', '.join(sorted(only))}")
            if key == "purposes":
                purposes = sum({_purpose(each) for each in _list(value)})
                continue
            if key not in _READERS:
                raise ValueError(f"no policy says it; there are {', '.join(sorted(_READERS))}")
            terms.update(_READERS[key](value, terms))
        except ValueError as error:
            at = lines.get(key, (0,))[0]
            raise UsageError(f"{path}, line {at}: {key}: {error}") from None
        except ArithmeticError:
            raise UsageError(f"{path}, line {lines.get(key, (0,))[0]}: {key}: no number") from None
    return PolicyFile(replace(base, **_joined(terms, base)), purposes, lines)


def _lines(text: str) -> dict[str, tuple[int, ...]]:
    """Where each key of the first level stands, and each table of a list: for messages only."""
    lines: dict[str, tuple[int, ...]] = {}
    inside = False  # a table's own keys are named by the table
    for number, line in enumerate(text.splitlines(), 1):
        if heading := re.match(r"\s*\[\[?\s*(\w+)", line):
            lines[heading[1]] = (*lines.get(heading[1], ()), number)
            inside = True
        elif not inside and (key := re.match(r"\s*(\w+)\s*=", line)):
            lines[key[1]] = (number,)
    return lines


def _joined(terms: dict[str, Any], base: PolicyTerms) -> dict[str, Any]:
    """Keys that make one field together."""
    battery = terms.pop("run_on_batteries", base.plugged_rule == 1)
    surplus = terms.pop("surplus_only", base.plugged_rule == 2)
    terms["plugged_rule"] = 2 if surplus else int(battery)
    low, high = base.temp_dc
    terms["temp_dc"] = (terms.pop("temp_low_dc", low), terms.pop("temp_high_dc", high))
    soc, temps = terms.pop("resume_soc", None), terms.pop("resume_temps", None)
    if soc is not None or temps is not None:
        floor = terms.get("soc_floor_permille", base.soc_floor_permille)
        low, high = temps or (terms["temp_dc"][0] + 10, terms["temp_dc"][1] - 10)
        terms["resume"] = Resume(min(1_000, floor + 20) if soc is None else soc, low, high)
    if "submitters" in terms:
        terms.setdefault("accounts", ())
    terms["caps"] = Caps(*(terms.pop(f"caps_{each}", kept) for each, kept in _caps(base.caps)))
    return terms


def _caps(caps: Caps) -> list[tuple[str, int]]:
    return list(zip(Caps._fields, caps, strict=True))


def terms_of(policy: Policy) -> PolicyTerms:
    """The owner's terms that a signed policy was drafted from."""
    mode, accounts = policy.submitters
    return PolicyTerms(
        policy.soc_floor_permille,
        policy.reserve_wh,
        policy.day_wh,
        policy.watt_max,
        policy.plugged_rule,
        policy.temp_dc,
        policy.low_voltage_mv,
        policy.wear_nano_per_kwh,
        policy.tariff,
        policy.efficiency_permille,
        policy.awake_w,
        mode,
        accounts,
        policy.caps,
        policy.departures,
        policy.metered_bytes_a_day,
        policy.sandbox_least or 0,
        policy.resume,
        bool(policy.stationary),
        policy.quiet,
        policy.idle_s,
        bool(policy.wifi_only),
        policy.disk_interval_s,
    )


def changed(before: Policy, after: Policy) -> list[str]:
    """Lines of the file that differ, for a person: what is gone with -, what has come with +."""
    old, new = (_pieces(written(each)) for each in (before, after))
    gone = [f"- {line}" for piece in old if piece not in new for line in piece]
    return gone + [f"+ {line}" for piece in new if piece not in old for line in piece]


def _pieces(text: str) -> list[list[str]]:
    """Lines by themselves, but those of a table together: alone they say little."""
    head, *tables = text.split("\n\n[[")
    lines = [[line] for line in head.splitlines() if line]
    return lines + [f"[[{table}".splitlines() for table in tables]


# ---- the keys


def _whole(low: int, high: int, times: int = 1) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}, not {value!r}")
        return value * times

    return read


def _is_number(value: Any) -> bool:
    """TOML knows nan and inf."""
    return type(value) is int or (type(value) is Decimal and value.is_finite())


def _tenths(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"a number from {low} to {high}, not {value!s}")
        tenths = Decimal(value) * 10
        if tenths != int(tenths):
            raise ValueError(f"{value} has more than one decimal")
        return int(tenths)

    return read


def money(value: Any) -> int:
    """Decimal units of the currency as 1e-9 of it."""
    if not _is_number(value) or not 0 <= value <= 1_000:
        raise ValueError(f"an amount from 0 to 1000, not {value!s}")
    nano = Decimal(value) * NANO
    if nano != int(nano):
        raise ValueError(f"{value} has more than nine decimals")
    return int(nano)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"true or false, not {value!r}")
    return value


def _bytes_or_any(value: Any) -> int | None:
    """`any` takes a bound back that an earlier policy had: what a file does not say stays."""
    return None if value == "any" else _whole(0, 1 << 50)(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list, not {value!r}")
    return value


def _one(name: str, read: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    return lambda value, _: {name: read(value)}


def _purpose(name: Any) -> int:
    if not isinstance(name, str) or name not in PURPOSES:
        raise ValueError(f"{name!r} is none of {', '.join(PURPOSES)}")
    return PURPOSES[name]


def _submitters(value: Any, _: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, list):
        try:
            accounts = tuple(Account(bytes.fromhex(each)) for each in value)
        except (TypeError, ValueError):
            accounts = ()
        if not accounts or any(len(each) != 32 for each in accounts) or len(accounts) > 256:
            raise ValueError("a list holds 1 to 256 accounts of 64 hexadecimal digits")
        return {"submitters": Submitters.LIST, "accounts": accounts}
    if not isinstance(value, str) or value not in ("mine", "fleet", "network"):
        raise ValueError(f"mine, fleet, network or a list of accounts, not {value!r}")
    return {"submitters": Submitters[value.upper()]}


def _chemistry(value: Any, before: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, str) or value not in WEAR_NANO_PER_KWH:
        raise ValueError(f"one of {', '.join(WEAR_NANO_PER_KWH)}, not {value!r}")
    # A price of the owner's own wins, wherever it stands.
    return {"wear_nano_per_kwh": before.get("wear_nano_per_kwh", WEAR_NANO_PER_KWH[value])}


def _layers(value: Any) -> int:
    try:
        return int(sandbox.of_names(",".join(_list(value))))
    except TypeError:
        raise ValueError("a list of names of sandbox layers") from None


def minute_of_day(value: Any) -> int:
    """`07:30` is 450; `24:00` is the end of the day, 1440."""
    found = re.fullmatch(r"(\d\d?):(\d\d)", value) if isinstance(value, str) else None
    minute = int(found[1]) * 60 + int(found[2]) if found and int(found[2]) < 60 else -1
    if not 0 <= minute <= 1440:
        raise ValueError(f"a time such as '07:30', not {value!r}")
    return minute


def _days(value: Any) -> list[int]:
    days = [
        WEEKDAYS.index(each) if isinstance(each, str) and each in WEEKDAYS else -1
        for each in _list(value)
    ]
    if not days or -1 in days:
        raise ValueError(f"a list of {', '.join(WEEKDAYS)}, not {value!r}")
    return sorted(set(days))


_EVERY_DAY: Final = list(WEEKDAYS)


def _rows(
    value: Any, most: int, needs: set[str], may: set[str], read: Callable[[dict[str, Any]], Any]
) -> list[Any]:
    rows = _list(value)
    if not 1 <= len(rows) <= most:
        raise ValueError(f"1 to {most} of them")
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("each a table")
        for name in row.keys() - needs - may:
            raise ValueError(f"{name} is nothing that it says")
        for name in sorted(needs - row.keys()):
            raise ValueError(f"{name} is missing")
    return [read(row) for row in rows]


def _between(row: dict[str, Any]) -> tuple[int, int]:
    """`until` is the minute that is no longer in it: a band of 00:00 to 24:00 is the whole day."""
    first, until = minute_of_day(row["from"]), minute_of_day(row["until"])
    if first == 1440 or first == until:
        raise ValueError(f"from {row['from']} until {row['until']} is no time at all")
    return first, (until - 1) % 1440


def _tariff(value: Any) -> tuple[Band, ...]:
    needs = {"from", "until", "per_kwh"}
    return tuple(
        _rows(value, 48, needs, set(), lambda row: Band(*_between(row), money(row["per_kwh"])))
    )


def _departures(value: Any) -> tuple[Departure, ...]:
    def read(row: dict[str, Any]) -> list[Departure]:
        minute, wh = minute_of_day(row["at"]), _whole(0, 1_000_000)(row.get("wh", 0))
        if minute == 1440:
            raise ValueError("24:00 is 00:00 of the next day")
        return [Departure(day, minute, wh) for day in _days(row.get("days", _EVERY_DAY))]

    every = [each for row in _rows(value, 28, {"at"}, {"days", "wh"}, read) for each in row]
    if len(every) > 28:
        raise ValueError("at most 28 departures a week")
    return tuple(every)


def _quiet(value: Any) -> tuple[Quiet, ...]:
    def read(row: dict[str, Any]) -> Quiet:
        days = sum(1 << day for day in _days(row.get("days", _EVERY_DAY)))
        return Quiet(days, *_between(row))

    return tuple(_rows(value, 28, {"from", "until"}, {"days"}, read))


def _resume_temps(value: Any) -> tuple[int, int]:
    if len(_list(value)) != 2:
        raise ValueError("two temperatures, the lower one first")
    low, high = (_tenths(-50, 80)(each) for each in value)
    return low, high


_BIG: Final = 1_000_000_000
_READERS: Final[dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]]] = {
    "battery_charge_min_pct": _one("soc_floor_permille", _whole(0, 100, 10)),
    "battery_charge_resume_pct": _one("resume_soc", _whole(0, 100, 10)),
    "battery_min_temperature": _one("temp_low_dc", _tenths(-50, 80)),
    "battery_max_temperature": _one("temp_high_dc", _tenths(-50, 80)),
    "battery_resume_temperatures": _one("resume_temps", _resume_temps),
    "battery_chemistry": _chemistry,
    "run_on_batteries": _one("run_on_batteries", _flag),
    "surplus_only": _one("surplus_only", _flag),
    "idle_time_to_run": _one("idle_s", _whole(0, 1_440, 60)),
    "low_voltage_min_v": _one("low_voltage_mv", lambda value: _tenths(0, 60)(value) * 100),
    "reserve_wh": _one("reserve_wh", _whole(0, _BIG)),
    "day_wh": _one("day_wh", _whole(0, _BIG)),
    "watt_max": _one("watt_max", _whole(0, _BIG)),
    "awake_w": _one("awake_w", _whole(0, 100_000)),
    "efficiency_pct": _one("efficiency_permille", _whole(1, 100, 10)),
    "wear_per_kwh": _one("wear_nano_per_kwh", money),
    "stationary": _one("stationary", _flag),
    "submitters": _submitters,
    "account_leases_max": _one("caps_leases", _whole(0, _BIG)),
    "account_bytes_max": _one("caps_bytes", _whole(0, 1 << 50)),
    "account_device_s_max": _one("caps_device_s", _whole(0, _BIG)),
    "disk_interval": _one("disk_interval_s", _whole(0, 86_400)),
    "network_wifi_only": _one("wifi_only", _flag),
    "metered_bytes_a_day": _one("metered_bytes_a_day", _bytes_or_any),
    "sandbox_least": _one("sandbox_least", _layers),
    "tariff": _one("tariff", _tariff),
    "departure": _one("departures", _departures),
    "quiet": _one("quiet", _quiet),
}


# ---- writing


def written(policy: Policy, purposes: int | None = None) -> str:
    """The policy as a file, every key with its value; what `read_policy` takes back."""
    lines = [
        "# This car's policy. To change it: meshnode policy set FILE",
        "",
    ]
    lines += [f"{key} = {value}" for key, value in _plain(policy, purposes)]
    for band in policy.tariff:
        price = _money(band.nano_per_kwh)
        lines += ["", "[[tariff]]", *_span(band.first_minute, band.last_minute)]
        lines += [f"per_kwh = {price}"]
    for departure in policy.departures or ():
        days = _names([departure.weekday])
        clock = clock_of(departure.minute)
        lines += ["", "[[departure]]", f"days = {days}", f'at = "{clock}"', f"wh = {departure.wh}"]
    for quiet in policy.quiet or ():
        days = _names([day for day in range(7) if quiet.weekdays >> day & 1])
        lines += ["", "[[quiet]]", f"days = {days}", *_span(quiet.first_minute, quiet.last_minute)]
    return "\n".join(lines) + "\n"


def _plain(policy: Policy, purposes: int | None) -> list[tuple[str, str]]:
    low, high = policy.temp_dc
    mode, accounts = policy.submitters
    names = [f'"{account.hex()}"' for account in accounts]
    rows: list[tuple[str, object]] = [
        ("battery_charge_min_pct", policy.soc_floor_permille // 10),
        ("battery_min_temperature", low / 10),
        ("battery_max_temperature", high / 10),
        ("low_voltage_min_v", policy.low_voltage_mv / 1_000),
        ("reserve_wh", policy.reserve_wh),
        ("day_wh", policy.day_wh),
        ("watt_max", policy.watt_max),
        ("awake_w", policy.awake_w),
        ("efficiency_pct", policy.efficiency_permille // 10),
        ("wear_per_kwh", _money(policy.wear_nano_per_kwh)),
        ("run_on_batteries", _yes(policy.plugged_rule == 1)),
        ("surplus_only", _yes(policy.plugged_rule == 2)),
        ("stationary", _yes(bool(policy.stationary))),
        ("network_wifi_only", _yes(bool(policy.wifi_only))),
        ("idle_time_to_run", (policy.idle_s or 0) // 60),
        ("submitters", f"[{', '.join(names)}]" if names else f'"{mode.name.lower()}"'),
    ]
    rows += [(f"account_{name}_max", cap) for name, cap in _caps(policy.caps)]
    if policy.disk_interval_s is not None:
        rows.append(("disk_interval", policy.disk_interval_s))
    if policy.metered_bytes_a_day is not None:
        rows.append(("metered_bytes_a_day", policy.metered_bytes_a_day))
    if policy.resume is not None:
        soc, resume_low, resume_high = policy.resume
        rows.insert(1, ("battery_charge_resume_pct", soc // 10))
        rows.insert(4, ("battery_resume_temperatures", [resume_low / 10, resume_high / 10]))
    if policy.sandbox_least is not None:
        layers = (f'"{name}"' for name in sandbox.listed(policy.sandbox_least))
        rows.append(("sandbox_least", f"[{', '.join(layers)}]"))
    if purposes is not None:
        given = (f'"{name}"' for name, bit in PURPOSES.items() if purposes & bit)
        rows.append(("purposes", f"[{', '.join(given)}]"))
    return [(key, str(value)) for key, value in rows]


def _yes(value: bool) -> str:
    return "true" if value else "false"


def _money(nano: int) -> str:
    whole, rest = divmod(nano, NANO)
    return f"{whole}.{rest:09d}".rstrip("0").ljust(len(str(whole)) + 2, "0")


def clock_of(minute: int) -> str:
    """450 is `07:30`."""
    return f"{minute // 60:02d}:{minute % 60:02d}"


def _span(first: int, last: int) -> list[str]:
    return [f'from = "{clock_of(first)}"', f'until = "{clock_of(last + 1)}"']


def _names(days: list[int]) -> str:
    return "[" + ", ".join(f'"{WEEKDAYS[day]}"' for day in days) + "]"
