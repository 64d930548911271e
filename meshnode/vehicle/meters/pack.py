"""The traction battery's power, summed up: the only meter that sees all that the work takes.

First in the chain. The node feeds it the vehicle's states; it reads nothing itself. What leaves an
unplugged battery is what the car draws, so the run's part is what it is above the draw before. On
the plug the battery's power says nothing about the load: the charger carries it.
"""

from __future__ import annotations

from typing import Final

from meshnode.protocol.budget import VehicleState, driver_is_back

from .meter import EnergyMethod, Traits

HOLD_MS_MAX: Final = 5_000
"""A power stands for the time until the next one, but not longer. Adapters tell a change at once,
and every second or two while the car offers itself."""
AGE_MS_MAX: Final = 5_000  # a reading that was older when it was told is none

TRAITS: Final = Traits(
    name="pack",
    method=EnergyMethod.VEHICLE,
    # 30 to 50 is usually said of the current sensor with a gateway that smooths it. No car was at
    # hand to check, and a signal in steps of 100 W would be worse.
    uncertainty_permille=40,
    resolution_ms=2_000,  # two looks at the vehicle, at the pace of a car that works
    again_ms=0,  # its readings are in memory
    period_ms=60_000,  # what it loses by not being fed, no reading brings back
    # Without the draw before, the awake car would count as work, and it draws more than an
    # inference chip (250 against 72 W): never used so.
    idle_permille=1_000,
)


class PackMeter:
    """`feed` it every state of the vehicle."""

    traits = TRAITS

    def __init__(self) -> None:
        self._counted_uj = 0
        self._out_w: int | None = None  # what the battery gives; None: that says nothing now
        self._told_ms = 0

    def feed(self, state: VehicleState, now_ms: int) -> None:
        """A new state of the vehicle: until now the last power held.

        It counts from the moment it is told, not from its age: what was counted stays counted, and
        the resolution allows for the delay.
        """
        counted_uj = self.energy_uj(now_ms)
        if counted_uj is not None:
            self._counted_uj = counted_uj
        self._out_w = _out_w(state)
        self._told_ms = now_ms

    def energy_uj(self, now_ms: int) -> int | None:
        """Microjoules out of the battery; None while plugged, charging, driven or not told."""
        held_ms = now_ms - self._told_ms
        if self._out_w is None or not 0 <= held_ms <= HOLD_MS_MAX:
            return None
        return self._counted_uj + self._out_w * held_ms * 1_000  # W x ms is mJ

    def close(self) -> None:
        self._out_w = None


def _out_w(state: VehicleState) -> int | None:
    """What the battery gives to a parked car that nothing else feeds, in W; else None."""
    age_ms = state.ages_ms.get("pack_power_w")
    if state.pack_power_w is None or age_ms is None or age_ms > AGE_MS_MAX:
        return None
    if state.plugged is not False or state.charging in ("charging", "complete"):
        return None
    if driver_is_back(state):
        return None  # the motors draw from the same battery
    # Into an unplugged battery: a solar roof, or a car that rolls. The load is hidden behind it.
    return -state.pack_power_w if state.pack_power_w <= 0 else None
