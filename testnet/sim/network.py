"""Where the cars of a simulated fleet are, and how long a message between two of them takes.

A fleet stands in metro areas of about `METRO_CARS` cars, of log-normal sizes; a metro of more than
`CELL_CARS_MAX` is cut into cells. The round trip of two cars is

    last mile of one + last mile of the other + core(cell of one, cell of the other)

The last mile is a car's own share of every round trip it takes part in, whoever the other is: it
is what orders the cars of one cell. Flow: the event simulator asks message by message, the
vectorised model takes the arrays. Neither draws a latency of its own.

Where the numbers come from:

- Last mile. Ookla's Speedtest Global Index for the United States, end of 2022: 14 ms median to a
  near server on fixed lines and 31 ms on cellular; Verizon's fibre 9 ms. With 2 ms of metro core,
  and rounded for cable and 4G/5G together, medians of 5 (fibre), 13 (cable, DSL) and 38 ms
  (cellular). Who has what, 35/35/30 %, and the spread are assumptions: no published count says by
  which line parked cars are connected.
- Distance. Bozkurt et al., "Dissecting Latency in the Internet's Fiber Infrastructure" (2018): the
  Internet takes about 2.1 times the straight line at the speed of light in fibre, 0.021 ms/km of
  round trip; the conduits that exist would allow 1.3 times. Between them, `KM_US`.
- Between continents. Ping times over sea cables lie between 75 ms (North Atlantic) and 290 ms
  (opposite sides of the planet); `INLAND_US` is the way to the cables' ends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MODELS: Final = ("metro", "region", "continents")

METRO_CARS: Final = 500
METRO_SIGMA: Final = 0.5  # of the logarithm of a metro's size
CELL_CARS_MAX: Final = 1_000
METRO_CELLS_LEAST: Final = 4  # the model `metro` shows several cells even when it is small
CELL_CARS_LEAST: Final = 50  # ... unless they would be smaller than this
METRO_RADIUS_KM: Final = 20.0

LAST_MILE_SHARE: Final = (0.35, 0.35, 0.30)  # fibre, cable or DSL, cellular
LAST_MILE_MEDIAN_US: Final = (5_000, 13_000, 38_000)
LAST_MILE_SIGMA: Final = 0.4  # of the logarithm
LAST_MILE_US_MAX: Final = 400_000

METRO_CORE_US: Final = 2_000
KM_US: Final = 18.0  # of round trip, per kilometre of straight line
INLAND_US: Final = 15_000
JITTER: Final = 0.10  # a message takes up to so much more or less than half a round trip

CONTINENTS: Final = ("na", "sa", "eu", "as", "oc")
CONTINENT_SHARE: Final = (0.22, 0.10, 0.28, 0.30, 0.10)  # of the cars: an assumption
CONTINENT_KM: Final = (4_000.0, 2_500.0)  # every continent is a rectangle of this size
SEA_US: Final = (
    (0, 115_000, 75_000, 130_000, 145_000),
    (115_000, 0, 185_000, 290_000, 280_000),
    (75_000, 185_000, 0, 160_000, 260_000),
    (130_000, 290_000, 160_000, 0, 110_000),
    (145_000, 280_000, 260_000, 110_000, 0),
)
"""Round trips between the cables' ends. About the figures that cloud providers publish between
their regions (Virginia, São Paulo, Ireland, Singapore and Tokyo, Sydney)."""
# Where a continent's rectangle stands on the drawn map; distances are only taken within one.
CONTINENT_AT_KM: Final = (
    (0.0, 0.0),
    (2_000.0, 4_200.0),
    (6_500.0, -400.0),
    (11_500.0, 400.0),
    (12_500.0, 4_400.0),
)

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one car stands. Kilometres east and south of a corner of the drawn map."""

    cell: str
    last_mile_us: int  # the car's share of every round trip
    x_km: float
    y_km: float
    continent: int


