"""A run's results on their way to the node: small ones in frames, large ones by shared memory.

`main` makes a `Results` for each run, `runs` and `slices` fill it. The other end is
`meshnode.executor.link` and `area`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from meshnode.executor import wire
from meshnode.protocol.reasons import Reason

from .frames import Area

Array = NDArray[Any]

_HELD_MAX: Final = 8  # frames whose outputs the node has not copied yet


class Port(Protocol):
    """The worker's socket and signals, as a run sees them."""

    @property
    def stop_asked(self) -> bool: ...

    def send(self, frame: bytes) -> None: ...

    def poll(self) -> None:
        """Take what the node has said meanwhile."""
        ...

    def wait(self) -> None:
        """Block until the node says something, and take it."""
        ...


def arrays_of(outs: Sequence[jax.Array]) -> list[Array]:
    """All outputs of one unit; waits until they are there."""
    return [np.asarray(out) for out in outs]


def joined(arrays: Sequence[Array]) -> bytes:
    if len(arrays) == 1:
        return arrays[0].tobytes()
    return b"".join([array.tobytes() for array in arrays])


class Results:
    """The units of one run, in order; the last batch carries the end."""

    def __init__(
        self, port: Port, area: Area | None, exec_id: int, first: int, whole_bytes: int
    ) -> None:
        """`whole_bytes`: of all units of the run; by that both sides know how they travel."""
        self._port = port
        self.exec_id = exec_id
        self._next = first  # first unit of the batch in the making
        self._batch: list[bytes] = []
        self._units = 0
        self._bytes = 0
        self._sending_s = 0.0
        self._started = self._flushed = time.perf_counter()
        self._room: memoryview | None = None
        self._flush_bytes = wire.FLUSH_BYTES
        self._waits = False
        if whole_bytes > wire.AREA_BYTES_LEAST:
            if area is None:
                raise wire.WireError("no area for the results")
            self._room = area.outputs
            self._flush_bytes = wire.AREA_FLUSH_BYTES
            self._waits = whole_bytes > len(area.outputs)
        self._used = self._held = 0  # bytes behind which there is room; frames not yet taken

    def device_ms(self) -> int:
        return round((time.perf_counter() - self._started - self._sending_s) * 1000)

    def send(self, frame: bytes) -> None:
        began = time.perf_counter()
        self._port.send(frame)
        self._sending_s += time.perf_counter() - began

    def add(self, units: int, arrays: Sequence[Array]) -> None:
        """Outputs of the next `units` units, one unit after the other. They are copied."""
        if self._room is None:
            content = joined(arrays)
            self._batch.append(content)
            self._bytes += len(content)
        else:
            self._put(self._room, arrays)
        self._units += units

    def _put(self, room: memoryview, arrays: Sequence[Array]) -> None:
        size = sum(array.nbytes for array in arrays)
        if self._used + size > len(room):
            self.flush()
            self._wait_until_held(0)
            self._used = 0
        for array in arrays:
            end = self._used + array.nbytes
            if array.nbytes:
                target = np.frombuffer(room[self._used : end], array.dtype)
                np.copyto(target, array.reshape(-1))
            self._used = end
        self._bytes += size

    @property
    def due(self) -> bool:
        """Whether a batch is worth a frame."""
        return (
            self._units >= wire.FLUSH_UNITS
            or self._bytes >= self._flush_bytes
            or self._late(time.perf_counter())
        )

    def _late(self, now_s: float) -> bool:
        """Whether results have waited long enough: the longer the run, the longer they may.

        A part costs both nodes about a millisecond of CPU each, which at 10 ms a unit and a fixed
        20 ms was 3 % of two cores; from 50 ms on and growing, a run of a second has ten parts.
        """
        wait_s = (now_s - self._started) * wire.FLUSH_SHARE
        least_s, most_s = wire.FLUSH_MS / 1000, wire.FLUSH_MS_MAX / 1000
        return now_s - self._flushed >= min(most_s, max(least_s, wait_s))

    def flush(self, last: bool = False) -> None:
        if not self._units and not last:
            return
        head = wire.UNITS_HEAD.pack(self.exec_id, self._next, self._units, self.device_ms(), last)
        if self._room is None:
            self.send(wire.frame(wire.UNITS, head, *self._batch))
        else:
            at = wire.UNITS_AREA_AT.pack(self._used - self._bytes)
            self.send(wire.frame(wire.UNITS_IN_AREA, head, at))
            self._held += self._waits
            self._wait_until_held(0 if last else _HELD_MAX)
        self._next += self._units
        self._batch.clear()
        self._units = self._bytes = 0
        self._flushed = time.perf_counter()

    def on_taken(self) -> None:
        """The node has copied what one frame told of."""
        if not self._held:
            raise wire.WireError("nothing was there to be taken")
        self._held -= 1

    def _wait_until_held(self, frames: int) -> None:
        """The node copies in its own time; until it has, what lies there stays."""
        began = time.perf_counter()
        while self._held > frames:
            self._port.wait()
        self._sending_s += time.perf_counter() - began

    def end(self, reason: Reason, text: str) -> None:
        """The run ends before its last unit."""
        self.flush()
        self._wait_until_held(0)  # no TAKEN of this run is left for the next to find
        self.send(wire.encode_ended(self.exec_id, reason, self.device_ms(), text))
