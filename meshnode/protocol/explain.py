"""Why a job's runs wait or went where they went: a pure read of what its requester knows.

Nobody is asked: it counts over the cars that are known by their adverts and over those that
answered, by typed reasons, with a few examples in the cars' own words. Used by `Node.explain` and
`Node.would`, and through the control socket by `mesh explain` and `mesh submit --dry-run`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from .agreement import Agreements
from .attempt import Attempt, Late, State
from .codec import digest
from .events import JobOrder
from .fleet import Fleet
from .job import Job, JobState, Past, Task, make_spec, spec_bytes, wanted
from .jobs import UNITS_HELD_MAX
from .objects import Advert
from .outbox import Identity
from .placement import Car, Placement
from .reasons import Reason
from .types import JobId, Now, Peer, array_bytes

_T = TypeVar("_T")

EXAMPLES_MAX = 3  # cars named for each reason
RUNS_MAX = 256  # newest runs that are told of
ASKED_MAX = 16  # cars that a dry run names

# What stands between a car and an offer for a moment only: the car is asked once it is gone.
SOON = frozenset(
    {Reason.WAITS_LINK, Reason.WAITS_AGREEMENT, Reason.WAITS_SLOT, Reason.WAITS_BACKOFF}
)

_ADVICE = {
    Reason.NOT_NAMED: "give the job more of --cars, or leave the option out",
    Reason.BUDGET: "lower the units per lease, or wait until they have charged",
    Reason.CHARGE_FLOOR: "wait until they have charged",
    Reason.LEASE_LENGTH: "make a unit shorter, or run a stepped kernel, which moves on with its"
    " checkpoint",
    Reason.MEMORY: "ask for less memory (`memory_mb_max` of the terms)",
    Reason.SUBMITTER: "their owners must admit your account; or --cars mine",
    Reason.ACCOUNT_CAP: "wait: what was used a day ago is free again; or let more cars join",
    Reason.NO_CONSENT: "their owners run `meshnode init` once more",
    Reason.NO_WORKER: "they have not measured their device yet; if it stays so, look at"
    " `meshnode status` there",
    Reason.SANDBOX: "their owners ask for a sandbox that the machine does not have",
    Reason.UNPLUGGED: "wait until they are plugged in",
    Reason.DRIVING: "wait until they are parked again",
    Reason.DRAINING: "wait for other cars: these are leaving",
    Reason.READINGS: "their vehicle gives no readings; look at `meshnode status` there",
    Reason.TEMPERATURE: "wait until their batteries are warmer or cooler",
    Reason.BUSY: "wait, or let more cars join",
    Reason.CLOCK_SKEW: "set the clocks, with NTP; `meshnode status` says whose are off",
    Reason.OTHER_NETWORK: "check --join and the genesis file",
    Reason.UNREACHABLE: "check --join, and that a node runs there",
    Reason.NO_ANSWER: "they are frozen or cut off; `mesh peers` shows who is up",
    Reason.LEASE_LOST: "they are frozen or cut off; `mesh peers` shows who is up",
    Reason.PEER_DOWN: "they went away; wait for others, `mesh peers` shows who is up",
    Reason.NOBODY: "no car is known; check --join, and that cars run in this cell",
    Reason.UNKNOWN_ARTIFACT: "they run another release; `mesh artifact build` takes the code along",
    Reason.FAILED_BY_JOB: "`mesh logs JOB` has the cars' own words",
    Reason.DEADLINE: "give the job a later --deadline",
    Reason.WALL_CLOCK: "let a unit take longer (`wall_s_max` of the terms), or make it smaller",
    Reason.WAITS_SLOT: "wait, or let more cars join",
    Reason.WAITS_LINK: "wait: they are being dialled",
    Reason.WAITS_AGREEMENT: "wait: the agreement takes a round trip or two",
    Reason.WAITS_BACKOFF: "wait: they are asked again by themselves",
}


@dataclass(frozen=True, slots=True)
class Example:
    peer: Peer
    text: str  # the car's own words or figures, if it gave any


@dataclass(frozen=True, slots=True)
class Stand:
    """Cars that get no run of the job now, for one reason."""

    reason: Reason
    cars: int
    again_ms: int | None  # from now, when the first of them is asked again; None: not by the clock
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run of units went, and what its car was chosen by (design section 4)."""

    task: bytes
    attempt: int
    peer: Peer
    first: int
    count: int
    done: int
    state: str
    reason: Reason
    from_step: int
    how: str  # "offer", "bid", "token" of a rendezvous, or "" for one of before a restart
    late: Late | None  # the attempt that it was to overtake; None: it is no hedge
    among: int | None  # cars that had room then; this and the next are None where none was compared
    chosen: Car | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Units that wait for one thing."""

    reason: Reason
    units: int
    until_ms: int | None  # from now, when it ends by itself


@dataclass(frozen=True, slots=True)
class Explanation:
    job_id: JobId
    kernel: str
    state: str
    reason: Reason
    units: int
    done: int
    in_work: int
    waiting: int
    cars_known: int
    cars_working: int
    cars_open: int  # would be offered the next run now
    stands: tuple[Stand, ...]  # the commonest first
    waits: tuple[Wait, ...]
    runs: tuple[Run, ...]  # oldest first
    runs_left_out: int
    advice: str  # one line; empty where nothing need be done


@dataclass(frozen=True, slots=True)
class Asked:
    """A car that would be asked, and what stands before it for a moment."""

    peer: Peer
    reason: Reason  # OK: at once
    car: Car


@dataclass(frozen=True, slots=True)
class Would:
    """What a submission would do now; nothing of it was done."""

    kernel: str
    units: int
    bytes_in_per_unit: int
    bytes_once: int  # constants and code: each car fetches them once, unless it is warm
    bytes_out_per_unit: int
    kflop_per_unit: int  # 0: not known
    how: str  # "offer": to chosen cars; "announce": in the cell, who bids gets a run; "place"
    cars_known: int
    cars_asked: int
    asked: tuple[Asked, ...]  # the first is the best; at most ASKED_MAX
    stands: tuple[Stand, ...]  # why the others are not
    unit_ms: float | None  # at the best car; by the order's hint, else by kFLOP and its rate
    unit_energy_mwh: float | None  # so long at the most that its owner lets it draw
    advice: str


class Sight:
    """What this requester knows of the cars, for one job, at one moment."""

    def __init__(self, job: Job, fleet: Fleet, agreements: Agreements, own: Peer, now: Now) -> None:
        self._job = job
        self._fleet = fleet
        self._agreements = agreements
        self._own = own
        self._now_ms = now.mono_ms
        self._consts = wanted(job.spec)
        self.working = {attempt.peer for attempt in _live(job) if attempt.holder is None}

    def known(self) -> Iterator[tuple[Peer, Advert]]:
        for peer, known in self._fleet.book.cars.items():
            if peer != self._own:
                yield peer, known.advert

    def car(self, peer: Peer, advert: Advert) -> Car:
        return self._fleet.car(self._job, peer, advert, self._consts)

    def stand(self, peer: Peer, advert: Advert) -> tuple[Reason, str, int | None]:
        """Why the car gets no run now, its words, and when it is asked again; OK if it would."""
        job, fleet = self._job, self._fleet
        answer = job.answers.get(peer)
        reason = fleet.unfit(job, peer, advert)
        if reason is not Reason.OK:
            said = answer.text if answer is not None and answer.reason is reason else ""
            return reason, said or _figures(reason, advert), None
        again_ms = fleet.rests_until(peer) - self._now_ms
        if again_ms > 0:
            if answer is not None:
                return answer.reason, answer.text, again_ms
            return Reason.WAITS_BACKOFF, "", again_ms
        if peer not in fleet.peers_up:
            return Reason.WAITS_LINK, "", None
        if self._agreements.with_provider(peer) is None:
            return Reason.WAITS_AGREEMENT, "", None
        if self.car(peer, advert).capacity <= 0:
            return Reason.WAITS_SLOT, f"has {fleet.mine[peer]} of this node's runs", None
        return Reason.OK, "", None


def explain(
    job: Job, fleet: Fleet, agreements: Agreements, identity: Identity, now: Now
) -> Explanation:
    """The job as it stands; of one that has ended, what its cars answered, and of one that failed
    also which of the others would not take it now either."""
    sight = Sight(job, fleet, agreements, identity.peer, now)
    known, free, stands = _stands(job, sight)
    first = (job.tasks[task_id].live for task_id in job.live)  # a hedge brings the same units
    in_work = sum(a.end - a.next_unit for a in first if a is not None and a.state is State.LEASED)
    waits = tuple(_waits(job, stands, free, now)) if job.state is JobState.RUNNING else ()
    left_out = max(0, len(job.history) - RUNS_MAX)
    return Explanation(
        job.job_id,
        job.spec.kernel,
        job.state.name.lower(),
        job.reason,
        job.spec.units,
        job.taken,
        in_work,
        max(0, job.spec.units - job.taken - in_work) if job.state is JobState.RUNNING else 0,
        known,
        len(sight.working),
        free,
        stands,
        waits,
        tuple(_run(past) for past in islice(job.history, left_out, None)),
        left_out,
        _advice_of(job, stands, waits),
    )


def _stands(job: Job, sight: Sight) -> tuple[int, int, tuple[Stand, ...]]:
    """Cars that are known, those that would take a run now, and why the others do not."""
    counted = _Counted()
    known, free = 0, 0
    told = set(sight.working)
    placing, failed = job.to_place(), job.state is JobState.FAILED
    for peer, advert in sight.known():
        known += 1
        if not placing and not (failed and peer not in job.answers):
            continue
        reason, text, again_ms = sight.stand(peer, advert)
        free += placing and reason is Reason.OK
        passing = reason is Reason.OK or (failed and (reason in SOON or again_ms is not None))
        if not passing and peer not in told:
            counted.add(reason, peer, text, again_ms)
        told.add(peer)
    for peer, answer in job.answers.items():
        if peer not in told:
            counted.add(answer.reason, peer, answer.text, None)
    return known, free, counted.stands()


def would(
    order: JobOrder,
    kflop_per_unit: int,
    fleet: Fleet,
    agreements: Agreements,
    identity: Identity,
    placement: Placement,
    now: Now,
) -> Would | tuple[Reason, str]:
    """What `Submit` of the order would do; a reason and its figures if it would be refused."""
    try:
        spec = make_spec(order, identity.network, identity.peer)
    except ValueError as error:
        return Reason.KERNEL_SPEC, str(error)
    if spec.units > UNITS_HELD_MAX:
        return Reason.TOO_LARGE, f"all jobs together may have {UNITS_HELD_MAX} units"
    job_digest = digest(spec_bytes(spec))
    # Of one unit: the tables of a job that is only imagined need no room.
    one = replace(spec, units=1)
    job = Job(JobId(job_digest[:16]), job_digest, one, order, now.mono_ms, now.mono_ms)
    sight = Sight(job, fleet, agreements, identity.peer, now)
    counted = _Counted()
    asked: list[Asked] = []
    known = 0
    for peer, advert in sight.known():
        known += 1
        reason, text, again_ms = sight.stand(peer, advert)
        if reason is Reason.OK or reason in SOON:
            asked.append(Asked(peer, reason, sight.car(peer, advert)))
        else:
            counted.add(reason, peer, text, again_ms)
    asked.sort(key=lambda a: (a.reason is not Reason.OK, -a.car.rate_mflops, a.car.rtt_us, a.peer))
    best = _best(asked, placement)
    if best is not None:
        asked.remove(best)
        asked.insert(0, best)
    unit_ms, energy_mwh = _cost(best, order.unit_ms_hint, kflop_per_unit, fleet)
    stands = counted.stands()
    gossip = order.policy == "gossip" or placement.announces()
    fixed = sum(arg.size for arg in spec.args if not arg.mapped)
    return Would(
        spec.kernel,
        spec.units,
        sum(arg.size // spec.units for arg in spec.args if arg.mapped),
        fixed + (spec.code.size if spec.code is not None else 0),
        sum(array_bytes(out) for out in spec.outs),
        kflop_per_unit,
        "announce" if gossip else "place" if order.policy == "tokens" else "offer",
        known,
        len(asked),
        tuple(asked[:ASKED_MAX]),
        stands,
        unit_ms,
        energy_mwh,
        "" if asked else _advice(stands or (Stand(Reason.NOBODY, 0, None, ()),)),
    )


class _Counted:
    """Cars by reason, with the first examples of each; those with words of their own before."""

    def __init__(self) -> None:
        self._cars: dict[Reason, int] = {}
        self._again_ms: dict[Reason, int] = {}
        self._examples: dict[Reason, list[Example]] = {}

    def add(self, reason: Reason, peer: Peer, text: str, again_ms: int | None) -> None:
        self._cars[reason] = self._cars.get(reason, 0) + 1
        if again_ms is not None:
            self._again_ms[reason] = min(again_ms, self._again_ms.get(reason, again_ms))
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_MAX:
            examples.append(Example(peer, text))
        elif text:
            silent = next((at for at, one in enumerate(examples) if not one.text), None)
            if silent is not None:
                examples[silent] = Example(peer, text)

    def stands(self) -> tuple[Stand, ...]:
        ranked = sorted(self._cars.items(), key=lambda pair: (-pair[1], pair[0]))
        return tuple(
            Stand(reason, cars, self._again_ms.get(reason), tuple(self._examples[reason]))
            for reason, cars in ranked
        )


def _live(job: Job) -> list[Attempt]:
    """All attempts that go on; a task's hedge stands beside its first."""
    return [attempt for task_id in job.live for attempt in job.tasks[task_id].going]


