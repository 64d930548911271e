"""The meters, by fake files and libraries: what does not measure is not there."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import LocalResource
from meshnode.protocol.budget import VehicleState
from meshnode.vehicle.meters import Terms, open_chain
from meshnode.vehicle.meters.ina import InaMeter
from meshnode.vehicle.meters.nvml import NvmlMeter
from meshnode.vehicle.meters.pack import HOLD_MS_MAX, PackMeter
from meshnode.vehicle.meters.profile import board_named
from meshnode.vehicle.meters.rapl import TRAITS as RAPL
from meshnode.vehicle.meters.rapl import RaplMeter, Zone

PLAIN = Terms(efficiency_permille=1_000, awake_w=0, watt_max=300)
UNPLUGGED = VehicleState(
    at_ms=0,
    plugged=False,
    charging="no",
    pack_power_w=-250,
    moving=False,
    ignition="off",
    ages_ms={"pack_power_w": 0},
)


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return folder


# ---- RAPL


def zone(root: Path, name: str, said: str, uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder = root / "sys/class/powercap" / name
    return write(folder, name=said, energy_uj=uj, max_energy_range_uj=range_uj)


def test_rapl_counts_each_package_once(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 7_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    meter = RaplMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    for folder in (first, *others):
        write(folder, energy_uj=5_001_000)
    write(second, energy_uj=1_007_000)
    assert meter.energy_uj(100) == 6_000_000


def test_rapl_goes_on_over_a_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    write(package, energy_uj=600_000)
    assert meter.energy_uj(100) == 328_850 + 600_000


def test_rapl_that_was_set_back_has_lost_the_thread_once(tmp_path: Path) -> None:
    """Back to 0 from the middle: as a wrap it would be 212 kJ in a second."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 50_000_000_000)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    write(package, energy_uj=10)
    assert meter.energy_uj(1_000) is None
    write(package, energy_uj=2_000_010)
    assert meter.energy_uj(2_000) == 2_000_000


def test_rapl_that_was_not_read_for_long_may_have_wrapped_unseen(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    write(package, energy_uj=1_000)
    assert meter.energy_uj(262_000) is None
    assert meter.energy_uj(262_000 + RAPL.period_ms) == 0


def test_rapl_that_may_not_be_read_is_not_there(tmp_path: Path) -> None:
    """Root in a test reads every file: a folder in its place cannot be read by anybody."""
    assert RaplMeter.open(tmp_path) is None
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    (package / "energy_uj").unlink()
    (package / "energy_uj").mkdir()
    assert meter.energy_uj(10) is None
    assert RaplMeter.open(tmp_path) is None
    zone(tmp_path, "intel-rapl:1", "package-1", 5)
    assert RaplMeter.open(tmp_path) is None  # half of the machine is not the machine
    meter.close()


@given(steps=st.lists(st.integers(0, 900_000_000), min_size=1, max_size=20), start=st.floats(0, 1))
def test_rapl_loses_nothing_over_any_wraps(steps: list[int], start: float) -> None:
    range_uj = 10**10
    raw = int(start * range_uj) % range_uj
    counted = Zone(Path("unused"), range_uj)
    assert counted.since(raw, 0) == 0
    counted.last_uj = raw
    for step in steps:
        raw = (raw + step) % range_uj
        assert counted.since(raw, 1_000) == step
        counted.last_uj = raw


# ---- NVML


class FakeNvml:
    """As much of libnvidia-ml.so as the reader calls; each GPU a counter in mJ or an error code."""

    def __init__(self, *boards: int, init: int = 0, count: int = 0, handle: int = 0) -> None:
        self.boards = list(boards)
        self.errors: dict[int, int] = {}
        self.codes = {"init": init, "count": count, "handle": handle}
        self.shut = 0

    def nvmlInit_v2(self) -> int:
        return self.codes["init"]

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.boards)
        return self.codes["count"]

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, board: Any) -> int:
        board._obj.value = 0x1000 + index.value
        return self.codes["handle"]

    def nvmlDeviceGetTotalEnergyConsumption(self, board: ctypes.c_void_p, energy_mj: Any) -> int:
        index = (board.value or 0) - 0x1000
        energy_mj._obj.value = self.boards[index]
        return self.errors.get(index, 0)

    def nvmlShutdown(self) -> int:
        self.shut += 1
        return 0


