"""A job: its spec, its units, and which of them are here, taken from whom and accepted.

job -> task -> attempt. A task is a contiguous run of units cut when it is first offered; its id is
fixed across attempts. Every unit has one source: the attempt whose bytes were taken first. The
digests stay for as long as receipts may come, so that a receipt is checked against what arrived
and not against what it says.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from ..errors import MeshError
from .attempt import Attempt
from .codec import decode, digest_of, encode_ordered
from .durations import Durations
from .events import JobOrder
from .fields import Span
from .objects import JobArg, JobSpec, JobSteps
from .placement import Choice
from .reasons import Reason
from .rule import decode_map, encode_map
from .types import (
    ARGS_MAX,
    ARTIFACT_BYTES_MAX,
    INLINE_BYTES_MAX,
    WATCH_BYTES_MAX,
    BlobRef,
    Digest,
    JobId,
    NetworkId,
    Peer,
    TaskId,
    array_bytes,
)

HISTORY_MAX = 4096  # attempts remembered for `mesh show`
ANSWERS_MAX = 256  # cars whose last refusal is remembered, with its words


class JobState(IntEnum):
    RUNNING = 0
    DONE = 1
    FAILED = 2
    CANCELLED = 3


def make_spec(order: JobOrder, network: NetworkId, requester: Peer) -> JobSpec:
    """The canonical spec of an order; ValueError with the reason if sizes do not fit together."""
    args: list[JobArg] = []
    offset = 0
    for number, arg in enumerate(order.args):
        want = array_bytes(arg.spec) * (order.units if arg.mapped else 1)
        if arg.blob is None:
            piece = order.inline[offset : offset + want]
            if len(piece) != want:
                raise ValueError(f"argument {number} needs {want} inline bytes")
            offset += want
            ident = Digest(hashlib.sha256(piece).digest())
            args.append(JobArg(int(arg.mapped), arg.spec, ident, want, 1))
        else:
            if arg.blob.size != want:
                raise ValueError(f"argument {number} has {arg.blob.size} bytes and needs {want}")
            args.append(JobArg(int(arg.mapped), arg.spec, arg.blob.blob_id, want, 0))
    if offset != len(order.inline):
        raise ValueError("inline bytes are left over")
    if order.units < 1 or len(order.nonce) != 16:
        raise ValueError("a job has at least one unit and a nonce of 16 bytes")
    if len(order.inline) > INLINE_BYTES_MAX:
        raise ValueError(f"at most {INLINE_BYTES_MAX} bytes travel inline; give the rest as blobs")
    for spec in order.outs:
        array_bytes(spec)
    made = JobSpec(
        1,
        network,
        requester,
        order.nonce,
        "job",
        order.kernel,
        order.artifact,
        tuple(args),
        order.outs,
        order.units,
        order.wall_ms_max,
        order.memory_mb_max,
        1,
        order.code,
        None if order.stepped is None else JobSteps(order.steps, *order.stepped),
    )
    check_steps(made)
    if made.code is not None and not 0 < made.code.size <= ARTIFACT_BYTES_MAX:
        raise ValueError(f"an artifact has at most {ARTIFACT_BYTES_MAX >> 20} MiB")
    try:
        decode_map(JobSpec, decode(spec_bytes(made)), closed=True)
    except (MeshError, OverflowError) as error:  # no car could read it either
        raise ValueError(str(error)) from None
    return made


def check_steps(spec: JobSpec) -> None:
    """ValueError unless results and watched arrays are arrays of the state, and fit."""
    if spec.steps is None:
        return
    state = [arg.spec for arg in spec.args if arg.mapped]
    chosen = (*spec.steps.result, *spec.steps.watch)
    if not spec.steps.total or not state or any(index >= len(state) for index in chosen):
        raise ValueError("a stepped job has steps, state arrays, and results among them")
    if tuple(state[index] for index in spec.steps.result) != spec.outs:
        raise ValueError("the outputs of a stepped job are those state arrays that it names")
    watched = watch_bytes(spec)
    if watched > WATCH_BYTES_MAX:
        raise ValueError(f"watched arrays have {watched} bytes; at most {WATCH_BYTES_MAX}")


def watch_bytes(spec: JobSpec) -> int:
    """Of what the client sees of a stepped unit as it goes on."""
    state = [arg.spec for arg in spec.args if arg.mapped]
    return sum(array_bytes(state[index]) for index in (spec.steps.watch if spec.steps else ()))


def wanted(spec: JobSpec) -> tuple[bytes, ...]:
    """Prefixes of the blobs that each run needs: a car that has them is warm."""
    blobs = [arg.ident[:8] for arg in spec.args if not arg.mapped and not arg.inline]
    if spec.code is not None and len(blobs) < ARGS_MAX:
        blobs.append(spec.code.blob_id[:8])
    return tuple(blobs)


Kind = tuple[object, ...]


def kind_of(spec: JobSpec) -> Kind:
    """Units of one kind take about as long: the same program, constants, and shapes."""
    args = tuple((arg.spec, arg.mapped or arg.ident) for arg in spec.args)
    return (spec.kernel, spec.artifact, args)


def state_bytes(spec: JobSpec) -> int:
    """Of a stepped unit: its mapped arrays, one after the other."""
    return sum(array_bytes(arg.spec) for arg in spec.args if arg.mapped)


@lru_cache(maxsize=64)  # every offer of a job asks for it, on both sides
def spec_bytes(spec: JobSpec) -> bytes:
    return encode_ordered(encode_map(spec))


@lru_cache(maxsize=1024)  # a car asks for it three times an offer
def task_digest(job_digest: Digest, first: int, count: int, replica: int) -> Digest:
    return digest_of([job_digest, first, count, replica])


def run_inline(spec: JobSpec, inline: bytes, first: int, count: int) -> bytes:
    """The inline bytes of units [first, first + count), argument after argument.

    Constant inline arguments travel with every run: they are small, or they would be blobs.
    """
    pieces: list[bytes] = []
    offset = 0
    for arg in spec.args:
        if not arg.inline:
            continue
        if arg.mapped:
            unit = arg.size // spec.units
            pieces.append(inline[offset + first * unit : offset + (first + count) * unit])
        else:
            pieces.append(inline[offset : offset + arg.size])
        offset += arg.size
    return b"".join(pieces)


def input_root(spec: JobSpec, job_digest: Digest, inline: bytes, first: int, count: int) -> Digest:
    """What a receipt cites as input: the inline bytes, or job and run when all are blobs."""
    if inline or any(arg.inline for arg in spec.args):
        return Digest(hashlib.sha256(inline).digest())
    return digest_of([job_digest, first, count])


def inline_size(spec: JobSpec, count: int) -> int:
    return sum(
        arg.size // spec.units * count if arg.mapped else arg.size
        for arg in spec.args
        if arg.inline
    )


@dataclass(slots=True)
class Task:
    """Units [first, first + count); `missing` is the first that is not here."""

    task_id: TaskId
    digest: Digest
    first: int
    count: int
    missing: int
    attempt: int = -1  # highest number used
    tries: int = 0  # refusals and silences in a row
    failures: int = 0  # runs in a row that ended without a unit
    live: Attempt | None = None
    hedge: Attempt | None = None  # the same units once more, elsewhere; only beside `live`
    hedges: int = 0  # that were tried
    state: BlobRef | None = None  # newest checkpoint; it is here, whole
    step: int | None = None  # how many steps are in it
    watched: int = 0  # steps that the client has seen

    @property
    def end(self) -> int:
        return self.first + self.count

    @property
    def going(self) -> tuple[Attempt, ...]:
        """The live attempt, and its hedge if it has one."""
        if self.live is None:
            return ()
        return (self.live,) if self.hedge is None else (self.live, self.hedge)

    def elsewhere(self, attempt: Attempt, peer: Peer) -> bool:
        """Whether the car has the task already, as another attempt of it."""
        return any(one.peer == peer for one in self.going if one is not attempt)


@dataclass(slots=True)
class Past:
    """A finished or live attempt, for `mesh show`."""

    attempt: Attempt
    task: Task
    choice: Choice | None = None  # None: of before a restart, or no car was compared
    how: str = ""  # "offer" to a car that was chosen, "bid" of a car that was asked with others


@dataclass(frozen=True, slots=True)
class Answer:
    """The last no of a car to this job, or the end of its run, in its own words."""

    reason: Reason
    text: str = ""


@dataclass(slots=True)
class Waiting:
    """An announcement that is out, or the wait before the next."""

    announce_id: bytes = b""
    until_mono_ms: int = 0
    backoff_ms: int = 0
    bidders: set[Peer] = field(default_factory=set)  # who has bid for it


@dataclass(slots=True)
class Job:
    job_id: JobId
    digest: Digest
    spec: JobSpec
    order: JobOrder
    submitted_mono_ms: int
    deadline_mono_ms: int
    state: JobState = JobState.RUNNING
    reason: Reason = Reason.OK
    fresh: int = 0  # first unit that belongs to no task yet
    stored: int = 0  # units whose outputs are durable (or given to the client, if ephemeral)
    taken: int = 0
    tasks: dict[TaskId, Task] = field(default_factory=dict)
    retry: deque[Task] = field(default_factory=deque)
    live: set[TaskId] = field(default_factory=set)
    attempts: dict[tuple[TaskId, int], Attempt] = field(default_factory=dict)
    history: deque[Past] = field(default_factory=lambda: deque(maxlen=HISTORY_MAX))
    sources: list[tuple[TaskId, int, Peer]] = field(default_factory=list)
    source_of: array[int] = field(default_factory=lambda: array("I"))
    digests: bytearray = field(default_factory=bytearray)
    accepted: bytearray = field(default_factory=bytearray)
    unsuited: dict[Peer, Reason] = field(default_factory=dict)
    most_at: dict[Peer, int] = field(default_factory=dict)  # units of a run, where more are refused
    refusals: Counter[Reason] = field(default_factory=Counter)
    answers: dict[Peer, Answer] = field(default_factory=dict)
    unit_ms: float = 0.0
    kind: Kind = ()
    times: Durations | None = None  # ms a unit of its own runs
    last_sign_mono_ms: int = 0  # when a car last took or returned work
    waiting: Waiting = field(default_factory=Waiting)
    placed: set[TaskId] = field(default_factory=set)  # tasks that a rendezvous looks for a car for
    asked: list[int] = field(default_factory=list)  # requests to answer once it is stored
    dry_since_mono_ms: int | None = None  # since then its placements wait in a line
    place_window: int = 4  # how many may be; grows as they are placed, shrinks as they are queued
    due_mono_ms: int | None = None  # when it wants attention next, as `requester` has noted it
    pump_mono_ms: int = 0  # when to look for cars again
    moved_mono_ms: int = 0  # when a run of it last went out or ended

    def __post_init__(self) -> None:
        self.source_of = array("I", [0]) * self.spec.units
        self.digests = bytearray(32 * self.spec.units)
        self.accepted = bytearray(self.spec.units)
        self.unit_ms = self.order.unit_ms_hint
        self.kind = kind_of(self.spec)

    def to_place(self) -> bool:
        if self.asked:
            return False  # not stored: after a crash nobody would know what the cars work for
        return self.state is JobState.RUNNING and (bool(self.retry) or self.fresh < self.spec.units)

    def drop_whole(self) -> None:
        """Tasks that a run which was given up has completed after all need no retry."""
        if any(task.missing >= task.end for task in self.retry):
            self.retry = deque(task for task in self.retry if task.missing < task.end)

    def cut(self, count: int) -> Task:
        """The next task: the first `count` fresh units."""
        count = min(count, self.spec.units - self.fresh)
        task = self.task(self.fresh, count)
        self.fresh += count
        return task

    def task(self, first: int, count: int) -> Task:
        digest = task_digest(self.digest, first, count, 0)
        task = Task(TaskId(digest[:16]), digest, first, count, first)
        self.tasks[task.task_id] = task
        return task

    def gaps(self, units_max: int) -> list[tuple[int, int]]:
        """Units below `fresh` that belong to no task: their record was lost with a crash."""
        gaps: list[tuple[int, int]] = []
        at = 0
        for task in sorted(self.tasks.values(), key=lambda task: task.first):
            while at < task.first:
                gaps.append((at, min(units_max, task.first - at)))
                at += gaps[-1][1]
            at = max(at, task.end)
        return gaps

    def heard(self, peer: Peer, reason: Reason, text: str = "") -> None:
        """A car said no, or its run ended without all its units. The newest counts."""
        before = self.answers.pop(peer, None)
        if not text and before is not None and before.reason is reason:
            text = before.text
        while len(self.answers) >= ANSWERS_MAX:
            del self.answers[next(iter(self.answers))]
        self.answers[peer] = Answer(reason, text)

    def why_nobody(self) -> Reason:
        """The commonest refusal that no waiting would mend says more than 'nobody'."""
        lasting = Counter(self.unsuited.values())
        return lasting.most_common(1)[0][0] if lasting else Reason.NOBODY

    def add_source(self, task_id: TaskId, attempt: int, peer: Peer) -> int:
        self.sources.append((task_id, attempt, peer))
        return len(self.sources)

    def take(self, unit: int, digest: bytes, source: int) -> bool:
        """The bytes of a unit came; False if it was here already."""
        if self.source_of[unit]:
            return False
        self.source_of[unit] = source
        self.digests[32 * unit : 32 * unit + 32] = digest
        self.taken += 1
        return True

    def digest_of(self, unit: int) -> bytes:
        return bytes(self.digests[32 * unit : 32 * unit + 32])

    def whose(self, unit: int) -> tuple[TaskId, int, Peer] | None:
        source = self.source_of[unit]
        return self.sources[source - 1] if source else None


def spans(units: list[int]) -> tuple[Span, ...]:
    """Ascending units as runs."""
    runs: list[Span] = []
    for unit in units:
        if runs and runs[-1].first + runs[-1].size == unit:
            runs[-1] = Span(runs[-1].first, runs[-1].size + 1)
        else:
            runs.append(Span(unit, 1))
    return tuple(runs)
