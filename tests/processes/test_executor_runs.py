"""Loops over short units and the cache of machine code, with real workers: bits never change."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio

from meshnode.executor import Artifact, Executor, ExecutorConfig, wire
from meshnode.executor.cache import MAGIC
from meshnode.protocol.effects import Admit, ArgSource, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import Event, ExecEnded
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer

from .executor_kit import (
    FolderBlobs,
    House,
    MadeArtifacts,
    complete,
    gone,
    true,
    until_end,
    with_executor,
    worker_processes,
)

EXPORT = """
import sys, jax, jax.numpy as jnp
from jax import export
def s(d, *n): return jax.ShapeDtypeStruct(n, d)
f32, i32, b = jnp.float32, jnp.int32, jnp.bool_
def pair(w, x, k): return jnp.tanh(x @ w) / (1 + k), k * 3, x > 0
def plus(x): return x + 1
def minus(x): return x - 1
def sweat(x): return jnp.sum(jnp.sin(jnp.full((1 << 24,), x[0]) + jnp.arange(1 << 24))).reshape(1)
def sorts(x):  # tens of seconds to compile
    for i in range(600): x = jnp.sort(x * (i + 2)) - i
    return x
for name, fn, shapes in (
    ("pair", pair, (s(f32, 8, 8), s(f32, 3, 8), s(i32))),
    ("plus", plus, (s(f32, 16),)),
    ("minus", minus, (s(f32, 16),)),
    ("sorts", sorts, (s(f32, 16),)),
    ("sweat", sweat, (s(f32, 1),)),
):
    made = export.export(jax.jit(fn), platforms=("cpu", "cuda", "tpu"))(*shapes)
    open(f"{sys.argv[1]}/{name}.bin", "wb").write(bytes(made.serialize()))
"""

ROW = ArraySpec("float32", (16,))
ONE = ArraySpec("float32", (1,))
PAIR_ARGS = (ArraySpec("float32", (8, 8)), ArraySpec("float32", (3, 8)), ArraySpec("int32", ()))
UNITS = 200
PAIR_OUTS = (ArraySpec("float32", (3, 8)), ArraySpec("int32", ()), ArraySpec("bool", (3, 8)))


class OwnArtifacts(MadeArtifacts):
    def __init__(self, folder: Path) -> None:
        self.digests = {}
        self._exported = {}
        for path in folder.glob("*.bin"):
            exported = path.read_bytes()
            self.digests[path.stem] = Digest(hashlib.sha256(exported).digest())
            self._exported[self.digests[path.stem]] = exported

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        return Artifact(self._exported[digest])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> OwnArtifacts:
    folder = tmp_path_factory.mktemp("artifacts")
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True, timeout=120)
    return OwnArtifacts(folder)


@pytest.fixture
def house(tmp_path: Path, artifacts: OwnArtifacts) -> House:
    (tmp_path / "blobs").mkdir()
    config = ExecutorConfig(run_dir=tmp_path, executable_cache=tmp_path / "executables")
    return House(config, artifacts, FolderBlobs(tmp_path / "blobs"))


def kept(house: House) -> list[Path]:
    """Files of the cache, oldest first."""
    assert house.config.executable_cache is not None
    paths = house.config.executable_cache.glob("*.exe")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def spec_of(
    house: House, name: str, args: tuple[ArgSource, ...], outs: tuple[ArraySpec, ...]
) -> ExecSpec:
    return ExecSpec(
        submitter=Peer(b"s" * 38),
        job_digest=Digest(b"j" * 32),
        kernel=name,
        artifact=house.artifacts.digests[name],
        args=args,
        outs=outs,
        wall_ms_max=60_000,
        memory_mb_max=512,
    )


def rows(house: House, name: str, count: int, shape: ArraySpec = ROW) -> StartExec:
    """Units of one inline row in, one like it out."""
    spec = spec_of(house, name, (ArgSource(True, shape, None),), (shape,))
    return house.run(spec, count, np.arange(count * shape.shape[0], dtype=np.float32))


def pairs(house: House, count: int, first: int = 0) -> StartExec:
    """Three outputs of three dtypes from a constant, a mapped blob and an inline scalar."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((8, 8)).astype(np.float32)
    x = rng.standard_normal((UNITS, 3, 8)).astype(np.float32)
    args = (
        ArgSource(False, PAIR_ARGS[0], house.blobs.put(w)),
        ArgSource(True, PAIR_ARGS[1], house.blobs.put(x)),
        ArgSource(True, PAIR_ARGS[2], None),
    )
    spec = spec_of(house, "pair", args, PAIR_OUTS)
    return house.run(spec, count, np.arange(first, first + count, dtype=np.int32), first=first)


async def one_by_one(executor: Executor, house: House) -> list[bytes]:
    """Every unit as a run of its own."""
    outputs = []
    for unit in range(UNITS):
        outputs += (await complete(executor, pairs(house, 1, unit))).outputs
    return outputs


