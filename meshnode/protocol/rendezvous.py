"""The rendezvous role: idle tokens on one side, placements on the other, and who gets which.

Any car may hold it for an epoch, because hashing says so. It keeps nothing but tokens that expire
and a short queue, and can forge neither side's word: cars and submitters sign. A placement takes
the best token at once; without one it goes on to a rendezvous that says it has some, else it waits
in its submitter's line, and the next token serves the lines in turn. Inputs never come here.

Place -> Assign (to the car) | Place (on, one hop more) | Queued | Refuse
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from .advert import AdvertBook
from .cell import MOMENTS_CARS_MAX, Roster, epoch_of
from .codec import digest
from .job import spec_bytes, task_digest, wanted
from .messages import Assign, Place, Queued, Refuse, Rest, Revoke, Tally
from .objects import T_OFFER, T_TOKEN, Offer, OfferKind, Token
from .outbox import Outbox, remember
from .placement import AdvertPlacement
from .reasons import Reason
from .reserve import Reserve
from .sealed import Sealed, unseal
from .stage import Key, Placement, Stage
from .tallies import Tallies
from .types import CLOCK_SKEW_MS_MAX, Digest, Lane, Peer, TaskId

TOKENS_PER_CAR_MAX: Final = 8  # held of one car, whatever its advert says
ASSIGNED_MAX: Final = 4096  # placements whose outcome we may still hear of
TRIES_MAX: Final = 4  # cars that refuse one placement before its submitter is told
LATE_MAX: Final = 16  # the same, where a run of another way came first: BUSY, EXPIRED
SENT_MAX: Final = 8  # times that one placement is sent on in all
ASKED_MAX: Final = 2  # other rendezvous that a placement is sent on to before it waits here
DRAWN_MAX: Final = 8  # tokens looked at for one placement
LONG_RUN_MS: Final = 60_000  # of such a run and longer not the nearest car is looked for
SAME_PART: Final = 1_000  # of a run: by so much of it no car is nearer than another
SPARE_TOKENS: Final = 2  # that a rendezvous keeps for its own cell
HEDGE_PART: Final = 10
"""A hedge gets a token only where more than one in so many of the cars served are idle: it computes
what is being computed. At 95 % load hedges that took any token made p99 three times as long."""
TALLY_MS: Final = 2_000  # how often other rendezvous hear what can be spared here
FIRST_TALLY_MS: Final = 20  # after a rest: what else comes goes with it
PUSH_MS: Final = 250  # how often what waits is offered to neighbours
QUEUED_MS: Final = 1_000  # how often who waits is told that it still does
SENT_ON_MS: Final = 50  # and so many round trips to whom a placement was sent on, a word takes
SENT_ON_RTTS: Final = 3
DRY_MS: Final = 250  # least time between two cries that the tokens have run out
ANSWERS_MS: Final = 1_000  # so long a car that was assigned something may say no
AGAIN_MS: Final = 100  # the same placement sooner than that is a duplicate

TOO_LATE: Final = frozenset({Reason.BUSY, Reason.EXPIRED})


@dataclass(frozen=True, slots=True)
class Held:
    """An idle token, while its car is connected."""

    token: Token
    sealed: Sealed
    until_mono_ms: int


class Rendezvous:
    """`rtt_us` of a connected peer, None if it is not connected; `reach` connects to one."""

    def __init__(
        self,
        outbox: Outbox,
        book: AdvertBook,
        roster: Roster,
        rtt_us: Callable[[Peer], int | None],
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._book = book
        self._roster = roster
        self._rtt_us = rtt_us
        self._reach = reach
        self.in_step: Callable[[Peer, Peer], bool] = lambda one, other: True
        """Whether two clocks are near enough for their owners to work together."""
        self._tokens: dict[Digest, Held] = {}
        self._by_car: dict[Peer, deque[Digest]] = {}
        self._lines: OrderedDict[Peer, deque[Placement]] = OrderedDict()  # submitter -> waiting
        self._queued = 0
        self._placed: OrderedDict[Key, Placement] = OrderedDict()
        self._tallies = Tallies(outbox, book, roster, rtt_us)
        self._tally_mono_ms = 0
        self._push_mono_ms = 0
        self._dry_mono_ms = -DRY_MS  # when we last said so
        self._reserve = Reserve()
        self._told: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        return len(self._tokens)

    @property
    def queued(self) -> int:
        return self._queued

    # ---- who hangs on this role

    def depositors(self) -> set[Peer]:
        return set(self._by_car)

    def tellers(self) -> set[Peer]:
        """Other rendezvous that say what they have."""
        return self._tallies.tellers()

    def origins(self) -> set[Peer]:
        """Who asked for a car here not long ago."""
        return {placement.origin for placement in self._placed.values()}

    def owed(self) -> set[Peer]:
        """Who waits in line, and who was sent a placement a moment ago and may say no."""
        waiting = {placement.origin for line in self._lines.values() for placement in line}
        since_ms = self._out.now.mono_ms - ANSWERS_MS
        for placement in reversed(self._placed.values()):
            if placement.came_mono_ms < since_ms:
                break
            if placement.to is not None:
                waiting |= {placement.to, placement.origin}
        return waiting

    # ---- tokens

    def on_token(self, peer: Peer, sealed: Sealed) -> None:
        """A car deposits one of its idle slots."""
        token = sealed.open(Token, T_TOKEN)
        reason = self._sound(peer, sealed, token)
        if reason is not Reason.OK:
            self._out.counters[f"tokens_refused_{reason.name.lower()}"] += 1
            return
        now = self._out.now
        left_ms = min(token.not_after_ms - now.unix_ms, self._out.limits.token_ttl_ms)
        held = Held(token, sealed, now.mono_ms + left_ms)
        waiting = self._next_for(held)
        if waiting is not None:
            self._assign(waiting, held)
            return
        known = self._book.cars.get(peer)
        most = min(TOKENS_PER_CAR_MAX, known.advert.slots if known else 1)
        mine = self._by_car.setdefault(peer, deque())
        while len(mine) >= most:  # it renews what it has here
            self._drop(mine[0])
            mine = self._by_car.setdefault(peer, deque())
        if len(self._tokens) >= self._out.limits.tokens_held_max:
            self._out.counters["tokens_refused_full"] += 1
            return
        self._wake()
        mine.append(sealed.digest)
        self._tokens[sealed.digest] = held
        epoch = epoch_of(now.unix_ms)
        _, posts = self._shape()
        if token.sleeps and self._reserve.one_too_many(peer, epoch, *self._idle_and_busy(), posts):
            self._out.post(peer, Lane.CONTROL, Rest(sealed.digest))

    def _wake(self) -> None:
        """Others hear of what comes after a rest, not put off by what comes behind it."""
        if not self._tokens and not self._queued:
            soon_ms = self._out.now.mono_ms + FIRST_TALLY_MS
            self._tally_mono_ms = max(self._tally_mono_ms, soon_ms)

    def _sound(self, peer: Peer, sealed: Sealed, token: Token) -> Reason:
        now = self._out.now.unix_ms
        if sealed.kid != peer or token.peer != peer or token.announce_id is not None:
            return Reason.NOT_YOURS
        if token.network != self._out.identity.network:
            return Reason.OTHER_NETWORK
        horizon = now + self._out.limits.token_ttl_ms + CLOCK_SKEW_MS_MAX
        if not now < token.not_after_ms <= horizon:
            return Reason.EXPIRED
        if sealed.digest in self._tokens:
            return Reason.DUPLICATE
        if not self._out.limits.rendezvous_cars:
            return Reason.NOT_PROVIDING
        return Reason.OK

    def on_revoke(self, peer: Peer, revoke: Revoke) -> None:
        held = self._tokens.get(revoke.token)
        if held is not None and held.token.peer == peer:
            self._drop(revoke.token)

    def peer_ready(self, peer: Peer) -> None:
        """Another of our cell, which may have what waits here, or wait for what is here."""
        if (self._tokens or self._queued) and self._tallies.ours(peer) and self._tallies.elected():
            self._out.send(peer, Lane.CONTROL, self._tally(peer))

    def peer_down(self, peer: Peer) -> None:
        for token in list(self._by_car.get(peer, ())):
            self._drop(token)
        self._tallies.forget(peer)
        for waiting in list(self._lines.get(peer, ())):
            self._unqueue(waiting)
            self._end(waiting)

    def _drop(self, token: Digest) -> None:
        held = self._tokens.pop(token)
        mine = self._by_car[held.token.peer]
        mine.remove(token)
        if not mine:
            del self._by_car[held.token.peer]

    # ---- placements

    def on_place(self, peer: Peer, place: Place) -> None:
        """A submitter wants a car, or another rendezvous has none for it."""
        sealed = unseal(place.offer)
        offer = sealed.open(Offer, T_OFFER)
        reason = self._welcome(peer, sealed, offer, place)
        job_digest = digest(spec_bytes(offer.job))
        task = TaskId(task_digest(job_digest, *offer.task, offer.replica)[:16])
        key = (task, offer.attempt)
        if reason is not Reason.OK:
            self._out.counters[f"places_refused_{reason.name.lower()}"] += 1
            self._out.post(peer, Lane.CONTROL, Refuse(task, offer.attempt, reason))
            return
        now_ms = self._out.now.mono_ms
        known = self._placed.get(key)
        if known is not None:
            if known.to is None or now_ms < known.came_mono_ms + AGAIN_MS:
                return  # it waits, or has just gone out
            known.refused_by.add(known.to)  # nothing came of it there
            self._tallies.had_none(known.to)
            self._end(known)
        # A line is for those who came here themselves: what is lent comes of the surplus.
        wait_ms = 0 if place.hops else min(place.wait_ms, self._out.limits.queue_ms_max)
        placement = Placement(
            place,
            offer,
            key,
            peer,
            wanted(offer.job),
            now_ms,
            now_ms + wait_ms,
            refused_by=known.refused_by if known else set(),
        )
        remember(self._placed, key, placement, ASSIGNED_MAX)
        self._out.counters["places"] += 1
        self._find(placement)

    def _welcome(self, peer: Peer, sealed: Sealed, offer: Offer, place: Place) -> Reason:
        if not self._out.limits.rendezvous_cars:
            return Reason.NOT_PROVIDING
        if not sealed.kid == offer.requester == offer.job.requester:
            return Reason.NOT_YOURS
        if place.hops == 0 and peer != offer.requester:
            return Reason.NOT_YOURS
        if offer.provider is not None or offer.token is not None:
            return Reason.NOT_YOURS
        network = self._out.identity.network
        if offer.network != network or offer.job.network != network:
            return Reason.OTHER_NETWORK
        if offer.not_after_ms <= self._out.now.unix_ms:
            return Reason.EXPIRED
        return Reason.OK

    def _find(self, placement: Placement) -> None:
        # What another cell sends is served from the surplus, however old the tally that it heard:
        # else a full network takes the long ways, and is fuller by them (trunk reservation).
        hedge = placement.offer.kind is OfferKind.HEDGE
        near = not placement.place.hops or self._spare(placement.origin)
        held = self._best(placement) if near and not (hedge and self._scarce()) else None
        if held is not None:
            self._drop(held.sealed.digest)
            self._assign(placement, held)
        elif hedge:
            self._give_up(placement, Reason.NO_TOKEN)
        elif not self._send_on(placement):
            self._queue(placement)
        self._count()

    def _scarce(self) -> bool:
        cars, posts = self._shape()
        return len(self._by_car) * HEDGE_PART * posts <= cars

    def _count(self) -> None:
        """Cars that are idle here, whatever their slots; and no more than fall to each of us."""
        cars, posts = self._shape()
        idle = min(len(self._by_car), -(-cars // posts))
        self._reserve.count(idle, self._out.now.mono_ms)

    def _idle_and_busy(self) -> tuple[int, int]:
        """Cars of the cell that could work and do not, asleep or awake, and those that do: by the
        adverts heard here, those not heard being like those that are. Where adverts do not say it
        all cars count as either."""
        cell = self._out.identity.cell
        cars = self._roster.cars(cell)
        if cars > MOMENTS_CARS_MAX:
            return cars, cars
        heard = [k.advert for k in self._book.cars.values() if k.advert.cell == cell]
        able = [each for each in heard if each.budget.may_run]
        busy = sum(not each.slots_free for each in able)
        idle = len(able) - busy + sum(each.budget.reason is Reason.ASLEEP for each in heard)
        idle, busy = (-(-count * cars // max(1, len(heard))) for count in (idle, busy))
        return idle, busy

    def _shape(self) -> tuple[int, int]:
        """Cars of the cell, and how many rendezvous serve them."""
        cell, epoch = self._out.identity.cell, epoch_of(self._out.now.unix_ms)
        posts = sum(len(ranks) for ranks in self._roster.posts(cell, epoch))
        return self._roster.cars(cell), max(1, posts)

    def _fits(self, placement: Placement, held: Held) -> bool:
        offer, car = placement.offer, held.token.peer
        if car == placement.submitter or car in placement.refused_by:
            return False
        if placement.place.avoid and car in placement.place.avoid:
            return False
        if not self.in_step(car, placement.submitter):
            return False
        known = self._book.cars.get(car)
        if known is not None:
            memory_mb = max((c.memory_mb for c in known.advert.classes), default=0)
            if offer.job.memory_mb_max > memory_mb:
                return False
        run_ms = placement.place.unit_ms * offer.run.size
        return offer.job.steps is not None or run_ms <= held.token.task_s_max * 1000

    def _best(self, placement: Placement) -> Held | None:
        """Of a few tokens the one whose car is nearest, a warm one unless it is much farther.

        Of a few: the best of all would be the same car's time and again, and no nearer to a
        submitter whose own way here is the larger part. Of a run of minutes a few milliseconds are
        nothing: there every car has its turn, or the near ones would work all day, and the far
        ones wait awake for work that never comes.
        """
        run_ms = placement.place.unit_ms * placement.offer.run.size
        best: tuple[tuple[int, int], Held] | None = None
        looked = 0
        for held in self._tokens.values():
            if not self._fits(placement, held):
                continue
            looked += 1
            rtt_us = self._rtt_us(held.token.peer) or 0
            if run_ms >= LONG_RUN_MS:
                rtt_us -= rtt_us % (run_ms * 1_000 // SAME_PART)
            cold = AdvertPlacement.FARTHER_US * (not self._warm(placement, held.token.peer))
            key = (rtt_us + cold, -held.token.rate_mflops)
            if best is None or key < best[0]:
                best = (key, held)
            if looked >= DRAWN_MAX:
                break
        return best[1] if best else None

    def _warm(self, placement: Placement, car: Peer) -> bool:
        known = self._book.cars.get(car)
        return known is not None and all(p in known.advert.cached for p in placement.consts)

    def _assign(self, placement: Placement, held: Held) -> None:
        placement.move(Stage.ASSIGNED, held.token.peer)
        placement.came_mono_ms = self._out.now.mono_ms
        self._out.counters["assigned"] += 1
        assign = Assign(held.sealed.wire, placement.place.offer, placement.place.addrs)
        self._out.post(held.token.peer, Lane.CONTROL, assign)

    def _send_on(self, placement: Placement) -> bool:
        """To a neighbour that says it has tokens to spare: the nearest of them."""
        tired = len(placement.asked) >= ASKED_MAX or placement.sent >= SENT_MAX
        if placement.place.hops > 0 or tired:
            return False  # one hop: what was sent on comes back with a no
        peer = self._tallies.take_one(placement.refused_by | placement.asked)
        if peer is None:
            return False
        placement.asked.add(peer)
        placement.sent += 1
        placement.move(Stage.SENT_ON, peer)
        placement.came_mono_ms = self._out.now.mono_ms
        on = replace(placement.place, hops=1, wait_ms=0)
        self._out.counters["places_sent_on"] += 1
        self._out.send(peer, Lane.CONTROL, on)
        # A car of another cell may be farther than its submitter waits for a word of ours; one that
        # has to dial first says so in that time.
        within_ms = SENT_ON_MS + SENT_ON_RTTS * (self._rtt_us(peer) or 0) // 1000
        within_ms = min(within_ms, QUEUED_MS)
        self._say_queued(placement, 0, within_ms)
        return True

    def on_refuse(self, peer: Peer, refuse: Refuse) -> bool:
        """A car or a neighbour does not take what it was sent; False if that is not our affair."""
        placement = self._placed.get((refuse.task_id, refuse.attempt))
        if placement is None or placement.to != peer:
            return False
        sent_on = placement.stage is Stage.SENT_ON
        placement.move(Stage.SOUGHT)
        if refuse.reason in TOO_LATE and not sent_on:
            placement.late += 1  # its next token says that it is idle again
        elif not sent_on:
            placement.refused_by.add(peer)
        if sent_on:
            self._tallies.had_none(peer)
        if len(placement.refused_by) >= TRIES_MAX or placement.late >= LATE_MAX:
            self._give_up(placement, refuse.reason)
        else:
            self._find(placement)
        return True

    def on_queued(self, peer: Peer, queued: Queued) -> bool:
        """A car has taken it and is not connected to its submitter, who would give it up before
        the lease comes; or a neighbour says so. Once: nobody holds a task up by saying it again."""
        placement = self._placed.get((queued.task_id, queued.attempt))
        if placement is None or placement.to != peer or placement.slow == peer:
            return False
        placement.slow = peer
        self._say_queued(placement, 0)
        return True

    def on_cancel(self, peer: Peer, task_id: TaskId, attempt: int) -> None:
        placement = self._placed.get((task_id, attempt))
        if placement is not None and placement.origin == peer:
            self._unqueue(placement)
            self._end(placement)

    # ---- the queue

    def _queue(self, placement: Placement) -> None:
        limits = self._out.limits
        line = self._lines.setdefault(placement.submitter, deque())
        if (
            placement.until_mono_ms <= self._out.now.mono_ms
            or not self._tallies.elected()
            or self._queued >= limits.placements_queued_max
            or len(line) >= limits.placements_queued_per_submitter_max
        ):
            if not line:
                del self._lines[placement.submitter]
            self._give_up(placement, Reason.NO_TOKEN)
            return
        self._wake()
        if not self._queued:
            self._push_mono_ms = self._out.now.mono_ms + FIRST_TALLY_MS
        at = len(line)
        while at and line[at - 1].until_mono_ms > placement.until_mono_ms:
            at -= 1  # what neighbours have refused has its place again
        line.insert(at, placement)
        placement.asked.clear()
        self._queued += 1
        placement.move(Stage.QUEUED)
        if self._queued == 1 and self._dry_mono_ms + DRY_MS <= self._out.now.mono_ms:
            self._dry_mono_ms = self._out.now.mono_ms
            self._tell()
        self._say_queued(placement, len(line) - 1)

    def _say_queued(
        self, placement: Placement, position: int, within_ms: int | None = None
    ) -> None:
        placement.said_mono_ms = self._out.now.mono_ms
        queued = Queued(placement.key[0], placement.key[1], position, within_ms)
        self._out.post(placement.origin, Lane.CONTROL, queued)

    def _unqueue(self, placement: Placement) -> None:
        line = self._lines.get(placement.submitter)
        if line is not None and placement in line:
            line.remove(placement)
            self._queued -= 1
            if not line:
                del self._lines[placement.submitter]

    def _give_up_all(self) -> None:
        for line in list(self._lines.values()):
            for placement in list(line):
                self._unqueue(placement)
                self._give_up(placement, Reason.NO_TOKEN)

    def _next_for(self, held: Held) -> Placement | None:
        """The first of a line that the token fits; the lines take turns, so that a flood of one
        submitter waits behind itself."""
        for submitter, line in self._lines.items():
            for placement in line:
                if self._fits(placement, held):
                    self._unqueue(placement)
                    if submitter in self._lines:
                        self._lines.move_to_end(submitter)
                    return placement
        return None

    def _end(self, placement: Placement) -> None:
        placement.move(Stage.OVER)
        self._placed.pop(placement.key, None)

    def _give_up(self, placement: Placement, reason: Reason) -> None:
        self._end(placement)
        self._out.counters["places_given_up"] += 1
        refuse = Refuse(placement.key[0], placement.key[1], reason)
        self._out.post(placement.origin, Lane.CONTROL, refuse)

    # ---- other rendezvous

    def on_tally(self, peer: Peer, tally: Tally) -> None:
        dry = self._tallies.take(peer, tally)
        if tally.tokens and self._queued:
            self._push()
        elif dry and self._spare(peer):
            self._out.send(peer, Lane.CONTROL, self._tally(peer))

    def _tally(self, peer: Peer) -> Tally:
        spare = min(self._spare(peer), 1 << 16)
        return Tally(self._out.identity.cell, spare, min(self._queued, 1 << 16))

    def _spare(self, peer: Peer) -> int:
        """Tokens that it may have: all, if it serves our cell or we do not any more."""
        kept = SPARE_TOKENS if self._tallies.elected() and not self._tallies.ours(peer) else 0
        return max(0, len(self._tokens) - kept)

    def _tell(self) -> None:
        now_ms = self._out.now.mono_ms
        self._tally_mono_ms = now_ms + TALLY_MS
        self._count()
        if self._told == (0, 0) == (len(self._tokens), self._queued):
            return
        self._told = (len(self._tokens), self._queued)
        self._tell_all(self._tallies.others())

    def _tell_all(self, peers: list[Peer]) -> None:
        for peer in peers:
            if self._rtt_us(peer) is None:
                self._reach(peer)
            else:
                self._out.send(peer, Lane.CONTROL, self._tally(peer))

    def _push(self) -> None:
        """Heads of the lines go to neighbours that have tokens now."""
        moved = True
        while moved:  # as many as they said that they can spare, one of each line in turn
            moved = False
            for submitter, line in list(self._lines.items()):
                head = line[0]
                if self._send_on(head):
                    self._unqueue(head)
                    if submitter in self._lines:
                        self._lines.move_to_end(submitter)
                    moved = True

    # ---- time

    def deadline(self) -> int | None:
        if not self._tokens and not self._queued:
            return None
        dues = [self._tally_mono_ms]
        if self._tokens:
            # They come in the order of their expiry but for clocks: the first is near enough.
            dues.append(next(iter(self._tokens.values())).until_mono_ms)
        if self._queued:
            dues.append(self._push_mono_ms)
        return min(dues)

    def tick(self) -> None:
        now_ms = self._out.now.mono_ms
        while self._tokens:
            token, held = next(iter(self._tokens.items()))
            if held.until_mono_ms > now_ms:
                break
            self._drop(token)
        if self._tally_mono_ms <= now_ms and (self._tokens or self._queued or any(self._told)):
            self._tallies.expire()
            self._tell()
        if self._queued and self._push_mono_ms <= now_ms:
            self._push_mono_ms = now_ms + PUSH_MS
            if not self._tallies.elected():  # the tokens come to others now, who will queue it
                self._give_up_all()
            self._push()
            if self._queued:  # whoever has some now answers
                self._tell_all(self._tallies.others(all_of_them=True))
            for line in list(self._lines.values()):
                for position, placement in enumerate(list(line)):
                    if placement.until_mono_ms <= now_ms:
                        self._unqueue(placement)
                        self._give_up(placement, Reason.NO_TOKEN)
                    elif placement.said_mono_ms + QUEUED_MS <= now_ms:
                        self._say_queued(placement, position)
