"""The random words of mc.pricing and lm.llama_decode are those of the published generator."""

from __future__ import annotations

import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkernels.threefry import threefry


def test_the_words_are_those_of_jax() -> None:
    rng = np.random.default_rng(7)
    key, counters = (rng.integers(0, 2**32, (2, n), dtype=np.uint32) for n in (1, 1000))
    want = jax.extend.random.threefry_2x32(jnp.asarray(key[:, 0]), jnp.asarray(counters.ravel()))
    with np.errstate(over="ignore"):
        got = threefry((key[0, 0], key[1, 0]), counters[0], counters[1])
    assert np.array_equal(np.concatenate(got), want)
    traced = threefry((jnp.uint32(key[0, 0]), jnp.uint32(key[1, 0])), *map(jnp.asarray, counters))
    assert np.array_equal(np.concatenate(traced), want)


ONES = 0xFFFFFFFF
PI = (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        # Random123's kat_vectors, threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        (PI[:2], PI[2:], (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_words_are_the_published_ones(
    key: tuple[int, int], counter: tuple[int, int], words: tuple[int, int]
) -> None:
    with np.errstate(over="ignore"):
        got = threefry((np.uint32(key[0]), np.uint32(key[1])), *np.array(counter, np.uint32))
    assert [int(word) for word in got] == list(words)
