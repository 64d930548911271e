"""A car that lives through a trace: what its sensors would say, minute by minute. Pure.

`battery.Pack` and `trace.Trace` become a `VehicleState`; the policy trial, the simulated adapter
and the simulated week are its users. Time is the argument; nothing is drawn at random.
"""

from __future__ import annotations

from bisect import bisect_right
from math import cos, pi
from typing import Final

from meshnode.protocol.budget import ChargingState, VehicleState

from .battery import Pack
from .state import READINGS
from .trace import WEEK_MIN, Stay, Trace

_WEEK_S: Final = WEEK_MIN * 60
_WARMING_DC_PER_KW: Final = 8
"""A pack that takes or gives a kilowatt is so much warmer than the air in the end: a degree at
1.3 kW, eight at an 11 kW charger. Of the size that fleets report, no measurement of ours."""
_COOLING_S: Final = 2 * 3_600


class TracedCar:
    """Where it is and what is in its pack, from Monday 00:00 of the trace's first week on."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.pack = Pack(trace.pack, trace.pack.capacity_wh * trace.soc_permille)
        self.at_s = 0
        self.short_wh = 0  # what drives wanted and the pack did not have
        self._begins_s = [stay.from_min * 60 for stay in trace.stays]
        self._warmer_dc = 0.0
        self._driven = False  # the drive that goes on has been paid for

    # ---- time goes by

    def advance(self, seconds: int, load_w: int = 0) -> None:
        """So long, with this load at the terminals while it stands; drives take what they take."""
        while seconds > 0:
            stay = self._stay()
            left_s = self._left_s(stay)
            if left_s > 0:
                step_s = min(seconds, left_s)
                self.pack.run(step_s, stay.charger_w, load_w)
                self._driven = False
            else:
                step_s = min(seconds, left_s + stay.drive_min * 60)
                if not self._driven:
                    self.short_wh += self.pack.drive(stay.drive_wh)
                    self._driven = True
            self._warm(step_s)
            self.at_s += step_s
            seconds -= step_s

    def _stay(self) -> Stay:
        """The stay that goes on, or whose drive does."""
        into_s = self.at_s % _WEEK_S
        return self.trace.stays[bisect_right(self._begins_s, into_s) - 1]

    def _left_s(self, stay: Stay) -> int:
        """Until it drives away; negative while it drives."""
        into_s = self.at_s % _WEEK_S
        if into_s < self._begins_s[0]:  # the last drive of the week before
            into_s += _WEEK_S
        return stay.until_min * 60 - into_s

    def _warm(self, step_s: int) -> None:
        target = _WARMING_DC_PER_KW * abs(self.pack.power_w) / 1_000
        share = min(1.0, step_s / _COOLING_S)
        self._warmer_dc += (target - self._warmer_dc) * share

    # ---- what is read of it

    @property
    def driving(self) -> bool:
        stay = self._stay()
        return self._left_s(stay) <= 0 and stay.drive_min > 0

    def next_drive(self) -> tuple[int, int]:
        """Seconds until it drives away, and Wh that the drive takes: what the owner may know and
        no reading says."""
        stays, at = self.trace.stays, self.trace.stays.index(self._stay())
        ahead_s = self._left_s(stays[at])
        while not stays[at].drive_min or ahead_s <= 0:
            at = (at + 1) % len(stays)
            ahead_s = (stays[at].until_min * 60 - self.at_s) % _WEEK_S
        return ahead_s, stays[at].drive_wh

    def state(self, unix_ms: int) -> VehicleState:
        """Every reading, fresh at this time."""
        stay, driving = self._stay(), self.driving
        parked_s = 0 if driving else stay.until_min * 60 - stay.from_min * 60 - self._left_s(stay)
        plugged = stay.charger_w > 0 and not driving
        return VehicleState(
            at_ms=unix_ms,
            soc_permille=self.pack.soc_permille,
            usable_wh=self.pack.stored_mwh // 1_000,
            capacity_wh=self.pack.spec.capacity_wh,
            plugged=plugged,
            charging=self._charging(plugged, driving),
            pack_power_w=self.pack.power_w,
            charge_limit_permille=self.pack.spec.charge_limit_permille,
            pack_temp_dc=self._temperatures(),
            ambient_dc=self._ambient_dc(),
            low_voltage_mv=13_200,
            moving=driving,
            ignition="on" if driving else "off",
            parking=None if driving else stay.kind,
            parked_s=None if driving else parked_s,
            ages_ms=dict.fromkeys(READINGS, 0),
        )

    def _charging(self, plugged: bool, driving: bool) -> ChargingState:
        if driving:
            return "no"
        if plugged and self.pack.power_w == 0:
            return "complete"
        return self.pack.charging

    def _ambient_dc(self) -> int:
        coldest, warmest = self.trace.ambient_dc
        hour = self.at_s % 86_400 / 3_600
        swing = (1 - cos(2 * pi * (hour - 4) / 24)) / 2
        return round(coldest + (warmest - coldest) * swing)

    def _temperatures(self) -> tuple[int, int]:
        pack_dc = self._ambient_dc() + round(self._warmer_dc)
        return pack_dc, pack_dc + 20
