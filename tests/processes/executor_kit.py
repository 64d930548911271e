"""One real executor for the tests: programs of their own, blobs in a folder, what a run brought."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import trio

from jaxkernels import registry
from meshnode.executor import (
    Artifact,
    BuiltinArtifacts,
    Executor,
    ExecutorConfig,
    open_executor,
)
from meshnode.executor.artifacts import ArtifactSource
from meshnode.executor.bounds import BlobFiles
from meshnode.protocol.effects import ArgSource, ExecSpec, StartExec
from meshnode.protocol.events import (
    Event,
    ExecEnded,
    UnitsDone,
)
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer, TaskId, UnitRun

TEST_S_MAX = 90
NOOP = Digest(registry.artifact("bench.noop@1").digest)
ROW = ArraySpec("float32", (16,))

EXPORT = """
import sys, jax, jax.numpy as jnp
from jax import export, lax
jax.config.update("jax_enable_x64", True)
def s(d, *n): return jax.ShapeDtypeStruct(n, d)
f32, f64, i32 = jnp.float32, jnp.float64, jnp.int32
def affine(w, x, b): return x @ w + b, jnp.max(x).reshape(1)
def forever(x): return lax.while_loop(lambda v: v[0] < 1e30, lambda v: v * 0 + 1, x)
def steps(n): return lax.fori_loop(0, n[0], lambda i, v: jnp.sin(v) + i, jnp.float32(1)).reshape(1)
def wide(x): return jnp.cumsum(x)
def plus(x): return x + 1
def big(x): return jnp.broadcast_to(x, (1 << 20,)).astype(f32) + 0
for name, fn, shapes in (
    ("affine", affine, (s(f32, 4, 8), s(f32, 2, 4), s(f32, 8))),
    ("forever", forever, (s(f32, 4),)),
    ("steps", steps, (s(i32, 1),)),
    ("wide", wide, (s(f64, 4),)),
    ("big", big, (s(f32, 1),)),
    ("plus", plus, (s(f32, 1 << 18),)),
):
    made = export.export(jax.jit(fn), platforms=("cpu", "cuda", "tpu"))(*shapes)
    open(f"{sys.argv[1]}/{name}.bin", "wb").write(bytes(made.serialize()))
"""

SHAPES: dict[str, tuple[tuple[ArraySpec, ...], tuple[ArraySpec, ...]]] = {
    "affine": (
        (ArraySpec("float32", (4, 8)), ArraySpec("float32", (2, 4)), ArraySpec("float32", (8,))),
        (ArraySpec("float32", (2, 8)), ArraySpec("float32", (1,))),
    ),
    "forever": ((ArraySpec("float32", (4,)),), (ArraySpec("float32", (4,)),)),
    "steps": ((ArraySpec("int32", (1,)),), (ArraySpec("float32", (1,)),)),
    "wide": ((ArraySpec("float64", (4,)),), (ArraySpec("float64", (4,)),)),
    "big": ((ArraySpec("float32", (1,)),), (ArraySpec("float32", (1 << 20,)),)),
    "plus": ((ArraySpec("float32", (1 << 18,)),), (ArraySpec("float32", (1 << 18,)),)),
}


class MadeArtifacts:
    """Artifacts of this test beside the release's own; their shapes are left to the worker."""

    def __init__(self, folder: Path) -> None:
        self.digests: dict[str, Digest] = {}
        self._exported: dict[bytes, bytes] = {}
        for name in SHAPES:
            exported = (folder / f"{name}.bin").read_bytes()
            self.digests[name] = Digest(hashlib.sha256(exported).digest())
            self._exported[self.digests[name]] = exported
        garbage = b"not an artifact"
        self.digests["garbage"] = Digest(hashlib.sha256(garbage).digest())
        self._exported[self.digests["garbage"]] = garbage
        self._builtin = BuiltinArtifacts()

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        if digest in self._exported:
            return Artifact(self._exported[digest])
        return self._builtin.artifact(digest)


