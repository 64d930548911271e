"""Long jobs and strangers' functions over real processes: the bits, whoever dies."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from jaxkernels import host, registry
from jaxkernels.models import Model
from meshnode.client import Terms, aio
from meshnode.client.blocking import Mesh
from meshnode.errors import ArtifactRefused, UsageError
from meshnode.ledger.load import load
from meshnode.node.home import blobs_path
from meshnode.protocol.effects import TaskRecord
from testnet import link
from testnet.testnet import SUBMITTER, Testnet

from .test_testnet_jobs import killed_with

WITHIN_S = 480.0
STEPS = 10_000
PROMPTS = tuple(f"Tell me a long story about a {thing}." for thing in ("car", "river", "king"))


async def mesh_command(net: Testnet, models: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "meshnode.cli.mesh", *words, "--home", str(net.home())],
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            env={**link.environment(), "MESH_MODELS": str(models)},
        )
    )


async def kill_after_checkpoint(net: Testnet, mesh: aio.AsyncMesh, job_id: bytes) -> int:
    """SIGKILL to the car whose state has just come here; the step that is in it, 0 if the job ended
    before that."""
    async with aclosing(mesh.watch(job_id)) as notices:
        async for notice in notices:
            if notice.kind == "checkpoint":
                task, peer = notice.fields["task"], notice.fields["peer"]
                if await killed_with(net, mesh, job_id, task, peer):
                    return int(notice.fields["step"])
    return 0


async def begun_from(mesh: aio.AsyncMesh, job_id: bytes) -> list[int]:
    """The step that each lease of the job began with, in order, as its log says."""
    return [
        notice.fields["step"]
        for notice in await mesh.logs(job_id)
        if notice.kind == "attempt" and notice.fields["state"] == "leased"
    ]


@pytest.mark.long
def test_a_killed_cars_long_job_goes_on_from_its_checkpoint_with_the_same_bits() -> None:
    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(2, 31) as net, aio.connect(net.home()) as mesh:
                kernel = registry.get("md.lj@1")
                prepared = host.prepare(kernel.spec, 1, {"seed": 5})
                terms = Terms(steps=STEPS)
                calm = await mesh.submit_kernel(kernel, prepared, terms=terms)
                want = await mesh.result(calm)
                killed = await mesh.submit_kernel(kernel, prepared, terms=terms)
                step = await kill_after_checkpoint(net, mesh, killed)
                assert step, "the job ended before its car could be killed"
                (kept,) = (await mesh.show(killed))["checkpoints"]
                assert kept["unit"] == 0 and kept["step"] >= step
                got = await mesh.result(killed)
                assert [a.tobytes() for a in got] == [a.tobytes() for a in want]
                began = await begun_from(mesh, killed)
                assert began[0] == 0 and began[-1] >= step
                shown = await mesh.show(killed)
                assert shown["steps"] == STEPS and shown["checkpoints"] == []
                assert {attempt["from_step"] for attempt in shown["attempts"]} >= set(began)

    trio.run(main)


def stored(home: Path, job_id: bytes) -> list[TaskRecord]:
    """Tasks of the job with a checkpoint in the home's database, also beside a running node."""
    return [task for task in load(home, 0).tasks if task.job_digest[:16] == job_id and task.step]


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False], ids=["state kept", "state lost"])
def test_a_killed_submitters_long_job_goes_on_from_its_checkpoint_with_the_same_bits(
    kept: bool,
) -> None:
    """Or, if the state is gone from its blob store, from the beginning."""

    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(2, 35) as net:
                kernel = registry.get("md.lj@1")
                prepared = host.prepare(kernel.spec, 1, {"seed": 5})
                terms = Terms(steps=STEPS)
                async with aio.connect(net.home()) as mesh:
                    calm = await mesh.submit_kernel(kernel, prepared, terms=terms)
                    want = await mesh.result(calm)
                    killed = await mesh.submit_kernel(kernel, prepared, terms=terms)
                    await net.wait(
                        lambda: stored(net.home(), killed), WITHIN_S, "a state is stored"
                    )
                await net.kill(SUBMITTER)
                (task,) = stored(net.home(), killed)
                assert task.peer is not None and task.state is not None
                await net.kill(net.name_of(task.peer))  # or it might end the job meanwhile
                if not kept:
                    (blobs_path(net.home()) / f"{task.state.blob_id.hex()}.raw").unlink()
                await net.restart(SUBMITTER)
                async with aio.connect(net.home()) as mesh:
                    got = await mesh.result(killed)
                    assert [a.tobytes() for a in got] == [a.tobytes() for a in want]
                    began = await begun_from(mesh, killed)
                    assert began[0] == (task.step if kept else 0)

    trio.run(main)


