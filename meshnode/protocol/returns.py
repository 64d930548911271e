"""What comes of a lease: parts, checkpoints, signs of life, and its end in the car's own words.

Part -> units, stored and told -> the job is done. What is missing at the end of a run goes out
again; late units of a run that was given up count if nobody brought them before.
"""

from __future__ import annotations

from collections.abc import Callable

from .attempt import Attempt, Step
from .attempts import Attempts
from .checkpoints import FETCH_MS_MAX, PARTING_MS, Checkpoints, Said
from .effects import ResultRecord
from .fleet import BLAMELESS, TOO_MUCH, UNSUITED, Fleet
from .hedging import Hedging
from .intake import Intake
from .job import Job, JobState, Task, watch_bytes
from .jobs import Jobs
from .messages import Checkpoint, Ended, Handoff, Heartbeat, Part, Watch
from .outbox import Outbox
from .reasons import Reason
from .shelf import Shelf
from .types import Peer


class Returns:
    """`pump` places what a job has missing, `finish` ends it."""

    def __init__(
        self,
        outbox: Outbox,
        jobs: Jobs,
        fleet: Fleet,
        shelf: Shelf,
        checkpoints: Checkpoints,
        attempts: Attempts,
        hedging: Hedging,
        pump: Callable[[Job], None],
        finish: Callable[[Job, JobState, Reason], None],
    ) -> None:
        self._out = outbox
        self._jobs = jobs
        self._fleet = fleet
        self._shelf = shelf
        self._checkpoints = checkpoints
        self._attempts = attempts
        self._hedging = hedging
        self._pump = pump
        self._finish = finish
        self._intake = Intake(outbox)

    def on_part(self, peer: Peer, part: Part) -> None:
        # Units of a run that was given up count as well, if nobody brought them before: they are
        # right, and its receipt, which comes after them, can be checked.
        found = self._attempts.leased(peer, part.lease_id, live=False)
        if found is None:
            return
        job, task, attempt = found
        attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms
        outputs = self._intake.take(job, attempt, part)
        if isinstance(outputs, Reason):
            if attempt.live:
                self._attempts.lose(job, attempt, outputs)
                self._pump(job)
            return
        whole = attempt.live and attempt.next_unit == attempt.end
        if not outputs and not whole:
            return
        if attempt.live:
            self._time(job, attempt)
        while task.missing < task.end and job.source_of[task.missing]:
            task.missing += 1
        job.last_sign_mono_ms = self._out.now.mono_ms
        if whole:
            # Its end is only said after this; the next run need not wait for that.
            attempt.step(Step.RETURNED)
            self._attempts.leave(job, attempt)
            self._jobs.note(job, attempt)
            self._hedging.returned(job, task, attempt)
            self._attempts.again(job, task)
        else:
            self._hedging.relieve(job, task, attempt)
        for first, taken in outputs:
            self._taken(job, attempt, first, taken)
        if not attempt.live:
            self._pump(job)

    def _time(self, job: Job, attempt: Attempt) -> None:
        done = attempt.next_unit - attempt.first
        spent = self._out.now.mono_ms - attempt.started_mono_ms
        if done > 0:
            measured = max(0.05, spent / done)
            job.unit_ms = measured if job.unit_ms == 0 else 0.7 * job.unit_ms + 0.3 * measured

    def _taken(self, job: Job, attempt: Attempt, first: int, outputs: list[bytes]) -> None:
        """New units, in order: to the client, and to the store if the job is durable."""
        count = len(outputs)
        whole = b"".join(outputs)

        def stored() -> None:
            job.stored += count
            self.progress(job)

        if job.order.durable:
            digests = bytes(job.digests[32 * first : 32 * (first + count)])
            record = ResultRecord(
                job.digest, first, count, attempt.number, attempt.peer, digests, whole
            )
            self._shelf.add(record, stored, lambda: self._attempts.disk_full(job))
            if job.taken == job.spec.units:
                self._shelf.flush()
        self._out.notify(
            job.job_id,
            "units",
            first=first,
            count=count,
            outputs=whole,
            peer=attempt.peer,
            attempt=attempt.number,
        )
        if not job.order.durable:
            stored()

    def progress(self, job: Job) -> None:
        if job.state is not JobState.RUNNING:
            return
        if job.stored == job.spec.units:
            self._finish(job, JobState.DONE, Reason.DONE)
        else:
            self._jobs.say(job)

    def on_ended(self, peer: Peer, ended: Ended) -> None:
        found = self._attempts.leased(peer, ended.lease_id)
        if found is None:
            return
        job, task, attempt = found
        if attempt.next_unit - attempt.first < ended.units_done <= attempt.count:
            return  # parts are missing; the car sends them, and this, again
        reason = ended.reason if ended.reason is not Reason.DONE else Reason.MISMATCH
        job.refusals[reason] += 1
        if reason in TOO_MUCH and self._fleet.halved(job, attempt, reason):
            task.failures = 0
        elif reason in UNSUITED:
            job.unsuited[peer] = reason
        elif reason in BLAMELESS:
            if attempt.next_unit == attempt.first:
                self._fleet.shun(peer, self._out.limits.backoff_ms)
        else:
            # Doubling, so that a run that cannot succeed here does not spin between two peers.
            task.failures = 1 if attempt.next_unit > attempt.first else task.failures + 1
            # Never so long that the job takes its own patience for an empty cell.
            longest_ms = self._out.limits.nobody_ms // 2
            self._fleet.shun(peer, min(self._out.limits.backoff_ms << task.failures, longest_ms))
        job.heard(peer, reason, ended.text or "")
        self._jobs.say_ended(job, peer, reason, ended.text or "")
        self._attempts.lose(job, attempt, reason)
        self._pump(job)

    def on_heartbeat(self, peer: Peer, beat: Heartbeat) -> None:
        found = self._attempts.leased(peer, beat.lease_id)
        if found is not None:
            job, _, attempt = found
            attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms
            job.last_sign_mono_ms = self._out.now.mono_ms

    def on_checkpoint(self, peer: Peer, checkpoint: Checkpoint) -> None:
        found = self._attempts.leased(peer, checkpoint.lease_id)
        if found is not None:
            job, task, attempt = found
            said = Said(peer, checkpoint.state, checkpoint.step, FETCH_MS_MAX)
            self._checkpoints.take(job, task, said)
            attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms

    def on_watch(self, peer: Peer, watch: Watch) -> None:
        """Only what is new: an attempt that goes on from a checkpoint repeats what came after."""
        found = self._attempts.leased(peer, watch.lease_id)
        steps = found[0].spec.steps if found is not None else None
        if found is None or steps is None:
            return
        job, task, attempt = found
        attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms
        if task.watched < watch.step <= steps.total and len(watch.values) == watch_bytes(job.spec):
            task.watched = watch.step
            self._out.notify(
                job.job_id,
                "watch",
                unit=task.first,
                step=watch.step,
                steps=steps.total,
                values=watch.values,
                peer=peer,
            )

    def on_state_here(self, fetch_id: int) -> None:
        self._state_ended(self._checkpoints.ended(fetch_id, here=True))

    def on_state_failed(self, fetch_id: int) -> None:
        self._state_ended(self._checkpoints.ended(fetch_id, here=False))

    def _state_ended(self, of: tuple[Job, Task] | None) -> None:
        """A task whose car has gone meanwhile was waiting for this."""
        if of is not None:
            job, task = of
            job.last_sign_mono_ms = max(job.last_sign_mono_ms, self._out.now.mono_ms)
            if task.live is None and self._attempts.again(job, task):
                self._pump(job)

    def on_handoff(self, peer: Peer, handoff: Handoff) -> None:
        """The car leaves: its checkpoint, if any, goes into the next offer of the task."""
        found = self._attempts.leased(peer, handoff.lease_id)
        if found is None:
            return
        job, task, attempt = found
        if handoff.state is not None and handoff.step is not None:
            said = Said(peer, handoff.state, handoff.step, PARTING_MS)
            self._checkpoints.take(job, task, said)
        self._fleet.leave_alone(peer, 10 * self._out.limits.backoff_ms)
        self._fleet.book.drop(peer)
        self._attempts.lose(job, attempt, handoff.reason)
        self._pump(job)
