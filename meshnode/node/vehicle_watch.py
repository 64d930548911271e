"""Readings of the vehicle become what this car may spend: `BudgetRead` and `Recall` events.

Between `meshnode.vehicle` (readings only), `meshnode.protocol.budget` (the numbers) and the driver.
The driver's return is posted in the task that reads it, before anything is computed from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshnode.config import VehicleSettings
from meshnode.errors import UsageError
from meshnode.protocol.budget import driver_is_back, spendable
from meshnode.protocol.events import BudgetRead, Event, Recall
from meshnode.protocol.papers import T_POLICY, Policy
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import unseal
from meshnode.vehicle.sim import SimVehicle
from meshnode.vehicle.state import VehicleAdapter

from .clock import Clock

RECALL_GRACE_MS: Final = 100
"""A run may end its unit within it, then it is killed: the accelerator is idle in 250 ms."""


def open_vehicle(settings: VehicleSettings) -> SimVehicle:
    """The adapter that the configuration names."""
    if settings.adapter != "sim":
        raise UsageError(f"there is no vehicle adapter {settings.adapter!r}; there is: sim")
    file = Path(settings.sim_file).expanduser() if settings.sim_file else None
    return SimVehicle(file=file, period_s=settings.poll_s)


async def watch_vehicle(
    vehicle: VehicleAdapter, policy_wire: bytes, clock: Clock, post: Callable[[Event], None]
) -> None:
    """Task: until cancelled. Only changes are posted."""
    policy = unseal(policy_wire).open(Policy, T_POLICY)
    told: BudgetRead | None = None
    was_back = False
    async for state in vehicle.watch():
        back = driver_is_back(state)
        if back and not was_back:
            post(Recall(Reason.DRIVING, RECALL_GRACE_MS))
        was_back = back
        budget = spendable(
            state,
            policy,
            clock.now(),
            utc_offset_min=time.localtime().tm_gmtoff // 60,
            previous=told,
        )
        if budget != told:
            post(budget)
            told = budget
