"""What a fleet takes back of what its cars' owners allow: stricter in every number, never looser.

    owner's policy + operator's fleet terms -> narrowed -> the policy that the car goes by

The consent names the operator; nobody else's terms count. Prices and what the car is and does
(tariff, wear, draws, departures, a machine that stands for good) stay the owner's: they are no
permissions, and another of them could allow more: a departure replaces the forecast, a lower draw
makes the same energy last longer. Read by `owner`, and by the node for vehicle, workers and meters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ..errors import VerificationFailed
from .budget import RESUME_SOC_PERMILLE, RESUME_TEMP_DC
from .papers import (
    PURPOSE_COMPUTE,
    PURPOSE_ENERGY_BATTERY,
    T_FLEET,
    T_POLICY,
    AdmitRule,
    Caps,
    Consent,
    FleetTerms,
    Policy,
    Resume,
    Submitters,
)
from .sealed import Sealed, unseal
from .types import Account

_STRICTNESS: Final = {1: 0, 0: 1, 2: 2}  # of plugged rules: also from the battery, plug, surplus


def check_fleet(sealed: Sealed, consent: Consent) -> FleetTerms:
    """The fleet terms that narrow this consent; VerificationFailed says why they do not."""
    terms = sealed.open(FleetTerms, T_FLEET)
    if sealed.kid != terms.account:
        raise VerificationFailed("the fleet terms are not signed by the account that they name")
    if terms.network != consent.network:
        raise VerificationFailed("the fleet terms belong to another network")
    if terms.account != consent.operator:
        raise VerificationFailed(
            f"the fleet terms are of account {terms.account.hex()[:8]}; the consent names "
            f"{consent.operator.hex()[:8]} as operator"
        )
    return terms


def policy_in_effect(policy: bytes, fleet: bytes | None) -> Policy:
    """Of papers that were checked, sealed: what this car goes by."""
    own = unseal(policy).open(Policy, T_POLICY)
    return own if fleet is None else narrowed(own, unseal(fleet).open(FleetTerms, T_FLEET))


def narrowed(policy: Policy, fleet: FleetTerms) -> Policy:
    """The policy as far as the fleet goes with it."""
    day_wh = policy.day_wh if fleet.day_wh is None else min(policy.day_wh, fleet.day_wh)
    floor = max(policy.soc_floor_permille, fleet.soc_floor_permille)
    (low, high), (fleet_low, fleet_high) = policy.temp_dc, fleet.temp_dc
    temp = max(low, fleet_low), min(high, fleet_high)
    plugged_rule = max(policy.plugged_rule, fleet.plugged_rule, key=_STRICTNESS.__getitem__)
    if plugged_rule == 1 and not fleet.purposes & PURPOSE_ENERGY_BATTERY:
        plugged_rule = 0
    return replace(
        policy,
        soc_floor_permille=floor,
        reserve_wh=max(policy.reserve_wh, fleet.reserve_wh),
        day_wh=day_wh if fleet.purposes & PURPOSE_COMPUTE else 0,
        plugged_rule=plugged_rule,
        temp_dc=temp,
        low_voltage_mv=max(policy.low_voltage_mv, fleet.low_voltage_mv),
        submitters=_both(policy.submitters, fleet.submitters, fleet.account),
        caps=Caps(*(_cap(own, its) for own, its in zip(policy.caps, fleet.caps, strict=True))),
        metered_bytes_a_day=_least(policy.metered_bytes_a_day, fleet.metered_bytes_a_day),
        resume=_resume(policy.resume, floor, temp),
        sandbox_least=(policy.sandbox_least or 0) | fleet.sandbox_least or policy.sandbox_least,
        quiet=(*(policy.quiet or ()), *(fleet.quiet or ())) or None,
        idle_s=max(policy.idle_s or 0, fleet.idle_s or 0) or None,
        wifi_only=(policy.wifi_only or 0) | (fleet.wifi_only or 0) or None,
        disk_interval_s=max(policy.disk_interval_s or 0, fleet.disk_interval_s or 0) or None,
    )


def _least(own: int | None, its: int | None) -> int | None:
    """None is no bound."""
    bounds = [bound for bound in (own, its) if bound is not None]
    return min(bounds, default=None)


def _cap(own: int, its: int) -> int:
    """0 is no cap."""
    return min(own or its, its or own)


def _resume(resume: Resume | None, floor: int, temp: tuple[int, int]) -> Resume | None:
    """The owner's own thresholds keep their distance to limits that have moved."""
    if resume is None:
        return None
    return Resume(
        min(1_000, max(resume.soc_permille, floor + RESUME_SOC_PERMILLE)),
        max(resume.temp_low_dc, temp[0] + RESUME_TEMP_DC),
        min(resume.temp_high_dc, temp[1] - RESUME_TEMP_DC),
    )


def _both(own: AdmitRule, its: AdmitRule, operator: Account) -> AdmitRule:
    """Who passes both; the car's own account always does (`owner.admits`)."""
    if own.mode is Submitters.NETWORK:
        return its
    if its.mode is Submitters.NETWORK or own == its:
        return own
    either = [
        {*rule.accounts, *([operator] if rule.mode is Submitters.FLEET else [])}
        for rule in (own, its)
    ]
    common = either[0] & either[1]
    if own.mode is its.mode is Submitters.FLEET:
        return AdmitRule(Submitters.FLEET, tuple(sorted(common - {operator})))
    return AdmitRule(Submitters.LIST if common else Submitters.MINE, tuple(sorted(common)))
