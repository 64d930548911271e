"""The adapter `vss` and the stubs of kuksa-client, in an environment of its own, read each other.

Our table of messages is our own (`vehicle/vss/wire.py`), so that others read it is the proof that
its numbers are KUKSA's. `make test-long` installs kuksa-client; there a missing one is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.vehicle.state import PERIOD_S_MAX, Pace, Source, VehicleState
from meshnode.vehicle.vss import signals as vss
from meshnode.vehicle.vss.adapter import VssVehicle
from tests.node.vss_broker import PARKED, Broker

from .test_vectors import ROOT, TIMEOUT_S, missing

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("check_kuksa.py")
# path, field of Value, value; the reading that it makes, and what of
STORY: list[tuple[str, str, Any, str, Any]] = [
    (vss.CHARGE, "float", 71.5, "soc_permille", 715),
    (vss.CHARGE, "double", 70.5, "soc_permille", 705),
    (vss.CAPACITY, "uint32", 61, "capacity_wh", 61_000),
    (vss.CAPACITY, "uint64", 62, "capacity_wh", 62_000),
    (vss.CAPACITY, "int32", 63, "capacity_wh", 63_000),
    (vss.CAPACITY, "int64", 64, "capacity_wh", 64_000),
    (vss.CAPACITY, "int32", -64, "capacity_wh", None),
    (vss.CABLE_5, "bool", False, "plugged", False),
    (vss.CHARGE, "float_array", [70.5], "soc_permille", None),
    (vss.IGNITION, "string", "ACC", "ignition", "acc"),
    (vss.MOVING, "bool", True, "moving", True),
]
PARKED_ROWS: list[list[Any]] = [
    [path, {bool: "bool", float: "float", int: "uint32", str: "string"}[type(value)], value, unit]
    for path, (unit, value) in PARKED.items()
]


@pytest.fixture
def python() -> Path:
    path = Path(os.environ.get("MESHNODE_KUKSA_PYTHON", ROOT / ".venv-kuksa" / "bin" / "python"))
    if not path.exists():
        missing(
            "no kuksa-client: python -m venv .venv-kuksa && .venv-kuksa/bin/pip install"
            " kuksa-client==0.6.0 (or set MESHNODE_KUKSA_PYTHON)"
        )
    return path


class Told:
    """The states that the adapter tells, waited for one by one."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[VehicleState](100)

    def __call__(self, state: VehicleState) -> None:
        self._send.send_nowait(state)

    async def until(self, holds: Callable[[VehicleState], bool]) -> VehicleState:
        while not holds(state := await self._receive.receive()):
            pass
        return state


def watching(address: str, period_s: float, test: Callable[[Told], Any]) -> None:
    async def main() -> None:
        told = Told()
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(VssVehicle(Source(address)).run, told, Pace(period_s))
                await test(told)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_their_stub_publishes_our_adapter_tells(python: Path) -> None:
    broker = Broker()
    broker.start()
    # Ours knows no arrays: what it forwards of one is no value.
    rows = [[path, field, value] for path, field, value, *_ in STORY if "array" not in field]

    async def test(told: Told) -> None:
        await told.until(lambda state: True)
        done = await trio.run_process(
            [python, SCRIPT, "publish", broker.address],
            stdin="\n".join(map(json.dumps, rows)).encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        counts = json.loads(done.stdout)
        assert counts["listed"] == counts["pushed"] == len(PARKED)
        assert counts["published"] == counts["read"] == len(rows)
        for _, field, _, reading, meaning in STORY:
            if "array" not in field:
                await told.until(lambda state, r=reading, m=meaning: getattr(state, r) == m)  # type: ignore[misc]

    watching(broker.address, PERIOD_S_MAX, test)
    broker.stop()


@pytest.mark.parametrize("period_s", [PERIOD_S_MAX, 0.05])
def test_a_broker_of_their_stub_is_read_by_our_adapter(python: Path, period_s: float) -> None:
    with subprocess.Popen(
        [python, SCRIPT, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as served:
        assert served.stdin is not None and served.stdout is not None

        def say(what: Any) -> None:
            assert served.stdin is not None
            served.stdin.write(json.dumps(what) + "\n")
            served.stdin.flush()

        fahrenheit = [vss.AVERAGE, "float", 68.0, "fahrenheit"]
        say([row for row in PARKED_ROWS if row[0] not in (vss.COLDEST, vss.HOTTEST)] + [fahrenheit])
        port = int(served.stdout.readline())

        async def test(told: Told) -> None:
            first = await told.until(lambda state: True)
            assert (first.soc_permille, first.charging, first.ignition) == (800, "complete", "off")
            assert first.pack_temp_dc is None, "its unit was read, and is not ours"
            for path, field, value, reading, meaning in STORY:
                say([path, field, value])
                await told.until(lambda state, r=reading, m=meaning: getattr(state, r) == m)  # type: ignore[misc]

        watching(f"127.0.0.1:{port}", period_s, test)
        served.stdin.close()
        assert served.wait(TIMEOUT_S) == 0
