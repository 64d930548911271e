"""The power sensors of an NVIDIA Jetson module (INA3221), by the kernel's hwmon files.

Fourth in the chain, for work on anything: CPU and GPU share the module. The sensors show power, not
energy, so it is summed up between readings. Documentation/hwmon/ina3221.rst: `in[123]_input` is mV,
`curr[123]_input` mA, `in[123]_label` the rail's name from the device tree.

Which rails make up a module is known for the modules of `SUPPLIES` (arch/arm64/boot/dts/nvidia/
tegra234-p3701.dtsi and -p3767.dtsi) and for no other: some rails feed others, and a sum of all that
there are would count those twice. The carrier board is behind none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from .meter import EnergyMethod, Traits, number_in, word_in

HWMON: Final = "sys/class/hwmon"
CHANNELS: Final = (1, 2, 3)  # 4 to 7 are sums and shunt voltages of these
SUPPLIES: Final = (
    ("VDD_IN",),  # Orin NX and Orin Nano: all that enters the module; the other two are parts of it
    # AGX Orin. Its memory (VDDQ_VDD2_1V8AO, about 1 W) is said to be fed by the last one; if it is
    # not, the sum misses it.
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
)
SAMPLES_MS_MAX: Final = 10_000  # between two powers further apart anything may have happened

TRAITS: Final = Traits(
    name="jetson",
    method=EnergyMethod.DEVICE,
    # 1 % of the shunts, 40 uV steps over 2 mOhm (20 mA, 0.4 W at 20 V), and a carrier board that is
    # not seen.
    uncertainty_permille=70,
    resolution_ms=1_000,
    again_ms=1_000,  # a reading is six registers at 0.5 ms each
    period_ms=5_000,
    idle_permille=200,  # as 8 of 42 W of an AGX Orin in its 50 W mode
)


class _Rail(NamedTuple):
    voltage: Path  # mV
    current: Path  # mA

    def power_uw(self) -> int | None:
        voltage_mv, current_ma = number_in(self.voltage), number_in(self.current)
        if voltage_mv is None or current_ma is None:
            return None
        return max(0, voltage_mv * current_ma)


class InaMeter:
    """The supply rails of a known module, by trapezoids between its readings."""

    traits = TRAITS

    def __init__(self, rails: list[_Rail]) -> None:
        self._rails = rails
        self._counted_nj = 0
        self._last_uw: int | None = None
        self._read_ms = 0

    @classmethod
    def open(cls, root: Path = Path("/")) -> InaMeter | None:
        """None without the sensors, on an unknown module, or if a rail cannot be read."""
        found: dict[str, _Rail] = {}
        for folder in sorted((root / HWMON).glob("hwmon*")):
            if word_in(folder / "name") != "ina3221":
                continue
            for channel in CHANNELS:
                label = word_in(folder / f"in{channel}_label")
                rail = _Rail(folder / f"in{channel}_input", folder / f"curr{channel}_input")
                found.setdefault(label, rail)
        for supply in SUPPLIES:
            if found.keys() >= set(supply):
                meter = cls([found[label] for label in supply])
                return meter if meter._power_uw() is not None else None
        return None

    def energy_uj(self, now_ms: int) -> int | None:
        """Microjoules since it was opened; None if a rail cannot be read, or was not for long."""
        elapsed_ms = now_ms - self._read_ms
        last_uw, self._last_uw, self._read_ms = self._last_uw, self._power_uw(), now_ms
        if self._last_uw is None:
            return None
        if last_uw is not None:
            if not 0 <= elapsed_ms <= SAMPLES_MS_MAX:
                return None
            self._counted_nj += (last_uw + self._last_uw) * elapsed_ms // 2  # uW x ms is nJ
        return self._counted_nj // 1_000

    def close(self) -> None:
        self._rails = []
        self._last_uw = None

    def _power_uw(self) -> int | None:
        powers = [rail.power_uw() for rail in self._rails]
        known = [power_uw for power_uw in powers if power_uw is not None]
        return sum(known) if known and len(known) == len(powers) else None
