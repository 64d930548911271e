"""Counters become the energy of one run: what it took, by which method, how sure that is.

Between the meters of this folder and the executor, which asks for a run's energy so far whenever it
tells of the run. Pure: time is an argument (monotonic milliseconds).

Of the meters that saw the whole run the first wins whose doubt is not above that of the estimate;
if there is none, the estimate from the board's profile stands and says so. Every meter counts a
whole device or car, so a run's part is worked out:

    counted   what the meter counted while the run was open; between n open runs each gets 1/n
    idle      what the meter counts while no run is open, times the run's share of the time
    work      max(0, counted - idle), at the terminals: device work x 1000 / efficiency_permille
    energy    work + awake_w x the run's share of the time

1/n and not the device time, which is known only afterwards and not for the moment of a reading.
That two kernels on equally many cores differ in power by no more than a third is assumed, not
measured: SHARED_PERMILLE. Other processes' work above their idle draw is counted as the run's: no
counter can tell.

The owner's policy charges the awake draw to the mesh, as its own number (`awake_w`). A vehicle's
meter has seen the awake draw itself and states no more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from meshnode.errors import LocalProtocolError
from meshnode.protocol.budget import VehicleState

from .meter import MWH_UJ, EnergyMethod, Meter, Traits
from .pack import PackMeter
from .profile import Board

TICK_MS: Final = 1_000  # how often the meters are read while a run is open
EFFICIENCY_PERMILLE: Final = 30  # doubt of a DC-DC converter's 90 to 95 %, which falls at low load
SHARED_PERMILLE: Final = 300  # doubt of an equal part, where runs shared a meter all the time
AWAKE_PERMILLE: Final = 300  # doubt of the policy's `awake_w`: an owner's figure, not a reading
SETTLE_MS: Final = 2_000  # after a run clocks and fans come down, and slow counters catch up
REST_MS_LEAST: Final = 5_000  # a shorter rest says little about the idle draw
REST_MS_MAX: Final = 60_000  # a longer one becomes several
RESTS_KEPT: Final = 4


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one run so far, at the terminals of battery or plug."""

    energy_uj: int
    method: EnergyMethod
    uncertainty_permille: int  # of the whole energy, at most 1000
    battery_uj: int  # of that, out of the traction battery
    meter: str  # which one it was, for people

    @property
    def energy_mwh(self) -> int:
        """Whole mWh, rounded down: whoever adds runs up must add microjoules."""
        return self.energy_uj // MWH_UJ

    @property
    def battery_mwh(self) -> int:
        return self.battery_uj // MWH_UJ


@dataclass(frozen=True, slots=True)
class Terms:
    """Of the owner's policy, what an energy depends on."""

    efficiency_permille: int  # from the terminals to the device
    awake_w: int  # at the terminals
    watt_max: int  # at the terminals

    def at_terminals(self, device_uj: int) -> int:
        """energy_pack = device x 1000 // efficiency_permille."""
        return device_uj * 1_000 // max(1, self.efficiency_permille)


@dataclass(eq=False, slots=True)
class Mark:
    """One open run. Made by `start`, opaque to whoever holds it."""

    platform: str
    started_ms: int
    counted_uj: list[int | None]  # per meter; None: it lost the thread during the run
    share_us: int = 0  # of the time since the start: all of it while alone, 1/n among n
    shared_ms: int = 0  # of the time since the start, not alone
    battery_ms: int = 0
    said: Energy = field(
        default_factory=lambda: Energy(0, EnergyMethod.ESTIMATED, AWAKE_PERMILLE, 0, "")
    )


class _Reading(NamedTuple):
    uj: int
    at_ms: int


class _Idle(NamedTuple):
    mean_mw: int
    spread_mw: int  # between the lowest and the highest rest


class _Work(NamedTuple):
    uj: int  # at the terminals
    awake_uj: int
    permille: int
    awake_permille: int
    traits: Traits | None  # None: the estimate


