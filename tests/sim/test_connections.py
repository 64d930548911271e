"""More peers than a node may be connected to: nothing is lost, and nobody is turned away."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.connections import FRESH_MS, QUIET_MS, SETTLE_MS, SWEEP_MS, Worth
from meshnode.protocol.job import JobState
from meshnode.protocol.promises import Promises
from meshnode.protocol.types import Limits, Now
from testnet.sim.mesh import EPOCH_MS, PROVIDE, REQUEST, Mesh, Site

from .rogue import Rogue
from .test_mesh import accepted_units, assert_whole, ended, mesh_of, order, submit
from .test_tokens import counted, node_of, rendezvous_of

FEW = replace(Limits(), peers_max=6)


def ups(site: Site) -> int:
    return len(node_of(site).peers)


@pytest.mark.parametrize("policy", ["adverts", "tokens", "gossip"])
@pytest.mark.parametrize("seed", range(3))
def test_a_mesh_of_more_than_each_may_be_connected_to_does_all_its_work(
    seed: int, policy: str
) -> None:
    mesh = Mesh(seed, limits=FEW)
    for name in ("submitter", "other"):
        mesh.add(name, REQUEST)
    for number in range(12):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    for nonce in range(4):
        submit(mesh, order(60, nonce=nonce, policy=policy))
        mesh.feed(mesh.sites["other"], ev.Submit(2, order(60, nonce=9 + nonce, policy=policy)))
        mesh.rest(500)
        assert all(ups(site) <= FEW.peers_max for site in mesh.sites.values())

    def over() -> bool:
        jobs = [j for n in ("submitter", "other") for j in node_of(mesh.sites[n]).jobs.all.values()]
        return all(job.state is not JobState.RUNNING for job in jobs)

    assert mesh.run(over)
    mesh.rest(3_000)
    for name in ("submitter", "other"):
        site = mesh.sites[name]
        jobs = node_of(site).jobs.all.values()
        assert [job.state for job in jobs] == [JobState.DONE] * 4
        assert len(accepted_units(site)) == 240, "every unit of four jobs is accepted"
    assert counted(mesh, "hung_up")
    for car in mesh.sites.values():
        assert not node_of(car).provider.leases


def test_a_job_reaches_cars_one_after_the_other_through_a_table_of_two() -> None:
    mesh = mesh_of(6, 1)
    mesh.sites["submitter"].limits = replace(Limits(), peers_max=2)
    mesh.crash("submitter")
    mesh.boot("submitter")
    for number in range(6):
        mesh.connect("submitter", f"car-{number}")
        mesh.rest(2_500)
        cars = (mesh.sites[f"car-{number}"].identity.peer,)
        submit(mesh, order(5, nonce=number, cars=cars))
        assert mesh.run(lambda: ended(mesh))
        mesh.rest(2_500)
        assert ups(mesh.sites["submitter"]) <= 2
    assert sorted(accepted_units(mesh.sites["submitter"])) == sorted([*range(5)] * 6)


def test_a_newcomer_is_refused_only_if_all_are_at_work() -> None:
    mesh = mesh_of(3, 2)
    site = mesh.sites["submitter"]
    site.limits = replace(Limits(), peers_max=3)
    mesh.crash("submitter")
    mesh.boot("submitter")
    for number in range(3):
        mesh.connect("submitter", f"car-{number}")
    mesh.unit_ms = 20_000
    mesh.rest(1_000)
    submit(mesh, order(6, lease_units_max=1))
    mesh.rest(3_000)
    late = mesh.add("late", PROVIDE)
    mesh.connect("late", "submitter")
    mesh.rest(100)
    assert late.identity.peer not in node_of(site).peers
    assert node_of(site).counters["blocked_busy"] == 1
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    assert_whole(mesh, 6)
    mesh.connect("late", "submitter")
    mesh.rest(100)
    assert late.identity.peer in node_of(site).peers


def strangers(mesh: Mesh, victim: Site, count: int) -> list[Rogue]:
    found = []
    for number in range(count):
        rogue = Rogue(mesh, f"rogue-{number}")
        mesh.connect(rogue.name, victim.name)
        mesh.rest(20)
        found.append(rogue)
    return found


def test_identities_that_cost_nothing_push_out_nobody_that_was_of_use() -> None:
    mesh = mesh_of(3, 3)
    site = mesh.sites["submitter"]
    site.limits = FEW
    mesh.crash("submitter")
    mesh.boot("submitter")
    for number in range(3):
        mesh.connect("submitter", f"car-{number}")
    mesh.rest(500)
    submit(mesh, order(30, lease_units_max=2))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(10_000)
    useful = set(node_of(site).peers)
    assert len(useful) == 3
    strangers(mesh, site, 40)
    assert useful < set(node_of(site).peers)
    assert ups(site) == FEW.peers_max
    assert node_of(site).counters["hung_up"] == 37


def test_who_asks_for_terms_again_and_again_is_not_in_use() -> None:
    """A table full of handshakes that never end still takes an honest peer."""
    mesh = mesh_of(0, 4)
    car = mesh.add("car", PROVIDE)
    car.limits = FEW
    mesh.crash("car")
    mesh.boot("car")
    found = strangers(mesh, car, 6)
    mesh.rest(FRESH_MS)
    for rogue in found:
        rogue.say(car, messages.TermsRequest(rogue.identity.mandate))
    mesh.rest(20)
    worth = Promises(node_of(car), mesh.now(car))
    assert [worth(p) for p in node_of(car).peers] == [Worth.ASKING] * 6
    mesh.connect("submitter", "car")
    submit(mesh, order(4))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(1_000)
    assert_whole(mesh, 4)


def test_both_ends_see_an_ordinary_end_and_neither_calls_back() -> None:
    """A full car hangs up on the idle; nobody has work, so nobody dials."""
    mesh = Mesh(5, limits=FEW)
    car = mesh.add("car", PROVIDE)
    for number in range(6):
        mesh.add(f"idle-{number}", REQUEST)
        mesh.connect(f"idle-{number}", "car")
    mesh.rest(QUIET_MS + 2 * SWEEP_MS)
    assert ups(car) == 4, "the low mark of six"
    assert sum(ups(mesh.sites[f"idle-{n}"]) for n in range(6)) == 4
    before = len(mesh.trace)
    mesh.rest(600_000)
    dials = [line for line in mesh.trace[before:] if " Dial(" in line]
    assert not dials
    assert ups(car) == 4


def test_who_hangs_up_again_and_again_is_called_ever_more_seldom() -> None:
    """A job that waits looks at each car every 50 ms, and a full one hangs up on the idle."""
    node = node_of(mesh_of(1, 6).sites["submitter"])
    fleet, (car,) = node.requester.fleet, node.peers
    dials = []
    for at_ms in range(1_000, 31_000, 50):
        node._out.now = Now(at_ms, EPOCH_MS + at_ms)
        fleet.tick()
        fleet._seek(car, ("/sim/car-0",))
        if any(isinstance(effect, fx.Dial) for effect in node._out.take()):
            dials.append(at_ms)
            fleet.parted(car)  # it was up, and nothing came of it
    assert dials == [1_000, 2_000, 4_000, 8_000, 16_000]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(
    st.integers(0, 10_000),
    st.integers(3, 7),
    st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13), st.integers(0, 1_500)), max_size=30),
)
def test_whoever_comes_and_goes_every_job_ends_and_every_unit_is_accepted(
    seed: int, peers_max: int, calls: list[tuple[int, int, int]]
) -> None:
    mesh = Mesh(seed, limits=replace(Limits(), peers_max=peers_max))
    names = ["submitter", "other", *(f"car-{n}" for n in range(12))]
    for name in names:
        mesh.add(name, PROVIDE if name.startswith("car") else REQUEST)
    mesh.connect_all()
    for number, (one, other, wait_ms) in enumerate(calls):
        if one != other:
            mesh.connect(names[one], names[other])
        site = mesh.sites[names[number % 2]]
        if number < 6:
            policy = ("adverts", "tokens", "gossip")[number % 3]
            mesh.feed(site, ev.Submit(number, order(20, nonce=number, policy=policy)))
        mesh.rest(wait_ms)
        assert all(ups(s) <= peers_max for s in mesh.sites.values())
    jobs = [j for n in names[:2] for j in node_of(mesh.sites[n]).jobs.all.values()]
    assert mesh.run(lambda: all(job.state is not JobState.RUNNING for job in jobs))
    assert all(job.state is JobState.DONE for job in jobs)
    askers = [mesh.sites[name] for name in names[:2]]

    def accepted() -> bool:
        """Whoever was hung up on calls after 2 s, and again after 4 and 8."""
        return all(
            len(accepted_units(site)) == sum(j.spec.units for j in node_of(site).jobs.all.values())
            for site in askers
        )

    assert mesh.run(accepted, ms_max=60_000)


def test_a_car_that_dials_first_says_so_and_its_run_goes_to_nobody_else() -> None:
    """Its lease comes after five ways of 33 ms, its word after four; the submitter waits 150 ms."""
    mesh = mesh_of(5, 7, delay_ms=(33, 33))
    mesh.rest(500)
    submit(mesh, order(20, lease_units_max=1))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(21_000)
    rendezvous = rendezvous_of(mesh)
    for name in sorted(mesh.sites["submitter"].links):
        if name != rendezvous.name:
            mesh.cut("submitter", name)
    before = counted(mesh, "assigned")
    mesh.rest(2_000)
    submit(mesh, order(4, nonce=1, policy="tokens", lease_units_max=1))
    assert mesh.run(lambda: ended(mesh))
    node = node_of(mesh.sites["submitter"])
    (job,) = (job for job in node.jobs.all.values() if job.spec.nonce[-1] == 1)
    assert job.state is JobState.DONE
    mesh.rest(1_000)
    assert counted(mesh, "assigned") - before == len(job.history) == 4
    assert {past.how for past in job.history} == {"token"}
    assert not node.counters["announced"]


def test_who_comes_while_a_rendezvous_looks_for_a_car_is_not_pushed_out_by_the_next() -> None:
    """Its lease is under way, and all the others were of use before."""
    mesh = mesh_of(4, 1)
    mesh.rest(3_000)
    submitter, holder = mesh.sites["submitter"], rendezvous_of(mesh)
    submit(mesh, order(20, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(SETTLE_MS + 500)
    (stranger,) = strangers(mesh, submitter, 1)

    def worth() -> Worth:
        return Promises(node_of(submitter), mesh.now())(stranger.peer)

    assert worth() < Worth.PROVEN
    holder.lie = lambda effect: []  # the question waits
    submit(mesh, order(1, nonce=1, policy="tokens"))
    assert worth() is Worth.EXPECTED > Worth.PROVEN
    mesh.rest(FRESH_MS)
    assert worth() < Worth.PROVEN
