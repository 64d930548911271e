"""Jobs over a testnet of real processes: right answers, a car that dies with a lease, receipts."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import numpy as np
import psutil
import trio

from jaxkernels import host, registry
from jaxkernels.bench_spin.reference import reference as spin
from meshnode.cli.frame import read_testnet
from meshnode.client import aio
from meshnode.ledger.load import signed_objects
from meshnode.protocol.channel_check import Checked, accepted_units, check_objects
from testnet import procfs
from testnet.testnet import Testnet

WITHIN_S = 240.0  # on a slow machine the nodes alone take a minute to start
RECEIPTS_S = 90.0
UNITS = 48
ITERATIONS = 30_000_000  # about 100 ms: on a fast machine too, the job outlasts a look at it


def check_receipts(net: Testnet) -> Checked:
    """As `mesh receipts verify` does it: from the submitter's ledger, from scratch."""
    return check_objects(signed_objects(net.home()))


def accepted(checked: Checked, job_id: bytes) -> list[int]:
    """Units of the job that an accepted receipt covers."""
    units: list[int] = []
    for chain in checked.chains:
        for seq, (receipt, _) in chain.receipts.items():
            if seq <= chain.accepted_seq and receipt.work.job_id == job_id:
                units += accepted_units(chain, seq)
    return sorted(units)


def leased(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Attempts that their car has promised and not finished."""
    return [a for a in job["attempts"] if a["state"] == "leased" and a["done"] < a["count"]]


def test_a_job_is_right_and_every_unit_has_an_accepted_receipt() -> None:
    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(4, 11) as net, aio.connect(net.home()) as mesh:
                x = np.arange(500 * 16, dtype=np.float32).reshape(500, 16)
                kernel = registry.get("bench.noop@1")
                job_id = await mesh.submit_kernel(kernel, host.prepare(kernel.spec, x))
                (y,) = await mesh.result(job_id)
                assert np.array_equal(y, x + 1)
                every = list(range(500))
                await net.wait(
                    lambda: accepted(check_receipts(net), job_id) == every,
                    RECEIPTS_S,
                    "every unit is in an accepted receipt",
                )
                assert check_receipts(net).findings == ()

    trio.run(main)


def test_a_car_killed_with_a_lease_costs_another_attempt_and_no_unit() -> None:
    async def main() -> list[tuple[int, int]]:
        with trio.fail_after(WITHIN_S):
            async with Testnet(4, 12) as net, aio.connect(net.home()) as mesh:
                iterations = np.arange(UNITS, dtype=np.int32)[:, None] + ITERATIONS
                kernel = registry.get("bench.spin@1")
                prepared = host.prepare(kernel.spec, iterations)
                job_id = await mesh.submit_kernel(kernel, prepared)
                dead = await kill_a_holder(net, mesh, job_id)

                (value,) = await mesh.result(job_id)
                want = np.array([spin(row)[0] for row in iterations])
                assert np.array_equal(value, want)
                assert moved(await mesh.show(job_id), net.peer(dead))
                await net.wait(
                    lambda: check_receipts(net).accepted > 0, RECEIPTS_S, "a receipt is accepted"
                )
                checked = check_receipts(net)
                assert checked.findings == ()
                taken = accepted(checked, job_id)
                assert len(taken) == len(set(taken))
                return family(net)

    processes = trio.run(main)
    assert len(processes) >= 8  # warden, zygote of all, four nodes, zygotes, workers
    assert [pid for pid, ticks in processes if procfs.alive(pid, ticks)] == []


def family(net: Testnet) -> list[tuple[int, int]]:
    """Every process of the testnet, workers too."""
    warden = psutil.Process(read_testnet(net.name)["pid"])
    found = [warden, *warden.children(recursive=True)]
    return [(process.pid, procfs.start_ticks(process.pid)) for process in found]


async def kill_a_holder(net: Testnet, mesh: aio.AsyncMesh, job_id: bytes) -> str:
    """SIGKILL to a car with a lease; its name."""
    async with aclosing(mesh.watch(job_id)) as notices:
        async for _ in notices:
            for attempt in leased(await mesh.show(job_id)):
                if await killed_with(net, mesh, job_id, attempt["task"], attempt["peer"]):
                    return net.name_of(attempt["peer"])
    raise AssertionError("the job ended before a car could be killed")


async def killed_with(
    net: Testnet, mesh: aio.AsyncMesh, job_id: bytes, task: bytes, peer: bytes
) -> bool:
    """SIGKILL to a car if the task is still leased to it; frozen first, it cannot end it between
    the look and the kill."""
    name = net.name_of(peer)
    await net.freeze(name)
    if any((a["task"], a["peer"]) == (task, peer) for a in leased(await mesh.show(job_id))):
        await net.kill(name)
        return True
    await net.thaw(name)
    return False


def moved(job: dict[str, Any], dead: bytes) -> bool:
    """Was a task that the dead car lost finished by a later attempt on another car?"""
    attempts = job["attempts"]
    return any(
        lost["peer"] == dead
        and lost["state"] == "lost"
        and later["task"] == lost["task"]
        and later["attempt"] > lost["attempt"]
        and later["peer"] != dead
        and later["state"] == "returned"
        for lost in attempts
        for later in attempts
    )
