"""One process per home: an flock that the kernel drops when its holder dies, however it dies.

Taken by `open_journal` before a database is touched. flock and not fcntl locks: the latter are
lost as soon as the process closes any descriptor of the file (fcntl(2)).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshnode.errors import LocalResource

LOCK_NAME = "lock"


@contextmanager
def hold_home(home: Path) -> Iterator[None]:
    """Hold `home` for this process; LocalResource names the process that has it already."""
    path = home / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalResource(f"cannot use {home}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalResource(
                f"{home} is in use by process {_holder(fd)}; stop it or choose another MESH_HOME"
            ) from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds, only the number in the message is lost
        # The file stays: unlinking a locked file lets two processes lock two inodes of one name.
        yield
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    text = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
    return text if text.isdigit() else "(unknown)"
