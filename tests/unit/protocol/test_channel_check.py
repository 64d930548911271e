"""A whole history that holds, and every way of touching it that must be found."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.node.fleet_file import read_fleet
from meshnode.node.founding import seeded_genesis, seeded_key, seeded_papers
from meshnode.protocol.agreement import FREE_RATES
from meshnode.protocol.channel import DISPUTED_MAX, ProviderChannel, RequesterChannel
from meshnode.protocol.channel_check import Checked, check_objects
from meshnode.protocol.effects import SignedObject
from meshnode.protocol.fields import Span
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.merkle import root
from meshnode.protocol.objects import (
    T_ACCEPT,
    T_AGREEMENT,
    T_RECEIPT,
    Acceptance,
    Agreement,
    Cited,
    Dispute,
    Measured,
    Method,
    Outcome,
    Rate,
    Receipt,
    Verdict,
    Work,
)
from meshnode.protocol.outbox import Identity, row
from meshnode.protocol.papers import T_CONSENT, T_FLEET, T_MANDATE, Consent, Mandate
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import Sealed, seal, unseal
from meshnode.protocol.types import Digest, JobId, LeaseId

SEED = 7
NOW_MS = 1_800_000_000_000
NETWORK = seeded_genesis(SEED).ident
REQUESTER = seeded_key(SEED, "node/submitter")
MINE = seeded_papers(SEED, "submitter", NOW_MS, car=False)


def sealed_by(key: KeySigner, obj: object, typ: str) -> Sealed:
    return seal(obj, typ, key.peer, key.sign)


@dataclass
class Writer:
    """One channel of one car with the submitter, written as both sides would."""

    car: str
    rates: tuple[Rate, ...] = FREE_RATES
    fleet: Digest | None = None

    def __post_init__(self) -> None:
        self.key = seeded_key(SEED, f"node/{self.car}")
        self.papers = seeded_papers(SEED, self.car, NOW_MS, car=True)
        theirs = self.papers.mandate.open(Mandate, T_MANDATE)
        mine = MINE.mandate.open(Mandate, T_MANDATE)
        self.agreement = Agreement(
            1,
            NETWORK,
            self.key.peer,
            REQUESTER.peer,
            "agreement",
            theirs.account,
            mine.account,
            "XXX",
            self.rates,
            0,
            0,
            60_000,
            theirs.not_after_ms,
            14 * 86_400,
            self.papers.mandate.digest,
            MINE.mandate.digest,
            bytes(16),
        )
        asked = sealed_by(REQUESTER, self.agreement, T_AGREEMENT)
        agreed = sealed_by(self.key, self.agreement, T_AGREEMENT)
        self.rows = [row(s) for s in (*MINE.all(), *self.papers.all(), asked, agreed)]
        self.provider = ProviderChannel(self.agreement, asked.digest)
        self.requester = RequesterChannel(self.agreement, asked.digest)

    def receipt(self, first: int, count: int, job: int = 1) -> Digest:
        work = Work(
            JobId(bytes([job]) * 16),
            Span(first, count),
            Digest(bytes([2]) * 32),
            Digest(bytes([3]) * 32),
            root([]),
            root([bytes([unit % 251]) * 32 for unit in range(first, first + count)]),
            Outcome.DONE,
            0,
            LeaseId(bytes([4]) * 16),
            0,
        )
        measured = Measured(10 * count, 12 * count, count, 0, 0, 5, 1, 300, 0)
        consent, policy = self.papers.consent, self.papers.policy
        assert consent is not None and policy is not None
        identity = Identity(
            NETWORK,
            self.key.peer,
            self.agreement.payee,
            "cell",
            "XXX",
            3,
            self.papers.mandate.wire,
            None,
            None,
            frozenset(),
        )
        period = (NOW_MS + 1_000, NOW_MS + 2_000)
        cited = Cited(consent.digest, policy.digest, self.fleet)
        receipt = self.provider.mint(identity, work, measured, period, cited)
        sealed = sealed_by(self.key, receipt, T_RECEIPT)
        self.provider.minted(receipt, sealed)
        assert self.requester.check(receipt, sealed.digest, NOW_MS) is Reason.OK
        self.requester.take(receipt, sealed.digest, 0)
        self.rows.append(row(sealed))
        return sealed.digest

    def accept(self, disputes: tuple[Dispute, ...] = (), *, lost: bool = False) -> Reason:
        """What the provider says to it; it stands in the books all the same, unless it is lost."""
        newest = self.provider.open[max(self.provider.open)]
        withheld = sum(dispute.withheld_nano for dispute in disputes)
        self.requester.withheld_nano += withheld
        acceptance = Acceptance(
            1,
            NETWORK,
            self.requester.digest,
            max(self.provider.open),
            newest.digest,
            self.requester.total_nano - self.requester.withheld_nano,
            Verdict(Method.NONE, 0, 0),
            NOW_MS + 3_000,
            None,
            disputes or None,
            self.requester.disputed,
        )
        sealed = sealed_by(REQUESTER, acceptance, T_ACCEPT)
        if disputes:
            self.requester.disputed = sealed.digest
        self.requester.accepted(acceptance, sealed.wire)
        if lost:
            return Reason.OK
        self.rows.append(row(sealed))
        return self.take(sealed)

    def take(self, sealed: Sealed) -> Reason:
        acceptance = sealed.open(Acceptance, T_ACCEPT)
        reason = self.provider.take(acceptance, sealed.digest)
        if reason is Reason.OK:
            self.provider.settle(acceptance)
        return reason


def history() -> list[SignedObject]:
    """Two cars, seven receipts, four acceptances: the shape that a killed car leaves."""
    one, two = Writer("car-0", (Rate(0, 500, 7),)), Writer("car-1")
    for number in range(3):
        one.receipt(number * 8, 8)
        if number:
            one.accept()
    one.receipt(24, 4)
    two.receipt(28, 8)
    two.receipt(36, 4)
    two.accept()
    one.accept()
    two.receipt(40, 1)
    rows = one.rows + two.rows
    unique = {(r.digest, r.sealed): r for r in rows}  # the submitter's mandate stands once
    return list(unique.values())


HISTORY = history()
RECEIPTS = [at for at, stored in enumerate(HISTORY) if stored.typ == T_RECEIPT]
COVERED = RECEIPTS[:-1]  # the last one was not accepted yet


def reasons(rows: list[SignedObject]) -> set[Reason]:
    return {finding.reason for finding in check(rows).findings}


def check(rows: list[SignedObject]) -> Checked:
    return check_objects(rows, NETWORK)


def test_an_honest_history_holds() -> None:
    checked = check(HISTORY)
    assert checked.findings == ()
    assert (checked.receipts, checked.accepted, len(checked.chains)) == (7, 6, 2)
    paid = {chain.agreement.provider: chain.accepted_nano for chain in checked.chains}
    assert paid[seeded_key(SEED, "node/car-0").peer] == 280 * 500 // 7


@pytest.mark.parametrize("at", COVERED)
def test_a_deleted_receipt_is_a_gap(at: int) -> None:
    assert Reason.GAP in reasons(HISTORY[:at] + HISTORY[at + 1 :])


@pytest.mark.parametrize("at", RECEIPTS)
def test_a_duplicated_receipt_is_found(at: int) -> None:
    assert reasons([*HISTORY, HISTORY[at]]) == {Reason.DUPLICATE}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_two_swapped_receipts_are_found(data: st.DataObject) -> None:
    a = data.draw(st.sampled_from(RECEIPTS))
    b = data.draw(st.sampled_from([at for at in RECEIPTS if at != a]))
    contents = list(HISTORY)
    contents[a] = dataclasses.replace(HISTORY[a], sealed=HISTORY[b].sealed)
    contents[b] = dataclasses.replace(HISTORY[b], sealed=HISTORY[a].sealed)
    assert Reason.MISMATCH in reasons(contents)
    rows = list(HISTORY)
    rows[a], rows[b] = rows[b], rows[a]
    same_channel = (a in RECEIPTS[:4]) == (b in RECEIPTS[:4])
    if same_channel:
        assert Reason.MISMATCH in reasons(rows)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    at = data.draw(st.sampled_from(range(len(HISTORY))))
    stored = HISTORY[at]
    place = data.draw(st.integers(0, 8 * len(stored.sealed) - 1))
    touched = bytearray(stored.sealed)
    touched[place // 8] ^= 1 << place % 8
    rows = list(HISTORY)
    rows[at] = dataclasses.replace(stored, sealed=bytes(touched))
    assert reasons(rows) & {Reason.BAD_SIGNATURE, Reason.BAD_FRAME, Reason.MISMATCH}


@pytest.mark.parametrize("at", RECEIPTS)
def test_a_receipt_signed_anew_by_another_key_is_found(at: int) -> None:
    receipt = unseal(HISTORY[at].sealed).open(Receipt, T_RECEIPT)
    rows = list(HISTORY)
    rows[at] = row(sealed_by(REQUESTER, receipt, T_RECEIPT))
    found = reasons(rows)
    assert Reason.BAD_SIGNATURE in found
    own = [row(sealed_by(KeySigner(bytes([9]) * 32), receipt, T_RECEIPT))]
    assert reasons([*HISTORY, *own]) == {Reason.BAD_SIGNATURE}


@pytest.mark.parametrize("at", RECEIPTS[:3])
def test_a_second_receipt_for_one_place_is_equivocation(at: int) -> None:
    receipt = unseal(HISTORY[at].sealed).open(Receipt, T_RECEIPT)
    key = seeded_key(SEED, "node/car-0")
    other = dataclasses.replace(receipt, period_ms=(NOW_MS + 1_000, NOW_MS + 9_000))
    assert reasons([*HISTORY, row(sealed_by(key, other, T_RECEIPT))]) == {Reason.EQUIVOCATION}
    rows = list(HISTORY)
    rows[at] = row(sealed_by(key, other, T_RECEIPT))
    assert Reason.EQUIVOCATION in reasons(rows)


def test_totals_that_do_not_add_up_are_found() -> None:
    at = RECEIPTS[6]  # nothing after it that its digest could give away
    receipt = unseal(HISTORY[at].sealed).open(Receipt, T_RECEIPT)
    key = seeded_key(SEED, "node/car-1")
    for change in (
        {"totals": receipt.totals._replace(device_ms=receipt.totals.device_ms + 1)},
        {"amount_nano": 1},
        {"total_nano": 1},
    ):
        rows = list(HISTORY)
        rows[at] = row(sealed_by(key, dataclasses.replace(receipt, **change), T_RECEIPT))
        assert reasons(rows) == {Reason.MISMATCH}


@pytest.mark.parametrize(
    ("typ", "reason"), [(T_AGREEMENT, Reason.NO_AGREEMENT), (T_MANDATE, Reason.NO_AGREEMENT)]
)
def test_a_missing_agreement_or_mandate_is_found(typ: str, reason: Reason) -> None:
    for at, stored in enumerate(HISTORY):
        if stored.typ == typ:
            assert reason in reasons(HISTORY[:at] + HISTORY[at + 1 :])


def test_a_unit_accepted_from_two_cars_is_found_unless_disputed() -> None:
    one, two = Writer("car-0"), Writer("car-1")
    one.receipt(0, 8)
    one.accept()
    two.receipt(4, 8)
    two.accept()
    rows = list({(r.digest, r.sealed): r for r in one.rows + two.rows}.values())
    assert reasons(rows) == {Reason.DUPLICATE}

    two = Writer("car-1")
    two.receipt(4, 8)
    two.accept((Dispute(0, Reason.DUPLICATE, 0, (Span(4, 4),)),))
    rows = list({(r.digest, r.sealed): r for r in one.rows + two.rows}.values())
    assert reasons(rows) == set()


def test_a_dispute_withholds_and_must_fit() -> None:
    one = Writer("car-0", (Rate(0, 8, 1),))
    one.receipt(0, 8)
    one.accept((Dispute(0, Reason.MISMATCH, 320, (Span(0, 4),)),))
    checked = check(one.rows)
    assert checked.findings == ()
    assert checked.chains[0].accepted_nano == 320
    for bad in (
        Dispute(0, Reason.MISMATCH, 320, (Span(4, 8),)),
        Dispute(1, Reason.MISMATCH, 0, (Span(0, 4),)),
        Dispute(0, Reason.MISMATCH, 641, (Span(0, 4),)),
    ):
        two = Writer("car-0", (Rate(0, 8, 1),))
        two.receipt(0, 8)
        assert two.accept((bad,)) is Reason.MISMATCH, "the car does not take it"
        assert Reason.MISMATCH in reasons(two.rows)


def test_disputes_that_are_lost_come_before_what_follows_them() -> None:
    """On a network without money nothing but `after` would show that they are missing."""
    one = Writer("car-0")
    for first in (0, 8, 16):
        one.receipt(first, 8)
    one.accept()
    one.receipt(24, 8)
    one.accept((Dispute(3, Reason.DUPLICATE, 0, (Span(24, 4),)),), lost=True)
    one.receipt(32, 8)
    assert one.accept() is Reason.GAP, "the car waits for the one with disputes"
    assert Reason.GAP in reasons(one.rows), "and whoever reads its books would find the hole"
    again = [unseal(wire) for wire in one.requester.said_again(min(one.provider.open))]
    assert [sealed.open(Acceptance, T_ACCEPT).seq for sealed in again] == [3, 4]
    assert [one.take(sealed) for sealed in again] == [Reason.OK, Reason.OK]
    assert [one.take(sealed) for sealed in again] == [Reason.DUPLICATE, Reason.DUPLICATE]
    assert not one.provider.open
    assert reasons(one.rows[:-1] + [row(sealed) for sealed in again]) == set()


def test_a_requester_keeps_so_many_acceptances_with_disputes_and_no_more() -> None:
    one = Writer("car-0")
    for number in range(DISPUTED_MAX + 9):
        one.receipt(8 * number, 8)
        one.accept((Dispute(number, Reason.DUPLICATE, 0, (Span(8 * number, 1),)),))
    assert len(one.requester.said_again(0)) == DISPUTED_MAX
    assert reasons(one.rows) == set()


@pytest.mark.parametrize(
    ("after_ms", "by", "found"),
    [
        (1_000, "car-0", set()),  # the receipt's period begins with it
        (999, "car-0", {Reason.NO_CONSENT}),
        (1_500, "car-0", set()),  # what ran then is paid
        (0, "car-1", set()),  # another owner's word ends nothing here
    ],
)
def test_work_that_begins_after_a_withdrawal_is_found(
    after_ms: int, by: str, found: set[Reason]
) -> None:
    one = Writer("car-0")
    one.receipt(0, 8)
    assert one.papers.consent is not None
    consent = one.papers.consent.open(Consent, T_CONSENT)
    account = seeded_key(SEED, f"account/{by}")
    ended = dataclasses.replace(
        consent,
        account=account.account,
        replaces=one.papers.consent.digest,
        withdrawn_ms=NOW_MS + after_ms,
    )
    word = seal(ended, T_CONSENT, account.account, account.sign)
    assert reasons([*one.rows, row(word)]) == found
    assert reasons([row(word), *one.rows]) == found


@pytest.mark.parametrize(("by", "found"), [("submitter", set()), ("car-1", {Reason.NO_CONSENT})])
def test_fleet_terms_of_another_than_the_operator_are_found(by: str, found: set[Reason]) -> None:
    account = seeded_key(SEED, f"account/{by}")  # the consent's operator is the submitter's account
    terms = read_fleet(Path(os.devnull), account.account, NETWORK, NOW_MS)
    word = seal(terms, T_FLEET, account.account, account.sign)
    one = Writer("car-0", fleet=word.digest)
    one.receipt(0, 8)
    assert reasons(one.rows) == set()  # whoever lacks the terms cannot hold them against it
    assert reasons([*one.rows, row(word)]) == found


def test_objects_of_another_network_are_found() -> None:
    found = check_objects(HISTORY, seeded_genesis(SEED + 1).ident).findings
    assert {finding.reason for finding in found} == {Reason.OTHER_NETWORK}