def test_nvml_adds_up_all_boards() -> None:
    library = FakeNvml(1_000, 2_000, 30)
    meter = NvmlMeter.open(lambda name: library)
    assert meter is not None
    assert meter.energy_uj(0) == 3_030_000
    library.boards[2] += 5
    assert meter.energy_uj(0) == 3_035_000
    meter.close()
    assert library.shut == 1


@pytest.mark.parametrize("code", [3, 4, 15, 999])
def test_nvml_of_which_one_board_does_not_count_is_not_there(code: int) -> None:
    library = FakeNvml(1_000, 2_000)
    library.errors[1] = code
    assert NvmlMeter.open(lambda name: library) is None
    assert library.shut == 1


@pytest.mark.parametrize(
    ("library", "shut"),
    [
        (FakeNvml(init=9), 0),
        (FakeNvml(5, init=18), 0),
        (FakeNvml(), 1),
        (FakeNvml(5, count=1), 1),
        (FakeNvml(5, handle=4), 1),
    ],
)
def test_nvml_without_a_usable_board_is_not_there(library: FakeNvml, shut: int) -> None:
    assert NvmlMeter.open(lambda name: library) is None
    assert library.shut == shut


def test_nvml_without_a_driver_or_the_call_is_not_there() -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert NvmlMeter.open(missing) is None
    assert NvmlMeter.open(lambda name: object()) is None


def test_nvml_that_loses_a_board_says_so() -> None:
    library = FakeNvml(1_000, 2_000)
    meter = NvmlMeter.open(lambda name: library)
    assert meter is not None
    library.errors[0] = 15  # GPU is lost
    assert meter.energy_uj(0) is None


# ---- Jetson


def rail(hwmon: Path, channel: int, label: str, mv: object, ma: object) -> None:
    write(
        hwmon,
        **{f"in{channel}_label": label, f"in{channel}_input": mv, f"curr{channel}_input": ma},
    )


def agx_orin(root: Path) -> Path:
    hwmon = write(root / "sys/class/hwmon/hwmon3", name="ina3221", in7_label="sum", in7_input=9)
    rail(hwmon, 1, "VDD_GPU_SOC", 20_000, 1_000)  # 20 W
    rail(hwmon, 2, "VDD_CPU_CV", 20_000, 500)  # 10 W
    rail(hwmon, 3, "VIN_SYS_5V0", 5_000, 1_000)  # 5 W
    memory = write(root / "sys/class/hwmon/hwmon4", name="ina3221")
    rail(memory, 2, "VDDQ_VDD2_1V8AO", 5_000, 200)
    write(root / "sys/class/hwmon/hwmon0", name="tmp451", in1_label="VDD_IN")
    return hwmon


def test_a_jetson_is_summed_over_the_rails_of_its_module(tmp_path: Path) -> None:
    hwmon = agx_orin(tmp_path)
    meter = InaMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    assert meter.energy_uj(1_000) == 35_000_000
    rail(hwmon, 1, "VDD_GPU_SOC", 20_000, 2_000)  # 55 W: the trapezoid between is 45 W
    assert meter.energy_uj(2_000) == 35_000_000 + 45_000_000


def test_the_input_of_an_orin_nx_is_all_of_it(tmp_path: Path) -> None:
    hwmon = write(tmp_path / "sys/class/hwmon/hwmon1", name="ina3221")
    rail(hwmon, 1, "VDD_IN", 5_000, 2_000)
    rail(hwmon, 2, "VDD_CPU_GPU_CV", 5_000, 1_000)
    rail(hwmon, 3, "VDD_SOC", 5_000, 500)
    meter = InaMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    assert meter.energy_uj(500) == 5_000_000


def test_a_jetson_that_was_not_read_for_long_has_lost_the_thread(tmp_path: Path) -> None:
    hwmon = agx_orin(tmp_path)
    meter = InaMeter.open(tmp_path)
    assert meter is not None
    assert meter.energy_uj(0) == 0
    assert meter.energy_uj(60_000) is None
    assert meter.energy_uj(61_000) == 35_000_000
    rail(hwmon, 2, "VDD_CPU_CV", 20_000, "")
    assert meter.energy_uj(62_000) is None
    rail(hwmon, 2, "VDD_CPU_CV", 20_000, 500)
    assert meter.energy_uj(63_000) == 35_000_000
    assert meter.energy_uj(62_000) is None  # a clock that went back


