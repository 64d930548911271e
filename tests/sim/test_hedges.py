"""Hedges: late runs are started once more, which cuts the tail, costs little, and accepts nothing
twice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.messages import CancelTask, pack
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, ArraySpec, JobId, Limits, Peer, TaskId
from testnet.sim.counting import CountingSigner, counted
from testnet.sim.invariants import Proof
from testnet.sim.mesh import ARTIFACT, PROVIDE, REQUEST, Mesh, Site
from testnet.sim.site import DAY_MS, EPOCH_MS, NETWORK, account_keys
from testnet.sim.standing import Standing

from .test_explain import explained
from .test_mesh import accepted_units, assert_whole, ended, job_of, receipts

OUT = ArraySpec("float32", (16,))
CARS = 30
UNIT_MS = 2_000
TASKS = 400
WARM = 100  # the first of them, that are not measured: nobody knows yet what is late
GAP_MS = 120  # between arrivals, in the mean: half of what the cars can do
SLOW = 5  # times slower
CANCEL = pack(CancelTask(TaskId(bytes(16)), 0, Reason.SUPERSEDED))[:3]
HUNG = 300  # times slower: ten minutes


class Street(Mesh):
    """Some cars are slow; counts the starts of units and notes when jobs end."""

    def __init__(self, seed: int, slow: dict[str, int], slow_share: float, **limits: int) -> None:
        super().__init__(
            seed,
            delay_ms=(5, 20),
            limits=replace(Limits(), advert_gap_ms=20_000, **limits),
            keys_of=CountingSigner,
        )
        account = Account(account_keys(0, CountingSigner).account)
        self.standing = Standing(NETWORK, account, EPOCH_MS + 6 * DAY_MS)
        self.keep_trace = False
        self.slow = slow
        self.starts = 0
        self.ended_ms: dict[JobId, int] = {}
        self.slow_share = slow_share
        self.came_ms: dict[JobId, int] = {}
        self._car = ""
        self._spread = random.Random(f"{seed} spread")

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        self._car = site.name
        self.starts += effect.run.count
        super()._execute(site, effect, life)

    def unit_us(self, effect: fx.StartExec) -> int:
        us = int(UNIT_MS * 1000 * (0.9 + 0.2 * self._spread.random()))
        times = SLOW if self._spread.random() < self.slow_share else 1
        return us * self.slow.get(self._car, times)

    def _notify(self, site: Site, effect: fx.Notify, life: int) -> None:
        if effect.notice.kind == "submitted":
            self.came_ms[JobId(effect.subject)] = self.now_ms
        elif effect.notice.kind == "job" and dict(effect.notice.fields)["state"] != "running":
            self.ended_ms[JobId(effect.subject)] = self.now_ms


@dataclass
class Served:
    took_ms: list[int]  # ascending
    extra: float  # starts of units over those that were needed
    counters: Counter[str]

    def quantile_ms(self, share: float) -> int:
        return self.took_ms[int(share * len(self.took_ms))]


def serve(
    slow: dict[str, int] | None = None,
    slow_share: float = 0.0,
    policy: str = "tokens",
    seed: int = 1,
    **limits: int,
) -> Served:
    """`TASKS` jobs of one unit arrive at random at one submitter."""
    with counted():
        street = Street(seed, slow or {}, slow_share, **limits)
        submitter = street.add("submitter", REQUEST)
        for number in range(CARS):
            street.add(f"car-{number}", PROVIDE)
        street.connect_all()
        street.rest(2_000)
        rng, at_ms = random.Random(f"{seed} arrivals"), 0
        for number in range(TASKS):
            at_ms += int(rng.expovariate(1 / GAP_MS))
            nonce = number.to_bytes(16, "big")
            order = ev.JobOrder(
                "bench.spin@1", ARTIFACT, (), (OUT,), 1, nonce, policy=policy, durable=False
            )
            submit = ev.Submit(number, order)
            street.at(at_ms, lambda submit=submit: street.feed(submitter, submit))  # type: ignore[misc]
        assert street.run(lambda: len(street.ended_ms) == TASKS, ms_max=2 * HUNG * UNIT_MS)
    node = submitter.node
    assert node is not None
    measured = list(street.came_ms)[WARM:]
    took = sorted(street.ended_ms[job_id] - street.came_ms[job_id] for job_id in measured)
    return Served(took, street.starts / TASKS - 1, node.counters)


def test_hedges_halve_the_tail_for_few_starts() -> None:
    """Three of a hundred runs are five times slower, wherever they are."""
    without, hedged = serve(slow_share=0.03, hedge_permille=0), serve(slow_share=0.03)
    assert without.extra == 0 < hedged.extra <= 0.05
    assert hedged.quantile_ms(0.99) < 0.6 * without.quantile_ms(0.99)
    assert hedged.quantile_ms(0.5) < 1.05 * without.quantile_ms(0.5)
    assert hedged.counters["hedges_won"] == hedged.counters["hedges"] == round(hedged.extra * TASKS)


def test_where_nothing_is_late_nothing_is_hedged() -> None:
    assert serve().extra == 0


def test_a_budget_bounds_them() -> None:
    served = serve(slow_share=0.045, hedge_permille=10)
    computed_ms = sum(served.took_ms) * TASKS / (TASKS - WARM)
    assert 0 < served.counters["hedges"] * UNIT_MS <= 1.1 * 0.01 * computed_ms


@pytest.mark.long
@pytest.mark.parametrize("policy", ["tokens", "adverts"])
@pytest.mark.parametrize("times", [SLOW, HUNG])
def test_slow_cars_and_hung_ones(times: int, policy: str) -> None:
    served = serve({"car-3": times, "car-7": times}, policy=policy)
    assert served.quantile_ms(0.99) < 2.5 * UNIT_MS
    assert 0 < served.extra <= 0.05


class Yard(Proof):
    """Four cars; one of them hangs from `hang` on, until it is well again."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, delay_ms=(1, 5))
        self.unit_ms = 100
        self.hung = ""
        self._car = ""

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        self._car = site.name
        super()._execute(site, effect, life)

    def unit_us(self, effect: fx.StartExec) -> int:
        return super().unit_us(effect) * (20 if self._car == self.hung else 1)


