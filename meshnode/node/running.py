"""A node that runs, as its own clients use it: submit, call, watch, result, blobs, status.

Made by `app.open_node`. `control` puts it behind a socket; tests and benches in the same process
call it directly. Everything goes through the driver's `post`; answers come back by the bulletin.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from meshnode import errors
from meshnode.config import NodeConfig
from meshnode.errors import LocalResource, MeshError, UsageError
from meshnode.ledger.blobs import BlobStore
from meshnode.ledger.load import read_results
from meshnode.protocol.codec import digest
from meshnode.protocol.effects import JobRecord, Notice
from meshnode.protocol.events import (
    BlobsHeld,
    Cancel,
    Drain,
    JobOrder,
    Meet,
    Recall,
    Submit,
)
from meshnode.protocol.identity import peer_of_text
from meshnode.protocol.job import JobState, make_spec, spec_bytes
from meshnode.protocol.node import Node
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, JobId, Peer, array_bytes
from meshnode.protocol.view import JobView, View

from . import status
from .bulletin import Bulletin, Logged, Watch, field_of, has_ended
from .clock import Clock
from .collector import CALL_BYTES_MAX, Collector, OnEnd, Packed
from .driver import Driver
from .energy_book import Drawn
from .failures import error_of_reason
from .metering import Metering
from .mode import Mode
from .owners import Owners
from .owners_word import OwnersWord
from .vehicle_watch import VehicleWatch

ORDERS_KEPT_MAX: Final = 1_024
HEARING_MS_MAX: Final = 3_000
HEARING_POLL_S: Final = 0.05
TMP_NAME: Final = "tmp"
_TMP_NAMES = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended."""

    state: str
    reason: int
    units: int
    done: int


@dataclass(frozen=True, slots=True)
class Result:
    """A job's outputs: all units, each unit's outputs side by side."""

    ended: Ended
    order: JobOrder
    packed: Packed = b""
    path: Path | None = None  # where they lie instead, if they are many; the reader's to delete


