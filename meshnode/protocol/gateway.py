"""Beyond the cell: rendezvous of neighbouring cells know each other, and rare things are found.

A rendezvous joins the topic of its cell's parent region, says its advert there and in the DHT that
it serves, and passes on what its cell could not place: an announcement goes to the other cells of
the region by their rendezvous, each of which says it in its own. What a whole region may not have
(a submitter's weights, a large memory, an accelerator) its holders provide in the DHT by a key that
its seeker can compute. All of this is off the path of a task that its cell can place.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from .advert import cell_topic
from .cell import Roster, epoch_of
from .effects import Dial, FindProviders, Join, Leave, Provide, Publish
from .events import ProvidersFound, WorkerClass
from .objects import T_ANNOUNCE, Announce, JobSpec
from .outbox import Outbox, remember
from .sealed import Sealed
from .types import CLOCK_SKEW_MS_MAX, Digest, Lane, NetworkId, Peer

PROVIDE_S: Final = 3_600  # that a record in the DHT is good for; made anew after half of it
PROVIDED_MAX: Final = 16  # keys of one car: its newest blobs, and what it is
SEEKS_MAX: Final = 16  # questions to the DHT that are open
SEEK_GAP_MS: Final = 10_000  # between two questions for the same key
DIALS_MAX: Final = 4  # of those that an answer names
TAKEN_IN_CELLS: Final = 4  # that an announcement from elsewhere is said in, about
RELAY_GAP_MS: Final = 1_000  # between two announcements of one requester that are passed on
RELAYS_KNOWN_MAX: Final = 256
ANNOUNCES_SEEN_MAX: Final = 4_096
ANNOUNCE_MS_MAX: Final = 60_000  # that an announcement is good for
MEMORY_STEPS_MB: Final = tuple(1 << shift for shift in range(14, 21))  # 16 GiB to 1 TiB


def region_of(cell: str) -> str:
    """`eu/de/berlin` lies in `eu/de`; a cell without a slash in the whole network."""
    return cell.rpartition("/")[0]


def region_topic(network: NetworkId, cell: str) -> str:
    return f"m/1/{network.hex()}/r/{region_of(cell)}"


def key_of(what: str) -> Digest:
    return Digest(hashlib.sha256(what.encode()).digest())


def memory_keys(network: NetworkId, memory_mb: int) -> list[Digest]:
    """Every step that so much memory covers."""
    steps = [step for step in MEMORY_STEPS_MB if step <= memory_mb]
    return [key_of(f"m/1/{network.hex()}/memory/{step}") for step in steps]


def wanted_keys(network: NetworkId, memory_mb: int, blobs: Sequence[Digest]) -> list[Digest]:
    """By which a car is found that has the blobs of a job already, or the memory that it needs."""
    step = next((step for step in MEMORY_STEPS_MB if memory_mb <= step), None)
    rare = memory_mb > MEMORY_STEPS_MB[0] // 2 and step is not None
    memory = [key_of(f"m/1/{network.hex()}/memory/{step}")] if rare else []
    return [*memory, *blobs]


class Gateway:
    def __init__(
        self,
        outbox: Outbox,
        roster: Roster,
        peers_up: set[Peer],
        reach: Callable[[Peer], None],
        bid: Callable[[Announce], None],
    ) -> None:
        """`bid`: this car may, for what is announced in its cell or region."""
        self._reach = reach
        self._bid = bid
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # ids of announcements
        self._out = outbox
        self._roster = roster
        self._peers_up = peers_up
        self._topic: str | None = None  # of the region, while we hold the role
        self._said_mono_ms = 0
        self._epoch = -1  # of our last question who else does
        self._provided: OrderedDict[Digest, int] = OrderedDict()  # -> when to say it again
        self._seeks: OrderedDict[int, None] = OrderedDict()
        self._sought: OrderedDict[Digest, int] = OrderedDict()
        self._relayed: OrderedDict[Peer, int] = OrderedDict()
        """Requester -> when something of it was passed on last."""

    # ---- what a car says of itself

    def shown(
        self, wire: bytes, classes: tuple[WorkerClass, ...], blobs: tuple[Digest, ...]
    ) -> None:
        """An advert of ours has gone out: the region hears it too, if we serve our cell."""
        identity, now = self._out.identity, self._out.now
        epoch = epoch_of(now.unix_ms)
        self._provide_all(classes, blobs)
        posts = self._roster.posts(identity.cell, epoch)
        if not any(identity.peer in ranks for ranks in posts):
            if self._topic is not None:
                self._out.add(Leave(self._topic))
                self._topic = None
            return
        topic = region_topic(identity.network, identity.cell)
        if self._topic is None:
            self._topic = topic
            self._out.add(Join(topic))
        if self._epoch != epoch:
            self._epoch = epoch
            key = key_of(topic)
            self._out.add(Provide(key, PROVIDE_S))
            self.seek([key])
        elif self._said_mono_ms + self._out.limits.advert_period_ms > now.mono_ms:
            return  # what changes by the second is for the cell
        self._said_mono_ms = now.mono_ms
        self._out.add(Publish(topic, wire))

    def _provide_all(self, classes: tuple[WorkerClass, ...], blobs: tuple[Digest, ...]) -> None:
        network, now_ms = self._out.identity.network, self._out.now.mono_ms
        keys = [key for each in classes for key in memory_keys(network, each.memory_mb)]
        for key in dict.fromkeys([*keys, *blobs[-PROVIDED_MAX // 2 :]]):
            if self._provided.get(key, 0) <= now_ms:
                again_ms = now_ms + PROVIDE_S * 1_000 // 2
                remember(self._provided, key, again_ms, 4 * PROVIDED_MAX)
                self._out.add(Provide(key, PROVIDE_S))

    # ---- seeking

    def seek(self, keys: list[Digest]) -> None:
        """Ask the DHT who has any of them; who is found is dialled, and shows its advert."""
        now_ms = self._out.now.mono_ms
        for key in keys:
            asked = self._sought.get(key)
            if len(self._seeks) >= SEEKS_MAX or (asked is not None and asked > now_ms):
                continue
            remember(self._sought, key, now_ms + SEEK_GAP_MS, RELAYS_KNOWN_MAX)
            query_id = self._out.mint()
            self._seeks[query_id] = None
            self._out.add(FindProviders(query_id, key))

    def on_found(self, event: ProvidersFound) -> None:
        if event.query_id not in self._seeks:
            return
        del self._seeks[event.query_id]
        own = self._out.identity.peer
        others = [(p, addrs) for p, addrs in event.peers if p != own and p not in self._peers_up]
        self._out.counters["providers_found"] += len(others)
        for peer, addrs in self._out.rng.sample(others, min(DIALS_MAX, len(others))):
            self._out.add(Dial(peer, addrs))

    # ---- announcements that a cell could not place

    def beyond(self, spec: JobSpec, sealed: Sealed) -> None:
        """Our own cell did not bid for a job of ours: its region is asked, and the DHT."""
        identity, out = self._out.identity, self._out
        posts = self._roster.posts(identity.cell, epoch_of(out.now.unix_ms))
        there = [p for ranks in posts for p in ranks if p in self._peers_up or p == identity.peer]
        if there:
            out.post(there[out.rng.randrange(len(there))], Lane.CONTROL, sealed.wire)
        else:
            for holder in posts[0]:
                self._reach(holder)  # for the next announcement
        blobs = [arg.ident for arg in spec.args if not arg.mapped and not arg.inline]
        if spec.code is not None:
            blobs.append(spec.code.blob_id)
        self.seek(wanted_keys(identity.network, spec.memory_mb_max, blobs))

    def _holds(self, peer: Peer) -> bool:
        """Whether it is a rendezvous of our cell, or of another of which we know."""
        epoch = epoch_of(self._out.now.unix_ms)
        own = self._out.identity.cell
        posts = self._roster.posts(own, epoch)
        cells = self._roster.neighbours(own) if self._topic is not None else ()
        ranked = [posts, *(self._roster.posts(cell, epoch) for cell in cells)]
        return any(peer in ranks for shards in ranked for ranks in shards)

    def on_asked(self, peer: Peer, sealed: Sealed) -> None:
        """A requester has asked its cell in vain, and us, as a rendezvous of it, for its region."""
        announce = sealed.open(Announce, T_ANNOUNCE)
        if sealed.kid != peer or not self._in_force(announce, sealed) or self._topic is None:
            return
        if self._in_turn(announce.requester):
            self._out.counters["announces_passed_on"] += 1
            self._out.add(Publish(self._topic, sealed.wire))

    def on_announce(self, topic: str, source: Peer, sealed: Sealed) -> None:
        """From its requester, or said again by a rendezvous; once in any case."""
        announce = sealed.open(Announce, T_ANNOUNCE)
        if source != sealed.kid and not self._holds(source):
            return
        if not self._in_force(announce, sealed) or announce.announce_id in self._seen:
            return
        remember(self._seen, announce.announce_id, None, ANNOUNCES_SEEN_MAX)
        if topic == self._topic:
            self._take_in(announce, sealed)
        self._bid(announce)

    def _in_force(self, announce: Announce, sealed: Sealed) -> bool:
        left_ms = announce.expires_ms - self._out.now.unix_ms
        return (
            sealed.kid == announce.requester
            and announce.network == self._out.identity.network
            and -CLOCK_SKEW_MS_MAX < left_ms <= ANNOUNCE_MS_MAX + CLOCK_SKEW_MS_MAX
        )

    def _take_in(self, announce: Announce, sealed: Sealed) -> None:
        """Of another cell of the region: one of our cell's rendezvous says it there."""
        identity = self._out.identity
        posts = self._roster.posts(identity.cell, epoch_of(self._out.now.unix_ms))
        first = posts[0][0] if posts[0] else None
        # So many cells for each announcement as sortition reckons bids with, drawn by lot.
        cells = len(self._roster.neighbours(identity.cell)) + 1
        lot = hashlib.sha256(announce.announce_id + identity.cell.encode()).digest()[:4]
        if int.from_bytes(lot, "big") * cells >= TAKEN_IN_CELLS << 32:
            return
        if first == identity.peer and self._in_turn(announce.requester):
            self._out.counters["announces_taken_in"] += 1
            self._out.add(Publish(cell_topic(identity.network, identity.cell), sealed.wire))

    def _in_turn(self, requester: Peer) -> bool:
        now_ms = self._out.now.mono_ms
        if self._relayed.get(requester, now_ms) > now_ms:
            return False
        remember(self._relayed, requester, now_ms + RELAY_GAP_MS, RELAYS_KNOWN_MAX)
        return True
