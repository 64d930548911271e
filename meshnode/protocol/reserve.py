"""How many idle cars a rendezvous keeps awake: pure arithmetic over the tokens that it has seen.

`rendezvous` counts its tokens here at each placement and tally. The car behind one that is more
than it needs is told to rest, and `standby` decides there whether it does.
"""

from __future__ import annotations

import hashlib
from math import exp, isqrt
from typing import Final

from .types import Peer

WINDOW_MS: Final = 30_000  # tokens are averaged over about so long: they move from one to another
RESERVE_LEAST: Final = 4  # idle cars that a cell keeps awake, however small it is
RESERVE_ROOTS: Final = 2
"""And so many times the square root of those at work: how many work at a time varies by about one
root by chance (square-root staffing: Halfin and Whitt 1981). By the root of all cars of a cell, a
cell of 75 of which 8 work kept 22 awake; now it is 9."""


def reserve(busy: int, posts: int) -> int:
    """Tokens that each of so many rendezvous keeps for a cell in which so many cars work: what one
    lacks another of the cell has."""
    return -(-(RESERVE_LEAST + isqrt(RESERVE_ROOTS * RESERVE_ROOTS * busy)) // posts)


class Reserve:
    """What a rendezvous has seen of its own tokens."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._last = 0
        self._at_mono_ms: int | None = None

    def count(self, tokens: int, now_ms: int) -> None:
        """So many there are now; there were as many as last time until now."""
        if self._at_mono_ms is not None:
            kept = exp((self._at_mono_ms - now_ms) / WINDOW_MS)
            self._mean = self._last + (self._mean - self._last) * kept
        self._last, self._at_mono_ms = tokens, now_ms

    def one_too_many(self, car: Peer, epoch: int, idle: int, busy: int, posts: int) -> bool:
        """Whether this car may rest, of those whose tokens come here: by a lot that is the same at
        each rendezvous, because a car asks them all, and another one in each epoch. Of the cell's
        cars so many are `idle`, awake or asleep, and so many `busy`; so many `posts` serve it.

        While there are more idle cars awake than the reserve, those stay awake whose lot is among
        the highest of *all* that are idle, as many as the reserve and its root, so that chance
        leaves none of them: by their lots among the awake alone a car that has just woken would
        stay as often as it goes, and three times the reserve stood awake.
        """
        kept = reserve(busy, posts)
        if self._mean < kept + 1:
            return False
        drawn = hashlib.sha256(b"rest\0%d\0" % epoch + car).digest()[:4]
        lot = int.from_bytes(drawn, "big") / (1 << 32)
        stay = kept * posts + isqrt(kept * posts)
        return lot * idle < idle - stay or lot * self._mean < self._mean - kept
