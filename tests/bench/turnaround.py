"""`turnaround_p50_ms_mesh`: 16 kB in, 16 kB out, from submit to result, to a car not yet dialled.

The car stands behind a proxy that delays every byte by 20 ms each way, so a round trip is 40 ms.
The two know each other's accounts (an agreement is in force); everything else is cold: TCP, Noise,
yamux, control stream, hello, advert, then offer, inputs, lease and results.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import trio

from meshnode.client.orders import Terms, split_outputs
from meshnode.node import firstrun
from meshnode.node.app import open_node

from . import workload as w
from .delay import delayed
from .figures import percentile
from .overhead_mesh import job_order
from .small_mesh import SEED, start_car, submitter_config

DELAY_S = 0.020
UNITS = 256  # of 64 bytes: 16 KiB each way, the most that travels inline


async def sample(home: Path, addr: str) -> float:
    """One submit to result, by a node that has just started."""
    async with open_node(home, submitter_config(())) as own:
        xs = w.noop_inputs(UNITS)
        order = await job_order(own, "bench.noop@1", xs, Terms(durable=False))
        start = time.perf_counter()
        own.meet(addr)
        packed = await own.call(order)
        spent = (time.perf_counter() - start) * 1e3
        assert (split_outputs(packed, order.outs, UNITS)[0] == xs + 1).all()
        return spent


async def measure(samples: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="meshbench-") as folder:
        car = start_car(Path(folder), "car-0", ())
        try:
            home = Path(folder) / "submitter"
            now_ms = time.time_ns() // 1_000_000
            firstrun.init_seeded(home, SEED, "submitter", car=False, now_ms=now_ms)
            port = int(re.findall(r"/tcp/(\d+)", car.addrs[0])[0])
            async with delayed("127.0.0.1", port, DELAY_S) as proxy:
                addr = re.sub(r"/tcp/\d+", f"/tcp/{proxy}", car.addrs[0])
                await sample(home, addr)  # agrees, and warms the car's worker
                return [await sample(home, addr) for _ in range(samples)]
        finally:
            car.process.terminate()
            await trio.to_thread.run_sync(car.process.wait)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    spent = trio.run(measure, 5 if options.quick else 20)
    print(json.dumps({"turnaround_p50_ms_mesh": round(percentile(spent, 0.5), 1)}))


if __name__ == "__main__":
    main()
