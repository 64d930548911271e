"""Plain frames of the control stream: maps whose key 0 is the message's number.

A frame is either a sealed object (first byte 0xd2) or one of these. They need no signature: the
Noise handshake of the connection says who sent them. Unknown optional keys are ignored, so that a
newer peer may say more; unknown numbers are answered by nothing and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

from ..errors import LocalProtocolError, RemoteProtocolError
from .codec import decode, encode_ordered
from .fields import ADDRS, BLOB, DIGEST, ID16, MS, NETWORK, PEER
from .objects import RATES, Rate
from .reasons import Reason
from .rule import (
    Bstr,
    Code,
    Many,
    OrNull,
    Remark,
    Row,
    Tstr,
    Uint,
    at,
    decode_map,
    encode_map,
    rule,
)
from .types import (
    FRAME_BYTES_MAX,
    INLINE_BYTES_MAX,
    LEASE_UNITS_MAX,
    PART_BYTES_MAX,
    SEALED_BYTES_MAX,
    STEPS_MAX,
    WATCH_BYTES_MAX,
    BlobRef,
    Digest,
    LeaseId,
    NetworkId,
    Peer,
    TaskId,
)

HOPS_MAX: Final = 4  # of a placement; a rendezvous sends none on that has come through one
AVOID_MAX: Final = 32  # cars that a placement leaves out
_SEALED: Final = Bstr(most=SEALED_BYTES_MAX // 2)


@rule
@dataclass(frozen=True, slots=True)
class Hello:
    """First frame each way. Another network or no common version ends the connection."""

    versions: Annotated[tuple[int, ...], at(1, Many(Uint(65535), 16, 1))]
    features: Annotated[int, at(2, Uint())]
    network: Annotated[NetworkId, at(3, NETWORK)]
    jax_window: Annotated[tuple[int, int] | None, at(4, OrNull(Row(None, Uint(1024), Uint(1024))))]
    slots: Annotated[int, at(5, Uint(1024))]
    unix_ms: Annotated[int, at(6, MS)]
    agent: Annotated[str | None, at(7, Remark(64), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Refuse:
    """The car's no to an offer, or to a lease that the requester thinks it has."""

    task_id: Annotated[TaskId, at(1, ID16)]
    attempt: Annotated[int, at(2, Uint(65535))]
    reason: Annotated[Reason, at(3, Code(Reason))]
    text: Annotated[str | None, at(4, Remark(), optional=True)] = None
    retry_ms: Annotated[int | None, at(5, Uint(3_600_000), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Inputs:
    """Inline mapped arguments of a run: argument after argument, units stacked."""

    task_id: Annotated[TaskId, at(1, ID16)]
    attempt: Annotated[int, at(2, Uint(65535))]
    values: Annotated[bytes, at(3, Bstr(most=INLINE_BYTES_MAX))]


@rule
@dataclass(frozen=True, slots=True)
class Part:
    """Results as they come: units [first, first + len(outputs)), or one piece of a large unit."""

    lease_id: Annotated[LeaseId, at(1, ID16)]
    first: Annotated[int, at(2, Uint())]
    outputs: Annotated[
        tuple[bytes, ...], at(3, Many(Bstr(most=PART_BYTES_MAX), LEASE_UNITS_MAX, 1))
    ]
    piece: Annotated[
        tuple[int, int] | None,
        at(4, Row(None, Uint(1 << 32), Uint(1 << 32)), optional=True),
    ] = None  # [offset of these bytes, bytes of the whole unit]


@rule
@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a lease. Every unit that was done has been sent before it."""

    lease_id: Annotated[LeaseId, at(1, ID16)]
    reason: Annotated[Reason, at(2, Code(Reason))]
    units_done: Annotated[int, at(3, Uint(LEASE_UNITS_MAX))]
    device_ms: Annotated[int, at(4, Uint())]
    wall_ms: Annotated[int, at(5, Uint())]
    text: Annotated[str | None, at(6, Remark(), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Heartbeat:
    lease_id: Annotated[LeaseId, at(1, ID16)]
    units_done: Annotated[int, at(2, Uint(LEASE_UNITS_MAX))]
    eta_ms: Annotated[int, at(3, Uint())]
    waits_for: Annotated[Reason | None, at(4, Code(Reason), optional=True)] = None
    depart_in_s: Annotated[int | None, at(5, Uint(), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class CancelTask:
    """Stop attempts up to and including `attempt`."""

    task_id: Annotated[TaskId, at(1, ID16)]
    attempt: Annotated[int, at(2, Uint(65535))]
    reason: Annotated[Reason, at(3, Code(Reason))]


@rule
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a stepped job at a slice end; the blob is held by the sender."""

    lease_id: Annotated[LeaseId, at(1, ID16)]
    step: Annotated[int, at(2, Uint())]
    state: Annotated[BlobRef, at(3, BLOB)]


@rule
@dataclass(frozen=True, slots=True)
class Handoff:
    """The car is about to leave: what it has done, and the state to go on from."""

    lease_id: Annotated[LeaseId, at(1, ID16)]
    units_done: Annotated[int, at(2, Uint(LEASE_UNITS_MAX))]
    grace_ms: Annotated[int, at(3, Uint(3_600_000))]
    reason: Annotated[Reason, at(4, Code(Reason))]
    step: Annotated[int | None, at(5, Uint(), optional=True)] = None
    state: Annotated[BlobRef | None, at(6, BLOB, optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Watch:
    """A long job as it goes on: the watched arrays after so many steps. Replaces the one before."""

    lease_id: Annotated[LeaseId, at(1, ID16)]
    step: Annotated[int, at(2, Uint(STEPS_MAX))]
    values: Annotated[bytes, at(3, Bstr(most=WATCH_BYTES_MAX))]


@rule
@dataclass(frozen=True, slots=True)
class Assign:
    """A token is spent on an offer: both sealed, both unmodified. From a rendezvous with the
    requester's addresses, because the car may not know it."""

    token: Annotated[bytes, at(1, _SEALED)]
    offer: Annotated[bytes, at(2, _SEALED)]
    addrs: Annotated[tuple[str, ...] | None, at(3, ADDRS, optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class TermsRequest:
    """I want to be your customer; here is my mandate."""

    mandate: Annotated[bytes, at(1, _SEALED)]


@rule
@dataclass(frozen=True, slots=True)
class Terms:
    """What the car asks for: its mandate, rates and bounds; the requester signs an agreement."""

    mandate: Annotated[bytes, at(1, _SEALED)]
    currency: Annotated[str, at(2, Tstr(3, size=3))]
    rates: Annotated[tuple[Rate, ...], at(3, RATES)]
    unaccepted_nano_max: Annotated[int, at(4, Uint())]
    unsettled_nano_max: Annotated[int, at(5, Uint())]
    slice_ms_max: Annotated[int, at(6, Uint())]
    not_after_ms: Annotated[int, at(7, MS)]
    dispute_s: Annotated[int, at(8, Uint())]


@rule
@dataclass(frozen=True, slots=True)
class Goodbye:
    """This node leaves the cell, in good order."""

    seq: Annotated[int, at(1, Uint())]
    back_at_ms: Annotated[int | None, at(2, MS, optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Decline:
    """A signed object (agreement, terms request, receipt) is refused."""

    about: Annotated[Digest, at(1, DIGEST)]
    reason: Annotated[Reason, at(2, Code(Reason))]
    text: Annotated[str | None, at(3, Remark(), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Place:
    """Find a car for this offer: to a rendezvous, or on from one to another with `hops` more."""

    offer: Annotated[bytes, at(1, _SEALED)]  # names no car
    wait_ms: Annotated[int, at(2, Uint(60_000))]  # in the queue, if no token is there
    hops: Annotated[int, at(3, Uint(HOPS_MAX))]
    addrs: Annotated[tuple[str, ...], at(4, ADDRS)]  # the requester's
    unit_ms: Annotated[int, at(5, Uint())]  # 0 if not known
    avoid: Annotated[tuple[Peer, ...] | None, at(6, Many(PEER, AVOID_MAX), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Queued:
    """No token was there: the placement waits at `position`, from 0, which is said again while it
    does; or another has it, of whom something will be heard within `within_ms`."""

    task_id: Annotated[TaskId, at(1, ID16)]
    attempt: Annotated[int, at(2, Uint(65535))]
    position: Annotated[int, at(3, Uint(1 << 16))]
    within_ms: Annotated[int | None, at(4, Uint(60_000), optional=True)] = None


@rule
@dataclass(frozen=True, slots=True)
class Revoke:
    """The slot behind an idle token is taken, or the car leaves."""

    token: Annotated[Digest, at(1, DIGEST)]
    reason: Annotated[Reason, at(2, Code(Reason))]


@rule
@dataclass(frozen=True, slots=True)
class Tally:
    """What a rendezvous can spare, to another: so that who runs dry knows where to ask."""

    cell: Annotated[str, at(1, Tstr(64))]
    tokens: Annotated[int, at(2, Uint(1 << 16))]
    queued: Annotated[int, at(3, Uint(1 << 16))]


@rule
@dataclass(frozen=True, slots=True)
class Rest:
    """A rendezvous has more tokens than it needs: the car behind this one may sleep. The token
    stays good until the car revokes it."""

    token: Annotated[Digest, at(1, DIGEST)]


NUMBERS: Final[dict[int, type]] = {
    1: Hello,
    2: Refuse,
    3: Inputs,
    4: Part,
    5: Ended,
    6: Heartbeat,
    7: CancelTask,
    8: Checkpoint,
    9: Handoff,
    10: Assign,
    11: TermsRequest,
    12: Terms,
    13: Goodbye,
    14: Decline,
    15: Watch,
    16: Place,
    17: Queued,
    18: Revoke,
    19: Tally,
    20: Rest,
}
_NUMBER_OF: Final = {message: number for number, message in NUMBERS.items()}


def pack(message: Any) -> bytes:
    """The frame of a message."""
    frame = encode_ordered({0: _NUMBER_OF[type(message)], **encode_map(message)})
    if len(frame) > FRAME_BYTES_MAX:
        raise LocalProtocolError(f"{type(message).__name__} of {len(frame)} bytes")
    return frame


def unpack(frame: bytes) -> Any:
    """The message of a plain frame, None for a number of a newer version; RemoteProtocolError if
    it is no frame at all."""
    fields = decode(frame)
    if type(fields) is not dict:
        raise RemoteProtocolError("a frame is a sealed object or a map")
    number = fields.get(0)
    message = NUMBERS.get(number) if type(number) is int else None
    if type(number) is not int:
        raise RemoteProtocolError("a frame has its number at key 0")
    if message is None:
        return None
    return decode_map(message, fields, closed=False)
