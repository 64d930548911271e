"""The one place where a node reads clocks: what the machine gets as `now`.

Between the operating system and `driver`; the simulator has a clock of its own.
"""

from __future__ import annotations

import time
from typing import Protocol

from meshnode.protocol.types import Now


class Clock(Protocol):
    def now(self) -> Now: ...

    def seconds_until(self, mono_ms: int) -> float:
        """Never negative."""
        ...


class SystemClock:
    """CLOCK_MONOTONIC, as the overlay's deadlines are, and unix time."""

    def now(self) -> Now:
        return Now(time.monotonic_ns() // 1_000_000, time.time_ns() // 1_000_000)

    def seconds_until(self, mono_ms: int) -> float:
        return max(0.0, mono_ms / 1000 - time.monotonic())
