"""How long a parked car will stay: a distribution of stays, given how long it is parked. Pure.

`budget` asks with the vehicle's readings and the owner's departures; the answer bounds
`lease_s_max` and by that the advert's bucket, the refusal LEASE_LENGTH and placement. A departure
that the owner or the car has named wins: then nothing is guessed.

The stays are those of charging sessions in the Netherlands, by the quantiles that ElaadNL publishes
("Open datasets for electric mobility research", table "connection time", 2019 and later; the MIT
package ev2gym carries the same table). Between two knots leaving is equally likely at any time. The
longest 2 % are few and capped at three days there: past them the hazard is constant, with the
table's own mean, so that a car which has not moved for weeks gets a figure too.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import exp
from typing import Final, Literal

Parking = Literal["home", "public", "work"]
KINDS: Final[tuple[Parking, ...]] = ("home", "public", "work")
LEASE_PROBABILITY: Final = 0.9
"""A lease of full length ends before the car leaves so often: the 10th percentile of the rest of
its stay."""
STEP_S: Final = 60
"""Forecasts are whole minutes: the rest of a stay shrinks by the second, and each change of a
budget is an event."""

# Per cent of stays that last longer than so many tenths of an hour.
_PERCENT: Final = (99, 95, 90, 85, 80, 75, 70, 65, 60, 55, 50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 2)
_TENTHS_H: Final[dict[Parking, tuple[int, ...]]] = {
    "home": (
        *(5, 10, 15, 22, 31, 42, 65, 85, 95, 103),
        *(110, 118, 125, 132, 138, 146, 157, 174, 203, 293, 430),
    ),
    "public": (
        *(0, 3, 6, 10, 13, 17, 21, 25, 30, 36),
        *(44, 55, 74, 89, 104, 121, 135, 149, 171, 217, 388),
    ),
    "work": (
        *(0, 6, 13, 17, 20, 25, 29, 33, 38, 43),
        *(49, 57, 65, 74, 80, 85, 88, 92, 98, 132, 257),
    ),
}
_TAIL_MEAN_S: Final[dict[Parking, int]] = {"home": 50_400, "public": 40_860, "work": 78_930}


@dataclass(frozen=True, slots=True)
class _Curve:
    """Knots of the survival function, and what is below it up to each knot."""

    at_s: tuple[int, ...]
    left: tuple[float, ...]
    area_s: tuple[float, ...]
    tail_mean_s: int

    def survives(self, stay_s: float) -> float:
        """The share of stays that last longer than `stay_s`."""
        if stay_s >= self.at_s[-1]:
            return self.left[-1] * exp((self.at_s[-1] - stay_s) / self.tail_mean_s)
        at = bisect_right(self.at_s, stay_s) - 1
        share = (stay_s - self.at_s[at]) / (self.at_s[at + 1] - self.at_s[at])
        return self.left[at] + (self.left[at + 1] - self.left[at]) * share

    def area(self, stay_s: float) -> float:
        """The integral of `survives` from 0; at infinity it is the mean stay."""
        last = len(self.at_s) - 1
        at = min(bisect_right(self.at_s, stay_s) - 1, last)
        if at == last:
            beyond = self.tail_mean_s * (self.left[last] - self.survives(stay_s))
            return self.area_s[last] + beyond
        width = stay_s - self.at_s[at]
        return self.area_s[at] + width * (self.left[at] + self.survives(stay_s)) / 2

    @property
    def mean_s(self) -> float:
        return self.area_s[-1] + self.tail_mean_s * self.left[-1]


@lru_cache(maxsize=len(KINDS))
def _curve(kind: Parking) -> _Curve:
    knots = [
        (360 * tenths, percent / 100)
        for percent, tenths in zip(_PERCENT, _TENTHS_H[kind], strict=True)
    ]
    if knots[0][0]:
        knots.insert(0, (0, 1.0))
    areas = [0.0]
    for (a_s, a), (b_s, b) in pairwise(knots):
        areas.append(areas[-1] + (b_s - a_s) * (a + b) / 2)
    at_s, left = zip(*knots, strict=True)
    return _Curve(at_s, left, tuple(areas), _TAIL_MEAN_S[kind])


@dataclass(frozen=True, slots=True)
class Stay:
    """What is known of a car's stay; None is unknown."""

    kind: Parking | None = None
    """Unknown: whichever kind leaves sooner."""
    parked_s: int | None = None
    """Unknown: the car is met at a random moment of its stay, so rather of a long one."""
    departs_s: int | None = None
    """The next departure that car or owner has named, from now; it wins."""

    def stays_until(self, ahead_s: float) -> float:
        """The probability that the car is still here so many seconds from now."""
        if ahead_s <= 0:
            return 1.0
        if self.departs_s is not None:
            return float(ahead_s <= self.departs_s)
        kinds = KINDS if self.kind is None else (self.kind,)
        return min(self._stays(_curve(kind), ahead_s) for kind in kinds)

    def _stays(self, curve: _Curve, ahead_s: float) -> float:
        if self.parked_s is None:
            # The rest of a stay that is met at random has the density S(t) / mean (renewal theory:
            # Cox 1962, section 5.2).
            return max(0.0, 1 - curve.area(ahead_s) / curve.mean_s)
        parked_s = max(0, self.parked_s)
        # Past the last knot the hazard is constant: how long it is parked says nothing more, and
        # no quotient of two vanishing numbers is taken.
        parked_s = min(parked_s, curve.at_s[-1])
        return curve.survives(parked_s + ahead_s) / curve.survives(parked_s)

    def lease_s_at(self, probability: float, most_s: int) -> int:
        """The longest time, at most `most_s`, for which the car stays with this probability: the
        inverse of `stays_until`. Whole minutes, unless the departure is named."""
        if self.departs_s is not None:
            return max(0, min(most_s, self.departs_s))
        if self.stays_until(most_s) >= probability:
            return most_s
        low, high = 0, most_s // STEP_S + 1  # stays with it until `low`, without it until `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self.stays_until(middle * STEP_S) >= probability:
                low = middle
            else:
                high = middle
        return low * STEP_S
