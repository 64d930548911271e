"""The provider's receipt desk: finished units become signed receipts, in groups.

Results go out first, receipts trail by at most `receipt_delay_ms`: one group commit for up to
GROUP_MAX (a single power-safe commit costs milliseconds, sixteen in one cost the same). Every
receipt is durable before it is sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from .agreement import InForce
from .allowance import HOUR_MS, HOURS, Allowance, Used
from .channel import ProviderChannel
from .effects import HeldDropped, HeldRecord
from .events import Meters, SendFailed
from .fields import Span
from .lease import Granted
from .merkle import root
from .objects import T_ACCEPT, T_RECEIPT, Acceptance, Cited, Measured, Outcome, Receipt, Work
from .outbox import Outbox, remember, row
from .reasons import Reason
from .sealed import Sealed
from .types import (
    RECEIPT_SPAN_MS_MAX,
    Digest,
    Durability,
    JobId,
    Lane,
    Peer,
)

ENERGY_ESTIMATED = 1
UJ_PER_MWH = 3_600_000  # microjoule
ESTIMATE_UNCERTAINTY_PERMILLE = 300  # a board profile is within 30 %
SENDS_KNOWN_MAX = 4096
STORE_AGAIN_MS = 1_000  # after a full disk
SAY_AGAIN_MS = 1_000  # to one that refuses receipts which may stand later; doubles
SAY_AGAIN_MS_MAX = 30_000  # the longest wait of that kind
UNHEARD_MS = 5_000  # to one that has said nothing of the receipts it got; doubles
UNHEARD_MS_MAX = 300_000  # the longest wait of that kind: what it declined for good stays open too
ALLOWANCE_MS = (HOURS + 1) * HOUR_MS  # so old a receipt counts against its account's caps
NO_DUES = [None, None, None]
GROUP_MAX = 16
"""Receipts of one group, which leaves when it is full. Signing eighty in a row held up a call for
30 ms, and checking them on the other side did again: p99 of a 3 ms call was 20 ms, and is 9."""

_OUTCOME = {
    Reason.FAILED_BY_JOB: Outcome.FAILED_BY_JOB,
    Reason.STOPPED_BY_REQUESTER: Outcome.STOPPED_BY_REQUESTER,
    Reason.OK: Outcome.DONE,
    Reason.DONE: Outcome.DONE,
}


class Later(NamedTuple):
    """When a requester gets its open receipts again; None: it has, and has not said a word yet."""

    due_mono_ms: int | None
    wait_ms: int


class Waiting(NamedTuple):
    """Work that is done and not yet signed for."""

    channel: ProviderChannel
    work: Work
    meters: Measured
    period_ms: tuple[int, int]
    cited: Cited


class ReceiptDesk:
    def __init__(
        self,
        outbox: Outbox,
        up: Callable[[Peer], bool],
        unsent: Callable[[Peer], bool],
        settled: Callable[[list[bytes]], None],
        allowance: Allowance,
    ) -> None:
        """`up(peer)`: its hello has come. `unsent(peer)`: units for it wait to be sent; results go
        before receipts. `settled(lease ids)`: receipts of these were accepted, for good."""
        self._out = outbox
        self._up = up
        self._unsent = unsent
        self._settled = settled
        self._allowance = allowance
        self._resend: set[Peer] = set()  # who gets every open receipt again
        self._sends: OrderedDict[int, Peer] = OrderedDict()
        self.channels: dict[Digest, ProviderChannel] = {}
        self._waiting: list[Waiting] = []
        # Signed and not durable yet: one group at a time, so that no receipt is ever on the disk,
        # or with the requester, before the one that its chain hangs on.
        self._storing: list[tuple[Peer, Sealed]] = []
        self._store_again_mono_ms: int | None = None
        # Acceptances likewise: each is on the disk after those that it follows.
        self._taken: list[tuple[ProviderChannel, Acceptance, Sealed]] = []
        self._keeping: list[tuple[ProviderChannel, Acceptance, Sealed]] = []
        self._keep_again_mono_ms: int | None = None
        self._later: dict[Peer, Later] = {}  # who refuses our receipts for now
        self._unheard: dict[Peer, Later] = {}  # who has got receipts and said nothing since
        self._due_mono_ms: int | None = None
        self._left_uj = 0  # energy of runs too short for a whole mWh is carried over
        self._left_battery_uj = 0

    def restore(
        self,
        entered: InForce,
        receipts: list[tuple[Receipt, Sealed]],
        accepts: list[tuple[Acceptance, Sealed]],
    ) -> None:
        channel = ProviderChannel(entered.agreement, entered.digest)
        leases: set[bytes] = set()
        for receipt, sealed in receipts:
            channel.minted(receipt, sealed)
            if abs(self._out.now.unix_ms - receipt.period_ms[1]) <= ALLOWANCE_MS:
                lease = receipt.work.lease_id
                self._used(channel, receipt.meters, receipt.period_ms[1], lease not in leases)
                leases.add(lease)
        for acceptance, sealed in accepts:
            if channel.take(acceptance, sealed.digest) is Reason.OK:
                channel.settle(acceptance)
        self.channels[entered.digest] = channel

    def _used(
        self, channel: ProviderChannel, meters: Measured, unix_ms: int, lease: bool = False
    ) -> None:
        used = Used(int(lease), meters.bytes_in + meters.bytes_out, meters.device_ms)
        self._allowance.add(channel.agreement.payer, unix_ms, used)

    def open_count(self, channel: Digest) -> int:
        found = self.channels.get(channel)
        waiting = sum(entry.channel.digest == channel for entry in self._waiting)
        return waiting + (len(found.open) if found else 0)

    def add(
        self,
        granted: Granted,
        entered: InForce,
        cited: Cited,
        kflop: int,
        watt: int,
    ) -> None:
        """Units of the lease that stand in no receipt yet."""
        channel = self.channels.get(entered.digest)
        if channel is None:
            channel = self.channels[entered.digest] = ProviderChannel(
                entered.agreement, entered.digest
            )
        now = self._out.now
        first, count = granted.receipted, granted.done - granted.receipted
        before, after = granted.receipted_meters, granted.meters
        wall_ms = max(0, after.wall_ms - before.wall_ms)
        energy, battery = self._energy_mwh(before, after, watt)
        measured = Measured(
            max(0, after.device_ms - before.device_ms),
            wall_ms,
            kflop,
            granted.bytes_in,
            granted.bytes_out,
            energy,
            after.method or ENERGY_ESTIMATED,
            after.uncertainty_permille if after.method else ESTIMATE_UNCERTAINTY_PERMILLE,
            battery,
        )
        work = Work(
            JobId(granted.job_digest[:16]),
            Span(granted.offer.run.first + first, count),
            granted.task_digest,
            granted.offer.job.artifact,
            granted.offer.input_root,
            root(granted.digests[first:]),
            _OUTCOME.get(granted.reason, Outcome.STOPPED_BY_OWNER),
            granted.lease.attempt,
            granted.lease_id,
            granted.offer.replica,
        )
        period = (
            granted.receipted_unix_ms,
            max(now.unix_ms, granted.receipted_unix_ms),
        )
        granted.receipted = granted.done
        granted.receipted_meters = after
        granted.receipted_unix_ms = period[1]
        granted.bytes_in = granted.bytes_out = 0
        granted.unsettled += 1
        self._used(channel, measured, period[1])
        self._waiting.append(Waiting(channel, work, measured, period, cited))
        if len(self._waiting) >= GROUP_MAX:
            self._due_mono_ms = now.mono_ms
        elif self._due_mono_ms is None:
            self._due_mono_ms = now.mono_ms + self._out.limits.receipt_delay_ms

    def _energy_mwh(self, before: Meters, after: Meters, watt: int) -> tuple[int, int]:
        """Whole mWh, and those of them out of the battery; what is less goes into the next receipt.

        Where nobody measures, it is the most that the owner lets a run draw, for its time.
        """
        if after.method:
            self._left_uj += max(0, after.energy_uj - before.energy_uj)
            self._left_battery_uj += max(0, after.battery_uj - before.battery_uj)
        else:
            self._left_uj += watt * 1_000 * max(0, after.wall_ms - before.wall_ms)
        energy, self._left_uj = divmod(self._left_uj, UJ_PER_MWH)
        battery = min(energy, self._left_battery_uj // UJ_PER_MWH)
        self._left_battery_uj -= battery * UJ_PER_MWH
        return energy, battery

    def interval_over(self, granted: Granted) -> bool:
        interval_ms = min(self._out.limits.receipt_interval_ms, RECEIPT_SPAN_MS_MAX)
        return self._out.now.unix_ms - granted.receipted_unix_ms >= interval_ms

    def flush(self) -> None:
        """Sign, store and send all that waits; while a group is being stored the rest waits on."""
        if self._storing:
            return
        every, self._waiting = self._waiting, []
        waiting: list[Waiting] = []
        for entry in every:
            held = len(waiting) >= GROUP_MAX or self._unsent(entry.channel.agreement.requester)
            (self._waiting if held else waiting).append(entry)
        if not waiting:
            if self._waiting:
                self._due_mono_ms = self._out.now.mono_ms + self._out.limits.receipt_delay_ms
            return
        for entry in waiting:
            channel = entry.channel
            receipt = channel.mint(self._out.identity, *entry[1:])
            sealed = self._out.seal(receipt, T_RECEIPT)
            channel.minted(receipt, sealed)
            self._storing.append((channel.agreement.requester, sealed))
        self._out.counters["receipts_signed"] += len(waiting)
        self._store()

    def _store(self) -> None:
        self._store_again_mono_ms = None
        rows = tuple(row(sealed) for _, sealed in self._storing)
        self._out.persist(rows, Durability.POWER, self._stored, self._not_stored)

    def _not_stored(self) -> None:
        self._store_again_mono_ms = self._out.now.mono_ms + STORE_AGAIN_MS

    def _stored(self) -> None:
        """They are durable. A requester that went and came back meanwhile must get its results
        again first; `_resend_all` has the receipts for it then."""
        minted, self._storing = self._storing, []
        if self._waiting:
            self._due_mono_ms = self._out.now.mono_ms
        for requester, sealed in minted:
            if not self._up(requester) or requester in self._resend:
                continue
            if self._unsent(requester):
                self._say_again(requester)
            else:
                self._say(requester, sealed.wire)

    def _say(self, requester: Peer, wire: bytes) -> None:
        send_id = self._out.send(requester, Lane.MONEY, wire)
        remember(self._sends, send_id, requester, SENDS_KNOWN_MAX)
        # A frame can be lost on a connection that stays up: a write that ran out of time, or the
        # other of two connections. Nothing else would bring it until the peer comes back.
        if requester not in self._unheard:
            self._unheard[requester] = Later(self._out.now.mono_ms + UNHEARD_MS, UNHEARD_MS)

    def _say_again(self, requester: Peer) -> None:
        self._resend.add(requester)
        if self._due_mono_ms is None:
            self._due_mono_ms = self._out.now.mono_ms + self._out.limits.receipt_delay_ms

    def on_send_failed(self, event: SendFailed) -> None:
        """One that found its queue full leaves a gap, and all after it would be refused."""
        requester = self._sends.pop(event.send_id, None)
        if requester is not None and event.reason is Reason.QUEUE_FULL and self._up(requester):
            self._say_again(requester)

    def peer_ready(self, peer: Peer) -> None:
        """A requester came back: it gets every receipt it has not accepted, after its results."""
        self._later.pop(peer, None)
        self._unheard.pop(peer, None)
        self._resend.add(peer)
        if self._due_mono_ms is None:
            self._due_mono_ms = self._out.now.mono_ms

    def _resend_all(self) -> None:
        storing = {sealed.digest for _, sealed in self._storing}  # these follow when they are
        for peer in sorted(self._resend):
            if self._unsent(peer):
                continue
            self._resend.discard(peer)
            for channel in self.channels.values():
                if channel.agreement.requester == peer:
                    for seq in sorted(channel.open):
                        accepted = seq <= channel.taken_seq
                        if not accepted and channel.open[seq].digest not in storing:
                            self._say(peer, channel.open[seq].wire)
        if self._resend:
            self._due_mono_ms = self._out.now.mono_ms + self._out.limits.receipt_delay_ms

    def on_acceptance(self, peer: Peer, sealed: Sealed) -> None:
        acceptance = sealed.open(Acceptance, T_ACCEPT)
        channel = self.channels.get(acceptance.channel)
        if channel is None or sealed.kid != peer or channel.agreement.requester != peer:
            return
        reason = channel.take(acceptance, sealed.digest)
        if reason is Reason.DUPLICATE:
            return
        if peer in self._unheard:
            if self.open_with(peer):
                self._unheard[peer] = Later(self._out.now.mono_ms + UNHEARD_MS, UNHEARD_MS)
            else:
                del self._unheard[peer]
        if reason is not Reason.OK:
            self._out.counters[f"acceptance_{reason.name.lower()}"] += 1
            if reason is Reason.GAP:
                self._ask_later(peer)  # our receipts bring what is missing
            return
        if peer in self._later:
            if self.open_with(peer):
                self.ask_soon(peer)  # this was on its way when it refused what came after
            else:
                del self._later[peer]
        self._taken.append((channel, acceptance, sealed))
        if not self._keeping:
            self._keep()

    def _keep(self) -> None:
        if not self._keeping:
            self._keeping, self._taken = self._taken, []
        self._keep_again_mono_ms = None
        rows = tuple(row(sealed) for _, _, sealed in self._keeping)
        self._out.persist(rows, Durability.POWER, self._kept, self._not_kept)

    def _not_kept(self) -> None:
        self._keep_again_mono_ms = self._out.now.mono_ms + STORE_AGAIN_MS

    def _kept(self) -> None:
        kept, self._keeping = self._keeping, []
        for channel, acceptance, _ in kept:
            self._settled([receipt.tag for receipt in channel.settle(acceptance)])
        if self._taken:
            self._keep()

    def open_with(self, peer: Peer) -> bool:
        """Whether it has receipts of ours, of any channel, that no acceptance here covers."""
        return any(
            seq > channel.taken_seq
            for channel in self.channels.values()
            if channel.agreement.requester == peer
            for seq in channel.open
        )

    def open_requesters(self) -> list[Peer]:
        """With whom receipts are open."""
        return sorted(
            {
                channel.agreement.requester
                for channel in self.channels.values()
                if any(seq > channel.taken_seq for seq in channel.open)
            }
        )

    def on_decline(self, peer: Peer, reason: Reason) -> None:
        """A receipt did not stand, for now: its chain had a hole, or a clock is wrong."""
        if reason in (Reason.GAP, Reason.CLOCK_SKEW):
            self._ask_later(peer)

    def ask_soon(self, peer: Peer) -> None:
        """What it refused may stand now."""
        if peer in self._later:
            due_mono_ms = self._out.now.mono_ms + SAY_AGAIN_MS
            if (known := self._later[peer].due_mono_ms) is not None:
                due_mono_ms = min(due_mono_ms, known)  # not put off by each that is accepted
            self._later[peer] = Later(due_mono_ms, SAY_AGAIN_MS)

    def _ask_later(self, peer: Peer) -> None:
        """All that is open goes out again from the first on, less often each time in vain."""
        known = self._later.get(peer, Later(None, 0))
        channels = self.channels.values()
        if known.due_mono_ms is None and any(
            channel.open and channel.agreement.requester == peer for channel in channels
        ):
            wait_ms = min(max(SAY_AGAIN_MS, 2 * known.wait_ms), SAY_AGAIN_MS_MAX)
            self._later[peer] = Later(self._out.now.mono_ms + wait_ms, wait_ms)

    def keep_held(self, record: HeldRecord) -> None:
        self._out.persist((record,), Durability.PROCESS)

    def drop_held(self, granted: Granted) -> None:
        self._out.persist(
            (HeldDropped(granted.requester, granted.task_id, granted.lease.attempt),),
            Durability.PROCESS,
        )

    def deadline(self) -> int | None:
        dues = [self._due_mono_ms, self._store_again_mono_ms, self._keep_again_mono_ms]
        if self._later or self._unheard:
            waits = (*self._later.values(), *self._unheard.values())
            dues += [later.due_mono_ms for later in waits]
        elif dues == NO_DUES:
            return None  # as nearly always: a fleet asks millions of times
        return min((due for due in dues if due is not None), default=None)

    def tick(self) -> None:
        now = self._out.now.mono_ms
        if self._store_again_mono_ms is not None and self._store_again_mono_ms <= now:
            self._store()
        if self._keep_again_mono_ms is not None and self._keep_again_mono_ms <= now:
            self._keep()
        for peer, later in list(self._later.items()):
            if later.due_mono_ms is None or later.due_mono_ms > now:
                continue
            if not self._up(peer):
                del self._later[peer]  # it gets them when it is back
                continue
            self._later[peer] = Later(None, later.wait_ms)
            self._resend.add(peer)
            self._due_mono_ms = now
        self._ask_unheard()
        if self._due_mono_ms is not None and self._due_mono_ms <= now:
            self._due_mono_ms = None
            self._resend_all()
            self.flush()

    def _ask_unheard(self) -> None:
        """Who is there and has said nothing gets all that is open again, less often each time."""
        now = self._out.now.mono_ms
        for peer, (due_mono_ms, wait_ms) in list(self._unheard.items()):
            if due_mono_ms is None or due_mono_ms > now:
                continue
            del self._unheard[peer]
            if not self._up(peer) or not self.open_with(peer):
                continue  # it gets them when it is back, or has them all
            wait_ms = min(2 * wait_ms, UNHEARD_MS_MAX)
            self._unheard[peer] = Later(now + wait_ms, wait_ms)
            later = self._later.get(peer)
            if later is None or later.due_mono_ms is None:  # else they go soon in any case
                self._resend.add(peer)
                self._due_mono_ms = now
                self._out.counters["receipts_unheard"] += 1
