"""A car's idle slots as tokens at its cell's rendezvous: deposit, renew, revoke, spend.

A token is one signed message to one rendezvous, drawn anew each time, and is good once, here: a
rendezvous that hands it out twice, replays it or invents one finds it spent. `provider` spends it
when the assignment comes. Join-Idle-Queue (Lu et al. 2011): an idle car says so, nobody asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from .cell import EPOCH_MS, Posts, Roster, epoch_of, served_by, shard_of
from .messages import Revoke
from .objects import T_TOKEN, Token
from .outbox import Outbox, remember
from .owner import Owner
from .reasons import Reason
from .types import Digest, Lane, Peer

OVER_MS: Final = 50  # a slot that is taken for less keeps its token: short calls come in a row
MOVE_MS: Final = 2_000  # within so long of a new epoch tokens are deposited anew
SHUN_MS: Final = 60_000  # for so long a rendezvous that lets tokens lapse is drawn around
UNSPENT_MAX: Final = 3  # tokens in a row that a rendezvous let lapse while others' were spent
POSTS_KNOWN_MAX: Final = 64
REACH_MS: Final = 10_000  # between two dials of a rendezvous while another is there
RENEW_MS: Final = 4_000
"""A token that nobody has spent for so long is renewed, at another rendezvous if there is one; the
next after twice as long, up to two thirds of its life. One that keeps tokens for itself starves the
cars that drew it until then; an idle mesh renews no more often than each third of a minute."""
LOOK_MS: Final = 500
"""After a deposit its car looks whether its holder is still elected, then after twice as long each
time: who has just come elects itself, or an old one, until it has heard of the others."""


class End(Enum):
    """How a deposited token ends, once and for good; docs/spec/states.md is drawn from this."""

    SPENT = "spent"  # its holder assigns it in time: the offer may have the slot
    LATE = "late"  # its holder assigns it after its time: refuse with EXPIRED
    RENEWED = "renewed"  # it is due: a new one; revoke if that lies elsewhere, or of several slots
    MOVED = "moved"  # hashing names others for its shard now: a new one is deposited there, revoke
    TAKEN = "taken"  # another run has had its slot for OVER_MS: revoke with BUSY
    WITHDRAWN = "withdrawn"  # the car takes no more work: revoke with the reason
    PARTED = "parted"  # the connection to its holder ends


@dataclass(slots=True)
class Deposit:
    holder: Peer
    began_mono_ms: int
    until_mono_ms: int
    renew_mono_ms: int
    look_mono_ms: int


class Tokens:
    """`slots_free` is how many idle slots this car has now; `reach` connects it to a peer."""

    def __init__(
        self,
        outbox: Outbox,
        owner: Owner,
        roster: Roster,
        peers_up: set[Peer],
        slots_free: Callable[[], int],
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._owner = owner
        self._roster = roster
        self._peers_up = peers_up
        self._slots_free = slots_free
        self._reach = reach
        self._deposits: dict[Digest, Deposit] = {}
        self._seq = 0
        self._over_mono_ms: int | None = None  # since then fewer slots are free than tokens out
        self._again_mono_ms: int | None = None  # nobody was in reach; look again then
        self._quiet = 0  # tokens of ours in a row that nobody spent, wherever they lay
        self._unspent: OrderedDict[Peer, int] = OrderedDict()  # tokens in a row that lapsed there
        self._spent: OrderedDict[Peer, int] = OrderedDict()  # when one was spent last
        self._shunned: OrderedDict[Peer, int] = OrderedDict()
        self._reached: OrderedDict[Peer, int] = OrderedDict()  # while another was there

    def __len__(self) -> int:
        return len(self._deposits)

    def holders(self) -> set[Peer]:
        return {deposit.holder for deposit in self._deposits.values()}

    def lies_at(self, token: Digest) -> Peer | None:
        """The rendezvous that holds it."""
        deposit = self._deposits.get(token)
        return None if deposit is None else deposit.holder

    def changed(self) -> None:
        """A slot was taken or is free again, or somebody came into reach."""
        if not self._out.limits.rendezvous_cars or self._owner.classes is None:
            return
        free = self._slots_free()
        if free >= len(self._deposits):
            self._over_mono_ms = None
            for _ in range(free - len(self._deposits)):
                if self._deposit() is None:
                    return
        elif self._owner.may_run() is not Reason.OK:
            self._revoke(len(self._deposits), End.WITHDRAWN, self._owner.may_run())
        elif self._over_mono_ms is None:
            self._over_mono_ms = self._out.now.mono_ms

    def spend(self, token: Digest, holder: Peer) -> bool:
        """Single use, and only by the rendezvous that it was given to."""
        deposit = self._deposits.get(token)
        if deposit is None or deposit.holder != holder:
            self._out.counters["tokens_not_ours"] += 1
            return False
        self._quiet = 0
        end = End.SPENT if deposit.until_mono_ms > self._out.now.mono_ms else End.LATE
        self._end(token, end)
        self._unspent.pop(holder, None)
        remember(self._spent, holder, self._out.now.mono_ms, POSTS_KNOWN_MAX)
        return end is End.SPENT

    def _end(self, token: Digest, end: End) -> Deposit:
        self._out.counters[f"tokens_{end.value}"] += 1
        return self._deposits.pop(token)

    def peer_down(self, peer: Peer) -> None:
        """What lay there is lost with the connection: the rendezvous drops it too."""
        gone = [token for token, deposit in self._deposits.items() if deposit.holder == peer]
        for token in gone:
            self._end(token, End.PARTED)
        if gone:
            self.changed()

    # ---- depositing

    def _drawn(self, but: Peer | None) -> Peer | None:
        """One of the two rendezvous that serve us, if it is in reach; it is reached for if not. If
        neither is there or to be trusted, one of the others of our shard."""
        identity, now = self._out.identity, self._out.now
        posts = self._posts()
        ranks = posts[shard_of(identity.peer, len(posts))]
        trusted = [p for p in ranks if self._shunned.get(p, 0) <= now.mono_ms] or list(ranks)
        mine = [p for p in served_by(identity.peer, posts) if p in trusted] or trusted
        there = [p for p in mine if self._in_reach(p)]
        for peer in mine if there else trusted:
            # One that is full hangs up on whose token it has not: then the other will do.
            since = self._reached.get(peer, -REACH_MS)
            if not self._in_reach(peer) and (not there or since + REACH_MS <= now.mono_ms):
                remember(self._reached, peer, now.mono_ms, POSTS_KNOWN_MAX)
                self._reach(peer)
        there = there or [p for p in trusted if self._in_reach(p)]
        there = [p for p in there if p != but] or there
        return there[self._out.rng.randrange(len(there))] if there else None

    def _posts(self) -> Posts:
        return self._roster.posts(self._out.identity.cell, epoch_of(self._out.now.unix_ms))

    def _in_reach(self, peer: Peer) -> bool:
        return peer == self._out.identity.peer or peer in self._peers_up

    def _deposit(self, but: Peer | None = None) -> Peer | None:
        holder = self._drawn(but)
        now, limits, identity = self._out.now, self._out.limits, self._out.identity
        if holder is None:
            self._again_mono_ms = now.mono_ms + limits.redial_gap_ms
            return None
        assert self._owner.classes is not None
        best = max(self._owner.classes.classes, key=lambda c: c.rate_mflops)
        self._seq += 1
        ttl_ms = limits.token_ttl_ms
        token = Token(
            1,
            identity.network,
            identity.peer,
            self._seq,
            "token",
            best.class_digest,
            best.rate_mflops,
            now.unix_ms + ttl_ms,
            self._owner.budget.floor_nano_per_s,
            self._owner.budget.lease_s_max,
            0,
            sleeps=1 if limits.sleep_ms_max else None,
        )
        sealed = self._out.seal(token, T_TOKEN)
        # A new epoch has other rendezvous: what lies at the old ones moves within two seconds.
        moves_ms = EPOCH_MS - now.unix_ms % EPOCH_MS + self._out.rng.randrange(MOVE_MS)
        renew_ms = min(RENEW_MS << min(self._quiet, 8), ttl_ms * 2 // 3, moves_ms)
        began_ms = now.mono_ms
        self._deposits[sealed.digest] = Deposit(
            holder, began_ms, began_ms + ttl_ms, began_ms + renew_ms, began_ms + LOOK_MS
        )
        self._out.counters["tokens_deposited"] += 1
        self._out.post(holder, Lane.CONTROL, sealed.wire)
        return holder

    def _revoke(self, count: int, end: End, reason: Reason) -> None:
        self._over_mono_ms = None
        for token in list(self._deposits)[:count]:
            deposit = self._end(token, end)
            self._out.post(deposit.holder, Lane.URGENT, Revoke(token, reason))

    def _replace(self, token: Digest, end: End) -> None:
        """By a newer one, at whoever is drawn now."""
        holder = self._end(token, end).holder
        free = self._slots_free() > len(self._deposits)
        but = holder if end is End.RENEWED else None
        if not free or self._deposit(but) != holder or self._owner.slots > 1:
            # Two would be one promise too many. Of a single slot the newer takes the older's place.
            self._out.post(holder, Lane.CONTROL, Revoke(token, Reason.EXPIRED))

    def _lapsed(self, deposit: Deposit) -> None:
        """A rendezvous may have had no use for it, or keeps tokens to starve a cell: one whose
        tokens lapse again and again while another's are spent is drawn around for a minute."""
        self._quiet += 1
        holder = deposit.holder
        if deposit.until_mono_ms - self._out.now.mono_ms > self._out.limits.token_ttl_ms // 2:
            return  # too soon to say
        count = self._unspent.get(holder, 0) + 1
        remember(self._unspent, holder, count, POSTS_KNOWN_MAX)
        since = self._out.now.mono_ms - SHUN_MS
        others = any(each != holder and at > since for each, at in self._spent.items())
        if count >= UNSPENT_MAX and others:
            until = self._out.now.mono_ms + SHUN_MS
            remember(self._shunned, holder, until, POSTS_KNOWN_MAX)
            del self._unspent[holder]

    # ---- time

    def deadline(self) -> int | None:
        if not self._deposits and self._over_mono_ms is None and self._again_mono_ms is None:
            return None
        dues = [min(d.renew_mono_ms, d.look_mono_ms) for d in self._deposits.values()]
        if self._over_mono_ms is not None:
            dues.append(self._over_mono_ms + OVER_MS)
        if self._again_mono_ms is not None:
            dues.append(self._again_mono_ms)
        return min(dues)

    def tick(self) -> None:
        now_ms = self._out.now.mono_ms
        for token, deposit in list(self._deposits.items()):
            if deposit.renew_mono_ms <= now_ms:
                self._lapsed(deposit)
                self._replace(token, End.RENEWED)
            elif deposit.look_mono_ms <= now_ms:
                posts = self._posts()
                if deposit.holder in posts[shard_of(self._out.identity.peer, len(posts))]:
                    deposit.look_mono_ms = 2 * now_ms - deposit.began_mono_ms
                else:
                    self._replace(token, End.MOVED)
        if self._over_mono_ms is not None and self._over_mono_ms + OVER_MS <= now_ms:
            over = len(self._deposits) - self._slots_free()
            self._over_mono_ms = None
            if over > 0:
                self._revoke(over, End.TAKEN, Reason.BUSY)
        if self._again_mono_ms is not None and self._again_mono_ms <= now_ms:
            self._again_mono_ms = None
        self.changed()
