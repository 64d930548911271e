"""The warden of one testnet: a fork server that starts, holds, kills and reaps its nodes.

    python -m testnet.warden --name N --seed S --folder DIR [--lifeline FD]

It imports everything a node needs once, starts no thread, freezes the collector, and forks: a node
is up in a fraction of a second instead of the second that libp2p alone takes to import. jax never
comes in here: all zygotes of the cars are forks of one `meshnode.worker.zygote --listen`.

A request is a JSON line on the unix socket `warden`; some are answered later (`await`). Nodes are
children, so their pids cannot be reused behind our back. When the lifeline closes (its holder died,
however) or on `down`, all processes, homes, sockets and the state file go. If the warden itself is
killed, the kernel kills the nodes (PDEATHSIG) and the next command removes the files.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from meshnode.errors import MeshError, UsageError
from meshnode.node.home import make_home, run_base, run_dir
from meshnode.vehicle.sim import VEHICLE_FILE

from . import procfs

NODES_MAX: Final = 128
CLIENTS_MAX: Final = 32
LINE_BYTES_MAX: Final = 1 << 16
STOP_S_MAX: Final = 6.0
"""From SIGTERM to SIGKILL in `down`; a node drains for 2 s."""
SOCKET_NAME: Final = "warden"
STATE_VERSION: Final = 1
LISTEN: Final = "/ip4/127.0.0.1/tcp/0"
JOINED_MAX: Final = 2
PROBE_FILE: Final = "probe.cbor"
_PR_SET_PDEATHSIG: Final = 1


@dataclass(eq=False)
class Child:
    """A node, running or not; its home outlives its processes."""

    name: str
    role: str
    home: Path
    log: Path
    arguments: list[str]
    pid: int = 0
    ticks: int = 0
    pidfd: int = -1
    ready_fd: int = -1
    ready_line: bytes = b""
    peer: str = ""
    addrs: list[str] = field(default_factory=list)
    control: str = ""
    state: str = "new"  # new | starting | ready | frozen | ended
    code: int | None = None
    starts: int = 0

    def shown(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "home": str(self.home),
            "log": str(self.log),
            "pid": self.pid,
            "start_ticks": self.ticks,
            "peer": self.peer,
            "addrs": self.addrs,
            "control": self.control,
            "state": self.state,
            "code": self.code,
            "starts": self.starts,
        }


@dataclass(eq=False)
class Client:
    sock: socket.socket
    buffer: bytes = b""
    waits_for: list[str] = field(default_factory=list)


class Warden:
    def __init__(self, name: str, seed: int, folder: Path, state_path: Path) -> None:
        self.name = name
        self.seed = seed
        self.folder = folder
        self.state_path = state_path
        self.children: dict[str, Child] = {}
        self.poll = select.poll()
        self.clients: dict[int, Client] = {}
        self.zygote: subprocess.Popen[bytes] | None = None
        self.zygote_lifeline = -1
        self.created_unix_ms = time.time_ns() // 1_000_000
        self.ending = False
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket_path = folder / SOCKET_NAME

    # ---- the state file

    def write_state(self) -> None:
        state = {
            "version": STATE_VERSION,
            "name": self.name,
            "seed": self.seed,
            "pid": os.getpid(),
            "start_ticks": procfs.start_ticks(os.getpid()),
            "socket": str(self.socket_path),
            "folder": str(self.folder),
            "created_unix_ms": self.created_unix_ms,
            "zygote": self._zygote_shown(),
            "nodes": {name: child.shown() for name, child in self.children.items()},
        }
        draft = self.state_path.with_suffix(f".{os.getpid()}.part")
        draft.write_text(json.dumps(state, indent=1) + "\n")
        draft.replace(self.state_path)

    def _zygote_shown(self) -> dict[str, int] | None:
        if self.zygote is None:
            return None
        pid = self.zygote.pid
        return {"pid": pid, "start_ticks": procfs.start_ticks(pid)}

    # ---- nodes

    def start_zygote(self) -> None:
        """One process that imports jax; each car's zygote is its fork."""
        read_end, self.zygote_lifeline = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", "meshnode.worker.zygote"]
        command += ["--listen", str(self.zygote_path), "--lifeline", str(read_end)]
        with (self.folder / "log" / "zygote.log").open("wb") as log:
            self.zygote = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(read_end,),
                start_new_session=True,
            )
        os.close(read_end)

    @property
    def zygote_path(self) -> Path:
        return self.folder / "zygote"

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make node `name` (role car or submitter), or start it again in its old home."""
        name, role = str(request["name"]), str(request.get("role", "car"))
        child = self.children.get(name)
        if child is None:
            if len(self.children) >= NODES_MAX:
                raise UsageError(f"a testnet has at most {NODES_MAX} nodes")
            home = make_home(self.folder / "homes" / name)
            log = self.folder / "log" / f"{name}.log"
            child = Child(name, role, home, log, [str(a) for a in request.get("arguments", [])])
            if config := request.get("config"):
                (home / "config.toml").write_text(str(config))
            if role == "car":
                (home / VEHICLE_FILE).write_text("")  # parked and plugged, until somebody drives
            self.children[name] = child
        elif child.state in ("starting", "ready", "frozen"):
            raise UsageError(f"{name} runs already")
        self._fork(child)
        self.write_state()
        return child.shown()

    def _command_line(self, child: Child, ready_fd: int) -> list[str]:
        listen = child.addrs[0].split("/p2p/")[0] if child.addrs else LISTEN
        line = ["--home", str(child.home), "--cell", "testnet", "--listen", listen]
        line += ["--ready-fd", str(ready_fd)]
        line += ["--role", "submitter" if child.role == "submitter" else "testnet-car"]
        for other in self._joined(child):
            line += ["--join", other]
        if child.role != "submitter" and self.zygote is not None:
            line += ["--zygote-parent", str(self.zygote_path)]
        return line + child.arguments

    def _joined(self, child: Child) -> list[str]:
        """Addresses of the first cars that run: car-0 and car-1, unless they are down."""
        up = [
            f"{other.addrs[0]}"
            if "/p2p/" in other.addrs[0]
            else f"{other.addrs[0]}/p2p/{other.peer}"
            for other in self.children.values()
            if other is not child and other.role == "car" and other.state == "ready" and other.addrs
        ]
        return up[:JOINED_MAX]

    def _fork(self, child: Child) -> None:
        self._share_probe(child)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        line = self._command_line(child, write_end)
        gc.collect()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(child, parent, write_end, line)
        os.close(write_end)
        child.pid, child.ticks, child.pidfd = pid, procfs.start_ticks(pid), os.pidfd_open(pid)
        child.ready_fd, child.ready_line = read_end, b""
        child.state, child.code, child.control = "starting", None, ""
        child.starts += 1
        os.set_blocking(read_end, False)
        self.poll.register(child.pidfd, select.POLLIN)
        self.poll.register(read_end, select.POLLIN)

    def _share_probe(self, child: Child) -> None:
        """What the machine can compute is the same for all cars: it is probed once."""
        if child.role != "car" or (child.home / PROBE_FILE).exists():
            return
        for other in self.children.values():
            known = other.home / PROBE_FILE
            if other is not child and known.exists():
                with contextlib.suppress(OSError):
                    shutil.copyfile(known, child.home / PROBE_FILE)
                return

    def _become(self, child: Child, parent: int, ready_fd: int, line: list[str]) -> None:
        """In the fork: shed everything of the warden's, then be `python -m meshnode.node`."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
            os.setsid()  # Ctrl-C in the warden's terminal is not meant for the nodes
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for fd in (1, 2):
                os.dup2(log, fd)
            os.closerange(3, ready_fd)
            os.closerange(ready_fd + 1, 4096)
            _make_papers(child, self.seed)
            from meshnode.node.__main__ import run

            code = run(line)
        except MeshError as error:
            print(f"meshnode: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:  # noqa: BLE001 - the last line of a process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._running(str(request["name"]))
        number = signal.Signals(int(request.get("signal", signal.SIGKILL)))
        signal.pidfd_send_signal(child.pidfd, number)
        if number in (signal.SIGSTOP, signal.SIGCONT) and child.state in ("ready", "frozen"):
            child.state = "frozen" if number is signal.SIGSTOP else "ready"
            self.write_state()
        return child.shown()

    def _running(self, name: str) -> Child:
        child = self.children.get(name)
        if child is None:
            known = ", ".join(sorted(self.children))
            raise UsageError(f"testnet {self.name} has no node {name!r}; it has: {known}")
        if child.pidfd < 0:
            raise UsageError(f"{name} does not run")
        return child

    def _on_ready(self, child: Child) -> None:
        try:
            chunk = os.read(child.ready_fd, 65_536)
        except BlockingIOError:
            return
        child.ready_line += chunk
        if chunk and b"\n" not in child.ready_line and len(child.ready_line) < LINE_BYTES_MAX:
            return
        self.poll.unregister(child.ready_fd)
        os.close(child.ready_fd)
        child.ready_fd = -1
        if not chunk and b"\n" not in child.ready_line:
            return  # it ended before it was ready; its pidfd says how
        line = json.loads(child.ready_line)
        child.peer, child.addrs, child.control = line["peer"], line["addrs"], line["control"]
        child.state = "ready"
        self.write_state()

    def _on_end(self, child: Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        self.poll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        if child.ready_fd >= 0:
            self.poll.unregister(child.ready_fd)
            os.close(child.ready_fd)
            child.ready_fd = -1
        child.code = os.waitstatus_to_exitcode(status)
        child.state = "ended"
        if not self.ending:
            self.write_state()

    # ---- requests

    def answer(self, client: Client, request: dict[str, Any]) -> dict[str, Any] | None:
        match request.get("op"):
            case "start":
                return {"node": self.start(request)}
            case "kill":
                return {"node": self.kill(request)}
            case "status":
                nodes = {name: child.shown() for name, child in self.children.items()}
                return {"name": self.name, "seed": self.seed, "nodes": nodes, "pid": os.getpid()}
            case "await":
                client.waits_for = [str(name) for name in request["names"]]
                return self._awaited(client)
            case "down":
                self.ending = True
                return None  # the connection closes when nothing is left
            case other:
                raise UsageError(f"the warden knows no {other!r}")

    def _awaited(self, client: Client) -> dict[str, Any] | None:
        """The answer to an `await`: all ready, or one has ended; None while it is neither."""
        waited = [self.children[name] for name in client.waits_for if name in self.children]
        for child in waited:
            if child.state == "ended":
                client.waits_for = []
                text = f"{child.name} ended with exit code {child.code}: {last_line(child.log)}"
                return {"error": text, "exit_code": child.code}
        if all(child.state in ("ready", "frozen") for child in waited):
            client.waits_for = []
            return {"nodes": {child.name: child.shown() for child in waited}}
        return None

    def _read(self, client: Client) -> None:
        try:
            chunk = client.sock.recv(65_536)
        except OSError:
            chunk = b""
        client.buffer += chunk
        if not chunk or len(client.buffer) > LINE_BYTES_MAX:
            self._hang_up(client)
            return
        while b"\n" in client.buffer:
            line, client.buffer = client.buffer.split(b"\n", 1)
            try:
                reply = self.answer(client, json.loads(line))
            except MeshError as error:
                reply = {"error": str(error), "exit_code": error.exit_code}
            except (OSError, ValueError, KeyError, TypeError) as error:
                reply = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
            if reply is not None:
                self._send(client, reply)

    def _send(self, client: Client, reply: dict[str, Any]) -> None:
        try:
            client.sock.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            self._hang_up(client)

    def _hang_up(self, client: Client) -> None:
        found = self.clients.pop(client.sock.fileno(), None)
        if found is not None:
            self.poll.unregister(client.sock.fileno())
            client.sock.close()

    # ---- the loop

    def serve(self, lifeline: int | None) -> None:
        self.listener.bind(str(self.socket_path))
        self.listener.listen(CLIENTS_MAX)
        self.write_state()
        self.poll.register(self.listener.fileno(), select.POLLIN)
        if lifeline is not None:
            self.poll.register(lifeline, select.POLLIN)
        while not self.ending:
            for fd, _ in self.poll.poll():
                if fd == lifeline:
                    self.ending = True
                elif fd == self.listener.fileno():
                    self._accept()
                else:
                    self._on_fd(fd)
            for client in list(self.clients.values()):
                if client.waits_for and (reply := self._awaited(client)) is not None:
                    self._send(client, reply)

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        if len(self.clients) >= CLIENTS_MAX:
            sock.close()
            return
        self.clients[sock.fileno()] = Client(sock)
        self.poll.register(sock.fileno(), select.POLLIN)

    def _on_fd(self, fd: int) -> None:
        client = self.clients.get(fd)
        if client is not None:
            self._read(client)
            return
        for child in self.children.values():
            if fd == child.pidfd:
                self._on_end(child)
                return
            if fd == child.ready_fd:
                self._on_ready(child)
                return

    # ---- the end

    def close(self) -> None:
        """Nothing is left: nodes by SIGTERM, then SIGKILL; then the files."""
        for child in self.children.values():
            if child.pidfd >= 0:
                signal.pidfd_send_signal(child.pidfd, signal.SIGTERM)
                signal.pidfd_send_signal(child.pidfd, signal.SIGCONT)  # a frozen one ends too
        deadline_s = time.monotonic() + STOP_S_MAX
        for child in self.children.values():
            left_s = max(0.0, deadline_s - time.monotonic())
            if child.pidfd >= 0 and not select.select([child.pidfd], [], [], left_s)[0]:
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            if child.pidfd >= 0:
                self._on_end(child)
        if self.zygote is not None:
            os.close(self.zygote_lifeline)
            try:
                self.zygote.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self.zygote.kill()
                self.zygote.wait()
        self.listener.close()
        homes = [(child.home, child.addrs) for child in self.children.values()]
        remove_files(self.folder, self.state_path, homes)
        for client in list(self.clients.values()):
            self._hang_up(client)  # whoever asked for `down` sees the end of file now


def _make_papers(child: Child, seed: int) -> None:
    from meshnode.node import firstrun

    if not (child.home / firstrun.GENESIS_FILE).exists():
        now_ms = time.time_ns() // 1_000_000
        firstrun.init_seeded(child.home, seed, child.name, car=child.role == "car", now_ms=now_ms)


def last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
    return "it said nothing"


def remove_files(folder: Path, state_path: Path, homes: list[tuple[Path, list[str]]]) -> None:
    """Run directories, port locks, homes, state: all that a testnet ever made."""
    ports = run_base() / "ports"
    for home, addrs in homes:
        if home.exists():
            shutil.rmtree(run_dir(home), ignore_errors=True)
        for addr in addrs:
            parts = addr.split("/")
            _remove_port_lock(ports / f"tcp-{parts[2].replace(':', '_')}-{parts[4]}.lock")
    shutil.rmtree(folder, ignore_errors=True)
    state_path.unlink(missing_ok=True)


def _remove_port_lock(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while someone else has the port
            path.unlink()
        finally:
            os.close(fd)


def _import_node() -> None:
    """Everything that a node imports, and nothing that starts a thread."""
    import meshnode.executor
    import meshnode.ledger.journal
    import meshnode.node.__main__
    import meshnode.node.app
    import meshnode.node.firstrun
    import meshnode.overlay  # noqa: F401

    if procfs.threads() != 1:
        raise RuntimeError(f"{procfs.threads()} threads after the imports; a fork is not safe")


def _timed(what: str, step: Callable[[], None]) -> None:
    start_s = time.monotonic()
    step()
    print(f"{what}: {time.monotonic() - start_s:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testnet.warden")
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("--no-zygote", action="store_true")
    options = parser.parse_args()
    # Before numpy is imported: OpenBLAS starts its threads at import.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    warden = Warden(options.name, options.seed, options.folder, options.state)
    (options.folder / "log").mkdir(exist_ok=True)
    (options.folder / "homes").mkdir(mode=0o700, exist_ok=True)
    try:
        if not options.no_zygote:
            warden.start_zygote()
        _timed("import", _import_node)
        gc.collect()
        gc.freeze()
        warden.serve(options.lifeline)
    except SystemExit:
        pass
    finally:
        warden.close()


def _terminate(*_: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
