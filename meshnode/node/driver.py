"""Carries the machine's effects out and feeds it events: the loop of the whole node.

    overlay, executor, journal --events--> one pump each --> Machine.handle --> effects
    control, vehicle watch ----- post ---------------------^         |
    overlay.send, executor.start, journal.persist, blobs, bulletin <-'

Everything between an event and its effects is one synchronous stretch: handling never waits and
carrying an effect out never blocks, so no two events overlap and no task switch stands between a
frame that came and the frame that answers it (a switch costs trio about 20 us, a call has a dozen).
The bounded queue is that of each source, whose back-pressure reaches the peer or worker behind it;
what is posted while an event is in hand waits in `_queue`. `Recall` and `Persisted` go first: a
pump gives way after `BATCH_MAX` events, and a recall is handled in the task that brings it.

An effect with `after=seq` waits until `Persisted(seq)` has come, in order; if `PersistFailed` comes
instead it is dropped, and the machine, which hears of it, knows what it had promised to nobody.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import trio

from meshnode.errors import LocalProtocolError, MeshError
from meshnode.protocol.effects import (
    Admit,
    Block,
    Dial,
    Effect,
    FetchBlob,
    FindProviders,
    Hangup,
    Join,
    Leave,
    Notify,
    Persist,
    Pin,
    Provide,
    Publish,
    Send,
    Sleep,
    StartExec,
    StopExec,
    Unpin,
)
from meshnode.protocol.events import (
    BlobFailed,
    BlobReady,
    Event,
    Persisted,
    PersistFailed,
    Recall,
    Tick,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Now, Peer

from .bulletin import Bulletin
from .clock import Clock

BATCH_MAX: Final = 64
"""Events of one source before the others get their turn."""
QUEUE_MAX: Final = 4_096
"""Events posted from inside while another is in hand."""
FETCHES_WAITING_MAX: Final = 1_024
TICK_S_MIN: Final = 0.001
"""A deadline that has passed and stays is asked about no more often than this."""
TICK_S_MAX: Final = 3_600.0


class Machine(Protocol):
    """`meshnode.protocol.node.Node`, or what stands in for it."""

    def start(self, now: Now) -> list[Effect]: ...
    def handle(self, event: Event, now: Now) -> list[Effect]: ...
    def deadline_mono_ms(self) -> int | None: ...


class OverlayPort(Protocol):
    """`meshnode.overlay.Overlay` as the driver uses it."""

    events: trio.MemoryReceiveChannel[Event]

    def send(self, effect: Send) -> None: ...
    def publish(self, topic: str, frame: bytes) -> None: ...
    def join(self, topic: str) -> None: ...
    def leave(self, topic: str) -> None: ...
    def dial(self, peer: Peer, addrs: Sequence[str]) -> None: ...
    def block(self, peer: Peer, until_mono_ms: int) -> None: ...
    def hang_up(self, peer: Peer) -> None: ...
    def provide(self, key: Digest, ttl_s: int) -> None: ...
    def find_providers(self, query_id: int, key: Digest) -> None: ...

    async def fetch_blob(
        self,
        fetch_id: int,
        ref: BlobRef,
        first_byte: int,
        byte_count: int,
        holders: Sequence[Peer],
        deadline_mono_ms: int,
    ) -> int: ...


class ExecutorPort(Protocol):
    """`meshnode.executor.Executor` as the driver uses it."""

    events: trio.MemoryReceiveChannel[Event]

    def admit(self, effect: Admit) -> None: ...
    def start(self, effect: StartExec) -> None: ...
    def stop(self, effect: StopExec) -> None: ...


class JournalPort(Protocol):
    """`meshnode.ledger.journal.Journal` as the driver uses it."""

    @property
    def events(self) -> trio.MemoryReceiveChannel[Any]: ...

    def persist(self, effect: Persist) -> None: ...


class BlobPort(Protocol):
    """What the driver asks of the blob store."""

    def pin(self, blob_id: Digest) -> None: ...
    def unpin(self, blob_id: Digest) -> None: ...


class Driver:
    """One per node. `run` is its life; `post` may be called from any task of the same loop."""

    def __init__(
        self,
        machine: Machine,
        overlay: OverlayPort,
        executor: ExecutorPort | None,
        journal: JournalPort,
        blobs: BlobPort,
        bulletin: Bulletin,
        clock: Clock,
        *,
        fetches_max: int = 8,
    ) -> None:
        self._machine = machine
        self._overlay = overlay
        self._journal = journal
        self._bulletin = bulletin
        self._clock = clock
        self._fetches_max = fetches_max
        self.on_fetched: Callable[[BlobRef], None] = lambda _: None
        self.on_sleep: Callable[[Sleep], None] = lambda _: None
        self._sources = [overlay.events] + ([executor.events] if executor is not None else [])
        self._queue: deque[Event] = deque()
        self._urgent: deque[Event] = deque()
        self._busy = False
        self.started = trio.Event()
        self._waiting: dict[int, list[Send | Publish]] = {}
        self._tick_scope = trio.CancelScope()
        self._tick_mono_ms: int | None = None
        self._fetches, self._fetch_queue = trio.open_memory_channel[FetchBlob](FETCHES_WAITING_MAX)
        self.counters: Counter[str] = Counter()
        self._carry: dict[type, Callable[[Any], None]] = {
            Send: overlay.send,
            Publish: lambda e: overlay.publish(e.topic, e.frame),
            Join: lambda e: overlay.join(e.topic),
            Leave: lambda e: overlay.leave(e.topic),
            Dial: lambda e: overlay.dial(e.peer, e.addrs),
            Block: lambda e: overlay.block(e.peer, e.until_mono_ms),
            Hangup: lambda e: overlay.hang_up(e.peer),
            Provide: lambda e: overlay.provide(e.key, e.ttl_s),
            FindProviders: lambda e: overlay.find_providers(e.query_id, e.key),
            FetchBlob: self._queue_fetch,
            Pin: lambda e: blobs.pin(e.blob_id),
            Unpin: lambda e: blobs.unpin(e.blob_id),
            Persist: self._persist,
            Notify: lambda e: bulletin.post(e.subject, e.notice),
            Sleep: lambda e: self.on_sleep(e),
        }
        if executor is not None:
            self._carry |= {
                Admit: executor.admit,
                StartExec: executor.start,
                StopExec: executor.stop,
            }

    # ---- what others call

    def post(self, event: Event) -> None:
        """Handle `event` now; from inside the handling of another, right after that one."""
        self._put(event)
        self._drain()

    async def run(self) -> None:
        """Until cancelled; `started` is set once the machine's first effects are out."""
        async with trio.open_nursery() as nursery:
            for source in (self._journal.events, *self._sources):
                nursery.start_soon(self._pump, source)
            for _ in range(self._fetches_max):
                nursery.start_soon(self._fetch)
            nursery.start_soon(self._ticks)
            self._carry_out(self._machine.start(self._clock.now()))
            self.started.set()
            self._drain()

    # ---- events in

    async def _pump(self, source: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in source:
            self._put(event)
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                for _ in range(BATCH_MAX - 1):
                    self._put(source.receive_nowait())
            self._drain()

    def _put(self, event: Event) -> None:
        if isinstance(event, Recall | Persisted | PersistFailed):
            self._urgent.append(event)
        elif len(self._queue) >= QUEUE_MAX:
            raise LocalProtocolError(f"{QUEUE_MAX} events were posted while one was in hand")
        else:
            self._queue.append(event)

    def _drain(self) -> None:
        if self._busy or not self.started.is_set():
            return
        self._busy = True
        try:
            while self._urgent or self._queue:
                event = self._urgent.popleft() if self._urgent else self._queue.popleft()
                self._handle(event)
        finally:
            self._busy = False
        self._arm()

    def _handle(self, event: Event) -> None:
        released: list[Send | Publish] = []
        if isinstance(event, Persisted):
            released = self._answered(event.seq)
        elif isinstance(event, PersistFailed):
            self.counters["effects_dropped"] += len(self._answered(event.seq))
        # What was promised under a seq leaves before anything that its answer brings about.
        self._carry_out(released)
        self._carry_out(self._machine.handle(event, self._clock.now()))

    def _answered(self, seq: int) -> list[Send | Publish]:
        return self._waiting.pop(seq, [])

    # ---- time

    async def _ticks(self) -> None:
        while True:
            self._tick_mono_ms = self._machine.deadline_mono_ms()
            with trio.CancelScope(deadline=self._tick_at(self._tick_mono_ms)) as self._tick_scope:
                await trio.sleep(TICK_S_MAX)
            # A deadline that moved away leaves the alarm where it was: only a due one is a Tick.
            due = self._machine.deadline_mono_ms()
            if due is not None and due <= self._clock.now().mono_ms:
                self.post(Tick())

    def _tick_at(self, due_mono_ms: int | None) -> float:
        if due_mono_ms is None:
            return float("inf")
        wait_s = self._clock.seconds_until(due_mono_ms)
        return trio.current_time() + max(TICK_S_MIN, wait_s)

    def _arm(self) -> None:
        """The alarm goes earlier if it must; later it goes by itself."""
        due = self._machine.deadline_mono_ms()
        if due is not None and (self._tick_mono_ms is None or due < self._tick_mono_ms):
            self._tick_mono_ms = due
            self._tick_scope.deadline = self._tick_at(due)

    # ---- effects out

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send | Publish) and effect.after is not None:
                held = self._waiting.get(effect.after)
                if held is not None:
                    held.append(effect)
                    continue
            carry = self._carry.get(type(effect))
            if carry is None:
                raise LocalProtocolError(f"this node cannot carry out {type(effect).__name__}")
            carry(effect)

    def _persist(self, effect: Persist) -> None:
        self._waiting[effect.seq] = []
        self._journal.persist(effect)

    # ---- blobs

    def _queue_fetch(self, effect: FetchBlob) -> None:
        try:
            self._fetches.send_nowait(effect)
        except trio.WouldBlock:
            self._queue.append(BlobFailed(effect.fetch_id, effect.ref.blob_id, Reason.BUSY))

    async def _fetch(self) -> None:
        """Task, `fetches_max` of them: one fetch after the other."""
        async for effect in self._fetch_queue:
            self.post(await self._fetched(effect))

    async def _fetched(self, effect: FetchBlob) -> BlobReady | BlobFailed:
        try:
            fetched = await self._overlay.fetch_blob(
                effect.fetch_id,
                effect.ref,
                effect.first_byte,
                effect.byte_count,
                effect.holders,
                effect.deadline_mono_ms,
            )
        except MeshError as error:
            reason = getattr(error, "reason", Reason.BLOB_MISSING)
            return BlobFailed(effect.fetch_id, effect.ref.blob_id, reason)
        self.counters["blob_bytes_fetched"] += fetched
        self.on_fetched(effect.ref)
        return BlobReady(effect.fetch_id, effect.ref, fetched)
