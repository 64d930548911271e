"""Gossip: signed messages on topics, with an intake budget and no silent loss.

Under `overlay`. GossipSub 1.1 of libp2p carries the messages; this module bounds what a forwarder
and a source may cost, hands messages to the driver in order, and counts everything dropped.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ValidationError
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from meshnode.protocol.events import GossipIn
from meshnode.protocol.types import Peer

from . import locality
from .config import GOSSIP_PROTOCOL, OverlayConfig
from .guard import GOSSIP_BUDGET, PUSH_MSG, Budget, contained, log
from .host import MeshHost, id_of, peer_of
from .sink import EventSink

READ_BYTES: Final = 64 << 10
FLOOD_PEERS: Final = 10
POOL_MAX: Final = 4_096  # peers of a topic that are looked at for its mesh
SWAP_BEATS: Final = 15  # heartbeats between two looks for a nearer peer
PUSHES_MAX: Final = 1_024
"""Messages read and not yet looked at; each takes well under a millisecond."""


class MeshRouter(GossipSub):
    """GossipSub whose heartbeat outlives an exception, and whose meshes are of near peers."""

    counters: Counter[str]
    lot = random.Random()
    _beats = 0

    def __init__(self, rtt_us: Callable[[ID], int], heartbeat_s: int) -> None:
        super().__init__(
            protocols=[TProtocol(GOSSIP_PROTOCOL)],
            degree=6,
            degree_low=4,
            degree_high=10,
            heartbeat_interval=heartbeat_s,
            # Stock drops above 10 messages/s a topic without a word, and its scores all end at
            # thresholds of minus infinity; budgets of the pubsub take their place.
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
            adaptive_gossip_enabled=False,
            do_px=False,
        )
        self.rtt_us = rtt_us

    def _perform_opportunistic_grafting(self, topic: str, peers_to_graft: Any) -> int:
        """Stock grafts at each heartbeat whoever scores well, wherever that is."""
        return 0

    def _handle_dropped_rpc(self, peer_id: ID, rpc: Any, reason: str) -> None:
        self.counters["gossip_dropped_peer_queue"] += 1
        super()._handle_dropped_rpc(peer_id, rpc, reason)

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        """What this node says itself goes to peers outside its mesh too, up to FLOOD_PEERS.

        A mesh forms at the heartbeat: what was published before it went to nobody, and was never
        offered again, because by then the peer is in the mesh and no IHAVE goes there. GossipSub
        1.1 calls this flood publishing; libp2p 0.8.1 has no option for it.
        """
        chosen = set(super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id))
        pubsub = self.pubsub
        if pubsub is not None and origin == pubsub.my_id:
            for topic in topic_ids:
                known = sorted(pubsub.peer_topics.get(topic, ()), key=ID.to_bytes)
                others = [peer for peer in known if peer in pubsub.peers and peer not in chosen]
                chosen.update(others[: max(0, FLOOD_PEERS - len(chosen))])
        return chosen

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Iterable[ID], backoff_check: bool = False
    ) -> list[ID]:
        """Whom to graft, near ones first; for IHAVE, which is to go anywhere, as stock does."""
        of = super()._get_in_topic_gossipsub_peers_from_minus
        if not backoff_check:
            return of(topic, num_to_select, minus)
        members = len(self.mesh.get(topic, ()))
        pool = of(topic, POOL_MAX, minus, True)
        return locality.to_graft(pool, num_to_select, members, self.rtt_us, self.lot)

    def _select_peers_for_pruning(self, topic: str, num_to_prune: int) -> list[ID]:
        mesh = self.mesh.get(topic, set())
        return locality.to_prune(mesh, max(0, num_to_prune), self.rtt_us, self.lot)

    def mesh_heartbeat(self) -> tuple[Any, Any]:
        """Stock's, and now and then a near peer in the place of a far one: a mesh forms of whoever
        comes first."""
        grafts, prunes = super().mesh_heartbeat()
        self._beats += 1
        for topic in self.mesh if self._beats % SWAP_BEATS == 0 else ():
            mesh = self.mesh[topic]
            if len(mesh) < self.degree_low or len(mesh) >= self.degree_high:
                continue  # stock fills it, or cuts it down to the near ones
            of = super()._get_in_topic_gossipsub_peers_from_minus
            peer = locality.nearer(mesh, of(topic, POOL_MAX, mesh, True), self.rtt_us)
            if peer is None:
                continue
            mesh.add(peer)
            self._notify_mesh_peer_added(peer, topic)
            grafts[peer].append(topic)
            self.counters["gossip_nearer_peers"] += 1
            for gone in self._select_peers_for_pruning(topic, len(mesh) - self.degree):
                mesh.discard(gone)
                prunes[gone].append(topic)
        return grafts, prunes

    async def heartbeat(self) -> None:
        while True:
            await contained(super().heartbeat, self.counters, "heartbeat")()
            await trio.sleep(self.heartbeat_interval)


class _Straight:
    """A gossip stream for the loops that read and write it, without the lock of its NetStream.

    Stock reads a length byte by byte, each through that lock: a third of what a delivery cost. The
    exceptions are those of the NetStream, because the loops tell the peer's end by them.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._muxed = stream.muxed_stream
        self._buffer = bytearray()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, count: int) -> bytes:
        if not self._buffer:
            try:
                self._buffer += await self._muxed.read(READ_BYTES)
            except MuxedStreamEOF as error:
                raise StreamEOF from error
            except MuxedStreamError as error:
                raise StreamReset from error
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def write(self, chunk: bytes) -> None:
        try:
            await self._muxed.write(chunk)
        except MuxedStreamError as error:
            raise StreamReset from error


