"""The owner's papers change while a car works: what was granted, what ends, what receipts cite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.allowance import HOUR_MS, Allowance, Used
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.fields import Span
from meshnode.protocol.lease import Stage
from meshnode.protocol.objects import T_RECEIPT, Receipt
from meshnode.protocol.owner import unit_bytes
from meshnode.protocol.papers import (
    T_CONSENT,
    T_FLEET,
    T_POLICY,
    AdmitRule,
    Caps,
    Consent,
    FleetTerms,
    Policy,
    Submitters,
)
from meshnode.protocol.provider import Provider
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import Sealed, seal, unseal
from meshnode.protocol.types import Account
from testnet.sim.mesh import Mesh, Site
from testnet.sim.site import NETWORK, account_keys

from .rogue import Rogue
from .test_mesh import ended, mesh_of, order, submit

ACCOUNT = account_keys(2)  # of car-0, the second node of a mesh
ACCOUNT_OF_SUBMITTER = Account(account_keys(1).account)


def signed(car: Site, policy: dict[str, Any], **consent: Any) -> tuple[Sealed, Sealed]:
    """The car's papers with something else in them, signed by its account."""
    old_policy, old_consent = car.identity.policy, car.identity.consent
    assert old_policy is not None and old_consent is not None
    terms = replace(unseal(old_policy).open(Policy, T_POLICY), **policy)
    policy_sealed = seal(terms, T_POLICY, ACCOUNT.account, ACCOUNT.sign)
    given = replace(
        unseal(old_consent).open(Consent, T_CONSENT), policy=policy_sealed.digest, **consent
    )
    return seal(given, T_CONSENT, ACCOUNT.account, ACCOUNT.sign), policy_sealed


def change(mesh: Mesh, policy: dict[str, Any], **consent: Any) -> Sealed:
    car = mesh.sites["car-0"]
    given, terms = signed(car, policy, **consent)
    mesh.feed(car, ev.TermsChanged(given.wire, terms.wire))
    return given


def provider_of(mesh: Mesh) -> Provider:
    node = mesh.sites["car-0"].node
    assert node is not None
    return node.provider


def receipts(mesh: Mesh) -> list[Receipt]:
    stored = mesh.sites["car-0"].disk.signed
    return [unseal(one.sealed).open(Receipt, T_RECEIPT) for one in stored if one.typ == T_RECEIPT]


def findings(mesh: Mesh) -> list[Reason]:
    signed_objects = mesh.sites["car-0"].disk.signed
    return [one.reason for one in check_objects(signed_objects, NETWORK).findings]