class Network:
    """A drawn fleet. Cars are numbered from 0, cell after cell; the same draw, the same numbers.

    The lists are made when first asked for: ten million cars need only the arrays.
    """

    def __init__(
        self,
        model: str,
        cell_names: list[str],
        cell_metro: Ints,
        cell_continent: Ints,
        cell_cars: Ints,
        last_mile_us: Ints,
        x_km: npt.NDArray[np.float32],
        y_km: npt.NDArray[np.float32],
    ) -> None:
        self.model = model
        self.cell_names = cell_names
        self._metro = cell_metro
        self._continent = cell_continent
        self._cars = cell_cars
        self._first = np.concatenate(([0], np.cumsum(cell_cars, dtype=np.int64)))
        self._last_mile = last_mile_us
        self._x = x_km
        self._y = y_km
        starts = self._first[:-1]
        self._cell_x: Floats = np.add.reduceat(x_km, starts, dtype=np.float64) / cell_cars
        self._cell_y: Floats = np.add.reduceat(y_km, starts, dtype=np.float64) / cell_cars
        self._index = {name: number for number, name in enumerate(cell_names)}
        self._core: dict[int, int] = {}
        self._nearest: dict[tuple[int, int], list[str]] = {}

    def __len__(self) -> int:
        """How many cars there are."""
        return len(self._last_mile)

    @cached_property
    def _cell_of(self) -> list[int]:
        cells: list[int] = np.repeat(np.arange(len(self.cell_names)), self._cars).tolist()
        return cells

    @cached_property
    def _mile_of(self) -> list[int]:
        miles: list[int] = self._last_mile.tolist()
        return miles

    @cached_property
    def places(self) -> list[Place]:
        """One a car, by its number."""
        continents = self._continent.tolist()
        return [
            Place(self.cell_names[cell], mile, x, y, continents[cell])
            for cell, mile, x, y in zip(
                self._cell_of, self._mile_of, self._x.tolist(), self._y.tolist(), strict=True
            )
        ]

    @cached_property
    def cells(self) -> dict[str, list[int]]:
        """The numbers of the cars of each cell."""
        edges = self._first.tolist()
        return {
            name: list(range(edges[number], edges[number + 1]))
            for number, name in enumerate(self.cell_names)
        }

    def rtt_us(self, a: int, b: int) -> int:
        """The round trip of cars `a` and `b`, without jitter."""
        if a == b:
            return 0
        miles, cells = self._mile_of, self._cell_of
        return miles[a] + miles[b] + self.core_us(cells[a], cells[b])

    def one_way_us(self, a: int, b: int, rng: random.Random) -> int:
        """One message's way from `a` to `b`, another car: half a round trip, with jitter."""
        share = 0.5 + JITTER * (rng.random() - 0.5)
        return max(1, int(self.rtt_us(a, b) * share))

    def core_us(self, cell: int, other: int) -> int:
        """The part of a round trip between cars of two cells, by number, that is no last mile."""
        if cell == other:
            return METRO_CORE_US
        key = cell * len(self.cell_names) + other
        known = self._core.get(key)
        if known is None:
            known = self._core[key] = int(self.core_row_us(cell, np.array([other]))[0])
        return known

    def core_row_us(self, cell: int, others: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """`core_us` from one cell to many, all by number: shape and order of `others`."""
        return self.core_pairs_us(np.full_like(others, cell), others)

    def core_pairs_us(
        self, cells: npt.NDArray[np.integer[Any]], others: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.int64]:
        """`core_us` of each cell of one array and the one at the same place of the other."""
        here, there = self._continent[cells], self._continent[others]
        km = np.hypot(
            self._cell_x[others] - self._cell_x[cells], self._cell_y[others] - self._cell_y[cells]
        )
        near = METRO_CORE_US + np.round(KM_US * km).astype(np.int64)
        far = METRO_CORE_US + INLAND_US + np.asarray(SEA_US)[here, there]
        pairs: npt.NDArray[np.int64] = np.where(here == there, near, far).astype(np.int64)
        pairs[cells == others] = METRO_CORE_US
        return pairs

    def neighbours(self, cell: str, count: int) -> list[str]:
        """At most `count` other cells, the nearest first; equally near ones by their number."""
        number = self._index[cell]
        known = self._nearest.get((number, count))
        if known is None:
            row = self.core_row_us(number, np.arange(len(self.cell_names)))
            row[number] = np.iinfo(np.int64).max
            order = np.argsort(row, kind="stable")[: min(count, len(row) - 1)]
            known = [self.cell_names[other] for other in order.tolist()]
            self._nearest[number, count] = known
        return known

    def nearest_cells(self, count: int) -> Ints:
        """`neighbours` of every cell, by number: shape (cells, count), -1 where there are no more.

        In 20,000 cells this takes seconds; cells of other continents are looked at one by one, and
        only where the own continent has too few.
        """
        near = np.full((len(self.cell_names), count), -1, np.int32)
        for continent in np.unique(self._continent):
            mine = np.flatnonzero(self._continent == continent)
            if len(mine) <= count:
                for cell in mine.tolist():
                    row = self.core_row_us(cell, np.arange(len(self.cell_names)))
                    row[cell] = np.iinfo(np.int64).max
                    order = np.argsort(row, kind="stable")[: min(count, len(row) - 1)]
                    near[cell, : len(order)] = order
                continue
            x, y = self._cell_x[mine], self._cell_y[mine]
            for rows in np.array_split(np.arange(len(mine)), -(-len(mine) // 500)):
                km = np.hypot(x[rows, None] - x, y[rows, None] - y)
                km[np.arange(len(rows)), rows] = np.inf
                best = np.argpartition(km, count - 1, axis=1)[:, :count]
                order = np.argsort(np.take_along_axis(km, best, axis=1), axis=1)
                near[mine[rows]] = mine[np.take_along_axis(best, order, axis=1)]
        return near

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The same for the vectorised model; do not write to them.

        Of a car, by its number: `cell` (int32), `last_mile_us` (int32), `x_km`, `y_km` (float32).
        Of a cell, by its number in `cell_names`: `cell_first` (int64, one more than there are
        cells: the cars of cell c are `cell_first[c]` to `cell_first[c + 1]`), `cell_cars`,
        `cell_metro`, `cell_continent` (int32), `cell_x_km`, `cell_y_km` (float64).
        """
        return {
            "cell": np.repeat(np.arange(len(self.cell_names), dtype=np.int32), self._cars),
            "last_mile_us": self._last_mile,
            "x_km": self._x,
            "y_km": self._y,
            "cell_first": self._first,
            "cell_cars": self._cars,
            "cell_metro": self._metro,
            "cell_continent": self._continent,
            "cell_x_km": self._cell_x,
            "cell_y_km": self._cell_y,
        }


def draw(model: str, cars: int, seed: int) -> Network:
    """A network of `cars` cars: one metro area, one continent (`region`) or all five.

    ValueError for an unknown model or no cars.
    """
    if model not in MODELS:
        raise ValueError(f"{model!r} is no network model: choose one of {', '.join(MODELS)}")
    if cars < 1:
        raise ValueError(f"a network has at least one car, not {cars}")
    rng = np.random.default_rng([seed, MODELS.index(model), 0x6E6574])
    sizes, continents, at = _metros(model, cars, rng)
    largest = CELL_CARS_MAX
    if model == "metro":
        largest = min(CELL_CARS_MAX, max(CELL_CARS_LEAST, -(-cars // METRO_CELLS_LEAST)))
    radius = METRO_RADIUS_KM * np.sqrt(rng.random(cars))
    angle = rng.uniform(0.0, 2 * np.pi, cars)
    x = (np.repeat(at[:, 0], sizes) + radius * np.cos(angle)).astype(np.float32)
    y = (np.repeat(at[:, 1], sizes) + radius * np.sin(angle)).astype(np.float32)
    names: list[str] = []
    cell_cars: list[int] = []
    cell_metro: list[int] = []
    cell_continent: list[int] = []
    first = 0
    for metro, (size, continent) in enumerate(
        zip(sizes.tolist(), continents.tolist(), strict=True)
    ):
        mine = slice(first, first + size)
        parts = _cut(x[mine], y[mine], -(-size // largest))
        order = np.concatenate(parts)
        x[mine], y[mine] = x[mine][order], y[mine][order]
        for number, part in enumerate(parts):
            names.append(f"{CONTINENTS[continent]}{metro}-{number}")
            cell_cars.append(len(part))
            cell_metro.append(metro)
            cell_continent.append(continent)
        first += size
    return Network(
        model,
        names,
        np.asarray(cell_metro, np.int32),
        np.asarray(cell_continent, np.int32),
        np.asarray(cell_cars, np.int32),
        _last_miles(cars, rng),
        x,
        y,
    )


def _metros(
    model: str, cars: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Cars, continent and centre (shape metros x 2, km) of each metro that has a car."""
    if model == "metro":
        return np.array([cars]), np.array([2]), np.zeros((1, 2))
    continents_drawn = 1 if model == "region" else len(CONTINENTS)
    count = max(round(cars / METRO_CARS), 2 * continents_drawn)
    if model == "region":
        continents = np.full(count, 2)
    else:
        # the first metro of each continent is there for sure, so that there are always five
        drawn = rng.choice(len(CONTINENTS), count - len(CONTINENTS), p=CONTINENT_SHARE)
        continents = np.sort(np.concatenate((np.arange(len(CONTINENTS)), drawn)))
    weight = rng.lognormal(0.0, METRO_SIGMA, count)
    sizes = rng.multinomial(cars, weight / weight.sum()).astype(np.int64)
    at = rng.random((count, 2)) * np.asarray(CONTINENT_KM) + np.asarray(CONTINENT_AT_KM)[continents]
    some = sizes > 0
    return sizes[some], continents[some], at[some]


def _cut(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], parts: int
) -> list[npt.NDArray[np.int64]]:
    """The cars' numbers in `parts` groups of nearly equal size, each compact on the map.

    Halves across the longer side, again and again (a k-d tree), as a quadkey prefix would if it
    split where the cars are.
    """
    found: list[npt.NDArray[np.int64]] = []
    left = [(np.arange(len(x)), parts)]
    while left:
        cars, pieces = left.pop()
        if pieces == 1:
            found.append(cars)
            continue
        xs, ys = x[cars], y[cars]
        side = xs if np.ptp(xs) >= np.ptp(ys) else ys
        order = np.argsort(side, kind="stable")
        less = pieces // 2
        edge = len(cars) * less // pieces
        left.append((cars[order[edge:]], pieces - less))
        left.append((cars[order[:edge]], less))
    return found


def _last_miles(cars: int, rng: np.random.Generator) -> Ints:
    median = np.asarray(LAST_MILE_MEDIAN_US)[rng.choice(3, cars, p=LAST_MILE_SHARE)]
    drawn = median * rng.lognormal(0.0, LAST_MILE_SIGMA, cars)
    return np.clip(drawn, 500, LAST_MILE_US_MAX).astype(np.int32)
