"""The membership oracle knows who is there, and leaves the choice to whom it is given."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.protocol.cell import Posts
from meshnode.protocol.types import Peer
from testnet.sim.faults import KILLED_MS, PLANS
from testnet.sim.mesh import PROVIDE, Mesh
from testnet.sim.network import draw
from testnet.sim.roster import FleetRoster


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


class Elected(Mesh):
    def role_holders(self) -> list[str]:
        return [name for name in self.sites if name.startswith("car")]


def test_a_quarter_of_all_rendezvous_dies_at_once_and_comes_back() -> None:
    mesh = Elected(1)
    for number in range(8):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    PLANS["kill"].schedule(mesh, (0, 2_000_000))
    mesh.rest(999)
    assert all(site.node for site in mesh.sites.values())
    mesh.rest(2)
    assert sum(site.node is None for site in mesh.sites.values()) == 2
    mesh.rest(KILLED_MS)
    assert all(site.node and len(site.links) == 7 for site in mesh.sites.values())
