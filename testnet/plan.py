"""What a testnet consists of: its nodes, their homes and settings, all derived from a seed.

Made by `handle` from what the person asked for, read by `keeper` in its own process. The papers of
each node come from `meshnode.node.founding`: a seed names the same keys and the same network every
day, only folders and ports differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from meshnode.errors import UsageError

Tables: TypeAlias = Mapping[str, Mapping[str, Any]]

CARS_MAX: Final = 128
SUBMITTER: Final = "submitter"
BOOTSTRAPS: Final = 2  # car-0 and car-1
CELL: Final = "testnet"
PRESET: Final = "testnet-car"
PLAN_FILE: Final = "plan.json"
ZYGOTE_SOCKET: Final = "zygote.sock"
PROBE_FILE: Final = "probe.cbor"
KEEPER_LOG: Final = "keeper.log"
# A node that only asks, with the quick time-outs of its neighbours.
SUBMITTER_TABLES: Final[Tables] = {
    "node": {"provides": False},
    "overlay": {"dht_server": False},
    "compute": {"slots": 0},
}


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    seed: int
    cars: int
    folder: str
    """Of everything on disk; removed by `down`."""
    car_tables: Tables = field(default_factory=dict)
    """As `config.toml` has them, over the preset of a testnet's car; for every car."""
    submitter_tables: Tables = field(default_factory=dict)
    log_level: str = "WARNING"

    def __post_init__(self) -> None:
        if not 1 <= self.cars <= CARS_MAX:
            raise UsageError(f"a testnet has 1 to {CARS_MAX} cars, not {self.cars}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"a seed is a whole number from 0, not {self.seed}")

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def car_names(self) -> list[str]:
        return [f"car-{number}" for number in range(self.cars)]

    @property
    def names(self) -> list[str]:
        return [*self.car_names, SUBMITTER]

    def home(self, name: str) -> Path:
        return self.path / "homes" / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    @property
    def keeper_log(self) -> Path:
        return self.path / "logs" / KEEPER_LOG

    def save(self) -> None:
        (self.path / PLAN_FILE).write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(folder: Path) -> Plan:
        return Plan(**json.loads((folder / PLAN_FILE).read_text()))

    def config_toml(self, name: str, ports: Mapping[str, int], peers: Mapping[str, str]) -> str:
        """The node's `config.toml`: with it `python -m meshnode.node` starts the same node."""
        boots = [boot for boot in self.car_names[:BOOTSTRAPS] if boot != name]
        tables: dict[str, dict[str, Any]] = {
            "node": {
                "listen": [f"/ip4/127.0.0.1/tcp/{ports[name]}"],
                "bootstrap": [f"/ip4/127.0.0.1/tcp/{ports[b]}/p2p/{peers[b]}" for b in boots],
                "cell": CELL,
            },
            "compute": {"zygote_parent": str(self.path / ZYGOTE_SOCKET)},
        }
        own = self.car_tables if name != SUBMITTER else self.submitter_tables
        for more in (SUBMITTER_TABLES if name == SUBMITTER else {}, own):
            for table, fields in more.items():
                tables.setdefault(table, {}).update(fields)
        lines = [f"# {name} of the testnet {self.name}; preset {PRESET}"]
        for table, fields in tables.items():
            lines.append(f"[{table}]")
            # Whole numbers, texts, booleans and lists of texts are the same in TOML and JSON.
            lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
        return "\n".join(lines) + "\n"
