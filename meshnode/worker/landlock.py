"""Landlock: what of the file system, of TCP and of other processes a worker can still name.

A layer of `confine`, put in force before the backend starts its threads: before ABI 8 a ruleset
covers the calling thread and what it starts, not its siblings. Constants and struct layouts:
linux/landlock.h; landlock(7) says what each ABI added. Stat and readlink are not covered by any
ABI, so a worker can learn that a path exists.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from . import kernel

_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_RULESET: Final = struct.Struct("=QQQ")  # handled_access_fs, handled_access_net, scoped
_PATH_BENEATH: Final = struct.Struct("=Qi")  # allowed_access, parent_fd; packed

WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
IOCTL_DEV: Final = 1 << 15
# Every right that an ABI knows is handled, and so denied where no rule gives it.
_FS_BY_ABI: Final = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
_NET_ABI: Final = 4
_NET: Final = 0b11  # bind and connect over TCP
_SCOPE_ABI: Final = 6
_SCOPE: Final = 0b11  # abstract unix sockets, signals
_ABSENT: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # not built, off, or filtered


def abi() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    if not kernel.known_machine():
        return 0
    try:
        return kernel.call("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise


def has_net(version: int) -> bool:
    return version >= _NET_ABI


def has_scope(version: int) -> bool:
    return version >= _SCOPE_ABI


def restrict(version: int, readable: Iterable[str], devices: Iterable[str]) -> None:
    """Give up everything but reading beneath `readable` and using the nodes of `devices`.

    Needs no_new_privs. Paths that do not exist are left out: nothing is there to be read. Nothing
    may be executed anywhere.
    """
    handled = _FS_BY_ABI[min(version, len(_FS_BY_ABI) - 1)]
    words = (handled, _NET if has_net(version) else 0, _SCOPE if has_scope(version) else 0)
    # A kernel refuses a struct longer than its own unless the rest is zero, which it is.
    ruleset = kernel.call("landlock_create_ruleset", _RULESET.pack(*words), _RULESET.size, 0)
    try:
        for path in readable:
            _add(ruleset, path, READ_FILE | READ_DIR)
        for path in devices:
            _add(ruleset, path, (READ_FILE | WRITE_FILE | IOCTL_DEV) & handled)
        kernel.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _add(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= ~READ_DIR
        rule = _PATH_BENEATH.pack(access, fd)
        kernel.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
