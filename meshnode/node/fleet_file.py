"""What a fleet's operator does not let its cars do, from a TOML file with the policy's keys.

    fleet.toml -> read_fleet -> FleetTerms -> signed by the operator's account -> `fleet install`

Between the CLI and `policy_file`. A key that the file does not have limits nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..errors import UsageError
from ..protocol.papers import (
    PURPOSE_COMPUTE,
    PURPOSE_ENERGY_BATTERY,
    AdmitRule,
    FleetTerms,
    Submitters,
)
from ..protocol.types import Account, NetworkId
from .founding import PolicyTerms
from .policy_file import PURPOSES, read_policy

_NO_BOUND: Final = 1_000_000_000  # the most Wh that a file can say
WIDEST: Final = PolicyTerms(
    soc_floor_permille=0,
    reserve_wh=0,
    day_wh=_NO_BOUND,
    plugged_rule=1,
    temp_dc=(-500, 800),
    low_voltage_mv=0,
    submitters=Submitters.NETWORK,
    sandbox_least=0,
)
"""Narrows nothing."""
NARROWS: Final = frozenset(
    {
        "battery_charge_min_pct",
        "battery_min_temperature",
        "battery_max_temperature",
        "run_on_batteries",
        "surplus_only",
        "idle_time_to_run",
        "low_voltage_min_v",
        "reserve_wh",
        "day_wh",
        "submitters",
        "account_leases_max",
        "account_bytes_max",
        "account_device_s_max",
        "disk_interval",
        "network_wifi_only",
        "metered_bytes_a_day",
        "sandbox_least",
        "quiet",
        "purposes",
    }
)
"""The rest of a policy is no permission: prices, and what the car is and does."""


def read_fleet(path: Path, operator: Account, network: NetworkId, now_ms: int) -> FleetTerms:
    """What the file says; UsageError, in one line with the place, for what is no narrowing."""
    said = read_policy(path, WIDEST, only=NARROWS)
    terms = said.terms
    every = sum(PURPOSES.values())
    purposes = every if said.purposes is None else said.purposes
    if not purposes & PURPOSE_COMPUTE:
        raise UsageError(
            f"{path}: purposes without compute stop every car; say day_wh = 0 if that is meant"
        )
    if purposes | PURPOSE_ENERGY_BATTERY != every:
        raise UsageError(f"{path}: of an owner's purposes a fleet can take back battery alone")
    low, high = terms.temp_dc
    if low >= high:
        raise UsageError(f"{path}: no battery is between {low / 10} and {high / 10} degrees")
    return FleetTerms(
        1,
        network,
        operator,
        "fleet",
        now_ms,
        purposes,
        terms.soc_floor_permille,
        terms.reserve_wh,
        terms.plugged_rule,
        terms.temp_dc,
        terms.low_voltage_mv,
        AdmitRule(terms.submitters, terms.accounts),
        terms.caps,
        terms.sandbox_least,
        None if terms.day_wh == _NO_BOUND else terms.day_wh,
        terms.metered_bytes_a_day,
        terms.quiet,
        terms.idle_s or None,
        int(terms.wifi_only) or None,
        terms.disk_interval_s or None,
    )
