"""What a fleet has instead of cryptography: signatures that only count, and small random streams.

An Ed25519 signature and its check take 100 us together, more than everything else that a frame
costs. `CountingSigner` signs with a hash of key id and message, which anybody could compute: right
where nobody lies. `counted()` makes this process check such signatures for as long as it lasts.
That both decide the same is proved by tests/sim/test_counting.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

from meshnode.protocol import sealed
from meshnode.protocol.types import PEER_PREFIX, Account, Peer

_T = TypeVar("_T")


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


@contextmanager
def counted() -> Iterator[None]:
    with patch.object(sealed, "verify", verify):
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
