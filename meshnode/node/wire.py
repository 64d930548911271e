"""What passes over the control socket between a client and its own node: frames and their values.

A frame is a u32 big-endian length and a CBOR map with text keys. Requests are `{"op", "id", ...}`,
answers `{"id", "ok": True, ...}` or `{"id", "error": {"kind", "text", "reason"}}`; a stream sends
`{"id", "notice": {"kind", "fields"}}` any number of times before its answer. Both ends are the same
user on the same machine, so this is plain CBOR and not the signed profile; sizes and counts are
bounded all the same. Imports neither trio nor libp2p: the client of a CLI command loads it.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import cbor2

from meshnode.errors import LocalProtocolError
from meshnode.protocol.effects import ArgSource, Notice
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import Account, ArraySpec, BlobRef, Digest, Peer, Stepped

CONTROL_VERSION: Final = 1
SOCKET_NAME: Final = "control.sock"
INLINE_RESULT_BYTES_MAX: Final = 1 << 20
"""Blobs and results up to this size travel in a frame; larger ones as a file's path."""
CONTROL_FRAME_BYTES_MAX: Final = 4 << 20
REQUESTS_MAX: Final = 64
"""Requests in flight on one connection."""
CLIENTS_MAX: Final = 64
NOTE_BYTES_MAX: Final = 512 * 1024
"""The client's own note kept with a job: what `finish` needs after a restart."""

_LENGTH: Final = struct.Struct(">I")


def pack(message: dict[str, Any]) -> bytes:
    """One frame."""
    body = cbor2.dumps(message)
    if len(body) > CONTROL_FRAME_BYTES_MAX:
        raise LocalProtocolError(f"a control frame of {len(body)} bytes is over the bound")
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Bytes as they come in, messages as they are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now; LocalProtocolError if the other end is no peer."""
        self._buffer += received
        messages: list[dict[str, Any]] = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > CONTROL_FRAME_BYTES_MAX:
                raise LocalProtocolError(f"a control frame of {length} bytes is over the bound")
            end = at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(_message(bytes(self._buffer[at + _LENGTH.size : end])))
            at = end
        del self._buffer[:at]
        return messages


def _message(body: bytes) -> dict[str, Any]:
    try:
        message = cbor2.loads(body)
    except Exception as error:  # noqa: BLE001 - cbor2 raises many kinds on bad input
        raise LocalProtocolError(f"a control frame is not CBOR: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("id"), int):
        raise LocalProtocolError("a control frame has no id")
    return message


# ---- values


def order_fields(order: JobOrder) -> dict[str, Any]:
    """A JobOrder as a plain map."""
    return {
        "kernel": order.kernel,
        "artifact": order.artifact,
        "args": [
            [arg.mapped, arg.spec.dtype, list(arg.spec.shape), list(arg.blob) if arg.blob else None]
            for arg in order.args
        ],
        "outs": [[out.dtype, list(out.shape)] for out in order.outs],
        "units": order.units,
        "nonce": order.nonce,
        "inline": order.inline,
        "unit_ms_hint": order.unit_ms_hint,
        "wall_ms_max": order.wall_ms_max,
        "memory_mb_max": order.memory_mb_max,
        "lease_units_max": order.lease_units_max,
        "policy": order.policy,
        "cars": list(order.cars),
        "owners": list(order.owners),
        "deadline_ms": order.deadline_ms,
        "durable": order.durable,
        "request": order.request,
        "holders": list(order.holders),
        "code": None if order.code is None else list(order.code),
        "steps": order.steps,
        "stepped": None if order.stepped is None else [list(row) for row in order.stepped],
    }


def order_of(fields: dict[str, Any]) -> JobOrder:
    """The inverse; LocalProtocolError if the map is none of ours."""
    try:
        args = tuple(
            ArgSource(
                bool(mapped),
                ArraySpec(str(dtype), tuple(int(extent) for extent in shape)),
                _blob(blob),
            )
            for mapped, dtype, shape, blob in fields["args"]
        )
        outs = tuple(ArraySpec(str(d), tuple(int(e) for e in shape)) for d, shape in fields["outs"])
        return JobOrder(
            str(fields["kernel"]),
            Digest(bytes(fields["artifact"])),
            args,
            outs,
            int(fields["units"]),
            bytes(fields["nonce"]),
            inline=bytes(fields["inline"]),
            unit_ms_hint=float(fields["unit_ms_hint"]),
            wall_ms_max=int(fields["wall_ms_max"]),
            memory_mb_max=int(fields["memory_mb_max"]),
            lease_units_max=int(fields["lease_units_max"]),
            policy=str(fields["policy"]),
            cars=tuple(Peer(bytes(peer)) for peer in fields["cars"]),
            owners=tuple(Account(bytes(owner)) for owner in fields["owners"]),
            deadline_ms=int(fields["deadline_ms"]),
            durable=bool(fields["durable"]),
            request=bytes(fields["request"]),
            holders=tuple(Peer(bytes(peer)) for peer in fields["holders"]),
            code=_blob(fields["code"]),
            steps=int(fields["steps"]),
            stepped=_stepped(fields["stepped"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LocalProtocolError(
            f"a job order over the control socket is malformed: {error!r}"
        ) from None


def _blob(fields: Any) -> BlobRef | None:
    return None if fields is None else BlobRef(Digest(bytes(fields[0])), int(fields[1]))


def _stepped(fields: Any) -> Stepped | None:
    if fields is None:
        return None
    result, watch = fields
    return Stepped(tuple(int(i) for i in result), tuple(int(i) for i in watch))


def notice_fields(notice: Notice, *, outputs: bool) -> dict[str, Any]:
    """A Notice as a plain map; without the units' outputs unless they were asked for."""
    fields = {name: value for name, value in notice.fields if outputs or name != "outputs"}
    return {"kind": notice.kind, "fields": fields}
