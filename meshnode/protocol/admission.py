"""Whether a car takes an offer: who asks, under what, for how long, and is there room.

`provider` asks before each lease; the first reason that stands in the way is the answer. What an
artifact costs the executor says once, of its first lease: `affords` counts with it from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from .agreement import Agreements
from .allowance import Used
from .effects import Admit
from .events import Admitted
from .lease import Granted, exec_spec
from .objects import Lease, Offer
from .outbox import Outbox, remember
from .owner import Owner
from .presence import Presence
from .reasons import Reason
from .sealed import Sealed
from .types import Account, Digest, LeaseId, Peer, TaskId

HEARTBEAT_MS_MIN = 100  # whatever lease an offer asks for
QUEUE_AHEAD_MS = 100  # of work of other jobs that a run waits behind, for each slot
ARTIFACTS_KNOWN_MAX = 1024


class Admission:
    """`open_count(channel)`: its receipts that nobody has accepted."""

    def __init__(
        self,
        outbox: Outbox,
        agreements: Agreements,
        owner: Owner,
        presence: Presence,
        leases: Mapping[LeaseId, Granted],
        open_count: Callable[[Digest], int],
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._owner = owner
        self._presence = presence
        self._leases = leases
        self._open_count = open_count
        self.apart: Callable[[Peer], bool] = lambda _: False
        """Whether a peer's clock is too far from ours to work for it."""
        self._asked: dict[int, Granted] = {}  # whose job the executor was asked about
        self._admitted: OrderedDict[Digest, tuple[int, bool]] = OrderedDict()
        """Artifact -> kFLOP a unit, and whether that is all of it; 0 if not known yet."""

    def check(
        self,
        peer: Peer,
        sealed: Sealed,
        offer: Offer,
        token: Digest | None,
        channel: Digest | None,
    ) -> Reason:
        """OK if `peer` may have what it offers to take; spends the bid `token`, if it is one."""
        identity = self._out.identity
        if sealed.kid != peer or offer.requester != peer or offer.job.requester != peer:
            return Reason.NOT_YOURS
        if offer.network != identity.network or offer.job.network != identity.network:
            return Reason.OTHER_NETWORK
        if offer.provider != (identity.peer if channel == offer.channel else None):
            return Reason.NOT_YOURS
        if self.apart(peer):
            return Reason.CLOCK_SKEW  # it would refuse our receipts
        if offer.not_after_ms <= self._out.now.unix_ms:
            return Reason.EXPIRED
        may = self._owner.may_run()
        if may is not Reason.OK:
            return may
        entered = self._agreements.as_provider(channel, peer) if channel else None
        if entered is None or channel is None:
            return Reason.NO_AGREEMENT
        if not self._owner.admits(entered.agreement.payer):
            return Reason.SUBMITTER
        if self._open_count(channel) >= self._out.limits.unaccepted_receipts_max:
            return Reason.CREDIT
        fits = self._owner.fits(offer)
        if fits is not Reason.OK:
            return fits
        if self._owner.caps_accounts:
            payer = entered.agreement.payer
            allows = self._owner.allows(payer, offer, self._of_payer(payer))
            if allows is not Reason.OK:
                return allows
        if token is not None and not self._presence.spend(token, peer):
            return Reason.EXPIRED
        room = self._owner.slots * (1 + self._out.limits.leases_queued_per_slot_max)
        if self.working() + self._presence.held() >= room:
            return Reason.BUSY
        return Reason.BUSY if self._waits_long(offer) else Reason.OK

    def unwelcome(self) -> list[Granted]:
        """Leases that the owner's newest policy would not grant any more."""
        if self._owner.consent is None:
            return []
        lacks = self._owner.lacks_layers()
        return [
            lease
            for lease in self._leases.values()
            if lacks or not self._owner.admits(self.payer(lease) or b"")
        ]

    def lease(self, task_id: TaskId, sealed: Sealed, offer: Offer, channel: Digest) -> Lease:
        """What is granted on the sealed offer."""
        identity, limits = self._out.identity, self._out.limits
        entered = self._agreements.by_channel.get(channel)
        if entered is not None:
            self._owner.has_lease(entered.agreement.payer)
        return Lease(
            1,
            identity.network,
            identity.peer,
            offer.requester,
            "lease",
            LeaseId(self._out.rng.randbytes(16)),
            task_id,
            offer.attempt,
            offer.run,
            sealed.digest,
            min(offer.lease_ms, limits.lease_ms),
            max(HEARTBEAT_MS_MIN, min(limits.heartbeat_ms, offer.lease_ms // 3)),
            int(self._owner.run_ms(offer.job, offer.run.size)),
            self._out.now.unix_ms,
            channel,
        )

    def working(self) -> int:
        """Leases with units to do. One whose units are all out has only its end to say: counted,
        it refused the next offer of a requester that had just seen its last unit."""
        return sum(lease.done < lease.offer.run.size for lease in self._leases.values())

    def _waits_long(self, offer: Offer) -> bool:
        """Behind others' long runs, where an idle car would begin at once. Behind its own job's a
        run may wait: its requester knows, and hides the way there and back behind them."""
        leases = [lease for lease in self._leases.values() if lease.done < lease.offer.run.size]
        if len(leases) < self._owner.slots:
            return False
        if any(lease.offer.job.nonce == offer.job.nonce for lease in leases):
            return False
        ahead_ms = sum(
            self._owner.run_ms(lease.offer.job, lease.offer.run.size - lease.done)
            for lease in leases
        )
        return ahead_ms > QUEUE_AHEAD_MS * self._owner.slots

    # ---- what the executor knows of an artifact

    def ask(self, granted: Granted) -> None:
        """Unless it has been asked about the artifact already."""
        job = granted.offer.job
        if job.artifact not in self._admitted:
            exec_id = self._out.mint()
            self._asked[exec_id] = granted
            remember(self._admitted, job.artifact, (0, True), ARTIFACTS_KNOWN_MAX)
            self._out.add(Admit(exec_id, exec_spec(job, granted.job_digest, 1)))

    def on_admitted(self, event: Admitted) -> Digest | None:
        """The artifact, if we asked."""
        asked = self._asked.pop(event.exec_id, None)
        if asked is None:
            return None
        artifact = asked.offer.job.artifact
        known = event.kflop_per_unit, event.counted
        remember(self._admitted, artifact, known, ARTIFACTS_KNOWN_MAX)
        return artifact

    def on_refused(self, exec_id: int) -> Granted | None:
        """Whose job is refused, if we asked about one; the artifact is asked about again."""
        asked = self._asked.pop(exec_id, None)
        if asked is not None:
            self._admitted.pop(asked.offer.job.artifact, None)
        return asked

    def affords(self, offer: Offer) -> tuple[Reason, str]:
        kflop, _ = self._admitted.get(offer.job.artifact, (0, True))
        return self._owner.affords(offer, kflop, self._promised_mwh(offer))

    def _of_payer(self, payer: Account) -> list[Granted]:
        return [lease for lease in self._leases.values() if self.payer(lease) == payer]

    def payer(self, granted: Granted) -> Account | None:
        entered = self._agreements.by_channel.get(granted.lease.channel)
        return None if entered is None else entered.agreement.payer

    def spent_unpaid(self, granted: Granted) -> None:
        """What an ended lease had of this car and no receipt names counts for its account: who
        cancels just before the end has had the device all the same."""
        payer = self.payer(granted)
        if payer is not None:
            device_ms = granted.meters.device_ms - granted.receipted_meters.device_ms
            used = Used(0, granted.bytes_in + granted.bytes_out, max(0, device_ms))
            self._owner.allowance.add(payer, self._out.now.unix_ms, used)

    def _promised_mwh(self, but: Offer) -> float:
        """Energy that the leases in hand will still draw."""
        return sum(
            self._owner.run_mwh(
                self._owner.run_ms(lease.offer.job, lease.offer.run.size - lease.done)
            )
            for lease in self._leases.values()
            if lease.offer is not but
        )

    def kflop(self, granted: Granted) -> int:
        """Of the units that stand in no receipt yet; 0 where loops run on as their data says."""
        each, counted = self._admitted.get(granted.offer.job.artifact, (0, True))
        if not counted or not granted.meters.counted:
            return 0
        # As counted by the run: one that went on from a checkpoint did a part of its unit.
        by_run = granted.meters.kflop - granted.receipted_meters.kflop
        return by_run if by_run > 0 else each * (granted.done - granted.receipted)
