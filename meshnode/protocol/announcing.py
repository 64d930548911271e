"""Asking a cell: the announcement of a job, and the bids that wait for an agreement.

The fallback when point-to-point offers have nothing more to give, and the whole of it under
`--policy gossip`. Bidders are thinned by sortition, so an answer is never a storm. And a requester
whose jobs nobody bids for asks at a rate of its own, however many they are: what one of them heard
from a full cell, the others would hear too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .advert import cell_topic
from .cell import Roster
from .effects import Publish
from .job import Job, wanted
from .jobs import Jobs
from .objects import T_ANNOUNCE, Announce, JobSpec
from .outbox import Outbox
from .sealed import Sealed

AGAIN: Final = 4  # announcements within the longest wait for one, of all jobs that got no bid


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
        self._again_mono_ms = 0  # before that no job that got no bid asks again
        self.addrs: tuple[str, ...] = ()

    def heard(self) -> None:
        """A car has bid: there may be others, for other jobs of ours."""
        self._again_mono_ms = 0

    def announce(self, job: Job) -> None:
        """Ask the cell; who bids gets a run. Backs off while nobody does."""
        now, limits, waiting = self._out.now, self._out.limits, job.waiting
        if waiting.until_mono_ms > now.mono_ms:
            return
        unheard = waiting.backoff_ms > 0 and not waiting.bidders
        if unheard and self._again_mono_ms > now.mono_ms:
            return
        self._jobs.announced.pop(waiting.announce_id, None)
        waiting.bidders.clear()
        waiting.announce_id = self._out.rng.randbytes(16)
        waiting.backoff_ms = min(
            max(limits.announce_backoff_ms, 2 * waiting.backoff_ms), limits.announce_backoff_ms_max
        )
        waiting.until_mono_ms = now.mono_ms + waiting.backoff_ms
        if unheard:
            gap_ms = min(waiting.backoff_ms, limits.announce_backoff_ms_max // AGAIN)
            self._again_mono_ms = now.mono_ms + gap_ms
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
