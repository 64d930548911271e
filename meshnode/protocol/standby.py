"""Working, standby, asleep: when a car that its cell does not need sleeps, and when it wakes.

Being awake costs a car more than computing does (about 250 W against the 36 of an inference chip),
so an idle car that nobody needs sleeps. Nobody decides that for it. A rendezvous counts the tokens
that it never came to use; what is more than its reserve it tells to **rest**. A car sleeps if its
owner lets it, it has had no work for a while, and each rendezvous that serves it has said so: one
alone could send a cell to sleep. Its advert says until when, and each wakes at another moment.

rendezvous: token -> `Reserve` -> Rest;  car: Rest -> `Standby` -> advert, Revoke, Sleep
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Final

from .cell import SERVED_BY, Roster, epoch_of, served_by
from .effects import Sleep
from .messages import Rest
from .outbox import Outbox, remember
from .provider import Provider
from .reasons import Reason
from .types import SLEEP_MS_MAX, Peer

IDLE_MS: Final = 60_000  # a car sleeps only after so long without work
OWED_MS: Final = 300_000  # and so long after its last run it waits for receipts to be accepted
FIRST_SLEEP_MS: Final = 300_000
"""The first sleep after work is no longer; each one that nothing came of is twice as long. Nobody
wakes a sleeper: of a cell that fell asleep at once for an hour, the first tasks waited an hour."""
HEARD_TTLS: Final = 2  # so many lives of a token a rendezvous's word counts that it is one too many
HEARD_MAX: Final = 16
SLEEPS_COUNTED_MAX: Final = 8  # in a row; by then a sleep is as long as any may be
SETTLE_MS: Final = 2_000  # between the decision and the sleep: advert and revocations are under way


class Stance(Enum):
    """What a parked car is doing."""

    WORKING = "working"  # a slot is taken, or something of its is under way
    STANDBY = "standby"  # idle and awake: it holds tokens
    ASLEEP = "asleep"  # its advert says until when; it holds none


class Standby:
    """`busy`: whether anything of this node is under way, for itself or others."""

    def __init__(
        self,
        outbox: Outbox,
        provider: Provider,
        roster: Roster,
        busy: Callable[[], bool],
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._owner = provider.owner
        self._presence = provider.presence
        self._tokens = provider.tokens
        self._roster = roster
        self._busy = busy
        self._reach = reach
        self._heard: OrderedDict[Peer, int] = OrderedDict()
        self._wake_mono_ms: int | None = None
        self._in_vain = 0  # sleeps since it last worked
        self._idle_since_mono_ms = 0  # when it woke, unless it has worked since

    @property
    def stance(self) -> Stance:
        if self._owner.wakes_unix_ms is not None:
            return Stance.ASLEEP
        idle = self._presence.slots_free() >= self._owner.slots and not self._busy()
        return Stance.STANDBY if idle else Stance.WORKING

    def is_long_idle(self) -> bool:
        """Whoever has not taken its results by now keeps nobody awake for them."""
        return self._out.now.mono_ms > self._owner.worked_mono_ms + OWED_MS

    def still(self) -> bool:
        """Whether it sleeps and nothing has come between, as when its owner submits a job."""
        return self._owner.wakes_unix_ms is not None and not self._busy()

    def on_rest(self, peer: Peer, rest: Rest) -> None:
        """A rendezvous has more tokens than it needs, and ours is one."""
        if self._tokens.lies_at(rest.token) != peer or not self._out.limits.sleep_ms_max:
            return
        remember(self._heard, peer, self._out.now.mono_ms, HEARD_MAX)
        if self._may_sleep():
            self._sleep()

    def _may_sleep(self) -> bool:
        now, identity = self._out.now, self._out.identity
        if now.mono_ms < self._owner.worked_mono_ms + IDLE_MS:
            return False
        posts = self._roster.posts(identity.cell, epoch_of(now.unix_ms))
        elected = any(identity.peer in ranks for ranks in posts)
        serving = served_by(identity.peer, posts)
        since_ms = now.mono_ms - HEARD_TTLS * self._out.limits.token_ttl_ms
        heard = sum(self._heard.get(peer, since_ms) > since_ms for peer in serving)
        agreed = heard == len(serving) >= SERVED_BY
        may_run = self._owner.may_run() is Reason.OK
        return agreed and may_run and not elected and self.stance is Stance.STANDBY

    def _sleep(self) -> None:
        """For half of what it may, or longer: else all that fell asleep together would wake
        together."""
        if self._owner.worked_mono_ms != self._idle_since_mono_ms:
            self._in_vain = 0
        most_ms, now = min(self._out.limits.sleep_ms_max, SLEEP_MS_MAX), self._out.now
        most_ms = min(most_ms, FIRST_SLEEP_MS << min(self._in_vain, SLEEPS_COUNTED_MAX))
        self._in_vain += 1
        for_ms = max(2 * SETTLE_MS, most_ms - self._out.rng.randrange(most_ms // 2 + 1))
        self._heard.clear()
        self._wake_mono_ms = now.mono_ms + for_ms
        self._owner.wakes_unix_ms = now.unix_ms + for_ms
        self._out.counters["sleeps"] += 1
        self._presence.changed(now=True)
        self._out.add(Sleep(SETTLE_MS, for_ms))

    def deadline(self) -> int | None:
        """By either clock: the monotonic one stands still while a machine is suspended."""
        wakes, now = self._owner.wakes_unix_ms, self._out.now
        if wakes is None or self._wake_mono_ms is None:
            return None
        return min(self._wake_mono_ms, now.mono_ms + max(0, wakes - now.unix_ms))

    def tick(self) -> None:
        due = self.deadline()
        if due is not None and due <= self._out.now.mono_ms:
            self.wake()

    def wake(self) -> None:
        """Its time is over, or something woke it. What it knew of its cell is a sleep old: those
        that may serve it are sought before it is forgotten."""
        if self._owner.wakes_unix_ms is None:
            return
        now, identity = self._out.now, self._out.identity
        for peer in served_by(
            identity.peer, self._roster.posts(identity.cell, epoch_of(now.unix_ms))
        ):
            self._reach(peer)
        self._owner.wakes_unix_ms = self._wake_mono_ms = None
        # It is there for a while.
        self._owner.worked_mono_ms = self._idle_since_mono_ms = now.mono_ms
        self._presence.changed(now=True)
