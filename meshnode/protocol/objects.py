"""What is signed in the course of work, one frozen dataclass per rule of docs/spec/meshnode.cddl.

Key 0 is the schema version, 1 the network, 4 the object's own name where the typ alone could be
mistaken. Money is in 1e-9 of the agreement's currency, times in unix milliseconds, energy in mWh.
The `T_*` constants are the COSE `typ` values: one per kind of object, the domain separators.
The order is the grammar's, because the two are read side by side; papers.py has its first rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, Literal, NamedTuple

from ..errors import RemoteProtocolError
from .fields import (
    ACCOUNT,
    ADDRS,
    ARRAY,
    BLOB,
    CLASS_DIGEST,
    DIGEST,
    ID16,
    MS,
    NETWORK,
    PEER,
    PREFIX8,
    RUN,
    SPAN,
    Span,
)
from .reasons import Reason
from .rule import (
    Code,
    Fixed,
    Int,
    Kid,
    Kind,
    Many,
    Nested,
    OrNull,
    Row,
    Tstr,
    Uint,
    at,
    rule,
)
from .types import (
    ARGS_MAX,
    ARTIFACT_BYTES_MAX,
    BLOB_BYTES_MAX,
    CACHED_MAX,
    CELL_CARS_MAX,
    CLASSES_MAX,
    JOB_UNITS_MAX,
    KERNEL_CHARS_MAX,
    STEPS_MAX,
    Account,
    ArraySpec,
    BlobRef,
    Digest,
    JobId,
    LeaseId,
    NetworkId,
    Peer,
    TaskId,
)

T_AGREEMENT: Final = "mesh-agreement/1"
T_ADVERT: Final = "mesh-advert/1"
T_ANNOUNCE: Final = "mesh-announce/1"
T_TOKEN: Final = "mesh-token/1"
T_OFFER: Final = "mesh-offer/1"
T_LEASE: Final = "mesh-lease/1"
T_RECEIPT: Final = "mesh-receipt/1"
T_ACCEPT: Final = "mesh-accept/1"
T_MANIFEST: Final = "mesh-manifest/1"


class Outcome(IntEnum):
    DONE = 0
    FAILED_BY_JOB = 1
    STOPPED_BY_OWNER = 2
    STOPPED_BY_REQUESTER = 3


class Method(IntEnum):
    """How the requester convinced itself before it accepted."""

    NONE = 0
    DIGEST_MATCH = 1
    TOLERANCE = 2
    SPOT_CHECK = 3
    ATTESTED = 4


class Rate(NamedTuple):
    """`nano` per `unit` of meter: 0 device ms, 1 wall ms, 2 kFLOP, 3 bytes in, 4 bytes out."""

    meter: int
    nano: int
    unit: int


RATES: Final = Many(Row(Rate, Uint(6), Uint(), Uint()), 7, 1)


@rule
@dataclass(frozen=True, slots=True)
class Agreement:
    """Price terms of a channel. The requester signs, the provider signs the same bytes; the
    payload's digest is the channel id."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    provider: Annotated[Peer, at(2, PEER)]
    requester: Annotated[Peer, at(3, PEER)]
    name_of_object: Annotated[Literal["agreement"], at(4, Fixed("agreement"))]
    payee: Annotated[Account, at(5, ACCOUNT)]
    payer: Annotated[Account, at(6, ACCOUNT)]
    currency: Annotated[str, at(7, Tstr(3, size=3))]
    rates: Annotated[tuple[Rate, ...], at(8, RATES)]
    unaccepted_nano_max: Annotated[int, at(9, Int())]
    unsettled_nano_max: Annotated[int, at(10, Int())]
    slice_ms_max: Annotated[int, at(11, Uint())]
    not_after_ms: Annotated[int, at(12, MS)]
    dispute_s: Annotated[int, at(13, Uint())]
    provider_mandate: Annotated[Digest, at(14, DIGEST)]
    requester_mandate: Annotated[Digest, at(15, DIGEST)]
    nonce: Annotated[bytes, at(16, ID16)]

    def __post_init__(self) -> None:
        if any(rate.unit == 0 for rate in self.rates):
            raise ValueError("a rate has unit 0")


class AdvertClass(NamedTuple):
    platform: str
    kind: str
    memory_mb: int
    rate_mflops: int
    class_digest: bytes


