"""One run on its way through the executor, from `start` to `ExecEnded`. Used by `supervisor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from meshnode.protocol.effects import StartExec
from meshnode.protocol.events import Meters
from meshnode.protocol.reasons import Reason

from .admission import Program
from .cache import Figures
from .metering import EnergyMeter, MeteredEnergy
from .stepping import SteppedRun


@dataclass(eq=False, slots=True)
class Run:
    effect: StartExec
    program: Program
    unit_bytes: int
    flop_per_unit: int = 0  # of a step, if stepped; 0: not known yet
    counted: bool = True  # else that is the least it can be
    done: int = 0
    device_ms: int = 0
    started_s: float = 0.0
    waited: bool = False  # for a slot or a worker
    stop_reason: Reason | None = None
    stepped: SteppedRun | None = None
    meter: EnergyMeter | None = None  # while it measures
    mark: Any = None
    energy: MeteredEnergy | None = None

    def learn(self, figures: Figures) -> None:
        """What compiling told, unless the artifact's maker has said it."""
        if not self.flop_per_unit:
            self.flop_per_unit, self.counted = figures.flop_per_unit, figures.counted

    def begin(self, meter: EnergyMeter | None, platform: str) -> None:
        """It is in the worker's hands."""
        self.started_s = trio.current_time()
        if meter is not None:
            self.meter, self.mark = meter, meter.start(int(self.started_s * 1000), platform)

    def meters(self, *, ends: bool = False) -> Meters:
        """What it has cost so far. The end, from which on nothing is measured, comes once; asked
        again it says the same."""
        wall_ms = round((trio.current_time() - self.started_s) * 1000) if self.started_s else 0
        done = self.stepped.steps_done if self.stepped else self.done
        # A worker that counts more device time than has passed is wrong or lies.
        device_ms = min(self.device_ms, wall_ms + 1)
        if self.meter is not None:
            ask = self.meter.stop if ends else self.meter.so_far
            self.energy = ask(self.mark, int(trio.current_time() * 1000), device_ms)
            if ends:
                self.meter = None
        energy = self.energy
        return Meters(
            device_ms=device_ms,
            wall_ms=wall_ms,
            kflop=self.flop_per_unit * done // 1000,
            counted=self.counted,
            energy_uj=energy.energy_uj if energy else 0,
            method=int(energy.method) if energy else 0,
            uncertainty_permille=energy.uncertainty_permille if energy else 0,
            battery_uj=energy.battery_uj if energy else 0,
        )
