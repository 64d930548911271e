"""A week of cars with batteries: the real machines place work, packs give energy, drivers return.

    parking.draw -> Trace -> vehicle.car.TracedCar --readings--> protocol.budget.spendable
      -> BudgetRead, Recall -> the machines of `World` -> runs -> load on the pack -> receipts

Every car looks at itself once a minute and at the moment its driver leaves or comes back, as
`node.vehicle_watch` does, and stays in reach while it drives: what is asked here is what happens to
batteries and money, not to connections. Runs are of one unit of 5 to 15 minutes. A run's meters are
the pack's own, so what receipts add up to can be held against what the packs gave.
"""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from meshnode.node.founding import PolicyTerms, draft_policy
from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import sealed
from meshnode.protocol.budget import (
    CHARGER_PERMILLE,
    floor_nano_per_s,
    spendable,
    tariff_nano_per_kwh,
)
from meshnode.protocol.objects import T_RECEIPT, Receipt
from meshnode.protocol.papers import Band, Policy, Submitters
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, Now
from meshnode.protocol.upkeep import Upkeep
from meshnode.vehicle.battery import PackSpec
from meshnode.vehicle.car import TracedCar
from meshnode.vehicle.trace import WEEK_MIN, Stay, Trace

from . import parking
from .counting import counted
from .faults import GRACE_MS
from .measured import Setup
from .site import DAY_MS, EPOCH_MS, NETWORK, PROVIDE, Site, account_keys, mandate_of, papers_of
from .standing import Standing
from .virtual import output_of
from .workload import Ground, Task, lay_out
from .world import READY_S, World, _without_collector

LOOK_S: Final = 60
AVAILABLE_S: Final = 300
TASK_S: Final = (300, 900)
PLUGGED: Final = 0.4  # of the stays: so that driving alone empties few packs
CHARGER_W: Final = {"home": 11_000, "work": 11_000, "public": 22_000}
WH_PER_DRIVE_MIN: Final = 125  # 45 km/h at 170 Wh a km
RENEW_DAYS: Final = 5
DEADLINE_MS: Final = 6 * 3_600_000
CALM: Final[dict[str, int]] = {
    "heartbeat_ms": 60_000,
    "lease_ms": 300_000,
    "advert_period_ms": 600_000,
    "advert_ttl_ms": 1_800_000,
    "token_ttl_ms": 120_000,
    "receipt_interval_ms": 60_000,
    "announce_backoff_ms": 5_000,
    "announce_backoff_ms_max": 60_000,
}
"""Limits of runs that last minutes: a week of 300 cars has a tenth of the events that it would have
with those of 2 s runs."""
METHOD, UNCERTAINTY_PERMILLE = 3, 40  # the pack's own power
_UJ_PER_MWH: Final = 3_600_000
TERMS: Final = PolicyTerms(
    soc_floor_permille=300,
    reserve_wh=8_000,
    day_wh=10_000,
    watt_max=300,
    plugged_rule=1,
    temp_dc=(-200, 500),
    tariff=(Band(1_320, 359, 200_000_000), Band(360, 1_319, 320_000_000)),
    submitters=Submitters.NETWORK,
    sandbox_least=0,  # workers of the simulator have no sandbox
)


@dataclass(slots=True)
class WeekOfCars:
    """What came of it; money in 1e-9, energies in mWh at the terminals."""

    cars: int
    load: float
    days: float
    tasks: int = 0
    done: int = 0
    recalls: int = 0
    below_floor_min: int = 0
    reserve_missed: int = 0  # departures before which work drew into the reserve
    short_wh: int = 0  # that drives lacked because of the work
    work_mwh: int = 0  # that packs and plugs gave to runs
    standby_mwh: int = 0
    receipts_mwh: int = 0
    unpaid_mwh: int = 0  # of runs that a recall ended
    cost_nano: int = 0
    income_nano: int = 0
    unpaid_nano: int = 0  # what those cost
    due_nano: int = 0  # what waiting and ended runs have cost and the next work pays for
    income_permille_least: int = 0  # of any car, of its cost but for what is due or in hand
    shares: dict[str, float] = field(default_factory=dict)  # of the cars' time, by reason
    events: int = 0
    digest: str = ""
    cpu_s: float = 0.0

    def fields(self) -> dict[str, Any]:
        useful = max(1, self.work_mwh)
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "standby_per_useful": round(self.standby_mwh / useful, 3),
            "cpu_s": round(self.cpu_s, 1),
        }


