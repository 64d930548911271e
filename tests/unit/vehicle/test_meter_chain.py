"""The energy of a run, by fake counters: never invented, never twice, never less than was told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import LocalProtocolError
from meshnode.protocol.budget import VehicleState
from meshnode.vehicle.meters import MWH_UJ, EnergyMethod, MeterChain, Terms
from meshnode.vehicle.meters.ina import TRAITS as INA
from meshnode.vehicle.meters.meter import Traits
from meshnode.vehicle.meters.nvml import TRAITS as NVML
from meshnode.vehicle.meters.pack import PackMeter
from meshnode.vehicle.meters.profile import Board
from meshnode.vehicle.meters.rapl import TRAITS as RAPL

PLAIN = Terms(efficiency_permille=1_000, awake_w=0, watt_max=300)
BOARD = Board("test", peak_w=100, idle_w=20)
SHARP = Traits("sharp", EnergyMethod.DEVICE, 10, 0, 0, 60_000, 0)
UNPLUGGED = VehicleState(
    at_ms=0,
    plugged=False,
    charging="no",
    pack_power_w=-250,
    moving=False,
    ignition="off",
    ages_ms={"pack_power_w": 0},
)


class Counter:
    """A meter whose counter the test moves. None: it cannot be read."""

    def __init__(self, traits: Traits = SHARP) -> None:
        self.traits = traits
        self.uj: int | None = 0
        self.readings = 0

    def energy_uj(self, now_ms: int) -> int | None:
        self.readings += 1
        return self.uj

    def add(self, watt: int, ms: int) -> None:
        assert self.uj is not None
        self.uj += watt * ms * 1_000

    def close(self) -> None:
        self.uj = None


# ---- the estimate


def test_where_nothing_measures_the_board_is_estimated() -> None:
    """P = awake + (peak - idle) x device_ms / wall_ms, at the terminals: 250 + 80 / 2 / 0.8 W."""
    chain = MeterChain([], Terms(800, 250, 300), BOARD)
    energy = chain.stop(chain.start(0, "cpu"), 7_200, 3_600)
    assert (energy.method, energy.uncertainty_permille) == (EnergyMethod.ESTIMATED, 300)
    assert energy.energy_uj == 250 * 7_200_000 + 100 * 3_600_000
    assert (energy.energy_mwh, energy.battery_mwh, energy.meter) == (600, 0, "test")


def test_a_device_that_says_it_worked_longer_than_the_run_did_not() -> None:
    chain = MeterChain([], PLAIN, BOARD)
    assert chain.stop(chain.start(0, "cpu"), 1_000, 9_000).energy_uj == 80 * 1_000_000
    assert chain.stop(chain.start(0, "cpu"), 1_000, -5).energy_uj == 0
    assert chain.stop(chain.start(1_000, "cpu"), 1_000, 5).energy_uj == 0


# ---- the chain


def rested(chain: MeterChain, counter: Counter, idle_w: int, until_ms: int = 10_000) -> None:
    """The chain sees the counter's idle draw from 0 to `until_ms`."""
    chain.tick(0)
    counter.add(idle_w, until_ms)
    chain.tick(until_ms)


def test_a_run_is_what_the_counter_rose_above_its_idle_draw() -> None:
    """(60 - 10) W for 20 s at the device are 55.6 W at the terminals, and 250 W of being awake."""
    counter = Counter()
    chain = MeterChain([counter], Terms(900, 250, 300), BOARD)
    rested(chain, counter, 10)
    mark = chain.start(10_000, "cpu")
    counter.add(60, 20_000)
    energy = chain.stop(mark, 30_000, 5)
    work_uj, awake_uj = 50 * 20_000_000 * 1_000 // 900, 250 * 20_000_000
    assert (energy.method, energy.meter) == (EnergyMethod.DEVICE, "sharp")
    assert energy.energy_uj == work_uj + awake_uj
    # 40 for work (10 of the meter, 30 of the converter), 300 for the policy's figure.
    mean = (40 * work_uj + 300 * awake_uj) / (work_uj + awake_uj)
    assert energy.uncertainty_permille == pytest.approx(mean, abs=1)


