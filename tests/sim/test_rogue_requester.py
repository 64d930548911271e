"""A car among requesters that mean it no good: its slots, its other customers, its chain."""

from __future__ import annotations

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.admission import HEARTBEAT_MS_MIN
from meshnode.protocol.fields import Span
from meshnode.protocol.lease import FETCH_MS_MAX, INPUTS_MS_MAX
from meshnode.protocol.node import Node
from meshnode.protocol.objects import T_ANNOUNCE, Announce
from meshnode.protocol.reasons import Reason
from testnet.sim.mesh import ARTIFACT, PROVIDE, REQUEST, Mesh, Site

from .rogue import Rogue
from .test_mesh import ended, job_of, order, submit


def car_and_rogue(**more: object) -> tuple[Mesh, Site, Rogue]:
    mesh = Mesh(1)
    car = mesh.add("car", PROVIDE, **more)
    rogue = Rogue(mesh, "rogue")
    mesh.connect_all()
    mesh.rest(100)
    return mesh, car, rogue


def node_of(site: Site) -> Node:
    assert site.node is not None
    return site.node


def test_a_lease_whose_inline_inputs_never_come_gives_its_slot_back() -> None:
    mesh, car, rogue = car_and_rogue()
    channel = rogue.agree(car)
    inline = bytes(4 * 64)
    rogue.say(car, rogue.offer(car, channel, rogue.job(4, inline=inline), Span(0, 4)))
    assert len(node_of(car).provider.leases) == 1
    mesh.rest(INPUTS_MS_MAX - 1_000)
    assert len(node_of(car).provider.leases) == 1
    mesh.rest(2_000)
    assert not node_of(car).provider.leases
    assert [e.reason for e in rogue.all_heard(messages.Ended)] == [Reason.BLOB_MISSING]


def test_a_lease_whose_blob_never_comes_gives_its_slot_back() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.no_blobs = True
    channel = rogue.agree(car)
    rogue.say(car, rogue.offer(car, channel, rogue.job(4), Span(0, 4)))
    mesh.rest(FETCH_MS_MAX + 10_000)
    assert not node_of(car).provider.leases


def test_a_lease_of_no_time_does_not_make_the_car_beat_without_pause() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.no_blobs = True
    channel = rogue.agree(car)
    rogue.say(car, rogue.offer(car, channel, rogue.job(4), Span(0, 4), lease_ms=0))
    mesh.rest(2_000)
    assert 1 < len(rogue.all_heard(messages.Heartbeat)) <= 2_000 // HEARTBEAT_MS_MIN


def test_wrong_inputs_for_a_lease_of_before_a_restart_are_ignored() -> None:
    mesh, car, rogue = car_and_rogue()
    channel = rogue.agree(car)
    inline = bytes(4 * 64)
    offer = rogue.offer(car, channel, rogue.job(4, inline=inline), Span(0, 4), inline=inline)
    rogue.say(car, offer)
    mesh.cut("car", "rogue")
    rogue.mesh.connect("car", "rogue")
    mesh.rest(50)
    rogue.say(car, messages.Inputs(rogue.task_of(offer), 0, inline))
    mesh.cut("car", "rogue")
    mesh.rest(1_000)
    assert car.disk.held
    mesh.crash("car")
    mesh.boot("car")
    mesh.connect("car", "rogue")
    mesh.rest(100)
    rogue.say(car, offer)
    rogue.say(car, messages.Inputs(rogue.task_of(offer), 0, b"something else"))
    assert node_of(car).provider.ended


def test_an_offer_that_fits_no_kernel_does_not_end_the_leases_of_others() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.add("submitter", REQUEST)
    mesh.connect_all()
    mesh.rest(100)
    mesh.refuse_kernel = "other.kernel@1"
    channel = rogue.agree(car)
    job = rogue.job(4, kernel=mesh.refuse_kernel)
    submit(mesh, order(200))
    rogue.say(car, rogue.offer(car, channel, job, Span(0, 4)))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).reason is Reason.DONE
    assert not job_of(mesh).unsuited
    reasons = {past.attempt.reason for past in job_of(mesh).history}
    assert reasons <= {Reason.OK, Reason.BUSY}, "the other job had a place, and no more"


def test_outputs_of_another_size_stop_the_run() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.unit_ms = 1_000
    channel = rogue.agree(car)
    rogue.say(car, rogue.offer(car, channel, rogue.job(4), Span(0, 4)))
    mesh.rest(100)
    (lease,) = node_of(car).provider.leases.values()
    mesh.feed(car, ev.UnitsDone(lease.exec_id, 0, (b"short",), ev.Meters()))
    assert lease.exec_id in car.stopped
    assert not node_of(car).provider.leases


def test_drain_hands_back_what_only_waits() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.unit_ms = 100
    channel = rogue.agree(car)
    job = rogue.job(8)
    rogue.say(car, rogue.offer(car, channel, job, Span(0, 4)))
    rogue.say(car, rogue.offer(car, channel, job, Span(4, 4)))
    mesh.rest(100)
    assert len(node_of(car).provider.leases) == 2
    mesh.feed(car, ev.Drain(Reason.DRAINING))
    assert len(node_of(car).provider.leases) == 1, "the run in work goes on"
    mesh.rest(1_000)
    assert not node_of(car).provider.leases
    assert [e.reason for e in rogue.all_heard(messages.Ended)] == [Reason.STOPPED_BY_OWNER]
    parts = rogue.all_heard(messages.Part)
    assert sum(len(part.outputs) for part in parts) == 4, "and its last unit is its end"


def test_requesters_that_come_and_go_leave_nothing_behind() -> None:
    mesh, car, rogue = car_and_rogue()
    mesh.no_blobs = True
    channel = rogue.agree(car)
    rogue.say(car, rogue.offer(car, channel, rogue.job(4), Span(0, 4)))
    mesh.cut("car", "rogue")
    mesh.rest(60_000)
    assert not node_of(car).provider.leases
    assert node_of(car).deadline_mono_ms() is not None
    assert not node_of(car).provider.keeping._away


def test_a_car_does_not_dial_wherever_announcements_say() -> None:
    mesh = Mesh(1)
    car = mesh.add("car", PROVIDE, slots=8)
    mesh.rest(100)
    dialled = sum("Dial(" in line for line in mesh.trace)
    for number in range(8):
        stranger = Rogue(mesh, f"stranger-{number}")
        announce = Announce(
            1,
            stranger.identity.network,
            stranger.peer,
            bytes([number]) * 16,
            "announce",
            "bench.noop@1",
            ARTIFACT,
            (),
            1,
            16,
            0,
            (1 << 32) - 1,
            mesh.now().unix_ms + 30_000,
            0,
            ("/ip4/192.0.2.1/tcp/25",),
        )
        frame = stranger.seal(announce, T_ANNOUNCE).wire
        mesh.feed(car, ev.GossipIn("", stranger.peer, frame))
    assert sum("Dial(" in line for line in mesh.trace) == dialled + 1
