"""Readings become budgets: silence, failures and a driver's return, told by the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from meshnode.config import VehicleSettings
from meshnode.errors import UsageError
from meshnode.node import founding, vehicle_watch
from meshnode.node.energy_book import Drawn, EnergyBook
from meshnode.node.mode import MODE_FILE, Mode, read_mode, write_mode
from meshnode.node.uplink import Uplink
from meshnode.node.vehicle_watch import AGAIN_S_LEAST, AGAIN_S_MAX, VehicleWatch, open_vehicle
from meshnode.protocol.budget import FRESH_MS, VehicleState
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
        return max(0.0, mono_ms / 1000 - trio.current_time())


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
        self._tell(replace(PARKED, **{"at_ms": now_ms, **readings}))

    async def breaks(self, failure: Exception | None) -> float:
        """End the run so; the seconds until the next one begins."""
        began_s, self.failure, self._again = trio.current_time(), failure, trio.Event()
        self._broken.set()
        await self._again.wait()
        return trio.current_time() - began_s


async def goes_by(seconds: float) -> None:
    """Turn the clock; nobody waits, and whatever was due has run."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    clock.autojump_threshold = float("inf")
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked()
    clock.autojump_threshold = 0.05


def watched(
    test: Callable[[Told, VehicleWatch, list[Event]], Any],
    terms: founding.PolicyTerms = founding.TEST_POLICY,
) -> None:
    key = founding.seeded_key(7, "account/car-0")
    policy = founding.draft_policy(key.account, NetworkId(bytes(8)), terms)

    async def main() -> None:
        posted: list[Event] = []
        car = Told()
        watch = VehicleWatch(car, policy, TrialClock(), posted.append, poll_s=2.0)
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
        await goes_by(FRESH_MS["moving"] / 1000 - 0.1)
        assert reasons(posted) == [Reason.OK]
        car.says()
        await goes_by(FRESH_MS["moving"] / 1000 - 0.1)
        assert reasons(posted) == [Reason.OK]
        await goes_by(0.2)
        assert reasons(posted) == [Reason.OK, Reason.READINGS]
        car.says()
        assert reasons(posted)[-1] is Reason.OK
        # Frozen: what it says is its last reading, which gets no younger by being said again.
        await goes_by(2)
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
    assert open_vehicle(VehicleSettings(), simulated=True).name == "sim"
    assert open_vehicle(VehicleSettings(adapter="sim")).name == "sim"
    assert open_vehicle(VehicleSettings()).name == "none"
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
        await goes_by(1.5)
        mode = {"kind": "auto", "until_ms": None}
        said = watch.says()
        assert said["link"] is None and said["metered_bytes"] == 0
        assert (said["adapter"], said["age_ms"], said["lost"], said["mode"]) == (
            "told",
            1500,
            None,
            mode,
        )

    watched(test)


def test_whatever_ends_the_permission_ends_the_work() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        for readings, reason in (
            ({"soc_permille": 100}, Reason.CHARGE_FLOOR),
            ({"pack_temp_dc": (200, 500)}, Reason.TEMPERATURE),
            ({"low_voltage_mv": 11_000}, Reason.LOW_VOLTAGE),
        ):
            posted.clear()
            car.says()
            car.says(**readings)
            car.says(**readings)
            assert [type(event) for event in posted] == [BudgetRead, Recall, BudgetRead]
            assert posted[1] == Recall(reason, vehicle_watch.RECALL_GRACE_MS)

    watched(test)


def test_a_pause_recalls_at_once_and_ends_by_the_clock() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        car.says()
        posted.clear()
        now_ms = TrialClock().now().unix_ms
        watch.set_mode(Mode("never", now_ms + 3_000))
        assert posted[0] == Recall(Reason.PAUSED, vehicle_watch.RECALL_GRACE_MS)
        assert reasons(posted) == [Reason.PAUSED]
        car.says(moving=True)  # the driver comes before the pause
        assert reasons(posted)[-1] is Reason.DRIVING
        car.says()
        assert reasons(posted)[-1] is Reason.PAUSED
        await goes_by(2.9)
        car.says()
        assert reasons(posted)[-1] is Reason.PAUSED
        await goes_by(0.2)
        assert reasons(posted)[-1] is Reason.OK
        watch.set_mode(Mode("never"))
        await goes_by(3)
        car.says()
        assert reasons(posted)[-1] is Reason.PAUSED
        watch.set_mode(Mode())
        assert reasons(posted)[-1] is Reason.OK

    watched(test)


def test_always_sets_the_hours_aside_and_no_limit() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        car.says(parked_s=5)
        assert reasons(posted)[-1] is Reason.JUST_PARKED
        watch.set_mode(Mode("always", TrialClock().now().unix_ms + 2_000))
        assert reasons(posted)[-1] is Reason.OK
        car.says(parked_s=5, soc_permille=100)
        assert reasons(posted)[-1] is Reason.CHARGE_FLOOR
        car.says(parked_s=5)
        await goes_by(2.1)
        assert reasons(posted)[-1] is Reason.JUST_PARKED

    watched(test, replace(founding.TEST_POLICY, idle_s=600))


