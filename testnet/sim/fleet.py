"""A whole fleet placing tasks by idle tokens, as arrays: what the event simulator cannot reach.

    python -m testnet.sim.fleet --cars 1000000 --load 0.8 --seconds 11 --seed 1 --json

It is a second model of the rules, not the protocol's code: no placement decision of a car is made
here. The tests hold it against the protocol's own code at 10^4 cars, and against an exact event
model of the same rules; then it says what those cannot: whether the figures stay flat to 10^7.

The rules. A car with nothing to do has a token at its rendezvous. A task is offered to the
submitter's rendezvous, which assigns it to the nearest car of a draw of tokens. With no token it
passes the task on to the nearest rendezvous that it believes to have more than
`TOKENS_BELIEVED_LEAST` of them; with none such, the task waits, and the next token takes the first
that waits. Waiting tasks are passed on every `PUSH_S`. When its task has ended, a car sends its
token again. Times from submit to start:

    way(submitter, rendezvous) [+ way(rendezvous, other) ...] [+ wait] + way(rendezvous, car)

with `HANDLING_S` for each message, ways from `network.py` with its jitter.

What is simpler than the truth:

- Time goes in steps of `STEP_S`. Within a step tokens arrive before offers; no task starts before
  its token was there, so a step only decides who gets which token.
- Digests are all sent at once, every `DIGEST_S`, or after `DIGEST_CHANGE_S` where a rendezvous went
  dry or came back, and are believed one `DIGEST_CHANGE_S` later whatever the way.
- Nothing is lost, no car leaves, none refuses, all connections are open, one task a car. A token
  never expires (a run of seconds is shorter than its time to live).
- Queues have no bound, tokens are not lent in advance. Above 90 % load the times of the slowest
  hundredth depend on this and on the seed: read them as no more than an order of magnitude.
- Messages counted are those that place: offer, assign, token, forward, queued, digest. The words
  between submitter and car once a task has started (lease, result, receipt) are not.

The policy `limit` is no protocol: it knows every car at every moment and sends the task straight
to the nearest idle car of the submitter's cell, or else of the nearest cell that has one. It takes
each task by itself: who planned for all of them could still do better for the slowest thousandth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from . import network as networks
from .network import JITTER, METRO_CORE_US, Network
from .rendezvous_map import NEIGHBOURS, RendezvousMap, chart, shard_cars
from .report import write_report
from .result import QUANTILES, CellFigure, Result

POLICIES: Final = ("tokens", "limit")
STEP_S: Final = 0.005
MARGIN_S: Final = 1.0  # at either end of the run, not measured
HANDLING_S: Final = 0.001
DRAW: Final = 8  # tokens of which the nearest car gets the task; 0 for all of them
TOKENS_BELIEVED_LEAST: Final = 2
HOPS_MAX: Final = 4
DIGEST_S: Final = 1.0
DIGEST_CHANGE_S: Final = 0.05
PUSH_S: Final = 0.25
WINDOW_S: Final = PUSH_S  # of which the submitted tasks are drawn at once
SKEW: Final = 0.25  # of demand between metros: sigma of its logarithm
TASK_S: Final = 2.0
CARS_MAX: Final = 20_000_000  # about 300 bytes a car
SECONDS_MAX: Final = 600.0
CELLS_DRAWN_MAX: Final = 1_500
CORE_S: Final = METRO_CORE_US / 2e6

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(slots=True)
class Offers:
    """Tasks on their way to a rendezvous, or waiting there: one entry a task in every array."""

    at: Floats  # when it is there, s
    shard: Longs  # of the rendezvous
    submitted: Floats
    car: Longs  # the submitter
    hops: npt.NDArray[np.int8]  # that it may still be passed on

    def __len__(self) -> int:
        return len(self.at)

    def take(self, which: npt.NDArray[Any] | slice) -> Self:
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """All of them, the earliest first."""
        columns = [np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)]
        whole = cls(*columns)
        return whole.take(np.argsort(whole.at, kind="stable"))

    @classmethod
    def none(cls) -> Self:
        number = np.empty(0, np.int64)
        return cls(np.empty(0), number, np.empty(0), number, np.empty(0, np.int8))


def ranks(groups: npt.NDArray[Any]) -> Longs:
    """The how-manieth of its group each entry is; equal groups stand together."""
    if not len(groups):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    lengths = np.diff(np.concatenate((starts, [len(groups)])))
    return np.arange(len(groups)) - np.repeat(starts, lengths)


class Fleet:
    """One run's state. Times in seconds; a car is its number, a token its place in the shard."""

    def __init__(
        self,
        network: Network,
        load: float,
        seed: int,
        *,
        policy: str = "tokens",
        task_s: float = TASK_S,
        draw: int = DRAW,
        skew: float = SKEW,
        cars_a_rendezvous: int | None = None,
    ) -> None:
        self.network = network
        self.direct = policy == "limit"
        self.task_s, self.draw = task_s, 0 if self.direct else draw
        rng = self.rng = np.random.default_rng([seed, 0x666C6565])
        # the limit sees whole cells, and nobody in between
        most = networks.CELL_CARS_MAX if self.direct else cars_a_rendezvous
        self.map: RendezvousMap = chart(network, most or shard_cars(load, task_s), skew, rng)
        shards, cars = len(self.map), len(network)
        self.rate = cars * load / task_s
        width = int(np.diff(self.map.first).max())
        self.slots = np.zeros((shards, width), np.int16)  # tokens: which car of the shard
        self.miles = np.full((shards, width), np.inf, np.float32)  # its last mile; none: inf
        self.held = np.zeros(shards, np.int64)  # tokens
        self.believed = np.zeros((shards, NEIGHBOURS), np.int64)
        self.published = np.zeros(shards, np.int64)
        self.due = rng.uniform(0.0, DIGEST_S, shards)  # of the next digest
        self.receivers = (self.map.near >= 0).sum(axis=1)
        self.fresh: tuple[npt.NDArray[np.bool_], Longs] | None = None  # digests on their way
        self.offers = Offers.none()  # on their way; within a window, those known at its start
        self.passed: list[Offers] = []  # on their way from one rendezvous to another
        self.waiting = Offers.none()
        self.new: Longs = np.empty(0, np.int64)  # cars that got a task in this step
        self.soon: Longs = self.new  # cars that are ready again before the window ends
        self.counts = dict.fromkeys(("offer", "assign", "token", "forward", "queued", "digest"), 0)
        self.started: list[tuple[Floats, npt.NDArray[Any], npt.NDArray[Any]]] = []
        # In the steady state: `load` of the cars work, and what is left of their tasks is
        # exponential too. The others have their tokens out.
        self.ready = np.where(
            rng.random(cars) < load, rng.exponential(task_s, cars), -1.0
        )  # when a car's token is at its rendezvous
        self._hold(np.flatnonzero(self.ready < 0))
        self.believed[:] = self.held[self.map.near]
        self.published[:] = self.held

    # -- one window of time after another -----------------------------------------------------

    def run(self, seconds: float) -> None:
        windows = round(seconds / WINDOW_S)
        steps = round(WINDOW_S / STEP_S)
        for window in range(windows):
            start = window * WINDOW_S
            end = start + WINDOW_S
            self.offers = Offers.join([self.offers, self._submit(start)])
            back = np.flatnonzero((self.ready >= start) & (self.ready < end))
            back = back[np.argsort(self.ready[back], kind="stable")]
            self.soon = np.empty(0, np.int64)
            self.passed = []
            edges = start + STEP_S * np.arange(1, steps + 1)
            edges[-1] = end
            tokens = np.searchsorted(self.ready[back], edges)
            offers = np.searchsorted(self.offers.at, edges)
            token = offer = 0
            for step, edge in enumerate(edges.tolist()):
                self._step(edge, end, back[token : tokens[step]], slice(offer, offers[step]))
                token, offer = int(tokens[step]), int(offers[step])
            self._push(end)
            self.offers = Offers.join([self.offers.take(slice(offer, None)), *self.passed])

    def _submit(self, start: float) -> Offers:
        """The tasks that are submitted within the window, on their way."""
        rng, shards = self.rng, self.map
        counts = rng.multinomial(rng.poisson(self.rate * WINDOW_S), shards.weight)
        shard = np.repeat(np.arange(len(shards)), counts)
        size = np.diff(shards.first)[shard]
        car = shards.first[shard] + (rng.random(len(shard)) * size).astype(np.int64)
        submitted = start + WINDOW_S * rng.random(len(shard))
        if self.direct:
            at = submitted
        else:
            at = submitted + self._way(car, shard) + HANDLING_S
            self.counts["offer"] += len(shard)
        return Offers(at, shard, submitted, car, np.full(len(shard), HOPS_MAX, np.int8))

    def _step(self, edge: float, end: float, back: Longs, offers: slice) -> None:
        """What happens before `edge`: tokens come, offers come, digests go."""
        due = self.ready[self.soon] < edge
        if due.any():
            back = np.concatenate((back, self.soon[due]))
            self.soon = self.soon[~due]
        self._return(back)
        come = self.offers.take(offers)
        if self.passed:
            passed = Offers.join(self.passed)
            here = int(np.searchsorted(passed.at, edge))
            self.passed = [passed.take(slice(here, None))] if here < len(passed) else []
            come = Offers.join([come, passed.take(slice(here))])
        self._place(come)
        self.soon = np.concatenate((self.soon, self.new[self.ready[self.new] < end]))
        if self.direct:
            self._push(edge)
        elif round(edge / STEP_S) % round(DIGEST_CHANGE_S / STEP_S) == 0:
            self._digests(edge)

    # -- tokens -------------------------------------------------------------------------------

    def _return(self, cars: Longs) -> None:
        """Cars that ended their tasks: the first waiting task of the shard, or a token to hold."""
        self.new = np.empty(0, np.int64)
        if len(self.waiting) and len(cars):
            cars = cars[np.lexsort((self.ready[cars], self.map.car_shard[cars]))]
            shard = self.map.car_shard[cars].astype(np.int64)
            key = shard * 2**32 + ranks(shard)
            order = np.lexsort((self.waiting.at, self.waiting.shard))
            waiting = self.waiting.take(order)
            wanted = waiting.shard * 2**32 + ranks(waiting.shard)
            place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
            served = key[place] == wanted
            self._start(waiting.take(served), cars[place[served]])
            self.waiting = waiting.take(~served)
            cars = np.delete(cars, place[served])
        self._hold(cars)

    def _hold(self, cars: Longs) -> None:
        if not len(cars):
            return
        cars = np.sort(cars)  # by shard too
        shard = self.map.car_shard[cars].astype(np.int64)
        place = self.held[shard] + ranks(shard)
        self.slots[shard, place] = cars - self.map.first[shard]
        self.miles[shard, place] = self.map.mile_s[cars]
        np.add.at(self.held, shard, 1)

    def _draw(self, shard: Longs) -> Longs:
        """The nearest car of a draw of tokens in each of these shards, all different."""
        held = self.held[shard]
        if self.draw:
            places = (self.rng.random((len(shard), self.draw)) * held[:, None]).astype(np.int64)
            best = np.argmin(self.miles[shard[:, None], places], axis=1)
            place = places[np.arange(len(shard)), best]
        else:
            place = np.argmin(self.miles[shard], axis=1)
        car: Longs = self.map.first[shard] + self.slots[shard, place]
        last = held - 1  # fills the gap
        self.slots[shard, place] = self.slots[shard, last]
        self.miles[shard, place] = self.miles[shard, last]
        self.miles[shard, last] = np.inf
        self.held[shard] = last
        return car

    # -- tasks --------------------------------------------------------------------------------

    def _place(self, offers: Offers) -> None:
        """Each offer gets a token, goes on, or waits; those of one rendezvous one by one."""
        if not len(offers):
            return
        offers = offers.take(np.argsort(offers.shard, kind="stable"))
        nth = ranks(offers.shard)
        order = np.argsort(nth, kind="stable")
        ends = np.cumsum(np.bincount(nth))
        dry: list[Offers] = []
        first = 0
        for last in ends.tolist():
            now = offers.take(order[first:last])
            first = last
            some = self.held[now.shard] > 0
            if some.all():
                self._start(now, self._draw(now.shard))
                continue
            got = now.take(some)
            self._start(got, self._draw(got.shard))
            left = self._pass_on(now.take(~some), 0.0)
            if len(left):
                dry.append(left)
        if dry:
            self.counts["queued"] += sum(map(len, dry))
            self.waiting = Offers.join([self.waiting, *dry])

    def _start(self, offers: Offers, cars: Longs) -> None:
        """The rendezvous assigns; the car runs; its token is back in `ready`."""
        if not len(offers):
            return
        shard = self.map.car_shard[cars]
        token_s = self.ready[cars]
        begin = np.maximum(offers.at, token_s)
        if self.direct:
            begin = begin + self._between(offers.car, cars) + HANDLING_S
            back = begin + self.rng.exponential(self.task_s, len(cars))
        else:
            begin = begin + self._way(cars, shard) + HANDLING_S
            back = begin + self.rng.exponential(self.task_s, len(cars))
            back += self._way(cars, shard) + HANDLING_S
            self.counts["token"] += len(cars)
        self.counts["assign"] += len(cars)
        self.ready[cars] = back
        self.new = np.concatenate((self.new, cars))
        self.started.append(
            (
                offers.submitted,
                (begin - offers.submitted).astype(np.float32),
                self.map.cell[self.map.car_shard[offers.car]],
            )
        )

    def _pass_on(self, offers: Offers, now: float) -> Offers:
        """Sends each on to the nearest rendezvous believed to have tokens; returns the others.

        At most one offer a shard.
        """
        if not len(offers):
            return offers
        known = self.held[self.map.near[offers.shard]] if self.direct else None
        believed = self.believed[offers.shard] if known is None else known
        least = 0 if self.direct else TOKENS_BELIEVED_LEAST
        rich = (believed > least) & (self.map.near[offers.shard] >= 0)
        which = np.argmax(rich, axis=1)
        goes = rich.any(axis=1) & (offers.hops > 0)
        sent, which = offers.take(goes), which[goes]
        if len(sent):
            self.believed[sent.shard, which] -= 1
            if not self.direct:
                way = self.map.way_s[sent.shard, which] * self._jitter(len(sent))
                sent.at = np.maximum(sent.at, now) + way + HANDLING_S
                sent.hops = sent.hops - np.int8(1)
                self.counts["forward"] += len(sent)
            sent.shard = self.map.near[sent.shard, which].astype(np.int64)
            self.passed.append(sent)
        return offers.take(~goes)

    def _push(self, now: float) -> None:
        """Passes waiting tasks on where there are tokens by now; their hops count anew."""
        if not len(self.waiting):
            return
        waiting = self.waiting.take(np.lexsort((self.waiting.at, self.waiting.shard)))
        nth = ranks(waiting.shard)
        kept: list[Offers] = [Offers.none()]
        for turn in range(int(nth.max()) + 1):
            heads = waiting.take(nth == turn)
            heads.hops = np.ones_like(heads.hops)
            left = self._pass_on(heads, now)
            kept.append(left)
            if len(left) == len(heads):  # no head went on, so none behind it will
                kept.append(waiting.take(nth > turn))
                break
        self.waiting = Offers.join(kept)

    def _digests(self, now: float) -> None:
        """What was sent one tick ago is believed now; who is due or has changed sends."""
        sends = (self.due <= now) | ((self.published > 0) != (self.held > 0))
        if self.fresh is not None:
            senders, counts = self.fresh
            heard = senders[self.map.near]
            self.believed[heard] = counts[self.map.near][heard]
        self.fresh = (sends, self.held.copy())
        self.published[sends] = self.held[sends]
        self.due[sends] = now + DIGEST_S
        self.counts["digest"] += int(self.receivers[sends].sum())

    # -- ways ---------------------------------------------------------------------------------

    def _jitter(self, count: int) -> Floats:
        return 1.0 + JITTER * (2.0 * self.rng.random(count) - 1.0)

    def _way(self, cars: Longs, shard: npt.NDArray[np.integer[Any]]) -> Floats:
        """From cars to their rendezvous or back, s. A rendezvous is there already."""
        rendezvous = self.map.rendezvous[shard]
        way = self.map.mile_s[cars] + self.map.mile_s[rendezvous] + CORE_S
        return np.where(rendezvous == cars, 0.0, way * self._jitter(len(cars)))

    def _between(self, cars: Longs, others: Longs) -> Floats:
        """From cars straight to cars, s."""
        cells = (self.map.cell[self.map.car_shard[ends]] for ends in (cars, others))
        core = self.network.core_pairs_us(*cells) / 2e6
        way = self.map.mile_s[cars] + self.map.mile_s[others] + core
        return np.where(cars == others, 0.0, way * self._jitter(len(cars)))


