"""How long runs take, by kind of work, and which cars are far behind the others.

`hedging` says which runs came back or were outrun, and asks whether another is late; `fleet` asks
whether a car is slow. What a car says of itself counts for nothing here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from .attempt import Attempt
from .durations import Durations
from .job import Job, Kind
from .outbox import Outbox, remember
from .types import Peer

KNOWN_LEAST: Final = 8  # runs, before anything is said of the next
KINDS_MAX: Final = 64
CARS_MAX: Final = 1024  # of a kind, whose last runs are remembered
SLOW_RUNS: Final = 3  # in a row, after which a car is slow
SLOW_TIMES: Final = 3  # the median of its kind: so long a run of a slow car takes at the least
SLOW_MS_LEAST: Final = 100  # and so long over it: a far car's short runs are mostly round trips
SLOW_FOR_MS: Final = 60_000  # a slow car comes last; then it is tried again
OUTRUN_FOR_MS: Final = 10_000  # the same, of one that a hedge has outrun, and so set free
UNIT_MS_LEAST: Final = 0.05  # of a run shorter than the clock can tell


@dataclass(slots=True)
class _Past:
    """What is known of a kind of work: ms a unit, and whose last runs were far behind."""

    times: Durations = field(default_factory=Durations)
    behind: OrderedDict[Peer, deque[bool]] = field(default_factory=OrderedDict)
    slow: dict[Peer, int] = field(default_factory=dict)  # car -> mono ms until which it counts so


class Pace:
    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox
        self._kinds: OrderedDict[Kind, _Past] = OrderedDict()

    def times(self, job: Job) -> Durations | None:
        """Ms a unit of the job's own runs, if it has had enough, else of its kind's; None: nobody
        knows yet."""
        if job.times is not None and len(job.times) >= KNOWN_LEAST:
            return job.times
        past = self._kinds.get(job.kind)
        return past.times if past is not None and len(past.times) >= KNOWN_LEAST else None

    def returned(self, job: Job, attempt: Attempt) -> None:
        """A run has brought all its units."""
        spent_ms = self._out.now.mono_ms - attempt.started_mono_ms
        unit_ms = max(UNIT_MS_LEAST, spent_ms / attempt.count)
        past = self._past(job)
        if self._judge(past, attempt.peer, unit_ms, attempt.count):
            return  # it is known to be slow, and says nothing of the others
        past.times.add(unit_ms)
        if job.spec.units > 1:
            job.times = job.times or Durations()
            job.times.add(unit_ms)

    def outrun(self, job: Job, attempt: Attempt) -> None:
        """Another was faster: this one would have taken longer than it has. Frozen or only slow,
        nobody knows: others come first for a while."""
        units = attempt.next_unit - attempt.first + 1
        spent_ms = self._out.now.mono_ms - attempt.started_mono_ms
        past = self._past(job)
        if not self._judge(past, attempt.peer, spent_ms / units, units):
            self._mark(past, attempt.peer, OUTRUN_FOR_MS)

    def slow(self, job: Job, peer: Peer) -> bool:
        """Its last runs of this kind took far longer than others' do. It is tried again later."""
        past = self._kinds.get(job.kind)
        return past is not None and past.slow.get(peer, 0) > self._out.now.mono_ms

    def slow_cars(self, job: Job) -> list[Peer]:
        past = self._kinds.get(job.kind)
        return sorted(peer for peer in past.slow if self.slow(job, peer)) if past else []

    def _past(self, job: Job) -> _Past:
        past = self._kinds.get(job.kind) or _Past()
        remember(self._kinds, job.kind, past, KINDS_MAX)
        return past

    def _judge(self, past: _Past, peer: Peer, unit_ms: float, units: int) -> bool:
        """One more run of the car; True if it is slow now."""
        if len(past.times) < KNOWN_LEAST:
            return False
        now_ms = self._out.now.mono_ms
        usual_ms = past.times.quantile(500)
        over_ms = (unit_ms - usual_ms) * units
        runs = past.behind.get(peer) or deque(maxlen=SLOW_RUNS)
        runs.append(unit_ms > SLOW_TIMES * usual_ms and over_ms > SLOW_MS_LEAST)
        remember(past.behind, peer, runs, CARS_MAX)
        if not runs[-1]:
            past.slow.pop(peer, None)
        elif len(runs) == SLOW_RUNS and all(runs):
            self._mark(past, peer, SLOW_FOR_MS)
        return past.slow.get(peer, 0) > now_ms

    def _mark(self, past: _Past, peer: Peer, for_ms: int) -> None:
        """Never most of the cars: then it is the work that has changed."""
        now_ms = self._out.now.mono_ms
        past.slow = {p: until for p, until in past.slow.items() if until > now_ms}
        if peer in past.slow or 2 * (len(past.slow) + 1) <= len(past.behind):
            past.slow[peer] = now_ms + for_ms