async def get_loop(executor: Executor, house: House, run: Callable[[], StartExec]) -> list[bytes]:
    """Run until the worker has asked for a loop and has got it; the first run's outputs."""
    first = await complete(executor, run())
    with trio.fail_after(60):
        while len(kept(house)) < 2:
            assert (await complete(executor, run())).outputs == first.outputs
    await true(lambda: len(kept(house)) == 2 and len(worker_processes()) == 1)
    return first.outputs


# ------------------------------------------------------------------------------------------- loops


def test_a_loop_gives_the_bits_of_unit_by_unit_for_runs_of_every_length(house: House) -> None:
    async def body(executor: Executor) -> None:
        want = await one_by_one(executor, house)
        assert executor.compiles == 1  # runs of one ask for no loop
        assert await get_loop(executor, house, lambda: pairs(house, UNITS)) == want
        for first, count in (
            (0, UNITS),
            (0, 64),
            (1, 1),
            (5, 2),
            (9, 3),
            (3, 7),
            (8, 65),
            (7, 130),
        ):
            got = await complete(executor, pairs(house, count, first))
            assert got.end.reason is Reason.DONE, got.end
            assert got.outputs == want[first : first + count]
        assert executor.compiles == 2

    with_executor(house, body)


@pytest.mark.long
def test_a_loop_gives_the_same_bits_through_shared_memory(house: House) -> None:
    async def body(executor: Executor) -> None:
        await get_loop(executor, house, lambda: rows(house, "plus", 64))
        for count in (4_096, 64, 1_100, 2_000):  # 64 bytes each: over 64 kB they go there
            got = await complete(executor, rows(house, "plus", count))
            assert got.end.reason is Reason.DONE, got.end
            want = np.arange(count * 16, dtype=np.float32) + 1
            assert b"".join(got.outputs) == want.tobytes()
            assert got.batches >= count / 128

    with_executor(house, body)


@pytest.mark.long
def test_a_loop_costs_the_worker_a_fraction(house: House) -> None:
    async def cost_s(executor: Executor, count: int) -> float:
        """Processor time of a unit, of so many that the clock's ticks of 10 ms do not matter."""
        (worker,) = worker_processes()
        units, spent, before = 0, 0.0, cpu_s(worker)
        while spent < 0.3:
            await complete(executor, rows(house, "plus", count))
            units += count
            spent = cpu_s(worker) - before
        return spent / units

    def cpu_s(worker: psutil.Process) -> float:
        times = worker.cpu_times()
        return float(times.user + times.system)

    async def body(executor: Executor) -> None:
        await complete(executor, rows(house, "plus", 7))
        alone_s = await cost_s(executor, 7)  # a run of seven asks for no loop
        await get_loop(executor, house, lambda: rows(house, "plus", 64))
        await complete(executor, rows(house, "plus", 64))  # proves it
        assert await cost_s(executor, 1024) < alone_s / 3  # a twentieth on a quiet machine

    with_executor(house, body)


@pytest.mark.long
def test_long_units_get_no_loop(house: House) -> None:
    async def body(executor: Executor) -> None:
        got = await complete(executor, rows(house, "sweat", 16, ONE))
        assert got.end.reason is Reason.DONE and len(got.outputs) == 16
        assert (await complete(executor, rows(house, "sweat", 16, ONE))).outputs == got.outputs
        assert executor.compiles == 1 and len(kept(house)) == 1

    with_executor(house, body)


@pytest.mark.long
def test_a_loop_with_other_bits_is_never_used(house: House) -> None:
    """The machine code of another kernel in the loop's place: x - 1 instead of x + 1."""

    def loop_is_there(executor: Executor) -> bool:
        """Asked for, and no task brings it any more: it lies before the worker's next run."""
        (worker,) = executor._workers
        tasks = executor._nursery.child_tasks
        return worker.loop_asked and not any("_bring_loop" in task.name for task in tasks)

    async def run(executor: Executor) -> None:
        got = await complete(executor, rows(house, "plus", 200))
        want = np.arange(200 * 16, dtype=np.float32) + 1
        assert b"".join(got.outputs) == want.tobytes()
        assert got.end.reason is Reason.DONE

    async def body(executor: Executor) -> None:
        await run(executor)
        while not loop_is_there(executor):
            await run(executor)
        for _ in range(2):  # one that tries the loop, one after that
            await run(executor)
        assert executor.compiles == 0  # both came from the cache

    def loop_of(name: str) -> Path:
        """The program's loop, compiled into a cache of its own."""

        async def fill(executor: Executor) -> None:
            await get_loop(executor, house, lambda: rows(house, name, 64))

        house.config = replace(house.config, executable_cache=house.config.run_dir / name)
        with_executor(house, fill)
        return kept(house)[1]

    wrong, right = loop_of("minus"), loop_of("plus")
    right.chmod(0o600)
    right.write_bytes(wrong.read_bytes())
    with_executor(house, body)


