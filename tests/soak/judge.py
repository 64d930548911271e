"""What a soak reads once its nodes are back: results, and both sides' ledgers.

    results as they must be > every receipt answered > each unit accepted once, by both ledgers

Used by `kill` and `nodes`. A car that was killed had perhaps not yet signed for what it had sent:
those units came, and stand in no receipt; they are counted (`unpaid`), nobody else's may be
missing. Broken promises keep logs and ledgers of all nodes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxkernels import host, registry
from jaxkernels.bench_spin.reference import reference as spin
from meshnode.cli.frame import read_testnet
from meshnode.client import Mesh, Terms
from meshnode.errors import MeshError, TimedOut
from meshnode.ledger.load import job_records, signed_objects
from meshnode.ledger.schema import JOBS, open_reader
from meshnode.protocol.channel_check import Checked, accepted_units, check_objects
from testnet.testnet import Testnet

RESULT_S_MAX: Final = 60.0
SETTLE_S_MAX: Final = 30.0


@dataclass
class Outcome:
    """What one seed found."""

    seed: int
    units: int = 0
    right: int = 0
    accepted: int = 0
    unpaid: int = 0  # computed by a killed car, which died before it had signed for them
    twice: int = 0
    wall_s: float = 0.0
    violations: list[str] = field(default_factory=list)
    kept: str = ""

    @property
    def lost(self) -> int:
        return self.units - self.right

    @property
    def happened(self) -> str:
        """What was done to the nodes, in words."""
        return ""

    @property
    def line(self) -> str:
        text = (
            f"seed {self.seed}: {self.happened}; {self.right} of {self.units} right, "
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


# ---- the jobs


def send(mesh: Mesh, name: str, inputs: Any, want: Any, terms: Terms) -> Sent:
    kernel = registry.get(name)
    job_id = mesh.submit_kernel(kernel, host.prepare(kernel.spec, inputs), terms=terms)
    return Sent(job_id, want)


def send_spins(mesh: Mesh, units: int, iterations: int, terms: Terms) -> Sent:
    """Units that last, each a little longer than the one before: no two have one result."""
    steps = np.arange(units, dtype=np.int32)[:, None] + iterations
    want = np.array([np.asarray(spin(row)[0]) for row in steps])
    return send(mesh, "bench.spin@1", steps, want, terms)


def right_units(sent: list[Sent], mesh: Mesh, timeout_s: float = RESULT_S_MAX) -> list[int]:
    """How many units of each job came back as they must."""
    counts: list[int] = []
    for job in sent:
        (value,) = mesh.result(job.job_id, timeout_s)
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


async def check_ledgers(
    net: Testnet, sent: list[Sent], outcome: Outcome, excused: Collection[str] = ()
) -> None:
    """Once both sides agree: every history holds, each unit is accepted once, none is missing but
    what an excused car, killed by us, had sent and not signed for."""
    ledgers = await settled(net, sent, excused)
    for name, checked in (("submitter", ledgers.mine), *ledgers.theirs.items()):
        outcome.violations += [f"ledger of {name}: {found.text}" for found in checked.findings]
    for job in sent:
        accepted = accepted_of(ledgers.mine, job.job_id)
        outcome.accepted += len(accepted)
        outcome.unpaid += len(without_receipt(net, job, accepted, ()))
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


async def settled(net: Testnet, sent: list[Sent], excused: Collection[str]) -> Ledgers:
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
    net: Testnet, job: Sent, accepted: Counter[int], excused: Collection[str]
) -> list[int]:
    """Units that came, and stand in no accepted receipt; not those of the excused cars."""
    record = next(r for r in job_records(net.home()) if r.job_digest[:16] == job.job_id)
    spared = {net.peer(name) for name in excused}
    return [
        unit
        for first, count, peer in sources(net.home(), record.job_digest)
        for unit in range(first, first + count)
        if not accepted[unit] and peer not in spared
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


async def keep(net: Testnet, seed: int) -> Path:
    """Logs and ledgers of all nodes, out of the testnet's folder before that goes; and what each
    says of itself: whom it is connected to, and what it has refused."""
    kept = Path(tempfile.mkdtemp(prefix=f"mesh-soak-seed{seed}-"))
    folder = Path(read_testnet(net.name)["folder"])
    shutil.copytree(folder / "log", kept / "log")
    for name in net.nodes:
        (kept / name).mkdir()
        for file in net.home(name).glob("*.sqlite*"):
            shutil.copy2(file, kept / name)
        with suppress(MeshError):
            said = await net.call(lambda mesh: {**mesh.status(), "peers": mesh.peers()}, name)
            (kept / name / "says.json").write_text(json.dumps(said, indent=1, default=str))
    return kept
