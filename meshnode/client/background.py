"""A submitter node in the background, for a home on which none runs.

    mesh, started = connect_or_start(home)
    with mesh: ...

The node owns the jobs, so `mesh submit` may return at once and a terminal may be closed. The one
started here is a process of its own session (Ctrl-C at the terminal is not for it), logs into
`node.log` of the home, and ends when it has had no client and no job for `IDLE_EXIT_S`; its jobs
are in the home, so the next `mesh` command that starts it again goes on with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO, Final

import meshnode
from meshnode.errors import LocalResource, MeshError, TimedOut, Unreachable

from .blocking import Mesh, connect

IDLE_EXIT_S: Final = 60.0
START_S_MAX: Final = 30.0
LOG_NAME: Final = "node.log"
LOG_BYTES_MAX: Final = 4 << 20
"""A log that has grown past it is started anew, the old one kept beside it."""
_READY_BYTES_MAX: Final = 65_536


def connect_or_start(
    home: Path, *, join: tuple[str, ...] = (), timeout_s: float = START_S_MAX
) -> tuple[Mesh, bool]:
    """A connection to the node of `home`, started if none runs; and whether it was."""
    try:
        return connect(home), False
    except Unreachable:
        pass
    try:
        start(home, join=join, timeout_s=timeout_s)
    except LocalResource as error:
        # Two commands at once: the other one's node has the lock, and will be ready soon.
        try:
            return _connect_soon(home, timeout_s), False
        except Unreachable:
            raise error from None
    return connect(home), True


def start(home: Path, *, join: tuple[str, ...] = (), timeout_s: float = START_S_MAX) -> int:
    """Start a background submitter and wait until it is ready; its pid.

    LocalResource with the node's own last line if it ends, TimedOut if it is not ready in time.
    """
    command = [sys.executable, "-m", "meshnode.node", "--home", str(home), "--role", "submitter"]
    command += ["--idle-exit-s", f"{IDLE_EXIT_S:g}", "--detach"]
    for address in join:
        command += ["--join", address]
    reading, writing = os.pipe()
    try:
        with _open_log(home) as log:
            process = subprocess.Popen(
                [*command, "--ready-fd", str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(writing,),
                start_new_session=True,
                # `-m` looks here first: the node is of the same installation, or checkout, as we.
                cwd=Path(meshnode.__file__).parent.parent,
            )
    except OSError as error:
        os.close(reading)
        raise LocalResource(f"cannot start a node: {error.strerror}") from None
    finally:
        os.close(writing)
    process.wait()  # it has forked the node, which is no child of ours: no zombie stays
    try:
        ready = _read_line(reading, timeout_s)
    except TimedOut:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
    if not ready:
        raise _failure(home)
    pid: int = json.loads(ready)["pid"]
    return pid


def _open_log(home: Path) -> BinaryIO:
    path = home / LOG_NAME
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _read_line(fd: int, timeout_s: float) -> bytes:
    """The node's ready line; empty if it ended before."""
    deadline_s = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n") and len(line) < _READY_BYTES_MAX:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
        if not readable:
            raise TimedOut(f"the node was not ready within {timeout_s:g} s")
        piece = os.read(fd, 4_096)
        if not piece:
            return b""
        line += piece
    return line


def _failure(home: Path) -> MeshError:
    with (home / LOG_NAME).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2_000))
        lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    text = lines[-1].removeprefix("meshnode: ")
    return LocalResource(f"a background node could not start: {text}")


def _connect_soon(home: Path, timeout_s: float) -> Mesh:
    """The socket of a node that is starting appears when it is ready; there is nothing to wait on
    but its name."""
    deadline_s = time.monotonic() + min(timeout_s, 5.0)
    while True:
        try:
            return connect(home)
        except Unreachable:
            if time.monotonic() > deadline_s:
                raise
            select.select([], [], [], 0.05)
