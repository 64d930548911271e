"""Where a run of units goes: pure choice over what is believed of the cars.

The simple placement of design section 4's fallback row: adverts, then point-to-point offers to
cars believed idle, then an announcement in the cell. `Placement` is the seam at which idle tokens
come in; the same object serves a car and the simulator, and no other module chooses a car.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .types import Peer, Rng

LEASE_MS_LEAST = 5.0  # a shorter lease costs more than it computes: about 2 ms of both sides
TURN_MS = 15.0  # between a run's end and the arrival of the next, without the wire
UNTIMED_UNITS_MAX = 16  # in one lease, until the first units have been timed


@dataclass(frozen=True, slots=True)
class Car:
    """A car as the requester believes it to be, fit for the job at hand."""

    peer: Peer
    capacity: int  # runs that it can still take from us, queue included
    idle: bool  # none of our runs is there, and it says that a slot is free
    rtt_us: int
    rate_mflops: int
    warm: bool  # holds the artifact and constants already
    spendable_mwh: int
    slow: bool = False  # its last runs of this work took far longer than others'
    ours: bool = False  # it works for this very job, or has just ended a run of ours

    def taken(self) -> Car:
        """The same car with one more of our runs."""
        return replace(self, capacity=self.capacity - 1, idle=False)


@dataclass(frozen=True, slots=True)
class Need:
    units_left: int
    unit_ms: float  # 0 if not yet known
    lease_units_max: int
    lease_target_ms: int
    workers: int  # slots of all cars in use or usable
    depth: int  # runs per slot, the waiting one included


@dataclass(frozen=True, slots=True)
class Choice:
    """What a car was chosen by, kept with the attempt for `mesh explain`."""

    car: Car
    among: int  # cars with room for a run at that moment, this one included

    @staticmethod
    def of(cars: Sequence[Car], peer: Peer) -> Choice | None:
        chosen = next((car for car in cars if car.peer == peer), None)
        if chosen is None:
            return None
        return Choice(chosen, max(1, sum(car.capacity > 0 for car in cars)))


class Placement(Protocol):
    def choose(self, cars: Sequence[Car], rng: Rng) -> Peer | None:
        """The car for the next run, or None to wait or announce."""
        ...

    def announces(self) -> bool:
        """Whether work is announced first, without point-to-point offers."""
        ...


class AdvertPlacement:
    """Idle before busy, warm before cold unless it is much farther, then fast, then near; one that
    is far behind the others only where nobody else has room."""

    FARTHER_US = 50_000  # a warm car may be so much farther than a cold one

    def choose(self, cars: Sequence[Car], rng: Rng) -> Peer | None:
        best: tuple[tuple[bool, bool, int, int, float], Peer] | None = None
        for car in cars:
            if car.capacity <= 0:
                continue
            reach_us = car.rtt_us + (0 if car.warm else self.FARTHER_US)
            key = (car.slow, not car.idle, reach_us // 10_000, -car.rate_mflops, rng.random())
            if best is None or key < best[0]:
                best = (key, car.peer)
        return None if best is None else best[1]

    def announces(self) -> bool:
        return False


class TokenPlacement(AdvertPlacement):
    """Only cars that work for us: nobody knows better what they will do next. Who else is idle, a
    rendezvous knows."""

    def choose(self, cars: Sequence[Car], rng: Rng) -> Peer | None:
        return super().choose([car for car in cars if car.ours and not car.slow], rng)


class GossipPlacement:
    """Announcement only: every run goes to a bidder."""

    def choose(self, cars: Sequence[Car], rng: Rng) -> Peer | None:
        return None

    def announces(self) -> bool:
        return True


def queued_runs(unit_ms: float, rtt_us: int, most: int) -> int:
    """Runs that wait at a car behind the running one: what it computes while an end comes here and
    an offer goes back. More would only bind units to a car that may be slower than another."""
    if unit_ms <= 0:
        return min(1, most)
    hidden_ms = TURN_MS + rtt_us / 1000
    return min(most, max(1, int(hidden_ms / max(unit_ms, LEASE_MS_LEAST))))


def run_units(need: Need) -> int:
    """Units of the next lease: guided self-scheduling, `remaining / (2 * workers * depth)`
    (Polychronopoulos and Kuck 1987), bounded by what fits into the target time. Measured with
    10 ms units and two cars: efficiency 0.98 against 0.95 for fixed sizes."""
    units = -(-need.units_left // (2 * max(1, need.workers) * need.depth))
    most = need.lease_units_max
    if need.unit_ms > 0:
        most = min(most, max(1, int(need.lease_target_ms / need.unit_ms)))
        units = max(units, int(LEASE_MS_LEAST / need.unit_ms))
    else:
        most = min(most, UNTIMED_UNITS_MAX)
    return max(1, min(units, most, need.units_left))
