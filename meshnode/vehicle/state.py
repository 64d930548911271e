"""What an adapter of a vehicle is: a name, what it can read, and a task that tells states.

Between the adapters of this folder and `node.vehicle_watch`. There is deliberately no method that
writes: a car's battery and motion are never ours to command (UN R155).

An adapter of one's own is a package with an entry point in the group `meshnode.vehicle`, whose name
is what `[vehicle] adapter` says and whose object is called with a `Source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Protocol

import trio

from meshnode.errors import Unreachable
from meshnode.protocol.budget import ChargingState, VehicleState

__all__ = [
    "ENTRY_POINTS",
    "PERIOD_S_MAX",
    "READINGS",
    "ChargingState",
    "Pace",
    "Source",
    "Tell",
    "VehicleAdapter",
    "VehicleLost",
    "VehicleState",
]

ENTRY_POINTS: Final = "meshnode.vehicle"
PERIOD_S_MAX: Final = 30.0  # an adapter tells a state at least so often
READINGS: Final = frozenset(one.name for one in fields(VehicleState)) - {"at_ms", "ages_ms"}

Tell = Callable[[VehicleState], None]


class VehicleLost(Unreachable):
    """The source of the car's readings does not answer, or answers nonsense."""


class Pace:
    """How long an adapter that polls waits between two looks.

    Short while this car offers itself or works, because a driver's return must be seen; long while
    something else stops it anyway. Quickening it ends the wait that is going on.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = min(period_s, PERIOD_S_MAX)
        self._quickened = trio.Event()

    @property
    def period_s(self) -> float:
        return self._period_s

    def set(self, period_s: float) -> None:
        period_s = min(period_s, PERIOD_S_MAX)
        quicker, self._period_s = period_s < self._period_s, period_s
        if quicker:
            self.hurry()

    def hurry(self) -> None:
        """End every wait now: something has changed."""
        self._quickened.set()
        self._quickened = trio.Event()

    async def rest(self) -> None:
        """Until the period is over, or the pace quickens."""
        with trio.move_on_after(self._period_s):
            await self._quickened.wait()


@dataclass(frozen=True, slots=True)
class Source:
    """Where the owner's configuration says that the readings come from (`[vehicle]`)."""

    address: str = ""  # a URL, or host:port
    file: Path | None = None
    token_file: Path | None = None  # a secret that the source asks for
    root: Path = Path("/")  # of the file system, for what is read under /sys
    options: Mapping[str, str] = field(default_factory=dict)  # what one adapter alone asks for


class VehicleAdapter(Protocol):
    name: str
    provides: frozenset[str]
    """Readings of `VehicleState` that this adapter may ever know. What it does not provide counts
    as unknown, unless the owner's policy calls the machine stationary; it is never inferred."""

    async def run(self, tell: Tell, pace: Pace) -> None:
        """Task, until cancelled: tell the state now, at once on a change, and every
        `pace.period_s` while the source gives signs of life.

        The age of a reading is that of the source's last sign of life, not of its last change. A
        source that is gone raises `VehicleLost`; whoever runs this runs it again after a while.
        """
        ...
