"""Events on their way from executor to driver: one bounded channel. Used by `supervisor`."""

from __future__ import annotations

import contextlib
from collections import deque

import trio

from meshnode.errors import LocalProtocolError
from meshnode.protocol.events import Event

from .bounds import EVENTS_LATE_MAX, EVENTS_QUEUED_MAX


class Outbox:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._send: trio.MemorySendChannel[Event]
        self.events: trio.MemoryReceiveChannel[Event]
        self._send, self.events = trio.open_memory_channel[Event](EVENTS_QUEUED_MAX)
        self._late: deque[Event] = deque()
        self._closing = False

    def emit(self, event: Event) -> None:
        """From code that cannot wait. What finds the channel full is sent by a task, in order."""
        if not self._late:
            try:
                self._send.send_nowait(event)
                return
            except trio.WouldBlock:
                if not self._closing:
                    self._nursery.start_soon(self._send_late)
            except trio.BrokenResourceError:
                return  # nobody listens any more
        if len(self._late) >= EVENTS_LATE_MAX:
            raise LocalProtocolError("nobody reads the executor's events")
        self._late.append(event)

    async def send(self, event: Event) -> None:
        """From a worker's own task: a full channel makes the worker wait too, by its socket."""
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            await self._send.send(event)

    async def _send_late(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while self._late:
                await self._send.send(self._late[0])
                self._late.popleft()

    def begin_close(self) -> None:
        """No task may be started any more."""
        self._closing = True

    def close(self) -> None:
        self._send.close()
