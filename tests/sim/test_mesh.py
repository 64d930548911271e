"""Machines among themselves: jobs end, units are right, receipts are accepted once."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.effects import ArgSource
from meshnode.protocol.job import Job, JobState
from meshnode.protocol.objects import T_ACCEPT, T_RECEIPT, Acceptance, Receipt
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import unseal
from meshnode.protocol.types import Account, ArraySpec, BlobRef, Digest, Lane, NetworkId, Peer
from testnet.sim.frames import kind_of
from testnet.sim.mesh import ARTIFACT, DAY_MS, PROVIDE, REQUEST, Mesh, Site, output_of

F16 = ArraySpec("float32", (16,))


def order(units: int, *, nonce: int = 0, policy: str = "adverts", **more: object) -> ev.JobOrder:
    ref = BlobRef(Digest(b"\x33" * 32), 64 * units)
    return ev.JobOrder(
        "bench.noop@1",
        ARTIFACT,
        (ArgSource(True, F16, ref),),
        (F16,),
        units,
        nonce.to_bytes(16, "big"),
        policy=policy,
        **more,  # type: ignore[arg-type]
    )


def mesh_of(cars: int, seed: int, **more: object) -> Mesh:
    mesh = Mesh(seed, **more)  # type: ignore[arg-type]
    mesh.add("submitter", REQUEST)
    for number in range(cars):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    return mesh


def submit(mesh: Mesh, the_order: ev.JobOrder, request_id: int = 1) -> None:
    """Until its record is stored: before that no car is asked."""
    site = mesh.sites["submitter"]
    mesh.feed(site, ev.Submit(request_id, the_order))

    def entered() -> bool:
        return site.node is None or not any(job.asked for job in site.node.jobs.all.values())

    mesh.run(entered, ms_max=1_000)


def job_of(mesh: Mesh) -> Job:
    node = mesh.sites["submitter"].node
    assert node is not None
    return next(iter(node.jobs.all.values()))


def ended(mesh: Mesh) -> bool:
    node = mesh.sites["submitter"].node
    return node is not None and all(
        job.state is not JobState.RUNNING for job in node.jobs.all.values()
    )


def units_on_disk(site: Site) -> dict[int, bytes]:
    units: dict[int, bytes] = {}
    for record in site.disk.results:
        for index in range(record.count):
            unit = record.first + index
            assert unit not in units, "a unit was stored twice"
            units[unit] = record.outputs[64 * index : 64 * index + 64]
    return units


def receipts(site: Site) -> list[Receipt]:
    return [
        unseal(o.sealed).open(Receipt, T_RECEIPT) for o in site.disk.signed if o.typ == T_RECEIPT
    ]


def accepted_units(site: Site) -> list[int]:
    """Units that the acceptances on disk accept, with repetition."""
    vouchers = [
        unseal(o.sealed).open(Acceptance, T_ACCEPT) for o in site.disk.signed if o.typ == T_ACCEPT
    ]
    reach = {v.channel: max(w.seq for w in vouchers if w.channel == v.channel) for v in vouchers}
    refused = {
        (v.channel, d.seq, unit)
        for v in vouchers
        for d in v.disputes or ()
        for run in d.units
        for unit in range(run.first, run.first + run.size)
    }
    return [
        unit
        for r in receipts(site)
        if r.seq <= reach.get(r.channel, -1)
        for unit in range(r.work.units.first, r.work.units.first + r.work.units.size)
        if (r.channel, r.seq, unit) not in refused
    ]


def assert_whole(mesh: Mesh, units: int) -> None:
    site = mesh.sites["submitter"]
    stored = units_on_disk(site)
    assert stored == {unit: output_of(unit) for unit in range(units)}
    once = accepted_units(site)
    assert len(once) == len(set(once)), "a unit was accepted twice"


@pytest.mark.parametrize("seed", range(5))
def test_a_job_comes_back_whole_and_every_unit_is_accepted(seed: int) -> None:
    mesh = mesh_of(3, seed)
    submit(mesh, order(200))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    mesh.rest(2_000)
    assert_whole(mesh, 200)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(200))
    assert len({r.provider for r in receipts(mesh.sites["submitter"])}) == 3


def test_inline_inputs_reach_the_worker() -> None:
    mesh = mesh_of(1, 1)
    inline = ev.JobOrder(
        "bench.noop@1", ARTIFACT, (ArgSource(True, F16, None),), (F16,), 4, bytes(16), bytes(256)
    )
    submit(mesh, inline)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE


@pytest.mark.parametrize("seed", range(3))
def test_gossip_only_places_by_announcement(seed: int) -> None:
    mesh = mesh_of(4, seed)
    submit(mesh, order(60, policy="gossip"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 60)
    counters = [site.node.counters["bids"] for site in mesh.sites.values() if site.node]
    assert sum(counters) >= 2


@pytest.mark.parametrize("seed", range(20))
def test_a_car_that_dies_loses_no_unit(seed: int) -> None:
    mesh = mesh_of(3, seed)
    submit(mesh, order(300))
    assert mesh.run(lambda: job_of(mesh).stored >= 100)
    victim = next(iter(job_of(mesh).tasks[t].live for t in sorted(job_of(mesh).live)))
    assert victim is not None
    mesh.crash(mesh.by_peer[victim.peer].name)
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 300)
    again = [past for past in job_of(mesh).history if past.attempt.number > 0]
    assert again
    assert all(past.attempt.peer != victim.peer for past in again)


@pytest.mark.parametrize("seed", range(20))
def test_a_submitter_that_dies_and_comes_back_loses_no_unit_and_accepts_none_twice(
    seed: int,
) -> None:
    mesh = mesh_of(3, seed)
    submit(mesh, order(300))
    stop_at = 10 + 13 * seed
    assert mesh.run(lambda: job_of(mesh).stored >= stop_at)
    mesh.crash("submitter")
    mesh.rest(50 + 200 * seed)
    mesh.boot("submitter")
    mesh.connect_all()
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    assert job_of(mesh).state is JobState.DONE
    assert_whole(mesh, 300)
    once = accepted_units(mesh.sites["submitter"])
    assert sorted(once) == list(range(300)), "every car lives, so all work is accepted"


@pytest.mark.parametrize("seed", [*range(20), 124, 146, 177, 202, 206])
def test_links_that_break_and_heal(seed: int) -> None:
    mesh = mesh_of(3, seed)
    submit(mesh, order(400))

    def shake() -> None:
        if ended(mesh):
            return
        name = f"car-{mesh.rng.randrange(3)}"
        mesh.cut("submitter", name)
        mesh.at(mesh.rng.randint(5, 400), lambda: mesh.connect("submitter", name))
        mesh.at(mesh.rng.randint(20, 200), shake)

    mesh.at(20, shake)
    assert mesh.run(lambda: ended(mesh))
    mesh.connect_all()
    mesh.rest(5_000)
    assert_whole(mesh, 400)
    once = accepted_units(mesh.sites["submitter"])
    assert sorted(once) == list(range(400)), "what came back is accepted in the end"


@pytest.mark.parametrize("seed", range(10))
def test_parts_that_find_their_queue_full_are_sent_again(seed: int) -> None:
    mesh = mesh_of(2, seed)
    mesh.queue_full = 0.3
    submit(mesh, order(200))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 200)
    again = [past for past in job_of(mesh).history if past.attempt.number]
    assert all(past.attempt.late for past in again), "a late run is hedged, none is lost"


@pytest.mark.parametrize("seed", range(10))
def test_receipts_that_find_their_queue_full_are_sent_again(seed: int) -> None:
    mesh = mesh_of(2, seed)
    mesh.queue_full, mesh.full_lanes = 0.3, {Lane.RESULT, Lane.MONEY}
    submit(mesh, order(200))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(10_000)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(200))
    for site in mesh.sites.values():
        assert site.node is not None
        assert not any(c.open for c in site.node.provider.receipts.channels.values())


def test_recall_stops_the_car_and_the_work_goes_elsewhere() -> None:
    mesh = mesh_of(2, 5)
    submit(mesh, order(200))
    assert mesh.run(lambda: job_of(mesh).stored >= 40)
    car = mesh.sites["car-0"]
    mesh.feed(car, ev.Recall(Reason.DRIVING, 0))
    assert car.node is not None
    assert not car.node.provider.leases, "every lease has ended at once"
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 200)


def test_a_kernel_that_fails_twice_fails_the_job() -> None:
    mesh = mesh_of(3, 2)
    mesh.fail_kernel = True
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.FAILED_BY_JOB)


def test_a_run_that_always_fails_backs_off_and_gives_up() -> None:
    mesh = mesh_of(2, 2)
    mesh.fail_kernel, mesh.fail_reason = True, Reason.BLOB_MISSING
    submit(mesh, order(4))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.BLOB_MISSING)
    assert len(job_of(mesh).history) <= 4 * mesh.limits.attempts_max
    assert mesh.now_ms > 4 * mesh.limits.backoff_ms, "it did not spin"


def test_a_car_whose_disk_is_full_is_not_asked_again() -> None:
    mesh = mesh_of(2, 2)
    mesh.fail_kernel, mesh.fail_reason = True, Reason.DISK_FULL
    submit(mesh, order(40, lease_units_max=1))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).reason is Reason.DISK_FULL
    tried = Counter(past.attempt.peer for past in job_of(mesh).history)
    room = 1 + mesh.limits.leases_queued_per_slot_max
    assert all(count <= room for count in tried.values()), "what it had, and no more"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["car-0", "submitter"])
def test_a_full_disk_leaves_no_hole_in_a_chain(seed: int, name: str) -> None:
    """What could not be stored was not sent, and comes first once there is room."""
    mesh = mesh_of(2, seed)
    disk = mesh.sites[name].disk
    submit(mesh, order(200, durable=False))
    assert mesh.run(lambda: job_of(mesh).stored >= 20 + seed)
    disk.full = True
    assert mesh.run(lambda: ended(mesh))
    mesh.cut("submitter", "car-0")
    mesh.connect_all()
    mesh.rest(500)
    disk.full = False
    mesh.rest(3_000)
    mesh.crash(name)
    mesh.boot(name)
    mesh.connect_all()
    submit(mesh, order(200, nonce=1))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    for site in mesh.sites.values():
        assert check_objects(site.disk.signed).findings == (), site.name
        assert len(accepted_units(mesh.sites["submitter"])) == 400


def test_a_failed_job_is_said_even_if_that_cannot_be_stored() -> None:
    mesh = mesh_of(2, 3)
    submit(mesh, order(200))
    assert mesh.run(lambda: job_of(mesh).stored >= 20)
    mesh.sites["submitter"].disk.full = True
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(100)
    said = [dict(n.fields) for _, n in mesh.sites["submitter"].notices if n.kind == "job"]
    assert (said[-1]["state"], said[-1]["reason"]) == ("failed", int(Reason.DISK_FULL))


def test_nobody_there_says_so() -> None:
    mesh = mesh_of(0, 2)
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.NOBODY)


def test_who_meets_nobody_is_told_why() -> None:
    for event, reason in (
        (ev.DialFailed(Peer(bytes(38)), Reason.UNREACHABLE), Reason.UNREACHABLE),
        (None, Reason.OTHER_NETWORK),
    ):
        mesh = Mesh(3)
        site = mesh.add("submitter", REQUEST)
        mesh.add("car-0", PROVIDE, network=NetworkId(b"othernet"))
        if event is None:
            mesh.connect_all()
        else:
            mesh.feed(site, event)
        submit(mesh, order(20))
        assert mesh.run(lambda mesh=mesh: ended(mesh))  # type: ignore[misc]
        assert job_of(mesh).reason is reason


def test_another_network_is_refused() -> None:
    mesh = Mesh(3)
    mesh.add("submitter", REQUEST)
    mesh.add("car-0", PROVIDE, network=NetworkId(b"othernet"))
    mesh.connect_all()
    mesh.rest(1_000)
    assert not mesh.sites["submitter"].links
    said = [n.kind for site in mesh.sites.values() for _, n in site.notices]
    assert "other_network" in said


def test_cancel_stops_the_cars() -> None:
    mesh = mesh_of(2, 9)
    submit(mesh, order(400))
    assert mesh.run(lambda: job_of(mesh).stored >= 40)
    mesh.feed(mesh.sites["submitter"], ev.Cancel(job_of(mesh).job_id))
    mesh.rest(1_000)
    assert job_of(mesh).state is JobState.CANCELLED
    for name in ("car-0", "car-1"):
        node = mesh.sites[name].node
        assert node is not None
        assert not node.provider.leases


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace() -> list[str]:
        mesh = mesh_of(3, 42)
        submit(mesh, order(100))
        assert mesh.run(lambda: ended(mesh))
        return mesh.trace

    assert trace() == trace()


@pytest.mark.parametrize("seed", range(3))
def test_no_offer_is_refused_to_the_only_requester(seed: int) -> None:
    mesh = mesh_of(2, seed)
    submit(mesh, order(200, lease_units_max=1))
    assert mesh.run(lambda: ended(mesh))
    assert not job_of(mesh).refusals


def test_a_long_lease_is_receipted_while_it_runs() -> None:
    mesh = mesh_of(1, 3)
    mesh.unit_ms = 200
    submit(mesh, order(64, unit_ms_hint=200, lease_units_max=64))
    assert mesh.run(lambda: job_of(mesh).stored >= 40)
    (past,) = [p for p in job_of(mesh).history if p.attempt.live][:1]
    mesh.crash(mesh.by_peer[past.attempt.peer].name)
    mesh.rest(1_000)
    signed = len(accepted_units(mesh.sites["submitter"]))
    late = (mesh.limits.receipt_interval_ms + mesh.limits.receipt_delay_ms) // mesh.unit_ms
    assert signed >= job_of(mesh).stored - late - 8


@pytest.mark.parametrize("known", ["at admission", "by the run"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_receipt_states_no_cost_that_was_not_counted(known: str, counted: bool) -> None:
    mesh = mesh_of(1, 4)
    if known == "at admission":
        mesh.counted = counted
    else:
        mesh.kflop_per_unit, mesh.run_kflop, mesh.run_counted = 0, 7, counted
    submit(mesh, order(100))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    stated = {r.meters.kflop / r.work.units.size for r in receipts(mesh.sites["submitter"])}
    assert stated == {7.0 if counted else 0.0}


def test_results_are_stored_before_they_are_accepted() -> None:
    mesh = mesh_of(2, 4)
    submit(mesh, order(100))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    site = mesh.sites["submitter"]
    stored = {u for r in site.disk.results for u in range(r.first, r.first + r.count)}
    assert set(accepted_units(site)) <= stored


def test_a_unit_is_timed_without_its_wait_in_the_queue() -> None:
    mesh = mesh_of(1, 4)
    mesh.unit_ms = 8
    submit(mesh, order(60, lease_units_max=1))
    assert mesh.run(lambda: ended(mesh))
    assert 8 <= job_of(mesh).unit_ms <= 12


@pytest.mark.parametrize("policy", ["adverts", "gossip"])
def test_a_job_runs_on_its_owners_cars_only(policy: str) -> None:
    mesh = mesh_of(4, 6)
    nodes = {name: site.node for name, site in mesh.sites.items()}
    mine, named = nodes["car-1"], nodes["car-2"]
    assert mine is not None and named is not None
    owners, cars = (mine.identity.account,), (named.identity.peer,)
    submit(mesh, order(200, policy=policy, owners=owners, cars=cars))
    assert mesh.run(lambda: ended(mesh))
    assert_whole(mesh, 200)
    ran = {past.attempt.peer for past in job_of(mesh).history}
    assert ran <= {mine.identity.peer, named.identity.peer} and mine.identity.peer in ran


def test_a_job_for_nobodys_cars_says_so() -> None:
    mesh = mesh_of(2, 6)
    submit(mesh, order(20, owners=(Account(b"\x07" * 32),)))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.NOBODY)
    assert not job_of(mesh).history


def said_of_ends(mesh: Mesh) -> set[str]:
    return {text for text in re.findall(r"'text', '([^']+)'", "\n".join(mesh.trace))}


def test_a_run_that_the_battery_does_not_cover_is_refused_with_the_figures() -> None:
    mesh = mesh_of(1, 3)
    mesh.kflop_per_unit = 10**9  # 5 s at the most that the device can do
    car = mesh.sites["car-0"]
    mesh.feed(car, ev.BudgetRead(True, Reason.OK, 100, 300, 7_200, 0))
    submit(mesh, order(1))
    assert mesh.run(lambda: ended(mesh))
    assert (job_of(mesh).state, job_of(mesh).reason) == (JobState.FAILED, Reason.BUDGET)
    text = "one unit takes 5 s, at 200 GFLOP/s and 300 W: 0.417 Wh; 0.1 Wh may be spent"
    assert said_of_ends(mesh) == {text}
    assert not any("StartExec" in line for line in mesh.trace), "nothing was computed"
    # The car learned it from the first run's admission; the second it refused by itself.
    assert {past.attempt.lease_id is None for past in job_of(mesh).history} == {True, False}


def test_a_run_longer_than_the_car_stays_is_refused_with_the_figures() -> None:
    mesh = mesh_of(1, 3)
    mesh.kflop_per_unit = 10**9
    mesh.feed(mesh.sites["car-0"], ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 4, 0))
    submit(mesh, order(1))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).reason is Reason.LEASE_LENGTH
    assert said_of_ends(mesh) == {"one unit takes 5 s, at 200 GFLOP/s; 4 s are allowed"}


def test_a_budget_that_shrinks_by_the_minute_is_no_news_to_the_cell() -> None:
    """A forecast changes as time goes by; an advert says it in steps, and goes out for a step."""

    def adverts() -> int:
        return sum(" car-0 Publish" in line for line in mesh.trace)

    mesh = mesh_of(1, 3)
    mesh.rest(mesh.limits.advert_gap_ms + 1_000)
    before = adverts()
    for lease_s in range(7_140, 3_600, -60):
        whole = ev.BudgetRead(True, Reason.OK, 5_000_000, 300, lease_s, 0, lease_s)
        mesh.feed(mesh.sites["car-0"], whole)
    mesh.rest(mesh.limits.advert_gap_ms + 1_000)
    assert adverts() <= before + 1  # from two hours to one: once
    before = adverts()
    mesh.feed(mesh.sites["car-0"], ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 3_540, 0, 3_540))
    mesh.rest(mesh.limits.advert_gap_ms + 1_000)
    assert adverts() == before + 1


def test_a_run_too_long_for_a_car_goes_out_in_shorter_ones() -> None:
    mesh = mesh_of(2, 3)
    mesh.kflop_per_unit = 2 * 10**8  # a second, and most of a lease is 3 s at the one car
    mesh.feed(mesh.sites["car-0"], ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 3, 0))
    submit(mesh, order(200))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 200)
    peer = mesh.sites["car-0"].identity.peer
    done = [p.attempt for p in job_of(mesh).history if p.attempt.peer == peer]
    assert 1 < max(a.count for a in done if a.next_unit > a.first) <= 3


@pytest.mark.parametrize("renewed", [True, False])
def test_a_mesh_outlives_its_mandates_if_they_are_renewed(renewed: bool) -> None:
    mesh = mesh_of(2, 9)
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(1_000)
    mesh.skip(5 * DAY_MS)
    if renewed:
        for name in mesh.sites:
            mesh.renew(name, 5 * DAY_MS)
    mesh.skip(2 * DAY_MS)
    mesh.rest(5_000)
    mesh.feed(mesh.sites["submitter"], ev.Submit(2, order(20, nonce=1)))
    assert mesh.run(lambda: ended(mesh))
    node = mesh.sites["submitter"].node
    assert node is not None
    first, second = node.jobs.all.values()
    assert first.state is JobState.DONE
    assert second.state is (JobState.DONE if renewed else JobState.FAILED)
    if not renewed:
        assert second.reason is Reason.EXPIRED
    for site in mesh.sites.values():
        assert check_objects(site.disk.signed).findings == (), site.name


def test_a_receipt_before_its_units_waits_for_them() -> None:
    """Lanes have their own queues, and who has crashed asks for the units once more."""
    mesh = mesh_of(1, 1)
    car, submitter = mesh.sites["car-0"], mesh.sites["submitter"]

    def late(effect: fx.Send) -> list[fx.Send]:
        if kind_of(effect.frame) != "part":
            return [effect]
        life = car.life
        mesh.at(3_000, lambda: mesh.send_late(car, submitter, effect, life))
        return []

    car.lie = late
    submit(mesh, order(6))
    assert mesh.run(lambda: bool(submitter.node and submitter.node.acceptances._early))
    assert job_of(mesh).taken == 0
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(15_000)
    assert_whole(mesh, 6)
    assert sorted(accepted_units(submitter)) == list(range(6))


@pytest.mark.parametrize("policy", ["adverts", "gossip", "tokens"])
def test_a_job_that_waits_for_minutes_looks_less_often(policy: str) -> None:
    mesh = mesh_of(2, 1)
    mesh.unit_us = lambda effect: 200_000_000  # type: ignore[method-assign]
    submit(mesh, order(6, policy=policy, lease_units_max=1, wall_ms_max=300_000))
    mesh.rest(5_000)
    submit(mesh, order(1, nonce=1, policy=policy, wall_ms_max=300_000), 2)
    mesh.rest(30_000)
    looks = 0
    feed = mesh.feed

    def counted(site: Site, event: ev.Event) -> None:
        nonlocal looks
        looks += site.name == "submitter" and isinstance(event, ev.Tick)
        feed(site, event)

    mesh.feed = counted  # type: ignore[method-assign]
    mesh.rest(30_000)
    assert looks < 150, "twenty a second would be 600"
    assert mesh.run(lambda: ended(mesh), ms_max=900_000)
