"""Two car processes and a submitter in this process: the mesh that the benches measure.

The submitter is composed in the caller's process, as Ray's driver and Dask's client are; the cars
are whole nodes of their own, with journal, overlay, receipts and worker.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshnode import config
from meshnode.node import firstrun
from meshnode.node.app import open_node
from meshnode.node.running import RunningNode

SEED = 11
READY_S_MAX = 120


@dataclasses.dataclass(frozen=True, slots=True)
class Car:
    name: str
    process: subprocess.Popen[bytes]
    addrs: tuple[str, ...]


def start_car(folder: Path, name: str, join: tuple[str, ...], *, role: str = "testnet-car") -> Car:
    """`role` is the preset: `car` is a car of its own, `testnet-car` one of many on a machine."""
    home = folder / name
    firstrun.init_seeded(home, SEED, name, car=True, now_ms=time.time_ns() // 1_000_000)
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "meshnode.node", "--home", str(home), "--role", role]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--cell", "bench", "--ready-fd", str(writing)]
    for addr in join:
        command += ["--join", addr]
    process = subprocess.Popen(command, pass_fds=(writing,))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        ready = json.loads(pipe.readline())
    return Car(name, process, tuple(ready["addrs"]))


def submitter_config(join: tuple[str, ...]) -> config.NodeConfig:
    preset = config.submitter()
    node = dataclasses.replace(
        preset.node,
        provides=False,
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=join,
        cell="bench",
    )
    return dataclasses.replace(preset, node=node)


@asynccontextmanager
async def small_mesh(cars: int, role: str) -> AsyncIterator[tuple[RunningNode, list[Car]]]:
    """A submitter and its cars, all of them connected and with a worker class known."""
    folder = Path(tempfile.mkdtemp(prefix="meshbench-"))
    started: list[Car] = []
    try:
        for number in range(cars):
            join = started[0].addrs if started else ()
            started.append(start_car(folder, f"car-{number}", join, role=role))
        home = folder / "submitter"
        firstrun.init_seeded(home, SEED, "submitter", car=False, now_ms=time.time_ns() // 1_000_000)
        addrs = tuple(addr for car in started for addr in car.addrs)
        async with open_node(home, submitter_config(addrs)) as own:
            await until(lambda: len(usable_cars(own)) >= cars, READY_S_MAX)
            yield own, started
    finally:
        for car in started:
            car.process.terminate()
        for car in started:
            try:
                car.process.wait(20)
            except subprocess.TimeoutExpired:
                car.process.kill()
                car.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def usable_cars(own: RunningNode) -> list[bytes]:
    return [car.peer for car in own.view().cars if car.may_run]


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float) -> None:
    with trio.fail_after(seconds):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await trio.sleep(0.02)


def run_bench(
    cars: int,
    body: Callable[[RunningNode, list[Car]], Awaitable[None]],
    *,
    role: str = "testnet-car",
) -> None:
    async def main() -> None:
        async with small_mesh(cars, role) as (own, started):
            await body(own, started)

    trio.run(main)
