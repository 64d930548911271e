"""Argument shapes as people write them: 'f32[64,128]', 'bool[8]', 'int32[]'.

Read by `mesh artifact build --spec` and by the client; the wire has dtype and shape apart. No jax.
"""

from __future__ import annotations

import re
from typing import Final

from ..errors import UsageError
from ..protocol.types import DIMS_MAX, DTYPE_BYTES, ArraySpec

# XLA's short names and NumPy's long ones; the wire has the long ones (meshnode.md, section 4).
_SHORT: Final = {
    "pred": "bool", "bool": "bool",
    "s8": "int8", "i8": "int8", "u8": "uint8", "ui8": "uint8",
    "s16": "int16", "i16": "int16", "u16": "uint16", "ui16": "uint16",
    "s32": "int32", "i32": "int32", "u32": "uint32", "ui32": "uint32",
    "s64": "int64", "i64": "int64", "u64": "uint64", "ui64": "uint64",
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64",
}  # fmt: skip
DIM_MAX: Final = 1 << 40
_SPEC: Final = re.compile(r"([a-z]+[0-9]*)\[([0-9]{1,13}(?:,[0-9]{1,13})*)?\]")


def parse_spec(text: str) -> ArraySpec:
    """The dtype and shape of 'f32[64,128]'; UsageError says what is wrong with other text."""
    found = _SPEC.fullmatch(text.replace(" ", ""))
    if found is None:
        raise UsageError(f"{text!r} is no argument spec; write it like 'f32[64,128]' or 'int32[]'")
    name, dims = found.groups()
    dtype = _SHORT.get(name, name)
    if dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise UsageError(f"{text!r}: {name} does not cross the mesh; use one of {known}")
    shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    if len(shape) > DIMS_MAX or any(not 0 < dim <= DIM_MAX for dim in shape):
        raise UsageError(f"{text!r}: at most {DIMS_MAX} dimensions, each from 1 to {DIM_MAX}")
    return ArraySpec(dtype, shape)


def spec_text(spec: ArraySpec) -> str:
    """The inverse, with NumPy's name: 'float32[64,128]'."""
    return f"{spec.dtype}[{','.join(map(str, spec.shape))}]"
