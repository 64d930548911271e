"""A job's id is told when it is stored, and no car is asked before."""

from __future__ import annotations

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol.reasons import Reason
from testnet.sim.mesh import Mesh

from .test_mesh import ended, mesh_of, order

FRAMES = ("offer", "announce", "place")


def say(mesh: Mesh, the_order: ev.JobOrder) -> None:
    """Without waiting until it is stored."""
    mesh.feed(mesh.sites["submitter"], ev.Submit(1, the_order))


def told(mesh: Mesh, kind: str) -> list[dict[str, object]]:
    notices = mesh.sites["submitter"].notices
    return [dict(notice.fields) for _, notice in notices if notice.kind == kind]


def kinds(mesh: Mesh) -> list[str]:
    """Of what was told of jobs."""
    return [notice.kind for subject, notice in mesh.sites["submitter"].notices if subject]


@pytest.mark.parametrize("policy", ["adverts", "gossip", "tokens"])
def test_a_durable_job_is_told_once_it_is_stored_and_before_all_else(policy: str) -> None:
    mesh = mesh_of(2, 1)
    mesh.rest(2_000)  # so that cars are at hand
    say(mesh, order(20, policy=policy))
    assert not told(mesh, "submitted")
    disk = mesh.sites["submitter"].disk
    assert mesh.run(lambda: bool(told(mesh, "submitted")))
    assert disk.jobs
    assert mesh.run(lambda: ended(mesh))
    assert kinds(mesh)[:2] == ["submitted", "job"]


def test_who_dies_before_that_has_promised_nothing() -> None:
    mesh = mesh_of(2, 1)
    mesh.rest(2_000)
    before = len(mesh.trace)
    say(mesh, order(20))
    mesh.crash("submitter")
    mesh.boot("submitter")
    mesh.connect_all()
    mesh.rest(1_000)
    assert not told(mesh, "submitted")
    assert not any("T_OFFER" in line or "StartExec" in line for line in mesh.trace[before:])
    node = mesh.sites["submitter"].node
    assert node is not None
    assert not node.jobs.all


def test_a_full_disk_is_a_refusal_and_no_job() -> None:
    mesh = mesh_of(2, 1)
    mesh.rest(2_000)
    disk = mesh.sites["submitter"].disk
    disk.full = True
    say(mesh, order(20))
    mesh.feed(mesh.sites["submitter"], ev.Submit(2, order(20)))
    mesh.rest(1_000)
    assert [(said["request_id"], said["reason"]) for said in told(mesh, "refused")] == [
        (1, Reason.DISK_FULL),
        (2, Reason.DISK_FULL),
    ]
    assert not kinds(mesh)
    node = mesh.sites["submitter"].node
    assert node is not None
    assert not node.jobs.all
    assert not node.jobs.running
    disk.full = False
    say(mesh, order(20))
    assert mesh.run(lambda: ended(mesh) and bool(told(mesh, "submitted")))


def test_an_order_that_comes_twice_meanwhile_is_one_job_and_told_to_both() -> None:
    mesh = mesh_of(1, 1)
    say(mesh, order(20))
    mesh.feed(mesh.sites["submitter"], ev.Submit(2, order(20)))
    assert mesh.run(lambda: ended(mesh))
    assert [said["request_id"] for said in told(mesh, "submitted")] == [1, 2]


def test_a_call_is_told_at_once() -> None:
    mesh = mesh_of(1, 1)
    say(mesh, order(1, durable=False))
    assert told(mesh, "submitted")
