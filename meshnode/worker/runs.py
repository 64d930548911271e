"""A run of units, one after the other or, where they are short, many in one XLA call.

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
from typing import TYPE_CHECKING, Final

import jax
import numpy as np

from meshnode.executor import wire

from .results import Array, Port, Results, arrays_of, joined

if TYPE_CHECKING:
    from .program import Program

LOOP_UNITS_MIN: Final = 8  # a shorter run is not worth asking for, nor proves anything
LOOP_RUN_MIN: Final = 3  # what is left of a run and shorter goes unit by unit
LOOP_UNIT_S_MAX: Final = 250e-6  # a dispatch is less than a tenth of a longer unit
LOOP_S_MAX: Final = 0.02  # of one call, so that a stop is heard soon
LOOP_BYTES_MAX: Final = 4 << 20  # stacked arguments and results of one call
GAIN_MIN: Final = 1.05  # of a loop over unit by unit


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


def rows_of(outs: Sequence[jax.Array], count: int) -> list[Array]:
    """The first `count` units of stacked outputs, unit after unit."""
    rows = [np.asarray(out)[:count] for out in outs]
    if len(rows) == 1:
        return rows
    flat = [np.frombuffer(row.tobytes(), np.uint8).reshape(count, -1) for row in rows if row.size]
    return [np.concatenate(flat, axis=1)]


class UnitRun:
    """Serves one RUN frame; `compute` says whether all units are done."""

    def __init__(self, port: Port, program: Program, results: Results) -> None:
        self._port = port
        self._program = program
        self._results = results

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
        run_unit, results = self._program.run_unit, self._results
        clock = _UnitClock(self._program, results, count - done)
        ahead = None
        for index in range(done, count):
            if self._port.stop_asked:
                break
            dispatched = run_unit([array[index] for array in arrays])
            if ahead is not None:
                results.add(1, arrays_of(ahead))
                done += 1
                clock.tick()
                if results.due:
                    results.flush()
                    self._port.poll()
                    if self._program.loop is not None and count - index > LOOP_UNITS_MIN:
                        ahead = dispatched
                        break
            ahead = dispatched
        if ahead is not None:
            results.add(1, arrays_of(ahead))
            done += 1
        return done

    def _in_loops(self, loop: Loop, arrays: Sequence[Array], done: int, count: int) -> int:
        results, ahead, ahead_units = self._results, None, 0
        at = done
        while at < count and not self._port.stop_asked:
            end = min(count, at + loop.units)
            dispatched = loop([array[at:end] for array in arrays])
            if ahead is not None:
                results.add(ahead_units, rows_of(ahead, ahead_units))
                if results.due:
                    results.flush()
            ahead, ahead_units, at = dispatched, end - at, end
        if ahead is not None:
            results.add(ahead_units, rows_of(ahead, ahead_units))
        return at

    def _prove(self, loop: Loop, arrays: Sequence[Array], done: int, count: int) -> int:
        """One chunk both ways. What leaves is what unit by unit gave."""
        end = min(count, done + loop.units)
        chunk = [array[done:end] for array in arrays]
        began = time.perf_counter()
        units = [
            joined(arrays_of(self._program.run_unit([array[i] for array in chunk])))
            for i in range(end - done)
        ]
        between = time.perf_counter()
        whole, looped = b"".join(units), joined(rows_of(loop(chunk), end - done))
        if looped == whole:
            again = time.perf_counter()  # the first call of a program takes longer
            joined(rows_of(loop(chunk), end - done))
            gain = (between - began) / (time.perf_counter() - again)
            loop.proved = gain >= GAIN_MIN
        if not loop.proved:
            self._program.loop = None
        self._results.add(end - done, [np.frombuffer(whole, np.uint8)])
        if end < count:  # the run's last batch says that it is the last
            self._results.flush()
        return end


class _UnitClock:
    """How long a unit lasts, as the median of a few says; asks for a loop once, if it would pay."""

    def __init__(self, program: Program, results: Results, units: int) -> None:
        self._left = 0 if program.loop_asked or units < LOOP_UNITS_MIN else LOOP_UNITS_MIN - 1
        self._program = program
        self._results = results
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
            self._results.send(wire.frame(wire.WANT, wire.WANT_BODY.pack(units)))


def loop_units(unit_s: float, unit_bytes: int) -> int:
    """Units of a loop that would pay, a power of two; 0 if none would."""
    if unit_s > LOOP_UNIT_S_MAX:
        return 0
    most = min(
        wire.LOOP_UNITS_MAX, int(LOOP_S_MAX / max(unit_s, 1e-9)), LOOP_BYTES_MAX // unit_bytes
    )
    return 1 << most.bit_length() - 1 if most >= LOOP_UNITS_MIN else 0
