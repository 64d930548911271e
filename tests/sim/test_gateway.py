"""Beyond the cell: neighbours that know each other, announcements passed on, rare things found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol.effects import ArgSource
from meshnode.protocol.gateway import MEMORY_STEPS_MB, memory_keys, region_of, wanted_keys
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Limits, NetworkId
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh

from .test_mesh import F16, assert_whole, ended, job_of, order, submit
from .test_tokens import counted, node_of

CELLS = ("eu/de/north", "eu/de/south", "eu/de/east")
WEIGHTS = Digest(b"\x44" * 32)


def region(cars: int, seed: int = 1, home: int = 0) -> Mesh:
    """So many cars in each cell but the submitter's own, which has `home`. Nobody is connected to
    another cell; a region's rendezvous find each other by the DHT."""
    mesh = Mesh(seed)
    mesh.add("submitter", REQUEST, cell=CELLS[0])
    for cell in CELLS:
        for number in range(home if cell == CELLS[0] else cars):
            mesh.add(f"{cell}/{number}", PROVIDE, cell=cell)
    mesh.rest(70_000)
    return mesh


def test_a_cell_lies_in_a_region() -> None:
    assert region_of("eu/de/berlin") == "eu/de" and region_of("home") == ""


def test_memory_is_found_by_the_step_that_covers_it() -> None:
    network = NetworkId(bytes(32))
    assert memory_keys(network, 8_000) == [] == wanted_keys(network, 8_000, ())
    assert len(memory_keys(network, 1 << 20)) == len(MEMORY_STEPS_MB)
    for asked in (9_000, 16_384, 16_385, 100_000):
        (key,) = wanted_keys(network, asked, ())
        step = next(step for step in MEMORY_STEPS_MB if step >= asked)
        assert key in memory_keys(network, step) and key not in memory_keys(network, step - 1)


def test_rendezvous_of_a_region_know_each_other() -> None:
    mesh = region(4, home=3)
    for cell in CELLS:
        known = [
            node_of(site).rendezvous._roster.neighbours(cell)
            for site in mesh.sites.values()
            if site.identity.cell == cell and node_of(site).gateway._topic
        ]
        assert known and all(set(cells) == set(CELLS) - {cell} for cells in known)


@pytest.mark.parametrize("policy", ["tokens", "gossip"])
def test_work_that_a_cell_cannot_do_is_done_in_the_next(policy: str) -> None:
    mesh = region(4, home=2)
    for site in mesh.sites.values():
        if site.identity.cell == CELLS[0] and site.name != "submitter":
            mesh.feed(site, ev.Drain(Reason.DRAINING))  # they serve their cell, and run nothing
    mesh.rest(5_000)
    submit(mesh, order(20, policy=policy))
    assert mesh.run(lambda: ended(mesh))
    assert_whole(mesh, 20)
    cells = {mesh.by_peer[past.attempt.peer].identity.cell for past in job_of(mesh).history}
    assert cells & set(CELLS[1:])


def test_a_flood_of_announcements_is_passed_on_once_a_second() -> None:
    mesh = region(3, home=2)
    before = counted(mesh, "announces_passed_on")
    for nonce in range(40):
        submit(mesh, order(1, nonce=nonce, policy="gossip", memory_mb_max=1 << 19))
    at_ms = mesh.now_ms
    mesh.rest(10_000)
    assert 0 < counted(mesh, "announces_passed_on") - before <= 2 * (mesh.now_ms - at_ms) // 1000


def test_a_car_far_away_that_has_the_weights_is_found() -> None:
    mesh = Mesh(1, limits=replace(Limits(), nobody_ms=60_000))
    mesh.add("submitter", REQUEST, cell="here")
    far = mesh.add("far", PROVIDE, cell="there/far/away")
    mesh.rest(1_000)
    mesh.feed(far, ev.BlobsHeld((WEIGHTS,)))
    mesh.rest(70_000)
    mapped = ArgSource(True, F16, BlobRef(Digest(b"\x33" * 32), 64 * 5))
    weights = ArgSource(False, F16, BlobRef(WEIGHTS, 64))
    submit(mesh, replace(order(5, policy="tokens"), args=(mapped, weights)))
    assert mesh.run(lambda: ended(mesh))
    assert {past.attempt.peer for past in job_of(mesh).history} == {far.identity.peer}
