"""Processes by pid and start time: the pair names one process for ever, the pid alone does not."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat, or 0 if there is no such process (or only its zombie)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text[text.rindex(")") + 2 :].split()  # the name may hold spaces and brackets
    return 0 if fields[0] == "Z" else int(fields[19])


def alive(pid: int, ticks: int) -> bool:
    return ticks != 0 and start_ticks(pid) == ticks


def end(pid: int, ticks: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Signal exactly that process; False if it is gone already."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not alive(pid, ticks):  # after the open: the descriptor cannot change its process
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        return True
    finally:
        os.close(pidfd)


def wait_gone(pid: int, ticks: int, timeout_s: float) -> bool:
    """Until the process has ended, at most so long."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        if not alive(pid, ticks):
            return True
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))
