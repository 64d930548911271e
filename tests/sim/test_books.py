"""Both ends of a channel keep the same books, whatever is lost on the way between them."""

from __future__ import annotations

import pytest

from meshnode.protocol import effects as fx
from meshnode.protocol.acceptances import AcceptanceDesk
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.job import Job
from meshnode.protocol.objects import T_ACCEPT, Acceptance, Receipt
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import unseal
from meshnode.protocol.types import Lane
from testnet.sim.frames import kind_of
from testnet.sim.mesh import Mesh, Site

from .test_mesh import accepted_units, ended, mesh_of, order, submit

CAR = "car-0"


def vouchers(site: Site) -> list[Acceptance]:
    return [
        unseal(stored.sealed).open(Acceptance, T_ACCEPT)
        for stored in site.disk.signed
        if stored.typ == T_ACCEPT
    ]


def assert_same_books(mesh: Mesh) -> None:
    """All is accepted, and the car has every dispute that its requester has."""
    car, submitter = mesh.sites[CAR], mesh.sites["submitter"]
    assert car.node is not None
    assert not any(channel.open for channel in car.node.provider.receipts.channels.values())
    for site in (car, submitter):
        assert check_objects(site.disk.signed).findings == (), site.name
    disputed = [
        {v.seq: v.disputes for v in vouchers(site) if v.disputes} for site in (car, submitter)
    ]
    assert disputed[0] == disputed[1]
    assert disputed[0], "there was something to lose"


@pytest.fixture
def disputes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every other receipt the first unit is disputed, for no reason."""
    judge = AcceptanceDesk._withheld

    def harsh(self: AcceptanceDesk, job: Job | None, receipt: Receipt) -> tuple[list[int], Reason]:
        withheld, reason = judge(self, job, receipt)
        return (withheld, reason) if receipt.seq % 2 else ([receipt.work.units.first], reason)

    monkeypatch.setattr(AcceptanceDesk, "_withheld", harsh)


def lose_acceptances(mesh: Mesh, share: float) -> None:
    """That share of the submitter's."""

    def lie(effect: fx.Send) -> list[fx.Send]:
        lost = kind_of(effect.frame) == "accept" and mesh.rng.random() < share
        return [] if lost else [effect]

    mesh.sites["submitter"].lie = lie


@pytest.mark.usefixtures("disputes")
@pytest.mark.parametrize("crashes", ["", CAR, "submitter"])
@pytest.mark.parametrize("seed", range(5))
def test_disputes_that_were_under_way_when_the_link_broke_reach_the_car(
    seed: int, crashes: str
) -> None:
    mesh = mesh_of(1, seed)
    mesh.unit_ms = 20
    lose_acceptances(mesh, 1.0)
    submit(mesh, order(200, lease_units_max=4))
    assert mesh.run(lambda: len(vouchers(mesh.sites["submitter"])) >= 3)
    if crashes:
        mesh.crash(crashes)
        mesh.boot(crashes)
    else:
        mesh.cut("submitter", CAR)
    mesh.sites["submitter"].lie = None
    mesh.connect_all()
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(5_000)
    assert_same_books(mesh)


@pytest.mark.usefixtures("disputes")
@pytest.mark.parametrize("seed", range(10))
def test_acceptances_that_find_their_queue_full_leave_no_hole(seed: int) -> None:
    mesh = mesh_of(1, seed)
    mesh.unit_ms = 20
    mesh.queue_full, mesh.full_lanes = 0.4, {Lane.MONEY}
    submit(mesh, order(200, lease_units_max=4))
    assert mesh.run(lambda: ended(mesh))
    mesh.queue_full = 0.0
    mesh.rest(20_000)
    assert_same_books(mesh)


