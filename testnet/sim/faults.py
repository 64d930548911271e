"""What goes wrong on purpose, seeded: frames, links, power, clocks, drivers, liars.

A `Plan` is a set of rates. `Weather` bends frames under way, `Plan.schedule` breaks the rest from
the heap. Streams are reliable: a frame that is dropped there comes a retransmission time-out later,
and holds up all behind it; gossip may lose and repeat messages. Between `begin` and `end` of the
window things go wrong, after it nothing does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .liars import KINDS, lies_of

if TYPE_CHECKING:
    from .mesh import Mesh, Site

RTO_US: Final = 150_000  # of a lost packet: about what Linux takes at these round trips
AWAY_MS: Final = (500, 8_000)
KILLED_MS: Final = 3_000
SPLIT_MS: Final = (200, 4_000)
GRACE_MS: Final = 2_000  # of a driver who has unlocked the car
SKEW_MS_MAX: Final = 90_000  # two clocks may then differ by half as much again as nodes bear


@dataclass(frozen=True, slots=True)
class Plan:
    """Shares of frames, and events a second in the whole mesh."""

    drop: float = 0.0
    duplicate: float = 0.0  # of frames: what a reconnect or a second path may bring twice
    delay: float = 0.0
    delay_us_max: int = 400_000
    partitions_s: float = 0.0
    crashes_s: float = 0.0
    cuts_s: float = 0.0
    drives_s: float = 0.0
    clocks_s: float = 0.0  # wall clocks that are set anew, right or wrong
    skew: bool = False  # every wall clock is off, by up to SKEW_MS_MAX
    submitters_crash: bool = False
    kill_share: float = 0.0  # of those that hold the rendezvous role, at once, in mid window
    liars_share: float = 0.0  # of those, each with one of `liars.KINDS`
    ground_keys: int = 0  # of one who wants every rendezvous of a cell, and drops what comes there
    ground_networks: int = 1  # that they are in

    @property
    def bends(self) -> bool:
        return bool(self.drop or self.duplicate or self.delay)

    @property
    def crashes(self) -> bool:
        return bool(self.crashes_s or self.drives_s or self.kill_share)

    @classmethod
    def named(cls, name: str) -> Plan:
        """ValueError with the names for a name that there is not."""
        plan = PLANS.get(name)
        if plan is None:
            raise ValueError(f"{name!r} is no fault plan: choose one of {', '.join(PLANS)}")
        return plan

    def schedule(self, mesh: Mesh, window_us: tuple[int, int]) -> None:
        """Put into the mesh's heap whatever goes wrong between the two times."""
        rng = random.Random(f"{mesh.seed} faults")
        if self.skew:
            for site in mesh.sites.values():
                site.skew_ms = _skew_ms(rng)
        breaks = _Breaks(mesh, rng, self)
        for rate, call in (
            (self.partitions_s, breaks.partition),
            (self.crashes_s, breaks.crash),
            (self.cuts_s, breaks.cut),
            (self.drives_s, breaks.drive_away),
            (self.clocks_s, breaks.set_clock),
        ):
            at = window_us[0] / 1e6
            while rate:
                at += rng.expovariate(rate)
                if at * 1e6 >= window_us[1]:
                    break
                mesh.at_us(int(at * 1e6) - mesh.now_us, call)
        if self.liars_share:
            mesh.at_us(window_us[0] - mesh.now_us, breaks.lie)
        if self.kill_share:
            middle_us = sum(window_us) // 2
            mesh.at_us(middle_us - mesh.now_us, breaks.kill)
        if self.bends:
            mesh.at_us(window_us[1] - mesh.now_us, lambda: setattr(mesh, "weather", None))


PLANS: Final[dict[str, Plan]] = {
    "none": Plan(),
    "loss": Plan(drop=0.01),
    "drives": Plan(drives_s=1.0),
    "churn": Plan(drop=0.01, crashes_s=0.5, cuts_s=0.5, drives_s=1.0),
    "kill": Plan(kill_share=0.25),
    "liars": Plan(liars_share=0.05),
    "ground": Plan(ground_keys=1_000),
    "storm": Plan(
        drop=0.05,
        duplicate=0.05,
        delay=0.1,
        partitions_s=0.3,
        crashes_s=0.3,
        cuts_s=0.6,
        drives_s=0.3,
        clocks_s=0.1,
        skew=True,
        submitters_crash=True,
    ),
}


def _skew_ms(rng: random.Random) -> int:
    return rng.randint(-SKEW_MS_MAX, SKEW_MS_MAX)


