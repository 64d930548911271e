"""How an artifact is forged: another module in an honest header, or another header on its module.

jax.export signs nothing and checks nothing when an artifact is called, so whoever can write bytes
can write these. StableHLO's own serializer makes the modules: what MLIR's verifier refuses to
serialize, a forger writes bit by bit, which is the fuzzer's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.export
from jax._src.export import serialization
from jax._src.export import serialization_generated as flat
from jax._src.interpreters import mlir
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jaxkernels.export import STABLEHLO_VERSION, strip


def honest(
    function: Callable[..., Any] = lambda x: (x + 1,),
    *shapes: jax.ShapeDtypeStruct,
    platforms: tuple[str, ...] = ("cpu",),
) -> jax.export.Exported:
    """A plain export; of one platform, so that a module takes the arguments and nothing else."""
    given = shapes or (jax.ShapeDtypeStruct((4,), "float32"),)
    return strip(jax.export.export(jax.jit(function), platforms=platforms)(*given))


def serialized(text: str) -> bytes:
    """StableHLO text as a portable artifact at the pinned version."""
    context = mlir.make_ir_context()
    stablehlo.register_dialect(context)  # and quant with it
    with context:
        module = ir.Module.parse(text)
        content = mlir.module_to_bytecode(module)
        return bytes(_jax.mlir.serialize_portable_artifact(content, STABLEHLO_VERSION, True))


def with_module(module: bytes, base: jax.export.Exported | None = None) -> bytes:
    """The bytes of an honest header around any module bytes."""
    exported = dataclasses.replace(base or honest(), mlir_module_serialized=module)
    return bytes(exported.serialize())


def with_code(text: str, base: jax.export.Exported | None = None) -> bytes:
    return with_module(serialized(text), base)


def body(lines: str, more: str = "", kind: str = "tensor<4xf32>") -> str:
    """A module whose main takes %x: `kind` and returns %r of the same type."""
    return (
        f"module @m {{\n func.func public @main(%x: {kind}) -> ({kind}) {{\n{lines}\n"
        f" return %r : {kind}\n }}\n{more}\n}}"
    )


def forged(**fields: Any) -> bytes:
    """An honest artifact with other header fields, as jax would serialize them."""
    return bytes(dataclasses.replace(honest(), **fields).serialize())


def with_effect(field: str) -> bytes:
    """An honest artifact that claims an effect; jax writes its class's name and no more."""

    def effect(builder: Any, name: str) -> int:
        text = builder.CreateString(name)
        flat.EffectStart(builder)
        flat.EffectAddTypeName(builder, text)
        return int(flat.ExportedEnd(builder))

    with _replaced("_serialize_effect", effect):
        return forged(**{field: ("<class 'jax._src.callback.IOEffect'>",)})


def patched(old: bytes, new: bytes, content: bytes) -> bytes:
    """The bytes with one string for another of the same length."""
    assert len(old) == len(new) and old in content
    return content.replace(old, new)


def with_dimension(text: str) -> bytes:
    """An honest header whose first dimension is written as `text`, of ten characters."""
    content = bytes(honest(lambda x: (x,), jax.ShapeDtypeStruct((1234567890,), "bool")).serialize())
    return patched(b"1234567890", text.encode(), content)


@contextmanager
def _replaced(name: str, stand_in: Any) -> Iterator[None]:
    real = getattr(serialization, name)
    setattr(serialization, name, stand_in)
    try:
        yield
    finally:
        setattr(serialization, name, real)


def with_shared_tree(levels: int) -> bytes:
    """Results in a tree each of whose nodes holds its one child twice: 2^levels leaves."""
    real = serialization._serialize_pytreedef
    calls = 0

    def tree(builder: Any, definition: Any) -> int:
        nonlocal calls
        calls += 1
        if definition.num_leaves != 1 or calls == 1:  # the arguments' tree comes first
            return int(real(builder, definition))
        flat.PyTreeDefStart(builder)
        flat.PyTreeDefAddKind(builder, flat.PyTreeDefKind.leaf)
        node = flat.PyTreeDefEnd(builder)
        for _ in range(levels):
            children = serialization._serialize_array(builder, lambda _, off: off, [node, node])
            flat.PyTreeDefStart(builder)
            flat.PyTreeDefAddKind(builder, flat.PyTreeDefKind.tuple)
            flat.PyTreeDefAddChildren(builder, children)
            node = flat.PyTreeDefEnd(builder)
        return int(node)

    def top(builder: Any, definition: Any) -> int:
        nonlocal calls
        if calls == 0:
            calls = 1
            with _replaced("_serialize_pytreedef", real):
                return int(real(builder, definition))
        return tree(builder, definition)

    with _replaced("_serialize_pytreedef", top):
        return bytes(honest().serialize())