class Vehicle:
    """One car's battery and owner, beside its machine."""

    def __init__(self, site: Site, trace: Trace, policy: Policy, names_departures: bool) -> None:
        self.site = site
        self.policy = policy
        self.car = TracedCar(trace)
        self.idle = TracedCar(trace)  # the same car without the mesh
        self.names_departures = names_departures
        self.told: ev.BudgetRead | None = None
        self.upkeep = Upkeep()
        self.runs: dict[int, tuple[int, int, int, int, int]] = {}
        """exec -> pack, plug, s, price, and of it for upkeep"""
        self.work_mwh = self.standby_mwh = self.unpaid_mwh = self.cost_nano = self.income_nano = 0
        self.unpaid_nano = 0  # what runs cost that the driver ended
        self._run_cost_nano = 0
        self.below_floor_min = self.recalls = self.reserve_missed = 0
        self.minutes: dict[str, int] = {}
        self.asleep = False
        self._day = -1
        self._spent_mwh = 0
        self._reserve_ok = True

    def now(self) -> Now:
        return Now(self.car.at_s * 1_000, EPOCH_MS + self.car.at_s * 1_000)

    def advance(self, to_s: int) -> None:
        """Time goes by under the load of now."""
        seconds = to_s - self.car.at_s
        if seconds <= 0:
            return
        told = self.told
        waits = told is not None and told.may_run and not self.runs and not self.asleep
        load_w = 0
        if self.runs:
            load_w = self.policy.watt_max + self.policy.awake_w
        elif waits:
            load_w = self.policy.awake_w
        before = self._drawn()
        now, state = self.now(), self.car.state(self.now().unix_ms)
        self.car.advance(seconds, load_w)
        self.idle.advance(seconds)
        pack, plug = (after - earlier for after, earlier in zip(self._drawn(), before, strict=True))
        self._spent_mwh += pack + plug
        rate = tariff_nano_per_kwh(state, self.policy, now)
        cost = (pack + plug) * 1_000 // CHARGER_PERMILLE * rate // 1_000_000
        cost += pack * self.policy.wear_nano_per_kwh // 1_000_000
        self.cost_nano += cost
        if self.runs:
            self.work_mwh += pack + plug
            self._run_cost_nano += cost
        elif waits:
            self.standby_mwh += pack + plug
            self.upkeep.waited(cost)
        if load_w and self.car.pack.soc_permille < self.policy.soc_floor_permille:
            self.below_floor_min += 1
        if pack:
            self._mind_reserve()

    def _drawn(self) -> tuple[int, int]:
        return self.car.pack.load_from_pack_mwh, self.car.pack.load_from_plug_mwh

    def _mind_reserve(self) -> None:
        """Work out of the battery left less than floor and reserve; once for each stay."""
        policy = self.policy
        kept = self.car.pack.capacity_mwh * policy.soc_floor_permille // 1_000
        kept += policy.reserve_wh * 1_000
        # A look is a minute apart: what waiting draws in one is within.
        missed = self.car.pack.stored_mwh < kept - policy.awake_w * LOOK_S * 1_000 // 3_600
        if missed and self._reserve_ok:
            self.reserve_missed += 1
        self._reserve_ok = not missed

    def look(self) -> list[ev.Event]:
        """As `node.vehicle_watch` does: what the machine is told."""
        now = self.now()
        day = self.car.at_s // 86_400
        if day != self._day:
            self._day, self._spent_mwh = day, 0
        state = self.car.state(now.unix_ms)
        if self.names_departures and not self.car.driving:
            ahead_s, _ = self.car.next_drive()
            state = replace(state, departure_ms=now.unix_ms + ahead_s * 1_000)
        read = spendable(
            state,
            self.policy,
            now,
            spent_today_mwh=-(-self._spent_mwh // 1_000) * 1_000,
            previous=self.told,
            upkeep=self.upkeep,
        )
        told, self.told = self.told, read
        if read == told:
            return []
        if told is not None and told.may_run and not read.may_run:
            self.recalls += bool(self.runs)
            return [ev.Recall(read.reason, GRACE_MS), read]
        return [read]

    def begin(self, exec_id: int) -> None:
        price = 0 if self.told is None else self.told.floor_nano_per_s
        bare = floor_nano_per_s(self.car.state(self.now().unix_ms), self.policy, self.now())
        self.runs[exec_id] = (*self._drawn(), self.car.at_s, price, max(0, price - bare))
        self._run_cost_nano = 0

    def in_hand_nano(self) -> int:
        """What the run has cost that has not ended."""
        return self._run_cost_nano if self.runs else 0

    def end(self, exec_id: int, done: bool) -> ev.Meters:
        """The run's meters, from the pack's own counters."""
        pack, plug, since_s, price, for_upkeep = self.runs.pop(exec_id)
        now_pack, now_plug = self._drawn()
        pack, plug = now_pack - pack, now_plug - plug
        took_s = self.car.at_s - since_s
        if done:
            self.income_nano += price * took_s
            self.upkeep.worked(took_s * 1_000, for_upkeep)
        else:
            self.unpaid_mwh += pack + plug
            self.unpaid_nano += self._run_cost_nano
            self.upkeep.waited(self._run_cost_nano)
        return ev.Meters(
            took_s * 1_000,
            took_s * 1_000,
            energy_uj=(pack + plug) * _UJ_PER_MWH,
            method=METHOD,
            uncertainty_permille=UNCERTAINTY_PERMILLE,
            battery_uj=pack * _UJ_PER_MWH,
        )


class WeekWorld(World):
    """`World` whose cars have batteries and drivers."""

    def __init__(
        self, setup: Setup, ground: Ground, tasks: list[Task], traces: list[Trace]
    ) -> None:
        super().__init__(setup, ground, tasks)
        self.limits = replace(self.limits, job_deadline_ms=DEADLINE_MS, **CALM)
        account = Account(account_keys(0, self.keys_of).account)
        self.policy = draft_policy(account, NETWORK, TERMS)
        self.standing = Standing(NETWORK, account, EPOCH_MS + 30 * DAY_MS)
        self.vehicles: dict[str, Vehicle] = {}
        self._traces = traces
        self.receipts_mwh = 0
        self.done = 0

    def papers(self) -> Any:
        return papers_of(account_keys(0, self.keys_of), policy=self.policy)

    def build(self) -> None:
        super().build()
        cars = [number for numbers in self.ground.cars.values() for number in numbers]
        for index, number in enumerate(cars):
            site = self.by_number[number]
            trace = self._traces[index]
            vehicle = Vehicle(site, trace, self.policy, names_departures=bool(index % 2))
            self.vehicles[site.name] = vehicle
            first_us = int(READY_S * 1e6) + index * LOOK_S * 1_000_000 // len(cars)
            self.at_us(first_us, lambda vehicle=vehicle: self._look(vehicle))  # type: ignore[misc]
            for stay in trace.stays:
                for minute in (stay.until_min, stay.until_min + stay.drive_min):
                    if stay.drive_min:
                        turn = int(minute * 60e6)  # what the drive takes comes after it
                        self.at_us(turn, lambda vehicle=vehicle: self._turn(vehicle))  # type: ignore[misc]
        for site in self.by_number.values():
            self.at_us(RENEW_DAYS * 86_400_000_000, lambda site=site: self._renew(site))  # type: ignore[misc]

    def boot(self, name: str) -> None:
        super().boot(name)
        if name in self.vehicles:
            self._turn(self.vehicles[name])

    def _renew(self, site: Site) -> None:
        account = account_keys(0, self.keys_of)
        begins_ms = EPOCH_MS + (RENEW_DAYS - 1) * DAY_MS
        wire = mandate_of(site.identity.peer, account, site.identity.roles, NETWORK, begins_ms)
        self.feed(site, ev.MandateRenewed(wire))

    def stirred(self, site: Site) -> None:
        super().stirred(site)
        if site.name in self.vehicles:
            self._goes_on(self.vehicles[site.name])
            self.vehicles[site.name].asleep = site.asleep
            self._tell(self.vehicles[site.name])  # before it offers anything

    def _goes_on(self, vehicle: Vehicle) -> None:
        vehicle.advance(self.now_us // 1_000_000)

    def _turn(self, vehicle: Vehicle) -> None:
        """A driver leaves or comes back: told at once."""
        self._goes_on(vehicle)
        self._tell(vehicle)

    def _look(self, vehicle: Vehicle) -> None:
        self._turn(vehicle)
        told = vehicle.told
        name = "none" if told is None else told.reason.name.lower()
        if told is not None and told.may_run:
            name = "works" if vehicle.runs else "asleep" if vehicle.asleep else "waits"
        vehicle.minutes[name] = vehicle.minutes.get(name, 0) + 1
        self.at_us(LOOK_S * 1_000_000, lambda: self._look(vehicle))

    def _tell(self, vehicle: Vehicle) -> None:
        if vehicle.site.asleep:
            return  # its node sees nothing; what has changed meanwhile it sees when it wakes
        for event in vehicle.look():
            self.feed(vehicle.site, event)

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        number = self._by_job[effect.spec.job_digest[:16]]
        run = self.runs[number]
        run.starts[effect.run.attempt] = self.now_us
        self.payments.ran.add((effect.spec.job_digest[:16], site.identity.peer))
        vehicle, exec_id, first = self.vehicles[site.name], effect.exec_id, effect.run.first
        self._goes_on(vehicle)
        vehicle.begin(exec_id)

        def ends() -> None:
            if site.life == life and exec_id not in site.stopped:
                self._goes_on(vehicle)
                meters = vehicle.end(exec_id, done=True)
                self.feed(site, ev.UnitsDone(exec_id, first, (output_of(first),), meters))
                self.feed(site, ev.ExecEnded(exec_id, Reason.DONE, meters))

        self.at_us(self.unit_us(effect), ends)

    def _stop(self, site: Site, effect: fx.StopExec, life: int) -> None:
        vehicle = self.vehicles[site.name]
        site.stopped.add(effect.exec_id)
        if effect.exec_id not in vehicle.runs:
            return
        self._goes_on(vehicle)
        ended = ev.ExecEnded(effect.exec_id, effect.reason, vehicle.end(effect.exec_id, done=False))
        self.at(1, lambda: self.feed_life(site, life, ended))

    def stored(self, site: Site, record: fx.Record) -> None:
        super().stored(site, record)
        if (
            isinstance(record, fx.SignedObject)
            and record.typ == T_RECEIPT
            and not site.identity.roles & PROVIDE
        ):
            receipt = sealed.unseal(record.sealed).open(Receipt, T_RECEIPT)
            self.receipts_mwh += receipt.meters.energy_mwh


def trace_of(number: int, stays: parking.Stays) -> Trace:
    """A car's drawn week as a trace: whole minutes, and the drives between the stays."""
    mine = sorted(
        (stays.arrive_s[at], stays.leave_s[at], parking.KINDS[stays.kind[at]], stays.plugged[at])
        for at in np.flatnonzero(stays.car == number)
    )
    rows: list[Stay] = []
    at_min = 0
    for index, (_, leave_s, kind, plugged) in enumerate(mine):
        until_min = min(WEEK_MIN, max(at_min, round(leave_s / 60)))
        last = index + 1 == len(mine) or until_min >= WEEK_MIN
        back_min = WEEK_MIN
        if not last:
            back_min = min(WEEK_MIN, max(until_min + 1, round(mine[index + 1][0] / 60)))
        drive_min = 0 if last else back_min - until_min
        until_min = WEEK_MIN if last else until_min
        charger_w = CHARGER_W[kind] if plugged else 0
        wh = WH_PER_DRIVE_MIN * drive_min
        rows.append(Stay(kind, at_min, until_min, charger_w, wh, drive_min))
        at_min = back_min
        if at_min >= WEEK_MIN:
            break
    soc = random.Random(f"{number} charge").randrange(450, 800)
    return Trace(f"car-{number}", PackSpec(), soc, (60, 140), tuple(rows))


def tasks_of_week(ground: Ground, until_s: float, running: float, seed: int) -> list[Task]:
    """Arrivals by a Poisson process, so many running on average if all found a car."""
    rng = random.Random(f"{seed} week")
    submitters = [number for some in ground.submitters.values() for number in some]
    rate = running / (sum(TASK_S) / 2)
    tasks: list[Task] = []
    at_s = READY_S + LOOK_S + rng.expovariate(rate)
    while at_s < until_s:
        unit_us = rng.randrange(TASK_S[0], TASK_S[1] + 1) * 1_000_000
        tasks.append(Task(len(tasks), int(at_s * 1e6), rng.choice(submitters), unit_us))
        at_s += rng.expovariate(rate)
    return tasks


def available(traces: list[Trace], policy: Policy, until_s: int) -> float:
    """How many cars can work at a time on average, were each to work whenever it may: what their
    batteries, limits and drivers let them do. By a look in five minutes."""
    looks = may = 0
    for trace in traces:
        car, told, day, spent_mwh = TracedCar(trace), None, -1, 0
        for at_s in range(0, until_s, AVAILABLE_S):
            if at_s // 86_400 != day:
                day, spent_mwh = at_s // 86_400, 0
            now = Now(at_s * 1_000, EPOCH_MS + at_s * 1_000)
            state = car.state(now.unix_ms)
            before_mwh = car.pack.load_from_pack_mwh + car.pack.load_from_plug_mwh
            told = spendable(state, policy, now, spent_today_mwh=spent_mwh, previous=told)
            looks, may = looks + 1, may + told.may_run
            car.advance(AVAILABLE_S, told.load_w if told.may_run else 0)
            spent_mwh += car.pack.load_from_pack_mwh + car.pack.load_from_plug_mwh - before_mwh
    return len(traces) * may / max(1, looks)


def simulate_week(
    cars: int, load: float, seed: int, days: float, say: Any = lambda _: None, sleep_s: float = 0.0
) -> WeekOfCars:
    """`load`: work that arrives, of what the cars can do (`available`)."""
    cpu = time.process_time()
    until_s = int(days * 86_400)
    ground = lay_out("metro", cars, seed)
    stays = parking.draw(cars, 7 * parking.DAY_S, seed, plugged=PLUGGED)
    traces = [trace_of(number, stays) for number in range(cars)]
    setup = Setup(
        cars, load, seed, task_s=sum(TASK_S) / 2, model="metro", full=False, sleep_s=sleep_s
    )
    policy = draft_policy(Account(bytes(32)), NETWORK, TERMS)
    running = load * available(traces, policy, until_s)
    tasks = tasks_of_week(ground, until_s - TASK_S[1], running, seed)
    with counted() if not setup.is_full else nullcontext(), _without_collector():
        world = WeekWorld(setup, ground, tasks, traces)
        world.build()
        say(f"{cars} cars, {running:.0f} of them busy on average, {len(tasks)} tasks")
        world.schedule()
        world._advance(until_s * 1_000_000, say)
    found = WeekOfCars(len(world.vehicles), load, days, len(tasks))
    found.done = sum(run.done for run in world.runs)
    total_min: dict[str, int] = {}
    permille: list[int] = []
    for vehicle in world.vehicles.values():
        found.recalls += vehicle.recalls
        found.below_floor_min += vehicle.below_floor_min
        found.reserve_missed += vehicle.reserve_missed
        found.short_wh += max(0, vehicle.car.short_wh - vehicle.idle.short_wh)
        found.work_mwh += vehicle.work_mwh
        found.standby_mwh += vehicle.standby_mwh
        found.unpaid_mwh += vehicle.unpaid_mwh
        found.cost_nano += vehicle.cost_nano
        found.income_nano += vehicle.income_nano
        found.unpaid_nano += vehicle.unpaid_nano
        found.due_nano += vehicle.upkeep.due_nano
        cost = vehicle.cost_nano - vehicle.upkeep.due_nano - vehicle.in_hand_nano()
        if cost > 0:
            permille.append(vehicle.income_nano * 1_000 // cost)
        for name, minutes in vehicle.minutes.items():
            total_min[name] = total_min.get(name, 0) + minutes
    found.income_permille_least = min(permille, default=0)
    whole = max(1, sum(total_min.values()))
    found.shares = {name: round(m / whole, 4) for name, m in sorted(total_min.items())}
    found.receipts_mwh = world.receipts_mwh
    assert world.digest is not None
    found.events, found.digest = world.digest.events, world.digest.hexdigest()
    found.cpu_s = time.process_time() - cpu
    return found
