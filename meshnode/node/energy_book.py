"""What this car has given today, in energy and metered bytes, and what its waiting has cost: kept
beside the ledger.

    driver's meters + vehicle_watch's looks -> EnergyBook -> budget.spendable (day's energy, upkeep)
                                                          -> diary (`meshnode report`)

Energy of runs is what the meters say. A car that may work, is awake and has nothing to do draws
`awake_w` for the mesh; that is counted from the clock. It all counts against the owner's Wh a day.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import trio

from meshnode.protocol.budget import (
    CHARGER_PERMILLE,
    OffsetAt,
    VehicleState,
    floor_nano_per_s,
    tariff_nano_per_kwh,
)
from meshnode.protocol.events import BudgetRead
from meshnode.protocol.papers import Policy
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Now
from meshnode.protocol.upkeep import Upkeep

from .diary import Diary, Entry

BOOK_FILE: Final = "energy.json"
SAVE_MS: Final = 60_000  # a crash forgets so much waiting; work is in the receipts
GAP_MS_MAX: Final = 120_000
"""Between two looks; a longer gap was a suspended machine, which drew nothing for the mesh."""
ENTRY_MS: Final = 600_000  # the diary has a line at least so often, and at each change of reason
_UJ_PER_MWH: Final = 3_600_000
_BYTES_MAX: Final = 4_096


class Drawn(NamedTuple):
    """What the machine knows: energy of all runs since it began, and what it does now."""

    work_uj: int
    battery_uj: int
    work_ms: int
    working: bool
    asleep: bool
    unpaid_uj: int = 0  # of it, for runs that were stopped: nobody pays for those
    unpaid_battery_uj: int = 0
    unpaid_ms: int = 0


class EnergyBook:
    """Made at the node's start; `account` is called at every look at the vehicle."""

    def __init__(self, home: Path, drawn: Callable[[], Drawn], diary: Diary | None = None) -> None:
        self._path = home / BOOK_FILE
        self._drawn = drawn
        self._diary = diary
        self.upkeep = Upkeep()
        self._day = -1
        self._spent_uj = 0
        self._open_uj = 0  # of it, what no meter has said yet
        self._surcharge_nano_per_s = 0  # in the price of the work in hand
        self._paid_nano = 0  # for upkeep, by the work in hand
        self.metered_bytes = 0  # today, over a link that somebody is billed for
        self._last: tuple[Now, Drawn] | None = None
        self._saved_mono_ms = 0
        self._entry: Entry | None = None  # the diary's line that is being filled
        self._lines: list[Entry] = []
        self._filled = trio.Event()
        self._read()

    def spent_today_mwh(self) -> int:
        """In steps of a Wh, rounded up: each other value would be a new budget."""
        return -(-self._spent_uj // (1_000 * _UJ_PER_MWH)) * 1_000

    def account(
        self,
        now: Now,
        state: VehicleState | None,
        policy: Policy,
        told: BudgetRead | None,
        offset_at: OffsetAt,
        metered_bytes: int = 0,
    ) -> None:
        """The time since the last look; `told` is the budget that held in it, and `metered_bytes`
        went over a mobile link in it."""
        drawn = self._drawn()
        day = (now.unix_ms // 60_000 + offset_at(now.unix_ms)) // 1_440
        if day > self._day:  # a clock that is set back does not fill the day again
            self._day, self._spent_uj, self._open_uj, self.metered_bytes = day, 0, 0, 0
        self.metered_bytes += metered_bytes
        last, self._last = self._last, (now, drawn)
        if last is None or told is None:
            return
        elapsed_ms = now.mono_ms - last[0].mono_ms
        work_uj = max(0, drawn.work_uj - last[1].work_uj)
        battery_uj = min(work_uj, max(0, drawn.battery_uj - last[1].battery_uj))
        worked_ms = min(elapsed_ms, max(0, drawn.work_ms - last[1].work_ms))
        waited_ms = 0
        if told.may_run and not drawn.working and not drawn.asleep and elapsed_ms <= GAP_MS_MAX:
            waited_ms = elapsed_ms - worked_ms
        waiting_uj = policy.awake_w * waited_ms * 1_000
        self._spend(work_uj, waiting_uj, told.load_w * elapsed_ms * 1_000 if drawn.working else 0)
        rate = tariff_nano_per_kwh(state, policy, now, offset_at)
        on_battery = state is not None and state.plugged is False
        waiting_battery_uj = waiting_uj if on_battery else 0
        cost_nano = energy_nano(waiting_uj, rate)
        wear = policy.wear_nano_per_kwh
        self.upkeep.waited(cost_nano + wear_nano(waiting_battery_uj, wear))
        self._stopped(drawn, last[1], rate, wear)
        if drawn.working and told.may_run and state is not None:
            bare = floor_nano_per_s(state, policy, now, offset_at)
            self._surcharge_nano_per_s = max(0, told.floor_nano_per_s - bare)
            self._paid_nano += self.upkeep.worked(elapsed_ms, self._surcharge_nano_per_s)
        elif not drawn.working:
            self._paid_nano = 0
        self._note(
            now,
            Entry(
                now.unix_ms,
                now.unix_ms,
                None if state is None else state.soc_permille,
                None if state is None else state.plugged,
                int(Reason.ASLEEP if told.may_run and drawn.asleep else told.reason),
                elapsed_ms if drawn.working else worked_ms,
                work_uj,
                waiting_uj,
                battery_uj + waiting_battery_uj,
                cost_nano + energy_nano(work_uj, rate),
                wear_nano(battery_uj + waiting_battery_uj, wear),
            ),
        )
        if now.mono_ms - self._saved_mono_ms >= SAVE_MS:
            self.save(now)

    def _stopped(self, drawn: Drawn, before: Drawn, rate: int, wear: int) -> None:
        """Runs that were stopped brought nothing: what they drew is due like waiting, and so is
        what was taken for upkeep that they would have paid."""
        unpaid_uj = max(0, drawn.unpaid_uj - before.unpaid_uj)
        battery_uj = max(0, drawn.unpaid_battery_uj - before.unpaid_battery_uj)
        unpaid_ms = max(0, drawn.unpaid_ms - before.unpaid_ms)
        self.upkeep.waited(energy_nano(unpaid_uj, rate) + wear_nano(battery_uj, wear))
        back_nano = min(self._paid_nano, unpaid_ms * self._surcharge_nano_per_s // 1_000)
        self._paid_nano -= back_nano
        self.upkeep.waited(back_nano)

    def _spend(self, work_uj: int, waiting_uj: int, open_uj: int) -> None:
        """`open_uj` is the most that a run draws which has said nothing yet: it counts until its
        meters come, or a unit of an hour could take what the day does not have."""
        if work_uj:
            said_uj = min(self._open_uj, work_uj)
            self._open_uj -= said_uj
            self._spent_uj += work_uj - said_uj
        elif open_uj:
            self._open_uj += open_uj
            self._spent_uj += open_uj
        else:
            self._spent_uj -= self._open_uj
            self._open_uj = 0
        self._spent_uj += waiting_uj

    def save(self, now: Now) -> None:
        """A full disk is no reason to stop: then the day begins anew at a restart."""
        self._saved_mono_ms = now.mono_ms
        kept = {
            "day": self._day,
            "spent_uj": self._spent_uj,
            "due_nano": self.upkeep.due_nano,
            "metered_bytes": self.metered_bytes,
        }
        draft = self._path.with_suffix(".new")
        try:
            draft.write_text(json.dumps(kept) + "\n")
            os.replace(draft, self._path)
        except OSError:
            return

    async def run(self) -> NoReturn:
        """Task: lines into the diary, in a thread, because each waits for the disk."""
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            lines, self._lines = self._lines, []
            if self._diary is not None:
                await trio.to_thread.run_sync(self._diary.add, lines)

    def close(self, now: Now) -> None:
        """The last line is short; it is written here, where nothing waits for the loop any more."""
        if self._diary is not None:
            self._diary.add([*self._lines, *([self._entry] if self._entry else [])])
        self._lines, self._entry = [], None
        self.save(now)

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                kept = json.loads(file.read(_BYTES_MAX))
            day, spent_uj, due_nano = (kept[key] for key in ("day", "spent_uj", "due_nano"))
            metered = kept.get("metered_bytes", 0)
            if all(type(each) is int for each in (day, spent_uj, due_nano, metered)):
                self.metered_bytes = max(0, metered)
                self._day, self._spent_uj = day, max(0, spent_uj)
                self.upkeep.due_nano = max(0, due_nano)
        except (OSError, ValueError, TypeError, KeyError):
            return  # the first start, or a file that somebody has broken: the day begins anew

    def _note(self, now: Now, entry: Entry) -> None:
        """Into the line in hand, or a new one: another reason, another plug, or ten minutes."""
        held = self._entry
        if held is None:
            self._entry = entry
            return
        same = (held.reason, held.plugged) == (entry.reason, entry.plugged)
        if same and now.unix_ms - held.from_ms < ENTRY_MS:
            self._entry = held.joined(entry)
            return
        self._lines.append(held.until(now.unix_ms))
        self._filled.set()
        self._entry = entry


def energy_nano(terminal_uj: int, nano_per_kwh: int) -> int:
    """What so much at the battery's terminals costs at the wall."""
    wall_uj = terminal_uj * 1_000 // CHARGER_PERMILLE
    return wall_uj * nano_per_kwh // (_UJ_PER_MWH * 1_000_000)


def wear_nano(battery_uj: int, nano_per_kwh: int) -> int:
    return battery_uj * nano_per_kwh // (_UJ_PER_MWH * 1_000_000)
