"""A peer with real keys and no machine: it signs and says whatever a test wants.

It answers the handshakes that every peer must pass (hello, terms, agreement) and keeps the frames
that it hears. A site of the mesh like any other, so links, delays and crashes treat it the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, cast

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.agreement import FREE_RATES
from meshnode.protocol.codec import digest
from meshnode.protocol.fields import Span
from meshnode.protocol.job import input_root, spec_bytes, task_digest
from meshnode.protocol.node import Node
from meshnode.protocol.objects import (
    NO_METERS,
    T_ADVERT,
    T_AGREEMENT,
    T_LEASE,
    T_OFFER,
    T_RECEIPT,
    Advert,
    AdvertBudget,
    AdvertClass,
    Agreement,
    JobArg,
    JobSpec,
    Lease,
    Offer,
    OfferKind,
    Receipt,
    Work,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import Sealed, seal, unseal
from meshnode.protocol.types import (
    ArraySpec,
    Digest,
    Lane,
    LeaseId,
    NetworkId,
    Now,
    Peer,
    TaskId,
    array_bytes,
)
from testnet.sim.mesh import ARTIFACT, EPOCH_MS, NETWORK, PROVIDE, REQUEST, Mesh, Site, identity_of

F16 = ArraySpec("float32", (16,))
DAY_MS = 86_400_000


class Rogue:
    def __init__(self, mesh: Mesh, name: str, *, advertises: bool = False) -> None:
        self.mesh = mesh
        self.name = name
        seed = len(mesh.sites) + 1
        self.identity, self.key = identity_of(seed, PROVIDE | REQUEST)
        site = Site(name, self.identity, self.key, mesh.limits, seed - 1)
        site.node = cast("Node", self)
        mesh.sites[name] = site
        mesh.by_peer[self.identity.peer] = site
        self.heard: list[Any] = []  # messages and Sealed
        self.advertises = advertises
        self.seq = EPOCH_MS

    @property
    def peer(self) -> Peer:
        return self.identity.peer

    # ---- what the mesh wants of a node

    def handle(self, event: ev.Event, now: Now) -> list[fx.Effect]:
        if isinstance(event, ev.PeerUp):
            hello = messages.Hello((1,), 0, NETWORK, (9, 10), 1, now.unix_ms)
            frames = [messages.pack(hello)]
            if self.advertises:
                frames.append(self.advert().wire)
            return [self._send(event.peer, frame) for frame in frames]
        if not isinstance(event, ev.FrameIn):
            return []
        if event.frame[0] == 0xD2:
            sealed = unseal(event.frame)
            self.heard.append(sealed)
            if sealed.typ == T_AGREEMENT:
                agreement = sealed.open(Agreement, T_AGREEMENT)
                if agreement.provider == self.peer:
                    return [self._send(event.peer, self.seal(agreement, T_AGREEMENT).wire)]
            return []
        message = messages.unpack(event.frame)
        self.heard.append(message)
        if isinstance(message, messages.TermsRequest):
            return [self._send(event.peer, messages.pack(self.terms()))]
        return []

    def deadline_mono_ms(self) -> int | None:
        return None

    def _send(self, peer: Peer, frame: bytes) -> fx.Send:
        return fx.Send(0, peer, Lane.CONTROL, frame)

    # ---- speaking

    def say(self, to: Site, frame: Any) -> None:
        """At once, past the queue of the link."""
        wire = frame.wire if isinstance(frame, Sealed) else frame
        wire = wire if isinstance(wire, bytes) else messages.pack(wire)
        self.mesh.feed(to, ev.FrameIn(self.peer, Lane.CONTROL, wire))

    def seal(self, obj: Any, typ: str) -> Sealed:
        return seal(obj, typ, self.peer, self.key.sign)

    def all_heard(self, kind: type | str) -> list[Any]:
        if isinstance(kind, str):
            return [h for h in self.heard if isinstance(h, Sealed) and h.typ == kind]
        return [h for h in self.heard if isinstance(h, kind)]

    # ---- objects

    def advert(self, *, slots: int = 2) -> Sealed:
        self.seq += 1
        now = self.mesh.now().unix_ms
        return self.seal(
            Advert(
                1,
                NETWORK,
                self.peer,
                self.seq,
                "advert",
                "cell",
                (AdvertClass("cpu", "sim", 4_096, 900_000, b"simclass"),),
                slots,
                slots,
                (9, 10),
                "0.0",
                0,
                (),
                AdvertBudget(5_000_000, 300, 7_200, 0, 1, Reason.OK),
                now + 100_000,
                (f"/sim/{self.name}",),
            ),
            T_ADVERT,
        )

    def terms(self) -> messages.Terms:
        return messages.Terms(
            self.identity.mandate, "XXX", FREE_RATES, 0, 0, 60_000, EPOCH_MS + DAY_MS, DAY_MS
        )

    def agreement(self, car: Site, nonce: int = 0) -> Sealed:
        """The one that a requester signs, as the car would have it."""
        return self.seal(
            Agreement(
                1,
                NETWORK,
                car.identity.peer,
                self.peer,
                "agreement",
                car.identity.account,
                self.identity.account,
                "XXX",
                FREE_RATES,
                0,
                0,
                60_000,
                EPOCH_MS + DAY_MS,
                DAY_MS,
                unseal(car.identity.mandate).digest,
                unseal(self.identity.mandate).digest,
                nonce.to_bytes(16, "big"),
            ),
            T_AGREEMENT,
        )

    def agree(self, car: Site, nonce: int = 0) -> Digest:
        self.say(car, messages.TermsRequest(self.identity.mandate))
        agreement = self.agreement(car, nonce)
        self.say(car, agreement)
        return agreement.digest

    def job(self, units: int, *, inline: bytes | None = None, **more: Any) -> JobSpec:
        size = array_bytes(F16) * units
        ident = Digest(b"\x33" * 32 if inline is None else hashlib.sha256(inline).digest())
        spec = JobSpec(
            1,
            NetworkId(NETWORK),
            self.peer,
            bytes(16),
            "job",
            "bench.noop@1",
            ARTIFACT,
            (JobArg(1, F16, ident, size, int(inline is not None)),),
            (F16,),
            units,
            60_000,
            16,
            1,
        )
        return replace(spec, **more)

    def offer(
        self,
        car: Site,
        channel: Digest,
        job: JobSpec,
        run: Span,
        *,
        inline: bytes = b"",
        **more: Any,
    ) -> Sealed:
        job_digest = digest(spec_bytes(job))
        offer = Offer(
            1,
            NETWORK,
            self.peer,
            car.identity.peer,
            "offer",
            job,
            run,
            0,
            run,
            input_root(job, job_digest, inline, *run),
            0,
            OfferKind.FIRST,
            channel,
            30_000,
            self.mesh.now().unix_ms + 600_000,
            0,
        )
        return self.seal(replace(offer, **more), T_OFFER)

    def receipt(self, channel: Digest, agreement: Agreement, work: Work, **more: Any) -> Sealed:
        now = self.mesh.now().unix_ms
        receipt = Receipt(
            1,
            NETWORK,
            self.peer,
            agreement.requester,
            agreement.payee,
            agreement.payer,
            channel,
            0,
            None,
            work,
            NO_METERS,
            NO_METERS,
            0,
            0,
            (now, now),
            Digest(b"\1" * 32),
            Digest(b"\1" * 32),
        )
        return self.seal(replace(receipt, **more), T_RECEIPT)

    def task_of(self, offer: Sealed) -> TaskId:
        opened = offer.open(Offer, T_OFFER)
        task = task_digest(digest(spec_bytes(opened.job)), *opened.task, opened.replica)
        return TaskId(task[:16])

    def lease(self, offer: Sealed, lease_id: bytes = bytes(16), **more: Any) -> Sealed:
        """What a car answers to an offer."""
        opened = offer.open(Offer, T_OFFER)
        lease = Lease(
            1,
            NETWORK,
            self.peer,
            opened.requester,
            "lease",
            LeaseId(lease_id),
            self.task_of(offer),
            opened.attempt,
            opened.run,
            offer.digest,
            30_000,
            2_000,
            0,
            self.mesh.now().unix_ms,
            opened.channel or Digest(bytes(32)),
        )
        return self.seal(replace(lease, **more), T_LEASE)
