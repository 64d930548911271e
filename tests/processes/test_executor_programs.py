"""What a program must be before it runs: validated, compiled confined, within time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio

from meshnode.executor import Artifact, Executor, ExecutorConfig, wire
from meshnode.executor.admission import Refused
from meshnode.executor.cache import ExecutableCache
from meshnode.executor.compiling import Compiler
from meshnode.executor.forks import Zygote
from meshnode.executor.link import open_link
from meshnode.protocol.effects import Admit, ArgSource, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import Admitted, WorkerClasses
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer

from .executor_kit import (
    FolderBlobs,
    House,
    MadeArtifacts,
    complete,
    true,
    until,
    until_end,
    with_executor,
    worker_processes,
)

EXPORT = """
import sys, jax, jax.numpy as jnp
from jax import export, lax
def lapack(x): return jnp.linalg.svd(x)[1]
def trips(x): return lax.fori_loop(0, 1 << 30, lambda i, v: v @ v, x)
def sorts(x):  # tens of seconds to compile
    for i in range(600): x = jnp.sort(x * (i + 2)) - i
    return x
def large(x): return jnp.sort(jnp.broadcast_to(x, (64, 32, 32, 32)), 0)[0, 0] + x
for fn in (lapack, trips, sorts, large):
    # LAPACK is a custom call on the platform that it was exported for, and on no other.
    made = export.export(jax.jit(fn), platforms=("cpu",))(jax.ShapeDtypeStruct((32, 32), "f4"))
    open(f"{sys.argv[1]}/{fn.__name__}.bin", "wb").write(bytes(made.serialize()))
