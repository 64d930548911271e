"""What happens to a testnet's car: readings of its simulated vehicle, changed from outside.

Each car's home has a `vehicle.toml`; the adapter `sim` reads it at once when it changes. Used by
`mesh testnet drive-away|park|plug|unplug|heat|charge`, by `Testnet` and by the demo.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from meshnode.errors import LocalResource, UsageError
from meshnode.vehicle.sim import PARKED, VEHICLE_FILE

DRIVES_AWAY: Final = {"moving": True, "ignition": "on", "plugged": False, "charging": "no"}
PARKS: Final = {"moving": False, "ignition": "off", "parked_s": 0}
PLUGGED: Final = {"plugged": True, "charging": "complete", "pack_power_w": 0}
UNPLUGGED: Final = {"plugged": False, "charging": "no", "pack_power_w": 0}
HOT_C: Final = 45
_SPREAD_DC: Final = 20  # between the coolest and the warmest cell


def heated(celsius: int) -> dict[str, Any]:
    """The pack is so warm."""
    if not -50 <= celsius <= 100:
        raise UsageError(f"{celsius} degrees are no temperature of a battery: -50 to 100")
    return {"pack_temp_dc": [10 * celsius, 10 * celsius + _SPREAD_DC]}


def charged(percent: int) -> dict[str, Any]:
    """The pack holds so much."""
    if not 0 <= percent <= 100:
        raise UsageError(f"{percent} % is no charge: 0 to 100")
    capacity_wh = PARKED.capacity_wh or 0
    return {"soc_permille": 10 * percent, "usable_wh": capacity_wh * percent // 100}


def change(home: Path, readings: dict[str, Any]) -> None:
    """Write the readings into the car's file, beside what it says already, in one step."""
    path = home / VEHICLE_FILE
    try:
        before = tomllib.loads(path.read_text(encoding="utf-8"))
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(_toml({**before, **readings}), encoding="utf-8")
        os.replace(draft, path)
    except FileNotFoundError:
        raise UsageError(f"{home.name} is no car of a testnet: it has no {VEHICLE_FILE}") from None
    except (OSError, ValueError) as error:
        raise LocalResource(f"{path}: {error}") from None


def _toml(readings: dict[str, Any]) -> str:
    lines = ["# Readings of this simulated vehicle; what is not here is that of a parked car."]
    for name, value in readings.items():
        if isinstance(value, bool):
            text = "true" if value else "false"
        else:
            text = f'"{value}"' if isinstance(value, str) else str(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"
