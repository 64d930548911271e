"""A laptop's readings from a tree of files as Linux lays them out; what is odd there is unknown."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.budget import FRESH_MS, VehicleState
from meshnode.vehicle.state import Pace, Source, VehicleAdapter
from meshnode.vehicle.sysfs import (
    FILE_BYTES_MAX,
    TEMP_DC_LEAST,
    TEMP_DC_MAX,
    SysfsVehicle,
)

# A ThinkPad's: energies in uWh, thresholds, a power without a sign.
BY_ENERGY = {
    "type": "Battery",
    "present": "1",
    "status": "Discharging",
    "capacity": "73",
    "energy_now": "36720000",
    "energy_full": "50000000",
    "energy_full_design": "57000000",
    "power_now": "12345678",
    "voltage_now": "11800000",
    "voltage_min_design": "11400000",
    "charge_control_start_threshold": "75",
    "charge_control_end_threshold": "80",
}
# Another maker's: charges in uAh, a signed current, a thermometer.
BY_CHARGE = {
    "type": "Battery",
    "status": "Charging",
    "capacity": "50",
    "charge_now": "2000000",
    "charge_full": "4000000",
    "current_now": "-1500000",
    "voltage_now": "8000000",
    "voltage_min_design": "7700000",
    "temp": "312",
}
MAINS = {"type": "Mains", "online": "0"}
MOUSE = {"type": "Battery", "scope": "Device", "present": "1", "capacity": "5"}
TABLET = {"type": "Mains", "scope": "Device", "online": "1"}


class Machine:
    """A tree of files; each word of `supplies` is a folder."""

    def __init__(self, root: Path, **supplies: dict[str, str]) -> None:
        self.root = root
        self.folder = root / "sys/class/power_supply"
        self.folder.mkdir(parents=True)
        for name, files in supplies.items():
            (self.folder / name).mkdir()
            self.write(name, **files)

    def write(self, supply: str, **files: str) -> None:
        for name, content in files.items():
            (self.folder / supply / name).write_text(content + "\n")

    def vehicle(self) -> SysfsVehicle:
        return SysfsVehicle(Source(root=self.root))

    def read(self) -> VehicleState:
        return self.vehicle().read()


def test_a_battery_by_its_energy(tmp_path: Path) -> None:
    car = Machine(tmp_path, BAT0=BY_ENERGY, AC=MAINS, hidpp_0=MOUSE, wacom=TABLET).vehicle()
    state = car.read()
    assert state.soc_permille == 734  # not the 73 per cent of `capacity`
    assert (state.usable_wh, state.capacity_wh) == (36, 50)
    assert state.plugged is False  # a tablet's plug is not the machine's
    assert (state.charging, state.pack_power_w) == ("discharging", -12)
    assert state.charge_limit_permille == 800
    assert state.pack_temp_dc is None
    assert car.provides == {
        "soc_permille",
        "usable_wh",
        "capacity_wh",
        "plugged",
        "charging",
        "pack_power_w",
        "charge_limit_permille",
    }
    assert {name for name in car.provides if getattr(state, name) is None} == set()
    assert set(state.ages_ms) == car.provides


def test_a_battery_by_its_charge(tmp_path: Path) -> None:
    """Charges become energies by the voltage of the design, not by that of the moment; the sign of
    the current is the status's."""
    machine = Machine(tmp_path, battery=BY_CHARGE, usb={"type": "USB", "online": "2"})
    state = machine.read()
    assert (state.soc_permille, state.usable_wh, state.capacity_wh) == (500, 15, 30)
    assert (state.charging, state.pack_power_w, state.plugged) == ("charging", 12, True)
    assert state.pack_temp_dc == (312, 312)
    machine.write("battery", voltage_min_design="0")  # a driver that does not know
    assert machine.read().capacity_wh == 32
    (machine.folder / "battery" / "voltage_min_design").unlink()
    (machine.folder / "battery" / "voltage_now").unlink()
    car = machine.vehicle()
    assert car.read().soc_permille == 500  # a share needs no voltage
    assert car.read().capacity_wh is None
    assert not {"capacity_wh", "usable_wh", "pack_power_w"} & car.provides


def test_only_per_cent(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0={"type": "Battery", "capacity": "42"})
    car = machine.vehicle()
    assert car.read().soc_permille == 420
    assert car.provides == {"soc_permille", "charging"}
    assert (car.read().charging, car.read().plugged) == (None, None)


def test_two_batteries_are_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, BAT1=BY_ENERGY, AC=MAINS)
    machine.write("BAT1", status="Not charging", power_now="0", energy_now="3280000")
    machine.write("BAT1", energy_full="30000000")
    state = machine.read()
    assert (state.soc_permille, state.usable_wh, state.capacity_wh) == (500, 40, 80)
    assert (state.charging, state.pack_power_w) == ("discharging", -12)
    # One without a thermometer has none to fail; of one without energies the lowest share counts.
    machine.write("BAT1", temp="251")
    (machine.folder / "BAT1" / "energy_now").unlink()
    machine.write("BAT1", capacity="11", charge_control_end_threshold="90")
    car = machine.vehicle()
    state = car.read()
    assert (state.soc_permille, state.usable_wh, state.capacity_wh) == (110, None, None)
    assert state.pack_temp_dc == (251, 251)
    assert state.charge_limit_permille == 900
    assert "capacity_wh" not in car.provides
    machine.write("BAT0", temp="-20")
    assert machine.read().pack_temp_dc == (-20, 251)


