"""Wall clocks that are wrong: no work is done that could not be accepted, and mending is enough."""

from __future__ import annotations

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.clocks import STEP_MS, Clocks
from meshnode.protocol.job import JobState
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import CLOCK_SKEW_MS_MAX, Now, Peer
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh, Site

from .test_mesh import accepted_units, assert_whole, ended, job_of, mesh_of, order, submit

APART_MS = 180_000
OWN, ONE, TWO, THREE = (Peer(bytes([number]) * 38) for number in range(4))


def set_clock(mesh: Mesh, name: str, skew_ms: int) -> None:
    """It is noticed with the next event."""
    mesh.sites[name].skew_ms = skew_ms
    mesh.feed(mesh.sites[name], ev.Tick())


def told_of_clocks(site: Site) -> list[object]:
    return [dict(n.fields)["wrong"] for _, n in site.notices if n.kind == "clock_skew"]


@pytest.mark.parametrize("policy", ["adverts", "gossip", "tokens"])
@pytest.mark.parametrize("skew_ms", [-APART_MS, 140_000, APART_MS])
def test_clocks_too_far_apart_do_no_work_for_each_other(policy: str, skew_ms: int) -> None:
    mesh = mesh_of(2, 1)
    for name in ("car-0", "car-1"):
        set_clock(mesh, name, skew_ms)
    mesh.rest(2_000)
    submit(mesh, order(40, policy=policy))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.CLOCK_SKEW)
    assert not job_of(mesh).taken
    for name in ("car-0", "car-1"):
        assert told_of_clocks(mesh.sites[name]), "its owner is told"
    assert told_of_clocks(mesh.sites["submitter"])[-1] == "ours", "two agree against it"


@pytest.mark.parametrize("policy", ["adverts", "gossip", "tokens"])
@pytest.mark.parametrize("who", ["submitter", "car-0"])
def test_a_clock_that_is_set_right_is_enough(policy: str, who: str) -> None:
    """Nobody connects anew."""
    mesh = mesh_of(1, 2)
    set_clock(mesh, who, APART_MS)
    mesh.rest(1_000)
    submit(mesh, order(40, policy=policy))
    mesh.rest(5_000)
    assert not job_of(mesh).taken
    set_clock(mesh, who, 0)
    assert mesh.run(lambda: ended(mesh), ms_max=130_000)
    assert_whole(mesh, 40)


@pytest.mark.parametrize("who", ["submitter", "car-0"])
@pytest.mark.parametrize("skew_ms", [-APART_MS, APART_MS])
def test_receipts_of_a_wrong_clock_are_accepted_once_it_is_right(who: str, skew_ms: int) -> None:
    """What was in work when the clock jumped is stopped, and signed for with a wrong time."""
    mesh = mesh_of(1, 3)
    mesh.unit_ms = 50
    submit(mesh, order(400))
    assert mesh.run(lambda: job_of(mesh).taken >= 60)
    set_clock(mesh, who, skew_ms)
    mesh.rest(3_000)
    car = mesh.sites["car-0"]
    assert car.node is not None
    assert not car.node.provider.leases
    taken = job_of(mesh).taken
    set_clock(mesh, who, 0)
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(150_000)
    assert_whole(mesh, 400)
    assert len(accepted_units(mesh.sites["submitter"])) == 400 > taken
    assert not any(channel.open for channel in car.node.provider.receipts.channels.values())
    assert check_objects(car.disk.signed).findings == ()


def test_a_rendezvous_gives_nobody_a_car_whose_clock_is_too_far_from_theirs() -> None:
    """It is itself between the two, and can work with both."""
    mesh = Mesh(5)
    mesh.add("submitter", REQUEST)
    for number in range(4):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    set_clock(mesh, "submitter", -90_000)
    for number in (1, 2, 3):
        set_clock(mesh, f"car-{number}", 90_000 if number > 1 else 0)
    mesh.rest(3_000)
    submit(mesh, order(60, policy="tokens", lease_units_max=4))
    assert mesh.run(lambda: ended(mesh))
    assert_whole(mesh, 60)
    near = {mesh.sites[name].identity.peer for name in ("car-0", "car-1")}
    worked = {
        past.attempt.peer
        for past in job_of(mesh).history
        if past.attempt.next_unit > past.attempt.first
    }
    assert worked
    assert worked <= near


@pytest.mark.parametrize("policy", ["adverts", "gossip"])
def test_cars_that_are_busy_with_others_work_are_not_nobody(policy: str) -> None:
    mesh = mesh_of(1, 4)
    other = mesh.add("other", REQUEST)
    mesh.connect_all()
    mesh.rest(2_000)
    mesh.unit_ms = 500
    mesh.feed(other, ev.Submit(1, order(100, policy="adverts")))  # one lease after the other
    mesh.rest(2_000)
    submit(mesh, order(4, nonce=1, policy=policy))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).reason is Reason.DONE
    assert mesh.now_ms > mesh.limits.nobody_ms + 2_000
    waits = [n for _, n in mesh.sites["submitter"].notices if n.kind == "waits"]
    assert waits or policy == "adverts", "and its user is told what it waits for"


def test_nobody_is_still_said_when_the_cars_have_gone() -> None:
    mesh = mesh_of(1, 4)
    mesh.rest(2_000)
    mesh.crash("car-0")
    submit(mesh, order(4, policy="gossip"))
    assert mesh.run(lambda: ended(mesh), ms_max=200_000)
    assert job_of(mesh).state is JobState.FAILED


def test_offsets_follow_our_own_clock() -> None:
    clocks = Clocks(OWN)
    clocks.see(Now(1_000, 500_000))
    clocks.heard(ONE, 500_000 + CLOCK_SKEW_MS_MAX + 1)
    clocks.heard(TWO, 500_000 - CLOCK_SKEW_MS_MAX)
    assert clocks.apart(ONE)
    assert not clocks.apart(TWO)
    assert not clocks.apart(THREE), "nobody knows yet"
    assert not clocks.in_step(ONE, TWO)
    assert clocks.in_step(OWN, TWO)
    assert not clocks.see(Now(3_000, 502_000 + STEP_MS))
    assert clocks.see(Now(3_000, 502_001 + STEP_MS)), "it was set"
    assert not clocks.apart(ONE)
    assert clocks.apart(TWO)
    assert not clocks.see(Now(4_000, 503_001 + STEP_MS)), "that is told once"


def test_a_clock_is_ours_to_set_if_most_others_agree_against_it() -> None:
    clocks = Clocks(OWN)
    clocks.see(Now(0, 1_000_000))
    clocks.heard(ONE, 1_000_000 + APART_MS)
    assert not clocks.standing().ours_is_off, "one against one"
    clocks.heard(TWO, 1_000_500 + APART_MS)
    assert clocks.standing().ours_is_off
    clocks.heard(THREE, 1_000_000)
    assert clocks.standing().ours_is_off
    clocks.forget(TWO)
    assert not clocks.standing().ours_is_off
