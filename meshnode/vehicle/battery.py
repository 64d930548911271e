"""A battery and its charger, in whole mWh: what charging, driving and work do to the charge. Pure.

Under `meshnode.vehicle.car`, which drives it through a trace; never in a car that has sensors. The
numbers stay simple and on the careful side: a real pack's chemistry is not what a budget is made
from, its readings are.

    charger W x efficiency  ->  the load first, the rest into the pack, up to what it accepts
    no charger              ->  the load out of the pack
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from meshnode.protocol.budget import ChargingState

# What a pack accepts, in per mille of its capacity per hour, by charge: full power up to a half,
# then less and less. The shape of published DC sessions; an 11 kW charger meets it at 97 %.
_ACCEPTS: Final = ((0, 1_500), (500, 1_500), (800, 500), (1_000, 50))
STEP_S: Final = 60
"""Charge moves by at most 2.5 % in a step, so the curve is followed closely enough."""


@dataclass(frozen=True, slots=True)
class PackSpec:
    """A pack and its charger, as a maker's sheet has them."""

    capacity_wh: int = 60_000
    charge_limit_permille: int = 800
    charger_efficiency_permille: int = 900
    """Wall to terminals; about 90 % for onboard chargers."""


WS_PER_WH: Final = 3_600


class Pack:
    """What is in the pack, and where the energy of the load came from. Inside, watt-seconds: so
    nothing is lost in rounding, however short the steps are."""

    def __init__(self, spec: PackSpec, stored_mwh: int) -> None:
        self.spec = spec
        self.power_w = 0  # over the last step; positive is into the pack
        self.charging: ChargingState = "no"
        self._stored_ws = stored_mwh * WS_PER_WH // 1_000
        self._from_pack_ws = 0
        self._from_plug_ws = 0
        self._grid_ws = 0

    @property
    def capacity_mwh(self) -> int:
        return self.spec.capacity_wh * 1_000

    @property
    def stored_mwh(self) -> int:
        return _mwh(self._stored_ws)

    @property
    def soc_permille(self) -> int:
        return self.stored_mwh * 1_000 // self.capacity_mwh

    @property
    def load_from_pack_mwh(self) -> int:
        return _mwh(self._from_pack_ws)

    @property
    def load_from_plug_mwh(self) -> int:
        """At the terminals, as the other."""
        return _mwh(self._from_plug_ws)

    @property
    def grid_mwh(self) -> int:
        """Out of the wall: for the load and for the pack."""
        return _mwh(self._grid_ws)

    def run(self, seconds: int, charger_w: int, load_w: int) -> None:
        """So long with this charger (W at the wall, 0: not plugged in) and this load."""
        while seconds > 0:
            step_s = min(STEP_S, seconds)
            self._step(step_s, charger_w, load_w)
            seconds -= step_s

    def drive(self, wh: int) -> int:
        """Take a trip's energy out; what was not there, in Wh (the car would have charged on the
        way)."""
        self.charging, self.power_w = "no", 0
        short_ws = max(0, wh * WS_PER_WH - self._stored_ws)
        self._stored_ws = max(0, self._stored_ws - wh * WS_PER_WH)
        return -(-short_ws // WS_PER_WH)

    def _step(self, step_s: int, charger_w: int, load_w: int) -> None:
        limit_ws = self.spec.capacity_wh * WS_PER_WH * self.spec.charge_limit_permille // 1_000
        room_ws = limit_ws - self._stored_ws
        offered_w = charger_w * self.spec.charger_efficiency_permille // 1_000
        from_plug_w = min(load_w, offered_w)
        into_w = 0
        if room_ws > 0:
            into_w = min(offered_w - from_plug_w, self._accepts_w(), -(-room_ws // step_s))
        from_pack_w = min(load_w - from_plug_w, self._stored_ws // step_s)  # empty gives nothing
        self.power_w = into_w - from_pack_w
        self._stored_ws += self.power_w * step_s
        self._from_pack_ws += from_pack_w * step_s
        self._from_plug_ws += from_plug_w * step_s
        wall_w = -(-(from_plug_w + into_w) * 1_000 // self.spec.charger_efficiency_permille)
        self._grid_ws += wall_w * step_s
        self.charging = self._shown(charger_w, into_w, from_pack_w)

    def _shown(self, charger_w: int, into_w: int, from_pack_w: int) -> ChargingState:
        if into_w > 0:
            return "charging"
        if charger_w > 0 and from_pack_w == 0:
            return "complete"
        return "discharging" if from_pack_w > 0 else "no"

    def _accepts_w(self) -> int:
        soc = self.soc_permille
        for (low, at_low), (high, at_high) in pairwise(_ACCEPTS):
            if soc <= high:
                permille = at_low + (at_high - at_low) * (soc - low) // (high - low)
                return self.spec.capacity_wh * permille // 1_000
        return 0


def _mwh(watt_seconds: int) -> int:
    return watt_seconds * 1_000 // WS_PER_WH
