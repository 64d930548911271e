"""What rendezvous say of each other is believed of those who may say it, and while it holds."""

from __future__ import annotations

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.cell import epoch_of
from meshnode.protocol.types import Lane

from .test_mesh import job_of
from .test_tokens import cars_of, node_of, rendezvous_of, settled, stuck


def test_of_our_own_cell_only_its_rendezvous_have_tokens() -> None:
    mesh = settled(4)
    holder = rendezvous_of(mesh)
    epoch = epoch_of(mesh.now().unix_ms)
    served = {
        peer
        for each in (epoch - 1, epoch)
        for ranks in node_of(holder).roster.posts(holder.identity.cell, each)
        for peer in ranks
    }
    other = next(car for car in cars_of(mesh) if car.identity.peer not in served)
    known = node_of(holder).rendezvous._tallies._known
    for cell, believed in ((holder.identity.cell, False), ("elsewhere", False), ("far", True)):
        if believed:  # nobody has heard of which cell it is
            node_of(holder).book.drop(other.identity.peer)
        tally = messages.pack(messages.Tally(cell, 3, 0))
        mesh.feed(holder, ev.FrameIn(other.identity.peer, Lane.CONTROL, tally))
        assert (other.identity.peer in known) is believed


def test_nobody_holds_a_placement_up_by_saying_that_it_waits() -> None:
    mesh = settled(4)
    placement, holder = stuck(mesh), rendezvous_of(mesh)
    site = mesh.sites["submitter"]
    task_id, number = placement.key
    (attempt,) = (a for a in job_of(mesh).attempts.values() if a.number == number)
    assert attempt.holder == holder.identity.peer
    holder.lie = lambda effect: []  # nor does it say no when the time is up
    queued = messages.pack(messages.Queued(task_id, number, 0))
    for _ in range(30):
        mesh.feed(site, ev.FrameIn(holder.identity.peer, Lane.CONTROL, queued))
        mesh.rest(500)
    assert not attempt.live or attempt.asked > 1
