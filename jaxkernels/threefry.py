"""Threefry-2x32 with 20 rounds: random words that are a function of a key and a counter.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Plain operators, so
that kernels call it on jax's arrays and their references on NumPy's; tests hold it against jax's
own. Not jax.random in an artifact: for three platforms that brings 800 operations, some unrolled
and some not, where this has 130.
"""

from __future__ import annotations

from typing import Any, Final

ROTATIONS: Final = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY: Final = 0x1BD11BDA  # makes the third key word


def threefry(key: tuple[Any, Any], first: Any, second: Any) -> tuple[Any, Any]:
    """Two words of 32 random bits for each counter (`first`, `second`); everything is uint32."""
    unsigned = first.dtype.type
    words = (*key, key[0] ^ key[1] ^ unsigned(PARITY))
    first, second = first + words[0], second + words[1]
    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            first = first + second
            second = ((second << unsigned(bits)) | (second >> unsigned(32 - bits))) ^ first
        first = first + words[(group + 1) % 3]
        second = second + words[(group + 2) % 3] + unsigned(group + 1)
    return first, second
