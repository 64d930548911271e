"""`bench placement`: from submit to start, and messages a task, of every policy on one fleet.

Each run is `mesh testnet sim`: the same network, the same tasks; what is simulated is the time, so
the figures do not depend on this machine. `limit`, `central` and `random` are oracles. Adverts and
gossip are measured on fewer cars: a requester looks at every car of its cell for each task, and
each announcement is read by all of them.
"""

from __future__ import annotations

import sys

from .figures import Figures, report, sub_bench

CARS, QUICK_CARS = 10_000, 500
SECONDS, QUICK_SECONDS = 20.0, 5.0
MACHINE_SECONDS, QUICK_MACHINE_SECONDS = 5.0, 2.0  # each takes many seconds of this machine
FALLBACK_CARS = 1_000
LOAD = 0.8
TASK_S = 2.0
SEED = 1
POLICIES = ("limit", "central", "random", "tokens", "adverts", "gossip")
TARGETS = {
    "p50_ms_tokens": "<= p50_ms_limit + 12",
    "p99_ms_tokens": "<= 1.25 * p99_ms_limit",
    "messages_per_task_tokens": "<= 3.5",
}


def measured(policy: str, quick: bool) -> Figures:
    cars, seconds = (QUICK_CARS, QUICK_SECONDS) if quick else (CARS, SECONDS)
    if policy in ("adverts", "gossip"):
        seconds = QUICK_MACHINE_SECONDS if quick else MACHINE_SECONDS
        cars = min(cars, FALLBACK_CARS)
    print(f"{policy}: {cars} cars, {seconds:g} s", file=sys.stderr)
    options = {
        "--cars": cars,
        "--load": LOAD,
        "--seed": SEED,
        "--policy": policy,
        "--task-s": TASK_S,
        "--seconds": seconds,
    }
    line = [text for name, value in options.items() for text in (name, str(value))]
    return sub_bench("testnet", "sim", "--json", *line)


def run(quick: bool) -> int:
    figures: Figures = {"load": LOAD, "task_s": TASK_S}
    ok = True
    for policy in POLICIES:
        said = measured(policy, quick)
        if "p50_ms" not in said:
            figures[f"why_{policy}"] = said.get("why", "it said nothing")
            ok = False
            continue
        for name in ("p50_ms", "p95_ms", "p99_ms", "messages_per_task"):
            figures[f"{name}_{policy}"] = round(said[name], 2)
        figures[f"cars_{policy}"] = said["cars"]
        figures[f"started_{policy}"] = said["started"] / max(1, said["tasks"])
        figures[f"events_per_s_{policy}"] = round(said["events"] / max(said["wall_s"], 1e-9))
    if "p50_ms_tokens" in figures and "p50_ms_limit" in figures:
        ok = ok and (
            figures["p50_ms_tokens"] <= figures["p50_ms_limit"] + 12
            and figures["p99_ms_tokens"] <= 1.25 * figures["p99_ms_limit"]
            and figures["messages_per_task_tokens"] <= 3.5
        )
    return report("placement", figures, TARGETS, ok)
