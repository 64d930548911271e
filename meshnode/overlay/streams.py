"""Control streams: one per peer, frames both ways, and the facts that the peer is there or gone.

Under `overlay`, above `host`. The peer with the smaller id opens the stream on every new
connection, so two never compete; a new stream from it replaces the old one (it has restarted or
moved). PeerUp is emitted when the stream is usable in both directions, PeerDown exactly once when
it ends, and the end of the stream is the end of the connection.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final

import trio
from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction

from meshnode.protocol.effects import Send
from meshnode.protocol.events import FrameIn, PeerDown, PeerUp, RttMeasured, SendFailed
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ADDRS_MAX, Lane, Peer

from .config import CTL_PROTOCOL, OverlayConfig
from .frames import PING, PONG, TOKEN_BYTES, BadFrame, Echo, FrameDecoder, encode_echo, encode_frame
from .guard import FRAME_BOUND, contained, log
from .host import MeshHost, peer_of
from .sink import EventSink
from .swarm import MeshConn

READ_BYTES: Final = 64 * 1024
WRITE_BYTES: Final = 60 * 1024
"""Queued frames are joined up to about this size: one yamux frame, one or two Noise packets."""
PONGS_MAX: Final = 16
NEWCOMERS_MAX: Final = 16
"""Links over `peers_max` that are let in all the same: the machine hangs up on somebody idle for
each, or refuses it with a reason. An event takes a millisecond to it, a goodbye a few more."""
LINKLESS_S: Final = 5.0
REAP_S: Final = 2.0


def mono_ms() -> int:
    """The clock of `expires_mono_ms`."""
    return time.monotonic_ns() // 1_000_000


class Link:
    """One peer's control stream, its outgoing queues and its pulse."""

    def __init__(
        self,
        peer: Peer,
        conn: MeshConn,
        stream: INetStream,
        config: OverlayConfig,
        sink: EventSink,
        guards: frozenset[str],
    ) -> None:
        self.peer = peer
        self.conn = conn
        self.done = trio.Event()
        self.born_s = time.monotonic()
        self.rtt_us: int | None = None  # as it was measured last
        self._config = config
        self._sink = sink
        # The NetStream takes a lock and so a turn of the scheduler around each call.
        self._stream: Any = stream.muxed_stream  # type: ignore[attr-defined]
        frame_max = config.frame_bytes_max if FRAME_BOUND in guards else 1 << 32
        self._decoder = FrameDecoder(frame_max)
        self._lanes: tuple[deque[Send], ...] = tuple(deque() for _ in Lane)
        self._lane_bytes = [0] * len(Lane)
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._reason = Reason.PEER_DOWN
        self.finishing = False
        self._pongs: deque[bytes] = deque(maxlen=PONGS_MAX)
        self._ping: bytes | None = None  # token that still has to be written
        self._ping_token = b""
        self._ping_sent_ns = 0
        self._waiting: list[trio.Event] = []  # for the next pong
        self._ping_now = trio.Event()
        self._allowance = float(config.frames_per_s_max)
        self._allowance_s = time.monotonic()

    # ---- called by Links; never waits

    def queue(self, send: Send) -> Reason | None:
        """Why it cannot be queued, or None."""
        lane, size = send.lane, len(send.frame)
        if size > self._config.frame_bytes_max or size == 0:
            return Reason.TOO_LARGE
        queued = self._lanes[lane]
        if (
            len(queued) >= self._config.queue_frames_max
            or self._lane_bytes[lane] + size > self._config.queue_bytes_max
        ):
            return Reason.QUEUE_FULL
        queued.append(send)
        self._lane_bytes[lane] += size
        self._wake.set()
        return None

    def cut(self, reason: Reason) -> None:
        self._reason = reason
        self._scope.cancel()

    def finish(self) -> None:
        """End once everything that is queued has been written."""
        self.finishing = True
        self._wake.set()

    async def probe(self) -> bool:
        """Whether the peer answers on this stream within the ping timeout."""
        ponged = trio.Event()
        self._waiting.append(ponged)
        self._ping_now.set()
        with trio.move_on_after(self._config.ping_timeout_s):
            await ponged.wait()
        return ponged.is_set()

    # ---- the link's one task

    async def run(self) -> Reason:
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._ping_loop)
                    await self._read_loop()
                    nursery.cancel_scope.cancel()
            except Exception as error:  # noqa: BLE001 - libp2p's stream errors have no base class
                log.info("control stream failed: %r", error)
        return self._reason

    def failed_sends(self) -> list[Send]:
        """What was queued and never written."""
        left = [send for lane in self._lanes for send in lane]
        for lane in self._lanes:
            lane.clear()
        return left

    async def _read_loop(self) -> None:
        decoder = self._decoder
        try:
            while True:
                patience = self._config.frame_timeout_s if decoder.pending else math.inf
                with trio.move_on_after(patience) as scope:
                    chunk = await self._stream.read(READ_BYTES)
                if scope.cancelled_caught:
                    raise BadFrame("half a frame, and then nothing")
                frames = 0
                for item in decoder.feed(chunk):
                    if isinstance(item, Echo):
                        await self._on_echo(item)
                    else:
                        frames += 1
                        await self._sink.emit(FrameIn(self.peer, Lane.CONTROL, item))
                if frames:
                    await self._pace(frames)
        except BadFrame as error:
            log.info("bad frame: %s", error)
            self._reason = Reason.BAD_FRAME
        except Exception:  # noqa: BLE001 - libp2p's stream errors have no base class
            # The stream ended. In the middle of a frame, with the connection still there, the
            # peer broke the protocol; otherwise it is simply gone.
            if decoder.pending and not self.conn.muxed_conn.is_closed:
                self._reason = Reason.BAD_FRAME

    async def _on_echo(self, echo: Echo) -> None:
        if echo.kind == PING:
            self._pongs.append(echo.token)
            self._wake.set()
        elif echo.kind == PONG and echo.token == self._ping_token:
            us = (time.perf_counter_ns() - self._ping_sent_ns) // 1000
            self._ping_token = b""
            self.rtt_us = us
            for waiting in self._waiting:
                waiting.set()
            self._waiting.clear()
            await self._sink.emit(RttMeasured(self.peer, us))

    async def _pace(self, frames: int) -> None:
        """Read a flood no faster than agreed; its sender's window then fills."""
        now = time.monotonic()
        rate = self._config.frames_per_s_max
        self._allowance = min(rate, self._allowance + (now - self._allowance_s) * rate) - frames
        self._allowance_s = now
        if self._allowance < 0:
            await trio.sleep(-self._allowance / rate)

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while chunk := self._next_chunk():
                with trio.move_on_after(self._config.write_stall_s) as scope:
                    await self._stream.write(chunk)
                if scope.cancelled_caught:
                    self.cut(Reason.QUEUE_FULL)
            if self.finishing:
                # The other side reads to the end, then closes the connection. Closing it here
                # would take what it has not read yet.
                with trio.move_on_after(self._config.close_timeout_s):
                    await self._stream.close()
                    await trio.sleep(math.inf)
                self.cut(Reason.PEER_DOWN)

    def _next_chunk(self) -> bytes:
        """Echoes first, then the lanes in order, joined into one write."""
        parts = [encode_echo(PONG, token) for token in self._pongs]
        self._pongs.clear()
        if self._ping is not None:
            parts.append(encode_echo(PING, self._ping))
            self._ping = None
            self._ping_sent_ns = time.perf_counter_ns()
        size = 0
        now = mono_ms()
        for lane, queued in enumerate(self._lanes):
            while queued and (size == 0 or size + len(queued[0].frame) <= WRITE_BYTES):
                send = queued.popleft()
                self._lane_bytes[lane] -= len(send.frame)
                if send.expires_mono_ms is not None and now >= send.expires_mono_ms:
                    self._sink.emit_now(SendFailed(send.send_id, self.peer, Reason.DEADLINE))
                    continue
                parts.append(encode_frame(send.frame))
                size += len(send.frame)
            if queued:
                break
        return b"".join(parts)

    async def _ping_loop(self) -> None:
        """Round trips, and the only way to notice a peer that vanished without a FIN."""
        while True:
            ponged = trio.Event()
            self._waiting.append(ponged)
            token = os.urandom(TOKEN_BYTES)
            self._ping = self._ping_token = token
            asked_s = time.monotonic()
            self._wake.set()
            with trio.move_on_after(self._config.ping_timeout_s):
                await ponged.wait()
            if not ponged.is_set():
                # A busy uplink delays pongs; data that arrived meanwhile is a pulse as well.
                heard_s = getattr(self.conn.muxed_conn, "heard_s", 0.0)
                if heard_s <= asked_s:
                    self.cut(Reason.PEER_DOWN)
            with trio.move_on_after(self._config.ping_interval_s):
                await self._ping_now.wait()
            self._ping_now = trio.Event()


