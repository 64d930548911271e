"""Bringing results to requesters: parts, ends, and all of it again after a broken connection.

Results go to the control stream in order; what finds its queue full waits and goes again from that
unit on. `receipts` asks here whether a requester has everything that a receipt would speak of.
"""

from __future__ import annotations

from collections import OrderedDict

from .events import SendFailed
from .lease import Granted, parts
from .messages import Ended
from .outbox import Outbox, remember
from .presence import Presence
from .reasons import Reason
from .types import Lane, LeaseId, Peer

PARTS_KNOWN_MAX = 8192
BURST_BYTES_MAX = 1 << 20  # of parts handed to the control stream at once
RESEND_MS = 50


class Delivery:
    """`live` and `ended` are the provider's own tables of leases."""

    def __init__(
        self,
        outbox: Outbox,
        presence: Presence,
        live: dict[LeaseId, Granted],
        ended: dict[LeaseId, Granted],
    ) -> None:
        self._out = outbox
        self._presence = presence
        self._live = live
        self._ended = ended
        self.unsaid: dict[LeaseId, None] = {}  # ended, but not all of it is with the requester
        self._part_sends: OrderedDict[int, tuple[LeaseId, int]] = OrderedDict()

    def up(self, peer: Peer) -> bool:
        return peer in self._presence.peers_up

    def say(self, granted: Granted) -> None:
        """Hand what is new to the control stream; the rest waits if its queue is full."""
        peer = granted.requester
        if peer not in self._presence.peers_up or granted.resend_mono_ms is not None:
            return  # it gets them when it comes back, or when there is room
        burst = 0
        for part in parts(
            granted.lease_id,
            granted.offer.run.first + granted.sent,
            granted.outputs[granted.sent :],
        ):
            if burst >= BURST_BYTES_MAX:
                self._say_later(granted)
                return
            burst += sum(map(len, part.outputs))
            send_id = self._out.send(peer, Lane.RESULT, part)
            unit = part.first - granted.offer.run.first
            remember(self._part_sends, send_id, (granted.lease_id, unit), PARTS_KNOWN_MAX)
            if part.piece is None:
                granted.sent = unit + len(part.outputs)
            elif part.piece[0] + len(part.outputs[0]) == part.piece[1]:
                granted.sent = unit + 1
        if granted.ended and not granted.said_end:
            granted.said_end = True
            self.unsaid.pop(granted.lease_id, None)
            whole = granted.done == granted.offer.run.size
            if granted.reason is not Reason.DONE or not whole:
                self._send_ended(granted)  # its last unit says it otherwise

    def unsent(self, peer: Peer) -> bool:
        return peer in self._presence.peers_up and any(
            granted.requester == peer and granted.sent < granted.done for granted in self.to_say()
        )

    def to_say(self) -> list[Granted]:
        return [*self._live.values(), *(self._ended[i] for i in self.unsaid if i in self._ended)]

    def _say_later(self, granted: Granted) -> None:
        granted.resend_mono_ms = self._out.now.mono_ms + RESEND_MS

    def _send_ended(self, granted: Granted) -> None:
        ended = Ended(
            granted.lease_id,
            granted.reason,
            granted.done,
            granted.meters.device_ms,
            granted.meters.wall_ms,
            granted.text or None,
        )
        send_id = self._out.send(granted.requester, Lane.RESULT, ended)
        known = (granted.lease_id, granted.done)
        remember(self._part_sends, send_id, known, PARTS_KNOWN_MAX)

    def on_send_failed(self, event: SendFailed) -> None:
        """A part did not get into the queue: from its unit on, everything goes again."""
        lease_id, unit = self._part_sends.pop(event.send_id, (None, 0))
        granted = self._live.get(lease_id) or self._ended.get(lease_id) if lease_id else None
        if granted is not None and event.reason is Reason.QUEUE_FULL:
            granted.sent = min(granted.sent, unit)
            granted.said_end = False
            if granted.ended:
                self.unsaid[granted.lease_id] = None
            self._say_later(granted)

    def say_again(self, granted: Granted) -> None:
        self._out.send(granted.requester, Lane.CONTROL, granted.wire)
        granted.sent = 0
        granted.said_end = False
        granted.resend_mono_ms = None
        if granted.ended:
            self.unsaid[granted.lease_id] = None
        self.say(granted)

    def deadline(self) -> int | None:
        if not self._live and not self.unsaid:
            return None
        waiting = [granted.resend_mono_ms for granted in self.to_say()]
        dues = [due for due in waiting if due is not None]
        return min(dues) if dues else None

    def tick(self) -> None:
        for granted in self.to_say():
            due = granted.resend_mono_ms
            if due is not None and due <= self._out.now.mono_ms:
                granted.resend_mono_ms = None
                self.say(granted)
