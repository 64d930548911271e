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
import select
import signal
import socket
from collections.abc import Sequence

import jax

from meshnode.executor import wire
from meshnode.protocol.reasons import Reason

from . import confine
from .compiling import LoadRefused, compiled, environment, serialized
from .program import Program, Unusable, map_file, split
from .runs import Outlet, UnitRun
from .slices import SteppedRun

_called = False


def _on_call(*_: object) -> None:
    """SIGUSR1: a frame that does not wait for the run's end is here."""
    global _called
    _called = True


class _Socket:
    """Blocking frames with the files that came along."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def receive(self) -> tuple[int, bytes, list[int]] | None:
        """(kind, body, fds), or None when the node has hung up."""
        # A frame's files ride on its first byte, so they come with its header.
        head, fds, _, _ = socket.recv_fds(self._sock, wire.HEAD.size, wire.FDS_MAX)
        while head and len(head) < wire.HEAD.size:
            more = self._sock.recv(wire.HEAD.size - len(head))
            head = head + more if more else b""
        if not head:
            return None
        length, kind = wire.HEAD.unpack(head)
        if length > wire.LOAD_BYTES_MAX:
            raise wire.WireError(f"frame of {length} bytes")
        body = bytearray(length)
        view = memoryview(body)
        while view:
            received = self._sock.recv_into(view)
            if not received:
                return None
            view = view[received:]
        return kind, bytes(body), list(fds)

    def waiting(self) -> bool:
        return bool(select.select([self._sock], [], [], 0)[0])

    def send(self, frame: bytes) -> None:
        self._sock.sendall(frame)


def _begin(sock: socket.socket) -> _Socket:
    """Sandbox, backend, READY."""
    signal.signal(signal.SIGUSR1, _on_call)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    frames = _Socket(sock)
    confine.before_backend()
    jax.devices()  # starts the backend and its threads
    body = wire.READY_BODY.pack(confine.after_backend(), environment())
    frames.send(wire.frame(wire.READY, body))
    return frames


def serve(sock: socket.socket) -> None:
    """Until the node hangs up or kills."""
    worker = _Worker(_begin(sock))
    while worker.take():
        pass


def compile_only(sock: socket.socket) -> None:
    """One LOAD in, one COMPILED or ENDED out."""
    frames = _begin(sock)
    received = frames.receive()
    if received is None:
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
    figures = wire.FIGURES.pack(made.compile_ms, made.flop_per_unit, made.memory_mb)
    frames.send(wire.frame(wire.COMPILED, figures, executable))


class _Worker:
    """What lasts between runs; a run's `SteppedPort`."""

    def __init__(self, frames: _Socket) -> None:
        self._frames = frames
        self._program: Program | None = None
        self._exec_id = 0  # of the run in work
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
        program, idle = self._program, not self._exec_id
        if kind == wire.LOAD and program is None:
            self._program = _load(self._frames, body, fds)
        elif kind == wire.RUN and program is not None and idle:
            self._run_units(program, body, fds)
        elif kind == wire.STEPS and program is not None and idle:
            self._run_steps(program, body, fds)
        elif kind == wire.LOOP and program is not None and len(fds) == 1:
            (units,) = wire.LOOP_BODY.unpack(body)
            program.take_loop(units, fds[0])
        elif kind in (wire.KEPT, wire.STOP):
            # Of the run in work, or late and of one that has ended.
            if wire.EXEC_BODY.unpack(body)[0] == self._exec_id:
                self.kept |= kind == wire.KEPT
                self._stop |= kind == wire.STOP
        else:
            raise wire.WireError(f"frame {kind}")

    def _run_units(self, program: Program, body: bytes, fds: Sequence[int]) -> None:
        exec_id, first, count, mask, inline = wire.decode_run(body)
        outlet = self._outlet(exec_id, first)
        try:
            arrays = program.mapped_arrays(first, count, mask, inline, fds)
            finished = UnitRun(self, program, outlet).compute(arrays, count)
        except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
            self._fail(outlet, error)
            return
        self._end(outlet, finished)

    def _run_steps(self, program: Program, body: bytes, fds: Sequence[int]) -> None:
        run, steps, step, goes_on = wire.decode_steps(body)
        exec_id, first, count, mask, inline = run
        outlet = self._outlet(exec_id, first)
        *blobs, state_fd = fds[:-1] if goes_on else fds
        try:
            arrays = program.mapped_arrays(first, count, mask, inline, blobs)
            starts = [[array[index] for array in arrays] for index in range(count)]
            if goes_on:
                specs = program.load.state
                size = sum(map(wire.array_bytes, specs))
                starts[0] = split(map_file(fds[-1], 0, size), specs)
            stepped = SteppedRun(self, program, outlet, state_fd)
            finished = stepped.compute(first, starts, steps, step)
        except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
            self._fail(outlet, error)
            return
        self._end(outlet, finished)

    def _outlet(self, exec_id: int, first: int) -> Outlet:
        global _called
        _called = True  # a STOP that came right behind the run is looked for once
        self._exec_id, self._stop = exec_id, False
        return Outlet(self, exec_id, first)

    def _end(self, outlet: Outlet, finished: bool) -> None:
        self._exec_id = 0
        outlet.flush(last=finished)
        if not finished:
            self._say_end(outlet, Reason.STOPPED_BY_OWNER, "")

    def _fail(self, outlet: Outlet, error: Exception) -> None:
        self._exec_id = 0
        outlet.flush()
        self._say_end(outlet, _reason_of(error), _text_of(error))

    def _say_end(self, outlet: Outlet, reason: Reason, text: str) -> None:
        self.send(wire.encode_ended(outlet.exec_id, reason, outlet.device_ms(), text))


def _load(frames: _Socket, body: bytes, fds: Sequence[int]) -> Program | None:
    try:
        program = Program(wire.decode_load(body), fds)
    except Unusable:
        frames.send(wire.frame(wire.UNUSABLE))
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a typed end
        frames.send(_refusal(error))
        return None
    frames.send(wire.frame(wire.LOADED, wire.LOADED_BODY.pack(*program.figures)))
    return program


def _refusal(error: Exception) -> bytes:
    if isinstance(error, LoadRefused):
        return wire.encode_ended(0, error.reason, 0, wire.one_line(str(error)))
    return wire.encode_ended(0, _reason_of(error), 0, _text_of(error))


def _reason_of(error: Exception) -> Reason:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return Reason.MEMORY
    return Reason.FAILED_BY_JOB


def _text_of(error: Exception) -> str:
    return wire.one_line(f"{type(error).__name__}: {error}")
