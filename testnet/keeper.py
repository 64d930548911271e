"""The process that holds a testnet: imports libp2p once, forks every node, reaps, cleans up.

Started by `handle` as `python -m testnet.keeper FOLDER`. One thread and no event loop, because a
fork of a process with threads may deadlock and trio must start fresh in each child:

    plan > ports > jax parent (imports beside us) > libp2p > nodes, each a fork > requests, deaths

A node that is forked shares our pages (65 MB) and is up in a tenth of the time of an interpreter;
its zygote is forked by the one jax parent in the same way. The probe of the accelerators runs once,
in a fork that uses the executor as a node does, and every car starts with its answer.

How it ends: request `down`, SIGTERM, or end of file on the lifeline, which its owner's death
brings about. Children die with it (PR_SET_PDEATHSIG), so that even a SIGKILL leaves files only,
and those are named in the state that `mesh testnet down` reads.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from . import state as states
from .plan import PRESET, PROBE_FILE, SUBMITTER, ZYGOTE_SOCKET, Plan

REQUEST_BYTES_MAX: Final = 65_536
REQUEST_S_MAX: Final = 2.0
READY_BYTES_MAX: Final = 65_536
PARKED_MAX: Final = 64
"""Clients that wait for a change at a time."""
PROBE_S_MAX: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1
_SIGNALS: Final = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGCONT}
)


class BadRequest(Exception):
    """Becomes the error line of an answer."""


@dataclass(slots=True)
class _Node:
    name: str
    pid: int
    pidfd: int
    ready_fd: int  # -1 once its line has come
    line: bytes = b""


class Keeper:
    def __init__(self, plan: Plan, listener: socket.socket, lifeline: int | None) -> None:
        self._plan = plan
        self._listener = listener
        self._lifeline = lifeline
        self._began_s = time.monotonic()
        self._poll = select.poll()
        self._on: dict[int, Callable[[], None]] = {}
        self._nodes: dict[str, _Node] = {}
        self._parked: list[tuple[socket.socket, int]] = []
        self._change = 0
        self._ending = False
        self._jax: subprocess.Popen[bytes] | None = None
        self._jax_lifeline = -1
        self._probe: tuple[int, int] | None = None  # pid, pidfd
        self._go = os.pipe()  # cars start at its end of file: the probe has been
        self._ports: dict[str, socket.socket] = {}
        self._last_words: socket.socket | None = None
        self._state: states.State = {}

    # ---- life

    def run(self) -> None:
        try:
            self._set_up()
            self._import()
            self._start_probe()
            for name in self._plan.names:
                self._fork_node(name)
            self._mark("forked_s")
            self._publish()
            while not self._ending:
                for fd, _ in self._poll.poll():
                    handler = self._on.get(fd)
                    if handler is not None:
                        handler()
        finally:
            self._end()

    def _set_up(self) -> None:
        plan = self._plan
        self._ports = {name: _reserve_port() for name in plan.names}
        ports = {name: sock.getsockname()[1] for name, sock in self._ports.items()}
        from meshnode.node.founding import seeded_genesis, seeded_key
        from meshnode.node.home import run_dir
        from meshnode.protocol.identity import peer_text

        peers = {name: peer_text(seeded_key(plan.seed, f"node/{name}").peer) for name in plan.names}
        nodes: dict[str, Any] = {}
        for name in plan.names:
            home = plan.home(name)
            home.mkdir(mode=0o700, parents=True)
            (home / "config.toml").write_text(plan.config_toml(name, ports, peers))
            nodes[name] = {
                "role": "submitter" if name == SUBMITTER else "car",
                "home": str(home),
                "run": str(run_dir(home)),
                "log": str(plan.log(name)),
                "port": ports[name],
                "peer": peers[name],
                "state": "starting",
                "pid": 0,
                "start_ticks": 0,
                "exit": None,
                "starts": 0,
            }
        self._state = {
            "version": states.STATE_VERSION,
            "name": plan.name,
            "seed": plan.seed,
            "network": seeded_genesis(plan.seed).ident.hex(),
            "folder": plan.folder,
            "log": str(plan.keeper_log),
            "created_unix_ms": time.time_ns() // 1_000_000,
            "keeper": _process(os.getpid()),
            "jax": None,
            "nodes": nodes,
            "timings": {},
        }
        self._publish()
        self._watch(self._listener.fileno(), self._accept)
        if self._lifeline is not None:
            self._watch(self._lifeline, self._stop)
        self._watch_signals()

    def _watch_signals(self) -> None:
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(writing.detach())
        fd = reading.detach()
        self._watch(fd, self._stop)

    def _import(self) -> None:
        """Everything a node needs, once, in the pages that all of them share."""
        from meshnode.executor.forks import worker_environment

        self._start_jax(worker_environment())
        import sqlite3  # noqa: F401

        import meshnode.ledger.store
        import meshnode.node.app
        import meshnode.node.firstrun  # noqa: F401
        from jaxkernels import registry

        registry.artifacts()
        threads = _thread_count()
        if threads != 1:
            raise RuntimeError(f"{threads} threads after the imports; a fork would not be safe")
        gc.collect()
        gc.freeze()  # the collector would write to, and so unshare, every page
        self._mark("imported_s")

    def _stop(self) -> None:
        self._ending = True

    def _end(self) -> None:
        """Nothing is left afterwards: no process, no file, no socket."""
        for node in self._nodes.values():
            _kill(node.pidfd)
        if self._probe is not None:
            _kill(self._probe[1])
        if self._jax is not None:
            os.close(self._jax_lifeline)
            self._jax.kill()  # its zygotes and their workers die with it
            self._jax.wait()
        for node in self._nodes.values():
            os.waitpid(node.pid, 0)
        if self._probe is not None:
            os.waitpid(self._probe[0], 0)
        self._wait_for_workers()
        if self._state:
            states.remove_files(self._state)
        else:
            shutil.rmtree(self._plan.folder, ignore_errors=True)
            states.socket_path(self._plan.name).unlink(missing_ok=True)
        if self._last_words is not None:
            _answer(self._last_words, {"ok": True})

    def _wait_for_workers(self) -> None:
        """Grandchildren are not ours to reap, but their files must be closed before ours go."""
        deadline_s = time.monotonic() + states.KILL_S_MAX
        while states.group_size(os.getpid()) > 1 and time.monotonic() < deadline_s:
            select.select([], [], [], 0.01)

    # ---- state

    def _publish(self) -> None:
        self._change += 1
        self._state["change"] = self._change
        states.write_state(self._state)
        parked, self._parked = self._parked, []
        for client, after in parked:
            self._answer_state(client, after)

    def _mark(self, what: str) -> None:
        elapsed_s = round(time.monotonic() - self._began_s, 3)
        self._state["timings"].setdefault(what, elapsed_s)

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._on[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._on[fd]
        os.close(fd)

    # ---- the jax parent and the probe

    def _start_jax(self, environment: dict[str, str]) -> None:
        reading, self._jax_lifeline = os.pipe()
        command = [sys.executable, "-P", "-m", "meshnode.worker.zygote"]
        command += ["--listen", str(self._plan.path / ZYGOTE_SOCKET), "--lifeline", str(reading)]
        with self._plan.log("zygote").open("ab") as log:
            self._jax = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(reading,),
                env=environment,
            )
        os.close(reading)
        self._state["jax"] = {**_process(self._jax.pid), "state": "starting"}
        assert self._jax.stdout is not None
        self._watch(self._jax.stdout.fileno(), self._hear_jax)

    def _hear_jax(self) -> None:
        assert self._jax is not None and self._jax.stdout is not None
        fd = self._jax.stdout.fileno()
        said = os.read(fd, READY_BYTES_MAX)
        self._state["jax"]["state"] = "up" if said else "dead"
        self._mark("jax_s")
        if not said:
            self._poll.unregister(fd)
            del self._on[fd]
        self._publish()

    def _start_probe(self) -> None:
        path = self._plan.path
        cache = path / PROBE_FILE

        def body() -> int:
            return _probe_once(path / ZYGOTE_SOCKET, path, cache)

        pid = self._fork(body, (), self._plan.log("probe"))
        pidfd = os.pidfd_open(pid)
        self._probe = (pid, pidfd)
        self._watch(pidfd, self._probed)

    def _probed(self) -> None:
        assert self._probe is not None
        pid, pidfd = self._probe
        self._probe = None
        os.waitpid(pid, 0)
        self._unwatch(pidfd)
        # Even if it failed: then each car probes for itself, and says what is wrong.
        os.close(self._go[1])
        self._go = (self._go[0], -1)
        self._mark("probed_s")

    # ---- nodes

    def _fork_node(self, name: str) -> None:
        reading, writing = os.pipe()
        plan, go = self._plan, self._go[0]
        waits = name != SUBMITTER

        def body() -> int:
            return _run_node(plan, name, go if waits else -1, writing)

        pid = self._fork(body, (writing, go), plan.log(name))
        os.close(writing)
        os.set_blocking(reading, False)
        node = _Node(name, pid, os.pidfd_open(pid), reading)
        self._nodes[name] = node
        shown = self._state["nodes"][name]
        shown.update(state="starting", exit=None, starts=shown["starts"] + 1, **_process(pid))
        self._watch(node.ready_fd, lambda: self._hear(node))
        self._watch(node.pidfd, lambda: self._dead(node))

    def _hear(self, node: _Node) -> None:
        piece = os.read(node.ready_fd, READY_BYTES_MAX)
        node.line += piece
        if piece and not node.line.endswith(b"\n") and len(node.line) < READY_BYTES_MAX:
            return
        self._unwatch(node.ready_fd)
        node.ready_fd = -1
        if node.line.endswith(b"\n"):
            self._state["nodes"][node.name].update(
                state="up", addrs=json.loads(node.line)["addrs"]
            )
            if all(shown["state"] == "up" for shown in self._state["nodes"].values()):
                self._mark("up_s")
            self._publish()

    def _dead(self, node: _Node) -> None:
        _, status = os.waitpid(node.pid, 0)
        if node.ready_fd >= 0:
            self._unwatch(node.ready_fd)
        self._unwatch(node.pidfd)
        del self._nodes[node.name]
        shown = self._state["nodes"][node.name]
        shown.update(state="dead", exit=os.waitstatus_to_exitcode(status), pid=0, start_ticks=0)
        self._publish()

    def _fork(self, body: Callable[[], int], keep: tuple[int, ...], log: Path) -> int:
        """The child runs `body` and ends with what it returns."""
        keeper = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            _become_child(keeper, keep, log)
            status = body()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001 - a fork must not return into its parent's frames
            logging.getLogger("testnet").exception("the process failed")
        finally:
            os._exit(status)

    # ---- requests

    def _accept(self) -> None:
        client, _ = self._listener.accept()  # the socket's folder is private: it is ourselves
        client.settimeout(REQUEST_S_MAX)
        try:
            line = b""
            while not line.endswith(b"\n") and len(line) < REQUEST_BYTES_MAX:
                piece = client.recv(REQUEST_BYTES_MAX)
                if not piece:
                    break
                line += piece
            request = json.loads(line)
            self._serve(client, request)
        except BadRequest as error:
            _answer(client, {"error": str(error)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            _answer(client, {"error": f"the request cannot be understood: {error!r}"})

    def _serve(self, client: socket.socket, request: dict[str, Any]) -> None:
        op = request["op"]
        if op == "state":
            self._answer_state(client, request.get("after", 0))
            return
        if op == "down":
            self._last_words = client
            self._stop()
            return
        if op == "detach":
            if self._lifeline is not None:
                self._unwatch(self._lifeline)
                self._lifeline = None
        elif op == "start":
            name = self._known(request["name"])
            if name in self._nodes:
                raise BadRequest(f"{name} runs already")
            self._fork_node(name)
            self._publish()
        elif op == "signal":
            self._signal(self._known(request["name"]), signal.Signals(request["signal"]))
        else:
            raise BadRequest(f"there is no request {op!r}")
        _answer(client, {"ok": True})

    def _known(self, name: str) -> str:
        if name not in self._state["nodes"]:
            there = ", ".join(self._state["nodes"])
            raise BadRequest(f"there is no node {name!r} in {self._plan.name}; it has: {there}")
        return name

    def _signal(self, name: str, number: signal.Signals) -> None:
        node = self._nodes.get(name)
        if node is None:
            raise BadRequest(f"{name} does not run; start it: mesh testnet restart {name}")
        if number not in _SIGNALS:
            raise BadRequest(f"{number.name} is not sent to nodes")
        signal.pidfd_send_signal(node.pidfd, number)
        shown = self._state["nodes"][name]
        if number is signal.SIGSTOP:
            shown["state"] = "frozen"
            self._publish()
        elif number is signal.SIGCONT and shown["state"] == "frozen":
            shown["state"] = "up" if node.ready_fd < 0 else "starting"
            self._publish()

    def _answer_state(self, client: socket.socket, after: int) -> None:
        if after < self._change:
            _answer(client, {"ok": True, "state": self._state})
        elif len(self._parked) < PARKED_MAX:
            self._parked.append((client, after))
        else:
            _answer(client, {"error": f"{PARKED_MAX} clients wait already"})


# ---- what children do


def _become_child(keeper: int, keep: tuple[int, ...], log: Path) -> None:
    """Die with the keeper, hold nobody's files, talk into a log of one's own."""
    signal.set_wakeup_fd(-1)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != keeper:  # it ended between fork and prctl
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own is closed already


def _run_node(plan: Plan, name: str, go: int, ready_fd: int) -> int:
    """A node's home, if it has none yet, and then the node itself, as `python -m meshnode.node`."""
    from meshnode import config
    from meshnode.node import app
    from meshnode.node.firstrun import GENESIS_FILE, init_seeded

    logging.basicConfig(
        level=plan.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    home = plan.home(name)
    if not (home / GENESIS_FILE).exists():
        now_ms = time.time_ns() // 1_000_000
        init_seeded(home, plan.seed, name, car=name != SUBMITTER, now_ms=now_ms)
    if go >= 0:
        os.read(go, 1)  # end of file: the probe's answer is there
        probe = plan.path / PROBE_FILE
        if probe.exists():
            shutil.copyfile(probe, home / PROBE_FILE)
    return app.main(home, config.load(home, config.PRESETS[PRESET]()), ready_fd)


def _probe_once(zygote: Path, run_dir: Path, cache: Path) -> int:
    """The executor's own probe, its answer kept in `cache`."""
    import trio

    from meshnode.executor import BuiltinArtifacts, ExecutorConfig, open_executor
    from meshnode.protocol.events import WorkerClasses

    class NoBlobs:
        def open_blob(self, blob_id: bytes) -> int:
            raise KeyError(blob_id)

    async def ask() -> int:
        config = ExecutorConfig(run_dir, zygote_parent=zygote, probe_cache=cache)
        with trio.fail_after(PROBE_S_MAX):
            async with open_executor(config, NoBlobs(), BuiltinArtifacts()) as executor:
                executor.probe()
                async for event in executor.events:
                    if isinstance(event, WorkerClasses):
                        return 0 if event.classes else 1
        return 1

    while not zygote.exists():  # bound by the jax parent before it imports anything heavy
        select.select([], [], [], 0.01)
    return trio.run(ask)


# ---- small things


def _reserve_port() -> socket.socket:
    """Bound and never listening, for the testnet's life: a node may listen there (both say
    SO_REUSEADDR), and comes back there; nobody's outgoing connection takes it meanwhile."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))  # without SO_REUSEADDR, or two might get the same
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _process(pid: int) -> dict[str, int]:
    return {"pid": pid, "start_ticks": states.start_ticks(pid) or 0}


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def _answer(client: socket.socket, fields: dict[str, Any]) -> None:
    try:
        with client:
            client.sendall(json.dumps(fields).encode() + b"\n")
    except OSError:
        return  # nobody waits for it any more


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m testnet.keeper", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--lifeline-fd", type=int)
    options = parser.parse_args()
    plan = Plan.load(options.folder)
    Keeper(plan, socket.socket(fileno=options.listen_fd), options.lifeline_fd).run()
    sys.exit(0)


if __name__ == "__main__":
    main()