def simulate(
    network: Network,
    load: float,
    seconds: float,
    seed: int,
    *,
    policy: str = "tokens",
    task_s: float = TASK_S,
    draw: int = DRAW,
    skew: float = SKEW,
    cars_a_rendezvous: int | None = None,
) -> Result:
    """Runs a fleet for so many seconds; measures those that are not within `MARGIN_S` of an end.

    The load is a share of the cars' time, `draw` 0 takes the nearest of all tokens. ValueError for
    numbers out of range.
    """
    if policy not in POLICIES:
        raise ValueError(f"{policy!r} is no policy of the fleet model: {', '.join(POLICIES)}")
    if not 0 < load < 1 or not 0.1 <= task_s <= 3_600 or draw < 0 or not 0 <= skew <= 2:
        raise ValueError("fleet: load within 0 and 1, tasks of 0.1 to 3600 s, skew of 0 to 2")
    if not 2 * MARGIN_S + 1 <= seconds <= SECONDS_MAX:
        raise ValueError(f"fleet: {2 * MARGIN_S + 1:g} to {SECONDS_MAX:g} seconds, not {seconds:g}")
    if len(network) > CARS_MAX:
        raise ValueError(f"fleet: at most {CARS_MAX} cars, not {len(network)}")
    begun = time.perf_counter()
    fleet = Fleet(
        network,
        load,
        seed,
        policy=policy,
        task_s=task_s,
        draw=draw,
        skew=skew,
        cars_a_rendezvous=cars_a_rendezvous,
    )
    fleet.run(seconds)
    submitted, latency, cell = (np.concatenate(c) for c in zip(*fleet.started, strict=True))
    last = seconds - MARGIN_S
    measured = (submitted >= MARGIN_S) & (submitted < last)
    left = np.concatenate((fleet.waiting.submitted, fleet.offers.submitted))
    unstarted = int(((left >= MARGIN_S) & (left < last)).sum())
    times = np.sort(latency[measured]) * 1e6
    total = len(submitted)
    return Result(
        policy=policy,
        engine="fleet",
        model=network.model,
        cars=len(network),
        load=load,
        seed=seed,
        task_s=task_s,
        simulated_s=seconds - 2 * MARGIN_S,
        tasks=len(times) + unstarted,
        unstarted=unstarted,
        latency_us=_at_quantiles(times),
        messages={kind: count / total for kind, count in sorted(fleet.counts.items()) if count},
        cells=_figures(network, cell[measured], latency[measured], fleet.rng),
        command=(
            f"python -m testnet.sim.fleet --model {network.model} --cars {len(network)} "
            f"--load {load:g} --seconds {seconds:g} --seed {seed} --policy {policy}"
            + (f" --task-s {task_s:g}" if task_s != TASK_S else "")
            + (f" --draw {draw}" if draw != DRAW else "")
            + (f" --skew {skew:g}" if skew != SKEW else "")
            + (f" --cars-a-rendezvous {cars_a_rendezvous}" if cars_a_rendezvous else "")
        ),
        wall_s=round(time.perf_counter() - begun, 3),
    )


