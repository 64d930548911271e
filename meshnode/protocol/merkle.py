"""RFC 9162 section 2.1: the tree over unit result digests whose root stands in a receipt.

Leaves are hashed as `SHA-256(0x00 || leaf)`, nodes as `SHA-256(0x01 || left || right)`, so a leaf
can never pass as a node. The tree of nothing is SHA-256 of nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .types import Digest


def root(leaves: Sequence[bytes]) -> Digest:
    """Merkle tree hash MTH(D[n]). Pairing level by level gives the RFC's split at the largest
    power of two: a lone last node moves up unchanged."""
    sha = hashlib.sha256
    if not leaves:
        return Digest(sha().digest())
    level = [sha(b"\0" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        paired = [
            sha(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)
        ]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return Digest(level[0])


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Inclusion path of leaf `index`, nearest sibling first."""
    sha = hashlib.sha256
    level = [sha(b"\0" + leaf).digest() for leaf in leaves]
    path: list[bytes] = []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        paired = [
            sha(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)
        ]
        if len(level) % 2:
            paired.append(level[-1])
        level, index = paired, index // 2
    return path


def included(leaf: bytes, index: int, size: int, path: Sequence[bytes], tree: bytes) -> bool:
    """RFC 9162 section 2.1.3.2: does `path` lead from the leaf to the root?"""
    if not 0 <= index < size:
        return False
    sha = hashlib.sha256
    at, last = index, size - 1
    node = sha(b"\0" + leaf).digest()
    for sibling in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            node = sha(b"\1" + sibling + node).digest()
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            node = sha(b"\1" + node + sibling).digest()
        at, last = at >> 1, last >> 1
    return last == 0 and node == tree
