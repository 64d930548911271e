"""`bench minilm`: sentences per second through the mesh over the same kernel in one process.

The car already holds the weights and the compiled kernel, as after its first lease; the kernel
alone is timed before and after the mesh, and the mean of both is the reference.
"""

from __future__ import annotations

import pydoc_data.topics
import tempfile
from pathlib import Path

import numpy as np
import trio

from jaxkernels import host, models, registry
from meshnode.client.orders import Note, Terms, make_order
from meshnode.node.running import RunningNode
from meshnode.protocol.events import JobOrder

from .figures import Figures, report, sub_bench
from .overhead_mesh import run_job
from .small_mesh import Car, run_bench

KERNEL = "embed.minilm@1"
UNITS = 48
QUICK_UNITS = 12
TARGETS = {"mesh_ratio": ">= 0.90"}


def kernel_alone() -> float:
    """Units per second of one process, by the kernel's own bench."""
    figures: Figures = sub_bench("jaxkernels.embed_minilm.bench")["figures"]
    return float(figures["units_per_s"])


async def order_of(own: RunningNode, prepared: host.Prepared) -> JobOrder:
    refs = {}
    for index, arg in enumerate(prepared.args):
        content = np.ascontiguousarray(arg.array)
        refs[index] = await trio.to_thread.run_sync(own.blobs.put_bytes, content.tobytes())
    return make_order(prepared, refs, Terms(), Note(KERNEL, dict(prepared.context)))


def passages(count: int) -> list[str]:
    text = " ".join(pydoc_data.topics.topics.values())
    return [text[i * 400 : i * 400 + 400] for i in range(count)]


def run(quick: bool) -> int:
    units = QUICK_UNITS if quick else UNITS
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="meshbench-") as folder:
        model = models.get("minilm", Path(folder), lambda *_: None)
        before = kernel_alone()

        async def body(own: RunningNode, cars: list[Car]) -> None:
            batch = registry.get(KERNEL).args[-1].shape[0]
            warm = host.prepare(KERNEL, passages(2 * batch), {"long": "cut"}, model)
            await run_job(own, await order_of(own, warm))
            prepared = host.prepare(KERNEL, passages(units * batch), {"long": "cut"}, model)
            _, spent = await run_job(own, await order_of(own, prepared))
            figures["units_per_s_mesh"] = round(prepared.units / spent, 3)
            figures["sentences_per_s_mesh"] = round(units * batch / spent, 2)

        run_bench(1, body, role="car")
        after = kernel_alone()
    alone = (before + after) / 2
    figures["units_per_s_kernel"] = round(alone, 3)
    figures["mesh_ratio"] = round(figures["units_per_s_mesh"] / alone, 3)
    return report("minilm", figures, TARGETS, True)