def test_the_mode_is_kept_in_the_home(tmp_path: Path) -> None:
    assert read_mode(tmp_path) == Mode()
    for mode in (Mode("never"), Mode("always", 5), Mode()):
        write_mode(tmp_path, mode)
        assert read_mode(tmp_path) == mode
    for bad in ("", "{}", "[]", '{"mode": "often", "until_ms": null}', '{"mode": "auto"}', "nul"):
        (tmp_path / MODE_FILE).write_text(bad)
        assert read_mode(tmp_path) == Mode("never")
    assert Mode("always", 5).at(4) == "always"
    assert Mode("always", 5).at(5) == "auto"


def test_a_car_whose_owner_chose_no_adapter_computes_nothing() -> None:
    async def main() -> None:
        told: list[VehicleState] = []
        with pytest.raises(VehicleLost, match="no vehicle adapter is chosen"):
            await open_vehicle(VehicleSettings()).run(told.append, Pace(1.0))
        assert told == []

    trio.run(main)


def test_what_no_car_reads_is_no_reading() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        for readings in (
            {"soc_permille": float("nan")},
            {"soc_permille": 10**20},
            {"soc_permille": "80"},
            {"soc_permille": True},
            {"pack_temp_dc": 200},
            {"pack_temp_dc": (200, 100)},
            {"moving": 0},
            {"ignition": "idle"},
            {"ages_ms": None},
            {"ages_ms": {"moving": -1}},
        ):
            car.says()
            assert reasons(posted)[-1] is Reason.OK
            car.says(**readings)
            assert reasons(posted)[-1] is Reason.READINGS, readings
            watch.set_mode(Mode("never"))  # nothing of it may stand in the owner's way
            watch.set_mode(Mode())
        car.says(at_ms="now")
        assert reasons(posted)[-1] is Reason.READINGS

    watched(test)


def test_a_pause_does_not_forget_the_limit_that_held() -> None:
    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        above = {"soc_permille": 215}
        for between in ("pause", "readings", "drive"):
            car.says()
            car.says(soc_permille=200)
            assert reasons(posted)[-1] is Reason.CHARGE_FLOOR
            if between == "pause":
                watch.set_mode(Mode("never"))
                watch.set_mode(Mode())
            else:
                car.says(moving=None if between == "readings" else True, **above)
            car.says(**above)
            assert reasons(posted)[-1] is Reason.CHARGE_FLOOR, between
            car.says(soc_permille=221)
            assert reasons(posted)[-1] is Reason.OK

    watched(test)


def test_a_car_that_had_nothing_left_stays_so_over_a_drive_a_pause_and_lost_readings() -> None:
    """Of 60 kWh 12 are the floor's and 10 reserved; a quarter of an hour of 550 W is 137 Wh."""

    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        parked = {
            "plugged": False,
            "charging": "no",
            "capacity_wh": 60_000,
            "usable_wh": None,
            "pack_power_w": 0,
        }
        for between in ("pause", "readings", "drive"):
            car.says(**parked, soc_permille=366)
            assert reasons(posted)[-1] is Reason.BUDGET
            if between == "pause":
                watch.set_mode(Mode("never"))
                watch.set_mode(Mode())
            else:
                lost = None if between == "readings" else True
                car.says(**parked, moving=lost, soc_permille=366)
            car.says(**parked, soc_permille=368)  # 80 Wh
            assert reasons(posted)[-1] is Reason.BUDGET, between
            car.says(**parked, soc_permille=371)
            assert reasons(posted)[-1] is Reason.OK
            car.says(**parked, soc_permille=368)
            assert reasons(posted)[-1] is Reason.OK  # it goes on to the end

    terms = replace(
        founding.TEST_POLICY,
        soc_floor_permille=200,
        reserve_wh=10_000,
        plugged_rule=1,
        watt_max=300,
        awake_w=250,
        day_wh=50_000,
    )
    watched(test, terms)


@pytest.mark.parametrize(
    ("terms", "ends"),
    [({"wifi_only": True}, 0), ({"metered_bytes_a_day": 300}, 300), ({}, None)],
)
def test_work_ends_where_a_mobile_link_costs_what_its_owner_does_not_give(
    tmp_path: Path, terms: dict[str, Any], ends: int | None
) -> None:
    moved, kind = 0, "wifi"
    uplink = Uplink("auto", lambda: moved, lambda: kind)  # type: ignore[arg-type, return-value]
    book = EnergyBook(tmp_path, lambda: Drawn(0, 0, 0, working=False, asleep=False))

    async def test(car: Told, watch: VehicleWatch, posted: list[Event]) -> None:
        nonlocal moved, kind
        watch._book, watch._uplink = book, uplink
        car.says()
        kind = "cellular"
        await goes_by(4.0)
        car.says()
        await goes_by(1.1)
        car.says()
        for _ in range(4):
            moved += 100
            await goes_by(0.1)
            car.says()
        said = reasons(posted)
        if ends is None:
            assert set(said) == {Reason.OK}
            return
        assert said[-1] is Reason.METERED and Recall(Reason.METERED, 100) in posted
        assert watch.says()["metered_bytes"] == 400
        kind = "wired"
        await goes_by(5.1)
        car.says()
        car.says()
        assert reasons(posted)[-1] is Reason.OK
        book.save(TrialClock().now())
        assert EnergyBook(tmp_path, book._drawn).metered_bytes == 400

    watched(test, replace(founding.TEST_POLICY, **terms))
