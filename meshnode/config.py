"""What an owner or operator may tune: one frozen value, from `config.toml` in the home.

Read by `meshnode.node.app` (and shown by the CLI); the protocol gets its `Limits` out of it, the
overlay and the executor their own configurations. Presets instead of flags: `parked_car()` is the
default of a car, `testnet_car()` of many cars on one machine, `submitter()` of a node that only
asks. A file overrides single fields of the preset:

    [node]
    listen = ["/ip4/0.0.0.0/tcp/4100"]
    [compute]
    slots = 2

Keys that no field has and values of another type are refused with the place where they stand.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from meshnode.errors import LocalResource, UsageError
from meshnode.protocol.types import Limits

CONFIG_NAME: Final = "config.toml"
CONFIG_BYTES_MAX: Final = 1 << 18

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """`[node]`: who this process is and when it ends."""

    provides: bool = True
    """Whether this node runs other people's work. A submitter says no and starts no worker."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001",)
    """Multiaddrs to listen on; 0.0.0.0 stands for every interface's own address, port 0 for any
    free port. Each address costs one listening socket and one line in every advert."""
    bootstrap: tuple[str, ...] = ()
    """Multiaddrs ending in /p2p/ID, dialled while this node is alone; those of the genesis are
    added. One that answers is enough."""
    cell: str = "home"
    """The gossip cell: cars that should find each other name the same. Adverts cost each member
    about members / 60 messages a second."""
    fleet: tuple[str, ...] = ()
    """Accounts (64 hexadecimal digits each) whose cars a job's `--cars fleet` means, beside those
    of one's own account."""
    link: Literal["auto", "wired", "wifi", "cellular"] = "auto"
    """What this node's bytes go over: `wired`, `wifi` or `cellular`; `auto` looks at the default
    route. Say `cellular` behind a router that dials out itself. A policy's `network_wifi_only` and
    `metered_bytes_a_day` go by it."""
    idle_exit_s: float = 0.0
    """A node without clients, jobs and leases for so long ends; 0 never. For background
    submitters."""
    drain_s: float = 10.0
    """On SIGTERM leases in work get so long to finish before the node ends."""


@dataclass(frozen=True, slots=True)
class OverlaySettings:
    """`[overlay]`: connections, gossip and DHT."""

    dht_server: bool = True
    """Answer other nodes' DHT queries. A few messages a minute; a submitter behind NAT is of no
    use to others."""
    connections_max: int = 1024
    """Sockets of libp2p; above, new ones are refused. Keep it at twice `limits.peers_max`, and
    `ulimit -n` at twice this."""
    ping_interval_s: float = 5.0
    ping_timeout_s: float = 4.0
    """A silent peer is noticed within interval + timeout. A ping costs two frames."""
    gossip_heartbeat_s: int = 1
    """Seconds between two gossipsub heartbeats; more saves idle CPU (0.2 % of a core at 1 s) and
    joins a mesh more slowly."""


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """`[compute]`: what jobs may use of this machine."""

    slots: int = 1
    """Runs at a time. More than one per accelerator only helps while units wait for I/O."""
    memory_mb_max: int = 8_192
    """Most memory of one worker's program; a worker that needs more is refused beforehand."""
    threads: int = 0
    """Of XLA in each worker; 0 is cores / slots."""
    idle_stop_s: float = 120.0
    """Idle workers end after so long. A warm one holds 150-300 MB and saves 1-2 s of compiling."""
    workers_max: int = 4
    """Live workers, idle ones with a compiled program too."""
    load_s_max: float = 120.0
    """Longest fork, compile and reading of constants."""
    executable_bytes_max: int = 1 << 30
    """Compiled programs kept in the home (0.01 to 1 MB each), so that a restarted node compiles
    nothing again; at the bound the one used longest ago goes. 0 keeps none."""
    zygote_parent: str = ""
    """Socket of a shared parent of zygotes, for many cars on one machine: jax is imported once.
    Empty: a zygote of one's own, started with the first offer (1-2 s, 120 MB)."""
    worker_cgroup: str = ""
    """A control group (v2, or v1's memory controller) that this node may make groups in, one for
    each worker: its memory is then bounded as a whole. systemd: `Delegate=memory pids` and
    `DelegateSubgroup=node`, and here the unit's own folder below /sys/fs/cgroup. Empty: none."""
    share_device: bool = False
    """Let workers of several submitters hold an accelerator at a time. What one leaves in the
    device's memory another may find. The CPU is always shared, memory being the kernel's there."""
    worker_log: bool = False
    """Keep what workers print in `worker.log` of the run directory."""


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """`[storage]`: what the home may take of the disk."""

    blob_bytes_max: int = 20 << 30
    """Blobs, pinned ones included; at the bound the one used longest ago goes."""
    jobs_bytes_max: int = 16 << 30
    """Jobs with their results; at the bound a job fails as on a full disk."""
    keep_jobs_s: float = 7 * 86_400.0
    """Ended jobs and their results are deleted after so long."""
    fetches_max: int = 8
    """Blobs fetched at once, each from up to 4 holders."""
    ingests_max: int = 2
    """Files hashed into the store at once, one thread each (1.8 GB/s a thread)."""


