"""A lease as the car that granted it sees it: what it waits for, what it has done and sent.

WAITING (inputs and blobs on their way) -> READY (waits for a slot) -> RUNNING -> ENDED. The
outputs stay here until the requester has accepted their receipt: a requester that was away gets
them again when it comes back, and nothing is computed twice on this car.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import Enum
from typing import Final

from ..errors import MeshError
from .codec import digest
from .effects import ArgSource, ExecSpec, HeldRecord
from .events import Meters
from .job import spec_bytes
from .job import task_digest as digest_of_task
from .messages import Part
from .objects import T_LEASE, T_OFFER, Cited, JobSpec, Lease, Offer
from .reasons import Reason
from .sealed import unseal
from .types import (
    LEASE_UNITS_MAX,
    PART_BYTES_MAX,
    BlobRef,
    Digest,
    LeaseId,
    Now,
    Peer,
    Stepped,
    TaskId,
)

FETCH_MS_MAX = 600_000  # of one blob that a lease needs
FETCH_LATE_MS = 5_000  # past its deadline a fetch that says nothing is taken for failed
INPUTS_MS_MAX = 10_000  # inline inputs follow their offer; a slot does not wait longer for them
LEASE_COST_BYTES = 4096  # of an ended lease beside its outputs: offer, lease, tables
UNIT_COST_BYTES = 160  # of a kept unit beside its bytes: its digest and two objects


class Stage(Enum):
    """docs/spec/states.md is drawn from EDGES."""

    WAITING = "waiting"  # promised; its inputs and blobs are on their way
    READY = "ready"  # all is here; it waits for a slot
    RUNNING = "running"  # a worker computes its units
    ENDED = "ended"  # no more units come; outputs are kept until their receipt is accepted


EDGES: Final[dict[Stage, set[Stage]]] = {
    Stage.WAITING: {
        Stage.READY,  # the last of its inputs and blobs is here
        Stage.ENDED,  # cancelled, recalled, an input failed or late, its requester gone: ended
    },
    Stage.READY: {
        Stage.RUNNING,  # a slot is free and it is its turn
        Stage.ENDED,  # cancelled, recalled, the program refused, its requester gone: ended
    },
    Stage.RUNNING: {
        Stage.ENDED,  # all done, the run failed, cancelled, recalled, its requester gone: ended
    },
    Stage.ENDED: set(),
}


class Granted:
    """One lease of this car."""

    __slots__ = (
        "asked_out_mono_ms",
        "beat_mono_ms",
        "bytes_in",
        "bytes_out",
        "digests",
        "exec_id",
        "fetches",
        "granted_mono_ms",
        "granted_unix_ms",
        "inline",
        "inline_wanted",
        "job_digest",
        "lease",
        "leaving",
        "meters",
        "offer",
        "offer_wire",
        "outputs",
        "outputs_bytes",
        "papers",
        "reason",
        "receipted",
        "receipted_meters",
        "receipted_unix_ms",
        "requester",
        "resend_mono_ms",
        "run_mono_ms",
        "said_end",
        "sent",
        "stage",
        "state",
        "step",
        "stored",
        "task_digest",
        "text",
        "unsettled",
        "wire",
    )

    def __init__(
        self,
        lease: Lease,
        wire: bytes,
        offer: Offer,
        offer_wire: bytes,
        job_digest: Digest,
        task_digest: Digest,
        *,
        mono_ms: int,
        unix_ms: int,
    ) -> None:
        self.lease = lease
        self.wire = wire
        self.offer = offer
        self.offer_wire = offer_wire
        self.job_digest = job_digest
        self.task_digest = task_digest
        self.requester: Peer = offer.requester
        self.stage = Stage.WAITING
        self.reason = Reason.OK
        self.text = ""
        self.exec_id = 0
        self.fetches: set[int] = set()
        self.inline: bytes | None = None
        self.inline_wanted = any(arg.inline for arg in offer.job.args)
        self.outputs: list[bytes] = []
        self.outputs_bytes = 0
        self.sent = 0  # units of the run that have been handed to the control stream
        self.said_end = False
        self.resend_mono_ms: int | None = None  # its queue was full; try again then
        self.digests: list[bytes] = []
        self.meters = Meters()
        self.papers: Cited | None = None  # those in force when it was granted
        self.bytes_in = 0
        self.bytes_out = 0
        self.receipted = 0  # units of the run that stand in a receipt
        self.receipted_meters = Meters()
        self.receipted_unix_ms = unix_ms
        self.unsettled = 0  # receipts of this lease that nobody has accepted yet
        self.granted_mono_ms = mono_ms
        self.granted_unix_ms = unix_ms
        self.run_mono_ms = mono_ms
        self.beat_mono_ms = mono_ms
        self.asked_out_mono_ms: int | None = None  # the requester is away since
        self.stored = False
        self.state: BlobRef | None = offer.state  # newest checkpoint of a stepped unit
        self.step = offer.step or 0  # how many steps are in it
        self.leaving: Reason | None = None  # the car is going; the run ends at its next slice

    @property
    def lease_id(self) -> LeaseId:
        return self.lease.lease_id

    @property
    def task_id(self) -> TaskId:
        return self.lease.task_id

    @property
    def key(self) -> tuple[Peer, TaskId, int]:
        return (self.requester, self.lease.task_id, self.lease.attempt)

    @property
    def done(self) -> int:
        return len(self.digests)

    @property
    def ended(self) -> bool:
        return self.stage is Stage.ENDED

    @property
    def kept_bytes(self) -> int:
        """What it costs to keep an ended lease, units without a byte included."""
        return LEASE_COST_BYTES + self.outputs_bytes + UNIT_COST_BYTES * self.done

    @property
    def patience_mono_ms(self) -> int | None:
        """Until when it may wait for its inputs: a slot stands behind it."""
        if self.stage is not Stage.WAITING:
            return None
        if self.inline_wanted and self.inline is None:
            return self.granted_mono_ms + INPUTS_MS_MAX
        return self.granted_mono_ms + FETCH_MS_MAX + FETCH_LATE_MS

    def move(self, stage: Stage) -> None:
        assert stage in EDGES[self.stage], f"lease: {self.stage.value} -> {stage.value}"
        self.stage = stage

    def held(self, expires_unix_ms: int) -> HeldRecord:
        """Its finished units, as they must survive this process."""
        return HeldRecord(
            self.requester,
            self.task_id,
            self.lease.attempt,
            self.offer.run.first,
            self.done,
            self.offer_wire,
            self.wire,
            self.reason,
            b"".join(self.outputs),
            expires_unix_ms,
        )

    def __repr__(self) -> str:
        return f"<Lease {self.lease_id.hex()[:6]} {self.stage.value} {self.done} units done>"


def revived(record: HeldRecord, now: Now) -> Granted | None:
    """An ended lease of before a restart, whose requester has not accepted it yet."""
    try:
        offer = unseal(record.offer).open(Offer, T_OFFER)
        lease = unseal(record.lease).open(Lease, T_LEASE)
    except MeshError:
        return None
    job_digest = digest(spec_bytes(offer.job))
    granted = Granted(
        lease,
        record.lease,
        offer,
        record.offer,
        job_digest,
        digest_of_task(job_digest, *offer.task, offer.replica),
        mono_ms=now.mono_ms,
        unix_ms=now.unix_ms,
    )
    size = len(record.outputs) // max(1, record.count)
    granted.outputs = [record.outputs[i * size : (i + 1) * size] for i in range(record.count)]
    granted.outputs_bytes = len(record.outputs)
    granted.digests = [hashlib.sha256(output).digest() for output in granted.outputs]
    granted.receipted = record.count  # receipted before, or at its end
    granted.stage = Stage.ENDED
    granted.reason = Reason.of(record.reason)
    granted.stored = True
    granted.unsettled = 1
    granted.asked_out_mono_ms = now.mono_ms
    return granted


def exec_spec(job: JobSpec, job_digest: Digest, count: int) -> ExecSpec:
    """What the executor needs; the wall clock bounds the run, not the unit."""
    return ExecSpec(
        job.requester,
        job_digest,
        job.kernel,
        job.artifact,
        tuple(
            ArgSource(
                bool(arg.mapped),
                arg.spec,
                None if arg.inline else BlobRef(arg.ident, arg.size),
            )
            for arg in job.args
        ),
        job.outs,
        job.unit_wall_ms_max * count,
        job.memory_mb_max,
        job.code,
        Stepped(job.steps.result, job.steps.watch) if job.steps else None,
        job.steps.total if job.steps else 0,
    )


def parts(lease_id: LeaseId, first: int, outputs: list[bytes]) -> Iterator[Part]:
    """Outputs as part frames: many units in one, or one unit in many pieces."""
    group: list[bytes] = []
    size = 0
    for index, output in enumerate(outputs):
        if len(output) > PART_BYTES_MAX:
            if group:
                yield Part(lease_id, first + index - len(group), tuple(group))
                group, size = [], 0
            for offset in range(0, len(output), PART_BYTES_MAX):
                piece = output[offset : offset + PART_BYTES_MAX]
                yield Part(lease_id, first + index, (piece,), (offset, len(output)))
            continue
        # 8 bytes bound the CBOR head of each output
        if group and (size + len(output) + 8 > PART_BYTES_MAX or len(group) >= LEASE_UNITS_MAX):
            yield Part(lease_id, first + index - len(group), tuple(group))
            group, size = [], 0
        group.append(output)
        size += len(output) + 8
    if group:
        yield Part(lease_id, first + len(outputs) - len(group), tuple(group))