class MeshPubsub(Pubsub):
    """Pubsub with guarded intake; messages go to `inbox`, not into 32-deep channels."""

    def __init__(self, host: MeshHost, router: MeshRouter, config: OverlayConfig) -> None:
        super().__init__(host, router, strict_signing=True)
        self._guards = host.guards
        self._counters = host.counters
        self._config = config
        self.inbox: dict[str, deque[GossipIn]] = {}
        self.arrived = trio.Event()
        self._swarm = host.swarm
        self._pushes: deque[tuple[ID, Any]] = deque()
        self._pushed = trio.Event()
        self._forwarders = Budget(
            config.gossip_per_forwarder_per_s, config.gossip_per_forwarder_burst
        )
        self._sources = Budget(config.gossip_per_source_per_s, config.gossip_per_source_burst)
        # Stock counts seconds since 1970 plus messages sent: a node that restarts reuses its
        # sequence numbers, and what it says is "seen" for two minutes and silently dropped.
        self.counter = time.time_ns()

    async def run(self) -> None:
        if PUSH_MSG in self._guards:
            # Tasks that a peer's bytes start may not end the service, which ends the host.
            manager: Any = self.manager
            start = manager.run_task

            def run_task(function: Any, *args: Any, **kwargs: Any) -> None:
                if function == self.push_msg:
                    self._queue_push(*args)
                else:
                    start(contained(function, self._counters, "gossip"), *args, **kwargs)

            manager.run_task = run_task
            start(self._push_all)
        await super().run()

    def _queue_push(self, forwarder: ID, msg: Any) -> None:
        """Stock makes a task of each message: a fifth of what one costs, unbounded, unordered."""
        if len(self._pushes) >= PUSHES_MAX:
            self._counters["gossip_dropped_intake"] += 1
            return
        self._pushes.append((forwarder, msg))
        self._pushed.set()

    async def _push_all(self) -> None:
        while True:
            await self._pushed.wait()
            self._pushed = trio.Event()
            while self._pushes:
                await self.push_msg(*self._pushes.popleft())

    async def _handle_new_peer(self, peer_id: ID) -> None:
        # Stock writes the hello with the topics of now, and lists the peer only once that write is
        # through: a topic joined meanwhile is announced to everybody else, and to this peer never.
        said = set(self.topic_ids)
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:
            for topic in said ^ set(self.topic_ids):
                packet, option = self._build_announce_rpc(topic, subscribe=topic in self.topic_ids)
                self._enqueue_or_retry_announce(peer_id, queue, packet, option)

    async def continuously_read_stream(self, stream: Any) -> None:
        await super().continuously_read_stream(_Straight(stream))  # type: ignore[arg-type]

    async def handle_sending_messages(self, peer_id: ID, stream: Any, queue: Any) -> None:
        await super().handle_sending_messages(peer_id, _Straight(stream), queue)  # type: ignore[arg-type]

    def _is_subscribed_to_msg(self, msg: Any) -> bool:
        # Asked before a task is made for the message, which costs more than all there is to do for
        # one that was here before; and three of four are, in a mesh of degree six.
        return super()._is_subscribed_to_msg(msg) and not self._is_msg_seen(msg)

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        if GOSSIP_BUDGET in self._guards and not self._admits(msg_forwarder, msg):
            return
        if PUSH_MSG not in self._guards:
            await super().push_msg(msg_forwarder, msg)
            return
        await contained(super().push_msg, self._counters, "gossip")(msg_forwarder, msg)

    def _admits(self, forwarder: ID, msg: Any) -> bool:
        """Before the signature is checked, which is what a message costs."""
        if forwarder == self.my_id:
            return True
        if len(msg.data) > self._config.gossip_bytes_max or len(msg.topicIDs) != 1:
            self._counters["gossip_refused_form"] += 1
        elif self._swarm.refuses(ID(msg.from_id)):
            self._counters["gossip_refused_blocked"] += 1
        elif not self._forwarders.take(forwarder.to_bytes()):
            self._counters["gossip_refused_forwarder"] += 1
        else:
            return True
        return False

    async def validate_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """After the signature: only now may a message count against its source."""
        if (
            GOSSIP_BUDGET in self._guards
            and msg_forwarder != self.my_id
            and not self._sources.take(bytes(msg.from_id))
        ):
            self._counters["gossip_refused_source"] += 1
            raise ValidationError("the source is over its budget")
        await super().validate_msg(msg_forwarder, msg)

    def notify_subscriptions(self, publish_message: Any) -> None:
        source = peer_of(ID(publish_message.from_id))
        if source is None or bytes(source) == self.my_id.to_bytes():
            return
        for topic in publish_message.topicIDs:
            queued = self.inbox.get(topic)
            if queued is None:
                continue
            if len(queued) >= self._config.gossip_queue_max:
                queued.popleft()  # adverts and announcements age; the newest is worth most
                self._counters["gossip_dropped_queue"] += 1
            queued.append(GossipIn(topic, source, bytes(publish_message.data)))
            self.arrived.set()


