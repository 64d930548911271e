"""A worker: one process, one program, many runs; started by `zygote`, killed from outside.

Reads LOAD and RUN or STEPS frames from its socket, in order, and answers with UNITS and ENDED. It
never raises out: what goes wrong in a kernel is an ENDED frame, what goes wrong in the process is
its death, and the node tells the two apart. It keeps no clock over itself: a hang in native code
stops for nothing but SIGKILL (SIGALRM does not get through), so the node holds the wall clock.

`compile_only` is the other kind of worker: it compiles one artifact, says the machine code, and
ends. It executes nothing, so its word may be kept in the node's cache.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence

import jax

from meshnode.errors import ArtifactRefused
from meshnode.executor import wire
from meshnode.protocol.reasons import Reason

from . import confine
from .compiling import LoadRefused, compiled, environment, serialized
from .frames import Area, Frames
from .program import Program, Unusable, map_file, split
from .results import Results
from .runs import UnitRun
from .slices import SteppedRun

_called = False


def _on_call(*_: object) -> None:
    """SIGUSR1: a frame that does not wait for the run's end is here."""
    global _called
    _called = True


def _begin(sock: socket.socket, terms: confine.Terms) -> Frames | None:
    """Sandbox, backend, READY; None without a sandbox."""
    signal.signal(signal.SIGUSR1, _on_call)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    frames = Frames(sock)
    try:
        taken = confine.before_backend(terms)
        jax.devices()  # starts the backend and its threads
        layers = confine.after_backend(terms, taken)
    except (confine.LayerMissing, OSError) as error:  # no sandbox, no work
        frames.send(wire.encode_ended(0, Reason.SANDBOX, 0, wire.one_line(str(error))))
        return None
    frames.send(wire.frame(wire.READY, wire.READY_BODY.pack(layers, environment())))
    return frames


def serve(sock: socket.socket, terms: confine.Terms) -> None:
    """Until the node hangs up or kills."""
    frames = _begin(sock, terms)
    if frames is not None:
        worker = _Worker(frames)
        while worker.take():
            pass


def compile_only(sock: socket.socket, terms: confine.Terms) -> None:
    """One LOAD in, one COMPILED or ENDED out."""
    frames = _begin(sock, terms)
    received = frames.receive() if frames is not None else None
    if frames is None or received is None:
        return
    kind, body, _ = received
    if kind != wire.LOAD:
        raise wire.WireError(f"frame {kind}")
    try:
        made = compiled(wire.decode_load(body))
        executable = serialized(made)
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a typed end
        frames.send(_refusal(error))
        return
    if len(executable) > wire.EXECUTABLE_BYTES_MAX:
        executable = b""  # then every worker compiles for itself
    frames.send(wire.frame(wire.COMPILED, made.figures(), executable))


