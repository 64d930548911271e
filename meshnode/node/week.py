"""An owner's week: charge, what ran, what stopped it and what it cost and brought in. Pure.

    diary + ledger -> week_of_diary -> Week -> the terminal (cli/report.py) and week_page
    policy_trial   -> week_of_trial ->

Money is in 1e-9 of the network's currency, energies in microjoule at the battery's terminals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ..protocol.budget import OffsetAt
from ..protocol.reasons import Reason
from .diary import Entry
from .policy_trial import MONDAY_UNIX_MS, Trial

DAY_MS: Final = 86_400_000
MWH_UJ: Final = 3_600_000
WORKS: Final = "works"
WAITS: Final = "waits for work"


@dataclass(slots=True)
class Day:
    """One local day."""

    from_ms: int  # unix, its midnight
    working_ms: int = 0
    work_uj: int = 0
    waiting_uj: int = 0
    battery_uj: int = 0
    energy_nano: int = 0
    wear_nano: int = 0
    income_nano: int = 0


@dataclass(frozen=True, slots=True)
class Stretch:
    """While the same held; `what` is WORKS, WAITS, or the reason's sentence."""

    from_ms: int
    until_ms: int
    what: str


@dataclass(slots=True)
class Week:
    """Any number of whole local days."""

    title: str
    from_ms: int
    until_ms: int
    floor_permille: int
    days: list[Day] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    charge: list[tuple[int, int]] = field(default_factory=list)  # unix ms, per mille

    def held_ms(self) -> dict[str, int]:
        """How long what held, the longest first."""
        sums: dict[str, int] = {}
        for one in self.stretches:
            sums[one.what] = sums.get(one.what, 0) + one.until_ms - one.from_ms
        return dict(sorted(sums.items(), key=lambda row: -row[1]))

    def total(self) -> Day:
        whole = Day(self.from_ms)
        for day in self.days:
            for name in Day.__slots__[1:]:
                setattr(whole, name, getattr(whole, name) + getattr(day, name))
        return whole


def midnight(unix_ms: int, offset_at: OffsetAt) -> int:
    """Of the local day that the time is in."""
    local_ms = unix_ms + offset_at(unix_ms) * 60_000
    begins_ms = unix_ms - local_ms % DAY_MS
    # Where the clocks change in between, the day began with another offset.
    return begins_ms - (offset_at(begins_ms) - offset_at(unix_ms)) * 60_000


def week_of_diary(
    entries: Iterable[Entry],
    income: Iterable[tuple[int, int]],
    *,
    now_ms: int,
    days: int,
    floor_permille: int,
    offset_at: OffsetAt,
) -> Week:
    """The last `days` local days, today included. `income`: unix ms and amount of each receipt."""
    begins = [midnight(now_ms, offset_at)]
    for _ in range(days - 1):
        begins.append(midnight(begins[-1] - 1, offset_at))
    begins.reverse()
    week = Week(f"{days} days", begins[0], now_ms, floor_permille, [Day(at) for at in begins])
    for entry in entries:
        if entry.until_ms <= week.from_ms or entry.from_ms >= now_ms:
            continue
        day = week.days[_day_of(begins, max(entry.from_ms, week.from_ms))]
        day.working_ms += entry.working_ms
        day.work_uj += entry.work_uj
        day.waiting_uj += entry.waiting_uj
        day.battery_uj += entry.battery_uj
        day.energy_nano += entry.energy_nano
        day.wear_nano += entry.wear_nano
        if entry.soc_permille is not None:
            week.charge.append((entry.until_ms, entry.soc_permille))
        _append(week, max(entry.from_ms, week.from_ms), entry.until_ms, _what(entry))
    for at_ms, amount_nano in income:
        if week.from_ms <= at_ms < now_ms:
            week.days[_day_of(begins, at_ms)].income_nano += amount_nano
    return week


def week_of_trial(trial: Trial, floor_permille: int, title: str) -> Week:
    """A tried week, in the trace's own time; money is all in the first day."""
    minutes = len(trial.charge_permille)
    start = MONDAY_UNIX_MS
    whole = Day(
        start,
        trial.work_min * 60_000,
        trial.work_mwh * MWH_UJ,
        trial.standby_mwh * MWH_UJ,
        trial.from_battery_mwh * MWH_UJ,
        trial.energy_nano,
        trial.wear_nano,
        trial.income_nano,
    )
    days = [whole, *(Day(start + day * DAY_MS) for day in range(1, minutes // 1_440))]
    week = Week(title, start, start + minutes * 60_000, floor_permille, days)
    for one in trial.stretches:
        works = WORKS if one.working else WAITS
        what = one.reason.text if one.reason else works
        _append(week, start + one.from_min * 60_000, start + one.until_min * 60_000, what)
    every = range(0, minutes, 10)
    week.charge = [(start + at * 60_000, trial.charge_permille[at]) for at in every]
    return week


def _day_of(begins: list[int], at_ms: int) -> int:
    return max(index for index, begin in enumerate(begins) if begin <= at_ms)


def _what(entry: Entry) -> str:
    if entry.reason:
        try:
            return Reason.of(entry.reason).text
        except ValueError:
            return f"reason {entry.reason}"
    half = 2 * entry.working_ms >= entry.until_ms - entry.from_ms
    return WORKS if half and entry.working_ms else WAITS


def _append(week: Week, from_ms: int, until_ms: int, what: str) -> None:
    last = week.stretches[-1] if week.stretches else None
    if last is not None and last.what == what and last.until_ms == from_ms:
        week.stretches[-1] = Stretch(last.from_ms, until_ms, what)
    elif until_ms > from_ms:
        week.stretches.append(Stretch(from_ms, until_ms, what))
