"""What rendezvous say of each other is believed of those who may say it, and while it holds."""

from __future__ import annotations

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.cell import epoch_of
from meshnode.protocol.rendezvous import AGAIN_MS
from meshnode.protocol.stage import Stage
from meshnode.protocol.tallies import SILENT_MS
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
    for cell, believed in ((holder.identity.cell, False), ("elsewhere", True)):
        tally = messages.pack(messages.Tally(cell, 3, 0))
        mesh.feed(holder, ev.FrameIn(other.identity.peer, Lane.CONTROL, tally))
        assert (other.identity.peer in known) is believed


def test_who_lets_a_placement_drop_is_not_believed_for_a_while() -> None:
    mesh = settled(4)
    first, holder = stuck(mesh), rendezvous_of(mesh)
    role, submitter = node_of(holder).rendezvous, mesh.sites["submitter"].identity.peer
    liar = next(car for car in cars_of(mesh) if car is not holder)
    liar.lie = lambda effect: []
    tally = messages.pack(messages.Tally("elsewhere", 3, 0))
    mesh.feed(holder, ev.FrameIn(liar.identity.peer, Lane.CONTROL, tally))
    assert first.stage is Stage.SENT_ON and first.to == liar.identity.peer
    mesh.rest(AGAIN_MS + 1)
    place = messages.pack(first.place)
    mesh.feed(holder, ev.FrameIn(submitter, Lane.CONTROL, place))
    for rest_ms, believed in ((0, False), (SILENT_MS, True)):
        mesh.rest(rest_ms)
        mesh.feed(holder, ev.FrameIn(liar.identity.peer, Lane.CONTROL, tally))
        assert (liar.identity.peer in role._tallies._known) is believed


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