def _at_quantiles(ordered: npt.NDArray[Any]) -> tuple[int, ...]:
    """The values at QUANTILES of what is sorted already, µs."""
    place = np.asarray(QUANTILES) * (len(ordered) - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, len(ordered) - 1)
    value = ordered[low] + (place - low) * (ordered[high].astype(np.float64) - ordered[low])
    return tuple(np.rint(value).astype(int).tolist())


def _figures(
    network: Network, cell: npt.NDArray[Any], latency: npt.NDArray[Any], rng: np.random.Generator
) -> tuple[CellFigure, ...]:
    """The cells of the map. Of more than `CELLS_DRAWN_MAX`, a sample."""
    arrays = network.arrays()
    names = network.cell_names
    chosen = np.arange(len(names))
    if len(chosen) > CELLS_DRAWN_MAX:
        chosen = np.sort(rng.choice(len(names), CELLS_DRAWN_MAX, replace=False))
    keep = np.isin(cell, chosen)
    cell, latency = cell[keep], latency[keep]
    order = np.argsort(cell, kind="stable")
    edges = np.searchsorted(cell[order], np.stack((chosen, chosen + 1)))
    latency = latency[order]
    return tuple(
        CellFigure(
            names[number],
            round(float(arrays["cell_x_km"][number]), 1),
            round(float(arrays["cell_y_km"][number]), 1),
            int(arrays["cell_cars"][number]),
            high - low,
            round(float(np.median(latency[low:high])) * 1e6) if high > low else 0,
        )
        for number, low, high in zip(chosen.tolist(), *edges.tolist(), strict=True)
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m testnet.sim.fleet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=networks.MODELS, default="continents")
    parser.add_argument("--cars", type=int, default=10_000)
    parser.add_argument("--load", type=float, default=0.8, help="share of the cars' time")
    parser.add_argument("--seconds", type=float, default=11.0, help="simulated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", choices=POLICIES, default="tokens")
    parser.add_argument("--task-s", type=float, default=TASK_S, help="mean")
    parser.add_argument("--draw", type=int, default=DRAW, help="tokens to choose of; 0: all")
    parser.add_argument("--skew", type=float, default=SKEW, help="of demand between metros")
    parser.add_argument("--cars-a-rendezvous", type=int, default=None)
    parser.add_argument("--report", metavar="PATH", help="also write a page that shows the result")
    parser.add_argument("--json", action="store_true", help="the whole result, cells too")
    asked = parser.parse_args(words)
    try:
        if asked.cars > CARS_MAX:
            raise ValueError(f"fleet: at most {CARS_MAX} cars, not {asked.cars}")
        result = simulate(
            networks.draw(asked.model, asked.cars, asked.seed),
            asked.load,
            asked.seconds,
            asked.seed,
            policy=asked.policy,
            task_s=asked.task_s,
            draw=asked.draw,
            skew=asked.skew,
            cars_a_rendezvous=asked.cars_a_rendezvous,
        )
        if asked.report:
            write_report([result], asked.report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(result.to_json()))
        return 0
    placed_s = asked.cars * asked.load / asked.task_s * asked.seconds / result.wall_s
    p50, p95, p99 = (result.quantile_us(share) / 1_000 for share in (0.5, 0.95, 0.99))
    print(
        f"{result.policy}: {result.cars} cars, load {result.load:g}, "
        f"{result.tasks} tasks measured\n"
        f"submit to start: p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms; "
        f"{result.unstarted} not started\n"
        f"messages a task: {result.messages_per_task:.2f} "
        f"({', '.join(f'{kind} {count:.2f}' for kind, count in result.messages.items())})\n"
        f"{result.wall_s:.1f} s of wall time, {placed_s:,.0f} tasks a second"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
