"""What the roles of one node share while an event is handled: time, identity, and effects so far.

`Node.handle` sets `now`, lets the roles write effects here, and takes them away. Ids of sends,
persists, fetches and runs are minted here, so that the same events give the same ids in a car, in
the simulator and in a replay.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from . import messages
from .effects import (
    Effect,
    HeldRecord,
    JobRecord,
    Notice,
    Notify,
    Persist,
    Record,
    Send,
    SignedObject,
    TaskRecord,
)
from .sealed import Sealed, seal
from .types import (
    Account,
    Digest,
    Durability,
    Lane,
    Limits,
    NetworkId,
    Now,
    Peer,
    Rng,
    Signer,
)

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is: what `meshnode.node.firstrun` reads from the home."""

    network: NetworkId
    peer: Peer
    account: Account
    cell: str
    currency: str
    roles: int  # objects.Role bits
    mandate: bytes  # sealed
    consent: bytes | None  # sealed; without a valid one a car computes nothing
    policy: bytes | None  # sealed
    artifacts: frozenset[Digest]  # digests of the built-in kernels
    agent: str = "meshnode"
    fleet: bytes | None = None  # sealed: the operator's terms, which narrow the policy


@dataclass(frozen=True, slots=True)
class Restored:
    """What survived: read from the ledger at start, in the order it was stored."""

    signed: tuple[SignedObject, ...] = ()
    jobs: tuple[JobRecord, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    results: tuple[RestoredResult, ...] = ()
    held: tuple[HeldRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoredResult:
    """A ResultRecord without its outputs."""

    job_digest: Digest
    first: int
    count: int
    attempt: int
    peer: Peer
    digests: bytes


class Outbox:
    """Effects of the event in hand."""

    def __init__(self, identity: Identity, limits: Limits, signer: Signer, rng: Rng) -> None:
        self.identity = identity
        self.limits = limits
        self.rng = rng
        self.now = Now(0, 0)
        self.counters: Counter[str] = Counter()
        self._signer = signer
        self.to_self: deque[bytes] = deque()  # frames from one of our roles to another
        self._effects: list[Effect] = []
        self._minted = 0
        self._after: dict[int, Callable[[], None]] = {}
        self._failed: dict[int, Callable[[], None]] = {}

    def take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def mint(self) -> int:
        self._minted += 1
        return self._minted

    def add(self, effect: Effect) -> None:
        self._effects.append(effect)

    def send(
        self,
        peer: Peer,
        lane: Lane,
        frame: Any,
        *,
        after: int | None = None,
        expires_in_ms: int | None = None,
    ) -> int:
        """`frame` is a message of `messages`, or bytes that are a frame already."""
        wire = frame if isinstance(frame, bytes) else messages.pack(frame)
        expires = None if expires_in_ms is None else self.now.mono_ms + expires_in_ms
        send_id = self.mint()
        self._effects.append(Send(send_id, peer, lane, wire, after, expires))
        return send_id

    def post(self, peer: Peer, lane: Lane, frame: Any) -> None:
        """`send`, to a role that may be ours: then `Node` hands it over after this event."""
        if peer != self.identity.peer:
            self.send(peer, lane, frame)
        else:
            self.to_self.append(frame if isinstance(frame, bytes) else messages.pack(frame))

    def seal(self, obj: Any, typ: str) -> Sealed:
        return seal(obj, typ, self.identity.peer, self._signer.sign)

    def persist(
        self,
        records: tuple[Record, ...],
        durability: Durability,
        then: Callable[[], None] | None = None,
        failed: Callable[[], None] | None = None,
    ) -> int:
        """Store; `then` runs inside the handling of `Persisted`, `failed` of `PersistFailed`."""
        seq = self.mint()
        self._effects.append(Persist(seq, records, durability))
        if then is not None:
            self._after[seq] = then
        if failed is not None:
            self._failed[seq] = failed
        return seq

    def persisted(self, seq: int) -> None:
        self._failed.pop(seq, None)
        then = self._after.pop(seq, None)
        if then is not None:
            then()

    def persist_failed(self, seq: int) -> None:
        self._after.pop(seq, None)
        failed = self._failed.pop(seq, None)
        if failed is not None:
            failed()

    def notify(self, subject: bytes, kind: str, **fields: int | str | bytes | None) -> None:
        self._effects.append(Notify(subject, Notice(kind, tuple(fields.items()))))


def row(sealed: Sealed) -> SignedObject:
    return SignedObject(sealed.digest, sealed.typ, sealed.wire)


def remember(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """A bounded memory: the oldest entry goes."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
