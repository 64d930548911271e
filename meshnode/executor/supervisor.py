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
import signal
import socket
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.effects import Admit, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import Admitted, Event, ExecEnded, Meters, Started, UnitsDone
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sandbox import missing, names
from meshnode.protocol.types import Peer

from . import wire
from .admission import (
    Program,
    Refused,
    Sizes,
    check_run,
    check_sizes,
    memory_mb_least,
    program_of,
    sizes_of,
)
from .artifacts import Artifact, ArtifactSource
from .bounds import (
    EVENTS_LATE_MAX,
    EVENTS_QUEUED_MAX,
    FIGURES_KEPT_MAX,
    RECEIVE_BYTES,
    REFUSALS_KEPT_MAX,
    RUNS_QUEUED_MAX,
    BlobFiles,
    ExecutorConfig,
)
from .forks import Child, Zygote, ZygoteLost, open_zygote
from .link import Link, open_blob
from .probing import forget, probe
from .run import Figures, Run, keep

_LOAD_REFUSALS = frozenset({Reason.KERNEL_SPEC, Reason.JAX_WINDOW, Reason.MEMORY})
# Says nothing of the program: the next worker may fare better, another program no better.
_OTHER_REFUSALS = (Reason.SANDBOX, Reason.FAILED_BY_JOB, Reason.STOPPED_BY_OWNER)
_OutputsOf = Callable[[bytes, int, int], tuple[bytes, ...] | None]
_WORKER_REASONS = {int(reason): reason for reason in (*_LOAD_REFUSALS, *_OTHER_REFUSALS)}


