"""A car and a submitter, whole, over loopback: real keys, journal, overlay, worker and kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from meshnode.client.aio import connect
from meshnode.client.orders import split_outputs
from meshnode.errors import LocalProtocolError, LocalResource, MeshError, NoSuitableNode, UsageError
from meshnode.ledger.load import signed_objects
from meshnode.node import founding, terms
from meshnode.node.app import open_node
from meshnode.node.fleet_file import read_fleet
from meshnode.node.running import RunningNode
from meshnode.protocol.objects import T_ACCEPT, T_RECEIPT
from meshnode.protocol.papers import T_FLEET
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import Sealed
from meshnode.protocol.types import JobId
from meshnode.vehicle.sim import SimVehicle

from .node_kit import SEED, make_home, node_config, noop_order, stacked

WITHIN_S = 120.0


def with_two_nodes(
    folder: Path, test: Callable[[RunningNode, RunningNode], Awaitable[None]]
) -> None:
    async def main() -> None:
        with trio.fail_after(WITHIN_S):
            car_home = make_home(folder, "car-0", car=True)
            home = make_home(folder, "submitter", car=False)
            async with (
                open_node(car_home, node_config(car=True)) as car,
                open_node(home, node_config(car=False, join=car.addrs)) as own,
            ):
                await test(car, own)

    trio.run(main)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - two ledgers that wake nobody
        await trio.sleep(0.02)


def test_a_job_a_call_and_their_receipts(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        order = noop_order(40, label="first")
        job_id = await own.submit(order)
        states = [n async for n in own.watch(job_id)]
        assert states[-1].kind == "job"
        result = await own.result(job_id)
        assert result.ended.state == "done"
        (out,) = split_outputs(result.packed, order.outs, order.units)
        want = stacked(40) + 1
        assert np.array_equal(out, want)

        packed = await own.call(noop_order(1, durable=False))
        assert np.array_equal(split_outputs(packed, order.outs, 1)[0], want[:1])

        (row, _) = await own.jobs()
        assert (row["label"], row["state"], row["done"]) == ("first", "done", 40)
        shown = await own.show(job_id)
        assert {attempt["peer"] for attempt in shown["attempts"]} == {car.peer}

        def settled() -> bool:
            accepted = list(signed_objects(car.home, T_ACCEPT))
            return bool(accepted) and len(list(signed_objects(own.home, T_RECEIPT))) > 0

        await until(settled)

    with_two_nodes(tmp_path, test)


def test_large_results_come_as_a_file(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        order = noop_order(40)
        job_id = await own.submit(order)
        result = await own.result(job_id, inline_bytes_max=100)
        assert result.path is not None
        (out,) = split_outputs(result.path.read_bytes(), order.outs, order.units)
        assert out.shape == (40, 16)

    with_two_nodes(tmp_path, test)


def test_a_node_alone_says_that_nobody_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        config = node_config(car=False, nobody_ms=300)
        async with open_node(make_home(tmp_path, "submitter", car=False), config) as own:
            with trio.fail_after(WITHIN_S):
                with pytest.raises(NoSuitableNode):
                    await own.call(noop_order(1, durable=False))
                job_id = await own.submit(noop_order(2))
                assert (await own.wait(job_id)).state == "failed"
                assert (await own.explain(job_id))["reasons"][0]["text"]
                with pytest.raises(UsageError, match="knows no job"):
                    await own.wait(JobId(bytes(16)))

    trio.run(main)


def test_a_job_goes_on_when_its_node_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        home = make_home(tmp_path, "submitter", car=False)
        order = noop_order(400)  # too much to be inline
        assert not order.inline
        with trio.fail_after(WITHIN_S):
            async with open_node(home, node_config(car=False)) as own:
                ref = await own.put_bytes(stacked(400).tobytes())
                assert order.args[0].blob == ref
                job_id = await own.submit(order)
            car_home = make_home(tmp_path, "car-0", car=True)
            async with (
                open_node(car_home, node_config(car=True)) as car,
                open_node(home, node_config(car=False, join=car.addrs)) as own,
            ):
                result = await own.result(job_id)
        (out,) = split_outputs(result.packed, order.outs, order.units)
        assert np.array_equal(out, stacked(400) + 1)

    trio.run(main)


def test_a_home_has_one_node(tmp_path: Path) -> None:
    async def main() -> None:
        home = make_home(tmp_path, "submitter", car=False)
        async with open_node(home, node_config(car=False)):
            with pytest.raises(LocalResource, match="in use by process"):
                async with open_node(home, node_config(car=False)):
                    pass

    trio.run(main)


def test_the_process_says_ready_and_ends_on_sigterm(tmp_path: Path) -> None:
    home = make_home(tmp_path, "car-0", car=True)
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "meshnode.node", "--home", str(home), "--role", "testnet-car"]
    process = subprocess.Popen([*command, "--ready-fd", str(writing)], pass_fds=(writing,))
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            ready = json.loads(pipe.readline())
        assert ready["ready"]
        assert Path(ready["control"]).is_socket()
        assert Path(ready["control"]).stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert not Path(ready["control"]).exists()
    finally:
        process.kill()
        process.wait()


def test_what_is_wrong_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshnode.node", "--home", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == LocalResource.exit_code
    assert done.stderr.startswith("meshnode: ")
    assert done.stderr.count("\n") == 1


def test_the_driver_comes_back_and_leaves_again(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        await own.call(noop_order(1, durable=False))
        assert car.vehicle is not None and isinstance(car.vehicle.adapter, SimVehicle)
        car.vehicle.adapter.change(moving=True)
        await until(lambda: car.view().may_run is Reason.DRIVING)
        job_id = await own.submit(noop_order(2))
        car.vehicle.adapter.change(moving=False)
        assert (await own.wait(job_id)).state == "done"

    with_two_nodes(tmp_path, test)


def test_the_owner_pauses_the_car_over_the_control_socket(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        await own.call(noop_order(1, durable=False))
        async with connect(car.home) as owner:
            assert await owner.mode("never") == {"kind": "never", "until_ms": None}
            await until(lambda: car.view().may_run is Reason.PAUSED)
            assert (await owner.status())["vehicle"]["mode"]["kind"] == "never"
            job_id = await own.submit(noop_order(2))
            await owner.mode("auto")
            assert (await own.wait(job_id)).state == "done"
            with pytest.raises(LocalProtocolError, match="a mode is one of"):
                await owner.mode("often")
        async with connect(own.home) as owner:
            assert await owner.mode("never") is None  # it runs nobody's work anyway

    with_two_nodes(tmp_path, test)


def test_consent_is_withdrawn_and_given_again_while_the_node_runs(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        await own.call(noop_order(1, durable=False))
        async with connect(car.home) as owner:
            now_ms = time.time_ns() // 1_000_000
            ended = terms.withdrawal(car.home, now_ms)
            assert ended is not None
            assert await owner.terms([ended.wire]) is False
            await until(lambda: car.view().may_run is Reason.NO_CONSENT)
            await until(lambda: [one.reason for one in own.view().cars] == [Reason.NO_CONSENT])
            found = terms.in_force(car.home)
            assert found is not None and found.consent.withdrawn_ms == now_ms + terms.WITHDRAWAL_MS
            job_id = await own.submit(noop_order(2))
            policy = replace(founding.TEST_POLICY, watt_max=77)
            operator = founding.ConsentTerms(operator=found.consent.operator)
            papers = terms.change(
                car.home, policy, operator, vehicle=bytes(range(16)), now_ms=now_ms + 1
            )
            await owner.terms([each.wire for each in papers])
            assert (await own.wait(job_id)).state == "done"
            assert car.view().budget.watt_max == 77
            # Without the account's key: the car stops all the same.
            await owner.terms([])
            await until(lambda: car.view().may_run is Reason.NO_CONSENT)
            with pytest.raises(MeshError, match="not signed by the car's account"):
                await owner.terms([other_networks_consent().wire])
        past = terms.history(car.home)
        assert [one.consent.withdrawn_ms is None for one in past] == [True, False, True]

    with_two_nodes(tmp_path, test)


def test_a_fleet_narrows_a_car_that_runs_and_stops_doing_so(tmp_path: Path) -> None:
    async def test(car: RunningNode, own: RunningNode) -> None:
        await own.call(noop_order(1, durable=False))
        operator = founding.seeded_key(SEED, "account/submitter")  # whom its consent names
        file = tmp_path / "fleet.toml"
        file.write_text("day_wh = 3\ndisk_interval = 7\n")
        now_ms = time.time_ns() // 1_000_000
        words = read_fleet(file, operator.account, car.network, now_ms)
        fleet = founding.sign_as(operator, words)
        async with connect(car.home) as owner:
            await owner.fleet(fleet.wire)
            await until(lambda: car.view().budget.spendable_mwh <= 3_000)
            executor: Any = car.word.on_policy.args[0]  # type: ignore[attr-defined]
            assert executor.disk_interval_s == 7.0
            job_id = await own.submit(noop_order(2))
            assert (await own.wait(job_id)).state == "done"
            stranger = founding.seeded_key(SEED, "account/car-0")
            foreign = replace(words, account=stranger.account)
            with pytest.raises(MeshError, match="as operator"):
                await owner.fleet(founding.sign_as(stranger, foreign).wire)
            with pytest.raises(LocalProtocolError, match="one sealed object"):
                await owner._ask("fleet", terms=5)
            await owner.fleet(None)
            await until(lambda: car.view().budget.spendable_mwh > 3_000)
            await owner.terms([])  # a withdrawn consent is not put back by a fleet's word
            with pytest.raises(MeshError, match="was withdrawn"):
                await owner.fleet(fleet.wire)
            await until(lambda: car.view().may_run is Reason.NO_CONSENT)
            # Nor one whose withdrawal could not be written.
            (car.home / "consent.withdrawn.mesh").rename(car.home / "consent.mesh")
            await owner.fleet(None)
            with pytest.raises(MeshError, match="withdrawn"):
                await owner.fleet(fleet.wire)
            assert car.view().may_run is Reason.NO_CONSENT
        assert fleet.digest in {one.digest for one in signed_objects(car.home, T_FLEET)}

    with_two_nodes(tmp_path, test)


def other_networks_consent() -> Sealed:
    consent = founding.seeded_papers(99, "car-0", 1, car=True).consent
    assert consent is not None
    return consent
