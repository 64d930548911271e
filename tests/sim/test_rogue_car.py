"""A requester among cars that mean it no good: its chains, its disk, its jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.agreement import UNUSED_MAX
from meshnode.protocol.effects import ArgSource
from meshnode.protocol.fields import Span
from meshnode.protocol.node import Node
from meshnode.protocol.objects import (
    T_AGREEMENT,
    T_OFFER,
    T_RECEIPT,
    T_TOKEN,
    Agreement,
    Offer,
    Outcome,
    Token,
    Work,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, JobId, LeaseId
from testnet.sim.mesh import ARTIFACT, PROVIDE, REQUEST, Mesh, Site

from .rogue import Rogue
from .test_long_jobs import long_order
from .test_mesh import F16, job_of, order, submit


def submitter_and_rogue() -> tuple[Mesh, Site, Rogue]:
    mesh = Mesh(1)
    site = mesh.add("submitter", REQUEST)
    rogue = Rogue(mesh, "rogue", advertises=True)
    mesh.connect_all()
    mesh.rest(100)
    return mesh, site, rogue


def node_of(site: Site) -> Node:
    assert site.node is not None
    return site.node


def first_offer(mesh: Mesh, rogue: Rogue) -> None:
    assert mesh.run(lambda: bool(rogue.all_heard(T_OFFER)), ms_max=5_000)


def work_of(job_id: JobId, run: Span) -> Work:
    zeros = Digest(bytes(32))
    return Work(job_id, run, zeros, ARTIFACT, zeros, zeros, Outcome.DONE, 0, LeaseId(bytes(16)), 0)


def test_a_receipt_kept_as_proof_takes_no_place_in_the_chain_after_a_restart() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    signed = rogue.all_heard(T_AGREEMENT)[0]
    agreement = signed.open(Agreement, T_AGREEMENT)
    work = work_of(job_of(mesh).job_id, Span(0, 20))
    for number in range(20):
        rogue.say(
            site,
            rogue.receipt(signed.digest, agreement, work, previous=Digest(bytes([number]) * 32)),
        )
    mesh.rest(100)
    assert sum(o.typ == T_RECEIPT for o in site.disk.signed) == 1, "one proof is enough"
    mesh.crash("submitter")
    mesh.boot("submitter")
    assert node_of(site).acceptances.channels[signed.digest].next_seq == 0
    assert not any(job_of(mesh).accepted)


def test_a_receipt_for_no_units_is_disputed() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    signed = rogue.all_heard(T_AGREEMENT)[0]
    agreement = signed.open(Agreement, T_AGREEMENT)
    work = work_of(job_of(mesh).job_id, Span(0, 0))
    rogue.say(site, rogue.receipt(signed.digest, agreement, work))
    (pending,) = node_of(site).acceptances._pending.values()
    assert [d.reason for d in pending.disputes] == [Reason.MISMATCH]


def test_terms_that_nobody_asked_for_are_not_signed() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    before = len(rogue.all_heard(T_AGREEMENT))
    stored = sum("Persist(" in line for line in mesh.trace)
    for _ in range(10):
        rogue.say(site, rogue.terms())
    assert sum("Persist(" in line for line in mesh.trace) == stored
    mesh.rest(100)
    assert len(rogue.all_heard(T_AGREEMENT)) == before == 1


def test_a_car_speaks_only_for_itself() -> None:
    mesh, site, rogue = submitter_and_rogue()
    other = Rogue(mesh, "other")
    rogue.say(site, other.advert())
    assert other.peer not in node_of(site).book.cars
    assert rogue.peer in node_of(site).book.cars


def test_agreements_that_are_never_used_do_not_pile_up() -> None:
    mesh = Mesh(1)
    car = mesh.add("car", PROVIDE)
    rogue = Rogue(mesh, "rogue")
    mesh.connect_all()
    mesh.rest(100)
    kept = rogue.agree(car)
    rogue.say(car, rogue.offer(car, kept, rogue.job(4), Span(0, 4)))
    rogue.say(car, rogue.agreement(car, 1))
    assert len(node_of(car).agreements.by_channel) == 1, "its mandate is shown for each"
    for nonce in range(2, UNUSED_MAX + 20):
        rogue.agree(car, nonce)
    assert len(node_of(car).agreements.by_channel) == UNUSED_MAX + 1
    assert kept in node_of(car).agreements.by_channel


def test_a_car_that_takes_runs_and_gives_them_back_does_not_spin() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    answered, until = 0, mesh.now_ms + 5_000
    while mesh.now_ms < until:
        for offer in rogue.all_heard(T_OFFER)[answered:]:
            answered += 1
            lease_id = answered.to_bytes(16, "big")
            rogue.say(site, rogue.lease(offer, lease_id))
            rogue.say(site, messages.Ended(LeaseId(lease_id), Reason.STOPPED_BY_OWNER, 0, 0, 0))
            rogue.say(site, rogue.advert())
        mesh.rest(5)
    at_once = 2 * (1 + mesh.limits.leases_queued_per_slot_max)  # runs on its two slots
    assert 1 < answered <= at_once * (5_000 // mesh.limits.backoff_ms + 2)
    assert not any(a.frames for a in job_of(mesh).attempts.values() if not a.live)


def test_leases_for_a_run_that_was_given_up_do_not_pile_up() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    offer = rogue.all_heard(T_OFFER)[0]
    mesh.rest(mesh.limits.offer_timeout_ms + 100)
    for number in range(50):
        rogue.say(site, rogue.lease(offer, number.to_bytes(16, "big")))
    assert len(node_of(site).jobs.by_lease) == 1


def test_a_car_cannot_ask_for_more_silence_than_it_was_offered() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    rogue.say(site, rogue.lease(rogue.all_heard(T_OFFER)[0], lease_ms=3_600_000))
    (attempt,) = node_of(site).jobs.by_lease.values()
    assert attempt.expires_mono_ms == mesh.now_ms + mesh.limits.lease_ms


def states_offered(rogue: Rogue) -> list[BlobRef | None]:
    return [offer.open(Offer, T_OFFER).state for offer in rogue.all_heard(T_OFFER)]


@pytest.mark.parametrize(("step", "size"), [(1, 1 << 30), (0, 64), (40, 64), (41, 64)], ids=str)
def test_a_checkpoint_that_cannot_be_is_not_fetched(step: int, size: int) -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, long_order(units=1, steps=40, policy="adverts"))
    first_offer(mesh, rogue)
    lease = LeaseId(bytes(16))
    rogue.say(site, rogue.lease(rogue.all_heard(T_OFFER)[0], lease))
    rogue.say(site, messages.Checkpoint(lease, step, BlobRef(Digest(bytes(32)), size)))
    assert not any("FetchBlob" in line and " submitter " in line for line in mesh.trace)
    rogue.say(site, messages.Ended(lease, Reason.STOPPED_BY_OWNER, 0, 0, 0))
    mesh.rest(10_000)
    assert len(states_offered(rogue)) > 1 and not any(states_offered(rogue))


def test_a_checkpoint_of_a_plain_job_is_refused() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, order(20))
    first_offer(mesh, rogue)
    lease = LeaseId(bytes(16))
    rogue.say(site, rogue.lease(rogue.all_heard(T_OFFER)[0], lease))
    rogue.say(site, messages.Checkpoint(lease, 1, BlobRef(Digest(bytes(32)), 64)))
    rogue.say(site, messages.Watch(lease, 1, bytes(64)))
    assert node_of(site).counters["checkpoints_refused"] == 1
    assert not any(notice.kind == "watch" for _, notice in site.notices)


def test_a_state_on_which_the_kernel_fails_is_tried_once() -> None:
    mesh, site, rogue = submitter_and_rogue()
    submit(mesh, long_order(units=1, steps=40, policy="adverts"))
    first_offer(mesh, rogue)
    state = BlobRef(Digest(b"\x07" * 32), 64)
    for number, reason in enumerate((Reason.STOPPED_BY_OWNER, Reason.FAILED_BY_JOB)):
        lease = LeaseId(number.to_bytes(16, "big"))
        mesh.run(lambda n=number: len(rogue.all_heard(T_OFFER)) > n)  # type: ignore[misc]
        rogue.say(site, rogue.lease(rogue.all_heard(T_OFFER)[number], lease))
        if number == 0:
            rogue.say(site, messages.Checkpoint(lease, 10, state))
            mesh.rest(100)
        rogue.say(site, messages.Ended(lease, reason, 0, 0, 0))
        rogue.say(site, rogue.advert())
    mesh.run(lambda: len(rogue.all_heard(T_OFFER)) > 2)
    assert states_offered(rogue)[:3] == [None, state, None]


def test_one_bid_takes_one_run_however_often_it_is_said() -> None:
    mesh = Mesh(1)
    site = mesh.add("submitter", REQUEST)
    rogue = Rogue(mesh, "rogue")
    mesh.connect_all()
    mesh.rest(100)
    submit(mesh, order(400, policy="gossip"))
    (announce_id,) = node_of(site).jobs.announced
    token = rogue.seal(
        Token(
            1,
            rogue.identity.network,
            rogue.peer,
            1,
            "token",
            bytes(8),
            1,
            mesh.now().unix_ms + 30_000,
            0,
            60,
            1,
            announce_id,
            600,
        ),
        T_TOKEN,
    )
    for _ in range(20):
        rogue.say(site, token)
        mesh.rest(5)
    mesh.rest(100)
    assert len(rogue.all_heard(messages.Assign)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"units": 10**9, "args": ()},
        {"outs": ()},
        {"kernel": "k" * 1_000},
        {"args": (ArgSource(True, F16, None),), "units": 2_000, "inline": bytes(64 * 2_000)},
    ],
)
def test_an_order_that_cannot_be_carried_is_refused(change: dict[str, Any]) -> None:
    mesh, site, _ = submitter_and_rogue()
    mesh.feed(site, ev.Submit(1, replace(order(20), **change)))
    assert not node_of(site).jobs.all
    assert [n.kind for _, n in site.notices].count("refused") == 1