class RunningNode:
    def __init__(
        self,
        home: Path,
        config: NodeConfig,
        machine: Node,
        driver: Driver,
        bulletin: Bulletin,
        blobs: BlobStore,
        clock: Clock,
        addrs: tuple[str, ...],
    ) -> None:
        self.home = home
        self.config = config
        self.driver = driver
        self.bulletin = bulletin
        self.blobs = blobs
        self.addrs = addrs
        self.peer: Peer = machine.identity.peer
        self.network = machine.identity.network
        self._owners = Owners(machine.identity.account, config.node.fleet)
        self.stopping = trio.Event()
        """Set by `stop`: whoever owns the node drains it and ends it."""
        self.clients = 0
        self.vehicle: VehicleWatch | None = None
        self.metering: Metering | None = None
        self.word = OwnersWord(self)
        self.worker_pids: Callable[[], list[tuple[int, bool]]] = list
        self._machine = machine
        self.clock = clock
        self._request_ids = itertools.count(1)
        self._orders: dict[JobId, JobOrder] = {}
        self._ingests = trio.CapacityLimiter(max(1, config.storage.ingests_max))
        self._reads = trio.CapacityLimiter(4)
        self._started_mono_ms = clock.now().mono_ms
        self._held_changed = trio.Event()

    # ---- jobs

    async def submit(self, order: JobOrder) -> JobId:
        """Hand over a job; returns once a SIGKILL would not lose it."""
        if not order.durable:
            raise UsageError("a job without durability is a call: its outputs are kept nowhere")
        answered = trio.Event()
        found: list[JobId | MeshError] = []

        def on_answer(outcome: JobId | MeshError) -> None:
            """In the machine's own step: the job is followed also if its client is gone."""
            found.append(outcome)
            answered.set()
            if isinstance(outcome, MeshError):
                self._unpin(order)
                return
            try:
                self._follow(outcome, partial(self._unpin, order))
            except LocalResource as error:
                self._unpin(order)
                found[0] = error

        for ref in _blobs_of(order):
            self.blobs.pin(ref.blob_id)
        try:
            self._enter(order, on_answer)
        except MeshError:  # an owner that nobody knows
            self._unpin(order)
            raise
        await answered.wait()
        if isinstance(found[0], MeshError):
            raise found[0]
        return found[0]

    def start_call(self, order: JobOrder, on_end: OnEnd) -> Call:
        """Submit now; `on_end` hears of the outputs or of the error, in the task that brings it."""
        if Collector.bytes_needed(order) > CALL_BYTES_MAX:
            raise UsageError(f"a call returns at most {CALL_BYTES_MAX >> 20} MiB; submit a job")
        return Call(self, order, on_end)

    async def call(self, order: JobOrder) -> Packed:
        """Submit, wait, outputs. Cancelled with its caller."""
        ended = trio.Event()
        found: list[Packed | MeshError] = []

        def on_end(outcome: Packed | MeshError) -> None:
            found.append(outcome)
            ended.set()

        call = self.start_call(order, on_end)
        try:
            await ended.wait()
        finally:
            call.close()
        if isinstance(found[0], MeshError):
            raise found[0]
        return found[0]

    async def wait(self, job_id: JobId) -> Ended:
        """Until the job has ended. Wakes nobody for what comes before."""
        ended = trio.Event()
        found: list[Notice] = []

        def push(notice: Notice) -> None:
            if has_ended(notice):
                found.append(notice)
                ended.set()

        with self.bulletin.subscribed(job_id, push):
            now = await self._job_notice(job_id)
            if has_ended(now):
                return _ended(now)
            await ended.wait()
        return _ended(found[0])

    async def watch(self, job_id: JobId) -> AsyncGenerator[Notice, None]:
        """The job's present state, then what happens to it, until it has ended."""
        watch = Watch()
        with self.bulletin.subscribed(job_id, watch.push):
            now = await self._job_notice(job_id)
            yield now
            if has_ended(now):
                return
            async with aclosing(watch.notices()) as notices:
                async for notice in notices:
                    yield notice

    async def result(self, job_id: JobId, *, inline_bytes_max: int = 1 << 62) -> Result:
        """Wait for the job, then its outputs; into a file if they are more than the bound."""
        ended = await self.wait(job_id)
        order = await self._order(job_id)
        if ended.state != "done":
            return Result(ended, order)
        packed, path = await trio.to_thread.run_sync(
            self._read, job_id, order, inline_bytes_max, limiter=self._reads
        )
        return Result(ended, order, packed, path)

    def cancel(self, job_id: JobId) -> None:
        self.driver.post(Cancel(job_id))

    def meet(self, addr: str) -> None:
        """Connect to the peer behind a multiaddress that ends in /p2p/ID."""
        _, found, name = addr.rpartition("/p2p/")
        if not found:
            raise UsageError(f"{addr} does not end in /p2p/ and a peer id")
        self.driver.post(Meet(peer_of_text(name), (addr,)))

    async def jobs(self) -> list[dict[str, Any]]:
        """All jobs of this home, oldest first."""
        past = await trio.to_thread.run_sync(status.ended_jobs, self.home, limiter=self._reads)
        here = {job.job_id: status.job_of_view(job) for job in self.view().jobs}
        merged = {row["job_id"]: row for row in past} | here
        return sorted(merged.values(), key=lambda row: row["submitted_unix_ms"])

    async def show(self, job_id: JobId) -> dict[str, Any]:
        job = self._job_view(job_id)
        if job is not None:
            return status.shown_job(job)
        record = await self._record(job_id)
        return {
            **status.job_of_record(record),
            "tasks": None,
            "attempts": [],
            "refusals": [],
            "waits_for": None,
            "checkpoints": [],
        }

    async def explain(self, job_id: JobId) -> dict[str, Any]:
        """Why its runs wait or went where they went; of a job of before, how it ended."""
        found = self._machine.explain(job_id, self.clock.now())
        job = self._job_view(job_id)
        if found is not None and job is not None:
            return status.explanation_of(found, status.explained(job))
        return status.explanation_of_record(await self._record(job_id))

    async def would(self, order: JobOrder, kflop_per_unit: int) -> dict[str, Any]:
        """What submitting the order would do now; raises what the submission would raise.

        A node that has just started has heard of nobody: it waits for a first car, for a moment.
        """
        order = self._with_accounts(order)
        while self._hears_of_nobody_yet():  # noqa: ASYNC110 - the machine wakes nobody for it
            await trio.sleep(HEARING_POLL_S)
        found = self._machine.would(order, kflop_per_unit, self.clock.now())
        if isinstance(found, tuple):
            raise error_of_reason(*found)
        answer: dict[str, Any] = status.plain(found)
        return answer

    def logs(self, job_id: bytes) -> tuple[Logged, ...]:
        """What was notified of a job (or, for b"", of the node) in this process, bounded."""
        return self.bulletin.log(job_id)

    # ---- blobs

    async def put_bytes(self, content: bytes) -> BlobRef:
        return await self._put(self.blobs.put_bytes, content, "the blob store")

    async def put_path(self, path: Path) -> BlobRef:
        return await self._put(self.blobs.put_file, path, str(path))

    def blob_fetched(self, ref: BlobRef) -> None:
        """A fetch was successful: what is here whole may have changed."""
        del ref
        self._held_changed.set()

    async def tell_blobs_held(self) -> None:
        """Task: the machine hears what is here whole, at most once a second."""
        told: tuple[Digest, ...] = ()
        while True:
            held = self.blobs.held()
            if set(held) != set(told):
                self.driver.post(BlobsHeld(held))
                told = held
            await trio.sleep(HELD_PAUSE_S)
            await self._held_changed.wait()
            self._held_changed = trio.Event()

    # ---- the node

    def view(self) -> View:
        return self._machine.view(self.clock.now())

    def status(self) -> dict[str, Any]:
        view = self.view()
        plain = status.plain(view)
        for name in ("jobs", "peers", "cars", "sandbox_layers", "sandbox_least"):
            del plain[name]
        return {
            **plain,
            "network": self.network,
            "sandbox": status.sandbox_of(view),
            "clock": {**plain["clock"], "ours_is_off": view.clock.ours_is_off},
            "addrs": list(self.addrs),
            "pid": os.getpid(),
            "home": str(self.home),
            "provides": self.config.node.provides,
            "up_s": (self.clock.now().mono_ms - self._started_mono_ms) // 1000,
            "peers_up": sum(peer.ready for peer in view.peers),
            "cars_known": len(view.cars),
            "jobs_running": sum(job.state == "running" for job in view.jobs),
            "blob_bytes": self.blobs.bytes_used,
            "clients": self.clients,
            "workers": [{"pid": pid, "runs": runs} for pid, runs in self.worker_pids()],
            "meters": [] if self.metering is None else self.metering.names,
            "vehicle": None if self.vehicle is None else self.vehicle.says(),
            "counters": {**dict(view.counters), **self.driver.counters},
        }

    def peers(self) -> list[dict[str, Any]]:
        return status.peers_of(self.view())

    def drain(self) -> None:
        self.driver.post(Drain(Reason.DRAINING))

    def recall(self, reason: Reason, grace_ms: int) -> None:
        """The driver is back: the accelerator is idle when this returns, or after the grace."""
        self.driver.post(Recall(reason, grace_ms))

    def set_mode(self, mode: Mode) -> dict[str, Any] | None:
        """The owner's word in force from now on; None where nothing is ever run."""
        if self.vehicle is None:
            return None
        self.vehicle.set_mode(mode)
        says: dict[str, Any] = self.vehicle.says()["mode"]
        return says

    def drawn(self) -> Drawn:
        """For the energy book: what all runs have drawn, and what the car does now."""
        owner = self._machine.provider.owner
        working, asleep = self._machine.provider.admission.working(), owner.wakes_unix_ms
        return Drawn(
            owner.drawn_uj,
            owner.drawn_battery_uj,
            owner.worked_ms,
            bool(working),
            asleep is not None,
            owner.unpaid_uj,
            owner.unpaid_battery_uj,
            owner.unpaid_ms,
        )

    def stop(self) -> None:
        self.stopping.set()

    def adopt(self, records: Sequence[JobRecord]) -> None:
        """Jobs of an earlier process go on: their blobs stay here until they end."""
        for record in records:
            if record.state != JobState.RUNNING:
                continue
            try:
                order = status.order_of_record(record)
            except MeshError:  # the machine leaves it alone too
                continue
            job_id = JobId(record.job_digest[:16])
            self._orders[job_id] = order
            for ref in _blobs_of(order):
                self.blobs.pin(ref.blob_id)
            self._follow(job_id, partial(self._unpin, order))

    @property
    def leases_running(self) -> bool:
        """Runs of others on this car."""
        return any(lease.stage != "ended" for lease in self.view().leases)

    @property
    def busy(self) -> bool:
        """Runs of others, or jobs of its own."""
        return self.leases_running or any(job.state == "running" for job in self.view().jobs)

    # ---- inside

    def _enter(self, order: JobOrder, on_answer: Callable[[JobId | MeshError], None]) -> None:
        """`on_answer` hears of the job's id or why it is refused: of a call before this returns,
        of a durable job once it is stored."""
        order = self._with_accounts(order)
        request_id = next(self._request_ids)

        def answer(subject: bytes, notice: Notice) -> None:
            if notice.kind == "refused":
                text = str(field_of(notice, "text") or "")
                on_answer(error_of_reason(field_of(notice, "reason"), text))
                return
            job_id = JobId(subject)
            self._orders[job_id] = order
            while len(self._orders) > ORDERS_KEPT_MAX:
                del self._orders[next(iter(self._orders))]
            on_answer(job_id)

        self.bulletin.asked[request_id] = answer
        self.driver.post(Submit(request_id, order))

    def _hears_of_nobody_yet(self) -> bool:
        up_ms = self.clock.now().mono_ms - self._started_mono_ms
        return not self._machine.book.cars and up_ms < HEARING_MS_MAX

    def _with_accounts(self, order: JobOrder) -> JobOrder:
        if not order.owners:  # a short call spares the copy
            return order
        return replace(order, owners=self._owners.accounts(order.owners))

    def _follow(self, job_id: JobId, on_end: Callable[[], None]) -> None:
        """`on_end()` once, when the job has ended."""
        subscription = ExitStack()

        def push(notice: Notice) -> None:
            if has_ended(notice):
                subscription.close()
                on_end()

        subscription.enter_context(self.bulletin.subscribed(job_id, push))
        last = self.bulletin.job_notice(job_id)
        if last is not None:
            push(last)

    def _unpin(self, order: JobOrder) -> None:
        for ref in _blobs_of(order):
            self.blobs.unpin(ref.blob_id)

    def _job_view(self, job_id: JobId) -> JobView | None:
        return next((job for job in self.view().jobs if job.job_id == job_id), None)

    async def _record(self, job_id: JobId) -> Any:
        return await trio.to_thread.run_sync(
            status.find_record, self.home, job_id, limiter=self._reads
        )

    async def _job_notice(self, job_id: JobId) -> Notice:
        """The newest `job` notice; made from the ledger for a job of an earlier process."""
        last = self.bulletin.job_notice(job_id)
        if last is not None:
            return last
        job = self._job_view(job_id)
        row = status.job_of_view(job) if job else status.job_of_record(await self._record(job_id))
        fields = ("state", "reason", "units", "done")
        return Notice("job", tuple((name, row[name]) for name in fields))

    async def _order(self, job_id: JobId) -> JobOrder:
        known = self._orders.get(job_id)
        return known or status.order_of_record(await self._record(job_id))

    def _read(
        self, job_id: JobId, order: JobOrder, inline_bytes_max: int
    ) -> tuple[Packed, Path | None]:
        """Thread: a job's outputs out of the ledger, in unit order."""
        spec = make_spec(order, self.network, self.peer)
        job_digest = Digest(digest(spec_bytes(spec)))
        assert job_digest[:16] == job_id, "the order is that of the job"
        size = order.units * sum(array_bytes(out) for out in order.outs)
        rows = read_results(self.home, job_digest)
        if size <= inline_bytes_max:
            packed = b"".join(outputs for _, _, outputs in rows)
            if len(packed) != size:
                raise LocalResource("outputs of the job are missing; its home is damaged")
            return packed, None
        path = self.home / TMP_NAME / f"out-{os.getpid()}-{next(_TMP_NAMES)}"
        try:
            with path.open("xb") as file:
                for _, _, outputs in rows:
                    file.write(outputs)
                written = file.tell()
        except OSError as error:
            path.unlink(missing_ok=True)
            raise LocalResource(
                f"cannot write results into {path.parent}: {error.strerror}"
            ) from None
        if written != size:
            path.unlink(missing_ok=True)
            raise LocalResource("outputs of the job are missing; its home is damaged")
        return b"", path

    async def _put(self, put: Any, what: Any, name: str) -> BlobRef:
        try:
            ref: BlobRef = await trio.to_thread.run_sync(put, what, limiter=self._ingests)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise LocalResource(f"no room for the blob: {error.strerror}") from None
            raise LocalResource(f"{name} cannot be read: {error.strerror}") from None
        self._held_changed.set()
        return ref