class AdvertBudget(NamedTuple):
    """The battery budget in buckets: never exact charge or departure time."""

    spendable_mwh: int
    watt_max: int
    lease_s_max: int
    floor_nano_per_s: int
    may_run: int
    reason: Reason


@rule
@dataclass(frozen=True, slots=True)
class Advert:
    """A car's capacity and battery budget, signed by its node key; the newest seq wins."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    peer: Annotated[Peer, at(2, PEER)]
    seq: Annotated[int, at(3, Uint())]
    name_of_object: Annotated[Literal["advert"], at(4, Fixed("advert"))]
    cell: Annotated[str, at(5, Tstr(64))]
    classes: Annotated[
        tuple[AdvertClass, ...],
        at(
            6,
            Many(
                Row(AdvertClass, Tstr(16), Tstr(64), Uint(), Uint(), CLASS_DIGEST),
                CLASSES_MAX,
            ),
        ),
    ]
    slots: Annotated[int, at(7, Uint(1024))]
    slots_free: Annotated[int, at(8, Uint(1024))]
    jax_window: Annotated[tuple[int, int], at(9, Row(None, Uint(1024), Uint(1024)))]
    jaxlib: Annotated[str, at(10, Tstr(32))]
    sandbox_layers: Annotated[int, at(11, Uint(65535))]
    cached: Annotated[tuple[bytes, ...], at(12, Many(PREFIX8, CACHED_MAX))]
    budget: Annotated[
        AdvertBudget,
        at(13, Row(AdvertBudget, Uint(), Uint(), Uint(), Uint(), Uint(1), Code(Reason))),
    ]
    expires_ms: Annotated[int, at(14, MS)]
    addrs: Annotated[tuple[str, ...], at(15, ADDRS)]
    last_mile_us: Annotated[int | None, at(16, Uint(), optional=True)] = None
    wake_at_ms: Annotated[int | None, at(17, MS, optional=True)] = None
    cell_cars: Annotated[int | None, at(18, Uint(CELL_CARS_MAX), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Announce:
    """The fallback: a job seeks cars in its cell. Carries digests and sizes, never inputs."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    requester: Annotated[Peer, at(2, PEER)]
    announce_id: Annotated[bytes, at(3, ID16)]
    name_of_object: Annotated[Literal["announce"], at(4, Fixed("announce"))]
    kernel: Annotated[str, at(5, Tstr(KERNEL_CHARS_MAX))]
    artifact: Annotated[Digest, at(6, DIGEST)]
    consts: Annotated[tuple[bytes, ...], at(7, Many(PREFIX8, ARGS_MAX))]
    units: Annotated[int, at(8, Uint(JOB_UNITS_MAX))]
    memory_mb: Annotated[int, at(9, Uint())]
    unit_ms_hint: Annotated[int, at(10, Uint())]
    threshold: Annotated[int, at(11, Uint((1 << 32) - 1))]
    expires_ms: Annotated[int, at(12, MS)]
    price_max_nano_per_s: Annotated[int, at(13, Uint())]
    addrs: Annotated[tuple[str, ...], at(14, ADDRS)]
    code: Annotated[BlobRef | None, at(15, BLOB, optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Token:
    """A slot of a car, good once: idle at a rendezvous, or a bid, held for who announced or was
    assigned. `announce_id` is then the announcement's, or the id of the task."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    peer: Annotated[Peer, at(2, PEER)]
    seq: Annotated[int, at(3, Uint())]
    name_of_object: Annotated[Literal["token"], at(4, Fixed("token"))]
    class_digest: Annotated[bytes, at(5, CLASS_DIGEST)]
    rate_mflops: Annotated[int, at(6, Uint())]
    not_after_ms: Annotated[int, at(7, MS)]
    floor_nano_per_s: Annotated[int, at(8, Uint())]
    task_s_max: Annotated[int, at(9, Uint())]
    warm: Annotated[int, at(10, Uint(1))]
    announce_id: Annotated[bytes | None, at(11, ID16, optional=True)] = None
    hold_ms: Annotated[int | None, at(12, Uint(60_000), optional=True)] = None
    sleeps: Annotated[int | None, at(13, Uint(1), optional=True)] = None


class JobArg(NamedTuple):
    """`ident` is the blob id, or SHA-256 of the bytes if `inline` is 1."""

    mapped: int
    spec: ArraySpec
    ident: Digest
    size: int
    inline: int


JOB_ARG: Final = Row(JobArg, Uint(1), ARRAY, DIGEST, Uint(BLOB_BYTES_MAX), Uint(1))


class JobSteps(NamedTuple):
    """A long job: each unit is this many steps of a stepped artifact; see `types.Stepped`."""

    total: int
    result: tuple[int, ...]
    watch: tuple[int, ...]


INDICES: Final = Many(Uint(ARGS_MAX - 1), ARGS_MAX)


@rule
@dataclass(frozen=True, slots=True)
class JobSpec:
    """What is computed, whoever computes it. Job id: first 16 bytes of its SHA-256."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    requester: Annotated[Peer, at(2, PEER)]
    nonce: Annotated[bytes, at(3, ID16)]
    name_of_object: Annotated[Literal["job"], at(4, Fixed("job"))]
    kernel: Annotated[str, at(5, Tstr(KERNEL_CHARS_MAX))]
    artifact: Annotated[Digest, at(6, DIGEST)]
    args: Annotated[tuple[JobArg, ...], at(7, Many(JOB_ARG, ARGS_MAX))]
    outs: Annotated[tuple[ArraySpec, ...], at(8, Many(ARRAY, ARGS_MAX, 1))]
    units: Annotated[int, at(9, Uint(JOB_UNITS_MAX))]
    unit_wall_ms_max: Annotated[int, at(10, Uint())]
    memory_mb_max: Annotated[int, at(11, Uint())]
    replicas: Annotated[int, at(12, Uint(16))]
    code: Annotated[BlobRef | None, at(13, BLOB, optional=True)] = None
    steps: Annotated[
        JobSteps | None, at(14, Row(JobSteps, Uint(STEPS_MAX), INDICES, INDICES), optional=True)
    ] = None


class OfferKind(IntEnum):
    FIRST = 0
    RETRY = 1
    HEDGE = 2
    VERIFY = 3


@rule
@dataclass(frozen=True, slots=True)
class Offer:
    """One attempt of one task. Digests and sizes only; inputs follow directly.

    For one car, under the agreement with it; or, with neither, for whichever car a rendezvous
    finds, under the agreement that the two have.
    """

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    requester: Annotated[Peer, at(2, PEER)]
    provider: Annotated[Peer | None, at(3, OrNull(PEER))]
    name_of_object: Annotated[Literal["offer"], at(4, Fixed("offer"))]
    job: Annotated[JobSpec, at(5, Nested(JobSpec))]
    task: Annotated[Span, at(6, SPAN)]
    attempt: Annotated[int, at(7, Uint(65535))]
    run: Annotated[Span, at(8, RUN)]
    input_root: Annotated[Digest, at(9, DIGEST)]
    replica: Annotated[int, at(10, Uint(16))]
    kind: Annotated[OfferKind, at(11, Code(OfferKind))]
    channel: Annotated[Digest | None, at(12, OrNull(DIGEST))]
    lease_ms: Annotated[int, at(13, Uint(3_600_000))]
    not_after_ms: Annotated[int, at(14, MS)]
    price_max_nano_per_s: Annotated[int, at(15, Uint())]
    state: Annotated[BlobRef | None, at(16, BLOB, optional=True)] = None
    step: Annotated[int | None, at(17, Uint(), optional=True)] = None
    token: Annotated[Digest | None, at(18, DIGEST, optional=True)] = None

    def __post_init__(self) -> None:
        task, run = self.task, self.run
        if not (
            run.size > 0
            and task.first <= run.first
            and run.first + run.size <= task.first + task.size <= self.job.units
        ):
            raise ValueError("the run does not lie inside its task and job")
        if (self.provider is None) != (self.channel is None):
            raise ValueError("a car and the agreement with it are named together")


@rule
@dataclass(frozen=True, slots=True)
class Lease:
    """The car's promise: it runs these units, and is silent for at most `lease_ms`."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    provider: Annotated[Peer, at(2, PEER)]
    requester: Annotated[Peer, at(3, PEER)]
    name_of_object: Annotated[Literal["lease"], at(4, Fixed("lease"))]
    lease_id: Annotated[LeaseId, at(5, ID16)]
    task_id: Annotated[TaskId, at(6, ID16)]
    attempt: Annotated[int, at(7, Uint(65535))]
    run: Annotated[Span, at(8, RUN)]
    offer: Annotated[Digest, at(9, DIGEST)]
    lease_ms: Annotated[int, at(10, Uint(3_600_000))]
    heartbeat_ms: Annotated[int, at(11, Uint(3_600_000))]
    eta_ms: Annotated[int, at(12, Uint())]
    granted_ms: Annotated[int, at(13, MS)]
    channel: Annotated[Digest, at(14, DIGEST)]


@rule
@dataclass(frozen=True, slots=True)
class Work:
    """What a receipt is for."""

    job_id: Annotated[JobId, at(0, ID16)]
    units: Annotated[Span, at(1, RUN)]
    task_digest: Annotated[Digest, at(2, DIGEST)]
    artifact: Annotated[Digest, at(3, DIGEST)]
    input_root: Annotated[Digest, at(4, DIGEST)]
    output_root: Annotated[Digest | None, at(5, OrNull(DIGEST))]
    outcome: Annotated[Outcome, at(6, Code(Outcome))]
    attempt: Annotated[int, at(7, Uint(65535))]
    lease_id: Annotated[LeaseId, at(8, ID16)]
    replica: Annotated[int, at(9, Uint(16))]


class Measured(NamedTuple):
    """The receipt's meters. Energy is the provider's own statement and is never billed."""

    device_ms: int
    wall_ms: int
    kflop: int
    bytes_in: int
    bytes_out: int
    energy_mwh: int
    method: int
    uncertainty_permille: int
    battery_mwh: int


class MeterMap:
    """`meters` of the CDDL: a map with keys 0 to 8."""

    def load(self, value: object) -> Measured:
        kind: Kind = Uint()
        if type(value) is not dict or value.keys() != set(range(9)):
            raise RemoteProtocolError("not a map of the nine meters")
        return Measured(*(kind.load(value[key]) for key in range(9)))

    def dump(self, value: Measured) -> dict[int, int]:
        return dict(enumerate(value))


METERS: Final = MeterMap()
NO_METERS: Final = Measured(0, 0, 0, 0, 0, 0, 0, 0, 0)


class Cited(NamedTuple):
    """The papers under which a run was granted."""

    consent: Digest
    policy: Digest
    fleet: Digest | None = None  # the operator's terms, where they narrow the policy


@rule
@dataclass(frozen=True, slots=True)
class Receipt:
    """What the car did in one interval of one lease. seq has no gaps, totals never go down."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    provider: Annotated[Peer, at(2, PEER)]
    requester: Annotated[Peer, at(3, PEER)]
    payee: Annotated[Account, at(4, ACCOUNT)]
    payer: Annotated[Account, at(5, ACCOUNT)]
    channel: Annotated[Digest, at(6, DIGEST)]
    seq: Annotated[int, at(7, Uint())]
    previous: Annotated[Digest | None, at(8, OrNull(DIGEST))]
    work: Annotated[Work, at(9, Nested(Work))]
    meters: Annotated[Measured, at(10, METERS)]
    totals: Annotated[Measured, at(11, METERS)]
    amount_nano: Annotated[int, at(12, Int())]
    total_nano: Annotated[int, at(13, Int())]
    period_ms: Annotated[tuple[int, int], at(14, Row(None, MS, MS))]
    consent: Annotated[Digest, at(15, DIGEST)]
    policy: Annotated[Digest, at(16, DIGEST)]
    evidence: Annotated[Digest | None, at(17, DIGEST, optional=True)] = None
    tariff: Annotated[tuple[int, int] | None, at(18, Row(None, Uint(), Uint()), optional=True)] = (
        None
    )
    fleet: Annotated[Digest | None, at(19, DIGEST, optional=True)] = None


class Verdict(NamedTuple):
    method: Method
    agreed: int
    asked: int


class Dispute(NamedTuple):
    """A receipt that is not accepted in full: which units not, why, and how much is withheld."""

    seq: int
    reason: Reason
    withheld_nano: int
    units: tuple[Span, ...]


@rule
@dataclass(frozen=True, slots=True)
class Acceptance:
    """A cumulative voucher: what the requester owes up to and including receipt `seq`.

    `disputes` are those of the receipts since the previous acceptance of the channel; `after` is
    the newest acceptance before this one that has some, so that none of those can be missing.
    """

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    channel: Annotated[Digest, at(2, DIGEST)]
    seq: Annotated[int, at(3, Uint())]
    receipt: Annotated[Digest, at(4, DIGEST)]
    total_nano: Annotated[int, at(5, Int())]
    verdict: Annotated[Verdict, at(6, Row(Verdict, Code(Method), Uint(), Uint()))]
    at_ms: Annotated[int, at(7, MS)]
    wall_seen_ms: Annotated[int | None, at(8, Uint(), optional=True)] = None
    disputes: Annotated[
        tuple[Dispute, ...] | None,
        at(
            9,
            Many(Row(Dispute, Uint(), Code(Reason), Int(), Many(SPAN, 64)), 1024, 1),
            optional=True,
        ),
    ] = None
    after: Annotated[Digest | None, at(10, DIGEST, optional=True)] = None


class ArgRole(IntEnum):
    """How an argument meets the units of a job."""

    CONSTANT = 0  # the same array for every unit
    MAPPED = 1  # one slice a unit
    STATE = 2  # of a stepped artifact: what one call returns is the next one's argument


class Numerics(IntEnum):
    """How two honest cars of different kinds may differ on one unit."""

    EXACT = 0
    F32_HIGHEST = 1
    TF32 = 2
    BF16 = 3


class ManifestArg(NamedTuple):
    role: ArgRole
    spec: ArraySpec


class Steps(NamedTuple):
    """Of a stepped artifact: `step(constants..., state..., n: int32) -> state...`.

    `result` and `watch` are indices of its state arrays, in the order of its arguments of that
    role: what a unit gives in the end, and what the submitter sees as it goes on. Rising.
    """

    result: tuple[int, ...]
    watch: tuple[int, ...]
    unit: int  # steps of one unit, if the person says nothing
    slice: int  # a first guess of how many take half a second


@rule
@dataclass(frozen=True, slots=True)
class Manifest:
    """What its maker says of an artifact; a car believes only what the bytes themselves say.

    `args` are those of the artifact in calling order; a stepped one takes `n` after them. The
    tolerance is in 1e-9 of the largest output.
    """

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    maker: Annotated[bytes, at(2, Kid())]
    name_of_object: Annotated[Literal["manifest"], at(4, Fixed("manifest"))]
    name: Annotated[str, at(5, Tstr(KERNEL_CHARS_MAX))]
    artifact: Annotated[Digest, at(6, DIGEST)]
    size: Annotated[int, at(7, Uint(ARTIFACT_BYTES_MAX))]
    args: Annotated[
        tuple[ManifestArg, ...],
        at(8, Many(Row(ManifestArg, Code(ArgRole), ARRAY), ARGS_MAX)),
    ]
    outs: Annotated[tuple[ArraySpec, ...], at(9, Many(ARRAY, ARGS_MAX, 1))]
    x64: Annotated[int, at(10, Uint(1))]
    numerics: Annotated[Numerics, at(11, Code(Numerics))]
    tolerance_nano: Annotated[int, at(12, Uint())]
    unit_wall_ms_max: Annotated[int, at(13, Uint())]
    memory_mb_max: Annotated[int, at(14, Uint())]
    result_bytes_max: Annotated[int, at(15, Uint(BLOB_BYTES_MAX))]
    jax: Annotated[str, at(16, Tstr(32))]
    calling_convention: Annotated[int, at(17, Uint(1024))]
    platforms: Annotated[tuple[str, ...], at(18, Many(Tstr(16), 8, 1))]
    made_ms: Annotated[int, at(19, MS)]
    steps: Annotated[
        Steps | None,
        at(20, Row(Steps, INDICES, INDICES, Uint(), Uint()), optional=True),
    ] = None

    def __post_init__(self) -> None:
        state = [arg.spec for arg in self.args if arg.role is ArgRole.STATE]
        if self.steps is None:
            if state:
                raise ValueError("an argument is state, but the artifact is not stepped")
            return
        if not state or tuple(state) != self.outs:
            raise ValueError("a stepped artifact returns its state: as many arrays, equal shapes")
        for indices in (self.steps.result, self.steps.watch):
            if sorted(set(indices)) != list(indices) or (indices and indices[-1] >= len(state)):
                raise ValueError("result and watch are rising indices of state arrays")
        if not self.steps.result or not self.steps.unit or not self.steps.slice:
            raise ValueError("a stepped artifact has a result, and steps in a unit and a slice")
