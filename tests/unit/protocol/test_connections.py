"""Who is hung up on: the least worth first, and of those the one unused longest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.connections import (
    IDLE_MS,
    KEEP,
    QUIET_MS,
    SWEEP_MS,
    SWEPT_MAX,
    Connections,
    PeerState,
    Worth,
)
from meshnode.protocol.types import Peer


def peer(number: int) -> Peer:
    return Peer(number.to_bytes(38, "big"))


def table(worths: list[Worth], peers_max: int = 8) -> tuple[Connections, dict[Peer, Worth]]:
    """Peer n has the n-th worth and was used at n ms."""
    connections = Connections(peers_max)
    for number, _ in enumerate(worths):
        connections.enter(PeerState(peer(number), "lan", (), True, 0, number))
    return connections, {peer(number): worth for number, worth in enumerate(worths)}


NEW = peer(1_000)


def test_the_least_worth_goes_and_of_those_the_one_unused_longest() -> None:
    found, worth = table([Worth.KNOWN, Worth.IN_USE, Worth.CALLED, Worth.CALLED])
    assert found.gives_way(NEW, True, worth.__getitem__) == peer(2)
    found.peers[peer(2)].used_mono_ms = 99
    assert found.gives_way(NEW, True, worth.__getitem__) == peer(3)


def test_nobody_goes_whom_work_is_with() -> None:
    found, worth = table([Worth.IN_USE] * 8)
    assert found.full
    assert found.gives_way(NEW, False, worth.__getitem__) is None
    worth[peer(5)] = Worth.OWED
    assert found.gives_way(NEW, True, worth.__getitem__) == peer(5)


def test_strangers_push_out_strangers_and_not_the_half_that_has_proven_useful() -> None:
    found, worth = table([Worth.PROVEN] * 4 + [Worth.STRANGER] * 4)
    for number in range(4):
        found.prove(peer(number))
    for number in range(1_000, 1_100):  # identities cost nothing
        gone = found.gives_way(peer(number), True, worth.__getitem__)
        assert gone is not None and not found.is_proven(gone)
        del found.peers[gone]
        found.enter(PeerState(peer(number), "lan", (), True, 0, number))
        worth[peer(number)] = Worth.STRANGER
    for number in range(1_000, 1_100):
        worth[peer(number)] = Worth.IN_USE
    assert found.gives_way(NEW, True, worth.__getitem__) is None, "the half is kept"
    assert found.gives_way(NEW, False, worth.__getitem__) == peer(0), "we called it"
    found.prove(NEW)
    assert found.gives_way(NEW, True, worth.__getitem__) == peer(0), "it was of use before"


def test_over_half_those_of_use_make_room_for_strangers_as_well() -> None:
    found, worth = table([Worth.PROVEN] * 8)
    for number in range(5):
        found.prove(peer(number))
    for number in range(5, 8):
        worth[peer(number)] = Worth.IN_USE
    assert found.gives_way(NEW, True, worth.__getitem__) == peer(0)


def test_above_the_high_mark_the_quiet_ones_go_down_to_the_low_mark() -> None:
    found, worth = table([Worth.CALLED] * 15, peers_max=16)  # marks: 14 and 12
    assert found.due(14)
    assert found.sweep(QUIET_MS - 1, worth.__getitem__) == []
    assert found.deadline() == QUIET_MS - 1 + SWEEP_MS
    assert not found.due(QUIET_MS)
    gone = found.sweep(QUIET_MS + 100, worth.__getitem__)
    assert gone == [peer(0), peer(1), peer(2)]
    for each in gone:
        del found.peers[each]
    assert found.sweep(QUIET_MS + 100, worth.__getitem__) == []
    assert not found.has_room(0), "what was closed is not called again"


def test_what_has_been_idle_for_long_goes_down_to_the_number_that_is_kept() -> None:
    found, worth = table([Worth.KNOWN] * (KEEP + 10), peers_max=512)
    assert found.sweep(IDLE_MS - 1, worth.__getitem__) == []
    assert found.sweep(IDLE_MS + 4, worth.__getitem__) == [peer(n) for n in range(5)]
    assert len(found.sweep(2 * IDLE_MS, worth.__getitem__)) == 10
    few, worth = table([Worth.KNOWN] * KEEP, peers_max=512)
    assert few.deadline() is None
    assert few.sweep(10 * IDLE_MS, worth.__getitem__) == []


def test_being_in_use_is_a_use() -> None:
    found, worth = table([Worth.IN_USE] * (KEEP + 1), peers_max=512)
    assert found.sweep(2 * IDLE_MS, worth.__getitem__) == []
    worth = dict.fromkeys(worth, Worth.KNOWN)
    assert found.sweep(2 * IDLE_MS + 1, worth.__getitem__) == []
    assert found.sweep(3 * IDLE_MS, worth.__getitem__) == [peer(0)]


ROWS = st.lists(
    st.tuples(st.sampled_from(Worth), st.integers(0, 2 * IDLE_MS), st.booleans()), max_size=40
)


@given(ROWS, st.integers(1, 40), st.integers(0, 3 * IDLE_MS), st.booleans())
def test_nothing_in_use_goes_and_a_sweep_never_goes_too_far(
    rows: list[tuple[Worth, int, bool]], peers_max: int, now_ms: int, inbound: bool
) -> None:
    found = Connections(peers_max)
    worth: dict[Peer, Worth] = {}
    for number, (value, used_ms, proven) in enumerate(rows[:peers_max]):
        found.enter(PeerState(peer(number), "lan", (), True, 0, used_ms))
        worth[peer(number)] = value
        if proven:
            found.prove(peer(number))
    gone = found.gives_way(NEW, inbound, worth.__getitem__)
    if gone is None:
        proven_here = sum(found.is_proven(p) for p in found.peers)
        spared = inbound and proven_here <= peers_max // 2
        assert all(
            value is Worth.IN_USE or (spared and found.is_proven(p)) for p, value in worth.items()
        )
    else:
        assert worth[gone] < Worth.IN_USE
    before = len(found.peers)
    swept = found.sweep(now_ms, worth.__getitem__)
    assert len(set(swept)) == len(swept)
    assert all(worth[p] <= SWEPT_MAX for p in swept)
    assert not swept or before - len(swept) >= min(KEEP, peers_max * 3 // 4)
