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


@dataclass(slots=True)
class Pack:
    """What is in the pack, and where the energy of the load came from."""

    spec: PackSpec
    stored_mwh: int
    power_w: int = 0  # over the last step; positive is into the pack
    charging: ChargingState = "no"
    load_from_pack_mwh: int = 0
    load_from_plug_mwh: int = 0  # at the terminals
    grid_mwh: int = 0  # out of the wall: for the load and for the pack
    _ws: int = 0  # watt-seconds that are no whole mWh yet, into the pack
    _load_ws: int = 0

    @property
    def capacity_mwh(self) -> int:
        return self.spec.capacity_wh * 1_000

    @property
    def soc_permille(self) -> int:
        return self.stored_mwh * 1_000 // self.capacity_mwh

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
        short_mwh = max(0, wh * 1_000 - self.stored_mwh)
        self.stored_mwh = max(0, self.stored_mwh - wh * 1_000)
        return -(-short_mwh // 1_000)

    def _step(self, step_s: int, charger_w: int, load_w: int) -> None:
        room_mwh = self.capacity_mwh * self.spec.charge_limit_permille // 1_000 - self.stored_mwh
        offered_w = charger_w * self.spec.charger_efficiency_permille // 1_000
        from_plug_w = min(load_w, offered_w)
        into_w = 0
        if room_mwh > 0:
            room_w = -(-room_mwh * 3_600 // (1_000 * step_s))
            into_w = min(offered_w - from_plug_w, self._accepts_w(), room_w)
        from_pack_w = load_w - from_plug_w
        stored_w = self.stored_mwh * 3_600 // (1_000 * step_s)
        from_pack_w = min(from_pack_w, stored_w)  # an empty pack gives nothing
        self.power_w = into_w - from_pack_w
        self._ws += self.power_w * step_s
        # 1 mWh is 3.6 Ws; floor division keeps the rest, also of a negative number.
        moved_mwh, rest = divmod(self._ws * 10, 36)
        self._ws = rest // 10
        self.stored_mwh = min(self.capacity_mwh, max(0, self.stored_mwh + moved_mwh))
        self.load_from_pack_mwh += from_pack_w * step_s * 10 // 36
        self.load_from_plug_mwh += from_plug_w * step_s * 10 // 36
        wall_w = -(-(from_plug_w + into_w) * 1_000 // self.spec.charger_efficiency_permille)
        self.grid_mwh += wall_w * step_s * 10 // 36
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
