"""A requester among cars that mean it no good: its chains, its disk, its jobs."""

from __future__ import annotations

from meshnode.protocol.agreement import UNUSED_MAX
from meshnode.protocol.node import Node
from meshnode.protocol.objects import (
    T_AGREEMENT,
    T_OFFER,
    T_RECEIPT,
    Agreement,
    Outcome,
    Span,
    Work,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest, JobId, LeaseId

from .mesh import ARTIFACT, PROVIDE, REQUEST, Mesh, Site
from .rogue import Rogue
from .test_mesh import job_of, order, submit


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
