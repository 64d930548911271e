"""The whole node as one deterministic machine.

`handle(event, now) -> effects`: facts and time in, small values out, nothing done. The same events
give the same effects in a car, in the simulator and in a replay. It never raises on input: what a
stranger sends is decoded here, and what does not hold ends in a counter, a typed refusal or the
end of the connection.

Calling order: `start` once, then `handle` for every event, `Tick` when `deadline_mono_ms` has
passed. `view` is a pure read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import MeshError
from . import events as ev
from . import messages
from .acceptances import AcceptanceDesk, Audit
from .advert import AdvertBook, cell_topic
from .agreement import Agreements, InForce
from .books import reopen
from .cell import AdvertRoster, Roster
from .clocks import Clocks
from .connections import Connections, PeerState
from .effects import Block, Dial, Effect, Hangup, Join
from .explain import Explanation, Would, explain, would
from .gateway import Gateway
from .jobs import Jobs
from .objects import (
    T_ACCEPT,
    T_ADVERT,
    T_AGREEMENT,
    T_ANNOUNCE,
    T_LEASE,
    T_OFFER,
    T_RECEIPT,
    T_TOKEN,
    Token,
)
from .outbox import Identity, Outbox, Restored
from .placement import Placement
from .promises import Promises, under_way
from .provider import Provider
from .reasons import Reason
from .rendezvous import Rendezvous
from .requester import Requester
from .sealed import TAG_18, Sealed, unseal
from .standby import Stance, Standby
from .types import (
    PROTOCOL_VERSION,
    Digest,
    JobId,
    Lane,
    Limits,
    Now,
    Peer,
    Rng,
    Signer,
)
from .view import View, look

BLOCK_MS = 60_000  # how long a peer that broke the protocol is refused
PARTING_MS = 500  # for our hello to arrive before we hang up on who belongs elsewhere
EARLY_FRAMES_MAX = 256


class Node:
    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        signer: Signer,
        placement: Placement,
        audit: Audit,
        rng: Rng,
        restored: Restored,
        roster: Roster | None = None,
        standing: Callable[[Peer, Peer], InForce] | None = None,
    ) -> None:
        """`roster`: who is in which cell, where that is known otherwise than by adverts;
        `standing`: agreements, where they are known otherwise than by making them."""
        self.limits = limits
        self._out = Outbox(identity, limits, signer, rng)
        self.clocks = Clocks(identity.peer)
        self.connections = Connections(limits.peers_max)
        self.peers = self.connections.peers
        self._parting: dict[Peer, int] = {}  # of another network -> when we hang up
        self.book = AdvertBook(limits, identity.network)
        self._restored = restored
        self.agreements = Agreements(self._out, restored, standing)
        self.roster = known = roster or AdvertRoster(
            self.book,
            limits.rendezvous_cars or 1,
            lambda: self._out.now.mono_ms,
            lambda: self.provider.presence.advert,
        )
        self.provider = Provider(self._out, self.agreements, self.book, known, self._reach)
        self.jobs = Jobs(self._out)
        presence = self.provider.presence
        presence.last_mile_us = self.connections.last_mile_us
        self.gateway = Gateway(
            self._out, known, presence.peers_up, self._reach, self.provider.on_announce
        )
        presence.on_shown = self.gateway.shown
        self.requester = Requester(
            self._out,
            self.agreements,
            self.book,
            placement,
            self.jobs,
            known,
            self._reach,
            self.gateway.beyond,
        )
        self.requester.fleet.has_room = self.connections.has_room
        self.requester.fleet.came_back = self.connections.prove
        self.provider.accepted_by = self.connections.prove
        self.rendezvous = Rendezvous(self._out, self.book, known, self._rtt_us, self._reach)
        self.acceptances = AcceptanceDesk(
            self._out, self.agreements, audit, self.jobs, self.requester.shelf
        )
        self.provider.admission.apart = self.requester.fleet.apart = self.clocks.apart
        self.rendezvous.in_step = self.clocks.in_step
        self.standby = Standby(
            self._out, self.provider, known, lambda: under_way(self), self._reach
        )
        self._placement = placement
        self._looked_mono_ms = 0
        self._due_mono_ms: int | None = None
        self._due_known = False
        self._handlers = self._event_table()
        self._messages = self._message_table()
        self._objects = self._object_table()

    def _event_table(self) -> dict[type, Callable[[Any], None]]:
        return {
            ev.Tick: lambda _: None,
            ev.PeerUp: self._on_peer_up,
            ev.PeerDown: self._on_peer_down,
            ev.DialFailed: lambda e: self.requester.dial_failed(e.peer),
            ev.RttMeasured: self._on_rtt,
            ev.FrameIn: self._on_frame,
            ev.GossipIn: self._on_gossip,
            ev.ProvidersFound: self.gateway.on_found,
            ev.BlobReady: self._on_blob_ready,
            ev.BlobFailed: self._on_blob_failed,
            ev.WorkerClasses: self.provider.on_classes,
            ev.Admitted: self.provider.on_admitted,
            ev.UnitsDone: self.provider.on_units,
            ev.SliceDone: self.provider.on_slice,
            ev.Partial: self.provider.on_partial,
            ev.ExecEnded: self.provider.on_exec_ended,
            ev.BudgetRead: self.provider.on_budget,
            ev.Recall: lambda e: self.provider.on_recall(e.reason, e.grace_ms),
            ev.Woke: lambda _: self.standby.wake(),
            ev.Drain: lambda e: self.provider.drain(e.reason),
            ev.SendFailed: self._on_send_failed,
            ev.Persisted: lambda e: self._out.persisted(e.seq),
            ev.PersistFailed: self._on_persist_failed,
            ev.Submit: self.requester.submit,
            ev.Cancel: lambda e: self.requester.cancel(e.job_id),
            ev.BlobsHeld: lambda e: self.provider.on_blobs(e.blob_ids),
            ev.AddrsKnown: self._on_addrs,
            ev.Meet: lambda e: self._out.add(Dial(e.peer, e.addrs)),
            ev.MandateRenewed: self._on_mandate,
            ev.TermsChanged: lambda e: self.provider.on_terms(e.consent, e.policy, e.fleet),
        }

    def _message_table(self) -> dict[type, Callable[[Peer, Any], None]]:
        return {
            messages.Hello: self._on_hello,
            messages.Refuse: self._on_refuse,
            messages.Place: self.rendezvous.on_place,
            messages.Queued: self._on_queued,
            messages.Revoke: self.rendezvous.on_revoke,
            messages.Tally: self.rendezvous.on_tally,
            messages.Rest: self.standby.on_rest,
            messages.Inputs: self.provider.on_inputs,
            messages.Part: self.requester.returns.on_part,
            messages.Ended: self.requester.returns.on_ended,
            messages.Heartbeat: self.requester.returns.on_heartbeat,
            messages.CancelTask: self._on_cancel_task,
            messages.Handoff: self.requester.returns.on_handoff,
            messages.Checkpoint: self.requester.returns.on_checkpoint,
            messages.Watch: self.requester.returns.on_watch,
            messages.Assign: self.provider.on_assign,
            messages.TermsRequest: self._on_terms_request,
            messages.Terms: self._on_terms,
            messages.Goodbye: lambda peer, _: self.book.drop(peer),
            messages.Decline: self._on_decline,
        }

    def _object_table(self) -> dict[str, Callable[[Peer, Sealed], None]]:
        return {
            T_ADVERT: lambda peer, sealed: self._on_advert(peer, sealed),
            T_AGREEMENT: self._on_agreement,
            T_OFFER: self.provider.on_offer,
            T_LEASE: self.requester.on_lease,
            T_TOKEN: self._on_token,
            T_ANNOUNCE: self.gateway.on_asked,
            T_RECEIPT: self.acceptances.on_receipt,
            T_ACCEPT: self._on_acceptance,
        }

    @property
    def identity(self) -> Identity:
        return self._out.identity

    # ---- the calling order

    def start(self, now: Now) -> list[Effect]:
        """First effects, and the work of before a restart."""
        self._out.now = now
        self.clocks.see(now)
        self._out.add(Join(cell_topic(self.identity.network, self.identity.cell)))
        self.jobs.restore(self._restored)
        reopen(
            self._restored.signed,
            self.agreements,
            self.identity.peer,
            self.provider.receipts,
            self.acceptances,
        )
        self.provider.keeping.restore(self._restored.held)
        self.requester.resume()
        self._restored = Restored()
        self._looked_mono_ms = now.mono_ms
        return self._out.take()

    def handle(self, event: ev.Event, now: Now) -> list[Effect]:
        self._out.now = now
        self._due_known = False
        if self.clocks.see(now):
            if self.standby.stance is Stance.ASLEEP:
                self.clocks.resumed()
            else:
                self._clock_was_set()
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)
        self._to_self()
        if now.mono_ms > self._looked_mono_ms or type(event) is not ev.FrameIn:
            # Frames come many in a millisecond, the clock's own step, and a sixth of all time went
            # into looking after each.
            self._looked_mono_ms = now.mono_ms
            due = self.deadline_mono_ms()
            if due is not None and due <= now.mono_ms:
                self._due_known = False
                self._tick()
                self._to_self()
        return self._out.take()

    def deadline_mono_ms(self) -> int | None:
        """When to send a `Tick`; only an event changes it."""
        if not self._due_known:
            self._due_mono_ms = self._due()
            self._due_known = True
        return self._due_mono_ms

    def _due(self) -> int | None:
        every = (
            self.provider.deadline(),
            self.requester.deadline() if self.jobs.all else None,
            self.acceptances.deadline(),
            self.rendezvous.deadline(),
            self.standby.deadline(),
            self.book.deadline(self._out.now),
            self.connections.deadline(),
            min(self._parting.values()) if self._parting else None,
        )
        dues = [due for due in every if due is not None]
        return min(dues) if dues else None

    def view(self, now: Now) -> View:
        return look(self, now)

    def explain(self, job_id: JobId, now: Now) -> Explanation | None:
        """Why a job's runs wait or went where they went; None if it is not here. A pure read."""
        job = self.jobs.all.get(job_id)
        fleet = self.requester.fleet
        return explain(job, fleet, self.agreements, self.identity, now) if job else None

    def would(
        self, order: ev.JobOrder, kflop_per_unit: int, now: Now
    ) -> Would | tuple[Reason, str]:
        """What submitting the order would do now, or why it would be refused. A pure read."""
        fleet, agreements, placement = self.requester.fleet, self.agreements, self._placement
        return would(order, kflop_per_unit, fleet, agreements, self.identity, placement, now)

    @property
    def counters(self) -> Counter[str]:
        return self._out.counters

    def _tick(self) -> None:
        self.standby.tick()  # before adverts are forgotten: a car that wakes seeks those it knew
        self._out.counters["adverts_expired"] += len(self.book.expire(self._out.now))
        now_ms = self._out.now.mono_ms
        for peer in [peer for peer, at in self._parting.items() if at <= now_ms]:
            self._block(peer, Reason.OTHER_NETWORK)
        if self.connections.due(now_ms):
            for peer in self.connections.sweep(now_ms, Promises(self, self._out.now)):
                self._hang_up(peer)
        self.provider.tick()
        self.requester.tick()
        self.acceptances.tick()
        self.rendezvous.tick()

    # ---- peers

    def _on_peer_up(self, event: ev.PeerUp) -> None:
        if event.peer in self.peers:
            self._gone(event.peer)
        now = self._out.now
        if self.connections.full:
            worth = Promises(self, now)
            idle = self.connections.gives_way(event.peer, event.inbound, worth)
            if idle is None:
                self._block(event.peer, Reason.BUSY)
                return
            self._hang_up(idle)
        self.connections.enter(
            PeerState(event.peer, event.path, event.addrs, event.inbound, now.mono_ms, now.mono_ms)
        )
        self._say_hello(event.peer)

    def _say_hello(self, peer: Peer) -> None:
        classes = self.provider.owner.classes
        self._out.send(
            peer,
            Lane.URGENT,
            messages.Hello(
                (PROTOCOL_VERSION,),
                0,
                self.identity.network,
                classes.jax_window if classes else None,
                self.provider.owner.slots,
                self._out.now.unix_ms,
                self.identity.agent,
            ),
        )

    def _on_hello(self, peer: Peer, hello: messages.Hello) -> None:
        state = self.peers[peer]
        if hello.network != self.identity.network:
            self._out.notify(b"", "other_network", peer=peer, network=hello.network)
            self.requester.fleet.met_nobody(Reason.OTHER_NETWORK)
            # Not at once: our own hello is under way, and tells its user what went wrong.
            self._parting[peer] = self._out.now.mono_ms + PARTING_MS
            return
        if PROTOCOL_VERSION not in hello.versions:
            self._block(peer, Reason.VERSION)
            return
        was_apart = self.clocks.apart(peer)
        self.clocks.heard(peer, hello.unix_ms)
        first, state.hello = state.hello is None, hello
        if first:
            self._out.notify(b"", "peer_up", peer=peer, path=state.path)
            self.provider.peer_ready(peer)
            self.requester.peer_ready(peer)
            self.rendezvous.peer_ready(peer)
        if first or was_apart != self.clocks.apart(peer):
            self._clock_of(peer)

    def _clock_of(self, peer: Peer) -> None:
        """Its clock is too far from ours, or no longer."""
        if self.clocks.apart(peer):
            skew_ms = self.clocks.skew_ms(peer)
            whose = "ours" if self.clocks.standing().ours_is_off else "its"
            self._out.notify(b"", "clock_skew", peer=peer, skew_ms=skew_ms, wrong=whose)
        self.provider.clock_of(peer)

    def _clock_was_set(self) -> None:
        """Ours: who is apart from us has changed, and the others shall know."""
        self._out.counters["clock_set"] += 1
        for peer, state in self.peers.items():
            self._say_hello(peer)
            if state.hello is not None:
                self._clock_of(peer)
        self.requester.pump_all()

    def _on_peer_down(self, event: ev.PeerDown) -> None:
        if event.peer in self.peers:
            self._gone(event.peer)
            self._out.notify(b"", "peer_down", peer=event.peer, reason=int(event.reason))

    def _gone(self, peer: Peer) -> None:
        del self.peers[peer]
        self._parting.pop(peer, None)
        self.clocks.forget(peer)
        self.agreements.forget(peer)
        self.provider.peer_down(peer)
        self.rendezvous.peer_down(peer)
        self.requester.fleet.parted(peer)
        self.requester.peer_down(peer)

    def _hang_up(self, peer: Peer) -> None:
        """Nothing is under way over it, and another needs the room."""
        self._out.counters["hung_up"] += 1
        self._out.add(Hangup(peer))
        self._gone(peer)
        self._out.notify(b"", "peer_down", peer=peer, reason=int(Reason.BUSY))

    def _block(self, peer: Peer, reason: Reason) -> None:
        self._out.counters[f"blocked_{reason.name.lower()}"] += 1
        self._out.add(Block(peer, reason, self._out.now.mono_ms + BLOCK_MS))
        if peer in self.peers:
            self._gone(peer)

    def _on_rtt(self, event: ev.RttMeasured) -> None:
        state = self.peers.get(event.peer)
        if state is not None:
            state.measured(event.us)
            if event.peer in self.requester.fleet.peers_up:
                self.requester.fleet.peers_up[event.peer] = state.rtt_us

    # ---- frames

    def _on_frame(self, event: ev.FrameIn) -> None:
        state = self.peers.get(event.peer)
        if state is None or event.peer in self._parting:
            return
        try:
            self._deliver(event.peer, event.frame, state)
        except MeshError as error:
            # From an authenticated peer a frame that does not hold is a broken or hostile
            # implementation; another connection may be tried after a minute.
            self._out.notify(b"", "bad_frame", peer=event.peer, text=str(error)[:200])
            self._block(event.peer, Reason.BAD_FRAME)

    def _deliver(self, peer: Peer, frame: bytes, state: PeerState | None = None) -> None:
        """A frame of a connected peer in that state, or of one of our own roles."""
        early = state is not None and state.hello is None
        if frame.startswith(TAG_18):
            if early and state is not None:
                self._early(state)
                return
            sealed = unseal(frame)
            if state is not None and sealed.typ != T_ADVERT:  # those come whatever happens
                state.used_mono_ms = self._out.now.mono_ms
            on_object = self._objects.get(sealed.typ)
            if on_object is None:
                self._out.counters["unknown_object"] += 1
            else:
                on_object(peer, sealed)
            return
        message = messages.unpack(frame)
        if message is None:
            self._out.counters["unknown_message"] += 1
        elif early and state is not None and type(message) is not messages.Hello:
            self._early(state)
        else:
            if state is not None:
                state.used_mono_ms = self._out.now.mono_ms
            self._messages[type(message)](peer, message)

    def _to_self(self) -> None:
        """What one of our roles said to another."""
        while self._out.to_self:
            self._deliver(self.identity.peer, self._out.to_self.popleft())

    def _on_token(self, peer: Peer, sealed: Sealed) -> None:
        """A bid is for us as requester, an idle slot for us as rendezvous."""
        token = sealed.open(Token, T_TOKEN)
        if token.announce_id is None:
            self.rendezvous.on_token(peer, sealed)
        else:
            self.requester.bidding.on_token(peer, sealed)

    def _on_refuse(self, peer: Peer, refuse: messages.Refuse) -> None:
        if not self.rendezvous.on_refuse(peer, refuse):
            self.requester.on_refuse(peer, refuse)

    def _on_queued(self, peer: Peer, queued: messages.Queued) -> None:
        if not self.rendezvous.on_queued(peer, queued):
            self.requester.placing.on_queued(peer, queued)

    def _on_cancel_task(self, peer: Peer, cancel: messages.CancelTask) -> None:
        self.rendezvous.on_cancel(peer, cancel.task_id, cancel.attempt)
        self.provider.on_cancel(peer, cancel)

    def _reach(self, peer: Peer) -> None:
        known = self.book.cars.get(peer)
        self.requester.fleet.dial(peer, known.advert.addrs if known else ())

    def _rtt_us(self, peer: Peer) -> int | None:
        if peer == self.identity.peer:
            return 0
        state = self.peers.get(peer)
        return state.rtt_us if state is not None and state.hello is not None else None

    def _early(self, state: PeerState) -> None:
        """Before its hello a peer says nothing; what was under way when the connection changed
        is dropped, and a peer that never says hello is no peer."""
        state.early += 1
        self._out.counters["frames_before_hello"] += 1
        if state.early > EARLY_FRAMES_MAX:
            self._block(state.peer, Reason.BAD_FRAME)

    def _on_agreement(self, peer: Peer, sealed: Sealed) -> None:
        if self.agreements.on_signed(peer, sealed) is not None:
            self.requester.in_force(peer)

    def _on_mandate(self, event: ev.MandateRenewed) -> None:
        self._out.identity = replace(self._out.identity, mandate=event.mandate)
        self.agreements.renewed()
        self._out.notify(b"", "mandate_renewed")

    def _on_terms_request(self, peer: Peer, request: messages.TermsRequest) -> None:
        why = Reason.CLOCK_SKEW if self.clocks.apart(peer) else Reason.NOT_PROVIDING
        if why is Reason.CLOCK_SKEW or not self.provider.owner.active:
            self._out.send(peer, Lane.CONTROL, messages.Decline(Digest(bytes(32)), why))
            return
        self.agreements.on_terms_request(peer, request)

    def _on_terms(self, peer: Peer, terms: messages.Terms) -> None:
        if not self.agreements.answered(peer):
            self._out.counters["terms_unasked"] += 1
            return
        reason = self.agreements.on_terms(peer, terms)
        if reason is not Reason.OK:
            self.requester.terms_refused(peer, reason)

    def _on_decline(self, peer: Peer, decline: messages.Decline) -> None:
        self._out.counters[f"declined_{decline.reason.name.lower()}"] += 1
        self._out.notify(b"", "declined", peer=peer, reason=int(decline.reason))
        self.provider.receipts.on_decline(peer, decline.reason)
        if self.agreements.asking(peer):
            self.agreements.forget(peer)
            self.requester.terms_refused(peer, decline.reason)

    def _on_acceptance(self, peer: Peer, sealed: Sealed) -> None:
        self.provider.receipts.on_acceptance(peer, sealed)

    def _on_advert(self, source: Peer, sealed: Sealed) -> None:
        """A car speaks for itself: whoever wants many cars in the book needs many connections."""
        if sealed.kid != source:
            self._out.counters["adverts_of_others"] += 1
            return
        advert = self.book.take(sealed.wire, self._out.now)
        if advert is not None:
            self.requester.advert_came(advert)

    def _on_gossip(self, event: ev.GossipIn) -> None:
        if event.source == self.identity.peer or not event.frame.startswith(TAG_18):
            return
        try:
            sealed = unseal(event.frame)
            if sealed.typ == T_ADVERT:
                self._on_advert(event.source, sealed)
            elif sealed.typ == T_ANNOUNCE:
                self.gateway.on_announce(event.topic, event.source, sealed)
        except MeshError:
            self._out.counters["bad_gossip"] += 1

    # ---- own state

    def _on_blob_ready(self, event: ev.BlobReady) -> None:
        self.provider.on_blob_ready(event)
        self.requester.returns.on_state_here(event.fetch_id)

    def _on_blob_failed(self, event: ev.BlobFailed) -> None:
        self.provider.on_blob_failed(event)
        self.requester.returns.on_state_failed(event.fetch_id)

    def _on_addrs(self, event: ev.AddrsKnown) -> None:
        self.provider.on_addrs(event.addrs)
        self.requester.addrs_known(event.addrs)

    def _on_send_failed(self, event: ev.SendFailed) -> None:
        self._out.counters[f"send_failed_{event.reason.name.lower()}"] += 1
        self.provider.delivery.on_send_failed(event)
        self.provider.receipts.on_send_failed(event)
        self.acceptances.on_send_failed(event)
        self.requester.on_send_failed(event)

    def _on_persist_failed(self, event: ev.PersistFailed) -> None:
        self._out.counters["persist_failed"] += 1
        self._out.notify(b"", "persist_failed", reason=int(event.reason))
        self._out.persist_failed(event.seq)