def _figures(reason: Reason, advert: Advert) -> str:
    """What the advert says to a reason that is read out of it."""
    if reason is Reason.LEASE_LENGTH:
        return f"runs of at most {advert.budget.lease_s_max} s"
    if reason is Reason.MEMORY:
        return f"offers {max(c.memory_mb for c in advert.classes)} MB"
    return ""


def _run(past: Past) -> Run:
    attempt, choice = past.attempt, past.choice
    return Run(
        attempt.task_id,
        attempt.number,
        attempt.peer,
        attempt.first,
        attempt.count,
        attempt.next_unit - attempt.first,
        attempt.state.value,
        attempt.reason,
        attempt.from_step,
        past.how,
        attempt.late,
        None if choice is None else choice.among,
        None if choice is None else choice.car,
    )


def _waits(job: Job, stands: tuple[Stand, ...], free: int, now: Now) -> Iterator[Wait]:
    """What the units that nobody works on wait for now."""
    first = (job.tasks[task_id].live for task_id in job.live)
    open_ = [one for one in first if one is not None and one.state is State.OFFERED]
    for reason, offered in (
        (Reason.WAITS_ANSWER, [attempt for attempt in open_ if attempt.holder is None]),
        (Reason.WAITS_TOKEN, [attempt for attempt in open_ if attempt.holder is not None]),
    ):
        if offered:
            until_ms = min(attempt.expires_mono_ms for attempt in offered) - now.mono_ms
            units = sum(attempt.count for attempt in offered)
            yield Wait(reason, units, max(0, until_ms))
    if job.spec.steps is not None:
        again = {task.task_id for task in job.retry}
        idle = (task for task in job.tasks.values() if task.live is None)
        fetching = _units(task for task in idle if task.task_id not in again)
    else:
        fetching = 0
    if fetching:
        yield Wait(Reason.WAITS_CHECKPOINT, fetching, None)
    unplaced = job.spec.units - job.fresh + _units(job.retry)
    if not unplaced:
        return
    soon = [stand for stand in stands if stand.reason in SOON or stand.again_ms is not None]
    announced_ms = job.waiting.until_mono_ms - now.mono_ms
    if job.waiting.announce_id and announced_ms > 0:
        yield Wait(Reason.WAITS_BIDS, unplaced, announced_ms)
    elif free or (job.live and not soon):
        yield Wait(Reason.WAITS_SLOT, unplaced, None)
    elif soon:
        yield Wait(soon[0].reason, unplaced, soon[0].again_ms)
    else:
        reason = stands[0].reason if stands else Reason.NOBODY
        yield Wait(reason, unplaced, None)


