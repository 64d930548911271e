"""What an adapter of a vehicle is: a name, what it can read, and a stream of states.

Between the adapters of this folder and `node.vehicle_watch`. There is deliberately no method that
writes: a car's battery and motion are never ours to command (UN R155).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from meshnode.protocol.budget import ChargingState, VehicleState

__all__ = ["ChargingState", "VehicleAdapter", "VehicleState"]

PERIOD_S_MAX = 30.0  # an adapter shows a state at least so often


class VehicleAdapter(Protocol):
    name: str
    provides: frozenset[str]
    """Fields of `VehicleState` that this adapter may know."""

    def watch(self) -> AsyncIterator[VehicleState]:
        """The state now, at once on a change, and at least every PERIOD_S_MAX."""
        ...

    async def aclose(self) -> None: ...
