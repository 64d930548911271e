"""A worker: one process, one program, many runs; started by `zygote`, killed from outside.

Reads LOAD and RUN frames from its socket, in order, and answers with UNITS and ENDED. It never
raises out: what goes wrong in a kernel is an ENDED frame, what goes wrong in the process is its
death, and the node tells the two apart. It keeps no clock over itself: a hang in native code
stops for nothing but SIGKILL (SIGALRM does not get through), so the node holds the wall clock.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence

import jax
import numpy as np

from meshnode.executor import wire
from meshnode.protocol.reasons import Reason

from . import confine
from .program import Array, LoadRefused, Program

_stop_asked = False


def _on_stop(*_: object) -> None:
    global _stop_asked
    _stop_asked = True


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

    def send(self, frame: bytes) -> None:
        self._sock.sendall(frame)


def serve(sock: socket.socket) -> None:
    """Until the node hangs up or kills."""
    signal.signal(signal.SIGUSR1, _on_stop)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    frames = _Socket(sock)
    confine.before_backend()
    jax.devices()  # starts the backend and its threads
    frames.send(wire.frame(wire.READY, wire.READY_BODY.pack(confine.after_backend())))
    program: Program | None = None
    while True:
        received = frames.receive()
        if received is None:
            return
        kind, body, fds = received
        try:
            if kind == wire.LOAD and program is None:
                program = _load(frames, body, fds)
            elif kind == wire.RUN and program is not None:
                _Run(frames, program).serve(body, fds)
            else:
                raise wire.WireError(f"frame {kind}")
        finally:
            for fd in fds:  # a mapping outlives its descriptor
                os.close(fd)


def _load(frames: _Socket, body: bytes, fds: Sequence[int]) -> Program | None:
    try:
        program = Program(wire.decode_load(body), fds)
    except LoadRefused as refused:
        frames.send(wire.encode_ended(0, refused.reason, 0, wire.one_line(str(refused))))
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a typed end
        frames.send(wire.encode_ended(0, _reason_of(error), 0, _text_of(error)))
        return None
    figures = (program.compile_ms, program.flop_per_unit, program.memory_mb)
    frames.send(wire.frame(wire.LOADED, wire.LOADED_BODY.pack(*figures)))
    return program


class _Run:
    """One run of units: results leave in batches, and the last batch carries the end."""

    def __init__(self, frames: _Socket, program: Program) -> None:
        self._frames = frames
        self._program = program
        self._exec_id = 0
        self._next = 0  # first unit of the batch in the making
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._taken = 0
        self._sending_s = 0.0
        self._started = self._flushed = time.perf_counter()

    def serve(self, body: bytes, fds: Sequence[int]) -> None:
        global _stop_asked
        _stop_asked = False
        self._exec_id, first, count, mask, inline = wire.decode_run(body)
        self._next = first
        try:
            arrays = self._program.mapped_arrays(first, count, mask, inline, fds)
            finished = self._compute(arrays, count)
        except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
            self._flush(last=False)
            self._end(_reason_of(error), _text_of(error))
            return
        if finished:
            self._flush(last=True)
        else:
            self._flush(last=False)
            self._end(Reason.STOPPED_BY_OWNER, "")

    def _compute(self, arrays: Sequence[Array], count: int) -> bool:
        """One unit is always in flight behind the one being read: the device does not wait."""
        run_unit = self._program.run_unit
        ahead = None
        for index in range(count):
            if _stop_asked:
                break
            dispatched = run_unit([array[index] for array in arrays])
            if ahead is not None:
                self._take(ahead)
            ahead = dispatched
        if ahead is not None:
            self._take(ahead, more=False)
        return self._taken == count

    def _take(self, outs: Sequence[jax.Array], more: bool = True) -> None:
        if len(outs) == 1:
            unit = np.asarray(outs[0]).tobytes()
        else:
            unit = b"".join(np.asarray(out).tobytes() for out in outs)
        self._taken += 1
        self._batch.append(unit)
        self._batch_bytes += len(unit)
        if not more:
            return
        if (
            len(self._batch) >= wire.FLUSH_UNITS
            or self._batch_bytes >= wire.FLUSH_BYTES
            or time.perf_counter() - self._flushed >= wire.FLUSH_MS / 1000
        ):
            self._flush(last=False)

    def _device_ms(self) -> int:
        return round((time.perf_counter() - self._started - self._sending_s) * 1000)

    def _flush(self, last: bool) -> None:
        units = len(self._batch)
        if not units and not last:
            return
        began = time.perf_counter()
        head = wire.UNITS_HEAD.pack(self._exec_id, self._next, units, self._device_ms(), last)
        self._frames.send(wire.frame(wire.UNITS, head, *self._batch))
        self._next += units
        self._batch.clear()
        self._batch_bytes = 0
        self._flushed = time.perf_counter()
        self._sending_s += self._flushed - began

    def _end(self, reason: Reason, text: str) -> None:
        self._frames.send(wire.encode_ended(self._exec_id, reason, self._device_ms(), text))


def _reason_of(error: Exception) -> Reason:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return Reason.MEMORY
    return Reason.FAILED_BY_JOB


def _text_of(error: Exception) -> str:
    return wire.one_line(f"{type(error).__name__}: {error}")