class _Worker:
    """What lasts between runs; a run's `SteppedPort`."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._program: Program | None = None
        self._area: Area | None = None
        self._results: Results | None = None  # of the run in work
        self._stop = False
        self.kept = True

    @property
    def stop_asked(self) -> bool:
        global _called
        if _called:
            _called = False
            self.poll()
        return self._stop

    def send(self, frame: bytes) -> None:
        self._frames.send(frame)

    def take(self) -> bool:
        """One frame; False when the node has hung up."""
        received = self._frames.receive()
        if received is None:
            return False
        kind, body, fds = received
        try:
            self._on_frame(kind, body, fds)
        finally:
            for fd in fds:  # a mapping outlives its descriptor
                os.close(fd)
        return True

    def poll(self) -> None:
        while self._frames.waiting() and self.take():
            pass

    def wait(self) -> None:
        if not self.take():
            raise wire.WireError("the node has hung up")

    def _on_frame(self, kind: int, body: bytes, fds: Sequence[int]) -> None:
        program, results = self._program, self._results
        idle = program is not None and results is None
        if kind == wire.LOAD and program is None:
            self._program = _load(self._frames, body, fds)
        elif kind == wire.RUN and program is not None and idle:
            self._run_units(program, body, fds)
        elif kind == wire.STEPS and program is not None and idle:
            self._run_steps(program, body, fds)
        elif kind == wire.AREA and idle and len(fds) == 1:
            self._area = Area(body, fds[0])
        elif kind == wire.TAKEN and results is not None:
            results.on_taken()
        elif kind == wire.LOOP and program is not None and len(fds) == 1:
            (units,) = wire.LOOP_BODY.unpack(body)
            program.take_loop(units, fds[0])
        elif kind in (wire.KEPT, wire.STOP):
            # Of the run in work, or late and of one that has ended.
            if results is not None and wire.EXEC_BODY.unpack(body)[0] == results.exec_id:
                self.kept |= kind == wire.KEPT
                self._stop |= kind == wire.STOP
        else:
            raise wire.WireError(f"frame {kind}")

    def _run_units(self, program: Program, body: bytes, fds: Sequence[int]) -> None:
        head, inline = wire.decode_run(body)
        results = self._begin_run(program, head)
        try:
            arrays = program.mapped_arrays(head, self._inline(head, inline), fds)
            finished = UnitRun(self, program, results).compute(arrays, head.units)
        except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
            self._end(results, _reason_of(error), _text_of(error))
            return
        self._end(results, Reason.DONE if finished else Reason.STOPPED_BY_OWNER)

    def _run_steps(self, program: Program, body: bytes, fds: Sequence[int]) -> None:
        head, (steps, step, goes_on), inline = wire.decode_steps(body)
        results = self._begin_run(program, head)
        *blobs, state_fd = fds[:-1] if goes_on else fds
        try:
            arrays = program.mapped_arrays(head, self._inline(head, inline), blobs)
            starts = [[array[index] for array in arrays] for index in range(head.units)]
            if goes_on:
                specs = program.load.state
                size = sum(map(wire.array_bytes, specs))
                starts[0] = split(map_file(fds[-1], 0, size), specs)
            stepped = SteppedRun(self, program, results, state_fd)
            finished = stepped.compute(head.first, starts, steps, step)
        except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
            self._end(results, _reason_of(error), _text_of(error))
            return
        self._end(results, Reason.DONE if finished else Reason.STOPPED_BY_OWNER)

    def _inline(self, head: wire.RunHead, in_frame: memoryview) -> memoryview:
        if not head.area_bytes:
            return in_frame
        if self._area is None:
            raise wire.WireError("no area for the arguments")
        return self._area.inputs[: head.area_bytes]

    def _begin_run(self, program: Program, head: wire.RunHead) -> Results:
        global _called
        _called = True  # a STOP that came right behind the run is looked for once
        self._stop = False
        whole_bytes = head.units * program.unit_bytes
        self._results = Results(self, self._area, head.exec_id, head.first, whole_bytes)
        return self._results

    def _end(self, results: Results, reason: Reason, text: str = "") -> None:
        if reason is Reason.DONE:
            results.flush(last=True)
        else:
            results.end(reason, text)
        self._results = None


def _load(frames: Frames, body: bytes, fds: Sequence[int]) -> Program | None:
    try:
        program = Program(wire.decode_load(body), fds)
    except Unusable:
        frames.send(wire.frame(wire.UNUSABLE))
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a typed end
        frames.send(_refusal(error))
        return None
    frames.send(wire.frame(wire.LOADED))
    return program


def _refusal(error: Exception) -> bytes:
    if isinstance(error, LoadRefused | ArtifactRefused):
        return wire.encode_ended(0, error.reason, 0, wire.one_line(str(error)))
    return wire.encode_ended(0, _reason_of(error), 0, _text_of(error))


def _reason_of(error: Exception) -> Reason:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return Reason.MEMORY
    return Reason.FAILED_BY_JOB


def _text_of(error: Exception) -> str:
    return wire.one_line(f"{type(error).__name__}: {error}")
