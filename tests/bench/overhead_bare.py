"""`bench overhead` without any system: how long a unit lasts alone, and on two bare workers."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.synchronize import Barrier

from . import workload as w


def bare(iterations: int, units: int, barrier: Barrier) -> None:
    w.spin(iterations)
    barrier.wait()
    for _ in range(units):
        w.spin(iterations)
    barrier.wait()  # before the process tears jax down, which is none of the work


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--iterations", type=int, default=0)
    options = parser.parse_args()
    iterations = options.iterations or w.calibrated_iterations()
    units = w.QUICK_SPIN_UNITS if options.quick else w.SPIN_UNITS
    start = time.perf_counter()
    for _ in range(40):
        w.spin(iterations)
    alone_ms = (time.perf_counter() - start) * 1e3 / 40
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(w.WORKERS + 1)
    workers = [
        context.Process(target=bare, args=(iterations, units // w.WORKERS, barrier))
        for _ in range(w.WORKERS)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    spent = time.perf_counter() - start
    for worker in workers:
        worker.join()
    print(
        json.dumps(
            {
                "iterations": iterations,
                "unit_ms": alone_ms,
                "eff10_bare": round(units * alone_ms / 1e3 / w.WORKERS / spent, 3),
                "bare_s": spent,
                "bare_units": units,
            }
        )
    )


if __name__ == "__main__":
    main()
