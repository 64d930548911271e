"""A long durable job over many real cars, three in ten of which are killed while it runs.

    testnet up > a job left in peace, timed > the long one > SIGKILL and restart, car after car
               > results > both ledgers

The first job says how fast this machine is, so that the second lasts as long as it is to; its
results are held against the same reference, which no mesh computes: with kills and without, to the
bit. A kill comes when a drawn share of the units is done, so that every one meets the job at work,
however fast or slow it goes. Cars die as rendezvous and as providers alike.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from meshnode.client import Terms
from meshnode.errors import MeshError
from meshnode.protocol.reasons import Reason
from testnet.testnet import Testnet

from .judge import Outcome, Sent, check_ledgers, keep, right_units, send_spins

POLICIES: Final = ("tokens", "adverts", "gossip")
CARS: Final = 16
JOB_S: Final = 120.0
KILLED_PER_CENT: Final = 30
ITERATIONS: Final = 30_000_000  # about 0.1 s of one core
LEASE_UNITS: Final = 4
"""So that a lease outlasts a few heartbeats where a core is shared by many cars."""
WARM_UNITS_PER_CAR: Final = 4
PACE_UNITS_PER_CAR: Final = 16
DONE_LEAST: Final = 0.05
DONE_MOST: Final = 0.9
"""Share of the units between which cars are killed."""
AWAY_MOST: Final = 0.05  # of the job is done by the others until it is back
PATIENCE: Final = 10.0
"""A job may last so many times as long as in peace, and a minute more, before it counts as hung."""


@dataclass
class Shaken(Outcome):
    """A long job, and who was killed in it."""

    policy: str = POLICIES[0]
    cars: int = 0
    killed: dict[str, int] = field(default_factory=dict)  # car -> units done when it died
    peace_units: int = 0
    peace_units_per_s: float = 0.0
    job_s: float = 0.0
    attempts: int = 0  # runs that were begun
    ends: dict[str, int] = field(default_factory=dict)  # how they ended, the commonest first

    @property
    def happened(self) -> str:
        kills = ", ".join(f"{name} at {done}" for name, done in self.killed.items())
        return (
            f"{self.policy}, {self.cars} cars, job of {self.job_s:.0f} s, killed "
            f"{kills or 'nobody'}"
        )


async def soak(
    policy: str,
    seeds: Iterable[int],
    tell: Callable[[Shaken], None],
    *,
    cars: int = CARS,
    job_s: float = JOB_S,
) -> list[Shaken]:
    """Each seed on a testnet of its own."""
    outcomes: list[Shaken] = []
    for seed in seeds:
        async with Testnet(cars, 7) as net:
            outcome = await one_seed(net, policy, seed, job_s)
            if outcome.violations:
                outcome.kept = str(await keep(net, seed))
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


async def one_seed(net: Testnet, policy: str, seed: int, job_s: float) -> Shaken:
    rng = random.Random(seed)
    outcome = Shaken(seed, policy=policy, cars=len(net.cars))
    began_s = time.monotonic()
    try:
        terms = Terms(label=f"seed {seed}", policy=policy, lease_units_max=LEASE_UNITS)
        patience_s = PATIENCE * job_s + 60
        await net.wait(net.all_known, patience_s, "the submitter knows every car")
        await peace(net, terms, outcome, patience_s)
        units = max(len(net.cars) * LEASE_UNITS, int(outcome.peace_units_per_s * job_s))
        job_began_s = time.monotonic()
        job = await net.call(partial(send_spins, units=units, iterations=ITERATIONS, terms=terms))
        outcome.units = units
        await shake(net, job, rng, outcome, patience_s)
        outcome.right = sum(await net.call(partial(right_units, [job], timeout_s=patience_s)))
        outcome.job_s = round(time.monotonic() - job_began_s, 1)
        if outcome.lost:
            outcome.violations.append(f"{outcome.lost} units lost or wrong")
        shown = await net.call(lambda mesh: mesh.show(job.job_id))
        outcome.attempts = len(shown["attempts"])
        ends = Counter(Reason.of(each["reason"]["code"]).name for each in shown["attempts"])
        outcome.ends = dict(ends.most_common())
        await check_ledgers(net, [job], outcome, outcome.killed)
    except* MeshError as errors:
        for error in errors.exceptions:
            outcome.violations.append(f"{type(error).__name__}: {error}")
    outcome.wall_s = round(time.monotonic() - began_s, 1)
    return outcome


async def peace(net: Testnet, terms: Terms, outcome: Shaken, patience_s: float) -> None:
    """Units a second with every car alive and warm, and their results."""
    for per_car in (WARM_UNITS_PER_CAR, PACE_UNITS_PER_CAR):
        units = per_car * len(net.cars)
        began_s = time.monotonic()
        job = await net.call(partial(send_spins, units=units, iterations=ITERATIONS, terms=terms))
        (right,) = await net.call(partial(right_units, [job], timeout_s=patience_s))
        outcome.peace_units_per_s = round(units / (time.monotonic() - began_s), 2)
        outcome.peace_units += units
        if right != units:
            outcome.violations.append(f"{units - right} units lost or wrong though nobody died")


async def shake(
    net: Testnet, job: Sent, rng: random.Random, outcome: Shaken, patience_s: float
) -> None:
    """Each victim dies once, at its share of the job, and is back when some more of it is done."""
    victims = rng.sample(net.cars, max(1, round(len(net.cars) * KILLED_PER_CENT / 100)))
    shares = sorted(rng.uniform(DONE_LEAST, DONE_MOST) for _ in victims)
    async with trio.open_nursery() as nursery:
        for victim, share in zip(victims, shares, strict=True):
            least = int(share * outcome.units)
            done = await net.wait(partial(reached, net, job, least), patience_s, "units come")
            await net.kill(victim)
            outcome.killed[victim] = done
            away = min(outcome.units, done + int(rng.uniform(0.0, AWAY_MOST) * outcome.units))
            nursery.start_soon(back, net, victim, partial(reached, net, job, away), patience_s)


async def reached(net: Testnet, job: Sent, least: int) -> int:
    """How many units are done, 0 if fewer than `least`."""
    rows = {row["job_id"]: row for row in await net.call(lambda mesh: mesh.jobs())}
    done: int = rows[job.job_id]["done"]
    return done if done >= max(1, least) else 0


async def back(
    net: Testnet, name: str, due: Callable[[], Awaitable[int]], patience_s: float
) -> None:
    await net.wait(due, patience_s, f"so much is done that {name} is back")
    await net.restart(name)
