"""Hedges: a run that is late is started once more, on an idle car, and the first whole result wins.

Late is a run that has taken longer than 95 of 100 runs of its kind do (Dean and Barroso, The Tail
at Scale, 2013), while a fresh one would be over sooner by what is known: of a car that has brought
units by its own rate, else by how much longer such late runs have taken. Only where a job has
nothing else to place, never queued behind other work, and never of a long job, which hands off.

What hedges compute is bounded by a share of what runs have computed: `Limits.hedge_permille`. Both
attempts are live under their own numbers, so leases, parts and receipts find theirs; a unit is
taken from whoever brings it first, and the other's receipt for it is withheld as a duplicate.
"""

from __future__ import annotations

from typing import Final

from .attempt import Attempt, Late, State
from .attempts import Attempts
from .durations import Durations
from .fleet import Fleet
from .job import Job, Task
from .offering import Offers
from .outbox import Outbox
from .pace import Pace
from .placement import AdvertPlacement, Choice
from .placing import Placing
from .reasons import Reason

LATE_PERMILLE: Final = 950  # of the runs of a kind: one is late when it has taken longer
GAIN: Final = 1.5  # what is left must be so many times a fresh run, which costs a start as well
RUN_MS_MAX: Final = 60_000  # a hedge is expected to take no longer: then it is no matter of latency
HEDGES_MAX: Final = 3  # of one task; one that no car was idle for does not count
LOOK_MS_LEAST: Final = 250  # before a run is looked at again that no hedge would help
LOOK_MS_SOON: Final = 20  # the same, where it is not late yet
RUN_ALL_THE_SAME: Final = frozenset({Reason.SUPERSEDED, Reason.HELD})  # by another attempt
SAVED_MS_MAX: Final = 60_000  # of computing that a quiet time may save up for hedges


