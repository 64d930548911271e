"""What no real scheduler can have: perfect knowledge, or none. For comparison, on the same tasks.

- `limit`: whoever submits knows every car at every instant and pushes to the nearest idle one; one
  message, one way. With no idle car anywhere, the first to be free takes the oldest task, which
  lies there already.
- `central`: one scheduler in one place, infinitely fast, that knows every car at every instant:
  submit, assign, done. It takes the idle car that is nearest to itself, and keeps one queue.
- `random`: a push to any car, which has a queue. One message.

The same network, jitter and handling time as for real machines; no protocol code.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .mesh import HANDLING_US
from .trace import Trace
from .workload import Ground, Task

ORACLES = ("random", "central", "limit")
NEAR_CELLS = 4  # looked at beside a submitter's own: a far cell's fibre beats a near one's radio
FRAMES = {
    "random": ("push",),
    "central": ("submit", "assign", "done"),
    "limit": ("push",),
}


@dataclass(slots=True)
class Played:
    start_us: dict[int, int] = field(default_factory=dict)  # task -> when its unit started
    trace: Trace = field(default_factory=Trace)


class _Field:
    """Cars as the oracles see them: idle ones by cell, those with the shortest last mile first,
    which is the order of their round trips from anywhere outside or inside the cell."""

    def __init__(self, ground: Ground, seed: int) -> None:
        self.network = ground.network
        self.rng = random.Random(f"{seed} oracle")
        self.places = ground.network.places
        self.cell_of = {n: cell for cell, numbers in ground.cars.items() for n in numbers}
        self.idle = {
            cell: sorted((self.places[n].last_mile_us, n) for n in numbers)
            for cell, numbers in ground.cars.items()
        }
        self.idle_count = len(self.cell_of)
        self.all = list(self.cell_of)
        self.events: list[tuple[int, int, Callable[[int], None]]] = []
        self._order = 0

    def at(self, at_us: int, call: Callable[[int], None]) -> None:
        self._order += 1
        heapq.heappush(self.events, (at_us, self._order, call))

    def way_us(self, a: int, b: int) -> int:
        return self.network.one_way_us(a, b, self.rng) + HANDLING_US

    def free(self, car: int) -> None:
        heapq.heappush(self.idle[self.cell_of[car]], (self.places[car].last_mile_us, car))
        self.idle_count += 1

    def nearest(self, here: int) -> int:
        """The idle car nearest to `here`, which is idle no more; there is one."""
        own = self.places[here].cell
        best: tuple[int, str] | None = None
        cells = [own, *self.network.neighbours(own, NEAR_CELLS)]
        for cell in cells:
            if self.idle[cell]:
                reach = self.network.rtt_us(here, self.idle[cell][0][1])
                best = min(best or (reach, cell), (reach, cell))
        if best is None:
            others = self.network.neighbours(own, len(self.idle))[NEAR_CELLS:]
            best = next((0, cell) for cell in others if self.idle[cell])
        self.idle_count -= 1
        return heapq.heappop(self.idle[best[1]])[1]

    def run(self) -> None:
        while self.events:
            at_us, _, call = heapq.heappop(self.events)
            call(at_us)


def play(policy: str, ground: Ground, tasks: list[Task], seed: int) -> Played:
    """When each task starts under an oracle; all of them do."""
    cars = _Field(ground, seed)
    played = Played()

    def started(task: Task, car: int, at_us: int) -> None:
        played.start_us[task.number] = at_us
        played.trace.events += 1
        played.trace.note(at_us, f"{task.number} {car}")

    if policy == "random":
        _random(cars, tasks, started)
    elif policy == "central":
        _central(cars, ground, tasks, started)
    else:
        _limit(cars, tasks, started)
    cars.run()
    return played


Started = Callable[[Task, int, int], None]


def _random(cars: _Field, tasks: list[Task], started: Started) -> None:
    free_us: dict[int, int] = {}  # car -> when its queue is empty

    def arrive(task: Task, car: int, at_us: int) -> None:
        start = max(at_us, free_us.get(car, 0))
        free_us[car] = start + task.unit_us
        started(task, car, start)

    def submit(task: Task, at_us: int) -> None:
        car = cars.rng.choice(cars.all)
        cars.at(at_us + cars.way_us(task.submitter, car), lambda at: arrive(task, car, at))

    for task in tasks:
        cars.at(task.at_us, lambda at, task=task: submit(task, at))  # type: ignore[misc]


def _central(cars: _Field, ground: Ground, tasks: list[Task], started: Started) -> None:
    largest = max(ground.cells, key=lambda cell: len(ground.cars[cell]))
    here = ground.submitters[largest][0] if ground.submitters[largest] else tasks[0].submitter
    queue: deque[Task] = deque()

    def assign(task: Task, car: int, at_us: int) -> None:
        begin = at_us + cars.way_us(here, car) if car != here else at_us
        started(task, car, begin)
        cars.at(begin + task.unit_us, lambda at: done(car, at))

    def done(car: int, at_us: int) -> None:
        if queue:
            assign(queue.popleft(), car, at_us)
        else:
            cars.free(car)

    def come(task: Task, at_us: int) -> None:
        if cars.idle_count:
            assign(task, cars.nearest(here), at_us)
        else:
            queue.append(task)

    def submit(task: Task, at_us: int) -> None:
        way_us = cars.way_us(task.submitter, here) if task.submitter != here else HANDLING_US
        cars.at(at_us + way_us, lambda at: come(task, at))

    for task in tasks:
        cars.at(task.at_us, lambda at, task=task: submit(task, at))  # type: ignore[misc]


def _limit(cars: _Field, tasks: list[Task], started: Started) -> None:
    queue: deque[Task] = deque()

    def run(task: Task, car: int, begin_us: int) -> None:
        started(task, car, begin_us)
        cars.at(begin_us + task.unit_us, lambda at: done(car, at))

    def done(car: int, at_us: int) -> None:
        if queue:
            task = queue.popleft()
            run(task, car, max(at_us, task.at_us + cars.way_us(task.submitter, car)))
        else:
            cars.free(car)

    def submit(task: Task, at_us: int) -> None:
        if cars.idle_count:
            car = cars.nearest(task.submitter)
            run(task, car, at_us + cars.way_us(task.submitter, car))
        else:
            queue.append(task)

    for task in tasks:
        cars.at(task.at_us, lambda at, task=task: submit(task, at))  # type: ignore[misc]
