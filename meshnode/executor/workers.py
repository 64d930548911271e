"""A worker and the run in it, as the node holds them: one process at the end of one socket.

`supervisor` decides what a worker does and turns its answers into events; here is how frames and
open files get into its socket, in whole frames and in order, and how they come out.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from meshnode.protocol.effects import StartExec
from meshnode.protocol.events import Meters
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest

from . import wire
from .admission import Program
from .bounds import RECEIVE_BYTES, BlobFiles
from .cache import Figures
from .forks import Child
from .stepping import SteppedRun


@dataclass(eq=False, slots=True)
class Run:
    effect: StartExec
    program: Program
    unit_bytes: int
    flop_per_unit: int = 0  # of a step, if stepped
    done: int = 0
    device_ms: int = 0
    started_s: float = 0.0
    stop_reason: Reason | None = None
    stepped: SteppedRun | None = None

    def meters(self) -> Meters:
        wall_ms = round((trio.current_time() - self.started_s) * 1000) if self.started_s else 0
        done = self.stepped.steps_done if self.stepped else self.done
        # A worker that counts more device time than has passed is wrong or lies.
        return Meters(
            device_ms=min(self.device_ms, wall_ms + 1),
            wall_ms=wall_ms,
            kflop=self.flop_per_unit * done // 1000,
        )


@dataclass(eq=False, slots=True)
class Worker:
    program: Program
    sock: socket.socket  # ours, non-blocking
    scope: trio.CancelScope
    run: Run | None
    child: Child | None = None
    loaded: bool = False
    figures: Figures | None = None
    environment: bytes = b""  # what its machine code must be made for
    loop_asked: bool = False
    verdict: tuple[Reason, str] | None = None  # why it is being killed
    frames: wire.FrameReader = field(default_factory=wire.FrameReader)
    unsent: trio.Event | None = None  # while a long frame is on its way into the socket

    @property
    def idle(self) -> bool:
        return self.loaded and self.run is None and self.verdict is None

    def doom(self, reason: Reason, text: str = "") -> None:
        """SIGKILL now; its task then says how the run ended."""
        if self.verdict is None:
            self.verdict = (reason, text)
        if self.child is not None:
            self.child.signal(signal.SIGKILL)
        self.scope.cancel()

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.sock.fileno())
        self.sock.close()

    async def receive(self) -> list[tuple[int, bytes]]:
        """At least one frame; OSError when the process has ended."""
        while True:
            await trio.lowlevel.wait_readable(self.sock.fileno())
            chunk = self.sock.recv(RECEIVE_BYTES)
            if not chunk:
                raise OSError("end of file")
            if frames := list(self.frames.feed(chunk)):
                return frames

    async def load(self, load: wire.Load, fds: Sequence[int]) -> None:
        frame = wire.encode_load(load)
        sent = self.sock.sendmsg([frame], riding(array.array("i", fds)))
        await self.send_rest(frame[sent:])

    async def send_rest(self, rest: bytes) -> None:
        """What the socket did not take at once; other words wait for it."""
        view = memoryview(rest)
        self.unsent = self.unsent or trio.Event()
        try:
            while view:
                try:
                    view = view[self.sock.send(view) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock.fileno())
        except (OSError, trio.ClosedResourceError):
            pass  # the worker's own task sees its end
        finally:
            self.unsent.set()
            self.unsent = None

    async def say(self, kind: int, body: bytes, *fds: int) -> None:
        """A word beside the runs. It goes between frames, and a worker too busy to read the ones
        before hears nothing."""
        while self.unsent is not None:
            await self.unsent.wait()
        with contextlib.suppress(OSError):
            self.sock.sendmsg([wire.frame(kind, body)], riding(array.array("i", fds)))
            if self.child is not None and kind == wire.STOP:
                self.child.signal(signal.SIGUSR1)  # it reads between units once it is called


def run_head(
    run: Run,
    fds: array.array[int],
    blobs: BlobFiles,
    open_blob: Callable[[Digest, int, int], int],
) -> bytes:
    """Header of the run's frame; the files that ride on it are added to `fds`."""
    effect, mask = run.effect, 0
    mapped = [arg for arg in effect.spec.args if arg.mapped]
    for index, arg in enumerate(mapped):
        if arg.blob is None:
            mask |= 1 << index
        else:
            unit_bytes = wire.array_bytes(arg.spec)
            first, count = effect.run.first * unit_bytes, effect.run.count * unit_bytes
            fds.append(open_blob(arg.blob.blob_id, first, count))
    row = (effect.exec_id, effect.run.first, effect.run.count, mask)
    if effect.spec.stepped is None:
        return wire.encode_run_head(*row, len(effect.inline))
    run.stepped = stepped = SteppedRun(effect, blobs)
    fds.append(os.dup(stepped.state_fd))
    if effect.state is not None:
        fds.append(open_blob(effect.state.blob_id, 0, stepped.state_bytes))
    goes_on, inline_bytes = effect.state is not None, len(effect.inline)
    return wire.encode_steps_head(row, effect.spec.steps, effect.step, goes_on, inline_bytes)


def riding(fds: array.array[int]) -> list[tuple[int, int, array.array[int]]]:
    """Open files as `sendmsg` wants them."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
