"""Gathers the outputs of one job as they come, for a call that waits for them.

A subscriber of the bulletin, made by `RunningNode.start_call`: what it has is in memory only. The
end is told by a callback, there and then; a task that waits for it would cost a switch more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from meshnode.errors import LocalProtocolError, MeshError
from meshnode.protocol.effects import Notice
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import array_bytes

from .bulletin import field_of, has_ended
from .failures import error_of_reason

CALL_BYTES_MAX: Final = 256 << 20
"""Outputs of one call; a job with more is submitted, and its results lie on disk."""

Packed: TypeAlias = bytes | bytearray
OnEnd: TypeAlias = Callable[[Packed | MeshError], None]


class Collector:
    def __init__(self, order: JobOrder, on_end: OnEnd) -> None:
        self._unit_bytes = sum(array_bytes(out) for out in order.outs)
        self._units = order.units
        self._packed: Packed = b"" if order.units == 1 else bytearray(self.bytes_needed(order))
        self._missing = order.units
        self._on_end = on_end
        self._text = ""

    @staticmethod
    def bytes_needed(order: JobOrder) -> int:
        return order.units * sum(array_bytes(out) for out in order.outs)

    def push(self, notice: Notice) -> None:
        if notice.kind == "units":
            self._take(field_of(notice, "first"), field_of(notice, "outputs"))
        elif notice.kind == "ended":
            self._text = str(field_of(notice, "text") or "")
        elif has_ended(notice):
            self._end(notice)

    def _take(self, first: int, outputs: bytes) -> None:
        self._missing -= len(outputs) // self._unit_bytes if self._unit_bytes else 0
        if isinstance(self._packed, bytes):
            self._packed = outputs
        else:
            at = first * self._unit_bytes
            self._packed[at : at + len(outputs)] = outputs

    def _end(self, notice: Notice) -> None:
        if field_of(notice, "state") != "done":
            self._on_end(error_of_reason(field_of(notice, "reason"), self._text))
        elif self._missing and self._unit_bytes:
            self._on_end(LocalProtocolError("the job is done and outputs are missing"))
        else:
            self._on_end(self._packed)
