"""Readings of the vehicle become what this car may spend: `BudgetRead` and `Recall` events.

Between `meshnode.vehicle` (readings only), `meshnode.protocol.budget` (the numbers) and the driver.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshnode.config import VehicleSettings
from meshnode.protocol.events import BudgetRead, Event
from meshnode.protocol.outbox import Identity
from meshnode.protocol.reasons import Reason


async def watch_vehicle(
    settings: VehicleSettings, identity: Identity, post: Callable[[Event], None]
) -> None:
    """Task: until cancelled."""
    post(BudgetRead(True, Reason.OK, 20_000_000, 1_000, 7_200, 0))
    await trio.sleep_forever()
