"""A simulated vehicle: the numbers it is given, until somebody changes them.

For testnets, demos and tests, where there is no car. `change` drives away or plugs in from
within the process, an edited file of readings from outside it.
"""

from __future__ import annotations

import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from meshnode.errors import LocalResource
from meshnode.protocol.forecast import KINDS

from .filewatch import watch_file
from .state import READINGS, Pace, Source, Tell, VehicleState

VEHICLE_FILE = "vehicle.toml"
"""Of a home: read where no other file is named."""

PARKED = VehicleState(
    at_ms=0,
    soc_permille=800,
    usable_wh=48_000,
    capacity_wh=60_000,
    plugged=True,
    charging="complete",
    pack_power_w=0,
    charge_limit_permille=800,
    pack_temp_dc=(200, 220),
    ambient_dc=180,
    low_voltage_mv=13_200,
    moving=False,
    ignition="off",
    parking="home",
    parked_s=3_600,
    ages_ms=dict.fromkeys(READINGS, 0),
)
"""Parked at home for an hour and plugged in, charged to its limit."""


def open_sim(source: Source) -> SimVehicle:
    """By `[vehicle] sim_file`; without one the car stands parked and plugged."""
    return SimVehicle(file=source.file)


class SimVehicle:
    """`file` (TOML, names of `VehicleState`) overlays `start` and is read again at every look, and
    at once when it changes."""

    name = "sim"
    provides = READINGS

    def __init__(self, start: VehicleState = PARKED, *, file: Path | None = None) -> None:
        self._readings = start
        self._file = file
        self._pace: Pace | None = None
        if file is not None:
            self._overlaid()  # a bad file is said at the start

    def change(self, **readings: Any) -> None:
        """Set readings by name; they are told at once."""
        _check(readings)
        self._readings = replace(self._readings, **readings)
        if self._pace is not None:
            self._pace.hurry()

    def read(self) -> VehicleState:
        """The state now. A file that went bad while in use is a car whose readings failed."""
        try:
            readings = self._overlaid()
        except LocalResource:
            readings = VehicleState(at_ms=0)
        return replace(readings, at_ms=time.time_ns() // 1_000_000)

    async def run(self, tell: Tell, pace: Pace) -> None:
        self._pace = pace
        async with trio.open_nursery() as nursery:
            if self._file is not None:
                nursery.start_soon(watch_file, self._file, pace.hurry)
            while True:
                tell(self.read())
                await pace.rest()

    def _overlaid(self) -> VehicleState:
        if self._file is None:
            return self._readings
        try:
            readings = tomllib.loads(self._file.read_text(encoding="utf-8"))
            _check(readings)
        except OSError as error:
            raise LocalResource(f"cannot read {self._file}: {error.strerror}") from None
        except (ValueError, TypeError) as error:
            raise LocalResource(f"{self._file}: {error}") from None
        if "pack_temp_dc" in readings:
            readings["pack_temp_dc"] = tuple(readings["pack_temp_dc"])
        return replace(self._readings, **readings)


def _check(readings: dict[str, Any]) -> None:
    """ValueError for a name or a type that no reading has: a typo must not look like a default."""
    for name, value in readings.items():
        if name not in READINGS:
            raise ValueError(f"{name} is no reading of a vehicle")
        sample = getattr(PARKED, name)
        if name == "pack_temp_dc" and value is not None:
            good = len(value) == 2 and all(type(each) is int for each in value)
        else:
            good = value is None or type(value) is (int if sample is None else type(sample))
        if not good:
            raise ValueError(f"{name} = {value!r} is of the wrong type")
        if name in _WORDS and value is not None and value not in _WORDS[name]:
            raise ValueError(f"{name} is one of {', '.join(_WORDS[name])}")


_WORDS = {
    "charging": ("no", "charging", "complete", "discharging"),
    "ignition": ("off", "acc", "on"),
    "parking": KINDS,
}
