"""Does a store of signed objects hold? Every envelope, chain, total and acceptance, from scratch.

Input is what `ledger.load` reads, in the order in which it was stored; nothing of the running
machine is trusted or needed, so this is also what an auditor would write. `mesh receipts verify`
prints the findings and exits 5 if there is one. The chain rules are those that `channel` mints and
checks one receipt at a time; here they are held against the whole history.

What cannot be seen from one side: a receipt cut off the very end that was not yet accepted. The
other side's copy shows that, and the next receipt's number does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import MeshError, VerificationFailed
from .channel import add_meters, bears, owed_nano
from .effects import SignedObject
from .fields import Span
from .identity import short
from .objects import NO_METERS, T_ACCEPT, T_AGREEMENT, T_RECEIPT, Acceptance, Agreement, Receipt
from .papers import (
    T_CONSENT,
    T_FLEET,
    T_MANDATE,
    T_POLICY,
    Consent,
    FleetTerms,
    Mandate,
    Policy,
    Role,
)
from .reasons import Reason
from .sealed import Sealed, unseal
from .types import CLOCK_SKEW_MS_MAX, Account, Digest, NetworkId

LEASE_MS_MAX = 3_600_000  # the bound of Offer.lease_ms: how far a run may outlast its agreement
DISPUTE_SPANS_MAX = 64  # the bound of Dispute.units: at it, the list may have been cut

_ZEROS = bytes(32)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold."""

    reason: Reason
    text: str
    digest: Digest  # of the object, or of the channel where something is missing
    channel: Digest | None = None
    seq: int | None = None


@dataclass(slots=True)
class Chain:
    """One channel as it was found."""

    digest: Digest
    agreement: Agreement
    signers: set[bytes] = field(default_factory=set)
    receipts: dict[int, tuple[Receipt, Digest]] = field(default_factory=dict)
    stored: list[int] = field(default_factory=list)  # seqs as they were stored
    acceptances: list[tuple[Acceptance, Digest]] = field(default_factory=list)
    accepted_seq: int = -1
    accepted_nano: int = 0
    withheld_nano: int = 0
    disputed: dict[int, tuple[Span, ...]] = field(default_factory=dict)  # by seq


@dataclass(frozen=True, slots=True)
class Checked:
    findings: tuple[Finding, ...]
    chains: tuple[Chain, ...]

    @property
    def receipts(self) -> int:
        return sum(len(chain.receipts) for chain in self.chains)

    @property
    def accepted(self) -> int:
        return sum(seq <= chain.accepted_seq for chain in self.chains for seq in chain.receipts)


def check_objects(objects: Iterable[SignedObject], network: NetworkId | None = None) -> Checked:
    """All findings; none means that every accepted piece of work has a receipt that holds."""
    checker = _Checker(network)
    for stored in objects:
        checker.take(stored)
    checker.finish()
    chains = sorted(checker.chains.values(), key=lambda chain: chain.digest)
    return Checked(tuple(checker.findings), tuple(chains))


