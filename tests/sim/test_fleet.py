"""The vectorised fleet model: against an exact event model, against itself at other sizes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from testnet.sim import fleet, world
from testnet.sim.fleet import Fleet, ranks, simulate
from testnet.sim.measured import Setup
from testnet.sim.network import draw
from testnet.sim.rendezvous_map import NEIGHBOURS, chart, shard_cars
from testnet.sim.result import Result
from tests.sim.agreement import disagreements, quantile_us
from tests.sim.placement_heap import exact


@pytest.mark.long
@pytest.mark.parametrize("model", ["metro", "continents"])
def test_agrees_with_the_exact_event_model(model: str) -> None:
    networks = [(draw(model, 2_000, seed), seed) for seed in range(1, 6)]
    ours = [simulate(network, 0.8, 6, seed) for network, seed in networks]
    theirs = [exact(network, 0.8, 6, seed) for network, seed in networks]
    assert disagreements(ours, theirs, {0.5: 0.05, 0.95: 0.10, 0.99: 0.15}) == []
    messages = [np.mean([run.messages_per_task for run in runs]) for runs in (ours, theirs)]
    assert messages[0] == pytest.approx(messages[1], rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("model", ["metro", "continents"])
def test_agrees_at_95_percent_too_within_the_noise_of_seeds(model: str) -> None:
    networks = [(draw(model, 2_000, seed), seed) for seed in range(1, 13)]
    ours = [simulate(network, 0.95, 11, seed) for network, seed in networks]
    theirs = [exact(network, 0.95, 11, seed) for network, seed in networks]
    assert disagreements(ours, theirs, {0.5: 0.10, 0.95: 0.5, 0.99: 0.6}) == []


@pytest.mark.long
def test_agrees_with_the_protocols_own_code() -> None:
    """The tail of the model is the longer one: its messages between rendezvous are older."""
    load, cars, seed = 0.8, 2_500, 1
    network = draw("continents", cars, seed)
    setup = Setup(cars=cars, load=load, seed=seed, policy="tokens", model="continents", seconds=4)
    theirs = world.simulate(setup).result(network, "")
    ours = simulate(network, load, 8, seed, skew=fleet.SKEW)
    assert disagreements([ours], [theirs], {0.5: 0.10, 0.95: 0.10, 0.99: 0.30}) == []
    assert ours.messages_per_task == pytest.approx(theirs.messages_per_task, rel=0.10)


def p50_us(cars: int, seconds: float, seeds: tuple[int, ...]) -> float:
    runs = [simulate(draw("continents", cars, seed), 0.8, seconds, seed) for seed in seeds]
    return quantile_us(runs, 0.5)


def test_the_median_does_not_grow_with_the_fleet() -> None:
    times = [p50_us(6_000, 3, (1, 2, 3, 4, 5)), p50_us(60_000, 3, (1,))]
    assert max(times) < 1.10 * min(times)


@pytest.mark.long
def test_the_median_does_not_grow_up_to_a_million_cars() -> None:
    times = [p50_us(cars, 6, (1,)) for cars in (10_000, 100_000, 1_000_000)]
    assert max(times) < 1.10 * min(times)


@pytest.mark.long
def test_the_median_of_the_protocols_own_code_does_not_grow() -> None:
    """From few cars to five times as many, with room for what few tasks scatter: the whole
    range, within 10 %, is `bench placement`'s `flat_p50`."""
    times = []
    for cars in (600, 3_000):
        setup = Setup(cars=cars, seed=1, policy="tokens", model="continents", seconds=2)
        times.append(world.simulate(setup).quantile_ms(0.5))
    assert max(times) < 1.2 * min(times)


