"""The virtual worker of every simulated car: output of unit i is i as 64 bytes, and time passes.

Base of `mesh.Mesh`, which gives it the heap. What a run costs and how it fails are the attributes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest

from .site import Site

KERNEL_MS = 5
PART_UNITS = 4  # of what comes as one event


class VirtualWorkers(ABC):
    def __init__(self) -> None:
        self.unit_ms = KERNEL_MS
        self.kflop_per_unit = 7
        self.counted = True  # the kernel's cost is whole
        self.run_kflop = 0  # a unit, as the run learns it from the compiler
        self.run_counted = True
        self.fail_kernel = False
        self.fail_reason = Reason.FAILED_BY_JOB
        self.slice_steps = 10  # of a long job
        self.stepping: dict[tuple[str, int], tuple[int, int]] = {}  # site, exec -> unit, step
        self.began: list[tuple[str, int, int]] = []  # car, unit, step that it went on from
        self.refuse_kernel = ""  # the executor does not admit it

    @abstractmethod
    def at(self, delay_ms: int, call: Callable[[], None]) -> None: ...

    @abstractmethod
    def at_us(self, delay_us: int, call: Callable[[], None]) -> None: ...

    @abstractmethod
    def feed_life(self, site: Site, life: int, event: ev.Event) -> None: ...

    def unit_us(self, effect: fx.StartExec) -> int:
        """How long a unit of the run lasts."""
        return self.unit_ms * 1000

    def _meters(self, done: int, us: int) -> ev.Meters:
        ms = us // 1000
        return ev.Meters(ms, ms, done * self.run_kflop, counted=self.run_counted)

    def _admit(self, site: Site, effect: fx.Admit, life: int) -> None:
        if effect.spec.kernel == self.refuse_kernel:
            refused = ev.ExecEnded(effect.exec_id, Reason.KERNEL_SPEC, ev.Meters())
            self.at(200, lambda: self.feed_life(site, life, refused))
            return
        admitted = ev.Admitted(effect.exec_id, self.kflop_per_unit, 10, self.counted)
        self.at(1, lambda: self.feed_life(site, life, admitted))

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        run, done = effect.run, 0
        if effect.spec.stepped is not None:
            self._step(site, effect, life)
            return
        if self.fail_kernel:
            failed = ev.ExecEnded(effect.exec_id, self.fail_reason, ev.Meters(), "boom")
            self.at(self.unit_ms, lambda: self.feed_life(site, life, failed))
            return
        unit_us = self.unit_us(effect)
        while done < run.count:
            count = min(PART_UNITS, run.count - done)
            first = run.first + done
            outputs = tuple(output_of(first + i) for i in range(count))
            done += count
            meters = self._meters(done, done * unit_us)
            event = ev.UnitsDone(effect.exec_id, first, outputs, meters)
            self.at_us(done * unit_us, self._unless_stopped(site, effect.exec_id, event, life))
        ended = ev.ExecEnded(effect.exec_id, Reason.DONE, self._meters(done, done * unit_us))
        self.at_us(done * unit_us, self._unless_stopped(site, effect.exec_id, ended, life))

    def _step(self, site: Site, effect: fx.StartExec, life: int) -> None:
        """A long job: a step a millisecond, a slice of `slice_steps`."""
        spec, unit = effect.spec, effect.run.first
        self.began.append((site.name, unit, effect.step))
        for step in range(effect.step + self.slice_steps, spec.steps + 1, self.slice_steps):
            meters = ev.Meters(step - effect.step, step - effect.step)
            state = _state(unit, step)
            for event in (
                ev.Partial(effect.exec_id, unit, step, step.to_bytes(64, "big")),
                ev.SliceDone(effect.exec_id, unit, state, step, meters),
            ):
                call = self._unless_stopped(site, effect.exec_id, event, life)
                self.at(step - effect.step, call)
            known = partial(self.stepping.__setitem__, (site.name, effect.exec_id), (unit, step))
            self.at(step - effect.step, known)
        left = spec.steps - effect.step
        meters = ev.Meters(left, left)
        units = ev.UnitsDone(effect.exec_id, unit, (output_of(unit),), meters)
        ends: tuple[ev.Event, ...] = (units, ev.ExecEnded(effect.exec_id, Reason.DONE, meters))
        for end in ends:
            self.at(left, self._unless_stopped(site, effect.exec_id, end, life))

    def _stop(self, site: Site, effect: fx.StopExec, life: int) -> None:
        site.stopped.add(effect.exec_id)
        key = (site.name, effect.exec_id)
        if effect.grace_ms and key in self.stepping:
            unit, step = self.stepping[key]
            event = ev.SliceDone(effect.exec_id, unit, _state(unit, step), step, ev.Meters())
            self.at(1, lambda: self.feed_life(site, life, event))
        ended = ev.ExecEnded(effect.exec_id, effect.reason, ev.Meters())
        self.at(1, lambda: self.feed_life(site, life, ended))

    def _unless_stopped(
        self, site: Site, exec_id: int, event: ev.Event, life: int
    ) -> Callable[[], None]:
        def call() -> None:
            if site.life == life and exec_id not in site.stopped:
                self.feed_life(site, life, event)

        return call


def _state(unit: int, step: int) -> BlobRef:
    return BlobRef(Digest(hashlib.sha256(b"%d %d" % (unit, step)).digest()), 64)


def output_of(unit: int) -> bytes:
    return unit.to_bytes(8, "big") * 8
