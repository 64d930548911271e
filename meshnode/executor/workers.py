"""A worker as the node holds it: one process at the end of one link, and the run in it.

`supervisor` decides what a worker does and turns its answers into events.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import trio

from meshnode.protocol.reasons import Reason

from . import wire
from .admission import Program
from .cache import Figures
from .forks import Child
from .link import Link
from .run import Run


@dataclass(eq=False, slots=True)
class Worker:
    program: Program
    link: Link
    scope: trio.CancelScope
    run: Run | None
    child: Child | None = None
    loaded: bool = False
    figures: Figures | None = None
    environment: bytes = b""  # what its machine code must be made for
    loop_asked: bool = False
    verdict: tuple[Reason, str] | None = None  # why it is being killed

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

    async def ask_to_stop(self, exec_id: int) -> None:
        """At its next unit or slice."""
        await self.link.say(wire.STOP, wire.EXEC_BODY.pack(exec_id))
        if self.child is not None:
            self.child.signal(signal.SIGUSR1)  # it reads between units once it is called