def test_no_way_of_placing_is_faster_than_the_limit() -> None:
    network = draw("continents", 4_000, 1)
    tokens, limit = (simulate(network, 0.8, 5, 1, policy=p) for p in ("tokens", "limit"))
    for share in (0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        assert limit.quantile_us(share) < tokens.quantile_us(share)
    assert set(limit.messages) == {"assign"} and limit.messages_per_task == 1
    assert 3.0 <= tokens.messages_per_task <= 3.5
    best = simulate(network, 0.5, 5, 1, draw=0).quantile_us(0.5)
    assert best <= simulate(network, 0.5, 5, 1, draw=1).quantile_us(0.5)


@pytest.mark.parametrize("policy", fleet.POLICIES)
def test_each_car_has_one_token_or_one_task(policy: str) -> None:
    network = draw("continents", 3_000, 5)
    run = Fleet(network, 0.9, 5, policy=policy)
    run.run(3.0)
    held = [
        int(run.map.first[shard] + run.slots[shard, place])
        for shard in range(len(run.map))
        for place in range(int(run.held[shard]))
    ]
    busy = np.flatnonzero(run.ready >= 3.0).tolist()
    assert sorted(held + busy) == list(range(len(network)))
    assert np.isfinite(run.miles).sum() == len(held)
    # every task that was submitted has started, waits, or is on its way
    started = sum(len(submitted) for submitted, _, _ in run.started)
    assert started + len(run.waiting) + len(run.offers) == pytest.approx(
        run.rate * 3.0, rel=4 / np.sqrt(run.rate * 3.0)
    )
    assert all((late > 0).all() for _, late, _ in run.started)


def test_utilisation_is_the_load() -> None:
    network = draw("metro", 6_000, 2)
    run = Fleet(network, 0.8, 2)
    run.run(6.0)
    # a car is also without a token while its assignment and its token travel
    away = 2 * (float(run.map.mile_s.mean()) + 0.003) / run.task_s
    assert 1 - run.held.sum() / 6_000 == pytest.approx(0.8 * (1 + away), abs=0.02)


def test_the_same_seed_gives_the_same_figures() -> None:
    network = draw("region", 2_000, 1)
    first, again, other = (simulate(network, 0.8, 3, seed) for seed in (7, 7, 8))
    assert replace(first, wall_s=0) == replace(again, wall_s=0) != replace(other, wall_s=0)


def test_shards_have_a_near_reachable_rendezvous_of_their_own() -> None:
    network = draw("continents", 20_000, 1)
    found = chart(network, 250, 0.25, np.random.default_rng(1))
    sizes = np.diff(found.first)
    assert sizes.sum() == 20_000 and sizes.max() <= 250 and sizes.min() >= 20
    assert (found.car_shard[found.rendezvous] == np.arange(len(found))).all()
    for shard in (0, 17, len(found) - 1):
        members = np.sort(found.mile_s[found.first[shard] : found.first[shard + 1]])
        assert found.mile_s[found.rendezvous[shard]] <= members[int(len(members) * 0.2)]
        near = found.near[shard]
        assert len(set(near.tolist())) == NEIGHBOURS and shard not in near
        other = int(found.rendezvous[near[0]])
        way_us = network.rtt_us(int(found.rendezvous[shard]), other) / 2
        assert found.way_s[shard, 0] * 1e6 == pytest.approx(way_us, abs=1)
    assert found.weight.sum() == pytest.approx(1)
    assert shard_cars(0.8, 2.0) == 250


def test_ranks_count_within_groups() -> None:
    assert ranks(np.array([3, 3, 4, 7, 7, 7])).tolist() == [0, 1, 0, 0, 1, 2]
    assert ranks(np.array([])).tolist() == []


def test_the_command_says_the_same_in_words_and_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    words = ["--cars", "500", "--seconds", "3", "--seed", "4", "--model", "metro"]
    words += ["--report", str(page)]
    assert fleet.main([*words, "--json"]) == 0
    read = Result.from_json(json.loads(capsys.readouterr().out))
    assert read == Result.from_json(json.loads(json.dumps(read.to_json())))
    assert read.command in page.read_text()
    assert read.cars == 500 and sum(cell.cars for cell in read.cells) == 500
    assert sum(cell.tasks for cell in read.cells) == read.tasks - read.unstarted
    assert fleet.main(read.command.split()[3:]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"p50 {read.quantile_us(0.5) / 1000:.1f} ms", told), told


@pytest.mark.parametrize(
    "words",
    [
        ["--cars", "0"],
        ["--cars", "999999999"],
        ["--load", "1.2", "--cars", "100"],
        ["--seconds", "1", "--cars", "100"],
        ["--task-s", "0", "--cars", "100"],
        ["--seconds", "3", "--cars", "100", "--report", "/nowhere/at/all.html"],
    ],
)
def test_bad_input_gets_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
