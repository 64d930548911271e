"""A topic's mesh: near peers, and a few of anywhere."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11

from meshnode.overlay import locality
from meshnode.overlay.gossip import SWAP_BEATS, MeshRouter

TOPIC = "t"


@given(st.sets(st.integers(1, 10_000), max_size=40), st.integers(0, 20), st.integers(0, 8))
def test_who_is_grafted_is_of_the_pool_near_but_for_two(
    pool: set[int], count: int, members: int
) -> None:
    chosen = locality.to_graft(pool, count, members, lambda us: us, random.Random(1))
    assert len(chosen) == len(set(chosen)) == min(count, len(pool)) and set(chosen) <= pool
    far = max(0, min(count, len(pool), locality.FAR_LEAST - members))
    assert set(chosen[far:]) == set(sorted(pool - set(chosen[:far]))[: len(chosen) - far])


@given(st.sets(st.integers(1, 10_000), max_size=20), st.integers(0, 20))
def test_who_is_pruned_is_of_the_mesh_and_far(mesh: set[int], count: int) -> None:
    gone = locality.to_prune(mesh, count, lambda us: us, random.Random(1))
    assert len(gone) == len(set(gone)) and set(gone) <= mesh
    assert len(gone) == min(count, len(mesh))
    stay = mesh - set(gone)
    assert sum(us > min(gone, default=10_000) for us in stay) <= locality.FAR_LEAST


class Known:
    """What the router asks of its pubsub: who has said that it wants the topic."""

    def __init__(self, peers: set[ID]) -> None:
        self.peer_topics = {TOPIC: peers}


def router(rtts_us: dict[ID, int]) -> MeshRouter:
    made = MeshRouter(rtts_us.__getitem__, 1)
    made.counters = Counter()
    pubsub: Any = Known(set(rtts_us))
    made.pubsub = pubsub
    made.lot = random.Random(3)
    made.mesh[TOPIC] = set()
    made.peer_protocol.update(dict.fromkeys(rtts_us, PROTOCOL_ID_V11))
    return made


def test_a_mesh_fills_with_near_peers_and_swaps_far_ones() -> None:
    peers = [ID(bytes([number]) * 34) for number in range(1, 41)]
    rtts_us = {peer: 1_000 * number for number, peer in enumerate(peers, 1)}
    made = router(rtts_us)
    made.mesh_heartbeat()
    mesh = made.mesh[TOPIC]
    assert len(mesh) == 6 and sum(peer in mesh for peer in peers[:6]) >= 4
    mesh.clear()
    mesh.update(peers[-6:])  # whoever came first is far
    for _ in range(8 * SWAP_BEATS):
        grafts, prunes = made.mesh_heartbeat()
        assert 4 <= len(mesh) <= 10 and not set(grafts) & set(prunes)
    assert sum(rtts_us[peer] <= 8_000 for peer in mesh) >= 4, "of six, four are near"
    assert sum(rtts_us[peer] > 30_000 for peer in mesh) <= 2
