"""The rules of `testnet.sim.fleet` as an exact event model: a heap, no steps, no arrays of tasks.

Written from the rules in that module's docstring, not from its code, to be its reference at small
sizes. It shares the drawn network and the map of rendezvous, since those are input to both.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from testnet.sim.fleet import (
    DIGEST_CHANGE_S,
    DIGEST_S,
    DRAW,
    HANDLING_S,
    HOPS_MAX,
    MARGIN_S,
    PUSH_S,
    SKEW,
    TASK_S,
    TOKENS_BELIEVED_LEAST,
)
from testnet.sim.network import JITTER, METRO_CORE_US, Network
from testnet.sim.rendezvous_map import chart, shard_cars
from testnet.sim.result import Result


@dataclass(slots=True)
class Task:
    submitted: float
    hops: int = HOPS_MAX


@dataclass(slots=True)
class Rendezvous:
    number: int
    car: int
    near: list[tuple[int, float]]  # the other rendezvous, mean way in seconds
    tokens: list[int] = field(default_factory=list)
    queue: deque[Task] = field(default_factory=deque)
    believed: dict[int, int] = field(default_factory=dict)
    published: int = 0


class Heap:
    def __init__(self, network: Network, load: float, seed: int) -> None:
        rng = self.rng = np.random.default_rng([seed, 0x68656170])
        # the same map as the fleet model draws from its own first numbers
        self.map = chart(
            network, shard_cars(load, TASK_S), SKEW, np.random.default_rng([seed, 0x666C6565])
        )
        self.miles = [float(mile) for mile in self.map.mile_s]
        self.shard = self.map.car_shard.tolist()
        self.places = [
            Rendezvous(
                number,
                int(self.map.rendezvous[number]),
                [
                    (int(other), float(way))
                    for other, way in zip(
                        self.map.near[number], self.map.way_s[number], strict=True
                    )
                    if other >= 0
                ],
            )
            for number in range(len(self.map))
        ]
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.told = 0
        self.now = 0.0
        self.messages: Counter[str] = Counter()
        self.latencies: list[tuple[float, float]] = []
        self.rate = len(network) * load / TASK_S
        for car in range(len(network)):
            if rng.random() < load:
                self.at(rng.exponential(TASK_S), self.token, car)
            else:
                self.places[self.shard[car]].tokens.append(car)
        for place in self.places:
            place.believed = {other: len(self.places[other].tokens) for other, _ in place.near}
            place.published = len(place.tokens)
            self.at(rng.uniform(0, DIGEST_S), self.digest_due, place)
            self.at(rng.uniform(0, DIGEST_CHANGE_S), self.digest_changed, place)
            self.at(rng.uniform(0, PUSH_S), self.push, place)
        self.at(rng.exponential(1 / self.rate), self.submit)

    def at(self, delay: float, call: Callable[..., None], *given: Any) -> None:
        self.told += 1
        heapq.heappush(self.events, (self.now + delay, self.told, call, given))

    def run(self, seconds: float) -> None:
        while self.events[0][0] < seconds:
            self.now, _, call, given = heapq.heappop(self.events)
            call(*given)

    def way(self, car: int, place: Rendezvous) -> float:
        if car == place.car:
            return 0.0
        mean = self.miles[car] + self.miles[place.car] + METRO_CORE_US / 2e6
        return mean * float(self.rng.uniform(1 - JITTER, 1 + JITTER))

    def submit(self) -> None:
        place = self.places[int(self.rng.choice(len(self.places), p=self.map.weight))]
        first, last = self.map.first[place.number : place.number + 2].tolist()
        car = int(self.rng.integers(first, last))
        self.messages["offer"] += 1
        self.at(self.way(car, place) + HANDLING_S, self.offer, place, Task(self.now))
        self.at(self.rng.exponential(1 / self.rate), self.submit)

    def offer(self, place: Rendezvous, task: Task) -> None:
        if place.tokens:
            drawn = self.rng.integers(0, len(place.tokens), DRAW)
            best = min(drawn.tolist(), key=lambda token: self.miles[place.tokens[token]])
            car = place.tokens[best]
            place.tokens[best] = place.tokens[-1]
            place.tokens.pop()
            self.assign(place, task, car)
        elif not self.pass_on(place, task):
            self.messages["queued"] += 1
            place.queue.append(task)

    def assign(self, place: Rendezvous, task: Task, car: int) -> None:
        begin = self.way(car, place) + HANDLING_S
        self.latencies.append((task.submitted, self.now + begin - task.submitted))
        self.messages["assign"] += 1
        self.messages["token"] += 1
        runs = float(self.rng.exponential(TASK_S))
        self.at(begin + runs + self.way(car, place) + HANDLING_S, self.token, car)

    def token(self, car: int) -> None:
        place = self.places[self.shard[car]]
        if place.queue:
            self.assign(place, place.queue.popleft(), car)
        else:
            place.tokens.append(car)

    def pass_on(self, place: Rendezvous, task: Task) -> bool:
        if task.hops <= 0:
            return False
        for other, way in place.near:
            if place.believed[other] > TOKENS_BELIEVED_LEAST:
                place.believed[other] -= 1
                task.hops -= 1
                self.messages["forward"] += 1
                delay = way * float(self.rng.uniform(1 - JITTER, 1 + JITTER)) + HANDLING_S
                self.at(delay, self.offer, self.places[other], task)
                return True
        return False

    def push(self, place: Rendezvous) -> None:
        while place.queue:
            place.queue[0].hops = 1
            if not self.pass_on(place, place.queue[0]):
                break
            place.queue.popleft()
        self.at(PUSH_S, self.push, place)

    def digest_due(self, place: Rendezvous) -> None:
        self.digest(place)
        self.at(DIGEST_S, self.digest_due, place)

    def digest_changed(self, place: Rendezvous) -> None:
        if (place.published > 0) != (len(place.tokens) > 0):
            self.digest(place)
        self.at(DIGEST_CHANGE_S, self.digest_changed, place)

    def digest(self, place: Rendezvous) -> None:
        place.published = len(place.tokens)
        for other, way in place.near:
            self.messages["digest"] += 1
            self.at(way, self.hear, self.places[other], place.number, place.published)

    def hear(self, place: Rendezvous, sender: int, tokens: int) -> None:
        if sender in place.believed:
            place.believed[sender] = tokens


def exact(network: Network, load: float, seconds: float, seed: int) -> Result:
    """What `fleet.simulate` answers, event by event. Tasks that never start are left out."""
    heap = Heap(network, load, seed)
    heap.run(seconds)
    last = seconds - MARGIN_S
    measured = [late for at, late in heap.latencies if MARGIN_S <= at < last]
    return Result.of(
        latencies_us=np.asarray(measured) * 1e6,
        messages=heap.messages,
        tasks=len(heap.latencies),
        policy="tokens",
        engine="event",
        model=network.model,
        cars=len(network),
        load=load,
        seed=seed,
        task_s=TASK_S,
        simulated_s=seconds - 2 * MARGIN_S,
        cells=(),
        command="",
    )
