"""Who may hold the rendezvous role, and how a car of a large cell knows how large it is."""

from __future__ import annotations

from collections import Counter

import pytest

from meshnode.protocol.advert import AdvertBook, Known
from meshnode.protocol.cell import (
    CANDIDATES_MAX,
    EPOCH_MS,
    GOSSIP_CARS_MAX,
    NEXT_EPOCH_MS,
    AdvertRoster,
    Candidate,
    elect,
    epoch_of,
    may_hold,
    network_of,
    score,
    shape,
    shard_of,
)
from meshnode.protocol.last_mile import STEPS_US, last_mile_us
from meshnode.protocol.objects import Advert, AdvertBudget
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Limits, NetworkId, Peer

NETWORK = NetworkId(bytes(32))


def peer(number: int) -> Peer:
    return Peer(number.to_bytes(38, "big"))


def advert(
    number: int,
    *,
    addr: str = "",
    last_mile_us: int | None = None,
    cell_cars: int | None = None,
    lease_s: int = 7_200,
) -> Advert:
    budget = AdvertBudget(0, 300, lease_s, 0, 1, Reason.OK)
    addrs = (addr or f"/ip4/10.{number >> 8}.{number & 255}.1/tcp/4001",)
    return Advert(
        1,
        NETWORK,
        peer(number),
        1,
        "advert",
        "c",
        (),
        1,
        1,
        (0, 0),
        "0",
        0,
        (),
        budget,
        1 << 40,
        addrs,
        last_mile_us,
        cell_cars=cell_cars,
    )


def roster_of(*adverts: Advert) -> AdvertRoster:
    book = AdvertBook(Limits(), NETWORK)
    book.cars = {each.peer: Known(each, 0) for each in adverts}
    return AdvertRoster(book, 250, lambda: 0, lambda: None)


def test_the_near_of_the_lowest_hold_the_role() -> None:
    cars = [Candidate(peer(n), 1_000 * (1 + n % 40), str(n)) for n in range(400)]
    miles = {each.peer: each.last_mile_us for each in cars}
    held = Counter(
        miles[holder] for epoch in range(100) for holder in elect("c", epoch, cars, 400, 250)[0]
    )
    assert max(held) < 20_000, "a quarter of the lowest, and no farther"
    lowest = sorted((each.peer for each in cars), key=lambda p: score("c", 0, 7, p))
    assert set(elect("c", 7, cars, 400, 250)[0]) <= set(lowest[:CANDIDATES_MAX])


def test_a_thousand_ground_keys_of_one_network_hold_one_post_of_four() -> None:
    honest = [Candidate(peer(n), 5_000, str(n)) for n in range(1_000)]
    tried = sorted((peer(10_000 + n) for n in range(20_000)), key=lambda p: score("c", 0, 3, p))
    ground = [Candidate(each, 1, "one") for each in tried[:1_000]]
    ((*posts,),) = elect("c", 3, honest + ground, 1_000, 250)
    assert len(posts) == 4 and len(set(posts) & set(tried)) == 1
    alone = elect("c", 3, ground, 1_000, 250)
    assert len(alone[0]) == 4, "a garage is one network, and works"


def test_an_address_says_its_network() -> None:
    assert network_of(("/ip4/192.0.2.77/tcp/1", "/ip4/198.51.100.1/tcp/1")) == "192.0.2.0/24"
    assert network_of(("/ip6/2001:db8:1:2::3/tcp/1",)) == "2001:db8:1::/48"
    assert network_of(("/dns4/car.example/tcp/1",)) == "/dns4/car.example/tcp/1"
    assert network_of(("/ip4/999.1.1.1/tcp/1",)) == "/ip4/999.1.1.1/tcp/1"
    assert network_of(()) == ""


@pytest.mark.parametrize("cars", [GOSSIP_CARS_MAX - 1, 400, 1_000, 5_000])
def test_who_may_hold_the_role_gossips_and_few_others(cars: int) -> None:
    now_ms = 7 * EPOCH_MS + 1_000
    everyone = [peer(n) for n in range(cars)]
    heard = {each for each in everyone if may_hold("c", now_ms, each, cars, 250)}
    shards, _ = shape(cars, 250)
    if cars < GOSSIP_CARS_MAX:
        assert len(heard) == cars
        return
    assert len(heard) < 80 * shards
    for shard in range(shards):
        lowest = sorted(everyone, key=lambda p: score("c", shard, epoch_of(now_ms), p))
        assert len(heard & set(lowest[:CANDIDATES_MAX])) == CANDIDATES_MAX
    late_ms = 8 * EPOCH_MS - NEXT_EPOCH_MS
    soon = {each for each in everyone if may_hold("c", late_ms, each, cars, 250)}
    assert soon > heard - {each for each in heard if each not in soon}, (
        "the next ones are heard too"
    )
    next_lowest = sorted(everyone, key=lambda p: score("c", 0, 8, p))[:CANDIDATES_MAX]
    assert set(next_lowest) <= soon


def test_a_rendezvous_counts_its_shard_and_the_others_take_the_middle_of_what_they_hear() -> None:
    cars = [advert(n) for n in range(600)]
    roster = roster_of(*cars)
    ((*holders,),) = roster.posts("c", 1)
    assert roster.cars("c") == 600
    counts = [roster.counted("c", 1, holder) or 0 for holder in holders]
    assert all(abs(count - 600) < 60 for count in counts), "each serves two of three"
    assert 1_794 <= sum(counts) <= 1_800, "each car is served by two, rounded down at each"
    outsider = next(each.peer for each in cars if each.peer not in holders)
    assert roster.counted("c", 1, outsider) is None
    assert roster_of(*cars[:20]).counted("c", 1, cars[0].peer) is None, "all hear all"

    # A car that hears candidates alone, and what they say.
    numbers = [int.from_bytes(each, "big") for each in holders]
    few = [advert(n, cell_cars=600 if n in numbers else None) for n in {*numbers, *range(40)}]
    hears = roster_of(*few)
    hears.posts("c", 1)
    hears._counts.clear()
    assert hears.cars("c") == 600
    liar = next(n for n in range(40) if n not in numbers)
    few = [each if each.peer != peer(liar) else advert(liar, cell_cars=1 << 20) for each in few]
    lied = roster_of(*few)
    lied.posts("c", 1)
    lied._counts.clear()
    assert lied.cars("c") == 600, "only rendezvous are asked"


def test_shards_share_a_cell_evenly() -> None:
    each = Counter(shard_of(peer(n), 4) for n in range(4_000))
    assert set(each) == {0, 1, 2, 3} and max(each.values()) < 1_150


def test_the_last_mile_is_half_the_shortest_round_trip_in_steps() -> None:
    assert last_mile_us([]) is None and last_mile_us([0]) is None
    assert last_mile_us([60_000, 9_000, 0, 31_000]) == 5_000
    assert last_mile_us([1]) == STEPS_US[0]
    assert last_mile_us([10_000_000]) == STEPS_US[-1]
