"""The node's end of one worker: its socket, the memory they share, and a run's way into both.

Used by `supervisor`. Nothing here waits: what a socket does not take at once is given back for a
task to send. Blobs travel as open files, small arrays in frames, large ones in the `Area`.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from meshnode.protocol.effects import StartExec
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest

from . import wire
from .admission import Refused
from .area import AREA_BYTES_LEAST, Area, output_bytes
from .bounds import BlobFiles


def open_blob(blobs: BlobFiles, blob_id: Digest, first_byte: int, byte_count: int) -> int:
    """A descriptor, the caller's to close; Refused if the blob is not here or too short."""
    try:
        fd = blobs.open_blob(blob_id, first_byte, byte_count)
    except (KeyError, OSError) as error:
        raise Refused(Reason.BLOB_MISSING, f"blob {blob_id.hex()[:16]}") from error
    if os.fstat(fd).st_size < first_byte + byte_count:
        os.close(fd)
        raise Refused(Reason.KERNEL_SPEC, f"blob {blob_id.hex()[:16]} is too short")
    return fd


class Link:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock  # ours, non-blocking
        self._area: Area | None = None
        self._waits = False

    def close(self) -> None:
        self.sock.close()
        if self._area is not None:
            self._area.close()
            self._area = None

    def send(self, frame: bytes | memoryview, fds: array.array[int]) -> bytes:
        """What the socket did not take."""
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        return bytes(frame[self.sock.sendmsg([frame], files) :])

    def send_run(self, effect: StartExec, unit_bytes: int, blobs: BlobFiles) -> bytes:
        """Into an idle worker; what its empty socket did not take. Refused, or OSError if it is
        dead."""
        run, inline = effect.run, effect.inline
        by_area = inline if len(inline) > AREA_BYTES_LEAST else b""
        self._make_area(len(by_area), output_bytes(unit_bytes, run.count))
        if self._area is not None:
            self._area.put_inputs(by_area)
            self._waits = unit_bytes * run.count > self._area.output_bytes
        by_frame = b"" if by_area else inline
        with _mapped_files(effect, blobs) as (mask, fds):
            head = wire.encode_run_head(
                effect.exec_id, run.first, run.count, mask, len(by_frame), len(by_area)
            )
            return self.send(head + by_frame, fds)

    def _make_area(self, for_inputs: int, for_outputs: int) -> None:
        """A larger one where the old does not do. It stays for the worker's next runs, because
        fresh pages cost more than what is copied into them."""
        if not for_inputs and not for_outputs:
            return
        old = self._area
        if old is not None:
            if old.fits(for_inputs, for_outputs):
                return
            for_inputs = max(for_inputs, old.input_bytes)
            for_outputs = max(for_outputs, old.output_bytes)
            old.close()
        self._area = area = Area(for_inputs, for_outputs)
        body = wire.AREA_BODY.pack(area.input_bytes, area.output_bytes)
        if self.send(wire.frame(wire.AREA, body), array.array("i", [area.fd])):
            raise OSError("an idle worker's socket is full")

    def outputs_in_frame(self, body: bytes, units: int, size: int) -> tuple[bytes, ...] | None:
        """Of a UNITS frame, one a unit; None if its length is wrong."""
        start = wire.UNITS_HEAD.size
        if len(body) != start + units * size:
            return None
        return tuple(body[at : at + size] for at in range(start, len(body), size))

    def outputs_in_area(self, body: bytes, units: int, size: int) -> tuple[bytes, ...] | None:
        """Of a UNITS_IN_AREA frame, copied; None if they do not lie where they should."""
        if self._area is None or len(body) != wire.UNITS_HEAD.size + wire.UNITS_AREA_AT.size:
            return None
        (first_byte,) = wire.UNITS_AREA_AT.unpack_from(body, wire.UNITS_HEAD.size)
        outputs = self._area.take(first_byte, units, size)
        if outputs is not None and self._waits:
            # A worker has at most 8 frames in flight before it reads: this never finds it full.
            self.sock.send(wire.frame(wire.TAKEN))
        return outputs


@contextmanager
def _mapped_files(effect: StartExec, blobs: BlobFiles) -> Iterator[tuple[int, array.array[int]]]:
    """(bit i: the i-th mapped argument is inline, the files of the others), open for the block."""
    mask, fds = 0, array.array("i")
    try:
        for index, arg in enumerate(arg for arg in effect.spec.args if arg.mapped):
            if arg.blob is None:
                mask |= 1 << index
            else:
                unit_bytes = wire.array_bytes(arg.spec)
                first, count = effect.run.first * unit_bytes, effect.run.count * unit_bytes
                fds.append(open_blob(blobs, arg.blob.blob_id, first, count))
        yield mask, fds
    finally:
        for fd in fds:
            os.close(fd)
