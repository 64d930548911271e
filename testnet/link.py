"""The other end of a warden: start one, ask it, take it down, clean up after one that was killed.

Synchronous and bounded; `command` calls it as it is, `testnet` from threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import meshnode
from meshnode.cli.frame import path_of_testnet, read_testnet
from meshnode.errors import LocalResource, MeshError, TimedOut, UsageError
from meshnode.node.home import run_base

from . import procfs
from .warden import STOP_S_MAX, remove_files

WARDEN_S_MAX: Final = 60.0
"""From the start of a warden to its socket: the imports of libp2p on a cold disk."""
ANSWER_S: Final = 30.0
DOWN_S_MAX: Final = STOP_S_MAX + 10.0
DEFAULT_NAME: Final = "default"


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name):
        raise UsageError(f"{name!r} is no name of a testnet: use letters, digits and dashes")
    return name


@dataclass
class Link:
    """A connection to the warden of one testnet."""

    name: str
    sock: socket.socket
    process: subprocess.Popen[bytes] | None = None  # the warden, if we started it
    _buffer: bytes = b""

    @classmethod
    def to(cls, name: str) -> Self:
        state = read_testnet(check_name(name))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(ANSWER_S)
            sock.connect(state["socket"])
        except OSError as error:
            sock.close()
            raise LocalResource(
                f"the testnet {name} was killed ({error.strerror}); "
                f"clear it away: mesh testnet down --name {name}"
            ) from None
        return cls(name, sock)

    def ask(self, op: str, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        self.sock.settimeout(timeout_s)
        try:
            self.sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            while b"\n" not in self._buffer:
                chunk = self.sock.recv(65_536)
                if not chunk:
                    raise LocalResource(f"the testnet {self.name} has ended")
                self._buffer += chunk
        except TimeoutError:
            raise TimedOut(f"testnet {self.name}: no answer to {op} in {timeout_s:g} s") from None
        except OSError as error:
            raise LocalResource(f"the testnet {self.name} has ended: {error}") from None
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise {2: UsageError, 8: LocalResource}.get(reply["exit_code"], MeshError)(
                reply["error"]
            )
        return reply

    def close(self) -> None:
        """The testnet goes on without this connection."""
        self.sock.close()
        if self.process is not None:
            self.process.returncode = 0  # not ours to wait for, and Popen would complain

    def reap(self) -> None:
        """After `down`: no zombie stays in the process that started the warden."""
        self.sock.close()
        if self.process is not None:
            self.process.wait(DOWN_S_MAX)


def start_warden(
    name: str,
    seed: int,
    folder: Path | None = None,
    lifeline: int | None = None,
    zygote: bool = True,
) -> Link:
    """Start a testnet without nodes. With a `lifeline` it ends when that pipe closes."""
    check_name(name)
    state_path = path_of_testnet(name)
    make_folders(state_path)
    if state_path.exists():
        state = read_testnet(name)
        if procfs.alive(state["pid"], state["start_ticks"]):
            raise UsageError(
                f"testnet {name} runs already; end it: mesh testnet down --name {name}"
            )
        down(name)
    # Homes hold weights: hundreds of MB. A runtime directory is often a small tmpfs, so they lie
    # where temporary files do, and only the state lies there.
    root = folder or Path(tempfile.gettempdir())
    place = Path(tempfile.mkdtemp(prefix=f"mesh-{name}-", dir=root))
    command = [sys.executable, "-m", "testnet.warden", "--name", name, "--seed", str(seed)]
    command += ["--folder", str(place), "--state", str(state_path)]
    if lifeline is not None:
        command += ["--lifeline", str(lifeline)]
    if not zygote:
        command.append("--no-zygote")
    # Kept open: a warden that fails removes its folder, and its last words are what one needs.
    with (place / "warden.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=() if lifeline is None else (lifeline,),
            start_new_session=True,
            env=environment(),
            cwd="/",
        )
        linked = _await_warden(name, process, place, log)
    linked.process = process
    return linked


def environment() -> dict[str, str]:
    """Ours, with the packages that we ourselves were loaded from, wherever we are called."""
    sources = str(Path(meshnode.__file__).resolve().parent.parent)
    paths = [sources, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _await_warden(name: str, process: subprocess.Popen[bytes], place: Path, log: BinaryIO) -> Link:
    deadline_s = time.monotonic() + WARDEN_S_MAX
    while time.monotonic() < deadline_s:
        with contextlib.suppress(MeshError):
            return Link.to(name)
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
        text = said[-1] if said else "it said nothing"
        shutil.rmtree(place, ignore_errors=True)
        raise LocalResource(f"the testnet {name} could not start: {text}")
    process.kill()
    process.wait()
    down(name)
    shutil.rmtree(place, ignore_errors=True)
    raise TimedOut(f"the testnet {name} did not start within {WARDEN_S_MAX:g} s")


def make_folders(state_path: Path) -> None:
    for folder in (run_base(), state_path.parent):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise LocalResource(f"cannot make {folder}: {error.strerror}") from None


def down(name: str) -> bool:
    """End a testnet; False if there is none. Kills only what its own state names."""
    path = path_of_testnet(check_name(name))
    if not path.exists():
        return False
    try:
        state = read_testnet(name)
    except MeshError:
        path.unlink(missing_ok=True)
        return True
    warden = (state["pid"], state["start_ticks"])
    if procfs.alive(*warden):
        with contextlib.suppress(MeshError, OSError):
            link = Link.to(name)
            link.sock.sendall(b'{"op": "down"}\n')
            link.close()
        if not procfs.wait_gone(*warden, DOWN_S_MAX):
            procfs.end(*warden)
            procfs.wait_gone(*warden, 5.0)
    if path.exists():
        _clear(state, path)
    return True


def _clear(state: dict[str, Any], path: Path) -> None:
    """After a warden that was killed: its nodes died with it, unless they are only just dying."""
    nodes = list(state["nodes"].values())
    left = [(node["pid"], node["start_ticks"]) for node in nodes]
    if state.get("zygote"):
        left.append((state["zygote"]["pid"], state["zygote"]["start_ticks"]))
    for pid, ticks in left:
        if pid and procfs.end(pid, ticks, signal.SIGKILL):
            procfs.wait_gone(pid, ticks, 5.0)
    homes = [(Path(node["home"]), list(node["addrs"])) for node in nodes]
    remove_files(Path(state["folder"]), path, homes)


def names() -> list[str]:
    """Testnets of this user, running or left behind."""
    return sorted(path.stem for path in (run_base() / "testnet").glob("*.json"))
