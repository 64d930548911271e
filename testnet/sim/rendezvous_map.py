"""Which car of a simulated fleet is the rendezvous of which, and which rendezvous are near.

A cell is cut into shards of one rendezvous each, sized by how many messages a second a car should
handle. The vectorised model and the exact one that it is tested against share this map, as both
share the network: they differ only in how they let time pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .network import CELL_CARS_MAX, Network

RENDEZVOUS_MESSAGES_S: Final = 300.0  # what one rendezvous handles: Python on a small core
MESSAGES_A_TASK: Final = 3.0  # at the rendezvous: offer in, assignment out, token in
NEIGHBOURS: Final = 12  # other rendezvous that a rendezvous exchanges with
BEST_SHARE: Final = 0.2  # the rendezvous is one of the cars with the best last miles

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RendezvousMap:
    """Arrays by shard, but for `car_shard` and `mile_s`, which are by car.

    The cars of shard s are `first[s]` to `first[s + 1]`.
    """

    first: npt.NDArray[np.int64]
    cell: Ints
    rendezvous: npt.NDArray[np.int64]  # the car
    near: Ints  # shards x NEIGHBOURS, the nearest first, -1 where there are no more
    way_s: npt.NDArray[np.float64]  # the same shape: half the round trip of the two rendezvous
    weight: npt.NDArray[np.float64]  # its part of all submitted tasks; sums to 1
    car_shard: Ints
    mile_s: npt.NDArray[np.float32]  # half of a car's share of a round trip

    def __len__(self) -> int:
        return len(self.cell)


def shard_cars(load: float, task_s: float) -> int:
    """How many cars one rendezvous can serve within `RENDEZVOUS_MESSAGES_S`."""
    tasks_s = RENDEZVOUS_MESSAGES_S / MESSAGES_A_TASK
    return int(min(CELL_CARS_MAX, max(1.0, tasks_s * task_s / load)))


def chart(network: Network, cars_max: int, skew: float, rng: np.random.Generator) -> RendezvousMap:
    """Shards of at most `cars_max` cars; demand per car log-normal over metros (sigma `skew`)."""
    arrays = network.arrays()
    parts = -(-arrays["cell_cars"] // cars_max)
    cell = np.repeat(np.arange(len(parts), dtype=np.int32), parts)
    nth = np.arange(len(cell)) - np.repeat(np.cumsum(parts) - parts, parts)
    size = arrays["cell_cars"][cell] // parts[cell]
    size += nth < arrays["cell_cars"][cell] % parts[cell]
    first = np.concatenate(([0], np.cumsum(size, dtype=np.int64)))
    car_shard = np.repeat(np.arange(len(cell), dtype=np.int32), size)
    mile = arrays["last_mile_us"]

    # One of the best fifth, drawn by lot as rendezvous hashing draws among those that may.
    order = np.argsort(car_shard + mile / 1e6, kind="stable")
    lot = (rng.random(len(cell)) * np.maximum(1, (size * BEST_SHARE).astype(int))).astype(int)
    rendezvous = order[first[:-1] + lot]

    # One metro area has no other metros to differ from: there its cells do.
    area = arrays["cell_metro"] if network.model != "metro" else np.arange(len(parts))
    demand = rng.lognormal(0.0, skew, int(area.max()) + 1)[area[cell]] * size

    near = _near_shards(network.nearest_cells(NEIGHBOURS), parts)
    core = _core_us(network, cell, near)
    both = mile[rendezvous][:, None] + mile[rendezvous[near]]
    return RendezvousMap(
        first,
        cell,
        rendezvous,
        near,
        (both + core) / 2e6,
        demand / demand.sum(),
        car_shard,
        (mile / 2e6).astype(np.float32),
    )


def _near_shards(near_cells: Ints, parts: npt.NDArray[np.integer[Any]]) -> Ints:
    """The other shards of the own cell, then one of each near cell, not the same for each of ours.

    One of each rather than all of the nearest: an overloaded neighbourhood is several cells wide,
    and a digest reaches beyond it at the same price.
    """
    first = (np.cumsum(parts) - parts).tolist()
    counts = parts.tolist()
    near = np.full((int(parts.sum()), NEIGHBOURS), -1, np.int32)
    for cell, others in enumerate(near_cells.tolist()):
        mine = range(first[cell], first[cell] + counts[cell])
        for nth, shard in enumerate(mine):
            row = [other for other in mine if other != shard]
            row += [first[other] + nth % counts[other] for other in others if other >= 0]
            near[shard, : min(len(row), NEIGHBOURS)] = row[:NEIGHBOURS]
    return near


def _core_us(network: Network, cell: Ints, near: Ints) -> npt.NDArray[np.int64]:
    """Of each shard and its near ones, the part of the round trip that is no last mile."""
    here = np.repeat(cell, near.shape[1])
    there = cell[near.ravel()]
    return network.core_pairs_us(here, there).reshape(near.shape)
