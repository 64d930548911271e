"""`python -m testnet.demo`: a real job crosses a real mesh, a car dies in the middle, all is right.

Six cars on this machine embed the Python reference's topics. None of them has the model: weights
come to them through the mesh. Once 40 % is accepted, a car that holds a running lease is killed
with SIGKILL. Then three questions are put to the vectors, again over the mesh, and a function of
this program, which no car has seen, is run on each of them. Then all of it is embedded
again, and the driver of a car that computes comes back. The demo ends with 0 only if every check of
`Checks` holds; each is a sentence that it prints.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from meshnode.cli.frame import put_table, talk
from meshnode.cli.inputs import models_folder
from meshnode.cli.watching import progress
from meshnode.errors import TimedOut

from .testnet import Testnet

if TYPE_CHECKING:
    from jaxkernels.host import Prepared
    from jaxkernels.models import Model
    from meshnode.client import Mesh
    from meshnode.protocol.channel_check import Checked

CARS: Final = 6
SEED: Final = 7
KILL_AT: Final = 0.4
CHECKED_PASSAGES: Final = 32
STRONGEST: Final = 16
IDLE_S_MAX: Final = 10.0
JOB_S_MAX: Final = 600.0
RECEIPTS_S_MAX: Final = 30.0
EMBED: Final = "embed.minilm@1"
SEARCH: Final = "vec.knn@1"
# Each question, and the topic that must come first; by 0.19 and more before any other topic.
QUESTIONS: Final = (
    ("How do I set a breakpoint in the debugger?", "debugger"),
    ("Format a string with curly braces", "formatstrings"),
    ("What does the assert statement do?", "assert"),
)


_ATTEMPT: Final = ("task", "attempt", "peer")
Say = Callable[[str], None]


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
        self.killed_lease: dict[str, Any] = {}
        self.killed_bytes = 0  # fetched by it until then: nobody can ask it afterwards
        self.drove = ""  # the car whose driver came back
        self.drove_lease: dict[str, Any] = {}
        self.idle_ms = 0.0  # from then until it had let go of its runs

    # ---- jobs

    async def submit(self, kernel: str, prepared: Prepared) -> bytes:
        from jaxkernels import registry

        return await self.net.call(lambda mesh: mesh.submit_kernel(registry.get(kernel), prepared))

    async def finish(self, job_id: bytes) -> Any:
        return await self.net.call(lambda mesh: mesh.finish(job_id, JOB_S_MAX))

    async def job(self, job_id: bytes) -> dict[str, Any]:
        return await self.net.call(lambda mesh: mesh.show(job_id))

    async def embed(
        self, prepared: Prepared, what: str, *, kill: bool = False, drive: bool = False
    ) -> tuple[bytes, Any]:
        """One job with progress; once 40 % of the units are accepted, `kill` lets a car die and
        `drive` lets one drive away."""
        job_id = await self.submit(EMBED, prepared)
        with progress(what) as shown, trio.fail_after(JOB_S_MAX):
            while True:
                job = await self.job(job_id)
                shown.at(job["done"] or 0, job["units"])
                if job["state"] != "running":
                    break
                due = (kill and not self.killed) or (drive and not self.drove)
                if due and job["accepted"] >= KILL_AT * job["units"]:
                    lease = self._lease_in_work(job)
                    if lease is not None:
                        await (self._kill if kill else self._drive)(job, lease, shown.say)
                await trio.sleep(0.1)
        if job["state"] != "done":
            self._tell(job)
        return job_id, await self.finish(job_id)

    async def _kill(self, job: dict[str, Any], lease: dict[str, Any], say: Say) -> None:
        victim = self.net.name_of(lease["peer"])
        share = f"{100 * job['accepted'] // job['units']} %"
        say(f"{share} accepted: SIGKILL to {victim}, which holds a lease")
        self.killed_bytes = await self.fetched_bytes(victim)
        self.killed, self.killed_lease = victim, lease
        await self.net.kill(victim)

    async def _drive(self, job: dict[str, Any], lease: dict[str, Any], say: Say) -> None:
        """The driver of a car that computes comes back: how soon it has let go of its runs."""
        car = self.net.name_of(lease["peer"])
        share = f"{100 * job['accepted'] // job['units']} %"
        say(f"{share} accepted: the driver of {car} is back, in the middle of a run")
        self.drove, self.drove_lease = car, lease

        async def idle() -> bool:
            found = await self.net.call(lambda mesh: mesh.status(), car)
            working = any(one["stage"] != "ended" for one in found["leases"])
            return bool(found["may_run"]["code"]) and not working

        began_s = time.monotonic()
        await self.net.drive_away(car)
        await self.net.wait(idle, IDLE_S_MAX, f"{car} has let go of its runs")
        self.idle_ms = 1_000 * (time.monotonic() - began_s)

    def _tell(self, job: dict[str, Any]) -> None:
        """Why the job failed, attempt by attempt."""
        for a in job["attempts"]:
            if a["reason"]["code"]:
                name, text = self.net.name_of(a["peer"]), a["reason"]["text"]
                talk(f"  units {a['first']} to {a['first'] + a['count'] - 1} on {name}: {text}")

    def _lease_in_work(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The attempt with most left of those of which some units are back, and not all."""
        running = [
            attempt
            for attempt in job["attempts"]
            if attempt["state"] == "leased" and 0 < attempt["done"] < attempt["count"]
        ]
        return max(running, key=lambda a: a["count"] - a["done"], default=None)

    async def fetched_bytes(self, name: str) -> int:
        status = await self.net.call(lambda mesh: mesh.status(), name)
        return int(status["counters"].get("blob_bytes_fetched", 0))

    async def search(self, vectors: Any, keys: list[str]) -> None:
        """The three questions, embedded and looked up over the mesh."""
        from jaxkernels import host

        asked = host.prepare(EMBED, [question for question, _ in QUESTIONS], None, self.model)
        _, queries = await self.embed(asked, "questions")
        table = {"queries": queries, "vectors": vectors}
        job_id = await self.submit(SEARCH, host.prepare(SEARCH, table, {"top": 5}))
        scores, rows = await self.finish(job_id)
        for at, (question, topic) in enumerate(QUESTIONS):
            found = list(dict.fromkeys(keys[row] for row in rows[at]))
            talk(f"  {question}\n      {', '.join(found)} ({scores[at][0]:.2f})")
            self.checks.hold(found[0] == topic, f"the first answer is {topic!r}")

    async def strangers_function(self, vectors: Any) -> None:
        """A function that is in no release: exported here, validated and run by the cars."""
        import numpy as np

        talk(f"{strongest.__name__}(x), a function of this program, for each of the vectors")
        job = partial(_map_function, vectors=vectors)
        found = await self.net.call(job)
        want = np.sort(np.abs(vectors), axis=1)[:, ::-1][:, :STRONGEST]
        self.checks.hold(
            found.tobytes() == np.ascontiguousarray(want).tobytes(),
            f"{len(found)} results of a function that no car had seen are NumPy's, to the bit",
        )

    # ---- checks

    def check_attempts(self, job: dict[str, Any]) -> None:
        """The task whose lease died was finished by a later attempt on another car."""
        self.checks.hold(bool(self.killed), "a car that held a running lease was killed")
        lost = self.killed_lease
        again = [
            f"units {a['first']} to {a['first'] + a['count'] - 1} by attempt {a['attempt']} on "
            f"{self.net.name_of(a['peer'])}"
            for a in job["attempts"]
            if lost
            and a["task"] == lost["task"]
            and a["attempt"] > lost["attempt"]
            and a["peer"] != lost["peer"]
            and a["state"] == "returned"
        ]
        said = ", ".join(again) or "nobody"
        self.checks.hold(bool(again), f"what {self.killed} left of its lease was done: {said}")

    def check_drive(self, job: dict[str, Any]) -> None:
        """What the car that drove away had done is kept, and another car does the rest."""
        self.checks.hold(bool(self.drove), "a car drove away in the middle of a run")
        left = self.drove_lease
        kept = [
            a["done"]
            for a in job["attempts"]
            if left and (a["task"], a["attempt"], a["peer"]) == tuple(map(left.get, _ATTEMPT))
        ]
        rest = sum(
            a["done"]
            for a in job["attempts"]
            if left
            and a["task"] == left["task"]
            and a["attempt"] > left["attempt"]
            and a["peer"] != left["peer"]
        )
        sentence = f"{self.drove} let go of its run after {self.idle_ms:.0f} ms; it had handed in "
        sentence += f"{sum(kept)} units of its run, others did {rest}"
        self.checks.hold(bool(left) and sum(kept) + rest >= left["count"], sentence)

    def check_weights(self, job: dict[str, Any], fetched: dict[str, int]) -> None:
        """Every car that worked has fetched as much as the weights."""
        from jaxkernels import models

        worked = {self.net.name_of(a["peer"]) for a in job["attempts"] if a["done"]}
        least = min(fetched[name] for name in worked)
        # All arguments but the pooler, which the weight file has and the kernel does not need.
        through_mesh = least >= 0.95 * models.lock("minilm").weights_bytes
        alone = importlib.util.find_spec(weights_package()) is None
        sentence = f"{len(worked)} cars, none of which can import {weights_package()}, got the "
        sentence += f"weights through the mesh: {least / 1e6:.0f} MB at least"
        self.checks.hold(alone and through_mesh, sentence)

    def check_reference(self, prepared: Prepared, vectors: Any) -> None:
        """Some passages against NumPy in float64."""
        import numpy as np

        from jaxkernels.embed_minilm.api import INFO, TOKENS
        from jaxkernels.embed_minilm.reference import reference

        weights = [arg.array for arg in prepared.args if not arg.mapped]
        mapped = [arg.array for arg in prepared.args if arg.mapped]
        # Rows of a unit do not see each other, so any rows make one call of the reference.
        rows = np.linspace(0, len(vectors) - 1, CHECKED_PASSAGES).astype(int)
        want = reference(*weights, *(array.reshape(-1, TOKENS)[rows] for array in mapped))[0]
        worst = float(np.abs(vectors[rows] - want).max())
        sentence = f"{len(rows)} passages agree with NumPy in float64: {worst:.1e}"
        self.checks.hold(worst <= INFO.tolerance, f"{sentence} <= {INFO.tolerance:.0e}")

    async def check_receipts(self, job: dict[str, Any]) -> Counter[bytes]:
        """Every receipt holds; every unit stands in one that is accepted, but for units that came
        from the killed car in its last moment: it cannot sign for them any more, nor be paid."""
        orphans = self._unsigned(job)
        due = set(range(job["units"])) - orphans

        async def settled() -> bool:
            _, paid = await trio.to_thread.run_sync(self._ledger, job["job_id"])
            return due <= paid.keys()

        try:
            await self.net.wait(settled, RECEIPTS_S_MAX, "every unit is in an accepted receipt")
        except TimedOut as error:
            talk(f"  {error}")
        checked, paid = await trio.to_thread.run_sync(self._ledger, job["job_id"])
        for finding in checked.findings:
            talk(f"  {finding.reason.name}: {finding.text}")
        receipts: Counter[bytes] = Counter(
            receipt.provider
            for chain in checked.chains
            for receipt, _ in chain.receipts.values()
            if receipt.work.job_id == job["job_id"]
        )
        count = checked.receipts
        self.checks.hold(not checked.findings, f"{count} receipts verify, signatures and chains")
        missing = set(range(job["units"])) - paid.keys()
        whole = missing <= orphans and set(paid.values()) == {1}
        sentence = f"{len(paid)} of {job['units']} units stand in one accepted receipt each"
        if missing:
            sentence += f", {len(missing)} came just before {self.killed} died and are not paid"
        self.checks.hold(whole, sentence)
        return receipts

    def _ledger(self, job_id: bytes) -> tuple[Checked, Counter[int]]:
        """Thread: the submitter's ledger checked from scratch, and the job's settled units."""
        from meshnode.ledger.load import signed_objects
        from meshnode.node.firstrun import read_network
        from meshnode.protocol.channel_check import accepted_units, check_objects

        home = self.net.home()
        checked = check_objects(signed_objects(home), read_network(home).ident)
        paid: Counter[int] = Counter()
        for chain in checked.chains:
            for seq, (receipt, _) in chain.receipts.items():
                if receipt.work.job_id == job_id and seq <= chain.accepted_seq:
                    paid.update(accepted_units(chain, seq))
        return checked, paid

    def _unsigned(self, job: dict[str, Any]) -> set[int]:
        """Units that the killed car returned: some of their receipts died with it."""
        if not self.killed:
            return set()
        dead = self.net.peer(self.killed)
        return {
            unit
            for attempt in job["attempts"]
            if attempt["peer"] == dead
            for unit in range(attempt["first"], attempt["first"] + attempt["done"])
        }

    async def table(self, job: dict[str, Any], receipts: Counter[bytes]) -> dict[str, int]:
        """Per car: units, attempts, bytes fetched, receipts; the bytes by car."""
        attempts: Counter[bytes] = Counter(a["peer"] for a in job["attempts"])
        units: Counter[bytes] = Counter()
        for attempt in job["attempts"]:
            units[attempt["peer"]] += attempt["done"]
        rows, bytes_of = [], {self.killed: self.killed_bytes}
        for name in self.net.cars:
            peer = self.net.peer(name)
            if name != self.killed:
                bytes_of[name] = await self.fetched_bytes(name)
            fetched = f"{bytes_of[name] / 1e6:.1f} MB"
            shown = f"{name} (killed)" if name == self.killed else name
            rows.append((shown, units[peer], attempts[peer], fetched, receipts[peer]))
        put_table(("CAR", "UNITS", "ATTEMPTS", "FETCHED", "RECEIPTS"), rows)
        return bytes_of


