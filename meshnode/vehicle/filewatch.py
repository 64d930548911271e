"""A call at once when a file changes: Linux's inotify, which wakes nobody while nothing happens.

Used by adapters whose readings stand in a file. Only a hurry: where the kernel gives no watch
(its limit is reached, another system), the file is still read at every look.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

# <sys/inotify.h>: the flags of what we want to hear of.
_CLOSE_WRITE: Final = 0x08
_MOVED_TO: Final = 0x80
_CREATE: Final = 0x100
_DELETE: Final = 0x200
_EVENT_BYTES: Final = 4096  # an event has 16 bytes and a name of at most 255


async def watch_file(path: Path, changed: Callable[[], None]) -> None:
    """Task, until cancelled: call `changed` after the file was written, replaced or deleted.

    The folder is watched and not the file: editors, and whoever writes atomically, put a new file
    in the place of the old.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        return
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        return
    try:
        flags = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE
        folder = os.fsencode(path.parent)
        if libc.inotify_add_watch(fd, folder, ctypes.c_uint32(flags)) < 0:
            return
        name = os.fsencode(path.name)
        while True:
            await trio.lowlevel.wait_readable(fd)
            if name in _names(os.read(fd, _EVENT_BYTES)):
                changed()
    finally:
        os.close(fd)


def _names(events: bytes) -> set[bytes]:
    """`struct inotify_event`: int wd, uint32 mask, cookie, len; then the name, padded by NULs."""
    names, at = set(), 0
    while at + 16 <= len(events):
        size = int.from_bytes(events[at + 12 : at + 16], sys.byteorder)
        names.add(events[at + 16 : at + 16 + size].rstrip(b"\0"))
        at += 16 + size
    return names
