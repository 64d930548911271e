"""What `validated` takes besides bytes, and artifacts that jax wrote without our export."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

from jaxkernels import registry
from jaxkernels.export import export_bytes
from meshnode.artifact.specs import parse_spec
from meshnode.errors import ArtifactRefused
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec
from meshnode.worker.validate import validated

from . import honest

SQUARE = [parse_spec("f32[6,6]")]


@pytest.mark.parametrize(
    "function",
    [jnp.linalg.qr, jnp.linalg.svd, lambda a: jnp.linalg.cholesky(a @ a.T), jnp.linalg.inv],
    ids=["qr", "svd", "cholesky", "inv"],
)
def test_only_what_a_release_signed_may_call_native_code(function: Any) -> None:
    content = export_bytes(function, SQUARE)
    assert validated(content, builtin=True).ops > 0
    with pytest.raises(ArtifactRefused) as refused:
        validated(content)
    assert refused.value.reason is Reason.ARTIFACT_CALL


def test_an_artifact_for_another_platform_is_refused() -> None:
    content = bytes(
        jax.export.export(jax.jit(jnp.sin), platforms=("tpu",))(
            jax.ShapeDtypeStruct((4,), "float32")
        ).serialize()
    )
    assert validated(content, platform="tpu").header.platforms == ("tpu",)
    with pytest.raises(ArtifactRefused, match="exported for tpu, this is cpu") as refused:
        validated(content, platform="cpu")
    assert refused.value.reason is Reason.ARTIFACT_PLATFORM


def test_what_jax_writes_by_itself_is_accepted_with_its_debug_information() -> None:
    def nested(x: Any, y: Any) -> Any:
        return {"b": (x + 1, [y]), "a": None, "c": jnp.sort(x)}

    shapes = [jax.ShapeDtypeStruct((4, 3), "float32"), jax.ShapeDtypeStruct((2,), "int8")]
    content = bytes(jax.export.export(jax.jit(nested))(*shapes).serialize())
    found = validated(content)
    assert b".py" in content  # not stripped
    assert found.header.args == (ArraySpec("float32", (4, 3)), ArraySpec("int8", (2,)))
    assert len(found.header.outs) == 3 and not found.header.x64


def test_an_unused_argument_is_one_of_the_header_and_none_of_the_code() -> None:
    shapes = [jax.ShapeDtypeStruct((4,), "float32"), jax.ShapeDtypeStruct((9,), "float32")]
    content = bytes(jax.export.export(jax.jit(lambda x, unused: x * 2))(*shapes).serialize())
    header = validated(content).header
    assert (len(header.args), header.kept) == (2, (0,))


def test_what_is_validated_runs_and_gives_what_the_function_gives() -> None:
    found = validated(honest.bytes_of("scan_sum"), platform="cpu")
    x = jnp.arange(70, dtype=jnp.float32).reshape(10, 7)
    carried, rows = found.exported.call(x)
    want_carried, want_rows = honest.scan_sum(x)
    assert (carried == want_carried).all() and (rows == want_rows).all()


def test_a_built_in_kernel_passes_as_a_stranger_s_would() -> None:
    """One code path: today's kernels need no favour."""
    for spec in registry.KERNELS:
        content = registry.artifact_bytes(spec)
        assert validated(content).ops == validated(content, builtin=True).ops
