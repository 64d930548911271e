"""What one simulated run says: the one form that every model fills and the report reads.

    Result.of(policy="tokens", latencies_us=[...], messages={"offer": 14_020, ...}, ...)

A run of millions of tasks keeps no list of them: the times are a table of 200 quantiles, dense in
the tail. Figures between two of them are interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

QUANTILES: Final[tuple[float, ...]] = (
    *(number / 100 for number in range(91)),
    *(number / 1_000 for number in range(901, 1_000)),
    *(number / 10_000 for number in range(9_991, 10_000)),
    1.0,
)
"""Of which the table of a result holds the values: 200, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class CellFigure:
    """One cell of the map."""

    name: str
    x_km: float
    y_km: float
    cars: int
    tasks: int  # submitted by its cars within the measured time
    p50_us: int  # from submit to start, of those tasks; 0 if there was none


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one policy on one drawn fleet."""

    policy: str  # tokens, gossip, adverts, random, central, limit
    engine: str  # "event": real protocol code; "oracle"; "fleet": the vectorised model
    model: str  # of the network
    cars: int
    load: float  # share of the cars' time that the submitted tasks would fill
    seed: int
    task_s: float  # mean
    simulated_s: float  # measured, without the time to fill up
    tasks: int  # submitted within the measured time
    unstarted: int  # of them, not started when the run ended: they have no latency
    latency_us: tuple[int, ...]  # submit to start, at QUANTILES
    messages: Mapping[str, float]  # a task, by type of message
    cells: tuple[CellFigure, ...]
    command: str  # what a person types to get these figures again
    wall_s: float = 0.0  # how long the run took here; not part of what a seed determines

    def __post_init__(self) -> None:
        if len(self.latency_us) != len(QUANTILES):
            raise ValueError(
                f"latency_us has {len(self.latency_us)} values: one for each of QUANTILES"
            )

    @classmethod
    def of(
        cls,
        *,
        latencies_us: Sequence[int] | npt.NDArray[Any],
        messages: Mapping[str, int],
        **fields: Any,
    ) -> Self:
        """From each started task's time and the count of messages of each type, in any order."""
        started = len(latencies_us)
        if not started:
            raise ValueError("no task was started: there is no time to report")
        table = np.quantile(np.asarray(latencies_us, np.float64), QUANTILES)
        tasks = fields.get("tasks", started)
        fields.setdefault("tasks", tasks)
        fields.setdefault("unstarted", tasks - started)
        return cls(
            latency_us=tuple(np.rint(table).astype(int).tolist()),
            messages={kind: messages[kind] / tasks for kind in sorted(messages)},
            **fields,
        )

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> Self:
        cells = tuple(CellFigure(**cell) for cell in read["cells"])
        return cls(**{**read, "cells": cells, "latency_us": tuple(read["latency_us"])})

    def to_json(self) -> dict[str, Any]:
        """What `json` can write and `from_json` reads."""
        return {**asdict(self), "messages": dict(self.messages)}

    def quantile_us(self, share: float) -> int:
        """The time within which this share (0 to 1) of the started tasks started."""
        return round(float(np.interp(share, QUANTILES, self.latency_us)))

    def share_within(self, time_us: float) -> float:
        """The share of the started tasks that started within this time."""
        return float(np.interp(time_us, self.latency_us, QUANTILES, left=0.0, right=1.0))

    @property
    def messages_per_task(self) -> float:
        return sum(self.messages.values())
