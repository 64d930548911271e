"""Ids, clocks and every named maximum of the wire: the words all other modules are built from.

First in the flow: nothing here imports anything of ours. What comes from outside is bounded by a
`*_MAX` of this file; what an owner or operator may tune stands in `Limits`, which `config` fills
and hands down frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, NewType, Protocol, TypeVar

Peer = NewType("Peer", bytes)  # 38-byte identity multihash of the libp2p Ed25519 key
Account = NewType("Account", bytes)  # 32-byte Ed25519 public key that settles
Digest = NewType("Digest", bytes)  # SHA-256
NetworkId = NewType("NetworkId", bytes)  # first 8 bytes of the genesis digest
JobId = NewType("JobId", bytes)  # first 16 bytes of the job digest
TaskId = NewType("TaskId", bytes)  # first 16 bytes of the task digest
LeaseId = NewType("LeaseId", bytes)  # 16 random bytes, minted by the provider's machine

PROTOCOL_VERSION: Final = 1  # in `hello`
PEER_PREFIX: Final = bytes.fromhex("002408011220")  # identity multihash, libp2p Ed25519 key
PEER_BYTES: Final = 38  # the prefix and the key
ACCOUNT_BYTES: Final = 32  # an Ed25519 key
ID_BYTES: Final = 16  # of job, task, lease and announcement
DIGEST_BYTES: Final = 32  # SHA-256

FRAME_BYTES_MAX: Final = 64 * 1024  # one control frame, length prefix not counted
GOSSIP_BYTES_MAX: Final = 32 * 1024  # libp2p drops silently at 1 MiB; ours are far below
SEALED_BYTES_MAX: Final = FRAME_BYTES_MAX  # one signed object in its envelope
CBOR_DEPTH_MAX: Final = 16  # levels of arrays and maps
UINT_MAX: Final = (1 << 63) - 1  # of an unsigned integer; an `int` goes as far below 0
CHUNK_BYTES: Final = 1 << 20  # a blob's chunk
BLOB_BYTES_MAX: Final = 1 << 36  # one blob
BLOB_CHUNKS_MAX: Final = BLOB_BYTES_MAX // CHUNK_BYTES  # of one blob
INLINE_BYTES_MAX: Final = 16 * 1024  # inputs or outputs of a run that travel in a frame
PART_BYTES_MAX: Final = 48 * 1024  # output bytes in one part frame
JOB_UNITS_MAX: Final = 1 << 32  # of one job
LEASE_UNITS_MAX: Final = 4096  # also the most units of one receipt
RECEIPT_SPAN_MS_MAX: Final = 60_000  # of one lease, in one receipt
ARTIFACT_BYTES_MAX: Final = 16 << 20  # an exported kernel
ARGS_MAX: Final = 64  # arguments of a kernel, and its results
DIMS_MAX: Final = 8  # of one array
ADDRS_MAX: Final = 16  # of one peer
ADDR_CHARS_MAX: Final = 256  # bytes of one multiaddr
CLASSES_MAX: Final = 8  # devices of one car
CELL_CARS_MAX: Final = 1 << 24  # cars of one cell, as an advert or a rendezvous counts them
CACHED_MAX: Final = 64  # blobs and artifacts that an advert names
KERNEL_CHARS_MAX: Final = 128  # bytes of a kernel's name
TEXT_BYTES_MAX: Final = 512  # UTF-8, as all sizes of text on the wire
CLOCK_SKEW_MS_MAX: Final = 120_000  # between the clocks of two nodes
MANDATE_MS_MAX: Final = 7 * 86_400_000  # from its `not_before_ms` to its `not_after_ms`


class Now(NamedTuple):
    """Monotonic time for durations, leases and billing; unix time for signatures and expiries."""

    mono_ms: int
    unix_ms: int


class Lane(IntEnum):
    """Which queue of a peer's control stream a frame waits in; lower goes first."""

    URGENT = 0  # recall, cancel, hand-off
    CONTROL = 1  # offers, leases, heartbeats
    RESULT = 2  # inputs and parts
    MONEY = 3  # receipts and acceptances


class Durability(IntEnum):
    PROCESS = 0  # survives a SIGKILL
    POWER = 1  # survives a power loss


class BlobRef(NamedTuple):
    blob_id: Digest  # SHA-256 of CBOR [size, [chunk SHA-256 ...]]
    size: int


class ArraySpec(NamedTuple):
    """Raw little-endian C-order bytes; shape and dtype stand beside, never inside."""

    dtype: str
    shape: tuple[int, ...]


DTYPE_BYTES: Final = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
"""All that the mesh carries; a worker and its node know the same ones."""


def array_bytes(spec: ArraySpec) -> int:
    """Bytes of one array, in Python ints so that no shape can overflow; ValueError for a dtype that
    the mesh does not carry."""
    size = DTYPE_BYTES.get(spec.dtype)
    if size is None:
        raise ValueError(f"dtype {spec.dtype} is not one of {', '.join(DTYPE_BYTES)}")
    for extent in spec.shape:
        size *= extent
    return size


STEPS_MAX: Final = (1 << 31) - 1  # of one unit: `n` is an int32
STEP_COUNT: Final = ArraySpec("int32", ())  # that `n`, the last argument of a stepped program
WATCH_BYTES_MAX: Final = 32 << 10  # watched arrays of a long job: they travel in one frame


