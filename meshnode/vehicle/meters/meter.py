"""What a meter is: a counter of microjoules that says of itself what it sees and how well.

Below the readers of this folder (`pack`, `nvml`, `rapl`, `ina`) and `chain`, which turns counters
into the energy of one run. A reader opens what the machine has, or gives None; it never guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, Protocol

MWH_UJ: Final = 3_600_000  # microjoules of one mWh


class EnergyMethod(IntEnum):
    """How an energy came about: `method` in a receipt's meters (docs/spec/meshnode.cddl)."""

    NONE = 0
    ESTIMATED = 1
    DEVICE = 2
    VEHICLE = 3


@dataclass(frozen=True, slots=True)
class Traits:
    """What is true of a kind of meter, whatever it reads."""

    name: str
    method: EnergyMethod
    uncertainty_permille: int  # of what it counts over a long time, at its own place
    resolution_ms: int  # how late a change may show in what is read of it
    again_ms: int  # it is not read more often, except at the end of a run of seconds
    period_ms: int  # it must be read at least so often, or it loses the thread
    idle_permille: int  # how much of a run's count is idle draw, where none was seen
    platforms: frozenset[str] | None = None  # on what work must run to be seen; None: on anything

    def sees(self, platform: str) -> bool:
        """Whether work on `platform` (jax's name: cpu, cuda, ...) shows in this meter."""
        return self.platforms is None or platform in self.platforms


class Meter(Protocol):
    traits: Traits

    def energy_uj(self, now_ms: int) -> int | None:
        """Microjoules counted since some moment; it only grows, wraps are undone inside.

        `now_ms` is monotonic time. None: it cannot be read now, or what it counted since the last
        reading is not known. It goes on from the next reading then. Never raises.
        """
        ...

    def close(self) -> None:
        """Give back what it holds. It is not read afterwards."""
        ...


def number_in(path: Path) -> int | None:
    """The integer that a file of sysfs holds; None if it is not there, or not for us."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def word_in(path: Path) -> str:
    """The word that a file of sysfs holds; empty if it is not there, or not for us."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
