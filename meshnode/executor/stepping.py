"""The node's half of a stepped run: what its worker may say, and checkpoints into the blob store.

Used by `supervisor`. The worker writes its state into one memory file of fixed size, which the node
made and which can neither grow nor shrink; STATE says that it is written, a thread hashes it into
the store, KEPT gives the file back. What a worker says of its progress is held to what it can be:
this run's unit, more steps than before, no more than there are, and no faster than it should.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

import trio

from meshnode.protocol.effects import StartExec
from meshnode.protocol.events import Meters, Partial, SliceDone
from meshnode.protocol.types import ArraySpec

from . import wire
from .bounds import BlobFiles

STATE_S_MIN: Final = 0.1  # between two checkpoints: each costs the disk its size
WATCH_S_MIN: Final = 0.1  # between two partial results; the first slices of a run are short


def state_specs(effect: StartExec) -> list[ArraySpec]:
    return [arg.spec for arg in effect.spec.args if arg.mapped]


class SteppedRun:
    """From dispatch to end; `close` when the run is over."""

    def __init__(self, effect: StartExec, blobs: BlobFiles) -> None:
        assert effect.spec.stepped is not None
        self._blobs = blobs
        self._effect = effect
        specs = state_specs(effect)
        self.state_bytes = sum(map(wire.array_bytes, specs))
        self._watch_bytes = sum(wire.array_bytes(specs[i]) for i in effect.spec.stepped.watch)
        self._unit = effect.run.first
        self._step = effect.step
        self._kept_s = self._said_s = self._shown_s = float("-inf")
        self.state_fd = os.memfd_create("state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.state_fd, self.state_bytes)
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.state_fd, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        os.close(self.state_fd)

    @property
    def steps_done(self) -> int:
        """Of the units that this run has worked on, without what a checkpoint brought."""
        units = self._unit - self._effect.run.first
        return units * self._effect.spec.steps + self._step - self._effect.step

    def on_units(self, done: int) -> None:
        """`done` units of the run are complete."""
        self._unit, self._step = self._effect.run.first + done, 0

    def progress(self, kind: int, body: bytes) -> tuple[int, bytes]:
        """(device_ms, watched arrays) of a STATE or WATCH frame; WireError if it cannot be."""
        size = wire.SLICE_HEAD.size + (self._watch_bytes if kind == wire.WATCH else 0)
        if len(body) != size:
            raise wire.WireError("a slice of a wrong size")
        exec_id, unit, step, device_ms = wire.SLICE_HEAD.unpack_from(body)
        if exec_id != self._effect.exec_id or unit != self._unit:
            raise wire.WireError("a slice of another run")
        if not self._step <= step <= self._effect.spec.steps:
            raise wire.WireError("steps that cannot be")
        self._step = step
        return device_ms, body[wire.SLICE_HEAD.size :]

    def partial(self, watch: bytes) -> Partial | None:
        """What the submitter may see, unless it saw something a moment ago."""
        now_s = trio.current_time()
        if now_s - self._shown_s < WATCH_S_MIN:
            return None
        self._shown_s = now_s
        return Partial(self._effect.exec_id, self._unit, self._step, watch)

    async def keep(
        self, meters: Meters, *, stopping: bool, interval_s: float = 0.0
    ) -> SliceDone | None:
        """The state as a blob; None if the store has no room, or the last one went to the disk
        less than `interval_s` ago: the run goes on without."""
        now_s = trio.current_time()
        if now_s - self._said_s < STATE_S_MIN and not stopping:
            raise wire.WireError("checkpoints too often")
        self._said_s = now_s
        if now_s - self._kept_s < interval_s and not stopping:
            return None
        unit, step = self._unit, self._step
        try:
            ref = await trio.to_thread.run_sync(
                self._blobs.put_open, self.state_fd, self.state_bytes
            )
        except OSError:
            return None
        finally:
            self._kept_s = self._said_s = trio.current_time()
        return SliceDone(self._effect.exec_id, unit, ref, step, meters)
