"""Facts on their way to the driver: one bounded channel, in order, nothing lost without a trace.

Everything the overlay learns ends here. Tasks wait when the driver is slow (and so slow their
peer down); the calls of `Overlay`, which may not wait, leave what does not fit in a bounded
overflow that a task forwards.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.events import Event

OVERFLOW_MAX: Final = 65_536


class EventSink:
    def __init__(self, events_max: int) -> None:
        self._send, self.receive = trio.open_memory_channel[Event](events_max)
        self._overflow: deque[Event] = deque()
        self._wake = trio.Event()
        self._drained = trio.Event()

    def emit_now(self, event: Event) -> None:
        """For callers that may not wait."""
        if not self._overflow:
            try:
                self._send.send_nowait(event)
                return
            except trio.WouldBlock:
                pass
            except trio.BrokenResourceError:
                return
        if len(self._overflow) >= OVERFLOW_MAX:
            raise LocalProtocolError("the driver does not read the overlay's events")
        self._overflow.append(event)
        self._wake.set()

    async def emit(self, event: Event) -> None:
        """For tasks: waits for room, and so slows down whoever caused the event."""
        while self._overflow:  # a PeerUp must not overtake the PeerDown before it
            await self._drained.wait()
        await self._put(event)

    async def _put(self, event: Event) -> None:
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            try:
                await self._send.send(event)
            except trio.BrokenResourceError:
                pass
        except trio.BrokenResourceError:
            pass

    async def forward(self) -> None:
        """Task: moves the overflow into the channel, in order."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._overflow:
                await self._put(self._overflow[0])
                self._overflow.popleft()
            self._drained.set()
            self._drained = trio.Event()

    def close(self) -> None:
        self._send.close()
