"""A run's energy: measured while it is in the worker's hands, ended once, added up to whole mWh."""

from __future__ import annotations

from typing import Any, cast

import trio
import trio.testing

from meshnode.executor.run import Run
from meshnode.node.metering import Metering
from meshnode.protocol.events import Meters
from meshnode.vehicle.meters import EnergyMethod, MeterChain, Terms
from meshnode.vehicle.meters.profile import Board


def bare_chain() -> MeterChain:
    """Nothing measures: a board of 300 W, and being awake takes 200."""
    return MeterChain([], Terms(1_000, 200, 300), Board("bench", 300))


def bare_run() -> Run:
    """Of no program: what it computes does not matter here."""
    return Run(cast(Any, None), cast(Any, None), 8)


def test_a_run_is_measured_from_its_start_to_its_one_end() -> None:
    async def main() -> None:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        metering = Metering(bare_chain(), "generic")
        run = bare_run()
        assert run.meters() == Meters()  # it waits for a worker, and costs nothing
        clock.jump(60.0)
        run.begin(metering, "cpu")
        clock.jump(1.0)
        run.device_ms = 500
        first = run.meters()
        # Half of the second at 300 W, and a second of being awake at 200 W.
        assert (first.energy_uj, first.method) == (350_000_000, EnergyMethod.ESTIMATED)
        assert first.battery_uj == 0 and first.uncertainty_permille == 300
        clock.jump(1.0)
        run.device_ms = 1_500
        last = run.meters(ends=True)
        assert last.energy_uj == 850_000_000
        clock.jump(5.0)
        again = run.meters(ends=True)  # the same end, told by another way
        assert again.energy_uj == last.energy_uj and again.method == last.method

    trio.run(main, clock=trio.testing.MockClock())


def test_without_a_meter_nothing_is_claimed() -> None:
    async def main() -> None:
        run = bare_run()
        run.begin(None, "cpu")
        read = run.meters(ends=True)
        assert (read.energy_uj, read.method, read.uncertainty_permille) == (0, 0, 0)

    trio.run(main)


def test_an_open_run_ends_the_long_sleep_of_the_meters() -> None:
    async def main() -> None:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        chain = bare_chain()
        metering = Metering(chain, "generic")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(metering.run)
            await trio.testing.wait_all_tasks_blocked()
            assert chain.tick_ms == 60_000
            mark = metering.start(int(trio.current_time() * 1000), "cpu")
            await trio.testing.wait_all_tasks_blocked()
            # It wakes each second now, not in a minute.
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline <= 1.0
            metering.stop(mark, int(trio.current_time() * 1000), 0)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock())