def strongest(x: Any) -> Any:
    """The strongest components of a vector, without their signs."""
    import jax.numpy as jnp

    return jnp.sort(jnp.abs(x))[::-1][:STRONGEST]


def _map_function(mesh: Mesh, vectors: Any) -> Any:
    return mesh.map(strongest, vectors).result(JOB_S_MAX)


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


async def demo(cars: int, units_max: int | None, searches: bool) -> int:
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
        receipts = await run.check_receipts(job)
        fetched = await run.table(job, receipts)
        run.check_weights(job, fetched)
        run.check_attempts(job)
        if searches:
            await run.search(vectors, keys)
        await run.strangers_function(vectors)
        talk(
            "the same again, and a car drives away in the middle; meanwhile "
            f"{CHECKED_PASSAGES} passages in NumPy"
        )
        async with trio.open_nursery() as nursery:
            compare = partial(run.check_reference, prepared, vectors)
            nursery.start_soon(trio.to_thread.run_sync, compare)
            again_id, again = await run.embed(prepared, "with a drive-away", drive=True)
        run.check_drive(await run.job(again_id))
        same = vectors.tobytes() == again.tobytes()
        sentence = f"all {len(vectors)} vectors are bitwise those of the run in which a car died"
        checks.hold(same, sentence)
    return checks.failed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m testnet.demo", description=__doc__)
    parser.add_argument("--cars", type=int, default=CARS)
    parser.add_argument("--units", type=int, help="Only so many units, for a quick look.")
    parser.add_argument("--no-search", action="store_true", help="Without the three questions.")
    options = parser.parse_args(arguments)
    start_s = time.monotonic()
    try:
        failed = trio.run(demo, options.cars, options.units, not options.no_search)
    except BaseException as error:  # noqa: BLE001 - one clear line, whatever it was wrapped in
        return _last_line(error)
    took_s = time.monotonic() - start_s
    talk(f"{'PASS' if not failed else f'FAIL: {failed} checks'} in {took_s:.0f} s")
    return 1 if failed else 0


def _last_line(error: BaseException) -> int:
    single = error
    while isinstance(single, BaseExceptionGroup):
        single = single.exceptions[0]
    if isinstance(single, KeyboardInterrupt):
        talk("stopped; nothing is left running")
        return 130
    # Those of jaxkernels have a code too, and are not of our tree.
    code = getattr(single, "exit_code", None)
    if not isinstance(code, int):
        raise error
    talk(f"error: {' '.join(str(single).split())}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