class Weather:
    """`mesh.Bent` of a plan."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._rng = random.Random(f"{seed} weather")

    def arrivals_us(self, rng: random.Random, *, stream: bool) -> tuple[int, ...]:
        plan, mine = self._plan, self._rng
        extra = 0
        while mine.random() < plan.drop:
            if not stream:
                return ()
            extra = 2 * extra + RTO_US
        if mine.random() < plan.delay:
            extra += mine.randrange(plan.delay_us_max)
        if mine.random() < plan.duplicate:
            return (extra, extra + mine.randrange(plan.delay_us_max))
        return (extra,)


class _Breaks:
    def __init__(self, mesh: Mesh, rng: random.Random, plan: Plan) -> None:
        self.mesh = mesh
        self.rng = rng
        self.plan = plan

    def _up(self) -> list[Site]:
        return [site for site in self.mesh.sites.values() if site.node is not None]

    def _note(self, text: str) -> None:
        if self.mesh.digest is not None:
            self.mesh.digest.note(self.mesh.now_us, text)

    def crash(self) -> None:
        """Power goes, and comes back."""
        sites = [site for site in self._up() if self._may_crash(site)]
        if sites:
            site = self.rng.choice(sites)
            self._note(f"crash {site.name}")
            known = sorted(site.links)
            self.mesh.crash(site.name)
            self._back(site, known)

    def kill(self) -> None:
        """A share of all rendezvous, in one instant; as cars they are back after `KILLED_MS`."""
        holders = sorted(self.mesh.role_holders())
        killed = self.rng.sample(holders, round(self.plan.kill_share * len(holders)))
        self._note(f"kill {' '.join(killed)}")
        known = {name: sorted(self.mesh.sites[name].links) for name in killed}
        for name in killed:
            self.mesh.crash(name)
            self._back(self.mesh.sites[name], known[name], KILLED_MS)

    def lie(self) -> None:
        """A share of all rendezvous lies from now on, each in its own way."""
        holders = sorted(self.mesh.role_holders())
        count = max(1, round(self.plan.liars_share * len(holders)))
        for index, name in enumerate(self.rng.sample(holders, count)):
            site, kind = self.mesh.sites[name], KINDS[index % len(KINDS)]
            self._note(f"{name} lies: {kind}")
            site.lie = lies_of(self.mesh, site, kind, random.Random(f"{self.mesh.seed} {name}"))

    def _may_crash(self, site: Site) -> bool:
        return self.plan.submitters_crash or bool(site.identity.roles & 1)

    def _back(self, site: Site, known: list[str], away_ms: int = 0) -> None:
        life = site.life

        def boot() -> None:
            if site.life == life:
                self.mesh.boot(site.name)
                for other in known:
                    self.mesh.connect(site.name, other)

        self.mesh.at(away_ms or self.rng.randint(*AWAY_MS), boot)

    def cut(self) -> None:
        """A link breaks, and is there again."""
        links = [(site.name, other) for site in self._up() for other in sorted(site.links)]
        if links:
            one, other = self.rng.choice(links)
            self._note(f"cut {one} {other}")
            self.mesh.cut(one, other)
            self.mesh.at(self.rng.randint(*SPLIT_MS), lambda: self.mesh.connect(one, other))

    def set_clock(self) -> None:
        """Somebody's wall clock jumps, under whatever it has in work."""
        site = self.rng.choice(list(self.mesh.sites.values()))
        site.skew_ms = _skew_ms(self.rng)
        self._note(f"clock {site.name}")

    def partition(self) -> None:
        """Some cannot reach the others for a while, and dials fail."""
        sites = self._up()
        if len(sites) < 2:
            return
        inside = self.rng.sample(sites, self.rng.randint(1, len(sites) // 2))
        names = {site.name for site in inside}
        pairs = [
            (a.name, b.name)
            for a in inside
            for b in self.mesh.sites.values()
            if b.name not in names and frozenset((a.name, b.name)) not in self.mesh.partitioned
        ]
        self._note(f"partition {' '.join(sorted(names))}")
        broken = [(one, other) for one, other in pairs if other in self.mesh.sites[one].links]
        self.mesh.partitioned |= {frozenset(pair) for pair in pairs}
        for one, other in broken:
            self.mesh.cut(one, other)

        def heal() -> None:
            self.mesh.partitioned -= {frozenset(pair) for pair in pairs}
            for one, other in broken:
                self.mesh.connect(one, other)

        self.mesh.at(self.rng.randint(*SPLIT_MS), heal)

    def drive_away(self) -> None:
        """Somebody unlocks the car: it is told at once, is gone after the grace, and comes back."""
        cars = [site for site in self._up() if site.identity.roles & 1]
        if cars:
            self.mesh.drive_away(self.rng.choice(cars).name, GRACE_MS, self._back)