def _of_ids(rtt_us: Callable[[Peer], int | None]) -> Callable[[ID], int]:
    """By libp2p's own names of peers; who is not measured is far."""

    def of(peer_id: ID) -> int:
        peer = peer_of(peer_id)
        return (None if peer is None else rtt_us(peer)) or locality.UNKNOWN_US

    return of


class Gossip:
    """What `overlay` calls: join, leave, publish; and the task that delivers."""

    def __init__(
        self,
        host: MeshHost,
        config: OverlayConfig,
        sink: EventSink,
        rtt_us: Callable[[Peer], int | None],
    ) -> None:
        self._config = config
        self._sink = sink
        self._counters = host.counters
        self._wanted: dict[str, None] = {}
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._work = trio.Event()
        self.router = MeshRouter(_of_ids(rtt_us), config.gossip_heartbeat_s)
        self.router.counters = host.counters
        self.pubsub = MeshPubsub(host, self.router, config)

    # ---- called by Overlay; never waits

    def join(self, topic: str) -> None:
        if topic in self._wanted:
            return
        if len(self._wanted) >= self._config.gossip_topics_max:
            self._counters["gossip_topics_refused"] += 1
            return
        self._wanted[topic] = None
        self.pubsub.inbox.setdefault(topic, deque())
        self._work.set()

    def leave(self, topic: str) -> None:
        self._wanted.pop(topic, None)
        self.pubsub.inbox.pop(topic, None)
        self._work.set()

    def publish(self, topic: str, frame: bytes) -> None:
        if len(frame) > self._config.gossip_bytes_max:
            self._counters["gossip_refused_size"] += 1
            log.warning("a gossip message of %d bytes was not sent", len(frame))
        elif len(self._outbox) >= self._config.gossip_queue_max:
            self._counters["gossip_dropped_outbox"] += 1
        else:
            self._outbox.append((topic, frame))
            self._work.set()

    # ---- tasks

    async def work(self) -> None:
        """Joins, leaves and publishes, in that order."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            for topic in set(self.pubsub.topic_ids) - set(self._wanted):
                await contained(self.pubsub.unsubscribe, self._counters, "gossip")(topic)
            for topic in list(self._wanted):
                if topic not in self.pubsub.topic_ids:
                    await contained(self.pubsub.subscribe, self._counters, "gossip")(topic)
            while self._outbox:
                topic, frame = self._outbox.popleft()
                await contained(self.pubsub.publish, self._counters, "gossip")(topic, frame)

    def mend_peer(self, peer: Peer) -> None:
        """Replace a stream whose connection is gone.

        A peer that reconnects before stock has heard of its old connection's end keeps the dead
        stream in the table for good: it is told nothing, not even what this node subscribed to.
        """
        peer_id = id_of(peer)
        stream = self.pubsub.peers.get(peer_id)
        if stream is not None:
            muxed: Any = stream.muxed_conn
            if muxed.event_shutting_down.is_set():
                self.pubsub._handle_dead_peer(peer_id)

    async def mend(self) -> None:
        """Task: what `mend_peer` does, for connections that end without a new link."""
        while True:
            await trio.sleep(self._config.gossip_heartbeat_s)
            for peer_id in list(self.pubsub.peers):
                peer = peer_of(peer_id)
                if peer is not None:
                    self.mend_peer(peer)

    async def deliver(self) -> None:
        """Messages to the driver, topics in turn, so that a loud topic starves no other."""
        while True:
            await self.pubsub.arrived.wait()
            self.pubsub.arrived = trio.Event()
            while any(self.pubsub.inbox.values()):
                for queued in list(self.pubsub.inbox.values()):
                    if queued:
                        await self._sink.emit(queued.popleft())
