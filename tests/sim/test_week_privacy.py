"""What leaves a car, byte by byte: no exact charge, no departure, nothing that the sensors said.

Every reading of every simulated car is a number that occurs nowhere else, nine bytes of CBOR, and
every frame that any node sends or publishes is searched for all of them. Position, speed and
identification number cannot leave: no reading has them (`tests/unit/vehicle/test_sim.py`).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import budget, presence
from meshnode.protocol import effects as fx
from meshnode.protocol.budget import VehicleState
from meshnode.protocol.codec import encode
from testnet.sim import week
from testnet.sim.site import Site
from testnet.sim.week import WeekWorld, simulate_week

PLANTED = ("usable_wh", "capacity_wh", "pack_power_w", "low_voltage_mv", "tariff_nano_per_kwh")
LARGE = 1 << 40  # nine bytes of CBOR, and no number that a mesh has reason to say


class Planted:
    """The readings of all cars, each a number of its own; and where one was seen."""

    def __init__(self) -> None:
        self.needles: dict[bytes, str] = {}
        self.seen: list[str] = []
        self.frames = 0
        self._rng = random.Random(5)

    def state(self, real: VehicleState) -> VehicleState:
        """The same car, with readings that are its own."""
        values: dict[str, Any] = {name: self._number(name) for name in PLANTED}
        if real.departure_ms is not None:
            # An exact time, as a calendar has it: to the millisecond it is nobody else's.
            values["departure_ms"] = real.departure_ms + self._rng.randrange(1_000)
            self.needles[encode(values["departure_ms"])] = "departure_ms"
        return replace(real, **values)

    def _number(self, name: str) -> int:
        value = LARGE + self._rng.getrandbits(39)
        self.needles[encode(value)] = name
        return value

    def scan(self, frame: bytes) -> None:
        self.frames += 1
        at = frame.find(b"\x1b")  # the head of every integer of nine bytes
        while at >= 0:
            name = self.needles.get(frame[at : at + 9])
            if name is not None:
                self.seen.append(name)
            at = frame.find(b"\x1b", at + 1)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    found = Planted()
    real = budget.spendable
    send, publish = WeekWorld._send, WeekWorld._publish

    def spendable(state: VehicleState, *args: Any, **more: Any) -> Any:
        return real(found.state(state), *args, **more)

    def sends(self: WeekWorld, site: Site, effect: fx.Send, life: int) -> None:
        found.scan(effect.frame)
        send(self, site, effect, life)

    def publishes(self: WeekWorld, site: Site, effect: fx.Publish, life: int) -> None:
        found.scan(effect.frame)
        publish(self, site, effect, life)

    monkeypatch.setattr(week, "spendable", spendable)
    monkeypatch.setattr(WeekWorld, "_send", sends)
    monkeypatch.setattr(WeekWorld, "_publish", publishes)
    return found


def test_no_reading_leaves_a_car(planted: Planted) -> None:
    found = simulate_week(6, 0.6, 2, 0.1)
    assert found.done > 10 and planted.frames > 500 and len(planted.needles) > 2_000
    assert planted.seen == []


def test_a_car_that_tells_its_departure_is_found(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant says in its adverts what the sensors said, where a step of energy belongs."""
    needles = planted.needles

    def leaking(_spendable_mwh: int) -> int:
        return int.from_bytes(next(reversed(needles))[1:], "big") if needles else 0

    monkeypatch.setattr(presence, "bucket_mwh", leaking)
    simulate_week(6, 0.6, 2, 0.05)
    assert planted.seen