class _Line:
    """One meter in the chain: its last reading, and what it counts while nothing runs."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.last: _Reading | None = None
        self.read_ms: int | None = None
        self._rest: _Reading | None = None  # the first reading of the rest that goes on
        self._rests: deque[tuple[int, int]] = deque(maxlen=RESTS_KEPT)  # uJ, ms

    def due(self, now_ms: int) -> bool:
        return self.read_ms is None or now_ms - self.read_ms >= self.meter.traits.again_ms

    def step(self, now_ms: int) -> int | None:
        """Read it: what it counted since the last reading, None if it has lost the thread."""
        uj = self.meter.energy_uj(now_ms)
        last, self.last = self.last, None if uj is None else _Reading(uj, now_ms)
        self.read_ms = now_ms
        if uj is None or last is None or uj < last.uj:
            self._rest = None
            return None
        return uj - last.uj

    def rest(self) -> None:
        """The last reading was in a time without runs."""
        if self._rest is None:
            self._rest = self.last
        elif self.last is not None and self.last.at_ms - self._rest.at_ms >= REST_MS_MAX:
            self.end_rest()
            self._rest = self.last

    def end_rest(self) -> None:
        first, self._rest = self._rest, None
        if first is not None and self.last is not None:
            rest_ms = self.last.at_ms - first.at_ms
            if rest_ms >= REST_MS_LEAST:
                self._rests.append((self.last.uj - first.uj, rest_ms))

    def idle(self) -> _Idle | None:
        """uJ / ms is mW. None: no rest was seen yet."""
        if not self._rests:
            return None
        means_mw = [uj // rest_ms for uj, rest_ms in self._rests]
        all_uj, all_ms = map(sum, zip(*self._rests, strict=True))
        return _Idle(all_uj // all_ms, max(means_mw) - min(means_mw))


class MeterChain:
    """All meters of a machine, best first, and the runs that are open.

    `terms` and `board` may be replaced at any time, when the owner signs another policy.
    """

    def __init__(self, meters: Sequence[Meter], terms: Terms, board: Board) -> None:
        self._lines = [_Line(meter) for meter in meters]
        self._pack = next((meter for meter in meters if isinstance(meter, PackMeter)), None)
        self.terms = terms
        self.board = board
        self._open: list[Mark] = []
        self._at_ms: int | None = None  # up to when the open runs have their shares
        self._stopped_ms: int | None = None
        self._on_battery = False

    @property
    def names(self) -> list[str]:
        """The meters that there are, best first, for `status`."""
        return [line.meter.traits.name for line in self._lines] + [self.board.name]

    @property
    def tick_ms(self) -> int:
        """How long until `tick` should be called next."""
        if self._open:
            return TICK_MS
        return min((line.meter.traits.period_ms for line in self._lines), default=60_000)

    def tick(self, now_ms: int) -> None:
        """Read all meters. Without it wraps are missed, and nobody knows the idle draw."""
        self._advance(now_ms, every=True)
        settled = self._stopped_ms is None or now_ms - self._stopped_ms >= SETTLE_MS
        if settled and not self._open:
            for line in self._lines:
                line.rest()

    def feed(self, state: VehicleState, now_ms: int) -> None:
        """A new state of the vehicle."""
        self._share_time(now_ms)
        if self._pack is not None:
            self._pack.feed(state, now_ms)
        # Where the cable is in and nothing flows, the battery carries the load. What is not known
        # is not stated.
        self._on_battery = state.plugged is False or (
            state.plugged is True and state.charging in ("no", "discharging")
        )
        self.tick(now_ms)

    def start(self, now_ms: int, platform: str) -> Mark:
        """A run begins on `platform` (jax's name: cpu, cuda, ...)."""
        self._advance(now_ms)
        if not self._open:
            for line in self._lines:
                line.end_rest()
        counted_uj = [None if line.last is None else 0 for line in self._lines]
        mark = Mark(platform, now_ms, counted_uj)
        self._open.append(mark)
        return mark

    def so_far(self, mark: Mark, now_ms: int, device_ms: int) -> Energy:
        """The run's energy since its start. It never shrinks.

        `device_ms` is how long the device worked for it. LocalProtocolError for a run that is not
        open.
        """
        if mark not in self._open:
            raise LocalProtocolError("the energy of a run that is not open")
        self._advance(now_ms)
        return self._said(mark, now_ms, device_ms)

    def stop(self, mark: Mark, now_ms: int, device_ms: int) -> Energy:
        """The run is over: its energy. LocalProtocolError for a run that is not open."""
        if mark not in self._open:
            raise LocalProtocolError("the energy of a run that is not open")
        # A run that took seconds is worth a reading of its end; a call of 3 ms is not.
        self._advance(now_ms, every=now_ms - mark.started_ms >= TICK_MS)
        self._open.remove(mark)
        self._stopped_ms = now_ms
        return self._said(mark, now_ms, device_ms)

    def close(self) -> None:
        for line in self._lines:
            line.meter.close()
        self._lines = []
        self._open = []

    # ---------------------------------------------------------------------------------- counting

    def _advance(self, now_ms: int, *, every: bool = False) -> None:
        """Share out the time and the energy since the last call; `every` meter, or those due."""
        self._share_time(now_ms)
        runs = len(self._open)
        for index, line in enumerate(self._lines):
            if every or line.due(now_ms):
                parts_uj = _parts(line.step(now_ms), runs)
                for mark, part_uj in zip(self._open, parts_uj, strict=True):
                    counted_uj = mark.counted_uj[index]
                    if counted_uj is not None:
                        mark.counted_uj[index] = None if part_uj is None else counted_uj + part_uj

    def _share_time(self, now_ms: int) -> None:
        elapsed_ms = 0 if self._at_ms is None else max(0, now_ms - self._at_ms)
        self._at_ms = now_ms if self._at_ms is None else max(self._at_ms, now_ms)
        runs = len(self._open)
        for mark in self._open:
            mark.share_us += elapsed_ms * 1_000 // runs
            mark.shared_ms += elapsed_ms if runs > 1 else 0
            mark.battery_ms += elapsed_ms if self._on_battery else 0

    # ----------------------------------------------------------------------------------- judging

    def _said(self, mark: Mark, now_ms: int, device_ms: int) -> Energy:
        """What is said of a run now, after what was said of it before."""
        wall_ms = max(0, now_ms - mark.started_ms)
        work = self._measured(mark, wall_ms) or self._estimated(mark, wall_ms, device_ms)
        energy_uj = work.uj + work.awake_uj
        doubt = work.uj * work.permille + work.awake_uj * work.awake_permille
        permille = _up(doubt, energy_uj) if energy_uj else work.permille
        method = EnergyMethod.ESTIMATED if work.traits is None else work.traits.method
        name = self.board.name if work.traits is None else work.traits.name
        said = mark.said
        if energy_uj < said.energy_uj:
            # What was told in a receipt stands until the meter that says less has caught up, and
            # so do its doubts.
            if said.method < method:
                method, name = said.method, said.meter
            energy_uj, permille = said.energy_uj, max(permille, said.uncertainty_permille)
        battery_uj = energy_uj * mark.battery_ms // wall_ms if wall_ms else 0
        battery_uj = min(energy_uj, max(battery_uj, said.battery_uj))
        mark.said = Energy(energy_uj, method, min(1_000, permille), battery_uj, name)
        return mark.said

    def _measured(self, mark: Mark, wall_ms: int) -> _Work | None:
        """By the first meter that saw all of the run and is not in more doubt than the estimate."""
        share_ms = mark.share_us // 1_000
        shared = _shared_permille(mark, wall_ms)
        for line, counted_uj in zip(self._lines, mark.counted_uj, strict=True):
            traits = line.meter.traits
            if counted_uj is None or not traits.sees(mark.platform):
                continue
            idle = line.idle()
            idle_uj = idle.mean_mw * share_ms if idle is not None else 0
            work_uj = max(0, counted_uj - idle_uj)
            permille = _doubt_permille(traits, idle, wall_ms, share_ms, work_uj)
            if permille > self.board.uncertainty_permille:
                continue
            awake_uj = self.terms.awake_w * share_ms * 1_000
            if traits.method is EnergyMethod.VEHICLE:
                if work_uj > self._most_uj(share_ms):
                    continue  # the car does something else: heats itself, charges a telephone
                awake_uj, awake_permille = min(awake_uj, idle_uj), permille + shared
            else:
                work_uj, awake_permille = self.terms.at_terminals(work_uj), AWAKE_PERMILLE
            return _Work(work_uj, awake_uj, permille + shared, awake_permille, traits)
        return None

    def _estimated(self, mark: Mark, wall_ms: int, device_ms: int) -> _Work:
        """P = awake + (peak - idle) x device_ms / wall_ms, over the run's share of the time."""
        share_ms = mark.share_us // 1_000
        busy_ms = min(max(0, device_ms), wall_ms)
        work_uj = self.board.work_uj(busy_ms) * share_ms // wall_ms if wall_ms else 0
        return _Work(
            self.terms.at_terminals(work_uj),
            self.terms.awake_w * share_ms * 1_000,
            self.board.uncertainty_permille + _shared_permille(mark, wall_ms),
            AWAKE_PERMILLE,
            None,
        )

    def _most_uj(self, share_ms: int) -> int:
        """What work can take at the terminals, with the room that an estimate leaves."""
        board_w = self.terms.at_terminals(self.board.peak_w)
        most_w = max(self.terms.watt_max, board_w) * (1_000 + self.board.uncertainty_permille)
        return most_w * share_ms  # W per mille x ms is uJ


def _parts(step_uj: int | None, runs: int) -> Iterator[int | None]:
    """`step_uj` in `runs` equal parts, none lost: the first ones get what is left over."""
    whole_uj, left_uj = divmod(step_uj or 0, max(1, runs))
    for index in range(runs):
        yield None if step_uj is None else whole_uj + (index < left_uj)


def _shared_permille(mark: Mark, wall_ms: int) -> int:
    return _up(SHARED_PERMILLE * mark.shared_ms, wall_ms) if wall_ms else 0


def _doubt_permille(
    traits: Traits, idle: _Idle | None, wall_ms: int, share_ms: int, work_uj: int
) -> int:
    """How far a meter may be off for this run: the sum of what may be wrong, as if all at once.

    The meter itself; its edges, because a change shows up to `resolution_ms` late; the idle draw,
    by half of what the rests differ; and the converter between a device and the terminals.
    """
    if wall_ms <= 0 or work_uj <= 0:
        return 1_000
    permille = traits.uncertainty_permille + _up(1_000 * traits.resolution_ms, wall_ms)
    if idle is None:
        permille += traits.idle_permille
    else:
        permille += _up(1_000 * idle.spread_mw * share_ms, 2 * work_uj)
    return permille + (0 if traits.method is EnergyMethod.VEHICLE else EFFICIENCY_PERMILLE)


def _up(number: int, by: int) -> int:
    return -(-number // by)
