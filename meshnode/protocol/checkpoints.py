"""Checkpoints of long jobs on the requester's side: fetched while their car is still there.

A car says `Checkpoint` at the end of a slice and `Handoff` when it leaves; the state is a blob that
only it has. The requester fetches it at once, so that a car that is killed takes at most a slice
with it, and offers it with the task's next attempt. A state is believed as results are: what it
holds shows when the unit is verified. Its size and place in the job are checked here.

Of a durable job the newest checkpoint is stored with its task, and after a restart the task goes on
from it, if the blob is still here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .effects import FetchBlob, Pin, Unpin
from .job import Job, JobState, Task, state_bytes
from .jobs import Jobs
from .outbox import Outbox
from .reasons import Reason
from .shelf import Shelf
from .types import BlobRef, Peer, TaskId

FETCH_MS_MAX: Final = 60_000  # of a checkpoint, from the car that runs
LATE_MS: Final = 5_000  # past its deadline a fetch that says nothing is taken for failed
PARTING_MS: Final = 10_000  # to fetch from a car that is leaving; the task waits for it
SPOILT: Final = frozenset(
    {
        Reason.FAILED_BY_JOB,
        Reason.KERNEL_SPEC,
        Reason.BLOB_MISSING,
        Reason.BLOB_CORRUPT,
        Reason.WORKER_DIED,
        Reason.WALL_CLOCK,
    }
)
"""Ends that a bad state can bring about: the next attempt begins at the beginning."""


class Said(NamedTuple):
    """A checkpoint that a car has told of, or that was here before a restart."""

    peer: Peer | None  # who has it; None: it must be here already
    state: BlobRef
    step: int
    patience_ms: int


class Fetch(NamedTuple):
    job: Job
    task: Task
    said: Said
    deadline_mono_ms: int


class Checkpoints:
    def __init__(self, outbox: Outbox, jobs: Jobs, shelf: Shelf) -> None:
        self._out = outbox
        self._jobs = jobs
        self._shelf = shelf
        self._fetches: dict[int, Fetch] = {}
        self._by_task: dict[TaskId, int] = {}
        self._newer: dict[TaskId, Said] = {}  # came while another was under way; the last counts

    def take(self, job: Job, task: Task, said: Said) -> None:
        steps = job.spec.steps
        if steps is None or said.state.size != state_bytes(job.spec):
            self._out.counters["checkpoints_refused"] += 1
        elif (task.step or 0) < said.step < steps.total:
            if task.task_id in self._by_task:
                self._newer[task.task_id] = said
            else:
                self._fetch(job, task, said)

    def restore(self, job: Job, task: Task) -> None:
        """After a restart: the task has its stored checkpoint back once its blob is found here.

        A fetch from nobody is the question whether it is here whole, with the bytes it had. Without
        it the unit begins at the beginning, and the next offer stores that it does.
        """
        state, step = task.state, task.step
        task.state = task.step = None
        if state is not None and step is not None:
            self.take(job, task, Said(None, state, step, FETCH_MS_MAX))

    def fetching(self, task: Task) -> bool:
        return task.task_id in self._by_task

    def _fetch(self, job: Job, task: Task, said: Said) -> None:
        fetch_id = self._out.mint()
        deadline = self._out.now.mono_ms + said.patience_ms
        self._fetches[fetch_id] = Fetch(job, task, said, deadline)
        self._by_task[task.task_id] = fetch_id
        holders = () if said.peer is None else (said.peer,)
        effect = FetchBlob(said.state, 0, said.state.size, holders, deadline, fetch_id)
        self._out.add(effect)

    def ended(self, fetch_id: int, *, here: bool) -> tuple[Job, Task] | None:
        """A fetch is over; the task it was for, None if it was for no task of ours."""
        fetch = self._fetches.pop(fetch_id, None)
        if fetch is None:
            return None
        job, task, said, _ = fetch
        del self._by_task[task.task_id]
        if job.state is JobState.RUNNING and task.missing < task.end:
            if here and said.step > (task.step or 0):
                self._keep(job, task, said)
            newer = self._newer.pop(task.task_id, None)
            if newer is not None and newer.step > (task.step or 0):
                self._fetch(job, task, newer)
        return job, task

    def holders(self) -> set[Peer]:
        """Cars that a checkpoint is being fetched from: after a hand-off nothing else is there."""
        said = (fetch.said.peer for fetch in self._fetches.values())
        return {peer for peer in said if peer is not None}

    def deadline(self) -> int | None:
        if not self._fetches:
            return None
        return min(fetch.deadline_mono_ms + LATE_MS for fetch in self._fetches.values())

    def late(self) -> list[int]:
        """Fetches that said nothing past their deadline: a task must not wait for ever."""
        now = self._out.now.mono_ms
        return [i for i, f in self._fetches.items() if f.deadline_mono_ms + LATE_MS <= now]

    def _keep(self, job: Job, task: Task, said: Said) -> None:
        self._out.add(Pin(said.state.blob_id))
        self.drop(task)
        task.state, task.step = said.state, said.step
        if said.peer is None:
            return  # nothing new
        if job.order.durable:
            record = self._jobs.task_record(job, job.attempts[task.task_id, task.attempt])
            self._shelf.add(record, None, self._unstored)
        self._out.notify(
            job.job_id, "checkpoint", task=task.task_id, step=said.step, peer=said.peer
        )

    def _unstored(self) -> None:
        """Only a restart would miss it. A full disk ends the job by what it cannot do without."""
        self._out.counters["checkpoints_unstored"] += 1

    def drop(self, task: Task) -> None:
        """The task needs its state no more, or cannot use it."""
        if task.state is not None:
            self._out.add(Unpin(task.state.blob_id))
        task.state = task.step = None

    def forget(self, job: Job) -> None:
        """The job has ended."""
        if job.spec.steps is not None:
            for task in job.tasks.values():
                self._newer.pop(task.task_id, None)
                self.drop(task)
