"""What the machine hears: facts only, and bytes of strangers stay bytes until it decodes them.

Out of overlay, executor, vehicle, ledger and client, through the driver's one bounded queue, into
`Node.handle(event, now)`. `Recall` and `Persisted` jump that queue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from .effects import ArgSource
from .reasons import Reason
from .types import Account, ArraySpec, BlobRef, Digest, JobId, Lane, Peer, Stepped


@dataclass(frozen=True, slots=True)
class Tick:
    """`Node.deadline_mono_ms()` has passed. There are no timer effects."""


@dataclass(frozen=True, slots=True)
class PeerUp:
    peer: Peer
    path: str  # "lan" | "direct" | "relay"
    addrs: tuple[str, ...]
    inbound: bool


@dataclass(frozen=True, slots=True)
class PeerDown:
    peer: Peer
    reason: Reason


@dataclass(frozen=True, slots=True)
class DialFailed:
    peer: Peer
    reason: Reason


@dataclass(frozen=True, slots=True)
class RttMeasured:
    peer: Peer
    us: int


@dataclass(frozen=True, slots=True)
class FrameIn:
    peer: Peer
    lane: Lane
    frame: bytes


@dataclass(frozen=True, slots=True)
class GossipIn:
    topic: str
    source: Peer  # who signed the gossip message, not who forwarded it
    frame: bytes


@dataclass(frozen=True, slots=True)
class SendFailed:
    send_id: int
    peer: Peer
    reason: Reason


@dataclass(frozen=True, slots=True)
class ProvidersFound:
    query_id: int
    peers: tuple[tuple[Peer, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class BlobReady:
    fetch_id: int
    ref: BlobRef
    bytes_fetched: int  # over the network, for this request; 0 if it was all here


@dataclass(frozen=True, slots=True)
class BlobFailed:
    fetch_id: int
    blob_id: Digest
    reason: Reason


@dataclass(frozen=True, slots=True)
class WorkerClass:
    """One accelerator that the probe worker found."""

    platform: str  # "cpu", "cuda", "tpu"
    kind: str  # device kind as jax names it
    memory_mb: int
    rate_mflops: int  # sustained, measured by the probe
    class_digest: bytes  # 8 bytes: platform, kind, features, jaxlib, flags; bitwise-equal class


@dataclass(frozen=True, slots=True)
class WorkerClasses:
    classes: tuple[WorkerClass, ...]
    jaxlib: str
    jax_window: tuple[int, int]  # calling conventions accepted
    sandbox_layers: int  # bit set
    slots: int


@dataclass(frozen=True, slots=True)
class Meters:
    """What a run cost so far, since its start."""

    device_ms: int = 0
    wall_ms: int = 0
    kflop: int = 0  # loops whose length is data count once
    counted: bool = True  # there are no such loops
    energy_uj: int = 0  # at the terminals of battery or plug; a call of 3 ms is below one mWh
    method: int = 0  # how it was measured, as in a receipt; 0: nobody did
    uncertainty_permille: int = 0
    battery_uj: int = 0  # of it out of the traction battery


@dataclass(frozen=True, slots=True)
class Admitted:
    exec_id: int
    kflop_per_unit: int  # 0: not known
    memory_mb: int
    counted: bool = True  # else loops whose length is data count once in it: no receipt states it


@dataclass(frozen=True, slots=True)
class Started:
    """Of a run that had to wait for a slot or a worker; the others begin when they are asked for,
    and a wake-up of the node is a tenth of a short run."""

    exec_id: int


@dataclass(frozen=True, slots=True)
class UnitsDone:
    """Units [first, first + len(outputs)) of the run, in order; one bytes per unit, all outputs
    of the unit concatenated in argument order. Many units come as one event: at 64 units a lease
    one event each would cost more than the units."""

    exec_id: int
    first: int
    outputs: tuple[bytes, ...]
    meters: Meters


@dataclass(frozen=True, slots=True)
class SliceDone:
    """A checkpoint of `unit` (counted as the job counts) lies in the blob store: the state arrays'
    raw bytes in order, after `step` steps. Nothing has pinned it yet."""

    exec_id: int
    unit: int
    state: BlobRef
    step: int
    meters: Meters


@dataclass(frozen=True, slots=True)
class Partial:
    """The watched arrays of `unit` after `step` steps, raw bytes in order. Each replaces the one
    before: who reads slowly may skip any but the last."""

    exec_id: int
    unit: int
    step: int
    watch: bytes


@dataclass(frozen=True, slots=True)
class ExecEnded:
    """Exactly one for each `StartExec`. `reason` DONE means all units of the run came."""

    exec_id: int
    reason: Reason
    meters: Meters
    text: str = ""


@dataclass(frozen=True, slots=True)
class BudgetRead:
    """The vehicle's state as numbers: what this car may spend now. From `meshnode.vehicle`."""

    may_run: bool
    reason: Reason
    spendable_mwh: int
    watt_max: int
    lease_s_max: int
    floor_nano_per_s: int
    stay_s: int | None = None
    """Until the departure that is named, else the time that nine of ten such cars stay: the part
    of `lease_s_max` that is not energy. None: it may not run, or nobody has asked."""
    load_w: int = 0
    """What battery or plug give while a run works at full power: `watt_max` and being awake."""


