"""Storms over small meshes: the invariants hold, and would be seen if they did not."""

from __future__ import annotations

import pytest

from meshnode.protocol.acceptances import AcceptanceDesk
from meshnode.protocol.bidding import Bidding
from meshnode.protocol.job import Job
from meshnode.protocol.objects import Receipt
from meshnode.protocol.presence import Presence
from meshnode.protocol.provider import Provider
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import Sealed
from meshnode.protocol.types import Peer
from testnet.sim import seeds


@pytest.mark.parametrize("seed", range(8))
def test_a_storm_breaks_no_promise(seed: int) -> None:
    went = seeds.run(seed)
    assert not went.broken, f"{went.broken}\npython -m testnet.sim.seeds --first {seed} --count 1"
    assert went.jobs >= 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8, 500))
def test_hundreds_more_break_none(seed: int) -> None:
    went = seeds.run(seed)
    assert not went.broken, f"{went.broken}\npython -m testnet.sim.seeds --first {seed} --count 1"


def test_a_seed_replays_to_the_byte() -> None:
    assert seeds.run(3) == seeds.run(3)


def broken_by(first: int) -> str:
    """What the first of ten seeds that breaks something says."""
    return next(
        (w.broken for seed in range(first, first + 10) if (w := seeds.run(seed)).broken), ""
    )


def test_a_token_that_is_spent_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A car that forgets what it has spent, and a requester that tries."""
    award = Bidding._award

    def twice(self: Bidding, job: Job, peer: Peer, sealed: Sealed) -> None:
        award(self, job, peer, sealed)
        award(self, job, peer, sealed)

    monkeypatch.setattr(Bidding, "_award", twice)
    monkeypatch.setattr(Presence, "spend", lambda self, token, peer: True)
    monkeypatch.setattr(Presence, "held", lambda self: 0)
    assert "leased twice on token" in broken_by(0)


def test_a_unit_that_is_accepted_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_it(self: AcceptanceDesk, job: object, receipt: Receipt) -> tuple[list[int], Reason]:
        return [], Reason.OK

    monkeypatch.setattr(AcceptanceDesk, "_withheld", all_of_it)
    assert "twice" in broken_by(0)


def test_a_car_that_starts_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Provider._start_ready

    def eager(self: Provider) -> None:
        classes = self.owner.classes
        self.owner.classes = (
            None
            if classes is None
            else type(classes)(
                classes.classes, classes.jaxlib, classes.jax_window, classes.sandbox_layers, 9
            )
        )
        start(self)
        self.owner.classes = classes

    monkeypatch.setattr(Provider, "_start_ready", eager)
    assert "slots" in broken_by(0)