@dataclass(frozen=True, slots=True)
class VehicleSettings:
    """`[vehicle]`: where the readings come from. Without readings a car computes nothing."""

    adapter: str = ""
    """Empty: none is chosen, and the car computes nothing, except in test networks, whose cars are
    simulated. `sim`: a simulated vehicle; `vss`: a car's own signals, by a KUKSA databroker;
    `sysfs`: a laptop's battery and plug; `evcc`: a charge controller in the house. Neither of the
    last two knows of motion, so they need a policy with `stationary`. Or what another package adds
    under the entry points `meshnode.vehicle`."""
    address: str = ""
    """Of the source that the adapter asks, as it wants it: `http://evcc.local:7070`, or for vss
    HOST:PORT, `grpcs://HOST:PORT` or `unix:/PATH` (empty: 127.0.0.1:55555)."""
    token_file: str = ""
    """A file with the secret that the source asks for: a databroker's JWT."""
    options: tuple[str, ...] = ()
    """NAME=VALUE each: what an adapter wants to know besides; for evcc loadpoint, vehicle and
    currency, for vss ca_file."""
    poll_s: float = 2.0
    """Time between two looks at motion and ignition while this car offers itself or works; a
    driver's return is noticed within it where the adapter does not push. Else every 30 s."""
    board: str = "generic"
    """What runs draw where nothing measures it: a board's profile. `generic` draws the policy's
    `watt_max` at full load; the others are named in meshnode/vehicle/meters/boards.toml."""
    sleep_command: tuple[str, ...] = ()
    """Run with a number of seconds appended when the car's cell does not need it (see
    `limits.sleep_ms_max`), for example `["rtcwake", "-m", "mem", "-s"]`; it should suspend the
    machine for so long. Empty: the node only keeps quiet."""
    sim_file: str = ""
    """TOML of the simulated vehicle's readings; empty: `vehicle.toml` in the home, if it is there,
    else parked and plugged, 80 % charged. Read again when it changes: so tests and demos drive
    away."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A node's whole configuration; made by a preset, overridden by `load`."""

    node: NodeSettings = field(default_factory=NodeSettings)
    overlay: OverlaySettings = field(default_factory=OverlaySettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    vehicle: VehicleSettings = field(default_factory=VehicleSettings)
    limits: Limits = field(default_factory=Limits)


# ---- presets


def parked_car() -> NodeConfig:
    """One car on one machine, reachable on a fixed port."""
    return NodeConfig()


def testnet_car() -> NodeConfig:
    """One of many cars on one machine: loopback, any port, small bounds, quick to notice."""
    return NodeConfig(
        node=NodeSettings(listen=("/ip4/127.0.0.1/tcp/0",), cell="testnet", drain_s=2.0),
        overlay=OverlaySettings(ping_interval_s=1.0, ping_timeout_s=2.0),
        compute=ComputeSettings(threads=1, workers_max=2, memory_mb_max=2_048),
        storage=StorageSettings(blob_bytes_max=2 << 30, jobs_bytes_max=2 << 30),
        vehicle=VehicleSettings(adapter="sim", poll_s=0.2),
        limits=Limits(advert_period_ms=10_000, advert_ttl_ms=30_000, advert_gap_ms=200),
    )


def submitter() -> NodeConfig:
    """Asks and computes nothing: no worker, no fixed port, no DHT service."""
    return NodeConfig(
        node=NodeSettings(provides=False, listen=("/ip4/0.0.0.0/tcp/0",), drain_s=2.0),
        overlay=OverlaySettings(dht_server=False),
        compute=ComputeSettings(slots=0),
    )


PRESETS: Final = {"car": parked_car, "testnet-car": testnet_car, "submitter": submitter}


# ---- the file


def load(home: Path, preset: NodeConfig) -> NodeConfig:
    """`preset` with what `config.toml` says otherwise; UsageError names the line's key."""
    path = home / CONFIG_NAME
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        return preset
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > CONFIG_BYTES_MAX:
        raise UsageError(f"{path} has more than {CONFIG_BYTES_MAX} bytes")
    try:
        tables = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    return override(preset, tables, str(path))


def override(preset: NodeConfig, tables: dict[str, Any], where: str) -> NodeConfig:
    """`preset` with single fields replaced; every field is checked against its type."""
    parts = {part.name: getattr(preset, part.name) for part in dataclasses.fields(preset)}
    for name, table in tables.items():
        if name not in parts:
            raise UsageError(f"{where}: there is no table [{name}]; {_known(parts)}")
        if not isinstance(table, dict):
            raise UsageError(f"{where}: [{name}] must be a table")
        parts[name] = _replaced(parts[name], table, f"{where}: {name}.")
    return NodeConfig(**parts)


def _replaced(part: _T, table: dict[str, Any], where: str) -> _T:
    hints = typing.get_type_hints(type(part))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{where}{key} is no setting; {_known(hints)}")
        values[key] = _checked(value, hints[key], where + key)
    return dataclasses.replace(part, **values)  # type: ignore[type-var]


def _checked(value: Any, hint: Any, where: str) -> Any:
    if hint is float and type(value) in (int, float) and value >= 0:
        return float(value)
    if hint is int and type(value) is int and value >= 0:
        return value
    if hint in (bool, str) and type(value) is hint:
        return value
    if typing.get_origin(hint) is Literal and value in typing.get_args(hint):
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_checked(item, inner, where) for item in value)
    raise UsageError(f"{where} must be {_word(hint)}, not {value!r}")


def _word(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if isinstance(hint, types.GenericAlias):
        return f"a list, each {_word(typing.get_args(hint)[0])}"
    words = {int: "a whole number from 0", float: "a number from 0", str: "a text"}
    return words.get(hint, "true or false")


def _known(names: typing.Iterable[str]) -> str:
    return f"there are {', '.join(sorted(names))}"
