"""A cell where not all hear all: candidates gossip, the others tell their rendezvous."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from meshnode.protocol import cell
from meshnode.protocol import effects as fx
from meshnode.protocol.cell import epoch_of
from meshnode.protocol.types import Limits
from testnet.sim.frames import kind_of
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh, Site

from .test_mesh import accepted_units, assert_whole, ended, order, submit
from .test_tokens import cars_of, node_of

CARS = 72


class Counting(Mesh):
    """Counts adverts that are gossiped, by who says them."""

    def __init__(self, seed: int, limits: Limits) -> None:
        super().__init__(seed, limits=limits)
        self.gossiped: Counter[str] = Counter()

    def _publish(self, site: Site, effect: fx.Publish, life: int) -> None:
        if kind_of(effect.frame) == "advert":
            self.gossiped[site.name] += 1
        super()._publish(site, effect, life)


def mesh_of_a_city(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The proportions of a cell of 1,000, at a size that a test can afford."""
    monkeypatch.setattr(cell, "GOSSIP_CARS_MAX", 12)
    monkeypatch.setattr(cell, "HEARD_CARS", 12)
    monkeypatch.setattr(cell, "CANDIDATES_MAX", 8)
    mesh = Counting(1, replace(Limits(), rendezvous_cars=12))
    mesh.keep_trace = False
    mesh.add("submitter", REQUEST)
    for number in range(CARS):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.rest(160_000)  # the adverts of when nobody knew how many there are have expired
    mesh.gossiped.clear()
    mesh.rest(62_000)
    return mesh


def test_few_gossip_all_know_how_many_and_work_comes_to_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = mesh_of_a_city(monkeypatch)
    assert len(mesh.gossiped) < CARS // 2 and mesh.gossiped.total() < CARS
    posts, counts = Counter[object](), Counter[int]()
    for car in cars_of(mesh):
        roster = node_of(car).provider.tokens._roster
        posts[roster.posts("cell", epoch_of(mesh.now().unix_ms))] += 1
        counts[roster.cars("cell")] += 1
    assert posts.most_common(1)[0][1] > 0.8 * CARS, "they agree whom to ask"
    assert counts.most_common(1)[0][0] in range(int(0.8 * CARS), int(1.2 * CARS))
    heard = set(node_of(mesh.sites["submitter"]).book.cars)
    assert len(heard) < 0.7 * CARS
    holders = [site for site in cars_of(mesh) if node_of(site).rendezvous.tokens]
    most = max(len(node_of(site).rendezvous.depositors()) for site in holders)
    assert most < CARS // 2, "each serves a part of its shard"

    submit(mesh, order(900, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    assert_whole(mesh, 900)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(900))
    worked = {
        past.attempt.peer
        for past in next(iter(node_of(mesh.sites["submitter"]).jobs.all.values())).history
    }
    assert worked - heard, "a rendezvous knew them"
