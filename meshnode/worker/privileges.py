"""What a worker may do by who it is: user, capabilities, namespaces; given up, never gained.

Layers of `confine`, taken before the backend starts its threads, because credentials are each
thread's own. capabilities(7), user_namespaces(7), prctl(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from . import kernel

NOBODY: Final = 65534

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITIES_MAX: Final = 64  # the width of the kernel's sets
_CAPABILITY_VERSION_3: Final = 0x20080522
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_EVERYBODY_MAY_ENTER: Final = 0o001
_EVERYBODY_MAY_READ: Final = 0o005


def become_nobody(needed: Iterable[str]) -> bool:
    """From root to the user nobody: a file of root's stays root's even without Landlock.

    False if this is not root, if the user cannot be changed (a container without that user), or if
    one of the folders `needed`, an installation below root's own home say, is not for everybody.
    """
    if os.geteuid() != 0 or not all(map(_for_everybody, needed)):
        return False
    _drop_bounding_set()  # takes CAP_SETPCAP, which the change of user takes away
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return False
    return True


def _for_everybody(folder: str) -> bool:
    path = Path(folder)
    try:
        if path.stat().st_mode & _EVERYBODY_MAY_READ != _EVERYBODY_MAY_READ:
            return False
        return all(above.stat().st_mode & _EVERYBODY_MAY_ENTER for above in path.parents)
    except OSError:
        return False


def enter_namespaces() -> bool:
    """User, network and IPC namespaces of one's own: 1-2 ms. False where they are not allowed.

    The process has no identity inside but nobody's, and no interface, not even loopback's; threads
    are counted against RLIMIT_NPROC there alone (since Linux 5.14).
    """
    try:
        kernel.call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)
    except OSError:
        return False
    return True


def drop_capabilities() -> None:
    """All of them: bounding (where one may), ambient, inheritable, permitted, effective."""
    _drop_bounding_set()
    kernel.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    head = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    kernel.call("capset", head, bytes(24))


def _drop_bounding_set() -> None:
    for capability in range(_CAPABILITIES_MAX):
        try:
            kernel.prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # EPERM: no CAP_SETPCAP; EINVAL: behind the last one
            return


def take_no_new_privs() -> None:
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def refuse_tracers() -> None:
    """Not dumpable: no core, and another process of the same user can neither trace this one nor
    read its memory."""
    kernel.prctl(_PR_SET_DUMPABLE, 0)


def status() -> dict[str, str]:
    """/proc/self/status, for checking what is in force: proc_pid_status(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
