"""`bench footprint`: what an idle car costs while it hears the chatter of a 250-car cell.

Four feeders, each a real overlay in this process, publish as many signed adverts as 250 cars would,
each car once a minute, and forward one another's: the node receives duplicates as in a cell.
CPU is /proc's for the node's process; memory is its resident set, and with its zygote the
proportional set of both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio

from meshnode.client import connect
from meshnode.ledger.blobs import BlobStore
from meshnode.node import firstrun
from meshnode.overlay import Overlay, OverlayConfig, open_overlay
from meshnode.protocol.advert import cell_topic
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.objects import T_ADVERT, Advert, AdvertBudget, AdvertClass
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import seal
from meshnode.protocol.types import NetworkId, Peer
from testnet.warden import PROBE_FILE

from .figures import Figures, report
from .small_mesh import READY_S_MAX, Car, start_car, until

CARS = 250
FEEDERS = 4
PERIOD_S = 60.0
MEASURE_S = 60.0
QUICK_MEASURE_S = 10.0
TARGETS = {
    "rss_mb_node": "<= 110",
    "cpu_percent_node": "<= 1.0",
    "help_s": "<= 0.4",
    "help_loads_heavy": "== 0",
}


def advert_of(signer: KeySigner, network: NetworkId, seq: int) -> bytes:
    now_ms = time.time_ns() // 1_000_000
    best = AdvertClass("cpu", "x86", 8_192, 100_000, b"feedcell")
    budget = AdvertBudget(5_000_000, 300, 7_200, 0, 1, Reason.OK)
    advert = Advert(
        1, network, signer.peer, seq, "advert", "bench", (best,), 1, 1, (9, 10), "0.10.2", 0,
        tuple(bytes([i]) * 8 for i in range(8)), budget, now_ms + 150_000,
        ("/ip4/127.0.0.1/tcp/4001",),
    )  # fmt: skip
    return seal(advert, T_ADVERT, signer.peer, signer.sign).wire


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def wakeups(pid: int) -> int:
    """How often its threads have gone to sleep by themselves so far: each time somebody woke them
    (proc_pid_status(5))."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.MULTILINE)
        total += int(found[1]) if found else 0
    return total


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in children for p in (int(child), *descendants(int(child)))]


async def chatter(
    feeders: list[tuple[Overlay, KeySigner]], network: NetworkId, done: trio.Event
) -> None:
    """CARS adverts a PERIOD_S, evenly spread over the feeders, each advert its sender's own: a
    node believes no other. What a message costs does not depend on whose it is."""
    topic = cell_topic(network, "bench")
    seq = time.time_ns() // 1_000_000
    while not done.is_set():
        for overlay, signer in feeders:
            seq += 1
            overlay.publish(topic, advert_of(signer, network, seq))
            await trio.sleep(PERIOD_S / CARS)


def formed(feeders: list[tuple[Overlay, KeySigner]], topic: str) -> bool:
    """Does every feeder gossip straight with the other feeders and the car?"""
    meshes = (feeder.gossip.router.mesh.get(topic, ()) for feeder, _ in feeders)
    return all(len(mesh) >= FEEDERS for mesh in meshes)


def heard(home: Path, peers: list[Peer]) -> bool:
    """Has the car an advert of each?"""
    with connect(home) as mesh:
        return set(peers) <= {row["peer"] for row in mesh.peers() if row.get("car")}


async def hear(feeder: Overlay) -> None:
    async for _ in feeder.events:
        pass


async def measure(car: Car, folder: Path, seconds: float) -> Figures:
    network = firstrun.read_network(folder / "car-0").ident
    figures: Figures = {}
    await until((folder / "car-0" / PROBE_FILE).exists, READY_S_MAX)
    before = wakeups(car.process.pid)
    figures["cpu_percent_node_alone"] = await cpu_percent(car.process.pid, seconds)
    figures["wakeups_per_min_node_alone"] = round(
        (wakeups(car.process.pid) - before) * 60 / seconds
    )
    async with trio.open_nursery() as nursery:
        feeders: list[tuple[Overlay, KeySigner]] = []
        for number in range(FEEDERS):
            config = OverlayConfig(
                key_seed=(1 << 50 | number).to_bytes(32, "big"),
                listen=("/ip4/127.0.0.1/tcp/0",),
                bootstrap=(*car.addrs, *(a for f, _ in feeders for a in f.addrs)),
                lock_dir=folder,
            )
            opened = await nursery.start(_feeder, config, folder / f"feeder-{number}", network)
            feeders.append((opened, KeySigner(config.key_seed)))
            nursery.start_soon(hear, opened)
        done = trio.Event()
        await until(lambda: formed(feeders, cell_topic(network, "bench")), READY_S_MAX)
        pid = car.process.pid
        figures["cpu_percent_node_quiet"] = await cpu_percent(pid, seconds)
        nursery.start_soon(chatter, feeders, network, done)
        known = partial(heard, folder / "car-0", [signer.peer for _, signer in feeders])
        await until(lambda: trio.to_thread.run_sync(known), READY_S_MAX)
        figures["cpu_percent_node"] = await cpu_percent(pid, seconds)
        figures["rss_mb_node"] = round(memory_mb(pid, "Rss"), 1)
        both = [pid, *descendants(pid)]
        figures["pss_mb_node_and_zygote"] = round(sum(memory_mb(p, "Pss") for p in both), 1)
        figures["processes"] = len(both)
        figures["adverts_per_s"] = round(CARS / PERIOD_S, 2)
        done.set()
        nursery.cancel_scope.cancel()
    return figures


async def cpu_percent(pid: int, seconds: float) -> float:
    before, start = cpu_s(pid), time.perf_counter()
    await trio.sleep(seconds)
    return round((cpu_s(pid) - before) / (time.perf_counter() - start) * 100, 2)


async def _feeder(
    config: OverlayConfig,
    folder: Path,
    network: NetworkId,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    folder.mkdir()  # noqa: ASYNC240 - a bench has no other task to hold up
    async with open_overlay(config, BlobStore(folder, bytes_max=1 << 20)) as overlay:
        overlay.join(cell_topic(network, "bench"))
        task_status.started(overlay)
        await trio.sleep_forever()


def help_figures() -> Figures:
    """`mesh --help`: how long it takes, and how many of the heavy packages it loads."""
    code = (
        "import sys\nsys.argv = ['mesh', '--help']\n"
        "from meshnode.cli.mesh import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = [m for m in ('libp2p', 'jax', 'numpy', 'trio') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr)\n"
    )
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    heavy = done.stderr.strip().splitlines()[-1]
    loads = sum(name in heavy for name in ("libp2p", "jax"))
    return {"help_s": round(min(times), 3), "help_loads_heavy": loads, "help_loads": heavy}


def run(quick: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="meshbench-") as name:
        folder = Path(name)
        car = start_car(folder, "car-0", (), role="car")
        try:
            seconds = QUICK_MEASURE_S if quick else MEASURE_S
            figures = trio.run(measure, car, folder, seconds)
        finally:
            car.process.terminate()
            car.process.wait()
    figures |= help_figures()
    return report("footprint", figures, TARGETS, True)
