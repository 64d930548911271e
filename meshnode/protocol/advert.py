"""Adverts: what cars say they can and may do, and when this car says it.

A car publishes in its cell once a minute and on change, never faster than the gap; an advert
expires by itself. `AdvertBook` keeps the newest per car. At the bound the advert that expires
first goes, so a flood of strangers cannot grow the book.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import MeshError
from .events import BudgetRead
from .objects import T_ADVERT, Advert
from .sealed import unseal
from .types import CLOCK_SKEW_MS_MAX, SLEEP_MS_MAX, Limits, NetworkId, Now, Peer

ENERGY_BUCKET_MWH = 250_000  # 250 Wh steps: never the exact charge
EXPIRY_COMPANY_MS = 1_000
LEASE_BUCKETS_S = (7_200, 3_600, 1_800, 900, 300, 60, 0)


def bucket_mwh(spendable_mwh: int) -> int:
    return spendable_mwh // ENERGY_BUCKET_MWH * ENERGY_BUCKET_MWH


def bucket_lease_s(lease_s: int) -> int:
    return next(step for step in LEASE_BUCKETS_S if lease_s >= step)


def coarse(budget: BudgetRead) -> BudgetRead:
    """What of a budget an advert says; while it is the same no advert needs to say it again."""
    return replace(
        budget,
        spendable_mwh=bucket_mwh(budget.spendable_mwh),
        lease_s_max=bucket_lease_s(budget.lease_s_max),
        stay_s=None,
    )


def cell_topic(network: NetworkId, cell: str) -> str:
    return f"m/1/{network.hex()}/c/{cell}"


@dataclass(frozen=True, slots=True)
class Known:
    advert: Advert
    heard_mono_ms: int


class AdvertBook:
    """The newest advert of each car, bounded."""

    def __init__(self, limits: Limits, network: NetworkId) -> None:
        self._limits = limits
        self._network = network
        self.cars: dict[Peer, Known] = {}
        self._due_unix_ms: int | None = None  # none of them expires before

    def take(self, wire: bytes, now: Now) -> Advert | None:
        """The advert if it is news, None if it is old, foreign or bad."""
        try:
            sealed = unseal(wire)
            advert = sealed.open(Advert, T_ADVERT)
        except MeshError:
            return None
        if sealed.kid != advert.peer or advert.network != self._network:
            return None
        if advert.slots_free > advert.slots:
            return None
        asleep_ms = 0 if advert.wake_at_ms is None else SLEEP_MS_MAX
        horizon = now.unix_ms + self._limits.advert_ttl_ms + asleep_ms + CLOCK_SKEW_MS_MAX
        if not now.unix_ms < advert.expires_ms <= horizon:
            return None
        known = self.cars.get(advert.peer)
        if known is not None and known.advert.seq >= advert.seq:
            return None
        if known is None and len(self.cars) >= self._limits.adverts_max:
            del self.cars[min(self.cars, key=self._dispensable)]
        self.cars[advert.peer] = Known(advert, now.mono_ms)
        if self._due_unix_ms is None or advert.expires_ms < self._due_unix_ms:
            self._due_unix_ms = advert.expires_ms
        return advert

    def _dispensable(self, peer: Peer) -> tuple[bool, int]:
        """Sleepers first: their adverts last longer than others may."""
        advert = self.cars[peer].advert
        return advert.wake_at_ms is None, advert.expires_ms

    def expire(self, now: Now) -> list[Peer]:
        if self._due_unix_ms is None or self._due_unix_ms > now.unix_ms:
            return []
        gone = [p for p, known in self.cars.items() if known.advert.expires_ms <= now.unix_ms]
        for peer in gone:
            del self.cars[peer]
        expiries = (known.advert.expires_ms for known in self.cars.values())
        self._due_unix_ms = min(expiries, default=None)
        return gone

    def deadline(self, now: Now) -> int | None:
        """Mono ms at which to look for expired ones; a second late, for company."""
        if self._due_unix_ms is None:
            return None
        return now.mono_ms + self._due_unix_ms - now.unix_ms + EXPIRY_COMPANY_MS

    def drop(self, peer: Peer) -> None:
        self.cars.pop(peer, None)

    def holders(self, prefix: bytes) -> list[Peer]:
        """Cars that say they hold a blob or artifact, by the first 8 bytes of its digest."""
        return [peer for peer, known in self.cars.items() if prefix in known.advert.cached]
