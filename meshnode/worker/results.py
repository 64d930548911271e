"""Outputs on their way to the node: small ones in batches of frames, large ones by shared memory.

`Frames` is the worker's end of its socket, `Results` one run's outputs in order. Used by `main`;
the other end is `meshnode.executor.supervisor` and `area`.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from meshnode.executor import wire
from meshnode.executor.area import AREA_BYTES_LEAST
from meshnode.protocol.reasons import Reason

_RECEIVE_BYTES: Final = 16 << 10
_AREA_FLUSH_BYTES: Final = 1 << 20
_HELD_MAX: Final = 8  # frames whose outputs the node has not copied yet


class Area:
    """Both halves of the node's shared memory, mapped; the mapping outlives the file."""

    def __init__(self, body: bytes, fd: int) -> None:
        input_bytes, output_bytes = wire.AREA_BODY.unpack(body)
        whole = memoryview(mmap.mmap(fd, input_bytes + output_bytes))
        self.inputs = whole[:input_bytes].toreadonly()
        self.outputs = whole[input_bytes:]


class Frames:
    """Blocking frames with the files that came along."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = b""
        self._fds: list[int] = []

    def receive(self) -> tuple[int, bytes, list[int]] | None:
        """(kind, body, fds), or None when the node has hung up.

        Files ride on the first byte of their frame, and the kernel ends a read behind the message
        that brought some. A read may have begun at a TAKEN before it, which never brings any.
        """
        chunk = self._ahead
        while len(chunk) < wire.HEAD.size:
            more, came, _, _ = socket.recv_fds(self._sock, _RECEIVE_BYTES, wire.FDS_MAX)
            self._fds += came
            if not more:
                return None
            chunk += more
        length, kind = wire.HEAD.unpack_from(chunk)
        if length > wire.LOAD_BYTES_MAX:
            raise wire.WireError(f"frame of {length} bytes")
        end, fds = wire.HEAD.size + length, []
        if kind != wire.TAKEN:
            fds, self._fds = self._fds, fds
        if len(chunk) >= end:
            self._ahead = chunk[end:]
            return kind, chunk[wire.HEAD.size : end], fds
        self._ahead = b""
        body = bytearray(length)
        have = len(chunk) - wire.HEAD.size
        body[:have] = chunk[wire.HEAD.size :]
        view = memoryview(body)[have:]
        while view:
            received = self._sock.recv_into(view)
            if not received:
                return None
            view = view[received:]
        return kind, bytes(body), fds

    def send(self, frame: bytes) -> None:
        self._sock.sendall(frame)


class Results:
    """The units of one run, in order; the last batch carries the end."""

    def __init__(
        self, frames: Frames, area: Area | None, exec_id: int, first: int, whole_bytes: int
    ) -> None:
        """`whole_bytes`: of all units of the run; by that both sides know how they travel."""
        self._frames = frames
        self._exec_id = exec_id
        self._next = first  # first unit of the batch in the making
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._sending_s = 0.0
        self._started = self._flushed = time.perf_counter()
        self._outputs: memoryview | None = None
        self._waits = False
        if whole_bytes > AREA_BYTES_LEAST and area is not None:
            self._outputs = area.outputs
            self._waits = whole_bytes > len(area.outputs)
        self._used = self._held = 0  # bytes behind which there is room; frames not yet taken
        self.taken = 0

    def add(self, outs: Sequence[Any], more: bool = True) -> None:
        """One unit's outputs, in order. With `more` a batch leaves when it is worth it."""
        arrays = [np.asarray(out) for out in outs]
        self.taken += 1
        if self._outputs is not None:
            self._add_to_area(arrays, more)
            return
        if len(arrays) == 1:
            unit = arrays[0].tobytes()
        else:
            unit = b"".join([array.tobytes() for array in arrays])
        self._batch.append(unit)
        self._batch_bytes += len(unit)
        if more and (len(self._batch) >= wire.FLUSH_UNITS or self._due(wire.FLUSH_BYTES)):
            self.flush(last=False)

    def _due(self, flush_bytes: int) -> bool:
        since_s = time.perf_counter() - self._flushed
        return self._batch_bytes >= flush_bytes or since_s >= wire.FLUSH_MS / 1000

    def _add_to_area(self, arrays: Sequence[np.ndarray[Any, Any]], more: bool) -> None:
        assert self._outputs is not None
        size = sum(array.nbytes for array in arrays)
        if self._used + size > len(self._outputs):
            self.flush(last=False)
            self._wait_until_held(0)
            self._used = 0
        for array in arrays:
            end = self._used + array.nbytes
            if array.nbytes:
                target = np.frombuffer(self._outputs[self._used : end], array.dtype)
                np.copyto(target, array.reshape(-1))
            self._used = end
        self._batch.append(b"")
        self._batch_bytes += size
        if more and self._due(_AREA_FLUSH_BYTES):
            self.flush(last=False)

    def _wait_until_held(self, frames: int) -> None:
        """The node copies in its own time; until it has, what lies there stays."""
        began = time.perf_counter()
        while self._held > frames:
            received = self._frames.receive()
            if received is None:
                os._exit(0)
            if received[0] != wire.TAKEN:
                raise wire.WireError(f"frame {received[0]} in a run")
            self._held -= 1
        self._sending_s += time.perf_counter() - began

    def flush(self, last: bool) -> None:
        units = len(self._batch)
        if not units and not last:
            return
        began = time.perf_counter()
        head = wire.UNITS_HEAD.pack(self._exec_id, self._next, units, self.device_ms(), last)
        if self._outputs is None:
            self._frames.send(wire.frame(wire.UNITS, head, *self._batch))
        else:
            at = wire.UNITS_AREA_AT.pack(self._used - self._batch_bytes)
            self._frames.send(wire.frame(wire.UNITS_IN_AREA, head, at))
            self._held += self._waits
            self._wait_until_held(0 if last else _HELD_MAX)
        self._next += units
        self._batch.clear()
        self._batch_bytes = 0
        self._flushed = time.perf_counter()
        self._sending_s += self._flushed - began

    def device_ms(self) -> int:
        return round((time.perf_counter() - self._started - self._sending_s) * 1000)

    def end(self, reason: Reason, text: str) -> None:
        """The run ends before its last unit."""
        self.flush(last=False)
        self._wait_until_held(0)  # no TAKEN of this run is left for the next to find
        self._frames.send(wire.encode_ended(self._exec_id, reason, self.device_ms(), text))