def _units(tasks: Iterable[Task]) -> int:
    return sum(max(0, task.end - task.missing) for task in tasks)


def _advice_of(job: Job, stands: tuple[Stand, ...], waits: tuple[Wait, ...]) -> str:
    if job.state in (JobState.DONE, JobState.CANCELLED):
        return ""
    if job.state is JobState.FAILED:
        # What its cars said is nearer to the cause than how the job ended for want of a car.
        named = [stand for stand in stands if stand.reason is job.reason]
        return _advice((*named, *stands, Stand(job.reason, 0, None, ())))
    if not waits:
        return ""
    lasting = [stand for stand in stands if stand.reason not in SOON and stand.again_ms is None]
    if job.live:
        lasting = [stand for stand in lasting if stand.reason is not Reason.NOT_NAMED]
    if lasting:
        return _advice(lasting)
    return "" if job.live or stands else _advice((Stand(Reason.NOBODY, 0, None, ()),))


def _advice(stands: Iterable[Stand]) -> str:
    """One line for the commonest reason that there is advice for."""
    for stand in stands:
        told = _ADVICE.get(stand.reason)
        if told is not None:
            cars = f"{stand.cars} car{'s' if stand.cars > 1 else ''}: " if stand.cars else ""
            return f"{cars}{stand.reason.name}: {told}"
    return ""


