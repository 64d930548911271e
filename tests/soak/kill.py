"""SIGKILL to a car or to the submitter's node in the middle of durable jobs; nothing may be lost.

    testnet up > two jobs > SIGKILL after a seeded time > restart > results > both ledgers

A seed draws victim, moment and pause, so that many seeds meet every phase: offers, leases, parts,
receipts, acceptances. What a seed leaves in the ledgers stays for the next: a long history has to
hold as well. Broken promises keep logs and ledgers of all nodes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import trio

from meshnode.client import Mesh, Terms
from meshnode.errors import MeshError
from testnet.testnet import SUBMITTER, Testnet

from .judge import (
    RESULT_S_MAX,
    Outcome,
    Sent,
    check_ledgers,
    keep,
    right_units,
    send,
    send_spins,
)

ROLES: Final = ("car", "submitter")
CARS: Final = 4
NOOP_UNITS: Final = 400
SPIN_UNITS: Final = 160
SPIN_ITERATIONS: Final = 1_500_000  # about 5 ms: the job lasts about half a second on two cores
LEASE_UNITS: Final = 16
"""Small leases: at any moment several are open, and each has a receipt of its own."""
KILL_S_MAX: Final = 2.0
"""After submission; the jobs take about a second, receipts and acceptances a little longer."""
PAUSE_S_MAX: Final = 2.0


@dataclass
class Killed(Outcome):
    """One node, at one moment."""

    victim: str = ""
    kill_s: float = 0.0
    done_at_kill: int = 0
    running: bool = False  # the jobs ran when the victim died

    @property
    def happened(self) -> str:
        return (
            f"{self.victim} killed {self.kill_s:.2f} s in, "
            f"{self.done_at_kill} of {self.units} units done"
        )


async def soak(
    roles: Sequence[str], seeds: Iterable[int], tell: Callable[[Killed], None]
) -> list[Killed]:
    """All seeds over one testnet; a broken one gets its evidence kept and a fresh testnet."""
    outcomes: list[Killed] = []
    waiting = list(seeds)
    while waiting:
        async with Testnet(CARS, 7) as net:
            while waiting:
                seed = waiting.pop(0)
                outcome = await one_seed(net, roles[seed % len(roles)], seed)
                if outcome.violations:
                    outcome.kept = str(await keep(net, seed))
                outcomes.append(outcome)
                tell(outcome)
                if outcome.violations:
                    break
    return outcomes


async def one_seed(net: Testnet, role: str, seed: int) -> Killed:
    rng = random.Random(seed)
    victim = SUBMITTER if role == "submitter" else rng.choice(net.cars)
    outcome = Killed(seed, victim=victim, kill_s=rng.uniform(0.0, KILL_S_MAX))
    pause_s = rng.uniform(0.0, PAUSE_S_MAX)
    began_s = time.monotonic()
    try:
        await net.wait(net.all_known, RESULT_S_MAX, "the submitter knows every car")
        sent = await net.call(partial(submit, seed))
        outcome.units = sum(len(job.want) for job in sent)
        await trio.sleep(outcome.kill_s)
        rows = {row["job_id"]: row for row in await net.call(lambda mesh: mesh.jobs())}
        outcome.done_at_kill = sum(rows[job.job_id]["done"] for job in sent)
        outcome.running = any(rows[job.job_id]["state"] == "running" for job in sent)
        await net.kill(victim)
        await trio.sleep(pause_s)
        await net.restart(victim)
        outcome.right = sum(await net.call(partial(right_units, sent)))
        if outcome.lost:
            outcome.violations.append(f"{outcome.lost} units lost or wrong")
        excused = {victim} - {SUBMITTER}
        await check_ledgers(net, sent, outcome, excused)
    except MeshError as error:
        outcome.violations.append(f"{type(error).__name__}: {error}")
    outcome.wall_s = time.monotonic() - began_s
    return outcome


def submit(seed: int, mesh: Mesh) -> list[Sent]:
    """A job of no-ops, over in a moment, and one whose leases last."""
    x = np.arange(NOOP_UNITS * 16, dtype=np.float32).reshape(NOOP_UNITS, 16) + seed
    terms = Terms(label=f"seed {seed}", lease_units_max=LEASE_UNITS)
    return [
        send(mesh, "bench.noop@1", x, x + 1, terms),
        send_spins(mesh, SPIN_UNITS, SPIN_ITERATIONS + seed, terms),
    ]
