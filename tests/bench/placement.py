"""`bench placement`: from submit to start, and messages a task, of every policy and in trouble.

Each run is `mesh testnet sim`: the same network, the same tasks; what is simulated is the time, so
the figures do not depend on this machine, but for `sim_cpu_s_*`. `limit`, `central` and `random`
are oracles. Adverts and gossip are measured on fewer cars: a requester looks at every car of its
cell for each task, and each announcement is read by all of them.

Figures end in the policy, or in the experiment with tokens: `busy` is 95 % load, `loss` loses a
packet in a hundred, `kill` takes a quarter of all rendezvous away (its p99 is of the next 12 s),
`liars` has one rendezvous in twenty lie, `ground` has one network with 1,000 tried keys in the
largest cell (`hurt_p99` is of that cell), `1k`, `100k` are sizes; `fleet_` is the vectorised model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Final

from testnet.sim import fleet
from testnet.sim.network import draw

from .figures import Figures, report, sub_bench

LOAD = 0.8
TASK_S = 2.0
SEED = 1
RUN_S_MAX: Final = 7_200  # of this machine, for one run
FLEET_CARS = (100_000, 1_000_000, 10_000_000)
QUICK_FLEET_CARS = (10_000, 100_000)
FLEET_S = 11.0
FLAT = 1.1


@dataclass(frozen=True, slots=True)
class Experiment:
    """`seconds` and `cars` are (whole, quick)."""

    name: str
    cars: tuple[int, int]
    seconds: tuple[float, float]
    options: dict[str, str | float] = field(default_factory=dict)
    only_whole: bool = False


EXPERIMENTS: Final = (
    Experiment("limit", (10_000, 1_000), (20, 5), {"--policy": "limit"}),
    Experiment("central", (10_000, 1_000), (20, 5), {"--policy": "central"}),
    Experiment("random", (10_000, 1_000), (20, 5), {"--policy": "random"}),
    Experiment("adverts", (1_000, 500), (5, 2), {"--policy": "adverts"}),
    Experiment("gossip", (1_000, 500), (5, 2), {"--policy": "gossip"}),
    Experiment("tokens", (10_000, 1_000), (4, 2)),
    Experiment("busy", (10_000, 1_000), (4, 2), {"--load": 0.95}),
    Experiment("loss", (10_000, 1_000), (4, 2), {"--faults": "loss"}),
    Experiment("kill", (10_000, 1_000), (24, 24), {"--faults": "kill"}),
    Experiment("liars", (10_000, 1_000), (8, 4), {"--faults": "liars"}),
    Experiment("ground", (1_000, 600), (4, 2), {"--faults": "ground"}),
    Experiment("1k", (1_000, 1_000), (8, 2)),
    Experiment("100k", (100_000, 0), (2, 0), only_whole=True),
    # A minute of simulated time with boot and filling up, which take 17 s of it.
    Experiment("minute", (100_000, 2_000), (43, 10), {"--task-s": 30.0}),
)
TARGETS = {
    "p50_ms_tokens": "<= p50_ms_limit + 12",
    "p99_ms_tokens": "<= 1.25 * p99_ms_limit",
    "messages_per_task_tokens": "<= 3.5",
    "p99_ms_busy": "<= 250",
    "hurt_p99_ms_kill": "<= 300",
    "lost_*": "0",
    "paid_wrong_*": "0",
    "flat_p50": "<= 1.1, of the sizes from 1,000 cars",
    "flat_p50_fleet": "<= 1.1",
    "sim_cpu_s_minute": "<= 120",
}


def measured(experiment: Experiment, quick: bool) -> Figures:
    cars, seconds = experiment.cars[quick], experiment.seconds[quick]
    print(f"{experiment.name}: {cars} cars, {seconds:g} s", file=sys.stderr)
    options: dict[str, object] = {
        "--cars": cars,
        "--load": LOAD,
        "--seed": SEED,
        "--policy": "tokens",
        "--task-s": TASK_S,
        "--seconds": seconds,
    } | experiment.options
    line = [text for name, value in options.items() for text in (name, str(value))]
    return sub_bench("testnet", "sim", "--json", *line, seconds_max=RUN_S_MAX)


def of_fleets(quick: bool) -> Figures:
    """The vectorised model's median at sizes that no event simulator reaches."""
    figures: Figures = {}
    for cars in QUICK_FLEET_CARS if quick else FLEET_CARS:
        print(f"fleet model: {cars} cars", file=sys.stderr)
        result = fleet.simulate(draw("continents", cars, SEED), LOAD, FLEET_S, SEED)
        figures[f"p50_ms_fleet_{cars}"] = round(result.quantile_us(0.5) / 1_000, 2)
        figures[f"p99_ms_fleet_{cars}"] = round(result.quantile_us(0.99) / 1_000, 2)
        figures[f"messages_per_task_fleet_{cars}"] = round(result.messages_per_task, 2)
    return figures


def run(quick: bool) -> int:
    figures: Figures = {"load": LOAD, "task_s": TASK_S}
    whole = True
    for experiment in EXPERIMENTS:
        if quick and experiment.only_whole:
            continue
        name, said = experiment.name, measured(experiment, quick)
        if "p50_ms" not in said:
            figures[f"why_{name}"] = said.get("why", "it said nothing")
            whole = False
            continue
        for figure in ("p50_ms", "p95_ms", "p99_ms", "messages_per_task"):
            figures[f"{figure}_{name}"] = round(said[figure], 2)
        if said["faults"] != "none":
            figures[f"hurt_p99_ms_{name}"] = round(said["hurt_p99_ms"], 2)
        figures[f"cars_{name}"] = said["cars"]
        figures[f"lost_{name}"] = said["tasks"] - said["started"]
        figures[f"paid_wrong_{name}"] = said["paid_wrong"]
        figures[f"sim_cpu_s_{name}"] = round(said["cpu_s"], 1)
        figures[f"events_per_cpu_s_{name}"] = round(said["events"] / max(said["cpu_s"], 1e-9))
        # Two hours whole: what is known already is said as it comes.
        reached_now = {key: value for key, value in figures.items() if key.endswith(f"_{name}")}
        print(json.dumps(reached_now), file=sys.stderr)
    figures |= of_fleets(quick)
    sizes = [figures[f"p50_ms_{n}"] for n in ("1k", "tokens", "100k") if f"p50_ms_{n}" in figures]
    if sizes:
        figures["flat_p50"] = round(max(sizes) / min(sizes), 3)
    modelled = [value for name, value in figures.items() if name.startswith("p50_ms_fleet_")]
    figures["flat_p50_fleet"] = round(max(modelled) / min(modelled), 3)
    return report("placement", figures, TARGETS, whole and reached(figures))


def reached(figures: Figures) -> bool:
    """All but the simulator's own speed, which is the machine's."""
    zero = ("lost_", "paid_wrong_")
    return (
        figures["p50_ms_tokens"] <= figures["p50_ms_limit"] + 12
        and figures["p99_ms_tokens"] <= 1.25 * figures["p99_ms_limit"]
        and figures["messages_per_task_tokens"] <= 3.5
        and figures["p99_ms_busy"] <= 250
        and figures["hurt_p99_ms_kill"] <= 300
        and max(figures["flat_p50"], figures["flat_p50_fleet"]) <= FLAT
        and not any(value for name, value in figures.items() if name.startswith(zero))
    )
