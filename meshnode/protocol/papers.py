"""What an owner and a network's maker sign: genesis, mandate, policy, consent.

The papers come before any work and name who may do what. They are read by a car's own machine
(owner.py, budget.py) and by who meets it (agreement.py). objects.py has what is signed in the
course of work, and says what the keys have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, Literal, NamedTuple

from .fields import (
    ACCOUNT,
    ADDRS,
    DIGEST,
    ID16,
    MS,
    NETWORK,
    PEER,
)
from .rule import (
    Code,
    Fixed,
    Int,
    Many,
    Row,
    Tstr,
    Uint,
    at,
    rule,
)
from .types import (
    Account,
    Digest,
    NetworkId,
    Peer,
)

T_GENESIS: Final = "mesh-genesis/1"
T_MANDATE: Final = "mesh-mandate/1"
T_POLICY: Final = "mesh-policy/1"
T_CONSENT: Final = "mesh-consent/1"
T_FLEET: Final = "mesh-fleet/1"

NO_CURRENCY: Final = "XXX"  # ISO 4217: no currency involved


# Bits of a consent's purposes.
PURPOSE_COMPUTE: Final = 1
PURPOSE_NETWORK: Final = 2
PURPOSE_ENERGY_PLUG: Final = 4
PURPOSE_ENERGY_BATTERY: Final = 8
PURPOSE_STATISTICS: Final = 16


class NetworkKind(IntEnum):
    TEST = 0
    HOME = 1
    COMMUNITY = 2
    FLEET = 3


class Credit(IntEnum):
    FREE = 0
    GUARANTEED = 1
    PREPAID = 2


class Role(IntEnum):
    """Bits of a mandate."""

    PROVIDE = 1
    REQUEST = 2


class Submitters(IntEnum):
    MINE = 0
    FLEET = 1
    NETWORK = 2
    LIST = 3


@rule
@dataclass(frozen=True, slots=True)
class Genesis:
    """Names a network; signed by its maker. Network id: first 8 bytes of the payload's SHA-256."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    maker: Annotated[Account, at(2, ACCOUNT)]
    name_of_object: Annotated[Literal["genesis"], at(4, Fixed("genesis"))]
    name: Annotated[str, at(5, Tstr(64))]
    kind: Annotated[NetworkKind, at(6, Code(NetworkKind))]
    currency: Annotated[str, at(7, Tstr(3, size=3))]
    credit: Annotated[Credit, at(8, Code(Credit))]
    bootstrap: Annotated[tuple[str, ...], at(9, ADDRS)]
    release_keys: Annotated[tuple[Account, ...], at(10, Many(ACCOUNT, 8))]
    protocol: Annotated[int, at(11, Uint(65535))]
    created_ms: Annotated[int, at(12, MS)]


