"""Which worker runs what, until when: the executor that the driver calls.

In come the machine's effects (`admit`, `start`, `stop`, `probe`: none blocks), out go events
through one channel. A run goes straight from `start` into the socket of a worker that has its
program loaded, and the worker's one task turns answers into events: two wake-ups a run, because
wake-ups are most of what a short run costs. Wall clock, load time and idle time are all the
deadline of that task's cancel scope.

A worker serves one submitter and one program (artifact, constants, shapes). It outlives a job,
because a single call is a job of its own and would else pay a fork and a compile each time.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.effects import Admit, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import Admitted, Event, ExecEnded, Meters, Started, UnitsDone
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest

from . import wire
from .admission import (
    Program,
    Refused,
    check_run,
    check_sizes,
    load_of,
    memory_mb_least,
    program_of,
)
from .artifacts import Artifact, ArtifactSource
from .bounds import (
    EVENTS_LATE_MAX,
    EVENTS_QUEUED_MAX,
    FIGURES_KEPT_MAX,
    REFUSALS_KEPT_MAX,
    RUNS_QUEUED_MAX,
    BlobFiles,
    ExecutorConfig,
)
from .cache import ExecutableCache, Figures
from .compiling import Compiler
from .forks import Zygote, ZygoteLost, open_zygote
from .probing import probe
from .workers import Run, Worker, riding, run_head

_K = TypeVar("_K")
_V = TypeVar("_V")

_LOAD_REFUSALS = frozenset({Reason.KERNEL_SPEC, Reason.JAX_WINDOW, Reason.MEMORY})
_WORKER_REASONS = {
    int(reason): reason
    for reason in (*_LOAD_REFUSALS, Reason.FAILED_BY_JOB, Reason.STOPPED_BY_OWNER)
}


class Executor:
    """Made by `open_executor`. Every `StartExec` gets exactly one `ExecEnded`."""

    def __init__(
        self,
        config: ExecutorConfig,
        blobs: BlobFiles,
        artifacts: ArtifactSource,
        nursery: trio.Nursery,
    ) -> None:
        self._send: trio.MemorySendChannel[Event]
        self.events: trio.MemoryReceiveChannel[Event]
        self._send, self.events = trio.open_memory_channel[Event](EVENTS_QUEUED_MAX)
        self._config = config
        self._blobs = blobs
        self._artifacts = artifacts
        # Lives exactly as long as `open_executor`'s block, like this object: `start` is not async
        # and yet must start tasks, and a task between would cost each run a wake-up.
        self._nursery = nursery
        self._workers: list[Worker] = []
        self._queue: deque[Run] = deque()
        self._runs: dict[int, Run] = {}
        self._late: deque[Event] = deque()
        self._figures: OrderedDict[Program, Figures] = OrderedDict()
        self._refused: OrderedDict[Program, tuple[Reason, str]] = OrderedDict()
        self._zygote: Zygote | None = None
        self._zygote_scope: trio.CancelScope | None = None
        self._zygote_lock = trio.Lock()
        self._zygote_users = 0
        self._used_s = trio.current_time()
        cache = ExecutableCache(config.executable_cache, config.executable_bytes_max)
        self._compiler = Compiler(config, cache, self._ensure_zygote)
        self._probing = False
        self._closing = False

    # ------------------------------------------------------------------------ called by the driver

    def probe(self) -> None:
        """One `WorkerClasses` follows; without any class if no worker could be started."""
        if not self._probing:
            self._probing = True
            self._nursery.start_soon(self._probe)

    def admit(self, effect: Admit) -> None:
        """`Admitted` with what is known of the cost, or `ExecEnded` with the refusal."""
        try:
            artifact = self._check(effect.spec)
        except Refused as refused:
            self._emit(ExecEnded(effect.exec_id, refused.reason, Meters(), refused.text))
            return
        figures = self._figures.get(program_of(effect.spec))
        flop = artifact.flop_per_unit or (figures.flop_per_unit if figures else 0)
        flop *= effect.spec.steps if effect.spec.stepped else 1
        memory_mb = figures.memory_mb if figures else memory_mb_least(effect.spec)
        self._emit(Admitted(effect.exec_id, flop // 1000, memory_mb))
        if self._zygote is None and not self._zygote_lock.locked():
            self._nursery.start_soon(self._warm)

    def start(self, effect: StartExec) -> None:
        """Run now or as soon as a slot is free."""
        if effect.exec_id in self._runs:
            raise LocalProtocolError(f"exec {effect.exec_id} runs already")
        try:
            artifact = self._check(effect.spec)
            check_run(effect)
            if len(self._queue) >= RUNS_QUEUED_MAX:
                raise Refused(Reason.BUSY, f"{RUNS_QUEUED_MAX} runs wait already")
        except Refused as refused:
            self._emit(ExecEnded(effect.exec_id, refused.reason, Meters(), refused.text))
            return
        unit_bytes = sum(wire.array_bytes(spec) for spec in effect.spec.outs)
        run = Run(effect, program_of(effect.spec), unit_bytes, artifact.flop_per_unit)
        self._runs[effect.exec_id] = run
        self._queue.append(run)
        self._place()

    def stop(self, effect: StopExec) -> None:
        """`grace_ms` 0 kills; else the run ends at the next unit, and is killed after the grace."""
        run = self._runs.get(effect.exec_id)
        if run is None:
            return  # it has ended, and its ExecEnded is on the way
        if run in self._queue:
            self._queue.remove(run)
            self._end(run, effect.reason, "")
            return
        worker = next(worker for worker in self._workers if worker.run is run)
        if effect.grace_ms <= 0 or worker.child is None or not worker.loaded:
            worker.doom(effect.reason)
            return
        run.stop_reason = effect.reason
        self._nursery.start_soon(worker.say, wire.STOP, wire.EXEC_BODY.pack(effect.exec_id))
        deadline = trio.current_time() + effect.grace_ms / 1000
        worker.scope.deadline = min(worker.scope.deadline, deadline)

    def running(self) -> int:
        """Slots in use."""
        return sum(worker.run is not None for worker in self._workers)

    @property
    def zygote_ready(self) -> bool:
        """A run that starts now waits for no import of jax."""
        return self._zygote is not None

    @property
    def compiles(self) -> int:
        """Compile-only workers started so far."""
        return self._compiler.compiles

    # -------------------------------------------------------------------------------------- checks

    def _check(self, spec: ExecSpec) -> Artifact:
        """Everything that can be refused before a process is spawned."""
        try:
            artifact = self._artifacts.artifact(spec.artifact, spec.code)
        except KeyError:
            raise Refused(Reason.UNKNOWN_ARTIFACT) from None
        check_sizes(spec, self._config.memory_mb_max)
        if artifact.args is not None:
            if artifact.args != tuple(wire.LoadArg(arg.mapped, arg.spec) for arg in spec.args):
                raise Refused(Reason.KERNEL_SPEC, f"the arguments are not those of {spec.kernel}")
            if artifact.outs != spec.outs or artifact.stepped != spec.stepped:
                raise Refused(Reason.KERNEL_SPEC, f"the outputs are not those of {spec.kernel}")
        if known := self._refused.get(program_of(spec)):
            raise Refused(*known)
        figures = self._figures.get(program_of(spec))
        if figures is not None and figures.memory_mb > self._memory(spec):
            raise Refused(Reason.MEMORY, f"it needs {figures.memory_mb} MB")
        return artifact

    def _memory(self, spec: ExecSpec) -> int:
        return min(spec.memory_mb_max, self._config.memory_mb_max)

    # ----------------------------------------------------------------------------------- placement

    def _place(self) -> None:
        """Give queued runs to workers while slots are free, first come first served."""
        while self._queue and not self._closing and self.running() < self._config.slots:
            run = self._queue[0]
            worker = next((w for w in self._workers if w.idle and w.program == run.program), None)
            if worker is None:
                self._make_room()
                self._queue.popleft()
                self._spawn(run)
            elif self._dispatch(worker, run):
                self._queue.popleft()

    def _make_room(self) -> None:
        """At the bound the worker that has been idle longest goes; running ones are <= slots."""
        alive = [worker for worker in self._workers if worker.verdict is None]
        if len(alive) >= max(self._config.workers_max, self._config.slots):
            idle = [worker for worker in alive if worker.idle]
            min(idle, key=lambda worker: worker.scope.deadline).doom(Reason.OK)

    def _spawn(self, run: Run) -> None:
        # Both ends exist before the child does, so nothing waits for an address.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        scope = trio.CancelScope(deadline=trio.current_time() + self._config.load_s_max)
        worker = Worker(run.program, ours, scope, run)
        self._zygote_users += 1
        self._workers.append(worker)
        self._nursery.start_soon(self._live, worker, theirs)

    def _dispatch(self, worker: Worker, run: Run) -> bool:
        """Into the worker's socket, here and now. False: the worker turned out to be dead."""
        effect, fds = run.effect, array.array("i")
        try:
            head = run_head(run, fds, self._blobs, self._open_blob)
            # The socket of an idle worker is empty, so this takes what fits and never blocks.
            sent = worker.sock.sendmsg([head, effect.inline], riding(fds))
        except Refused as refused:
            worker.run = None
            self._rest(worker)
            self._end(run, refused.reason, refused.text)
            return True
        except OSError:
            worker.doom(Reason.WORKER_DIED)
            return False
        finally:
            for fd in fds:
                os.close(fd)
        worker.run = run
        run.started_s = trio.current_time()
        assert worker.figures is not None
        run.flop_per_unit = run.flop_per_unit or worker.figures.flop_per_unit
        worker.scope.deadline = run.started_s + effect.spec.wall_ms_max / 1000
        rest = len(head) + len(effect.inline) - sent
        if rest:
            worker.unsent = trio.Event()
            self._nursery.start_soon(worker.send_rest, effect.inline[-rest:])
        self._emit(Started(effect.exec_id))
        return True

    def _open_blob(self, blob_id: Digest, first_byte: int, byte_count: int) -> int:
        try:
            fd = self._blobs.open_blob(blob_id, first_byte, byte_count)
        except (KeyError, OSError) as error:
            raise Refused(Reason.BLOB_MISSING, f"blob {blob_id.hex()[:16]}") from error
        if os.fstat(fd).st_size < first_byte + byte_count:
            os.close(fd)
            raise Refused(Reason.KERNEL_SPEC, f"blob {blob_id.hex()[:16]} is too short")
        return fd

    # ------------------------------------------------------------------------------ a worker's life

    async def _live(self, worker: Worker, theirs: socket.socket) -> None:
        try:
            with worker.scope, contextlib.ExitStack() as files:
                files.callback(theirs.close)
                await self._bring_up(worker, theirs, files)
                files.close()
                await self._serve(worker)
        except Refused as refused:
            worker.verdict = worker.verdict or (refused.reason, refused.text)
        except ZygoteLost as lost:
            worker.verdict = worker.verdict or (Reason.NO_WORKER, str(lost))
        except wire.WireError as error:
            broke = f"it broke its protocol: {error}"
            worker.verdict = worker.verdict or (Reason.WORKER_DIED, broke)
        except (OSError, trio.BrokenResourceError):
            pass  # the process ended, or nobody listens to events any more
        finally:
            with trio.CancelScope(shield=True):
                await self._bury(worker)

    async def _bring_up(
        self, worker: Worker, theirs: socket.socket, files: contextlib.ExitStack
    ) -> None:
        """Fork, find the program's machine code, hand both over; `_on_frame` does the rest."""
        assert worker.run is not None
        spec = worker.run.effect.spec
        fds = []
        for arg in spec.args:
            if not arg.mapped and arg.blob is not None:
                fds.append(self._open_blob(arg.blob.blob_id, 0, wire.array_bytes(arg.spec)))
                files.callback(os.close, fds[-1])
        zygote = await self._ensure_zygote()
        worker.child = await zygote.fork("worker", theirs, self._config.threads_per_worker())
        theirs.close()  # while a worker's end is open here, its death is no end of file
        while not worker.environment:
            await self._hear(worker)
        artifact = self._artifacts.artifact(spec.artifact, spec.code)
        load = load_of(spec, artifact.exported, self._memory(spec))
        environment = worker.environment
        try:
            executable, figures = await self._compiler.executable(spec.artifact, load, environment)
        except Refused as refused:
            self._remember(worker.program, refused)
            raise
        if executable is None:
            await worker.load(load, fds)
            return
        files.callback(os.close, executable.fd)
        ready = replace(load, artifact=b"", executable=True)
        await worker.load(ready, [*fds, executable.fd])
        worker.figures = figures
        while not worker.loaded:
            for kind, body in await worker.receive():
                if kind == wire.UNUSABLE:  # a cache of another machine, say
                    await self._compiler.drop(spec.artifact, load, environment)
                    await worker.load(load, fds)
                    return
                self._on_frame(worker, kind, body)

    async def _bring_loop(self, worker: Worker, spec: ExecSpec, units: int) -> None:
        """What WANT asked for, while the run goes on; without it units go one by one."""
        artifact = self._artifacts.artifact(spec.artifact, spec.code)
        load = load_of(spec, artifact.exported, self._memory(spec))
        load = replace(load, loop_units=units)
        with trio.move_on_after(self._config.load_s_max), contextlib.suppress(Refused, ZygoteLost):
            entry, _ = await self._compiler.executable(spec.artifact, load, worker.environment)
            if entry is not None:
                with os.fdopen(entry.fd, "rb"):
                    await worker.say(wire.LOOP, wire.LOOP_BODY.pack(units), entry.fd)

    async def _hear(self, worker: Worker) -> None:
        """What has come, into events."""
        for kind, body in await worker.receive():
            if kind == wire.UNITS:
                await self._on_units(worker, body)
            elif kind in (wire.STATE, wire.WATCH):
                await self._on_slice(worker, kind, body)
            else:
                self._on_frame(worker, kind, body)

    async def _serve(self, worker: Worker) -> None:
        """Answers into events, until the worker ends."""
        while True:
            await self._hear(worker)

    async def _on_slice(self, worker: Worker, kind: int, body: bytes) -> None:
        run = worker.run
        if run is None or run.stepped is None:
            raise wire.WireError("a slice without steps")
        run.device_ms, watch = run.stepped.progress(kind, body)
        event: Event | None
        if kind == wire.WATCH:
            event = run.stepped.partial(watch)
        else:
            stopping = run.stop_reason is not None
            event = await run.stepped.keep(run.meters(), stopping=stopping)
            await worker.say(wire.KEPT, wire.EXEC_BODY.pack(run.effect.exec_id))
        if event is not None:
            await self._send_event(event)

    async def _on_units(self, worker: Worker, body: bytes) -> None:
        run = worker.run
        if run is None or len(body) < wire.UNITS_HEAD.size:
            raise wire.WireError("units")
        exec_id, first, units, device_ms, last = wire.UNITS_HEAD.unpack_from(body)
        effect, size, start = run.effect, run.unit_bytes, wire.UNITS_HEAD.size
        if exec_id != effect.exec_id or first != effect.run.first + run.done or not units:
            raise wire.WireError("units of another run")
        if run.done + units > effect.run.count or len(body) != start + units * size:
            raise wire.WireError("units of a wrong size")
        run.done += units
        run.device_ms = device_ms
        view = memoryview(body)
        outputs = tuple(bytes(view[at : at + size]) for at in range(start, len(body), size))
        if run.stepped is not None:
            run.stepped.on_units(run.done)
        await self._send_event(UnitsDone(exec_id, first, outputs, run.meters()))
        if last:
            if run.done != effect.run.count:
                raise wire.WireError("an end before the end")
            self._finish(worker, run, Reason.DONE, "")

    def _on_frame(self, worker: Worker, kind: int, body: bytes) -> None:
        if kind == wire.READY and len(body) == wire.READY_BODY.size and not worker.environment:
            # Said before anybody's code is in the process, and believed only then. The layers
            # in force are for a policy that asks for some to compare.
            _, worker.environment = wire.READY_BODY.unpack(body)
            return
        if kind == wire.WANT and len(body) == wire.WANT_BODY.size:
            self._on_want(worker, *wire.WANT_BODY.unpack(body))
            return
        if kind == wire.LOADED and len(body) == wire.LOADED_BODY.size and not worker.loaded:
            # Machine code from the cache says nothing of itself: its figures came with it.
            worker.figures = worker.figures or Figures(*wire.LOADED_BODY.unpack(body))
            _keep(self._figures, worker.program, worker.figures, FIGURES_KEPT_MAX)
            worker.loaded = True
            run = worker.run
            assert run is not None  # it was spawned for a run, and only its end takes it away
            if not self._dispatch(worker, run):
                raise OSError("it ended after loading")
            self._place()  # the run may have been refused at once, and the slot is free
            return
        if kind != wire.ENDED or worker.run is None:
            raise wire.WireError(f"frame {kind}")
        exec_id, code, device_ms, text = wire.decode_ended(body)
        run, reason = worker.run, _WORKER_REASONS.get(code)
        if reason is None:
            raise wire.WireError(f"reason {code}")
        if not worker.loaded:
            refused = Refused(reason, text)
            self._remember(worker.program, refused)
            raise refused
        if exec_id != run.effect.exec_id:
            raise wire.WireError("the end of another run")
        run.device_ms = device_ms
        if reason is Reason.STOPPED_BY_OWNER:
            reason = run.stop_reason or reason
        self._finish(worker, run, reason, text)

    def _on_want(self, worker: Worker, units: int) -> None:
        run = worker.run
        sound = 1 < units <= wire.LOOP_UNITS_MAX and units.bit_count() == 1
        if run is None or worker.loop_asked or not sound or run.stepped is not None:
            raise wire.WireError("a loop that it may not want")
        worker.loop_asked = True
        self._nursery.start_soon(self._bring_loop, worker, run.effect.spec, units)

    def _remember(self, program: Program, refused: Refused) -> None:
        """No other run of the program will fare better; memory is each job's own bound."""
        if refused.reason in _LOAD_REFUSALS - {Reason.MEMORY}:
            _keep(self._refused, program, (refused.reason, refused.text), REFUSALS_KEPT_MAX)

    def _finish(self, worker: Worker, run: Run, reason: Reason, text: str) -> None:
        """The run is over and the worker lives on."""
        worker.run = None
        self._rest(worker)
        self._end(run, reason, text)
        self._place()

    def _rest(self, worker: Worker) -> None:
        self._used_s = trio.current_time()
        worker.scope.deadline = self._used_s + self._config.idle_stop_s

    async def _bury(self, worker: Worker) -> None:
        """The worker is over, one way or another: no process, no file, and its run has an end."""
        reason, text = worker.verdict or self._verdict_of_clock(worker) or (Reason.WORKER_DIED, "")
        if worker.child is not None:
            if reason is Reason.WORKER_DIED and not text:
                text = await worker.child.ending()
            await worker.child.gone()
            os.close(worker.child.pidfd)
        worker.close()
        self._workers.remove(worker)
        run, worker.run = worker.run, None
        if run is not None:
            self._end(run, reason, text)
        self._let_go_of_zygote()
        self._place()

    def _verdict_of_clock(self, worker: Worker) -> tuple[Reason, str] | None:
        """Which deadline it was, if it was one."""
        run = worker.run
        if not worker.scope.cancelled_caught:
            return (Reason.SHUTDOWN, "") if self._closing else None
        if run is None:
            return Reason.OK, "idle"
        if run.stop_reason is not None:
            return run.stop_reason, ""
        if not worker.loaded:
            return Reason.WALL_CLOCK, f"it did not load in {self._config.load_s_max:g} s"
        limit_ms = run.effect.spec.wall_ms_max
        return Reason.WALL_CLOCK, f"its limit of {limit_ms} ms is over"

    def _end(self, run: Run, reason: Reason, text: str) -> None:
        del self._runs[run.effect.exec_id]
        self._emit(ExecEnded(run.effect.exec_id, reason, run.meters(), text))
        if run.stepped is not None:
            run.stepped.close()

    # -------------------------------------------------------------------------------------- zygote

    async def _ensure_zygote(self) -> Zygote:
        async with self._zygote_lock:
            scope = self._zygote_scope
            if self._zygote is None or self._zygote.lost or (scope and scope.cancel_called):
                self._zygote = await open_zygote(self._config)
                self._zygote_scope = trio.CancelScope()
                self._nursery.start_soon(self._tend, self._zygote, self._zygote_scope)
            assert self._zygote_scope is not None
            self._zygote_scope.deadline = float("inf")
            return self._zygote

    async def _tend(self, zygote: Zygote, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await zygote.tend()
        finally:
            zygote.abandon()
            if self._zygote is zygote:
                self._zygote = None
            with trio.CancelScope(shield=True):
                await zygote.close()

    def _let_go_of_zygote(self) -> None:
        self._zygote_users = max(0, self._zygote_users - 1)
        if not self._zygote_users and self._zygote_scope is not None:
            self._zygote_scope.deadline = self._used_s + self._config.idle_stop_s

    async def _warm(self) -> None:
        """An offer is here: the import of jax can start before the run does."""
        self._zygote_users += 1
        self._used_s = trio.current_time()
        try:
            with contextlib.suppress(ZygoteLost):  # the run will say so
                await self._ensure_zygote()
        finally:
            self._let_go_of_zygote()

    async def _probe(self) -> None:
        self._zygote_users += 1
        self._used_s = trio.current_time()
        try:
            self._emit(await probe(self._config, self._ensure_zygote))
        finally:
            self._probing = False
            self._let_go_of_zygote()

    # -------------------------------------------------------------------------------------- events

    def _emit(self, event: Event) -> None:
        """From code that cannot wait. What finds the channel full is sent by a task, in order."""
        if not self._late:
            try:
                self._send.send_nowait(event)
                return
            except trio.WouldBlock:
                if not self._closing:
                    self._nursery.start_soon(self._send_late)
            except trio.BrokenResourceError:
                return  # nobody listens any more
        if len(self._late) >= EVENTS_LATE_MAX:
            raise LocalProtocolError("nobody reads the executor's events")
        self._late.append(event)

    async def _send_event(self, event: Event) -> None:
        """From a worker's own task: a full channel makes the worker wait too, by its socket."""
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            await self._send.send(event)

    async def _send_late(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while self._late:
                await self._send.send(self._late[0])
                self._late.popleft()

    def _close(self) -> None:
        """No new process; what runs or waits ends with SHUTDOWN as its worker is buried."""
        self._closing = True
        while self._queue:
            self._end(self._queue.popleft(), Reason.SHUTDOWN, "")
        for worker in self._workers:
            worker.doom(Reason.SHUTDOWN)


@asynccontextmanager
async def open_executor(
    config: ExecutorConfig, blobs: BlobFiles, artifacts: ArtifactSource
) -> AsyncIterator[Executor]:
    """An executor for the length of the block; afterwards no process, file or socket is left."""
    async with trio.open_nursery() as nursery:
        executor = Executor(config, blobs, artifacts, nursery)
        try:
            yield executor
        finally:
            executor._close()
            nursery.cancel_scope.cancel()
    executor._send.close()


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V, count_max: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > count_max:
        kept.popitem(last=False)
