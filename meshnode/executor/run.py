"""One run on its way through the executor, and what is remembered of programs between runs.

Used by `supervisor` alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import trio

from meshnode.protocol.effects import StartExec
from meshnode.protocol.events import Meters
from meshnode.protocol.reasons import Reason

from .admission import Program

_K = TypeVar("_K")
_V = TypeVar("_V")


class Figures(NamedTuple):
    """What loading a program told."""

    flop_per_unit: int
    memory_mb: int
    compile_ms: int


@dataclass(eq=False, slots=True)
class Run:
    effect: StartExec
    program: Program
    unit_bytes: int
    flop_per_unit: int = 0
    done: int = 0
    device_ms: int = 0
    started_s: float = 0.0
    waited: bool = False
    stop_reason: Reason | None = None

    def meters(self) -> Meters:
        wall_ms = round((trio.current_time() - self.started_s) * 1000) if self.started_s else 0
        # A worker that counts more device time than has passed is wrong or lies.
        return Meters(
            device_ms=min(self.device_ms, wall_ms + 1),
            wall_ms=wall_ms,
            kflop=self.flop_per_unit * self.done // 1000,
        )


def keep(kept: OrderedDict[_K, _V], key: _K, value: _V, count_max: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > count_max:
        kept.popitem(last=False)