def hung_yard(policy: str, units: int, *, hears: bool = True, **more: int) -> Yard:
    """A job of single units, of whose cars one hangs in the middle; it may not hear of hedges."""
    yard = Yard(7)
    submitter = yard.add("submitter", REQUEST)
    for number in range(4):
        yard.add(f"car-{number}", PROVIDE)
    yard.connect_all()

    def lie(effect: fx.Send) -> list[fx.Send]:
        return [] if effect.frame.startswith(CANCEL) else [effect]

    submitter.lie = None if hears else lie
    order = ev.JobOrder(
        "bench.spin@1", ARTIFACT, (), (OUT,), units, bytes(16), policy=policy, lease_units_max=1
    )
    yard.submit(submitter, 1, order)
    assert yard.run(lambda: job_of(yard).stored >= units - 16)
    yard.hung = "car-2"
    assert yard.run(lambda: ended(yard))
    yard.rest(8_000)
    return yard


@pytest.mark.parametrize("policy", ["tokens", "adverts"])
def test_the_last_run_of_a_job_does_not_wait_for_a_hung_car(policy: str) -> None:
    yard = hung_yard(policy, 60)
    assert_whole(yard, 60)
    yard.check_whole()
    assert sorted(accepted_units(yard.sites["submitter"])) == list(range(60))
    hedges = [past.attempt for past in job_of(yard).history if past.attempt.late is not None]
    assert hedges and all(hedge.peer != peer_of(yard, "car-2") for hedge in hedges)
    took_ms = max(hedge.started_mono_ms for hedge in hedges) - hedges[0].started_mono_ms
    assert took_ms < 20 * yard.unit_ms


@pytest.mark.parametrize("policy", ["tokens", "adverts"])
def test_a_loser_that_goes_on_is_told_that_its_unit_came_twice(policy: str) -> None:
    yard = hung_yard(policy, 60, hears=False)
    submitter = yard.sites["submitter"]
    assert submitter.node is not None and submitter.node.counters["units_twice"] >= 1
    once = accepted_units(submitter)
    assert sorted(once) == list(range(60)) and len(receipts(submitter)) > 0
    late = [r for r in receipts(submitter) if r.provider == peer_of(yard, "car-2")]
    units = {unit for r in late for unit in range(r.work.units.first, sum(r.work.units))}
    others = {u for u in units if job_of(yard).whose(u)[2] != peer_of(yard, "car-2")}  # type: ignore[index]
    assert others, "it has signed for a unit that was taken from another"


def test_an_explanation_names_the_run_that_was_late() -> None:
    yard = hung_yard("tokens", 60)
    runs = {(run.task, run.attempt): run for run in explained(yard).runs}
    hedges = [run for run in runs.values() if run.late is not None]
    assert hedges
    for hedge in hedges:
        assert hedge.late is not None and hedge.late.spent_ms > hedge.late.usual_ms
        first = runs[hedge.task, hedge.late.attempt]
        assert (first.first, first.count) == (hedge.first, hedge.count)
        assert first.peer != hedge.peer


def peer_of(yard: Yard, name: str) -> Peer:
    return yard.sites[name].identity.peer


def test_a_hedge_that_no_car_was_idle_for_is_tried_again() -> None:
    """The cell is full for three seconds, the last run hangs, and then cars are idle."""
    yard = Yard(7)
    submitter = yard.add("submitter", REQUEST)
    for number in range(4):
        yard.add(f"car-{number}", PROVIDE)
    yard.connect_all()
    full = [True]
    for site in yard.sites.values():
        assert site.node is not None
        site.node.rendezvous._scarce = lambda: full[0]  # type: ignore[method-assign]
    order = ev.JobOrder(
        "bench.spin@1", ARTIFACT, (), (OUT,), 60, bytes(16), policy="tokens", lease_units_max=1
    )
    yard.submit(submitter, 1, order)
    assert yard.run(lambda: job_of(yard).stored >= 44)
    yard.hung = "car-2"
    yard.unit_us = lambda effect: (  # type: ignore[method-assign]
        Mesh.unit_us(yard, effect) * (HUNG if yard._car == yard.hung else 1)
    )
    yard.rest(3_000)
    assert job_of(yard).stored < 60 and submitter.node is not None
    assert submitter.node.counters["hedges"] > 3, "asked, in vain"
    full[0] = False
    assert yard.run(lambda: ended(yard), ms_max=10_000)
