"""The requester's acceptance desk: receipts are checked against what arrived, then accepted.

A receipt stands if its chain and arithmetic hold and its output root is the root over the digests
of the units that came. Units that were taken from another attempt are withheld by name, so each
(task, replica, unit) is accepted at most once whoever ran it. Receipt and acceptance are durable
before the acceptance leaves, in groups, like the provider's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from .agreement import Agreements
from .channel import RequesterChannel
from .effects import SignedObject
from .events import SendFailed
from .job import Job, JobState, spans
from .jobs import Jobs
from .merkle import root
from .messages import Decline
from .objects import T_ACCEPT, T_RECEIPT, Acceptance, Dispute, Method, Receipt, Verdict
from .outbox import Outbox, remember, row
from .reasons import Reason
from .sealed import Sealed
from .shelf import Shelf
from .types import LEASE_UNITS_MAX, Digest, Durability, Lane, Peer

DISPUTE_RUNS_MAX = 64  # runs of units that one dispute names
SENDS_KNOWN_MAX = 4096
PENDING_MAX = 64  # receipts, and disputes, of one acceptance
STORE_AGAIN_MS = 1_000  # after a full disk
EARLY_MS = 10_000  # a receipt waits for its units: who has crashed may have to ask for them again
EARLY_MAX = 64  # of one channel; then the first is judged by what is here


def _range(receipt: Receipt) -> tuple[int, int]:
    first, size = receipt.work.units
    return first, first + size


class Audit(Protocol):
    """What convinced the requester. Verification comes in here."""

    def verdict(self, receipt: Receipt) -> Verdict: ...


class NoAudit:
    """Results are compared with nothing: only their digests with the receipt's root."""

    def verdict(self, receipt: Receipt) -> Verdict:
        return Verdict(Method.NONE, 0, 0)


@dataclass(slots=True)
class Pending:
    """What the next acceptance of a channel will say."""

    channel: RequesterChannel
    total_nano: int
    seq: int
    receipt: Digest
    verdict: Verdict
    disputes: list[Dispute]
    rows: list[SignedObject]
    marks: list[tuple[Job, list[int]]]


