"""`bench recall`: the driver is back, and how long until nothing of the mesh computes in the car.

A car of a testnet has a worker in the middle of a computation of six seconds, one XLA call that
hears nothing. Then its readings change, by a databroker's publish (adapter `vss`) or in a file
(`sim`), and the clock stops when the worker's process is gone: a pidfd, so the kernel says it.
Between two recalls the car parks again and gets the next run. The floor is the grace of 100 ms, in
which a unit that hears may end.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from jaxkernels import host, registry
from meshnode.node.vehicle_watch import RECALL_GRACE_MS
from meshnode.vehicle.vss import signals
from testnet import driving
from testnet.testnet import Testnet
from tests.node.vss_broker import Broker

from .figures import Figures, percentile, report

if TYPE_CHECKING:
    from meshnode.client import Mesh

SEED = 41
RECALLS = 200
QUICK = 20
WAIT_S = 30.0
BUSY_TICKS = 2  # 20 ms of CPU time in the run: the worker is inside of XLA's loop
UNIT_MS = 6_000
Turn = Callable[[], Awaitable[None]]


async def recalls(net: Testnet, count: int, drive: Turn, park: Turn) -> list[float]:
    """Milliseconds from the change of the readings to the end of the worker's process."""
    with net.client(net.cars[0]) as node, net.client() as own:
        return [await recall(net, node, own, drive, park) for _ in range(count)]


async def recall(net: Testnet, node: Mesh, own: Mesh, drive: Turn, park: Turn) -> float:
    """One: a run begins, the driver comes back, the car parks again."""

    async def may_run() -> bool:
        status = await trio.to_thread.run_sync(node.status)
        return not status["may_run"]["code"]

    async def in_work() -> int:
        status = await trio.to_thread.run_sync(node.status)
        return next((int(each["pid"]) for each in status["workers"] if each["runs"]), 0)

    await net.wait(may_run, WAIT_S, "the car may run")
    prepared = host.prepare("bench.spin@1", 1, {"ms": UNIT_MS}, None)
    submit = partial(own.submit_kernel, registry.get("bench.spin@1"), prepared)
    job_id = await trio.to_thread.run_sync(submit)
    pid = await net.wait(in_work, WAIT_S, "a worker has the run")
    began = ticks(pid)
    await net.wait(lambda: ticks(pid) - began >= BUSY_TICKS, WAIT_S, "it computes")
    spent = await until_gone(pid, drive)
    await trio.to_thread.run_sync(own.cancel, job_id)
    await park()
    return spent


async def until_gone(pid: int, drive: Turn) -> float:
    fd = os.pidfd_open(pid)
    try:
        start = time.perf_counter()
        await drive()
        await trio.to_thread.run_sync(lambda: select.select([fd], [], [], WAIT_S))
        return (time.perf_counter() - start) * 1e3
    finally:
        os.close(fd)


def ticks(pid: int) -> int:
    """CPU time of a process in the kernel's ticks (proc(5): utime is the 14th field)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11])
    except OSError:
        return 0


async def by_file(count: int) -> list[float]:
    async with Testnet(1, SEED) as net:
        car = net.cars[0]

        async def drive() -> None:
            driving.change(net.home(car), driving.DRIVES_AWAY)  # the write is what is measured from

        async def park() -> None:
            driving.change(net.home(car), {**driving.PARKS, **driving.PLUGGED})

        return await recalls(net, count, drive, park)


async def by_broker(count: int) -> list[float]:
    broker = Broker()
    broker.start()
    try:
        address = f"127.0.0.1:{broker.port}"
        config = f'[vehicle]\nadapter = "vss"\naddress = "{address}"\n'
        async with Testnet(1, SEED, config=config) as net:

            async def drive() -> None:
                broker.publish(signals.IGNITION, "ON")

            async def park() -> None:
                broker.publish(signals.IGNITION, "OFF")

            return await recalls(net, count, drive, park)
    finally:
        broker.stop()


def run(quick: bool) -> int:
    each = (QUICK if quick else RECALLS) // 2
    figures: Figures = {"recalls": 2 * each, "grace_ms": RECALL_GRACE_MS}
    every: list[float] = []
    for name, way in (("file", by_file), ("broker", by_broker)):
        spent = trio.run(way, each)
        every += spent
        figures[f"recall_p50_ms_{name}"] = round(percentile(spent, 0.5), 1)
        figures[f"recall_max_ms_{name}"] = round(max(spent), 1)
    figures["recall_p50_ms"] = round(percentile(every, 0.5), 1)
    figures["recall_p99_ms"] = round(percentile(every, 0.99), 1)
    ok = figures["recall_p99_ms"] <= 250
    return report("recall", figures, {"recall_p99_ms": "<= 250"}, ok)
