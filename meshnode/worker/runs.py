"""A run of units: results leave in batches, and many short units are one XLA call.

`main` makes a `UnitRun` for each RUN frame. A unit that lasts microseconds costs more to dispatch
(15 to 30 us) than to compute, so when units turn out to be short the worker asks its node for a
loop over many of them (WANT), which a compile-only worker compiles while the run goes on. A loop
must prove itself on real units first: the same bits as unit by unit, in less time; otherwise this
worker never uses one for its program.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from meshnode.executor import wire

if TYPE_CHECKING:
    from .program import Program

Array = NDArray[Any]

LOOP_UNITS_MIN: Final = 8  # a shorter run is not worth asking for, nor proves anything
LOOP_RUN_MIN: Final = 3  # what is left of a run and shorter goes unit by unit
LOOP_UNIT_S_MAX: Final = 250e-6  # a dispatch is less than a tenth of a longer unit
LOOP_S_MAX: Final = 0.02  # of one call, so that a stop is heard soon
LOOP_BYTES_MAX: Final = 4 << 20  # stacked arguments and results of one call
GAIN_MIN: Final = 1.05  # of a loop over unit by unit


class Port(Protocol):
    """The worker's socket and signals, as a run sees them."""

    @property
    def stop_asked(self) -> bool: ...

    def send(self, frame: bytes) -> None: ...

    def poll(self) -> None:
        """Take what the node has said meanwhile."""
        ...


class Outlet:
    """What a run says: batches of results, and how long the device was at work."""

    def __init__(self, port: Port, exec_id: int, first: int) -> None:
        self._port = port
        self.exec_id = exec_id
        self._next = first  # first unit of the batch in the making
        self._batch: list[bytes] = []
        self._units = 0
        self._bytes = 0
        self._sending_s = 0.0
        self._started = self._flushed = time.perf_counter()

    def device_ms(self) -> int:
        return round((time.perf_counter() - self._started - self._sending_s) * 1000)

    def send(self, frame: bytes) -> None:
        began = time.perf_counter()
        self._port.send(frame)
        self._sending_s += time.perf_counter() - began

    def take(self, units: int, content: bytes) -> None:
        self._batch.append(content)
        self._units += units
        self._bytes += len(content)

    @property
    def due(self) -> bool:
        return (
            self._units >= wire.FLUSH_UNITS
            or self._bytes >= wire.FLUSH_BYTES
            or self._late(time.perf_counter())
        )

    def _late(self, now_s: float) -> bool:
        """Whether results have waited long enough: the longer the run, the longer they may.

        A part costs both nodes about a millisecond of CPU each, which at 10 ms a unit and a fixed
        20 ms was 3 % of two cores; growing, a run of a second has ten parts instead of fifty.
        """
        wait_s = (now_s - self._started) * wire.FLUSH_SHARE
        least_s, most_s = wire.FLUSH_MS / 1000, wire.FLUSH_MS_MAX / 1000
        return now_s - self._flushed >= min(most_s, max(least_s, wait_s))

    def flush(self, last: bool = False) -> None:
        if not self._units and not last:
            return
        head = wire.UNITS_HEAD.pack(self.exec_id, self._next, self._units, self.device_ms(), last)
        self.send(wire.frame(wire.UNITS, head, *self._batch))
        self._next += self._units
        self._batch.clear()
        self._units = self._bytes = 0
        self._flushed = time.perf_counter()


class Loop:
    """Up to `units` units in one call; proved by the first chunk that it is given."""

    def __init__(self, call: Callable[..., Sequence[jax.Array]], units: int) -> None:
        self._call = call
        self.units = units
        self.proved = False

    def __call__(self, arrays: Sequence[Array]) -> Sequence[jax.Array]:
        """Stacked arguments of at most `units` units; rows beyond them come out as zeros."""
        count = len(arrays[0])
        if count < self.units:
            arrays = [_padded(array, self.units) for array in arrays]
        return self._call(arrays, np.int32(count))


def _padded(array: Array, units: int) -> Array:
    whole = np.zeros((units, *array.shape[1:]), array.dtype)
    whole[: len(array)] = array
    return whole


def packed(outs: Sequence[jax.Array]) -> bytes:
    """All outputs of one unit, one after the other."""
    if len(outs) == 1:
        return np.asarray(outs[0]).tobytes()
    return b"".join(np.asarray(out).tobytes() for out in outs)


def packed_rows(outs: Sequence[jax.Array], count: int) -> bytes:
    """The first `count` units of stacked outputs, unit after unit."""
    rows = [np.asarray(out)[:count] for out in outs]
    if len(rows) == 1:
        return rows[0].tobytes()
    flat = [np.frombuffer(row.tobytes(), np.uint8).reshape(count, -1) for row in rows if row.size]
    return np.concatenate(flat, axis=1).tobytes()


