"""What a fleet has instead of cryptography: signatures that only count, and small random streams.

An Ed25519 signature and its check take 100 us together, more than everything else that a frame
costs. `CountingSigner` signs with a hash of key id and message, which anybody could compute: right
where nobody lies about who it is. `counted()` makes this process check such signatures for as long
as it lasts, and spares it to decode what it has itself encoded a moment ago: objects and messages
are frozen, so whoever reads the same bytes may have the same one. Each frame is still encoded by
the real codec, once. That a run decides the same with all of this as without is proved by
tests/sim/test_counting.py.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, Final, TypeVar
from unittest.mock import patch

from meshnode.protocol import sealed
from meshnode.protocol.job import spec_bytes
from meshnode.protocol.messages import NUMBERS, pack, unpack
from meshnode.protocol.sealed import Sealed, seal, unseal
from meshnode.protocol.types import PEER_PREFIX, Account, Peer

_T = TypeVar("_T")
OBJECTS_MAX: Final = 1 << 17  # far more than are under way at once
SPECS_MAX: Final = 1 << 12  # a node keeps 64
MESSAGES: Final = frozenset(NUMBERS.values())
open_ = Sealed.open


def _hashed(kid: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, key=kid[-32:], digest_size=64).digest()


def verify(kid: bytes, message: bytes, signature: bytes) -> bool:
    """In the place of `protocol.identity.verify`."""
    return _hashed(kid, message) == signature


class CountingSigner:
    """In the place of `identity.KeySigner`. `public` names another key's owner: then both have the
    same ids, and a run with either differs in signatures alone."""

    __slots__ = ("account", "peer")

    def __init__(self, seed: bytes, public: bytes | None = None) -> None:
        public = public or hashlib.sha256(seed).digest()
        self.peer = Peer(PEER_PREFIX + public)
        self.account = Account(public)

    def sign(self, message: bytes, /) -> bytes:
        return _hashed(self.account, message)


class _Memory:
    """What was encoded last, by its bytes: every frame and object is encoded by the real codec, and
    whoever decodes the same bytes gets what they were made of. Bytes from elsewhere are decoded.
    Two generations: when the young one is full, what is in the old one is forgotten."""

    def __init__(self) -> None:
        self._young: dict[bytes, Any] = {}
        self._old: dict[bytes, Any] = {}

    def _keep(self, wire: bytes, made: Any) -> None:
        if len(self._young) >= OBJECTS_MAX:
            self._old, self._young = self._young, {}
        self._young[wire] = made

    def _find(self, wire: bytes) -> Any:
        made = self._young.get(wire)
        return self._old.get(wire) if made is None else made

    def seal(self, obj: Any, typ: str, kid: bytes, sign: Callable[[bytes], bytes]) -> Sealed:
        made = seal(obj, typ, kid, sign)
        self._keep(made.wire, made)
        self._keep(made.payload, obj)
        return made

    def unseal(self, wire: bytes) -> Sealed:
        """Made here, so its signature holds."""
        made = self._find(wire)
        return made if type(made) is Sealed else unseal(wire)

    def open(self, envelope: Sealed, rule_class: type[_T], typ: str) -> _T:
        if envelope.typ == typ:
            obj = self._find(envelope.payload)
            if type(obj) is rule_class:
                return obj
        return open_(envelope, rule_class, typ)

    def pack(self, message: Any) -> bytes:
        frame = pack(message)
        if getattr(message, "text", None) is None:  # which the codec may cut
            self._keep(frame, message)
        return frame

    def unpack(self, frame: bytes) -> Any:
        message = self._find(frame)
        return message if type(message) in MESSAGES else unpack(frame)


def _users(original: Any) -> list[tuple[ModuleType, str]]:
    """The protocol's modules that have it, by its name."""
    name = original.__name__
    return [
        (module, name)
        for path, module in sorted(sys.modules.items())
        if path.startswith(sealed.__package__ or "") and getattr(module, name, None) is original
    ]


@contextmanager
def counted() -> Iterator[None]:
    memory = _Memory()
    specs = lru_cache(maxsize=SPECS_MAX)(spec_bytes.__wrapped__)
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (sealed, "verify", verify),
        (Sealed, "open", _method(memory.open)),
    ]
    table: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (seal, memory.seal),
        (unseal, memory.unseal),
        (pack, memory.pack),
        (unpack, memory.unpack),
        (spec_bytes, specs),
    )
    for original, replaced in table:
        places += [(module, name, replaced) for module, name in _users(original)]
    with ExitStack() as stack:
        for where, name, replaced in places:
            stack.enter_context(patch.object(where, name, replaced))
        yield


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method has no self to give: as a class's attribute it would miss the instance."""

    def method(*args: Any) -> Any:
        return call(*args)

    return method


class SmallRandom:
    """`types.Rng` in 100 bytes: a hash of a counter. `random.Random` takes 2.5 KB a node."""

    __slots__ = ("_count", "_key")

    def __init__(self, seed: str) -> None:
        self._key = hashlib.sha256(seed.encode()).digest()
        self._count = 0

    def randbytes(self, n: int, /) -> bytes:
        self._count += 1
        return hashlib.shake_128(self._key + self._count.to_bytes(8, "big")).digest(n)

    def random(self) -> float:
        return float(int.from_bytes(self.randbytes(7), "big") >> 3) / float(1 << 53)

    def randrange(self, stop: int, /) -> int:
        return int.from_bytes(self.randbytes(16), "big") % stop

    def sample(self, population: Sequence[_T], k: int) -> list[_T]:
        left = list(population)
        return [left.pop(self.randrange(len(left))) for _ in range(k)]
