"""How far this car's own line is from the rest: the shortest round trip to anybody, halved.

An upper bound that needs nobody's word: a peer can answer late, never early. It goes into adverts
in steps, so that it says little of where a car is, and ranks who may hold the rendezvous role.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

STEPS_US: Final = (
    *(200, 500, 1_000, 2_000, 3_000, 5_000, 7_000, 10_000),
    *(15_000, 20_000, 30_000, 50_000, 100_000, 200_000),
)


def last_mile_us(round_trips_us: Iterable[int]) -> int | None:
    """Of smoothed round trips, zeros left out; None if there are none."""
    shortest = min((us for us in round_trips_us if us > 0), default=None)
    if shortest is None:
        return None
    return next((step for step in STEPS_US if shortest <= 2 * step), STEPS_US[-1])
