"""What is measured of runs: exact quantiles over a window, and which cars are slow."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.attempt import Attempt, Step
from meshnode.protocol.durations import WINDOW, Durations
from meshnode.protocol.events import JobOrder
from meshnode.protocol.job import Job, make_spec
from meshnode.protocol.outbox import Outbox
from meshnode.protocol.pace import KNOWN_LEAST, OUTRUN_FOR_MS, SLOW_FOR_MS, SLOW_RUNS, Pace
from meshnode.protocol.types import ArraySpec, Digest, JobId, Limits, Now, Peer, TaskId
from testnet.sim.site import ARTIFACT, NETWORK, REQUEST, identity_of

ONE, OTHER, THIRD = (Peer(bytes([n]) * 38) for n in (1, 2, 3))


@given(st.lists(st.floats(0.05, 1e6), min_size=1, max_size=3 * WINDOW), st.integers(1, 1000))
def test_a_quantile_is_the_nearest_rank_of_the_last_values(
    values: list[float], permille: int
) -> None:
    durations = Durations()
    for value in values:
        durations.add(value)
    last = sorted(values[-WINDOW:])
    assert len(durations) == len(last)
    assert durations.quantile(permille) == last[math.ceil(permille * len(last) / 1000) - 1]
    assert durations.mean() == pytest.approx(sum(last) / len(last))


def test_what_is_left_of_a_late_one_is_what_later_ones_took() -> None:
    durations = Durations()
    for value in (2, 2, 2, 2, 10, 12):
        durations.add(value)
    assert durations.left(3) == 8
    assert durations.left(10) == 2
    assert durations.left(12) is None


class Bench:
    """A pace, a clock, and runs of one unit as they come back."""

    def __init__(self) -> None:
        identity, signer = identity_of(1, REQUEST)
        self.out = Outbox(identity, Limits(), signer, random.Random(1))
        self.pace = Pace(self.out)
        self.now(0)

    def now(self, mono_ms: int) -> None:
        self.out.now = Now(mono_ms, mono_ms)

    def job(self, number: int = 0, units: int = 1) -> Job:
        out = ArraySpec("float32", (16,))
        nonce = number.to_bytes(16, "big")
        order = JobOrder("bench.spin@1", ARTIFACT, (), (out,), units, nonce)
        spec = make_spec(order, NETWORK, self.out.identity.peer)
        return Job(JobId(nonce), Digest(bytes(32)), spec, order, 0, 0)

    def run(self, job: Job, peer: Peer, ms: int, *, back: bool = True) -> None:
        began = self.out.now.mono_ms
        task = TaskId(bytes(16))
        attempt = Attempt(task, 0, peer, 0, 1, 1, now_mono_ms=began, offer_timeout_ms=1)
        attempt.step(Step.GRANTED)
        self.now(began + ms)
        (self.pace.returned if back else self.pace.outrun)(job, attempt)


def test_nothing_is_said_of_work_that_was_seen_too_seldom() -> None:
    bench = Bench()
    job = bench.job()
    for _ in range(KNOWN_LEAST - 1):
        bench.run(job, ONE, 2_000)
    assert bench.pace.times(job) is None
    bench.run(job, ONE, 2_000)
    times = bench.pace.times(bench.job(7))
    assert times is not None and times.quantile(950) == 2_000


def test_a_job_of_many_runs_is_measured_by_its_own() -> None:
    bench = Bench()
    for number in range(KNOWN_LEAST):
        bench.run(bench.job(number), ONE, 9_000)
    job = bench.job(100, units=50)
    for _ in range(KNOWN_LEAST):
        bench.run(job, OTHER, 1_000)
    times = bench.pace.times(job)
    assert times is not None and times.quantile(950) == 1_000


def a_slow_one() -> tuple[Bench, Job]:
    bench = Bench()
    job = bench.job()
    for _ in range(KNOWN_LEAST):
        bench.run(job, ONE, 2_000)
        bench.run(job, OTHER, 2_000)
    return bench, job


def test_a_car_is_slow_after_three_runs_in_a_row_and_not_for_ever() -> None:
    bench, job = a_slow_one()
    for count in range(SLOW_RUNS):
        assert not bench.pace.slow(job, THIRD), f"after {count} runs"
        bench.run(job, THIRD, 7_000)
    assert bench.pace.slow(job, THIRD) and bench.pace.slow_cars(job) == [THIRD]
    bench.now(bench.out.now.mono_ms + SLOW_FOR_MS)
    assert not bench.pace.slow(job, THIRD) and bench.pace.slow_cars(job) == []


def test_one_good_run_clears_it() -> None:
    bench, job = a_slow_one()
    for _ in range(SLOW_RUNS):
        bench.run(job, THIRD, 7_000)
    bench.run(job, THIRD, 2_100)
    assert not bench.pace.slow(job, THIRD)


def test_a_car_that_was_outrun_comes_last_for_a_moment() -> None:
    bench, job = a_slow_one()
    bench.run(job, THIRD, 100)
    bench.run(job, THIRD, 4_000, back=False)
    assert bench.pace.slow(job, THIRD)
    bench.now(bench.out.now.mono_ms + OUTRUN_FOR_MS)
    assert not bench.pace.slow(job, THIRD)


def test_most_cars_are_never_slow() -> None:
    """Then the work has become longer, and one of them must do it."""
    bench, job = a_slow_one()
    for _ in range(SLOW_RUNS):
        for peer in (ONE, OTHER, THIRD):
            bench.run(job, peer, 7_000)
    assert len(bench.pace.slow_cars(job)) <= 1
