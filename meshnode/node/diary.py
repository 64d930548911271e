"""The car's own diary: what it gave, what stopped it and what that cost, in lines of ten minutes.

Written by `energy_book`, read by `meshnode report`. It never leaves this machine, and knows no
place and no trip: charge, plug and reason. An SQLite file of its own beside the ledger, because it
is no record of money and may be deleted at any time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final

from meshnode.errors import LocalResource

DIARY_FILE: Final = "diary.sqlite"
KEEP_MS: Final = 400 * 86_400_000
LINES_MAX: Final = 200_000  # ten minutes each, and a year has 52,560; changes of reason come on top
_BUSY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A while in which the same held. Energies in microjoule at the terminals, money in 1e-9."""

    from_ms: int  # unix
    until_ms: int
    soc_permille: int | None  # at its end
    plugged: bool | None
    reason: int  # 0: it might work
    working_ms: int
    work_uj: int
    waiting_uj: int  # awake, allowed to work, idle
    battery_uj: int  # of the two, out of the traction battery
    energy_nano: int
    wear_nano: int

    def joined(self, after: Entry) -> Entry:
        return replace(
            after,
            from_ms=self.from_ms,
            working_ms=self.working_ms + after.working_ms,
            work_uj=self.work_uj + after.work_uj,
            waiting_uj=self.waiting_uj + after.waiting_uj,
            battery_uj=self.battery_uj + after.battery_uj,
            energy_nano=self.energy_nano + after.energy_nano,
            wear_nano=self.wear_nano + after.wear_nano,
        )

    def until(self, unix_ms: int) -> Entry:
        return replace(self, until_ms=max(self.until_ms, unix_ms))


_COLUMNS: Final = ", ".join(Entry.__slots__)
_MAKE: Final = (
    "CREATE TABLE IF NOT EXISTS entry(from_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL,"
    " soc_permille INTEGER, plugged INTEGER, reason INTEGER NOT NULL, working_ms INTEGER NOT NULL,"
    " work_uj INTEGER NOT NULL, waiting_uj INTEGER NOT NULL, battery_uj INTEGER NOT NULL,"
    " energy_nano INTEGER NOT NULL, wear_nano INTEGER NOT NULL) STRICT"
)


class Diary:
    """Lines into the file; one that fails loses its lines, not the car."""

    def __init__(self, home: Path) -> None:
        self._path = home / DIARY_FILE
        self.failed = 0

    def add(self, entries: Sequence[Entry]) -> None:
        """Thread: waits for the disk."""
        if not entries:
            return
        try:
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S)) as file, file:
                file.execute(_MAKE)
                rows = [astuple(entry) for entry in entries]
                marks = ", ".join("?" * len(Entry.__slots__))
                file.executemany(f"INSERT INTO entry({_COLUMNS}) VALUES({marks})", rows)
                file.execute(
                    "DELETE FROM entry WHERE until_ms < ?", (entries[-1].until_ms - KEEP_MS,)
                )
                oldest = "SELECT rowid FROM entry ORDER BY rowid DESC LIMIT -1 OFFSET ?"
                file.execute(f"DELETE FROM entry WHERE rowid IN ({oldest})", (LINES_MAX,))
        except (sqlite3.Error, OverflowError):
            self.failed += 1


def read_diary(home: Path, from_ms: int, until_ms: int) -> Iterator[Entry]:
    """Lines that touch the time, the oldest first. LocalResource for a file that is none."""
    path = home / DIARY_FILE
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_BUSY_S)) as file:
            rows = file.execute(
                f"SELECT {_COLUMNS} FROM entry WHERE until_ms > ? AND from_ms < ? ORDER BY from_ms",
                (from_ms, until_ms),
            )
            for row in rows:
                plugged = None if row[3] is None else bool(row[3])
                yield Entry(row[0], row[1], row[2], plugged, *row[4:])
    except sqlite3.Error as error:
        raise LocalResource(f"{path} cannot be read: {error}") from None
