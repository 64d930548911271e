"""Arithmetic and printing shared by the benches: percentiles, the one JSON line, sub-benches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SUB_BENCH_S_MAX = 600
Figures = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `share` 0.5 is the median."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def call_figures(calls_ms: Sequence[float], suffix: str) -> Figures:
    return {
        f"call_p50_ms{suffix}": round(percentile(calls_ms, 0.5), 3),
        f"call_p99_ms{suffix}": round(percentile(calls_ms, 0.99), 3),
    }


def timed_calls(call: Callable[[], object], count: int, gap_s: float = 0.0) -> list[float]:
    """Milliseconds of each call, one after the other, with `gap_s` of rest between them."""
    spent: list[float] = []
    for _ in range(count):
        if gap_s:
            time.sleep(gap_s)  # noqa: TID251 - the rest between calls is what is measured
        start = time.perf_counter()
        call()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def sub_bench(module: str, *args: str, seconds_max: int = SUB_BENCH_S_MAX) -> Figures:
    """Run `python -m module args` and take its last line; a failure is said, never skipped."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *args],
            stdout=subprocess.PIPE,
            timeout=seconds_max,
            check=False,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"{module} took more than {seconds_max} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"ok": False, "why": f"{module} ended with {done.returncode}"}
    figures: Figures = json.loads(lines[-1])
    return figures


def report(bench: str, figures: Mapping[str, Any], targets: Mapping[str, str], ok: bool) -> int:
    """The last line of every bench. Targets are text: `>= dask`, `<= 110`."""
    print(
        json.dumps(
            {"bench": bench, "ok": ok, "figures": dict(figures), "targets": dict(targets)},
            sort_keys=True,
        )
    )
    return 0 if ok else 1
