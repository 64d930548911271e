"""A fleet narrows what its cars' owners allow, and never widens it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError, VerificationFailed
from meshnode.node.fleet_file import NARROWS, read_fleet
from meshnode.node.founding import ConsentTerms, draft_consent, seeded_key, sign_as
from meshnode.node.policy_file import _READERS
from meshnode.protocol.budget import VehicleState
from meshnode.protocol.narrowing import check_fleet, narrowed, policy_in_effect
from meshnode.protocol.papers import (
    AdmitRule,
    Caps,
    FleetTerms,
    Policy,
    Quiet,
    Resume,
    Submitters,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, Digest, NetworkId

from .test_budget import POLICIES, POLICY, SOUND, budget

NETWORK = NetworkId(bytes(8))
OPERATOR = Account(b"o" * 32)
OWNER, FRIEND, STRANGER = (Account(letter * 32) for letter in (b"c", b"f", b"s"))
NONE = FleetTerms(
    1, NETWORK, OPERATOR, "fleet", 0, 31, 0, 0, 1, (-500, 800), 0,
    AdmitRule(Submitters.NETWORK, ()), Caps(0, 0, 0), 0,
)  # fmt: skip


def test_terms_that_say_nothing_change_nothing() -> None:
    assert narrowed(POLICY, NONE) == POLICY
    own = replace(POLICY, resume=Resume(350, 100, 300), caps=Caps(1, 2, 3), idle_s=60, wifi_only=1)
    found = narrowed(own, NONE)
    assert found == own


def test_the_stricter_of_both_by_hand() -> None:
    own = replace(
        POLICY,
        resume=Resume(310, 60, 390),
        caps=Caps(0, 5, 7),
        metered_bytes_a_day=1_000,
        quiet=(Quiet(127, 0, 60),),
        sandbox_least=1,
    )
    fleet = replace(
        NONE,
        soc_floor_permille=400,
        reserve_wh=12_000,
        day_wh=4_000,
        plugged_rule=2,
        temp_dc=(100, 500),
        low_voltage_mv=12_000,
        caps=Caps(9, 0, 3),
        metered_bytes_a_day=5_000,
        sandbox_least=4,
        quiet=(Quiet(1, 600, 660),),
        idle_s=900,
        wifi_only=1,
        disk_interval_s=60,
    )
    assert narrowed(own, fleet) == replace(
        own,
        soc_floor_permille=400,
        reserve_wh=12_000,
        day_wh=4_000,
        plugged_rule=2,
        temp_dc=(100, 400),
        resume=Resume(420, 110, 390),
        caps=Caps(9, 5, 3),
        sandbox_least=5,
        quiet=(Quiet(127, 0, 60), Quiet(1, 600, 660)),
        idle_s=900,
        wifi_only=1,
        disk_interval_s=60,
    )
    assert narrowed(POLICY, replace(NONE, day_wh=9_000)).day_wh == POLICY.day_wh
    assert narrowed(POLICY, replace(NONE, purposes=7)).plugged_rule == 0  # not from the battery
    assert narrowed(POLICY, replace(NONE, purposes=2)).day_wh == 0
    surplus = replace(POLICY, plugged_rule=2)
    assert narrowed(surplus, replace(NONE, plugged_rule=0)).plugged_rule == 2


def admitted(rule: AdmitRule, payer: Account) -> bool:
    """As `owner.admits`, of a car whose operator is OPERATOR."""
    if rule.mode is Submitters.NETWORK or payer in rule.accounts or payer == OWNER:
        return True
    return rule.mode is Submitters.FLEET and payer == OPERATOR


RULES = st.builds(
    AdmitRule,
    st.sampled_from(Submitters),
    st.lists(st.sampled_from([OPERATOR, FRIEND, STRANGER]), max_size=2, unique=True).map(tuple),
)


@given(RULES, RULES)
def test_who_is_admitted_passes_both(own: AdmitRule, its: AdmitRule) -> None:
    both = narrowed(replace(POLICY, submitters=own), replace(NONE, submitters=its)).submitters
    if own.mode is its.mode and not own.accounts and not its.accounts:
        assert both == own  # nothing has changed, and nothing is shown as if it had
    for payer in (OWNER, OPERATOR, FRIEND, STRANGER):
        assert admitted(both, payer) == (admitted(own, payer) and admitted(its, payer))


FLEETS = st.builds(
    lambda **more: replace(NONE, **more),
    soc_floor_permille=st.integers(0, 1000),
    reserve_wh=st.integers(0, 30_000),
    plugged_rule=st.integers(0, 2),
    temp_dc=st.tuples(st.integers(-300, 600), st.integers(-300, 600)),
    low_voltage_mv=st.integers(0, 15_000),
    purposes=st.integers(0, 31),
    day_wh=st.one_of(st.none(), st.integers(0, 20_000)),
    quiet=st.one_of(st.none(), st.just((Quiet(127, 660, 780),))),
    idle_s=st.one_of(st.none(), st.integers(0, 7_200)),
)
HELD = st.sets(st.sampled_from([Reason.BUDGET, Reason.CHARGE_FLOOR, Reason.TEMPERATURE]))


@given(SOUND, POLICIES, FLEETS, st.integers(0, 20_000_000), HELD)
def test_a_fleet_never_widens_a_budget(
    state: VehicleState, policy: Policy, fleet: FleetTerms, spent_mwh: int, held: set[Reason]
) -> None:
    more: dict[str, Any] = {"spent_today_mwh": spent_mwh, "held": held}
    own = budget(state, policy, **more)
    found = budget(state, narrowed(policy, fleet), **more)
    assert own.may_run or not found.may_run
    assert found.spendable_mwh <= own.spendable_mwh and found.lease_s_max <= own.lease_s_max
    assert not found.may_run or (found.stay_s, found.load_w) == (own.stay_s, own.load_w)
    # Twice is once.
    again = narrowed(narrowed(policy, fleet), fleet)
    assert budget(state, again, **more) == found


def test_whose_terms_they_are() -> None:
    owner, operator, other = (seeded_key(7, f"account/{name}") for name in ("c", "o", "x"))
    consent = draft_consent(
        owner.account, NETWORK, Digest(bytes(32)), bytes(16), 0,
        ConsentTerms(operator=operator.account),
    )  # fmt: skip
    its = replace(NONE, account=operator.account, day_wh=5)
    sealed = sign_as(operator, its)
    assert check_fleet(sealed, consent) == its
    policy = sign_as(owner, replace(POLICY, account=owner.account))
    assert policy_in_effect(policy.wire, sealed.wire).day_wh == 5
    assert policy_in_effect(policy.wire, None).day_wh == POLICY.day_wh
    foreign = sign_as(other, replace(its, account=other.account))
    with pytest.raises(VerificationFailed, match="the consent names"):
        check_fleet(foreign, consent)
    elsewhere = sign_as(operator, replace(its, network=NetworkId(b"elsewher")))
    with pytest.raises(VerificationFailed, match="another network"):
        check_fleet(elsewhere, consent)


# ---- the file


def read(tmp_path: Path, text: str) -> FleetTerms:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    return read_fleet(file, OPERATOR, NETWORK, 0)


def test_a_file_narrows_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    assert read(tmp_path, "") == NONE
    found = read(
        tmp_path,
        """
