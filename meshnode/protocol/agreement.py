"""How two peers come to an agreement before the first lease, and which ones are in force.

terms-request (requester's mandate) -> terms (provider's mandate, rates, bounds) -> agreement signed
by the requester -> the same payload signed by the provider. Mandates link a node to an account, so
they are shown only here, never in adverts. Either side stores what both have signed before it acts
on it. An agreement lapses with the shorter of the two mandates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import MeshError
from .messages import Decline, Terms, TermsRequest
from .objects import T_AGREEMENT, Agreement, Rate
from .outbox import Outbox, Restored, row
from .papers import T_MANDATE, Mandate, Role
from .reasons import Reason
from .sealed import Sealed, unseal
from .types import CLOCK_SKEW_MS_MAX, MANDATE_MS_MAX, Digest, Durability, Lane, Peer

ASK_TIMEOUT_MS = 5_000  # an agreement that is not there after so long is asked for again
FREE_RATES = (Rate(0, 0, 1),)
UNUSED_MAX = 1024  # agreements as provider under which nothing has been leased yet


@dataclass(frozen=True, slots=True)
class InForce:
    agreement: Agreement
    digest: Digest


def read_mandate(wire: bytes, peer: Peer, role: Role, outbox: Outbox) -> Sealed | Reason:
    """A mandate that lets `peer` act in `role` now, or why not."""
    try:
        sealed = unseal(wire)
        mandate = sealed.open(Mandate, T_MANDATE)
    except MeshError:
        return Reason.BAD_SIGNATURE
    now = outbox.now.unix_ms
    if mandate.network != outbox.identity.network:
        return Reason.OTHER_NETWORK
    if sealed.kid != mandate.account or mandate.peer != peer or not mandate.roles & role:
        return Reason.NOT_YOURS
    if mandate.not_after_ms - mandate.not_before_ms > MANDATE_MS_MAX:
        return Reason.EXPIRED
    if not mandate.not_before_ms - CLOCK_SKEW_MS_MAX <= now < mandate.not_after_ms:
        return Reason.EXPIRED
    return sealed


class Agreements:
    """Agreements of this node, in both roles, by the peer at the other end.

    `standing(provider, requester)`: what two parties have agreed on before, where that is known
    otherwise: a large simulation does not play each first meeting.
    """

    def __init__(
        self,
        outbox: Outbox,
        restored: Restored,
        standing: Callable[[Peer, Peer], InForce] | None = None,
    ) -> None:
        self._out = outbox
        self._standing = standing
        self.by_channel: dict[Digest, InForce] = {}
        self._with_provider: dict[Peer, InForce] = {}
        self._with_requester: dict[Peer, InForce] = {}
        self._asked: dict[Peer, int] = {}  # provider -> when to stop waiting
        self._open: set[Peer] = set()  # providers whose terms we wait for
        self._proposed: dict[Peer, Sealed] = {}  # provider -> what we signed
        self._shown: dict[Peer, Sealed] = {}  # requester -> its mandate
        self._unused: OrderedDict[Digest, None] = OrderedDict()
        self._own = self._before = unseal(outbox.identity.mandate)
        signed: dict[Digest, set[bytes]] = {}
        for obj in restored.signed:
            if obj.typ != T_AGREEMENT:
                continue
            sealed = unseal(obj.sealed)
            kids = signed.setdefault(sealed.digest, set())
            kids.add(sealed.kid)
            agreement = sealed.open(Agreement, T_AGREEMENT)
            if kids == {agreement.provider, agreement.requester}:
                self._enter(InForce(agreement, sealed.digest))

    def renewed(self) -> None:
        """Our mandate has changed. What is in force stays so until it lapses; what is being agreed
        on under the old one still comes into force, and terms asked for with it are asked anew."""
        self._before, self._own = self._own, unseal(self._out.identity.mandate)
        for peer in self._open:
            self._asked.pop(peer, None)
        self._open.clear()

    def with_provider(self, peer: Peer) -> InForce | None:
        if self._standing is not None and peer not in self._with_provider:
            self._enter(self._standing(peer, self._out.identity.peer))
        found = self._with_provider.get(peer)
        if found is not None and found.agreement.not_after_ms <= self._out.now.unix_ms:
            return None
        return found

    def as_provider(self, channel: Digest, requester: Peer) -> InForce | None:
        if self._standing is not None and channel not in self.by_channel:
            self._enter(self._standing(self._out.identity.peer, requester))
        found = self.by_channel.get(channel)
        if (
            found is None
            or found.agreement.requester != requester
            or found.agreement.provider != self._out.identity.peer
            or found.agreement.not_after_ms <= self._out.now.unix_ms
        ):
            return None
        return found

    def with_requester(self, peer: Peer) -> InForce | None:
        """The one that it cited last. One that it has never cited may have reached us alone: what
        is leased under that it could not accept."""
        if self._standing is not None and peer not in self._with_requester:
            standing = self._standing(self._out.identity.peer, peer)
            self._enter(standing)
            self.use(standing.digest)
        found = self._with_requester.get(peer)
        return None if found is None else self.as_provider(found.digest, peer)

    def use(self, channel: Digest) -> None:
        """Something is leased under it: it stays."""
        self._unused.pop(channel, None)
        entered = self.by_channel[channel]
        self._with_requester[entered.agreement.requester] = entered

    def ask(self, peer: Peer) -> None:
        """Start the handshake, unless it is under way."""
        now = self._out.now.mono_ms
        if self._asked.get(peer, 0) > now:
            return
        self._asked[peer] = now + ASK_TIMEOUT_MS
        self._open.add(peer)
        self._out.send(peer, Lane.CONTROL, TermsRequest(self._own.wire))

    def asking(self, peer: Peer) -> bool:
        return self._asked.get(peer, 0) > self._out.now.mono_ms

    def asked(self) -> list[Peer]:
        """Providers whose answer we wait for."""
        return [peer for peer in self._asked if self.asking(peer)]

    def shown(self) -> frozenset[Peer]:
        """Requesters that asked for our terms and have not signed."""
        return frozenset(self._shown)

    def used_with(self, peer: Peer) -> bool:
        """Whether an agreement with it is here that is more than signed: we may offer under it, or
        something was leased to it. It may have lapsed; it says who has been of use."""
        return peer in self._with_provider or peer in self._with_requester

    def answered(self, peer: Peer) -> bool:
        """Terms came: whether they were asked for. Each question takes one answer, because an
        answer is signed and stored."""
        asked = peer in self._open
        self._open.discard(peer)
        return asked

    def void(self, peer: Peer) -> None:
        """The car does not know our agreement any more; the next use asks anew."""
        self._with_provider.pop(peer, None)

    def forget(self, peer: Peer) -> None:
        """The connection is gone; what was half-way starts anew."""
        self._asked.pop(peer, None)
        self._open.discard(peer)
        self._proposed.pop(peer, None)
        self._shown.pop(peer, None)

    # ---- provider's side

    def on_terms_request(self, peer: Peer, request: TermsRequest) -> None:
        shown = read_mandate(request.mandate, peer, Role.REQUEST, self._out)
        if isinstance(shown, Reason):
            self._decline(peer, self._own.digest, shown)
            return
        self._shown[peer] = shown
        self._say_terms(peer)

    def on_bid(self, peer: Peer) -> None:
        """We have bid to a requester that has no agreement with us as far as we know: our terms go
        with the bid, a round trip before it could have asked for them."""
        if self.with_requester(peer) is None:
            self._say_terms(peer)

    def _say_terms(self, peer: Peer) -> None:
        mandate = self._own.open(Mandate, T_MANDATE)
        self._out.send(
            peer,
            Lane.CONTROL,
            Terms(
                self._own.wire,
                self._out.identity.currency,
                FREE_RATES,
                0,
                0,
                60_000,
                mandate.not_after_ms,
                14 * 86_400,
            ),
        )

    def on_signed(self, peer: Peer, sealed: Sealed) -> InForce | None:
        """A signed agreement came: a proposal to us, or the countersignature we waited for.

        Returns the agreement when it has come into force for us as requester.
        """
        agreement = sealed.open(Agreement, T_AGREEMENT)
        if sealed.kid != peer or agreement.network != self._out.identity.network:
            self._decline(peer, sealed.digest, Reason.NOT_YOURS)
            return None
        me = self._out.identity.peer
        if agreement.provider == me and agreement.requester == peer:
            self._countersign(peer, agreement, sealed)
            return None
        proposed = self._proposed.get(peer)
        if proposed is None or proposed.digest != sealed.digest:
            return None
        del self._proposed[peer]
        self._asked.pop(peer, None)
        entered = InForce(agreement, sealed.digest)
        self._out.persist((row(proposed), row(sealed)), Durability.POWER)
        self._enter(entered)
        return entered

    def _countersign(self, peer: Peer, agreement: Agreement, sealed: Sealed) -> None:
        shown = self._shown.get(peer)
        cited = self._before if agreement.provider_mandate == self._before.digest else self._own
        own = cited.open(Mandate, T_MANDATE)
        identity = self._out.identity
        now = self._out.now.unix_ms
        reason = Reason.OK
        if shown is None or agreement.requester_mandate != shown.digest:
            reason = Reason.NO_AGREEMENT
        elif agreement.provider_mandate != cited.digest:
            reason = Reason.EXPIRED
        elif agreement.payee != identity.account or agreement.payer != shown.kid:
            reason = Reason.NOT_YOURS
        elif agreement.currency != identity.currency:
            reason = Reason.CURRENCY
        elif agreement.rates != FREE_RATES:
            reason = Reason.PRICE
        elif not now < agreement.not_after_ms <= own.not_after_ms:
            reason = Reason.EXPIRED
        if reason is not Reason.OK or shown is None:
            self._decline(peer, sealed.digest, reason)
            return
        signed = self._out.seal(agreement, T_AGREEMENT)
        seq = self._out.persist(
            (row(shown), row(cited), row(sealed), row(signed)), Durability.POWER
        )
        if sealed.digest not in self.by_channel:
            self._unused[sealed.digest] = None
        self._enter(InForce(agreement, sealed.digest))
        # One showing of the mandate, one agreement; and signing alone does not fill the table: a
        # requester whose unused agreement has gone is told NO_AGREEMENT and asks again.
        del self._shown[peer]
        if len(self._unused) > UNUSED_MAX:
            oldest, _ = self._unused.popitem(last=False)
            del self.by_channel[oldest]
        self._out.send(peer, Lane.CONTROL, signed.wire, after=seq)

    # ---- requester's side

    def on_terms(self, peer: Peer, terms: Terms) -> Reason:
        """Sign what the car asks for, if it may ask for it; the reason is OK if we signed."""
        shown = read_mandate(terms.mandate, peer, Role.PROVIDE, self._out)
        if isinstance(shown, Reason):
            return shown
        identity = self._out.identity
        if terms.currency != identity.currency:
            return Reason.CURRENCY
        if terms.rates != FREE_RATES:
            return Reason.PRICE
        own = self._own.open(Mandate, T_MANDATE)
        provider = shown.open(Mandate, T_MANDATE)
        agreement = Agreement(
            1,
            identity.network,
            peer,
            identity.peer,
            "agreement",
            provider.account,
            identity.account,
            identity.currency,
            terms.rates,
            terms.unaccepted_nano_max,
            terms.unsettled_nano_max,
            terms.slice_ms_max,
            min(terms.not_after_ms, own.not_after_ms, provider.not_after_ms),
            terms.dispute_s,
            shown.digest,
            self._own.digest,
            self._out.rng.randbytes(16),
        )
        signed = self._out.seal(agreement, T_AGREEMENT)
        self._proposed[peer] = signed
        seq = self._out.persist((row(shown), row(self._own)), Durability.POWER)
        self._out.send(peer, Lane.CONTROL, signed.wire, after=seq)
        return Reason.OK

    def _enter(self, entered: InForce) -> None:
        self.by_channel[entered.digest] = entered
        if entered.agreement.requester == self._out.identity.peer:
            known = self._with_provider.get(entered.agreement.provider)
            if known is None or known.agreement.not_after_ms <= entered.agreement.not_after_ms:
                self._with_provider[entered.agreement.provider] = entered

    def _decline(self, peer: Peer, about: Digest, reason: Reason) -> None:
        self._out.send(peer, Lane.CONTROL, Decline(about, reason))
