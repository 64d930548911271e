"""The provider role: a car that admits offers, runs leases and signs receipts.

Offer -> checks (consent, policy, agreement, budget, slots) -> lease -> inputs and blobs -> run ->
parts -> ended -> receipt -> acceptance. Recall beats all of it. Nothing here trusts an offer: what
does not fit is refused with a typed reason, and the requester goes elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

from .advert import AdvertBook, coarse
from .agreement import Agreements
from .cell import Roster
from .codec import digest
from .delivery import Delivery
from .effects import Admit, FetchBlob, HeldRecord, StartExec, StopExec
from .events import (
    Admitted,
    BlobFailed,
    BlobReady,
    BudgetRead,
    ExecEnded,
    Partial,
    SliceDone,
    UnitsDone,
    WorkerClasses,
)
from .job import inline_size, input_root, spec_bytes, task_digest
from .lease import FETCH_MS_MAX, Granted, Stage, exec_spec, revived
from .messages import (
    Assign,
    CancelTask,
    Heartbeat,
    Inputs,
    Queued,
    Refuse,
)
from .objects import (
    T_LEASE,
    T_OFFER,
    T_TOKEN,
    Announce,
    Lease,
    Offer,
)
from .outbox import Outbox, remember
from .owner import Owner
from .parting import Parting
from .presence import Presence
from .reasons import Reason
from .receipts import ReceiptDesk
from .sealed import Sealed, unseal
from .token import Tokens
from .types import (
    CHUNK_BYTES,
    BlobRef,
    Digest,
    Lane,
    LeaseId,
    Peer,
    TaskId,
    UnitRun,
    array_bytes,
)

HEARTBEAT_MS_MIN = 100  # whatever lease an offer asks for
ENDED_KEYS_MAX = 4096  # (requester, task, attempt) remembered after a lease is gone
CHUNKS_KNOWN_MAX = 1 << 16
QUEUE_AHEAD_MS = 100  # of work of other jobs that a run waits behind, for each slot
FIRST_HOLD_MS = 2_000
"""Of a slot for a requester that we have no agreement with: dial, terms, award."""


class Provider:
    def __init__(
        self,
        outbox: Outbox,
        agreements: Agreements,
        book: AdvertBook,
        roster: Roster,
        reach: Callable[[Peer], None],
    ) -> None:
        self._out = outbox
        self._agreements = agreements
        self._book = book
        self.owner = Owner(outbox)
        self.presence = Presence(outbox, self.owner, roster, self._working)
        self.presence.reach = reach
        self.presence.on_bid = agreements.on_bid
        self.tokens = Tokens(
            outbox, self.owner, roster, self.presence.peers_up, self.presence.slots_free, reach
        )
        self.presence.on_change = self.tokens.changed
        self.leases: dict[LeaseId, Granted] = {}  # not ended
        self.ended: dict[LeaseId, Granted] = {}  # kept until their receipts are accepted
        self._parting = Parting(outbox, self.presence)
        self.delivery = Delivery(outbox, self.presence, self.leases, self.ended)
        self.receipts = ReceiptDesk(
            outbox, self.delivery.up, self.delivery.unsent, self._on_settled
        )
        self.apart: Callable[[Peer], bool] = lambda _: False
        self.accepted_by: Callable[[Peer], None] = lambda _: None
        """Whether a peer's clock is too far from ours to work for it."""
        self._ended_bytes = 0
        self._away: dict[Peer, int] = {}  # requester with ended leases here -> away since
        self._by_key: dict[tuple[Peer, TaskId, int], Granted] = {}
        self._by_exec: dict[int, Granted] = {}
        self._by_fetch: dict[int, tuple[Granted, BlobRef, int, int]] = {}
        self._gone: OrderedDict[tuple[Peer, TaskId, int], Reason] = OrderedDict()
        self._admits: dict[int, Granted] = {}  # whose job the executor was asked about
        self._admitted: OrderedDict[Digest, tuple[int, bool]] = OrderedDict()
        """Artifact -> kFLOP a unit, and whether that is all of it; 0 if not known yet."""
        self._chunks: OrderedDict[tuple[Digest, int], None] = OrderedDict()

    def _working(self) -> int:
        """Leases with units to do. One whose units are all out has only its end to say: counted,
        it refused the next offer of a requester that had just seen its last unit."""
        return sum(lease.done < lease.offer.run.size for lease in self.leases.values())

    # ---- offers

    def on_offer(self, peer: Peer, sealed: Sealed, token: Digest | None = None) -> None:
        """From its requester; with `token` it spends a bid of ours."""
        self._consider(peer, peer, sealed, sealed.open(Offer, T_OFFER), token)

    def _consider(
        self,
        peer: Peer,
        asker: Peer,
        sealed: Sealed,
        offer: Offer,
        token: Digest | None = None,
        channel: Digest | None = None,
    ) -> None:
        """Grant it to its requester `peer`, or refuse it to whoever asked us: `channel` is given
        for one that a rendezvous has assigned."""
        identity = self._out.identity
        job_digest = digest(spec_bytes(offer.job))
        task = task_digest(job_digest, *offer.task, offer.replica)
        key = (peer, TaskId(task[:16]), offer.attempt)
        known = self._by_key.get(key)
        if known is not None:  # the same offer again: say the same, run nothing twice
            self.delivery.say_again(known)
            return
        channel = channel or offer.channel
        reason, text = self._admission(peer, sealed, offer, token, channel), ""
        if reason is Reason.OK and key in self._gone:
            reason = Reason.SUPERSEDED
        if reason is Reason.OK:
            reason, text = self._affords(offer)
        if reason is not Reason.OK or channel is None:
            self._out.counters[f"refused_{reason.name.lower()}"] += 1
            refuse = Refuse(key[1], offer.attempt, reason, text or None)
            self._out.post(asker, Lane.CONTROL, refuse)
            return
        now, limits = self._out.now, self._out.limits
        lease = Lease(
            1,
            identity.network,
            identity.peer,
            peer,
            "lease",
            LeaseId(self._out.rng.randbytes(16)),
            key[1],
            offer.attempt,
            offer.run,
            sealed.digest,
            min(offer.lease_ms, limits.lease_ms),
            max(HEARTBEAT_MS_MIN, min(limits.heartbeat_ms, offer.lease_ms // 3)),
            int(self.owner.run_ms(offer.job, offer.run.size)),
            now.unix_ms,
            channel,
        )
        wire = self._out.seal(lease, T_LEASE).wire
        granted = Granted(
            lease,
            wire,
            offer,
            sealed.wire,
            job_digest,
            task,
            mono_ms=now.mono_ms,
            unix_ms=now.unix_ms,
        )
        self._agreements.use(channel)
        self.leases[lease.lease_id] = granted
        self._by_key[key] = granted
        if asker == peer or peer in self.presence.peers_up:
            self._out.send(peer, Lane.CONTROL, wire)
        else:
            self._requester_left(granted)  # a rendezvous brought its offer; it hears when it is up
        self._prepare(granted)
        self.presence.changed()

    def _admission(
        self,
        peer: Peer,
        sealed: Sealed,
        offer: Offer,
        token: Digest | None,
        channel: Digest | None,
    ) -> Reason:
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
        may = self.owner.may_run()
        if may is not Reason.OK:
            return may
        entered = self._agreements.as_provider(channel, peer) if channel else None
        if entered is None or channel is None:
            return Reason.NO_AGREEMENT
        if not self.owner.admits(entered.agreement.payer):
            return Reason.SUBMITTER
        if self.receipts.open_count(channel) >= self._out.limits.unaccepted_receipts_max:
            return Reason.CREDIT
        fits = self.owner.fits(offer)
        if fits is not Reason.OK:
            return fits
        if token is not None and not self.presence.spend(token, peer):
            return Reason.EXPIRED
        room = self.owner.slots * (1 + self._out.limits.leases_queued_per_slot_max)
        if self._working() + self.presence.held() >= room:
            return Reason.BUSY
        return Reason.BUSY if self._waits_long(offer) else Reason.OK

    def _waits_long(self, offer: Offer) -> bool:
        """Behind others' long runs, where an idle car would begin at once. Behind its own job's a
        run may wait: its requester knows, and hides the way there and back behind them."""
        leases = [lease for lease in self.leases.values() if lease.done < lease.offer.run.size]
        if len(leases) < self.owner.slots:
            return False
        if any(lease.offer.job.nonce == offer.job.nonce for lease in leases):
            return False
        ahead_ms = sum(
            self.owner.run_ms(lease.offer.job, lease.offer.run.size - lease.done)
            for lease in leases
        )
        return ahead_ms > QUEUE_AHEAD_MS * self.owner.slots

    def on_assign(self, peer: Peer, assign: Assign) -> None:
        """A token of ours is spent on an offer: a bid's way and an idle slot's into one lease."""
        token = unseal(assign.token)
        if token.typ != T_TOKEN or token.kid != self._out.identity.peer:
            return
        sealed = unseal(assign.offer)
        offer = sealed.open(Offer, T_OFFER)
        if offer.provider is None:
            self._on_placed(peer, sealed, offer, token.digest, assign.addrs or ())
        elif offer.token == token.digest:
            self.on_offer(peer, sealed, token.digest)

    def _on_placed(
        self, holder: Peer, sealed: Sealed, offer: Offer, token: Digest, addrs: tuple[str, ...]
    ) -> None:
        """A rendezvous spends an idle slot on somebody's offer. With whom we have no agreement
        yet, we bid to: then it signs one, and awards."""
        requester = offer.requester
        task_id = TaskId(
            task_digest(digest(spec_bytes(offer.job)), *offer.task, offer.replica)[:16]
        )
        known = self._by_key.get((requester, task_id, offer.attempt))
        if known is not None:
            self.delivery.say_again(known)
            return
        reason = self._take_placed(holder, sealed, offer, token, task_id, addrs)
        if reason is not Reason.OK:
            self._out.counters[f"refused_{reason.name.lower()}"] += 1
            self._out.post(holder, Lane.CONTROL, Refuse(task_id, offer.attempt, reason))
        elif requester not in self.presence.peers_up:
            # A new connection takes longer than a requester waits for a word.
            self._out.post(holder, Lane.CONTROL, Queued(task_id, offer.attempt, 0))
        self.tokens.changed()

    def _take_placed(
        self,
        holder: Peer,
        sealed: Sealed,
        offer: Offer,
        token: Digest,
        task_id: TaskId,
        addrs: tuple[str, ...],
    ) -> Reason:
        requester = offer.requester
        if not self.tokens.spend(token, holder):
            return Reason.EXPIRED
        if self.presence.slots_free() < 1:
            may = self.owner.may_run()
            return Reason.BUSY if may is Reason.OK else may
        entered = self._agreements.with_requester(requester)
        if entered is None:
            bid = self.presence.bid(requester, task_id, addrs, FIRST_HOLD_MS)
            return Reason.OK if bid else Reason.BUSY
        if requester not in self.presence.peers_up and not self.presence.dial(requester, addrs):
            return Reason.BUSY  # nobody could tell it now
        self._consider(requester, holder, sealed, offer, None, entered.digest)
        return Reason.OK

    # ---- what is promised

    def promised(self) -> set[Peer]:
        """For whom something is under way here, and who looks after our idle slots."""
        requesters = {granted.requester for granted in self.leases.values()}
        return requesters | self.presence.bidden() | self.tokens.holders()

    def owed(self) -> set[Peer]:
        """Whose results or receipts are not settled."""
        return {granted.requester for granted in self.ended.values()}

    # ---- inputs

    def _prepare(self, granted: Granted) -> None:
        job = granted.offer.job
        if job.code is None:
            self._admit(granted)  # before its inputs are here: a worker takes a while to start
        else:
            self._fetch(granted, job.code, 0, job.code.size)
        run = granted.offer.run
        for arg in job.args:
            if arg.inline:
                continue
            unit = arg.size // job.units if arg.mapped else 0
            first = run.first * unit if arg.mapped else 0
            count = run.size * unit if arg.mapped else arg.size
            self._fetch(granted, BlobRef(arg.ident, arg.size), first, count)
        if granted.offer.state is not None:
            self._fetch(granted, granted.offer.state, 0, granted.offer.state.size)
        self._maybe_ready(granted)

    def _admit(self, granted: Granted) -> None:
        job = granted.offer.job
        if job.artifact not in self._admitted:
            exec_id = self._out.mint()
            self._admits[exec_id] = granted
            remember(self._admitted, job.artifact, (0, True), 1024)
            self._out.add(Admit(exec_id, exec_spec(job, granted.job_digest, 1)))

    def _fetch(self, granted: Granted, ref: BlobRef, first: int, count: int) -> None:
        chunks = range(first // CHUNK_BYTES, (first + max(count, 1) - 1) // CHUNK_BYTES + 1)
        if all((ref.blob_id, chunk) in self._chunks for chunk in chunks):
            return
        fetch_id = self._out.mint()
        granted.fetches.add(fetch_id)
        self._by_fetch[fetch_id] = (granted, ref, first, count)
        others = [p for p in self._book.holders(ref.blob_id[:8]) if p != self._out.identity.peer]
        holders = (granted.requester, *others[:7])
        deadline = self._out.now.mono_ms + FETCH_MS_MAX
        self._out.add(FetchBlob(ref, first, count, holders, deadline, fetch_id))

    def on_blob_ready(self, event: BlobReady) -> None:
        entry = self._by_fetch.pop(event.fetch_id, None)
        if entry is None:
            return
        granted, ref, first, count = entry
        last = (first + max(count, 1) - 1) // CHUNK_BYTES
        for chunk in range(first // CHUNK_BYTES, last + 1):
            remember(self._chunks, (ref.blob_id, chunk), None, CHUNKS_KNOWN_MAX)
        granted.fetches.discard(event.fetch_id)
        granted.bytes_in += event.bytes_fetched
        self._maybe_ready(granted)

    def on_blob_failed(self, event: BlobFailed) -> None:
        entry = self._by_fetch.pop(event.fetch_id, None)
        if entry is None:
            return
        granted = entry[0]
        granted.fetches.discard(event.fetch_id)
        if not granted.ended:
            self._end(granted, event.reason, "")

    def on_inputs(self, peer: Peer, inputs: Inputs) -> None:
        granted = self._by_key.get((peer, inputs.task_id, inputs.attempt))
        if granted is None or granted.ended:
            return
        if not granted.inline_wanted or granted.inline is not None:
            return
        job, run = granted.offer.job, granted.offer.run
        root = input_root(job, granted.job_digest, inputs.values, run.first, run.size)
        if len(inputs.values) != inline_size(job, run.size) or root != granted.offer.input_root:
            self._end(granted, Reason.KERNEL_SPEC, "the inline inputs do not match the offer")
            return
        granted.inline = inputs.values
        granted.bytes_in += len(inputs.values)
        self._maybe_ready(granted)

    def _maybe_ready(self, granted: Granted) -> None:
        if granted.stage is not Stage.WAITING or granted.fetches:
            return
        if granted.inline_wanted and granted.inline is None:
            return
        self._admit(granted)
        granted.move(Stage.READY)
        self._start_ready()

    def _start_ready(self) -> None:
        if self.owner.draining is not None or self.owner.recalled is not None:
            return
        running = sum(g.stage is Stage.RUNNING for g in self.leases.values())
        for granted in list(self.leases.values()):
            if running >= self.owner.slots:
                return
            if granted.stage is not Stage.READY:
                continue
            running += 1
            granted.move(Stage.RUNNING)
            granted.exec_id = self._out.mint()
            granted.run_mono_ms = self._out.now.mono_ms
            self._by_exec[granted.exec_id] = granted
            run = granted.offer.run
            self._out.add(
                StartExec(
                    granted.exec_id,
                    exec_spec(granted.offer.job, granted.job_digest, run.size),
                    UnitRun(granted.task_id, granted.lease.attempt, run.first, run.size),
                    granted.inline or b"",
                    granted.offer.state,
                    granted.offer.step or 0,
                )
            )

    # ---- what the executor says

    def on_admitted(self, event: Admitted) -> None:
        asked = self._admits.pop(event.exec_id, None)
        if asked is None:
            return
        artifact = asked.offer.job.artifact
        remember(self._admitted, artifact, (event.kflop_per_unit, event.counted), 1024)
        for granted in list(self.leases.values()):
            if granted.offer.job.artifact == artifact and granted.lease_id in self.leases:
                reason, text = self._affords(granted.offer)
                if reason is not Reason.OK:
                    self._stop(granted, reason, 0, text)

    def _affords(self, offer: Offer) -> tuple[Reason, str]:
        kflop, _ = self._admitted.get(offer.job.artifact, (0, True))
        return self.owner.affords(offer, kflop)

    def on_units(self, event: UnitsDone) -> None:
        granted = self._by_exec.get(event.exec_id)
        if granted is None or granted.ended:
            return
        run = granted.offer.run
        expected = run.first + granted.done
        if event.first != expected or granted.done + len(event.outputs) > run.size:
            return  # the executor promises order; anything else would mix units up
        size = sum(array_bytes(spec) for spec in granted.offer.job.outs)
        if any(len(output) != size for output in event.outputs):
            text = "an output has another size than promised"
            self._stop(granted, Reason.KERNEL_SPEC, 0, text)
            return
        outputs = list(event.outputs)
        granted.outputs += outputs
        granted.outputs_bytes += size * len(outputs)
        granted.bytes_out += size * len(outputs)
        granted.digests += [hashlib.sha256(output).digest() for output in outputs]
        granted.meters = event.meters
        granted.beat_mono_ms = self._out.now.mono_ms
        self.delivery.say(granted)
        if granted.done < run.size and self.receipts.interval_over(granted):
            self._receipt(granted)

    def on_exec_ended(self, event: ExecEnded) -> None:
        refused = self._admits.pop(event.exec_id, None)
        if refused is not None:
            self._not_admitted(refused, event)
            return
        granted = self._by_exec.pop(event.exec_id, None)
        if granted is None or granted.ended:
            self._start_ready()
            return
        granted.meters = event.meters
        if event.reason is Reason.DONE and granted.done < granted.offer.run.size:
            self._end(granted, Reason.WORKER_DIED, "the worker ended before its units")
            return
        if event.reason is Reason.BLOB_MISSING:
            self._chunks.clear()  # the store evicted something we believed to have
        if granted.done:
            spent_ms = self._out.now.mono_ms - granted.run_mono_ms
            self.owner.took(granted.offer.job, spent_ms, granted.done, granted.offer.step or 0)
        if granted.leaving is not None and event.reason is not Reason.DONE:
            self._parting.hand_off(granted, granted.leaving, 0)
        self._end(granted, event.reason, event.text)

    def _on_progress(self, event: SliceDone | Partial) -> Granted | None:
        granted = self._by_exec.get(event.exec_id)
        if granted is None or granted.ended or event.unit != granted.offer.run.first:
            return None
        return granted

    def on_slice(self, event: SliceDone) -> None:
        granted = self._on_progress(event)
        if granted is not None:
            self._parting.checkpoint(granted, event)

    def on_partial(self, event: Partial) -> None:
        granted = self._on_progress(event)
        if granted is not None:
            self._parting.watch(granted, event)

    def _not_admitted(self, refused: Granted, event: ExecEnded) -> None:
        """The admission itself was refused, for one job: another requester's job for the same
        artifact may have other arguments, and is asked about by itself."""
        artifact = refused.offer.job.artifact
        self._admitted.pop(artifact, None)
        waiting = [
            lease
            for lease in self.leases.values()
            if lease.offer.job.artifact == artifact and lease.stage in (Stage.WAITING, Stage.READY)
        ]
        for lease in waiting:
            if lease.job_digest != refused.job_digest:
                self._admit(lease)
        for lease in waiting:
            if lease.job_digest == refused.job_digest and lease.lease_id in self.leases:
                self._stop(lease, event.reason, 0, event.text)

    def _end(self, granted: Granted, reason: Reason, text: str) -> None:
        """The lease is over; say so, receipt what was done, give the slot to the next."""
        granted.move(Stage.ENDED)
        del self.leases[granted.lease_id]
        self.ended[granted.lease_id] = granted
        self._ended_bytes += granted.kept_bytes
        self.delivery.unsaid[granted.lease_id] = None
        granted.reason = reason
        granted.text = text[:200]
        for fetch_id in granted.fetches:
            self._by_fetch.pop(fetch_id, None)
        self.delivery.say(granted)
        if granted.done > granted.receipted and self.owner.consent is not None:
            self._receipt(granted)
        elif not granted.unsettled:
            self._forget(granted)
        if granted.requester not in self.presence.peers_up and granted.lease_id in self.ended:
            self._requester_left(granted)
        self._start_ready()
        self._bound_held()
        self.presence.changed()

    def _receipt(self, granted: Granted) -> None:
        assert self.owner.consent is not None
        consent, _, policy, _ = self.owner.consent
        # It was in force when the lease was granted; what lapsed since does not make work free.
        entered = self._agreements.by_channel.get(granted.lease.channel)
        if entered is None:
            return
        watt_max = self.owner.budget.watt_max
        self.receipts.add(
            granted, entered, consent.digest, policy.digest, self._kflop(granted), watt_max
        )

    def _kflop(self, granted: Granted) -> int:
        """Of the units that stand in no receipt yet; 0 where loops run on as their data says."""
        each, counted = self._admitted.get(granted.offer.job.artifact, (0, True))
        if not counted or not granted.meters.counted:
            return 0
        # As counted by the run: one that went on from a checkpoint did a part of its unit.
        by_run = granted.meters.kflop - granted.receipted_meters.kflop
        return by_run if by_run > 0 else each * (granted.done - granted.receipted)

    # ---- talking to the requester

    def _find(self, lease_id: LeaseId) -> Granted | None:
        return self.leases.get(lease_id) or self.ended.get(lease_id)

    def _of(self, peer: Peer) -> list[Granted]:
        every = (*self.leases.values(), *self.ended.values())
        return [granted for granted in every if granted.requester == peer]

    def on_cancel(self, peer: Peer, cancel: CancelTask) -> None:
        for granted in list(self.leases.values()):
            if (
                granted.requester == peer
                and granted.task_id == cancel.task_id
                and granted.lease.attempt <= cancel.attempt
            ):
                self._stop(granted, Reason.STOPPED_BY_REQUESTER, 0)

    def _stop(self, granted: Granted, reason: Reason, grace_ms: int, text: str = "") -> None:
        if granted.stage is Stage.RUNNING:
            self._by_exec.pop(granted.exec_id, None)
            self._out.add(StopExec(granted.exec_id, reason, grace_ms))
        self._end(granted, reason, text)

    def on_recall(self, reason: Reason, grace_ms: int) -> None:
        """The driver is back: stop everything first, then tell who waits."""
        self.owner.recalled = reason
        for granted in list(self.leases.values()):
            stepped = granted.offer.job.steps is not None and granted.stage is Stage.RUNNING
            if stepped and grace_ms > 0 and granted.leaving is None:
                # Its state is worth the grace; the executor says when it is out, or over.
                granted.leaving = reason
                stop = StopExec(granted.exec_id, Reason.STOPPED_BY_OWNER, grace_ms)
                self._out.add(stop)
                continue
            self._parting.hand_off(granted, reason, grace_ms)
            self._stop(granted, Reason.STOPPED_BY_OWNER, grace_ms)
        self.presence.changed()

    def drain(self, reason: Reason) -> None:
        """Runs in work go on; what only waits would never start, so it goes elsewhere now."""
        self.owner.draining = reason
        for granted in list(self.leases.values()):
            if granted.stage in (Stage.WAITING, Stage.READY):
                self._stop(granted, Reason.STOPPED_BY_OWNER, 0)
        self.presence.changed()

    def peer_ready(self, peer: Peer) -> None:
        """The peer's hello has come: our advert, then whatever it missed."""
        self.presence.peer_ready(peer)
        self.tokens.changed()
        self._away.pop(peer, None)
        for granted in self._of(peer):
            granted.asked_out_mono_ms = None
            self.delivery.say_again(granted)
        self.receipts.peer_ready(peer)

    def clock_of(self, peer: Peer) -> None:
        """The clocks have come apart, or together: no work that it could not accept, and what it
        refused meanwhile goes out again."""
        if not self.apart(peer):
            self.receipts.ask_soon(peer)
            return
        for granted in list(self.leases.values()):
            if granted.requester == peer:
                self._stop(granted, Reason.CLOCK_SKEW, 0)

    def peer_down(self, peer: Peer) -> None:
        self.presence.peers_up.discard(peer)
        self.tokens.peer_down(peer)
        for granted in self._of(peer):
            self._requester_left(granted)

    def _requester_left(self, granted: Granted) -> None:
        """A live lease goes on for a while; finished units must survive until it is back."""
        now = self._out.now.mono_ms
        granted.asked_out_mono_ms = now
        if granted.ended:
            self._away.setdefault(granted.requester, now)
            self._store(granted)

    def _on_settled(self, tags: list[bytes]) -> None:
        """Receipts of these leases were accepted: their outputs may go."""
        for tag in tags:
            granted = self._find(LeaseId(tag))
            if granted is None:
                continue
            granted.unsettled -= 1
            self.accepted_by(granted.requester)
            if granted.ended and granted.unsettled <= 0 and granted.receipted >= granted.done:
                self._forget(granted)

    def _forget(self, granted: Granted) -> None:
        if self.ended.pop(granted.lease_id, None) is not None:
            self._ended_bytes -= granted.kept_bytes
        self.delivery.unsaid.pop(granted.lease_id, None)
        self._by_key.pop(granted.key, None)
        remember(self._gone, granted.key, granted.reason, ENDED_KEYS_MAX)
        if granted.stored:
            self.receipts.drop_held(granted)

    def _store(self, granted: Granted) -> None:
        """The requester is away: finished units must survive this process."""
        if granted.stored or not granted.done:
            return
        granted.stored = True
        expires_unix_ms = self._out.now.unix_ms + self._out.limits.result_keep_ms
        self.receipts.keep_held(granted.held(expires_unix_ms))

    def _bound_held(self) -> None:
        """Results nobody accepts are bounded in bytes: the oldest go first."""
        while self.ended and self._ended_bytes > self._out.limits.result_keep_bytes_max:
            self._forget(next(iter(self.ended.values())))

    # ---- announcements and adverts

    def on_announce(self, announce: Announce) -> None:
        if not self.apart(announce.requester):
            self.presence.on_announce(announce)

    def on_classes(self, event: WorkerClasses) -> None:
        self.owner.classes = event
        self.presence.changed(now=True)

    def on_budget(self, event: BudgetRead) -> None:
        changed = coarse(event) != coarse(self.owner.budget)
        self.owner.budget = event
        if event.may_run and self.owner.recalled is not None:
            self.owner.recalled, changed = None, True
        if changed:
            self.presence.changed(now=True)

    def on_blobs(self, blob_ids: tuple[Digest, ...]) -> None:
        self.presence.blobs = blob_ids
        self.presence.changed(now=True)

    def on_addrs(self, addrs: tuple[str, ...]) -> None:
        self.presence.addrs = addrs
        self.presence.changed(now=True)

    # ---- time

    def deadline(self) -> int | None:
        every = (
            self.tokens.deadline(),
            self.presence.deadline(),
            self.receipts.deadline(),
            self.delivery.deadline(),
        )
        dues = [due for due in every if due is not None]
        if self._away:
            keep_ms = self._out.limits.result_keep_ms
            dues += [since + keep_ms for since in self._away.values()]
        if self.leases:
            dues += map(self._live_due, self.leases.values())
        return min(dues) if dues else None

    @staticmethod
    def _live_due(granted: Granted) -> int:
        """When a live lease wants attention: its next heartbeat, or the end of our patience."""
        due = granted.beat_mono_ms + granted.lease.heartbeat_ms
        if granted.asked_out_mono_ms is not None:
            due = granted.asked_out_mono_ms + granted.lease.lease_ms
        return min(due, granted.patience_mono_ms or due)

    def tick(self) -> None:
        mono = self._out.now.mono_ms
        for peer, since in list(self._away.items()):
            if since + self._out.limits.result_keep_ms <= mono:
                del self._away[peer]
                for granted in self._of(peer):
                    if granted.ended:
                        self._forget(granted)
        self.delivery.tick()
        for granted in list(self.leases.values()):
            if self._live_due(granted) > mono:
                continue
            if granted.asked_out_mono_ms is not None:
                self._stop(granted, Reason.PEER_DOWN, 0)
                continue
            if (granted.patience_mono_ms or mono + 1) <= mono:
                self._stop(granted, Reason.BLOB_MISSING, 0, "the inputs did not come")
                continue
            self._heartbeat(granted)
            if self.receipts.interval_over(granted) and granted.done > granted.receipted:
                self._receipt(granted)
        self.presence.tick()
        self.tokens.tick()
        self.receipts.tick()

    def _heartbeat(self, granted: Granted) -> None:
        granted.beat_mono_ms = self._out.now.mono_ms
        waits = {Stage.WAITING: Reason.WAITS_BLOB, Stage.READY: Reason.WAITS_SLOT}
        left = granted.offer.run.size - granted.done
        eta_ms = int(self.owner.run_ms(granted.offer.job, left))
        self._out.send(
            granted.requester,
            Lane.CONTROL,
            Heartbeat(granted.lease_id, granted.done, eta_ms, waits.get(granted.stage)),
        )

    # ---- after a restart

    def restore(self, held: tuple[HeldRecord, ...]) -> None:
        """Units that this car finished while their requester was away."""
        for record in held:
            if record.expires_unix_ms <= self._out.now.unix_ms:
                continue
            granted = revived(record, self._out.now)
            if granted is None:
                continue
            self.ended[granted.lease_id] = granted
            self._ended_bytes += granted.kept_bytes
            self.delivery.unsaid[granted.lease_id] = None
            self._away[granted.requester] = self._out.now.mono_ms
            self._by_key[granted.key] = granted
