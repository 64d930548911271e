"""Readings of the vehicle become what this car may spend: `BudgetRead` and `Recall` events.

Between `meshnode.vehicle` (readings only), `meshnode.protocol.budget` (the numbers) and the driver.
The driver's return is posted in the task that reads it, before anything is computed from it.

It fails closed: a source that falls silent is noticed by the clock, not by its next word, and an
adapter that fails is run again after a pause, while the car computes nothing.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, NoReturn

import trio

from meshnode.config import VehicleSettings
from meshnode.errors import MeshError, UsageError
from meshnode.protocol.budget import (
    VehicleState,
    driver_is_back,
    fresh_ms_left,
    limits_held,
    sound,
    spendable,
    stopped,
)
from meshnode.protocol.events import BudgetRead, Event, Recall
from meshnode.protocol.papers import (
    PURPOSE_ENERGY_BATTERY,
    Consent,
    Policy,
)
from meshnode.protocol.reasons import Reason
from meshnode.vehicle.state import (
    ENTRY_POINTS,
    PERIOD_S_MAX,
    READINGS,
    Pace,
    Source,
    Tell,
    VehicleAdapter,
    VehicleLost,
)

from .clock import Clock
from .energy_book import EnergyBook
from .mode import AUTO, Mode
from .uplink import Uplink

RECALL_GRACE_MS: Final = 100
"""A run may end its unit within it, then it is killed: the accelerator is idle in 250 ms."""
AGAIN_S_LEAST: Final = 0.5
AGAIN_S_MAX: Final = 30.0
"""Pause before an adapter that failed is run again; it doubles while no reading comes."""

_BUILT_IN: Final = {
    "sim": ("meshnode.vehicle.sim", "open_sim"),
    "sysfs": ("meshnode.vehicle.sysfs", "SysfsVehicle"),
    "vss": ("meshnode.vehicle.vss.adapter", "VssVehicle"),
    "evcc": ("meshnode.vehicle.evcc", "EvccVehicle"),
}

log = logging.getLogger("meshnode.node")


class NoVehicle:
    """Nobody has said where the readings come from, so there are none: a car whose sensors are
    invented would compute on an empty battery and in a driver's hands."""

    name = "none"
    provides = READINGS

    async def run(self, tell: Tell, pace: Pace) -> None:
        await trio.lowlevel.checkpoint()
        raise VehicleLost(
            "no vehicle adapter is chosen, so nothing is read and nothing runs: write "
            '[vehicle] adapter = "vss", "evcc", "sysfs" or, to try it out, "sim" in config.toml'
        )


def open_vehicle(
    settings: VehicleSettings, home: Path | None = None, *, simulated: bool = False
) -> VehicleAdapter:
    """The adapter that the configuration names: a built-in one, or another package's; where it
    names none, a simulated vehicle in a test network (`simulated`) and else nothing. A simulated
    vehicle's file is `sim_file`, else the home's `vehicle.toml`, if it has one.

    UsageError if there is none of the name, or its options are wrong; LocalResource if what it
    reads is not there.
    """
    source = Source(
        settings.address,
        _sim_file(settings, home),
        Path(settings.token_file).expanduser() if settings.token_file else None,
        options=_options(settings.options),
    )
    name = settings.adapter or ("sim" if simulated else "")
    if not name:
        return NoVehicle()
    if name in _BUILT_IN:
        module, maker = _BUILT_IN[name]
        adapter: VehicleAdapter = getattr(importlib.import_module(module), maker)(source)
        return adapter
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        there = ", ".join(sorted({*_BUILT_IN, *found}))
        raise UsageError(f"there is no vehicle adapter {name!r}; there are: {there}")
    try:
        foreign: VehicleAdapter = found[name].load()(source)
    except MeshError:
        raise
    except Exception as error:  # noqa: BLE001 - another package's code: its failure is the user's to read
        raise UsageError(f"the vehicle adapter {name} does not start: {error!r}") from None
    return foreign


def _sim_file(settings: VehicleSettings, home: Path | None) -> Path | None:
    if settings.sim_file:
        return Path(settings.sim_file).expanduser()
    beside = None if home is None else home / "vehicle.toml"
    return beside if beside is not None and beside.exists() else None


def local_offset_min(unix_ms: int) -> int:
    """Of this machine's time zone, which the owner's hours and departures are in."""
    time.tzset()  # reads /etc/localtime anew: a car crosses borders while its node runs
    return time.localtime(unix_ms / 1000).tm_gmtoff // 60


def _options(pairs: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"vehicle.options: {pair!r} is not NAME=VALUE")
        options[name] = value
    return options


