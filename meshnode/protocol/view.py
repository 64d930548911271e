"""What a person may see of the machine: plain frozen values, read without changing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .clocks import Clock
from .events import BudgetRead
from .job import Job
from .reasons import Reason
from .types import Account, JobId, Now, Peer

if TYPE_CHECKING:
    from .node import Node


@dataclass(frozen=True, slots=True)
class PeerView:
    peer: Peer
    path: str
    addrs: tuple[str, ...]
    inbound: bool
    ready: bool
    rtt_us: int
    agreed: bool
    account: Account | None  # that it settles with, once we have an agreement


@dataclass(frozen=True, slots=True)
class CarView:
    """A car by its newest advert."""

    peer: Peer
    cell: str
    slots: int
    slots_free: int
    platform: str
    kind: str
    memory_mb: int
    rate_mflops: int
    spendable_mwh: int
    watt_max: int
    lease_s_max: int
    may_run: bool
    reason: Reason
    expires_in_ms: int


@dataclass(frozen=True, slots=True)
class AttemptView:
    task: bytes
    task_first: int
    task_count: int
    attempt: int
    peer: Peer
    state: str
    reason: Reason
    first: int
    count: int
    done: int
    from_step: int  # of the checkpoint that it went on from; 0: it began at the beginning


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """The newest state of a unit that is here, and so outlives the car that computes it."""

    task: bytes
    unit: int
    step: int


@dataclass(frozen=True, slots=True)
class JobView:
    job_id: JobId
    kernel: str
    state: str
    reason: Reason
    units: int
    stored: int
    taken: int
    accepted: int
    tasks: int
    attempts: tuple[AttemptView, ...]
    refusals: tuple[tuple[Reason, int], ...]
    waits_for: Reason | None
    request: bytes
    steps: int | None  # of each unit; None: not a long job
    checkpoints: tuple[CheckpointView, ...]  # of units that are not done yet


@dataclass(frozen=True, slots=True)
class LeaseView:
    lease_id: bytes
    requester: Peer
    kernel: str
    stage: str
    first: int
    count: int
    done: int


@dataclass(frozen=True, slots=True)
class View:
    peer: Peer
    cell: str
    may_run: Reason
    slots: int
    slots_free: int
    budget: BudgetRead  # exactly, for its owner: adverts say it in steps
    sandbox_layers: int | None  # bit set of protocol.sandbox; None before the probe
    sandbox_least: int
    clock: Clock
    peers: tuple[PeerView, ...]
    cars: tuple[CarView, ...]
    jobs: tuple[JobView, ...]
    leases: tuple[LeaseView, ...]
    counters: tuple[tuple[str, int], ...]


def look(node: Node, now: Now) -> View:
    provider = node.provider
    return View(
        node.identity.peer,
        node.identity.cell,
        provider.owner.may_run(),
        provider.owner.slots,
        provider.presence.slots_free(),
        provider.owner.budget,
        None if provider.owner.classes is None else provider.owner.classes.sandbox_layers,
        provider.owner.sandbox_least,
        node.clocks.standing(),
        tuple(
            PeerView(
                state.peer,
                state.path,
                state.addrs,
                state.inbound,
                state.hello is not None,
                state.rtt_us,
                agreed is not None,
                None if agreed is None else agreed.agreement.payee,
            )
            for state in node.peers.values()
            for agreed in (node.agreements.with_provider(state.peer),)
        ),
        tuple(_car(node, peer, now) for peer in node.book.cars),
        tuple(job_view(job, _waits_for(node, job)) for job in node.jobs.all.values()),
        tuple(
            LeaseView(
                g.lease_id,
                g.requester,
                g.offer.job.kernel,
                g.stage.value,
                g.offer.run.first,
                g.offer.run.size,
                g.done,
            )
            for g in provider.leases.values()
        ),
        tuple(sorted(node.counters.items())),
    )


def _car(node: Node, peer: Peer, now: Now) -> CarView:
    advert = node.book.cars[peer].advert
    best = max(advert.classes, key=lambda c: c.rate_mflops, default=None)
    budget = advert.budget
    return CarView(
        peer,
        advert.cell,
        advert.slots,
        advert.slots_free,
        best.platform if best else "",
        best.kind if best else "",
        best.memory_mb if best else 0,
        best.rate_mflops if best else 0,
        budget.spendable_mwh,
        budget.watt_max,
        budget.lease_s_max,
        bool(budget.may_run),
        budget.reason,
        advert.expires_ms - now.unix_ms,
    )


def _waits_for(node: Node, job: Job) -> Reason | None:
    if not job.to_place():
        return None
    why = Reason.NOBODY if job.live else node.requester.fleet.why_nobody(job)
    if why is not Reason.NOBODY:
        return why
    return Reason.WAITS_BIDS if job.waiting.announce_id else Reason.WAITS_SLOT


def job_view(job: Job, waits: Reason | None) -> JobView:
    return JobView(
        job.job_id,
        job.spec.kernel,
        job.state.name.lower(),
        job.reason,
        job.spec.units,
        job.stored,
        job.taken,
        sum(job.accepted),
        len(job.tasks),
        tuple(
            AttemptView(
                past.task.task_id,
                past.task.first,
                past.task.count,
                past.attempt.number,
                past.attempt.peer,
                past.attempt.state.value,
                past.attempt.reason,
                past.attempt.first,
                past.attempt.count,
                past.attempt.next_unit - past.attempt.first,
                past.attempt.from_step,
            )
            for past in job.history
        ),
        tuple(sorted((reason, count) for reason, count in job.refusals.items())),
        waits,
        job.order.request,
        job.spec.steps.total if job.spec.steps is not None else None,
        _checkpoints(job),
    )


def _checkpoints(job: Job) -> tuple[CheckpointView, ...]:
    if job.spec.steps is None:
        return ()
    return tuple(
        CheckpointView(task.task_id, task.first, task.step)
        for task in job.tasks.values()
        if task.step is not None
    )
