"""The driver's own rules, with a machine that does what the test says: order, durability, ticks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from meshnode.errors import LocalProtocolError, LocalResource
from meshnode.node.bulletin import (
    LOGGED_NOTICES_MAX,
    WATCH_BYTES_MAX,
    Bulletin,
    Watch,
    field_of,
)
from meshnode.node.clock import SystemClock
from meshnode.node.driver import BATCH_MAX, Driver
from meshnode.overlay.bulk import BlobCorrupt
from meshnode.protocol.effects import (
    Effect,
    FetchBlob,
    Notice,
    Notify,
    Persist,
    Pin,
    Send,
    StartExec,
    Unpin,
)
from meshnode.protocol.events import (
    BlobFailed,
    BlobReady,
    Event,
    Persisted,
    PersistFailed,
    Recall,
    RttMeasured,
    SendFailed,
    Tick,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Durability, Lane, Now, Peer

PEER = Peer(bytes(38))
BLOB = BlobRef(Digest(bytes(32)), 5)


class Script:
    """A machine that answers each event by `react` and remembers what it heard."""

    def __init__(self, react: Callable[[Event], list[Effect]] = lambda _: []) -> None:
        self.react = react
        self.heard: list[Event] = []
        self.due: int | None = None

    def start(self, now: Now) -> list[Effect]:
        return []

    def handle(self, event: Event, now: Now) -> list[Effect]:
        self.heard.append(event)
        return self.react(event)

    def deadline_mono_ms(self) -> int | None:
        return self.due


class Sources:
    """Overlay, executor, journal and blobs in one: what was asked of them, and their events."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.arrive, self.events = trio.open_memory_channel[Event](1024)
        self.fetches = 0
        self.fetches_at_once = 0
        self.release = trio.Event()
        self.outcome: int | Exception = 5

    def send(self, effect: Send) -> None:
        self.done.append(effect.send_id)

    def persist(self, effect: Persist) -> None:
        self.done.append(f"persist {effect.seq}")

    def pin(self, blob_id: Digest) -> None:
        self.done.append("pin")

    def unpin(self, blob_id: Digest) -> None:
        self.done.append("unpin")

    async def fetch_blob(
        self,
        fetch_id: int,
        ref: BlobRef,
        first_byte: int,
        byte_count: int,
        holders: Sequence[Peer],
        deadline_mono_ms: int,
    ) -> int:
        self.fetches += 1
        self.fetches_at_once = max(self.fetches_at_once, self.fetches)
        await self.release.wait()
        self.fetches -= 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def publish(self, topic: str, frame: bytes) -> None: ...
    def join(self, topic: str) -> None: ...
    def leave(self, topic: str) -> None: ...
    def dial(self, peer: Peer, addrs: Sequence[str]) -> None: ...
    def block(self, peer: Peer, until_mono_ms: int) -> None: ...
    def hang_up(self, peer: Peer) -> None: ...
    def provide(self, key: Digest, ttl_s: int) -> None: ...
    def find_providers(self, query_id: int, key: Digest) -> None: ...


class Journal:
    def __init__(self, sources: Sources) -> None:
        self.answer, self.events = trio.open_memory_channel[Event](1024)
        self.persist = sources.persist


class Rig:
    def __init__(self, script: Script, *, fetches_max: int = 2) -> None:
        self.script = script
        self.sources = Sources()
        self.journal = Journal(self.sources)
        self.bulletin = Bulletin()
        self.driver = Driver(
            script,
            self.sources,
            None,
            self.journal,
            self.sources,
            self.bulletin,
            SystemClock(),
            fetches_max=fetches_max,
        )


def with_rig(rig_of: Callable[[], Rig], test: Callable[[Rig], object]) -> None:
    async def main() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                rig = rig_of()
                nursery.start_soon(rig.driver.run)
                await rig.driver.started.wait()
                await test(rig)  # type: ignore[misc]
                nursery.cancel_scope.cancel()

    trio.run(main)


