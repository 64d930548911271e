"""What a forked child does to itself before it runs anything: die with its parent, drop files.

Called by `zygote` right after a fork. `before_backend` and `after_backend` are the two places
where the sandbox's layers go: Landlock and no_new_privs must come before jax starts threads,
rlimits and seccomp (TSYNC) only after. Today no layer is in force, and `after_backend` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends, however it ends (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended between fork and prctl
        os._exit(1)


def keep_only(*fds: int) -> None:
    """Close every other open file: a child must hold neither its siblings' nor the node's."""
    keep = {0, 1, 2, *fds}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(fd)


def before_backend() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def after_backend() -> int:
    """Bit set of the sandbox layers in force."""
    return 0
