"""Export: one digest from every folder, and advice for what cars would refuse."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkernels import registry
from meshnode.artifact.exporting import export
from meshnode.artifact.specs import parse_spec, spec_text
from meshnode.errors import ArtifactRefused, UsageError
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import STEP_COUNT
from meshnode.worker.header import read_header

from . import honest

SOURCE = """
import jax.numpy as jnp

def inner(x):
    return jnp.sort(x) * 2

def fn(x, y):
    return {"a": inner(x) @ y, "b": (jnp.tanh(y),)}
"""


def function_in(folder: Path, name: str, lines_before: int) -> Callable[..., Any]:
    folder.mkdir(parents=True)
    path = folder / f"{name}.py"
    path.write_text("\n" * lines_before + SOURCE)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fn  # type: ignore[no-any-return]


def test_the_digest_does_not_know_where_the_source_lies(tmp_path: Path) -> None:
    specs = [parse_spec("f32[8,8]"), parse_spec("f32[8,8]")]
    one = export(function_in(tmp_path / "here", "one", 0), specs)
    two = export(function_in(tmp_path / "quite" / "elsewhere", "two", 31), specs)
    assert one == two
    assert str(tmp_path).encode() not in one and b".py" not in one


def test_two_processes_export_the_same_bytes() -> None:
    code = (
        "import hashlib\nfrom tests.artifacts.honest import bytes_of\n"
        "print(hashlib.sha256(bytes_of('random_numbers')).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = hashlib.sha256(honest.bytes_of("random_numbers")).hexdigest()
    assert done.stdout.strip() == ours


def test_an_exported_function_gives_the_bits_of_the_jitted_one() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 16, 8)).astype(np.float32)
    exported = jax.export.deserialize(bytearray(honest.bytes_of("attention")))
    (got,) = exported.call(x, x, x)
    assert np.asarray(got).tobytes() == np.asarray(jax.jit(honest.attention)(x, x, x)).tobytes()


def test_whatever_tree_it_returns_becomes_flat(tmp_path: Path) -> None:
    header = read_header(
        export(
            function_in(tmp_path / "t", "t", 0), [parse_spec("f32[3,3]"), parse_spec("f32[3,4]")]
        )
    )
    assert [spec_text(spec) for spec in header.outs] == ["float32[3,4]", "float32[3,4]"]
    assert header.platforms == ("cpu", "cuda", "tpu")


def test_a_stepped_function_takes_its_steps_last() -> None:
    header = read_header(honest.bytes_of("heat_step"))
    assert header.args[-1] == STEP_COUNT and header.outs == header.args[:-1]


def test_64_bits_are_exported_as_such_and_said() -> None:
    assert read_header(honest.bytes_of("double_precision")).x64
    assert not read_header(honest.bytes_of("attention")).x64
    forced = export(lambda x: x * jnp.float64(2), [parse_spec("f32[4]")], x64=True)
    assert [spec.dtype for spec in read_header(forced).outs] == ["float64"]


LARGE = np.ones((600, 600), np.float32)


def prints(x: Any) -> Any:
    jax.debug.print("{}", x[0])
    return x


def calls_back(x: Any) -> Any:
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct((600,), "float32"), x)


@pytest.mark.parametrize(
    ("function", "reason", "advice"),
    [
        (lambda x: LARGE @ x, Reason.ARTIFACT_CONSTANT, "1.4 MB (float32[600,600])"),
        (lambda x: jnp.asarray(LARGE) @ x, Reason.ARTIFACT_CONSTANT, "--spec const="),
        (prints, Reason.ARTIFACT_EFFECTS, "return what you want to see"),
        (calls_back, Reason.ARTIFACT_EFFECTS, "write it in jax.numpy"),
        (lambda x: jnp.linalg.cholesky(x[:, None]), Reason.ARTIFACT_CALL, "jax.lax"),
    ],
    ids=["numpy constant", "jax constant", "print", "callback", "LAPACK"],
)
def test_what_cars_would_refuse_is_refused_here(
    function: Callable[..., Any], reason: Reason, advice: str
) -> None:
    spec = "f32[1]" if reason is Reason.ARTIFACT_CALL else "f32[600]"
    with pytest.raises(ArtifactRefused, match=re.escape(advice)) as no:
        export(function, [parse_spec(spec)])
    assert no.value.reason is reason


def test_an_error_of_the_function_itself_goes_through() -> None:
    with pytest.raises(TypeError, match="incompatible shapes"):
        export(lambda x: x + jnp.ones(3), [parse_spec("f32[5]")])


def test_built_in_kernels_are_made_by_the_same_code() -> None:
    """The bytes that are committed come out of the code that strangers' functions go through."""
    from jaxkernels.vec_knn.api import INFO
    from jaxkernels.vec_knn.kernel import kernel
    from meshnode.protocol.types import ArraySpec

    specs = [ArraySpec(arg.dtype, arg.shape) for arg in INFO.args]
    assert export(kernel, specs) == registry.artifact_bytes(INFO.spec)


@pytest.mark.parametrize(
    ("text", "back"),
    [("f32[64,128]", "float32[64,128]"), ("int32[]", "int32[]"), ("pred[ 8 ]", "bool[8]")],
)
def test_specs_are_read_as_people_write_them(text: str, back: str) -> None:
    assert spec_text(parse_spec(text)) == back


@pytest.mark.parametrize(
    "text",
    ["f32", "f32[", "f32[0]", "f32[-1]", "c64[4]", "f32[a]", "f32[1,]", "f32[9" + "9" * 20 + "]"],
)
def test_other_specs_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        parse_spec(text)
