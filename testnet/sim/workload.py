"""Who submits what and when: the same tasks for every policy and oracle of one seed.

Open loop: tasks arrive by a Poisson process whatever becomes of them, at submitters that stand in
the cells like cars, one for about `CARS_PER_SUBMITTER`. Cells differ in what they ask for by a
log-normal factor. A task is one unit whose length is exponential; the load is the work that
arrives, over what the cars' slots can do. Before the measured time as many tasks arrive as run
in the steady state, within `fill_s`: lengths have no memory, so the fleet is as if it had always
been at work.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import accumulate

from .network import Network, draw

CARS_PER_SUBMITTER = 125
SKEW_SIGMA = 0.25  # of the logarithm of a cell's demand
FILL_S = (2.0, 10.0)  # a third of a task's length, within these: a burst would be another load
SETTLE_S = 3.0
TASK_US_MIN = 1_000
DRAWS_MAX = 8


@dataclass(frozen=True, slots=True)
class Task:
    number: int
    at_us: int
    submitter: int  # its number in the network
    unit_us: int


@dataclass(frozen=True, slots=True)
class Ground:
    """A drawn network and who in it submits; everybody else is a car with one slot."""

    network: Network
    submitters: dict[str, list[int]]  # by cell
    cars: dict[str, list[int]]

    @property
    def cells(self) -> list[str]:
        return list(self.cars)


def lay_out(model: str, cars: int, seed: int) -> Ground:
    """`cars` cars, and beside them a submitter for every `CARS_PER_SUBMITTER` of a cell: at least
    one, or nobody would ask for what the cell has."""
    extra = -(-cars // CARS_PER_SUBMITTER)
    for _ in range(DRAWS_MAX):
        network = draw(model, cars + extra, seed)
        quota = {
            cell: max(1, round(len(numbers) / (CARS_PER_SUBMITTER + 1)))
            for cell, numbers in network.cells.items()
        }
        if sum(quota.values()) == extra:
            break
        extra = sum(quota.values())
    # The last draw may want a few more or less than it made room for: the largest cell has them.
    quota[max(quota, key=lambda cell: quota[cell])] += len(network) - cars - sum(quota.values())
    rng = random.Random(f"{seed} submitters")
    submitters = {
        cell: sorted(rng.sample(numbers, quota[cell])) for cell, numbers in network.cells.items()
    }
    chosen = {number for numbers in submitters.values() for number in numbers}
    others = {
        cell: [number for number in numbers if number not in chosen]
        for cell, numbers in network.cells.items()
    }
    return Ground(network, submitters, others)


@dataclass(frozen=True, slots=True)
class Demand:
    load: float
    task_s: float
    seconds: float  # measured
    seed: int
    begins_s: float = 0.0  # when the fleet is ready

    @property
    def fill_s(self) -> float:
        return min(max(FILL_S[0], self.task_s / 3), FILL_S[1])

    @property
    def window_us(self) -> tuple[int, int]:
        start = self.begins_s + self.fill_s + SETTLE_S
        return int(start * 1e6), int((start + self.seconds) * 1e6)


def tasks_of(ground: Ground, demand: Demand) -> list[Task]:
    """All tasks in the order of their arrival; the last arrives when the measured time ends."""
    rng = random.Random(f"{demand.seed} tasks")
    weights: list[float] = []
    numbers: list[int] = []
    for cell in ground.cells:
        wanted = len(ground.cars[cell]) * rng.lognormvariate(0.0, SKEW_SIGMA)
        for number in ground.submitters[cell]:
            numbers.append(number)
            weights.append(wanted / len(ground.submitters[cell]))
    edges = list(accumulate(weights))
    running = demand.load * sum(len(cars) for cars in ground.cars.values())
    rate = running / demand.task_s
    start, end = demand.begins_s, demand.window_us[1] / 1e6
    times: list[float] = []
    at = start + rng.expovariate(rate)
    while at < end:
        times.append(at)
        at += rng.expovariate(rate)
    # What the steady arrivals alone would leave short when the fill is over.
    left = math.exp(-demand.fill_s / demand.task_s)
    fill = running * left / (demand.task_s / demand.fill_s * (1 - left))
    times += [start + demand.fill_s * rng.random() for _ in range(round(fill))]
    return [
        Task(
            number,
            int(at * 1e6),
            rng.choices(numbers, cum_weights=edges)[0],
            max(TASK_US_MIN, int(rng.expovariate(1e-6 / demand.task_s))),
        )
        for number, at in enumerate(sorted(times))
    ]
