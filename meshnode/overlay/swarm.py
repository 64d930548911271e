"""Connections: who gets in, how one is dialled, what a stranger's bytes may do to it.

Under `host`, above libp2p. Subclasses of Swarm, SwarmConn and Yamux with the guards of `guard`;
without a guard the stock method runs, which is what tests/attack compares with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import GO_AWAY_NORMAL, Yamux
from multiaddr import Multiaddr

from .config import OverlayConfig
from .express import ExpressSession, Frame, take_frame
from .guard import (
    DIAL,
    HALF_OPEN,
    INBOUND_SLOT,
    STREAM_HANDLER,
    WINDOW_BOUND,
    BoundedBuffers,
    HalfOpenGate,
    contained,
    log,
)

DIAL_ADDRS_MAX: Final = 8
REDIAL_PAUSE_S: Final = 2.0
"""After a failed dial the DHT does not try again so soon; a `Dial` of the driver always does."""


class MeshYamux(Yamux):
    """Yamux whose errors end the connection and never the process, and that can be cut off."""

    guards: frozenset[str] = frozenset()
    window_bytes: int = 1 << 20
    conn_bytes_max: int = 8 << 20
    close_timeout_s: float = 2.0
    body_timeout_s: float = 60.0
    counters: Counter[str] = Counter()  # noqa: RUF012 - as the others: set for the host's process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard_s = time.monotonic()
        self._express: ExpressSession | None = None
        if ExpressSession.fits(self.secured_conn):
            session: Any = self.secured_conn
            self._express = self.secured_conn = ExpressSession(session, self._take, self.counters)  # type: ignore[assignment]
        if WINDOW_BOUND in self.guards:
            # Twice the window: credit for what was read may cross data on the wire.
            self.stream_buffers = BoundedBuffers(2 * self.window_bytes, self.conn_bytes_max)

    async def start(self) -> None:
        if STREAM_HANDLER not in self.guards:
            await super().start()
            return
        try:
            await super().start()
        except Exception as error:  # noqa: BLE001 - a stranger's bytes decide what is raised
            log.info("yamux of %s failed: %r", self.peer_id, error)
            self.event_started.set()
            await self._cleanup_on_error()

    async def _measure_rtt_loop(self) -> None:
        """Round trips are measured on the control stream, every few seconds, not here."""

    def _take(self, frame: Frame, plain: bytearray) -> bool:
        taken = take_frame(self, frame, plain)
        if taken:
            self.heard_s = time.monotonic()
        return taken

    async def _read_data_body(self, length: int) -> bytes:
        if self._express is None:
            body = await super()._read_data_body(length)
        else:
            with trio.fail_after(self.body_timeout_s):
                body = await self._express.read_body(length)
        self.heard_s = time.monotonic()
        return body

    async def _write_frame(self, data: bytes) -> None:
        # Stock unpacks the header again for a debug line that is built even when nobody logs,
        # and passes through the scheduler once more.
        try:
            self._write_lock.acquire_nowait()
        except trio.WouldBlock:
            await self._write_lock.acquire()
        try:
            await self.secured_conn.write(data)
        finally:
            self._write_lock.release()

    async def close(self, error_code: int = GO_AWAY_NORMAL) -> None:
        """Say goodbye if the peer still reads; otherwise cut.

        Stock waits for the write lock without bound, and a peer that stopped reading its socket
        holds it for ever.
        """
        with trio.move_on_after(self.close_timeout_s) as scope:
            await super().close(error_code)
        if scope.cancelled_caught:
            await self.abort()

    async def abort(self) -> None:
        """Cut without a goodbye: for peers that are silent or broke the protocol."""
        await self._cleanup_on_error()


class MeshConn(SwarmConn):
    """One connection; an inbound stream can hurt at most this connection."""

    swarm: MeshSwarm
    doomed = False
    """Its control stream has ended, so it is about to be closed."""

    @property
    def is_live(self) -> bool:
        muxed: Any = self.muxed_conn
        return not (self.doomed or self.is_closed or muxed.event_shutting_down.is_set())

    async def start(self) -> None:
        if STREAM_HANDLER not in self.swarm.guards:
            await super().start()
            return
        try:
            await super().start()
        except Exception as error:  # noqa: BLE001 - see contained()
            self.swarm.counters["contained_connection"] += 1
            log.info("connection of %s failed: %r", self.muxed_conn.peer_id, error)
            self.event_started.set()
            await self.close()

    async def _handle_muxed_stream(self, muxed_stream: Any) -> None:
        if STREAM_HANDLER not in self.swarm.guards:
            await super()._handle_muxed_stream(muxed_stream)
            return
        if len(self.streams) >= self.swarm.config.streams_per_peer_max:
            self.swarm.counters["streams_refused"] += 1
            await contained(muxed_stream.reset, self.swarm.counters, "reset")()
            return
        try:
            await super()._handle_muxed_stream(muxed_stream)
        except Exception as error:  # noqa: BLE001 - L1, L2a, L2b: see contained()
            self.swarm.counters["contained_stream"] += 1
            log.info("stream of %s died: %r", self.muxed_conn.peer_id, error)
            await contained(muxed_stream.reset, self.swarm.counters, "reset")()


class _NoAutoConnector:
    """Stock dials every peer it ever heard of until half of max_connections are open.

    min_connections=0 and low_watermark=0 do not turn it off (libp2p 0.8.1, AutoConnector); here
    the machine decides whom to dial.
    """

    _is_connecting = False

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def maybe_connect(self) -> None: ...

    async def run_background_task(self, nursery: trio.Nursery) -> None: ...

    def record_disconnect(self, peer_id: ID) -> None: ...


class MeshSwarm(Swarm):
    """The swarm with bounded admission and a dial that neither waits nor sulks."""

    def __init__(
        self,
        *args: Any,
        config: OverlayConfig,
        guards: frozenset[str],
        counters: Counter[str],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.auto_connector = _NoAutoConnector()  # type: ignore[assignment]
        self.config = config
        self.guards = guards
        self.counters = counters
        self.gate = HalfOpenGate(config.half_open_max, config.half_open_per_ip_max, counters)
        self.refuses: Callable[[ID], bool] = lambda _: False
        self._failed_s: dict[ID, float] = {}

    def live_connections(self, peer_id: ID) -> list[Any]:
        return [conn for conn in self.get_connections(peer_id) if getattr(conn, "is_live", True)]

    # ---- in

    async def _handle_inbound_connection(self, stream: Any, maddr: Multiaddr) -> None:
        if INBOUND_SLOT not in self.guards:
            # L3: holds its slot until the swarm stops; deaf after 250 inbound connections.
            await super()._handle_inbound_connection(stream, maddr)
            return
        remote = stream.get_remote_address()
        ip = remote[0] if remote else "unknown"
        if len(self.get_connections()) >= self.config.connections_max:
            self.counters["inbound_refused"] += 1
            return  # the listener closes the socket
        muxed: Any = None
        scope = self.gate.enter(ip) if HALF_OPEN in self.guards else trio.CancelScope()
        try:
            with scope:
                muxed = await self.upgrade_inbound_raw_conn(RawConnection(stream, False), maddr)
        except SwarmException as error:
            log.debug("inbound connection from %s: %r", ip, error)
        except Exception as error:  # noqa: BLE001 - a handshake is a stranger's bytes
            self.counters["contained_handshake"] += 1
            log.info("handshake from %s failed: %r", ip, error)
        finally:
            self.gate.leave(ip, scope)
        if muxed is not None:
            await muxed.event_closed.wait()

    async def add_conn(self, muxed_conn: Any, direction: str = "unknown") -> SwarmConn:
        peer = muxed_conn.peer_id
        alive = self.live_connections(peer)
        if self.refuses(peer):
            refusal = "is blocked"
        elif len(alive) >= self.config.connections_per_peer_max:
            # Stock closes the oldest instead, which is the one in use.
            refusal = "has enough connections"
        else:
            return await super().add_conn(muxed_conn, direction)
        self.counters["connections_refused"] += 1
        await contained(muxed_conn.close, self.counters, "close")()
        raise SwarmException(f"{peer} {refusal}")

    # ---- out

    async def dial_peer(self, peer_id: ID) -> list[Any]:
        """For libp2p's own callers (DHT, gossip); a peer that just failed is left alone a while."""
        if DIAL not in self.guards:
            # L5, L6: 250 ms in any case, one address, and after a failure 60 s of refusal.
            return list(await super().dial_peer(peer_id))
        alive = self.live_connections(peer_id)
        if alive:
            return alive
        if time.monotonic() - self._failed_s.get(peer_id, -1e9) < REDIAL_PAUSE_S:
            raise SwarmException(f"{peer_id} could not be dialled a moment ago")
        return [await self.dial_fresh(peer_id)]

    async def dial_fresh(self, peer_id: ID, addrs: Sequence[Multiaddr] = ()) -> Any:
        """A connection to the peer: every known address, staggered, the first to answer wins."""
        if DIAL not in self.guards:
            return (await super().dial_peer(peer_id))[0]
        while (ongoing := self._ongoing_dials.get(peer_id)) is not None:
            await ongoing.wait()
        alive = self.live_connections(peer_id)
        if alive:
            return alive[0]
        if peer_id == self.self_id or self.refuses(peer_id):
            raise SwarmException(f"{peer_id} is not dialled")
        candidates = self._candidates(peer_id, addrs)
        if not candidates:
            raise SwarmException(f"no known address of {peer_id}")
        done = self._ongoing_dials[peer_id] = trio.Event()
        try:
            connection = await self._race(peer_id, candidates)
        finally:
            done.set()
            self._ongoing_dials.pop(peer_id, None)
        if connection is None:
            if len(self._failed_s) >= 4096:
                self._failed_s.clear()
            self._failed_s[peer_id] = time.monotonic()
            raise SwarmException(f"no address of {peer_id} answers")
        self._failed_s.pop(peer_id, None)
        return connection

    def _candidates(self, peer_id: ID, addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
        try:
            known = list(self.peerstore.addrs(peer_id))
        except Exception:  # noqa: BLE001 - the peerstore raises for a peer it never saw
            known = []
        own = {str(addr) for listener in self.listeners.values() for addr in listener.get_addrs()}
        unique: dict[str, Multiaddr] = {}
        for addr in (*addrs, *known):
            text = str(addr)
            bare = text.split("/p2p/", 1)[0]
            if "/p2p-circuit" in text or bare in own:
                continue
            if self.transport_manager.transport_for_dialing(addr) is not None:
                unique.setdefault(bare, Multiaddr(bare))
        return list(unique.values())[:DIAL_ADDRS_MAX]

    async def _race(self, peer_id: ID, candidates: list[Multiaddr]) -> Any:
        winner: list[Any] = []
        failed = [trio.Event() for _ in candidates]

        async def attempt(index: int, addr: Multiaddr) -> None:
            if index:
                with trio.move_on_after(self.config.dial_stagger_s * index):
                    await failed[index - 1].wait()
            try:
                async with self._global_dial_limiter:
                    connection = await self._dial_addr_single_attempt(addr, peer_id)
            except Exception as error:  # noqa: BLE001 - whatever the other side answered
                log.debug("dial of %s at %s: %r", peer_id, addr, error)
                failed[index].set()
                return
            if winner:
                await connection.close()
                return
            winner.append(connection)
            nursery.cancel_scope.cancel()

        with trio.move_on_after(self.config.dial_timeout_s):
            async with trio.open_nursery() as nursery:
                for index, addr in enumerate(candidates):
                    nursery.start_soon(attempt, index, addr)
        return winner[0] if winner else None
