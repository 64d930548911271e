"""A run of a stepped program: slices of half a second, watched arrays after each, checkpoints.

`main` makes a `SteppedRun` for each STEPS frame. How many steps a slice has is an argument of the
program and no constant in it, so slices follow the clock and nothing is compiled again; slices of
a, then b steps give the bits of a + b, so where they end changes nothing.

A checkpoint is all state arrays, raw, one after the other, written into the file that came with the
run; the node copies it into its blob store and says KEPT, and only then is the file written again.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import jax
import numpy as np

from meshnode.executor import wire
from meshnode.executor.wire import array_bytes

from .results import Array, Port, Results, arrays_of

if TYPE_CHECKING:
    from .program import Program

SLICE_S: Final = 1.0
WATCHED_SLICE_S: Final = 0.5  # somebody waits for what comes out
GROWTH_MAX: Final = 8  # of a slice over the one before: the first ones tell little
FIRST_CHECKPOINT_S: Final = 0.5
CHECKPOINT_S_MIN: Final = 1.0  # what a lost car costs
STATE_BYTES_PER_S: Final = 4 << 20  # a large state goes out less often: it crosses a car's uplink


class SteppedPort(Port, Protocol):
    kept: bool  # the node has copied the last checkpoint


class SteppedRun:
    """Serves one STEPS frame: units one after the other, `steps` each."""

    def __init__(
        self, port: SteppedPort, program: Program, results: Results, state_fd: int
    ) -> None:
        stepped = program.load.stepped
        if stepped is None:
            raise wire.WireError("steps of a program that has none")
        self._port = port
        self._program = program
        self._results = results
        self._stepped = stepped
        self._file = mmap.mmap(state_fd, sum(array_bytes(spec) for spec in program.load.state))
        self._slice_s = WATCHED_SLICE_S if stepped.watch else SLICE_S
        self._step_s = 0.0  # as the last slice says
        self._slice_steps = 1
        self._due_s = time.perf_counter() + FIRST_CHECKPOINT_S
        self._file_free = True
        self._checkpoint_s = CHECKPOINT_S_MIN

    def compute(self, first: int, starts: Sequence[Sequence[Array]], steps: int, step: int) -> bool:
        """All units, the first of them from `step` on. False: asked to stop, checkpoint handed
        out."""
        for index, start in enumerate(starts):
            self._results.flush()
            size = sum(array.nbytes for array in start)
            self._checkpoint_s = max(CHECKPOINT_S_MIN, size / STATE_BYTES_PER_S)
            state = [jax.device_put(np.array(array)) for array in start]
            if not self._unit(first + index, state, steps, step if index == 0 else 0):
                return False
        return True

    def _unit(self, unit: int, state: list[jax.Array], steps: int, step: int) -> bool:
        while step < steps:
            if self._port.stop_asked:
                self._checkpoint(unit, step, state)
                return False
            n = min(self._slice_steps, steps - step)
            began = time.perf_counter()
            state = self._program.step(state, n)
            jax.block_until_ready(state)
            self._measure(n, time.perf_counter() - began)
            step += n
            self._watch(unit, step, state)
            self._port.poll()
            if step < steps and time.perf_counter() >= self._due_s and self._free():
                self._checkpoint(unit, step, state)
        self._results.add(1, arrays_of([state[index] for index in self._stepped.result]))
        return True

    def _measure(self, n: int, took_s: float) -> None:
        wanted = int(n * self._slice_s / max(took_s, 1e-6))
        self._slice_steps = max(1, min(wanted, n * GROWTH_MAX))

    def _head(self, unit: int, step: int) -> bytes:
        results = self._results
        return wire.SLICE_HEAD.pack(results.exec_id, unit, step, results.device_ms())

    def _watch(self, unit: int, step: int, state: Sequence[jax.Array]) -> None:
        if self._stepped.watch:
            # Copies: a view that lived on would keep the next slice from using the buffer.
            watched = [np.asarray(state[index]).tobytes() for index in self._stepped.watch]
            self._results.send(wire.frame(wire.WATCH, self._head(unit, step), *watched))

    def _free(self) -> bool:
        if self._port.kept and not self._file_free:
            self._file_free = True
            self._due_s = time.perf_counter() + self._checkpoint_s
            return False
        return self._file_free

    def _checkpoint(self, unit: int, step: int, state: Sequence[jax.Array]) -> None:
        while not (self._file_free or self._port.kept):
            self._port.wait()  # asked to stop while the node still copies the last one
        self._file.seek(0)
        for array in state:
            self._file.write(np.asarray(array).tobytes())
        self._port.kept = self._file_free = False
        self._results.send(wire.frame(wire.STATE, self._head(unit, step)))
