"""The requester role: jobs become tasks, tasks become attempts, units come back and are accepted.

Persist the job -> agree with cars -> offer runs (or announce and collect bids) -> lease -> parts
-> store units -> receipts checked against what arrived -> acceptance. A lost attempt goes out again
under the next number, from the first unit that is missing. Execution is at least once; a unit is
taken once and accepted once.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from .advert import AdvertBook
from .agreement import Agreements
from .announcing import Announcer
from .attempt import Attempt, State, Step
from .attempts import Attempts
from .bidding import Bidding
from .cell import Roster
from .checkpoints import Checkpoints
from .codec import digest
from .dues import Dues
from .events import SendFailed, Submit
from .fields import Span
from .fleet import TOO_MUCH, UNSUITED, Fleet
from .hedging import Hedging
from .job import (
    Job,
    JobState,
    Task,
    make_spec,
    spec_bytes,
)
from .jobs import UNITS_HELD_MAX, Jobs
from .messages import (
    CancelTask,
    Refuse,
)
from .objects import T_LEASE, Advert, JobSpec, Lease
from .offering import Offers
from .outbox import Outbox
from .pace import Pace
from .placement import GossipPlacement, Placement
from .placing import Placing
from .reasons import Reason
from .returns import Returns
from .sealed import Sealed
from .shelf import Shelf
from .types import (
    Durability,
    JobId,
    Lane,
    Peer,
)

MENDED_BY_ADVERT = TOO_MUCH | {Reason.NO_CONSENT, Reason.NO_WORKER, Reason.NOT_PROVIDING}
PUMP_MS = 50  # how often a job with unplaced work looks again, whatever else happens
PUMP_PART = 8  # and no more often than after this part of how long nothing has come of it
CAPPED_MS = 600_000  # an owner who gives our account no more today is asked again after so long
PUMP_MS_MAX = 4_000  # but so often however long that is
PUMP_FIRST = 8  # jobs that look for cars at each change, however long they have waited


class Requester:
    def __init__(
        self,
        outbox: Outbox,
        agreements: Agreements,
        book: AdvertBook,
        placement: Placement,
        jobs: Jobs,
        roster: Roster,
        reach: Callable[[Peer], None],
        beyond: Callable[[JobSpec, Sealed], None],
    ) -> None:
        self._out = outbox
        self.jobs = jobs
        self._announcer = Announcer(outbox, roster, jobs, beyond)
        self._agreements = agreements
        pace = Pace(outbox)
        self.fleet = Fleet(outbox, agreements, book, pace)
        self._placement = placement
        self._gossip = GossipPlacement()
        self.shelf = Shelf(outbox)
        self._checkpoints = Checkpoints(outbox, jobs, self.shelf)
        self._dues = Dues(self.due)
        self._attempts = Attempts(
            outbox, jobs, self.fleet, self.shelf, self._checkpoints, self._dues, self._fail
        )
        self._offers = Offers(outbox, agreements, jobs, self.fleet, self._attempts)
        self.placing = Placing(
            outbox,
            agreements,
            jobs,
            self.fleet,
            self.shelf,
            self._attempts,
            self._offers,
            roster,
            reach,
        )
        self.bidding = Bidding(
            outbox,
            agreements,
            jobs,
            self.fleet,
            self._attempts,
            self._offers,
            self.placing,
        )
        self.bidding.heard = self._announcer.heard
        self._hedging = Hedging(
            outbox, self.fleet, pace, self._attempts, self._offers, self.placing
        )
        self.returns = Returns(
            outbox,
            jobs,
            self.fleet,
            self.shelf,
            self._checkpoints,
            self._attempts,
            self._hedging,
            self.pump,
            self._finish,
        )

    # ---- jobs

    def submit(self, event: Submit) -> None:
        order = event.order
        identity = self._out.identity
        try:
            spec = make_spec(order, identity.network, identity.peer)
        except ValueError as error:
            self.jobs.refuse(event.request_id, Reason.KERNEL_SPEC, str(error))
            return
        if not self.jobs.room_for(spec.units):
            text = f"all jobs together may have {UNITS_HELD_MAX} units"
            self.jobs.refuse(event.request_id, Reason.TOO_LARGE, text)
            return
        if len(self.jobs.running) >= self._out.limits.jobs_max:
            self.jobs.refuse(event.request_id, Reason.BUSY, "too many jobs are in work")
            return
        wire = spec_bytes(spec)
        job_digest = digest(wire)
        job_id = JobId(job_digest[:16])
        known = self.jobs.all.get(job_id)
        if known is not None and known.asked:
            known.asked.append(event.request_id)
            return
        job = known or self.jobs.enter(spec, job_digest, order)
        job.asked.append(event.request_id)
        if known is not None or not order.durable:  # same order, same nonce: the same job
            self._entered(job)
            return
        self._dues.touch(job)
        record = self.jobs.record(job)
        self._out.persist(
            (record,),
            Durability.PROCESS,
            lambda: self._entered(job),
            lambda: self._not_entered(job),
        )

    def _entered(self, job: Job) -> None:
        """Its id is told, and cars are asked, once a crash would not lose it."""
        asked, job.asked = job.asked, []
        for request_id in asked:
            self._out.notify(job.job_id, "submitted", request_id=request_id)
        self.jobs.say(job)
        self.pump(job)

    def _not_entered(self, job: Job) -> None:
        for request_id in job.asked:
            self.jobs.refuse(request_id, Reason.DISK_FULL, "the job could not be stored")
        self.jobs.end(job, JobState.FAILED, Reason.DISK_FULL)
        self.jobs.drop(job)
        self._dues.touch(job)

    def cancel(self, job_id: JobId) -> None:
        job = self.jobs.running.get(job_id)
        if job is not None:
            self._finish(job, JobState.CANCELLED, Reason.CANCELLED)

    def _finish(self, job: Job, state: JobState, reason: Reason) -> None:
        self._dues.touch(job)
        for task_id in list(job.live):
            for attempt in job.tasks[task_id].going:
                self._attempts.stop(job, attempt, Reason.STOPPED_BY_REQUESTER, reason)
        self._checkpoints.forget(job)
        self.jobs.end(job, state, reason)
        if job.order.durable:
            record = self.jobs.record(job)
            self.shelf.flush()

            def said() -> None:
                self.jobs.say(job)

            # Also when the disk is full, which may be why it ended: somebody waits for it.
            self._out.persist((record,), Durability.PROCESS, said, said)
        else:
            self.jobs.say(job)

    def _fail(self, job: Job, reason: Reason) -> None:
        self._finish(job, JobState.FAILED, reason)

    # ---- placing

    def pump_all(self) -> None:
        """Something has changed that may let jobs go on. One that has waited for long looks in a
        moment by itself: where hundreds wait, each car that comes or goes would have all of them
        look at all cars. The first in the line look each time, or the young would overtake them."""
        now_ms = self._out.now.mono_ms
        since_ms = now_ms - PUMP_PART * PUMP_MS_MAX
        first = PUMP_FIRST
        for job in list(self.jobs.running.values()):
            if not job.to_place():
                continue
            first -= 1
            if first < 0 and job.moved_mono_ms <= since_ms and job.pump_mono_ms > now_ms:
                continue
            self.pump(job)

    def pump(self, job: Job) -> None:
        """Place as much of the job as the cars will take now."""
        self._dues.touch(job)
        job.drop_whole()
        if not job.to_place():
            return
        gossip = job.order.policy == "gossip"
        placement: Placement = self._gossip if gossip else self._placement
        # Where cars are scarce, jobs wait for minutes: 20 looks a second each were four fifths of
        # what a requester computed.
        now_ms = self._out.now.mono_ms
        waited_ms = now_ms - job.moved_mono_ms
        job.pump_mono_ms = now_ms + min(max(PUMP_MS, waited_ms // PUMP_PART), PUMP_MS_MAX)
        if self.placing.serves(job) and self.placing.place_all(job):
            return
        if not placement.announces() and not self._offers.tried_out(job):
            self._offers.offer_all(job, placement, self.fleet.cars(job))
        if job.to_place() and (placement.announces() or self._nobody_offers(job)):
            self._announcer.announce(job)
            if self._announcer.in_vain(job) and self._may_stand_in_line(job):
                self._announcer.back_in_line(job)

    def _may_stand_in_line(self, job: Job) -> bool:
        """It is one of the first of all that wait, and cars could run it that are busy now."""
        waiting = (other for other in self.jobs.running.values() if other.to_place())
        first = any(other is job for other in itertools.islice(waiting, PUMP_FIRST))
        return first and self.placing.serves(job) and self.fleet.could_run(job)

    def _nobody_offers(self, job: Job) -> bool:
        """Point-to-point has nothing more to give: no run is out, or a task has been tried out."""
        asking = any(self._agreements.asking(peer) for peer in self.fleet.peers_up)
        return self._offers.tried_out(job) or (not job.live and not asking)

    # ---- peers

    def peer_ready(self, peer: Peer) -> None:
        self.fleet.met(peer)
        for job, _, attempt in self.jobs.live_at(peer):
            self._dues.touch(job)
            # The car may have restarted and know nothing, or have finished and said it to nobody:
            # the same offer again makes it grant anew, or say again what it has.
            attempt.lost_since_mono_ms = None
            for frame in attempt.frames:
                self._out.send(peer, Lane.CONTROL, frame)
        self.pump_all()

    def peer_down(self, peer: Peer) -> None:
        self.fleet.peers_up.pop(peer, None)
        self.bidding.peer_down(peer)
        now = self._out.now.mono_ms
        for job, _, attempt in self.jobs.live_at(peer):
            self._dues.touch(job)
            if attempt.state is State.OFFERED:
                self._attempts.lose(job, attempt, Reason.PEER_DOWN)
            else:
                attempt.lost_since_mono_ms = now
                known = self.fleet.book.cars.get(peer)
                self.fleet.dial(peer, known.advert.addrs if known else ())
        self.pump_all()

    def dial_failed(self, peer: Peer) -> None:
        """Nobody answers at its address: what it held is lost now, not after the grace."""
        self.fleet.met_nobody(Reason.UNREACHABLE)
        self.fleet.leave_alone(peer, self._out.limits.backoff_ms)
        for job, _, attempt in self.jobs.live_at(peer):
            if attempt.lost_since_mono_ms is not None:
                self._attempts.lose(job, attempt, Reason.PEER_DOWN)
        if not self.fleet.mine[peer]:
            self.fleet.book.drop(peer)
        self.pump_all()

    def in_force(self, peer: Peer) -> None:
        """An agreement was signed: a bid that waited for it, then everything else."""
        self.bidding.in_force(peer)
        self.pump_all()

    def terms_refused(self, peer: Peer, reason: Reason) -> None:
        mends = reason is Reason.CLOCK_SKEW
        if mends:
            self.fleet.leave_alone(peer, self._out.limits.backoff_ms)
        for job in self.jobs.running.values():
            job.refusals[reason] += 1
            if not mends:
                job.unsuited[peer] = reason
            job.heard(peer, reason)
        self.pump_all()

    def advert_came(self, advert: Advert) -> None:
        if advert.slots_free > 0 and advert.budget.may_run:
            self.fleet.backoff.pop(advert.peer, None)
        for job in self.jobs.running.values():
            why = job.unsuited.get(advert.peer)
            if why in MENDED_BY_ADVERT:
                if advert.budget.may_run:
                    del job.unsuited[advert.peer]
        self.pump_all()

    def fetching_from(self) -> set[Peer]:
        return self._checkpoints.holders()

    # ---- what cars answer

    def on_lease(self, peer: Peer, sealed: Sealed) -> None:
        lease = sealed.open(Lease, T_LEASE)
        if sealed.kid != peer or lease.provider != peer:
            return
        found = self._attempts.find(peer, lease.task_id, lease.attempt) or self.placing.found(
            peer, lease
        )
        if found is None:
            self._given_up(peer, lease)
            return
        job, task, attempt = found
        if lease.run != Span(attempt.first, attempt.count):
            self._attempts.lose(job, attempt, Reason.BAD_FRAME)
            return
        if not self.jobs.bind(attempt, lease.lease_id):
            self._attempts.lose(job, attempt, Reason.BAD_FRAME)
            return
        if attempt.holder is not None:
            self.placing.settle(job, task, attempt, peer)
        first_time = attempt.state is State.OFFERED
        attempt.step(Step.GRANTED)
        if first_time:
            self._hedging.begun(job, attempt)
        job.answers.pop(peer, None)
        silence_ms = min(lease.lease_ms, self._out.limits.lease_ms)
        attempt.expires_mono_ms = self._out.now.mono_ms + silence_ms
        job.last_sign_mono_ms = self._out.now.mono_ms
        job.tasks[attempt.task_id].tries = 0
        self.jobs.note(job, attempt)

    def _given_up(self, peer: Peer, lease: Lease) -> None:
        """A run that we no longer wait for: the car need not go on, but what it has done counts."""
        cancel = CancelTask(lease.task_id, lease.attempt, Reason.SUPERSEDED)
        self._out.send(peer, Lane.CONTROL, cancel)
        job = self.jobs.by_task.get(lease.task_id)
        attempt = job.attempts.get((lease.task_id, lease.attempt)) if job else None
        if attempt is not None and attempt.peer == peer:
            if lease.run == Span(attempt.first, attempt.count):
                self.jobs.bind(attempt, lease.lease_id)

    def on_send_failed(self, event: SendFailed) -> None:
        """An offer never left: the task goes elsewhere at once."""
        for job, task, attempt in self.jobs.live_at(event.peer):
            if attempt.state is State.OFFERED and event.send_id in attempt.sends:
                self.fleet.leave_alone(event.peer, self._out.limits.backoff_ms)
                task.tries += attempt.late is None
                self._attempts.lose(job, attempt, event.reason)

    def on_refuse(self, peer: Peer, refuse: Refuse) -> None:
        found = self._attempts.find(peer, refuse.task_id, refuse.attempt)
        if found is None:
            return
        job, task, attempt = found
        job.refusals[refuse.reason] += 1
        if attempt.holder is not None:
            if self.placing.not_placed(job, task, attempt, refuse.reason):
                self.pump(job)
            return
        if refuse.text:
            self.jobs.say_ended(job, peer, refuse.reason, refuse.text)
        job.heard(peer, refuse.reason, refuse.text or "")
        halved = self.fleet.halved(job, attempt, refuse.reason)
        task.tries += not halved and attempt.late is None
        if not halved and refuse.reason in UNSUITED:
            job.unsuited[peer] = refuse.reason
        elif refuse.reason is Reason.ACCOUNT_CAP:  # a day's use is free again hour by hour
            self.fleet.shun(peer, CAPPED_MS)
        elif not halved:
            wait = refuse.retry_ms or self._out.limits.backoff_ms
            self.fleet.leave_alone(peer, wait)
        if refuse.reason is Reason.NO_AGREEMENT:
            self._agreements.void(peer)
        self._attempts.lose(job, attempt, refuse.reason)
        self.pump(job)

    # ---- time

    def deadline(self) -> int | None:
        every = (self.shelf.deadline(), self._checkpoints.deadline(), self._dues.first())
        dues = [due for due in every if due is not None]
        return min(dues) if dues else None

    def due(self, job: Job) -> int | None:
        """When the job wants attention next, if nothing happens before."""
        if job.state is not JobState.RUNNING:
            return None
        dues = [job.deadline_mono_ms]
        for task_id in job.live:
            for attempt in job.tasks[task_id].going:
                dues.append(self._attempts.expiry(attempt))
                if attempt.look_mono_ms is not None:
                    dues.append(attempt.look_mono_ms)
        if job.to_place():
            dues.append(job.pump_mono_ms)
            if not job.live:
                dues.append(job.last_sign_mono_ms + self._out.limits.nobody_ms)
        return min(dues)

    def tick(self) -> None:
        self.shelf.tick()
        self.fleet.tick()
        for fetch_id in self._checkpoints.late():
            self.returns.on_state_failed(fetch_id)
        for job in self._dues.take(self._out.now.mono_ms):
            self._tick_job(job)

    def _tick_job(self, job: Job) -> None:
        now = self._out.now.mono_ms
        if job.job_id not in self.jobs.running:
            return
        if job.deadline_mono_ms <= now:
            self._finish(job, JobState.FAILED, Reason.DEADLINE)
            return
        for task_id in sorted(job.live):
            task = job.tasks[task_id]
            for attempt in task.going:
                if self._attempts.expiry(attempt) <= now:
                    self._expire(job, task, attempt)
                elif attempt.look_mono_ms is not None and attempt.look_mono_ms <= now:
                    self._hedging.look(job, task, attempt)
        if job.job_id not in self.jobs.running:
            return
        nobody = job.last_sign_mono_ms + self._out.limits.nobody_ms <= now
        if nobody and not job.live and job.to_place():
            if not self.fleet.could_run(job):
                self._finish(job, JobState.FAILED, self.fleet.why_nobody(job))
                return
            job.last_sign_mono_ms = now  # they are busy with others' work: it waits its turn
            self._out.notify(job.job_id, "waits", reason=int(Reason.WAITS_SLOT))
        self.pump(job)

    def _expire(self, job: Job, task: Task, attempt: Attempt) -> None:
        if attempt.holder is not None:
            self.placing.lost(attempt.holder)
            if self.placing.not_placed(job, task, attempt, Reason.NO_ANSWER):
                self.pump(job)
            return
        if attempt.state is State.OFFERED:
            reason = Reason.NO_ANSWER
            task.tries += attempt.late is None
        elif attempt.lost_since_mono_ms is not None:
            reason = Reason.PEER_DOWN
        else:
            reason = Reason.LEASE_LOST
        self.fleet.leave_alone(attempt.peer, 4 * self._out.limits.backoff_ms)
        if attempt.peer in self.fleet.peers_up:
            cancel = CancelTask(attempt.task_id, attempt.number, Reason.SUPERSEDED)
            self._out.send(attempt.peer, Lane.URGENT, cancel)
        self._attempts.lose(job, attempt, reason)

    # ---- after a restart

    def resume(self) -> None:
        """Jobs have been restored: those whose units are all here end now, and a long one's tasks
        wait until it is known whether their checkpoints are still here."""
        for job in list(self.jobs.running.values()):
            self._dues.touch(job)
            self.returns.progress(job)
            if job.spec.steps is not None and job.state is JobState.RUNNING:
                for task in job.retry:
                    self._checkpoints.restore(job, task)
                waiting = [task for task in job.retry if not self._checkpoints.fetching(task)]
                job.retry = deque(waiting)

    def addrs_known(self, addrs: tuple[str, ...]) -> None:
        self._announcer.addrs = self.placing.addrs = addrs
