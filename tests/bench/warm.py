"""`bench warm`: how soon a restarted node, its compiled programs kept, does its first MiniLM unit.

One executor compiles and fills the cache, then others open the same folder, as restarted nodes do;
time starts when the zygote is ready to fork. Weights come from the blob store, values at random.
The unit after the first, on the same worker, says what of it is the unit itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import trio

from jaxkernels import registry
from meshnode.executor import BuiltinArtifacts, Executor, ExecutorConfig, open_executor
from meshnode.ledger.blobs import BlobStore
from meshnode.protocol.effects import Admit, ArgSource, ExecSpec, StartExec
from meshnode.protocol.events import Event, ExecEnded, Started, UnitsDone
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec, Digest, Peer, TaskId, UnitRun

from .figures import Figures, report
from .small_mesh import until

KERNEL = "embed.minilm@1"
RESTARTS = 5
QUICK_RESTARTS = 2
START_S_MAX = 120
TARGETS = {"first_unit_s": "<= 0.3", "compiles_warm": "== 0"}

SAMPLE = """
import sys, numpy
from jaxkernels import registry
from jaxkernels.timing import sample_args
args = sample_args(registry.get(sys.argv[1]))
numpy.savez(sys.argv[2], *args)
"""


def unit(store: BlobStore, folder: Path) -> StartExec:
    """One unit with all its arguments in the store."""
    path = folder / "sample.npz"
    # The sample is drawn by code that imports jax, as a node never does.
    subprocess.run([sys.executable, "-c", SAMPLE, KERNEL, str(path)], check=True)
    info = registry.get(KERNEL)
    sources = []
    with np.load(path) as arrays:
        for arg, name in zip(info.args, arrays.files, strict=True):
            blob, shape = store.put_array(arrays[name])
            sources.append(ArgSource(arg.mapped, shape, blob))
    spec = ExecSpec(
        submitter=Peer(b"s" * 38),
        job_digest=Digest(b"j" * 32),
        kernel=KERNEL,
        artifact=Digest(registry.artifact(KERNEL).digest),
        args=tuple(sources),
        outs=tuple(ArraySpec(out.dtype, out.shape) for out in info.outs),
        wall_ms_max=60_000,
        memory_mb_max=2_048,
    )
    return StartExec(1, spec, UnitRun(TaskId(b"t" * 16), 0, 0, 1), b"")


async def first(executor: Executor, effect: StartExec) -> Figures:
    """Seconds from a zygote that is ready to the program loaded and to the first unit; and how
    long the next unit takes."""
    executor.admit(Admit(99, effect.spec))
    await until(lambda: executor.zygote_ready, START_S_MAX)
    spans = await run_one(executor, effect)
    again = await run_one(executor, replace(effect, exec_id=2))
    return {**spans, "next_unit_s": again["first_unit_s"]}


async def run_one(executor: Executor, effect: StartExec) -> Figures:
    began = time.perf_counter()
    executor.start(effect)
    spans: Figures = {}
    while True:
        event: Event = await executor.events.receive()
        if isinstance(event, Started):
            spans["loaded_s"] = round(time.perf_counter() - began, 3)
        elif isinstance(event, UnitsDone):
            spans["first_unit_s"] = round(time.perf_counter() - began, 3)
        elif isinstance(event, ExecEnded):
            assert event.reason is Reason.DONE, event
            return spans


async def measure(restarts: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="meshbench-") as name:
        folder = Path(name)
        store = BlobStore(folder / "blobs")
        effect = unit(store, folder)
        config = ExecutorConfig(run_dir=folder, executable_cache=folder / "executables")
        async with open_executor(config, store, BuiltinArtifacts()) as executor:
            cold = await first(executor, effect)
        warm, compiles = [], 0
        for _ in range(restarts):
            async with open_executor(config, store, BuiltinArtifacts()) as executor:
                warm.append(await first(executor, effect))
                compiles += executor.compiles
    median = sorted(warm, key=lambda spans: spans["first_unit_s"])[len(warm) // 2]
    return {
        **median,
        "first_unit_least_s": min(spans["first_unit_s"] for spans in warm),
        "cold_first_unit_s": cold["first_unit_s"],
        "compiles_warm": compiles,
    }


def run(quick: bool) -> int:
    figures = trio.run(measure, QUICK_RESTARTS if quick else RESTARTS)
    return report("warm", figures, TARGETS, figures["compiles_warm"] == 0)
