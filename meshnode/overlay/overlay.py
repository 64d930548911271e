"""The overlay as the driver sees it: calls that never wait, and facts that come back as events.

`meshnode.node.driver` opens it, carries the machine's Send, Publish, Join, Leave, Dial, Block,
Hangup, Provide, FindProviders and FetchBlob out through it, and feeds `events` to the machine.
Nothing outside this folder imports libp2p.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from libp2p.abc import INetwork
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from meshnode.errors import LocalResource, UsageError
from meshnode.protocol.effects import Send
from meshnode.protocol.events import DialFailed, Event
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ADDR_CHARS_MAX, ADDRS_MAX, BlobRef, Digest, Peer

from .bulk import BlobServer, ChunkStore, Fetch
from .config import BLOB_PROTOCOL, OverlayConfig
from .dht import Dht
from .gossip import Gossip
from .guard import ALL_GUARDS, contained, log
from .hardening import patch_once
from .host import MeshHost, build_host, id_of, peer_of
from .ports import PortLocks, expand_listen, parse_listen, port_locks
from .sink import EventSink
from .streams import Links, mono_ms

ADDRESS_TTL_S: Final = 3600
MET_TTL_S: Final = 24 * 3600
"""Addresses of an earlier life: as long as finished units are kept for a requester."""
MET_MAX: Final = 256
"""Peers whose addresses are remembered; Bitcoin Core's anchors.dat and libp2p's address book serve
the same purpose."""
MET_DIALS_MAX: Final = 8
"""Of these in one round, when nobody of the bootstrap answers."""
BLOCKED_MAX: Final = 4096
BOOTSTRAP_PAUSE_S: Final = 1.0
BOOTSTRAP_PAUSE_S_MAX: Final = 30.0


class _ConnectionNotifee:
    """libp2p's hook for new connections."""

    def __init__(self, on_connected: Callable[[Any], None]) -> None:
        self._on_connected = on_connected

    async def connected(self, network: INetwork, conn: Any) -> None:
        self._on_connected(conn)

    async def _nothing(self, *_: object) -> None:
        return None

    disconnected = opened_stream = closed_stream = listen = listen_close = _nothing