# ------------------------------------------------------------------------------------------- cache


def test_a_restarted_node_compiles_nothing_and_gives_the_same_bits(house: House) -> None:
    async def cold(executor: Executor) -> None:
        outputs.append(await get_loop(executor, house, lambda: pairs(house, UNITS)))
        assert executor.compiles == 2

    async def warm(executor: Executor) -> None:
        outputs.append((await complete(executor, pairs(house, UNITS))).outputs)
        await true(lambda: len(worker_processes()) == 1)
        outputs.append((await complete(executor, pairs(house, UNITS))).outputs)
        assert executor.compiles == 0

    async def without(executor: Executor) -> None:
        outputs.append((await complete(executor, pairs(house, UNITS))).outputs)

    outputs: list[list[bytes]] = []
    with_executor(house, cold)
    with_executor(house, warm)
    house.config = replace(house.config, executable_cache=None)
    with_executor(house, without)
    assert len(outputs) == 4 and all(other == outputs[0] for other in outputs)


@pytest.mark.long
def test_other_threads_are_another_environment(house: House) -> None:
    async def one(executor: Executor) -> None:
        await complete(executor, pairs(house, 1))
        assert executor.compiles == 1

    with_executor(house, one)
    house.config = replace(house.config, threads=house.config.threads_per_worker() + 1)
    with_executor(house, one)
    assert len(kept(house)) == 2


@pytest.mark.long
def test_a_damaged_entry_is_compiled_again(house: House) -> None:
    async def one(executor: Executor) -> None:
        outputs.append((await complete(executor, pairs(house, 3))).outputs)
        compiles.append(executor.compiles)

    outputs: list[list[bytes]] = []
    compiles: list[int] = []
    with_executor(house, one)
    (path,) = kept(house)
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:-100] + bytes(100))
    with_executor(house, one)
    with_executor(house, one)
    assert compiles == [1, 1, 0]
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(kept(house)[0].read_bytes()) == len(whole)


@pytest.mark.long
def test_an_entry_that_does_not_load_is_dropped_and_the_worker_compiles(house: House) -> None:
    async def one(executor: Executor) -> None:
        got = await complete(executor, pairs(house, 3))
        assert got.end.reason is Reason.DONE, got.end
        outputs.append(got.outputs)

    outputs: list[list[bytes]] = []
    with_executor(house, one)
    (path,) = kept(house)
    figures = wire.EXECUTABLE_HEAD.unpack_from(path.read_bytes())[2:]
    strange = b"whole, but no executable of this machine"
    digest = hashlib.sha256(wire.FIGURES.pack(*figures) + strange).digest()
    path.chmod(0o600)
    path.write_bytes(wire.EXECUTABLE_HEAD.pack(MAGIC, digest, *figures) + strange)
    with_executor(house, one)
    assert kept(house) == []
    with_executor(house, one)
    assert outputs[0] == outputs[1] == outputs[2] and len(kept(house)) == 1


@pytest.mark.long
def test_two_workers_with_one_program_compile_it_once(house: House) -> None:
    house.config = replace(house.config, slots=2, threads=1)

    async def body(executor: Executor) -> None:
        ours, theirs = pairs(house, 2), pairs(house, 2)
        theirs = replace(theirs, spec=replace(theirs.spec, submitter=Peer(b"o" * 38)))
        executor.start(ours)
        executor.start(theirs)
        ends: dict[int, Reason] = {}
        while len(ends) < 2:
            event: Event = await executor.events.receive()
            if isinstance(event, ExecEnded):
                ends[event.exec_id] = event.reason
        assert set(ends.values()) == {Reason.DONE}
        assert len(worker_processes()) == 2
        assert executor.compiles == 1

    with_executor(house, body)


@pytest.mark.long
def test_a_stop_while_compiling_leaves_no_process(house: House) -> None:
    async def body(executor: Executor) -> None:
        effect = rows(house, "sorts", 1)
        executor.start(effect)
        await true(lambda: executor.compiles == 1)
        processes = worker_processes()
        assert len(processes) == 2
        executor.stop(StopExec(effect.exec_id, Reason.CANCELLED, 1_000))
        assert (await until_end(executor, effect.exec_id)).end.reason is Reason.CANCELLED
        await gone(processes)
        again = await complete(executor, pairs(house, 2))
        assert again.end.reason is Reason.DONE

    with_executor(house, body)


@pytest.mark.long
def test_a_compile_is_bounded_in_time(house: House) -> None:
    house.config = replace(house.config, load_s_max=1.0)

    async def body(executor: Executor) -> None:
        executor.admit(Admit(77, pairs(house, 1).spec))
        await true(lambda: executor.zygote_ready)
        got = await complete(executor, rows(house, "sorts", 1))
        assert got.end.reason is Reason.WALL_CLOCK and "1 s" in got.end.text
        await true(lambda: worker_processes() == [])
        assert kept(house) == []

    with_executor(house, body)
