"""What waiting for work costs, and how work pays for it: pure arithmetic in 1e-9 of the currency.

A car that waits is awake, at about 250 W: more than many an accelerator draws at work. Nobody asks
for that energy by itself, so it stands in the floor price: what is due is spread over the next half
hour of work, and bounded by a share of the price, so that one long wait prices no car out of the
market.
`budget.spendable` adds it; whoever watches the car (`node.vehicle_watch`, a trial) keeps the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SPREAD_S: Final = 1_800  # of work, over which what waiting has cost is paid for: a few runs
STEPS: Final = 20  # of the surcharge in the bare price
SURCHARGE_PERMILLE_MAX: Final = 3_000
"""Of the bare floor: a car that waits nine tenths of its time at 250 W and works at 550 W is due
four times its bare price; above this it should sleep instead."""


@dataclass(slots=True)
class Upkeep:
    due_nano: int = 0

    def waited(self, cost_nano: int) -> None:
        """Energy and wear of a while in which the car was awake for the mesh and idle."""
        self.due_nano += max(0, cost_nano)

    def worked(self, span_ms: int, nano_per_s: int) -> int:
        """Work at a price that held so much for upkeep; what of it was due."""
        paid_nano = min(self.due_nano, span_ms * nano_per_s // 1_000)
        self.due_nano -= paid_nano
        return paid_nano

    def nano_per_s(self, bare_floor_nano_per_s: int) -> int:
        """What a second of work pays towards it now, in steps: each other price is a new advert."""
        most = bare_floor_nano_per_s * SURCHARGE_PERMILLE_MAX // 1_000
        step = max(1, bare_floor_nano_per_s // STEPS)
        return min(most, -(-self.due_nano // (SPREAD_S * step)) * step)
