"""linalg.matmul@1: one block of a matrix product, 1,024 x 2,048 times 2,048 x 1,024 a unit.

    c = a @ b

Both blocks are mapped: the host cuts any A @ B into such products, padded with zeros, and adds the
partial products along the inner dimension in float64. A unit is 4.3 GFLOP for 20 MiB that travel,
205 FLOP a byte; the inner dimension is the long one because it costs no output.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass

ROWS = 1024
INNER = 2048
COLUMNS = 1024

INFO = KernelInfo(
    name="linalg.matmul",
    version=1,
    package="linalg_matmul",
    description="Matrix product of two float32 arrays, a and b, of any size, in blocks.",
    args=(
        ArgSpec("a", "float32", (ROWS, INNER)),
        ArgSpec("b", "float32", (INNER, COLUMNS)),
    ),
    outs=(ArraySpec("c", "float32", (ROWS, COLUMNS)),),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=1e-5,
    flops_per_unit=2 * ROWS * INNER * COLUMNS,
    unit_ms_hint=45.0,
)
