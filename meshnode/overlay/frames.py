"""Frames of a control stream: cut out of bytes and put into bytes, without any I/O.

Used by `streams`. A frame is a u32 big-endian length and so many bytes. Length 0 is never a
frame of the machine: it is followed by 9 bytes, a kind (0 ping, 1 pong) and the ping's token of
8 bytes, with which the two ends measure round trips and notice each other's silence.
"""

from __future__ import annotations

from typing import Final

PING: Final = 0
PONG: Final = 1
TOKEN_BYTES: Final = 8
_ECHO_BYTES: Final = 1 + TOKEN_BYTES


class BadFrame(Exception):
    """The peer sent what no frame can be."""


def encode_frame(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "big") + frame


def encode_echo(kind: int, token: bytes) -> bytes:
    return b"\0\0\0\0" + bytes((kind,)) + token


class Echo:
    """A ping or pong between the two overlays; the machine never sees it."""

    __slots__ = ("kind", "token")

    def __init__(self, kind: int, token: bytes) -> None:
        self.kind = kind
        self.token = token


class FrameDecoder:
    """`feed` bytes as they come, get whole frames and echoes; raises BadFrame once, for good."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)

    def feed(self, chunk: bytes) -> list[bytes | Echo]:
        buffer = self._buffer
        buffer += chunk
        whole: list[bytes | Echo] = []
        at = 0
        while len(buffer) - at >= 4:
            size = int.from_bytes(buffer[at : at + 4], "big")
            if size > self._frame_bytes_max:
                raise BadFrame(f"a frame of {size} bytes")
            body = size or _ECHO_BYTES
            if len(buffer) - at < 4 + body:
                break
            at += 4
            if size:
                whole.append(bytes(buffer[at : at + size]))
            else:
                whole.append(self._echo(buffer, at))
            at += body
        if at:
            del buffer[:at]
        return whole

    @staticmethod
    def _echo(buffer: bytearray, at: int) -> Echo:
        kind = buffer[at]
        if kind not in (PING, PONG):
            raise BadFrame(f"an echo of kind {kind}")
        return Echo(kind, bytes(buffer[at + 1 : at + _ECHO_BYTES]))