def rtt(us: int) -> RttMeasured:
    return RttMeasured(PEER, us)


def send(send_id: int, after: int | None = None) -> Send:
    return Send(send_id, PEER, Lane.CONTROL, b"", after)


def store(seq: int) -> Persist:
    return Persist(seq, (), Durability.PROCESS)


def test_what_waits_for_a_persist_leaves_after_it_and_in_order() -> None:
    script = Script(lambda e: [store(1), send(10, 1), send(11), send(12, 1)] if e == rtt(0) else [])

    async def test(rig: Rig) -> None:
        rig.driver.post(rtt(0))
        assert rig.sources.done == ["persist 1", 11]
        script.react = lambda e: [send(13, 1)]  # already durable: at once
        await rig.journal.answer.send(Persisted(1))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.sources.done == ["persist 1", 11, 10, 12, 13]
        assert script.heard[-1] == Persisted(1)

    with_rig(lambda: Rig(script), test)


def test_what_could_not_be_stored_is_never_sent() -> None:
    script = Script(lambda e: [store(1), send(10, 1), store(2), send(20, 2)] if e == rtt(0) else [])

    async def test(rig: Rig) -> None:
        rig.driver.post(rtt(0))
        await rig.journal.answer.send(PersistFailed(1, Reason.DISK_FULL))
        await rig.journal.answer.send(Persisted(2))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.sources.done == ["persist 1", "persist 2", 20]
        assert PersistFailed(1, Reason.DISK_FULL) in script.heard
        assert rig.driver.counters["effects_dropped"] == 1

    with_rig(lambda: Rig(script), test)


def test_a_recall_goes_before_what_is_queued() -> None:
    waiting: deque[Event] = deque([rtt(1), rtt(2), Recall(Reason.DRIVING, 0)])

    async def test(rig: Rig) -> None:
        def react(event: Event) -> list[Effect]:
            while waiting:  # posted while an event is in hand
                rig.driver.post(waiting.popleft())
            return []

        rig.script.react = react
        rig.driver.post(rtt(0))
        assert rig.script.heard == [rtt(0), Recall(Reason.DRIVING, 0), rtt(1), rtt(2)]

    with_rig(lambda: Rig(Script()), test)


