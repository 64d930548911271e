"""Asking a cell: the announcement of a job, and the bids that wait for an agreement.

The fallback when point-to-point offers have nothing more to give, and the whole of it under
`--policy gossip`. Bidders are thinned by sortition, so an answer is never a storm. And where it is
the fallback, jobs that need the same and got no bid ask in turn, at the rate of one, however many
they are: what one of them heard from a full cell, the others would hear too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from .advert import cell_topic
from .cell import Roster
from .effects import Publish
from .job import Job, wanted
from .jobs import Jobs
from .objects import T_ANNOUNCE, Announce, JobSpec
from .outbox import Outbox, remember
from .sealed import Sealed

AGAIN: Final = 4  # announcements within the longest wait for one, of all jobs that need the same
NEEDS_MAX: Final = 256  # of which a requester remembers when it last asked

_Need = tuple[object, ...]


def _need(job: Job) -> _Need:
    """What cars are asked for: of jobs that need the same, each gets the answer of the others."""
    order = job.order
    return (job.spec.artifact, job.spec.memory_mb_max, order.cars, order.owners, order.policy)


class Announcer:
    def __init__(
        self,
        outbox: Outbox,
        roster: Roster,
        jobs: Jobs,
        beyond: Callable[[JobSpec, Sealed], None],
    ) -> None:
        """`beyond` asks other cells for a job that nobody here has bid for."""
        self._out = outbox
        self._beyond = beyond
        self._roster = roster
        self._jobs = jobs
        self._again_mono_ms: OrderedDict[_Need, int] = OrderedDict()
        """Before that no job of this need asks again: the last got no bid."""
        self._oldest = False  # whether the last turn was the oldest job's
        self.addrs: tuple[str, ...] = ()

    def heard(self, job: Job) -> None:
        """A car has bid: there may be others, for other jobs of ours."""
        self._again_mono_ms.pop(_need(job), None)

    def back_in_line(self, job: Job) -> None:
        """A cell that was asked and did not answer has nobody idle: whoever is next, the rendezvous
        hears of it first. Without this a job that has been in the line once would be overtaken by
        all that come later."""
        for task in job.retry:
            task.tries = 0

    def in_vain(self, job: Job) -> bool:
        """It has asked a few times, and nobody has bid."""
        waiting = job.waiting
        often = waiting.backoff_ms >= self._out.limits.announce_backoff_ms_max
        return often and not waiting.bidders

    def announce(self, job: Job) -> None:
        """Ask the cell; who bids gets a run. Backs off while nobody does, and lets others of the
        same need have their turn."""
        now_ms = self._out.now.mono_ms
        if job.waiting.until_mono_ms > now_ms:
            return
        if job.order.policy == "gossip":  # nothing else finds it a car
            self._ask(job)
            return
        shut = self._again_mono_ms.get(_need(job), 0) > now_ms
        first = None if shut else self._first(job)
        if first is not None:
            self._ask(first)
        if first is not job and not job.waiting.until_mono_ms:
            job.waiting.until_mono_ms = now_ms  # it waits from now on

    def _first(self, job: Job) -> Job:
        """Of all that need the same and wait for their turn the oldest, and every other time the
        one that has asked least lately: the oldest may be the one that no car can take."""
        now_ms, need = self._out.now.mono_ms, _need(job)
        self._oldest = not self._oldest
        first = job
        for other in self._jobs.running.values():
            since_ms = other.waiting.until_mono_ms
            if 0 < since_ms < (first.waiting.until_mono_ms or now_ms) or self._oldest:
                waits = 0 < since_ms <= now_ms and other.to_place() and not other.waiting.bidders
                if waits and _need(other) == need:
                    first = other
                    if self._oldest:  # jobs stand in the order in which they came
                        break
        return first

    def _ask(self, job: Job) -> None:
        now, limits, waiting = self._out.now, self._out.limits, job.waiting
        unheard = waiting.backoff_ms > 0 and not waiting.bidders
        self._jobs.announced.pop(waiting.announce_id, None)
        waiting.bidders.clear()
        waiting.announce_id = self._out.rng.randbytes(16)
        waiting.backoff_ms = min(
            max(limits.announce_backoff_ms, 2 * waiting.backoff_ms), limits.announce_backoff_ms_max
        )
        waiting.until_mono_ms = now.mono_ms + waiting.backoff_ms
        if unheard and job.order.policy != "gossip":
            gap_ms = min(waiting.backoff_ms, limits.announce_backoff_ms_max // AGAIN)
            remember(self._again_mono_ms, _need(job), now.mono_ms + gap_ms, NEEDS_MAX)
        self._jobs.announced[waiting.announce_id] = job
        cars = max(1, self._roster.cars(self._out.identity.cell))
        share = min(1.0, limits.bids_target / cars)
        left = job.spec.units - job.fresh + sum(t.end - t.missing for t in job.retry)
        identity = self._out.identity
        announce = Announce(
            1,
            identity.network,
            identity.peer,
            waiting.announce_id,
            "announce",
            job.spec.kernel,
            job.spec.artifact,
            wanted(job.spec),
            left,
            job.spec.memory_mb_max,
            int(job.unit_ms),
            int(share * ((1 << 32) - 1)),
            now.unix_ms + 30_000,
            0,
            self.addrs,
            job.spec.code,
        )
        sealed = self._out.seal(announce, T_ANNOUNCE)
        self._out.add(Publish(cell_topic(identity.network, identity.cell), sealed.wire))
        if unheard:
            self._beyond(job.spec, sealed)
        self._out.counters["announced"] += 1
        self._out.notify(job.job_id, "announced", units=left)