"""

SQUARE = ArraySpec("float32", (32, 32))
OUTS = {"lapack": ArraySpec("float32", (32,))}
TRIPS_FLOP = (1 << 30) * 2 * 32**3


class OwnArtifacts(MadeArtifacts):
    def __init__(self, folder: Path) -> None:
        paths = list(folder.glob("*.bin"))
        self.digests = {p.stem: Digest(hashlib.sha256(p.read_bytes()).digest()) for p in paths}
        self._exported = {self.digests[p.stem]: p.read_bytes() for p in paths}
        self.builtin = False  # whether a release has signed them

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        return Artifact(self._exported[digest], builtin=self.builtin)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> OwnArtifacts:
    folder = tmp_path_factory.mktemp("artifacts")
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True, timeout=120)
    return OwnArtifacts(folder)


@pytest.fixture
def house(tmp_path: Path, artifacts: OwnArtifacts) -> House:
    artifacts.builtin = False
    (tmp_path / "blobs").mkdir()
    config = ExecutorConfig(run_dir=tmp_path, executable_cache=tmp_path / "executables")
    return House(config, artifacts, FolderBlobs(tmp_path / "blobs"))


def run_of(
    house: House, name: str, *, wall_ms_max: int = 60_000, memory_mb_max: int = 512
) -> StartExec:
    spec = ExecSpec(
        submitter=Peer(b"s" * 38),
        job_digest=Digest(b"j" * 32),
        kernel=name,
        artifact=house.artifacts.digests[name],
        args=(ArgSource(True, SQUARE, None),),
        outs=(OUTS.get(name, SQUARE),),
        wall_ms_max=wall_ms_max,
        memory_mb_max=memory_mb_max,
    )
    return house.run(spec, 1, np.eye(32, dtype=np.float32))


def kept(house: House) -> list[Path]:
    assert house.config.executable_cache is not None
    return list(house.config.executable_cache.glob("*.exe"))


# -------------------------------------------------------------------------------------- validation


def test_a_strangers_native_call_is_refused_and_a_releases_is_not(house: House) -> None:
    async def strangers(executor: Executor) -> None:
        for _ in range(2):
            got = await complete(executor, run_of(house, "lapack"))
            assert got.end.reason is Reason.ARTIFACT_CALL
            assert "native code" in got.end.text
        effect = run_of(house, "lapack")
        executor.admit(Admit(effect.exec_id, effect.spec))
        assert (await until_end(executor, effect.exec_id)).end.reason is Reason.ARTIFACT_CALL
        assert executor.compiles == 1  # the others were refused without asking anybody
        assert worker_processes() == [] and kept(house) == []

    async def releases(executor: Executor) -> None:
        got = await complete(executor, run_of(house, "lapack"))
        assert got.end.reason is Reason.DONE, got.end
        assert np.allclose(np.frombuffer(got.outputs[0], np.float32), 1)
        assert len(kept(house)) == 1

    async def once_more(executor: Executor) -> None:
        """What was compiled as a release's lies in the cache, and is not a stranger's to have."""
        got = await complete(executor, run_of(house, "lapack"))
        assert got.end.reason is Reason.ARTIFACT_CALL

    assert isinstance(house.artifacts, OwnArtifacts)
    with_executor(house, strangers)
    house.artifacts.builtin = True
    with_executor(house, releases)
    house.artifacts.builtin = False
    with_executor(house, once_more)


# ------------------------------------------------------------------------------------ confinement


def confined(process: psutil.Process) -> bool:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return (
        status["Seccomp"] == "2" and status["NoNewPrivs"] == "1" and not int(status["CapEff"], 16)
    )


def test_compiling_is_confined_like_running(house: House) -> None:
    async def body(executor: Executor) -> None:
        effect = run_of(house, "sorts")
        executor.start(effect)
        await true(lambda: executor.compiles == 1)
        await true(lambda: len(worker_processes()) == 2 and all(map(confined, worker_processes())))
        executor.stop(StopExec(effect.exec_id, Reason.CANCELLED, 0))
        assert (await until_end(executor, effect.exec_id)).end.reason is Reason.CANCELLED

    with_executor(house, body)


def test_a_compile_only_worker_that_lacks_layers_gets_no_artifact(house: House) -> None:
    def check_layers(layers: int) -> None:
        if layers != 5:
            raise Refused(Reason.SANDBOX, "it lacks some")

    async def never() -> Zygote:
        raise AssertionError("asked for a zygote")

    async def ask(layers: int, answer: bytes) -> bytes:
        """What the worker hears."""
        compiler = Compiler(house.config, ExecutableCache(None, 0), never, check_layers)
        link, theirs = open_link()
        with contextlib.closing(link), theirs:
            ready = wire.READY_BODY.pack(layers, bytes(wire.ENVIRONMENT_BYTES))
            theirs.sendall(wire.frame(wire.READY, ready) + answer)
            with contextlib.suppress(Refused, OSError):
                await compiler._ask(link, wire.Load(b"artifact", (), (), 1))
            theirs.setblocking(False)
            try:
                return theirs.recv(4096)
            except BlockingIOError:
                return b""

    compiled = wire.frame(wire.COMPILED, wire.FIGURES.pack(1, 2, 3), b"code")
    assert b"artifact" in trio.run(ask, 5, compiled)
    assert trio.run(ask, 4, compiled) == b""


# ------------------------------------------------------------------------------------------- cost


def test_what_cannot_end_in_time_is_refused_with_both_figures(house: House) -> None:
    async def body(executor: Executor) -> None:
        executor.probe()
        await until(executor, WorkerClasses)
        for compiles in (1, 1):  # the second time its cost is known, and nobody is asked
            effect = run_of(house, "trips", wall_ms_max=2_000)
            got = await complete(executor, effect)
            assert got.end.reason is Reason.WALL_CLOCK
            assert got.end.meters.wall_ms == 0  # it has not begun
            assert "GFLOP" in got.end.text and "2 s are allowed" in got.end.text
            assert executor.compiles == compiles
        executor.admit(Admit(effect.exec_id, effect.spec))
        assert (await until_end(executor, effect.exec_id)).end.reason is Reason.WALL_CLOCK
        assert worker_processes() == []
        patient = run_of(house, "trips", wall_ms_max=1 << 31)
        executor.admit(Admit(patient.exec_id, patient.spec))
        admitted = await until(executor, Admitted)
        assert isinstance(admitted, Admitted)
        assert TRIPS_FLOP <= admitted.kflop_per_unit * 1000 < TRIPS_FLOP * 1.01

    with_executor(house, body)


def test_what_needs_too_much_memory_is_refused_with_both_figures(house: House) -> None:
    async def body(executor: Executor) -> None:
        for _ in range(2):
            effect = run_of(house, "large", memory_mb_max=1)
            got = await complete(executor, effect)
            assert got.end.reason is Reason.MEMORY
            assert "it needs" in got.end.text and "1 MB are allowed" in got.end.text
        assert executor.compiles == 1
        executor.admit(Admit(effect.exec_id, effect.spec))
        assert (await until_end(executor, effect.exec_id)).end.reason is Reason.MEMORY
        got = await complete(executor, run_of(house, "large"))
        assert got.end.reason is Reason.DONE, got.end
        assert executor.compiles == 1

    with_executor(house, body)