class Links:
    """All control streams of this node."""

    def __init__(
        self,
        host: MeshHost,
        config: OverlayConfig,
        sink: EventSink,
        counters: Counter[str],
        spawn: Callable[..., None],
    ) -> None:
        self._host = host
        self._config = config
        self._sink = sink
        self._counters = counters
        self._spawn = spawn
        self._links: dict[Peer, Link] = {}
        self._opening: dict[Peer, trio.Event] = {}
        self._someone_up = trio.Event()
        self._own = host.get_id().to_bytes()
        self.on_up: Callable[[Peer], None] = lambda _: None
        self.on_down: Callable[[Peer], None] = lambda _: None
        host.set_stream_handler(CTL_PROTOCOL, self._on_stream)  # type: ignore[arg-type]

    def __contains__(self, peer: Peer) -> bool:
        """Whether it is up, and not about to end."""
        link = self._links.get(peer)
        return link is not None and not link.finishing

    def rtt_us(self, peer: Peer) -> int | None:
        link = self._links.get(peer)
        return None if link is None else link.rtt_us

    def peers(self) -> tuple[Peer, ...]:
        return tuple(self._links)

    def send(self, effect: Send) -> None:
        link = self._links.get(effect.peer)
        refusal = Reason.PEER_DOWN if link is None else link.queue(effect)
        if refusal is not None:
            self._sink.emit_now(SendFailed(effect.send_id, effect.peer, refusal))

    def cut(self, peer: Peer, reason: Reason) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.cut(reason)

    def hang_up(self, peer: Peer) -> MeshConn | None:
        """End the peer's link in good order; its connection, which closes itself then."""
        link = self._links.get(peer)
        if link is None:
            return None
        link.conn.doomed = True  # a dial from now on makes a new one
        link.finish()
        return link.conn

    async def wait_up(self, peer: Peer, timeout_s: float, conn: MeshConn) -> bool:
        """Until the peer is up, the connection is closed or the time is over."""
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:

                async def closed() -> None:
                    await conn.event_closed.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(closed)
                # One that is hung up on already was up: the dial has done its part, and its
                # connection is not the dial's to close.
                while peer not in self._links:
                    await self._someone_up.wait()
                nursery.cancel_scope.cancel()
        return peer in self._links

    # ---- from libp2p

    def on_connected(self, conn: MeshConn) -> None:
        """A connection is there; the smaller id opens the stream."""
        if self._own < conn.muxed_conn.peer_id.to_bytes():
            self._spawn(self._open, conn)

    async def _open(self, conn: MeshConn) -> None:
        peer = peer_of(conn.muxed_conn.peer_id)
        if peer is None:
            await contained(conn.close, self._counters, "close")()
            return
        while (ongoing := self._opening.get(peer)) is not None:
            await ongoing.wait()
        done = self._opening[peer] = trio.Event()
        try:
            link = self._links.get(peer)
            if link is not None and link.conn.is_live and await link.probe():
                return  # both dialled at once, and the first connection is well
            stream = await self._host.open_on(conn, CTL_PROTOCOL)
            self._spawn(self._run, peer, conn, stream)
            while self._links.get(peer, link) is link and not conn.is_closed:
                await self._someone_up.wait()
        except Exception as error:  # noqa: BLE001 - libp2p's errors have no base class
            log.info("no control stream: %r", error)
            await contained(conn.close, self._counters, "close")()
        finally:
            done.set()
            del self._opening[peer]

    async def _on_stream(self, stream: INetStream) -> None:
        conn: Any = stream.swarm_conn  # type: ignore[attr-defined]
        peer = peer_of(conn.muxed_conn.peer_id)
        if peer is None or bytes(peer) > self._own:
            # Not theirs to open; ours is on its way.
            self._counters["control_streams_refused"] += 1
            await stream.reset()
            return
        done = trio.Event()
        self._spawn(self._run, peer, conn, stream, done)
        await done.wait()

    async def _run(
        self, peer: Peer, conn: MeshConn, stream: INetStream, done: trio.Event | None = None
    ) -> None:
        try:
            while (old := self._links.get(peer)) is not None:
                old.cut(Reason.PEER_DOWN)
                await old.done.wait()
            if len(self._links) >= self._config.peers_max + NEWCOMERS_MAX:
                self._counters["peers_refused"] += 1
            else:
                await self._run_link(
                    Link(peer, conn, stream, self._config, self._sink, self._host.guards)
                )
        finally:
            if done is not None:
                done.set()
            with trio.CancelScope(shield=True):
                await contained(conn.muxed_conn.close, self._counters, "close")()

    async def _run_link(self, link: Link) -> None:
        peer, conn = link.peer, link.conn
        self._links[peer] = link
        self._someone_up.set()
        self._someone_up = trio.Event()
        self.on_up(peer)
        reason = Reason.PEER_DOWN
        try:
            inbound = conn.direction == Direction.INBOUND
            path, addrs = self._whereabouts(conn)
            await self._sink.emit(PeerUp(peer, path, addrs, inbound))
            reason = await link.run()
        finally:
            conn.doomed = True
            del self._links[peer]
            for send in link.failed_sends():
                self._sink.emit_now(SendFailed(send.send_id, peer, Reason.PEER_DOWN))
            self.on_down(peer)
            # Not awaited: on the way out of the overlay nobody reads any more.
            self._sink.emit_now(PeerDown(peer, reason))
            link.done.set()

    def _whereabouts(self, conn: MeshConn) -> tuple[str, tuple[str, ...]]:
        path = "direct"
        remote = conn.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
        if remote is not None and ip_address(remote[0]).is_private:
            path = "lan"
        return path, self.addrs_of(conn.muxed_conn.peer_id)

    def addrs_of(self, peer_id: ID) -> tuple[str, ...]:
        try:
            known = self._host.get_peerstore().addrs(peer_id)
        except Exception:  # noqa: BLE001 - the peerstore raises for a peer it never saw
            return ()
        bare = (str(addr).split("/p2p/", 1)[0] for addr in known)
        return tuple(dict.fromkeys(bare))[:ADDRS_MAX]

    async def reap(self) -> None:
        """Task: when connections run short, those that never became a link go first."""
        threshold = self._config.connections_max * 3 // 4
        swarm = self._host.swarm
        while True:
            await trio.sleep(REAP_S)
            conns = swarm.get_connections()
            if len(conns) < threshold:
                continue
            linked = {id(link.conn) for link in self._links.values()}
            oldest_s = time.time() - LINKLESS_S
            for conn in conns:
                if id(conn) not in linked and conn._created_at < oldest_s:  # type: ignore[attr-defined]
                    self._counters["linkless_closed"] += 1
                    self._spawn(contained(conn.close, self._counters, "close"))
