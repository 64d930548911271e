"""What a fleet has instead of cryptography: signatures that only count, and small random streams.

An Ed25519 signature and its check take 100 us together, more than everything else that a frame
costs. `CountingSigner` signs with a hash of key id and message, which anybody could compute: right
where nobody lies. `counted()` makes this process check such signatures for as long as it lasts, and
spares it to decode what it has itself encoded a moment ago: sealed objects are frozen, so whoever
opens the same bytes may have the same object. That a run decides the same with all of this as
without is proved by tests/sim/test_counting.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar
from unittest.mock import patch

from meshnode.protocol import sealed
from meshnode.protocol.codec import decode, encode_ordered
from meshnode.protocol.rule import decode_map, encode_map
from meshnode.protocol.types import PEER_PREFIX, Account, Peer

_T = TypeVar("_T")
OBJECTS_MAX: Final = 1 << 17  # far more than are under way at once


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


class _Known:
    """In the place of a decoded map: the object that it was made of."""

    __slots__ = ("obj", "payload")

    def __init__(self, obj: Any, payload: bytes) -> None:
        self.obj = obj
        self.payload = payload


class _Memory:
    """The objects that were sealed last, by their payload; the oldest is forgotten."""

    def __init__(self) -> None:
        self._objects: dict[bytes, Any] = {}
        self._encoding: Any = None

    def encode_map(self, value: Any) -> dict[int, Any]:
        self._encoding = value
        return encode_map(value)

    def encode_ordered(self, value: Any) -> bytes:
        payload = encode_ordered(value)
        self._objects[payload] = self._encoding
        if len(self._objects) > OBJECTS_MAX:
            del self._objects[next(iter(self._objects))]
        return payload

    def decode(self, wire: bytes) -> Any:
        obj = self._objects.get(wire)
        return decode(wire) if obj is None else _Known(obj, wire)

    def decode_map(self, rule_class: type[_T], value: Any, *, closed: bool) -> _T:
        if type(value) is _Known:
            if type(value.obj) is rule_class:
                found: _T = value.obj
                return found
            value = decode(value.payload)
        return decode_map(rule_class, value, closed=closed)


@contextmanager
def counted() -> Iterator[None]:
    memory = _Memory()
    with ExitStack() as stack:
        for name, replaced in (
            ("verify", verify),
            ("encode_map", memory.encode_map),
            ("encode_ordered", memory.encode_ordered),
            ("decode", memory.decode),
            ("decode_map", memory.decode_map),
        ):
            stack.enter_context(patch.object(sealed, name, replaced))
        yield


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
