"""The peers that this node is connected to, and which of them makes room for another.

`Node` asks here on `PeerUp` and on `Tick`, and says `Hangup`. A connection is cheap to make again
(five round trips and a hello) and costs about 40 kB, so whoever is not in use may be hung up on;
what is promised over it is known to the roles, which `promises` asks.

Prior art: the two marks are those of go-libp2p's connection manager, the share that newcomers
cannot take is Bitcoin Core's (net.cpp, SelectNodeToEvict: who has been useful is protected, and
the rest competes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from .last_mile import last_mile_us
from .messages import Hello
from .outbox import remember
from .types import Peer

KEEP: Final = 64
"""So few connections are kept however idle: 2.5 MB, and gossip and the DHT live on them."""
IDLE_MS: Final = 600_000
"""Of more than `KEEP`, one unused for so long is closed: longer than a person waits between two
calls, and next to it the half second of a new connection is nothing."""
QUIET_MS: Final = 30_000
"""Above the high mark only what has been quiet for so long is closed: a token's life, and many
times a handshake."""
SWEEP_MS: Final = 5_000  # how often a table above its marks is looked through
FRESH_MS: Final = 1_000
"""A new connection counts as one of use for so long: the car that a rendezvous has just found for
us is a stranger until its lease comes, and was pushed out by the next before that. Whoever floods
us with identities pushes out idle peers that were never of use, and itself after a second."""
SETTLE_MS: Final = 2_000
"""A proven peer is in use for so long after its last frame: receipts trail results by 250 ms and a
commit, acceptances trail receipts as long."""
PROVEN_MAX: Final = 4_096  # peers remembered as having been of use


class Worth(IntEnum):
    """How much is lost with a connection, the least first."""

    STRANGER = 0  # it called us, and nothing has come of it
    CALLED = 1  # we called it, and nothing has come of it
    ASKING = 2  # it asked for terms a moment ago
    KNOWN = 3  # an agreement is in use, or it asked us for a car, or it has just come
    PROVEN = 4  # a run of ours came back from it, or it has accepted one of ours
    EXPECTED = 5  # it has just come, and a rendezvous is looking for a car for us
    MEMBER = 6  # a car of our cell, or another rendezvous, while we hold the role
    TOKEN = 7  # its idle slot is deposited here
    OWED = 8  # it waits for an answer of ours: a place in the queue, an assignment, a receipt
    IN_USE = 9  # never: work of ours is there or its is here, or our own role hangs on it


SWEPT_MAX: Final = Worth.PROVEN
"""Without need nobody is hung up on who would call back at once: whose token we hold, and who waits
for our answer. They make room for a newcomer only."""

WorthOf = Callable[[Peer], Worth]


@dataclass(slots=True)
class PeerState:
    """A connected peer. `hello` None: it has not said who it is, and may say nothing else."""

    peer: Peer
    path: str
    addrs: tuple[str, ...]
    inbound: bool
    since_mono_ms: int
    used_mono_ms: int  # its last frame that was no advert
    hello: Hello | None = None
    rtt_us: int = 0
    early: int = 0  # frames before its hello

    def measured(self, us: int) -> None:
        old = self.rtt_us
        self.rtt_us = us if old == 0 else (7 * old + us) // 8  # RFC 6298's 1/8


class Connections:
    """The table of peers, bounded by `peers_max`."""

    def __init__(self, peers_max: int) -> None:
        self.peers: dict[Peer, PeerState] = {}
        self._most = peers_max
        self._high = peers_max * 7 // 8
        self._low = peers_max * 3 // 4
        self._proven: OrderedDict[Peer, None] = OrderedDict()
        self._sweep_mono_ms = 0

    def enter(self, state: PeerState) -> None:
        self.peers[state.peer] = state
        self._sweep_mono_ms = max(self._sweep_mono_ms, state.used_mono_ms)

    def prove(self, peer: Peer) -> None:
        """Something has come of it. Remembered when it is gone: it comes back as proven."""
        remember(self._proven, peer, None, PROVEN_MAX)

    def is_proven(self, peer: Peer) -> bool:
        return peer in self._proven

    @property
    def full(self) -> bool:
        return len(self.peers) >= self._most

    def has_room(self, under_way: int) -> bool:
        """Whether to call somebody only because its advert is here. Below the low mark: what a
        sweep has closed is not called again."""
        return len(self.peers) + under_way < self._low

    def last_mile_us(self) -> int | None:
        return last_mile_us(state.rtt_us for state in self.peers.values())

    # ---- who goes

    def gives_way(self, newcomer: Peer, inbound: bool, worth: WorthOf) -> Peer | None:
        """Who is hung up on for it: of the least worth, the one unused longest; None if everybody
        is in use.

        Identities cost nothing, so strangers push out strangers: who calls us and has never been
        of use cannot take the half of the table that is kept for those who have.
        """
        welcome = not inbound or self.is_proven(newcomer)
        spared = not welcome and self._proven_here() <= self._most // 2
        found = self._idle(worth, Worth.OWED, spared)
        return min(found)[2] if found else None

    def sweep(self, now_ms: int, worth: WorthOf) -> list[Peer]:
        """Who is hung up on because time has passed: the idlest above the high mark, down to the
        low one, and of more than `KEEP` those unused for very long."""
        self._sweep_mono_ms = now_ms + SWEEP_MS
        ranked: list[tuple[Worth, int, Peer]] = []
        for peer, state in self.peers.items():
            value = worth(peer)
            if value is Worth.IN_USE:
                state.used_mono_ms = now_ms
            elif value <= SWEPT_MAX:
                ranked.append((value, state.used_mono_ms, peer))
        ranked.sort()
        count = len(self.peers)
        over = count - self._low if count > self._high else 0
        quiet = [entry for entry in ranked if entry[1] + QUIET_MS <= now_ms]
        gone = [peer for _, _, peer in quiet[:over]]
        most = max(0, count - min(KEEP, self._low) - len(gone))
        old = [peer for _, used, peer in quiet[over:] if used + IDLE_MS <= now_ms]
        return gone + old[:most]

    def due(self, now_ms: int) -> bool:
        """Whether to sweep now."""
        return self._crowded() and self._sweep_mono_ms <= now_ms

    def deadline(self) -> int | None:
        return self._sweep_mono_ms if self._crowded() else None

    def _crowded(self) -> bool:
        return len(self.peers) > min(KEEP, self._low)

    def _proven_here(self) -> int:
        return sum(peer in self._proven for peer in self.peers)

    def _idle(self, worth: WorthOf, most: Worth, spared: bool) -> list[tuple[Worth, int, Peer]]:
        """(worth, last used, peer); without the proven ones if they are spared."""
        return [
            (value, state.used_mono_ms, peer)
            for peer, state in self.peers.items()
            if not (spared and peer in self._proven) and (value := worth(peer)) <= most
        ]
