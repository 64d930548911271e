"""How a car shows itself: adverts in its cell and to its peers, and bids for announced jobs.

An advert is published once a minute and on a change that matters to who would offer, never faster
than the gap. A bid is a token good once, which holds a slot for a moment; `provider` spends it when
the award comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from .advert import bucket_lease_s, bucket_mwh, cell_topic
from .cell import MOMENTS_CARS_MAX, Roster, epoch_of, may_hold, served_by
from .effects import Dial, Publish
from .events import WorkerClass
from .objects import T_ADVERT, T_TOKEN, Advert, AdvertBudget, AdvertClass, Announce, Token
from .outbox import Outbox
from .owner import Owner
from .reasons import Reason
from .types import CACHED_MAX, Digest, Lane, Peer

TOKENS_MAX = 256


@dataclass(slots=True)
class Bid:
    token: Token
    requester: Peer
    wire: bytes
    until_mono_ms: int
    sent: bool


class Presence:
    def __init__(self, outbox: Outbox, owner: Owner, roster: Roster) -> None:
        self._out = outbox
        self._owner = owner
        self._roster = roster
        self.working: Callable[[], int] = lambda: 0  # leases with units to do
        self.peers_up: set[Peer] = set()
        self.addrs: tuple[str, ...] = ()
        self.blobs: tuple[Digest, ...] = ()
        self._bids: dict[Digest, Bid] = {}
        self._token_seq = 0
        self._dial_mono_ms = 0  # before that no announcer is dialled
        self._advert_seq = 0
        self.advert: Advert | None = None
        self._advert_wire: bytes | None = None
        self._advert_mono_ms = 0
        self._advert_changed = False
        self._advert_free = 0
        self._busy_since_mono_ms: int | None = None  # while the last advert says it is free
        self.on_change: Callable[[], None] = lambda: None  # whoever else tells of idle slots
        self.reach: Callable[[Peer], None] = lambda _: None
        self.on_bid: Callable[[Peer], None] = lambda _: None
        self.on_shown: Callable[[bytes, tuple[WorkerClass, ...], tuple[Digest, ...]], None] = (
            lambda wire, classes, blobs: None
        )
        self.last_mile_us: Callable[[], int | None] = lambda: None

    def peer_ready(self, peer: Peer) -> None:
        self.peers_up.add(peer)
        if self._advert_wire is not None:
            self._out.send(peer, Lane.CONTROL, self._advert_wire)
        for bid in self._bids.values():
            if bid.requester == peer and not bid.sent:
                bid.sent = True  # its hold begins for both sides now: the way here took its time
                bid.until_mono_ms = self._out.now.mono_ms + (bid.token.hold_ms or 0)
                self._say_bid(peer, bid.wire)

    def spend(self, token: Digest, peer: Peer) -> bool:
        """Single use: whoever asks, the token is gone."""
        bid = self._bids.pop(token, None)
        return bid is not None and bid.requester == peer

    def held(self) -> int:
        if not self._bids:
            return 0
        now = self._out.now.mono_ms
        return sum(bid.until_mono_ms > now for bid in self._bids.values())

    def bidden(self) -> set[Peer]:
        """For whom a slot is held."""
        return {bid.requester for bid in self._bids.values()}

    def free_for(self, requester: Peer) -> bool:
        """A slot that is held for it by a bid is free for what it placed: the same job may have
        been announced a moment before."""
        for digest, bid in self._bids.items():
            if bid.requester == requester and bid.until_mono_ms > self._out.now.mono_ms:
                del self._bids[digest]
                return True
        return False

    def slots_free(self) -> int:
        if self._owner.may_run() is not Reason.OK:
            return 0
        return max(0, self._owner.slots - self.working() - self.held())

    def on_announce(self, announce: Announce) -> None:
        """Bid for an announced job if sortition picks us and a slot is idle."""
        identity = self._out.identity
        lot = hashlib.sha256(announce.announce_id + identity.peer).digest()[:4]
        if int.from_bytes(lot, "big") > announce.threshold or len(self._bids) >= TOKENS_MAX:
            return
        known = announce.artifact in identity.artifacts or announce.code is not None
        if self.slots_free() < 1 or not known:
            return
        assert self._owner.classes is not None
        best = max(self._owner.classes.classes, key=lambda c: c.rate_mflops)
        if announce.memory_mb > best.memory_mb:
            return
        have = {blob[:8] for blob in self.blobs}
        warm = all(prefix in have for prefix in announce.consts)
        hold_ms = self._out.limits.announce_hold_ms * 4
        self.bid(announce.requester, announce.announce_id, announce.addrs, hold_ms, warm=warm)

    def bid(
        self,
        requester: Peer,
        about: bytes,
        addrs: tuple[str, ...],
        hold_ms: int,
        *,
        warm: bool = False,
    ) -> bool:
        """Hold a slot for who announced `about`, or whose task it is, and tell it; False if that
        cannot be done now."""
        identity, now = self._out.identity, self._out.now
        assert self._owner.classes is not None
        best = max(self._owner.classes.classes, key=lambda c: c.rate_mflops)
        up = requester in self.peers_up
        if len(self._bids) >= TOKENS_MAX or (not up and self._dial_mono_ms > now.mono_ms):
            return False  # addresses are a stranger's word: a cell must not dial wherever it says
        self._token_seq += 1
        token = Token(
            1,
            identity.network,
            identity.peer,
            self._token_seq,
            "token",
            best.class_digest,
            best.rate_mflops,
            now.unix_ms + 30_000,
            self._owner.budget.floor_nano_per_s,
            self._owner.budget.lease_s_max,
            int(warm),
            about,
            hold_ms,
        )
        sealed = self._out.seal(token, T_TOKEN)
        self._bids[sealed.digest] = Bid(token, requester, sealed.wire, now.mono_ms + hold_ms, up)
        self._out.counters["bids"] += 1
        if up:
            self._say_bid(requester, sealed.wire)
        else:
            self.dial(requester, addrs)
        return True

    def _say_bid(self, requester: Peer, wire: bytes) -> None:
        self._out.send(requester, Lane.CONTROL, wire)
        self.on_bid(requester)

    def dial(self, requester: Peer, addrs: tuple[str, ...]) -> bool:
        """Where it says it is; seldom, because nobody has checked that. False if not now."""
        now_ms = self._out.now.mono_ms
        if not addrs or self._dial_mono_ms > now_ms:
            return False
        self._dial_mono_ms = now_ms + self._out.limits.redial_gap_ms
        self._out.add(Dial(requester, addrs))
        return True

    def changed(self, *, now: bool = False) -> None:
        """Something an advert says has changed: at once if it matters to who would offer."""
        busy = self.slots_free() == 0
        told = self._roster.cars(self._out.identity.cell) <= MOMENTS_CARS_MAX
        if now or (told and not busy and self._advert_free == 0):
            self._advert_changed = True
        if not told or not busy or self._advert_free == 0:
            self._busy_since_mono_ms = None
        elif self._busy_since_mono_ms is None:
            # Said only once it has lasted: a car that serves short calls is busy and free hundreds
            # of times a second, and each advert costs every member of the cell a millisecond.
            self._busy_since_mono_ms = self._out.now.mono_ms
        self.on_change()

    def _publish(self) -> None:
        identity, now = self._out.identity, self._out.now
        limits = self._out.limits
        assert self._owner.classes is not None
        self._advert_seq = max(self._advert_seq + 1, now.unix_ms)
        self._advert_free = self.slots_free()
        reason = self._owner.may_run()
        cached = [d[:8] for d in (*sorted(identity.artifacts), *self.blobs)]
        advert = Advert(
            1,
            identity.network,
            identity.peer,
            self._advert_seq,
            "advert",
            identity.cell,
            tuple(
                AdvertClass(c.platform, c.kind, c.memory_mb, c.rate_mflops, c.class_digest)
                for c in self._owner.classes.classes
            ),
            self._owner.slots,
            self._advert_free,
            self._owner.classes.jax_window,
            self._owner.classes.jaxlib,
            self._owner.classes.sandbox_layers,
            tuple(dict.fromkeys(cached[-CACHED_MAX:])),
            AdvertBudget(
                bucket_mwh(self._owner.budget.spendable_mwh),
                self._owner.budget.watt_max,
                bucket_lease_s(self._owner.budget.lease_s_max),
                self._owner.budget.floor_nano_per_s,
                int(reason is Reason.OK),
                reason,
            ),
            # A sleeper stays a member of its cell until some time after it has woken.
            max(now.unix_ms, self._owner.wakes_unix_ms or 0) + limits.advert_ttl_ms,
            self.addrs,
            self.last_mile_us(),
            wake_at_ms=self._owner.wakes_unix_ms,
            cell_cars=self._roster.counted(identity.cell, epoch_of(now.unix_ms), identity.peer),
        )
        self.advert = advert
        self._advert_wire = self._out.seal(advert, T_ADVERT).wire
        self._advert_mono_ms = now.mono_ms
        self._advert_changed = False
        self._busy_since_mono_ms = None
        self._tell(self._advert_wire)

    def _tell(self, wire: bytes) -> None:
        """To the cell if it is small or may hash us to the rendezvous role, else to those who hold
        it: 1,000 cars that gossip would cost each of them 17 messages a second."""
        identity, limits, now = self._out.identity, self._out.limits, self._out.now
        cars, served = self._roster.cars(identity.cell), limits.rendezvous_cars
        if not served or may_hold(identity.cell, now.unix_ms, identity.peer, cars, served):
            self._out.add(Publish(cell_topic(identity.network, identity.cell), wire))
        else:
            posts = self._roster.posts(identity.cell, epoch_of(now.unix_ms))
            for holder in served_by(identity.peer, posts):
                if holder not in self.peers_up:
                    self.reach(holder)  # and it hears when it is up
        assert self._owner.classes is not None
        self.on_shown(wire, self._owner.classes.classes, self.blobs)
        # A cell of few peers may have no gossip mesh yet; those we talk to hear it directly.
        for peer in sorted(self.peers_up)[: limits.peers_max]:
            self._out.send(peer, Lane.CONTROL, wire)

    def _advert_due(self) -> int | None:
        if not self._owner.active or self._owner.classes is None:
            return None
        limits = self._out.limits
        if self._advert_wire is None:
            return self._out.now.mono_ms if self._advert_changed else None
        gap_ms = limits.advert_gap_ms
        due = self._advert_mono_ms + (gap_ms if self._advert_changed else limits.advert_period_ms)
        if self._busy_since_mono_ms is not None:
            due = min(due, max(self._advert_mono_ms, self._busy_since_mono_ms) + gap_ms)
        return due

    def deadline(self) -> int | None:
        advert = self._advert_due()
        if not self._bids:
            return advert
        dues = [bid.until_mono_ms for bid in self._bids.values()]
        if advert is not None:
            dues.append(advert)
        return min(dues)

    def tick(self) -> None:
        mono = self._out.now.mono_ms
        for token, bid in list(self._bids.items()):
            if bid.until_mono_ms <= mono:
                del self._bids[token]
                self.on_change()
        due = self._advert_due()
        if due is not None and due <= mono:
            self._publish()