class Hedging:
    def __init__(
        self,
        outbox: Outbox,
        fleet: Fleet,
        pace: Pace,
        attempts: Attempts,
        offers: Offers,
        placing: Placing,
    ) -> None:
        self._out = outbox
        self._fleet = fleet
        self._pace = pace
        self._attempts = attempts
        self._offers = offers
        self._placing = placing
        self._idle = AdvertPlacement()
        self._saved_ms = 0.0
        self._asked: list[tuple[Attempt, float]] = []  # hedges that no car has leased yet, and cost

    def begun(self, job: Job, attempt: Attempt) -> None:
        """A car has leased it: when to look whether it is late."""
        if self._serves(job):
            times = self._pace.times(job)
            wait_ms = LOOK_MS_LEAST if times is None else self._allowed_ms(attempt, times)
            attempt.look_mono_ms = self._out.now.mono_ms + int(wait_ms) + 1

    def returned(self, job: Job, task: Task, attempt: Attempt) -> None:
        """A run is whole: what another was to bring of it is here."""
        spent_ms = self._out.now.mono_ms - attempt.started_mono_ms
        earned_ms = spent_ms * self._out.limits.hedge_permille / 1000
        self._saved_ms = min(SAVED_MS_MAX, self._saved_ms + earned_ms)
        self._pace.returned(job, attempt)
        if attempt.late is not None:
            self._out.counters["hedges_won"] += 1
        self.relieve(job, task, attempt)

    def relieve(self, job: Job, task: Task, by: Attempt) -> None:
        """Runs of the task whose units are all here by now need not go on."""
        for other in task.going:
            if other is not by and task.missing >= other.end:
                if by.late is not None and other.state is State.LEASED:
                    self._pace.outrun(job, other)
                self._attempts.stop(job, other, Reason.SUPERSEDED)

    def look(self, job: Job, task: Task, attempt: Attempt) -> None:
        """Start it once more if it is late and that may help; else say when to look again."""
        now_ms = self._out.now.mono_ms
        attempt.look_mono_ms = None
        over = attempt.state is not State.LEASED or task.hedges >= HEDGES_MAX
        if over or not self._serves(job):
            return
        spent_ms = now_ms - attempt.started_mono_ms
        times = self._pace.times(job)
        if times is None:
            self._look_again(job, attempt, spent_ms)
            return
        allowed_ms = self._allowed_ms(attempt, times)
        if spent_ms < allowed_ms or self._fleet.queued(attempt):
            wait_ms = allowed_ms - spent_ms if spent_ms < allowed_ms else allowed_ms
            self._look_again(job, attempt, wait_ms, LOOK_MS_SOON)
            return
        cost_ms = times.mean() * (attempt.end - task.missing)
        if len(task.going) > 1 or job.to_place() or not self._helps(attempt, times, cost_ms):
            self._look_again(job, attempt, spent_ms // 2)
            return
        if self._affords(cost_ms):
            self._start(job, task, attempt, times, cost_ms)
        self._look_again(job, attempt, spent_ms // 2)  # nobody may have taken it

    def _serves(self, job: Job) -> bool:
        """Not a long job, and not one that only asks the whole cell: an announcement is answered by
        whoever likes to, which is no way to find one idle car soon."""
        on = self._out.limits.hedge_permille > 0
        return on and job.spec.steps is None and job.order.policy != "gossip"

    def _look_again(
        self, job: Job, attempt: Attempt, wait_ms: float, least_ms: int = LOOK_MS_LEAST
    ) -> None:
        """A wait is no shorter than what has passed or is allowed, or about half of it: a run of
        hours is not looked at each second."""
        attempt.look_mono_ms = self._out.now.mono_ms + max(least_ms, int(wait_ms) + 1)
        self._attempts.touch(job)

    def _allowed_ms(self, attempt: Attempt, times: Durations) -> float:
        """So long 95 of 100 such runs have taken at the most to where this one is.

        Units may come in bunches, so the pace is looked at from half of the run on, and only of a
        run that has brought some: one that brings all at its end has none to show."""
        done = attempt.next_unit - attempt.first
        half = (attempt.count + 1) // 2
        units = min(attempt.count, max(done + 1, half)) if done else attempt.count
        return times.quantile(LATE_PERMILLE) * units + self._out.limits.hedge_ms_least

    def _helps(self, attempt: Attempt, times: Durations, cost_ms: float) -> bool:
        spent_ms = self._out.now.mono_ms - attempt.started_mono_ms
        done, mean_ms = attempt.next_unit - attempt.first, times.mean()
        if cost_ms > RUN_MS_MAX:
            return False
        if done:
            return spent_ms / done > GAIN * mean_ms
        left_ms = times.left(spent_ms / attempt.count)
        return left_ms is None or left_ms > GAIN * mean_ms

    def _affords(self, cost_ms: float) -> bool:
        """What no car took costs nothing."""
        for hedge, asked_ms in self._asked:
            if not hedge.live and hedge.lease_id is None and hedge.reason not in RUN_ALL_THE_SAME:
                self._saved_ms += asked_ms
        self._asked = [(a, ms) for a, ms in self._asked if a.live and a.lease_id is None]
        return cost_ms <= self._saved_ms

    def _start(
        self, job: Job, task: Task, attempt: Attempt, times: Durations, cost_ms: float
    ) -> None:
        """To a car that says it is idle, or that a rendezvous knows to be."""
        spent_ms = self._out.now.mono_ms - attempt.started_mono_ms
        usual_ms = times.quantile(LATE_PERMILLE) * attempt.count
        late = Late(attempt.number, spent_ms, int(usual_ms))
        holder = self._placing.draw() if self._placing.serves(job) else None
        if holder is not None:
            self._placing.hedge(job, task, holder, late)
        else:
            cars = [car for car in self._fleet.cars(job) if car.idle and not car.slow]
            peer = self._idle.choose([c for c in cars if c.peer != attempt.peer], self._out.rng)
            if peer is None:
                return
            self._offers.offer(job, peer, task, None, Choice.of(cars, peer), late)
        assert task.hedge is not None
        task.hedges += 1
        self._saved_ms -= cost_ms
        self._asked.append((task.hedge, cost_ms))
        self._out.counters["hedges"] += 1
