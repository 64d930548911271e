"""Agreements without first meetings: who may work for whom, as a large simulated fleet has it.

Two machines agree by four frames before the first lease, once a week. A fleet of 10,000 cars in its
first minute does hardly anything else, in its second day nearly nothing of it, so above the size
of `measured.FULL_CARS_MAX` the machines find an agreement there when they look for one.
"""

from __future__ import annotations

from meshnode.protocol.agreement import FREE_RATES, InForce
from meshnode.protocol.codec import digest_of
from meshnode.protocol.objects import Agreement
from meshnode.protocol.papers import NO_CURRENCY
from meshnode.protocol.types import Account, Digest, NetworkId, Peer


class Standing:
    """Both machines of a pair see the same agreement; it is made when the first looks."""

    def __init__(self, network: NetworkId, account: Account, not_after_ms: int) -> None:
        self._network = network
        self._account = account
        self._not_after_ms = not_after_ms
        self._known: dict[tuple[Peer, Peer], InForce] = {}

    def __call__(self, provider: Peer, requester: Peer) -> InForce:
        known = self._known.get((provider, requester))
        if known is None:
            agreement = Agreement(
                1,
                self._network,
                provider,
                requester,
                "agreement",
                self._account,
                self._account,
                NO_CURRENCY,
                FREE_RATES,
                0,
                0,
                60_000,
                self._not_after_ms,
                14 * 86_400,
                Digest(bytes(32)),
                Digest(bytes(32)),
                bytes(16),
            )
            known = InForce(agreement, Digest(digest_of([provider, requester])))
            self._known[provider, requester] = known
        return known