@dataclass(eq=False, slots=True)
class _Worker:
    program: Program
    link: Link
    scope: trio.CancelScope
    run: Run | None
    child: Child | None = None
    loaded: bool = False
    figures: Figures | None = None
    verdict: tuple[Reason, str] | None = None  # why it is being killed
    frames: wire.FrameReader = field(default_factory=wire.FrameReader)

    @property
    def idle(self) -> bool:
        return self.loaded and self.run is None and self.verdict is None

    def doom(self, reason: Reason, text: str = "") -> None:
        """SIGKILL now; its task then says how the run ended."""
        if self.verdict is None:
            self.verdict = (reason, text)
        if self.child is not None:
            self.child.signal(signal.SIGKILL)
        self.scope.cancel()


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
        self._workers: list[_Worker] = []
        self._queue: deque[Run] = deque()
        self._runs: dict[int, Run] = {}
        self._late: deque[Event] = deque()
        self._figures: OrderedDict[Program, Figures] = OrderedDict()
        self._refused: OrderedDict[Program, tuple[Reason, str]] = OrderedDict()
        self._passed: OrderedDict[Hashable, tuple[Artifact, Sizes]] = OrderedDict()
        self._zygote: Zygote | None = None
        self._zygote_scope: trio.CancelScope | None = None
        self._zygote_lock = trio.Lock()
        self._zygote_users = 0
        self._used_s = trio.current_time()
        self._probing = False
        self._layers = 0  # of the sandbox, as the probe found them
        self._exclusive = False  # an accelerator: one submitter's workers at a time
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
        memory_mb = figures.memory_mb if figures else memory_mb_least(effect.spec)
        self._emit(Admitted(effect.exec_id, flop // 1000, memory_mb))
        if self._zygote is None and not self._zygote_lock.locked():
            self._nursery.start_soon(self._warm)

    def start(self, effect: StartExec) -> None:
        """Run now, or as soon as a slot is free and a worker is loaded: then `Started` tells."""
        if effect.exec_id in self._runs:
            raise LocalProtocolError(f"exec {effect.exec_id} runs already")
        try:
            artifact, sizes = self._sizes(effect.spec)
            check_run(effect, sizes.inline_bytes)
            if len(self._queue) >= RUNS_QUEUED_MAX:
                raise Refused(Reason.BUSY, f"{RUNS_QUEUED_MAX} runs wait already")
        except Refused as refused:
            self._emit(ExecEnded(effect.exec_id, refused.reason, Meters(), refused.text))
            return
        run = Run(effect, sizes.program, sizes.unit_bytes, artifact.flop_per_unit)
        self._runs[effect.exec_id] = run
        self._queue.append(run)
        self._place()
        run.waited = not run.started_s

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
        worker.child.signal(signal.SIGUSR1)
        deadline = trio.current_time() + effect.grace_ms / 1000
        worker.scope.deadline = min(worker.scope.deadline, deadline)

    def running(self) -> int:
        """Slots in use."""
        return sum(worker.run is not None for worker in self._workers)

    # -------------------------------------------------------------------------------------- checks

    def _sizes(self, spec: ExecSpec) -> tuple[Artifact, Sizes]:
        """`_check`, remembered: a requester's short calls are all of one program."""
        key = (spec.submitter, spec.artifact, spec.args, spec.outs, spec.memory_mb_max)
        known = self._passed.get(key)
        if known is None:
            artifact = self._check(spec)
            known = artifact, sizes_of(spec)
            keep(self._passed, key, known, FIGURES_KEPT_MAX)
        return known

    def _check(self, spec: ExecSpec) -> Artifact:
        """Everything that can be refused before a process is spawned."""
        try:
            artifact = self._artifacts.artifact(spec.artifact)
        except KeyError:
            raise Refused(Reason.UNKNOWN_ARTIFACT) from None
        check_sizes(spec, self._config.memory_mb_max)
        if artifact.args is not None:
            if artifact.args != tuple(wire.LoadArg(arg.mapped, arg.spec) for arg in spec.args):
                raise Refused(Reason.KERNEL_SPEC, f"the arguments are not those of {spec.kernel}")
            if artifact.outs != spec.outs:
                raise Refused(Reason.KERNEL_SPEC, f"the outputs are not those of {spec.kernel}")
        if known := self._refused.get(program_of(spec)):
            raise Refused(*known)
        figures = self._figures.get(program_of(spec))
        if figures is not None and figures.memory_mb > self._memory_mb_max(spec):
            raise Refused(Reason.MEMORY, f"it needs {figures.memory_mb} MB")
        return artifact

    def _memory_mb_max(self, spec: ExecSpec) -> int:
        return min(spec.memory_mb_max, self._config.memory_mb_max)

    # ----------------------------------------------------------------------------------- placement

    def _place(self) -> None:
        """Give queued runs to workers while slots are free, first come first served."""
        while self._queue and not self._closing and self.running() < self._config.slots:
            run = self._queue[0]
            worker = next((w for w in self._workers if w.idle and w.program == run.program), None)
            if worker is None:
                if self._exclusive and self._others_hold_the_device(run.program.submitter):
                    return  # `_bury` places again
                self._make_room()
                self._queue.popleft()
                self._spawn(run)
            elif self._dispatch(worker, run):
                self._queue.popleft()

    def _others_hold_the_device(self, submitter: Peer) -> bool:
        """What one submitter's worker leaves in a device's memory goes with its process; idle ones
        end here, a running one is waited for."""
        others = [w for w in self._workers if w.program.submitter != submitter]
        for worker in others:
            if worker.idle:
                worker.doom(Reason.OK)
        return bool(others)

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
        worker = _Worker(run.program, Link(ours), scope, run)
        self._zygote_users += 1
        self._workers.append(worker)
        self._nursery.start_soon(self._live, worker, theirs)

    def _dispatch(self, worker: _Worker, run: Run) -> bool:
        """Into the worker's socket, here and now. False: the worker turned out to be dead."""
        effect = run.effect
        try:
            rest = worker.link.send_run(effect, run.unit_bytes, self._blobs)
        except Refused as refused:
            worker.run = None
            self._rest(worker)
            self._end(run, refused.reason, refused.text)
            return True
        except OSError:
            worker.doom(Reason.WORKER_DIED)
            return False
        worker.run = run
        run.started_s = trio.current_time()
        assert worker.figures is not None
        run.flop_per_unit = run.flop_per_unit or worker.figures.flop_per_unit
        worker.scope.deadline = run.started_s + effect.spec.wall_ms_max / 1000
        if rest:
            self._nursery.start_soon(self._send_rest, worker, rest)
        if run.waited:  # else the caller still stands in `start`, and a wake-up is all it would get
            self._emit(Started(effect.exec_id))
        return True

    async def _send_rest(self, worker: _Worker, rest: bytes) -> None:
        view, sock = memoryview(rest), worker.link.sock
        with contextlib.suppress(OSError):  # the worker's own task sees its end
            while view:
                try:
                    view = view[sock.send(view) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sock.fileno())

    # ------------------------------------------------------------------------------ a worker's life

    async def _live(self, worker: _Worker, theirs: socket.socket) -> None:
        try:
            with worker.scope, contextlib.ExitStack() as files:
                files.callback(theirs.close)
                await self._bring_up(worker, theirs, files)
                files.close()  # while a worker's end is open here, its death is no end of file
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
        self, worker: _Worker, theirs: socket.socket, files: contextlib.ExitStack
    ) -> None:
        """Fork, hand over the program, and leave the rest to `_on_frame`."""
        assert worker.run is not None
        spec = worker.run.effect.spec
        fds = array.array("i")
        for arg in spec.args:
            if not arg.mapped and arg.blob is not None:
                size = wire.array_bytes(arg.spec)
                fds.append(open_blob(self._blobs, arg.blob.blob_id, 0, size))
                files.callback(os.close, fds[-1])
        zygote = await self._ensure_zygote()
        worker.child = await zygote.fork(
            "worker",
            theirs,
            self._config.threads_per_worker(),
            self._memory_mb_max(spec),
            self._config.cgroup,
        )
        load = wire.Load(
            self._artifacts.artifact(spec.artifact).exported,
            tuple(wire.LoadArg(arg.mapped, arg.spec) for arg in spec.args),
            spec.outs,
            self._memory_mb_max(spec),
        )
        rest = worker.link.send(memoryview(wire.encode_load(load)), fds)
        theirs.close()
        await self._send_rest(worker, rest)

    async def _serve(self, worker: _Worker) -> None:
        """Answers into events, until the worker ends."""
        sock = worker.link.sock
        while True:
            await trio.lowlevel.wait_readable(sock.fileno())
            chunk = sock.recv(RECEIVE_BYTES)
            if not chunk:
                raise OSError("end of file")
            for kind, body in worker.frames.feed(chunk):
                if kind == wire.UNITS:
                    await self._on_units(worker, body, worker.link.outputs_in_frame)
                elif kind == wire.UNITS_IN_AREA:
                    await self._on_units(worker, body, worker.link.outputs_in_area)
                else:
                    self._on_frame(worker, kind, body)

    async def _on_units(self, worker: _Worker, body: bytes, outputs_of: _OutputsOf) -> None:
        run = worker.run
        if run is None or len(body) < wire.UNITS_HEAD.size:
            raise wire.WireError("units")
        exec_id, first, units, device_ms, last = wire.UNITS_HEAD.unpack_from(body)
        effect = run.effect
        if exec_id != effect.exec_id or first != effect.run.first + run.done or not units:
            raise wire.WireError("units of another run")
        outputs = outputs_of(body, units, run.unit_bytes)
        if run.done + units > effect.run.count or outputs is None:
            raise wire.WireError("units of a wrong size")
        run.done += units
        run.device_ms = device_ms
        meters = run.meters()
        event = UnitsDone(exec_id, first, outputs, meters)
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            await self._send.send(event)  # the worker waits too, by its socket
        if last:
            if run.done != effect.run.count:
                raise wire.WireError("an end before the end")
            self._finish(worker, run, Reason.DONE, "", meters)

    def _on_frame(self, worker: _Worker, kind: int, body: bytes) -> None:
        if kind == wire.READY and len(body) == wire.READY_BODY.size and not worker.loaded:
            self._check_layers(*wire.READY_BODY.unpack(body))
            return
        if kind == wire.LOADED and len(body) == wire.LOADED_BODY.size and not worker.loaded:
            compile_ms, flop_per_unit, memory_mb = wire.LOADED_BODY.unpack(body)
            worker.figures = Figures(flop_per_unit, memory_mb, compile_ms)
            keep(self._figures, worker.program, worker.figures, FIGURES_KEPT_MAX)
            self._passed.clear()  # they passed without these figures
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
            if reason in _LOAD_REFUSALS - {Reason.MEMORY}:  # no other run of it will fare better
                keep(self._refused, worker.program, (reason, text), REFUSALS_KEPT_MAX)
                self._passed.clear()
            raise Refused(reason, text)
        if exec_id != run.effect.exec_id:
            raise wire.WireError("the end of another run")
        run.device_ms = device_ms
        if reason is Reason.STOPPED_BY_OWNER:
            reason = run.stop_reason or reason
        self._finish(worker, run, reason, text)

    def _check_layers(self, layers: int) -> None:
        """A worker says which it has: what the policy asks for, and what the advert promises."""
        lacks = missing(self._config.sandbox_least, layers)
        if lacks:
            raise Refused(Reason.SANDBOX, f"its owner asks for {names(lacks)}")
        lacks = missing(self._layers, layers)
        if lacks:
            forget(self._config)  # this machine has changed under the kept answer
            self.probe()
            raise Refused(Reason.SANDBOX, f"the probe had {names(lacks)}, this worker has not")

    def _finish(
        self, worker: _Worker, run: Run, reason: Reason, text: str, meters: Meters | None = None
    ) -> None:
        """The run is over and the worker lives on."""
        worker.run = None
        self._rest(worker)
        self._end(run, reason, text, meters)
        self._place()

    def _rest(self, worker: _Worker) -> None:
        self._used_s = trio.current_time()
        worker.scope.deadline = self._used_s + self._config.idle_stop_s

    async def _bury(self, worker: _Worker) -> None:
        """The worker is over, one way or another: no process, no file, and its run has an end."""
        reason, text = worker.verdict or self._verdict_of_clock(worker) or (Reason.WORKER_DIED, "")
        if worker.child is not None:
            if reason is Reason.WORKER_DIED and not text:
                text = await worker.child.ending()
            await worker.child.gone()
            os.close(worker.child.pidfd)
        worker.link.close()
        self._workers.remove(worker)
        run, worker.run = worker.run, None
        if run is not None:
            self._end(run, reason, text)
        self._let_go_of_zygote()
        self._place()

    def _verdict_of_clock(self, worker: _Worker) -> tuple[Reason, str] | None:
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

    def _end(self, run: Run, reason: Reason, text: str, meters: Meters | None = None) -> None:
        del self._runs[run.effect.exec_id]
        self._emit(ExecEnded(run.effect.exec_id, reason, meters or run.meters(), text))

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
            found = await probe(self._config, self._ensure_zygote)
            self._layers = found.sandbox_layers
            self._exclusive = not self._config.share_device and any(
                each.platform != "cpu" for each in found.classes
            )
            self._emit(found)
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