class _Checker:
    def __init__(self, network: NetworkId | None) -> None:
        self.network = network
        self.findings: list[Finding] = []
        self.chains: dict[Digest, Chain] = {}
        self._seen: set[tuple[Digest, bytes]] = set()
        self._receipts: list[tuple[Receipt, Sealed]] = []
        self._acceptances: list[tuple[Acceptance, Sealed]] = []
        self._mandates: dict[Digest, Mandate] = {}
        self._consents: dict[Digest, Consent] = {}
        # Account and digest of a consent that a withdrawal of the same account names.
        self._withdrawn_ms: dict[tuple[Account, Digest], int] = {}
        self._policies: set[Digest] = set()
        self._fleets: dict[Digest, FleetTerms] = {}

    def _find(
        self,
        reason: Reason,
        text: str,
        digest: Digest,
        chain: Chain | None = None,
        seq: int | None = None,
    ) -> None:
        where = None if chain is None else chain.digest
        self.findings.append(Finding(reason, text, digest, where, seq))

    # ---- one stored row

    def take(self, stored: SignedObject) -> None:
        name = f"the {stored.typ} {short(stored.digest)}"
        try:
            sealed = unseal(stored.sealed)
        except VerificationFailed:
            self._find(
                Reason.BAD_SIGNATURE, f"the signature of {name} does not hold", stored.digest
            )
            return
        except MeshError as error:
            self._find(Reason.BAD_FRAME, f"{name} cannot be decoded: {error}", stored.digest)
            return
        if sealed.digest != stored.digest:
            self._find(
                Reason.MISMATCH,
                f"{name} is stored under the digest of another object",
                stored.digest,
            )
            return
        if sealed.typ != stored.typ:
            self._find(Reason.MISMATCH, f"{name} is in truth a {sealed.typ}", stored.digest)
            return
        if (sealed.digest, sealed.kid) in self._seen:
            self._find(Reason.DUPLICATE, f"{name} is stored twice", stored.digest)
            return
        self._seen.add((sealed.digest, sealed.kid))
        try:
            self._sort(sealed)
        except MeshError as error:
            self._find(Reason.BAD_FRAME, f"{name} is no object of its rule: {error}", stored.digest)

    def _sort(self, sealed: Sealed) -> None:
        """Open the object, check who signed it, and keep it for `finish`."""
        signer: bytes | None
        match sealed.typ:
            case "mesh-receipt/1":
                receipt = sealed.open(Receipt, T_RECEIPT)
                signer, network = receipt.provider, receipt.network
                self._receipts.append((receipt, sealed))
            case "mesh-accept/1":
                acceptance = sealed.open(Acceptance, T_ACCEPT)
                signer, network = None, acceptance.network
                self._acceptances.append((acceptance, sealed))
            case "mesh-agreement/1":
                agreement = sealed.open(Agreement, T_AGREEMENT)
                network = agreement.network
                chain = self.chains.setdefault(sealed.digest, Chain(sealed.digest, agreement))
                signer = None
                if sealed.kid in (agreement.provider, agreement.requester):
                    chain.signers.add(sealed.kid)
                else:
                    signer = agreement.requester
            case "mesh-mandate/1":
                mandate = sealed.open(Mandate, T_MANDATE)
                signer, network = mandate.account, mandate.network
                self._mandates[sealed.digest] = mandate
            case "mesh-consent/1":
                consent = sealed.open(Consent, T_CONSENT)
                signer, network = consent.account, consent.network
                self._consents[sealed.digest] = consent
                if consent.withdrawn_ms is not None and consent.replaces is not None:
                    ended = (consent.account, consent.replaces)
                    before_ms = self._withdrawn_ms.get(ended, consent.withdrawn_ms)
                    self._withdrawn_ms[ended] = min(before_ms, consent.withdrawn_ms)
            case "mesh-policy/1":
                policy = sealed.open(Policy, T_POLICY)
                signer, network = policy.account, policy.network
                self._policies.add(sealed.digest)
            case "mesh-fleet/1":
                fleet = sealed.open(FleetTerms, T_FLEET)
                signer, network = fleet.account, fleet.network
                self._fleets[sealed.digest] = fleet
            case _:
                return  # envelope and digest hold; it has no part in a chain
        if signer is not None and sealed.kid != signer:
            self._find(
                Reason.BAD_SIGNATURE,
                f"the {sealed.typ} {short(sealed.digest)} is signed by {short(sealed.kid)} "
                f"and not by {short(signer)}, whom it names",
                sealed.digest,
            )
        if self.network is not None and network != self.network:
            self._find(
                Reason.OTHER_NETWORK,
                f"the {sealed.typ} {short(sealed.digest)} belongs to another network",
                sealed.digest,
            )

    # ---- what they say together

    def finish(self) -> None:
        for receipt, sealed in self._receipts:
            self._enter_receipt(receipt, sealed)
        for acceptance, sealed in self._acceptances:
            chain = self.chains.get(acceptance.channel)
            if chain is None:
                self._find(
                    Reason.NO_AGREEMENT,
                    f"acceptance {short(sealed.digest)} cites an agreement that is not here",
                    sealed.digest,
                )
            elif sealed.kid != chain.agreement.requester:
                self._find(
                    Reason.BAD_SIGNATURE,
                    f"acceptance {short(sealed.digest)} is not signed by the channel's requester",
                    sealed.digest,
                    chain,
                )
            else:
                chain.acceptances.append((acceptance, sealed.digest))
        for chain in self.chains.values():
            self._check_agreement(chain)
            self._check_chain(chain)
            self._check_acceptances(chain)
        self._check_once()

    def _enter_receipt(self, receipt: Receipt, sealed: Sealed) -> None:
        chain = self.chains.get(receipt.channel)
        digest = sealed.digest
        if chain is None:
            self._find(
                Reason.NO_AGREEMENT,
                f"receipt {short(digest)} cites an agreement that is not here",
                digest,
                seq=receipt.seq,
            )
            return
        if sealed.kid != receipt.provider:
            return  # found already; a forged one must not take the place of a true one
        if receipt.seq in chain.receipts:
            self._find(
                Reason.EQUIVOCATION,
                f"two receipts are signed for number {receipt.seq}: "
                f"{short(chain.receipts[receipt.seq][1])} and {short(digest)}",
                digest,
                chain,
                receipt.seq,
            )
            return
        chain.receipts[receipt.seq] = (receipt, digest)
        chain.stored.append(receipt.seq)

    def _check_agreement(self, chain: Chain) -> None:
        agreement = chain.agreement
        if not chain.receipts and not chain.acceptances:
            return  # half-signed agreements that never came into force do no harm
        for who, peer in (("provider", agreement.provider), ("requester", agreement.requester)):
            if peer not in chain.signers:
                self._find(
                    Reason.NO_AGREEMENT,
                    f"the agreement {short(chain.digest)} is not signed by its {who}",
                    chain.digest,
                    chain,
                )
        sides = (
            ("provider", agreement.provider_mandate, agreement.provider, agreement.payee),
            ("requester", agreement.requester_mandate, agreement.requester, agreement.payer),
        )
        for who, cited, peer, account in sides:
            role = Role.PROVIDE if who == "provider" else Role.REQUEST
            mandate = self._mandates.get(cited)
            if mandate is None:
                self._find(Reason.NO_AGREEMENT, f"the {who}'s mandate is not here", cited, chain)
            elif (
                mandate.peer != peer
                or mandate.account != account
                or mandate.network != agreement.network
                or not mandate.roles & role
            ):
                self._find(
                    Reason.NOT_YOURS,
                    f"the {who}'s mandate does not cover the agreement {short(chain.digest)}",
                    cited,
                    chain,
                )
            elif agreement.not_after_ms > mandate.not_after_ms:
                self._find(
                    Reason.EXPIRED,
                    f"the agreement {short(chain.digest)} outlasts the {who}'s mandate",
                    cited,
                    chain,
                )

    def _check_chain(self, chain: Chain) -> None:
        """seq without gaps, previous digests, totals that add up, in the stored order."""
        expected, previous = 0, None
        totals, total_nano = NO_METERS, 0
        for seq in sorted(chain.receipts):
            receipt, digest = chain.receipts[seq]
            if seq != expected:
                missing = str(expected) if seq == expected + 1 else f"{expected} to {seq - 1}"
                self._find(
                    Reason.GAP, f"receipt {missing} is missing", chain.digest, chain, expected
                )
            else:
                if receipt.previous != previous:
                    self._find(
                        Reason.EQUIVOCATION,
                        f"receipt {seq} follows another receipt {seq - 1} than the one here",
                        digest,
                        chain,
                        seq,
                    )
                owed = owed_nano(chain.agreement.rates, receipt.totals)
                if (
                    receipt.totals != add_meters(totals, receipt.meters)
                    or receipt.total_nano != owed
                    or receipt.amount_nano != owed - total_nano
                ):
                    self._find(
                        Reason.MISMATCH,
                        f"the totals of receipt {seq} do not add up",
                        digest,
                        chain,
                        seq,
                    )
            self._check_receipt(chain, receipt, digest)
            expected, previous = seq + 1, digest
            totals, total_nano = receipt.totals, receipt.total_nano
        for before, after in zip(chain.stored, chain.stored[1:], strict=False):
            if after < before:
                self._find(
                    Reason.MISMATCH,
                    f"receipt {after} is stored after receipt {before}: rows were swapped",
                    chain.receipts[after][1],
                    chain,
                    after,
                )

    def _check_receipt(self, chain: Chain, receipt: Receipt, digest: Digest) -> None:
        agreement, seq = chain.agreement, receipt.seq
        if (
            receipt.provider != agreement.provider
            or receipt.requester != agreement.requester
            or receipt.payee != agreement.payee
            or receipt.payer != agreement.payer
            or receipt.network != agreement.network
        ):
            self._find(
                Reason.NOT_YOURS,
                f"receipt {seq} names other parties than its agreement",
                digest,
                chain,
                seq,
            )
        start, end = receipt.period_ms
        if end < start or start > agreement.not_after_ms + LEASE_MS_MAX:
            self._find(
                Reason.EXPIRED,
                f"receipt {seq} is for a time outside its agreement",
                digest,
                chain,
                seq,
            )
        consent = self._consents.get(receipt.consent)
        no_consent = receipt.consent == _ZEROS or receipt.policy == _ZEROS
        if consent is not None:
            # A requester never sees the consent; whoever has it can hold the receipt against it.
            no_consent = no_consent or (
                consent.account != receipt.payee
                or consent.network != receipt.network
                or consent.policy != receipt.policy
                or not consent.given_ms - CLOCK_SKEW_MS_MAX <= start < consent.lapses_ms
                or (consent.withdrawn_ms is not None and consent.withdrawn_ms <= start)
                or start > self._withdrawn_ms.get((receipt.payee, receipt.consent), start)
            )
            fleet = None if receipt.fleet is None else self._fleets.get(receipt.fleet)
            no_consent = no_consent or (fleet is not None and fleet.account != consent.operator)
        if no_consent:
            self._find(
                Reason.NO_CONSENT,
                f"receipt {seq} cites no consent that covers it",
                digest,
                chain,
                seq,
            )

    def _check_acceptances(self, chain: Chain) -> None:
        last_seq = -1
        disputed: Digest | None = None
        for acceptance, digest in chain.acceptances:
            seq = acceptance.seq
            if seq <= last_seq:
                reason = Reason.EQUIVOCATION if seq == last_seq else Reason.MISMATCH
                self._find(
                    reason,
                    f"the acceptance up to receipt {seq} comes after one up to {last_seq}",
                    digest,
                    chain,
                    seq,
                )
                continue
            if acceptance.after != disputed:
                self._find(
                    Reason.GAP,
                    f"the acceptance up to receipt {seq} does not follow the last one with "
                    "disputes that is here",
                    digest,
                    chain,
                    seq,
                )
            disputed = digest if acceptance.disputes else acceptance.after
            named = chain.receipts.get(seq)
            if named is None:
                self._find(
                    Reason.GAP,
                    f"receipt {seq} is missing, which an acceptance names",
                    acceptance.receipt,
                    chain,
                    seq,
                )
                last_seq = seq
                continue
            receipt, receipt_digest = named
            if receipt_digest != acceptance.receipt:
                self._find(
                    Reason.EQUIVOCATION,
                    f"the receipt {seq} that is here is not the one that was accepted",
                    receipt_digest,
                    chain,
                    seq,
                )
            self._check_disputes(chain, acceptance, digest, last_seq)
            expected = receipt.total_nano - chain.withheld_nano
            if acceptance.total_nano != expected:
                self._find(
                    Reason.MISMATCH,
                    f"the acceptance up to receipt {seq} is for {acceptance.total_nano} "
                    f"and not for {expected}",
                    digest,
                    chain,
                    seq,
                )
            last_seq = chain.accepted_seq = seq
            chain.accepted_nano = acceptance.total_nano

    def _check_disputes(
        self, chain: Chain, acceptance: Acceptance, digest: Digest, last_seq: int
    ) -> None:
        for dispute in acceptance.disputes or ():
            named = chain.receipts.get(dispute.seq)
            if not last_seq < dispute.seq <= acceptance.seq or dispute.seq in chain.disputed:
                self._find(
                    Reason.MISMATCH,
                    f"an acceptance disputes receipt {dispute.seq}, which is not its to dispute",
                    digest,
                    chain,
                    dispute.seq,
                )
                continue
            chain.disputed[dispute.seq] = dispute.units
            chain.withheld_nano += dispute.withheld_nano
            if named is None:
                continue  # its gap is found already
            if not bears(named[0].work.units, named[0].amount_nano, dispute):
                self._find(
                    Reason.MISMATCH,
                    f"the dispute of receipt {dispute.seq} does not fit the receipt",
                    digest,
                    chain,
                    dispute.seq,
                )

    def _check_once(self) -> None:
        """Each (job, replica, unit) of a requester is accepted at most once, whoever ran it."""
        taken: dict[tuple[bytes, bytes, int], dict[int, tuple[Chain, int]]] = {}
        for chain in self.chains.values():
            for seq, (receipt, digest) in chain.receipts.items():
                if seq > chain.accepted_seq:
                    continue
                work = receipt.work
                units = taken.setdefault((receipt.requester, work.job_id, work.replica), {})
                twice = [unit for unit in accepted_units(chain, seq) if unit in units]
                if twice:
                    other, other_seq = units[twice[0]]
                    self._find(
                        Reason.DUPLICATE,
                        f"unit {twice[0]} of job {work.job_id.hex()} is accepted twice: in receipt "
                        f"{seq} and in receipt {other_seq} of channel {short(other.digest)}",
                        digest,
                        chain,
                        seq,
                    )
                for unit in accepted_units(chain, seq):
                    units.setdefault(unit, (chain, seq))


def accepted_units(chain: Chain, seq: int) -> Iterator[int]:
    """Units of an accepted receipt that no acceptance disputes."""
    first, size = chain.receipts[seq][0].work.units
    spans = chain.disputed.get(seq, ())
    if len(spans) >= DISPUTE_SPANS_MAX:
        return  # the list may have been cut at its bound: which units stand is not said
    disputed: set[int] = set()
    for low, count in spans:
        # bounded by the receipt, not by what a dispute claims
        disputed.update(range(max(low, first), min(low + count, first + size)))
    for unit in range(first, first + size):
        if unit not in disputed:
            yield unit