@pytest.mark.usefixtures("disputes")
@pytest.mark.parametrize("seed", range(5))
def test_acceptances_that_are_lost_without_a_word_are_asked_for(seed: int) -> None:
    """No link broke: what shows that one is missing is the next one."""
    mesh = mesh_of(1, seed)
    mesh.unit_ms = 20
    lose_acceptances(mesh, 0.5)
    submit(mesh, order(200, lease_units_max=4))
    assert mesh.run(lambda: ended(mesh))
    mesh.sites["submitter"].lie = None
    submit(mesh, order(20, nonce=1, lease_units_max=4))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(130_000)
    assert_same_books(mesh)


def drop_once(site: Site, kind: str) -> None:
    """The next frame of that kind that the site sends is lost."""

    def lie(effect: fx.Send) -> list[fx.Send]:
        if kind_of(effect.frame) != kind:
            return [effect]
        site.lie = None
        return []

    site.lie = lie


def test_a_receipt_that_is_lost_without_a_word_is_sent_again() -> None:
    """The next one is declined with GAP, and no link need break."""
    mesh = mesh_of(1, 1)
    mesh.unit_ms = 20
    drop_once(mesh.sites[CAR], "receipt")
    submit(mesh, order(200, lease_units_max=4))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(200))


@pytest.mark.parametrize(("who", "kind"), [(CAR, "receipt"), ("submitter", "accept")])
def test_the_last_that_is_lost_without_a_word_comes_again(who: str, kind: str) -> None:
    """Nothing comes after it that could show that it is missing."""
    mesh = mesh_of(1, 1)
    site, lost = mesh.sites[who], 0

    def lie(effect: fx.Send) -> list[fx.Send]:
        nonlocal lost
        lost += kind_of(effect.frame) == kind
        return [] if kind_of(effect.frame) == kind else [effect]

    site.lie = lie
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    assert lost
    site.lie = None
    mesh.rest(15_000)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(20))
    car = mesh.sites[CAR].node
    assert car is not None
    assert not any(channel.open for channel in car.provider.receipts.channels.values())


def test_a_car_that_crashed_calls_who_has_not_accepted_its_receipts() -> None:
    """Its requester's job is done: nothing there ever calls."""
    mesh = mesh_of(1, 1)
    lose_acceptances(mesh, 1.0)
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(1_000)
    mesh.crash(CAR)
    mesh.sites["submitter"].lie = None
    mesh.rest(120_000)  # its advert has gone
    mesh.boot(CAR)
    mesh.rest(10_000)
    car = mesh.sites[CAR].node
    assert car is not None
    assert not any(channel.open for channel in car.provider.receipts.channels.values())
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(20))


@pytest.mark.parametrize("minutes", [1, 90])
def test_a_requester_that_was_away_is_called_more_and_more_seldom(minutes: int) -> None:
    mesh = mesh_of(1, 1)
    lose_acceptances(mesh, 1.0)
    submit(mesh, order(20))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(1_000)
    mesh.crash("submitter")
    before = sum("Dial(" in line for line in mesh.trace)
    mesh.rest(minutes * 60_000)
    assert 3 <= sum("Dial(" in line for line in mesh.trace) - before <= 7 + minutes // 10


def test_who_declines_every_receipt_gets_them_less_and_less_often() -> None:
    mesh = mesh_of(1, 1)
    submitter = mesh.sites["submitter"]
    submit(mesh, order(40))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert submitter.node is not None
    for channel in submitter.node.acceptances.channels.values():
        channel.next_seq = -1  # so that each is a gap to it
    sent: list[int] = []

    def count(effect: fx.Send) -> list[fx.Send]:
        if kind_of(effect.frame) == "receipt":
            sent.append(mesh.now_ms)
        return [effect]

    mesh.sites[CAR].lie = count
    submit(mesh, order(4, nonce=1))
    mesh.rest(300_000)
    rounds = sorted({at // 500 for at in sent})
    assert 5 < len(rounds) < 25
    assert rounds[-1] - rounds[-2] > 2 * (rounds[1] - rounds[0])
