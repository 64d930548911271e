"""`python -m testnet.sim.seeds --count 500`: small meshes of real machines, one storm a seed.

Each seed draws a mesh of 4 to 12 nodes, its policy, its jobs and what goes wrong, runs it with real
signatures under `invariants.Proof`, lets the weather clear, and asks for the rest. A seed that
fails prints the command that replays it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.effects import ArgSource
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Limits

from .faults import PLANS, Weather
from .invariants import Broken, Proof
from .mesh import ARTIFACT, PROVIDE, REQUEST, Site
from .trace import Trace

POLICIES: Final = ("tokens", "adverts", "gossip")
F16 = ArraySpec("float32", (16,))
STORM_MS = 12_000
SETTLE_MS = 120_000  # from the end of the storm until everything has drained
DEADLINE_MS = 90_000
CLOCKS_MS = 3_000  # after the storm all clocks are set right within so long
LEASE_MS = 8_000
UNIT_MS = (1, 5, 40, 200)  # the last: all cars may be busy with others' jobs for a minute
Lie = Callable[[fx.Send], list[fx.Send]]
LIES = ("", "", "drop", "repeat", "hold")


@dataclass(frozen=True, slots=True)
class Seeded:
    """How one seed went."""

    seed: int
    events: int
    digest: str
    jobs: int
    done: int
    failed: tuple[tuple[str, int], ...]  # reasons of the jobs that the storm cost
    broken: str = ""


def run(seed: int) -> Seeded:
    """One seed, to its end; `broken` says which invariant did not hold."""
    rng = random.Random(f"{seed} mesh")
    limits = replace(Limits(), lease_ms=LEASE_MS, job_deadline_ms=DEADLINE_MS)
    mesh = Proof(seed, delay_ms=(1, rng.choice((8, 40, 120))), limits=limits)
    mesh.keep_trace = False
    mesh.digest = trace = Trace()
    failed: Counter[str] = Counter()
    broken = ""
    try:
        _play(mesh, rng)
    except Broken as error:
        broken = str(error)
    except Exception:  # noqa: BLE001 - a machine that raises is what is looked for
        broken = traceback.format_exc()
    for state, reason in mesh.ended.values():
        if state != "done":
            failed[Reason.of(reason).name.lower()] += 1
    done = len(mesh.ended) - failed.total()
    return Seeded(
        seed,
        trace.events,
        trace.hexdigest(),
        len(mesh.submitted),
        done,
        tuple(sorted(failed.items())),
        broken,
    )


def _play(mesh: Proof, rng: random.Random) -> None:
    for number in range(rng.randint(1, 2)):
        mesh.add(f"submitter-{number}", REQUEST)
    for number in range(rng.randint(3, 10)):
        mesh.add(f"car-{number}", PROVIDE, slots=rng.choice((1, 1, 2)))
    mesh.connect_all()
    mesh.unit_ms = rng.choice(UNIT_MS)
    plan = PLANS["storm"]
    mesh.weather = Weather(plan, mesh.seed)
    plan.schedule(mesh, (500_000, STORM_MS * 1000))
    submitters = [site for site in mesh.sites.values() if site.identity.roles & REQUEST]
    for number in range(rng.randint(2, 6)):
        at_ms = rng.randrange(STORM_MS)
        _submit_at(mesh, rng, submitters, number, at_ms)
    for site in mesh.sites.values():
        site.lie = _lie(mesh, site, rng.choice(LIES), random.Random(f"{mesh.seed} {site.name}"))
    mesh.rest(STORM_MS)
    _clear(mesh, rng)
    before = set(mesh.submitted)
    for number in range(100, 102):
        _submit_at(mesh, rng, submitters, number, rng.randrange(500))
    mesh.rest(1_000)
    if not mesh.run(mesh.settled, ms_max=SETTLE_MS):
        raise mesh.broken(f"not drained {SETTLE_MS / 1000:.0f} s after the storm: {_why(mesh)}")
    for job_id in sorted(mesh.submitted.keys() - before):
        if mesh.ended[job_id][0] != "done":
            reason = Reason.of(mesh.ended[job_id][1])
            raise mesh.broken(f"a job of after the storm ended with {reason.name}")
    mesh.check_whole()


def _submit_at(
    mesh: Proof, rng: random.Random, submitters: list[Site], number: int, at_ms: int
) -> None:
    site = rng.choice(submitters)
    units = rng.choice((1, 7, 40, 150))
    ref = BlobRef(Digest(b"\x33" * 32), 64 * units)
    order = ev.JobOrder(
        "bench.noop@1",
        ARTIFACT,
        (ArgSource(True, F16, ref),),
        (F16,),
        units,
        number.to_bytes(16, "big"),
        policy=rng.choice(POLICIES),
        lease_units_max=rng.choice((0, 1, 16)),
    )
    mesh.at(at_ms, lambda: mesh.submit(site, number, order))


def _clear(mesh: Proof, rng: random.Random) -> None:
    """Nothing goes wrong any more: all are up, told the truth, and connected anew. Clocks are set
    right one after the other, and nobody is connected anew for that."""
    mesh.weather = None
    mesh.partitioned.clear()
    for site in mesh.sites.values():
        site.lie = None
        if site.node is None:
            mesh.boot(site.name)
        for other in sorted(site.links):
            mesh.cut(site.name, other)
    mesh.connect_all()
    for site in mesh.sites.values():
        mesh.at(rng.randrange(CLOCKS_MS), partial(setattr, site, "skew_ms", 0))
    for site in mesh.sites.values():  # whoever had driven away without being gone is back
        if site.identity.roles & PROVIDE:
            mesh.feed(site, ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 7_200, 0))


def _lie(mesh: Proof, site: Site, kind: str, rng: random.Random) -> Lie | None:
    """A car whose frames get lost, come twice, or wait: some of them, as it likes."""
    if not kind or site.identity.roles & REQUEST:
        return None

    def lie(effect: fx.Send) -> list[fx.Send]:
        if rng.random() > 0.1:
            return [effect]
        if kind == "repeat":
            return [effect, effect]
        if kind == "hold":
            life, other = site.life, mesh.by_peer[effect.peer]
            mesh.at(rng.randint(1, 500), lambda: mesh.send_late(site, other, effect, life))
        return []

    return lie


def _why(mesh: Proof) -> str:
    found = []
    for site in mesh.sites.values():
        node = site.node
        if node is None:
            found.append(f"{site.name} is away")
            continue
        held = sum(len(channel.open) for channel in node.provider.receipts.channels.values())
        if node.jobs.running or node.provider.leases or held:
            found.append(
                f"{site.name} has {len(node.jobs.running)} jobs, {len(node.provider.leases)} "
                f"leases, {held} open receipts"
            )
    return "; ".join(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m testnet.sim.seeds", description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    seeds = range(options.first, options.first + options.count)
    bad = events = jobs = done = 0
    reasons: Counter[str] = Counter()
    with ProcessPoolExecutor(min(options.jobs, len(seeds))) as pool:
        for went in pool.map(run, seeds, chunksize=4):
            events += went.events
            jobs += went.jobs
            done += went.done
            reasons.update(dict(went.failed))
            if went.broken:
                bad += 1
                replay = f"python -m testnet.sim.seeds --first {went.seed} --count 1"
                print(f"seed {went.seed}: {went.broken}\n  again: {replay}", file=sys.stderr)
    said = ", ".join(f"{count} {name}" for name, count in reasons.most_common())
    print(
        f"{options.count} seeds, {bad} failed; {jobs} jobs, {done} done"
        f"{f' ({said})' if said else ''}; {events} events in {time.monotonic() - begun:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
