"""Ended leases: kept until their receipts are accepted, because their units may be asked for again.

`provider` hands them over at their end. While their requester is away they are on the disk, for a
day at the most and within a bound of bytes; the oldest go first. Who was hung up on, because one
side's table was full, or is not there when we come back from a crash, is called: the car's pay lies
there, in outputs as in receipts that nobody has accepted yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .delivery import Delivery
from .effects import HeldRecord
from .lease import Granted, revived
from .outbox import Outbox, remember
from .reasons import Reason
from .receipts import ReceiptDesk
from .types import LeaseId, Peer, TaskId

CALL_MS = 2_000  # a requester that left before it accepted is called after so long
CALL_MS_MAX = 600_000  # and ever more seldom, until it accepts something
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
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._ended = ended
        self._delivery = delivery
        self._receipts = receipts
        self._reach = reach
        self._calls: dict[Peer, int] = {}  # of those that are away -> when to call
        self._waits_ms: dict[Peer, int] = {}  # of those with ended leases here
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
        self._is_away(granted.requester)
        if granted.stored or not granted.done:
            return
        granted.stored = True
        expires_unix_ms = self._out.now.unix_ms + self._out.limits.result_keep_ms
        self._receipts.keep_held(granted.held(expires_unix_ms))

    def peer_down(self, peer: Peer) -> None:
        """Perhaps nothing of its units is here any more, but it has not accepted every receipt."""
        if self._receipts.open_with(peer):
            self._is_away(peer)
        elif all(granted.requester != peer for granted in self._ended.values()):
            self._waits_ms.pop(peer, None)  # the next time it is called soon

    def _is_away(self, peer: Peer) -> None:
        self._away.setdefault(peer, self._out.now.mono_ms)
        wait_ms = self._waits_ms.setdefault(peer, CALL_MS)
        self._calls.setdefault(peer, self._out.now.mono_ms + wait_ms)

    def requester_back(self, peer: Peer) -> None:
        self._away.pop(peer, None)
        self._calls.pop(peer, None)

    def forget(self, granted: Granted) -> None:
        if self._ended.pop(granted.lease_id, None) is not None:
            self._bytes -= granted.kept_bytes
            self._waits_ms.pop(granted.requester, None)
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
        gone_ms = min(self._away.values()) + self._out.limits.result_keep_ms
        return min(gone_ms, *self._calls.values()) if self._calls else gone_ms

    def tick(self) -> None:
        self._call()
        late = self._out.now.mono_ms - self._out.limits.result_keep_ms
        for peer, since in list(self._away.items()):
            if since <= late:
                self.requester_back(peer)
                for granted in [g for g in self._ended.values() if g.requester == peer]:
                    self.forget(granted)

    def _call(self) -> None:
        now_ms = self._out.now.mono_ms
        for peer, due in list(self._calls.items()):
            if due > now_ms:
                continue
            here = any(granted.requester == peer for granted in self._ended.values())
            if not here and not self._receipts.open_with(peer):
                del self._calls[peer]  # another run that ends brings it back
                self._waits_ms.pop(peer, None)
                continue
            wait_ms = min(2 * self._waits_ms.get(peer, CALL_MS), CALL_MS_MAX)
            self._waits_ms[peer], self._calls[peer] = wait_ms, now_ms + wait_ms
            self._reach(peer)

    def restore(self, held: tuple[HeldRecord, ...]) -> None:
        """Units that this car finished while their requester was away, and receipts of before."""
        for record in held:
            if record.expires_unix_ms <= self._out.now.unix_ms:
                continue
            granted = revived(record, self._out.now)
            if granted is not None:
                self.keep(granted)
                self._is_away(granted.requester)
                self.by_key[granted.key] = granted
        for peer in self._receipts.open_requesters():
            self._is_away(peer)
