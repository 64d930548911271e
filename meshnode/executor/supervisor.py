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

import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.effects import Admit, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import Admitted, Event, ExecEnded, Meters, Started, UnitsDone
from meshnode.protocol.owner import rate_mflops_most
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sandbox import missing, names
from meshnode.protocol.types import Peer

from . import wire
from .admission import (
    LOAD_REFUSALS,
    Refused,
    check_memory,
    check_run,
    check_time,
    flop_of_run,
)
from .artifacts import ArtifactSource
from .bounds import RUNS_QUEUED_MAX, BlobFiles, ExecutorConfig
from .cache import ExecutableCache
from .compiling import Compiler
from .forks import ZygoteLost
from .link import open_blob, open_link
from .metering import EnergyMeter
from .outbox import Outbox
from .probing import forget, probe
from .programs import Programs
from .run import Run
from .warm import WarmZygote
from .workers import Worker

_WORKER_REASONS = {int(reason): reason for reason in (*LOAD_REFUSALS, Reason.STOPPED_BY_OWNER)}
_OutputsOf = Callable[[bytes, int, int], tuple[bytes, ...] | None]


class Executor:
    """Made by `open_executor`. Every `StartExec` gets exactly one `ExecEnded`."""

    def __init__(
        self,
        config: ExecutorConfig,
        blobs: BlobFiles,
        artifacts: ArtifactSource,
        nursery: trio.Nursery,
        meter: EnergyMeter | None = None,
    ) -> None:
        self._meter = meter
        self._platform = "cpu"  # on which runs draw their energy, as the probe found it
        self._config = config
        self._blobs = blobs
        self.disk_interval_s = config.disk_interval_s
        self.sandbox_least = config.sandbox_least
        """As in the configuration, until the owner's policy says another."""
        # Lives exactly as long as `open_executor`'s block, like this object: `start` is not async
        # and yet must start tasks, and a task between would cost each run a wake-up.
        self._nursery = nursery
        self._outbox = Outbox(nursery)
        self.events: trio.MemoryReceiveChannel[Event] = self._outbox.events
        self._emit = self._outbox.emit
        self._workers: list[Worker] = []
        self._queue: deque[Run] = deque()
        self._runs: dict[int, Run] = {}
        self._programs = Programs(artifacts, config.memory_mb_max)
        self._zygote = WarmZygote(config, nursery)
        cache = ExecutableCache(config.executable_cache, config.executable_bytes_max)
        self._compiler = Compiler(config, cache, self._zygote.get, self._check_layers)
        self._probing = False
        self._layers = 0  # of the sandbox, as the probe found them
        self._rate_mflops = 0  # the most that the probe lets expect
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
        spec = effect.spec
        try:
            passed = self._programs.check(spec)
            flop = passed.flop_per_unit * (spec.steps if spec.stepped else 1)
            check_time(flop, self._rate_mflops, spec.wall_ms_max)
        except Refused as refused:
            self._emit(ExecEnded(effect.exec_id, refused.reason, Meters(), refused.text))
            return
        self._emit(Admitted(effect.exec_id, flop // 1000, passed.memory_mb, passed.counted))
        if self._zygote.cold:
            self._nursery.start_soon(self._warm)

    def start(self, effect: StartExec) -> None:
        """Run now, or as soon as a slot is free and a worker is loaded: then `Started` tells."""
        if effect.exec_id in self._runs:
            raise LocalProtocolError(f"exec {effect.exec_id} runs already")
        try:
            passed = self._programs.check(effect.spec)
            check_run(effect, passed.inline_bytes)
            flop, counted = passed.flop_per_unit, passed.counted
            run = Run(effect, passed.program, passed.unit_bytes, flop, counted)
            self._check_time(run)
            if len(self._queue) >= RUNS_QUEUED_MAX:
                raise Refused(Reason.BUSY, f"{RUNS_QUEUED_MAX} runs wait already")
        except Refused as refused:
            self._emit(ExecEnded(effect.exec_id, refused.reason, Meters(), refused.text))
            return
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
        self._nursery.start_soon(worker.ask_to_stop, effect.exec_id)
        deadline = trio.current_time() + effect.grace_ms / 1000
        worker.scope.deadline = min(worker.scope.deadline, deadline)

    def running(self) -> int:
        """Slots in use."""
        return sum(worker.run is not None for worker in self._workers)

    def worker_pids(self) -> list[tuple[int, bool]]:
        """Processes that hold somebody's program, and whether each has a run in hand."""
        return [(w.child.pid, w.run is not None) for w in self._workers if w.child is not None]

    @property
    def zygote_ready(self) -> bool:
        """A run that starts now waits for no import of jax."""
        return self._zygote.ready

    @property
    def compiles(self) -> int:
        """Compile-only workers started so far."""
        return self._compiler.compiles

    # -------------------------------------------------------------------------------------- checks

    def _check_time(self, run: Run) -> None:
        flop = flop_of_run(run.effect, run.flop_per_unit)
        check_time(flop, self._rate_mflops, run.effect.spec.wall_ms_max)

    def _check_layers(self, layers: int) -> None:
        """A worker says which it has: what the policy asks for, and what the advert promises."""
        lacks = missing(self.sandbox_least, layers)
        if lacks:
            raise Refused(Reason.SANDBOX, f"its owner asks for {names(lacks)}")
        lacks = missing(self._layers, layers)
        if lacks:
            forget(self._config)  # this machine has changed under the kept answer
            self.probe()
            raise Refused(Reason.SANDBOX, f"the probe had {names(lacks)}, this worker has not")

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
            elif worker.child is not None and worker.child.ended:
                worker.doom(Reason.OK)  # it ended while idle, and takes no run with it
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
        link, theirs = open_link()
        scope = trio.CancelScope(deadline=trio.current_time() + self._config.load_s_max)
        worker = Worker(run.program, link, scope, run)
        self._workers.append(worker)
        self._nursery.start_soon(self._live, worker, theirs)

    def _dispatch(self, worker: Worker, run: Run) -> bool:
        """Into the worker's socket, here and now. False: the worker turned out to be dead."""
        effect = run.effect
        try:
            rest = worker.link.send_run(run, self._blobs)
        except Refused as refused:
            worker.run = None
            self._rest(worker)
            self._end(run, refused.reason, refused.text)
            return True
        except OSError:
            worker.doom(Reason.WORKER_DIED)
            return False
        worker.run = run
        run.begin(self._meter, self._platform)
        assert worker.figures is not None
        run.learn(worker.figures)
        worker.scope.deadline = run.started_s + effect.spec.wall_ms_max / 1000
        if rest:
            self._nursery.start_soon(worker.link.send_rest, rest)
        if run.waited:  # else the caller still stands in `start`, and a wake-up is all it would get
            self._emit(Started(effect.exec_id))
        return True

    # ------------------------------------------------------------------------------ a worker's life

    async def _live(self, worker: Worker, theirs: socket.socket) -> None:
        with self._zygote.use():
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
        run = worker.run
        assert run is not None  # it was spawned for one
        spec = run.effect.spec
        fds = []
        for arg in spec.args:
            if not arg.mapped and arg.blob is not None:
                size = wire.array_bytes(arg.spec)
                fds.append(open_blob(self._blobs, arg.blob.blob_id, 0, size))
                files.callback(os.close, fds[-1])
        zygote = await self._zygote.get()
        worker.child = await zygote.fork(
            "worker",
            theirs,
            self._config.threads_per_worker(),
            self._programs.memory_mb_max(spec),
            self._config.cgroup,
        )
        theirs.close()
        while not worker.environment:
            await self._hear(worker)
        load, environment = self._programs.load(spec), worker.environment
        try:
            executable, figures = await self._compiler.executable(spec.artifact, load, environment)
        except Refused as refused:
            self._programs.refuse(worker.program, refused)
            raise
        worker.figures = figures
        if executable is not None:
            files.callback(os.close, executable.fd)
        self._programs.learn(worker.program, figures)
        check_memory(figures.memory_mb, load.memory_mb_max)
        run.learn(figures)
        self._check_time(run)
        if executable is None:
            await worker.link.send(wire.encode_load(load), fds)
            return
        ready = replace(load, artifact=b"", executable=True)
        await worker.link.send(wire.encode_load(ready), [*fds, executable.fd])
        while not worker.loaded:
            for kind, body in await worker.link.receive():
                if kind == wire.UNUSABLE:  # a cache of another machine, say
                    await self._compiler.drop(spec.artifact, load, environment)
                    await worker.link.send(wire.encode_load(load), fds)
                    return
                self._on_frame(worker, kind, body)

    async def _bring_loop(self, worker: Worker, spec: ExecSpec, units: int) -> None:
        """What WANT asked for, while the run goes on; without it units go one by one."""
        with trio.move_on_after(self._config.load_s_max), contextlib.suppress(Refused, ZygoteLost):
            load = replace(self._programs.load(spec), loop_units=units)
            entry, figures = await self._compiler.executable(
                spec.artifact, load, worker.environment
            )
            if entry is not None:
                with os.fdopen(entry.fd, "rb"):
                    check_memory(figures.memory_mb, load.memory_mb_max)
                    await worker.link.say(wire.LOOP, wire.LOOP_BODY.pack(units), entry.fd)

    async def _hear(self, worker: Worker) -> None:
        """What has come, into events."""
        for kind, body in await worker.link.receive():
            if kind == wire.UNITS:
                await self._on_units(worker, body, worker.link.outputs_in_frame)
            elif kind == wire.UNITS_IN_AREA:
                await self._on_units(worker, body, worker.link.outputs_in_area)
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
            interval_s = self.disk_interval_s
            event = await run.stepped.keep(run.meters(), stopping=stopping, interval_s=interval_s)
            await worker.link.say(wire.KEPT, wire.EXEC_BODY.pack(run.effect.exec_id))
        if event is not None:
            await self._outbox.send(event)

    async def _on_units(self, worker: Worker, body: bytes, outputs_of: _OutputsOf) -> None:
        run = worker.run
        if run is None or len(body) < wire.UNITS_HEAD.size:
            raise wire.WireError("units")
        exec_id, first, units, device_ms, last = wire.UNITS_HEAD.unpack_from(body)
        effect = run.effect
        if exec_id != effect.exec_id or first != effect.run.first + run.done:
            raise wire.WireError("units of another run")
        if not 1 <= units <= effect.run.count - run.done:
            raise wire.WireError("units of a wrong number")
        outputs = outputs_of(body, units, run.unit_bytes)
        if outputs is None:
            raise wire.WireError("units of a wrong size")
        run.done += units
        run.device_ms = device_ms
        if run.stepped is not None:
            run.stepped.on_units(run.done)
        meters = run.meters(ends=bool(last))
        await self._outbox.send(UnitsDone(exec_id, first, outputs, meters))
        if last:
            if run.done != effect.run.count:
                raise wire.WireError("an end before the end")
            self._finish(worker, run, Reason.DONE, "", meters)

    def _on_frame(self, worker: Worker, kind: int, body: bytes) -> None:
        if kind == wire.READY and len(body) == wire.READY_BODY.size and not worker.environment:
            # Said before anybody's code is in the process, and believed only then.
            layers, environment = wire.READY_BODY.unpack(body)
            self._check_layers(layers)
            worker.environment = environment
        elif kind == wire.WANT and len(body) == wire.WANT_BODY.size:
            self._on_want(worker, *wire.WANT_BODY.unpack(body))
        elif kind == wire.LOADED and not body and worker.figures and not worker.loaded:
            self._on_loaded(worker)
        elif kind == wire.ENDED and worker.run is not None:
            self._on_ended(worker, worker.run, body)
        else:
            raise wire.WireError(f"frame {kind}")

    def _on_loaded(self, worker: Worker) -> None:
        worker.loaded = True
        run = worker.run
        assert run is not None  # it was spawned for a run, and only its end takes it away
        if not self._dispatch(worker, run):
            raise OSError("it ended after loading")
        self._place()  # the run may have been refused at once, and the slot is free

    def _on_ended(self, worker: Worker, run: Run, body: bytes) -> None:
        exec_id, code, device_ms, text = wire.decode_ended(body)
        reason = _WORKER_REASONS.get(code)
        if reason is None:
            raise wire.WireError(f"reason {code}")
        if not worker.loaded:
            refused = Refused(reason, text)
            self._programs.refuse(worker.program, refused)
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

    def _finish(
        self, worker: Worker, run: Run, reason: Reason, text: str, meters: Meters | None = None
    ) -> None:
        """The run is over and the worker lives on."""
        worker.run = None
        self._rest(worker)
        self._end(run, reason, text, meters)
        self._place()

    def _rest(self, worker: Worker) -> None:
        self._zygote.touch()
        worker.scope.deadline = trio.current_time() + self._config.idle_stop_s

    async def _bury(self, worker: Worker) -> None:
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

    def _end(self, run: Run, reason: Reason, text: str, meters: Meters | None = None) -> None:
        del self._runs[run.effect.exec_id]
        self._emit(ExecEnded(run.effect.exec_id, reason, meters or run.meters(ends=True), text))
        if run.stepped is not None:
            run.stepped.close()

    # ----------------------------------------------------------------------------- beside the runs

    async def _warm(self) -> None:
        """An offer is here: the import of jax can start before the run does."""
        with self._zygote.use(), contextlib.suppress(ZygoteLost):  # the run will say so
            await self._zygote.get()

    async def _probe(self) -> None:
        try:
            with self._zygote.use():
                found = await probe(self._config, self._zygote.get)
            self._layers = found.sandbox_layers
            self._rate_mflops = rate_mflops_most(found.classes)
            devices = [each.platform for each in found.classes if each.platform != "cpu"]
            self._platform = devices[0] if devices else "cpu"
            self._exclusive = not self._config.share_device and bool(devices)
            self._emit(found)
        finally:
            self._probing = False

    def _close(self) -> None:
        """No new process; what runs or waits ends with SHUTDOWN as its worker is buried."""
        self._closing = True
        self._outbox.begin_close()
        while self._queue:
            self._end(self._queue.popleft(), Reason.SHUTDOWN, "")
        for worker in self._workers:
            worker.doom(Reason.SHUTDOWN)


@asynccontextmanager
async def open_executor(
    config: ExecutorConfig,
    blobs: BlobFiles,
    artifacts: ArtifactSource,
    meter: EnergyMeter | None = None,
) -> AsyncIterator[Executor]:
    """An executor for the length of the block; afterwards no process, file or socket is left."""
    async with trio.open_nursery() as nursery:
        executor = Executor(config, blobs, artifacts, nursery, meter)
        try:
            yield executor
        finally:
            executor._close()
            nursery.cancel_scope.cancel()
    executor._outbox.close()
