"""The requester's side of the rendezvous: which one to ask, and which ones to ask no more.

`requester` makes the attempt and reads the answers; here is where a placement goes, how long it
may take, and how each rendezvous has served: one that loses placements in a row is drawn around.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from .cell import Roster, epoch_of
from .fleet import Fleet
from .job import Job
from .messages import AVOID_MAX, Place
from .outbox import Outbox, remember
from .sealed import Sealed
from .types import Peer

WINDOW: Final = 4  # placements of a job that are under way before one has been answered
WINDOW_MAX: Final = 32
QUEUED_MS: Final = 3_000  # a rendezvous says each second that a placement still waits
LOST_MAX: Final = 3  # placements in a row that a rendezvous loses before it is drawn around
SHUN_MS: Final = 30_000
RENDEZVOUS_KNOWN_MAX: Final = 256


class Placing:
    def __init__(
        self, outbox: Outbox, fleet: Fleet, roster: Roster, reach: Callable[[Peer], None]
    ) -> None:
        self._out = outbox
        self._fleet = fleet
        self._roster = roster
        self._reach = reach
        self._lost: OrderedDict[Peer, int] = OrderedDict()
        self._shunned: OrderedDict[Peer, int] = OrderedDict()
        self.addrs: tuple[str, ...] = ()

    def serves(self, job: Job) -> bool:
        """Whether the job goes this way: one for named cars asks those, because accounts stand in
        no advert."""
        order = job.order
        named = bool(order.cars or order.owners)
        return order.policy == "tokens" and not named and bool(self._out.limits.rendezvous_cars)

    def draw(self, but: Peer | None = None) -> Peer | None:
        """A rendezvous of our cell that is in reach; the others are reached for."""
        identity, now = self._out.identity, self._out.now
        posts = self._roster.posts(identity.cell, epoch_of(now.unix_ms))
        ranks = posts[self._out.rng.randrange(len(posts))]
        there = []
        for peer in ranks:
            if peer == identity.peer or peer in self._fleet.peers_up:
                there.append(peer)
            else:
                self._reach(peer)
        good = [p for p in there if self._shunned.get(p, 0) <= now.mono_ms and p != but] or there
        return good[self._out.rng.randrange(len(good))] if good else None

    def message(self, job: Job, offer: Sealed) -> Place:
        avoid = tuple(sorted(job.unsuited))[:AVOID_MAX]
        return Place(
            offer.wire,
            self._out.limits.queue_ms_max,
            0,
            self.addrs,
            int(job.unit_ms),
            avoid or None,
        )

    def timeout_ms(self, holder: Peer) -> int:
        """Four round trips: there, on to the car, and its lease back by itself."""
        rtt_us = self._fleet.peers_up.get(holder, 0)
        return max(self._out.limits.place_timeout_ms, 4 * rtt_us // 1000)

    def lost(self, holder: Peer) -> None:
        count = self._lost.get(holder, 0) + 1
        remember(self._lost, holder, count, RENDEZVOUS_KNOWN_MAX)
        if count >= LOST_MAX:
            until = self._out.now.mono_ms + SHUN_MS
            remember(self._shunned, holder, until, RENDEZVOUS_KNOWN_MAX)

    def served(self, job: Job, holder: Peer) -> None:
        self._lost.pop(holder, None)
        self._shunned.pop(holder, None)
        job.place_window = min(2 * job.place_window, WINDOW_MAX)
