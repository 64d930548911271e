"""Host sides: what people type becomes units, and outputs come back in their order.

The kernels' NumPy references stand in for the mesh here, so these tests need no jax.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkernels import host, registry
from jaxkernels.bench_spin.host import calibrate
from jaxkernels.bench_spin.reference import state_after
from jaxkernels.errors import BadInput, ModelMissing, UnknownKernel
from jaxkernels.host import Prepared
from jaxkernels.linalg_matmul.api import COLUMNS, INNER
from jaxkernels.linalg_matmul.api import ROWS as MM_ROWS
from jaxkernels.vec_knn.api import ROWS, TOP, WIDTH
from jaxkernels.vec_knn.reference import reference as knn_reference


def test_noop_takes_one_unit_or_many() -> None:
    one = host.prepare("bench.noop@1", np.zeros(16, np.float32))
    many = host.prepare("bench.noop", np.zeros((5, 16), np.float32))
    assert (one.units, many.units, many.kernel) == (1, 5, "bench.noop@1")
    assert many.args[0].array.shape == (5, 16)


def test_spin_turns_ms_into_iterations() -> None:
    prepared = host.prepare("bench.spin@1", 3, {"ms": 2.0, "iterations_per_ms": 1000})
    assert prepared.args[0].array.tolist() == [[2000], [2000], [2000]]


def test_options_as_text_are_read() -> None:
    prepared = host.prepare("bench.spin@1", 1, {"ms": "2", "iterations_per_ms": "1e3"})
    assert prepared.args[0].array.tolist() == [[2000]]


@given(st.integers(0, 3000))
def test_spin_reference_is_the_loop(steps: int) -> None:
    state = 0
    for _ in range(steps):
        state = (state * 1664525 + 1013904223) % (1 << 32)
    assert state_after(steps) == state


def test_calibrate_takes_the_slope_not_the_overhead() -> None:
    def measure_s(iterations: int) -> float:
        return 0.003 + iterations / 250_000_000

    assert calibrate(measure_s) == pytest.approx(250_000, rel=1e-6)


def search(prepared: Prepared) -> Any:
    """The job by the reference, unit by unit, the context gone through JSON as in a journal."""
    queries, corpus, valid = (arg.array for arg in prepared.args)
    units = [knn_reference(queries, corpus[i], valid[i]) for i in range(prepared.units)]
    outs = [np.stack(column) for column in zip(*units, strict=True)]
    return host.finish("vec.knn@1", outs, json.loads(json.dumps(prepared.context)))


@settings(deadline=None, max_examples=12)
@given(
    count=st.sampled_from([1, 3, TOP, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 5]),
    queries=st.integers(1, 8),
    top=st.integers(1, TOP),
    seed=st.integers(0, 100),
)
def test_knn_over_blocks_is_knn_over_the_whole(
    count: int, queries: int, top: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values, so that equal scores across blocks happen: the lower row must come first.
    vectors = rng.integers(-1, 2, (count, WIDTH)).astype(np.float32)
    asked = rng.integers(-1, 2, (queries, WIDTH)).astype(np.float32)
    prepared = host.prepare("vec.knn@1", {"queries": asked, "vectors": vectors}, {"top": top})
    assert prepared.units == -(-count // ROWS)
    scores, rows = search(prepared)
    exact = asked.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :top]
    assert rows.tolist() == order.tolist()
    assert scores.tolist() == np.take_along_axis(exact, order, axis=1).tolist()


@settings(deadline=None, max_examples=8)
@given(
    rows=st.sampled_from([1, 5, MM_ROWS, MM_ROWS + 1]),
    inner=st.sampled_from([1, 7, INNER, INNER + 3, 2 * INNER]),
    columns=st.sampled_from([1, 3, COLUMNS, 2 * COLUMNS + 1]),
    seed=st.integers(0, 100),
)
def test_matmul_in_blocks_is_matmul(rows: int, inner: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Small whole numbers: every sum is exact, so any block in a wrong place shows.
    a = rng.integers(-3, 4, (rows, inner)).astype(np.float32)
    b = rng.integers(-3, 4, (inner, columns)).astype(np.float32)
    prepared = host.prepare("linalg.matmul@1", {"a": a, "b": b})
    left, right = (arg.array for arg in prepared.args)
    outs = [left[i] @ right[i] for i in range(prepared.units)]
    context = json.loads(json.dumps(prepared.context))
    found = host.finish("linalg.matmul@1", [np.stack(outs)], context)
    assert found.dtype == np.float32 and (found == a @ b).all()


def vectors_of(count: int) -> np.ndarray[Any, Any]:
    return np.zeros((count, WIDTH), np.float32)


def huge() -> np.ndarray[Any, Any]:
    """A large matrix that takes no memory."""
    return np.broadcast_to(np.float32(1), (1 << 16, 1 << 16))


@pytest.mark.parametrize(
    ("spec", "inputs", "options"),
    [
        ("bench.noop@1", np.zeros(16), {}),  # float64
        ("bench.noop@1", np.zeros((2, 15), np.float32), {}),
        ("bench.noop@1", np.zeros((0, 16), np.float32), {}),
        ("bench.noop@1", [[1.0], [1.0, 2.0]], {}),
        ("bench.noop@1", np.zeros(16, np.float32), {"ms": 1}),
        ("bench.spin@1", 0, {}),
        ("bench.spin@1", 1, {"ms": 1e9}),
        ("bench.spin@1", 1, {"ms": -1.0}),
        ("bench.spin@1", 1, {"ms": float("nan")}),
        ("bench.spin@1", 1, {"ms": "long"}),
        ("linalg.matmul@1", np.zeros((2, 2), np.float32), {}),
        ("linalg.matmul@1", {"a": np.zeros((2, 2)), "b": np.zeros((2, 2))}, {}),
        ("linalg.matmul@1", {"a": vectors_of(2), "b": vectors_of(2)}, {}),
        ("linalg.matmul@1", {"a": vectors_of(0), "b": vectors_of(0).T}, {}),
        ("linalg.matmul@1", {"a": huge(), "b": huge()}, {}),
        ("vec.knn@1", vectors_of(1), {}),
        ("vec.knn@1", {"queries": vectors_of(9), "vectors": vectors_of(1)}, {}),
        ("vec.knn@1", {"queries": vectors_of(1), "vectors": vectors_of(0)}, {}),
        ("vec.knn@1", {"queries": vectors_of(1)[:, :3], "vectors": vectors_of(1)}, {}),
        ("vec.knn@1", {"queries": vectors_of(1).astype(float), "vectors": vectors_of(1)}, {}),
        ("vec.knn@1", {"queries": vectors_of(1), "vectors": vectors_of(1) * np.nan}, {}),
        ("vec.knn@1", {"queries": vectors_of(1), "vectors": vectors_of(1)}, {"top": TOP + 1}),
        ("vec.knn@1", {"queries": vectors_of(1), "vectors": vectors_of(1)}, {"top": "all"}),
    ],
)
def test_bad_input_is_one_clear_line(spec: str, inputs: Any, options: dict[str, Any]) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(BadInput) as caught:
        host.prepare(spec, inputs, options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_unknown_kernel_and_missing_model_say_what_to_do() -> None:
    with pytest.raises(UnknownKernel, match=r"bench\.noop@1"):
        registry.get("bench.nope")
    with pytest.raises(ModelMissing, match="mesh models get minilm"):
        host.prepare("embed.minilm@1", ["text"])
