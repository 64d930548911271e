"""`bench sandbox`: what a confined worker costs: to start, a no-op, 4 MB in and out, a validation.

All through `Executor.start`, the call that the node makes, and so with every layer that this
kernel has in force (`layers` names them). `noop_us` is one unit of `bench.noop@1` on a loaded
worker: two wake-ups of the node's loop, one of the worker, one call into XLA. `io4mb_ms` is one
unit of a kernel that adds one to 4 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio

from jaxkernels import registry
from meshnode.executor import (
    Artifact,
    BuiltinArtifacts,
    Executor,
    ExecutorConfig,
    open_executor,
    wire,
)
from meshnode.executor.forks import open_zygote
from meshnode.protocol.effects import ArgSource, ExecSpec, StartExec
from meshnode.protocol.events import ExecEnded
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sandbox import names
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer, TaskId, UnitRun

from .figures import Figures, percentile, report

NOOPS = 3_000
IOS = 200
FORKS = 12
RUN_S_MAX = 60
VALIDATIONS = 20
TARGETS = {
    "fork_to_ready_ms": "<= 150",
    "noop_us": "<= 100",
    "io4mb_ms": "<= 2",
    "validator_ms": "<= 20",
}
ROW = ArraySpec("float32", (16,))
WIDE = ArraySpec("float32", (1 << 20,))
EXPORT = """
import sys, jax, jax.numpy as jnp
made = jax.export.export(jax.jit(lambda x: x + 1), platforms=("cpu", "cuda", "tpu"))(
    jax.ShapeDtypeStruct((1 << 20,), jnp.float32))
sys.stdout.buffer.write(bytes(made.serialize()))
"""
VALIDATE = f"""
import statistics, time
from jaxkernels import registry
from meshnode.worker.validate import validated
largest = max(map(registry.artifact_bytes, registry.KERNELS), key=len)
spent = []
for _ in range({VALIDATIONS}):
    began = time.perf_counter()
    validated(largest, builtin=True, platform="cpu")
    spent.append((time.perf_counter() - began) * 1e3)
print(statistics.median(spent))
"""


class _WithWide:
    """The release's artifacts, and the one that adds one to 4 MB."""

    def __init__(self, exported: bytes) -> None:
        self.digest = Digest(hashlib.sha256(exported).digest())
        self._exported = exported
        self._builtin = BuiltinArtifacts()

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        return Artifact(self._exported) if digest == self.digest else self._builtin.artifact(digest)


class _NoBlobs:
    def open_blob(self, blob_id: Digest, first_byte: int, byte_count: int, /) -> int:
        raise KeyError(blob_id)

    def put_open(self, fd: int, size: int, /) -> BlobRef:
        raise OSError("no room")


@dataclass
class _Caller:
    executor: Executor
    exec_ids: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))

    async def run(self, kernel: str, digest: Digest, row: ArraySpec, inline: bytes) -> float:
        """Seconds from `start` to the run's last event."""
        spec = ExecSpec(
            submitter=Peer(b"s" * 38),
            job_digest=Digest(b"j" * 32),
            kernel=kernel,
            artifact=digest,
            args=(ArgSource(True, row, None),),
            outs=(row,),
            wall_ms_max=RUN_S_MAX * 1000,
            memory_mb_max=512,
        )
        effect = StartExec(next(self.exec_ids), spec, UnitRun(TaskId(b"t" * 16), 0, 0, 1), inline)
        began = time.perf_counter()
        self.executor.start(effect)
        event = await self._end()
        took_s = time.perf_counter() - began
        if event.reason is not Reason.DONE:
            raise RuntimeError(f"{kernel}: {event.reason.text} {event.text}")
        return took_s

    async def _end(self) -> ExecEnded:
        """As the node's driver takes events: what is there, in one turn."""
        while True:
            events = [await self.executor.events.receive()]
            with contextlib.suppress(trio.WouldBlock):
                while True:
                    events.append(self.executor.events.receive_nowait())
            for event in events:
                if isinstance(event, ExecEnded):
                    return event


async def _fork_to_ready_ms(config: ExecutorConfig, forks: int) -> tuple[list[float], int]:
    """From the request to the zygote to the worker's READY; and the layers that it says."""
    spent: list[float] = []
    layers = 0
    zygote = await open_zygote(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zygote.tend)
        for _ in range(forks):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                began = time.perf_counter()
                child = await zygote.fork("worker", theirs, config.threads_per_worker(), 512)
                await trio.lowlevel.wait_readable(ours.fileno())
                spent.append((time.perf_counter() - began) * 1e3)
                ((kind, body),) = wire.FrameReader().feed(ours.recv(4096))
                if kind != wire.READY:
                    raise RuntimeError(wire.decode_ended(body)[3])
                layers = int.from_bytes(body[:4], "big")
                await child.gone()
                os.close(child.pidfd)
        nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await zygote.close()
    return spent, layers


async def _measure(wide: bytes, run_dir: Path, quick: bool) -> Figures:
    share = 10 if quick else 1
    artifacts = _WithWide(wide)
    noop = Digest(registry.artifact("bench.noop@1").digest)
    config = ExecutorConfig(run_dir)
    forks, layers = await _fork_to_ready_ms(config, max(4, FORKS // share))
    async with open_executor(config, _NoBlobs(), artifacts) as executor:
        caller = _Caller(executor)
        row = np.arange(16, dtype=np.float32).tobytes()
        for _ in range(20):
            await caller.run("bench.noop@1", noop, ROW, row)
        noops = [await caller.run("bench.noop@1", noop, ROW, row) for _ in range(NOOPS // share)]
        block = np.arange(1 << 20, dtype=np.float32).tobytes()
        for _ in range(10):
            await caller.run("wide", artifacts.digest, WIDE, block)
        ios = [await caller.run("wide", artifacts.digest, WIDE, block) for _ in range(IOS // share)]
    return {
        "layers": names(layers),
        "fork_to_ready_ms": round(percentile(forks, 0.5), 1),
        "fork_to_ready_max_ms": round(max(forks), 1),
        "noop_us": round(percentile(noops, 0.5) * 1e6, 1),
        "noop_p10_us": round(percentile(noops, 0.1) * 1e6, 1),
        "noop_p99_us": round(percentile(noops, 0.99) * 1e6, 1),
        "io4mb_ms": round(percentile(ios, 0.5) * 1e3, 2),
        "io4mb_p99_ms": round(percentile(ios, 0.99) * 1e3, 2),
    }


def _validator_ms() -> Figures:
    """The largest built-in's; nothing where this version has no validator."""
    if importlib.util.find_spec("meshnode.worker.validate") is None:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE], stdout=subprocess.PIPE, env=_cpu(), check=True
    )
    return {"validator_ms": round(float(done.stdout), 2)}


def _cpu() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(quick: bool) -> int:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    made = subprocess.run(
        [sys.executable, "-c", EXPORT], stdout=subprocess.PIPE, env=env, check=True
    )
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        figures |= trio.run(_measure, made.stdout, Path(folder), quick)
    return report("sandbox", figures, TARGETS, ok=True)
