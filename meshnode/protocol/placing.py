"""The requester's side of the rendezvous: which one to ask, what it answers, and which ones to ask
no more.

A placement is an attempt whose car is not known yet: its rendezvous stands in the car's place until
a lease comes. How each rendezvous has served is kept: one that loses placements in a row is drawn
around.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from .agreement import Agreements
from .attempt import Attempt, Late, State
from .attempts import Attempts
from .cell import Roster, epoch_of
from .fleet import Fleet
from .job import Job, Task, run_inline
from .jobs import Jobs
from .messages import AVOID_MAX, Inputs, Place, Queued, pack
from .objects import Lease
from .offering import Offers, seal_offer
from .outbox import Outbox, remember
from .patience import Patience
from .placement import TokenPlacement
from .reasons import Reason
from .sealed import Sealed
from .shelf import Shelf
from .types import Lane, Peer

WINDOW: Final = 4  # placements of a job that are under way before one has been answered
WINDOW_MAX: Final = 32
QUEUED_MS: Final = 3_000  # a rendezvous says each second that a placement still waits
DRY_MS: Final = 500  # a job whose placements have waited so long queues runs behind its own
LOST_MAX: Final = 3  # placements in a row that a rendezvous loses before it is drawn around
SHUN_MS: Final = 30_000  # for so long a rendezvous that loses placements is drawn around
RENDEZVOUS_KNOWN_MAX: Final = 256
PLACES_MAX: Final = 2  # rendezvous that are asked for one attempt before the cell is


class Placing:
    def __init__(
        self,
        outbox: Outbox,
        agreements: Agreements,
        jobs: Jobs,
        fleet: Fleet,
        shelf: Shelf,
        attempts: Attempts,
        offers: Offers,
        roster: Roster,
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._jobs = jobs
        self._fleet = fleet
        self._shelf = shelf
        self._attempts = attempts
        self._offers = offers
        self._tokens = TokenPlacement()
        self._roster = roster
        self._reach = reach
        self._patience = Patience()
        self._lost: OrderedDict[Peer, int] = OrderedDict()
        self._shunned: OrderedDict[Peer, int] = OrderedDict()
        self.addrs: tuple[str, ...] = ()

    def serves(self, job: Job) -> bool:
        """Whether the job goes this way: one for named cars asks those, because accounts stand in
        no advert."""
        order = job.order
        named = bool(order.cars or order.owners)
        return order.policy == "tokens" and not named and bool(self._out.limits.rendezvous_cars)

    def draw(self, but: Peer | None = None) -> Peer | None:
        """A rendezvous of our cell that is in reach; the others are reached for."""
        identity, now = self._out.identity, self._out.now
        posts = self._roster.posts(identity.cell, epoch_of(now.unix_ms))
        ranks = posts[self._out.rng.randrange(len(posts))]
        there = []
        for peer in ranks:
            if peer == identity.peer or peer in self._fleet.peers_up:
                there.append(peer)
            else:
                self._reach(peer)
        good = [p for p in there if self._shunned.get(p, 0) <= now.mono_ms and p != but] or there
        return good[self._out.rng.randrange(len(good))] if good else None

    def message(self, job: Job, offer: Sealed, but: tuple[Peer, ...], wait_ms: int) -> Place:
        """`but`: cars that must not get it. Those that are far behind the others wait as long as
        there is other work for them: else the last run of a job would be theirs."""
        slow = () if job.to_place() else self._fleet.slow_cars(job)
        avoid = tuple(dict.fromkeys((*but, *sorted(job.unsuited), *slow)))[:AVOID_MAX]
        return Place(
            offer.wire,
            wait_ms,
            0,
            self.addrs,
            int(job.unit_ms),
            avoid or None,
        )

    def timeout_ms(self, holder: Peer) -> int:
        """Four round trips: there, on to the car, and its lease back by itself; longer where
        answers have taken longer."""
        rtt_us = self._fleet.peers_up.get(holder, 0)
        least_ms = max(self._out.limits.place_timeout_ms, 4 * rtt_us // 1000)
        return self._patience.wait_ms(least_ms, self._lost.get(holder, 0))

    def lost(self, holder: Peer) -> None:
        count = self._lost.get(holder, 0) + 1
        remember(self._lost, holder, count, RENDEZVOUS_KNOWN_MAX)
        if count >= LOST_MAX:
            until = self._out.now.mono_ms + SHUN_MS
            remember(self._shunned, holder, until, RENDEZVOUS_KNOWN_MAX)

    def served(self, job: Job, holder: Peer) -> None:
        self._lost.pop(holder, None)
        self._shunned.pop(holder, None)
        job.place_window = min(2 * job.place_window, WINDOW_MAX)
        job.dry_since_mono_ms = None

    # ---- a placement

    def place_all(self, job: Job) -> bool:
        """To cars that work for us, and through the cell's rendezvous to whoever else is idle;
        False if that way is closed for now."""
        cars = self._fleet.cars(job, self._fleet.ours(job))
        if not job.placed:
            job.dry_since_mono_ms = None
        if not self._fleet.is_short(job) and not self._dry(job):
            # Behind a long run of ours would be later than on a car that is idle, if there is one.
            cars = [car for car in cars if car.idle]
        self._offers.offer_all(job, self._tokens, cars)
        while job.to_place() and len(job.placed) < job.place_window:
            if self._offers.tried_out(job):
                return False
            holder = self.draw()
            if holder is None:
                return False
            run = self._offers.next_run(job, [])
            self._place(job, run, holder, self._out.limits.queue_ms_max)
        return True

    def _dry(self, job: Job) -> bool:
        """Its placements wait in a line, and have for a while."""
        since = job.dry_since_mono_ms
        return since is not None and since + DRY_MS <= self._out.now.mono_ms

    def _place(
        self, job: Job, task: Task, holder: Peer, wait_ms: int, late: Late | None = None
    ) -> None:
        """One attempt, to whichever idle car a rendezvous has."""
        but = tuple(attempt.peer for attempt in task.going)
        task.attempt += 1
        first, count = task.missing, task.end - task.missing
        inline = run_inline(job.spec, job.order.inline, first, count)
        sealed = seal_offer(self._out, job, task, None, None, count, inline, None)
        attempt = self._attempts.begin(job, task, holder, count, self.timeout_ms(holder))
        attempt.holder, attempt.asked, attempt.offer = holder, 1, sealed.digest
        attempt.late = late
        job.history[-1].how = "token"
        attempt.frames = (pack(self.message(job, sealed, but, wait_ms)),)
        job.placed.add(task.task_id)
        after = self._attempts.keep(job, task, attempt)
        self._ask(attempt, after)
        self._jobs.note(job, attempt)

    def hedge(self, job: Job, task: Task, holder: Peer, late: Late) -> None:
        """The task's units once more, to another car that is idle now, or to none."""
        self._place(job, task, holder, 0, late)

    def _ask(self, attempt: Attempt, after: int | None = None) -> None:
        frame = attempt.frames[0]
        assert attempt.holder is not None
        attempt.asked_mono_ms = self._out.now.mono_ms
        if attempt.holder == self._out.identity.peer:
            self._out.post(attempt.holder, Lane.CONTROL, frame)
        else:
            attempt.sends = (self._out.send(attempt.holder, Lane.CONTROL, frame, after=after),)

    def found(self, peer: Peer, lease: Lease) -> tuple[Job, Task, Attempt] | None:
        """The attempt that a rendezvous found this car for: one that no car has yet."""
        job = self._jobs.by_task.get(lease.task_id)
        task = job.tasks.get(lease.task_id) if job else None
        going = task.going if task else ()
        attempt = next((one for one in going if one.holder is not None), None)
        entered = self._agreements.with_provider(peer)
        if (
            job is None
            or task is None
            or attempt is None
            or task.elsewhere(attempt, peer)
            or attempt.state is not State.OFFERED
            or attempt.number != lease.attempt
            or attempt.offer != lease.offer
            or entered is None
            or entered.digest != lease.channel
            or peer in job.unsuited
        ):
            return None
        self._attempts.touch(job)
        return job, task, attempt

    def settle(self, job: Job, task: Task, attempt: Attempt, peer: Peer) -> None:
        """The car that was found takes the rendezvous's place in the attempt."""
        assert attempt.holder is not None
        self.served(job, attempt.holder)
        if attempt.asked_mono_ms is not None:
            self._patience.answered(self._out.now.mono_ms - attempt.asked_mono_ms)
        job.placed.discard(task.task_id)
        attempt.holder = None
        attempt.peer = peer
        attempt.started_mono_ms = self._out.now.mono_ms
        job.sources[attempt.source - 1] = (task.task_id, attempt.number, peer)
        self._fleet.take(attempt)
        attempt.frames = attempt.sends = ()
        if any(arg.inline for arg in job.spec.args):
            inline = run_inline(job.spec, job.order.inline, attempt.first, attempt.count)
            frame = pack(Inputs(task.task_id, attempt.number, inline))
            attempt.frames = (frame,)
            self._out.send(peer, Lane.CONTROL, frame)
        if job.order.durable:
            record = self._jobs.task_record(job, attempt)
            self._shelf.add(record, None, lambda: self._attempts.disk_full(job))

    def on_queued(self, peer: Peer, queued: Queued) -> None:
        """No idle car is there now; ours waits in line, and more of ours would only wait too."""
        found = self._attempts.find(peer, queued.task_id, queued.attempt)
        if found is not None and found[2].holder is not None:
            job, _, attempt = found
            wait_ms = QUEUED_MS
            if queued.within_ms is not None:  # another has it, and may keep it
                wait_ms = min(wait_ms, self.timeout_ms(peer) + queued.within_ms)
            elif job.dry_since_mono_ms is None and attempt.late is None:
                job.dry_since_mono_ms = self._out.now.mono_ms
            # Nobody holds it up by saying that again and again.
            last_ms = attempt.started_mono_ms + self._out.limits.queue_ms_max + QUEUED_MS
            attempt.expires_mono_ms = min(self._out.now.mono_ms + wait_ms, last_ms)
            attempt.asked_mono_ms = None  # what comes now has waited in a line
            if attempt.late is None:
                job.place_window = 1
            job.last_sign_mono_ms = self._out.now.mono_ms

    def not_placed(self, job: Job, task: Task, attempt: Attempt, reason: Reason) -> bool:
        """A rendezvous has nobody for it: another is asked once; True if then the cell is to be."""
        assert attempt.holder is not None
        if task.hedge is attempt:  # the first goes on, and another time may be better
            task.hedges -= reason is Reason.NO_TOKEN  # nobody had one to start: that costs nothing
            self._attempts.lose(job, attempt, reason)
            return False
        other = self.draw(but=attempt.holder)
        if attempt.asked < PLACES_MAX and other is not None and task.live is attempt:
            attempt.asked += 1
            attempt.holder = attempt.peer = other
            attempt.started_mono_ms = self._out.now.mono_ms
            timeout_ms = self.timeout_ms(other)
            attempt.expires_mono_ms = self._out.now.mono_ms + timeout_ms
            self._ask(attempt)
            return False
        task.tries = self._out.limits.offer_tries_max
        self._attempts.lose(job, attempt, reason)
        return True