def test_without_a_rest_the_idle_draw_is_doubt() -> None:
    counter = Counter(replace(SHARP, idle_permille=150))
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    counter.add(60, 20_000)
    energy = chain.stop(mark, 20_000, 0)
    assert (energy.energy_uj, energy.uncertainty_permille) == (1_200_000_000, 190)


def test_rests_that_differ_are_doubt() -> None:
    """10 and 30 W of idle are 20 +- 10 W: of 80 W of work that is 125 per mille."""
    counter = Counter()
    chain = MeterChain([counter], PLAIN, BOARD)
    rested(chain, counter, 10)
    chain.stop(chain.start(10_000, "cpu"), 10_001, 1)
    chain.tick(15_000)
    counter.add(30, 10_000)
    chain.tick(25_000)
    mark = chain.start(25_000, "cpu")
    counter.add(100, 10_000)
    energy = chain.stop(mark, 35_000, 0)
    assert energy.energy_uj == 80 * 10_000_000
    assert energy.uncertainty_permille == 10 + 30 + 125


def test_a_rest_begins_when_the_machine_has_settled() -> None:
    """The 90 W right after a run are not idle draw."""
    counter = Counter()
    chain = MeterChain([counter], PLAIN, BOARD)
    chain.stop(chain.start(0, "cpu"), 1_000, 1)
    chain.tick(1_000)
    counter.add(90, 2_000)
    chain.tick(3_000)
    counter.add(10, 6_000)
    chain.tick(9_000)
    mark = chain.start(9_000, "cpu")
    counter.add(60, 10_000)
    assert chain.stop(mark, 19_000, 0).energy_uj == 50 * 10_000_000


def test_neither_a_run_nor_a_moment_between_runs_is_a_rest() -> None:
    counter = Counter(replace(SHARP, idle_permille=150))
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    chain.tick(1_000)
    counter.add(90, 9_000)
    chain.stop(mark, 10_000, 0)
    chain.tick(12_000)
    counter.add(90, 1_000)
    chain.tick(13_000)
    mark = chain.start(13_000, "cpu")
    counter.add(60, 10_000)
    energy = chain.stop(mark, 23_000, 0)
    assert (energy.energy_uj, energy.uncertainty_permille) == (600_000_000, 190)


def test_a_long_rest_forgets_what_was_long_ago() -> None:
    counter = Counter()
    chain = MeterChain([counter], PLAIN, BOARD)
    chain.tick(0)
    for minute in range(1, 6):
        counter.add(50 if minute == 1 else 10, 60_000)
        chain.tick(minute * 60_000)
    mark = chain.start(300_000, "cpu")
    counter.add(60, 10_000)
    energy = chain.stop(mark, 310_000, 0)
    assert (energy.energy_uj, energy.uncertainty_permille) == (50 * 10_000_000, 40)


