"""The last values of something that is timed, and their quantiles.

Exact over a bounded window: no sketch is needed for a hundred numbers. Filled by `pace`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from typing import Final

WINDOW: Final = 128


class Durations:
    """The last `most` values in the order they came, and sorted."""

    __slots__ = ("_most", "_recent", "_sorted")

    def __init__(self, most: int = WINDOW) -> None:
        self._most = most
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        if len(self._recent) >= self._most:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        insort(self._sorted, value)

    def quantile(self, permille: int) -> float:
        """The smallest value that at least so many of a thousand do not exceed (nearest rank).
        Asked of none it is an IndexError."""
        rank = -(-permille * len(self._sorted) // 1000)
        return self._sorted[max(1, rank) - 1]

    def mean(self) -> float:
        """ZeroDivisionError if there are none."""
        return sum(self._sorted) / len(self._sorted)

    def left(self, spent: float) -> float | None:
        """How much longer those took, in the mean, that took longer than `spent` (the mean residual
        life of reliability theory); None if none did."""
        longer = self._sorted[bisect_right(self._sorted, spent) :]
        return sum(longer) / len(longer) - spent if longer else None
