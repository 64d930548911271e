"""The membership oracle knows who is there, and leaves the choice to whom it is given."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.protocol.types import Peer
from testnet.sim.network import draw
from testnet.sim.roster import FleetRoster, Posts


def test_it_says_who_is_up_and_asks_once_an_epoch() -> None:
    network = draw("metro", 300, 1)
    peers = {number: Peer(number.to_bytes(38, "big")) for number in range(300)}
    asked: list[tuple[str, int]] = []

    def elect(cell: str, epoch: int, members: Sequence[Peer], cars: int) -> Posts:
        asked.append((cell, epoch))
        assert len(members) == cars
        return (tuple(members[:2]),)

    roster = FleetRoster(network, peers, elect)
    cell, numbers = next(iter(network.cells.items()))
    assert roster.cars(cell) == len(numbers)
    assert (
        roster.posts(cell, 1) == roster.posts(cell, 1) == ((peers[numbers[0]], peers[numbers[1]]),)
    )
    del peers[numbers[0]]
    roster.changed(cell)
    assert roster.posts(cell, 1)[0][0] == peers[numbers[1]]
    assert roster.posts(cell, 2) and asked == [(cell, 1), (cell, 1), (cell, 2)]
    assert cell not in roster.neighbours(cell) and set(roster.neighbours(cell)) <= set(
        network.cells
    )
