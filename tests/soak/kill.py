"""SIGKILL to a car or to the submitter's node in the middle of durable jobs; nothing may be lost.

    testnet up > two jobs > SIGKILL after a seeded time > restart > results > both ledgers

A seed draws victim, moment and pause, so that many seeds meet every phase: offers, leases, parts,
receipts, acceptances. What a seed leaves in the ledgers stays for the next: a long history has to
hold as well. Broken promises keep logs and ledgers of all nodes.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from jaxkernels import host, registry
from jaxkernels.bench_spin.reference import reference as spin
from meshnode.cli.frame import read_testnet
from meshnode.client import Mesh, Terms
from meshnode.errors import MeshError, TimedOut
from meshnode.ledger.load import job_records, signed_objects
from meshnode.ledger.schema import JOBS, open_reader
from meshnode.protocol.channel_check import Checked, accepted_units, check_objects
from testnet.testnet import SUBMITTER, Testnet

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
RESULT_S_MAX: Final = 60.0
SETTLE_S_MAX: Final = 30.0


@dataclass
class Outcome:
    """What one seed did and found."""

    seed: int
    victim: str
    kill_s: float
    units: int = 0
    done_at_kill: int = 0
    running: bool = False  # the jobs ran when the victim died
    right: int = 0
    accepted: int = 0
    unpaid: int = 0  # computed by the killed car, which died before it had signed for them
    twice: int = 0
    wall_s: float = 0.0
    violations: list[str] = field(default_factory=list)
    kept: str = ""

    @property
    def lost(self) -> int:
        return self.units - self.right

    @property
    def line(self) -> str:
        text = (
            f"seed {self.seed}: {self.victim} killed {self.kill_s:.2f} s in, "
            f"{self.done_at_kill} of {self.units} units done; {self.right} right, "
            f"{self.accepted} accepted, {self.unpaid} unsigned by the dead, "
            f"{self.twice} accepted twice; {self.wall_s:.1f} s"
        )
        for violation in self.violations:
            text += f"\n  broken: {violation}"
        return text + (f"\n  kept in {self.kept}" if self.kept else "")

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"lost": self.lost, "ok": not self.violations}


@dataclass(frozen=True)
class Sent:
    """A job of this seed and what must come back."""

    job_id: bytes
    want: np.ndarray[Any, Any]


async def soak(
    roles: Sequence[str], seeds: Iterable[int], tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """All seeds over one testnet; a broken one gets its evidence kept and a fresh testnet."""
    outcomes: list[Outcome] = []
    waiting = list(seeds)
    while waiting:
        async with Testnet(CARS, 7) as net:
            while waiting:
                seed = waiting.pop(0)
                outcome = await one_seed(net, roles[seed % len(roles)], seed)
                if outcome.violations:
                    outcome.kept = str(keep(net, seed))
                outcomes.append(outcome)
                tell(outcome)
                if outcome.violations:
                    break
    return outcomes


async def one_seed(net: Testnet, role: str, seed: int) -> Outcome:
    rng = random.Random(seed)
    victim = SUBMITTER if role == "submitter" else rng.choice(net.cars)
    outcome = Outcome(seed, victim, rng.uniform(0.0, KILL_S_MAX))
    pause_s = rng.uniform(0.0, PAUSE_S_MAX)
    began_s = time.monotonic()
    try:
        await net.wait(partial(all_known, net), RESULT_S_MAX, "the submitter knows every car")
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
        await check_ledgers(net, sent, outcome)
    except MeshError as error:
        outcome.violations.append(f"{type(error).__name__}: {error}")
    outcome.wall_s = time.monotonic() - began_s
    return outcome


async def all_known(net: Testnet) -> bool:
    """Has the submitter an advert of every car, ready to work? It dials them when it has work."""
    ready = {
        row["peer"]
        for row in await net.call(lambda mesh: mesh.peers())
        if row.get("car") and row["car"]["may_run"]
    }
    return all(net.peer(name) in ready for name in net.cars)


# ---- the jobs


def submit(seed: int, mesh: Mesh) -> list[Sent]:
    """A job of no-ops, over in a moment, and one whose leases last."""
    x = np.arange(NOOP_UNITS * 16, dtype=np.float32).reshape(NOOP_UNITS, 16) + seed
    steps = np.arange(SPIN_UNITS, dtype=np.int32)[:, None] + SPIN_ITERATIONS + seed
    wanted = {"bench.noop@1": (x, x + 1), "bench.spin@1": (steps, np.array([*map(_spun, steps)]))}
    sent: list[Sent] = []
    for name, (inputs, want) in wanted.items():
        kernel = registry.get(name)
        terms = Terms(label=f"seed {seed}", lease_units_max=LEASE_UNITS)
        sent.append(
            Sent(mesh.submit_kernel(kernel, host.prepare(kernel.spec, inputs), terms=terms), want)
        )
    return sent


def _spun(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(spin(row)[0])


def right_units(sent: list[Sent], mesh: Mesh) -> list[int]:
    """How many units of each job came back as they must."""
    counts: list[int] = []
    for job in sent:
        (value,) = mesh.result(job.job_id, RESULT_S_MAX)
        same = (value == job.want).reshape(len(job.want), -1)
        counts.append(int(same.all(axis=1).sum()))
    return counts


# ---- the ledgers


@dataclass(frozen=True)
class Ledgers:
    """Both sides at one moment."""

    mine: Checked
    theirs: dict[str, Checked]

    @classmethod
    def read(cls, net: Testnet) -> Ledgers:
        theirs = {name: check_objects(signed_objects(net.home(name))) for name in net.cars}
        return cls(check_objects(signed_objects(net.home())), theirs)


async def check_ledgers(net: Testnet, sent: list[Sent], outcome: Outcome) -> None:
    """Once both sides agree: every history holds, each unit is accepted once, none is missing."""
    excused = outcome.victim if outcome.victim != SUBMITTER else None
    ledgers = await settled(net, sent, excused)
    for name, checked in (("submitter", ledgers.mine), *ledgers.theirs.items()):
        outcome.violations += [f"ledger of {name}: {found.text}" for found in checked.findings]
    for job in sent:
        accepted = accepted_of(ledgers.mine, job.job_id)
        outcome.accepted += len(accepted)
        outcome.unpaid += len(without_receipt(net, job, accepted, None))
        seen = sum(
            (accepted_of(checked, job.job_id) for checked in ledgers.theirs.values()), Counter()
        )
        if seen != accepted:
            apart = sorted((seen - accepted) + (accepted - seen))
            outcome.violations.append(f"the two sides do not agree on units {apart[:8]}")
        if missing := without_receipt(net, job, accepted, excused):
            outcome.violations.append(f"units never accepted: {missing[:8]} of {len(missing)}")
    # Of all jobs: what an earlier seed left open may have been settled only now.
    for record in job_records(net.home()):
        again = [u for u, n in accepted_of(ledgers.mine, record.job_digest[:16]).items() if n > 1]
        outcome.twice += len(again)
        if again:
            outcome.violations.append(f"units accepted twice: {again[:8]}")
    outcome.violations += open_receipts(ledgers)


async def settled(net: Testnet, sent: list[Sent], excused: str | None) -> Ledgers:
    """The ledgers when every receipt is answered and every unit has one; or when time is up."""
    ledgers = Ledgers.read(net)

    def look() -> bool:
        nonlocal ledgers
        ledgers = Ledgers.read(net)
        return not open_receipts(ledgers) and not any(
            without_receipt(net, job, accepted_of(ledgers.mine, job.job_id), excused)
            for job in sent
        )

    with suppress(TimedOut):
        await net.wait(look, SETTLE_S_MAX, "receipts are settled")
    return ledgers


def accepted_of(checked: Checked, job_id: bytes) -> Counter[int]:
    """Units of a job by how many acceptances cover them, as this ledger has it."""
    units: Counter[int] = Counter()
    for chain in checked.chains:
        for seq, (receipt, _) in chain.receipts.items():
            if seq <= chain.accepted_seq and receipt.work.job_id == job_id:
                units.update(accepted_units(chain, seq))
    return units


def without_receipt(
    net: Testnet, job: Sent, accepted: Counter[int], excused: str | None
) -> list[int]:
    """Units that came, and stand in no accepted receipt; not those of the excused car."""
    record = next(r for r in job_records(net.home()) if r.job_digest[:16] == job.job_id)
    spared = net.peer(excused) if excused is not None else b""
    return [
        unit
        for first, count, peer in sources(net.home(), record.job_digest)
        for unit in range(first, first + count)
        if not accepted[unit] and peer != spared
    ]


def sources(home: Path, job_digest: bytes) -> list[tuple[int, int, bytes]]:
    """(first, count, peer): whose outputs the submitter has stored."""
    jobs = open_reader(home, JOBS)
    assert jobs is not None, "the submitter has jobs"
    try:
        rows = jobs.execute(
            "SELECT first, count, peer FROM result WHERE job_digest = ?", (job_digest,)
        )
        return [(first, count, peer) for first, count, peer in rows]
    finally:
        jobs.close()


def open_receipts(ledgers: Ledgers) -> list[str]:
    """Receipts that a car signed and that were not answered by an acceptance it has."""
    here = {chain.digest: chain for chain in ledgers.mine.chains}
    found: list[str] = []
    for name, checked in ledgers.theirs.items():
        for chain in checked.chains:
            top = max(chain.receipts, default=-1)
            known = here.get(chain.digest)
            reached = known.accepted_seq if known is not None else -1
            if not top <= chain.accepted_seq == reached:
                found.append(
                    f"{name} has signed up to {top}, has acceptances up to "
                    f"{chain.accepted_seq}; the submitter accepted up to {reached}"
                )
    return found


# ---- evidence


def keep(net: Testnet, seed: int) -> Path:
    """Logs and ledgers of all nodes, out of the testnet's folder before that goes."""
    kept = Path(tempfile.mkdtemp(prefix=f"mesh-soak-seed{seed}-"))
    folder = Path(read_testnet(net.name)["folder"])
    shutil.copytree(folder / "log", kept / "log")
    for name in net.nodes:
        (kept / name).mkdir()
        for file in net.home(name).glob("*.sqlite*"):
            shutil.copy2(file, kept / name)
    return kept
