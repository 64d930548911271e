"""Job records on their way to the store: many in one Persist, a few milliseconds apart.

Every Persist wakes the journal's thread, and with one unit per lease that thread and its commits
cost more than the work (measured: half of a submitter's CPU). Only what a promise hangs on leaves
at once; results and first attempts wait here for company.
"""

from __future__ import annotations

from collections.abc import Callable

from .effects import Record
from .outbox import Outbox
from .types import Durability

SHELF_MS = 4
SHELF_RECORDS_MAX = 64


class Shelf:
    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox
        self._records: list[Record] = []
        self._then: list[Callable[[], None]] = []
        self._failed: list[Callable[[], None]] = []
        self._due_mono_ms: int | None = None

    def add(
        self, record: Record, then: Callable[[], None] | None, failed: Callable[[], None]
    ) -> None:
        self._records.append(record)
        if then is not None:
            self._then.append(then)
        self._failed.append(failed)
        if self._due_mono_ms is None:
            self._due_mono_ms = self._out.now.mono_ms + SHELF_MS
        if len(self._records) >= SHELF_RECORDS_MAX:
            self.flush()

    def flush(self) -> int | None:
        """Store all that waits, in the order it came; the seq to wait for, None if nothing did."""
        self._due_mono_ms = None
        records, self._records = self._records, []
        then, self._then = self._then, []
        failed, self._failed = self._failed, []
        if not records:
            return None
        return self._out.persist(
            tuple(records), Durability.PROCESS, lambda: _call(then), lambda: _call(failed)
        )

    def deadline(self) -> int | None:
        return self._due_mono_ms

    def tick(self) -> None:
        if self._due_mono_ms is not None and self._due_mono_ms <= self._out.now.mono_ms:
            self.flush()


def _call(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