class Overlay:
    """Made by `open_overlay`; lives as long as its scope."""

    def __init__(
        self,
        host: MeshHost,
        config: OverlayConfig,
        chunks: ChunkStore,
        sink: EventSink,
    ) -> None:
        self._host = host
        self._config = config
        self._chunks = chunks
        self._sink = sink
        self._spawn = spawn = host.start_task
        self._blocked: dict[Peer, int] = {}
        self._dialling: set[Peer] = set()
        self.counters: Counter[str] = host.counters
        self.events: trio.MemoryReceiveChannel[Event] = sink.receive
        own = peer_of(host.get_id())
        assert own is not None
        self.peer: Peer = own
        self.addrs: tuple[str, ...] = ()
        self.links = Links(host, config, sink, host.counters, spawn)
        self.gossip = Gossip(host, config, sink, self.links.rtt_us)
        self.dht = Dht(host, config, sink, spawn, self.links.addrs_of)
        self.server = BlobServer(host, config, chunks)
        self._alone = trio.Event()
        self.links.on_down = self._on_down
        self.links.on_up = self.gossip.mend_peer
        host.on_identified = self._on_identified
        self._met: OrderedDict[Peer, tuple[str, ...]] = OrderedDict()  # the newest last
        self.on_met: Callable[[], None] = lambda: None
        for peer, addrs in reversed(_by_peer(config.met).items()):
            if peer != own:
                self._note_met(peer, addrs)
                host.get_peerstore().add_addrs(id_of(peer), _multiaddrs(addrs), MET_TTL_S)
        host.swarm.refuses = self._refuses
        host.swarm.register_notifee(_ConnectionNotifee(self.links.on_connected))  # type: ignore[arg-type]

    # ---- what the driver calls; none of these waits or raises on a peer's fault

    def send(self, effect: Send) -> None:
        """Queue a frame; SendFailed follows if it cannot be queued or written."""
        self.links.send(effect)

    def publish(self, topic: str, frame: bytes) -> None:
        self.gossip.publish(topic, frame)

    def join(self, topic: str) -> None:
        self.gossip.join(topic)

    def leave(self, topic: str) -> None:
        self.gossip.leave(topic)

    def dial(self, peer: Peer, addrs: Sequence[str]) -> None:
        """PeerUp or DialFailed follows; nothing, if the peer is up or being dialled already."""
        if peer in self.links or peer in self._dialling:
            return
        if len(self._dialling) >= self._config.dials_pending_max:
            self._sink.emit_now(DialFailed(peer, Reason.BUSY))
        elif self._is_blocked(peer):
            self._sink.emit_now(DialFailed(peer, Reason.BLOCKED))
        else:
            self._dialling.add(peer)
            self._spawn(self._dial, peer, tuple(addrs)[:ADDRS_MAX])

    def block(self, peer: Peer, until_mono_ms: int) -> None:
        """Drop the peer now and refuse it until then, in both directions."""
        if len(self._blocked) >= BLOCKED_MAX:
            now = mono_ms()
            self._blocked = {who: until for who, until in self._blocked.items() if until > now}
            while len(self._blocked) >= BLOCKED_MAX:
                del self._blocked[next(iter(self._blocked))]
        self._blocked[peer] = until_mono_ms
        self.links.cut(peer, Reason.BLOCKED)
        for conn in self._host.swarm.get_connections(id_of(peer)):
            self._spawn(contained(conn.close, self.counters, "close"))

    def hang_up(self, peer: Peer) -> None:
        """Close the connection once what is queued has gone out; either side may dial again."""
        kept = self.links.hang_up(peer)
        for conn in self._host.swarm.get_connections(id_of(peer)):
            if conn is not kept:
                self._spawn(contained(conn.close, self.counters, "close"))

    def provide(self, key: Digest, ttl_s: int) -> None:
        self.dht.provide(key, ttl_s)

    def find_providers(self, query_id: int, key: Digest) -> None:
        self.dht.find_providers(query_id, key)

    async def fetch_blob(
        self,
        fetch_id: int,
        ref: BlobRef,
        first_byte: int,
        byte_count: int,
        holders: Sequence[Peer],
        deadline_mono_ms: int,
    ) -> int:
        """Bring the missing chunks of a byte range here; bytes fetched. Raises BlobError.

        Holders are asked in their order, several at once; one that fails, stalls or lies is left
        and its chunks go to another. What was kept stays kept: calling again resumes.
        """
        fetch = Fetch(self._open_blob, self._config, self._chunks, self.counters, ref)
        return await fetch.run(first_byte, byte_count, holders, deadline_mono_ms)

    @property
    def met(self) -> tuple[str, ...]:
        """Multiaddrs ending in /p2p/ID of the peers met last, the newest first."""
        return tuple(
            f"{addr}/p2p/{id_of(peer)}"
            for peer, addrs in reversed(self._met.items())
            for addr in addrs
        )

    def tasks(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        """What runs as long as the overlay does."""
        return (
            self._sink.forward,
            self.links.reap,
            self.gossip.work,
            self.gossip.deliver,
            self.gossip.mend,
            self.dht.walk,
            self.dht.republish,
            self._bootstrap,
        )

    # ---- the rest is inside

    async def _open_blob(self, holder: Peer) -> Any:
        return await self._host.open_to(holder, BLOB_PROTOCOL)

    def _is_blocked(self, peer: Peer) -> bool:
        until = self._blocked.get(peer)
        if until is None:
            return False
        if until > mono_ms():
            return True
        del self._blocked[peer]
        return False

    def _refuses(self, peer_id: ID) -> bool:
        peer = peer_of(peer_id)
        return peer is None or self._is_blocked(peer)

    def _on_down(self, peer: Peer) -> None:
        self.dht.forget(peer)
        if not self.links.peers():
            self._alone.set()

    def remember(self, peer: Peer) -> None:
        """It is one of ours, by its hello: where it is goes into `met`, and the address is learnt
        by identify, before or after this. Strangers are not remembered: identities cost nothing."""
        self._note_met(peer, self._met.get(peer, ()))
        self._learn(peer)

    def _learn(self, peer: Peer) -> None:
        addrs = self.links.addrs_of(id_of(peer))
        addrs = tuple(a for a in addrs if a.isascii() and len(a) <= ADDR_CHARS_MAX)
        if peer in self._met and addrs and self._met[peer] != addrs:
            self._met[peer] = addrs
            self.on_met()

    async def _on_identified(self, peer_id: ID) -> None:
        """Now its own word on where it listens is in the peerstore."""
        peer = peer_of(peer_id)
        if peer is not None:
            self._learn(peer)
        await self.dht.on_identified(peer_id)

    def _note_met(self, peer: Peer, addrs: tuple[str, ...]) -> None:
        self._met[peer] = addrs
        self._met.move_to_end(peer)
        if len(self._met) > MET_MAX:
            away = (each for each in self._met if each not in self.links)
            gone = next(away, peer)
            del self._met[next(iter(self._met)) if gone == peer else gone]

    async def _dial(self, peer: Peer, addrs: tuple[str, ...]) -> None:
        up = False
        try:
            usable = _multiaddrs(addrs)
            if usable:
                self._host.get_peerstore().add_addrs(id_of(peer), usable, ADDRESS_TTL_S)
            conn = await self._host.swarm.dial_fresh(id_of(peer), usable)
            up = await self.links.wait_up(peer, self._config.link_timeout_s, conn)
            if not up:
                await conn.close()
        except Exception as error:  # noqa: BLE001 - becomes DialFailed
            log.debug("dial: %r", error)
        finally:
            self._dialling.discard(peer)
        if not up and peer not in self.links:
            reason = Reason.BLOCKED if self._is_blocked(peer) else Reason.UNREACHABLE
            self._sink.emit_now(DialFailed(peer, reason))

    async def _bootstrap(self) -> None:
        """Task: as long as this node is alone it dials the bootstrap addresses again; after the
        first time in vain also some of those it has met before, in turn."""
        own = self.peer
        named = {p: addrs for p, addrs in _by_peer(self._config.bootstrap).items() if p != own}
        pause_s, turn = BOOTSTRAP_PAUSE_S, 0
        while True:
            if self.links.peers():
                self._alone = trio.Event()
                await self._alone.wait()
                pause_s, turn = BOOTSTRAP_PAUSE_S, 0
            for peer, addrs in named.items():
                self.dial(peer, addrs)
            others = [peer for peer in reversed(self._met) if peer not in named]
            if others and (turn or not named):
                first = (turn - bool(named)) * MET_DIALS_MAX % len(others)
                for peer in others[first : first + MET_DIALS_MAX]:
                    self.dial(peer, self._met[peer])
            turn += 1
            pause_s = min(BOOTSTRAP_PAUSE_S_MAX, 2 * pause_s)
            await trio.sleep(pause_s)


def _peer_at(address: str) -> tuple[Peer, str] | None:
    """Who is where, of a multiaddr that ends in /p2p/ID; None if it is none."""
    bare, _, tail = address.rpartition("/p2p/")
    try:
        peer = peer_of(ID.from_base58(tail)) if bare and Multiaddr(bare) else None
    except Exception:  # noqa: BLE001 - py-multiaddr and base58 raise many kinds
        return None
    return None if peer is None else (peer, bare)


def _by_peer(addresses: Sequence[str]) -> dict[Peer, tuple[str, ...]]:
    """Multiaddrs ending in /p2p/ID -> peer -> where it is; what is none is left out."""
    every: dict[Peer, tuple[str, ...]] = {}
    for address in addresses:
        if found := _peer_at(address):
            peer, bare = found
            every[peer] = (*every.get(peer, ()), bare)[:ADDRS_MAX]
    return every


def _multiaddrs(addrs: Sequence[str]) -> list[Multiaddr]:
    usable = []
    for address in addrs:
        if len(address) <= ADDR_CHARS_MAX:
            try:
                usable.append(Multiaddr(address.split("/p2p/", 1)[0]))
            except Exception as error:  # noqa: BLE001 - py-multiaddr raises many kinds
                log.debug("not an address: %r", error)
    return usable


def _check_bootstrap(config: OverlayConfig) -> None:
    for address in config.bootstrap:
        if _peer_at(address) is None:
            raise UsageError(f"{address!r} is no bootstrap address: write ADDRESS/p2p/PEER")


@asynccontextmanager
async def open_overlay(config: OverlayConfig, chunks: ChunkStore) -> AsyncIterator[Overlay]:
    """The overlay, listening; its tasks, sockets and locks end with the scope."""
    async with open_with_guards(config, chunks, ALL_GUARDS) as overlay:
        yield overlay


@asynccontextmanager
async def open_with_guards(
    config: OverlayConfig, chunks: ChunkStore, guards: frozenset[str]
) -> AsyncIterator[Overlay]:
    """As `open_overlay`; only tests/attack passes less than all guards."""
    patch_once()
    _check_bootstrap(config)
    listen = expand_listen(config.listen)
    with port_locks(config.lock_dir) as locks:
        for address in listen:
            _, ip, port = parse_listen(address)
            locks.take(ip, port)
            locks.probe(ip, port)
        host = build_host(config, guards, Counter())
        sink = EventSink(config.events_max)
        overlay = Overlay(host, config, chunks, sink)
        failure: BaseException | None = None
        async with (
            background_trio_service(host.get_network()),
            background_trio_service(overlay.gossip.pubsub),
            background_trio_service(overlay.gossip.router),
            background_trio_service(overlay.dht.kad),
        ):
            try:
                async with trio.open_nursery() as nursery:
                    host.spawn = nursery.start_soon
                    try:
                        await _listen(host, overlay, listen, locks)
                        for task in overlay.tasks():
                            nursery.start_soon(task)
                        yield overlay
                    except BaseException as error:  # noqa: BLE001 - raised again below
                        # Kept out of the five nurseries: they would wrap it five times over.
                        failure = error
                    nursery.cancel_scope.cancel()
            finally:
                # Before the services end: leaving them does not close connections (L10).
                with trio.CancelScope(shield=True):
                    await host.close_all(config.close_timeout_s)
                sink.close()
        if failure is not None:
            raise failure


async def _listen(
    host: MeshHost, overlay: Overlay, listen: Sequence[str], locks: PortLocks
) -> None:
    swarm = host.swarm
    started_s = time.monotonic()
    if listen:
        await swarm.listen(*(Multiaddr(address) for address in listen))
    bound = [str(addr) for listener in swarm.listeners.values() for addr in listener.get_addrs()]
    if len(bound) < len(listen):
        raise LocalResource(f"cannot listen on all of {', '.join(listen)}")
    for address in bound:
        _, ip, port = parse_listen(address)
        locks.take(ip, port)
    overlay.addrs = tuple(f"{address}/p2p/{host.get_id()}" for address in bound)
    log.debug("listening after %.1f ms", 1000 * (time.monotonic() - started_s))
