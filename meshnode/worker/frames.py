"""The worker's end of its socket, and the memory that it shares with its node. Used by `main`.

The other end is `meshnode.executor.link`.
"""

from __future__ import annotations

import mmap
import select
import socket
from typing import Final

from meshnode.executor import wire

_RECEIVE_BYTES: Final = 16 << 10


class Area:
    """Both halves of the node's shared memory, mapped; the mapping outlives the file."""

    def __init__(self, body: bytes, fd: int) -> None:
        input_bytes, output_bytes = wire.AREA_BODY.unpack(body)
        whole = memoryview(mmap.mmap(fd, input_bytes + output_bytes))
        self.inputs = whole[:input_bytes].toreadonly()
        self.outputs = whole[input_bytes:]


class Frames:
    """Blocking frames with the files that came along."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._ahead = b""
        self._fds: list[int] = []  # of the last frame that begins in `_ahead`

    def receive(self) -> tuple[int, bytes, list[int]] | None:
        """(kind, body, fds), or None when the node has hung up.

        Files ride on the first byte of their frame, and the kernel ends a read behind the message
        that brought some: they belong to the last frame that begins in what was read.
        """
        chunk = self._ahead
        while len(chunk) < wire.HEAD.size:
            # No more than the rest of a header that is cut: behind it another frame's files come.
            most = wire.HEAD.size - len(chunk) if chunk else _RECEIVE_BYTES
            more, came, _, _ = socket.recv_fds(self._sock, most, wire.FDS_MAX)
            self._fds += came
            if not more:
                return None
            chunk += more
        length, kind = wire.HEAD.unpack_from(chunk)
        if length > wire.LOAD_BYTES_MAX:
            raise wire.WireError(f"frame of {length} bytes")
        end, fds = wire.HEAD.size + length, []
        if end >= len(chunk):
            fds, self._fds = self._fds, fds
        self._ahead = chunk[end:]
        if len(chunk) >= end:
            return kind, chunk[wire.HEAD.size : end], fds
        body = bytearray(length)
        have = len(chunk) - wire.HEAD.size
        body[:have] = chunk[wire.HEAD.size :]
        view = memoryview(body)[have:]
        while view:
            received = self._sock.recv_into(view)
            if not received:
                return None
            view = view[received:]
        return kind, bytes(body), fds

    def waiting(self) -> bool:
        return bool(self._ahead) or bool(self._readable.poll(0))

    def send(self, frame: bytes) -> None:
        self._sock.sendall(frame)