class Call:
    """A job whose outputs are wanted at once; `close` cancels it if it has not ended."""

    def __init__(self, node: RunningNode, order: JobOrder, on_end: OnEnd) -> None:
        self._node = node
        self._on_end = on_end
        self._ended = False
        self._pins = _blobs_of(order)
        found: list[JobId | MeshError] = []
        node._enter(order, found.append)
        if not found:
            raise errors.LocalProtocolError("the machine did not answer a submission")
        if isinstance(found[0], MeshError):
            raise found[0]
        self.job_id = found[0]
        for ref in self._pins:
            node.blobs.pin(ref.blob_id)
        self._subscription = ExitStack()
        collector = Collector(order, self._end)
        self._subscription.enter_context(node.bulletin.subscribed(self.job_id, collector.push))
        last = node.bulletin.job_notice(self.job_id)
        if last is not None and has_ended(last):
            collector.push(last)

    def _end(self, outcome: Packed | MeshError) -> None:
        if self._release():
            self._on_end(outcome)

    def _release(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        self._subscription.close()
        for ref in self._pins:
            self._node.blobs.unpin(ref.blob_id)
        return True

    def close(self) -> None:
        if self._release():
            self._node.cancel(self.job_id)


HELD_PAUSE_S: Final = 1.0


def _blobs_of(order: JobOrder) -> list[BlobRef]:
    return [arg.blob for arg in order.args if arg.blob is not None]


def _ended(notice: Notice) -> Ended:
    names = ("state", "reason", "units", "done")
    return Ended(*(field_of(notice, name) for name in names))