class VehicleWatch:
    """One car's adapter, kept running; `run` is the task."""

    def __init__(
        self,
        adapter: VehicleAdapter,
        policy: Policy,
        clock: Clock,
        post: Callable[[Event], None],
        *,
        poll_s: float,
        mode: Mode = AUTO,
        book: EnergyBook | None = None,
        consent: Consent | None = None,
        uplink: Uplink | None = None,
    ) -> None:
        self.adapter = adapter
        self._held: frozenset[Reason] = frozenset()
        self._clock = clock
        self._post = post
        self._poll_s = poll_s
        self.mode = mode
        self._book = book
        self._uplink = uplink
        self._pace = Pace(poll_s)
        self._state: VehicleState | None = None
        self._told: BudgetRead | None = None
        self._was_back = False
        self._stale = trio.CancelScope()
        self._still_ms: int | None = None  # since when the car is seen to stand, monotonic
        self._recalled: Reason | None = None  # until it may run again
        self._take_papers(policy, consent)
        self.on_state: Callable[[VehicleState], None] = lambda _: None
        """Also told of every state, after the driver's return."""
        self.lost: str | None = None  # why there are no readings now

    def says(self) -> dict[str, Any]:
        """For `status`: the adapter, how old its last word is, and why there is none."""
        state = self._state
        now_ms = self._clock.now().unix_ms
        age_ms = None if state is None else max(0, now_ms - state.at_ms)
        mode = {"kind": self.mode.at(now_ms), "until_ms": self.mode.until_unix_ms}
        link = None if self._uplink is None else self._uplink.kind(self._clock.now())
        return {
            "adapter": self.adapter.name,
            "age_ms": age_ms,
            "lost": self.lost,
            "mode": mode,
            "link": link,
            "metered_bytes": 0 if self._book is None else self._book.metered_bytes,
        }

    def set_mode(self, mode: Mode) -> None:
        """The owner's word, at once."""
        self.mode = mode
        self.weigh()

    def set_papers(self, policy: Policy, consent: Consent | None) -> None:
        """Another policy in effect and consent of the owner's, at once."""
        self._take_papers(policy, consent)
        self.weigh()

    def _take_papers(self, policy: Policy, consent: Consent | None) -> None:
        self._consent = consent
        if consent is not None:
            battery = consent.purposes & PURPOSE_ENERGY_BATTERY
            if policy.plugged_rule == 1 and not battery:
                policy = replace(policy, plugged_rule=0)  # consent was given to the plug alone
        self._policy = policy

    async def run(self) -> None:
        """Task: until cancelled. Only changes are posted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mind_silence)
            await self._keep_running()

    async def _keep_running(self) -> NoReturn:
        pause_s, said = AGAIN_S_LEAST, None
        while True:
            before = self._state
            try:
                await self.adapter.run(self._tell, self._pace)
                self.lost = "the adapter ended"
            except MeshError as error:
                self.lost = str(error)
            except Exception as error:
                # Whoever wrote the adapter: without readings the car stops, the node does not.
                self.lost = f"the adapter failed: {error!r}"
                log.exception("vehicle %s", self.adapter.name)
            if self._state is not before:
                pause_s = AGAIN_S_LEAST
            if self.lost != said:
                said = self.lost
                log.warning("vehicle %s: %s", self.adapter.name, said)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, AGAIN_S_MAX)

    async def _mind_silence(self) -> NoReturn:
        """The budget ends when a reading that it needs is too old, whoever is silent; and so does
        the owner's mode when its time is over."""
        while True:
            with self._stale:
                await trio.Event().wait()  # for ever, but mypy knows of no scope that expires
            self._stale = trio.CancelScope()
            self.weigh()

    def _tell(self, state: VehicleState) -> None:
        state = sound(state)
        back = driver_is_back(state)
        if back and not self._was_back:
            self._recall(Reason.DRIVING)
        self._was_back = back
        if back:
            self._still_ms = None
        elif self._still_ms is None:
            self._still_ms = self._clock.now().mono_ms
        self.lost = None
        self._state = state
        self.weigh()
        self.on_state(state)

    def weigh(self) -> None:
        """What may be spent now, by what was read last."""
        now = self._clock.now()
        mode = self.mode.at(now.unix_ms)
        spent_mwh, upkeep, moved_bytes = 0, None, 0
        metered = 0 if self._uplink is None else self._uplink.metered(now)
        if self._book is not None:
            self._book.account(
                now, self._state, self._policy, self._told, local_offset_min, metered
            )
            spent_mwh, upkeep = self._book.spent_today_mwh(), self._book.upkeep
            moved_bytes = self._book.metered_bytes
        read = spendable(
            self._state,
            self._policy,
            now,
            spent_today_mwh=spent_mwh,
            offset_at=local_offset_min,
            previous=self._told,
            upkeep=upkeep,
            at_any_hour=mode == "always",
            still_s=0 if self._still_ms is None else (now.mono_ms - self._still_ms) // 1000,
            provides=self.adapter.provides,
            held=self._held,
            link=None if self._uplink is None else self._uplink.link(now, moved_bytes),
        )
        was_short = Reason.BUDGET in self._held
        if self._state is not None:
            self._held = limits_held(self._state, self._policy, self._held)
            if read.reason is Reason.BUDGET or (was_short and not read.may_run):
                self._held |= {Reason.BUDGET}
        lapses_ms = None if self._consent is None else self._consent.lapses_ms
        if lapses_ms is not None and now.unix_ms >= lapses_ms:
            read = stopped(Reason.NO_CONSENT)
        # A pause is shown before what else would stop the car, but for the driver's return.
        paused = mode == "never" and read.reason is not Reason.DRIVING
        budget = stopped(Reason.PAUSED) if paused else read
        if budget.may_run:
            self._recalled = None
        if budget != self._told:
            if self._told is not None and self._told.may_run and not budget.may_run:
                # Whatever ends the permission ends the work: unplugged, too hot, at the floor.
                self._recall(budget.reason)
            self._post(budget)
            self._told = budget
        # Motion is looked at while a token or a lease is out; else something stops the car anyway.
        offers = budget.may_run or budget.reason is Reason.READINGS
        self._pace.set(self._poll_s if offers else PERIOD_S_MAX)
        left_ms = [fresh_ms_left(self._state, self._policy, now, self.adapter.provides)]
        if not budget.may_run:
            left_ms = []
        if self.mode.until_unix_ms is not None and mode == self.mode.kind:
            left_ms.append(max(1, self.mode.until_unix_ms - now.unix_ms))
        if lapses_ms is not None and budget.may_run:
            left_ms.append(max(1, lapses_ms - now.unix_ms))
        self._stale.deadline = trio.current_time() + min(left_ms, default=math.inf) / 1000

    def _recall(self, reason: Reason) -> None:
        if self._recalled is not reason:
            self._recalled = reason
            self._post(Recall(reason, RECALL_GRACE_MS))