class UnitRun:
    """Serves one RUN frame; `compute` says whether all units are done."""

    def __init__(self, port: Port, program: Program, outlet: Outlet) -> None:
        self._port = port
        self._program = program
        self._outlet = outlet

    def compute(self, arrays: Sequence[Array], count: int) -> bool:
        done = 0
        while done < count and not self._port.stop_asked:
            loop, left = self._program.loop, count - done
            if loop is None or left < (LOOP_RUN_MIN if loop.proved else LOOP_UNITS_MIN):
                done = self._one_by_one(arrays, done, count)
            elif not loop.proved:
                done = self._prove(loop, arrays, done, count)
            else:
                done = self._in_loops(loop, arrays, done, count)
        return done == count

    def _one_by_one(self, arrays: Sequence[Array], done: int, count: int) -> int:
        """Until the end, a stop, or a loop that has come. One unit is always in flight behind the
        one being read: the device does not wait."""
        run_unit, outlet = self._program.run_unit, self._outlet
        clock = _UnitClock(self._program, outlet, count - done)
        ahead = None
        for index in range(done, count):
            if self._port.stop_asked:
                break
            dispatched = run_unit([array[index] for array in arrays])
            if ahead is not None:
                outlet.take(1, packed(ahead))
                done += 1
                clock.tick()
                if outlet.due:
                    outlet.flush()
                    self._port.poll()
                    if self._program.loop is not None and count - index > LOOP_UNITS_MIN:
                        ahead = dispatched
                        break
            ahead = dispatched
        if ahead is not None:
            outlet.take(1, packed(ahead))
            done += 1
        return done

    def _in_loops(self, loop: Loop, arrays: Sequence[Array], done: int, count: int) -> int:
        outlet, ahead, ahead_units = self._outlet, None, 0
        at = done
        while at < count and not self._port.stop_asked:
            end = min(count, at + loop.units)
            dispatched = loop([array[at:end] for array in arrays])
            if ahead is not None:
                outlet.take(ahead_units, packed_rows(ahead, ahead_units))
                if outlet.due:
                    outlet.flush()
            ahead, ahead_units, at = dispatched, end - at, end
        if ahead is not None:
            outlet.take(ahead_units, packed_rows(ahead, ahead_units))
        return at

    def _prove(self, loop: Loop, arrays: Sequence[Array], done: int, count: int) -> int:
        """One chunk both ways. What leaves is what unit by unit gave."""
        end = min(count, done + loop.units)
        chunk = [array[done:end] for array in arrays]
        began = time.perf_counter()
        units = [
            packed(self._program.run_unit([array[i] for array in chunk])) for i in range(end - done)
        ]
        between = time.perf_counter()
        content = packed_rows(loop(chunk), end - done)
        if content == b"".join(units):
            again = time.perf_counter()  # the first call of a program takes longer
            packed_rows(loop(chunk), end - done)
            gain = (between - began) / (time.perf_counter() - again)
            loop.proved = gain >= GAIN_MIN
        if not loop.proved:
            self._program.loop = None
        self._outlet.take(end - done, b"".join(units))
        if end < count:  # the run's last batch says that it is the last
            self._outlet.flush()
        return end


class _UnitClock:
    """How long a unit lasts, as the median of a few says; asks for a loop once, if it would pay."""

    def __init__(self, program: Program, outlet: Outlet, units: int) -> None:
        self._left = 0 if program.loop_asked or units < LOOP_UNITS_MIN else LOOP_UNITS_MIN - 1
        self._program = program
        self._outlet = outlet
        self._units_s: list[float] = []
        self._last_s = time.perf_counter()

    def tick(self) -> None:
        if not self._left:
            return
        self._left -= 1
        now_s = time.perf_counter()
        self._units_s.append(now_s - self._last_s)
        self._last_s = now_s
        if self._left:
            return
        unit_s = statistics.median(self._units_s)
        units = loop_units(unit_s, self._program.unit_bytes + self._program.mapped_bytes)
        if units:
            self._program.loop_asked = True
            self._outlet.send(wire.frame(wire.WANT, wire.WANT_BODY.pack(units)))


def loop_units(unit_s: float, unit_bytes: int) -> int:
    """Units of a loop that would pay, a power of two; 0 if none would."""
    if unit_s > LOOP_UNIT_S_MAX:
        return 0
    most = min(
        wire.LOOP_UNITS_MAX, int(LOOP_S_MAX / max(unit_s, 1e-9)), LOOP_BYTES_MAX // unit_bytes
    )
    return 1 << most.bit_length() - 1 if most >= LOOP_UNITS_MIN else 0
