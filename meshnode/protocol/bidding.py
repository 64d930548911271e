"""Bids: a car holds a slot for us, and gets a run while it does.

A bid answers an announcement, or the rendezvous that found the car for us. With a car that we have
no agreement with, one is made first, and the bid waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

from .agreement import Agreements
from .attempts import Attempts
from .fleet import Fleet
from .job import Job, Task
from .jobs import Jobs
from .objects import T_TOKEN, Token
from .offering import Offers
from .outbox import Outbox
from .placement import Choice
from .placing import Placing
from .reasons import Reason
from .sealed import Sealed
from .types import Peer, TaskId


class Bidding:
    def __init__(
        self,
        outbox: Outbox,
        agreements: Agreements,
        jobs: Jobs,
        fleet: Fleet,
        attempts: Attempts,
        offers: Offers,
        placing: Placing,
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._jobs = jobs
        self._fleet = fleet
        self._attempts = attempts
        self._offers = offers
        self._placing = placing
        self._bids: dict[Peer, tuple[Job, Token, Sealed]] = {}  # that wait for an agreement
        self.heard: Callable[[Job], None] = lambda _: None  # a car has bid for it

    def on_token(self, peer: Peer, sealed: Sealed) -> None:
        """A bid: a slot of that car is held for us for a moment."""
        token = sealed.open(Token, T_TOKEN)
        if sealed.kid != peer or token.peer != peer or token.announce_id is None:
            return
        if self._fleet.apart(peer):
            return
        placed = self._placed_task(token)
        if placed is not None:
            self._on_assigned(peer, *placed, token, sealed)
            return
        job = self._jobs.announced.get(token.announce_id)
        if job is None or not job.to_place() or peer in job.unsuited:
            return
        if not self._fleet.named(job, peer):
            return
        if peer in job.waiting.bidders:
            return  # one announcement, one run for each that bids
        job.waiting.bidders.add(peer)
        self.heard(job)
        if self._agreements.with_provider(peer) is None:
            self._bids[peer] = (job, token, sealed)
            self._agreements.ask(peer)
            return
        self._award(job, peer, sealed)

    def _placed_task(self, token: Token) -> tuple[Job, Task] | None:
        """The task that a rendezvous has assigned to the bidding car, while it waits."""
        task_id = TaskId(token.announce_id or b"")
        job = self._jobs.by_task.get(task_id)
        return (job, job.tasks[task_id]) if job is not None and task_id in job.placed else None

    def _on_assigned(self, peer: Peer, job: Job, task: Task, token: Token, sealed: Sealed) -> None:
        """A car that we have no agreement with was assigned our task, and holds a slot for us."""
        attempt = next(one for one in task.going if one.holder is not None)
        if peer in job.unsuited or task.elsewhere(attempt, peer):
            return
        if self._agreements.with_provider(peer) is None:
            self._attempts.touch(job)
            attempt.expires_mono_ms = self._out.now.mono_ms + (token.hold_ms or 0)
            self._bids[peer] = (job, token, sealed)
            self._agreements.ask(peer)
            return
        assert attempt.holder is not None
        self._placing.served(job, attempt.holder)
        self._attempts.lose(job, attempt, Reason.HELD, again=False)
        if task.missing >= task.end:
            return  # a run that was given up has brought the rest meanwhile
        self._offers.offer(job, peer, task, sealed, None, attempt.late)
        job.history[-1].how = "token"

    def _award(self, job: Job, peer: Peer, sealed: Sealed) -> None:
        job.drop_whole()
        if not job.to_place() or self._fleet.rests(peer) or not self._fleet.named(job, peer):
            return
        job.waiting.backoff_ms = 0
        cars = self._fleet.cars(job)
        task = self._offers.next_run(job, cars)
        task.tries = 0
        self._offers.offer(job, peer, task, sealed, Choice.of(cars, peer))

    def peer_down(self, peer: Peer) -> None:
        self._bids.pop(peer, None)

    def in_force(self, peer: Peer) -> None:
        """An agreement was signed: a bid may have waited for it."""
        waiting = self._bids.pop(peer, None)
        if waiting is None:
            return
        job, token, sealed = waiting
        placed = self._placed_task(token)
        if placed is not None:
            self._on_assigned(peer, *placed, token, sealed)
        elif job.to_place() and token.announce_id in self._jobs.announced:
            self._award(job, peer, sealed)