def test_unknown_rails_are_not_added_up(tmp_path: Path) -> None:
    assert InaMeter.open(tmp_path) is None
    hwmon = write(tmp_path / "sys/class/hwmon/hwmon1", name="ina3221")
    rail(hwmon, 1, "VDD_GPU_SOC", 20_000, 1_000)
    rail(hwmon, 2, "CVB_ATX_12V", 12_000, 1_000)
    assert InaMeter.open(tmp_path) is None
    rail(hwmon, 3, "VDD_IN", 5_000, "disabled")
    assert InaMeter.open(tmp_path) is None


# ---- the traction battery


def test_the_pack_is_integrated_by_hand() -> None:
    """250 W for 2 s, 550 W for 3 s, 400 W for 1 s: 0.5 + 1.65 + 0.4 kJ."""
    pack = PackMeter()
    pack.feed(UNPLUGGED, 10_000)
    pack.feed(replace(UNPLUGGED, pack_power_w=-550), 12_000)
    pack.feed(replace(UNPLUGGED, pack_power_w=-400), 15_000)
    assert pack.energy_uj(15_000) == 2_150_000_000
    assert pack.energy_uj(16_000) == 2_550_000_000


@pytest.mark.parametrize(
    "readings",
    [
        {"pack_power_w": None},
        {"plugged": True},
        {"plugged": True, "charging": "complete"},
        {"plugged": True, "charging": "discharging"},
        {"plugged": None},
        {"charging": "charging"},
        {"pack_power_w": 40},
        {"moving": True},
        {"ignition": "on"},
        {"ages_ms": {}},
        {"ages_ms": {"pack_power_w": 60_000}},
    ],
)
def test_a_pack_that_does_not_carry_the_load_alone_does_not_count(readings: Any) -> None:
    pack = PackMeter()
    assert pack.energy_uj(0) is None
    pack.feed(UNPLUGGED, 0)
    assert pack.energy_uj(1_000) == 250_000_000
    pack.feed(replace(UNPLUGGED, **readings), 1_000)
    assert pack.energy_uj(1_000) is None
    pack.feed(UNPLUGGED, 2_000)
    assert pack.energy_uj(2_000) == 250_000_000  # what was not seen is not counted
    assert pack.energy_uj(2_000 + HOLD_MS_MAX + 1) is None
    pack.close()
    assert pack.energy_uj(2_000) is None


@given(st.lists(st.tuples(st.integers(1, HOLD_MS_MAX), st.integers(-5_000, 0)), max_size=30))
def test_the_pack_never_counts_more_than_its_power_times_the_time(
    told: list[tuple[int, int]],
) -> None:
    pack, now_ms, last_uj = PackMeter(), 0, 0
    pack.feed(UNPLUGGED, 0)
    for step_ms, power_w in told:
        now_ms += step_ms
        pack.feed(replace(UNPLUGGED, pack_power_w=power_w), now_ms)
        counted_uj = pack.energy_uj(now_ms)
        assert counted_uj is not None
        assert last_uj <= counted_uj <= 5_000 * now_ms * 1_000
        last_uj = counted_uj


# ---- boards, and all of it


def test_boards_come_from_the_table_or_the_policy() -> None:
    generic = board_named("generic", watt_max=300, efficiency_permille=900)
    assert (generic.peak_w, generic.idle_w, generic.uncertainty_permille) == (270, 0, 300)
    assert board_named("tesla-hw3", watt_max=1, efficiency_permille=1).peak_w == 72
    assert board_named("tesla-hw4", watt_max=1, efficiency_permille=1).uncertainty_permille > 300
    with pytest.raises(LocalResource, match=r"hw9.*generic.*jetson-agx-orin"):
        board_named("hw9", watt_max=1, efficiency_permille=1)


def test_the_chain_opens_what_the_machine_has(tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    chain = open_chain(PLAIN, root=tmp_path, load=missing)
    assert chain.names == ["pack", "generic"]
    chain.close()
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    agx_orin(tmp_path)
    library = FakeNvml(5)
    chain = open_chain(PLAIN, board="tesla-hw3", root=tmp_path, load=lambda name: library)
    assert chain.names == ["pack", "nvml", "rapl", "jetson", "tesla-hw3"]
    assert chain.tick_ms == 5_000
    chain.start(0, "cpu")
    assert chain.tick_ms == 1_000
    chain.close()
    assert (library.shut, chain.names) == (1, ["tesla-hw3"])
