"""A testnet of real processes: up, kill, restart, down; nothing stays, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import trio

from meshnode.cli.frame import path_of_testnet, read_testnet
from meshnode.node.home import run_base, run_dir
from testnet import link, procfs
from testnet.testnet import Testnet

GONE_S = 20.0
SCRIPT = """
import sys, trio
from testnet.testnet import Testnet
async def main():
    async with Testnet(1, 7, sys.argv[1], meet=False) as net:
        print("up", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def until(condition: Callable[[], bool], what: str, timeout_s: float = GONE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    pause = subprocess.Popen(["sleep", str(timeout_s)])
    try:
        while not condition():
            assert time.monotonic() < deadline_s, what
            with contextlib.suppress(subprocess.TimeoutExpired):
                pause.wait(0.05)
    finally:
        pause.kill()
        pause.wait()


class Traces:
    """Everything that a running testnet has on this machine."""

    def __init__(self, state: dict[str, Any]) -> None:
        warden = psutil.Process(state["pid"])
        family = [warden, *warden.children(recursive=True)]
        self.processes = [(p.pid, procfs.start_ticks(p.pid)) for p in family]
        homes = [Path(node["home"]) for node in state["nodes"].values()]
        self.paths = [Path(state["folder"]), path_of_testnet(state["name"])]
        self.paths += [run_dir(home) for home in homes]
        for node in state["nodes"].values():
            for addr in node["addrs"]:
                self.paths.append(run_base() / "ports" / f"tcp-127.0.0.1-{addr.split('/')[4]}.lock")

    def left(self) -> list[object]:
        alive = [pid for pid, ticks in self.processes if procfs.alive(pid, ticks)]
        return [*alive, *(path for path in self.paths if path.exists())]


def test_up_kill_restart_down_and_nothing_stays() -> None:
    async def main() -> Traces:
        async with Testnet(2, 7) as net:
            assert {node["state"] for node in net.nodes.values()} == {"ready"}
            traces = Traces(read_testnet(net.name))
            assert len(traces.processes) >= 5  # warden, zygote, three nodes
            assert traces.left()
            first = net.nodes["car-1"]
            await net.kill("car-1")
            assert net.nodes["car-1"]["code"] == -signal.SIGKILL
            await net.restart("car-1")
            again = net.nodes["car-1"]
            assert again["pid"] != first["pid"] and again["addrs"] == first["addrs"]
            await net.wait(net.all_met, 30.0, "the submitter knows car-1 again")
            await net.freeze("car-0")
            assert net.nodes["car-0"]["state"] == "frozen"
            with trio.fail_after(20):
                await net.add_car()
            return Traces(read_testnet(net.name))

    traces = trio.run(main)
    assert traces.left() == []


def test_a_killed_owner_leaves_nothing() -> None:
    name = f"orphan-{os.getpid()}"
    owner = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name], stdout=subprocess.PIPE, env=link.environment()
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        traces = Traces(read_testnet(name))
    finally:
        owner.kill()
        owner.communicate()
    until(lambda: traces.left() == [], f"left after the owner was killed: {traces.left()}")


def test_a_killed_warden_takes_its_nodes_along_and_down_clears_the_files() -> None:
    name = f"headless-{os.getpid()}"
    trio.run(Testnet(1, 7, name, meet=False).up)
    state = read_testnet(name)
    traces = Traces(state)
    assert procfs.end(state["pid"], state["start_ticks"], signal.SIGKILL)
    alive = [pair for pair in traces.processes if pair[0] != state["pid"]]
    until(lambda: not any(procfs.alive(*pair) for pair in alive), "nodes outlive their warden")
    assert link.down(name) and not link.down(name)
    assert traces.left() == []


def test_down_ends_only_what_its_own_state_names() -> None:
    name = f"reused-{os.getpid()}"
    trio.run(Testnet(1, 7, name, meet=False).up)
    path = path_of_testnet(name)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        state = path.read_text()
        real = read_testnet(name)
        warden = f'"pid": {real["pid"]},'
        # a pid that now belongs to someone else: the start time tells
        path.write_text(state.replace(warden, f'"pid": {bystander.pid},', 1))
        assert link.down(name)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        procfs.end(real["pid"], real["start_ticks"], signal.SIGTERM)
        procfs.wait_gone(real["pid"], real["start_ticks"], GONE_S)