def test_a_flood_of_one_source_gives_way() -> None:
    script = Script()

    async def test(rig: Rig) -> None:
        begun = trio.Event()

        def react(event: Event) -> list[Effect]:
            begun.set()
            return []

        script.react = react

        async def recall() -> None:
            await begun.wait()
            rig.driver.post(Recall(Reason.DRIVING, 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recall)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(1024):
                rig.sources.arrive.send_nowait(rtt(number))
            await trio.testing.wait_all_tasks_blocked()
        place = script.heard.index(Recall(Reason.DRIVING, 0))
        assert place <= 2 * BATCH_MAX  # which of two ready tasks trio runs first is chance
        flood = [event for event in script.heard if isinstance(event, RttMeasured)]
        assert flood == [rtt(number) for number in range(1024)]

    with_rig(lambda: Rig(script), test)


def test_ticks_come_when_they_are_due_and_not_before() -> None:
    script = Script()

    async def test(rig: Rig) -> None:
        await trio.testing.wait_all_tasks_blocked()
        clock = SystemClock()
        ticked = trio.Event()
        script.due = clock.now().mono_ms + 60_000
        rig.driver.post(rtt(0))  # arms the alarm for later

        def react(event: Event) -> list[Effect]:
            if isinstance(event, Tick):
                assert script.due is not None
                assert clock.now().mono_ms >= script.due
                script.due = None
                ticked.set()
            return []

        script.react = react
        script.due = clock.now().mono_ms + 30
        rig.driver.post(rtt(1))  # the alarm goes earlier
        await ticked.wait()

    with_rig(lambda: Rig(script), test)


def test_fetches_are_bounded_and_end_in_one_event_each() -> None:
    def fetch(number: int) -> FetchBlob:
        return FetchBlob(BLOB, 0, 5, (PEER,), 10**12, number)

    script = Script(lambda e: [fetch(n) for n in range(5)] if e == rtt(0) else [])

    async def test(rig: Rig) -> None:
        rig.driver.post(rtt(0))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.sources.fetches_at_once == 2
        rig.sources.release.set()
        await trio.testing.wait_all_tasks_blocked()
        ready = [e for e in script.heard if isinstance(e, BlobReady)]
        assert sorted(e.fetch_id for e in ready) == [0, 1, 2, 3, 4]
        rig.sources.outcome = BlobCorrupt()
        rig.driver.post(rtt(0))
        await trio.testing.wait_all_tasks_blocked()
        failed = [e for e in script.heard if isinstance(e, BlobFailed)]
        assert {e.reason for e in failed} == {BlobCorrupt.reason}
        assert len(failed) == 5

    with_rig(lambda: Rig(script), test)


def test_an_event_out_of_an_effect_waits_for_its_turn() -> None:
    script = Script(
        lambda e: [send(1), Pin(BLOB.blob_id), Unpin(BLOB.blob_id)] if e == rtt(0) else []
    )

    async def test(rig: Rig) -> None:
        failed = SendFailed(1, PEER, Reason.QUEUE_FULL)

        def refuse(effect: Send) -> None:
            rig.driver.post(failed)
            assert failed not in script.heard

        rig.sources.send = refuse  # type: ignore[method-assign]
        rig.driver._carry[Send] = refuse
        rig.driver.post(rtt(0))
        assert script.heard == [rtt(0), failed]
        assert rig.sources.done == ["pin", "unpin"]

    with_rig(lambda: Rig(script), test)


def test_a_node_without_an_executor_cannot_be_made_to_run() -> None:
    start = StartExec(1, None, None, b"")  # type: ignore[arg-type]

    async def test(rig: Rig) -> None:
        rig.script.react = lambda e: [start]
        with pytest.raises(LocalProtocolError, match="StartExec"):
            rig.driver.post(rtt(0))

    with_rig(lambda: Rig(Script()), test)


# ---- the bulletin


def job(state: str) -> Notice:
    return Notice("job", (("state", state),))


def test_notices_reach_watchers_and_the_log_without_outputs() -> None:
    units = Notice("units", (("first", 0), ("outputs", b"x" * 100)))
    script = Script(lambda e: [Notify(b"j", units), Notify(b"j", job("done"))])

    async def test(rig: Rig) -> None:
        watch = Watch()
        with rig.bulletin.subscribed(b"j", watch.push):
            rig.driver.post(rtt(0))
        assert [notice async for notice in watch.notices()] == [units, job("done")]
        logged = [one.notice for one in rig.bulletin.log(b"j")]
        assert [field_of(notice, "outputs") for notice in logged] == [None, None]
        assert rig.bulletin.job_notice(b"j") == job("done")

    with_rig(lambda: Rig(script), test)


def test_a_slow_watcher_is_dropped_and_says_so() -> None:
    async def main() -> None:
        watch = Watch()
        piece = Notice("units", (("outputs", b"x" * (1 << 20)),))
        for _ in range((WATCH_BYTES_MAX >> 20) + 1):
            watch.push(piece)
        with pytest.raises(LocalResource, match="too slowly"):
            async for _ in watch.notices():
                pass

    trio.run(main)


def test_logs_are_bounded() -> None:
    bulletin = Bulletin()
    for number in range(LOGGED_NOTICES_MAX + 10):
        bulletin.post(b"j", Notice("attempt", (("number", number),)))
    assert len(bulletin.log(b"j")) == LOGGED_NOTICES_MAX
    for number in range(1000):
        bulletin.post(number.to_bytes(16, "big"), job("running"))
    assert bulletin.log(b"j") == ()
