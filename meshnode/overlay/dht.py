"""Kademlia: who else is there, and who holds a blob. Off the path of every task.

Under `overlay`. Peer routing and provider records of libp2p under the private prefix
/meshnode/kad/1.0.0; values are refused (no validator). Keys are SHA-256 digests and travel as
multihashes (0x12 0x20 and the digest), as other libp2p implementations expect.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator

from meshnode.protocol.events import ProvidersFound
from meshnode.protocol.types import ADDRS_MAX, Digest, Peer

from .config import OverlayConfig
from .guard import contained, log
from .host import MeshHost, id_of, peer_of
from .sink import EventSink

PROVIDERS_MAX: Final = 20
ASKED_MAX: Final = 20
QUERY_S: Final = 4.0
REPUBLISH_S: Final = 6 * 3600.0
WALK_PAUSE_S: Final = 300.0


class Dht:
    def __init__(
        self,
        host: MeshHost,
        config: OverlayConfig,
        sink: EventSink,
        spawn: Callable[..., None],
        addrs_of: Callable[[ID], tuple[str, ...]],
    ) -> None:
        self._host = host
        self._config = config
        self._sink = sink
        self._spawn = spawn
        self._addrs_of = addrs_of
        self._counters: Counter[str] = host.counters
        self._provided: dict[Digest, float] = {}  # until when, on the monotonic clock
        self._queries = trio.CapacityLimiter(config.dht_queries_max)
        self._queries_waiting = 0
        self._announced: dict[Digest, float] = {}  # when at least one peer took the record
        self._walk = trio.Event()
        self._walked = trio.Event()
        self.kad = KadDHT(
            host,
            DHTMode.SERVER if config.dht_server else DHTMode.CLIENT,
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        self._store: Any = self.kad.provider_store
        self._bound_store()

    # ---- called by Overlay; never waits

    def provide(self, key: Digest, ttl_s: int) -> None:
        if len(self._provided) >= self._config.provided_keys_max and key not in self._provided:
            self._counters["dht_provide_refused"] += 1
            return
        self._provided[key] = time.monotonic() + ttl_s
        self._spawn(self._announce, key)

    def find_providers(self, query_id: int, key: Digest) -> None:
        if self._queries_waiting >= 4 * self._config.dht_queries_max:
            self._counters["dht_query_refused"] += 1
            self._sink.emit_now(ProvidersFound(query_id, ()))
            return
        self._queries_waiting += 1
        self._spawn(self._find, query_id, key)

    def forget(self, peer: Peer) -> None:
        """A dead peer in the table costs every lookup 0.7-1.5 s."""
        self.kad.routing_table.remove_peer(id_of(peer))

    # ---- tasks

    async def on_identified(self, peer_id: ID) -> None:
        """Not before: until identify is through the table does not take the peer in (L12)."""
        if await self.kad.routing_table.add_peer(peer_id):
            self._walk.set()

    async def walk(self) -> None:
        """Task: look for oneself after new peers, so that neighbours know each other."""
        while True:
            with trio.move_on_after(WALK_PAUSE_S):
                await self._walk.wait()
            self._walk = trio.Event()
            await trio.sleep(0.5)  # peers come in groups
            own = self._host.get_id().to_bytes()
            with trio.move_on_after(self._config.dht_timeout_s):
                await contained(
                    self.kad.peer_routing.find_closest_peers_network, self._counters, "dht"
                )(own)
            self._walked.set()
            self._walked = trio.Event()

    async def republish(self) -> None:
        """Task: announce what is still provided, drop what is not.

        After each walk as well: what was provided while this node was alone nobody has heard of.
        """
        while True:
            with trio.move_on_after(60.0):
                await self._walked.wait()
            now = time.monotonic()
            for key, until_s in list(self._provided.items()):
                if until_s <= now:
                    del self._provided[key]
                    self._announced.pop(key, None)
                    self._store.providing_keys.discard(_multihash(key))
                    self._store.providers.get(_multihash(key), {}).pop(str(self._host.get_id()), 0)
            due = [
                key
                for key in self._provided
                if now - self._announced.get(key, -math.inf) > REPUBLISH_S
            ]
            async with trio.open_nursery() as nursery:
                for key in due:
                    nursery.start_soon(self._announce, key)

    async def _announce(self, key: Digest) -> None:
        async with self._queries:
            with trio.move_on_after(self._config.dht_timeout_s):
                try:
                    if await self._store.provide(_multihash(key)) and key in self._provided:
                        self._announced[key] = time.monotonic()
                except Exception as error:  # noqa: BLE001 - what answers is strangers' bytes
                    self._counters["contained_dht"] += 1
                    log.info("announcement failed: %r", error)

    async def _find(self, query_id: int, key: Digest) -> None:
        found: dict[Peer, tuple[str, ...]] = {}
        try:
            async with self._queries:
                with trio.move_on_after(self._config.dht_timeout_s):
                    await self._lookup(_multihash(key), found)
        except Exception as error:  # noqa: BLE001 - what answers is strangers' bytes
            self._counters["contained_dht"] += 1
            log.info("provider lookup failed: %r", error)
        finally:
            self._queries_waiting -= 1
        self._sink.emit_now(ProvidersFound(query_id, tuple(found.items())))

    async def _lookup(self, key: bytes, found: dict[Peer, tuple[str, ...]]) -> None:
        """Ask the peers closest to the key.

        Stock answers from the local store whenever it has any record: a node that provides the
        key itself, or once heard of one holder, never learns of another.
        """
        self._note(self._store.get_providers(key), found)
        closest = await self.kad.peer_routing.find_closest_peers_network(key, ASKED_MAX)
        own = self._host.get_id()

        async def ask(peer_id: ID) -> None:
            with trio.move_on_after(QUERY_S):
                answer = await self._store._get_providers_from_peer_with_closers(peer_id, key)
                self._note(answer[0], found)

        async with trio.open_nursery() as nursery:
            for peer_id in closest[:ASKED_MAX]:
                if peer_id != own:
                    nursery.start_soon(contained(ask, self._counters, "dht"), peer_id)

    def _note(self, providers: list[PeerInfo], found: dict[Peer, tuple[str, ...]]) -> None:
        for info in providers:
            peer = peer_of(info.peer_id)
            if peer is None or info.peer_id == self._host.get_id():
                continue
            if len(found) >= PROVIDERS_MAX and peer not in found:
                return
            addrs = [str(addr).split("/p2p/", 1)[0] for addr in info.addrs]
            merged = dict.fromkeys((*found.get(peer, ()), *addrs, *self._addrs_of(info.peer_id)))
            found[peer] = tuple(merged)[:ADDRS_MAX]

    def _bound_store(self) -> None:
        """Records of strangers live 48 h and are not bounded in number."""
        add = self._store.add_provider

        def add_bounded(key: bytes, provider: PeerInfo) -> None:
            if key not in self._store.providers and (
                len(self._store.providers) >= self._config.provider_records_max
            ):
                self._counters["dht_record_refused"] += 1
                return
            add(key, provider)

        self._store.add_provider = add_bounded


def _multihash(key: Digest) -> bytes:
    return b"\x12\x20" + key