@pytest.mark.parametrize(
    ("files", "mains", "charging", "power_w"),
    [
        ({"status": "Charging"}, "1", "charging", 12),
        ({"status": "Discharging"}, "1", "discharging", -12),  # the plug is too weak
        ({"status": "Full", "power_now": "0"}, "1", "complete", 0),
        ({"status": "Full", "power_now": "0"}, "0", "no", 0),  # a moment after unplugging
        ({"status": "Full"}, "1", "complete", None),  # which way does it flow?
        # Held between its thresholds of 75 and 80 %.
        ({"status": "Not charging", "energy_now": "37600000"}, "1", "complete", None),
        # Not held, but hot or on a weak plug: the battery still wants to be charged.
        ({"status": "Not charging", "energy_now": "20000000"}, "1", "no", None),
        ({"status": "Unknown"}, "1", None, None),
        ({"status": "charging"}, "1", None, None),
        ({"status": ""}, "1", None, None),
    ],
)
def test_what_a_status_means(
    tmp_path: Path, files: dict[str, str], mains: str, charging: str | None, power_w: int | None
) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, AC=MAINS)
    machine.write("BAT0", **files)
    machine.write("AC", online=mains)
    state = machine.read()
    assert (state.charging, state.pack_power_w) == (charging, power_w)


@pytest.mark.parametrize(
    ("statuses", "charging"),
    [
        (("Charging", "Not charging"), "charging"),  # they take turns
        (("Charging", "Discharging"), "discharging"),
        (("Full", "Full"), "complete"),
        (("Full", "Unknown"), None),
        (("Full", "Not charging"), "no"),
    ],
)
def test_the_statuses_of_two(
    tmp_path: Path, statuses: tuple[str, str], charging: str | None
) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, BAT1=BY_ENERGY, AC={"type": "Mains", "online": "1"})
    for name, status in zip(("BAT0", "BAT1"), statuses, strict=True):
        machine.write(name, status=status)
    assert machine.read().charging == charging


def test_held_without_a_threshold_to_start_at(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, AC={"type": "Mains", "online": "1"})
    (machine.folder / "BAT0" / "charge_control_start_threshold").unlink()
    machine.write("BAT0", status="Not charging", energy_now="37500000")  # 75 % of a limit of 80 %
    assert machine.read().charging == "complete"
    machine.write("BAT0", energy_now="37000000")
    assert machine.read().charging == "no"


def test_plugs(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, AC=MAINS, ucsi={"type": "USB", "online": "0"})
    assert machine.read().plugged is False
    machine.write("ucsi", online="?")
    assert machine.read().plugged is None
    machine.write("AC", online="1")
    assert machine.read().plugged is True
    machine.write("AC", online="3")
    assert machine.read().plugged is None


def test_a_desktop_has_nothing_to_say(tmp_path: Path) -> None:
    for root in (Machine(tmp_path / "empty").root, tmp_path / "absent"):
        car = SysfsVehicle(Source(root=root))
        assert car.provides == frozenset()
        assert car.read() == VehicleState(at_ms=car.read().at_ms)
    machine = Machine(tmp_path / "slot", BAT0={"type": "Battery", "present": "0"}, AC=MAINS)
    assert machine.vehicle().provides == {"plugged"}


@pytest.mark.parametrize("content", ["", "x", "1e3", "0x10", "+5", "1_0", "9" * 30, "nan", "٣"])
@pytest.mark.parametrize(
    ("file", "readings"),
    [
        ("temp", {"pack_temp_dc"}),
        ("charge_now", {"usable_wh", "capacity_wh"}),
        ("charge_full", {"usable_wh", "capacity_wh"}),
        ("current_now", {"pack_power_w"}),
        ("capacity", set()),
        ("status", {"charging", "pack_power_w"}),
    ],
)
def test_what_is_no_number_is_unknown(
    tmp_path: Path, file: str, readings: set[str], content: str
) -> None:
    machine = Machine(tmp_path, battery=BY_CHARGE)
    car = machine.vehicle()
    machine.write("battery", **{file: content})
    state = car.read()
    assert {name for name in car.provides if getattr(state, name) is None} == readings
    assert state.soc_permille == 500


