"""Membership without gossip: who is in which cell, as a large simulated fleet knows it.

The machine of a car reads adverts for it. In a fleet of 100,000 cars every advert would be read by
hundreds of others, and keeping that up would be nearly all there is to compute; so above the size
of `world.FULL_CARS_MAX` the machines ask this. It answers what adverts would say, at once and
without error, and chooses nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshnode.protocol.types import Peer

from .network import Network

NEIGHBOURS_MAX = 12


class FleetRoster:
    """`protocol.cell.Roster`. `peers`: of the cars that are up, by their number."""

    def __init__(self, network: Network, peers: Mapping[int, Peer]) -> None:
        self._network = network
        self._peers = peers
        self._up: dict[str, list[Peer]] = {}

    def changed(self, cell: str) -> None:
        """A car of the cell came or went."""
        self._up.pop(cell, None)

    def candidates(self, cell: str) -> Sequence[Peer]:
        """Every car that is up; whether it is fit for the role is the machine's to say."""
        known = self._up.get(cell)
        if known is None:
            numbers = self._network.cells.get(cell, [])
            known = self._up[cell] = [self._peers[n] for n in numbers if n in self._peers]
        return known

    def cars(self, cell: str) -> int:
        return len(self.candidates(cell))

    def neighbours(self, cell: str) -> Sequence[str]:
        return self._network.neighbours(cell, NEIGHBOURS_MAX)
