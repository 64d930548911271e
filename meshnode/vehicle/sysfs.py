"""A laptop on its battery: the readings that Linux gives under /sys/class/power_supply.

Between the kernel and `node.vehicle_watch`, for machines that are no car: they have a battery, a
plug and sometimes a thermometer in the pack, but nothing that says motion or ignition. Files and
units: Linux, Documentation/ABI/testing/sysfs-class-power and Documentation/power/
power_supply_class.rst (uWh, uAh, uV, uA, uW, per cent, 0.1 degC).

Which batteries, plugs and files there are is settled at the start, by the files' presence and not
by what they say: a thermometer that fails at the start is one that fails, never one that is not
there. What cannot be read or cannot be true is unknown.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from .state import ChargingState, Pace, Source, Tell, VehicleState

FILE_BYTES_MAX: Final = 4096  # the kernel writes at most a page
SUPPLIES_MAX: Final = 64
ENERGY_UWH_MAX: Final = 10_000_000_000  # 10 kWh
CHARGE_UAH_MAX: Final = 1_000_000_000  # 1000 Ah
VOLTAGE_UV_LEAST: Final = 1_000_000
VOLTAGE_UV_MAX: Final = 1_000_000_000
CURRENT_UA_MAX: Final = 1_000_000_000
POWER_UW_MAX: Final = 10_000_000_000
TEMP_DC_LEAST: Final = -600  # below it firmware says "none": 0 K is -2731
TEMP_DC_MAX: Final = 1_200
OVERFULL_PERMILLE: Final = 1_050  # a gauge may count a little past its last full charge
HELD_PERMILLE: Final = 50  # so far under its limit a battery that rests is still held there

_STATUSES: Final = ("Charging", "Discharging", "Not charging", "Full")
_NUMBER: Final = re.compile(rb"-?[0-9]{1,18}")
_MICRO: Final = 1_000_000


class SysfsVehicle:
    """All batteries of the machine as one, and whether any of its power supplies is plugged in."""

    name = "sysfs"

    def __init__(self, source: Source) -> None:
        supplies = _supplies(source.root / "sys/class/power_supply")
        self._batteries = [_Battery(one) for one in supplies if one.is_battery()]
        self._plugs = [one for one in supplies if one.is_plug()]
        self.provides = self._provided()

    def _provided(self) -> frozenset[str]:
        batteries = self._batteries
        names = {"plugged"} if self._plugs else set()
        if batteries:
            # Also where no file says its charge: who has a battery must not pass for who has none.
            names |= {"soc_permille", "charging"}
            if all(one.tells_energy for one in batteries):
                names |= {"usable_wh", "capacity_wh"}
            if all(one.tells_power for one in batteries):
                names.add("pack_power_w")
            if any(one.tells_temp for one in batteries):
                names.add("pack_temp_dc")
            if all(one.tells_limit for one in batteries):
                names.add("charge_limit_permille")
        return frozenset(names)

    async def run(self, tell: Tell, pace: Pace) -> None:
        """Task, until cancelled: a look every `pace.period_s`; a failing file is no error."""
        while True:
            # The files alone take 0.1 ms, but behind /sys the firmware's controller answers: after
            # tens of ms on some machines, and never if it hangs. The node must not wait for it.
            state = await trio.to_thread.run_sync(
                self.read,
                abandon_on_cancel=True,  # type: ignore[call-arg]  # newer than trio-typing's stubs
            )
            tell(state)
            await pace.rest()

    def read(self) -> VehicleState:
        """The state now. Blocks for as long as the firmware does; raises nothing."""
        at_ms = time.time_ns() // 1_000_000
        looks = [battery.look() for battery in self._batteries]
        plugged = self._plugged()
        parts = _all_known(look.soc_permille for look in looks)
        soc_permille = None if parts is None else min(parts)
        stored = _all_known(look.stored_uwh for look in looks)
        full = _all_known(look.full_uwh for look in looks)
        if stored is not None and full is not None:
            soc_permille = min(1_000, sum(stored) * 1_000 // sum(full))
        powers = _all_known(look.power_uw for look in looks)
        limits = _all_known(look.limit_permille for look in looks)
        temps = _all_known(
            look.temp_dc
            for look, battery in zip(looks, self._batteries, strict=True)
            if battery.tells_temp
        )
        return VehicleState(
            at_ms=at_ms,
            soc_permille=soc_permille,
            usable_wh=None if stored is None else sum(stored) // _MICRO,
            capacity_wh=None if full is None else sum(full) // _MICRO,
            plugged=plugged,
            charging=_charging(looks, plugged),
            pack_power_w=None if powers is None else int(sum(powers) / _MICRO),
            # The highest, so that what is still to charge is not thought too little.
            charge_limit_permille=None if limits is None else max(limits),
            pack_temp_dc=None if temps is None else (min(temps), max(temps)),
            ages_ms=dict.fromkeys(self.provides, 0),
        )

    def _plugged(self) -> bool | None:
        # 1 is online, and so is 2: a plug whose voltage can be programmed.
        online = [plug.number("online", 0, 2) for plug in self._plugs]
        if any(online):
            return True
        return None if not online or None in online else False


class _Supply:
    """A folder of files; one that cannot be read, or was not there at the start, gives None."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._names = frozenset(os.listdir(path))
        except OSError:
            self._names = frozenset()

    def is_battery(self) -> bool:
        # A battery slot may be empty. The battery of a mouse has the scope "Device".
        return (
            self.text("type") == b"Battery"
            and self.text("scope") != b"Device"
            and self.number("present", 0, 1) != 0
        )

    def is_plug(self) -> bool:
        # A graphics tablet, too, has a plug of its own.
        return (
            self.text("type") in (b"Mains", b"USB")
            and self.text("scope") != b"Device"
            and self.has("online")
        )

    def has(self, *names: str) -> bool:
        return self._names.issuperset(names)

    def text(self, name: str) -> bytes | None:
        if name not in self._names:
            return None
        try:
            fd = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return os.read(fd, FILE_BYTES_MAX).strip()
            finally:
                os.close(fd)
        except OSError:
            return None  # ENODEV, EIO: it is being unplugged; ENODATA: the firmware does not know

    def number(self, name: str, least: int, most: int) -> int | None:
        text = self.text(name)
        if text is None or not _NUMBER.fullmatch(text):
            return None
        number = int(text)
        return number if least <= number <= most else None


