"""`bench overhead`, the Ray side: two single-core workers, the same jitted kernel."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import ray

from . import workload as w
from .figures import Figures, call_figures, timed_calls


class Warm:
    """Two actors keep the jitted kernel warm for the single calls, as a lease's worker does."""

    def call(self, x: Any) -> Any:
        return w.noop(x)


WarmActor: Any = ray.remote(num_cpus=1)(Warm)


@ray.remote(num_cpus=1)
def one(x: Any) -> Any:
    return w.noop(x)


@ray.remote(num_cpus=1)
def chunk(xs: Any) -> Any:
    return w.noop_chunk(xs)


@ray.remote(num_cpus=1)
def spin(iterations: int) -> float:
    return w.spin(iterations)


def throughput(quick: bool) -> Figures:
    units = w.QUICK_UNITS if quick else w.UNITS
    xs = w.noop_inputs(units)
    ray.get([one.remote(xs[0]) for _ in range(50)])  # both workers compile
    start = time.perf_counter()
    results = ray.get([one.remote(x) for x in xs])
    spent = time.perf_counter() - start
    assert all((result == x + 1).all() for result, x in zip(results, xs, strict=True))
    many = w.QUICK_CHUNKED_UNITS if quick else w.CHUNKED_UNITS
    ys = w.noop_inputs(many)
    chunked = w.spent_twice_s(
        lambda: ray.get([chunk.remote(ys[i : i + w.CHUNK]) for i in range(0, many, w.CHUNK)])
    )
    return {
        "units_per_s_ray": round(units / spent, 1),
        "units_per_s_chunk64_first_ray": round(many / chunked[0], 1),
        "units_per_s_chunk64_ray": round(many / chunked[1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--unit-ms", type=float, required=True)
    options = parser.parse_args()
    ray.init(num_cpus=w.WORKERS, include_dashboard=False, logging_level="ERROR")
    figures: Figures = {"ray_version": ray.__version__}
    figures |= throughput(options.quick)
    actor = WarmActor.remote()
    x = w.noop_inputs(1)[0]
    calls = w.QUICK_CALLS if options.quick else w.CALLS
    ray.get(actor.call.remote(x))
    figures |= call_figures(timed_calls(lambda: ray.get(actor.call.remote(x)), calls), "_ray")
    gap = timed_calls(lambda: ray.get(actor.call.remote(x)), calls // 3, w.GAP_S)
    figures |= call_figures(gap, "_gap20_ray")
    ray.kill(actor)
    units = w.QUICK_SPIN_UNITS if options.quick else w.SPIN_UNITS
    ray.get([spin.remote(options.iterations) for _ in range(8)])
    start = time.perf_counter()
    ray.get([spin.remote(options.iterations) for _ in range(units)])
    spent = time.perf_counter() - start
    figures["eff10_ray"] = round(units * options.unit_ms / 1e3 / w.WORKERS / spent, 3)
    ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
