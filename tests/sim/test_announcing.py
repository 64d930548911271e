"""Many jobs of one requester wait for few cars: how often they ask, and that each has its turn."""

from __future__ import annotations

import pytest

from meshnode.protocol.announcing import AGAIN

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