@dataclass(slots=True)
class _Look:
    """What one battery says now."""

    soc_permille: int | None = None
    stored_uwh: int | None = None
    full_uwh: int | None = None
    status: str | None = None
    power_uw: int | None = None  # positive is into the battery
    temp_dc: int | None = None
    limit_permille: int | None = None
    start_permille: int | None = None

    def rests(self) -> bool:
        """Whether it is charged as far as it is meant to be and the plug carries the load.

        "Not charging" alone is no proof: a weak plug or a hot pack says it as well.
        """
        if self.status == "Full":
            return True
        if self.status != "Not charging" or self.soc_permille is None:
            return False
        start = self.start_permille
        if start is None:
            start = (self.limit_permille or 1_000) - HELD_PERMILLE
        return self.soc_permille >= start


class _Battery:
    """Which files a battery has, and how they become a `_Look`."""

    def __init__(self, files: _Supply) -> None:
        self._files = files
        by_charge = files.has("charge_now", "charge_full")
        volts = files.has("voltage_min_design") or files.has("voltage_now")
        self.tells_energy = files.has("energy_now", "energy_full") or (by_charge and volts)
        self.tells_power = files.has("power_now") or files.has("current_now", "voltage_now")
        self.tells_temp = files.has("temp")
        self.tells_limit = files.has("charge_control_end_threshold")

    def look(self) -> _Look:
        files, look = self._files, _Look()
        if files.number("present", 0, 1) == 0:
            return look  # taken out since the start
        self._fill(look)
        status = files.text("status")
        look.status = next((word for word in _STATUSES if word.encode() == status), None)
        look.power_uw = self._power_uw(look.status)
        look.temp_dc = files.number("temp", TEMP_DC_LEAST, TEMP_DC_MAX)
        look.start_permille = _permille(files.number("charge_control_start_threshold", 1, 100))
        look.limit_permille = _permille(files.number("charge_control_end_threshold", 1, 100))
        return look

    def _fill(self, look: _Look) -> None:
        """How full it is; by its energy rather than the kernel's whole per cent."""
        files = self._files
        for what, most in (("energy", ENERGY_UWH_MAX), ("charge", CHARGE_UAH_MAX)):
            now = files.number(f"{what}_now", 0, most)
            full = files.number(f"{what}_full", 1, most)  # with ageing, unlike _full_design
            if now is None or full is None or now * 1_000 > full * OVERFULL_PERMILLE:
                continue
            look.soc_permille = min(1_000, now * 1_000 // full)
            # uAh x V is uWh; an energy is that already.
            voltage_uv = _MICRO if what == "energy" else self._nominal_uv()
            if voltage_uv is not None:
                look.stored_uwh = now * voltage_uv // _MICRO
                look.full_uwh = max(1, full * voltage_uv // _MICRO)
            return
        look.soc_permille = _permille(files.number("capacity", 0, 100))

    def _nominal_uv(self) -> int | None:
        """Of the design before that of now: the latter falls under load and rises while charging,
        and a capacity must not. It is also the lower one (the pack's voltage when empty by the
        ABI, its nominal voltage in the ACPI driver), so the energy is not thought too much."""
        for name in ("voltage_min_design", "voltage_now"):
            voltage_uv = self._files.number(name, VOLTAGE_UV_LEAST, VOLTAGE_UV_MAX)
            if voltage_uv is not None:
                return voltage_uv
        return None

    def _power_uw(self, status: str | None) -> int | None:
        """Signed by the status: the ABI signs a current, but ACPI gives no sign and drivers differ
        in theirs."""
        files = self._files
        power_uw = files.number("power_now", -POWER_UW_MAX, POWER_UW_MAX)
        if power_uw is None:
            current_ua = files.number("current_now", -CURRENT_UA_MAX, CURRENT_UA_MAX)
            voltage_uv = files.number("voltage_now", VOLTAGE_UV_LEAST, VOLTAGE_UV_MAX)
            if current_ua is None or voltage_uv is None:
                return None
            power_uw = current_ua * voltage_uv // _MICRO
        size_uw = abs(power_uw)
        if size_uw > POWER_UW_MAX:
            return None
        if size_uw < _MICRO:
            return 0  # less than a watt is nothing, whichever its direction
        if status == "Charging":
            return size_uw
        return -size_uw if status == "Discharging" else None


def _supplies(folder: Path) -> list[_Supply]:
    try:
        names = sorted(os.listdir(folder))[:SUPPLIES_MAX]
    except OSError:
        return []  # not Linux, or a machine without any
    return [_Supply(folder / name) for name in names]


def _charging(looks: list[_Look], plugged: bool | None) -> ChargingState | None:
    """Of all batteries together: one that drains outweighs one that charges (two batteries may
    take turns), and one of unknown status a rest of the others."""
    statuses = {look.status for look in looks}
    if "Discharging" in statuses:
        return "discharging"
    if "Charging" in statuses:
        return "charging"
    if not looks or None in statuses:
        return None
    return "complete" if plugged is True and all(look.rests() for look in looks) else "no"


def _permille(percent: int | None) -> int | None:
    return None if percent is None else percent * 10


def _all_known(numbers: Iterable[int | None]) -> list[int] | None:
    """None if there is none, or one of them is unknown."""
    found = list(numbers)
    known = [number for number in found if number is not None]
    return known if known and len(known) == len(found) else None