@rule
@dataclass(frozen=True, slots=True)
class Mandate:
    """An account lets a node key act for it, for at most seven days and up to a credit limit."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    account: Annotated[Account, at(2, ACCOUNT)]
    peer: Annotated[Peer, at(3, PEER)]
    name_of_object: Annotated[Literal["mandate"], at(4, Fixed("mandate"))]
    roles: Annotated[int, at(5, Uint(3))]
    credit_nano: Annotated[int, at(6, Int())]
    not_before_ms: Annotated[int, at(7, MS)]
    not_after_ms: Annotated[int, at(8, MS)]


class Band(NamedTuple):
    first_minute: int
    last_minute: int
    nano_per_kwh: int


class Departure(NamedTuple):
    weekday: int
    minute: int
    wh: int


class Quiet(NamedTuple):
    """No work from one minute of the day to another, `last_minute` included; past midnight the
    weekday is that of the beginning. Bit 0 of `weekdays` is Monday."""

    weekdays: int
    first_minute: int
    last_minute: int


class Resume(NamedTuple):
    """Work resumes only past these, so that a reading at the edge does not flap."""

    soc_permille: int
    temp_low_dc: int
    temp_high_dc: int


class AdmitRule(NamedTuple):
    mode: Submitters
    accounts: tuple[Account, ...]


class Caps(NamedTuple):
    """Per account, in any 24 hours; 0 is no cap."""

    leases: int
    bytes: int
    device_s: int


@rule
@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner allows, in numbers; signed by the owner's account key."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    account: Annotated[Account, at(2, ACCOUNT)]
    name_of_object: Annotated[Literal["policy"], at(4, Fixed("policy"))]
    soc_floor_permille: Annotated[int, at(5, Uint(1000))]
    reserve_wh: Annotated[int, at(6, Uint())]
    day_wh: Annotated[int, at(7, Uint())]
    watt_max: Annotated[int, at(8, Uint())]
    plugged_rule: Annotated[int, at(9, Uint(2))]
    temp_dc: Annotated[tuple[int, int], at(10, Row(None, Int(), Int()))]
    low_voltage_mv: Annotated[int, at(11, Uint())]
    wear_nano_per_kwh: Annotated[int, at(12, Uint())]
    tariff: Annotated[
        tuple[Band, ...], at(13, Many(Row(Band, Uint(1439), Uint(1439), Uint()), 48, 1))
    ]
    efficiency_permille: Annotated[int, at(14, Uint(1000))]
    awake_w: Annotated[int, at(15, Uint())]
    submitters: Annotated[AdmitRule, at(18, Row(AdmitRule, Code(Submitters), Many(ACCOUNT, 256)))]
    caps: Annotated[Caps, at(19, Row(Caps, Uint(), Uint(), Uint()))]
    departures: Annotated[
        tuple[Departure, ...] | None,
        at(16, Many(Row(Departure, Uint(6), Uint(1439), Uint()), 28, 1), optional=True),
    ] = None
    metered_bytes_a_day: Annotated[int | None, at(17, Uint(), optional=True)] = None
    resume: Annotated[
        Resume | None, at(20, Row(Resume, Uint(1000), Int(), Int()), optional=True)
    ] = None
    sandbox_least: Annotated[int | None, at(21, Uint(65535), optional=True)] = None
    stationary: Annotated[int | None, at(22, Uint(1), optional=True)] = None
    quiet: Annotated[
        tuple[Quiet, ...] | None,
        at(23, Many(Row(Quiet, Uint(127), Uint(1439), Uint(1439)), 28, 1), optional=True),
    ] = None
    idle_s: Annotated[int | None, at(24, Uint(86_400), optional=True)] = None
    wifi_only: Annotated[int | None, at(25, Uint(1), optional=True)] = None
    disk_interval_s: Annotated[int | None, at(26, Uint(86_400), optional=True)] = None


class Share(NamedTuple):
    account: Account
    role: int
    parts: int


@rule
@dataclass(frozen=True, slots=True)
class Consent:
    """The owner's yes: purposes, split, policy and the notice that was shown; revocable."""

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    account: Annotated[Account, at(2, ACCOUNT)]
    name_of_object: Annotated[Literal["consent"], at(4, Fixed("consent"))]
    operator: Annotated[Account, at(5, ACCOUNT)]
    vehicle: Annotated[bytes, at(6, ID16)]
    purposes: Annotated[int, at(7, Uint(65535))]
    shares: Annotated[
        tuple[Share, ...],
        at(8, Many(Row(Share, ACCOUNT, Uint(4), Uint(10_000)), 16, 1)),
    ]
    policy: Annotated[Digest, at(9, DIGEST)]
    notice: Annotated[Digest, at(10, DIGEST)]
    language: Annotated[str, at(11, Tstr(16))]
    given_ms: Annotated[int, at(12, MS)]
    lapses_ms: Annotated[int, at(13, MS)]
    replaces: Annotated[Digest | None, at(14, DIGEST, optional=True)] = None
    withdrawn_ms: Annotated[int | None, at(15, MS, optional=True)] = None

    def __post_init__(self) -> None:
        if sum(share.parts for share in self.shares) != 10_000:
            raise ValueError("shares do not add up to 10 000")


@rule
@dataclass(frozen=True, slots=True)
class FleetTerms:
    """What an operator does not let its cars do, whatever their owners allow; signed by it.

    Names and units are the policy's (`narrowing` says how the two meet); absent is no limit.
    """

    version: Annotated[Literal[1], at(0, Fixed(1))]
    network: Annotated[NetworkId, at(1, NETWORK)]
    account: Annotated[Account, at(2, ACCOUNT)]
    name_of_object: Annotated[Literal["fleet"], at(4, Fixed("fleet"))]
    given_ms: Annotated[int, at(5, MS)]
    purposes: Annotated[int, at(6, Uint(65535))]
    soc_floor_permille: Annotated[int, at(7, Uint(1000))]
    reserve_wh: Annotated[int, at(8, Uint())]
    plugged_rule: Annotated[int, at(9, Uint(2))]
    temp_dc: Annotated[tuple[int, int], at(10, Row(None, Int(), Int()))]
    low_voltage_mv: Annotated[int, at(11, Uint())]
    submitters: Annotated[AdmitRule, at(12, Row(AdmitRule, Code(Submitters), Many(ACCOUNT, 256)))]
    caps: Annotated[Caps, at(13, Row(Caps, Uint(), Uint(), Uint()))]
    sandbox_least: Annotated[int, at(14, Uint(65535))]
    day_wh: Annotated[int | None, at(15, Uint(), optional=True)] = None
    metered_bytes_a_day: Annotated[int | None, at(16, Uint(), optional=True)] = None
    quiet: Annotated[
        tuple[Quiet, ...] | None,
        at(17, Many(Row(Quiet, Uint(127), Uint(1439), Uint(1439)), 28, 1), optional=True),
    ] = None
    idle_s: Annotated[int | None, at(18, Uint(86_400), optional=True)] = None
    wifi_only: Annotated[int | None, at(19, Uint(1), optional=True)] = None
    disk_interval_s: Annotated[int | None, at(20, Uint(86_400), optional=True)] = None
