"""The requester role: jobs become tasks, tasks become attempts, units come back and are accepted.

Persist the job -> agree with cars -> offer runs (or announce and collect bids) -> lease -> parts
-> store units -> receipts checked against what arrived -> acceptance. A lost attempt goes out again
under the next number, from the first unit that is missing. Execution is at least once; a unit is
taken once and accepted once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .advert import AdvertBook
from .agreement import Agreements
from .announcing import Announcer
from .attempt import Attempt, State, Step
from .cell import Roster
from .checkpoints import FETCH_MS_MAX, PARTING_MS, SPOILT, Checkpoints, Said
from .codec import digest
from .dues import Dues
from .effects import ResultRecord
from .events import SendFailed, Submit
from .fleet import BLAMELESS, TOO_MUCH, UNSUITED, Fleet
from .intake import Intake
from .job import (
    Job,
    JobState,
    Past,
    Task,
    make_spec,
    run_inline,
    spec_bytes,
    watch_bytes,
)
from .jobs import UNITS_HELD_MAX, Jobs
from .messages import (
    Assign,
    CancelTask,
    Checkpoint,
    Ended,
    Handoff,
    Heartbeat,
    Inputs,
    Part,
    Queued,
    Refuse,
    Watch,
    pack,
)
from .objects import (
    T_LEASE,
    T_TOKEN,
    Advert,
    JobSpec,
    Lease,
    Span,
    Token,
)
from .offering import seal_offer
from .outbox import Outbox
from .placement import Car, Choice, GossipPlacement, Need, Placement, TokenPlacement, run_units
from .placing import QUEUED_MS, Placing
from .reasons import Reason
from .sealed import Sealed
from .shelf import Shelf
from .types import (
    Durability,
    JobId,
    Lane,
    LeaseId,
    Peer,
    TaskId,
)

ATTEMPTS_MAX = 65_000  # the attempt's number has 16 bits on the wire
MENDED_BY_ADVERT = TOO_MUCH | {Reason.NO_CONSENT, Reason.NO_WORKER, Reason.NOT_PROVIDING}
KERNEL_FAILURES_MAX = 2  # a kernel that fails on two cars fails by itself
ENDED_JOBS_MAX = 256
PLACES_MAX = 2  # rendezvous that are asked for one attempt before the cell is
PUMP_MS = 50  # how often a job with unplaced work looks again, whatever else happens


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
        self.fleet = Fleet(outbox, agreements, book)
        self._placement = placement
        self._gossip = GossipPlacement()
        self._tokens = TokenPlacement()
        self._placing = Placing(outbox, self.fleet, roster, reach)
        self._intake = Intake()
        self.shelf = Shelf(outbox)
        self._checkpoints = Checkpoints(outbox, jobs, self.shelf)
        self._bids: dict[Peer, tuple[Job, Token, Sealed]] = {}
        self._dues = Dues(self.due)

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
        if job_id in self.jobs.all:  # same order, same nonce: the same job
            self._out.notify(job_id, "submitted", request_id=event.request_id)
            self.jobs.say(self.jobs.all[job_id])
            return
        job = self.jobs.enter(spec, job_digest, order)
        self._out.notify(job_id, "submitted", request_id=event.request_id)
        if order.durable:
            record = self.jobs.record(job)
            self._out.persist((record,), Durability.PROCESS, None, lambda: self._disk_full(job))
        self.jobs.say(job)
        self.pump(job)

    def cancel(self, job_id: JobId) -> None:
        job = self.jobs.running.get(job_id)
        if job is not None:
            self._finish(job, JobState.CANCELLED, Reason.CANCELLED)

    def _finish(self, job: Job, state: JobState, reason: Reason) -> None:
        self._dues.touch(job)
        for task_id in list(job.live):
            task = job.tasks[task_id]
            if task.live is not None:
                cancel = CancelTask(task_id, task.live.number, Reason.STOPPED_BY_REQUESTER)
                if task.live.peer in self.fleet.peers_up:
                    self._out.send(task.live.peer, Lane.URGENT, cancel)
                self._lose(job, task.live, reason, again=False)
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

    def _disk_full(self, job: Job) -> None:
        if job.state is JobState.RUNNING:
            self._finish(job, JobState.FAILED, Reason.DISK_FULL)

    # ---- placing

    def pump_all(self) -> None:
        for job in list(self.jobs.running.values()):
            if job.to_place():
                self.pump(job)

    def pump(self, job: Job) -> None:
        """Place as much of the job as the cars will take now."""
        self._dues.touch(job)
        job.drop_whole()
        if not job.to_place():
            return
        gossip = job.order.policy == "gossip"
        placement: Placement = self._gossip if gossip else self._placement
        job.pump_mono_ms = self._out.now.mono_ms + PUMP_MS
        if self._placing.serves(job) and self._place_all(job):
            return
        if not placement.announces():
            self._offer_all(job, placement, self.fleet.cars(job))
        if job.to_place() and (placement.announces() or self._nobody_offers(job)):
            self._announcer.announce(job)

    def _place_all(self, job: Job) -> bool:
        """To cars that work for us, and through the cell's rendezvous to whoever else is idle;
        False if that way is closed for now."""
        self._offer_all(job, self._tokens, self.fleet.cars(job, self.fleet.ours(job)))
        while job.to_place() and len(job.placed) < job.place_window:
            if self._tried_out(job):
                return False
            holder = self._placing.draw()
            if holder is None:
                return False
            self._place(job, self._next_run(job, []), holder)
        return True

    def _offer_all(self, job: Job, placement: Placement, cars: list[Car]) -> None:
        """Point to point, as long as a car is chosen and the next task is not tried out."""
        while job.to_place() and not self._tried_out(job):
            peer = placement.choose(cars, self._out.rng)
            if peer is None:
                return
            self._offer(job, peer, self._next_run(job, cars), None, Choice.of(cars, peer))
            cars = [car.taken() if car.peer == peer else car for car in cars]

    def _nobody_offers(self, job: Job) -> bool:
        """Point-to-point has nothing more to give: no run is out, or a task has been tried out."""
        asking = any(self._agreements.asking(peer) for peer in self.fleet.peers_up)
        return self._tried_out(job) or (not job.live and not asking)

    def _tried_out(self, job: Job) -> bool:
        return bool(job.retry) and job.retry[0].tries >= self._out.limits.offer_tries_max

    def _next_run(self, job: Job, cars: list[Car]) -> Task:
        """A task that waits to be tried again, or fresh units of a guided size."""
        if job.retry:
            return job.retry.popleft()
        limits = self._out.limits
        depth = 1 + min(1, limits.leases_queued_per_slot_max)
        workers = sum(1 for car in cars if car.capacity > 0 or self.fleet.mine[car.peer])
        most = min(limits.lease_units_max, job.order.lease_units_max or limits.lease_units_max)
        if job.spec.steps is not None:
            most = 1  # one state, one checkpoint, one place to go on from
        need = Need(
            job.spec.units - job.fresh, job.unit_ms, most, limits.lease_target_ms, workers, depth
        )
        return self.jobs.cut(job, run_units(need))

    def _offer(
        self, job: Job, peer: Peer, task: Task, token: Sealed | None, choice: Choice | None
    ) -> None:
        """One attempt, to one car. The attempt's number is stored before the offer leaves."""
        entered = self._agreements.with_provider(peer)
        assert entered is not None, "a car without agreement is never chosen"
        task.attempt += 1
        first, count = task.missing, task.end - task.missing
        count = min(count, job.most_at.get(peer, count))
        inline = run_inline(job.spec, job.order.inline, first, count)
        sealed = seal_offer(self._out, job, task, peer, entered.digest, count, inline, token)
        attempt = self._attempt(job, task, peer, count, self._out.limits.offer_timeout_ms)
        past = job.history[-1]
        past.choice, past.how = choice, "offer" if token is None else "bid"
        after = self._keep(job, task, attempt)
        frames = [sealed.wire if token is None else pack(Assign(token.wire, sealed.wire))]
        if any(arg.inline for arg in job.spec.args):
            frames.append(pack(Inputs(task.task_id, task.attempt, inline)))
        sends = [self._out.send(peer, Lane.CONTROL, frame, after=after) for frame in frames]
        attempt.frames = tuple(frames)
        attempt.sends = tuple(sends)
        self.fleet.take(attempt)
        self.jobs.note(job, attempt)

    def _place(self, job: Job, task: Task, holder: Peer) -> None:
        """One attempt, to whichever idle car a rendezvous has."""
        task.attempt += 1
        first, count = task.missing, task.end - task.missing
        inline = run_inline(job.spec, job.order.inline, first, count)
        sealed = seal_offer(self._out, job, task, None, None, count, inline, None)
        attempt = self._attempt(job, task, holder, count, self._placing.timeout_ms(holder))
        attempt.holder, attempt.asked, attempt.offer = holder, 1, sealed.digest
        job.history[-1].how = "token"
        attempt.frames = (pack(self._placing.message(job, sealed)),)
        job.placed.add(task.task_id)
        after = self._keep(job, task, attempt)
        self._ask(attempt, after)
        self.jobs.note(job, attempt)

    def _ask(self, attempt: Attempt, after: int | None = None) -> None:
        frame = attempt.frames[0]
        assert attempt.holder is not None
        if attempt.holder == self._out.identity.peer:
            self._out.post(attempt.holder, Lane.CONTROL, frame)
        else:
            attempt.sends = (self._out.send(attempt.holder, Lane.CONTROL, frame, after=after),)

    def _attempt(self, job: Job, task: Task, peer: Peer, count: int, timeout_ms: int) -> Attempt:
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
        attempt.from_step = task.step or 0
        task.live = attempt
        job.live.add(task.task_id)
        job.history.append(Past(attempt, task))
        job.attempts[task.task_id, task.attempt] = attempt
        return attempt

    def _keep(self, job: Job, task: Task, attempt: Attempt) -> int | None:
        """The attempt's number, stored; what must wait for that, if anything must."""
        if not job.order.durable:
            return None
        # A first attempt needs no wait: after a crash the same task and number can only mean the
        # same run. A later number means another run, and must never be used twice.
        record = self.jobs.task_record(job, attempt)
        self.shelf.add(record, None, lambda: self._disk_full(job))
        return self.shelf.flush() if task.attempt else None

    # ---- announcing

    def on_token(self, peer: Peer, sealed: Sealed) -> None:
        """A bid: a slot of that car is held for us for a moment."""
        token = sealed.open(Token, T_TOKEN)
        if sealed.kid != peer or token.peer != peer or token.announce_id is None:
            return
        placed = self._placed_task(token)
        if placed is not None:
            self._on_assigned(peer, *placed, token, sealed)
            return
        job = self.jobs.announced.get(token.announce_id)
        if job is None or not job.to_place() or peer in job.unsuited:
            return
        if not self.fleet.named(job, peer):
            return
        if peer in job.waiting.bidders:
            return  # one announcement, one run for each that bids
        job.waiting.bidders.add(peer)
        if self._agreements.with_provider(peer) is None:
            self._bids[peer] = (job, token, sealed)
            self._agreements.ask(peer)
            return
        self._award(job, peer, sealed)

    def _placed_task(self, token: Token) -> tuple[Job, Task] | None:
        """The task that a rendezvous has assigned to the bidding car, while it waits."""
        task_id = TaskId(token.announce_id or b"")
        job = self.jobs.by_task.get(task_id)
        return (job, job.tasks[task_id]) if job is not None and task_id in job.placed else None

    def _on_assigned(self, peer: Peer, job: Job, task: Task, token: Token, sealed: Sealed) -> None:
        """A car that we have no agreement with was assigned our task, and holds a slot for us."""
        attempt = task.live
        assert attempt is not None
        if peer in job.unsuited:
            return
        if self._agreements.with_provider(peer) is None:
            self._dues.touch(job)
            attempt.expires_mono_ms = self._out.now.mono_ms + (token.hold_ms or 0)
            self._bids[peer] = (job, token, sealed)
            self._agreements.ask(peer)
            return
        if attempt.holder is not None:
            self._placing.served(job, attempt.holder)
        self._lose(job, attempt, Reason.SUPERSEDED, again=False)
        if task.missing >= task.end:
            return  # a run that was given up has brought the rest meanwhile
        self._offer(job, peer, task, sealed, None)
        job.history[-1].how = "token"

    def _award(self, job: Job, peer: Peer, sealed: Sealed) -> None:
        job.drop_whole()
        if not job.to_place() or self.fleet.rests(peer) or not self.fleet.named(job, peer):
            return
        job.waiting.backoff_ms = 0
        cars = self.fleet.cars(job)
        task = self._next_run(job, cars)
        task.tries = 0
        self._offer(job, peer, task, sealed, Choice.of(cars, peer))

    # ---- peers

    def peer_ready(self, peer: Peer) -> None:
        self.fleet.met(peer)
        for job, task in self.jobs.live_at(peer):
            self._dues.touch(job)
            assert task.live is not None
            # The car may have restarted and know nothing, or have finished and said it to nobody:
            # the same offer again makes it grant anew, or say again what it has.
            task.live.lost_since_mono_ms = None
            for frame in task.live.frames:
                self._out.send(peer, Lane.CONTROL, frame)
        self.pump_all()

    def peer_down(self, peer: Peer) -> None:
        self.fleet.peers_up.pop(peer, None)
        self._bids.pop(peer, None)
        now = self._out.now.mono_ms
        for job, task in self.jobs.live_at(peer):
            self._dues.touch(job)
            attempt = task.live
            assert attempt is not None
            if attempt.state is State.OFFERED:
                self._lose(job, attempt, Reason.PEER_DOWN)
            else:
                attempt.lost_since_mono_ms = now
                known = self.fleet.book.cars.get(peer)
                self.fleet.dial(peer, known.advert.addrs if known else ())
        self.pump_all()

    def dial_failed(self, peer: Peer) -> None:
        """Nobody answers at its address: what it held is lost now, not after the grace."""
        self.fleet.met_nobody(Reason.UNREACHABLE)
        self.fleet.leave_alone(peer, self._out.limits.backoff_ms)
        for job, task in self.jobs.live_at(peer):
            if task.live is not None and task.live.lost_since_mono_ms is not None:
                self._lose(job, task.live, Reason.PEER_DOWN)
        if not self.fleet.mine[peer]:
            self.fleet.book.drop(peer)
        self.pump_all()

    def in_force(self, peer: Peer) -> None:
        """An agreement was signed: a bid that waited for it, then everything else."""
        waiting = self._bids.pop(peer, None)
        if waiting is not None:
            job, token, sealed = waiting
            placed = self._placed_task(token)
            if placed is not None:
                self._on_assigned(peer, *placed, token, sealed)
            elif job.to_place() and token.announce_id in self.jobs.announced:
                self._award(job, peer, sealed)
        self.pump_all()

    def terms_refused(self, peer: Peer, reason: Reason) -> None:
        for job in self.jobs.running.values():
            job.refusals[reason] += 1
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

    # ---- what cars answer

    def _find(self, peer: Peer, task_id: TaskId, number: int) -> tuple[Job, Task, Attempt] | None:
        job = self.jobs.by_task.get(task_id)
        task = job.tasks.get(task_id) if job else None
        attempt = task.live if task else None
        if (
            job is None
            or task is None
            or attempt is None
            or attempt.peer != peer
            or attempt.number != number
        ):
            return None
        self._dues.touch(job)
        return job, task, attempt

    def on_lease(self, peer: Peer, sealed: Sealed) -> None:
        lease = sealed.open(Lease, T_LEASE)
        if sealed.kid != peer or lease.provider != peer:
            return
        found = self._find(peer, lease.task_id, lease.attempt) or self._found(peer, lease)
        if found is None:
            self._given_up(peer, lease)
            return
        job, task, attempt = found
        if lease.run != Span(attempt.first, attempt.count):
            self._lose(job, attempt, Reason.BAD_FRAME)
            return
        if not self.jobs.bind(attempt, lease.lease_id):
            self._lose(job, attempt, Reason.BAD_FRAME)
            return
        if attempt.holder is not None:
            self._settle(job, task, attempt, peer)
        attempt.step(Step.GRANTED)
        job.answers.pop(peer, None)
        silence_ms = min(lease.lease_ms, self._out.limits.lease_ms)
        attempt.expires_mono_ms = self._out.now.mono_ms + silence_ms
        job.last_sign_mono_ms = self._out.now.mono_ms
        job.tasks[attempt.task_id].tries = 0
        self.jobs.note(job, attempt)

    def _found(self, peer: Peer, lease: Lease) -> tuple[Job, Task, Attempt] | None:
        """The attempt that a rendezvous found this car for: one that no car has yet."""
        job = self.jobs.by_task.get(lease.task_id)
        task = job.tasks.get(lease.task_id) if job else None
        attempt = task.live if task else None
        entered = self._agreements.with_provider(peer)
        if (
            job is None
            or task is None
            or attempt is None
            or attempt.holder is None
            or attempt.state is not State.OFFERED
            or attempt.number != lease.attempt
            or attempt.offer != lease.offer
            or entered is None
            or entered.digest != lease.channel
            or peer in job.unsuited
        ):
            return None
        self._dues.touch(job)
        return job, task, attempt

    def _settle(self, job: Job, task: Task, attempt: Attempt, peer: Peer) -> None:
        """The car that was found takes the rendezvous's place in the attempt."""
        assert attempt.holder is not None
        self._placing.served(job, attempt.holder)
        job.placed.discard(task.task_id)
        attempt.holder = None
        attempt.peer = peer
        attempt.started_mono_ms = self._out.now.mono_ms
        job.sources[attempt.source - 1] = (task.task_id, attempt.number, peer)
        self.fleet.take(attempt)
        attempt.frames = attempt.sends = ()
        if any(arg.inline for arg in job.spec.args):
            inline = run_inline(job.spec, job.order.inline, attempt.first, attempt.count)
            frame = pack(Inputs(task.task_id, attempt.number, inline))
            attempt.frames = (frame,)
            self._out.send(peer, Lane.CONTROL, frame)
        if job.order.durable:
            record = self.jobs.task_record(job, attempt)
            self.shelf.add(record, None, lambda: self._disk_full(job))

    def on_queued(self, peer: Peer, queued: Queued) -> None:
        """No idle car is there now; ours waits in line, and more of ours would only wait too."""
        found = self._find(peer, queued.task_id, queued.attempt)
        if found is not None and found[2].holder is not None:
            job, _, attempt = found
            attempt.expires_mono_ms = self._out.now.mono_ms + QUEUED_MS
            job.place_window = 1
            job.last_sign_mono_ms = self._out.now.mono_ms

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
        for job, task in self.jobs.live_at(event.peer):
            attempt = task.live
            if (
                attempt is not None
                and attempt.state is State.OFFERED
                and event.send_id in attempt.sends
            ):
                self.fleet.leave_alone(event.peer, self._out.limits.backoff_ms)
                task.tries += 1
                self._lose(job, attempt, event.reason)

    def on_refuse(self, peer: Peer, refuse: Refuse) -> None:
        found = self._find(peer, refuse.task_id, refuse.attempt)
        if found is None:
            return
        job, task, attempt = found
        job.refusals[refuse.reason] += 1
        if attempt.holder is not None:
            self._not_placed(job, task, attempt, refuse.reason)
            return
        if refuse.text:
            self._say_ended(job, peer, refuse.reason, refuse.text)
        job.heard(peer, refuse.reason, refuse.text or "")
        halved = self._halved(job, attempt, refuse.reason)
        task.tries += not halved
        if not halved and refuse.reason in UNSUITED:
            job.unsuited[peer] = refuse.reason
        elif not halved:
            wait = refuse.retry_ms or self._out.limits.backoff_ms
            self.fleet.leave_alone(peer, wait)
        if refuse.reason is Reason.NO_AGREEMENT:
            self._agreements.void(peer)
        self._lose(job, attempt, refuse.reason)
        self.pump(job)

    def _leased(
        self, peer: Peer, lease_id: LeaseId, *, live: bool = True
    ) -> tuple[Job, Task, Attempt] | None:
        attempt = self.jobs.by_lease.get(lease_id)
        if attempt is None or attempt.peer != peer or (live and not attempt.live):
            return None
        job = self.jobs.by_task.get(attempt.task_id)
        if job is None:
            return None
        self._dues.touch(job)
        return job, job.tasks[attempt.task_id], attempt

    def on_part(self, peer: Peer, part: Part) -> None:
        # Units of a run that was given up count as well, if nobody brought them before: they are
        # right, and its receipt, which comes after them, can be checked.
        found = self._leased(peer, part.lease_id, live=False)
        if found is None:
            return
        job, task, attempt = found
        attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms
        outputs = self._intake.take(job, attempt, part)
        if isinstance(outputs, Reason):
            if attempt.live:
                self._lose(job, attempt, outputs)
                self.pump(job)
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
            self._leave(job, attempt)
            self.jobs.note(job, attempt)
            self._again(job, task)
        for first, taken in outputs:
            self._taken(job, attempt, first, taken)
        if not attempt.live:
            self.pump(job)

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
            self._progress(job)

        if job.order.durable:
            digests = bytes(job.digests[32 * first : 32 * (first + count)])
            record = ResultRecord(
                job.digest, first, count, attempt.number, attempt.peer, digests, whole
            )
            self.shelf.add(record, stored, lambda: self._disk_full(job))
            if job.taken == job.spec.units:
                self.shelf.flush()
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

    def _progress(self, job: Job) -> None:
        if job.state is not JobState.RUNNING:
            return
        if job.stored == job.spec.units:
            self._finish(job, JobState.DONE, Reason.DONE)
        else:
            self.jobs.say(job)

    def on_ended(self, peer: Peer, ended: Ended) -> None:
        found = self._leased(peer, ended.lease_id)
        if found is None:
            return
        job, task, attempt = found
        if attempt.next_unit - attempt.first < ended.units_done <= attempt.count:
            return  # parts are missing; the car sends them, and this, again
        reason = ended.reason if ended.reason is not Reason.DONE else Reason.MISMATCH
        job.refusals[reason] += 1
        if reason in TOO_MUCH and self._halved(job, attempt, reason):
            task.failures = 0
        elif reason in UNSUITED:
            job.unsuited[peer] = reason
        elif reason in BLAMELESS:
            if attempt.next_unit == attempt.first:
                self.fleet.shun(peer, self._out.limits.backoff_ms)
        else:
            # Doubling, so that a run that cannot succeed here does not spin between two peers.
            task.failures = 1 if attempt.next_unit > attempt.first else task.failures + 1
            # Never so long that the job takes its own patience for an empty cell.
            longest_ms = self._out.limits.nobody_ms // 2
            self.fleet.shun(peer, min(self._out.limits.backoff_ms << task.failures, longest_ms))
        job.heard(peer, reason, ended.text or "")
        self._say_ended(job, peer, reason, ended.text or "")
        self._lose(job, attempt, reason)
        self.pump(job)

    def _not_placed(self, job: Job, task: Task, attempt: Attempt, reason: Reason) -> None:
        """A rendezvous has nobody for it: another is asked once, then the cell."""
        assert attempt.holder is not None
        other = self._placing.draw(but=attempt.holder)
        if attempt.asked < PLACES_MAX and other is not None and task.live is attempt:
            attempt.asked += 1
            attempt.holder = attempt.peer = other
            timeout_ms = self._placing.timeout_ms(other)
            attempt.expires_mono_ms = self._out.now.mono_ms + timeout_ms
            self._ask(attempt)
            return
        task.tries = self._out.limits.offer_tries_max
        self._lose(job, attempt, reason)
        self.pump(job)

    def _halved(self, job: Job, attempt: Attempt, reason: Reason) -> bool:
        """The run was too much for this car: it gets half as many units from now on."""
        if reason not in TOO_MUCH:
            return False
        if attempt.count > 1:
            job.most_at[attempt.peer] = attempt.count // 2
            return True
        # Its battery may say something else later, and then its advert does.
        self.fleet.shun(attempt.peer, 10 * self._out.limits.backoff_ms)
        return False

    def _say_ended(self, job: Job, peer: Peer, reason: Reason, text: str) -> None:
        """How a run ended, or why it never began, in the car's own words."""
        self._out.notify(job.job_id, "ended", reason=int(reason), text=text, peer=peer)

    def on_heartbeat(self, peer: Peer, beat: Heartbeat) -> None:
        found = self._leased(peer, beat.lease_id)
        if found is not None:
            job, _, attempt = found
            attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms
            job.last_sign_mono_ms = self._out.now.mono_ms

    def on_checkpoint(self, peer: Peer, checkpoint: Checkpoint) -> None:
        found = self._leased(peer, checkpoint.lease_id)
        if found is not None:
            job, task, attempt = found
            said = Said(peer, checkpoint.state, checkpoint.step, FETCH_MS_MAX)
            self._checkpoints.take(job, task, said)
            attempt.expires_mono_ms = self._out.now.mono_ms + self._out.limits.lease_ms

    def on_watch(self, peer: Peer, watch: Watch) -> None:
        """Only what is new: an attempt that goes on from a checkpoint repeats what came after."""
        found = self._leased(peer, watch.lease_id)
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
            if task.live is None and self._again(job, task):
                self.pump(job)

    def on_handoff(self, peer: Peer, handoff: Handoff) -> None:
        """The car leaves: its checkpoint, if any, goes into the next offer of the task."""
        found = self._leased(peer, handoff.lease_id)
        if found is None:
            return
        job, task, attempt = found
        if handoff.state is not None and handoff.step is not None:
            said = Said(peer, handoff.state, handoff.step, PARTING_MS)
            self._checkpoints.take(job, task, said)
        self.fleet.leave_alone(peer, 10 * self._out.limits.backoff_ms)
        self.fleet.book.drop(peer)
        self._lose(job, attempt, handoff.reason)
        self.pump(job)

    # ---- the end of an attempt

    def _leave(self, job: Job, attempt: Attempt) -> None:
        self._dues.touch(job)
        job.last_sign_mono_ms = max(job.last_sign_mono_ms, self._out.now.mono_ms)
        task = job.tasks[attempt.task_id]
        if task.live is attempt:
            task.live = None
            job.live.discard(task.task_id)
        attempt.frames = attempt.sends = ()
        if attempt.holder is None:
            self.fleet.release(attempt)
        job.placed.discard(task.task_id)
        spoilt = attempt.reason in SPOILT and task.step == attempt.from_step
        if attempt.state is State.RETURNED or spoilt:
            self._checkpoints.drop(task)

    def _lose(self, job: Job, attempt: Attempt, reason: Reason, *, again: bool = True) -> None:
        """Whatever is missing goes out again, under the next number."""
        attempt.step(Step.LOST)
        attempt.reason = reason
        self._leave(job, attempt)
        self.jobs.note(job, attempt)
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
            self._finish(job, JobState.FAILED, reason)
            return
        self._again(job, task)

    def _again(self, job: Job, task: Task) -> bool:
        """The task waits to be offered again, unless its checkpoint is on its way here."""
        waits = job.state is not JobState.RUNNING or task.missing >= task.end
        if waits or self._checkpoints.fetching(task) or task in job.retry:
            return False
        job.retry.append(task)
        return True

    # ---- time

    def deadline(self) -> int | None:
        dues: list[int] = []
        shelf = self.shelf.deadline()
        if shelf is not None:
            dues.append(shelf)
        fetched = self._checkpoints.deadline()
        if fetched is not None:
            dues.append(fetched)
        first = self._dues.first()
        if first is not None:
            dues.append(first)
        return min(dues, default=None)

    def due(self, job: Job) -> int | None:
        """When the job wants attention next, if nothing happens before."""
        if job.state is not JobState.RUNNING:
            return None
        dues = [job.deadline_mono_ms]
        for task_id in job.live:
            attempt = job.tasks[task_id].live
            if attempt is not None:
                dues.append(self._expiry(attempt))
        if job.to_place():
            dues.append(job.pump_mono_ms)
            if not job.live:
                dues.append(job.last_sign_mono_ms + self._out.limits.nobody_ms)
        return min(dues)

    def _expiry(self, attempt: Attempt) -> int:
        if attempt.lost_since_mono_ms is None:
            return attempt.expires_mono_ms
        grace = attempt.lost_since_mono_ms + self._out.limits.silent_peer_grace_ms
        return min(attempt.expires_mono_ms, grace)

    def tick(self) -> None:
        self.shelf.tick()
        self.fleet.tick()
        for fetch_id in self._checkpoints.late():
            self.on_state_failed(fetch_id)
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
            attempt = job.tasks[task_id].live
            if attempt is not None and self._expiry(attempt) <= now:
                self._expire(job, job.tasks[task_id], attempt)
        if job.job_id not in self.jobs.running:
            return
        nobody = job.last_sign_mono_ms + self._out.limits.nobody_ms <= now
        if nobody and not job.live and job.to_place():
            self._finish(job, JobState.FAILED, self.fleet.why_nobody(job))
            return
        self.pump(job)

    def _expire(self, job: Job, task: Task, attempt: Attempt) -> None:
        if attempt.holder is not None:
            self._placing.lost(attempt.holder)
            self._not_placed(job, task, attempt, Reason.NO_ANSWER)
            return
        if attempt.state is State.OFFERED:
            reason = Reason.NO_ANSWER
            task.tries += 1
        elif attempt.lost_since_mono_ms is not None:
            reason = Reason.PEER_DOWN
        else:
            reason = Reason.LEASE_LOST
        self.fleet.leave_alone(attempt.peer, 4 * self._out.limits.backoff_ms)
        if attempt.peer in self.fleet.peers_up:
            cancel = CancelTask(attempt.task_id, attempt.number, Reason.SUPERSEDED)
            self._out.send(attempt.peer, Lane.URGENT, cancel)
        self._lose(job, attempt, reason)

    # ---- after a restart

    def resume(self) -> None:
        """Jobs have been restored: those whose units are all here end now, and a long one's tasks
        wait until it is known whether their checkpoints are still here."""
        for job in list(self.jobs.running.values()):
            self._dues.touch(job)
            self._progress(job)
            if job.spec.steps is not None and job.state is JobState.RUNNING:
                for task in job.retry:
                    self._checkpoints.restore(job, task)
                waiting = [task for task in job.retry if not self._checkpoints.fetching(task)]
                job.retry = deque(waiting)

    def addrs_known(self, addrs: tuple[str, ...]) -> None:
        self._announcer.addrs = self._placing.addrs = addrs
