"""`bench overhead`, the mesh: a submitter and two car nodes, everything on.

Signed offers, leases, receipts and acceptances, journal with fsynced money objects, encrypted
streams. Throughput jobs are durable, single calls are not, as the contracts have it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import trio

from jaxkernels import host
from meshnode.client.orders import Note, Terms, make_order, split_outputs
from meshnode.node.running import RunningNode
from meshnode.protocol import fleet
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import BlobRef

from . import workload as w
from .figures import Figures, call_figures
from .footprint import cpu_s
from .small_mesh import Car, run_bench

Array = np.ndarray[Any, Any]


async def job_order(own: RunningNode, kernel: str, inputs: Any, terms: Terms) -> JobOrder:
    """Large mapped arguments become blobs of the submitter, as the client does it."""
    prepared = host.prepare(kernel, inputs)
    note = Note(kernel, dict(prepared.context))
    refs: dict[int, BlobRef] = {}
    if sum(arg.array.nbytes for arg in prepared.args) > 16 * 1024:
        for index, arg in enumerate(prepared.args):
            content = np.ascontiguousarray(arg.array).tobytes()
            refs[index] = await trio.to_thread.run_sync(own.blobs.put_bytes, content)
    return make_order(prepared, refs, terms, note)


async def run_job(own: RunningNode, order: JobOrder) -> tuple[list[Array], float]:
    start = time.perf_counter()
    job_id = await own.submit(order)
    result = await own.result(job_id)
    spent = time.perf_counter() - start
    assert result.ended.state == "done", result.ended
    packed = result.packed if result.path is None else result.path.read_bytes()
    return split_outputs(packed, order.outs, order.units), spent


async def throughput(own: RunningNode, cars: list[Car], quick: bool) -> Figures:
    xs = w.noop_inputs(w.QUICK_UNITS if quick else w.UNITS)
    single = Terms(lease_units_max=1)
    await run_job(own, await job_order(own, "bench.noop@1", xs[:64], single))
    before = time.process_time(), sum(cpu_s(car.process.pid) for car in cars)
    outs, spent = await run_job(own, await job_order(own, "bench.noop@1", xs, single))
    ours_s = time.process_time() - before[0]
    theirs_s = sum(cpu_s(car.process.pid) for car in cars) - before[1]
    assert (outs[0] == xs + 1).all()
    ys = w.noop_inputs(w.QUICK_CHUNKED_UNITS if quick else w.CHUNKED_UNITS)
    chunked: list[float] = []
    for _ in range(2):  # as `workload.spent_twice_s`
        many = await job_order(own, "bench.noop@1", ys, Terms(lease_units_max=w.CHUNK))
        outs, spent_s = await run_job(own, many)
        assert (outs[0] == ys + 1).all()
        chunked.append(spent_s)
    return {
        "units_per_s_mesh": round(len(xs) / spent, 1),
        # Processor time of one lease of one unit: says what wall time on a shared machine hides.
        "lease_cpu_ms_submitter_mesh": round(ours_s / len(xs) * 1e3, 2),
        "lease_cpu_ms_car_mesh": round(theirs_s / len(xs) * 1e3, 2),
        "units_per_s_chunk64_first_mesh": round(len(ys) / chunked[0], 1),
        "units_per_s_chunk64_mesh": round(len(ys) / chunked[1], 1),
    }


async def call_ms(own: RunningNode, count: int, gap_s: float) -> list[float]:
    x = w.noop_inputs(1)
    spent: list[float] = []
    for _ in range(count):
        if gap_s:
            await trio.sleep(gap_s)
        start = time.perf_counter()
        order = await job_order(own, "bench.noop@1", x, Terms(durable=False))
        packed = await own.call(order)
        spent.append((time.perf_counter() - start) * 1e3)
        assert (split_outputs(packed, order.outs, 1)[0] == x + 1).all()
    return spent


async def spinning(own: RunningNode, options: argparse.Namespace) -> Figures:
    units = w.QUICK_SPIN_UNITS if options.quick else w.SPIN_UNITS
    inputs = np.full((units, 1), options.iterations, np.int32)
    await run_job(own, await job_order(own, "bench.spin@1", inputs[:16], Terms()))
    _, spent = await run_job(own, await job_order(own, "bench.spin@1", inputs, Terms()))
    figures = {"eff10_mesh": round(units * options.unit_ms / 1e3 / w.WORKERS / spent, 3)}
    if options.bare_s:
        figures["eff10_jit_vs_bare"] = round(options.bare_s / spent, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--unit-ms", type=float, required=True)
    parser.add_argument("--bare-s", type=float, default=0.0)
    options = parser.parse_args()
    figures: Figures = {}

    async def body(own: RunningNode, cars: list[Car]) -> None:
        calls = w.QUICK_CALLS if options.quick else w.CALLS
        figures.update(await throughput(own, cars, options.quick))
        await call_ms(own, 20, 0.0)
        figures.update(call_figures(await call_ms(own, calls, 0.0), "_mesh"))
        figures.update(call_figures(await call_ms(own, calls // 3, w.GAP_S), "_gap20_mesh"))
        with patch.object(fleet, "FRESH_MS", -1):  # no car is asked for having served just now
            placed = await call_ms(own, calls // 3, 0.0)
            figures.update(call_figures(placed, "_rendezvous_mesh"))
        figures.update(await spinning(own, options))

    run_bench(w.WORKERS, body)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
