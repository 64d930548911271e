"""A hold on a running testnet: start one, ask its keeper, wait for what should become true.

Blocking, for commands and the demo; `testnet.Testnet` is the same for trio. Every wait is bounded,
and its error names the log that says more. Loads neither libp2p, jax nor trio.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import meshnode
from meshnode.errors import LocalResource, MeshError, Refused, TimedOut, Unreachable, UsageError

from . import state as states
from .plan import SUBMITTER, Plan, Tables
from .state import State

if TYPE_CHECKING:
    from meshnode.client import Mesh

ANSWER_S: Final = 10.0
UP_S_MAX: Final = 60.0
"""From the call to all nodes ready; on two busy cores eight take about five seconds."""
DOWN_S_MAX: Final = 20.0
CHANGE_S_MAX: Final = 5.0
POLL_S: Final = 0.03
"""Between two looks at a node's status, which wakes nobody."""
LOG_TAIL_BYTES: Final = 4_096
FAILED_LOGS: Final = "mesh-testnet-failed-"


class Handle:
    """A testnet that runs. `start` makes one, `attach` finds one by its name."""

    def __init__(self, name: str, lifeline: int | None = None) -> None:
        self.name = name
        self._lifeline = lifeline

    # ---- asking

    def ask(self, op: str, *, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        """One request to the keeper; Unreachable if it is no more, Refused with its reason."""
        path = states.socket_path(self.name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            try:
                sock.connect(str(path))
                sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
                line = b""
                while piece := sock.recv(1 << 18):
                    line += piece
            except TimeoutError:
                raise TimedOut(
                    f"the testnet {self.name} did not answer within {timeout_s:g} s"
                ) from None
            except OSError as error:
                raise Unreachable(
                    f"the testnet {self.name} does not answer ({error.strerror}); "
                    f"clean up: mesh testnet down {self.name}"
                ) from None
        if not line.endswith(b"\n"):
            raise Unreachable(f"the testnet {self.name} ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def state(self, *, after: int = 0, timeout_s: float = ANSWER_S) -> State:
        """What the keeper knows; with `after` the first state that is newer than that one."""
        found: State = self.ask("state", after=after, timeout_s=timeout_s)["state"]
        return found

    def node(self, name: str) -> dict[str, Any]:
        nodes: dict[str, dict[str, Any]] = self.state()["nodes"]
        if name not in nodes:
            raise UsageError(
                f"there is no node {name!r} in {self.name}; it has: {', '.join(nodes)}"
            )
        return nodes[name]

    def home(self, name: str) -> Path:
        return Path(self.node(name)["home"])

    def client(self, name: str = SUBMITTER) -> Mesh:
        """A connection to the control socket of a node."""
        from meshnode.client import connect

        return connect(self.home(name))

    # ---- waiting

    def wait_state(self, holds: Callable[[State], bool], timeout_s: float, what: str) -> State:
        """Until the keeper's state is as `holds` says; woken by its changes."""
        deadline_s = time.monotonic() + timeout_s
        change = 0
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimedOut(f"{what}: not within {timeout_s:g} s; see `mesh testnet logs`")
            try:
                found = self.state(after=change, timeout_s=min(left_s, CHANGE_S_MAX))
            except TimedOut:
                continue
            change = found["change"]
            if holds(found):
                return found

    def wait_up(self, names: list[str] | None = None, timeout_s: float = UP_S_MAX) -> State:
        """Until these nodes (all) are ready; LocalResource with its last words if one ends."""

        def holds(found: State) -> bool:
            for name in names or found["nodes"]:
                shown = found["nodes"][name]
                if shown["state"] == "dead":
                    raise LocalResource(
                        f"{name} ended with exit status {shown['exit']}: "
                        f"{last_line(Path(shown['log']))}; its log: {shown['log']}"
                    )
                if shown["state"] == "starting":
                    return False
            return True

        late = ", ".join(names) if names else f"the nodes of {self.name}"
        return self.wait_state(holds, timeout_s, f"{late} did not start")

    def wait_connected(self, cars: list[str] | None = None, timeout_s: float = UP_S_MAX) -> None:
        """Until the submitter has a usable advert of these cars (all)."""
        found = self.state()["nodes"]
        wanted = {found[name]["peer"]: name for name in cars or cars_of(found)}
        deadline_s = time.monotonic() + timeout_s
        pause = threading.Event()
        with self.client(SUBMITTER) as mesh:
            while True:
                known = known_cars(mesh.peers())
                if wanted.keys() <= known:
                    return
                if time.monotonic() > deadline_s:
                    missing = sorted(wanted[peer] for peer in wanted.keys() - known)
                    raise TimedOut(
                        f"the submitter has not heard of {', '.join(missing)} within "
                        f"{timeout_s:g} s; logs: {found[missing[0]]['log']}, "
                        f"{found[SUBMITTER]['log']}"
                    )
                pause.wait(POLL_S)

    # ---- breaking things

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; after one that ends the process, wait for its end."""
        self.ask("signal", name=name, signal=int(number))
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            self.wait_state(
                lambda found: bool(found["nodes"][name]["state"] == "dead"),
                DOWN_S_MAX,
                f"{name} did not end",
            )

    def start_node(self, name: str, timeout_s: float = UP_S_MAX) -> None:
        """A node that is dead comes back with the same home, key and port."""
        self.ask("start", name=name)
        self.wait_up([name], timeout_s)

    def restart(self, name: str, timeout_s: float = UP_S_MAX) -> None:
        shown = self.node(name)
        if shown["state"] == "frozen":
            self.thaw(name)
        if shown["state"] != "dead":
            self.kill(name, signal.SIGTERM)
        self.start_node(name, timeout_s)

    def freeze(self, name: str) -> None:
        """SIGSTOP: the node falls silent, its sockets stay open. Its worker goes on."""
        self.kill(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.kill(name, signal.SIGCONT)

    # ---- the end

    def detach(self) -> None:
        """From now on the testnet outlives this process."""
        self.ask("detach")
        self._close_lifeline()

    def down(self) -> None:
        take_down(self.name)
        self._close_lifeline()

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def cars_of(nodes: dict[str, Any]) -> list[str]:
    """Cars that run."""
    return [n for n, shown in nodes.items() if shown["role"] == "car" and shown["state"] == "up"]


def known_cars(peers: list[dict[str, Any]]) -> set[str]:
    """Peer ids, as text, of the cars whose adverts say that they may compute."""
    from meshnode.protocol.identity import peer_text

    return {
        peer_text(entry["peer"])
        for entry in peers
        if entry.get("car") is not None and entry["car"]["may_run"] and entry["car"]["slots"]
    }


# ---- from nothing to a testnet and back


def start(
    name: str,
    *,
    cars: int,
    seed: int,
    car_tables: Tables | None = None,
    submitter_tables: Tables | None = None,
    log_level: str = "WARNING",
    timeout_s: float = UP_S_MAX,
) -> Handle:
    """A testnet whose nodes are up and know each other. It ends with this process unless
    detached."""
    folder = Path(tempfile.mkdtemp(prefix=states.FOLDER_PREFIX))
    try:
        plan = Plan(
            states.check_name(name),
            seed,
            cars,
            str(folder),
            car_tables or {},
            submitter_tables or {},
            log_level,
        )
        (folder / "logs").mkdir(mode=0o700)
        plan.save()
        lifeline = _spawn(plan)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    handle = Handle(name, lifeline)
    try:
        handle.wait_up(timeout_s=timeout_s)
        handle.wait_connected(timeout_s=timeout_s)
    except BaseException as error:
        kept = _keep_logs(plan)
        with contextlib.suppress(MeshError):
            handle.down()
        if isinstance(error, Unreachable):  # the keeper fell over
            why = last_line(kept / plan.keeper_log.name)
            raise LocalResource(f"the testnet {name} did not start: {why}; logs: {kept}") from None
        if isinstance(error, MeshError):
            text = str(error).replace(str(folder / "logs"), str(kept))
            raise type(error)(text) from None
        raise
    return handle


def _spawn(plan: Plan) -> int:
    """The keeper as a process of its own session; the end of its lifeline that is ours."""
    states.make_state_folder()
    reading, writing = os.pipe()
    try:
        with _listen(plan.name) as listener, plan.keeper_log.open("ab") as log:
            command = [sys.executable, "-P", "-m", "testnet.keeper", plan.folder]
            command += ["--listen-fd", str(listener.fileno()), "--lifeline-fd", str(reading)]
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(), reading),
                start_new_session=True,  # Ctrl-C at the terminal is not for it
                env=_environment(),
            )
    except OSError as error:
        os.close(writing)
        raise LocalResource(f"cannot start the testnet: {error.strerror}") from None
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    return writing


@contextmanager
def _listen(name: str) -> Iterator[socket.socket]:
    """The keeper's socket, bound: who has it owns the name."""
    path = states.socket_path(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.bind(str(path))
        except OSError:
            if _answers(name):
                raise LocalResource(
                    f"a testnet {name} runs already; end it: mesh testnet down {name}"
                ) from None
            take_down(name)  # what a killed one has left
            sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(64)
        yield sock


def _answers(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(str(states.socket_path(name)))
        except OSError:
            return False
        return True


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    # Before numpy is imported: OpenBLAS starts its threads at import, and the keeper forks.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env[name] = "1"
    source = str(Path(meshnode.__path__[0]).parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (source, env.get("PYTHONPATH"))))
    return env


def attach(name: str) -> Handle:
    """The running testnet of this name; UsageError if there is none."""
    if states.read_state(name) is None:
        there = ", ".join(states.names()) or "none"
        raise UsageError(f"there is no testnet {name!r} (there are: {there}); mesh testnet up")
    return Handle(name)


def take_down(name: str) -> bool:
    """End a testnet, whatever state it is in; False if there was none. May be called again."""
    found = states.read_state(name)
    keeper = None if found is None else found["keeper"]
    if keeper is not None and states.same_process(keeper):
        with contextlib.suppress(MeshError):
            Handle(name).ask("down", timeout_s=DOWN_S_MAX)
            _wait_gone(keeper, ANSWER_S)
        found = states.read_state(name)
        if found is None:
            return True
    if found is not None:
        states.remove_all(found)
        return True
    had_socket = states.socket_path(name).exists()
    states.socket_path(name).unlink(missing_ok=True)
    return had_socket


def _wait_gone(process: State, timeout_s: float) -> None:
    try:
        pidfd = os.pidfd_open(process["pid"])
    except OSError:
        return
    try:
        if states.same_process(process):
            states.wait_pidfd(pidfd, timeout_s)
    finally:
        os.close(pidfd)


# ---- logs


def last_line(log: Path) -> str:
    """What a process said last."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it said nothing"


def _keep_logs(plan: Plan) -> Path:
    """Out of the folder that is about to go; one set per name, the newest."""
    kept = Path(tempfile.gettempdir()) / f"{FAILED_LOGS}{plan.name}"
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(plan.path / "logs", kept)
    return kept
