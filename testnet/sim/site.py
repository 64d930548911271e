"""One simulated node and what is around it: its signed papers, its disk, its connections.

`mesh.Mesh` adds sites and feeds their machines. Papers are the real signed objects, made from a
seed; a fleet shares one owner's policy and consent, which is a third of what a node costs to make.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from meshnode.protocol import effects as fx
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.node import Node
from meshnode.protocol.outbox import Identity
from meshnode.protocol.papers import (
    NO_CURRENCY,
    T_CONSENT,
    T_MANDATE,
    T_POLICY,
    AdmitRule,
    Band,
    Caps,
    Consent,
    Mandate,
    Policy,
    Share,
    Submitters,
)
from meshnode.protocol.sealed import seal
from meshnode.protocol.types import Account, Digest, Limits, NetworkId, Peer

from .disk import Disk

NETWORK = NetworkId(b"simnet00")
ARTIFACT = Digest(b"\x11" * 32)
EPOCH_MS = 1_800_000_000_000
DAY_MS = 86_400_000
PROVIDE, REQUEST = 1, 2
_ACCOUNT_SEED = 1 << 60  # added to a node's seed it is its account's


class Keys(Protocol):
    """A key pair: `identity.KeySigner`, or `counting.CountingSigner` for a fleet."""

    peer: Peer
    account: Account

    def sign(self, message: bytes, /) -> bytes: ...


KeysOf = Callable[[bytes], Keys]


@dataclass(frozen=True, slots=True)
class Papers:
    """What an account has signed for its cars, the mandates apart."""

    account: Keys
    policy: bytes
    consent: bytes


def papers_of(account: Keys, network: NetworkId = NETWORK, policy: Policy | None = None) -> Papers:
    owner = Account(account.account)
    policy = policy or Policy(
        1,
        network,
        owner,
        "policy",
        300,
        0,
        20_000,
        300,
        1,
        (50, 400),
        12_000,
        0,
        (Band(0, 1439, 0),),
        900,
        150,
        AdmitRule(Submitters.NETWORK, ()),
        Caps(0, 0, 0),
    )
    policy_sealed = seal(policy, T_POLICY, owner, account.sign)
    consent = Consent(
        1,
        network,
        owner,
        "consent",
        owner,
        bytes(16),
        1,
        (Share(owner, 0, 10_000),),
        policy_sealed.digest,
        Digest(b"\x22" * 32),
        "en",
        EPOCH_MS,
        EPOCH_MS + 10**10,
    )
    consent_wire = seal(consent, T_CONSENT, owner, account.sign).wire
    return Papers(account, policy_sealed.wire, consent_wire)


def account_keys(seed: int, keys_of: KeysOf = KeySigner) -> Keys:
    return keys_of((seed + _ACCOUNT_SEED).to_bytes(32, "big"))


def mandate_of(peer: Peer, account: Keys, roles: int, network: NetworkId, begins_ms: int) -> bytes:
    """Six days of it, as the node's account signs it."""
    ends_ms = begins_ms + 6 * DAY_MS
    owner = Account(account.account)
    mandate = Mandate(1, network, owner, peer, "mandate", roles, 0, begins_ms, ends_ms)
    return seal(mandate, T_MANDATE, owner, account.sign).wire


def identity_of(
    seed: int,
    roles: int,
    *,
    network: NetworkId = NETWORK,
    cell: str = "cell",
    keys_of: KeysOf = KeySigner,
    papers: Papers | None = None,
) -> tuple[Identity, Keys]:
    """All real signed objects, from a seed; with `papers`, of their account."""
    node_keys = keys_of(seed.to_bytes(32, "big"))
    papers = papers or papers_of(account_keys(seed, keys_of), network)
    identity = Identity(
        network,
        node_keys.peer,
        Account(papers.account.account),
        cell,
        NO_CURRENCY,
        roles,
        mandate_of(node_keys.peer, papers.account, roles, network, EPOCH_MS),
        papers.consent,
        papers.policy,
        frozenset({ARTIFACT}),
    )
    return identity, node_keys


@dataclass(slots=True)
class Site:
    """`number` counts from 0 in the order of joining; it is the car's place in the network."""

    name: str
    identity: Identity
    signer: Keys
    limits: Limits
    number: int = 0
    disk: Disk = field(default_factory=Disk)
    node: Node | None = None
    life: int = 0
    asleep: bool = False
    links: set[str] = field(default_factory=set)
    waiting: dict[int, list[fx.Effect]] = field(default_factory=lambda: defaultdict(list))
    pending: set[int] = field(default_factory=set)
    pins: Counter[Digest] = field(default_factory=Counter)
    notices: list[tuple[bytes, fx.Notice]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    tick_at: int | None = None  # mono ms
    stored_us: int = 0
    slots: int = 1
    skew_ms: int = 0  # of its wall clock; what is monotonic has none
    lie: Callable[[fx.Send], list[fx.Send]] | None = None
    """What leaves this site instead of a frame: nothing, another, several. It lies about nothing
    else: its machine is the honest one."""

    @property
    def awake(self) -> bool:
        """Whether anything reaches it."""
        return self.node is not None and not self.asleep
