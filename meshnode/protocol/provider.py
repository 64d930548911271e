"""The provider role: a car that admits offers, runs leases and signs receipts.

Offer -> checks (consent, policy, agreement, budget, slots) -> lease -> inputs and blobs -> run ->
parts -> ended -> receipt -> acceptance. Recall beats all of it. Nothing here trusts an offer: what
does not fit is refused with a typed reason, and the requester goes elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from .admission import Admission
from .advert import AdvertBook, coarse
from .agreement import Agreements
from .cell import Roster
from .codec import digest
from .delivery import Delivery
from .effects import StartExec, StopExec
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
from .gathering import Gathering
from .job import spec_bytes, task_digest
from .keeping import Keeping
from .lease import Granted, Stage, exec_spec
from .messages import (
    Assign,
    CancelTask,
    Heartbeat,
    Inputs,
    Queued,
    Refuse,
)
from .objects import T_LEASE, T_OFFER, T_TOKEN, Announce, Offer
from .outbox import Outbox
from .owner import Owner
from .parting import Parting
from .presence import Presence
from .reasons import Reason
from .receipts import ReceiptDesk
from .sealed import Sealed, unseal
from .token import Tokens
from .types import (
    Digest,
    Lane,
    LeaseId,
    Peer,
    TaskId,
    UnitRun,
    array_bytes,
)

WITHDRAWN_GRACE_MS = 100  # a unit may end in it; consent ends within one slice of work
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
        self.owner = Owner(outbox)
        self.presence = Presence(outbox, self.owner, roster)
        self.presence.reach = reach
        self.presence.on_bid = agreements.on_bid
        self.tokens = Tokens(
            outbox, self.owner, roster, self.presence.peers_up, self.presence.slots_free, reach
        )
        self.presence.on_change = self.tokens.changed
        self.leases: dict[LeaseId, Granted] = {}  # not ended
        self.ended: dict[LeaseId, Granted] = {}  # kept until their receipts are accepted
        self._parting = Parting(outbox, self.presence, self.owner)
        self.delivery = Delivery(outbox, self.presence, self.leases, self.ended)
        self.receipts = ReceiptDesk(
            outbox, self.delivery.up, self.delivery.unsent, self._on_settled, self.owner.allowance
        )
        self.keeping = Keeping(outbox, self.ended, self.delivery, self.receipts, reach)
        self.accepted_by: Callable[[Peer], None] = lambda _: None
        self.admission = Admission(
            outbox,
            agreements,
            self.owner,
            self.presence,
            self.leases,
            self.receipts.open_count,
        )
        self.presence.working = self.admission.working
        self._gathering = Gathering(outbox, book)
        self._by_exec: dict[int, Granted] = {}

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
        job_digest = digest(spec_bytes(offer.job))
        task = task_digest(job_digest, *offer.task, offer.replica)
        key = (peer, TaskId(task[:16]), offer.attempt)
        known = self.keeping.by_key.get(key)
        if known is not None:  # the same offer again: say the same, run nothing twice
            self.delivery.say_again(known)
            return
        channel = channel or offer.channel
        reason, text = self.admission.check(peer, sealed, offer, token, channel), ""
        if reason is Reason.OK and key in self.keeping.gone:
            reason = Reason.SUPERSEDED
        if reason is Reason.OK:
            reason, text = self.admission.affords(offer)
        if reason is not Reason.OK or channel is None:
            self._out.counters[f"refused_{reason.name.lower()}"] += 1
            refuse = Refuse(key[1], offer.attempt, reason, text or None)
            self._out.post(asker, Lane.CONTROL, refuse)
            return
        now = self._out.now
        lease = self.admission.lease(key[1], sealed, offer, channel)
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
        granted.papers = self.owner.papers
        self._agreements.use(channel)
        self.leases[lease.lease_id] = granted
        self.keeping.by_key[key] = granted
        if asker == peer or peer in self.presence.peers_up:
            self._out.send(peer, Lane.CONTROL, wire)
        else:
            self._requester_left(granted)  # a rendezvous brought its offer; it hears when it is up
        self._prepare(granted)
        self.presence.changed()

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
        known = self.keeping.by_key.get((requester, task_id, offer.attempt))
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
            if may is not Reason.OK or not self.presence.free_for(requester):
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
        if granted.offer.job.code is None:
            self.admission.ask(granted)  # before its inputs are here: a worker takes a while
        self._gathering.begin(granted)
        self._maybe_ready(granted)

    def on_blob_ready(self, event: BlobReady) -> None:
        granted = self._gathering.on_blob_ready(event)
        if granted is not None:
            self._maybe_ready(granted)

    def on_blob_failed(self, event: BlobFailed) -> None:
        granted = self._gathering.on_blob_failed(event)
        if granted is not None and not granted.ended:
            self._end(granted, event.reason, "")

    def on_inputs(self, peer: Peer, inputs: Inputs) -> None:
        granted = self.keeping.by_key.get((peer, inputs.task_id, inputs.attempt))
        if granted is None or granted.ended:
            return
        if not granted.inline_wanted or granted.inline is not None:
            return
        reason = self._gathering.take(granted, inputs)
        if reason is not Reason.OK:
            self._end(granted, reason, "the inline inputs do not match the offer")
            return
        self._maybe_ready(granted)

    def _maybe_ready(self, granted: Granted) -> None:
        if granted.stage is not Stage.WAITING or granted.fetches:
            return
        if granted.inline_wanted and granted.inline is None:
            return
        self.admission.ask(granted)
        granted.move(Stage.READY)
        self._start_ready()

    def _start_ready(self) -> None:
        if self.owner.may_run() is not Reason.OK:
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
        artifact = self.admission.on_admitted(event)
        for granted in list(self.leases.values()):
            if granted.offer.job.artifact == artifact and granted.lease_id in self.leases:
                reason, text = self.admission.affords(granted.offer)
                if reason is not Reason.OK:
                    self._stop(granted, reason, 0, text)

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
        granted.meters = self.owner.drew(granted.meters, event.meters)
        granted.beat_mono_ms = self._out.now.mono_ms
        self.delivery.say(granted)
        if granted.done < run.size and self.receipts.interval_over(granted):
            self._receipt(granted)

    def on_exec_ended(self, event: ExecEnded) -> None:
        refused = self.admission.on_refused(event.exec_id)
        if refused is not None:
            self._not_admitted(refused, event)
            return
        granted = self._by_exec.pop(event.exec_id, None)
        if granted is None or granted.ended:
            self.owner.ended_after_stop(event.exec_id, event.meters)
            self._start_ready()
            return
        granted.meters = self.owner.drew(granted.meters, event.meters)
        if event.reason is Reason.DONE and granted.done < granted.offer.run.size:
            self._end(granted, Reason.WORKER_DIED, "the worker ended before its units")
            return
        if event.reason is Reason.BLOB_MISSING:
            self._gathering.lost()
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
        waiting = [
            lease
            for lease in self.leases.values()
            if lease.offer.job.artifact == artifact and lease.stage in (Stage.WAITING, Stage.READY)
        ]
        for lease in waiting:
            if lease.job_digest != refused.job_digest:
                self.admission.ask(lease)
        for lease in waiting:
            if lease.job_digest == refused.job_digest and lease.lease_id in self.leases:
                self._stop(lease, event.reason, 0, event.text)

    def _end(self, granted: Granted, reason: Reason, text: str) -> None:
        """The lease is over; say so, receipt what was done, give the slot to the next."""
        granted.move(Stage.ENDED)
        del self.leases[granted.lease_id]
        self.keeping.keep(granted)
        granted.reason = reason
        granted.text = text[:200]
        self._gathering.forget(granted)
        self.delivery.say(granted)
        if granted.done > granted.receipted and self.owner.consent is not None:
            self._receipt(granted)
        elif not granted.unsettled:
            self.keeping.forget(granted)
        self.admission.spent_unpaid(granted)
        if granted.requester not in self.presence.peers_up and granted.lease_id in self.ended:
            self._requester_left(granted)
        self._start_ready()
        self.keeping.bound()
        self.presence.changed()

    def _receipt(self, granted: Granted) -> None:
        # In force when the lease was granted; what changed or lapsed since makes no work free.
        cited = granted.papers or self.owner.papers
        entered = self._agreements.by_channel.get(granted.lease.channel)
        if entered is None:
            return
        kflop, watt_max = self.admission.kflop(granted), self.owner.budget.watt_max
        self.receipts.add(granted, entered, cited, kflop, watt_max)

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
            self.owner.stops(granted.exec_id, granted.meters, self.admission.payer(granted))
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
        self.keeping.requester_back(peer)
        for granted in self._of(peer):
            granted.asked_out_mono_ms = None
            self.delivery.say_again(granted)
        self.receipts.peer_ready(peer)

    def clock_of(self, peer: Peer) -> None:
        """The clocks have come apart, or together: no work that it could not accept, and what it
        refused meanwhile goes out again."""
        if not self.admission.apart(peer):
            self.receipts.ask_soon(peer)
            return
        for granted in list(self.leases.values()):
            if granted.requester == peer:
                self._stop(granted, Reason.CLOCK_SKEW, 0)

    def peer_down(self, peer: Peer) -> None:
        self.presence.peers_up.discard(peer)
        self.tokens.peer_down(peer)
        self.keeping.peer_down(peer)
        for granted in self._of(peer):
            self._requester_left(granted)

    def _requester_left(self, granted: Granted) -> None:
        """A live lease goes on for a while; finished units must survive until it is back."""
        now = self._out.now.mono_ms
        granted.asked_out_mono_ms = now
        if granted.ended:
            self.keeping.requester_left(granted)

    def _on_settled(self, tags: list[bytes]) -> None:
        """Receipts of these leases were accepted: their outputs may go."""
        for tag in tags:
            granted = self._find(LeaseId(tag))
            if granted is None:
                continue
            granted.unsettled -= 1
            self.accepted_by(granted.requester)
            if granted.ended and granted.unsettled <= 0 and granted.receipted >= granted.done:
                self.keeping.forget(granted)

    # ---- announcements and adverts

    def on_announce(self, announce: Announce) -> None:
        if not self.admission.apart(announce.requester):
            self.presence.on_announce(announce)

    def on_classes(self, event: WorkerClasses) -> None:
        self.owner.classes = event
        self.presence.changed(now=True)

    def on_budget(self, event: BudgetRead) -> None:
        changed = coarse(event) != coarse(self.owner.budget)
        self.owner.budget = event
        recalled = self.owner.recalled
        if recalled is not None and (event.may_run or recalled is not Reason.NO_CONSENT):
            # What holds it now is what it says, not what recalled it an hour ago.
            self.owner.recalled, changed = None if event.may_run else event.reason, True
        if changed:
            self.presence.changed(now=True)

    def on_terms(self, consent: bytes | None, policy: bytes | None, fleet: bytes | None) -> None:
        """The owner's new word, or the fleet's. Withdrawn: what was done is receipted, no more."""
        if not self.owner.on_terms(consent, policy, fleet):
            self.on_recall(Reason.NO_CONSENT, WITHDRAWN_GRACE_MS)
        for granted in self.admission.unwelcome():
            self._stop(granted, Reason.STOPPED_BY_OWNER, WITHDRAWN_GRACE_MS)
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
            self.keeping.deadline(),
        )
        dues = [due for due in every if due is not None]
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
        self.keeping.tick()
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
