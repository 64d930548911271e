"""Cells and who holds the rendezvous role in them: pure functions of what is known of the cars.

A cell is a region string that its cars agree on. For each of its shards and each epoch, rendezvous
hashing (Thaler and Ravishankar 1998) ranks the cars that may hold the role; both sides draw among
the first few, so that none of them sees everything and one that starves or steers is drawn around.
Whoever is hashed to the role is asked: nobody is told, and losing it loses nothing but tokens.

In a cell of `GOSSIP_CARS_MAX` and more a car whose hash is too high to be among the candidates does
not gossip its advert: it sends it to the rendezvous of its shard, which count their cars and say
how many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network
from statistics import median_low
from typing import Final, NamedTuple, Protocol

from .advert import AdvertBook
from .objects import Advert
from .types import Peer

EPOCH_MS: Final = 600_000  # how long an election of rendezvous holds
RANKS_MAX: Final = 4  # rendezvous of one shard
SERVED_BY: Final = 2  # of those that a car is connected to, and draws among
ALONE_CARS_MAX: Final = 16  # of so few cars one rendezvous serves all: tokens are not split
CANDIDATES_MAX: Final = 32  # of a shard: the lowest of the hash
NEAR_LEAST: Final = 8
"""Of those, the ones with the shortest last mile hold the role, because a task goes over that last
mile twice: a quarter of them, but so many at the least."""
NEAR_PART: Final = 4  # one in so many of the candidates, if that is more than `NEAR_LEAST`
GOSSIP_CARS_MAX: Final = 32  # in a cell of so many and more not every car gossips its advert
HEARD_CARS: Final = 48  # of a shard gossip their adverts, so that the 32 lowest are surely heard
MOMENTS_CARS_MAX: Final = 250
"""In a larger cell adverts do not tell who is busy at the moment: tokens do, and each advert would
cost every member a message."""
NEXT_EPOCH_MS: Final = 150_000  # before it begins its candidates are heard too: an advert's life
ADDRS_KNOWN_MAX: Final = 4_096  # whose network need not be read again at each election
LAST_MILE_UNKNOWN_US: Final = 20_000  # what an advert without one is taken for
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


@lru_cache(maxsize=8_192)
def served_by(car: Peer, posts: Posts) -> tuple[Peer, ...]:
    """The rendezvous of its shard that a car is connected to: two, drawn by hash, so that each has
    at most half the shard at its end. All at each would be 1,000 connections, twice what a car
    bears."""
    ranks = posts[shard_of(car, len(posts))]
    return tuple(
        sorted(ranks, key=lambda holder: hashlib.sha256(car + holder).digest())[:SERVED_BY]
    )


class Candidate(NamedTuple):
    peer: Peer
    last_mile_us: int = LAST_MILE_UNKNOWN_US
    where: str = ""  # the network it is in, as far as its address says so


@lru_cache(ADDRS_KNOWN_MAX)
def network_of(addrs: tuple[str, ...]) -> str:
    """The /24, or /48 of IPv6, of the first address; else that address itself."""
    for addr in addrs:
        parts = addr.split("/", 3)
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            try:
                ip = ip_address(parts[2])
            except ValueError:
                continue
            prefix = 24 if ip.version == 4 else 48
            return str(ip_network((ip, prefix), strict=False))
    return addrs[0] if addrs else ""


def elect(
    cell: str, epoch: int, candidates: Sequence[Candidate], cars: int, rendezvous_cars: int
) -> Posts:
    """Who holds the role in a cell of so many cars: by the hash, the best last miles of the lowest.

    Of each network one comes before any has a second: who grinds keys until all of them hash low
    needs as many networks, and has one of four posts with one.
    """
    shards, ranks = shape(cars, rendezvous_cars)
    return tuple(_ranked(cell, shard, epoch, candidates)[:ranks] for shard in range(shards))


def _ranked(cell: str, shard: int, epoch: int, candidates: Sequence[Candidate]) -> tuple[Peer, ...]:
    by_score = sorted(candidates, key=lambda each: score(cell, shard, epoch, each.peer))
    lowest = _spread(by_score)[:CANDIDATES_MAX]
    near = sorted(lowest, key=lambda each: each.last_mile_us)
    few = set(near[: max(NEAR_LEAST, len(near) // NEAR_PART)])
    return tuple(each.peer for each in lowest if each in few)


def _spread(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each network, then the others; in their order."""
    first: dict[str | bytes, Candidate] = {}
    for each in candidates:
        first.setdefault(each.where or each.peer, each)
    return [
        *first.values(),
        *(each for each in candidates if first[each.where or each.peer] != each),
    ]


