"""A policy tried on a week of a car: when it would work, when not and why, for what money. Pure.

    vehicle.car.TracedCar + Policy -> protocol.budget.spendable, minute by minute -> Trial

It asks the function that a running car asks, with readings that are always fresh. Work comes in
pieces of PIECE_MIN minutes; a piece begins only if the budget's lease is as long. While the car may
work and has nothing to do it is awake, which costs `awake_w` (`standby`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..protocol.budget import (
    CHARGER_PERMILLE,
    VehicleState,
    floor_nano_per_s,
    spendable,
    tariff_nano_per_kwh,
)
from ..protocol.events import BudgetRead
from ..protocol.papers import Policy
from ..protocol.reasons import Reason
from ..protocol.types import Now
from ..protocol.upkeep import Upkeep
from ..vehicle.car import TracedCar
from ..vehicle.trace import WEEK_MIN, Trace

PIECE_MIN: Final = 15
MONDAY_UNIX_MS: Final = 1_767_571_200_000  # 5 January 2026, 00:00 UTC: the trace's clock is UTC


@dataclass(slots=True)
class Stretch:
    """Minutes in which the same held: a reason against work, or none."""

    from_min: int
    until_min: int
    reason: Reason
    working: bool


@dataclass(slots=True)
class Trial:
    """What came of it; energies in mWh at the battery's terminals, money in 1e-9."""

    stretches: list[Stretch] = field(default_factory=list)
    charge_permille: list[int] = field(default_factory=list)  # one a minute
    work_min: int = 0
    standby_min: int = 0
    work_mwh: int = 0
    standby_mwh: int = 0
    from_battery_mwh: int = 0
    grid_mwh: int = 0  # bought for work and standby, charger's loss included
    energy_nano: int = 0
    wear_nano: int = 0
    income_nano: int = 0  # at this car's own floor price, for work alone
    below_floor_min: int = 0  # in which work or standby drew below the owner's floor
    short_wh: int = 0  # that drives did not find in the battery
    short_without_wh: int = 0  # the same week without any work

    def minutes_of(self) -> dict[Reason, int]:
        """Minutes by what held, the longest first; OK is when it worked or waited for work."""
        sums: dict[Reason, int] = {}
        for one in self.stretches:
            sums[one.reason] = sums.get(one.reason, 0) + one.until_min - one.from_min
        return dict(sorted(sums.items(), key=lambda row: -row[1]))


def try_policy(policy: Policy, trace: Trace, *, busy_pct: int = 50, weeks: int = 1) -> Trial:
    """`busy_pct`: in how many of a hundred pieces there is work for this car. The car's own
    departures stay unknown to it unless the policy names them, as in life."""
    car, trial, upkeep = TracedCar(trace), Trial(), Upkeep()
    read: BudgetRead | None = None
    day, spent_mwh, piece_until = -1, 0, 0
    for minute in range(weeks * WEEK_MIN):
        if minute // 1440 != day:
            day, spent_mwh = minute // 1440, 0
        now = Now(minute * 60_000, MONDAY_UNIX_MS + minute * 60_000)
        state = car.state(now.unix_ms)
        read = spendable(
            state, policy, now, spent_today_mwh=spent_mwh, previous=read, upkeep=upkeep
        )
        if not read.may_run:
            piece_until = 0
        elif minute >= piece_until and minute % PIECE_MIN == 0:
            fits = read.lease_s_max >= PIECE_MIN * 60
            piece_until = minute + PIECE_MIN if fits and _is_work(minute, busy_pct) else 0
        working = minute < piece_until
        load_w = read.load_w if working else policy.awake_w if read.may_run else 0
        before = (car.pack.load_from_pack_mwh, car.pack.load_from_plug_mwh)
        car.advance(60, load_w)
        from_pack = car.pack.load_from_pack_mwh - before[0]
        from_plug = car.pack.load_from_plug_mwh - before[1]
        spent_mwh += from_pack + from_plug
        cost_nano = _book(trial, policy, state, read, (from_pack, from_plug), working)
        if working:
            bare = floor_nano_per_s(state, policy, now)
            upkeep.worked(60_000, read.floor_nano_per_s - bare)
        else:
            upkeep.waited(cost_nano)
        _note(trial, minute, read.reason, working)
        trial.charge_permille.append(car.pack.soc_permille)
        if load_w and car.pack.soc_permille < policy.soc_floor_permille:
            trial.below_floor_min += 1
    trial.short_wh = car.short_wh
    idle = TracedCar(trace)
    idle.advance(weeks * WEEK_MIN * 60)
    trial.short_without_wh = idle.short_wh
    return trial


def _is_work(minute: int, busy_pct: int) -> bool:
    """Spread evenly: of any hundred pieces so many are work."""
    piece = minute // PIECE_MIN
    return (piece + 1) * busy_pct // 100 > piece * busy_pct // 100


def _book(
    trial: Trial,
    policy: Policy,
    state: VehicleState,
    read: BudgetRead,
    drawn_mwh: tuple[int, int],
    working: bool,
) -> int:
    """What the minute cost."""
    from_pack, from_plug = drawn_mwh
    if not from_pack + from_plug:
        return 0
    if working:
        trial.work_min += 1
        trial.work_mwh += from_pack + from_plug
        trial.income_nano += read.floor_nano_per_s * 60
    else:
        trial.standby_min += 1
        trial.standby_mwh += from_pack + from_plug
    grid_mwh = -(-(from_pack + from_plug) * 1_000 // CHARGER_PERMILLE)
    rate = tariff_nano_per_kwh(state, policy, Now(0, state.at_ms))
    trial.from_battery_mwh += from_pack
    trial.grid_mwh += grid_mwh
    energy_nano = grid_mwh * rate // 1_000_000
    wear_nano = from_pack * policy.wear_nano_per_kwh // 1_000_000
    trial.energy_nano += energy_nano
    trial.wear_nano += wear_nano
    return energy_nano + wear_nano


def _note(trial: Trial, minute: int, reason: Reason, working: bool) -> None:
    last = trial.stretches[-1] if trial.stretches else None
    if last is not None and (last.reason, last.working) == (reason, working):
        last.until_min = minute + 1
    else:
        trial.stretches.append(Stretch(minute, minute + 1, reason, working))
