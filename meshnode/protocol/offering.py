"""Runs are offered point to point: the next one is cut, sealed for its car, and sent.

`requester` says when, `placement` to whom; a bid and a rendezvous's car end here as well.
"""

from __future__ import annotations

from .agreement import Agreements
from .attempt import Late
from .attempts import Attempts
from .fields import Span
from .fleet import Fleet
from .job import Job, Task, input_root, run_inline
from .jobs import Jobs
from .messages import Assign, Inputs, pack
from .objects import T_OFFER, Offer, OfferKind
from .outbox import Outbox
from .placement import Car, Choice, Need, Placement, run_units
from .sealed import Sealed
from .types import Digest, Lane, Peer

DEADLINE_UNIX_MS = 600_000  # an offer's own expiry, far above its time-out: clocks differ


def _kind(task: Task) -> OfferKind:
    if task.live is not None:
        return OfferKind.HEDGE
    return OfferKind.RETRY if task.attempt else OfferKind.FIRST


def seal_offer(
    outbox: Outbox,
    job: Job,
    task: Task,
    peer: Peer | None,
    channel: Digest | None,
    count: int,
    inline: bytes,
    token: Sealed | None,
) -> Sealed:
    """The first `count` missing units of the task; `inline`: the inline bytes of this very run,
    which follow the offer, never in it."""
    identity, now = outbox.identity, outbox.now
    first = task.missing
    offer = Offer(
        1,
        identity.network,
        identity.peer,
        peer,
        "offer",
        job.spec,
        Span(task.first, task.count),
        task.attempt,
        Span(first, count),
        input_root(job.spec, job.digest, inline, first, count),
        0,
        _kind(task),
        channel,
        outbox.limits.lease_ms,
        now.unix_ms + DEADLINE_UNIX_MS,
        0,
        task.state,
        task.step,
        None if token is None else token.digest,
    )
    return outbox.seal(offer, T_OFFER)


class Offers:
    def __init__(
        self, outbox: Outbox, agreements: Agreements, jobs: Jobs, fleet: Fleet, attempts: Attempts
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._jobs = jobs
        self._fleet = fleet
        self._attempts = attempts

    def offer_all(self, job: Job, placement: Placement, cars: list[Car]) -> None:
        """Point to point, as long as a car is chosen and the next task is not tried out."""
        while job.to_place() and not self.tried_out(job):
            peer = placement.choose(cars, self._out.rng)
            if peer is None:
                return
            self.offer(job, peer, self.next_run(job, cars), None, Choice.of(cars, peer))
            cars = [car.taken() if car.peer == peer else car for car in cars]

    def tried_out(self, job: Job) -> bool:
        return bool(job.retry) and job.retry[0].tries >= self._out.limits.offer_tries_max

    def next_run(self, job: Job, cars: list[Car]) -> Task:
        """A task that waits to be tried again, or fresh units of a guided size."""
        if job.retry:
            return job.retry.popleft()
        limits = self._out.limits
        depth = 1 + min(1, limits.leases_queued_per_slot_max)
        workers = sum(1 for car in cars if car.capacity > 0 or self._fleet.mine[car.peer])
        most = min(limits.lease_units_max, job.order.lease_units_max or limits.lease_units_max)
        if job.spec.steps is not None:
            most = 1  # one state, one checkpoint, one place to go on from
        need = Need(
            job.spec.units - job.fresh, job.unit_ms, most, limits.lease_target_ms, workers, depth
        )
        return self._jobs.cut(job, run_units(need))

    def offer(
        self,
        job: Job,
        peer: Peer,
        task: Task,
        token: Sealed | None,
        choice: Choice | None,
        late: Late | None = None,
    ) -> None:
        """One attempt, to one car. The attempt's number is stored before the offer leaves."""
        entered = self._agreements.with_provider(peer)
        assert entered is not None, "a car without agreement is never chosen"
        task.attempt += 1
        first, count = task.missing, task.end - task.missing
        count = min(count, job.most_at.get(peer, count))
        inline = run_inline(job.spec, job.order.inline, first, count)
        sealed = seal_offer(self._out, job, task, peer, entered.digest, count, inline, token)
        attempt = self._attempts.begin(job, task, peer, count, self._out.limits.offer_timeout_ms)
        attempt.late = late
        past = job.history[-1]
        past.choice, past.how = choice, "offer" if token is None else "bid"
        after = self._attempts.keep(job, task, attempt)
        frames = [sealed.wire if token is None else pack(Assign(token.wire, sealed.wire))]
        if any(arg.inline for arg in job.spec.args):
            frames.append(pack(Inputs(task.task_id, task.attempt, inline)))
        sends = [self._out.send(peer, Lane.CONTROL, frame, after=after) for frame in frames]
        attempt.frames = tuple(frames)
        attempt.sends = tuple(sends)
        self._fleet.take(attempt)
        self._jobs.note(job, attempt)
