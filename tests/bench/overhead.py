"""`bench overhead`: what the mesh adds to a unit and to a call, against Ray and Dask.

Every system runs in a process of its own, one after the other, on the same jitted kernels; the
figures that matter are ratios within one run. Bare workers give the reference for efficiency.
"""

from __future__ import annotations

from .figures import Figures, report, sub_bench

TARGETS = {
    "units_per_s_mesh": ">= units_per_s_dask",
    "units_per_s_chunk64_mesh": ">= units_per_s_chunk64_dask",
    "call_p50_ms_mesh": "<= call_p50_ms_dask",
    "call_p99_ms_mesh": "<= call_p99_ms_dask",
    "eff10_mesh": ">= 0.8 and >= eff10_dask",
    "eff10_jit_vs_bare": ">= 0.92",
}


def run(quick: bool) -> int:
    flags = ["--quick"] if quick else []
    bare = sub_bench("tests.bench.overhead_bare", *flags)
    if bare.get("ok") is False:
        return report("overhead", bare, TARGETS, False)
    unit = ["--iterations", str(bare["iterations"]), "--unit-ms", str(bare["unit_ms"])]
    figures: Figures = {key: bare[key] for key in ("iterations", "unit_ms", "eff10_bare")}
    failures: list[str] = []
    systems = {
        "mesh": [*unit, "--bare-s", str(bare["bare_s"]), *flags],
        "ray": [*unit, *flags],
        "dask": [*unit, *flags],
    }
    for system, arguments in systems.items():
        print(f"{system} ...", flush=True)
        got = sub_bench(f"tests.bench.overhead_{system}", *arguments)
        if got.get("ok") is False:
            failures.append(f"{system}: {got['why']}")
        else:
            figures |= got
    turnaround = sub_bench("tests.bench.turnaround", *flags)
    if turnaround.get("ok") is False:
        failures.append(f"turnaround: {turnaround['why']}")
    else:
        figures |= turnaround
    if failures:
        figures["failures"] = failures
    return report("overhead", figures, TARGETS, not failures)
