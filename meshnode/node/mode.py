"""What the owner wants at the moment: `never` (paused), `auto` or `always`, perhaps for a time.

BOINC's run modes, with its snooze. Kept in the home, so that a pause outlives the node; written by
`meshnode pause`, `resume` and `mode`, read by `vehicle_watch`, which turns it into a budget.
`always` sets aside the owner's comfort (quiet hours, the wait after parking) and no limit that
protects the car.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from meshnode.errors import LocalResource

Kind = Literal["never", "auto", "always"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
MODE_FILE: Final = "mode.json"
_BYTES_MAX: Final = 256
UNTIL_MS_MAX: Final = 253_402_300_799_000  # the end of the year 9999


@dataclass(frozen=True, slots=True)
class Mode:
    kind: Kind = "auto"
    until_unix_ms: int | None = None  # then it is `auto` again; None: until it is changed

    def at(self, unix_ms: int) -> Kind:
        over = self.until_unix_ms is not None and unix_ms >= self.until_unix_ms
        return "auto" if over else self.kind


AUTO: Final = Mode()


def is_time(until_ms: object) -> bool:
    """None, or a unix time that arithmetic and calendars can bear."""
    return until_ms is None or (type(until_ms) is int and 0 <= until_ms <= UNTIL_MS_MAX)


def read_mode(home: Path) -> Mode:
    """What stands in the home. A file that says nothing sensible is a pause: its owner wanted
    something, and computing is what must not happen by mistake."""
    try:
        with (home / MODE_FILE).open("rb") as file:
            found = json.loads(file.read(_BYTES_MAX))
        kind, until = found["mode"], found["until_ms"]
        if kind not in KINDS or not is_time(until):
            return Mode("never")
    except FileNotFoundError:
        return AUTO
    except (OSError, ValueError, TypeError, KeyError):
        return Mode("never")
    return Mode(kind, until)


def write_mode(home: Path, mode: Mode) -> None:
    """In one step: a node that starts meanwhile reads the old one or the new one."""
    path, draft = home / MODE_FILE, home / f".{MODE_FILE}.new"
    text = json.dumps({"mode": mode.kind, "until_ms": mode.until_unix_ms})
    try:
        draft.write_text(text + "\n")
        os.replace(draft, path)
    except OSError as error:
        raise LocalResource(f"{path} cannot be written: {error.strerror}") from None
