"""One run on its way through the executor, from `start` to `ExecEnded`. Used by `supervisor`."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from meshnode.protocol.effects import StartExec
from meshnode.protocol.events import Meters
from meshnode.protocol.reasons import Reason

from .admission import Program
from .cache import Figures
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

    def learn(self, figures: Figures) -> None:
        """What compiling told, unless the artifact's maker has said it."""
        if not self.flop_per_unit:
            self.flop_per_unit, self.counted = figures.flop_per_unit, figures.counted

    def meters(self) -> Meters:
        wall_ms = round((trio.current_time() - self.started_s) * 1000) if self.started_s else 0
        done = self.stepped.steps_done if self.stepped else self.done
        # A worker that counts more device time than has passed is wrong or lies.
        return Meters(
            device_ms=min(self.device_ms, wall_ms + 1),
            wall_ms=wall_ms,
            kflop=self.flop_per_unit * done // 1000,
            counted=self.counted,
        )
