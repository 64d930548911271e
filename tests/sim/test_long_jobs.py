"""Long jobs among machines: checkpoints outlive their car, and nothing that was kept is done again.

The virtual worker does a step a millisecond and says its state every ten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol.effects import ArgSource, TaskRecord
from meshnode.protocol.job import JobState
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Stepped
from meshnode.protocol.view import JobView, look
from testnet.sim.mesh import ARTIFACT, Mesh, Site

from .test_mesh import F16, ended, job_of, mesh_of, submit

CODE = BlobRef(Digest(b"\x44" * 32), 2_000)
FOREIGN = Digest(b"\x55" * 32)


def long_order(*, units: int, steps: int, **more: Any) -> ev.JobOrder:
    ref = BlobRef(Digest(b"\x33" * 32), 64 * units)
    return ev.JobOrder(
        "md.lj@1",
        more.pop("artifact", ARTIFACT),
        (ArgSource(True, F16, ref),),
        (F16,),
        units,
        bytes(16),
        steps=steps,
        stepped=Stepped((0,), (0,)),
        **more,
    )


def notices(site: Site, kind: str) -> list[dict[str, Any]]:
    return [dict(notice.fields) for _, notice in site.notices if notice.kind == kind]


def stored_step(mesh: Mesh) -> int:
    return max((task.step or 0 for task in job_of(mesh).tasks.values()), default=0)


def test_a_long_job_shows_its_progress_and_ends() -> None:
    mesh = mesh_of(2, 1)
    submit(mesh, long_order(units=3, steps=100))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    assert {began[2] for began in mesh.began} == {0} and len(mesh.began) == 3
    for unit in range(3):
        seen = [w["step"] for w in notices(mesh.sites["submitter"], "watch") if w["unit"] == unit]
        assert seen == list(range(10, 101, 10))


def shown(mesh: Mesh) -> JobView:
    node = mesh.sites["submitter"].node
    assert node is not None
    (job,) = look(node, mesh.now()).jobs
    return job


def test_a_job_shows_what_is_kept_of_it_and_where_each_attempt_began() -> None:
    mesh = mesh_of(2, 1)
    submit(mesh, long_order(units=2, steps=400))
    assert shown(mesh).checkpoints == () and shown(mesh).steps == 400
    assert mesh.run(lambda: stored_step(mesh) >= 100)
    kept = {view.unit: view.step for view in shown(mesh).checkpoints}
    assert max(kept.values()) == stored_step(mesh) and kept.keys() <= {0, 1}
    mesh.crash(mesh.began[0][0])
    assert mesh.run(lambda: ended(mesh))
    job = shown(mesh)
    assert job.state == "done" and job.checkpoints == ()  # results are here, states are not kept
    began = {(view.first, view.from_step) for view in job.attempts}
    assert began == {(unit, step) for _, unit, step in mesh.began}
    assert any(step >= 100 for _, step in began)


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_car_costs_no_more_than_what_came_after_its_last_checkpoint(seed: int) -> None:
    mesh = mesh_of(2, seed)
    submit(mesh, long_order(units=1, steps=400))
    assert mesh.run(lambda: stored_step(mesh) >= 100)
    victim = mesh.began[0][0]
    at = stored_step(mesh)
    mesh.crash(victim)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    (_, _, zero), (heir, _, resumed) = mesh.began
    assert zero == 0 and heir != victim and resumed >= at
    attempts = notices(mesh.sites["submitter"], "attempt")
    leased = [a["step"] for a in attempts if a["state"] == "leased"]
    assert leased == [0, resumed]
    seen = [watch["step"] for watch in notices(mesh.sites["submitter"], "watch")]
    assert seen == sorted(set(seen)) and seen[-1] == 400  # nothing is shown twice


@pytest.mark.parametrize("seed", range(4))
def test_a_recalled_car_hands_its_newest_state_over(seed: int) -> None:
    mesh = mesh_of(2, seed)
    submit(mesh, long_order(units=1, steps=400))
    assert mesh.run(lambda: stored_step(mesh) >= 100)
    car = mesh.sites[mesh.began[0][0]]
    mesh.feed(car, ev.Recall(Reason.DRIVING, 2_000))
    (stop,) = [line for line in mesh.trace if "StopExec" in line]
    assert "grace_ms=2000" in stop
    # the executor's last word: where the slice in hand ended
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    assert mesh.began[0][2] == 0 and mesh.began[1][2] >= 100


def crash_with_a_checkpoint(mesh: Mesh) -> TaskRecord:
    """A long unit that has come to step 100 or more, and its submitter dead; what it had stored."""
    submit(mesh, long_order(units=1, steps=400))
    disk = mesh.sites["submitter"].disk
    assert mesh.run(lambda: any((task.step or 0) >= 100 for task in disk.tasks.values()))
    mesh.crash("submitter")
    (task,) = disk.tasks.values()
    return task


def back(mesh: Mesh) -> None:
    mesh.boot("submitter")
    mesh.connect_all()


@pytest.mark.parametrize("seed", range(8))
def test_a_submitter_that_comes_back_goes_on_from_the_checkpoint_that_it_had(seed: int) -> None:
    mesh = mesh_of(2, seed)
    task = crash_with_a_checkpoint(mesh)
    if seed % 2:
        mesh.crash(mesh.began[0][0])  # otherwise it computes on, for an attempt that is given up
    mesh.rest(seed)
    back(mesh)
    site = mesh.sites["submitter"]
    assert mesh.run(lambda: len(mesh.began) == 2)
    assert task.state is not None and task.step is not None
    assert mesh.began[1][1:] == (0, task.step)
    assert +site.pins == {task.state.blob_id: 1}
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE and len(mesh.began) == 2
    offered = [a for a in notices(site, "attempt") if a["attempt"] == task.attempt + 1]
    assert {a["step"] for a in offered} == {task.step}
    assert not any(site.pins.values()), "each state of an ended job is unpinned, once"


def test_a_checkpoint_whose_blob_is_gone_after_the_restart_is_not_offered() -> None:
    mesh = mesh_of(2, 4)
    task = crash_with_a_checkpoint(mesh)
    assert task.state is not None
    mesh.lost.add(task.state.blob_id)
    back(mesh)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    assert [step for _, _, step in mesh.began] == [0, 0]
    lost = [a for a in notices(mesh.sites["submitter"], "attempt") if a["reason"]]
    assert not [a for a in lost if a["reason"] == Reason.BLOB_MISSING], "no car was asked in vain"


def test_a_checkpoint_that_no_car_can_fetch_is_given_up_and_forgotten() -> None:
    mesh = mesh_of(2, 5)
    task = crash_with_a_checkpoint(mesh)
    assert task.state is not None
    back(mesh)
    site = mesh.sites["submitter"]
    assert mesh.run(lambda: stored_step(mesh) == task.step)
    mesh.lost.add(task.state.blob_id)
    assert mesh.run(lambda: len(mesh.began) == 2)
    lost = {a["attempt"]: a["reason"] for a in notices(site, "attempt") if a["state"] == "lost"}
    (missed,) = (number for number, reason in lost.items() if reason == Reason.BLOB_MISSING)
    assert missed > task.attempt and mesh.began[1][1:] == (0, 0)
    mesh.crash("submitter")
    (stored,) = site.disk.tasks.values()
    assert stored.attempt > missed and (stored.step or 0) < 100
    back(mesh)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE


def test_a_job_that_is_not_kept_stores_no_checkpoint() -> None:
    mesh = mesh_of(1, 6)
    submit(mesh, long_order(units=1, steps=100, durable=False))
    assert mesh.run(lambda: ended(mesh))
    assert notices(mesh.sites["submitter"], "checkpoint")
    assert not mesh.sites["submitter"].disk.tasks


def test_units_that_were_done_before_the_restart_take_no_state_back() -> None:
    """Of several long units some are done, some have a checkpoint, and the rest has not begun."""
    mesh = mesh_of(2, 7)
    submit(mesh, long_order(units=6, steps=100))
    site = mesh.sites["submitter"]
    assert mesh.run(lambda: job_of(mesh).stored >= 2 and len(mesh.began) == 4)
    mesh.rest(50)
    mesh.crash("submitter")
    steps = {task.first: task.step or 0 for task in site.disk.tasks.values()}
    done = {record.first for record in site.disk.results}
    assert done and any(step and unit not in done for unit, step in steps.items())
    before = len(mesh.began)
    back(mesh)
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    again = {unit: step for _, unit, step in mesh.began[before:]}
    assert not done & again.keys()
    assert {unit: step for unit, step in again.items() if step} == {
        unit: step for unit, step in steps.items() if step and unit in again
    }
    assert not any(site.pins.values())


def test_without_a_blob_the_next_attempt_begins_at_the_beginning() -> None:
    mesh = mesh_of(2, 3)
    mesh.no_blobs = True
    plain = long_order(units=1, steps=200)
    order = replace(plain, args=(ArgSource(True, F16, None),), inline=bytes(64))
    submit(mesh, order)
    assert mesh.run(lambda: len(mesh.began) == 1)
    mesh.rest(50)
    mesh.crash(mesh.began[0][0])
    assert mesh.run(lambda: ended(mesh), ms_max=300_000)
    assert job_of(mesh).state is JobState.DONE and mesh.began[1][2] == 0


def test_strangers_code_is_fetched_before_the_executor_is_asked() -> None:
    mesh = mesh_of(1, 1)
    submit(mesh, long_order(units=1, steps=20, artifact=FOREIGN, code=CODE))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
    steps = ("FetchBlob", "Admit", "StartExec")
    order = [word for line in mesh.trace for word in steps if f" car-0 {word}(" in line]
    assert order == ["FetchBlob", "FetchBlob", "Admit", "StartExec"]


def test_an_unknown_artifact_without_its_code_is_refused() -> None:
    mesh = mesh_of(1, 1)
    submit(mesh, long_order(units=1, steps=20, artifact=FOREIGN))
    assert mesh.run(lambda: ended(mesh))
    job = job_of(mesh)
    assert job.state is JobState.FAILED and job.reason is Reason.UNKNOWN_ARTIFACT


def test_strangers_code_is_announced_with_its_blob() -> None:
    mesh = mesh_of(2, 1)
    submit(mesh, long_order(units=1, steps=20, artifact=FOREIGN, code=CODE, policy="gossip"))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE
