"""Every forged artifact is refused with a reason, and every honest one is accepted.

The corpora are written by one process, which has jax's backend, and judged by another, which forks
a child for each file as a car does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxkernels import registry

from . import forged, honest

WALL_S = 60.0  # of one child, generous: the machine may be busy; no forged one needs a second


def judged(folder: Path, which: str, *more: str) -> dict[str, dict[str, Any]]:
    program = [sys.executable, "-m", "tests.fuzz"]
    subprocess.run([*program, "seeds", str(folder), "--which", which], check=True)
    done = subprocess.run(
        [*program, "judge", str(folder), "--wall-s", str(WALL_S), *more],
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return {name.removeprefix(f"{which} "): outcome for name, outcome in told.items()}


@pytest.fixture(scope="module")
def of_honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return judged(tmp_path_factory.mktemp("honest"), "honest")


@pytest.fixture(scope="module")
def of_forged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return judged(tmp_path_factory.mktemp("forged"), "forged")


@pytest.mark.parametrize("name", [*honest.PROGRAMS, *registry.KERNELS])
def test_an_honest_artifact_is_accepted(of_honest: dict[str, dict[str, Any]], name: str) -> None:
    assert of_honest[name]["kind"] == "accepted", of_honest[name]


@pytest.mark.parametrize("name", forged.FORGED)
def test_a_forged_artifact_is_refused(of_forged: dict[str, dict[str, Any]], name: str) -> None:
    outcome = of_forged[name.replace("/", " ")]
    assert outcome["kind"] == "refused", outcome
    assert outcome["what"] in {reason.name for reason in forged.FORGED[name].reasons}, outcome
    assert outcome["text"].isprintable() and 0 < len(outcome["text"]) < 400


def test_the_corpora_are_large_enough_to_mean_something() -> None:
    assert len(forged.FORGED) >= 100 and len(honest.PROGRAMS) >= 30


BARE = """
import sys, jax.export, jax.numpy as jnp
from jax._src.export import serialization
content = bytearray(open(sys.argv[1], "rb").read())
print("imported", flush=True)
exported = jax.export.deserialize(content)
exported.call(*[jnp.ones(a.shape, a.dtype) for a in exported.in_avals])
"""
# From the import on: what ends gets time to end on a slow machine; what never ends, never does.
END_S, HANG_S = 60.0, 8.0


def run_bare(path: Path, content: bytes, within_s: float = END_S) -> int | None:
    """The exit code of a process that trusts jax with the bytes; None if it never came back."""
    path.write_bytes(content)
    with subprocess.Popen(
        [sys.executable, "-c", BARE, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"imported\n"
        try:
            return child.wait(within_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return None


@pytest.mark.long
def test_without_the_validator_the_attacks_work(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    assert run_bare(path, honest.bytes_of("scan_sum")) == 0
    assert run_bare(path, forged.FORGED["dimension that never ends"].make(), HANG_S) is None
    for name in ("a function that calls itself", "Python callback by index"):
        code = run_bare(path, forged.FORGED[name].make())
        assert code is not None and code < 0, name  # a signal


@pytest.mark.long
def test_xla_compiles_every_honest_artifact(tmp_path: Path) -> None:
    outcomes = judged(tmp_path, "honest", "--compile")
    assert {name for name, one in outcomes.items() if one["kind"] != "accepted"} == set()