class Stepped(NamedTuple):
    """A long job: the artifact is `step(constants..., state..., n) -> state...`.

    The mapped arguments are the state that a unit begins with, `n` (int32) says how many steps one
    call does, and the artifact's outputs are the state again, in the same order and shapes.
    """

    result: tuple[int, ...]  # which state arrays are a unit's outputs, in their order
    watch: tuple[int, ...]  # which (small) ones the submitter sees as the unit goes on


@dataclass(frozen=True, slots=True)
class UnitRun:
    """What a lease carries: units [first, first + count) of one job, as attempt `attempt`."""

    task_id: TaskId
    attempt: int
    first: int
    count: int


_T = TypeVar("_T")


class Rng(Protocol):
    """The part of `random.Random` that the machine uses; seeded by driver or simulator."""

    def random(self) -> float: ...
    def randbytes(self, n: int, /) -> bytes: ...
    def randrange(self, stop: int, /) -> int: ...
    def sample(self, population: Sequence[_T], k: int) -> list[_T]: ...


class Signer(Protocol):
    """The node key, wherever it lives. Accounts sign elsewhere and before."""

    peer: Peer

    def sign(self, message: bytes, /) -> bytes: ...


SLEEP_MS_MAX: Final = 3_600_000  # a car that sleeps wakes within so long


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator may tune. One frozen value, made by `meshnode.config`, handed in whole."""

    peers_max: int = 640
    """Peers with a control stream, about 40 kB each. At the bound the idlest is hung up on for a
    new one, which is refused with BUSY only if all are in use."""
    adverts_max: int = 4096
    """Adverts kept; at the bound the one that expires first goes."""
    jobs_max: int = 256
    """Jobs in work at once; ended ones stay in the store."""
    leases_queued_per_slot_max: int = 3
    """Leases that wait behind the running one, so that a slot never idles for a round trip: as many
    as cover it, so one where leases are long."""
    offer_tries_max: int = 3
    """Point-to-point offers for a task before it is announced in the cell."""
    offer_timeout_ms: int = 2_000
    """How long an offer waits for a lease or a refusal."""
    announce_hold_ms: int = 150
    """How long a bid holds a slot for its announcer."""
    announce_backoff_ms: int = 200
    """First wait between announcements of the same job; doubles up to `announce_backoff_ms_max`."""
    announce_backoff_ms_max: int = 2_000  # longest wait between announcements of the same job
    bids_target: int = 8
    """Bids an announcement asks for; sortition keeps the expected number near it."""
    rendezvous_cars: int = 250
    """Cars that one rendezvous serves; 0 switches the role off for this node: it holds no tokens of
    others, deposits none and asks nobody for one."""
    tokens_held_max: int = 4096
    """Idle tokens of others that a rendezvous holds."""
    token_ttl_ms: int = 30_000
    """How long an idle token is good for; it is renewed after two thirds of that."""
    placements_queued_max: int = 1024
    """Placements that wait at a rendezvous for a token, of all submitters together."""
    placements_queued_per_submitter_max: int = 64  # of those, placements of one submitter
    place_timeout_ms: int = 150
    """How long a placement waits for a lease or a place in the queue before another rendezvous is
    asked; four round trips where those take longer."""
    queue_ms_max: int = 10_000
    """How long a placement waits in a rendezvous's queue before it goes elsewhere."""
    sleep_ms_max: int = 0
    """How long an idle car sleeps at most when its cell does not need it, an hour at the most; 0:
    it never does."""
    hedge_permille: int = 50
    """Runs that are late are started once more elsewhere, for at most this share of what all runs
    compute, in thousandths; 0 switches that off."""
    hedge_ms_least: int = 100
    """A run is not late before so long over what 95 of 100 runs of its kind take."""
    lease_ms: int = 30_000
    """Longest silence of a lease: no heartbeat and no part for so long, and the lease is lost."""
    heartbeat_ms: int = 2_000
    """How often a running lease says that it lives."""
    silent_peer_grace_ms: int = 3_000
    """After its peer went down a lease may come back within this time before it is lost."""
    advert_period_ms: int = 60_000  # how often a car adverts itself if nothing changes
    advert_gap_ms: int = 1_000
    """Least time between two adverts of one car, however fast its state changes."""
    advert_ttl_ms: int = 150_000  # how long an advert is good for
    lease_units_max: int = 1024
    """Most units in one lease; 4,096 is the protocol's own bound."""
    lease_target_ms: int = 4_000
    """Units of a lease are guided so that it lasts about so long at the measured rate."""
    receipt_delay_ms: int = 250
    """Receipts wait so long for company: one group commit, at most 1 s behind the result."""
    receipt_interval_ms: int = 2_000
    """Units of a running lease are receipted this often (the protocol allows 60 s): what a car has
    not signed for when it dies, nobody can accept."""
    unaccepted_receipts_max: int = 256
    """Open receipts per channel before a provider grants no further lease."""
    result_keep_ms: int = 86_400_000
    """How long a car keeps results that nobody has accepted."""
    result_keep_bytes_max: int = 256 << 20
    """Of such results, all requesters together; beyond, the oldest go."""
    attempts_max: int = 6
    """Runs of a task that fail in a row, without one unit done, before the job fails."""
    job_deadline_ms: int = 24 * 3_600_000
    """How long a job may take if its submitter names no deadline."""
    nobody_ms: int = 15_000
    """A job for which no car comes forward for so long fails; its explanation says why."""
    redial_gap_ms: int = 1_000
    """Least time between two dials of the same car."""
    backoff_ms: int = 500
    """A car that refused for want of a slot is left alone so long, unless it adverts anew."""
