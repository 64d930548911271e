"""What rendezvous know of each other: who has tokens to spare, and who ought to be told.

A tally is one small message to the rendezvous of the own cell and to one of each near cell. It is
old when it is read: it says whom to ask, and who is asked may still say no.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .advert import AdvertBook
from .cell import Roster, epoch_of, shard_of
from .messages import Tally
from .outbox import Outbox, remember
from .types import Peer

TALLIES_MAX: Final = 64
TALLY_TTL_MS: Final = 5_000  # how long a tally is believed
BELIEVED_MAX: Final = 32  # tokens of one tally: whoever lies gets no more before its next
ANSWER_MS: Final = 100  # least time between two answers to one that has run dry
NEIGHBOUR_CELLS: Final = 12  # near cells, of each of which one rendezvous hears tallies
NEW_CELLS: Final = 2  # of them are not yet known to be near
CELLS_MEASURED_MAX: Final = 64


@dataclass(slots=True)
class Known:
    """What another rendezvous said it has."""

    tokens: int
    until_mono_ms: int
    answered_mono_ms: int  # when it was last told what we have, out of turn


class Tallies:
    """`rtt_us` of a connected peer, None if it is not connected."""

    def __init__(
        self,
        outbox: Outbox,
        book: AdvertBook,
        roster: Roster,
        rtt_us: Callable[[Peer], int | None],
    ) -> None:
        self._out = outbox
        self._book = book
        self._roster = roster
        self._rtt_us = rtt_us
        self._known: dict[Peer, Known] = {}
        self._ways_us: OrderedDict[str, int] = OrderedDict()  # cell -> shortest round trip there

    def tellers(self) -> set[Peer]:
        return set(self._known)

    def elected(self) -> bool:
        """Whether hashing names us now."""
        return self.ours(self._out.identity.peer)

    def ours(self, peer: Peer) -> bool:
        """Whether it serves our cell now."""
        posts = self._roster.posts(self._out.identity.cell, epoch_of(self._out.now.unix_ms))
        return any(peer in ranks for ranks in posts)

    # ---- what they say

    def take(self, peer: Peer, tally: Tally) -> bool:
        """True if it has run dry and is to hear at once what can be spared here."""
        now_ms = self._out.now.mono_ms
        before = self._known.get(peer)
        full = before is None and len(self._known) >= TALLIES_MAX
        if full or not self._may_say(peer, tally):
            return False
        answered_ms = before.answered_mono_ms if before else 0
        believed = min(tally.tokens, BELIEVED_MAX)
        known = self._known[peer] = Known(believed, now_ms + TALLY_TTL_MS, answered_ms)
        if tally.tokens or not tally.queued or answered_ms + ANSWER_MS > now_ms:
            return False
        known.answered_mono_ms = now_ms
        return True

    def _may_say(self, peer: Peer, tally: Tally) -> bool:
        """Of our own cell we know who has tokens; of others not always who is elected there, but
        who belongs to them."""
        known = self._book.cars.get(peer)
        if known is not None and known.advert.cell != tally.cell:
            return False
        if tally.cell != self._out.identity.cell or self.ours(peer):
            return True
        posts = self._roster.posts(tally.cell, epoch_of(self._out.now.unix_ms) - 1)
        return any(peer in ranks for ranks in posts)  # it has not yet looked at its clock

    def forget(self, peer: Peer) -> None:
        self._known.pop(peer, None)

    def had_none(self, peer: Peer) -> None:
        """It had fewer tokens than it said."""
        known = self._known.get(peer)
        if known is not None:
            known.tokens = 0

    def expire(self) -> None:
        now_ms = self._out.now.mono_ms
        for peer in [p for p, known in self._known.items() if known.until_mono_ms <= now_ms]:
            del self._known[peer]

    def take_one(self, but: set[Peer]) -> Peer | None:
        """The nearest that has a token to spare, which is one less then."""
        having = [
            (rtt_us, peer)
            for peer, known in self._known.items()
            if known.tokens > 0 and peer not in but and (rtt_us := self._rtt_us(peer)) is not None
        ]
        if not having:
            return None
        _, peer = min(having)
        self._known[peer].tokens -= 1
        return peer

    # ---- whom ours is told

    def mates(self) -> list[Peer]:
        """The other rendezvous of this cell."""
        own, epoch = self._out.identity, epoch_of(self._out.now.unix_ms)
        found = (peer for ranks in self._roster.posts(own.cell, epoch) for peer in ranks)
        return [peer for peer in found if peer != own.peer]

    def others(self, *, all_of_them: bool = False) -> list[Peer]:
        """The rendezvous of this cell, and one or all of each of the nearest cells."""
        identity, epoch = self._out.identity, epoch_of(self._out.now.unix_ms)
        found = self.mates()
        for cell in self._near(self._roster.neighbours(identity.cell)):
            posts = self._roster.posts(cell, epoch)
            ranks = posts[shard_of(identity.peer, len(posts))]
            if all_of_them:
                found.extend(ranks)
            elif ranks:  # one of each, not the same for each of ours: it reaches further than all
                found.append(ranks[shard_of(identity.peer, len(ranks))])
        return [peer for peer in dict.fromkeys(found) if peer != identity.peer][:TALLIES_MAX]

    def _near(self, cells: Sequence[str]) -> list[str]:
        """The nearest by what we have measured, and a few that we have not: in the roster's order,
        which is all there is to begin with."""
        epoch = epoch_of(self._out.now.unix_ms)
        for cell in cells[:CELLS_MEASURED_MAX]:
            held = (peer for ranks in self._roster.posts(cell, epoch) for peer in ranks)
            way_us = min((us for us in map(self._rtt_us, held) if us), default=None)
            if way_us is not None:
                remember(self._ways_us, cell, way_us, CELLS_MEASURED_MAX)
        known = sorted((c for c in cells if c in self._ways_us), key=lambda c: self._ways_us[c])
        unknown = [cell for cell in cells if cell not in self._ways_us]
        few = known[: NEIGHBOUR_CELLS - min(NEW_CELLS, len(unknown))]
        return [*few, *unknown[: NEIGHBOUR_CELLS - len(few)]]