@dataclass
class FolderBlobs:
    folder: Path

    def put(self, array: np.ndarray[Any, Any]) -> BlobRef:
        content = array.tobytes()
        blob_id = Digest(hashlib.sha256(content).digest())
        (self.folder / blob_id.hex()).write_bytes(content)
        return BlobRef(blob_id, len(content))

    def open_blob(self, blob_id: Digest, first_byte: int, byte_count: int, /) -> int:
        try:
            return os.open(self.folder / blob_id.hex(), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise KeyError(blob_id) from None

    def put_open(self, fd: int, size: int, /) -> BlobRef:
        return self.put(np.frombuffer(os.pread(fd, size, 0), np.uint8))


@dataclass
class House:
    """What a test needs to run kernels."""

    config: ExecutorConfig
    artifacts: MadeArtifacts
    blobs: FolderBlobs
    exec_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def spec(self, name: str, args: tuple[ArgSource, ...] | None = None, **over: Any) -> ExecSpec:
        shapes, outs = SHAPES[name]
        made = ExecSpec(
            submitter=Peer(b"s" * 38),
            job_digest=Digest(b"j" * 32),
            kernel=name,
            artifact=self.artifacts.digests[name],
            args=args or tuple(ArgSource(True, shape, None) for shape in shapes),
            outs=outs,
            wall_ms_max=30_000,
            memory_mb_max=512,
        )
        return replace(made, **over)

    def noop_spec(self, **over: Any) -> ExecSpec:
        args = (ArgSource(True, ROW, None),)
        made = replace(self.spec("wide"), kernel="bench.noop@1", artifact=NOOP)
        return replace(replace(made, args=args, outs=(ROW,)), **over)

    def run(
        self, spec: ExecSpec, count: int, *inline: np.ndarray[Any, Any], first: int = 0
    ) -> StartExec:
        content = b"".join(array.tobytes() for array in inline)
        task = TaskId(b"t" * 16)
        return StartExec(next(self.exec_ids), spec, UnitRun(task, 0, first, count), content)

    def noop(self, count: int = 1, **over: Any) -> StartExec:
        x = np.arange(count * 16, dtype=np.float32)
        return self.run(self.noop_spec(**over), count, x)


@dataclass
class Ended:
    outputs: list[bytes]
    batches: int
    end: ExecEnded


async def until_end(executor: Executor, exec_id: int) -> Ended:
    outputs: list[bytes] = []
    batches = first = 0
    while True:
        event = await executor.events.receive()
        if isinstance(event, UnitsDone) and event.exec_id == exec_id:
            if not outputs:
                first = event.first  # not 0 where a test has taken the first batch already
            assert event.first == first + len(outputs)
            outputs += event.outputs
            batches += 1
        elif isinstance(event, ExecEnded) and event.exec_id == exec_id:
            return Ended(outputs, batches, event)


async def complete(executor: Executor, effect: StartExec) -> Ended:
    executor.start(effect)
    return await until_end(executor, effect.exec_id)


async def until(executor: Executor, kind: type[Event]) -> Event:
    while not isinstance(event := await executor.events.receive(), kind):
        pass
    return event


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Those that live: a run is over when its worker has ended, reaped or not yet."""
    try:
        return list(filter(lives, psutil.Process(pid).children(recursive=True)))
    except psutil.NoSuchProcess:
        return []


async def true(condition: Callable[[], bool]) -> None:
    """Conditions of other processes have no event to wait for."""
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def gone(processes: list[psutil.Process]) -> None:
    await true(lambda: not any(map(lives, processes)))


def worker_processes() -> list[psutil.Process]:
    """Grandchildren: the zygote is the node's child."""
    return [p for zygote in psutil.Process().children() for p in descendants(zygote.pid)]


class Premises(Protocol):
    """A house, whatever else it has."""

    @property
    def config(self) -> ExecutorConfig: ...
    @property
    def artifacts(self) -> ArtifactSource: ...
    @property
    def blobs(self) -> BlobFiles: ...


def with_executor(house: Premises, body: Callable[[Executor], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(TEST_S_MAX):
            async with open_executor(house.config, house.blobs, house.artifacts) as executor:
                await body(executor)

    trio.run(main)
