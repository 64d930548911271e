"""Whose clock goes wrong: how far others' are from ours, by what their hellos said.

Two nodes whose clocks are more than `CLOCK_SKEW_MS_MAX` apart do no work for each other: the
receipts of one would lie in the future of the other. Offsets are held against the monotonic clock,
so when ours is set right it is right with everybody at once; a node whose clock was set says hello
again, so that the others know too. Read by the roles, kept by `Node`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .types import CLOCK_SKEW_MS_MAX, Now, Peer

STEP_MS = 10_000
"""A clock that was set by so much is news. What NTP does to one that runs, 500 ppm at most, makes
this once in six hours."""


@dataclass(frozen=True, slots=True)
class Clock:
    """How ours stands among the others."""

    heard: int  # peers whose hello has come
    apart: int  # of those, too far from us to work with
    ahead_ms: int  # of the middle one of them, negative if it is behind

    @property
    def ours_is_off(self) -> bool:
        """Most of the others agree against us."""
        return self.apart > 1 and abs(self.ahead_ms) > CLOCK_SKEW_MS_MAX


class Clocks:
    def __init__(self, own: Peer) -> None:
        self._own = own
        self._now = Now(0, 0)
        self._offsets: dict[Peer, int] = {}  # its unix time less our monotonic one
        self._step_ms = 0  # what `see` saw last
        self._said_ms: int | None = None  # our own offset, as our hellos say it

    def see(self, now: Now) -> bool:
        """The time of the event in hand; whether our own clock was set since we said hello."""
        self._now = now
        offset = now.unix_ms - now.mono_ms
        if self._said_ms is None:
            self._said_ms = offset
        self._step_ms = offset - self._said_ms
        if abs(self._step_ms) <= STEP_MS:
            return False
        self._said_ms = offset
        return True

    def resumed(self) -> None:
        """That step was the monotonic clock's, which stood still while the machine was suspended:
        the others are as far from us as before."""
        for peer in self._offsets:
            self._offsets[peer] += self._step_ms

    def heard(self, peer: Peer, unix_ms: int) -> None:
        self._offsets[peer] = unix_ms - self._now.mono_ms

    def forget(self, peer: Peer) -> None:
        self._offsets.pop(peer, None)

    def _offset_ms(self, peer: Peer) -> int | None:
        if peer == self._own:
            return self._now.unix_ms - self._now.mono_ms
        return self._offsets.get(peer)

    def skew_ms(self, peer: Peer) -> int:
        """How far its clock is ahead of ours; 0 if it has not said hello."""
        offset = self._offset_ms(peer)
        return 0 if offset is None else offset + self._now.mono_ms - self._now.unix_ms

    def apart(self, peer: Peer) -> bool:
        return abs(self.skew_ms(peer)) > CLOCK_SKEW_MS_MAX

    def in_step(self, one: Peer, other: Peer) -> bool:
        """As far as we can know of the two."""
        offsets = self._offset_ms(one), self._offset_ms(other)
        if offsets[0] is None or offsets[1] is None:
            return True
        return abs(offsets[0] - offsets[1]) <= CLOCK_SKEW_MS_MAX

    def standing(self) -> Clock:
        skews = sorted(map(self.skew_ms, self._offsets))
        apart = sum(abs(skew) > CLOCK_SKEW_MS_MAX for skew in skews)
        return Clock(len(skews), apart, skews[len(skews) // 2] if skews else 0)
