"""What a job says of itself: counted over cars that were asked or are known, and nobody is asked.

Real machines on the simulator; a sentence here is what `mesh explain` prints.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol.explain import EXAMPLES_MAX, Explanation, Would
from meshnode.protocol.job import ANSWERS_MAX, JobState
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Peer
from testnet.sim.mesh import Mesh

from .test_long_jobs import long_order, stored_step
from .test_mesh import ended, job_of, mesh_of, order, submit

ADVERT_MS = 30_000  # a change is said in an advert within it


def explained(mesh: Mesh) -> Explanation:
    node = mesh.sites["submitter"].node
    assert node is not None
    found = node.explain(job_of(mesh).job_id, mesh.now())
    assert found is not None
    return found


def would(mesh: Mesh, the_order: ev.JobOrder, kflop: int = 0) -> Would | tuple[Reason, str]:
    node = mesh.sites["submitter"].node
    assert node is not None
    return node.would(the_order, kflop, mesh.now())


def asked(mesh: Mesh, the_order: ev.JobOrder, kflop: int = 0) -> Would:
    found = would(mesh, the_order, kflop)
    assert isinstance(found, Would)
    return found


def peer(mesh: Mesh, name: str) -> Peer:
    return mesh.sites[name].identity.peer


def budget(mesh: Mesh, name: str, **change: Any) -> None:
    whole = ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 7_200, 0)
    mesh.feed(mesh.sites[name], replace(whole, **change))


def stopped(mesh: Mesh, name: str, reason: Reason) -> None:
    mesh.feed(mesh.sites[name], ev.BudgetRead(False, reason, 0, 0, 0, 0))


# ---- a job that goes well


def test_a_running_job_says_where_its_runs_went_and_what_their_cars_were_chosen_by() -> None:
    mesh = mesh_of(3, 1)
    mesh.rest(1_000)
    submit(mesh, order(400))
    assert mesh.run(lambda: job_of(mesh).taken > 40)
    now = explained(mesh)
    assert (now.state, now.units, now.done) == ("running", 400, job_of(mesh).taken)
    assert now.in_work > 0 and now.done + now.in_work + now.waiting == 400
    assert (now.cars_known, now.stands, now.advice) == (3, (), "")
    first = now.runs[0]
    assert first.how == "offer" and first.chosen is not None and first.chosen.peer == first.peer
    assert first.chosen.idle and first.chosen.rate_mflops == 100_000 and first.among in (1, 2, 3)
    assert {wait.reason for wait in now.waits} <= {Reason.WAITS_SLOT, Reason.WAITS_ANSWER}
    assert mesh.run(lambda: ended(mesh))
    then = explained(mesh)
    assert (then.state, then.done, then.in_work, then.waiting) == ("done", 400, 0, 0)
    assert (then.waits, then.advice, then.cars_working) == ((), "", 0)
    assert sum(run.done for run in then.runs) == 400
    assert len(then.runs) + then.runs_left_out == len(job_of(mesh).history)


def test_under_gossip_runs_went_to_who_bid() -> None:
    mesh = mesh_of(3, 2)
    submit(mesh, order(60, policy="gossip"))
    now = explained(mesh)
    assert [wait.reason for wait in now.waits] == [Reason.WAITS_BIDS]
    assert now.waits[0].units == 60 and now.waits[0].until_ms is not None
    assert mesh.run(lambda: ended(mesh))
    assert {run.how for run in explained(mesh).runs} == {"bid"}


@pytest.mark.parametrize("seed", range(4))
def test_asking_changes_nothing(seed: int) -> None:
    """The same seed gives the same trace whether or not somebody asks at every event."""

    class Asking(Mesh):
        def feed(self, site: Any, event: ev.Event) -> None:
            super().feed(site, event)
            submitter = self.sites.get("submitter")
            if submitter is not None and submitter.node is not None:
                node = submitter.node
                for job_id in node.jobs.all:
                    assert node.explain(job_id, self.now()) is not None
                node.would(order(7, nonce=9), 10, self.now())

    traces = []
    for kind in (Mesh, Asking):
        mesh = kind(seed)
        mesh.add("submitter", 2)
        for number in range(3):
            mesh.add(f"car-{number}", 1)
        mesh.connect_all()
        submit(mesh, order(60))
        assert mesh.run(lambda mesh=mesh: job_of(mesh).taken > 5)  # type: ignore[misc]
        mesh.crash("car-1")
        assert mesh.run(lambda mesh=mesh: ended(mesh))  # type: ignore[misc]
        traces.append(mesh.trace)
    assert traces[0] == traces[1]


# ---- a job that waits or fails


def test_cars_are_counted_by_reason_with_a_few_in_their_own_words() -> None:
    mesh = mesh_of(5, 3)
    mesh.kflop_per_unit = 10**9  # 5 s at the most that the device can do
    for number in range(5):
        budget(mesh, f"car-{number}", spendable_mwh=100)
    submit(mesh, order(1))
    assert mesh.run(lambda: len(job_of(mesh).unsuited) == 5 or ended(mesh))
    now = explained(mesh)
    (stand,) = [stand for stand in now.stands if stand.reason is Reason.BUDGET]
    assert stand.cars == 5 and len(stand.examples) == EXAMPLES_MAX
    words = "one unit takes 5 s, at 200 GFLOP/s and 300 W: 0.417 Wh; 0.1 Wh may be spent"
    assert {example.text for example in stand.examples} == {words}
    assert now.advice == (
        "5 cars: BUDGET: lower the units per lease, or wait until they have charged"
    )
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).reason is Reason.BUDGET
    assert explained(mesh).advice == now.advice


@pytest.mark.parametrize(
    "reason", [Reason.DRIVING, Reason.CHARGE_FLOOR, Reason.UNPLUGGED, Reason.READINGS]
)
def test_a_car_that_may_not_run_is_named_with_its_own_reason(reason: Reason) -> None:
    mesh = mesh_of(3, 4)
    for number in range(3):
        stopped(mesh, f"car-{number}", reason)
    mesh.rest(ADVERT_MS)
    submit(mesh, order(4))
    now = explained(mesh)
    assert [(stand.reason, stand.cars) for stand in now.stands] == [(reason, 3)]
    assert (now.cars_known, now.cars_open, now.waiting) == (3, 0, 4)
    assert now.advice.startswith(f"3 cars: {reason.name}: ")
    assert mesh.run(lambda: ended(mesh))
    then = explained(mesh)
    assert (then.state, then.reason) == ("failed", reason)
    assert [(stand.reason, stand.cars) for stand in then.stands] == [(reason, 3)]
    assert then.advice == now.advice


def test_the_job_s_own_words_leave_cars_out() -> None:
    mesh = mesh_of(3, 5)
    mesh.rest(1_000)
    submit(mesh, order(400, cars=(peer(mesh, "car-1"),)))
    assert mesh.run(lambda: job_of(mesh).taken > 0)
    now = explained(mesh)
    assert [(stand.reason, stand.cars) for stand in now.stands] == [(Reason.NOT_NAMED, 2)]
    assert {run.peer for run in now.runs} == {peer(mesh, "car-1")}
    assert now.advice == "", "the person has said so, and it goes on"
    stopped(mesh, "car-1", Reason.DRIVING)
    mesh.feed(mesh.sites["car-1"], ev.Recall(Reason.DRIVING, 0))
    assert mesh.run(lambda: not job_of(mesh).live)
    assert {stand.reason for stand in explained(mesh).stands} >= {Reason.NOT_NAMED}


def test_a_silent_car_is_waited_for_and_then_left_alone_for_a_moment() -> None:
    mesh = mesh_of(1, 6)
    mesh.rest(1_000)
    mesh.sites["car-0"].node = None  # frozen: the link is there, nobody answers
    submit(mesh, order(4))
    # Without an agreement nothing can be offered yet.
    (stand,) = explained(mesh).stands
    assert (stand.reason, stand.cars) == (Reason.WAITS_AGREEMENT, 1)
    mesh = mesh_of(1, 6)
    submit(mesh, order(4))
    assert mesh.run(lambda: ended(mesh))
    mesh.sites["car-0"].node = None
    submit(mesh, order(4, nonce=1), 2)
    node = mesh.sites["submitter"].node
    assert node is not None
    second = list(node.jobs.all)[1]
    offered = node.explain(second, mesh.now())
    assert offered is not None
    wait = offered.waits[0]
    assert wait.reason is Reason.WAITS_ANSWER and wait.until_ms
    assert sum(each.units for each in offered.waits) == offered.waiting == 4
    assert mesh.run(lambda: not node.jobs.all[second].live)
    silent = node.explain(second, mesh.now())
    assert silent is not None
    (stand,) = silent.stands
    assert stand.reason is Reason.NO_ANSWER and stand.again_ms


def test_a_unit_waits_for_its_checkpoint() -> None:
    mesh = mesh_of(2, 1)
    submit(mesh, long_order(units=1, steps=400))
    assert mesh.run(lambda: stored_step(mesh) >= 100)
    mesh.no_blobs = True  # what is fetched from now on never comes
    car = mesh.sites[mesh.began[0][0]]
    mesh.feed(car, ev.Recall(Reason.DRIVING, 2_000))
    assert mesh.run(lambda: not job_of(mesh).live)
    now = explained(mesh)
    assert [(wait.reason, wait.units) for wait in now.waits] == [(Reason.WAITS_CHECKPOINT, 1)]
    assert now.waiting == 1


def test_alone_it_says_that_no_car_is_known() -> None:
    mesh = mesh_of(0, 1)
    submit(mesh, order(4))
    now = explained(mesh)
    assert (now.cars_known, now.stands) == (0, ())
    assert now.advice.startswith("NOBODY: no car is known")
    assert mesh.run(lambda: ended(mesh))
    assert explained(mesh).advice == now.advice


def test_what_is_kept_of_answers_is_bounded() -> None:
    mesh = mesh_of(0, 1)
    submit(mesh, order(4))
    job = job_of(mesh)
    for number in range(3 * ANSWERS_MAX):
        job.heard(Peer(number.to_bytes(38, "big")), Reason.BUSY, "full")
    assert len(job.answers) == ANSWERS_MAX
    (stand,) = explained(mesh).stands
    assert stand.cars == ANSWERS_MAX and len(stand.examples) == EXAMPLES_MAX


def test_a_car_that_refuses_by_itself_says_why_too() -> None:
    """From an earlier job it knows how long such units take."""
    mesh = mesh_of(1, 3)
    mesh.unit_ms = 1_000
    submit(mesh, order(1))
    assert mesh.run(lambda: ended(mesh))
    budget(mesh, "car-0", spendable_mwh=50)
    submit(mesh, order(1, nonce=1), 2)
    node = mesh.sites["submitter"].node
    assert node is not None
    job = list(node.jobs.all.values())[1]
    assert mesh.run(lambda: bool(job.unsuited))
    assert job.history[0].attempt.lease_id is None
    found = node.explain(job.job_id, mesh.now())
    assert found is not None and found.stands[0].reason is Reason.BUDGET
    assert found.stands[0].examples[0].text.startswith("one unit takes 1 s, as such units took")


def test_a_car_that_took_work_again_is_no_refusal_any_more() -> None:
    mesh = mesh_of(1, 3)
    submit(mesh, order(40))
    job_of(mesh).heard(peer(mesh, "car-0"), Reason.BUSY)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE and explained(mesh).stands == ()


# ---- what a submission would do


def test_a_dry_run_names_who_would_be_asked_and_what_a_unit_costs() -> None:
    mesh = mesh_of(4, 7)
    mesh.rest(1_000)
    stopped(mesh, "car-3", Reason.DRIVING)
    mesh.rest(ADVERT_MS)
    before = len(mesh.trace)
    found = asked(mesh, order(40), kflop=2_000_000)
    assert (found.cars_known, found.cars_asked, found.how) == (4, 3, "offer")
    assert [(stand.reason, stand.cars) for stand in found.stands] == [(Reason.DRIVING, 1)]
    assert {one.reason for one in found.asked} == {Reason.WAITS_AGREEMENT}
    assert (found.bytes_in_per_unit, found.bytes_once, found.bytes_out_per_unit) == (64, 0, 64)
    # 2 GFLOP at 100 GFLOP/s and 300 W.
    assert found.unit_ms == 20.0 and found.unit_energy_mwh == pytest.approx(300 * 20 / 3_600)
    assert asked(mesh, order(40, unit_ms_hint=7.0), kflop=2_000_000).unit_ms == 7.0
    assert asked(mesh, order(40)).unit_ms is None
    assert mesh.trace[before:] == [] and not job_ids(mesh)


def job_ids(mesh: Mesh) -> list[bytes]:
    node = mesh.sites["submitter"].node
    assert node is not None
    return [bytes(job_id) for job_id in node.jobs.all]


def test_the_first_of_a_dry_run_is_whom_placement_takes() -> None:
    mesh = mesh_of(3, 8)
    fast = ev.WorkerClass("cpu", "sim", 4_096, 900_000, b"simclass")
    mesh.feed(mesh.sites["car-0"], ev.WorkerClasses((fast,), "0.0", (9, 10), 0, 1))
    submit(mesh, order(40))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(ADVERT_MS)
    near = peer(mesh, "car-2")
    for number in range(3):
        rtt_us = 1_000 if number == 2 else 90_000
        car = peer(mesh, f"car-{number}")
        mesh.feed(mesh.sites["submitter"], ev.RttMeasured(car, rtt_us))
    found = asked(mesh, order(1, nonce=5))
    assert found.asked[0].peer == near and found.asked[0].reason is Reason.OK
    submit(mesh, order(1, nonce=5), 2)
    node = mesh.sites["submitter"].node
    assert node is not None
    run = list(node.jobs.all.values())[1].history[0]
    assert run.attempt.peer == near
    assert run.choice is not None and run.choice.car == found.asked[0].car


def test_a_dry_run_of_what_no_car_takes() -> None:
    mesh = mesh_of(2, 9)
    mesh.rest(1_000)
    found = asked(mesh, order(4, memory_mb_max=8_000))
    assert found.cars_asked == 0 and found.asked == () and found.unit_ms is None
    (stand,) = found.stands
    assert (stand.reason, stand.cars) == (Reason.MEMORY, 2)
    assert {example.text for example in stand.examples} == {"offers 4096 MB"}
    assert found.advice.startswith("2 cars: MEMORY: ask for less memory")
    too_long = asked(mesh, order(4, unit_ms_hint=8_000_000.0))
    assert {s.reason: s.examples[0].text for s in too_long.stands} == {
        Reason.LEASE_LENGTH: "runs of at most 7200 s"
    }


def test_a_dry_run_is_refused_as_the_submission_would_be() -> None:
    mesh = mesh_of(1, 10)
    bad = replace(order(4), inline=b"left over")
    assert would(mesh, bad) == (Reason.KERNEL_SPEC, "inline bytes are left over")
    huge = replace(order(4), units=1 << 30)
    whole = BlobRef(Digest(bytes(32)), 64 << 30)
    huge = replace(huge, args=(replace(huge.args[0], blob=whole),))
    refused = would(mesh, huge)
    assert isinstance(refused, tuple) and refused[0] is Reason.TOO_LARGE
    assert not job_ids(mesh)
