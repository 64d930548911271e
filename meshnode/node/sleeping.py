"""Suspends this machine while its car sleeps, by the owner's command; the protocol says when.

Sleep (from `protocol.standby`) -> settle -> the command with the seconds appended -> Woke

The monotonic clock stands still while a machine is suspended, so that the machine's own deadline
would come late: it is told that it woke. So it is when the command fails or comes back early.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from meshnode.protocol.effects import Sleep
from meshnode.protocol.events import Event, Woke

OVER_S_MAX: Final = 60.0
"""A command that runs so much longer than it was told is killed: the machine is awake, or it would
not be noticed."""


class Sleeper:
    """`still`: whether the node may be suspended now; `post` feeds it events."""

    def __init__(
        self,
        command: tuple[str, ...],
        still: Callable[[], bool],
        post: Callable[[Event], None],
        counters: Counter[str],
    ) -> None:
        self._command = command
        self._still = still
        self._post = post
        self._asked, self._sleeps = trio.open_memory_channel[Sleep](1)
        self._counters = counters
        self.on_awake: Callable[[], None] = lambda: None
        """Called before the machine hears that it is awake: what was read of the vehicle before is
        as old as the sleep was, and no clock that stood still meanwhile says so."""

    def fall(self, effect: Sleep) -> None:
        """From the driver; without a command the node keeps quiet and nothing else happens."""
        if not self._command:
            return
        try:
            self._asked.send_nowait(effect)
        except trio.WouldBlock:
            self._counters["sleeps_overtaken"] += 1  # the last one's command has not ended

    async def run(self) -> None:
        async for effect in self._sleeps:
            await trio.sleep(effect.settle_ms / 1000)
            if self._still():
                await self._suspend(-(-(effect.for_ms - effect.settle_ms) // 1000))
                self.on_awake()
            self._post(Woke())  # also where it was not suspended: an idle car that is awake works

    async def _suspend(self, seconds: int) -> None:
        words = [*self._command, str(max(1, seconds))]
        with trio.move_on_after(seconds + OVER_S_MAX):
            try:
                done = await trio.run_process(
                    words,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                self._counters["sleep_commands_failed"] += 1
                return
            self._counters["sleep_commands_failed"] += done.returncode != 0
