"""Where a testnet says that it is there, and how what it left behind is removed.

`keeper` writes the state file, `mesh --testnet NAME`, `mesh testnet ls` and `down` read it. A
process is named by pid and start time: a pid alone may belong to somebody else by now. Everything
that a testnet makes on disk is named in the state, and `remove_files` takes all of it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

from meshnode.errors import LocalResource, UsageError
from meshnode.node.home import run_base

State: TypeAlias = dict[str, Any]

STATE_VERSION: Final = 1
STATE_BYTES_MAX: Final = 1 << 20
NAME_CHARS_MAX: Final = 32
FOLDER_PREFIX: Final = "mesh-testnet-"
KILL_S_MAX: Final = 5.0
_ALLOWED: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def state_folder() -> Path:
    return run_base() / "testnet"


def make_state_folder() -> Path:
    """The folder of all state files, private."""
    folder = state_folder()
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for made in (folder.parent, folder):
            found = made.lstat()  # in /tmp anyone may have put a link of that name before us
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise LocalResource(f"{made} is not private to you; run `chmod 700 {made}`")
    except OSError as error:
        raise LocalResource(f"cannot make {folder}: {error.strerror}") from None
    return folder


def check_name(name: str) -> str:
    if not 0 < len(name) <= NAME_CHARS_MAX or not _ALLOWED.issuperset(name) or name[0] in ".-":
        raise UsageError(
            f"{name!r} is no name of a testnet: use letters, digits, dash and dot, "
            f"at most {NAME_CHARS_MAX}"
        )
    return name


def state_path(name: str) -> Path:
    return state_folder() / f"{check_name(name)}.json"


def socket_path(name: str) -> Path:
    """The keeper's; whoever has bound it owns the name."""
    return state_folder() / f"{check_name(name)}.sock"


def read_state(name: str) -> State | None:
    """None if there is no testnet of this name."""
    path = state_path(name)
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(STATE_BYTES_MAX))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LocalResource(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise LocalResource(f"{path} was written by another version; remove it")
    return state


def write_state(state: State) -> None:
    """Whole or not at all: commands read it at any moment."""
    path = state_path(state["name"])
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(state, file, indent=1)
    draft.replace(path)


def names() -> list[str]:
    """All testnets of this user that have a state file."""
    try:
        return sorted(path.stem for path in state_folder().glob("*.json"))
    except OSError:
        return []


# ---- processes


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the third on (proc(5)); None: no such process.

    A zombie is no process any more: nothing of it runs, and only its parent can remove it.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None: it is gone."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def group_size(group: int) -> int:
    """How many processes of the process group run."""
    stats = (_stat(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return sum(fields is not None and int(fields[2]) == group for fields in stats)


def same_process(process: State | None) -> bool:
    return process is not None and start_ticks(process["pid"]) == process["start_ticks"]


def kill_process(process: State | None) -> None:
    """SIGKILL to the recorded process if it is still that one, and wait for its end."""
    if not process:
        return
    try:
        pidfd = os.pidfd_open(process["pid"])
    except OSError:
        return
    try:
        # Checked with the pidfd in hand: from here on it means the same process for ever.
        if start_ticks(process["pid"]) == process["start_ticks"]:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_pidfd(pidfd, KILL_S_MAX)
    finally:
        os.close(pidfd)


def wait_pidfd(pidfd: int, timeout_s: float) -> bool:
    """True once the process has ended."""
    return bool(select.select([pidfd], [], [], max(0.0, timeout_s))[0])


def processes(state: State) -> Iterator[State]:
    """Every recorded process, the keeper first: it would start others again."""
    yield from filter(None, (state.get("keeper"), state.get("jax")))
    for node in state["nodes"].values():
        if node.get("pid"):
            yield node


# ---- files


def remove_files(state: State) -> None:
    """Homes, logs, run directories, port locks, socket, and the state file last of all."""
    folder = Path(state["folder"])
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    for node in state["nodes"].values():
        run = Path(node["run"])
        if run.parent == run_base():
            shutil.rmtree(run, ignore_errors=True)
        # Only while no node runs may a lock file go: two could else lock two files of one name.
        lock = run.parent / "ports" / f"tcp-127.0.0.1-{node['port']}.lock"
        lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (run_base() / "ports").rmdir()
    socket_path(state["name"]).unlink(missing_ok=True)
    state_path(state["name"]).with_suffix(".new").unlink(missing_ok=True)
    state_path(state["name"]).unlink(missing_ok=True)


def remove_all(state: State) -> None:
    """What `down` does when the keeper is no more: recorded processes, then files."""
    for process in processes(state):
        kill_process(process)
    _wait_workers(state)
    remove_files(state)


def _wait_workers(state: State) -> None:
    """Workers are not recorded: they die with their zygote, which dies with its parent (prctl
    PR_SET_PDEATHSIG), a moment later. They belong to the process group of the keeper."""
    keeper = state.get("keeper")
    deadline_s = time.monotonic() + KILL_S_MAX
    while keeper and group_size(keeper["pid"]) and time.monotonic() < deadline_s:
        select.select([], [], [], 0.01)
