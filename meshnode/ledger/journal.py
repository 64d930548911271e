"""The trio side of the store: `persist` never blocks, outcomes come back as events in order.

    driver --persist(effect)--> queue --> one writer thread --commit--> disk
    driver <--journal.events--  Persisted | PersistFailed  <--run_sync_soon--'

Group commit: the writer takes all that waits and commits it as one transaction per database, so
under load one fsync serves many. Opened once by `meshnode.node`; holds the home's lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.effects import (
    HeldRecord,
    JobRecord,
    Persist,
    Record,
    ResultRecord,
    SignedObject,
)
from meshnode.protocol.events import PersistFailed
from meshnode.protocol.reasons import Reason

from .checkpoint import Checkpointer
from .lock import hold_home
from .schema import JOBS_BYTES_MAX
from .store import Outcome, Store

PENDING_MAX = 16_384  # persists accepted and not yet answered, answers not yet read included
PENDING_BYTES_MAX = 128 << 20  # of their payloads
GROUP_BYTES_MAX = 4 << 20  # of one transaction: bounds how long the first of a group waits
REFUSED_MAX = 4_096  # unread answers of persists over the bound; past it the driver is stuck
BUSY_S = 0.02  # since the last commit: more is likely to come
GATHER_S = 0.002
"""How long the first persist of a group waits for others while the journal is busy.

A persist that finds the writer waiting wakes it, and the wake-up takes the trio thread the GIL for
up to a switch interval: 14 % of its time at 150 leases a second. A sleeping writer costs nothing.
"""
IDLE_S = 2.0  # without a persist for so long, the writer checkpoints


class Journal:
    """Made by `open_journal`. All methods belong to the trio thread."""

    def __init__(self, store: Store, checkpointer: Checkpointer) -> None:
        self._store = store
        self._checkpointer = checkpointer
        self._kick = threading.Event()
        self._ending = threading.Event()
        self._queue: queue.SimpleQueue[tuple[Persist, int] | _Prune | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._pending = 0
        self._pending_bytes = 0
        self._closing = False
        self._send, self.events = trio.open_memory_channel[Outcome](PENDING_MAX + REFUSED_MAX)

    def persist(self, effect: Persist) -> None:
        """Queue `effect`; its outcome comes through `events`, in the order of the calls.

        Over the bound the outcome is `PersistFailed(STORAGE)` at once, ahead of those in work.
        """
        if self._closing:
            raise LocalProtocolError("persist after the journal was closed")
        size = sum(_size(record) for record in effect.records)
        unread = self.events.statistics().current_buffer_used
        over = self._pending + unread >= PENDING_MAX
        if self._pending + unread >= PENDING_MAX + REFUSED_MAX:
            raise LocalProtocolError("the journal's events are not being read")
        if over or (self._pending and self._pending_bytes + size > PENDING_BYTES_MAX):
            self._answer([PersistFailed(effect.seq, Reason.STORAGE)])
            return
        self._pending += 1
        self._pending_bytes += size
        self._queue.put((effect, size))

    def prune(self, ended_before_unix_ms: int) -> None:
        """Delete jobs that ended before then with all their rows, piece by piece, when idle."""
        if not self._closing:
            self._queue.put(_Prune(ended_before_unix_ms))

    # ---- the writer thread

    def _write(self) -> None:
        prune: _Prune | None = None
        committed_s = 0.0
        while True:
            chores = prune is not None or self._store.dirty
            try:
                # With a prune in work only look; with a checkpoint to make wait a little.
                taken = self._queue.get(prune is None, IDLE_S if chores else None)
            except queue.Empty:
                if prune is None:
                    if self._store.checkpoint_due(idle=True):
                        self._kick.set()
                elif not self._store.prune_step(prune.ended_before_unix_ms, _unix_ms()):
                    prune = None
                continue
            if taken is None:
                return
            if isinstance(taken, _Prune):
                prune = taken
                continue
            if time.monotonic() - committed_s < BUSY_S:
                self._ending.wait(GATHER_S)
            batch, size, follower = self._group(*taken)
            outcomes = self._store.commit(batch)
            committed_s = time.monotonic()
            self._token.run_sync_soon(self._committed, outcomes, size)
            if isinstance(follower, _Prune):
                prune = follower
            if self._store.checkpoint_due(idle=False):
                self._kick.set()
                self._store.checkpoint_if_swollen()
            if follower is _END:
                return

    def _group(self, first: Persist, size: int) -> tuple[list[Persist], int, object]:
        """What waits now, `first` included, and what ended the group if it was no persist."""
        batch = [first]
        while size < GROUP_BYTES_MAX:
            try:
                taken = self._queue.get_nowait()
            except queue.Empty:
                break
            if taken is None:
                return batch, size, _END
            if isinstance(taken, _Prune):
                return batch, size, taken
            batch.append(taken[0])
            size += taken[1]
        return batch, size, None

    # ---- the checkpointing thread

    def _checkpoint(self) -> None:
        while True:
            self._kick.wait()
            self._kick.clear()
            if self._closing:
                return  # closing the writer's connections checkpoints what is left
            self._checkpointer.run()

    # ---- back on the trio thread

    def _committed(self, outcomes: Sequence[Outcome], size: int) -> None:
        self._pending -= len(outcomes)
        self._pending_bytes -= size
        self._answer(outcomes)

    def _answer(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            try:
                self._send.send_nowait(outcome)
            except trio.BrokenResourceError:
                return  # nobody listens any more: the node is going down

    def _close(self) -> None:
        self._closing = True
        self._ending.set()
        self._queue.put(None)
        self._kick.set()


class _Prune:
    __slots__ = ("ended_before_unix_ms",)

    def __init__(self, ended_before_unix_ms: int) -> None:
        self.ended_before_unix_ms = ended_before_unix_ms


_END = object()


@asynccontextmanager
async def open_journal(
    home: Path, *, jobs_bytes_max: int = JOBS_BYTES_MAX
) -> AsyncIterator[Journal]:
    """Lock the home, open its databases, run the writer. On leaving, all that waits is written.

    LocalResource if another process has the home or a database cannot be opened.
    """
    with ExitStack() as stack:
        stack.enter_context(hold_home(home))
        store = Store(home, jobs_bytes_max)
        stack.callback(store.close)
        checkpointer = Checkpointer(home)
        stack.callback(checkpointer.close)
        journal = Journal(store, checkpointer)
        stack.callback(journal._send.close)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_thread, journal._write)
            nursery.start_soon(_thread, journal._checkpoint)
            try:
                yield journal
            finally:
                journal._close()


async def _thread(run: Callable[[], None]) -> None:
    # A cancelled node still writes what it has accepted, and the home's lock must not be released
    # under a writing thread; PENDING_BYTES_MAX bounds how long that lasts.
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(run, limiter=trio.CapacityLimiter(1))


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


def _size(record: Record) -> int:
    match record:
        case SignedObject():
            return len(record.sealed)
        case JobRecord():
            return len(record.spec) + len(record.request)
        case ResultRecord():
            return len(record.digests) + len(record.outputs)
        case HeldRecord():
            return len(record.offer) + len(record.lease) + len(record.outputs)
        case _:
            return 0