def test_the_first_meter_that_is_sure_enough_wins() -> None:
    first, second = Counter(replace(SHARP, name="first", resolution_ms=1_000)), Counter()
    chain = MeterChain([first, second], PLAIN, BOARD)
    now_ms = 0
    for wall_ms, winner in ((3_000, "sharp"), (4_000, "first")):  # 40 + 1000 / 3 or 4 per mille
        mark = chain.start(now_ms, "cpu")
        first.add(50, wall_ms)
        second.add(60, wall_ms)
        now_ms += wall_ms
        assert chain.stop(mark, now_ms, 0).meter == winner
    chain = MeterChain([first], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    first.add(50, 3_000)
    assert chain.stop(mark, 3_000, 3_000).method is EnergyMethod.ESTIMATED


def test_a_meter_that_does_not_see_the_platform_states_nothing() -> None:
    """A GPU's counter would call the CPU's work nothing, and the other way round."""
    gpu, cpu = (Counter(replace(traits, idle_permille=0)) for traits in (NVML, RAPL))
    chain = MeterChain([gpu, cpu], PLAIN, BOARD)
    for turn, platform, winner in ((0, "cpu", "rapl"), (1, "cuda", "nvml"), (2, "tpu", "test")):
        mark = chain.start(turn * 20_000, platform)
        gpu.add(70, 20_000)
        cpu.add(50, 20_000)
        assert chain.stop(mark, (turn + 1) * 20_000, 20_000).meter == winner
    assert INA.sees("cuda") and INA.sees("cpu")


@pytest.mark.parametrize("broken", [None, 0])
def test_a_counter_that_fails_during_a_run_falls_to_the_estimate(broken: int | None) -> None:
    counter = Counter()
    counter.uj = 10**9
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    counter.add(60, 1_000)
    assert chain.so_far(mark, 1_000, 1_000).method is EnergyMethod.DEVICE
    counter.uj = broken
    chain.tick(2_000)
    counter.uj = 3 * 10**9  # it is back, and what it counted meanwhile is not known
    chain.tick(3_000)
    energy = chain.stop(mark, 4_000, 4_000)
    assert (energy.method, energy.meter) == (EnergyMethod.ESTIMATED, "test")
    assert (energy.energy_uj, energy.uncertainty_permille) == (80 * 4_000_000, 300)
    mark = chain.start(4_000, "cpu")
    counter.add(60, 1_000)
    assert chain.stop(mark, 5_000, 0).method is EnergyMethod.DEVICE


def test_what_was_told_stands_until_a_meter_has_caught_up() -> None:
    """An estimate of 80 W is told after 2 s, then the meter is sure and says 10 W."""
    counter = Counter(replace(SHARP, resolution_ms=1_000))
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    told = []
    for second in range(1, 21):
        counter.add(10, 1_000)
        energy = chain.so_far(mark, second * 1_000, second * 1_000)
        told.append((energy.energy_uj // 1_000_000, energy.method.name))
    assert told[0] == (80, "ESTIMATED") and told[2] == (240, "ESTIMATED")
    assert told[3] == (240, "ESTIMATED")  # the meter is chosen, the energy is still the estimate's
    assert told[19] == (240, "ESTIMATED")
    assert energy.uncertainty_permille == 300
    counter.add(60, 1_000)
    assert chain.so_far(mark, 21_000, 0).method is EnergyMethod.DEVICE


def test_a_measured_energy_that_an_estimate_keeps_is_no_longer_measured() -> None:
    counter = Counter()
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    counter.add(60, 5_000)
    assert chain.so_far(mark, 5_000, 0).uncertainty_permille == 40
    counter.uj = None
    energy = chain.stop(mark, 6_000, 0)
    assert (energy.energy_uj, energy.method) == (300_000_000, EnergyMethod.ESTIMATED)
    assert energy.uncertainty_permille == 300


def test_runs_at_a_time_share_the_counter() -> None:
    """Alone for 1 s, two for 2 s, alone for 1 s: 60 + 60 J and 60 + 60 J."""
    counter = Counter()
    chain = MeterChain([counter], PLAIN, BOARD)
    first = chain.start(0, "cpu")
    counter.add(60, 1_000)
    second = chain.start(1_000, "cpu")
    counter.add(60, 2_000)
    one = chain.stop(first, 3_000, 3_000)
    counter.add(60, 1_000)
    other = chain.stop(second, 4_000, 3_000)
    assert one.energy_uj == other.energy_uj == 120_000_000
    # Two thirds of the time shared: two thirds of 300 more.
    assert one.uncertainty_permille == 40 + 200


def test_runs_at_a_time_share_the_estimate_and_the_awake_draw() -> None:
    chain = MeterChain([], Terms(1_000, 30, 300), BOARD)
    first, second = chain.start(0, "cpu"), chain.start(0, "cpu")
    energies = [chain.stop(first, 10_000, 10_000), chain.stop(second, 10_000, 10_000)]
    assert sum(energy.energy_uj for energy in energies) == (80 + 30) * 10_000_000
    assert energies[0].uncertainty_permille > 300


def test_a_run_is_stopped_once() -> None:
    chain = MeterChain([], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    chain.stop(mark, 1, 0)
    with pytest.raises(LocalProtocolError):
        chain.stop(mark, 2, 0)
    with pytest.raises(LocalProtocolError):
        chain.so_far(mark, 2, 0)


def test_short_calls_do_not_read_the_meters_each_time() -> None:
    counter = Counter(INA)
    chain = MeterChain([counter], PLAIN, BOARD)
    for now_ms in range(0, 900, 3):
        chain.stop(chain.start(now_ms, "cpu"), now_ms + 3, 3)
    assert counter.readings == 1


def test_the_end_of_a_long_run_is_read_whatever_was_read_before() -> None:
    counter = Counter(replace(SHARP, again_ms=1_000))
    chain = MeterChain([counter], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    counter.add(60, 4_500)
    chain.tick(4_500)
    counter.add(60, 500)
    assert chain.stop(mark, 5_000, 0).energy_uj == 300_000_000


# ---- the chain with a car


def drive(chain: MeterChain, from_ms: int, to_ms: int, power_w: int) -> None:
    """Told once a second until `to_ms`, not at it."""
    for now_ms in range(from_ms, to_ms, 1_000):
        chain.feed(replace(UNPLUGGED, pack_power_w=power_w), now_ms)


def test_an_unplugged_car_meters_a_run_above_the_draw_before_it() -> None:
    """250 W awake, 550 W with the run for 60 s: 300 W of work, and the awake draw that was seen."""
    chain = MeterChain([PackMeter()], Terms(900, 999, 300), BOARD)
    drive(chain, 0, 10_000, -250)
    mark = chain.start(10_000, "cpu")
    drive(chain, 10_000, 70_000, -550)
    energy = chain.stop(mark, 70_000, 0)
    assert energy.method is EnergyMethod.VEHICLE
    assert energy.energy_uj == pytest.approx(550 * 60_000_000, rel=0.001)
    assert energy.battery_uj == energy.energy_uj
    assert energy.uncertainty_permille == 40 + 34  # and 2 s of 60


def test_a_run_of_a_few_readings_is_not_metered_by_the_car() -> None:
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    drive(chain, 0, 10_000, -250)
    mark = chain.start(10_000, "cpu")
    drive(chain, 10_000, 16_000, -550)
    energy = chain.stop(mark, 16_000, 0)
    assert energy.method is EnergyMethod.ESTIMATED


def test_a_car_whose_draw_before_is_not_known_meters_nothing() -> None:
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    mark = chain.start(0, "cpu")
    drive(chain, 0, 60_000, -550)
    assert chain.stop(mark, 60_000, 0).method is EnergyMethod.ESTIMATED


def test_a_car_that_does_something_else_is_not_believed() -> None:
    """A heater of 3 kW goes on during the run: 300 W are the most that work may take."""
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    drive(chain, 0, 10_000, -250)
    mark = chain.start(10_000, "cpu")
    drive(chain, 10_000, 70_000, -3_250)
    assert chain.stop(mark, 70_000, 0).method is EnergyMethod.ESTIMATED


def test_a_car_that_is_plugged_in_for_a_moment_has_not_seen_the_run() -> None:
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    drive(chain, 0, 10_000, -250)
    mark = chain.start(10_000, "cpu")
    drive(chain, 10_000, 40_000, -550)
    chain.feed(replace(UNPLUGGED, plugged=True, charging="charging"), 40_000)
    drive(chain, 50_000, 70_000, -550)
    energy = chain.stop(mark, 70_000, 60_000)
    assert energy.method is EnergyMethod.ESTIMATED
    # 50 of the 60 seconds out of the battery.
    assert energy.battery_uj == energy.energy_uj * 50 // 60


@pytest.mark.parametrize(
    ("plugged", "charging", "all_of_it"),
    [
        (True, "charging", False),
        (True, "complete", False),
        (True, "no", True),
        (True, None, False),
        (None, None, False),
        (False, None, True),
    ],
)
def test_what_comes_out_of_the_battery(plugged: Any, charging: Any, all_of_it: bool) -> None:
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    chain.feed(replace(UNPLUGGED, plugged=plugged, charging=charging), 0)
    energy = chain.stop(chain.start(0, "cpu"), 1_000, 1_000)
    assert energy.battery_uj == (energy.energy_uj if all_of_it else 0)


def test_what_came_out_of_the_battery_stays_so_when_the_car_is_plugged_in() -> None:
    chain = MeterChain([PackMeter()], PLAIN, BOARD)
    chain.feed(UNPLUGGED, 0)
    mark = chain.start(0, "cpu")
    assert chain.so_far(mark, 1_000, 1_000).battery_uj == 80_000_000
    chain.feed(replace(UNPLUGGED, plugged=True, charging="charging"), 1_000)
    energy = chain.stop(mark, 9_000, 1_000)
    assert energy.energy_uj == energy.battery_uj == 80_000_000


# ---- properties of the chain

steps = st.lists(
    st.tuples(
        st.integers(0, 5_000),  # ms
        st.one_of(st.none(), st.integers(-(10**9), 10**10)),  # what the counter does
        st.integers(0, 5_000),  # device ms
        st.integers(-900, 100),  # W of the pack
        st.booleans(),  # plugged
    ),
    min_size=1,
    max_size=30,
)


@given(steps, st.integers(0, 1_000), st.integers(0, 500))
def test_an_energy_is_never_negative_and_never_shrinks(
    told: list[tuple[int, int | None, int, int, bool]], efficiency: int, awake_w: int
) -> None:
    counter = Counter()
    chain = MeterChain([PackMeter(), counter], Terms(efficiency, awake_w, 300), BOARD)
    chain.tick(0)
    mark, now_ms, device_ms, last_uj, last_battery_uj = chain.start(0, "cpu"), 0, 0, 0, 0
    for step_ms, step_uj, busy_ms, power_w, plugged in told:
        now_ms += step_ms
        device_ms += busy_ms
        counter.uj = None if step_uj is None else (counter.uj or 0) + step_uj
        chain.feed(replace(UNPLUGGED, plugged=plugged, pack_power_w=power_w), now_ms)
        energy = chain.so_far(mark, now_ms, device_ms)
        assert 0 <= last_uj <= energy.energy_uj
        assert last_battery_uj <= energy.battery_uj <= energy.energy_uj
        assert 0 <= energy.uncertainty_permille <= 1_000
        last_uj, last_battery_uj = energy.energy_uj, energy.battery_uj


@given(
    st.lists(st.tuples(st.integers(1_000, 60_000), st.integers(21, 300)), min_size=1, max_size=10),
    st.integers(500, 1_000),
    st.integers(0, 300),
)
def test_slices_add_up_to_the_run(
    slices: list[tuple[int, int]], efficiency: int, awake_w: int
) -> None:
    """One run that is asked after each slice, and runs that follow each other without a rest."""
    counters = Counter(), Counter()
    terms = Terms(efficiency, awake_w, 300)
    whole, parted = (MeterChain([counter], terms, BOARD) for counter in counters)
    for chain, counter in ((whole, counters[0]), (parted, counters[1])):
        rested(chain, counter, 20)
    mark, now_ms, parts_uj, told_mwh, before_mwh = whole.start(10_000, "cpu"), 10_000, 0, 0, 0
    energy = None
    for wall_ms, watt in slices:
        part = parted.start(now_ms, "cpu")
        now_ms += wall_ms
        for counter in counters:
            counter.add(watt, wall_ms)
        parts_uj += parted.stop(part, now_ms, wall_ms).energy_uj
        energy = whole.so_far(mark, now_ms, wall_ms)
        told_mwh += energy.energy_mwh - before_mwh
        before_mwh = energy.energy_mwh
    assert energy is not None
    assert told_mwh == energy.energy_uj // MWH_UJ
    assert abs(parts_uj - energy.energy_uj) < MWH_UJ


@given(
    st.lists(
        st.tuples(st.integers(0, 3_000), st.integers(0, 300), st.booleans()),
        min_size=1,
        max_size=25,
    )
)
def test_runs_at_a_time_share_all_of_the_counter_and_no_more(
    told: list[tuple[int, int, bool]],
) -> None:
    counter, now_ms, counted_uj, energies_uj = Counter(), 0, 0, 0
    chain = MeterChain([counter], PLAIN, replace(BOARD, uncertainty_permille=1_000))
    open_marks = [chain.start(0, "cpu")]
    every = list(open_marks)
    for step_ms, watt, begins in told:
        now_ms += step_ms
        counter.add(watt, step_ms)
        counted_uj += watt * step_ms * 1_000 if open_marks else 0
        if begins:
            open_marks.append(chain.start(now_ms, "cpu"))
            every.append(open_marks[-1])
        elif open_marks:
            chain.stop(open_marks.pop(0), now_ms, 0)
        else:
            chain.tick(now_ms)
    for mark in open_marks:
        chain.stop(mark, now_ms, 0)
    for mark in every:
        assert mark.counted_uj[0] is not None
        energies_uj += mark.counted_uj[0]
    assert energies_uj == counted_uj
