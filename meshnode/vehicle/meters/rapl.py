"""The processor's energy counters (RAPL of Intel and AMD), by the kernel's powercap files.

Third in the chain, for work on the CPU only. The files, their units and the wrap are those of
Documentation/power/powercap/powercap.rst; since CVE-2020-8694 only root reads `energy_uj` (kernel
commit 949dd0104c49), and a node that is not root has no such meter.

Only zones `package-*` count. A zone below (`intel-rapl:0:1`, core and uncore) is part of its
package, `intel-rapl-mmio` shows the same package once more, and `psys` stands beside the packages
as a zone of its own (drivers/powercap/intel_rapl_common.c registers it without a parent) while it
contains them. It would see more than the processor, but what it covers is what the board's maker
has wired up, and nothing tells: the packages are certain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .meter import EnergyMethod, Traits, number_in, word_in

POWERCAP: Final = "sys/class/powercap"
PACKAGE_W_MAX: Final = 1_000
"""No processor draws more. A counter that must have run faster was set back, it did not wrap."""
_MARGIN_MS: Final = 1_000  # of the clock against the counter
_ZONE: Final = re.compile(r"intel-rapl:\d+")

TRAITS: Final = Traits(
    name="rapl",
    method=EnergyMethod.DEVICE,
    # The counters follow a meter at the plug closely (Khan et al., RAPL in Action, TOMPECS 2018),
    # but see no memory and no board, and Intel's filter (SA-00389) may distort short intervals.
    uncertainty_permille=100,
    resolution_ms=20,
    again_ms=20,  # it moves every millisecond or so, but each reading costs 0.1 ms
    period_ms=30_000,  # the smallest range, 65 kJ, lasts 65 s at PACKAGE_W_MAX
    idle_permille=220,  # as 10 of 45 W, on the high side
    platforms=frozenset({"cpu"}),
)


@dataclass(slots=True)
class Zone:
    """One package: a counter that starts again at 0 behind `range_uj`."""

    energy: Path
    range_uj: int
    last_uj: int | None = None
    counted_uj: int = 0

    def since(self, raw_uj: int, elapsed_ms: int) -> int | None:
        """Microjoules since the last reading; None if they cannot be told from a wrap too many."""
        if self.last_uj is None:
            return 0
        most_uj = PACKAGE_W_MAX * (elapsed_ms + _MARGIN_MS) * 1_000
        if most_uj >= self.range_uj:
            return None
        step_uj = raw_uj - self.last_uj
        if step_uj < 0:
            step_uj += self.range_uj
        return step_uj if 0 <= step_uj <= most_uj else None


class RaplMeter:
    """All packages together. Work of other processes is counted too."""

    traits = TRAITS

    def __init__(self, zones: list[Zone]) -> None:
        self._zones = zones
        self._read_ms = 0

    @classmethod
    def open(cls, root: Path = Path("/")) -> RaplMeter | None:
        """None without packages, or if one of them cannot be read. `root` is that of the files."""
        zones = []
        for folder in sorted((root / POWERCAP).glob("intel-rapl:*")):
            if not _ZONE.fullmatch(folder.name):
                continue
            if not word_in(folder / "name").startswith("package-"):
                continue
            range_uj = number_in(folder / "max_energy_range_uj")
            if not range_uj or number_in(folder / "energy_uj") is None:
                return None
            zones.append(Zone(folder / "energy_uj", range_uj))
        return cls(zones) if zones else None

    def energy_uj(self, now_ms: int) -> int | None:
        """Microjoules since it was opened; None if a package cannot be read or was set back."""
        elapsed_ms = now_ms - self._read_ms
        self._read_ms = now_ms
        known = True
        for zone in self._zones:
            raw_uj = number_in(zone.energy)
            since_uj = None if raw_uj is None else zone.since(raw_uj, elapsed_ms)
            zone.last_uj = raw_uj
            if since_uj is None:
                known = False
            else:
                zone.counted_uj += since_uj
        return sum(zone.counted_uj for zone in self._zones) if known else None

    def close(self) -> None:
        self._zones = []
