"""What this node has promised to whom, and hopes from whom: how much hangs on each connection.

`Node` makes one of these when it has to choose whom to hang up on; `connections` compares. A pure
read of the roles, made whole because choosing looks at every peer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .agreement import ASK_TIMEOUT_MS
from .cell import epoch_of, served_by
from .connections import FRESH_MS, SETTLE_MS, Worth
from .types import Now, Peer

if TYPE_CHECKING:
    from .node import Node


class Promises:
    """Call it with a connected peer."""

    def __init__(self, node: Node, now: Now) -> None:
        self._connections = node.connections
        self._agreements = node.agreements
        self._now_ms = now.mono_ms
        identity = node.identity
        posts = node.roster.posts(identity.cell, epoch_of(now.unix_ms))
        posted = {peer for ranks in posts for peer in ranks}
        self._in_use = {*posted, *_in_use(node)}
        self._owed = {*node.provider.owed(), *node.rendezvous.owed()}
        self._tokens = node.rendezvous.depositors()
        self._tellers = node.rendezvous.tellers()
        self._book, self._own, self._cell = node.book, identity.peer, identity.cell
        self._posts = posts if identity.peer in posted else None
        self._asking = node.agreements.shown()
        self._known = node.rendezvous.origins()
        self._expects = any(job.placed for job in node.jobs.running.values())

    def __call__(self, peer: Peer) -> Worth:
        state = self._connections.peers[peer]
        fresh = self._now_ms - state.since_mono_ms < FRESH_MS
        just_come = Worth.EXPECTED if self._expects else Worth.KNOWN
        if state.hello is None:
            return just_come if fresh else Worth.STRANGER
        quiet_ms = self._now_ms - state.used_mono_ms
        proven = self._connections.is_proven(peer)
        if peer in self._in_use or (proven and quiet_ms < SETTLE_MS):
            return Worth.IN_USE
        if peer in self._owed:
            return Worth.OWED
        if peer in self._tokens:
            return Worth.TOKEN
        if peer in self._tellers or self._serves(peer):
            return Worth.MEMBER
        if fresh:
            return max(just_come, Worth.PROVEN if proven else Worth.KNOWN)
        if proven:
            return Worth.PROVEN
        if peer in self._known or self._agreements.used_with(peer):
            return Worth.KNOWN
        if peer in self._asking and quiet_ms < ASK_TIMEOUT_MS:
            return Worth.ASKING
        return Worth.STRANGER if state.inbound else Worth.CALLED

    def _serves(self, peer: Peer) -> bool:
        """Whether we hold the role for that car: it would come back with its next token."""
        known = self._book.cars.get(peer)
        if self._posts is None or known is None or known.advert.cell != self._cell:
            return False
        return self._own in served_by(peer, self._posts)


def under_way(node: Node) -> bool:
    """Whether anything would be broken off if this node fell asleep."""
    provider, presence = node.provider, node.provider.presence
    return bool(
        provider.leases
        or presence.bidden()
        or (provider.owed() & presence.peers_up and not node.standby.is_long_idle())
        or node.jobs.running
        or node.agreements.asked()
        or node.acceptances.unsaid_to()
    )


def _in_use(node: Node) -> Iterator[Peer]:
    """Work of ours there, or of theirs here, or our own question unanswered. Each of these is
    scarce, or began with us: a stranger cannot make itself in use by asking."""
    for job in node.jobs.running.values():
        for task_id in job.live:
            for attempt in job.tasks[task_id].going:
                yield attempt.peer  # the rendezvous that was asked, until a car is found
    yield from node.requester.fetching_from()
    yield from node.agreements.asked()
    yield from node.acceptances.unsaid_to()
    yield from node.provider.promised()
