"""bench.noop@1: one more than each element, on 64 bytes.

The smallest honest unit: what it costs beyond its arithmetic is what the mesh costs.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass

LANES = 16  # float32, so 64 bytes: a cache line

INFO = KernelInfo(
    name="bench.noop",
    version=1,
    package="bench_noop",
    description="x + 1 on 64 bytes: measures what the mesh costs per unit.",
    args=(ArgSpec("x", "float32", (LANES,)),),
    outs=(ArraySpec("y", "float32", (LANES,)),),
    numerics=NumericsClass.EXACT,
    tolerance=0.0,
    flops_per_unit=LANES,
    unit_ms_hint=0.01,
)