class AcceptanceDesk:
    def __init__(
        self, outbox: Outbox, agreements: Agreements, audit: Audit, jobs: Jobs, shelf: Shelf
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._audit = audit
        self._jobs = jobs
        self._shelf = shelf
        self.channels: dict[Digest, RequesterChannel] = {}
        self._pending: dict[Digest, Pending] = {}
        self._sends: OrderedDict[int, tuple[RequesterChannel, int]] = OrderedDict()
        # From which receipt on what was accepted is to be said again.
        self._unsaid: dict[Digest, int] = {}
        self._full: list[Pending] = []
        # By seq: the first has come before its units, and those behind it wait for it.
        self._early: dict[Digest, dict[int, tuple[Sealed, Receipt, int]]] = {}
        # Signed and not durable yet: one group at a time, so that no acceptance is on the disk
        # before the receipts that an earlier one covers.
        self._storing: list[tuple[Pending, Acceptance, Sealed]] = []
        self._store_again_mono_ms: int | None = None
        self._due_mono_ms: int | None = None

    def restore(self, channel: RequesterChannel, vouchers: list[tuple[Acceptance, Sealed]]) -> None:
        """`vouchers`: all of the channel, in order of seq."""
        for acceptance, sealed in vouchers:
            channel.accepted(acceptance, sealed.wire)
            if acceptance.disputes:
                channel.disputed = sealed.digest
        self.channels[channel.digest] = channel

    def mark_restored(self, receipt: Receipt, dispute: Dispute | None) -> None:
        """Which units were accepted before the restart."""
        job = self._jobs.all.get(receipt.work.job_id)
        if job is None:
            return
        first, size = receipt.work.units
        withheld = {
            unit
            for run in (dispute.units if dispute else ())
            for unit in range(run.first, run.first + run.size)
        }
        for unit in range(first, min(first + size, job.spec.units)):
            if unit not in withheld:
                job.accepted[unit] = 1

    def on_receipt(self, peer: Peer, sealed: Sealed) -> None:
        receipt = sealed.open(Receipt, T_RECEIPT)
        entered = self._agreements.by_channel.get(receipt.channel)
        if sealed.kid != peer or receipt.provider != peer or entered is None:
            self._decline(peer, sealed.digest, Reason.NOT_YOURS)
            return
        if entered.agreement.requester != self._out.identity.peer:
            self._decline(peer, sealed.digest, Reason.NOT_YOURS)
            return
        channel = self.channels.get(receipt.channel)
        if channel is None:
            channel = self.channels[receipt.channel] = RequesterChannel(
                entered.agreement, entered.digest
            )
        early = self._early.get(receipt.channel)
        if early is None:
            if not self._comes_early(channel, receipt):
                self._judge(channel, receipt, sealed)
                return
            early = self._early[receipt.channel] = {}
            self._due_soon()
        known = early.get(receipt.seq)
        if known is None and len(early) < EARLY_MAX:
            early[receipt.seq] = (sealed, receipt, self._out.now.mono_ms + EARLY_MS)
        elif known is None or known[0].digest != sealed.digest:
            self._judge_early(receipt.channel, EARLY_MAX)
            self._judge(channel, receipt, sealed)

    def _comes_early(self, channel: RequesterChannel, receipt: Receipt) -> bool:
        """Its units are not here, and may still come: its job goes on."""
        job = self._jobs.all.get(receipt.work.job_id)
        first, end = _range(receipt)
        if job is None or job.state is not JobState.RUNNING or end > job.spec.units:
            return False
        if end - first > LEASE_UNITS_MAX:
            return False  # it does not stand in any case
        return receipt.seq == channel.next_seq and any(
            not job.source_of[unit] for unit in range(first, end)
        )

    def _judge_early(self, digest: Digest, least: int = 0) -> None:
        """Those whose units have come or whose time is over; `least` of them in any case."""
        early, channel = self._early.pop(digest), self.channels[digest]
        for seq in sorted(early):
            sealed, receipt, until_mono_ms = early[seq]
            waits = self._comes_early(channel, receipt) and until_mono_ms > self._out.now.mono_ms
            if waits and least <= 0:
                self._early[digest] = early
                self._due_soon()
                return
            least -= 1
            del early[seq]
            self._judge(channel, receipt, sealed)

    def _due_soon(self) -> None:
        if self._due_mono_ms is None:
            self._due_mono_ms = self._out.now.mono_ms + self._out.limits.receipt_delay_ms

    def _judge(self, channel: RequesterChannel, receipt: Receipt, sealed: Sealed) -> None:
        peer = receipt.provider
        reason = channel.check(receipt, sealed.digest, self._out.now.unix_ms)
        if reason is Reason.DUPLICATE:
            self._say_from(channel, receipt.seq)  # it is not accepted there: ours was lost
            return
        if reason is not Reason.OK:
            self._out.counters[f"receipt_{reason.name.lower()}"] += 1
            if reason is Reason.EQUIVOCATION:  # two signatures, one place: kept as the proof it is
                if not channel.equivocated:  # one proof is enough, and cannot fill the disk
                    self._out.persist((row(sealed),), Durability.POWER)
                    self._out.notify(peer, "equivocation", channel=receipt.channel, seq=receipt.seq)
                channel.equivocated = True
            self._decline(peer, sealed.digest, reason)
            return
        self._take(channel, receipt, sealed)

    def _take(self, channel: RequesterChannel, receipt: Receipt, sealed: Sealed) -> None:
        job = self._jobs.all.get(receipt.work.job_id)
        withheld, reason = self._withheld(job, receipt)
        digest = sealed.digest
        amount = receipt.amount_nano
        size = receipt.work.units.size
        withheld_nano = amount * len(withheld) // size if size else amount
        pending = self._pending.get(channel.digest)
        if pending is None:
            pending = self._pending[channel.digest] = Pending(
                channel, 0, receipt.seq, digest, self._audit.verdict(receipt), [], [], []
            )
        pending.seq, pending.receipt = receipt.seq, digest
        pending.rows.append(row(sealed))
        if withheld or not size:  # a receipt for no units bills for nothing that came
            runs = spans(withheld)
            if len(runs) > DISPUTE_RUNS_MAX:  # more than an acceptance can name: all of it
                withheld = list(range(*_range(receipt)))
                withheld_nano, runs = amount, spans(withheld)
            pending.disputes.append(Dispute(receipt.seq, reason, withheld_nano, runs))
        if job is not None:
            first = receipt.work.units.first
            kept = set(withheld)
            units = [u for u in range(first, first + size) if u not in kept]
            for unit in units:
                job.accepted[unit] = 1
        channel.take(receipt, digest, withheld_nano)
        pending.total_nano = channel.total_nano - channel.withheld_nano
        self._out.counters["receipts_taken"] += 1
        self._due_soon()
        if len(pending.rows) >= PENDING_MAX or len(pending.disputes) >= PENDING_MAX:
            self._full.append(self._pending.pop(channel.digest))
            self.flush()

    def _withheld(self, job: Job | None, receipt: Receipt) -> tuple[list[int], Reason]:
        """Units of the receipt that are not accepted, and why."""
        work = receipt.work
        first, size = work.units
        if size == 0 or size > LEASE_UNITS_MAX or job is None:
            return list(range(first, first + min(size, LEASE_UNITS_MAX))), Reason.MISMATCH
        every = list(range(first, first + size))
        if first + size > job.spec.units or work.artifact != job.spec.artifact:
            return every, Reason.MISMATCH
        if any(not job.source_of[unit] for unit in every):
            return every, Reason.MISMATCH
        if work.output_root != root([job.digest_of(unit) for unit in every]):
            return every, Reason.MISMATCH
        task_id = work.task_digest[:16]
        foreign = [
            unit
            for unit in every
            if job.accepted[unit] or job.whose(unit) != (task_id, work.attempt, receipt.provider)
        ]
        return foreign, Reason.DUPLICATE

    def flush(self) -> None:
        """Accept what was taken; its results are stored first, by order of the persists."""
        self._due_mono_ms = None
        if self._early:
            self._due_soon()
        if self._storing:
            return  # the rest goes with the next group
        self._shelf.flush()
        entries = [*self._full, *self._pending.values()]
        self._full, self._pending = [], {}
        for entry in entries:
            acceptance = Acceptance(
                1,
                self._out.identity.network,
                entry.channel.digest,
                entry.seq,
                entry.receipt,
                entry.total_nano,
                entry.verdict,
                self._out.now.unix_ms,
                None,
                tuple(entry.disputes) or None,
                entry.channel.disputed,
            )
            sealed = self._out.seal(acceptance, T_ACCEPT)
            if entry.disputes:
                entry.channel.disputed = sealed.digest
            self._storing.append((entry, acceptance, sealed))
        self._out.counters["acceptances_signed"] += len(entries)
        if entries:
            self._store()

    def _store(self) -> None:
        self._store_again_mono_ms = None
        rows = [
            stored for entry, _, sealed in self._storing for stored in (*entry.rows, row(sealed))
        ]
        self._out.persist(tuple(rows), Durability.POWER, self._stored, self._not_stored)

    def _not_stored(self) -> None:
        self._store_again_mono_ms = self._out.now.mono_ms + STORE_AGAIN_MS

    def _stored(self) -> None:
        accepted, self._storing = self._storing, []
        if self._pending or self._full:
            self._due_mono_ms = self._out.now.mono_ms
        for entry, acceptance, sealed in accepted:
            channel = entry.channel
            channel.accepted(acceptance, sealed.wire)
            provider = channel.agreement.provider
            self._say(channel, sealed.wire, acceptance.seq)
            self._out.notify(
                provider, "accepted", channel=channel.digest, seq=entry.seq, count=len(entry.rows)
            )

    def _say(self, channel: RequesterChannel, wire: bytes, seq: int) -> None:
        send_id = self._out.send(channel.agreement.provider, Lane.MONEY, wire)
        remember(self._sends, send_id, (channel, seq), SENDS_KNOWN_MAX)

    def _say_from(self, channel: RequesterChannel, seq: int) -> None:
        """Once for all that are asked for in the same moment."""
        self._unsaid[channel.digest] = min(seq, self._unsaid.get(channel.digest, seq))
        self._due_soon()

    def on_send_failed(self, event: SendFailed) -> None:
        """The newest stands for all before it without disputes, but nothing else would bring it."""
        known = self._sends.pop(event.send_id, None)
        if known is not None and event.reason is Reason.QUEUE_FULL:
            self._say_from(*known)

    def unsaid_to(self) -> set[Peer]:
        """Providers whose receipts were taken and are not answered yet."""
        entries = (*self._pending.values(), *self._full, *(entry for entry, _, _ in self._storing))
        waiting = (self.channels[digest] for digest in (*self._unsaid, *self._early))
        channels = (*(e.channel for e in entries), *waiting)
        return {channel.agreement.provider for channel in channels}

    def _decline(self, peer: Peer, about: Digest, reason: Reason) -> None:
        self._out.send(peer, Lane.MONEY, Decline(about, reason))

    def deadline(self) -> int | None:
        due, again = self._due_mono_ms, self._store_again_mono_ms
        if due is None or again is None:
            return again if due is None else due
        return min(due, again)

    def tick(self) -> None:
        now = self._out.now.mono_ms
        if self._store_again_mono_ms is not None and self._store_again_mono_ms <= now:
            self._store()
        if self._due_mono_ms is not None and self._due_mono_ms <= now:
            for digest in list(self._early):
                self._judge_early(digest)
            unsaid, self._unsaid = self._unsaid, {}
            for digest, seq in unsaid.items():
                channel = self.channels[digest]
                for wire in channel.said_again(seq):
                    self._say(channel, wire, seq)
            self.flush()
