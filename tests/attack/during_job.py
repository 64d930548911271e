"""All attacks on a real car in the middle of a job: the job must finish, and be right.

A testnet of real node processes works on job after job while one car that holds a lease is
attacked. What an attack does to a node without its guard is shown on the bare overlay of `node`,
and so are the attacks that need hooks which no real node has (`on` says where).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import trio

from jaxkernels import host, registry
from jaxkernels.bench_spin.reference import reference as spin
from meshnode.client import Mesh, Terms
from meshnode.errors import MeshError, TaskFailed
from meshnode.ledger.load import signed_objects
from meshnode.protocol.advert import cell_topic
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.types import NetworkId, Peer
from testnet import procfs
from testnet.testnet import Testnet

from .attacks import Attack
from .scene import Target, own_node, rss_mb_of
from .trial import judge, try_without

CARS: Final = 3
VICTIM: Final = "car-0"
UNITS: Final = 1_200
ITERATIONS: Final = 1_500_000  # about 5 ms: a job of some seconds on two cores
JOB_S_MAX: Final = 180.0
LEASE_S_MAX: Final = 60.0

Row = dict[str, Any]


@dataclass
class Car:
    """A car of a testnet as the scene watches it."""

    net: Testnet
    name: str
    topic: str

    @property
    def target(self) -> Target:
        addr = str(self.net.nodes[self.name]["addrs"][0])
        return Target(addr.partition("/p2p/")[0], Peer(self.net.peer(self.name)))

    @property
    def dead(self) -> bool:
        node = self.net.nodes[self.name]
        return not procfs.alive(node["pid"], node["start_ticks"])

    def rss_mb(self) -> float:
        return rss_mb_of(self.net.nodes[self.name]["pid"])

    def tell(self, **command: Any) -> None:
        raise NotImplementedError(f"a real node takes no {command}")

    async def ask(self, wanted: str, **command: Any) -> Any:
        """Gossip that reached the machine and was none."""
        if wanted != "heard":
            self.tell(**command)
        status = await self.net.call(lambda mesh: mesh.status(), self.name)
        return status["counters"].get("bad_gossip", 0)


@dataclass
class Work:
    """Job after job, until told to stop; the one that runs then is finished."""

    net: Testnet
    stop: bool = False
    job_id: bytes = b""
    jobs: int = 0
    units: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        steps = np.arange(UNITS, dtype=np.int32)[:, None] + ITERATIONS
        want = np.array([spin(row)[0] for row in steps])
        kernel = registry.get("bench.spin@1")
        prepared = host.prepare(kernel.spec, steps)
        terms = Terms(label="under attack", lease_units_max=40)
        while not self.stop and not self.wrong:
            try:
                submit = partial(Mesh.submit_kernel, kernel=kernel, prepared=prepared, terms=terms)
                self.job_id = await self.net.call(submit)
                job_id = self.job_id
                (value,) = await self.net.call(
                    lambda mesh, job_id=job_id: mesh.result(job_id, JOB_S_MAX)  # type: ignore[misc]
                )
            except MeshError as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                return
            self.jobs += 1
            self.units += UNITS
            if not np.array_equal(value, want):
                self.wrong.append(f"job {job_id.hex()[:8]} has wrong outputs")

    async def lease_at(self, peer: bytes) -> bool:
        """Does that car hold a lease of the job that runs?"""
        if self.wrong:
            raise TaskFailed(self.wrong[0])
        if not self.job_id:
            return False
        job_id = self.job_id
        job = await self.net.call(lambda mesh: mesh.show(job_id))
        return any(a["peer"] == peer and a["state"] == "leased" for a in job["attempts"])


async def during_job(picked: list[Attack], note: Callable[[Row], None]) -> Row:
    """Every attack with its guards on a working car, and without them on an overlay."""
    guarded: dict[str, str] = {}
    async with Testnet(CARS, 7) as net:
        network = (await net.call(lambda mesh: mesh.status()))["network"]
        car = Car(net, VICTIM, cell_topic(NetworkId(network), "testnet"))
        work = Work(net)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.run)
            try:
                for attack in picked:
                    if attack.hooks or car.dead:
                        continue
                    lease = partial(work.lease_at, car.target.peer)
                    await net.wait(lease, LEASE_S_MAX, f"{VICTIM} holds a lease")
                    guarded[attack.name] = await judge(attack, car.target, car)
            except MeshError as error:
                work.wrong.append(str(error))
            work.stop = True
        findings = [found.text for found in check_objects(signed_objects(net.home())).findings]
    for attack in picked:
        note(await _row(attack, guarded.get(attack.name)))
    return {
        "job": "finished" if work.jobs and not work.wrong else "; ".join(work.wrong) or "never ran",
        "jobs": work.jobs,
        "units": work.units,
        "car": VICTIM,
        "receipts": "hold" if not findings else "; ".join(findings[:4]),
        "ok": work.jobs > 0 and not work.wrong and not findings,
    }


async def _row(attack: Attack, seen: str | None) -> Row:
    where = "overlay" if attack.hooks else "car"
    if attack.hooks:
        async with own_node() as (node, target):
            seen = await judge(attack, target, node)
    return {
        "name": attack.name,
        "guards": sorted(attack.guards),
        "on": where,
        "guarded": seen or "not tried: the car was dead or had no lease",
        "unguarded": await try_without(attack),
    }
