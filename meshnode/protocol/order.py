"""What of an order must survive beside the job's spec, and the way back after a restart.

Part of `JobRecord.request`: inline inputs, placement wishes and the client's own note. Local to
this node, never sent.
"""

from __future__ import annotations

from typing import Any

from .codec import decode, encode
from .effects import ArgSource
from .events import JobOrder
from .objects import JobSpec
from .types import Account, BlobRef, Peer, Stepped

NOTE_BYTES_MAX = 1 << 20


def order_note(order: JobOrder) -> bytes:
    """What of an order must survive beside the spec: inline bytes, placement, the client's note."""
    return encode(
        [
            order.inline,
            int(order.unit_ms_hint * 1000),
            order.lease_units_max,
            order.policy,
            list(order.cars),
            order.request,
            list(order.owners),
        ]
    )


def order_of(spec: JobSpec, note: bytes) -> JobOrder:
    inline, hint, most, policy, cars, request, owners = _fields(decode(note, bytes_max=1 << 20))
    return JobOrder(
        spec.kernel,
        spec.artifact,
        tuple(
            ArgSource(bool(a.mapped), a.spec, None if a.inline else BlobRef(a.ident, a.size))
            for a in spec.args
        ),
        spec.outs,
        spec.units,
        spec.nonce,
        inline,
        hint / 1000,
        spec.unit_wall_ms_max,
        spec.memory_mb_max,
        most,
        policy,
        tuple(Peer(c) for c in cars),
        tuple(Account(o) for o in owners),
        request=request,
        code=spec.code,
        steps=spec.steps.total if spec.steps else 0,
        stepped=Stepped(spec.steps.result, spec.steps.watch) if spec.steps else None,
    )


def _fields(value: object) -> list[Any]:
    assert isinstance(value, list) and len(value) in (6, 7)
    return value if len(value) == 7 else [*value, []]  # a note of before there were owners