@pytest.mark.parametrize(
    ("file", "content", "reading"),
    [
        ("temp", str(TEMP_DC_LEAST - 1), "pack_temp_dc"),
        ("temp", str(TEMP_DC_MAX + 1), "pack_temp_dc"),
        ("temp", "-2731", "pack_temp_dc"),
        ("charge_now", "4200001", "capacity_wh"),  # more than the battery holds
        ("charge_now", "-1", "capacity_wh"),
        ("charge_full", "0", "capacity_wh"),
        ("current_now", "2000000000", "pack_power_w"),
        ("voltage_now", "12", "pack_power_w"),  # volts
    ],
)
def test_what_cannot_be_is_unknown(tmp_path: Path, file: str, content: str, reading: str) -> None:
    machine = Machine(tmp_path, battery=BY_CHARGE)
    assert getattr(machine.read(), reading) is not None
    machine.write("battery", **{file: content})
    assert getattr(machine.read(), reading) is None


def test_a_gauge_past_full_is_full(tmp_path: Path) -> None:
    machine = Machine(tmp_path, battery=BY_CHARGE)
    machine.write("battery", charge_now="4100000")
    assert machine.read().soc_permille == 1000


def test_a_battery_that_goes_and_comes_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, BAT1=BY_ENERGY, AC=MAINS)
    car = machine.vehicle()
    whole = car.read()
    assert whole.capacity_wh == 100
    machine.write("BAT1", present="0")
    for _ in range(2):
        state = car.read()
        assert state.plugged is False
        assert (state.soc_permille, state.usable_wh, state.capacity_wh) == (None, None, None)
        shutil.rmtree(machine.folder / "BAT1", ignore_errors=True)
    (machine.folder / "BAT1").mkdir()
    machine.write("BAT1", **BY_ENERGY)
    assert car.read().capacity_wh == 100
    assert "soc_permille" in car.provides


def test_a_file_that_fails_is_not_one_that_is_absent(tmp_path: Path) -> None:
    """Else a stationary machine would run on without its thermometer."""
    machine = Machine(tmp_path, battery=BY_CHARGE)
    temp = machine.folder / "battery" / "temp"
    temp.unlink()
    temp.mkdir()  # reading it fails, as while something is being unplugged
    car = machine.vehicle()
    assert car.read().pack_temp_dc is None
    assert "pack_temp_dc" in car.provides
    temp.rmdir()
    temp.write_text("300")
    assert car.read().pack_temp_dc == (300, 300)


def test_a_file_without_an_end_is_no_number(tmp_path: Path) -> None:
    machine = Machine(tmp_path, battery=BY_CHARGE)
    machine.write("battery", temp=" " * FILE_BYTES_MAX + "300")
    assert machine.read().pack_temp_dc is None
    (machine.folder / "battery" / "temp").unlink()
    (machine.folder / "battery" / "temp").symlink_to("/dev/zero")
    assert machine.read().pack_temp_dc is None


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers().map(str) | st.text("0123456789-. \n", max_size=12)
            for name in (*BY_ENERGY, *BY_CHARGE)
            if name != "type"
        },
    ),
    st.sampled_from(["Charging", "Discharging", "Not charging", "Full", "Unknown"]),
)
def test_whatever_the_files_hold(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str], status: str
) -> None:
    battery = {**files, "type": "Battery", "present": "1", "status": status}
    car = Machine(tmp_path_factory.mktemp("any"), BAT0=battery, AC=MAINS).vehicle()
    state = car.read()
    assert state.soc_permille is None or 0 <= state.soc_permille <= 1000
    assert state.pack_temp_dc is None or -600 <= state.pack_temp_dc[0] <= 1200
    assert state.charge_limit_permille is None or 0 < state.charge_limit_permille <= 1000
    assert state.pack_power_w is None or abs(state.pack_power_w) <= 10_000
    assert (state.usable_wh is None) == (state.capacity_wh is None)
    told = {name for name in FRESH_MS if getattr(state, name) is not None}
    assert told <= car.provides


def test_it_looks_once_a_period(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, AC=MAINS)
    told: list[VehicleState] = []
    seen = trio.Event()

    def tell(state: VehicleState) -> None:
        nonlocal seen
        told.append(state)
        seen.set()
        seen = trio.Event()

    async def main() -> None:
        car: VehicleAdapter = machine.vehicle()
        pace = Pace(30.0)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(car.run, tell, pace)
                await seen.wait()
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert len(told) == 1
                machine.write("AC", online="1")
                pace.hurry()
                await seen.wait()
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert [state.plugged for state in told] == [False, True]


def test_a_firmware_that_hangs_holds_up_nobody_else(tmp_path: Path) -> None:
    machine = Machine(tmp_path, BAT0=BY_ENERGY, AC=MAINS)
    answers = threading.Event()
    told: list[VehicleState] = []

    async def main() -> None:
        asked = trio.Event()

        class Hung(SysfsVehicle):
            def read(self) -> VehicleState:
                trio.from_thread.run_sync(asked.set)
                answers.wait(20)
                return super().read()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Hung(Source(root=machine.root)).run, told.append, Pace(30.0))
                await asked.wait()
                nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    finally:
        answers.set()
    assert told == []