class _NoChance:
    """Stands in for the source of chance: asking what would happen must not change what does."""

    def random(self) -> float:
        return 0.0

    def randbytes(self, n: int, /) -> bytes:
        return bytes(n)

    def randrange(self, stop: int, /) -> int:
        return 0

    def sample(self, population: Sequence[_T], k: int) -> list[_T]:
        return list(population[:k])


def _best(asked: list[Asked], placement: Placement) -> Asked | None:
    """The car that placement itself would take first; where it takes none, the fastest."""
    if not asked:
        return None
    ready = [one.car for one in asked if one.reason is Reason.OK]
    peer = placement.choose(ready, _NoChance())
    return next((one for one in asked if one.peer == peer), asked[0])


def _cost(
    best: Asked | None, unit_ms_hint: float, kflop_per_unit: int, fleet: Fleet
) -> tuple[float | None, float | None]:
    """Milliseconds and mWh of a unit at that car. W x ms is mJ, and 3,600 mJ are a mWh."""
    if best is None:
        return None, None
    unit_ms = unit_ms_hint
    if unit_ms <= 0 and kflop_per_unit and best.car.rate_mflops:
        unit_ms = kflop_per_unit / best.car.rate_mflops
    if unit_ms <= 0:
        return None, None
    watt_max = fleet.book.cars[best.peer].advert.budget.watt_max
    return unit_ms, watt_max * unit_ms / 3_600
