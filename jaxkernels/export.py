"""From a JAX function to artifact bytes that are the same wherever they are built. Needs jax.

Flow: `build` calls it for every kernel of the registry. The bytes are a `jax.export` flatbuffer for
three platforms; its module is stripped of debug information (which holds absolute source paths and
lines, so that the same kernel had another digest in another folder) and serialised again at one
pinned StableHLO version, so that a newer exporter does not change them without need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import export
from jax._src.interpreters import mlir
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jaxlib.mlir import ir, passmanager

from .spec import KernelInfo

PLATFORMS = ("cpu", "cuda", "tpu")
# Old enough for every jaxlib in JAX's window, new enough for each op in use; StableHLO reads
# serialisations up to five years old (docs/compatibility.md).
STABLEHLO_VERSION = "1.10.0"


class Shaped(Protocol):
    """An argument as far as export looks at it: a NumPy dtype's name and a shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def flat(function: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    """`function` with its result as a flat tuple of arrays, whatever tree it gives back."""

    @functools.wraps(function)
    def leaves(*args: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(function(*args)))

    return leaves


def strip(exported: export.Exported) -> export.Exported:
    """The same export without debug information, at the pinned StableHLO version."""
    with mlir.make_ir_context():
        portable = _jax.mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
        module = portable if isinstance(portable, ir.Module) else ir.Module.parse(portable)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        serialized = _jax.mlir.serialize_portable_artifact(
            mlir.module_to_bytecode(module), STABLEHLO_VERSION, True
        )
    return dataclasses.replace(exported, mlir_module_serialized=serialized)


def shapes_of(args: Sequence[Shaped]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]


def export_flat(flattened: jax.stages.Wrapped, args: Sequence[Shaped]) -> bytes:
    """Artifact bytes of a jitted function whose result is a flat tuple (`flat`)."""
    exported = export.export(flattened, platforms=PLATFORMS)(*shapes_of(args))
    return bytes(strip(exported).serialize(vjp_order=0))


def export_bytes(function: Callable[..., Any], args: Sequence[Shaped]) -> bytes:
    """Artifact bytes of `function` for exactly these shapes; flat arrays in, a flat tuple out."""
    return export_flat(jax.jit(flat(function)), args)


def export_kernel(info: KernelInfo, function: Callable[..., Any]) -> bytes:
    """A registered kernel's bytes, with its outputs checked against what `api` declares."""
    content = export_bytes(function, info.artifact_args)
    avals = export.deserialize(bytearray(content)).out_avals
    got = [(str(aval.dtype), tuple(aval.shape)) for aval in avals]
    want = [(out.dtype, out.shape) for out in info.artifact_outs]
    assert got == want, f"{info.spec}: api declares {want}, the kernel gives {got}"
    return content
