"""Readings become budgets: silence, failures and a driver's return, told by the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from meshnode.config import VehicleSettings
from meshnode.errors import UsageError
from meshnode.node import founding, vehicle_watch
from meshnode.node.vehicle_watch import AGAIN_S_LEAST, AGAIN_S_MAX, VehicleWatch, open_vehicle
from meshnode.protocol.budget import FRESH_MS
from meshnode.protocol.events import BudgetRead, Event, Recall
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import NetworkId, Now
from meshnode.vehicle.sim import PARKED
from meshnode.vehicle.state import PERIOD_S_MAX, READINGS, Pace, Tell, VehicleLost

START_UNIX_MS = 1_767_614_400_000


class TrialClock:
    """The monotonic clock is trio's, which a test turns; unix time goes along."""

    def now(self) -> Now:
        mono_ms = round(trio.current_time() * 1000)
        return Now(mono_ms, START_UNIX_MS + mono_ms)

    def seconds_until(self, mono_ms: int) -> float:
        raise NotImplementedError


class Told:
    """An adapter that does what the test tells it."""

    name = "told"
    provides = READINGS

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.pace: Pace | None = None
        self._tell: Tell | None = None
        self._broken = trio.Event()
        self._again = trio.Event()

    async def run(self, tell: Tell, pace: Pace) -> None:
        self._tell, self.pace, self._broken = tell, pace, trio.Event()
        self._again.set()
        await self._broken.wait()
        if self.failure is not None:
            raise self.failure

    def says(self, **readings: Any) -> None:
        assert self._tell is not None
        now_ms = TrialClock().now().unix_ms
        self._tell(replace(PARKED, at_ms=now_ms, **readings))

    async def breaks(self, failure: Exception | None) -> float:
        """End the run so; the seconds until the next one begins."""
        began_s, self.failure, self._again = trio.current_time(), failure, trio.Event()
        self._broken.set()
        await self._again.wait()
        return trio.current_time() - began_s


def watched(test: Callable[[Told, VehicleWatch, list[Event]], Any]) -> None:
    key = founding.seeded_key(7, "account/car-0")
    policy = founding.draft_policy(key.account, NetworkId(bytes(8)), founding.TEST_POLICY)
    wire = founding.sign_as(key, policy).wire

    async def main() -> None:
        posted: list[Event] = []
        car = Told()
        watch = VehicleWatch(car, wire, TrialClock(), posted.append, poll_s=2.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await trio.testing.wait_all_tasks_blocked()
            await test(car, watch, posted)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))


def reasons(posted: list[Event]) -> list[Reason]:
    return [event.reason for event in posted if isinstance(event, BudgetRead)]


def test_only_changes_are_posted_and_the_driver_comes_first() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        car.says()
        car.says()
        assert reasons(posted) == [Reason.OK]
        car.says(moving=True, ignition="on")
        car.says(moving=True, ignition="on")
        assert posted[1] == Recall(Reason.DRIVING, vehicle_watch.RECALL_GRACE_MS)
        assert len(posted) == 3 and reasons(posted)[-1] is Reason.DRIVING

    watched(test)


def test_silence_stops_the_car_by_the_clock() -> None:
    """The adapter hangs: nobody says anything any more, and the budget ends all the same."""

    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        car.says()
        await trio.sleep(FRESH_MS["moving"] / 1000 - 0.1)
        assert reasons(posted) == [Reason.OK]
        car.says()
        await trio.sleep(FRESH_MS["moving"] / 1000 - 0.1)
        assert reasons(posted) == [Reason.OK]
        await trio.sleep(0.2)
        assert reasons(posted) == [Reason.OK, Reason.READINGS]
        car.says()
        assert reasons(posted)[-1] is Reason.OK
        # Frozen: what it says is its last reading, which gets no younger by being said again.
        await trio.sleep(2)
        car.says(ages_ms=dict.fromkeys(READINGS, FRESH_MS["moving"] + 1))
        assert reasons(posted)[-1] is Reason.READINGS

    watched(test)


@pytest.mark.parametrize("failure", [VehicleLost("no answer"), ZeroDivisionError("bug"), None])
def test_an_adapter_that_fails_is_run_again_after_a_pause(failure: Exception | None) -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        pauses_s = [await car.breaks(failure) for _ in range(9)]
        assert pauses_s[:3] == pytest.approx([AGAIN_S_LEAST, 2 * AGAIN_S_LEAST, 4 * AGAIN_S_LEAST])
        assert pauses_s[-2:] == pytest.approx([AGAIN_S_MAX, AGAIN_S_MAX])
        said = watch.says()
        assert said["lost"] and said["age_ms"] is None
        car.says()  # it is there again: the next pause is short
        assert watch.says()["lost"] is None
        assert await car.breaks(failure) == pytest.approx(AGAIN_S_LEAST)

    watched(test)


def test_motion_is_looked_at_often_only_while_the_car_offers_itself() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        assert car.pace is not None
        for readings, period_s in (
            ({}, 2.0),
            ({"soc_permille": 100}, PERIOD_S_MAX),
            ({}, 2.0),
            ({"moving": None}, 2.0),  # it is because of the readings that it may not run
            ({"moving": True}, PERIOD_S_MAX),
        ):
            car.says(**readings)
            assert car.pace.period_s == period_s

    watched(test)


def test_the_adapter_is_that_of_the_configuration() -> None:
    assert open_vehicle(VehicleSettings()).name == "sim"
    with pytest.raises(UsageError, match=r"no vehicle adapter 'tesla'; there are: .*sim"):
        open_vehicle(VehicleSettings(adapter="tesla"))
    with pytest.raises(UsageError, match="'x' is not NAME=VALUE"):
        open_vehicle(VehicleSettings(options=("x",)))


def test_another_package_adds_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "told"
        failing = False

        def load(self) -> Callable[[Any], Told]:
            def make(source: Any) -> Told:
                assert source.options == {"unit": "2"}
                if self.failing:
                    raise KeyError("unit")
                return Told()

            return make

    point = Point()
    monkeypatch.setattr(vehicle_watch, "entry_points", lambda group: [point])
    settings = VehicleSettings(adapter="told", options=("unit=2",))
    assert open_vehicle(settings).name == "told"
    point.failing = True
    with pytest.raises(UsageError, match="told does not start"):
        open_vehicle(settings)


def test_status_says_how_old_the_last_word_is() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        car.says()
        await trio.sleep(1.5)
        assert watch.says() == {"adapter": "told", "age_ms": 1500, "lost": None}

    watched(test)
