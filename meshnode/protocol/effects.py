"""What the machine asks for: small frozen values that the driver carries out, in order.

Out of `Node.handle`, into `meshnode.node.driver` (or the simulator). An effect with `after=seq`
waits until `Persist(seq)` is durable: nothing is promised that a crash could take back. Carrying
an effect out never blocks; what cannot be queued comes back as `SendFailed` or another event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .reasons import Reason
from .types import ArraySpec, BlobRef, Digest, Durability, Lane, Peer, Stepped, UnitRun


@dataclass(frozen=True, slots=True)
class Send:
    send_id: int
    peer: Peer
    lane: Lane
    frame: bytes
    after: int | None = None
    expires_mono_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    topic: str
    frame: bytes
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Join:
    topic: str


@dataclass(frozen=True, slots=True)
class Leave:
    topic: str


@dataclass(frozen=True, slots=True)
class Dial:
    peer: Peer
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Drop the connection and refuse the peer until then."""

    peer: Peer
    reason: Reason
    until_mono_ms: int


@dataclass(frozen=True, slots=True)
class Hangup:
    """End the connection in good order: what is queued goes out first. Nobody is refused for it:
    either side may connect again. The machine has let go of the peer already."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Provide:
    """Say in the DHT that this node holds `key` (a SHA-256)."""

    key: Digest
    ttl_s: int


@dataclass(frozen=True, slots=True)
class FindProviders:
    query_id: int
    key: Digest


@dataclass(frozen=True, slots=True)
class FetchBlob:
    """Bring bytes [first_byte, first_byte + byte_count) of the blob here, from any holder."""

    ref: BlobRef
    first_byte: int
    byte_count: int
    holders: tuple[Peer, ...]
    deadline_mono_ms: int
    fetch_id: int


@dataclass(frozen=True, slots=True)
class Pin:
    blob_id: Digest


@dataclass(frozen=True, slots=True)
class Unpin:
    blob_id: Digest


@dataclass(frozen=True, slots=True)
class ArgSource:
    """One argument of the kernel, and where its bytes are.

    `blob` None means inline: the bytes come with `StartExec.inline`. A mapped argument's source is
    the stacked array, unit i at byte i * unit_bytes; a constant's source is the array itself.
    """

    mapped: bool
    spec: ArraySpec  # of one unit if mapped
    blob: BlobRef | None


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """Everything a worker needs to know of a job; the same for all its leases on this car."""

    submitter: Peer
    job_digest: Digest
    kernel: str
    artifact: Digest
    args: tuple[ArgSource, ...]
    outs: tuple[ArraySpec, ...]
    wall_ms_max: int  # of one run; the executor kills the worker when it is over
    memory_mb_max: int
    code: BlobRef | None = None  # where the artifact's bytes are, if it is a stranger's
    stepped: Stepped | None = None  # then `outs` are the state arrays that `result` names
    steps: int = 0  # of each unit of a stepped program


@dataclass(frozen=True, slots=True)
class Admit:
    exec_id: int
    spec: ExecSpec


@dataclass(frozen=True, slots=True)
class StartExec:
    exec_id: int
    spec: ExecSpec
    run: UnitRun
    inline: bytes  # the inline mapped arguments, argument after argument, units stacked
    state: BlobRef | None = None  # checkpoint that the run's first unit goes on from
    step: int = 0  # steps of it that are in the checkpoint


@dataclass(frozen=True, slots=True)
class StopExec:
    """`grace_ms` 0 kills. Else the run ends at the next unit, or slice: then its checkpoint comes
    as a `SliceDone` before the end. What does not end within the grace is killed."""

    exec_id: int
    reason: Reason
    grace_ms: int


@dataclass(frozen=True, slots=True)
class SignedObject:
    """A row of the one table: kept byte for byte as it was received or signed."""

    digest: Digest  # of the payload, never of the envelope
    typ: str
    sealed: bytes


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it must survive; `spec` is the canonical spec, `request` what the client asked."""

    job_digest: Digest
    spec: bytes
    request: bytes
    state: int
    reason: int


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task and its newest attempt: stored before the offer leaves, so no attempt is reused.

    Stored again with each checkpoint of a long job: what the next attempt goes on from.
    """

    job_digest: Digest
    first: int
    count: int
    attempt: int
    peer: Peer | None  # who was offered it
    run_first: int
    run_count: int
    state: BlobRef | None = None  # newest checkpoint; its bytes are in the blob store
    step: int | None = None


@dataclass(frozen=True, slots=True)
class ResultRecord:
    """Outputs of units [first, first + count) of a job: bytes of all outputs, unit after unit."""

    job_digest: Digest
    first: int
    count: int
    attempt: int
    peer: Peer
    digests: bytes  # 32 bytes a unit: what receipts are checked against, also after a restart
    outputs: bytes


@dataclass(frozen=True, slots=True)
class HeldRecord:
    """A car's own finished units, kept until they are accepted or 24 h have passed."""

    requester: Peer
    task_id: bytes
    attempt: int
    first: int
    count: int
    offer: bytes  # the sealed offer
    lease: bytes  # the sealed lease
    reason: int  # how the lease ended
    outputs: bytes
    expires_unix_ms: int


@dataclass(frozen=True, slots=True)
class HeldDropped:
    requester: Peer
    task_id: bytes
    attempt: int


Record: TypeAlias = SignedObject | JobRecord | TaskRecord | ResultRecord | HeldRecord | HeldDropped


@dataclass(frozen=True, slots=True)
class Persist:
    seq: int
    records: tuple[Record, ...]
    durability: Durability


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing a person or client may see: `kind` is a short word, `fields` are plain values."""

    kind: str
    fields: tuple[tuple[str, int | str | bytes | None], ...]


@dataclass(frozen=True, slots=True)
class Notify:
    """To client, page, metrics, explain. `subject` is a job id, a peer, or b"" for the node."""

    subject: bytes
    notice: Notice


@dataclass(frozen=True, slots=True)
class Sleep:
    """Nobody expects anything of this node from `settle_ms` on until `for_ms` have passed: the
    machine may be suspended. `Woke` says that it is awake again."""

    settle_ms: int
    for_ms: int


Effect: TypeAlias = (
    Send
    | Publish
    | Join
    | Leave
    | Dial
    | Block
    | Hangup
    | Provide
    | FindProviders
    | FetchBlob
    | Pin
    | Unpin
    | Admit
    | StartExec
    | StopExec
    | Persist
    | Notify
    | Sleep
)
