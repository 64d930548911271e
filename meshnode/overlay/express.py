"""The short way through Noise and Yamux for bytes that are already there.

Under `swarm`. Stock libp2p takes a trio lock, and so a turn of the scheduler, at each of its
layers: 13 turns for one small control frame in and 6 for one out, which was half of what a lease
cost the node. Nothing here changes a byte on the wire. What is common and simple (a DATA or
WINDOW_UPDATE frame without flags, a write that the window and the socket take at once) is done in
one stretch without waiting; everything else goes to the stock code, which sees the same bytes in
the same order.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import (
    HEADER_SIZE,
    MAX_MESSAGE_SIZE,
    TYPE_DATA,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    YamuxStream,
)

RECEIVE_BYTES: Final = 64 << 10
HEADER: Final = struct.Struct(YAMUX_HEADER_FORMAT)
assert HEADER.size == HEADER_SIZE

Frame = tuple[int, int, int, int]
"""type, flags, stream id, length of a Yamux header."""


class ExpressSession:
    """A Noise session over TCP with one buffer and no locks: the muxer reads it from one task and
    writes to it under its own lock. Other attributes are those of the session."""

    def __init__(
        self,
        session: SecureSession,
        take: Callable[[Frame, bytearray], bool],
        counters: Counter[str],
    ) -> None:
        noise: Any = session.conn
        self._session = session
        self._state = noise.noise_state
        self._tcp: TrioTCPStream = noise.read_writer.read_write_closer.stream
        self._take = take
        self._counters = counters
        self._cipher = bytearray()
        self._plain = bytearray(session._drain(None))  # what came with the muxer's negotiation

    @classmethod
    def fits(cls, session: Any) -> bool:
        """Whether it is Noise over TCP; anything else keeps the long way."""
        noise = getattr(session, "conn", None)
        raw = getattr(getattr(noise, "read_writer", None), "read_write_closer", None)
        return (
            type(session) is SecureSession
            and type(noise) is NoiseTransportReadWriter
            and type(raw) is RawConnection
            and type(raw.stream) is TrioTCPStream
            and isinstance(raw.stream.stream, trio.SocketStream)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def read(self, count: int) -> bytes:
        """The next header that the stock loop has to see: it reads nothing else by this name."""
        while True:
            while len(self._plain) >= HEADER_SIZE:
                _, kind, flags, stream_id, length = HEADER.unpack_from(self._plain)
                if not self._take((kind, flags, stream_id, length), self._plain):
                    return self._cut(count)
            await self._receive(count)

    async def read_body(self, count: int) -> bytes:
        """The body of a frame whose header went to the stock loop."""
        while len(self._plain) < count:
            await self._receive(count)
        return self._cut(count)

    def _cut(self, count: int) -> bytes:
        cut = bytes(self._plain[:count])
        del self._plain[:count]
        return cut

    async def _receive(self, wanted: int) -> None:
        """At least one more Noise message, or the exception that stock has for the end."""
        cipher = self._cipher
        while True:
            chunk = b""
            try:
                chunk = await self._tcp.stream.receive_some(RECEIVE_BYTES)
            except trio.BrokenResourceError as error:
                raise ConnectionClosedError(f"reset: {error}", transport="tcp") from error
            except trio.ClosedResourceError:
                pass  # closed on this side: the end, as for the other side's
            if not chunk:
                raise IncompleteReadError(
                    "the connection ended", expected_bytes=wanted, received_bytes=len(self._plain)
                )
            cipher += chunk
            self._counters["bytes_received"] += len(chunk)
            if self._open_messages():
                return

    def _open_messages(self) -> bool:
        """Whole messages of the buffer: u16 length, then that much ciphertext (Noise, libp2p)."""
        cipher, at, opened = self._cipher, 0, False
        while len(cipher) - at >= 2:
            end = at + 2 + int.from_bytes(cipher[at : at + 2], "big")
            if len(cipher) < end:
                break
            self._plain += self._state.decrypt(bytes(cipher[at + 2 : end]))
            at, opened = end, True
        del cipher[:at]
        return opened

    async def write(self, plain: bytes) -> None:
        """One send for all of it; waits only if the socket does not take it."""
        packets = []
        for at in range(0, len(plain), MAX_PLAINTEXT_LENGTH):
            sealed = self._state.encrypt(plain[at : at + MAX_PLAINTEXT_LENGTH])
            packets += [len(sealed).to_bytes(2, "big"), sealed]
        wire = b"".join(packets)
        self._counters["bytes_sent"] += len(wire)
        try:
            try:
                sent = os.write(self._tcp.stream.socket.fileno(), wire)
            except BlockingIOError:
                sent = 0
            if sent < len(wire):
                await self._tcp.stream.send_all(memoryview(wire)[sent:])
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"cannot send: {error}", transport="tcp") from error


class ExpressStream(YamuxStream):
    """A Yamux stream that neither locks nor waits where there is nothing to wait for."""

    async def read(self, n: int | None = -1) -> bytes:
        if n is None or n <= 0:
            return await super().read(n)
        conn = self.conn
        while True:
            buffer = conn.stream_buffers.get(self.stream_id)
            event = conn.stream_events.get(self.stream_id)
            ended = self.closed or self.recv_closed or self.reset_received
            if buffer:
                # Also after a reset: frames are taken many at a time here, and what came before it
                # would else be lost where stock, frame by frame, has given it out.
                chunk = bytes(buffer[:n])
                del buffer[:n]
                if not ended:
                    await self._auto_tune_and_send_window_update(bytes_read=len(chunk))
                elif self.closed and not buffer:
                    await conn._finalize_stream(self, fully_closed=True)
                return chunk
            if ended or buffer is None or event is None or conn.event_shutting_down.is_set():
                return await super().read(n)
            await event.wait()
            if conn.stream_events.get(self.stream_id) is event:
                conn.stream_events[self.stream_id] = trio.Event()

    async def write(self, data: bytes) -> None:
        if (
            self.send_closed
            or self.closed
            or not 0 < len(data) <= min(self.send_window, MAX_MESSAGE_SIZE - HEADER_SIZE)
            or self.window_lock.locked()
        ):
            await super().write(data)
            return
        self.send_window -= len(data)
        header = HEADER.pack(0, TYPE_DATA, 0, self.stream_id, len(data))
        await self.conn._write_frame(header + data)


def take_frame(conn: Any, frame: Frame, plain: bytearray) -> bool:
    """Do what stock does for a plain frame at the head of `plain`; False leaves it all to stock.

    Stock holds `streams_lock` while it changes streams; between two awaits nobody else runs, so it
    is enough that nobody holds it. What a buffer over its window raises goes to the caller, as it
    does in stock.
    """
    kind, flags, stream_id, length = frame
    if flags or conn.streams_lock.locked() or conn.event_shutting_down.is_set():
        return False
    stream = conn.streams.get(stream_id)
    if stream is None:
        return False
    if kind == TYPE_DATA:
        end = HEADER_SIZE + length
        if len(plain) < end:
            return False
        buffer = conn.stream_buffers[stream_id]
        buffer.extend(bytes(plain[HEADER_SIZE:end]))
        del plain[:end]
        stream.recv_window = max(0, stream.recv_window - length)
        conn.stream_events[stream_id].set()
        return True
    if kind == TYPE_WINDOW_UPDATE and not stream.window_lock.locked():
        stream.send_window += length
        del plain[:HEADER_SIZE]
        return True
    return False