@pytest.mark.long
def test_a_killed_cars_text_goes_on_where_it_was(smollm2: Model) -> None:
    """As a person sees it: `mesh run`, its output, and the log."""

    async def killed(net: Testnet, mesh: aio.AsyncMesh, words: tuple[str, ...]) -> int:
        """The checkpoint's step; 0 if the text was whole before its car could be killed."""
        models = smollm2.folder.parent
        calm = await mesh_command(net, models, *words)
        assert calm.returncode == 0, calm.stderr
        before = {job["job_id"] for job in await mesh.jobs()}
        outcome: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                outcome.append(await mesh_command(net, models, *words))

            nursery.start_soon(run)
            job_id = await new_job(mesh, before)
            step = await kill_after_checkpoint(net, mesh, job_id)
        (done,) = outcome
        assert done.returncode == 0 and done.stdout == calm.stdout
        resumed = re.findall(r"goes on from step (\d+)", done.stderr)
        assert len(resumed) == (step > 0) and all(int(at) >= step for at in resumed)
        return step

    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(2, 32) as net, aio.connect(net.home()) as mesh:
                for prompt in PROMPTS:  # a fast car may be through before its state is here
                    asked = ("--prompt", prompt, "--set", "max_tokens=200")
                    if await killed(net, mesh, ("run", "lm.llama_decode@1", *asked)):
                        return
                raise AssertionError("every text was whole before its car could be killed")

    trio.run(main)


async def new_job(mesh: aio.AsyncMesh, before: set[bytes]) -> bytes:
    while True:
        for job in await mesh.jobs():
            if job["job_id"] not in before:
                found: bytes = job["job_id"]
                return found
        await trio.lowlevel.checkpoint()


def halve(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.cumsum(x) * 0.5


def times(x: Any, w: Any) -> Any:
    import jax.numpy as jnp

    return jnp.sin(x) @ w, x.sum()


def test_functions_of_ones_own_run_on_cars_that_never_saw_them() -> None:
    def use(mesh: Mesh) -> None:
        rng = np.random.default_rng(3)
        x = rng.integers(0, 100, (40, 32)).astype(np.float32)  # sums of halves are exact
        assert np.array_equal(mesh.submit(halve, x[0]).result(), np.cumsum(x[0]) * 0.5)
        assert np.array_equal(mesh.map(halve, x).result(), np.cumsum(x, axis=1) * 0.5)
        rows = list(itertools.islice(mesh.map(halve, x), 40))
        assert np.array_equal(np.stack(rows), np.cumsum(x, axis=1) * 0.5)
        w = rng.random((32, 8)).astype(np.float32)
        product, total = mesh.map(times, x, constants=(w,)).result()
        np.testing.assert_allclose(product, np.sin(x) @ w, rtol=1e-4, atol=1e-4)
        assert product.shape == (40, 8) and np.array_equal(total, x.sum(axis=1))

    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(2, 33) as net:
                await net.call(use)

    trio.run(main)


def test_what_no_car_would_run_is_refused_before_it_is_sent() -> None:
    import jax
    import jax.numpy as jnp

    weights = np.ones((1024, 512), np.float32)

    def prints(x: Any) -> Any:
        jax.debug.print("{}", x)
        return x

    def heavy(x: Any) -> Any:
        return x @ jnp.asarray(weights)

    def use(mesh: Mesh) -> None:
        x = np.ones((3, 1024), np.float32)
        with pytest.raises(ArtifactRefused, match="side effects"):
            mesh.map(prints, x)
        with pytest.raises(ArtifactRefused, match="make it an argument"):
            mesh.map(heavy, x)
        with pytest.raises(UsageError, match="one row for each unit"):
            mesh.map(prints, np.float32(1))
        assert mesh.jobs() == []

    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            async with Testnet(1, 34) as net:
                await net.call(use)

    trio.run(main)
