"""Mutated artifacts: bytes anywhere, and bytes inside the StableHLO bytecode, which hides behind
the header's own checks. Seeds are the honest corpus, the forged one and the built-in kernels.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from . import forks

BYTECODE_MAGIC: Final = b"ML\xefR"
EDGES: Final = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)
WORDS: Final = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 1 << 16)
WALL_S: Final = 5.0
REPORT_EVERY_S: Final = 10.0

Mutation = Callable[[bytearray, int, int, random.Random], None]


def _flip(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        content[rng.randrange(first, end)] ^= 1 << rng.randrange(8)


def _edge(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        content[rng.randrange(first, end)] = rng.choice(EDGES)


def _word(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    at = rng.randrange(first, max(first + 1, end - 4))
    content[at : at + 4] = rng.choice(WORDS).to_bytes(4, "little")


def _copy(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    size = min(rng.choice((1, 2, 4, 8, 32, 128)), end - first)
    source, target = (rng.randrange(first, end - size + 1) for _ in range(2))
    content[target : target + size] = content[source : source + size]


def _swap(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    a, b = rng.randrange(first, end), rng.randrange(first, end)
    content[a], content[b] = content[b], content[a]


def _noise(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    size = min(rng.choice((2, 8, 64)), end - first)
    at = rng.randrange(first, end - size + 1)
    content[at : at + size] = rng.randbytes(size)


def _delete(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    size = min(rng.choice((1, 2, 4, 16, 256)), end - first)
    at = rng.randrange(first, end - size + 1)
    del content[at : at + size]


def _insert(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    at = rng.randrange(first, end)
    content[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))


def _cut(content: bytearray, first: int, end: int, rng: random.Random) -> None:
    del content[rng.randrange(first, end) :]


# The first keep the length, so that the header around the bytecode stays whole.
SAME_LENGTH: Final[tuple[Mutation, ...]] = (_flip, _flip, _edge, _word, _copy, _swap, _noise)
ANY_LENGTH: Final[tuple[Mutation, ...]] = (*SAME_LENGTH, _delete, _insert, _cut)


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """A mutant of an artifact: two in three are hurt in their bytecode alone."""
    content = bytearray(seed)
    code = seed.find(BYTECODE_MAGIC)
    if code >= 0 and rng.random() < 2 / 3:
        length = int.from_bytes(seed[code - 4 : code], "little")  # the flatbuffer's vector
        end = min(len(seed), code + length)
        # The header of the bytecode is short: most mutants would be hurt behind it otherwise.
        first = code + 4 if rng.random() < 0.5 else code
        rng.choice(SAME_LENGTH)(content, first, end, rng)
    else:
        rng.choice(ANY_LENGTH)(content, 0, len(content), rng)
    return bytes(content)


def seeds_of(folder: Path) -> list[bytes]:
    """Honest ones three times: a forged one is refused for what it is, however it is hurt."""
    paths = sorted(folder.iterdir())
    honest = [path for path in paths if path.name.startswith("honest")]
    return [path.read_bytes() for path in (*paths, *honest, *honest)]


def fuzz(
    seeds: Sequence[bytes], count: int, seed: int, *, compiled: bool, keep: Path | None
) -> Counter[str]:
    """Outcomes of `count` mutants; those that are not fine are printed, deadly ones kept."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    said = time.monotonic()
    for number in range(count):
        content = mutate(rng.choice(seeds), rng)
        outcome = forks.judge(content, wall_s=WALL_S, compiled=compiled)
        found[str(outcome)] += 1
        notable = not outcome.fine or outcome.kind in ("died", "hung")
        if notable and keep is not None:
            (keep / f"{seed}-{number}-{outcome.kind}-{outcome.what}").write_bytes(content)
        if not outcome.fine:
            found["not fine"] += 1
            print(f"mutant {number} of seed {seed}: {outcome}: {outcome.text}", file=sys.stderr)
        if time.monotonic() - said > REPORT_EVERY_S:
            said = time.monotonic()
            print(f"{number + 1} of {count}", file=sys.stderr)
    return found
