"""The attempts of a requester: how one begins, is found by what a car says, and ends.

Between `requester` and the job's own tables: whoever places a run begins an attempt here, and
whatever ends one comes through `leave`, so that job, fleet and dues always say the same.
"""

from __future__ import annotations

from collections.abc import Callable

from .attempt import Attempt, State, Step
from .checkpoints import SPOILT, Checkpoints
from .dues import Dues
from .fleet import Fleet
from .job import Job, JobState, Past, Task
from .jobs import Jobs
from .messages import CancelTask
from .outbox import Outbox
from .reasons import Reason
from .shelf import Shelf
from .types import Lane, LeaseId, Peer, TaskId

ATTEMPTS_MAX = 65_000  # the attempt's number has 16 bits on the wire
KERNEL_FAILURES_MAX = 2  # a kernel that fails on two cars fails by itself


class Attempts:
    """`fail` ends a job that cannot go on."""

    def __init__(
        self,
        outbox: Outbox,
        jobs: Jobs,
        fleet: Fleet,
        shelf: Shelf,
        checkpoints: Checkpoints,
        dues: Dues,
        fail: Callable[[Job, Reason], None],
    ) -> None:
        self._out = outbox
        self._jobs = jobs
        self._fleet = fleet
        self._shelf = shelf
        self._checkpoints = checkpoints
        self._dues = dues
        self._fail = fail

    def touch(self, job: Job) -> None:
        """Its due may be another now."""
        self._dues.touch(job)

    def begin(self, job: Job, task: Task, peer: Peer, count: int, timeout_ms: int) -> Attempt:
        attempt = Attempt(
            task.task_id,
            task.attempt,
            peer,
            task.missing,
            count,
            job.add_source(task.task_id, task.attempt, peer),
            now_mono_ms=self._out.now.mono_ms,
            offer_timeout_ms=timeout_ms,
        )
        self._dues.touch(job)
        job.moved_mono_ms = self._out.now.mono_ms
        attempt.from_step = task.step or 0
        if task.live is None:
            task.live = attempt
        else:
            task.hedge = attempt
        job.live.add(task.task_id)
        job.history.append(Past(attempt, task))
        job.attempts[task.task_id, task.attempt] = attempt
        return attempt

    def keep(self, job: Job, task: Task, attempt: Attempt) -> int | None:
        """The attempt's number, stored; what must wait for that, if anything must."""
        if not job.order.durable:
            return None
        # A first attempt needs no wait: after a crash the same task and number can only mean the
        # same run. A later number means another run, and must never be used twice.
        record = self._jobs.task_record(job, attempt)
        self._shelf.add(record, None, lambda: self.disk_full(job))
        return self._shelf.flush() if task.attempt else None

    def disk_full(self, job: Job) -> None:
        if job.state is JobState.RUNNING:
            self._fail(job, Reason.DISK_FULL)

    def find(self, peer: Peer, task_id: TaskId, number: int) -> tuple[Job, Task, Attempt] | None:
        job = self._jobs.by_task.get(task_id)
        task = job.tasks.get(task_id) if job else None
        if job is None or task is None:
            return None
        for attempt in task.going:
            if attempt.peer == peer and attempt.number == number:
                self._dues.touch(job)
                return job, task, attempt
        return None

    def leased(
        self, peer: Peer, lease_id: LeaseId, *, live: bool = True
    ) -> tuple[Job, Task, Attempt] | None:
        attempt = self._jobs.by_lease.get(lease_id)
        if attempt is None or attempt.peer != peer or (live and not attempt.live):
            return None
        job = self._jobs.by_task.get(attempt.task_id)
        if job is None:
            return None
        self._dues.touch(job)
        return job, job.tasks[attempt.task_id], attempt

    def leave(self, job: Job, attempt: Attempt) -> None:
        self._dues.touch(job)
        job.moved_mono_ms = self._out.now.mono_ms
        job.last_sign_mono_ms = max(job.last_sign_mono_ms, job.moved_mono_ms)
        task = job.tasks[attempt.task_id]
        if task.live is attempt:
            task.live, task.hedge = task.hedge, None  # which goes on by itself
        elif task.hedge is attempt:
            task.hedge = None
        if task.live is None:
            job.live.discard(task.task_id)
        attempt.frames = attempt.sends = ()
        if attempt.holder is None:
            self._fleet.release(attempt)
        else:
            job.placed.discard(task.task_id)
        spoilt = attempt.reason in SPOILT and task.step == attempt.from_step
        if attempt.state is State.RETURNED or spoilt:
            self._checkpoints.drop(task)

    def lose(self, job: Job, attempt: Attempt, reason: Reason, *, again: bool = True) -> None:
        """Whatever is missing goes out again, under the next number."""
        attempt.step(Step.LOST)
        attempt.reason = reason
        self.leave(job, attempt)
        self._jobs.note(job, attempt)
        task = job.tasks[attempt.task_id]
        if not again or job.state is not JobState.RUNNING:
            return
        if attempt.holder is None:
            job.heard(attempt.peer, reason)
        if task.missing >= task.end:
            return
        kernel_failed = reason is Reason.FAILED_BY_JOB
        most = KERNEL_FAILURES_MAX if kernel_failed else self._out.limits.attempts_max
        if task.failures >= most or task.attempt >= ATTEMPTS_MAX:
            self._fail(job, reason)
            return
        self.again(job, task)

    def stop(self, job: Job, attempt: Attempt, said: Reason, reason: Reason | None = None) -> None:
        """We need it no more; its car, or its rendezvous, is told `said`."""
        if attempt.peer in self._fleet.peers_up:
            cancel = CancelTask(attempt.task_id, attempt.number, said)
            self._out.send(attempt.peer, Lane.URGENT, cancel)
        self.lose(job, attempt, reason or said, again=False)

    def again(self, job: Job, task: Task) -> bool:
        """The task waits to be offered again, unless another attempt of it goes on, or its
        checkpoint is on its way here."""
        waits = job.state is not JobState.RUNNING or task.missing >= task.end
        if waits or task.live is not None or self._checkpoints.fetching(task) or task in job.retry:
            return False
        job.retry.append(task)
        return True

    def expiry(self, attempt: Attempt) -> int:
        if attempt.lost_since_mono_ms is None:
            return attempt.expires_mono_ms
        grace = attempt.lost_since_mono_ms + self._out.limits.silent_peer_grace_ms
        return min(attempt.expires_mono_ms, grace)
