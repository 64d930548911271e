"""Mutants of artifacts: none ends in any way but accepted, refused, or dead alone."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.fuzz.artifacts import mutate

from .forge import honest


@pytest.mark.parametrize(
    ("count", "which"), [(60, "honest"), pytest.param(3000, "all", marks=pytest.mark.long)]
)
def test_no_mutant_escapes(count: int, which: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "artifacts", "--count", str(count)]
    command += ["--seed", "7", "--which", which]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    assert sum(told.values()) == count
    assert sum(times for what, times in told.items() if what.startswith("refused")) > count // 2


def test_a_seed_gives_the_same_mutants() -> None:
    seed = bytes(honest().serialize())
    one, two = (
        [mutate(seed, rng) for _ in range(50)] for rng in (random.Random(5), random.Random(5))
    )
    assert one == two
    assert sum(mutant != seed for mutant in one) > 40
