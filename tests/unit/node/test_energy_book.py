"""The day's energy, what waiting costs, the diary's lines: by hand, over restarts and midnight."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from meshnode.errors import LocalResource
from meshnode.node import founding
from meshnode.node.diary import DIARY_FILE, KEEP_MS, Diary, Entry, read_diary
from meshnode.node.energy_book import BOOK_FILE, ENTRY_MS, GAP_MS_MAX, Drawn, EnergyBook
from meshnode.protocol.budget import VehicleState, spendable
from meshnode.protocol.events import BudgetRead
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, NetworkId, Now
from meshnode.protocol.upkeep import SPREAD_S, SURCHARGE_PERMILLE_MAX, Upkeep
from meshnode.vehicle.sim import PARKED

MONDAY_MS = 1_767_571_200_000
POLICY = founding.draft_policy(
    Account(bytes(32)), NetworkId(bytes(8)), founding.PolicyTerms(awake_w=250, day_wh=1_000)
)
WH_UJ = 3_600_000_000
MAY = BudgetRead(True, Reason.OK, 1, 300, 3_600, 0)
PAUSED = BudgetRead(False, Reason.PAUSED, 0, 0, 0, 0)


def utc(_unix_ms: int) -> int:
    return 0


class Day:
    """A book and what its node does, second by second of one clock."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.drawn = Drawn(0, 0, 0, False, False)
        self.state: VehicleState = PARKED
        self.at_s = 0
        self.book = self.opened()

    def opened(self) -> EnergyBook:
        return EnergyBook(self.home, lambda: self.drawn, Diary(self.home))

    @property
    def now(self) -> Now:
        return Now(self.at_s * 1_000, MONDAY_MS + self.at_s * 1_000)

    def goes_on(self, seconds: int, told: BudgetRead, look_s: int = 60) -> None:
        for _ in range(seconds // look_s):
            self.look(told)
            self.at_s += look_s
        self.look(told)

    def look(self, told: BudgetRead) -> None:
        self.book.account(self.now, self.state, POLICY, told, utc)

    def works(self, seconds: int, wh: int, battery_wh: int = 0) -> None:
        self.drawn = self.drawn._replace(working=True)
        for _ in range(seconds // 60):
            self.look(MAY)
            self.at_s += 60
            share = seconds // 60
            self.drawn = self.drawn._replace(
                work_uj=self.drawn.work_uj + wh * WH_UJ // share,
                battery_uj=self.drawn.battery_uj + battery_wh * WH_UJ // share,
                work_ms=self.drawn.work_ms + 60_000,
            )
        self.look(MAY)
        self.drawn = self.drawn._replace(working=False)


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(tmp_path)


def test_an_hour_of_waiting_and_an_hour_of_work_by_hand(day: Day) -> None:
    day.goes_on(3_600, MAY)
    assert day.book.spent_today_mwh() == 250_000
    # 250 Wh / 0.9 at 0.30 a kWh
    assert day.book.upkeep.due_nano == pytest.approx(250 / 0.9 * 0.3 / 1_000 * 1e9, rel=1e-3)
    due_nano = day.book.upkeep.due_nano
    day.works(3_600, 200)
    assert day.book.spent_today_mwh() == 450_000
    assert day.book.upkeep.due_nano == due_nano  # the price that held had no share for upkeep


def test_who_may_not_work_or_sleeps_waits_for_nobody(day: Day) -> None:
    day.goes_on(3_600, PAUSED)
    day.drawn = day.drawn._replace(asleep=True)
    day.goes_on(3_600, MAY)
    day.drawn = day.drawn._replace(asleep=False)
    day.at_s += 2 * GAP_MS_MAX // 1_000  # a suspended machine drew nothing for the mesh
    day.look(MAY)
    assert day.book.spent_today_mwh() == 0 == day.book.upkeep.due_nano


def test_the_day_ends_at_the_owners_midnight(day: Day) -> None:
    day.goes_on(3_600, MAY)

    def east(_unix_ms: int) -> int:
        return 23 * 60

    day.book.account(day.now, day.state, POLICY, MAY, east)
    assert day.book.spent_today_mwh() == 0
    assert day.book.upkeep.due_nano  # what is due stays due


def test_the_days_energy_is_the_budgets(day: Day) -> None:
    day.goes_on(3_600, MAY)
    left = spendable(
        replace(PARKED, at_ms=day.now.unix_ms),
        POLICY,
        day.now,
        spent_today_mwh=day.book.spent_today_mwh(),
        upkeep=day.book.upkeep,
    )
    bare = spendable(replace(PARKED, at_ms=day.now.unix_ms), POLICY, day.now)
    assert left.spendable_mwh == bare.spendable_mwh - 250_000 == 750_000
    assert left.floor_nano_per_s > bare.floor_nano_per_s
    day.works(3_600, 750)
    spent = day.book.spent_today_mwh()
    empty = spendable(
        replace(PARKED, at_ms=day.now.unix_ms), POLICY, day.now, spent_today_mwh=spent
    )
    assert empty.reason is Reason.BUDGET


def test_upkeep_is_paid_by_work_and_bounded_by_the_price() -> None:
    upkeep = Upkeep()
    upkeep.waited(7_200_000)
    per_s = upkeep.nano_per_s(10_000)
    assert 7_200_000 / SPREAD_S <= per_s <= 7_200_000 / SPREAD_S + 500
    upkeep.worked(1_000 * SPREAD_S, per_s)
    assert upkeep.due_nano == 0 == upkeep.nano_per_s(10_000)
    upkeep.waited(10**15)
    assert upkeep.nano_per_s(10_000) == 10_000 * SURCHARGE_PERMILLE_MAX // 1_000


def test_a_restart_remembers_the_day_and_what_is_due(day: Day) -> None:
    day.goes_on(3_600, MAY)
    spent, due = day.book.spent_today_mwh(), day.book.upkeep.due_nano
    day.book.close(day.now)
    day.book = day.opened()
    assert (day.book.spent_today_mwh(), day.book.upkeep.due_nano) == (spent, due)
    day.look(MAY)
    assert day.book.spent_today_mwh() == spent
    for broken in ("", "{}", '{"day": "x", "spent_uj": 1, "due_nano": 1}', "[1]"):
        (day.home / BOOK_FILE).write_text(broken)
        assert day.opened().spent_today_mwh() == 0


# ---- the diary


def lines(day: Day) -> list[Entry]:
    day.book.close(day.now)
    return list(read_diary(day.home, 0, 1 << 60))


def test_a_line_every_ten_minutes_and_at_each_change(day: Day) -> None:
    day.goes_on(1_800, MAY)
    day.goes_on(300, PAUSED)
    day.state = replace(PARKED, plugged=False, charging="discharging")
    day.works(600, 100, battery_wh=100)
    found = lines(day)
    assert all(before.until_ms == after.from_ms for before, after in pairwise(found))
    assert all(entry.until_ms - entry.from_ms <= ENTRY_MS + 60_000 for entry in found)
    assert {entry.reason for entry in found} == {0, int(Reason.PAUSED)}
    assert sum(entry.waiting_uj for entry in found) == 250 * 1_800 * 1_000_000
    assert sum(entry.work_uj for entry in found) == 100 * WH_UJ
    assert sum(entry.battery_uj for entry in found) == 100 * WH_UJ
    assert sum(entry.working_ms for entry in found) == 600_000
    # 0.1 kWh out of the battery at 0.05
    assert sum(entry.wear_nano for entry in found) == pytest.approx(5_000_000, rel=0.01)


class ToldDiary(Diary):
    """Says when its thread has written something."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.written = trio.Event()

    def add(self, entries: Sequence[Entry]) -> None:
        super().add(entries)
        trio.from_thread.run_sync(self.written.set)


def test_lines_are_written_while_the_node_runs(day: Day) -> None:
    async def main() -> None:
        diary = ToldDiary(day.home)
        day.book = EnergyBook(day.home, lambda: day.drawn, diary)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(day.book.run)
            day.goes_on(1_300, MAY)
            with trio.fail_after(10):
                await diary.written.wait()
            nursery.cancel_scope.cancel()
        assert list(read_diary(day.home, 0, 1 << 60))

    trio.run(main)


def test_the_diary_forgets_and_a_broken_one_is_said(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    old = Entry(0, 1_000, 500, True, 0, 0, 0, 0, 0, 0, 0)
    diary.add([old])
    diary.add([replace(old, from_ms=KEEP_MS, until_ms=KEEP_MS + 5_000)])
    assert [entry.from_ms for entry in read_diary(tmp_path, 0, 1 << 60)] == [KEEP_MS]
    assert list(read_diary(tmp_path / "none", 0, 1)) == []
    (tmp_path / DIARY_FILE).write_text("this is no database, and long enough to be seen as none")
    diary.add([old])  # the car goes on
    assert diary.failed == 1
    with pytest.raises(LocalResource, match=r"diary\.sqlite cannot be read"):
        list(read_diary(tmp_path, 0, 1))


def test_the_diary_knows_no_place_and_no_trip(day: Day) -> None:
    day.goes_on(1_300, MAY)
    day.book.close(day.now)
    with sqlite3.connect(day.home / DIARY_FILE) as file:
        columns = {row[1] for row in file.execute("PRAGMA table_info(entry)")}
    assert columns == set(Entry.__slots__)
    words = ("lat", "lon", "place", "trip", "speed", "vin", "position", "parking", "departure")
    assert not [name for name in columns for word in words if word in name.split("_")]


def test_short_calls_between_two_looks_are_no_waiting(day: Day) -> None:
    """95 of 100 seconds of calls, all over when somebody looks."""
    day.look(MAY)
    for _ in range(36):
        day.at_s += 100
        day.drawn = day.drawn._replace(
            work_ms=day.drawn.work_ms + 95_000, work_uj=day.drawn.work_uj + 14 * WH_UJ
        )
        day.look(MAY)
    assert day.book.spent_today_mwh() == 36 * 14_000 + 13_000  # 3 minutes of waiting: 12.5 Wh


def test_a_run_that_says_nothing_counts_as_the_most_that_it_may_draw(day: Day) -> None:
    told = MAY.__class__(True, Reason.OK, 1, 300, 3_600, 0, None, 550)
    day.look(told)
    day.drawn = day.drawn._replace(working=True)
    day.goes_on(3_600, told)
    assert day.book.spent_today_mwh() == 550_000
    # Its meters come with its end: they count, and no longer what was feared.
    day.drawn = day.drawn._replace(working=False, work_uj=400 * WH_UJ, work_ms=3_600_000)
    day.look(told)
    day.at_s += 2
    day.look(told)
    assert day.book.spent_today_mwh() == 401_000  # two seconds of waiting


def test_a_clock_that_is_set_back_does_not_fill_the_day_again(day: Day) -> None:
    day.goes_on(3_600, MAY)
    for shift_s in (86_400, -86_400):
        jumped = Now(day.now.mono_ms, day.now.unix_ms + 1_000 * shift_s)
        day.book.account(jumped, day.state, POLICY, MAY, utc)
    spent = day.book.spent_today_mwh()
    day.look(MAY)
    assert day.book.spent_today_mwh() == spent == 0  # the day ahead has begun, and goes on


def test_work_pays_for_what_waiting_has_cost(day: Day) -> None:
    day.goes_on(3_600, MAY)
    due = day.book.upkeep.due_nano
    bare = spendable(replace(PARKED, at_ms=day.now.unix_ms), POLICY, day.now).floor_nano_per_s
    paying = BudgetRead(True, Reason.OK, 1, 300, 3_600, bare + 10_000, None, 550)
    day.drawn = day.drawn._replace(working=True)
    day.goes_on(60, paying, look_s=1)
    day.goes_on(60, paying, look_s=60)
    assert day.book.upkeep.due_nano == due - 120 * 10_000


def test_what_a_stopped_run_cost_is_due_like_waiting(day: Day) -> None:
    bare = spendable(replace(PARKED, at_ms=MONDAY_MS), POLICY, day.now).floor_nano_per_s
    paying = BudgetRead(True, Reason.OK, 1, 300, 3_600, bare + 10_000, None, 550)
    day.book.upkeep.waited(10**9)
    day.look(paying)
    day.drawn = day.drawn._replace(working=True)
    day.goes_on(60, paying)
    assert day.book.upkeep.due_nano == 10**9 - 60 * 10_000
    # The driver comes: 40 s of it were of the unit in hand, which nobody pays for.
    day.drawn = Drawn(2 * WH_UJ, WH_UJ, 60_000, False, False, WH_UJ, WH_UJ // 2, 40_000)
    day.look(PAUSED)
    energy, wear = 0.3 / 0.9 * 1e6, POLICY.wear_nano_per_kwh / 2_000  # at 0.30 a kWh
    due = 10**9 - 20 * 10_000 + energy + wear
    assert day.book.upkeep.due_nano == pytest.approx(due, abs=2)
    day.look(PAUSED)
    assert day.book.upkeep.due_nano == pytest.approx(due, abs=2)  # once


def test_no_more_comes_back_than_was_taken(day: Day) -> None:
    """Two slots at a time: the time of the runs is twice that of the clock."""
    bare = spendable(replace(PARKED, at_ms=MONDAY_MS), POLICY, day.now).floor_nano_per_s
    paying = BudgetRead(True, Reason.OK, 1, 300, 3_600, bare + 10_000, None, 550)
    day.book.upkeep.waited(100_000)
    day.look(paying)
    day.drawn = day.drawn._replace(working=True)
    day.goes_on(60, paying)
    assert day.book.upkeep.due_nano == 0
    day.drawn = Drawn(0, 0, 120_000, False, False, 0, 0, 120_000)
    day.look(PAUSED)
    assert day.book.upkeep.due_nano == 100_000
