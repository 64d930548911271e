"""Ended leases: kept until their receipts are accepted, because their units may be asked for again.

`provider` hands them over at their end. While their requester is away they are on the disk, for a
day at the most and within a bound of bytes; the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict

from .delivery import Delivery
from .effects import HeldRecord
from .lease import Granted, revived
from .outbox import Outbox, remember
from .reasons import Reason
from .receipts import ReceiptDesk
from .types import LeaseId, Peer, TaskId

ENDED_KEYS_MAX = 4096  # (requester, task, attempt) remembered after a lease is gone

Key = tuple[Peer, TaskId, int]


class Keeping:
    """`ended` is filled here, and read by whoever delivers; `by_key` has the live ones too."""

    def __init__(
        self,
        outbox: Outbox,
        ended: dict[LeaseId, Granted],
        delivery: Delivery,
        receipts: ReceiptDesk,
    ) -> None:
        self._out = outbox
        self._ended = ended
        self._delivery = delivery
        self._receipts = receipts
        self._bytes = 0
        self._away: dict[Peer, int] = {}  # requester with ended leases here -> away since
        self.by_key: dict[Key, Granted] = {}
        self.gone: OrderedDict[Key, Reason] = OrderedDict()

    def keep(self, granted: Granted) -> None:
        self._ended[granted.lease_id] = granted
        self._bytes += granted.kept_bytes
        self._delivery.unsaid[granted.lease_id] = None

    def requester_left(self, granted: Granted) -> None:
        """Its units must survive this process until the requester is back."""
        self._away.setdefault(granted.requester, self._out.now.mono_ms)
        if granted.stored or not granted.done:
            return
        granted.stored = True
        expires_unix_ms = self._out.now.unix_ms + self._out.limits.result_keep_ms
        self._receipts.keep_held(granted.held(expires_unix_ms))

    def requester_back(self, peer: Peer) -> None:
        self._away.pop(peer, None)

    def forget(self, granted: Granted) -> None:
        if self._ended.pop(granted.lease_id, None) is not None:
            self._bytes -= granted.kept_bytes
        self._delivery.unsaid.pop(granted.lease_id, None)
        self.by_key.pop(granted.key, None)
        remember(self.gone, granted.key, granted.reason, ENDED_KEYS_MAX)
        if granted.stored:
            self._receipts.drop_held(granted)

    def bound(self) -> None:
        while self._ended and self._bytes > self._out.limits.result_keep_bytes_max:
            self.forget(next(iter(self._ended.values())))

    def deadline(self) -> int | None:
        if not self._away:
            return None
        return min(self._away.values()) + self._out.limits.result_keep_ms

    def tick(self) -> None:
        late = self._out.now.mono_ms - self._out.limits.result_keep_ms
        for peer, since in list(self._away.items()):
            if since <= late:
                del self._away[peer]
                for granted in [g for g in self._ended.values() if g.requester == peer]:
                    self.forget(granted)

    def restore(self, held: tuple[HeldRecord, ...]) -> None:
        """Units that this car finished while their requester was away."""
        for record in held:
            if record.expires_unix_ms <= self._out.now.unix_ms:
                continue
            granted = revived(record, self._out.now)
            if granted is not None:
                self.keep(granted)
                self._away[granted.requester] = self._out.now.mono_ms
                self.by_key[granted.key] = granted
