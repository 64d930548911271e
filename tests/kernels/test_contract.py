"""What every kernel promises, one test each, over all kernels of the registry.

The committed bytes load through jax.export, are what the source builds, give the bits of the
source's own jit, agree with the NumPy reference, and give the same bits in another process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from jaxkernels import build, registry, timing
from jaxkernels.export import PLATFORMS
from jaxkernels.host import Array

SPECS = sorted(registry.KERNELS)
HEAVY = (
    "lm.llama_decode@1",
)  # compiles for seconds each time: its whole contract is for long tests


def marked(specs: list[str]) -> list[Any]:
    return [pytest.param(s, marks=pytest.mark.long) if s in HEAVY else s for s in specs]


EACH = marked(SPECS)
STEPPED = marked([spec for spec in SPECS if registry.KERNELS[spec].stepped])
WITH_PRODUCTS = ("embed.minilm@1", "linalg.matmul@1", "lm.llama_decode@1", "vec.knn@1")
ROOT = Path(registry.__file__).parents[1]

OUTPUT_DIGESTS = """
import hashlib, json, sys
import numpy as np
from jaxkernels import registry, timing
digests = {}
for spec in sorted(registry.KERNELS):
    info = registry.get(spec)
    run, _ = timing.compile_kernel(info)
    outs = run(*timing.sample_args(info))
    digests[spec] = [hashlib.sha256(np.asarray(out).tobytes()).hexdigest() for out in outs]
json.dump(digests, sys.stdout)
"""


def part(spec: str, name: str) -> ModuleType:
    return importlib.import_module(f"jaxkernels.{registry.get(spec).package}.{name}")


@cache
def sample(spec: str, seed: int = 0) -> tuple[Array, ...]:
    return timing.sample_args(registry.get(spec), seed)


@cache
def loaded(spec: str) -> export.Exported:
    return export.deserialize(bytearray(registry.artifact_bytes(spec)))


@cache
def outputs(spec: str, seed: int = 0) -> tuple[Array, ...]:
    outs = jax.jit(loaded(spec).call)(*sample(spec, seed))
    return tuple(np.asarray(out) for out in outs)


@pytest.mark.parametrize("spec", EACH)
def test_shapes_are_those_of_the_registry(spec: str) -> None:
    info, exported = registry.get(spec), loaded(spec)
    args = [(str(a.dtype), tuple(a.shape)) for a in exported.in_avals]
    outs = [(str(a.dtype), tuple(a.shape)) for a in exported.out_avals]
    assert args == [(a.dtype, a.shape) for a in info.artifact_args]
    assert outs == [(o.dtype, o.shape) for o in info.artifact_outs]
    assert exported.platforms == PLATFORMS
    assert not exported.disabled_safety_checks
    assert not exported.ordered_effects and not exported.unordered_effects
    for arg, array in zip(info.artifact_args, sample(spec), strict=True):
        assert (array.dtype.name, array.shape) == (arg.dtype, arg.shape)


@pytest.mark.parametrize("spec", EACH)
def test_equals_the_source_bit_for_bit(spec: str) -> None:
    direct = jax.jit(part(spec, "kernel").kernel)(*sample(spec))
    for ours, theirs in zip(outputs(spec), direct, strict=True):
        assert ours.tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("spec", EACH)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_reference(spec: str, seed: int) -> None:
    info = registry.get(spec)
    assert part(spec, "reference").error(outputs(spec, seed), *sample(spec, seed)) <= info.tolerance


@pytest.mark.parametrize("spec", EACH)
def test_the_reference_sees_a_wrong_answer(spec: str) -> None:
    info, outs = registry.get(spec), [out.copy() for out in outputs(spec)]
    target = outs[info.stepped.result[0] if info.stepped else 0].reshape(-1)
    least = np.spacing(target[0]) if target.dtype.kind == "f" else 1
    target[:1] += np.asarray(max(10 * info.tolerance, float(least))).astype(target.dtype)
    assert part(spec, "reference").error(outs, *sample(spec)) > info.tolerance


@pytest.mark.parametrize("spec", EACH)
def test_a_run_in_one_call_gives_the_bits_of_single_units(spec: str) -> None:
    info, exported = registry.get(spec), loaded(spec)
    first, second = sample(spec, 0), list(sample(spec, 1))
    mapped = [i for i, arg in enumerate(info.artifact_args) if arg.mapped]
    for i, arg in enumerate(info.artifact_args):
        if not arg.mapped:
            second[i] = first[i]

    def one(units: list[jax.Array]) -> tuple[jax.Array, ...]:
        args: list[jax.Array | Array] = list(first)
        for i, unit in zip(mapped, units, strict=True):
            args[i] = unit
        return tuple(exported.call(*args))

    stacked = [np.stack([first[i], second[i]]) for i in mapped]
    together = jax.jit(lambda units: jax.lax.map(one, units))(stacked)
    alone = [jax.jit(exported.call)(*args) for args in (first, second)]
    for position, out in enumerate(together):
        want = np.stack([np.asarray(outs[position]) for outs in alone])
        assert np.asarray(out).tobytes() == want.tobytes()


@pytest.mark.parametrize("spec", STEPPED)
def test_steps_a_then_b_give_the_bits_of_a_plus_b(spec: str) -> None:
    info, run = registry.get(spec), jax.jit(loaded(spec).call)
    *args, n = sample(spec)
    constants, state = args[: -len(info.state)], args[-len(info.state) :]
    whole = outputs(spec)
    for first in {0, 1, int(n) // 2, int(n) - 1}:
        # Through host memory, as a checkpoint goes.
        half = [np.asarray(array) for array in run(*constants, *state, np.int32(first))]
        rest = run(*constants, *half, np.int32(int(n) - first))
        assert [np.asarray(a).tobytes() for a in rest] == [a.tobytes() for a in whole], first
        if first == 0:
            assert [a.tobytes() for a in half] == [a.tobytes() for a in state]


@pytest.mark.long
def test_same_bits_in_two_processes() -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", OUTPUT_DIGESTS],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        theirs = json.loads(done.stdout)
        for spec in SPECS:
            ours = [hashlib.sha256(out.tobytes()).hexdigest() for out in outputs(spec)]
            assert theirs[spec] == ours, spec


@pytest.mark.parametrize("spec", EACH)
def test_every_product_is_of_highest_precision(spec: str) -> None:
    module = loaded(spec).mlir_module()
    products = [line for line in module.splitlines() if "stablehlo.dot_general" in line]
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert "custom_call" not in module
    assert bool(products) == (spec in WITH_PRODUCTS)


def test_artifacts_hold_no_source_path() -> None:
    for spec in SPECS:
        content = registry.artifact_bytes(spec)
        assert str(ROOT).encode() not in content and b".py" not in content


def test_digest_list_and_files_match() -> None:
    folder = registry.artifact_folder()
    listed = json.loads((folder / registry.DIGESTS_FILE).read_bytes())["kernels"]
    assert sorted(listed) == SPECS
    assert sorted(path.name for path in folder.glob("*.bin")) == [f"{spec}.bin" for spec in SPECS]
    for spec, row in listed.items():
        content = (folder / row["file"]).read_bytes()
        assert row == build.describe(registry.get(spec), content)
        assert registry.by_digest(hashlib.sha256(content).digest()) is registry.get(spec)
    assert registry.by_digest(bytes(32)) is None
