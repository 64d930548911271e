"""Many jobs of one requester wait for few cars: how often they ask, and that each has its turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.protocol.announcing import AGAIN
from meshnode.protocol.job import JobState

from .test_mesh import ended, mesh_of, order, submit

JOBS = 40


@pytest.mark.parametrize("policy", ["adverts", "tokens"])
def test_waiting_jobs_ask_a_full_cell_no_more_often_than_one(policy: str) -> None:
    mesh = mesh_of(3, 1)
    mesh.unit_ms = 120_000
    submit(mesh, order(3, lease_units_max=1, policy=policy))
    mesh.rest(5_000)
    mesh.unit_ms = 1_000
    for number in range(JOBS):
        submit(mesh, order(1, nonce=number + 1, policy=policy), number + 2)
    node = mesh.sites["submitter"].node
    assert node is not None and len(node.jobs.running) == JOBS + 1
    mesh.rest(30_000)  # each has been in the line, and has asked once
    before = node.counters["announced"]
    mesh.rest(60_000)
    limits = node.requester._out.limits
    most = AGAIN * 60_000 // limits.announce_backoff_ms_max
    assert 0 < node.counters["announced"] - before <= most + AGAIN
    assert mesh.run(lambda: ended(mesh), ms_max=600_000)
    assert {job.state.name for job in node.jobs.all.values()} == {"DONE"}


@pytest.mark.parametrize("policy", ["gossip", "tokens"])
def test_jobs_that_nobody_can_take_now_hold_up_no_others(policy: str) -> None:
    """Ten jobs need the one car with much memory, which is busy for long; two small cars are free
    soon."""
    mesh = mesh_of(3, 1)
    mesh.rest(2_000)
    big = mesh.sites["car-0"]
    assert big.node is not None
    classes = big.node.provider.owner.classes
    assert classes is not None
    mesh.feed(big, replace(classes, classes=(replace(classes.classes[0], memory_mb=16_384),)))
    mesh.rest(3_000)
    mesh.unit_ms = 1_000_000
    submit(mesh, order(1, nonce=1, memory_mb_max=8_000), 1)
    mesh.rest(3_000)
    mesh.unit_ms = 60_000
    submit(mesh, order(6, nonce=2, lease_units_max=1), 2)
    mesh.rest(3_000)
    mesh.unit_ms = 1_000
    for number in range(10):
        submit(mesh, order(1, nonce=10 + number, policy=policy, memory_mb_max=8_000), 10 + number)
    submit(mesh, order(1, nonce=30, policy=policy), 30)
    node = mesh.sites["submitter"].node
    assert node is not None
    small = list(node.jobs.all.values())[-1]
    assert mesh.run(lambda: small.state is JobState.DONE, ms_max=260_000)
    assert sum(job.state is JobState.RUNNING for job in node.jobs.all.values()) >= 10


@pytest.mark.long
@pytest.mark.parametrize("policy", ["gossip", "tokens"])
def test_who_came_first_is_not_overtaken_by_all_that_come_later(policy: str) -> None:
    """A job comes every two seconds, and three cars end one in ten seconds each."""
    mesh = mesh_of(3, 2)
    mesh.unit_ms = 10_000
    for number in range(20):
        submit(mesh, order(1, nonce=number + 1, policy=policy), number + 1)
    node = mesh.sites["submitter"].node
    assert node is not None
    first = list(node.jobs.all.values())
    for number in range(400):
        submit(mesh, order(1, nonce=100 + number, policy=policy), 100 + number)
        mesh.rest(2_000)
        if not any(job.state is JobState.RUNNING for job in first):
            break
    assert {job.state for job in first} == {JobState.DONE}
