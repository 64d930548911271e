"""Membership without gossip: who is in which cell, as a large simulated fleet knows it.

The machine of a car reads adverts for it. In a fleet of 100,000 cars every advert would be read by
hundreds of others, and keeping that up would be nearly all there is to compute; so above the size
of `measured.FULL_CARS_MAX` the machines ask this. It answers what adverts would say, at once and
without error, and chooses nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meshnode.protocol.cell import Posts
from meshnode.protocol.types import Peer

from .network import Network

NEIGHBOURS_MAX: Final = 12
ELECTIONS_MAX: Final = 4_096  # remembered
Elect = Callable[[str, int, Sequence[Peer], int], Posts]
"""Cell, epoch, its cars, how many there are -> who holds the role: the protocol's choice."""


class FleetRoster:
    """`protocol.cell.Roster`, shared by all machines of a fleet. `peers`: of the cars that are up,
    by their number."""

    def __init__(self, network: Network, peers: Mapping[int, Peer], elect: Elect) -> None:
        self._network = network
        self._peers = peers
        self._elect = elect
        self.asleep: Counter[str] = Counter()  # cars of a cell that will be back
        self._up: dict[str, list[Peer]] = {}
        self._posts: dict[str, tuple[int, Posts]] = {}

    def changed(self, cell: str) -> None:
        """A car of the cell came or went."""
        self._up.pop(cell, None)
        self._posts.pop(cell, None)

    def members(self, cell: str) -> Sequence[Peer]:
        """Every car that is up."""
        known = self._up.get(cell)
        if known is None:
            numbers = self._network.cells.get(cell, [])
            known = self._up[cell] = [self._peers[n] for n in numbers if n in self._peers]
        return known

    def posts(self, cell: str, epoch: int) -> Posts:
        known = self._posts.get(cell)
        if known is None or known[0] != epoch:
            if len(self._posts) >= ELECTIONS_MAX:
                self._posts.clear()
            members = self.members(cell)
            known = epoch, self._elect(cell, epoch, members, self.cars(cell))
            self._posts[cell] = known
        return known[1]

    def holders(self) -> list[Peer]:
        """Whom the latest elections named, in the order of the cells' first questions."""
        named = (peer for _, posts in self._posts.values() for shard in posts for peer in shard)
        return list(dict.fromkeys(named))

    def cars(self, cell: str) -> int:
        return len(self.members(cell)) + self.asleep[cell]

    def counted(self, cell: str, epoch: int, holder: Peer) -> int | None:
        return None  # everybody knows

    def neighbours(self, cell: str) -> Sequence[str]:
        return self._network.neighbours(cell, NEIGHBOURS_MAX)
