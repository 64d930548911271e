"""`bench overhead`, the Dask side: two single-threaded worker processes, the same jitted kernel."""

from __future__ import annotations

import argparse
import json
import time
import warnings

import distributed
from distributed import Client, LocalCluster

from . import workload as w
from .figures import Figures, call_figures, timed_calls


def throughput(client: Client, quick: bool) -> Figures:
    units = w.QUICK_UNITS if quick else w.UNITS
    xs = w.noop_inputs(units)
    client.gather(client.map(w.noop, [xs[0]] * 50, pure=False))  # both workers compile
    start = time.perf_counter()
    results = client.gather(client.map(w.noop, list(xs), pure=False))
    spent = time.perf_counter() - start
    assert all((result == x + 1).all() for result, x in zip(results, xs, strict=True))
    many = w.QUICK_CHUNKED_UNITS if quick else w.CHUNKED_UNITS
    ys = w.noop_inputs(many)
    chunks = [ys[i : i + w.CHUNK] for i in range(0, many, w.CHUNK)]
    chunked = w.spent_twice_s(lambda: client.gather(client.map(w.noop_chunk, chunks, pure=False)))
    return {
        "units_per_s_dask": round(units / spent, 1),
        "units_per_s_chunk64_first_dask": round(many / chunked[0], 1),
        "units_per_s_chunk64_dask": round(many / chunked[1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--unit-ms", type=float, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with (
        LocalCluster(
            n_workers=w.WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        figures: Figures = {"dask_version": distributed.__version__}
        figures |= throughput(client, options.quick)
        x = w.noop_inputs(1)[0]
        calls = w.QUICK_CALLS if options.quick else w.CALLS

        def call() -> None:
            client.submit(w.noop, x, pure=False).result()

        call()
        figures |= call_figures(timed_calls(call, calls), "_dask")
        figures |= call_figures(timed_calls(call, calls // 3, w.GAP_S), "_gap20_dask")
        units = w.QUICK_SPIN_UNITS if options.quick else w.SPIN_UNITS
        client.gather(client.map(w.spin, [options.iterations] * 8, pure=False))
        start = time.perf_counter()
        client.gather(client.map(w.spin, [options.iterations] * units, pure=False))
        spent = time.perf_counter() - start
        figures["eff10_dask"] = round(units * options.unit_ms / 1e3 / w.WORKERS / spent, 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
