"""What lying and captured rendezvous cost a fleet, and what they cannot do to it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from meshnode.protocol import effects as fx
from meshnode.protocol.cell import Candidate, elect
from meshnode.protocol.types import Peer
from testnet.sim import faults, liars
from testnet.sim.counting import CountingSigner
from testnet.sim.frames import kind_of
from testnet.sim.measured import Measured, Setup
from testnet.sim.payments import Payments
from testnet.sim.world import simulate

SMALL = {"cars": 60, "model": "metro", "policy": "tokens", "task_s": 0.5, "full": False}


def run(plan: str, seconds: float = 2.0) -> Measured:
    return simulate(Setup(faults=plan, seconds=seconds, **SMALL))  # type: ignore[arg-type]


OFTEN = ("drop", "steer")
EACH = [pytest.param(k, marks=() if k in OFTEN else pytest.mark.long) for k in liars.KINDS]


@pytest.mark.parametrize("kind", EACH)
def test_no_lie_loses_a_task_or_is_paid(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "KINDS", (kind,))
    told: Counter[str] = Counter()
    make = liars.lies_of

    def counting(*args: object) -> liars.Lie:
        lie = make(*args)  # type: ignore[arg-type]

        def said(send: fx.Send) -> list[fx.Send]:
            out = lie(send)
            if out != [send]:
                told[kind_of(send.frame)] += 1
            return out

        return said

    monkeypatch.setattr(faults, "lies_of", counting)
    measured = run("liars")
    assert told["assign"] > 0, "it lied"
    assert len(measured.started_us) == measured.tasks and not measured.failed
    assert measured.paid > measured.tasks // 2 and not measured.paid_wrong


@pytest.mark.long
@pytest.mark.parametrize("networks", [1, 1_000])
def test_a_captured_cell_loses_no_task(networks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = faults.Plan(ground_keys=1_000, ground_networks=networks)
    monkeypatch.setitem(faults.PLANS, "ground", plan)
    measured = run("ground", seconds=1.0)
    assert 0 < len(measured.hurt_us) < measured.tasks, "one cell of several"
    assert len(measured.started_us) == measured.tasks and not measured.failed
    assert not measured.paid_wrong


@pytest.mark.parametrize(("networks", "least", "most"), [(1, 0.0, 0.5), (100, 0.85, 1.0)])
def test_what_keys_tried_for_an_epoch_win(networks: int, least: float, most: float) -> None:
    """In one network one post of the two; whoever has a network for each key has nearly all."""

    def peer_of(seed: int) -> Peer:
        return CountingSigner(seed.to_bytes(32, "big")).peer

    honest = [Candidate(peer_of(seed)) for seed in range(100)]
    mine = {seed: peer_of(seed) for seed in liars.ground_seeds(100)}

    def share(epoch: int) -> float:
        best = liars.best_keys("cell", epoch, 100, 250, mine, 100)
        keys = [Candidate(mine[seed], 1, f"{n % networks}") for n, seed in enumerate(best)]
        posts = [p for ranks in elect("cell", epoch, [*honest, *keys], 200, 250) for p in ranks]
        return sum(peer in {key.peer for key in keys} for peer in posts) / len(posts)

    shares = [share(epoch) for epoch in range(30)]
    assert least <= sum(shares) / len(shares) <= most
    assert max(shares) > 0, "one post at least, in some epoch"


def test_pay_for_what_no_car_ran_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(set[tuple[bytes, bytes]]):
        def add(self, _: object) -> None: ...

    honest = run("none", 1.0)
    assert honest.paid and not honest.paid_wrong and not honest.hurt_us
    monkeypatch.setattr(Payments, "__init__", _forgetful(Payments.__init__, Forgets))
    assert run("none", 1.0).paid_wrong == honest.paid


def _forgetful(init: Any, memory: Any) -> Any:
    def begin(self: Payments) -> None:
        init(self)
        self.ran = memory()

    return begin
