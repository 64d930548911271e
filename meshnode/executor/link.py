"""The node's end of one child process: its socket, the memory they share, a run's way into both.

Used by `supervisor` for workers, by `compiling` and `probing` for their children. Frames go in
whole and in order. Blobs travel as open files, small arrays in frames, large ones in the `Area`.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest

from . import wire
from .admission import Refused
from .area import Area, output_bytes
from .bounds import RECEIVE_BYTES, BlobFiles
from .run import Run
from .stepping import SteppedRun


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


def open_link(frame_bytes_max: int = wire.BODY_BYTES_MAX) -> tuple[Link, socket.socket]:
    """The link and the child's end of it. Both exist before the child does, so nothing waits for an
    address; while its end is open here, the child's death is no end of file."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return Link(ours, frame_bytes_max), theirs


class Link:
    def __init__(self, sock: socket.socket, frame_bytes_max: int = wire.BODY_BYTES_MAX) -> None:
        self._sock = sock  # ours, non-blocking
        self._frames = wire.FrameReader(frame_bytes_max)
        self._unsent: trio.Event | None = None  # while a long frame is on its way into the socket
        self._area: Area | None = None
        self._waits = False  # the worker, for its outputs to be taken

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock.fileno())
        self._sock.close()
        if self._area is not None:
            self._area.close()
            self._area = None

    # ---- frames

    async def receive(self) -> list[tuple[int, bytes]]:
        """At least one frame; OSError when the process has ended."""
        while True:
            await trio.lowlevel.wait_readable(self._sock.fileno())
            chunk = self._sock.recv(RECEIVE_BYTES)
            if not chunk:
                raise OSError("end of file")
            if frames := list(self._frames.feed(chunk)):
                return frames

    async def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        while self._unsent is not None:
            await self._unsent.wait()
        await self.send_rest(self._send_now(frame, array.array("i", fds)))

    async def send_rest(self, rest: bytes) -> None:
        """What the socket did not take at once; other frames wait for it."""
        if not rest:
            return
        view, self._unsent = memoryview(rest), self._unsent or trio.Event()
        try:
            while view:
                try:
                    view = view[self._sock.send(view) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock.fileno())
        except (OSError, trio.ClosedResourceError):
            pass  # whoever reads sees the end
        finally:
            self._unsent.set()
            self._unsent = None

    async def say(self, kind: int, body: bytes, *fds: int) -> None:
        """A word beside the runs; a worker too busy to read the ones before hears nothing."""
        while self._unsent is not None:
            await self._unsent.wait()
        with contextlib.suppress(OSError):
            self._send_now(wire.frame(kind, body), array.array("i", fds))

    def _send_now(self, frame: bytes, fds: array.array[int]) -> bytes:
        """What the socket did not take."""
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        return frame[self._sock.sendmsg([frame], files) :]

    # ---- runs

    def send_run(self, run: Run, blobs: BlobFiles) -> bytes:
        """Into an idle worker; what its empty socket did not take. Refused, or OSError if it is
        dead."""
        effect, inline = run.effect, run.effect.inline
        in_area = inline if len(inline) > wire.AREA_BYTES_LEAST else b""
        self._make_area(len(in_area), output_bytes(run.unit_bytes, effect.run.count))
        if self._area is not None:
            self._area.put_inputs(in_area)
            self._waits = run.unit_bytes * effect.run.count > self._area.output_bytes
        in_frame = b"" if in_area else inline
        with _files_of(run, blobs) as (mask, fds):
            head = wire.RunHead(
                effect.exec_id, effect.run.first, effect.run.count, mask, len(in_area)
            )
            if effect.spec.stepped is None:
                packed = wire.encode_run_head(head, len(in_frame))
            else:
                steps = wire.StepsHead(effect.spec.steps, effect.step, effect.state is not None)
                packed = wire.encode_steps_head(head, steps, len(in_frame))
            rest = self._send_now(packed + in_frame, fds)
        if rest:
            self._unsent = trio.Event()  # for `send_rest`, before anybody says a word
        return rest

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
            self._area = None
        self._area = area = Area(for_inputs, for_outputs)
        body = wire.AREA_BODY.pack(area.input_bytes, area.output_bytes)
        if self._send_now(wire.frame(wire.AREA, body), array.array("i", [area.fd])):
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
            self._sock.send(wire.frame(wire.TAKEN))
        return outputs


@contextmanager
def _files_of(run: Run, blobs: BlobFiles) -> Iterator[tuple[int, array.array[int]]]:
    """(bit i: the i-th mapped argument is inline, the run's files), open for the block: blobs of
    mapped arguments, then a stepped run's state file and the checkpoint that it goes on from."""
    effect, mask, fds = run.effect, 0, array.array("i")
    try:
        for index, arg in enumerate(arg for arg in effect.spec.args if arg.mapped):
            if arg.blob is None:
                mask |= 1 << index
            else:
                unit_bytes = wire.array_bytes(arg.spec)
                first, count = effect.run.first * unit_bytes, effect.run.count * unit_bytes
                fds.append(open_blob(blobs, arg.blob.blob_id, first, count))
        if effect.spec.stepped is not None:
            run.stepped = run.stepped or SteppedRun(effect, blobs)
            fds.append(os.dup(run.stepped.state_fd))
            if effect.state is not None:
                size = run.stepped.state_bytes
                fds.append(open_blob(blobs, effect.state.blob_id, 0, size))
        yield mask, fds
    finally:
        for fd in fds:
            os.close(fd)