def running(mesh: Mesh, unit_ms: int, units: int = 1) -> None:
    """The car is in the middle of a unit."""
    mesh.unit_ms = unit_ms
    submit(mesh, order(units))
    mesh.rest(unit_ms * 2 // 3)
    assert Stage.RUNNING in {one.stage for one in provider_of(mesh).leases.values()}


def test_a_receipt_cites_what_was_in_force_when_the_lease_was_granted() -> None:
    mesh = mesh_of(1, 1)
    running(mesh, 300_000)
    before = mesh.sites["car-0"].identity.consent
    assert before is not None
    now_ms = mesh.now(mesh.sites["car-0"]).unix_ms
    given = change(mesh, {"day_wh": 19_000}, given_ms=now_ms, replaces=unseal(before).digest)
    assert mesh.run(lambda: ended(mesh), ms_max=400_000)
    mesh.rest(3_000)
    (receipt,) = receipts(mesh)
    assert receipt.consent == unseal(before).digest != given.digest
    assert findings(mesh) == []
    submit(mesh, order(1, nonce=1), 2)
    assert mesh.run(lambda: ended(mesh), ms_max=400_000)
    mesh.rest(3_000)
    assert receipts(mesh)[-1].consent == given.digest and findings(mesh) == []


@pytest.mark.parametrize("signed_word", [True, False])
def test_a_withdrawal_ends_the_run_in_hand_and_takes_no_other(signed_word: bool) -> None:
    mesh = mesh_of(1, 1)
    running(mesh, 20_000, units=8)
    car = mesh.sites["car-0"]
    before = car.identity.consent
    assert before is not None
    if signed_word:
        now_ms = mesh.now(car).unix_ms
        change(mesh, {}, replaces=unseal(before).digest, withdrawn_ms=now_ms + 5_000)
    else:
        mesh.feed(car, ev.TermsChanged(None, None))
    provider = provider_of(mesh)
    assert provider.owner.may_run() is Reason.NO_CONSENT
    starts = len(mesh.began) + sum("StartExec" in line for line in mesh.trace)
    mesh.rest(120_000)
    assert not [one for one in provider.leases.values() if one.stage is Stage.RUNNING]
    assert len(mesh.began) + sum("StartExec" in line for line in mesh.trace) == starts
    assert findings(mesh) == []  # what was done before it is receipted, and holds
    change(mesh, {}, given_ms=mesh.now(car).unix_ms)
    assert provider.owner.may_run() is Reason.OK
    assert mesh.run(lambda: ended(mesh), ms_max=2_000_000)


@pytest.mark.parametrize(
    "policy", [{"submitters": AdmitRule(Submitters.MINE, ())}, {"sandbox_least": 65_535}]
)
def test_a_narrower_policy_ends_what_it_would_not_grant(policy: dict[str, Any]) -> None:
    mesh = mesh_of(1, 1)
    running(mesh, 20_000, units=8)
    change(mesh, policy)
    mesh.rest(1_000)
    assert all(one.ended for one in provider_of(mesh).leases.values())


def narrowing(mesh: Mesh, by: Account, **terms: Any) -> Sealed:
    every: dict[str, Any] = {
        "purposes": 31,
        "soc_floor_permille": 0,
        "reserve_wh": 0,
        "plugged_rule": 1,
        "temp_dc": (-500, 800),
        "low_voltage_mv": 0,
        "submitters": AdmitRule(Submitters.NETWORK, ()),
        "caps": Caps(0, 0, 0),
        "sandbox_least": 0,
    }
    now_ms = mesh.now(mesh.sites["car-0"]).unix_ms
    fleet = FleetTerms(1, NETWORK, by, "fleet", now_ms, **{**every, **terms})
    key = account_keys(1) if by == ACCOUNT_OF_SUBMITTER else ACCOUNT
    return seal(fleet, T_FLEET, key.account, key.sign)


def test_a_fleet_narrows_and_receipts_say_so() -> None:
    mesh = mesh_of(1, 1)
    car = mesh.sites["car-0"]
    given, policy = signed(car, {}, operator=ACCOUNT_OF_SUBMITTER)
    mesh.feed(car, ev.TermsChanged(given.wire, policy.wire))
    fleet = narrowing(mesh, ACCOUNT_OF_SUBMITTER, caps=Caps(2, 0, 0))
    mesh.feed(car, ev.TermsChanged(given.wire, policy.wire, fleet.wire))
    for nonce in range(2):
        submit(mesh, order(1, nonce=nonce), nonce + 1)
        assert mesh.run(lambda: ended(mesh), ms_max=60_000)
    mesh.rest(3_000)
    assert {receipt.fleet for receipt in receipts(mesh)} == {fleet.digest}
    assert findings(mesh) == []
    submit(mesh, order(1, nonce=5), 5)
    mesh.rest(20_000)
    assert not ended(mesh)  # the fleet lets an account have two leases a day
    mesh.feed(car, ev.TermsChanged(given.wire, policy.wire))
    assert mesh.run(lambda: ended(mesh), ms_max=2_000_000)
    mesh.rest(3_000)
    assert receipts(mesh)[-1].fleet is None


def test_terms_of_another_operator_let_nothing_run() -> None:
    """The node checks them before; should they come all the same, what holds is not known."""
    mesh = mesh_of(1, 1)
    car = mesh.sites["car-0"]
    given, policy = signed(car, {}, operator=ACCOUNT_OF_SUBMITTER)
    fleet = narrowing(mesh, Account(ACCOUNT.account))
    mesh.feed(car, ev.TermsChanged(given.wire, policy.wire, fleet.wire))
    assert provider_of(mesh).owner.may_run() is Reason.NO_CONSENT


def test_consent_to_anything_but_computing_is_none_to_compute() -> None:
    mesh = mesh_of(1, 1)
    change(mesh, {}, purposes=2)
    assert provider_of(mesh).owner.may_run() is Reason.NO_CONSENT


def test_leases_in_hand_keep_their_energy() -> None:
    """A run of 0.4 Wh fits a budget of 0.5 Wh, and another beside it does not."""
    mesh = mesh_of(1, 3)
    mesh.unit_ms = 4_800
    car = mesh.sites["car-0"]
    mesh.kflop_per_unit = 10
    submit(mesh, order(1))
    assert mesh.run(lambda: ended(mesh), ms_max=60_000)  # now it knows what a unit takes
    budget = ev.BudgetRead(True, Reason.OK, 500, 300, 7_200, 0, None, 300)
    mesh.feed(car, budget)
    admission, owner = provider_of(mesh).admission, provider_of(mesh).owner
    submit(mesh, order(1, nonce=1), 2)
    mesh.rest(500)
    (lease,) = [one for one in provider_of(mesh).leases.values() if not one.ended]
    assert admission._promised_mwh(lease.offer) == 0
    other = replace(lease.offer, attempt=9)
    assert admission._promised_mwh(other) == pytest.approx(owner.run_mwh(4_800))
    reason, text = owner.affords(other, 0, admission._promised_mwh(other))
    assert reason is Reason.BUDGET and text.endswith("0.1 Wh may be spent")
    assert owner.affords(other, 0, 0.0) == (Reason.OK, "")


def test_the_energy_of_a_run_that_was_stopped_counts() -> None:
    mesh = mesh_of(1, 1)
    running(mesh, 60_000)
    provider = provider_of(mesh)
    (lease,) = provider.leases.values()
    mesh.feed(mesh.sites["car-0"], ev.Recall(Reason.DRIVING, 100))
    assert provider.owner.drawn_uj == 0 and provider.owner.stopped
    meters = ev.Meters(40_000, 40_000, energy_uj=7_000_000, method=1, battery_uj=2_000_000)
    exec_id = next(iter(provider.owner.stopped))
    mesh.feed(mesh.sites["car-0"], ev.ExecEnded(exec_id, Reason.STOPPED_BY_OWNER, meters))
    owner = provider.owner
    assert (owner.drawn_uj, owner.drawn_battery_uj, owner.worked_ms) == (
        7_000_000,
        2_000_000,
        40_000,
    )
    assert not owner.stopped and lease.receipted == 0
    assert (owner.unpaid_uj, owner.unpaid_battery_uj, owner.unpaid_ms) == (
        7_000_000,
        2_000_000,
        40_000,
    )


DAY_MS = 24 * 3_600_000


def done(mesh: Mesh) -> int:
    return sum(receipt.work.units.size for receipt in receipts(mesh))


def test_an_account_gets_no_more_leases_a_day_than_its_cap() -> None:
    mesh = mesh_of(1, 1)
    change(mesh, {"caps": Caps(3, 0, 0)})
    submit(mesh, order(20, lease_units_max=4))
    mesh.rest(60_000)
    assert len({receipt.work.lease_id for receipt in receipts(mesh)}) == 3
    assert provider_of(mesh)._out.counters["refused_account_cap"]
    found = mesh.sites["submitter"].node
    assert found is not None
    job = next(iter(found.jobs.all.values()))
    assert not job.unsuited, "it waits: the cap is free again"
    assert not ended(mesh) and provider_of(mesh)._out.counters["refused_account_cap"] < 10
    change(mesh, {"caps": Caps(0, 0, 0)})
    mesh.rest(700_000)
    assert ended(mesh)


@pytest.mark.parametrize("crashes", [False, True])
def test_what_an_account_has_had_is_known_after_a_crash_and_forgotten_after_a_day(
    crashes: bool,
) -> None:
    mesh = mesh_of(1, 1)
    mesh.unit_ms = 1_000
    change(mesh, {"caps": Caps(0, 0, 10)})
    submit(mesh, order(8, lease_units_max=2))
    assert mesh.run(lambda: ended(mesh), ms_max=60_000)
    mesh.rest(2_000)
    if crashes:
        mesh.crash("car-0")
        mesh.boot("car-0")
        change(mesh, {"caps": Caps(0, 0, 10)})
        mesh.connect_all()
    submit(mesh, order(8, nonce=1, lease_units_max=2), 2)
    mesh.rest(60_000)
    assert 8 <= done(mesh) <= 8 + 2 * 2, "eight seconds of ten are used"
    now_ms = mesh.now(mesh.sites["car-0"]).unix_ms
    allowance = provider_of(mesh).owner.allowance
    assert allowance.used(ACCOUNT_OF_SUBMITTER, now_ms).device_ms >= 8_000
    assert allowance.used(ACCOUNT_OF_SUBMITTER, now_ms + DAY_MS + HOUR_MS) == Used()


def test_who_cancels_just_before_the_end_has_had_the_device_all_the_same() -> None:
    mesh = mesh_of(1, 1)
    running(mesh, 60_000)
    mesh.feed(mesh.sites["car-0"], ev.Recall(Reason.DRIVING, 100))
    exec_id = next(iter(provider_of(mesh).owner.stopped))
    meters = ev.Meters(40_000, 40_000, energy_uj=7_000_000, method=1)
    mesh.feed(mesh.sites["car-0"], ev.ExecEnded(exec_id, Reason.STOPPED_BY_OWNER, meters))
    allowance = provider_of(mesh).owner.allowance
    now_ms = mesh.now(mesh.sites["car-0"]).unix_ms
    assert allowance.used(ACCOUNT_OF_SUBMITTER, now_ms).device_ms == 40_000


def test_a_clock_that_was_ahead_neither_frees_nor_locks_an_account() -> None:
    allowance, account, year_ms = Allowance(), Account(bytes(32)), 365 * DAY_MS
    allowance.add(account, year_ms, Used(leases=1))
    assert allowance.used(account, 1_000) == Used()
    for _ in range(5):
        allowance.add(account, 1_000, Used(leases=1))
    assert allowance.used(account, 1_000).leases == 5
    assert allowance.used(account, DAY_MS).leases == 5, "the hour in which the day begins"
    assert allowance.used(account, DAY_MS + HOUR_MS).leases == 0


def test_an_offer_with_a_dtype_that_is_none_is_refused_under_a_cap_too() -> None:
    mesh = mesh_of(1, 1)
    change(mesh, {"caps": Caps(0, 1 << 30, 0)})
    rogue, car = Rogue(mesh, "rogue"), mesh.sites["car-0"]
    mesh.connect_all()
    mesh.rest(100)
    channel, job = rogue.agree(car), rogue.job(4)
    bad = replace(job, outs=(job.outs[0]._replace(dtype="float99"),))
    rogue.say(car, rogue.offer(car, channel, bad, Span(0, 4)))
    mesh.rest(100)
    assert [each.reason for each in rogue.all_heard(messages.Refuse)] == [Reason.KERNEL_SPEC]


def test_bytes_of_leases_in_hand_count() -> None:
    mesh = mesh_of(1, 3)
    mesh.unit_ms = 5_000
    whole = unit_bytes_of(mesh)
    change(mesh, {"caps": Caps(0, 3 * whole, 0)})
    submit(mesh, order(8, nonce=1, lease_units_max=1), 2)
    mesh.rest(4_000)
    assert len(provider_of(mesh).leases) <= 3


def unit_bytes_of(mesh: Mesh) -> int:
    """Of a unit of `order`."""
    running(mesh, 300)
    (lease,) = provider_of(mesh).leases.values()
    found = unit_bytes(lease.offer.job)
    mesh.rest(5_000)
    return found


def test_bytes_of_a_run_count_before_they_travel() -> None:
    mesh = mesh_of(1, 1)
    change(mesh, {"caps": Caps(0, 1, 0)})
    submit(mesh, order(4))
    mesh.rest(10_000)
    assert done(mesh) == 0
    change(mesh, {"caps": Caps(0, 1_000_000, 0)})
    mesh.rest(700_000)
    assert done(mesh) >= 4
