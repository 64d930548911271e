"""Who sleeps, who stays awake for the others, and that nothing of it can be forced on a cell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.reasons import Reason
from meshnode.protocol.reserve import WINDOW_MS, Reserve, reserve
from meshnode.protocol.standby import FIRST_SLEEP_MS, IDLE_MS, Stance
from meshnode.protocol.types import Lane, Limits, Peer
from testnet.sim.measured import Setup
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh
from testnet.sim.world import simulate

from .test_mesh import assert_whole, ended, order, submit
from .test_tokens import cars_of, counted, node_of

SLEEP_MS = 600_000


def parked(cars: int, *, sleep_ms: int = SLEEP_MS) -> Mesh:
    """So many cars that nobody has work for; their owners let them sleep."""
    mesh = Mesh(1, limits=replace(Limits(), sleep_ms_max=sleep_ms))
    mesh.add("submitter", REQUEST)
    for number in range(cars):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    return mesh


def asleep(mesh: Mesh) -> set[str]:
    return {car.name for car in cars_of(mesh) if car.asleep}


def test_a_reserve_grows_with_the_root_of_those_at_work() -> None:
    assert [reserve(busy, 1) for busy in (0, 4, 16, 100, 1_000)] == [4, 8, 12, 24, 67]
    assert reserve(1_000, 4) == 17, "what one lacks another of the cell has"


def test_what_is_over_the_reserve_may_rest_and_each_rendezvous_names_the_same_cars() -> None:
    one, other = Reserve(), Reserve()
    for each, tokens in ((one, 40), (other, 44)):
        each.count(tokens, 0)
        each.count(tokens, 20 * WINDOW_MS)
    cars = [Peer(bytes([number]) * 38) for number in range(200)]
    told = [{c for c in cars if each.one_too_many(c, 7, 100, 100, 2)} for each in (one, other)]
    assert told[0] <= told[1] and 0.7 < len(told[0]) / len(cars) < 0.85, "76 of 100"
    assert told[0] != {c for c in cars if one.one_too_many(c, 8, 100, 100, 2)}, (
        "others in their turn"
    )
    one.count(12, 20 * WINDOW_MS)
    one.count(12, 40 * WINDOW_MS)
    assert not any(one.one_too_many(c, 7, 100, 100, 2) for c in cars)


@pytest.mark.long
def test_of_an_idle_cell_most_sleep_and_take_turns() -> None:
    mesh = parked(40)
    slept: set[str] = set()
    shares = []
    for minute in range(25):
        mesh.rest(60_000)
        slept |= asleep(mesh)
        if minute > 2:
            shares.append(len(asleep(mesh)))
        assert 40 - len(asleep(mesh)) >= reserve(0, 1), minute
    assert sum(shares) / len(shares) > 10, "of 24 that could: each is awake for a minute at least"
    assert len(slept) > 30
    submit(mesh, order(40, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    assert_whole(mesh, 40)


@pytest.mark.long
def test_a_small_mesh_stays_awake_and_so_does_who_may_not_sleep() -> None:
    mesh = parked(8)
    mesh.rest(300_000)
    assert not asleep(mesh)
    mesh = parked(40, sleep_ms=0)
    mesh.rest(300_000)
    assert not asleep(mesh) and counted(mesh, "sleeps") == 0


def test_a_sleeper_says_until_when_and_is_not_asked() -> None:
    mesh = parked(40)
    assert mesh.run(lambda: bool(asleep(mesh)), ms_max=300_000)
    name = min(asleep(mesh))
    car = mesh.sites[name]
    assert not car.links
    advert = node_of(car).provider.presence.advert
    assert advert is not None and advert.budget.reason is Reason.ASLEEP
    assert advert.wake_at_ms is not None
    for_ms = advert.wake_at_ms - mesh.now().unix_ms
    assert FIRST_SLEEP_MS // 2 <= for_ms + 2_000 <= FIRST_SLEEP_MS + 2_000
    submitter = node_of(mesh.sites["submitter"])
    known = submitter.book.cars[car.identity.peer].advert
    assert known == advert and not known.budget.may_run
    mesh.rest(advert.wake_at_ms - mesh.now().unix_ms + 3_000)
    assert not car.asleep and node_of(car).standby.stance is Stance.STANDBY
    assert len(node_of(car).provider.tokens) == 1


@pytest.mark.parametrize("told_by", ["one", "one, the other gone", "both", "a stranger"])
def test_one_rendezvous_alone_sends_nobody_to_sleep(
    told_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reserve, "one_too_many", lambda *_: False)  # only we say it
    mesh = parked(16)
    mesh.rest(IDLE_MS + 5_000)
    assert not asleep(mesh)
    holders = [car for car in cars_of(mesh) if node_of(car).rendezvous.tokens]
    car = next(car for car in cars_of(mesh) if car not in holders)
    stranger = next(c for c in cars_of(mesh) if c not in holders and c is not car)
    tokens = node_of(car).provider.tokens
    names = {"both": holders, "a stranger": [stranger]}.get(told_by, [])
    if told_by == "one, the other gone":
        (token,) = tokens._deposits
        names = [holder for holder in holders if holder.identity.peer == tokens.lies_at(token)]
        mesh.cut(car.name, next(holder.name for holder in holders if holder not in names))
    until = mesh.now_ms + 50_000
    while mesh.now_ms < until and node_of(car).standby.stance is Stance.STANDBY:
        (token,) = tokens._deposits
        holder = mesh.by_peer[tokens.lies_at(token)]  # type: ignore[index]
        first = holder if told_by == "one" and not names else None
        if first is not None:
            names = [first]
        for liar in names:
            if liar is holder or told_by == "a stranger":
                rest = messages.pack(messages.Rest(token))
                mesh.feed(car, ev.FrameIn(liar.identity.peer, Lane.CONTROL, rest))
        mesh.rest(1_000)
    assert len(holders) == 2
    assert (node_of(car).standby.stance is Stance.ASLEEP) is (told_by == "both")


@pytest.mark.long
def test_who_has_work_does_not_sleep() -> None:
    mesh = parked(40)
    mesh.rest(2_000)
    mesh.unit_us = lambda effect: 400_000_000  # type: ignore[method-assign]
    submit(mesh, order(30, policy="tokens", lease_units_max=1, wall_ms_max=500_000))
    mesh.rest(250_000)
    working = [car for car in cars_of(mesh) if node_of(car).provider.leases]
    assert len(working) == 30 and not any(car.asleep for car in working)
    assert not asleep(mesh), "ten are less than the reserve"


@pytest.mark.long
def test_a_fleet_with_little_work_sleeps_and_tasks_start_as_soon() -> None:
    """Two in five cars work, and the reserve is there for what comes; the first 90 s nobody may."""
    awake = Setup(cars=120, load=0.4, model="metro", task_s=20.0, seconds=300.0)
    still, sleepy = simulate(awake), simulate(replace(awake, sleep_s=300.0))
    assert not still.stances and not sleepy.failed and sleepy.unstarted == 0
    assert sleepy.stances["asleep"] > 0.05
    assert sum(sleepy.stances.values()) == pytest.approx(1)
    assert sleepy.quantile_ms(0.5) < 1.2 * still.quantile_ms(0.5)
    assert sleepy.quantile_ms(0.95) < 2 * still.quantile_ms(0.95)


def test_who_wakes_for_nothing_sleeps_twice_as_long_and_work_begins_anew() -> None:
    mesh = parked(40, sleep_ms=8 * FIRST_SLEEP_MS)
    car = cars_of(mesh)[-1]
    standby, owner = node_of(car).standby, node_of(car).provider.owner

    def sleeps() -> int:
        """Minutes that it says it will sleep, rounded up to what it may."""
        standby._sleep()
        assert owner.wakes_unix_ms is not None
        for_ms = owner.wakes_unix_ms - mesh.now(car).unix_ms
        standby.wake()
        return next(n for n in (5, 10, 20, 40, 80) if for_ms <= n * 60_000)

    most = [sleeps() for _ in range(6)]
    assert most[0] == 5 and most == sorted(most) and most[-1] == 40
    mesh.rest(1_000)
    owner.worked_mono_ms = mesh.now(car).mono_ms
    assert sleeps() == 5


@pytest.mark.long
def test_a_job_for_a_car_that_sleeps_waits_until_it_wakes() -> None:
    mesh = parked(40)
    assert mesh.run(lambda: bool(asleep(mesh)), ms_max=300_000)
    car = mesh.sites[min(asleep(mesh))]
    submit(mesh, order(4, cars=(car.identity.peer,), deadline_ms=3_600_000))
    assert mesh.run(lambda: ended(mesh), ms_max=900_000)
    assert_whole(mesh, 4)


def test_sleepers_stay_members_and_slots_are_not_cars() -> None:
    mesh = parked(40)
    mesh.rest(400_000)
    held = [car for car in cars_of(mesh) if not car.asleep and node_of(car).rendezvous.tokens]
    assert asleep(mesh) and {node_of(car).roster.cars("cell") for car in held} == {40}
    few = Mesh(1, limits=replace(Limits(), sleep_ms_max=SLEEP_MS))
    for number in range(10):
        few.add(f"car-{number}", PROVIDE, slots=8)
    few.connect_all()
    few.rest(200_000)
    assert not asleep(few)


@pytest.mark.long
def test_the_rendezvous_of_a_small_cell_sends_nobody_to_sleep() -> None:
    mesh = parked(10)
    mesh.rest(3_000)
    (holder,) = [car for car in cars_of(mesh) if node_of(car).rendezvous.tokens]
    node_of(holder).rendezvous._reserve.one_too_many = lambda *_: True  # type: ignore[method-assign]
    mesh.rest(180_000)
    assert not asleep(mesh)


@pytest.mark.long
def test_where_tokens_live_long_cars_sleep_too() -> None:
    """A word comes with each renewal only: it counts for two lives of a token."""
    mesh = Mesh(1, limits=replace(Limits(), sleep_ms_max=SLEEP_MS, token_ttl_ms=180_000))
    for number in range(60):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    assert mesh.run(lambda: len(asleep(mesh)) > 3, ms_max=1_200_000)
