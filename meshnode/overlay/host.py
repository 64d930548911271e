"""One libp2p host: identity, Noise, Yamux, TCP, and nothing else of what libp2p offers.

Between `overlay` and `swarm`. Builds the parts by hand instead of through `new_host`, which would
bring plaintext, SECIO, TLS, mplex and a resource manager with its own leaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from meshnode.protocol.types import PEER_BYTES, PEER_PREFIX, Peer

from .config import OverlayConfig
from .guard import INBOUND_SLOT, NOISE_ONLY, STREAM_HANDLER, contained, log
from .swarm import MeshConn, MeshSwarm, MeshYamux

IDENTIFY_PAUSE_S: Final = 0.25
IDENTIFY_TRIES: Final = 4


def peer_of(peer_id: ID) -> Peer | None:
    """The 38-byte peer of a libp2p id, None if it is not an inlined Ed25519 key."""
    raw = peer_id.to_bytes()
    if len(raw) != PEER_BYTES or not raw.startswith(PEER_PREFIX):
        return None
    return Peer(raw)


def id_of(peer: Peer) -> ID:
    return ID(bytes(peer))


class MeshHost(BasicHost):
    """BasicHost without system tasks, with streams on a connection of the caller's choice."""

    counters: Counter[str]
    guards: frozenset[str]
    spawn: Callable[..., None] | None = None
    on_identified: Callable[[ID], Awaitable[None]] | None = None

    def start_task(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """In the nursery of `open_overlay`, inside whose scope every host lives.

        The overlay's calls may not wait, so each leaves its work to a task there.
        """
        if self.spawn is not None:
            self.spawn(task, *args)

    @property
    def swarm(self) -> MeshSwarm:
        swarm = self.get_network()
        assert isinstance(swarm, MeshSwarm)
        return swarm

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """In the overlay's nursery: stock starts a trio system task, which outlives the host."""
        if self.spawn is None or peer_id == self.get_id() or peer_id in self._identify_inflight:
            return
        if peer_id in self._identified_peers:
            return
        self._identify_inflight.add(peer_id)
        self.spawn(self._identify, peer_id, reason)

    async def _identify(self, peer_id: ID, reason: str) -> None:
        """Until identify is through the DHT may not take the peer in (L12), so try a few times."""
        try:
            for _ in range(IDENTIFY_TRIES):
                await contained(self._identify_now, self.counters, "identify")(peer_id, reason)
                if peer_id in self._identified_peers:
                    if self.on_identified is not None:
                        await self.on_identified(peer_id)
                    return
                if not self.get_network().get_connections(peer_id):
                    return
                await trio.sleep(IDENTIFY_PAUSE_S)
        finally:
            self._identify_inflight.discard(peer_id)

    async def _identify_now(self, peer_id: ID, reason: str) -> None:
        await self._identify_peer(peer_id, reason=reason)

    async def open_on(self, conn: MeshConn, protocol: str) -> INetStream:
        """A stream with `protocol` on exactly this connection."""
        stream = await conn.new_stream()
        opened = False
        try:
            selected = await self.multiselect_client.select_one_of(
                [TProtocol(protocol)],
                MultiselectCommunicator(stream),
                self.swarm.config.negotiate_timeout_s,
            )
            opened = True
        finally:
            if not opened:
                with trio.CancelScope(shield=True):
                    await contained(stream.reset, self.counters, "reset")()
        stream.set_protocol(selected)
        return stream

    async def open_to(self, peer: Peer, protocol: str) -> INetStream:
        """A stream with `protocol` to a peer, dialled first if need be."""
        conns = await self.swarm.dial_peer(id_of(peer))
        return await self.open_on(conns[0], protocol)

    async def close_all(self, timeout_s: float) -> None:
        """Close connections, all at once, then the rest; stock takes 0.2 s for each in turn."""
        with trio.CancelScope(shield=True), trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for conn in self.get_network().get_connections():
                    nursery.start_soon(contained(conn.close, self.counters, "close"))
        with trio.CancelScope(shield=True), trio.move_on_after(timeout_s):
            await contained(self.close, self.counters, "close")()


def _guarded_handler(host: MeshHost) -> Callable[[INetStream], Awaitable[None]]:
    """L1, L2a, L2b: whatever a handler raises costs the stream, not the process."""
    inner = host._swarm_stream_handler

    async def handle(stream: INetStream) -> None:
        try:
            await inner(stream)
        except Exception as error:  # noqa: BLE001 - see contained()
            host.counters["contained_handler"] += 1
            log.info("handler died: %r", error)
            await contained(stream.reset, host.counters, "reset")()

    return handle


def build_host(config: OverlayConfig, guards: frozenset[str], counters: Counter[str]) -> MeshHost:
    """A host that is not yet running."""
    keys = create_new_key_pair(config.key_seed)
    peer_id = ID.from_pubkey(keys.public_key)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    security: dict[TProtocol, Any] = {NOISE_PROTOCOL_ID: noise}
    if NOISE_ONLY not in guards:
        security[PLAINTEXT_PROTOCOL_ID] = InsecureTransport(keys, peerstore=None)
    MeshYamux.guards = guards
    MeshYamux.window_bytes = config.stream_window_bytes
    MeshYamux.conn_bytes_max = config.conn_buffer_bytes_max
    MeshYamux.counters = counters
    MeshYamux.close_timeout_s = config.close_timeout_s
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, keys)
    swarm = MeshSwarm(
        peer_id,
        peerstore,
        TransportUpgrader(security, {TProtocol(YAMUX_PROTOCOL_ID): MeshYamux}),
        transports=[TCP()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            # Stock counts 250 inbound slots out of 300; here the overlay's own bounds decide.
            max_connections=config.connections_max if _own_slots(guards) else 300,
            min_connections=0 if _own_slots(guards) else 50,
            low_watermark=0 if _own_slots(guards) else 50,
            high_watermark=config.connections_max if _own_slots(guards) else 200,
            max_connections_per_peer=config.connections_per_peer_max,
            inbound_upgrade_timeout=config.upgrade_timeout_s if _own_slots(guards) else 10.0,
            outbound_upgrade_timeout=config.upgrade_timeout_s,
            outbound_stream_protocol_negotiation_timeout=float(config.negotiate_timeout_s),
            inbound_stream_protocol_negotiation_timeout=float(config.negotiate_timeout_s),
        ),
        config=config,
        guards=guards,
        counters=counters,
    )
    host = MeshHost(swarm, addrs_factory=_advertised, disable_identify_address_discovery=True)
    host.counters = counters
    host.guards = guards
    if STREAM_HANDLER in guards:
        swarm.set_stream_handler(_guarded_handler(host))
    return host


def _own_slots(guards: frozenset[str]) -> bool:
    return INBOUND_SLOT in guards


def _advertised(bound: list[Multiaddr]) -> list[Multiaddr]:
    """Loopback only if there is nothing else: a peer elsewhere would dial itself there."""
    public = [addr for addr in bound if not _is_loopback(str(addr))]
    return public or bound


def _is_loopback(addr: str) -> bool:
    return addr.startswith(("/ip4/127.", "/ip6/::1/"))
