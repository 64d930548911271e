"""The cars as this requester believes them to be: reachable, agreed, idle, tired.

Between the book of adverts and `placement`: what stands in the way of a car (no connection, no
agreement) is started here, and the car is a candidate once it is gone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from .advert import AdvertBook
from .agreement import Agreements
from .attempt import Attempt, State
from .effects import Dial
from .job import Job, wanted
from .objects import Advert
from .outbox import Outbox, remember
from .pace import Pace
from .placement import Car, queued_runs
from .reasons import Reason
from .types import Peer

# Refusals that another minute will not mend: the car is left out of this job for good.
UNSUITED = frozenset(
    {
        Reason.OTHER_NETWORK,
        Reason.NOT_PROVIDING,
        Reason.SUBMITTER,
        Reason.PRICE,
        Reason.CURRENCY,
        Reason.BLOCKED,
        Reason.LEASE_LENGTH,
        Reason.BUDGET,
        Reason.MEMORY,
        Reason.UNKNOWN_ARTIFACT,
        Reason.KERNEL_SPEC,
        Reason.JAX_WINDOW,
        Reason.TOO_LARGE,
        Reason.NO_CONSENT,
        Reason.NO_WORKER,
        Reason.DISK_FULL,
        Reason.STORAGE,
    }
)
# A shorter run may fit.
TOO_MUCH = frozenset({Reason.LEASE_LENGTH, Reason.BUDGET})
# Ends that are nobody's fault: the task goes elsewhere and the car may have the next one.
BLAMELESS = frozenset(
    {
        Reason.STOPPED_BY_OWNER,
        Reason.STOPPED_BY_REQUESTER,
        Reason.SHUTDOWN,
        Reason.PEER_DOWN,
        Reason.CLOCK_SKEW,
    }
)


SHUNNED_MAX = 4096
SHORT_UNIT_MS = 100  # a unit that takes no longer may wait behind another of ours
FRESH_MS = 1_000  # for so long a car that ended a run of short units of ours is asked again first
DIALS_MAX = 64  # within `redial_gap_ms`
PARTINGS_MAX = 4096
PARTINGS_COUNTED_MAX = 6  # 64 times the gap


class Fleet:
    def __init__(
        self, outbox: Outbox, agreements: Agreements, book: AdvertBook, pace: Pace
    ) -> None:
        self._out = outbox
        self._pace = pace
        self._agreements = agreements
        self.book = book
        self.peers_up: dict[Peer, int] = {}  # -> rtt us, 0 if not yet measured
        self.mine: Counter[Peer] = Counter()  # live attempts of ours per car
        self._queued: dict[Peer, deque[Attempt]] = {}  # of those, in order, what waits for a slot
        self.backoff: dict[Peer, int] = {}  # car -> mono ms until which it is left alone
        self._shunned: dict[Peer, int] = {}  # the same, but no advert ends it
        self._fresh: dict[Peer, int] = {}  # car -> when it ended a run of ours
        self._dialled: dict[Peer, int] = {}
        self.apart: Callable[[Peer], bool] = lambda _: False
        """Whether its clock is too far from ours: it would take no work, nor we its receipts."""
        self._parted: OrderedDict[Peer, tuple[int, int]] = OrderedDict()  # car -> idle ends, last
        self.has_room: Callable[[int], bool] = lambda _: True  # for a car that may be of use
        self.came_back: Callable[[Peer], None] = lambda _: None  # a run, from that car
        self._in_vain: Reason | None = None  # how the newest attempt to meet anybody ended

    def met(self, peer: Peer) -> None:
        self.peers_up.setdefault(peer, 0)
        self.backoff.pop(peer, None)
        self._in_vain = None

    def met_nobody(self, reason: Reason) -> None:
        """A peer could not be dialled, or turned out to belong to another network: then it takes
        no more calls from us, and the first reason is the one to tell."""
        if self._in_vain is not Reason.OTHER_NETWORK:
            self._in_vain = reason

    def why_nobody(self, job: Job) -> Reason:
        """What cars said to the job, else what they say of themselves, else why none was met."""
        reason = job.why_nobody()
        if reason is not Reason.NOBODY:
            return reason
        own = self._out.identity.peer
        said = Counter(
            self.unfit(job, peer, known.advert)
            for peer, known in self.book.cars.items()
            if peer != own
        )
        del said[Reason.OK], said[Reason.NOT_NAMED]
        if said:
            return said.most_common(1)[0][0]
        if any(map(self.apart, self.peers_up)):
            return Reason.CLOCK_SKEW  # then their adverts may look as if they had expired
        return self._in_vain if self._in_vain is not None and not self.peers_up else reason

    def could_run(self, job: Job) -> bool:
        """Cars are known that could run it, busy as they may be: an advert is in force, and it
        does not say otherwise. Who does not answer is dialled in vain, and leaves the book."""
        own = self._out.identity.peer
        return any(
            peer != own and self.unfit(job, peer, known.advert) in (Reason.OK, Reason.ASLEEP)
            for peer, known in self.book.cars.items()
        )

    def leave_alone(self, peer: Peer, wait_ms: int) -> None:
        self.backoff[peer] = self._out.now.mono_ms + wait_ms

    def shun(self, peer: Peer, wait_ms: int) -> None:
        """It took a run and brought nothing: neither a new advert nor a new connection makes that
        undone, or a run would spin between the two at the speed of the link."""
        if len(self._shunned) < SHUNNED_MAX:
            self._shunned[peer] = self._out.now.mono_ms + wait_ms

    def halved(self, job: Job, attempt: Attempt, reason: Reason) -> bool:
        """The run was too much for this car: it gets half as many units from now on."""
        if reason not in TOO_MUCH:
            return False
        if attempt.count > 1:
            job.most_at[attempt.peer] = attempt.count // 2
            return True
        # Its battery may say something else later, and then its advert does.
        self.shun(attempt.peer, 10 * self._out.limits.backoff_ms)
        return False

    def slow_cars(self, job: Job) -> list[Peer]:
        return self._pace.slow_cars(job)

    def rests(self, peer: Peer) -> bool:
        return self.rests_until(peer) > self._out.now.mono_ms

    def rests_until(self, peer: Peer) -> int:
        return max(self.backoff.get(peer, 0), self._shunned.get(peer, 0))

    def take(self, attempt: Attempt) -> None:
        """One more of our attempts is at its car; over its slots it waits for one before it."""
        peer = attempt.peer
        self.mine[peer] += 1
        self._parted.pop(peer, None)
        known = self.book.cars.get(peer)
        if known is not None and self.mine[peer] > known.advert.slots:
            self._queued.setdefault(peer, deque()).append(attempt)

    def release(self, attempt: Attempt) -> None:
        """One of our attempts is over; the next in the queue begins, as far as we can know."""
        peer = attempt.peer
        self.mine[peer] -= 1
        if attempt.state is State.RETURNED:
            self._fresh[peer] = self._out.now.mono_ms
            self.came_back(peer)
        if self.mine[peer] <= 0:
            del self.mine[peer]
        queued = self._queued.get(peer)
        if queued is None:
            return
        if attempt in queued:
            queued.remove(attempt)
        else:
            queued.popleft().started_mono_ms = self._out.now.mono_ms
        if not queued:
            del self._queued[peer]

    def queued(self, attempt: Attempt) -> bool:
        """It waits at its car for a slot, behind another run of ours."""
        return attempt in self._queued.get(attempt.peer, ())

    def tick(self) -> None:
        if not (self.backoff or self._shunned or self._fresh or self._dialled):
            return
        now = self._out.now.mono_ms
        self.backoff = {peer: until for peer, until in self.backoff.items() if until > now}
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        self._fresh = {peer: at for peer, at in self._fresh.items() if at + FRESH_MS > now}
        gap = self._out.limits.redial_gap_ms
        self._dialled = {peer: at for peer, at in self._dialled.items() if at + gap > now}

    @staticmethod
    def is_short(job: Job) -> bool:
        """Its units are known to be over soon."""
        return 0 < job.unit_ms <= SHORT_UNIT_MS

    def ours(self, job: Job) -> set[Peer]:
        """Cars that work for this job; for short units also those that have ended a run of ours a
        moment ago and got no other: a way round a hop that would be much of the whole call."""
        live = (attempt for task_id in job.live for attempt in job.tasks[task_id].going)
        busy = {attempt.peer for attempt in live if attempt.holder is None}
        if job.unit_ms > SHORT_UNIT_MS:
            return busy
        since = self._out.now.mono_ms - FRESH_MS
        fresh = {peer for peer, at in self._fresh.items() if at >= since and not self.mine[peer]}
        return busy | fresh

    def cars(self, job: Job, ours: set[Peer] | None = None) -> list[Car]:
        """Cars that may take a run of this job now; starts what stands in the way for others.
        With `ours` only those are looked at."""
        consts = wanted(job.spec)
        cars: list[Car] = []
        now_ms, backoff, shunned = self._out.now.mono_ms, self.backoff, self._shunned
        for peer in self.book.cars if ours is None else sorted(ours):
            # First what costs nothing: where all are busy, all have just said so.
            if backoff.get(peer, 0) > now_ms or shunned.get(peer, 0) > now_ms:
                continue
            known = self.book.cars.get(peer)
            if known is None:
                continue
            advert = known.advert
            if peer == self._out.identity.peer or self.unfit(job, peer, advert) is not Reason.OK:
                continue
            if peer not in self.peers_up:
                self._seek(peer, advert.addrs)
                continue
            if self._agreements.with_provider(peer) is None:
                self._agreements.ask(peer)
                continue
            cars.append(self.car(job, peer, advert, consts, ours is not None))
        return cars

    def car(
        self, job: Job, peer: Peer, advert: Advert, consts: tuple[bytes, ...], ours: bool = False
    ) -> Car:
        """What placement compares; `consts` is what a run of the job needs to have there."""
        mine = self.mine.get(peer, 0)
        rtt_us = self.peers_up.get(peer, 0)
        most = self._out.limits.leases_queued_per_slot_max
        capacity = advert.slots * (1 + queued_runs(job.unit_ms, rtt_us, most)) - mine
        return Car(
            peer,
            capacity,
            mine == 0 and advert.slots_free > 0,
            rtt_us,
            max((c.rate_mflops for c in advert.classes), default=0),
            all(prefix in advert.cached for prefix in consts),
            advert.budget.spendable_mwh,
            slow=self._pace.slow(job, peer),
            ours=ours,
        )

    def named(self, job: Job, peer: Peer) -> bool:
        """Whether the submitter lets this car run the job: by itself, or by its owner's account,
        which only its mandate shows. Without an agreement nobody knows: asking is free."""
        order = job.order
        if peer in order.cars or not (order.cars or order.owners):
            return True
        entered = self._agreements.with_provider(peer)
        if entered is None:
            return bool(order.owners)
        return entered.agreement.payee in order.owners

    def unfit(self, job: Job, peer: Peer, advert: Advert) -> Reason:
        """Why this car is not even asked, by what it says of itself; OK if it is."""
        if not self.named(job, peer):
            return Reason.NOT_NAMED
        if peer in job.unsuited:
            return job.unsuited[peer]
        if self.apart(peer):
            return Reason.CLOCK_SKEW
        asleep = advert.budget.reason is Reason.ASLEEP
        if not advert.budget.may_run and not asleep:
            return advert.budget.reason
        if not advert.classes:
            return Reason.NO_WORKER
        unit_ms = job.unit_ms or job.order.unit_ms_hint
        # A long job may be handed on in the middle.
        if unit_ms > advert.budget.lease_s_max * 1000 and job.spec.steps is None:
            return Reason.LEASE_LENGTH
        fits = job.spec.memory_mb_max <= max(c.memory_mb for c in advert.classes)
        if not fits:
            return Reason.MEMORY
        return Reason.ASLEEP if asleep else Reason.OK  # it could run it once it is awake

    def parted(self, peer: Peer) -> None:
        """A connection is gone. One that nothing came of is not sought again at once, and each
        time it takes twice as long: a full car that hangs up on the idle would be called for ever
        by all whom its adverts reach."""
        if not self.mine[peer]:
            count = self._parted.get(peer, (0, 0))[0] + 1
            remember(self._parted, peer, (count, self._out.now.mono_ms), PARTINGS_MAX)

    def _seek(self, peer: Peer, addrs: tuple[str, ...]) -> None:
        """For work that this car may take or not: only while there is room for it."""
        count, since = self._parted.get(peer, (0, 0))
        gap = self._out.limits.redial_gap_ms << min(count - 1, PARTINGS_COUNTED_MAX) if count else 0
        if since + gap <= self._out.now.mono_ms and self.has_room(len(self._dialled)):
            self.dial(peer, addrs)

    def dial(self, peer: Peer, addrs: tuple[str, ...]) -> None:
        now = self._out.now.mono_ms
        if len(self._dialled) >= DIALS_MAX and peer not in self._dialled:
            return  # adverts name addresses that nobody has checked; the rest in a moment
        if self._dialled.get(peer, -(10**9)) + self._out.limits.redial_gap_ms <= now:
            self._dialled[peer] = now
            self._out.add(Dial(peer, addrs))
