"""A channel: the chain of receipts under one agreement, as its two ends see it.

The provider signs receipts with gapless seq, the digest of the one before and running totals; the
requester answers with cumulative acceptances (Golem's debit note, Filecoin's nonce, STREAM's "the
latest replaces any previous", without a chain). Both ends compute money the same way: floored once
on running totals, so that no slicing can change what is owed.

`ProviderChannel` mints, `RequesterChannel` checks. Neither sends nor stores: `provider` and
`requester` do, and always store before they send, because a crash between the two would make an
honest node sign two objects for one place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from .fields import Span
from .objects import (
    NO_METERS,
    Acceptance,
    Agreement,
    Cited,
    Dispute,
    Measured,
    Rate,
    Receipt,
    Work,
)
from .outbox import Identity
from .reasons import Reason
from .sealed import Sealed
from .types import CLOCK_SKEW_MS_MAX, UINT_MAX, Digest

DIGESTS_MAX = 4096  # receipts whose digest is remembered, to tell a repetition from a second one
DISPUTED_MAX = 64  # acceptances with disputes that can be said again
DISPUTED_BYTES_MAX = 1 << 18
"""What is lost is what was under way when a connection ended, and a requester accepts nothing while
it has none: a few. A provider that asks for more has lost its disk."""


def add_meters(totals: Measured, slice_: Measured) -> Measured:
    """Sums, except for the way energy was measured: the newest method and uncertainty stand."""
    return Measured(
        totals.device_ms + slice_.device_ms,
        totals.wall_ms + slice_.wall_ms,
        totals.kflop + slice_.kflop,
        totals.bytes_in + slice_.bytes_in,
        totals.bytes_out + slice_.bytes_out,
        totals.energy_mwh + slice_.energy_mwh,
        slice_.method,
        slice_.uncertainty_permille,
        totals.battery_mwh + slice_.battery_mwh,
    )


def owed_nano(rates: Iterable[Rate], totals: Measured) -> int:
    """`sum over rates of total_meter * nano // unit`: floored once, on totals."""
    return sum(totals[rate.meter] * rate.nano // rate.unit for rate in rates)


def bears(units: Span, amount_nano: int, dispute: Dispute) -> bool:
    """Whether a receipt for these units and this amount can be disputed so."""
    end = units.first + units.size
    inside = all(units.first <= run.first and run.first + run.size <= end for run in dispute.units)
    return inside and 0 <= dispute.withheld_nano <= max(0, amount_nano)


@dataclass(slots=True)
class OpenReceipt:
    digest: Digest
    wire: bytes
    tag: bytes  # the lease it came from
    units: Span
    amount_nano: int
    total_nano: int


class ProviderChannel:
    """The end that signs receipts."""

    def __init__(self, agreement: Agreement, digest: Digest) -> None:
        self.agreement = agreement
        self.digest = digest
        self.seq = 0
        self.previous: Digest | None = None
        self.totals = NO_METERS
        self.total_nano = 0
        self.open: dict[int, OpenReceipt] = {}
        self.taken_seq = -1  # of the newest acceptance that stands, durable or on its way to be
        self.withheld_nano = 0
        self.disputed: Digest | None = None  # the newest of those that has disputes
        self.accepted_seq = -1
        self.accepted_nano = 0

    def mint(
        self,
        identity: Identity,
        work: Work,
        meters: Measured,
        period_ms: tuple[int, int],
        cited: Cited,
    ) -> Receipt:
        """The next receipt; call `minted` with its seal before anything else happens."""
        totals = add_meters(self.totals, meters)
        total_nano = owed_nano(self.agreement.rates, totals)
        return Receipt(
            1,
            identity.network,
            self.agreement.provider,
            self.agreement.requester,
            self.agreement.payee,
            self.agreement.payer,
            self.digest,
            self.seq,
            self.previous,
            work,
            meters,
            totals,
            total_nano - self.total_nano,
            total_nano,
            period_ms,
            cited.consent,
            cited.policy,
            fleet=cited.fleet,
        )

    def minted(self, receipt: Receipt, sealed: Sealed) -> None:
        digest = sealed.digest
        self.open[receipt.seq] = OpenReceipt(
            digest,
            sealed.wire,
            receipt.work.lease_id,
            receipt.work.units,
            receipt.amount_nano,
            receipt.total_nano,
        )
        self.seq = receipt.seq + 1
        self.previous = digest
        self.totals = receipt.totals
        self.total_nano = receipt.total_nano

    def take(self, acceptance: Acceptance, digest: Digest) -> Reason:
        """Whether this voucher stands; `settle` once it is durable. DUPLICATE: it is not newer than
        what we have. GAP: one with disputes is missing before it, and must come first, or our own
        books would owe us what was withheld."""
        if acceptance.seq >= self.seq:
            return Reason.GAP
        if acceptance.seq <= self.taken_seq:
            return Reason.DUPLICATE
        named = self.open.get(acceptance.seq)
        if named is None or named.digest != acceptance.receipt:
            return Reason.EQUIVOCATION
        if acceptance.after != self.disputed:
            return Reason.GAP
        withheld_nano, last = self.withheld_nano, self.taken_seq
        for dispute in sorted(acceptance.disputes or ()):
            about = self.open.get(dispute.seq)
            if about is None or not last < dispute.seq <= acceptance.seq:
                return Reason.MISMATCH
            if not bears(about.units, about.amount_nano, dispute):
                return Reason.MISMATCH
            last = dispute.seq
            withheld_nano += dispute.withheld_nano
        if acceptance.total_nano != named.total_nano - withheld_nano:
            return Reason.MISMATCH
        self.taken_seq = acceptance.seq
        self.withheld_nano = withheld_nano
        if acceptance.disputes:
            self.disputed = digest
        return Reason.OK

    def settle(self, acceptance: Acceptance) -> list[OpenReceipt]:
        """The receipts that a voucher which was taken, and is durable now, settles."""
        settled = [self.open.pop(s) for s in sorted(self.open) if s <= acceptance.seq]
        self.accepted_seq = acceptance.seq
        self.accepted_nano = acceptance.total_nano
        return settled


class RequesterChannel:
    """The end that checks receipts and accepts."""

    def __init__(self, agreement: Agreement, digest: Digest) -> None:
        self.agreement = agreement
        self.digest = digest
        self.next_seq = 0
        self.previous: Digest | None = None
        self.totals = NO_METERS
        self.total_nano = 0
        self.withheld_nano = 0
        self.period_end_ms = 0
        self.digests: OrderedDict[int, Digest] = OrderedDict()  # of the latest receipts, by seq
        self.last_acceptance: bytes | None = None  # the newest that is durable
        self.disputed: Digest | None = None  # the newest acceptance with disputes, once signed
        self.with_disputes: OrderedDict[int, bytes] = OrderedDict()  # durable ones, by seq
        self.equivocated = False  # the proof is stored, one is enough

    def check(self, receipt: Receipt, digest: Digest, now_unix_ms: int) -> Reason:
        """Form, order and arithmetic; what the work is worth is the requester's to say."""
        agreement = self.agreement
        if receipt.network != agreement.network:
            return Reason.OTHER_NETWORK
        if (
            receipt.provider != agreement.provider
            or receipt.requester != agreement.requester
            or receipt.payee != agreement.payee
            or receipt.payer != agreement.payer
            or receipt.channel != self.digest
        ):
            return Reason.NOT_YOURS
        if receipt.seq > self.next_seq:
            return Reason.GAP
        if receipt.seq < self.next_seq:
            same = self.digests.get(receipt.seq, digest) == digest
            return Reason.DUPLICATE if same else Reason.EQUIVOCATION
        start_ms, end_ms = receipt.period_ms
        if not start_ms <= end_ms <= now_unix_ms + CLOCK_SKEW_MS_MAX:
            return Reason.CLOCK_SKEW
        if receipt.previous != self.previous:
            return Reason.EQUIVOCATION
        totals = add_meters(self.totals, receipt.meters)
        if receipt.totals != totals or max(totals) > UINT_MAX:
            return Reason.MISMATCH
        owed = owed_nano(agreement.rates, totals)
        if receipt.total_nano != owed or receipt.amount_nano != owed - self.total_nano:
            return Reason.MISMATCH
        zeros = bytes(32)
        if receipt.consent == zeros or receipt.policy == zeros:
            return Reason.NO_CONSENT
        return Reason.OK

    def take(self, receipt: Receipt, digest: Digest, withheld_nano: int) -> None:
        self.next_seq = receipt.seq + 1
        self.previous = digest
        self.totals = receipt.totals
        self.total_nano = receipt.total_nano
        self.withheld_nano += withheld_nano
        self.period_end_ms = receipt.period_ms[1]
        self.digests[receipt.seq] = digest
        if len(self.digests) > DIGESTS_MAX:
            self.digests.popitem(last=False)

    def accepted(self, acceptance: Acceptance, wire: bytes) -> None:
        """It is durable."""
        self.last_acceptance = wire
        if not acceptance.disputes:
            return
        kept = self.with_disputes
        kept[acceptance.seq] = wire
        while len(kept) > DISPUTED_MAX or sum(map(len, kept.values())) > DISPUTED_BYTES_MAX:
            kept.popitem(last=False)

    def said_again(self, seq: int) -> list[bytes]:
        """For a provider that has accepted nothing from receipt `seq` on, in order: acceptances
        with disputes, which nothing later repeats, and the newest, which stands for the others."""
        frames = [wire for at, wire in self.with_disputes.items() if at >= seq]
        if self.last_acceptance is not None and self.last_acceptance not in frames[-1:]:
            frames.append(self.last_acceptance)
        return frames


def accepted_chain(
    found: dict[Digest, tuple[Receipt, Sealed]], newest: Digest | None
) -> list[tuple[Receipt, Sealed]]:
    """The chain that ends in the receipt that we accepted last. Other receipts are here as proofs
    against their signer: they take no place in it, whatever seq they claim."""
    chain: list[tuple[Receipt, Sealed]] = []
    while newest is not None and newest in found:
        chain.append(found[newest])
        newest = chain[-1][0].previous
    return chain[::-1]
