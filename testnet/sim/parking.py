"""When cars stand still, where, and until when: seeded traces from published distributions.

A car alternates between a stay (home, work or public) and a drive: a semi-Markov chain whose next
kind depends on the hour and on whether it is a weekday. Flow: the event simulator reads
`events`, the vectorised models the arrays of `Stays`.

Where the numbers come from:

- Stays and arrivals. ElaadNL, Open datasets for electric mobility research (2020): connection time
  of charging sessions by kind of place, arrivals by quarter of an hour on weekdays and weekends,
  and mean session length by hour of arrival, as they are packaged in EV2Gym 2.0.0 (MIT). Read here
  at 24 quantiles and summed to hours. A session at a charger stands for every stay: no published
  table says how long cars stand where they do not charge.
- Drives. RAC Foundation, "Spaced Out" (2012): 18 trips a week of 20 minutes, so parked 96 %.
- Plugged in. UK Department for Transport and Ipsos: drivers charge once or twice a week, which is
  10 to 25 % of their parked time. `PLUGGED_SHARE` of the stays, whatever their kind.

A stay is drawn by inverse CDF. Its quantile is tied to the hour of arrival: the hours with the
longer mean stays get the upper part of the distribution in `HOUR_TIES` of the draws, as wide as the
share that arrives then, so that evening arrivals stay the night. Of `CHOICES` such draws one is
taken, by how many cars arrive anywhere at the hour when it ends. Both are fitted, with the weights
of the kinds: the arrival peaks and the chances that a parked car leaves come out near the published
ones for home and work (within 6 %); for public places the chances come out a quarter too high.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from meshnode.protocol.forecast import Parking

KINDS: Final[tuple[Parking, ...]] = ("home", "work", "public")
PLUGGED_SHARE: Final = 0.15
HOUR_TIES: Final = 0.4
CHOICES: Final = 3
DRIVE_MEDIAN_S: Final = 17 * 60.0  # log-normal: 20 minutes in the mean
DRIVE_SIGMA: Final = 0.57
HOUR_S: Final = 3_600.0
DAY_S: Final = 86_400.0
WARM_UP_DAYS: Final = 7  # before time 0: twice the longest stay, and the same weekday again
STAYS_MAX: Final = 50_000_000  # of one draw: what fits in memory

# Hours within which this share (STAY_AT) of the stays has ended.
STAY_AT: Final = (
    *(0, 0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50),
    *(0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 1),
)
STAY_H: Final = {
    "home": (
        *(0.0, 0.6, 1.0, 1.5, 2.2, 3.1, 4.2, 6.5, 8.5, 9.5, 10.3, 11.0),
        *(11.8, 12.5, 13.2, 13.8, 14.6, 15.7, 17.4, 20.3, 29.3, 43.0, 56.5, 72.0),
    ),
    "work": (
        *(0.0, 0.0, 0.6, 1.2, 1.7, 2.0, 2.5, 2.9, 3.3, 3.8, 4.3, 4.9),
        *(5.7, 6.5, 7.4, 8.0, 8.5, 8.8, 9.2, 9.8, 13.2, 25.7, 46.4, 72.0),
    ),
    "public": (
        *(0.0, 0.1, 0.3, 0.6, 1.0, 1.3, 1.7, 2.1, 2.5, 3.0, 3.6, 4.4),
        *(5.5, 7.4, 8.9, 10.4, 12.1, 13.5, 14.9, 17.1, 21.7, 38.8, 44.9, 72.0),
    ),
}
# Arrivals a thousand, by hour of the day.
ARRIVALS: Final = {
    "home": (
        *(21, 5, 2, 1, 1, 1, 2, 6, 14, 11, 11, 15),
        *(22, 22, 27, 37, 57, 121, 170, 115, 91, 89, 91, 66),
    ),
    "work": (
        *(0, 0, 0, 0, 1, 14, 43, 143, 267, 181, 77, 49),
        *(54, 53, 40, 30, 20, 10, 6, 5, 3, 1, 1, 0),
    ),
    "public": (
        *(10, 5, 2, 2, 2, 2, 7, 32, 79, 77, 51, 47),
        *(53, 53, 50, 51, 57, 83, 109, 81, 51, 40, 34, 23),
    ),
}
ARRIVALS_WEEKEND: Final = {
    "home": (
        *(41, 20, 8, 3, 2, 1, 1, 4, 9, 17, 30, 48),
        *(60, 62, 62, 69, 88, 102, 79, 65, 68, 62, 58, 41),
    ),
    "work": (0,) * 24,
    "public": (
        *(20, 12, 6, 4, 3, 3, 3, 6, 17, 37, 57, 70),
        *(79, 82, 85, 83, 80, 80, 73, 58, 49, 39, 31, 22),
    ),
}
# Mean hours of a stay that begins in this hour; where nothing was recorded, the nearest that was.
MEAN_STAY_H: Final = {
    "home": (
        *(9.1, 8.9, 7.2, 5.7, 4.7, 4.3, 4.6, 4.5, 3.2, 3.5, 3.4, 3.8),
        *(4.2, 4.7, 7.0, 14.9, 15.3, 14.7, 13.8, 13.0, 12.2, 11.2, 10.2, 9.6),
    ),
    "work": (
        *(8.2, 8.2, 8.2, 8.2, 8.2, 8.2, 8.5, 8.4, 7.8, 6.2, 4.8, 4.0),
        *(3.7, 3.2, 2.6, 2.2, 2.1, 2.6, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5),
    ),
    "public": (
        *(10.0, 9.9, 9.5, 8.4, 6.8, 5.6, 5.2, 5.2, 4.9, 4.0, 3.0, 2.8),
        *(3.0, 3.0, 3.0, 3.5, 4.7, 10.9, 12.4, 11.7, 11.3, 11.1, 10.5, 10.1),
    ),
}
# How arrivals anywhere divide: an assumption. It gives cars 74 % of their time at home, 22 % parked
# elsewhere and 18 trips a week (73, 23 and 18: RAC Foundation, as above and for England, 2021).
KIND_WEIGHT: Final = {"home": 1.0, "work": 0.4, "public": 0.175}

Floats = npt.NDArray[np.float64]
Event = tuple[float, int, Literal["arrive", "leave"], str]


@dataclass(frozen=True, slots=True)
class Stays:
    """Every stay of a fleet within a time, in no order. All arrays have one entry a stay."""

    cars: int
    until_s: float
    car: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int8]  # of KINDS
    arrive_s: Floats  # below 0: was there when the time began
    leave_s: Floats  # above until_s: still there when it ended
    plugged: npt.NDArray[np.bool_]

    def parked_at(self, at_s: float) -> npt.NDArray[np.bool_]:
        """Which stays go on at this time."""
        return (self.arrive_s <= at_s) & (at_s < self.leave_s)


def draw(
    cars: int, until_s: float, seed: int, *, start_s: float = 0.0, plugged: float = PLUGGED_SHARE
) -> Stays:
    """The stays of `cars` cars from time 0 to `until_s`, in a fleet that has driven for a week.

    Time 0 is `start_s` seconds after the midnight at which a Monday begins. ValueError for
    numbers out of range, or for more stays than `STAYS_MAX`.
    """
    if cars < 1 or until_s < 0 or not 0 <= plugged <= 1:
        raise ValueError("parking: at least one car, no negative time, a share within 0 and 1")
    if cars * (2 + 3 * until_s / DAY_S) > STAYS_MAX:
        raise ValueError(f"parking: {cars} cars for {until_s:g} s are over {STAYS_MAX} stays")
    rng = np.random.default_rng([seed, 0x7061726B])
    # The chain begins in the night before, everyone at home, and forgets it in the warm-up.
    ids = np.arange(cars, dtype=np.int32)
    now = rng.uniform(-6 * HOUR_S, 0.0, cars) - WARM_UP_DAYS * DAY_S
    kind = np.zeros(cars, np.int8)
    rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int8], Floats, Floats]] = []
    while len(ids):
        leave = _leaving_s(kind, now, start_s, rng)
        seen = leave > 0
        rows.append((ids[seen], kind[seen], now[seen], leave[seen]))
        now = leave + rng.lognormal(np.log(DRIVE_MEDIAN_S), DRIVE_SIGMA, len(ids))
        kind = _next_kinds(now + start_s, rng)
        going = now < until_s
        ids, now, kind = ids[going], now[going], kind[going]
    car, kinds, arrive, left = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Stays(cars, until_s, car, kinds, arrive, left, rng.random(len(car)) < plugged)


def events(stays: Stays) -> Iterator[Event]:
    """(at_s, car, "arrive" or "leave", kind) in the order of time; ties by car, leaving first.

    Cars that stand there at the beginning arrive at 0; those that stay beyond the end never leave.
    """
    leaving = stays.leave_s <= stays.until_s
    at = np.concatenate((np.maximum(stays.arrive_s, 0.0), stays.leave_s[leaving]))
    car = np.concatenate((stays.car, stays.car[leaving]))
    kind = np.concatenate((stays.kind, stays.kind[leaving]))
    arrives = np.arange(len(at)) < len(stays.car)
    order = np.lexsort((arrives, car, at))
    for number in order.tolist():
        what: Literal["arrive", "leave"] = "arrive" if arrives[number] else "leave"
        yield float(at[number]), int(car[number]), what, KINDS[kind[number]]


def leaves_within(kind: str, within_s: float) -> float:
    """P(a car seen at a random instant of a stay of this kind leaves within so long).

    The inspection paradox: E[min(stay, t)] / E[stay] over the table of stays.
    """
    share = np.linspace(0.0, 1.0, 100_001)
    stay = np.interp(share, STAY_AT, STAY_H[kind]) * HOUR_S
    return float(np.minimum(stay, within_s).mean() / stay.mean())


def _leaving_s(
    kind: npt.NDArray[np.int8], now: Floats, start_s: float, rng: np.random.Generator
) -> Floats:
    """When stays that begin `now` end: one of `CHOICES` draws, by how many arrive anywhere then.

    Nobody drives at four in the morning only because a quantile says so.
    """
    drawn = np.stack([now + _stays_s(kind, now + start_s, rng) for _ in range(CHOICES)])
    weight = _arrivals()[_weekend(drawn + start_s), :, _hour(drawn + start_s)].sum(axis=-1)
    edge = np.cumsum(weight, axis=0)
    picked = (rng.random(len(now)) * edge[-1] >= edge[:-1]).sum(axis=0)
    leaving: Floats = drawn[picked, np.arange(len(now))]
    return leaving


def _stays_s(kind: npt.NDArray[np.int8], at_s: Floats, rng: np.random.Generator) -> Floats:
    """How long stays of these kinds that begin at these times last, seconds."""
    hour = _hour(at_s)
    low, high = _bands()
    share = rng.random(len(kind))
    tied = rng.random(len(kind)) < HOUR_TIES
    band = low[kind, hour] + share * (high[kind, hour] - low[kind, hour])
    share = np.where(tied, band, share)
    stay = np.empty(len(kind))
    for number, name in enumerate(KINDS):
        mine = kind == number
        stay[mine] = np.interp(share[mine], STAY_AT, STAY_H[name])
    return stay * HOUR_S


def _bands() -> tuple[Floats, Floats]:
    """For each kind and hour, which part of the distribution its tied stays come from.

    Hours in the order of their mean stays, each as wide as its share of the arrivals of a week.
    """
    low, high = np.zeros((3, 24)), np.zeros((3, 24))
    for number, name in enumerate(KINDS):
        arrivals = 5 * np.asarray(ARRIVALS[name]) + 2 * np.asarray(ARRIVALS_WEEKEND[name])
        order = np.argsort(MEAN_STAY_H[name], kind="stable")
        edge = np.cumsum(arrivals[order]) / arrivals.sum()
        high[number, order] = edge
        low[number, order] = np.concatenate(([0.0], edge[:-1]))
    return low, high


def _next_kinds(at_s: Floats, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Where cars that arrive at these times arrive.

    By the published arrivals of that hour, wherever they were. From home to home is a round trip.
    """
    weight = _arrivals()[_weekend(at_s), :, _hour(at_s)]  # cars x kinds
    edge = np.cumsum(weight, axis=1)
    drawn = rng.random(len(at_s)) * edge[:, -1]
    picked: npt.NDArray[np.int8] = (drawn[:, None] >= edge[:, :2]).sum(axis=1).astype(np.int8)
    return picked


def _arrivals() -> Floats:
    """How many arrive: day (0 in the week, 1 at the weekend) x kind x hour."""
    return np.array(
        [
            [np.asarray(table[name]) * KIND_WEIGHT[name] + 1e-3 for name in KINDS]
            for table in (ARRIVALS, ARRIVALS_WEEKEND)
        ]
    )


def _hour(at_s: Floats) -> npt.NDArray[np.int64]:
    return (np.floor(at_s / HOUR_S) % 24).astype(np.int64)


def _weekend(at_s: Floats) -> npt.NDArray[np.int64]:
    return (np.floor(at_s / DAY_S) % 7 >= 5).astype(np.int64)
