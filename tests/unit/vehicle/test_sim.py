"""The simulated vehicle: shows what it is told, at once and from a file; never more than that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.errors import LocalResource
from meshnode.protocol.budget import FRESH_MS, VehicleState
from meshnode.vehicle.sim import PARKED, SimVehicle, open_sim
from meshnode.vehicle.state import READINGS, Pace, Source


def test_a_state_holds_nothing_that_tells_who_or_where() -> None:
    names = {field.name for field in fields(VehicleState)}
    assert not [
        name
        for name in names
        for word in ("lat", "lon", "position", "location", "vin", "speed", "evse", "odometer")
        if word in name.split("_")
    ]
    assert set(PARKED.ages_ms) >= set(FRESH_MS)


async def told(
    car: SimVehicle, pace: Pace, until: Callable[[VehicleState], bool]
) -> list[VehicleState]:
    """The states that the adapter tells, up to the one that is asked for."""
    seen: list[VehicleState] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            def tell(state: VehicleState) -> None:
                seen.append(state)
                if until(state):
                    nursery.cancel_scope.cancel()

            await car.run(tell, pace)
    return seen


def test_a_change_is_told_at_once() -> None:
    async def main() -> None:
        car = SimVehicle()
        async with trio.open_nursery() as nursery:

            async def drive_away() -> None:
                await trio.testing.wait_all_tasks_blocked()
                car.change(moving=True, ignition="on", plugged=False, charging="no")

            nursery.start_soon(drive_away)
            seen = await told(car, Pace(30.0), lambda state: bool(state.moving))
        assert [state.moving for state in seen] == [False, True]
        assert seen[0].plugged
        assert abs(seen[0].at_ms - time.time() * 1000) < 60_000

    trio.run(main)


def test_without_a_change_a_state_comes_every_period() -> None:
    async def main() -> None:
        times: list[int] = []

        def enough(state: VehicleState) -> bool:
            times.append(state.at_ms)
            return len(times) == 3

        await told(SimVehicle(), Pace(0.01), enough)
        assert times[0] < times[2]

    trio.run(main)
    assert Pace(1e9).period_s == 30.0


@pytest.mark.parametrize("atomic", [False, True])
def test_a_changed_file_is_read_at_once(tmp_path: Path, atomic: bool) -> None:
    """Within the 30 s of its period: the kernel says that the file was written, or replaced."""
    file = tmp_path / "car.toml"
    file.write_text("moving = false\n")

    async def main() -> None:
        car = open_sim(Source(file=file))
        async with trio.open_nursery() as nursery:

            async def drive_away() -> None:
                await trio.testing.wait_all_tasks_blocked()
                (tmp_path / "other.toml").write_text("nothing")
                written = tmp_path / "new.toml" if atomic else file
                written.write_text("moving = true\n")
                written.rename(file)

            nursery.start_soon(drive_away)
            seen = await told(car, Pace(30.0), lambda state: bool(state.moving))
        assert len(seen) <= 3  # the start, perhaps an empty file, the change: no other file's

    trio.run(main)


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
