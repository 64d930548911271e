"""`python -m testnet.demo`: a real job crosses a real mesh, a car dies in the middle, all is right.

Six cars on this machine embed the Python reference's topics. None of them has the model: weights
come to them through the mesh. Once 40 % is accepted, a car that holds a running lease is killed
with SIGKILL. Then three questions are put to the vectors, again over the mesh. The demo ends with
0 only if every check of `Checks` holds; each is a sentence that it prints.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from meshnode.cli.frame import put_table, talk
from meshnode.cli.inputs import models_folder
from meshnode.cli.watching import progress
from meshnode.errors import MeshError, TimedOut

from .testnet import Testnet

if TYPE_CHECKING:
    from jaxkernels.host import Prepared
    from jaxkernels.models import Model

CARS: Final = 6
SEED: Final = 7
KILL_AT: Final = 0.4
CHECKED_PASSAGES: Final = 32
JOB_S_MAX: Final = 600.0
RECEIPTS_S_MAX: Final = 30.0
EMBED: Final = "embed.minilm@1"
SEARCH: Final = "vec.knn@1"
# Each question, and a topic that must be the first answer.
QUESTIONS: Final = (
    ("How do I repeat a block of code for each item of a list?", "for"),
    ("How can a program handle an error that was raised?", "try"),
    ("Which operators work on integers bit by bit, like and, or, xor?", "bitwise"),
)


class Checks:
    """What must hold at the end; each is said as it is found."""

    def __init__(self) -> None:
        self.failed = 0

    def hold(self, found: bool, sentence: str) -> None:
        self.failed += not found
        talk(f"  {'ok  ' if found else 'FAIL'}  {sentence}")


class Demo:
    def __init__(self, net: Testnet, checks: Checks, model: Model) -> None:
        self.net = net
        self.checks = checks
        self.model = model
        self.killed = ""

    # ---- jobs

    async def submit(self, kernel: str, prepared: Prepared) -> bytes:
        from jaxkernels import registry

        return await self.net.call(lambda mesh: mesh.submit(registry.get(kernel), prepared))

    async def finish(self, job_id: bytes) -> Any:
        return await self.net.call(lambda mesh: mesh.finish(job_id, JOB_S_MAX))

    async def job(self, job_id: bytes) -> dict[str, Any]:
        return await self.net.call(lambda mesh: mesh.show(job_id))

    async def embed(self, prepared: Prepared, what: str, *, kill: bool) -> tuple[bytes, Any]:
        """One job with progress; with `kill` a car dies once 40 % of the units are accepted."""
        job_id = await self.submit(EMBED, prepared)
        with progress(what) as shown, trio.fail_after(JOB_S_MAX):
            while True:
                job = await self.job(job_id)
                shown.at(job["done"] or 0, job["units"])
                if job["state"] != "running":
                    break
                if kill and not self.killed and job["accepted"] >= KILL_AT * job["units"]:
                    victim = self._holder(job)
                    if victim:
                        share = f"{100 * job['accepted'] // job['units']} %"
                        shown.say(f"{share} accepted: SIGKILL to {victim}, which holds a lease")
                        self.killed = victim
                        await self.net.kill(victim)
                await trio.sleep(0.1)
        return job_id, await self.finish(job_id)

    def _holder(self, job: dict[str, Any]) -> str:
        """A car in the middle of a lease: some of its units are not back yet."""
        for attempt in job["attempts"]:
            name = self.net.name_of(attempt["peer"])
            if attempt["state"] == "leased" and attempt["done"] < attempt["count"]:
                return name
        return ""

    async def search(self, vectors: Any, keys: list[str]) -> None:
        """The three questions, embedded and looked up over the mesh."""
        from jaxkernels import host

        asked = host.prepare(EMBED, [question for question, _ in QUESTIONS], None, self.model)
        _, queries = await self.embed(asked, "questions", kill=False)
        table = {"queries": queries, "vectors": vectors}
        job_id = await self.submit(SEARCH, host.prepare(SEARCH, table, {"top": 5}))
        scores, rows = await self.finish(job_id)
        for at, (question, topic) in enumerate(QUESTIONS):
            found = list(dict.fromkeys(keys[row] for row in rows[at]))
            talk(f"  {question}\n      {', '.join(found)} ({scores[at][0]:.2f})")
            self.checks.hold(found[0] == topic, f"the first answer is {topic!r}")

    # ---- checks

    def check_attempts(self, job: dict[str, Any]) -> None:
        """A task of the killed car has a later attempt on another one."""
        dead = self.net.peer(self.killed) if self.killed else b""
        lost = {a["task"]: a["attempt"] for a in job["attempts"] if a["peer"] == dead}
        again = [
            a
            for a in job["attempts"]
            if a["task"] in lost and a["attempt"] > lost[a["task"]] and a["peer"] != dead
        ]
        self.checks.hold(bool(self.killed), "a car that held a running lease was killed")
        where = sorted({self.net.name_of(a["peer"]) for a in again})
        said = ", ".join(where) or "nobody"
        self.checks.hold(bool(again), f"{said} took over what {self.killed or 'it'} had begun")

    def check_reference(self, prepared: Prepared, vectors: Any) -> None:
        """Some passages against NumPy in float64."""
        import numpy as np

        from jaxkernels.embed_minilm.api import BATCH, INFO
        from jaxkernels.embed_minilm.reference import reference

        weights = [arg.array for arg in prepared.args if not arg.mapped]
        mapped = [arg.array for arg in prepared.args if arg.mapped]
        units = min(CHECKED_PASSAGES // BATCH, prepared.units)
        picked = np.linspace(0, prepared.units - 1, units).astype(int)
        worst, count = 0.0, 0
        for unit in picked:
            want = reference(*weights, *(array[unit] for array in mapped))[0]
            got = vectors[unit * BATCH : (unit + 1) * BATCH]
            count += len(got)
            worst = max(worst, float(np.abs(got - want[: len(got)]).max()))
        sentence = f"{count} passages agree with NumPy in float64: {worst:.1e}"
        self.checks.hold(worst <= INFO.tolerance, f"{sentence} <= {INFO.tolerance:.0e}")

    async def check_receipts(self, job_id: bytes, units: int) -> Counter[bytes]:
        """Every accepted unit stands in one receipt, and the whole ledger holds."""
        from meshnode.ledger.load import signed_objects
        from meshnode.node.firstrun import read_network
        from meshnode.protocol.channel_check import accepted_units, check_objects

        home = self.net.home()

        async def accepted() -> bool:
            return bool((await self.job(job_id))["accepted"] == units)

        try:
            await self.net.wait(accepted, RECEIPTS_S_MAX, "every unit is in an accepted receipt")
        except TimedOut as error:
            talk(f"  {error}")
        network = read_network(home).ident
        checked = await trio.to_thread.run_sync(
            lambda: check_objects(signed_objects(home), network)
        )
        for finding in checked.findings:
            talk(f"  {finding.reason.name}: {finding.text}")
        receipts: Counter[bytes] = Counter()
        paid: Counter[int] = Counter()
        for chain in checked.chains:
            for seq, (receipt, _) in chain.receipts.items():
                receipts[receipt.provider] += 1
                if receipt.work.job_id == job_id and seq <= chain.accepted_seq:
                    paid.update(accepted_units(chain, seq))
        count = checked.receipts
        self.checks.hold(not checked.findings, f"{count} receipts verify, signatures and chains")
        once = set(paid.values()) == {1}
        sentence = f"{len(paid)} of {units} units stand in an accepted receipt, each in one"
        self.checks.hold(len(paid) == units and once, sentence)
        return receipts

    async def table(self, job: dict[str, Any], receipts: Counter[bytes]) -> None:
        """Per car: units, attempts, bytes fetched, receipts."""
        attempts: Counter[bytes] = Counter(a["peer"] for a in job["attempts"])
        units: Counter[bytes] = Counter()
        for attempt in job["attempts"]:
            units[attempt["peer"]] += attempt["done"]
        rows = []
        for name in self.net.cars:
            peer = self.net.peer(name)
            fetched = "killed"
            if self.net.nodes[name]["state"] == "ready":
                status = await self.net.call(lambda mesh: mesh.status(), name)
                fetched = f"{status['counters'].get('blob_bytes_fetched', 0) / 1e6:.1f} MB"
            rows.append((name, units[peer], attempts[peer], fetched, receipts[peer]))
        put_table(("CAR", "UNITS", "ATTEMPTS", "FETCHED", "RECEIPTS"), rows)


def load_model() -> Model:
    """The weights on the submitter's side: downloaded once, checked against models.lock."""
    from jaxkernels import models

    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with progress("weights", "MB") as shown:

        def report(_: str, done: int, total: int) -> None:
            shown.at(done // 1_000_000, max(1, total // 1_000_000))

        return models.get("minilm", folder, report)


def corpus(model: Model) -> tuple[list[str], list[str]]:
    """Passages of the Python reference's topics, and the topic of each."""
    from pydoc_data.topics import topics

    from jaxkernels.embed_minilm.host import open_tokenizer, split_passages

    tokenizer = open_tokenizer(model.tokenizer_path)
    passages, keys = [], []
    for key, text in sorted(topics.items()):
        cut = split_passages(text, tokenizer)
        passages += cut
        keys += [key] * len(cut)
    return passages, keys


def weights_package() -> str:
    """The package that the cars must not have: its import name."""
    from jaxkernels import models

    return models.lock("minilm").weights_member.split("/")[0]


async def demo(cars: int, units_max: int | None) -> int:
    """All of it; how many checks failed."""
    from jaxkernels import host

    checks = Checks()
    model = await trio.to_thread.run_sync(load_model)
    passages, keys = await trio.to_thread.run_sync(corpus, model)
    if units_max is not None:
        passages, keys = passages[: 8 * units_max], keys[: 8 * units_max]
    prepare = partial(host.prepare, EMBED, passages, None, model)
    prepared = await trio.to_thread.run_sync(prepare)
    start_s = time.monotonic()
    async with Testnet(cars, SEED) as net:
        talk(f"{cars} cars and a submitter are up after {time.monotonic() - start_s:.1f} s")
        talk(f"embedding {len(passages)} passages: {prepared.units} units of {EMBED}")
        run = Demo(net, checks, model)
        run_s = time.monotonic()
        job_id, vectors = await run.embed(prepared, "with a kill", kill=True)
        talk(f"done after {time.monotonic() - run_s:.1f} s, {run.killed or 'nobody'} killed")
        job = await run.job(job_id)
        receipts = await run.check_receipts(job_id, prepared.units)
        await run.table(job, receipts)
        package = weights_package()
        missing = importlib.util.find_spec(package) is None
        checks.hold(missing, f"no car can import {package}: weights came through the mesh")
        run.check_attempts(job)
        talk("the same again, and nobody is killed")
        _, calm = await run.embed(prepared, "without a kill", kill=False)
        same = vectors.tobytes() == calm.tobytes()
        checks.hold(same, f"all {len(vectors)} vectors are bitwise the same in both runs")
        await trio.to_thread.run_sync(run.check_reference, prepared, vectors)
        await run.search(vectors, keys)
    return checks.failed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m testnet.demo", description=__doc__)
    parser.add_argument("--cars", type=int, default=CARS)
    parser.add_argument("--units", type=int, help="Only so many units, for a quick look.")
    options = parser.parse_args(arguments)
    start_s = time.monotonic()
    try:
        failed = trio.run(demo, options.cars, options.units)
    except MeshError as error:
        talk(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        talk("stopped; nothing is left running")
        return 130
    took_s = time.monotonic() - start_s
    talk(f"{'PASS' if not failed else f'FAIL: {failed} checks'} in {took_s:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
