"""A run before and after: what it follows from, and what was measured of its tasks.

Filled by `world.simulate`; printed by `command`, compared by the bench, drawn by the report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from .frames import GROUPS, group_of
from .network import Network
from .result import CellFigure, Result

FULL_CARS_MAX: Final = 500
SHARES: Final = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run follows from."""

    cars: int
    load: float = 0.8
    seed: int = 1
    policy: str = "tokens"
    model: str = "continents"
    task_s: float = 2.0
    seconds: float = 20.0
    faults: str = "none"
    parking: bool = False  # cars come and go
    sleep_s: float = 0.0  # so long at most a car sleeps that its cell does not need; 0: none does
    full: bool | None = None  # real signatures and all chatter; None: by the size

    @property
    def is_full(self) -> bool:
        return self.cars <= FULL_CARS_MAX if self.full is None else self.full


@dataclass(slots=True)
class Measured:
    """Of the tasks that were submitted within the measured time."""

    setup: Setup
    engine: str  # "event" or "oracle"
    signatures: str  # "ed25519", "counted" or "none"
    membership: str  # "adverts", "oracle" or "none"
    tasks: int
    started_us: list[int] = field(default_factory=list)  # submit to start, of those that started
    hurt_us: list[int] = field(default_factory=list)  # of those that the fault plan is about
    paid: int = 0  # units that submitters have accepted
    paid_wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    frames: dict[str, int] = field(default_factory=dict)  # sent within the measured time, by type
    starts: int = 0  # within the measured time, of any task
    stances: dict[str, float] = field(default_factory=dict)  # shares of all cars' time
    events: int = 0
    digest: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    simulated_s: float = 0.0  # all of it
    cell_us: dict[str, list[int]] = field(default_factory=dict)  # started_us by submitter's cell

    @property
    def unstarted(self) -> int:
        return self.tasks - len(self.started_us)

    def per_task(self) -> dict[str, float]:
        """Frames of each type for every task that started."""
        starts = max(1, self.starts)
        return {kind: count / starts for kind, count in sorted(self.frames.items())}

    def messages_per_task(self) -> float:
        per_task = self.per_task().items()
        return sum(count for kind, count in per_task if group_of(kind) == "placement")

    def quantile_ms(self, share: float, of_us: list[int] | None = None) -> float:
        """Nearest rank; 0 if nothing started."""
        ordered = sorted(self.started_us if of_us is None else of_us)
        if not ordered:
            return 0.0
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000

    def fields(self) -> dict[str, Any]:
        """What `mesh testnet sim --json` says."""
        setup = self.setup
        groups = {group: 0.0 for group, _ in GROUPS}
        for kind, count in self.per_task().items():
            if group_of(kind) in groups:
                groups[group_of(kind)] += count
        return {
            "policy": setup.policy,
            "engine": self.engine,
            "model": setup.model,
            "cars": setup.cars,
            "load": setup.load,
            "seed": setup.seed,
            "task_s": setup.task_s,
            "seconds": setup.seconds,
            "faults": setup.faults,
            "parking": setup.parking,
            "sleep_s": setup.sleep_s,
            "signatures": self.signatures,
            "membership": self.membership,
            "tasks": self.tasks,
            "started": len(self.started_us),
            "failed": dict(sorted(self.failed.items())),
            **{f"p{100 * share:.0f}_ms": round(self.quantile_ms(share), 3) for share in SHARES},
            "hurt": len(self.hurt_us),
            "hurt_p50_ms": round(self.quantile_ms(0.5, self.hurt_us), 3),
            "hurt_p99_ms": round(self.quantile_ms(0.99, self.hurt_us), 3),
            "paid": self.paid,
            "paid_wrong": self.paid_wrong,
            "messages_per_task": round(self.messages_per_task(), 3),
            "messages": {kind: round(count, 3) for kind, count in self.per_task().items()},
            "other_messages": {group: round(count, 3) for group, count in groups.items()},
            "stances": {stance: round(share, 4) for stance, share in self.stances.items()},
            "events": self.events,
            "simulated_s": round(self.simulated_s, 3),
            "wall_s": round(self.wall_s, 3),
            "cpu_s": round(self.cpu_s, 3),
            "digest": self.digest,
        }

    def result(self, network: Network, command: str) -> Result:
        """For the report. ValueError if no task was started."""
        cells = []
        for cell, numbers in network.cells.items():
            took = sorted(self.cell_us.get(cell, []))
            places = [network.places[number] for number in numbers]
            cells.append(
                CellFigure(
                    cell,
                    sum(place.x_km for place in places) / len(places),
                    sum(place.y_km for place in places) / len(places),
                    len(numbers),
                    len(took),
                    took[len(took) // 2] if took else 0,
                )
            )
        placing = {k: round(n) for k, n in self.frames.items() if group_of(k) == "placement"}
        scale = self.tasks / max(1, self.starts)
        return Result.of(
            latencies_us=self.started_us,
            messages={kind: round(count * scale) for kind, count in placing.items()},
            policy=self.setup.policy,
            engine=self.engine,
            model=self.setup.model,
            cars=self.setup.cars,
            load=self.setup.load,
            seed=self.setup.seed,
            task_s=self.setup.task_s,
            simulated_s=self.setup.seconds,
            tasks=self.tasks,
            cells=tuple(cells),
            command=command,
            wall_s=self.wall_s,
        )
