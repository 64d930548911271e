"""What the executor wants of a meter of energy: that of `meshnode.vehicle.meters`, by the node.

The executor may not import the vehicle; it knows a meter by these three calls. Times are trio's
clock in whole milliseconds.
"""

from __future__ import annotations

from typing import Any, Protocol


class MeteredEnergy(Protocol):
    """Of one run since its start, at the terminals of battery or plug; it never shrinks."""

    @property
    def energy_uj(self) -> int: ...
    @property
    def method(self) -> int: ...
    @property
    def uncertainty_permille(self) -> int: ...
    @property
    def battery_uj(self) -> int: ...


class EnergyMeter(Protocol):
    def start(self, now_ms: int, platform: str) -> Any:
        """A run begins on jax's platform; what it gives is handed back as it is."""
        ...

    def so_far(self, mark: Any, now_ms: int, device_ms: int) -> MeteredEnergy: ...

    def stop(self, mark: Any, now_ms: int, device_ms: int) -> MeteredEnergy:
        """Once for each `start`, however the run ends."""
        ...
