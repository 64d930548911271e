"""The jobs of this requester: in work and lately ended, by id, task and announcement.

Also what is said of them (to clients, logs and pages) and how they come back after a restart.
Decides nothing about placement; `requester` does.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice

from ..errors import MeshError
from .attempt import Attempt, Step
from .codec import decode
from .effects import JobRecord, TaskRecord
from .events import JobOrder
from .job import Job, JobState, Past, Task, spec_bytes
from .objects import JobSpec
from .order import order_note, order_of
from .outbox import Outbox, Restored, RestoredResult
from .reasons import Reason
from .rule import decode_map
from .types import Digest, JobId, LeaseId, Peer, TaskId

UNITS_HELD_MAX = 1 << 24  # of all jobs together: 37 bytes of tables each, so 620 MB
ENDED_JOBS_MAX = 256  # ended jobs kept for late receipts and `mesh show`


class Jobs:
    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox
        self.all: dict[JobId, Job] = {}
        self.running: dict[JobId, Job] = {}
        self.by_task: dict[TaskId, Job] = {}
        self.by_lease: dict[LeaseId, Attempt] = {}  # also of runs that were given up
        self.announced: dict[bytes, Job] = {}
        self._units_held = 0  # of all jobs in `all`

    def record(self, job: Job) -> JobRecord:
        return JobRecord(
            job.digest, spec_bytes(job.spec), order_note(job.order), job.state, job.reason
        )

    def task_record(self, job: Job, attempt: Attempt) -> TaskRecord:
        """The task of its newest attempt, and where the next one goes on."""
        task = job.tasks[attempt.task_id]
        return TaskRecord(
            job.digest,
            task.first,
            task.count,
            attempt.number,
            attempt.peer,
            attempt.first,
            attempt.count,
            task.state,
            task.step,
        )

    def end(self, job: Job, state: JobState, reason: Reason) -> None:
        job.state, job.reason = state, reason
        job.retry.clear()
        self.announced.pop(job.waiting.announce_id, None)
        self.running.pop(job.job_id, None)
        excess = len(self.all) - ENDED_JOBS_MAX
        if excess > 0:
            for old in list(islice(self.all.values(), excess)):
                if old.state is not JobState.RUNNING:
                    self.drop(old)

    def cut(self, job: Job, units: int) -> Task:
        """The next `units` fresh units of the job as a task."""
        task = job.cut(units)
        self.by_task[task.task_id] = job
        return task

    def room_for(self, units: int) -> bool:
        """Ended jobs make room, the oldest first."""
        if self._units_held + units > UNITS_HELD_MAX:
            for old in list(self.all.values()):
                if self._units_held + units <= UNITS_HELD_MAX:
                    break
                if old.state is not JobState.RUNNING:
                    self.drop(old)
        return self._units_held + units <= UNITS_HELD_MAX

    def bind(self, attempt: Attempt, lease_id: LeaseId) -> bool:
        """The lease carries the attempt, and no other does; False if the id is another car's."""
        known = self.by_lease.get(lease_id)
        if known is not None and known is not attempt:
            return False
        if attempt.lease_id is not None:
            self.by_lease.pop(attempt.lease_id, None)
        attempt.lease_id = lease_id
        self.by_lease[lease_id] = attempt
        return True

    def enter(self, spec: JobSpec, job_digest: Digest, order: JobOrder) -> Job:
        now = self._out.now.mono_ms
        deadline = now + (order.deadline_ms or self._out.limits.job_deadline_ms)
        job = Job(JobId(job_digest[:16]), job_digest, spec, order, now, deadline)
        job.last_sign_mono_ms = job.moved_mono_ms = now
        self.all[job.job_id] = job
        self._units_held += spec.units
        self.running[job.job_id] = job
        return job

    def drop(self, job: Job) -> None:
        del self.all[job.job_id]
        self._units_held -= job.spec.units
        for task_id in job.tasks:
            self.by_task.pop(task_id, None)
        for attempt in job.attempts.values():
            if attempt.lease_id is not None:
                self.by_lease.pop(attempt.lease_id, None)

    def refuse(self, request_id: int, reason: Reason, text: str) -> None:
        self._out.notify(b"", "refused", request_id=request_id, reason=int(reason), text=text)

    def say(self, job: Job) -> None:
        self._out.notify(
            job.job_id,
            "job",
            state=job.state.name.lower(),
            reason=int(job.reason),
            units=job.spec.units,
            done=job.stored,
        )

    def note(self, job: Job, attempt: Attempt) -> None:
        self._out.notify(
            job.job_id,
            "attempt",
            task=attempt.task_id,
            attempt=attempt.number,
            peer=attempt.peer,
            state=attempt.state.value,
            reason=int(attempt.reason),
            first=attempt.first,
            count=attempt.count,
            done=attempt.next_unit - attempt.first,
            step=attempt.from_step,
        )

    def say_ended(self, job: Job, peer: Peer, reason: Reason, text: str) -> None:
        """How a run ended, or why it never began, in the car's own words."""
        self._out.notify(job.job_id, "ended", reason=int(reason), text=text, peer=peer)

    def live_at(self, peer: Peer) -> list[tuple[Job, Task, Attempt]]:
        found: list[tuple[Job, Task, Attempt]] = []
        for job in self.running.values():
            for task_id in sorted(job.live) if len(job.live) > 1 else job.live:
                task = job.tasks[task_id]
                found += [(job, task, one) for one in task.going if one.peer == peer]
        return found

    def restore(self, restored: Restored) -> None:
        """Jobs, tasks and results of before; what is missing waits to be tried again."""
        by_job: dict[Digest, Job] = {}
        runs: list[tuple[Job, Task, TaskRecord]] = []
        for record in restored.jobs:
            try:
                spec = decode_map(JobSpec, decode(record.spec), closed=True)
                order = order_of(spec, record.request)
            except MeshError:
                continue
            job = self.enter(spec, record.job_digest, order)
            job.state, job.reason = JobState(record.state), Reason.of(record.reason)
            by_job[record.job_digest] = job
        for entry in restored.tasks:
            found = by_job.get(entry.job_digest)
            if found is not None:
                task = found.task(entry.first, entry.count)
                task.attempt = entry.attempt
                task.state, task.step = entry.state, entry.step
                found.fresh = max(found.fresh, entry.first + entry.count)
                self.by_task[task.task_id] = found
                runs.append((found, task, entry))
        in_order = {
            job_digest: sorted(job.tasks.values(), key=lambda task: task.first)
            for job_digest, job in by_job.items()
        }
        for result in restored.results:
            found = by_job.get(result.job_digest)
            if found is not None:
                self._restore_result(found, in_order[result.job_digest], result)
        for job in by_job.values():
            for first, count in job.gaps(self._out.limits.lease_units_max):
                self.by_task[job.task(first, count).task_id] = job
            for task in job.tasks.values():
                while task.missing < task.end and job.source_of[task.missing]:
                    task.missing += 1
                if job.state is JobState.RUNNING and task.missing < task.end:
                    job.retry.append(task)
                else:
                    task.state = task.step = None  # it needs its checkpoint no more
            if job.state is not JobState.RUNNING:
                del self.running[job.job_id]
        for job, task, entry in runs:
            self._restore_attempt(job, task, entry)

    def _restore_attempt(self, job: Job, task: Task, entry: TaskRecord) -> None:
        """The newest attempt of before: nobody waits for it now, but its car may have gone on, and
        what it brings must have a place, or its receipt could not be checked."""
        if entry.peer is None:
            return
        attempt = Attempt(
            task.task_id,
            entry.attempt,
            entry.peer,
            entry.run_first,
            entry.run_count,
            job.add_source(task.task_id, entry.attempt, entry.peer),
            now_mono_ms=self._out.now.mono_ms,
            offer_timeout_ms=0,
        )
        attempt.next_unit = min(max(task.missing, attempt.first), attempt.end)
        if attempt.next_unit == attempt.end:
            attempt.step(Step.GRANTED)
            attempt.step(Step.RETURNED)
        else:
            attempt.step(Step.LOST)
            attempt.reason = Reason.LEASE_LOST
        job.attempts[task.task_id, entry.attempt] = attempt
        job.history.append(Past(attempt, task))

    def _restore_result(self, job: Job, tasks: list[Task], result: RestoredResult) -> None:
        at = bisect_right(tasks, result.first, key=lambda task: task.first) - 1
        known = at >= 0 and result.first < tasks[at].end
        task_id = tasks[at].task_id if known else TaskId(bytes(16))
        source = job.add_source(task_id, result.attempt, result.peer)
        for index in range(result.count):
            job.take(result.first + index, result.digests[32 * index : 32 * index + 32], source)
        job.stored += result.count
