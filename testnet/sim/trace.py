"""What happened, as one SHA-256: every event that a machine was fed, in order, with its time.

Events decide the effects, and effects the events, so two runs with one digest are one run.
"""

from __future__ import annotations

import hashlib

from meshnode.protocol import events as ev

ROWS_MAX = 4096  # kept before they are hashed
_TICK = repr(ev.Tick()).encode()


class Trace:
    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.sha256()
        self._rows: list[bytes] = []

    def add(self, now_us: int, number: int, event: ev.Event) -> None:
        self.events += 1
        # A frame's repr costs ten times its hash.
        if type(event) is ev.FrameIn or type(event) is ev.GossipIn:
            body = event.frame
        elif type(event) is ev.Tick:
            body = _TICK
        else:
            body = repr(event).encode()
        rows = self._rows
        rows.append(b"%d %d %d " % (now_us, number, len(body)))
        rows.append(body)
        if len(rows) >= ROWS_MAX:
            self._flush()

    def note(self, now_us: int, text: str) -> None:
        """Something that happened to no machine: a fault, an oracle's choice."""
        self._rows.append(b"%d %s\n" % (now_us, text.encode()))

    def _flush(self) -> None:
        self._hash.update(b"".join(self._rows))
        self._rows.clear()

    def hexdigest(self) -> str:
        self._flush()
        return self._hash.hexdigest()