@dataclass(frozen=True, slots=True)
class Recall:
    """The driver is back. Beats every queue: nothing may stand between this and an idle car."""

    reason: Reason
    grace_ms: int


@dataclass(frozen=True, slots=True)
class Woke:
    """The machine is awake again, or was never suspended: the car's sleep is over."""


@dataclass(frozen=True, slots=True)
class Persisted:
    seq: int


@dataclass(frozen=True, slots=True)
class PersistFailed:
    seq: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What a submitter asks for; the machine makes the job spec of it.

    Mapped arguments with `blob` None are inline: `inline` holds them, argument after argument,
    units stacked (at most INLINE_BYTES_MAX in all).
    """

    kernel: str
    artifact: Digest
    args: tuple[ArgSource, ...]
    outs: tuple[ArraySpec, ...]
    units: int
    nonce: bytes  # 16 bytes; the same order with the same nonce is the same job
    inline: bytes = b""
    unit_ms_hint: float = 0.0  # how long one unit lasts on a car, 0 if unknown
    wall_ms_max: int = 60_000  # of one unit
    memory_mb_max: int = 2_048
    lease_units_max: int = 0  # most units a lease may carry; 0 leaves it to the guided size
    policy: str = "tokens"  # "tokens" | "adverts" | "gossip"
    cars: tuple[Peer, ...] = ()  # only these, if any, or cars of `owners`
    owners: tuple[Account, ...] = ()  # accounts whose cars may run it
    deadline_ms: int = 0  # from now; 0 is the limit's own
    durable: bool = True
    request: bytes = field(default=b"", repr=False)  # the client's own note, kept with the job
    code: BlobRef | None = None  # the artifact's bytes, unless it is one that each car has
    steps: int = 0  # of each unit, if it is stepped
    stepped: Stepped | None = None
    holders: tuple[Peer, ...] = ()  # who else has the blobs


@dataclass(frozen=True, slots=True)
class Submit:
    request_id: int
    order: JobOrder


@dataclass(frozen=True, slots=True)
class Cancel:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work and say so; leases in work go on."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class AddrsKnown:
    """Under which addresses this node can be dialled; they go into adverts and announcements."""

    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meet:
    """Somebody named a peer and where it is: connect to it."""

    peer: Peer
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlobsHeld:
    """Blobs and artifacts this node holds whole; for the advert and for placement by locality."""

    blob_ids: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class MandateRenewed:
    """The account has signed for this node anew; sealed bytes, checked by the node."""

    mandate: bytes


@dataclass(frozen=True, slots=True)
class TermsChanged:
    """The owner has signed another policy and consent, or withdrawn the consent (None, or one that
    says so), or the fleet narrows them otherwise; sealed bytes, checked by the node."""

    consent: bytes | None
    policy: bytes | None
    fleet: bytes | None = None


Event: TypeAlias = (
    Tick
    | PeerUp
    | PeerDown
    | DialFailed
    | RttMeasured
    | FrameIn
    | GossipIn
    | SendFailed
    | ProvidersFound
    | BlobReady
    | BlobFailed
    | WorkerClasses
    | Admitted
    | Started
    | UnitsDone
    | SliceDone
    | Partial
    | ExecEnded
    | BudgetRead
    | Recall
    | Woke
    | Persisted
    | PersistFailed
    | Submit
    | Cancel
    | Drain
    | AddrsKnown
    | Meet
    | BlobsHeld
    | MandateRenewed
    | TermsChanged
)
