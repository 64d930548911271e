"""What a car says of a long run as it goes on, and of any run when it leaves.

Beside `delivery`, used by `provider`. A checkpoint is said at the end of a slice; the requester
fetches it while the car is here. A hand-off is the last word before a recall ends the run.
"""

from __future__ import annotations

from .events import Partial, SliceDone
from .lease import Granted
from .messages import Checkpoint, Handoff, Watch
from .outbox import Outbox
from .owner import Owner
from .presence import Presence
from .reasons import Reason
from .types import WATCH_BYTES_MAX, Lane


class Parting:
    def __init__(self, outbox: Outbox, presence: Presence, owner: Owner) -> None:
        self._out = outbox
        self._owner = owner
        self._presence = presence

    def checkpoint(self, granted: Granted, event: SliceDone) -> None:
        granted.state, granted.step = event.state, event.step
        granted.meters = self._owner.drew(granted.meters, event.meters)
        granted.beat_mono_ms = self._out.now.mono_ms
        said = Checkpoint(granted.lease_id, event.step, event.state)
        self._out.send(granted.requester, Lane.CONTROL, said)

    def watch(self, granted: Granted, event: Partial) -> None:
        """Not said again if the queue is full: the next one says all of it."""
        if len(event.watch) <= WATCH_BYTES_MAX and granted.requester in self._presence.peers_up:
            watch = Watch(granted.lease_id, event.step, event.watch)
            self._out.send(granted.requester, Lane.RESULT, watch)

    def hand_off(self, granted: Granted, reason: Reason, grace_ms: int) -> None:
        if granted.requester not in self._presence.peers_up:
            return
        state, step = granted.state, granted.step
        if state is None or state == granted.offer.state:
            state, step = None, 0  # nothing that the requester does not have
        handoff = Handoff(
            granted.lease_id, granted.done, grace_ms, reason, step if state else None, state
        )
        self._out.send(granted.requester, Lane.URGENT, handoff)
