"""The simulator itself: it follows from its seed, and what decides is the protocol."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshnode.cli import frame
from meshnode.protocol.placement import AdvertPlacement, Car
from meshnode.protocol.types import Peer, Rng
from testnet.sim import command, faults, network, world
from testnet.sim.frames import gossip_frames, group_of, kind_of
from testnet.sim.measured import Measured, Setup
from testnet.sim.oracles import play
from testnet.sim.workload import Demand, lay_out, tasks_of
from testnet.sim.world import simulate
from tests import json_shape

SMALL = Setup(cars=24, seconds=1.5, model="metro", task_s=0.5)


@pytest.fixture(scope="module")
def small() -> Measured:
    return simulate(SMALL)


def test_every_task_starts_on_a_car(small: Measured) -> None:
    assert small.tasks > 20
    assert len(small.started_us) == small.tasks and not small.failed
    assert all(took > 0 for took in small.started_us)
    assert small.frames["place"] > 0 < small.frames["lease"]
    assert small.messages_per_task() > 1.5
    assert (small.signatures, small.membership) == ("ed25519", "adverts")


def test_cars_that_have_just_begun_find_work_by_tokens_at_once() -> None:
    """All begin within a second, each elects itself, and all adverts are real."""
    setup = replace(SMALL, cars=40, seconds=3.0, task_s=1.0, load=0.7, policy="tokens")
    begun = simulate(setup)
    assert begun.membership == "adverts" and not begun.failed
    assert begun.quantile_ms(0.95) < 400, "a place in a line that no token comes to takes seconds"


def test_the_same_seed_gives_the_same_digest_in_any_process() -> None:
    line = [sys.executable, "-m", "testnet", "sim", "--json", "--cars", "16", "--seconds", "0.6"]
    line += ["--task-s", "0.5", "--faults", "churn", "--parking"]
    said = []
    for salt in ("1", "77"):
        done = subprocess.run(
            line,
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        said.append(json_shape.check("testnet-sim", done.stdout))
    assert said[0]["digest"] == said[1]["digest"]
    assert said[0]["p99_ms"] == said[1]["p99_ms"]


@pytest.mark.long
def test_another_seed_gives_another_digest(small: Measured) -> None:
    assert simulate(replace(SMALL, seed=2)).digest != small.digest


def test_a_change_in_protocol_changes_the_run(
    small: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No placement decision lives in testnet: the last fit car instead of the best."""

    def last(self: AdvertPlacement, cars: list[Car], rng: Rng) -> Peer | None:
        fit = [car.peer for car in cars if car.capacity > 0]
        return fit[-1] if fit else None

    monkeypatch.setattr(AdvertPlacement, "choose", last)
    assert simulate(SMALL).digest != small.digest


@pytest.mark.long
def test_gossip_places_by_announcement() -> None:
    measured = simulate(replace(SMALL, policy="gossip"))
    assert len(measured.started_us) == measured.tasks
    assert measured.frames["announce"] > measured.frames["assign"] > 0
    assert measured.messages_per_task() > 10


def test_a_large_fleet_counts_signatures_and_knows_its_members() -> None:
    measured = simulate(replace(SMALL, full=False))
    assert (measured.signatures, measured.membership) == ("counted", "oracle")
    assert len(measured.started_us) == measured.tasks


@pytest.mark.long
def test_in_a_storm_every_task_starts_or_fails_with_a_reason(small: Measured) -> None:
    stormy = simulate(replace(SMALL, faults="storm"))
    assert stormy.digest != small.digest
    assert len(stormy.started_us) + stormy.failed.total() == stormy.tasks


@pytest.mark.parametrize("model", network.MODELS)
def test_no_oracle_beats_the_limit(model: str) -> None:
    ground = lay_out(model, 600, 3)
    demand = Demand(0.8, 2.0, 4, 3)
    tasks = tasks_of(ground, demand)
    medians = []
    for policy in ("limit", "central", "random"):
        starts = play(policy, ground, tasks, 3).start_us
        assert starts.keys() == {task.number for task in tasks}
        took = sorted(starts[task.number] - task.at_us for task in tasks)
        medians.append(took[len(took) // 2])
    assert medians == sorted(medians)


def test_the_workload_is_the_load_that_was_asked_for() -> None:
    ground = lay_out("continents", 2_000, 5)
    assert sum(map(len, ground.cars.values())) == 2_000
    assert all(ground.submitters.values()), "every cell has somebody who asks"
    demand = Demand(0.8, 2.0, 30, 5)
    first, last = demand.window_us
    tasks = [task for task in tasks_of(ground, demand) if first <= task.at_us < last]
    work = sum(task.unit_us for task in tasks) / 1e6 / 30 / 2_000
    assert 0.76 < work < 0.84


def test_frames_are_told_apart_by_their_first_bytes() -> None:
    assert kind_of(bytes.fromhex("a20001011a")) == "hello"
    assert [group_of(kind) for kind in ("part", "receipt", "advert", "offer", "message-77")] == [
        "result",
        "money",
        "upkeep",
        "placement",
        "placement",
    ]
    assert gossip_frames(500, 8) == 3_500 and gossip_frames(3, 8) == 6 and not gossip_frames(1, 8)


def test_the_command_offers_what_there_is() -> None:
    assert command.POLICIES == world.POLICIES
    assert command.MODELS == network.MODELS
    assert tuple(faults.PLANS) == command.FAULTS


def test_the_command_prints_a_table_and_one_json_object() -> None:
    options = ["--cars", "300", "--seconds", "1", "--policy", "limit"]
    table = CliRunner().invoke(command.sim, options, obj=frame.Face())
    assert table.exit_code == 0 and "P99_MS" in table.output and "digest" in table.output
    said = CliRunner().invoke(command.sim, [*options, "--json"], obj=frame.Face())
    fields = json_shape.check("testnet-sim", said.output)
    assert fields["messages"] == {"push": 1.0}
    assert json.loads(said.output)["digest"] in table.output


def test_a_report_shows_the_oracles_beside_it(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    options = ["--cars", "300", "--seconds", "1", "--policy", "limit", "--report", str(page)]
    done = CliRunner().invoke(command.sim, options, obj=frame.Face())
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert all(f"--policy {policy}" in text for policy in ("limit", "central", "random"))


def test_tokens_place_in_few_messages() -> None:
    measured = simulate(replace(SMALL, policy="tokens"))
    assert len(measured.started_us) == measured.tasks and not measured.failed
    assert measured.frames["place"] > 0 < measured.frames["assign"]


def test_a_policy_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'luck' is no policy"):
        simulate(Setup(cars=10, policy="luck"))


@pytest.mark.long
@pytest.mark.parametrize("policy", ["tokens", "gossip"])
def test_the_figures_of_the_readme_are_true(policy: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    line = re.search(rf"mesh testnet (sim .*--policy {policy}) +# (\d+) ms, (\d+) messages", readme)
    assert line is not None
    done = subprocess.run(
        [sys.executable, "-m", "testnet", *line[1].split(), "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    said = json.loads(done.stdout)
    told = [float(line[2]), float(line[3])]
    assert [said["p50_ms"], said["messages_per_task"]] == pytest.approx(told, rel=0.1)
