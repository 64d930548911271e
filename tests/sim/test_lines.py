"""Lines at a rendezvous: who waited longer is first, and no submitter goes before all others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.messages import Refuse
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rendezvous import Rendezvous
from meshnode.protocol.stage import Placement, Stage
from meshnode.protocol.tallies import Known
from meshnode.protocol.types import Lane, Peer, TaskId
from testnet.sim.mesh import Mesh

from .test_mesh import ended, order, submit
from .test_tokens import cars_of, node_of, rendezvous_of, settled, stuck


def another(role: Rendezvous, first: Placement, number: int, **more: object) -> Placement:
    """A placement like `first` that has just come."""
    key = (TaskId(number.to_bytes(16, "big")), 0)
    fresh = {"stage": Stage.SOUGHT, "asked": set(), "refused_by": set(), "sent": 0}
    placement = replace(first, key=key, **fresh, **more)  # type: ignore[arg-type]
    role._placed[key] = placement
    return placement


def scene() -> tuple[Mesh, Rendezvous, Placement, Peer]:
    """A role at which one placement waits, and a neighbour that nobody knows the cell of."""
    mesh = settled(8)
    first, holder = stuck(mesh), rendezvous_of(mesh)
    node = node_of(holder)
    node._out.now = mesh.now()
    neighbour = next(car for car in cars_of(mesh) if car is not holder)
    neighbour.lie = lambda effect: []
    node.book.drop(neighbour.identity.peer)
    return mesh, node.rendezvous, first, neighbour.identity.peer


def test_what_a_neighbour_refused_has_its_place_again_and_no_better_one() -> None:
    mesh, role, first, neighbour = scene()
    later = [first.until_mono_ms + number for number in range(4)]
    waiting = [another(role, first, n, until_mono_ms=later[n]) for n in (1, 2)]
    for placement in waiting:
        role._queue(placement)
    newcomer = another(role, first, 3, until_mono_ms=later[3])
    role._tallies._known = {neighbour: Known(1, mesh.now_ms + 5_000, 0)}
    role._find(newcomer)
    assert newcomer.stage is Stage.SENT_ON
    role.on_refuse(neighbour, Refuse(newcomer.key[0], 0, Reason.NO_TOKEN))
    assert list(role._lines[first.submitter]) == [first, *waiting, newcomer]


def test_spare_tokens_go_to_each_line_in_turn() -> None:
    mesh, role, first, neighbour = scene()
    modest = next(car.identity.peer for car in cars_of(mesh) if car.identity.peer != neighbour)
    until_ms = first.until_mono_ms
    for number in (1, 2, 3):
        role._queue(another(role, first, number, until_mono_ms=until_ms))
    theirs = another(role, first, 9, offer=replace(first.offer, requester=modest))
    role._queue(theirs)
    tally = messages.pack(messages.Tally("elsewhere", 1, 0))
    holder, got = rendezvous_of(mesh), Counter[Peer]()
    for _ in range(8):
        mesh.feed(holder, ev.FrameIn(neighbour, Lane.CONTROL, tally))
        for sent in [p for p in role._placed.values() if p.stage is Stage.SENT_ON]:
            got[sent.submitter] += 1
            no = messages.pack(Refuse(sent.key[0], sent.key[1], Reason.NO_TOKEN))
            mesh.feed(holder, ev.FrameIn(neighbour, Lane.CONTROL, no))
    assert got[modest] == got[first.submitter] == 4


def test_one_placement_is_sent_on_a_few_times_in_all() -> None:
    mesh, _, first, neighbour = scene()
    tally = messages.pack(messages.Tally("elsewhere", 1, 0))
    no = messages.pack(Refuse(first.key[0], first.key[1], Reason.NO_TOKEN))
    holder = rendezvous_of(mesh)
    for _ in range(20):
        mesh.feed(holder, ev.FrameIn(neighbour, Lane.CONTROL, tally))
        mesh.feed(holder, ev.FrameIn(neighbour, Lane.CONTROL, no))
    assert first.sent == 8 and first.stage is Stage.QUEUED


def test_a_slot_that_is_held_for_a_submitter_is_free_for_what_it_places() -> None:
    """A job that has just been announced is placed the moment that its submitter is connected."""
    mesh = settled(1)
    submit(mesh, order(1, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))  # they have agreed
    mesh.rest(1_000)
    (car,), submitter = cars_of(mesh), mesh.sites["submitter"]
    role = node_of(car).provider
    role._out.now = mesh.now()
    assert role.presence.bid(submitter.identity.peer, bytes(16), (), 60_000)
    again = order(1, nonce=1, policy="tokens")
    mesh.feed(submitter, ev.Submit(2, again))
    jobs = node_of(submitter).jobs
    assert mesh.run(lambda: len(jobs.all) == 2 and not jobs.running, ms_max=1_000)
