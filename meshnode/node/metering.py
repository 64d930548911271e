"""The node's energy meters, kept up to date: one chain for the executor's runs and `status`.

Between `meshnode.vehicle.meters`, which knows how to measure and has no clock, and the executor,
which asks at each run's ends. While no run is open it wakes once a minute (for RAPL twice).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import trio

from meshnode.executor.metering import MeteredEnergy
from meshnode.protocol.budget import VehicleState
from meshnode.protocol.papers import Policy
from meshnode.vehicle.meters import MeterChain, Terms, open_chain
from meshnode.vehicle.meters.profile import board_named


def _now_ms() -> int:
    return int(trio.current_time() * 1000)


class Metering:
    """An `EnergyMeter` of the executor, fed with the vehicle's states."""

    def __init__(self, chain: MeterChain, board: str) -> None:
        self._chain = chain
        self._board = board
        self._opened = trio.Event()

    @property
    def names(self) -> list[str]:
        """The meters that there are, the best first."""
        return self._chain.names

    def start(self, now_ms: int, platform: str) -> Any:
        before_ms = self._chain.tick_ms
        mark = self._chain.start(now_ms, platform)
        if self._chain.tick_ms < before_ms:  # the first of the runs that are open now
            self._opened.set()
        return mark

    def so_far(self, mark: Any, now_ms: int, device_ms: int) -> MeteredEnergy:
        return self._chain.so_far(mark, now_ms, device_ms)

    def stop(self, mark: Any, now_ms: int, device_ms: int) -> MeteredEnergy:
        return self._chain.stop(mark, now_ms, device_ms)

    def feed(self, state: VehicleState) -> None:
        """What the vehicle says now: its battery's power is the first of the meters."""
        self._chain.feed(state, _now_ms())

    def set_policy(self, policy: Policy) -> None:
        """Another policy: what the board and being awake are taken to draw."""
        terms = terms_of(policy)
        self._chain.terms = terms
        self._chain.board = board_named(
            self._board, watt_max=terms.watt_max, efficiency_permille=terms.efficiency_permille
        )

    async def run(self) -> NoReturn:
        """Task: read the meters, every second while a run is open."""
        while True:
            self._chain.tick(_now_ms())
            self._opened = trio.Event()
            with trio.move_on_after(self._chain.tick_ms / 1000):
                await self._opened.wait()


def terms_of(policy: Policy) -> Terms:
    return Terms(policy.efficiency_permille, policy.awake_w, policy.watt_max)


@asynccontextmanager
async def open_metering(policy: Policy, board: str) -> AsyncIterator[Metering]:
    """All meters of this machine. LocalResource for a board that no profile has."""
    # In a thread: NVIDIA's driver may take a second to answer.
    chain = await trio.to_thread.run_sync(lambda: open_chain(terms_of(policy), board=board))
    try:
        yield Metering(chain, board)
    finally:
        chain.close()