battery_charge_min_pct = 50
run_on_batteries = false
day_wh = 3000
submitters = "fleet"
purposes = ["compute", "network", "plug", "statistics"]

[[quiet]]
from = "22:00"
until = "06:00"
""",
    )
    assert found == replace(
        NONE,
        soc_floor_permille=500,
        plugged_rule=0,
        day_wh=3_000,
        submitters=AdmitRule(Submitters.FLEET, ()),
        purposes=23,
        quiet=(Quiet(127, 1_320, 359),),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wear_per_kwh = 0.1", "line 1: wear_per_kwh: a fleet narrows only"),
        ("day_wh = 5\n[[tariff]]\nfrom = 1", "line 2: tariff: a fleet narrows only"),
        ("stationary = true", "a fleet narrows only"),
        ("watt_max = 5", "a fleet narrows only"),
        ('[[departure]]\nat = "07:00"', "a fleet narrows only"),
        ('purposes = ["compute", "battery"]', "can take back battery alone"),
        ("day_wh = -1", "line 1: day_wh: a whole number"),
        ('purposes = ["network"]', "stop every car"),
        ("battery_min_temperature = 30\nbattery_max_temperature = 20", "no battery is between"),
    ],
)
def test_what_is_no_narrowing_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_key_is_a_permission_or_not() -> None:
    facts: dict[str, Any] = dict.fromkeys(_READERS.keys() | {"purposes"})
    assert facts.keys() >= NARROWS
    assert facts.keys() - NARROWS == {
        "battery_charge_resume_pct", "battery_resume_temperatures", "battery_chemistry", "awake_w",
        "efficiency_pct", "wear_per_kwh", "stationary", "tariff", "departure", "watt_max",
    }  # fmt: skip