def may_hold(cell: str, unix_ms: int, peer: Peer, cars: int, rendezvous_cars: int) -> bool:
    """Whether a car of a cell of so many may be among the candidates, now or soon: by its own hash,
    because who else is there not every car hears."""
    if cars < GOSSIP_CARS_MAX:
        return True
    shards, _ = shape(cars, rendezvous_cars)
    bound = (HEARD_CARS << 64) // cars
    epochs = {epoch_of(unix_ms), epoch_of(unix_ms + NEXT_EPOCH_MS)}
    return any(
        int.from_bytes(score(cell, shard, epoch, peer)[:8], "big") < bound
        for epoch in sorted(epochs)
        for shard in range(shards)
    )


class Roster(Protocol):
    """Who is in which cell, as far as this node needs it. In a car it reads the adverts; a large
    simulation shares one that knows everybody."""

    def posts(self, cell: str, epoch: int) -> Posts: ...

    def cars(self, cell: str) -> int:
        """How many cars the cell has."""
        ...

    def counted(self, cell: str, epoch: int, holder: Peer) -> int | None:
        """What a rendezvous can say of that to others; None for a car that is none, and where
        everybody hears everybody."""
        ...

    def neighbours(self, cell: str) -> Sequence[str]:
        """Other cells, the nearest first."""
        ...


class AdvertRoster:
    """What the adverts say that are here and in force: those of all cars of a small cell, and of
    the candidates of a larger one, whose rendezvous know how many cars there are."""

    def __init__(
        self,
        book: AdvertBook,
        rendezvous_cars: int,
        mono_ms: Callable[[], int],
        own: Callable[[], Advert | None],
    ) -> None:
        """`own`: what this car said of itself last; nobody sends it that."""
        self._book = book
        self._own = own
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
        posts = elect(cell, epoch, _eligible(members), self.cars(cell), self._rendezvous_cars)
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
            known = self._counts[cell] = now_ms + KNOWN_MS_MAX, self._count(cell)
        return known[1]

    def _count(self, cell: str) -> int:
        """Those that are heard are there; of what rendezvous say the middle: half of them would
        have to lie."""
        members = self._members(cell)
        holders = {
            peer
            for (of, _), (_, posts) in self._known.items()
            if of == cell
            for ranks in posts
            for peer in ranks
        }
        said = [
            advert.cell_cars
            for advert in members
            if advert.cell_cars is not None and advert.peer in holders
        ]
        return max(len(members), median_low(said) if said else 0)

    def counted(self, cell: str, epoch: int, holder: Peer) -> int | None:
        posts = self.posts(cell, epoch)
        mine = next((shard for shard, ranks in enumerate(posts) if holder in ranks), None)
        if mine is None:
            return None
        # Of its shard it serves the same part as every other; those that gossip all hear.
        served = sum(holder in served_by(a.peer, posts) for a in self._members(cell))
        ranks = len(posts[mine])
        cars = served * ranks // min(ranks, SERVED_BY) * len(posts)
        return cars if cars >= GOSSIP_CARS_MAX else None

    def neighbours(self, cell: str) -> Sequence[str]:
        return sorted({known.advert.cell for known in self._book.cars.values()} - {cell})

    def _members(self, cell: str) -> list[Advert]:
        own = self._own()
        found = [k.advert for k in self._book.cars.values() if k.advert.cell == cell]
        return found if own is None or own.cell != cell else [*found, own]


def _eligible(members: Sequence[Advert]) -> list[Candidate]:
    """Cars that stay and say where they are reached; if none does both, all."""
    stays = [advert for advert in members if _stays(advert)] or members
    reached = [advert for advert in stays if advert.addrs] or stays
    return [
        Candidate(
            advert.peer,
            LAST_MILE_UNKNOWN_US if advert.last_mile_us is None else advert.last_mile_us,
            network_of(advert.addrs),
        )
        for advert in reached
    ]


def _stays(advert: Advert) -> bool:
    return bool(advert.budget.may_run) and advert.budget.lease_s_max >= STAYS_S_LEAST
