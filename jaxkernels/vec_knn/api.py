"""vec.knn@1: exact top 16 by inner product, 8 queries against 4,096 vectors a unit.

    scores = queries @ corpus.T;  the 16 largest per query, the lower row first where equal

The corpus is the mapped argument, in blocks, and the queries are the constant one: a corpus of M
blocks is a job of M units that any cars share, whatever its size, and the submitter merges the M
lists (16 of 16 M candidates). The other way round a car would need the whole corpus for one query.
Rows from `valid` on are padding and never win: they come back as -inf and index -1.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec

QUERIES = 8
ROWS = 4096
WIDTH = 384
TOP = 16

INFO = KernelInfo(
    name="vec.knn",
    version=1,
    package="vec_knn",
    description="Exact search: the vectors of a corpus closest to each query by inner product.",
    args=(
        ArgSpec("queries", "float32", (QUERIES, WIDTH), mapped=False),
        ArgSpec("corpus", "float32", (ROWS, WIDTH)),
        ArgSpec("valid", "int32", (1,)),
    ),
    outs=(
        ArraySpec("scores", "float32", (QUERIES, TOP)),
        ArraySpec("indices", "int32", (QUERIES, TOP)),
    ),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=1e-5,
    flops_per_unit=2 * QUERIES * ROWS * WIDTH,
    unit_ms_hint=1.0,
    options=(OptionSpec("top", 10, f"how many per query, 1 to {TOP}"),),
)
