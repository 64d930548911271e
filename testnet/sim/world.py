"""A fleet at work: real machines on a drawn network, the tasks of a workload, and what is measured.

Flow: `simulate(Setup)` lays out the ground, draws the tasks, runs either the machines (`World`) or
an oracle on them, and returns a `Measured`. The time of a task is from its submission to the start
of its unit on a car, of the attempt whose result was taken.

Up to `measured.FULL_CARS_MAX` cars everything is real: Ed25519, and every advert reaches every
member of its cell. Above, signatures are counted (`counting.py`) and adverts reach requesters
alone: what cars know of each other decides nothing, and a cell of 500 would read 250,000 adverts a
minute.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import messages, sealed
from meshnode.protocol.cell import Candidate, Posts, elect, epoch_of
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, ArraySpec, Limits, Peer, Rng

from . import parking
from .counting import CountingSigner, SmallRandom, counted
from .faults import GRACE_MS, Plan, Weather
from .frames import gossip_frames, kind_of
from .liars import best_keys, ground_seeds, lies_of
from .measured import Measured, Setup
from .mesh import ARTIFACT, GOSSIP_DEGREE, PROVIDE, REQUEST, Mesh, Site
from .oracles import FRAMES, ORACLES, play
from .payments import Payments
from .roster import FleetRoster
from .site import DAY_MS, EPOCH_MS, NETWORK, Papers, account_keys, papers_of
from .standing import Standing
from .trace import Trace
from .workload import FILL_S, SETTLE_S, TASK_US_MIN, Demand, Ground, Task, lay_out, tasks_of

POLICIES: Final = ("tokens", "gossip", "adverts", *ORACLES)
BOOT_S: Final = 1.0  # all cars are up
CONNECTED_S: Final = 2.5  # to the submitters of their cell
PRIME_S: Final = 2.7  # each submitter has a short task: with it, it agrees with its cars
READY_S: Final = 4.0
SAID_MAX: Final = 60  # lines that say how far it is
DRAIN_S: Final = 30.0  # after the measured time, for tasks that wait still
DEADLINE_MS: Final = 120_000
JOBS_MAX: Final = 100_000
PARKING_START_S: Final = 17 * 3_600.0
GONE_MS: Final = 1_000
"""After so long a cell elects without a car that is gone: whoever was connected has dialled it in
vain, dropped its advert, and looks at an election once a second."""
AFTER_KILL_US: Final = 12_000_000  # of which the tasks are measured by themselves
OUT: Final = ArraySpec("float32", (16,))


@dataclass(slots=True)
class _Run:
    """A task as it goes."""

    task: Task
    starts: dict[int, int] = field(default_factory=dict)  # attempt -> us
    started_us: int | None = None  # of the attempt that was taken
    failed: Reason | None = None
    done: bool = False
    prime: bool = False  # it is there to make agreements


Say = Callable[[str], None]


def _primes(ground: Ground, first: int) -> list[Task]:
    """Agreements are made when there is work: all at once with the first of it, each would have
    every waiting job look for cars again."""
    submitters = [number for some in ground.submitters.values() for number in some]
    return [
        Task(first + index, int(PRIME_S * 1e6), number, TASK_US_MIN)
        for index, number in enumerate(submitters)
    ]


class World(Mesh):
    def __init__(self, setup: Setup, ground: Ground, tasks: list[Task]) -> None:
        limits = replace(
            Limits(),
            jobs_max=JOBS_MAX,
            job_deadline_ms=DEADLINE_MS,
            sleep_ms_max=int(1000 * setup.sleep_s),
        )
        super().__init__(
            setup.seed,
            links=ground.network,
            limits=limits,
            keys_of=KeySigner if setup.is_full else CountingSigner,
        )
        self.setup = setup
        self.ground = ground
        self.keep_trace = False
        self.digest = Trace()
        self.counted_frames: Counter[str] = Counter()
        self.runs = [_Run(task) for task in tasks]
        if setup.is_full:  # else agreements stand
            self.runs += [_Run(task, prime=True) for task in _primes(ground, len(tasks))]
        self.by_number: dict[int, Site] = {}
        self.peers: dict[int, Peer] = {}
        self.holders = FleetRoster(ground.network, self.peers, self._elect)
        if not setup.is_full:
            self.roster = self.holders
            account = Account(account_keys(0, self.keys_of).account)
            self.standing = Standing(NETWORK, account, EPOCH_MS + 6 * DAY_MS)
        self._by_job: dict[bytes, int] = {}  # job id -> task
        self._plan = Plan.named(setup.faults)
        # Who waits for an announcement or breaks links needs them all to be there.
        breaks = self._plan.cuts_s or self._plan.partitions_s
        self.lazy = not setup.is_full and setup.policy == "tokens" and not breaks
        self._ground_peers: list[Peer] = []  # of the one who wants the rendezvous of `_victim`
        self._victim = max(ground.cars, key=lambda cell: len(ground.cars[cell]))
        self._held: list[tuple[Site, ev.FrameIn]] | None = None  # frames that take no time
        self.began_us: list[int] = []  # every start of a unit
        self.payments = Payments()
        self._absent: set[str] = set()  # cars that are on the road
        self._asleep_us: dict[str, list[int]] = defaultdict(list)  # car -> from, to, from, to

    # ---- building

    def build(self) -> None:
        """Cars and submitters boot within `BOOT_S`, and are connected by `CONNECTED_S`."""
        papers = self.papers()
        numbers = len(self.ground.network.places)
        roles = {n: PROVIDE for cars in self.ground.cars.values() for n in cars}
        roles |= {n: REQUEST for some in self.ground.submitters.values() for n in some}
        for number in range(numbers):  # a site's number is its place in the network
            self.now_us = int(BOOT_S * 1e6 * number / numbers)
            role = roles[number]
            name = f"car-{number}" if role == PROVIDE else f"submitter-{number}"
            cell = self.ground.network.places[number].cell
            site = self.add(name, role, cell=cell, papers=papers)
            self.by_number[number] = site
            if role == PROVIDE:
                self.peers[number] = site.identity.peer
            site.disk.keeps = self._plan.crashes or self.setup.parking
        self.now_us = 0
        if self._plan.ground_keys:
            self._ground(papers)
        self._connect_cells()
        if self.setup.parking:
            self._park()

    def papers(self) -> Papers | None:
        """One owner's for the whole fleet; each car's own where all is real."""
        return None if self.setup.is_full else papers_of(account_keys(0, self.keys_of))

    def _ground(self, papers: Papers | None) -> None:
        """Keys that rank first in the largest cell, and a car for each that is elected there: all
        stand where the cell's first car does, and say nothing about placements."""
        cell, keys = self._victim, self._plan.ground_keys
        peers = {seed: self.keys_of(seed.to_bytes(32, "big")).peer for seed in ground_seeds(keys)}
        cars = len(self.ground.cars[cell])
        epoch = epoch_of(EPOCH_MS)
        best = best_keys(cell, epoch, cars, self.limits.rendezvous_cars, peers, keys)
        self._ground_peers = [peers[seed] for seed in best]
        elected = {peer for ranks in self.holders.posts(cell, epoch) for peer in ranks}
        for seed in best:
            if peers[seed] in elected:
                name = f"ground-{len(self.sites)}"
                site = self.add(name, PROVIDE, cell=cell, papers=papers, seed=seed)
                site.number = self.ground.cars[cell][0]
                site.lie = lies_of(self, site, "drop", random.Random(0))

    def _park(self) -> None:
        """Cars come and go as traces say; the time begins on a Monday at `PARKING_START_S`. Those
        that are on the road then are not there yet."""
        cars = [number for numbers in self.ground.cars.values() for number in numbers]
        until_s = READY_S + FILL_S[1] + SETTLE_S + self.setup.seconds + DRAIN_S
        stays = parking.draw(len(cars), until_s, self.setup.seed, start_s=PARKING_START_S)
        there = set(stays.car[stays.arrive_s <= 0].tolist())
        for index, number in enumerate(cars):
            if index not in there:
                self._absent.add(self.by_number[number].name)
                del self.peers[number]
                self.holders.changed(self.by_number[number].identity.cell)
        for at_s, index, what, _ in parking.events(stays):
            name = self.by_number[cars[index]].name
            at_us = int(at_s * 1e6)
            if what == "leave":
                self.at_us(at_us, lambda name=name: self.drive_away(name, GRACE_MS))  # type: ignore[misc]
            elif at_us > 0:
                self.at_us(at_us, lambda name=name: self._arrive(name))  # type: ignore[misc]

    def _arrive(self, name: str) -> None:
        self._absent.discard(name)
        self.boot(name)
        submitters = self.ground.submitters[self.sites[name].identity.cell]
        for number in () if self.lazy else submitters:
            self.connect(self.by_number[number].name, name)

    def boot(self, name: str) -> None:
        if name not in self._absent:
            super().boot(name)
            self._is_there(self.sites[name])

    def crash(self, name: str) -> None:
        super().crash(name)
        site = self.sites[name]
        life = site.life

        def missed() -> None:
            if site.life == life and self.peers.pop(site.number, None) is not None:
                self.holders.changed(site.identity.cell)

        self.at(GONE_MS, missed)

    def stirred(self, site: Site) -> None:
        """Asleep it is out of reach and not elected, which its advert says."""
        self._asleep_us[site.name].append(self.now_us)
        self.holders.asleep[site.identity.cell] += 1 if site.asleep else -1
        if site.asleep:
            self.peers.pop(site.number, None)
            self.holders.changed(site.identity.cell)
        else:
            self._is_there(site)

    def _is_there(self, site: Site) -> None:
        provides = site.identity.roles & PROVIDE and site.identity.peer not in self._ground_peers
        if provides and site.number not in self.peers:
            self.peers[site.number] = site.identity.peer
            self.holders.changed(site.identity.cell)

    def add(self, name: str, roles: int, **more: Any) -> Site:
        """Boots when the heap comes to it."""
        at_us, self.now_us = self.now_us, 0
        site = self._enter(name, roles, **more)
        self.at_us(at_us, lambda: self.boot(name))
        return site

    def _connect_cells(self) -> None:
        """Warm links: each submitter to the cars of its cell; cars dial their rendezvous.

        A large fleet has eight of these links a car and uses two, so there they are made when they
        are first used (`_warm`), and only those to the rendezvous beforehand."""
        links = [
            (self.by_number[submitter].name, car)
            for cell in self.ground.cells
            for submitter in self.ground.submitters[cell]
            for car in self._warm_cars(cell)
        ]
        first_us, last_us = BOOT_S * 1e6, CONNECTED_S * 1e6
        for at, (one, other) in enumerate(links):
            at_us = int(first_us + (last_us - first_us) * at / len(links))
            self.at_us(at_us, lambda one=one, other=other: self.connect(one, other))  # type: ignore[misc]

    def _warm_cars(self, cell: str) -> list[str]:
        if not self.lazy:
            cars = self.ground.cars[cell][: self.limits.peers_max]
            return [self.by_number[car].name for car in cars]
        posts = self.holders.posts(cell, epoch_of(EPOCH_MS))
        holders = dict.fromkeys(peer for ranks in posts for peer in ranks)
        return [self.by_peer[peer].name for peer in holders]

    def _warm(self, car: Site, offer: bytes) -> None:
        """The link between a car and a submitter of its cell, as if it had been there for long: its
        hellos take no time."""
        submitter = self.by_peer[Peer(sealed.unseal(offer).kid)]
        if submitter.name in car.links or submitter.identity.cell != car.identity.cell:
            return
        held = self._held = []
        self.connect(submitter.name, car.name)
        self._held = None
        for site, frame in held:
            self.feed(site, frame)

    def rng_of(self, site: Site) -> Rng:
        if site.identity.roles & REQUEST:
            return super().rng_of(site)
        return SmallRandom(f"{self.seed} {site.number} {site.life}")

    def role_holders(self) -> list[str]:
        return [self.by_peer[peer].name for peer in self.holders.holders()]

    def _elect(self, cell: str, epoch: int, members: Sequence[Peer], cars: int) -> Posts:
        """As the machines elect; each car has measured its last mile, and is alone in its /24."""
        places, by_peer = self.ground.network.places, self.by_peer
        candidates = [
            Candidate(peer, places[by_peer[peer].number].last_mile_us) for peer in members
        ]
        if cell == self._victim and self._ground_peers:
            # They stand next door, say so, and have so many networks.
            networks = self._plan.ground_networks
            candidates += [
                Candidate(peer, 1, f"net-{n % networks}")
                for n, peer in enumerate(self._ground_peers)
            ]
            cars += len(self._ground_peers)
        return elect(cell, epoch, candidates, cars, self.limits.rendezvous_cars)

    # ---- the workload

    def schedule(self) -> None:
        for run in self.runs:
            self.at_us(run.task.at_us, lambda run=run: self._submit(run))  # type: ignore[misc]

    def _submit(self, run: _Run) -> None:
        order = ev.JobOrder(
            "bench.spin@1",
            ARTIFACT,
            (),
            (OUT,),
            1,
            run.task.number.to_bytes(16, "big"),
            unit_ms_hint=self.setup.task_s * 1000,
            # The first job asks every car for an agreement, which adverts do and tokens do not.
            policy="adverts" if run.prime else self.setup.policy,
            durable=False,
        )
        site = self.by_number[run.task.submitter]
        self.feed(site, ev.Submit(run.task.number, order))

    def unit_us(self, effect: fx.StartExec) -> int:
        number = self._by_job.get(effect.spec.job_digest[:16])
        return super().unit_us(effect) if number is None else self.runs[number].task.unit_us

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        number = self._by_job[effect.spec.job_digest[:16]]
        self.runs[number].starts[effect.run.attempt] = self.now_us
        self.payments.ran.add((effect.spec.job_digest[:16], site.identity.peer))
        self.began_us.append(self.now_us)
        super()._execute(site, effect, life)

    def stored(self, site: Site, record: fx.Record) -> None:
        if isinstance(record, fx.SignedObject) and site.identity.roles & REQUEST:
            self.payments.stored(record)

    def _notify(self, site: Site, effect: fx.Notify, life: int) -> None:
        kind = effect.notice.kind
        if kind == "submitted":
            number = dict(effect.notice.fields)["request_id"]
            assert isinstance(number, int)
            self._by_job[effect.subject] = number
        elif kind == "refused":
            fields = dict(effect.notice.fields)
            number, reason = fields["request_id"], fields["reason"]
            assert isinstance(number, int) and isinstance(reason, int)
            self.runs[number].failed = Reason.of(reason)
        elif kind == "units":
            run = self.runs[self._by_job[effect.subject]]
            attempt = dict(effect.notice.fields)["attempt"]
            assert isinstance(attempt, int)
            run.started_us, run.done = run.starts[attempt], True
        elif kind == "job":
            fields = dict(effect.notice.fields)
            if fields["state"] == "failed":
                reason = fields["reason"]
                assert isinstance(reason, int)
                self.runs[self._by_job[effect.subject]].failed = Reason.of(reason)

    # ---- counting

    def _send(self, site: Site, effect: fx.Send, life: int) -> None:
        kind = kind_of(effect.frame)
        self.counted_frames[kind] += 1
        if self._held is not None:
            frame = ev.FrameIn(site.identity.peer, effect.lane, effect.frame)
            self._held.append((self.by_peer[effect.peer], frame))
            return
        if kind == "assign" and self.lazy:
            self._warm(self.by_peer[effect.peer], messages.unpack(effect.frame).offer)
        super()._send(site, effect, life)

    def _publish(self, site: Site, effect: fx.Publish, life: int) -> None:
        members = self.topics[effect.topic]
        kind = kind_of(effect.frame)
        self.counted_frames[kind] += gossip_frames(len(members), GOSSIP_DEGREE)
        if kind != "advert" or self.setup.is_full:
            super()._publish(site, effect, life)
        elif self.setup.policy != "tokens":
            event = ev.GossipIn(effect.topic, site.identity.peer, effect.frame)
            for number in self.ground.submitters[site.identity.cell]:
                other = self.by_number[number]
                if other is not site and other.node is not None:
                    self._gossip(site, other, event, len(members))

    # ---- running

    def play(self, window_us: tuple[int, int], say: Say) -> Measured:
        self.schedule()
        if self._plan.bends:
            self.weather = Weather(self._plan, self.setup.seed)
        self._plan.schedule(self, window_us)
        kill_us = sum(window_us) // 2
        first, last = window_us
        self._advance(first, say)
        before = Counter(self.counted_frames)
        self._advance(last, say)
        sent = self.counted_frames - before
        mine = [run for run in self.runs if first <= run.task.at_us < last]
        end_us = last + int(DRAIN_S * 1e6)
        while self.now_us < end_us and any(not run.starts and not run.failed for run in mine):
            self.run_to(self.now_us + 250_000)
        # A task that has started is measured by the attempt whose result came, if one has come.
        measured = Measured(
            self.setup,
            "event",
            "ed25519" if self.setup.is_full else "counted",
            "adverts" if self.setup.is_full else "oracle",
            len(mine),
            frames=dict(sorted(sent.items())),
            starts=sum(first <= at < last for at in self.began_us),
            simulated_s=self.now_us / 1e6,
        )
        for run in mine:
            start = run.started_us or min(run.starts.values(), default=None)
            if start is not None:
                self._took(measured, run.task, start)
                if self._hurt(run.task, kill_us):
                    measured.hurt_us.append(start - run.task.at_us)
            elif run.failed is not None:
                measured.failed[run.failed.name.lower()] += 1
        assert self.digest is not None
        if self.setup.sleep_s:
            measured.stances = self._stances(window_us)
        measured.paid, measured.paid_wrong = self.payments.units, self.payments.wrong
        measured.events, measured.digest = self.digest.events, self.digest.hexdigest()
        return measured

    def _stances(self, window_us: tuple[int, int]) -> dict[str, float]:
        """Of the cars' time in the window, what they worked, stood by and slept."""
        first, last = window_us
        whole_us = (last - first) * sum(map(len, self.ground.cars.values()))
        asleep_us = 0
        for times in self._asleep_us.values():
            spans = zip(times[::2], [*times[1::2], last], strict=False)
            asleep_us += sum(max(0, min(end, last) - max(at, first)) for at, end in spans)
        worked_us = sum(
            max(0, min(at + run.task.unit_us, last) - max(at, first))
            for run in self.runs
            for at in run.starts.values()
        )
        working, asleep = worked_us / whole_us, asleep_us / whole_us
        return {"working": working, "standby": 1 - working - asleep, "asleep": asleep}

    def _hurt(self, task: Task, kill_us: int) -> bool:
        """Whether the fault plan is about this task."""
        if self._plan.kill_share:
            return kill_us <= task.at_us < kill_us + AFTER_KILL_US
        if self._plan.ground_keys:
            return self.ground.network.places[task.submitter].cell == self._victim
        return self._plan != Plan()

    def _took(self, measured: Measured, task: Task, start_us: int) -> None:
        took_us = start_us - task.at_us
        measured.started_us.append(took_us)
        cell = self.ground.network.places[task.submitter].cell
        measured.cell_us.setdefault(cell, []).append(took_us)

    def _advance(self, to_us: int, say: Say) -> None:
        step_us = max(1_000_000, (to_us - self.now_us) // SAID_MAX)
        while self.now_us < to_us:
            self.run_to(min(to_us, self.now_us + step_us))
            assert self.digest is not None
            waiting = sum(not r.starts for r in self.runs if r.task.at_us < self.now_us)
            say(
                f"{self.now_us / 1e6:.0f} s simulated, {self.digest.events} events, "
                f"{waiting} tasks wait"
            )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Machines die with the process: looking for dead ones among 100,000 takes a third of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def simulate(setup: Setup, say: Say = lambda _: None) -> Measured:
    """One run. ValueError for a policy, model or fault plan that there is not."""
    if setup.policy not in POLICIES:
        raise ValueError(f"{setup.policy!r} is no policy: choose one of {', '.join(POLICIES)}")
    if Plan.named(setup.faults).kill_share and setup.policy != "tokens":
        raise ValueError(f"the policy {setup.policy!r} has no rendezvous to kill")
    begun, cpu = time.monotonic(), time.process_time()
    ground = lay_out(setup.model, setup.cars, setup.seed)
    begins_s = 0.0 if setup.policy in ORACLES else READY_S
    demand = Demand(setup.load, setup.task_s, setup.seconds, setup.seed, begins_s)
    tasks = tasks_of(ground, demand)
    if setup.policy in ORACLES:
        measured = _oracle(setup, ground, tasks, demand.window_us)
    else:
        with nullcontext() if setup.is_full else counted(), _without_collector():
            world = World(setup, ground, tasks)
            world.build()
            say(f"{len(world.sites)} machines, {len(tasks)} tasks")
            measured = world.play(demand.window_us, say)
    measured.wall_s, measured.cpu_s = time.monotonic() - begun, time.process_time() - cpu
    return measured


def _oracle(
    setup: Setup, ground: Ground, tasks: list[Task], window_us: tuple[int, int]
) -> Measured:
    played = play(setup.policy, ground, tasks, setup.seed)
    first, last = window_us
    mine = [task for task in tasks if first <= task.at_us < last]
    starts = sum(first <= at < last for at in played.start_us.values())
    measured = Measured(setup, "oracle", "none", "none", len(mine), starts=starts)
    measured.frames = {kind: starts for kind in FRAMES[setup.policy]}
    for task in mine:
        took_us = played.start_us[task.number] - task.at_us
        measured.started_us.append(took_us)
        cell = ground.network.places[task.submitter].cell
        measured.cell_us.setdefault(cell, []).append(took_us)
    measured.events, measured.digest = played.trace.events, played.trace.hexdigest()
    measured.simulated_s = last / 1e6
    return measured
