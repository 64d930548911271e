"""The simulated vehicle: shows what it is told, at once and from a file; never more than that."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.errors import LocalResource
from meshnode.protocol.budget import FRESH_MS, VehicleState
from meshnode.vehicle.sim import PARKED, READINGS, SimVehicle
from meshnode.vehicle.state import VehicleAdapter


def test_a_state_holds_nothing_that_tells_who_or_where() -> None:
    names = {field.name for field in fields(VehicleState)}
    assert not [
        name
        for name in names
        for word in ("lat", "lon", "position", "location", "vin", "speed", "evse", "odometer")
        if word in name.split("_")
    ]
    assert set(PARKED.ages_ms) >= set(FRESH_MS)


def test_a_change_is_seen_at_once_and_the_period_bounds_silence() -> None:
    async def main() -> None:
        car: VehicleAdapter = SimVehicle(period_s=30.0)
        assert isinstance(car, SimVehicle)
        seen: list[VehicleState] = []
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    async for state in car.watch():
                        seen.append(state)
                        if state.moving:
                            return

                nursery.start_soon(watch)
                await trio.testing.wait_all_tasks_blocked()
                assert len(seen) == 1
                car.change(moving=True, ignition="on", plugged=False, charging="no")
        assert [state.moving for state in seen] == [False, True]
        assert seen[0].plugged
        assert abs(seen[0].at_ms - time.time() * 1000) < 60_000
        await car.aclose()

    trio.run(main)


def test_without_a_change_a_state_comes_every_period() -> None:
    async def main() -> None:
        states = SimVehicle(period_s=0.01).watch()
        with trio.fail_after(10):
            first, second = await anext(states), await anext(states)
        assert second.at_ms > first.at_ms

    trio.run(main)
    assert SimVehicle(period_s=1e9)._period_s == 30.0


def test_a_file_overlays_the_readings_and_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "car.toml"
    file.write_text("soc_permille = 310\npack_temp_dc = [60, 70]\n")
    car = SimVehicle(file=file)
    state = car.read()
    assert (state.soc_permille, state.pack_temp_dc, state.plugged) == (310, (60, 70), True)
    file.write_text('moving = true\nignition = "on"\n')
    state = car.read()
    assert (state.moving, state.ignition, state.soc_permille) == (True, "on", PARKED.soc_permille)
    file.write_text("moving = ")  # fails closed: nothing is known
    state = car.read()
    assert all(getattr(state, name) is None for name in READINGS)
    assert not state.ages_ms


@pytest.mark.parametrize(
    "text",
    [
        "position = 1",
        "at_ms = 1",
        "soc_permille = 31.0",
        "soc_permille = true",
        "moving = 0",
        'charging = "fast"',
        'parking = "street"',
        "parked_s = 1.5",
        "pack_temp_dc = [1]",
        "pack_temp_dc = 1",
        "pack_temp_dc = [1.0, 2.0]",
        "not toml",
    ],
)
def test_a_bad_file_is_one_clear_line_at_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "car.toml"
    file.write_text(text)
    with pytest.raises(LocalResource, match=r"car\.toml"):
        SimVehicle(file=file)
    with pytest.raises(LocalResource, match="cannot read"):
        SimVehicle(file=tmp_path / "nowhere")


def test_a_typo_in_a_change_is_refused() -> None:
    with pytest.raises(ValueError, match="no reading"):
        SimVehicle().change(soc=1)
