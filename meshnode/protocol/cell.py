"""Cells and who holds the rendezvous role in them: pure functions of what is known of the cars.

A cell is a region string that its cars agree on. For each of its shards and each epoch, rendezvous
hashing (Thaler and Ravishankar 1998) ranks the cars that may hold the role; both sides draw among
the first few, so that none of them sees everything and one that starves or steers is drawn around.
Whoever is hashed to the role is asked: nobody is told, and losing it loses nothing but tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from .advert import AdvertBook
from .types import Peer

EPOCH_MS: Final = 600_000
RANKS_MAX: Final = 4  # rendezvous of one shard that are drawn among
ALONE_CARS_MAX: Final = 16  # of so few cars one rendezvous serves all: tokens are not split
STAYS_S_LEAST: Final = 900  # a car that leaves sooner holds no role, if others stay
CELLS_KNOWN_MAX: Final = 64
KNOWN_MS_MAX: Final = 1_000  # for so long an election is not looked at again

Posts = tuple[tuple[Peer, ...], ...]
"""Shard -> its rendezvous, the best first."""


def epoch_of(unix_ms: int) -> int:
    return unix_ms // EPOCH_MS


def score(cell: str, shard: int, epoch: int, peer: Peer) -> bytes:
    """The lowest holds the role."""
    return hashlib.sha256(b"%b\0%d\0%d\0" % (cell.encode(), shard, epoch) + peer).digest()


def shape(cars: int, rendezvous_cars: int) -> tuple[int, int]:
    """(shards, rendezvous of each): as few as their message budget allows, because a pool that is
    split runs dry sooner (simulated at 95 % load: p99 155 ms with 250 cars each, 1,227 with 60)."""
    if cars < ALONE_CARS_MAX:
        return 1, 1
    wanted = -(-cars // rendezvous_cars)
    shards = -(-wanted // RANKS_MAX)
    return shards, max(2, -(-wanted // shards))


def shard_of(peer: Peer, shards: int) -> int:
    return int.from_bytes(hashlib.sha256(peer).digest()[:4], "big") % shards


def elect(
    cell: str, epoch: int, candidates: Sequence[Peer], cars: int, rendezvous_cars: int
) -> Posts:
    """Who holds the role in a cell of so many cars."""
    shards, ranks = shape(cars, rendezvous_cars)
    return tuple(
        tuple(sorted(candidates, key=lambda peer: score(cell, shard, epoch, peer))[:ranks])
        for shard in range(shards)
    )


class Roster(Protocol):
    """Who is in which cell, as far as this node needs it. In a car it reads the adverts; a large
    simulation shares one that knows everybody."""

    def posts(self, cell: str, epoch: int) -> Posts: ...

    def cars(self, cell: str) -> int:
        """How many cars the cell has."""
        ...

    def neighbours(self, cell: str) -> Sequence[str]:
        """Other cells, the nearest first."""
        ...


class AdvertRoster:
    """The cars whose adverts are here and in force, which are those of a small cell."""

    def __init__(self, book: AdvertBook, rendezvous_cars: int, mono_ms: Callable[[], int]) -> None:
        self._book = book
        self._rendezvous_cars = rendezvous_cars
        self._mono_ms = mono_ms
        self._known: dict[tuple[str, int], tuple[int, Posts]] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    def posts(self, cell: str, epoch: int) -> Posts:
        now_ms = self._mono_ms()
        known = self._known.get((cell, epoch))
        if known is not None and known[0] > now_ms and known[1] != ((),):
            return known[1]
        members = self._members(cell)
        stays = [p for p in members if self._stays(p)]
        posts = elect(cell, epoch, stays or members, len(members), self._rendezvous_cars)
        if len(self._known) >= CELLS_KNOWN_MAX:
            self._known.clear()
        self._known[cell, epoch] = now_ms + KNOWN_MS_MAX, posts
        return posts

    def cars(self, cell: str) -> int:
        """Looked at once a second: it is asked at each run's begin and end."""
        now_ms = self._mono_ms()
        known = self._counts.get(cell)
        if known is None or known[0] <= now_ms:
            if len(self._counts) >= CELLS_KNOWN_MAX:
                self._counts.clear()
            known = self._counts[cell] = now_ms + KNOWN_MS_MAX, len(self._members(cell))
        return known[1]

    def neighbours(self, cell: str) -> Sequence[str]:
        return sorted({known.advert.cell for known in self._book.cars.values()} - {cell})

    def _members(self, cell: str) -> list[Peer]:
        return [peer for peer, known in self._book.cars.items() if known.advert.cell == cell]

    def _stays(self, peer: Peer) -> bool:
        budget = self._book.cars[peer].advert.budget
        return bool(budget.may_run) and budget.lease_s_max >= STAYS_S_LEAST
