"""Which peers a topic's mesh consists of: most of them near, a few anywhere. Pure.

Stock GossipSub draws at random, so that a message crosses the continent at each hop. With near
neighbours it does so once; the few that are drawn keep the mesh in one piece (a small world: Watts
and Strogatz 1998). `gossip` asks at its heartbeats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Final, TypeVar

FAR_LEAST: Final = 2  # members of a mesh that are there by lot
NEARER: Final = 2  # a peer so many times nearer than the farthest takes its place
UNKNOWN_US: Final = 1 << 40  # a peer that nobody has measured yet is far

_P = TypeVar("_P")


def to_graft(
    pool: Collection[_P], count: int, members: int, rtt_us: Callable[[_P], int], lot: random.Random
) -> list[_P]:
    """`count` of the pool for a mesh of `members`: the first two by lot, then the nearest."""
    left = list(pool)
    by_lot = min(len(left), max(0, min(count, FAR_LEAST - members)))
    drawn = lot.sample(left, by_lot)
    near = sorted((peer for peer in left if peer not in drawn), key=rtt_us)
    return [*drawn, *near[: max(0, count - by_lot)]]


def to_prune(
    mesh: Collection[_P], count: int, rtt_us: Callable[[_P], int], lot: random.Random
) -> list[_P]:
    """`count` of the mesh: the farthest, but for two that are kept by lot."""
    far_first = sorted(mesh, key=rtt_us, reverse=True)
    kept = lot.sample(far_first, min(FAR_LEAST, max(0, len(far_first) - count)))
    return [peer for peer in far_first if peer not in kept][:count]


def nearer(mesh: Collection[_P], pool: Collection[_P], rtt_us: Callable[[_P], int]) -> _P | None:
    """One of the pool that is much nearer than most of the mesh, if there is one."""
    if not pool or len(mesh) <= FAR_LEAST:
        return None
    nearest = min(pool, key=rtt_us)
    # Two may be far for good: the farthest of the others is what it is held against.
    held_us = sorted(map(rtt_us, mesh), reverse=True)[FAR_LEAST]
    return nearest if rtt_us(nearest) * NEARER <= held_us else None
