"""The cost walker against analytic counts, with loops of known length counted in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxkernels import registry
from meshnode.artifact.exporting import export
from meshnode.artifact.specs import parse_spec
from meshnode.executor.cache import Figures
from meshnode.executor.wire import FIGURES, Load, LoadArg
from meshnode.protocol.types import STEP_COUNT, Stepped
from meshnode.worker.compiling import compiled
from meshnode.worker.cost import Cost
from meshnode.worker.validate import validated

from . import honest


def cost(function: Callable[..., Any], *specs: str, platform: str | None = "cpu") -> Cost:
    content = export(function, [parse_spec(spec) for spec in specs])
    return validated(content, platform=platform).cost


@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40), trips=st.integers(1, 50))
def test_products_in_loops_are_counted_exactly(m: int, k: int, n: int, trips: int) -> None:
    one = cost(jnp.matmul, f"f32[{m},{k}]", f"f32[{k},{n}]")
    assert (one.flop, one.unbounded) == (2 * m * k * n, False)

    def scanned(x: Any, w: Any) -> Any:
        return lax.scan(lambda c, _: (c @ w, None), x, length=trips)[0]

    def looped(x: Any, w: Any) -> Any:
        return lax.fori_loop(3, 3 + trips, lambda i, c: c @ w, x)

    for function in (scanned, looped):
        found = cost(function, f"f32[{m},{m}]", f"f32[{m},{m}]")
        products = trips * 2 * m**3
        # besides: the loop's own counter and test
        assert products <= found.flop <= products + 4 * trips + 4 and not found.unbounded


def test_loops_inside_loops_multiply() -> None:
    def nested(x: Any) -> Any:
        def outer(_: Any, c: Any) -> Any:
            return lax.fori_loop(0, 7, lambda i, d: d @ d, c) + lax.map(lambda row: row, c)

        return lax.fori_loop(0, 11, outer, x)

    found = cost(nested, "f32[32,32]")
    assert found.flop / (11 * 7 * 2 * 32**3) == pytest.approx(1, abs=5e-3) and not found.unbounded


def test_a_bound_is_followed_through_carried_values_and_calls() -> None:
    def bound_is_carried(x: Any) -> Any:
        inner = jax.jit(lambda c, n: lax.while_loop(lambda s: s[1] < s[2], body, (c, 0, n))[0])

        def body(s: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            return s[0] @ s[0], s[1] + 2, s[2]

        return inner(x, 20)

    found = cost(bound_is_carried, "f32[16,16]")
    assert found.flop == pytest.approx(10 * 2 * 16**3, rel=0.01) and not found.unbounded


def test_data_that_decides_makes_a_cost_unbounded() -> None:
    assert validated(honest.bytes_of("heat_step")).cost.unbounded
    assert validated(registry.artifact_bytes("bench.spin@1")).cost.unbounded

    def sum_is_no_counter(x: Any) -> Any:
        """The research's throw-away walker read this as 10^9 trips."""
        return lax.while_loop(lambda y: jnp.sum(y) < 1e9, lambda y: y * 2, x)

    assert cost(sum_is_no_counter, "f32[8]").unbounded

    def forever(x: Any) -> Any:
        return lax.while_loop(lambda s: s[1] < 10, lambda s: (s[0] + 1, s[1]), (x, 0))[0]

    assert cost(forever, "f32[8]").unbounded


def test_a_stepped_program_costs_what_one_step_does() -> None:
    content = honest.bytes_of("heat_step")
    one, whatever = (validated(content, stepped=stepped).cost for stepped in (True, False))
    assert not one.unbounded and one.flop == whatever.flop > 0
    spin = registry.artifact_bytes("bench.spin@1")  # which counts no steps
    assert validated(spin, stepped=True).cost == validated(spin).cost

    def settles(x: Any, n: Any) -> Any:
        def step(_: Any, x: Any) -> Any:
            return lax.while_loop(lambda y: jnp.sum(y) < 1e9, lambda y: y * 2, x)

        return lax.fori_loop(0, n, step, x)

    def without_count(x: Any, n: Any) -> Any:
        return lax.fori_loop(0, x[0], lambda _, x: x + 1, x)

    for function in (settles, without_count):
        content = export(function, [parse_spec("i32[8]"), STEP_COUNT])
        assert validated(content, stepped=True).cost.unbounded


def test_a_worker_tells_its_node_which_figures_are_whole() -> None:
    content = honest.bytes_of("heat_step")
    header = validated(content).header
    for stepped, counted in ((Stepped((0,), ()), True), (None, False)):
        args = header.args[:-1] if stepped else header.args
        load = Load(content, tuple(LoadArg(True, arg) for arg in args), header.outs, 512, stepped)
        figures = Figures(*FIGURES.unpack(compiled(load).figures()))
        assert figures.counted is counted
        assert figures.flop_per_unit == validated(content).cost.flop


def test_a_bound_beside_a_condition_is_the_most_it_can_be() -> None:
    found = cost(honest.newton_while, "f32[9]")
    assert not found.unbounded and 64 * 9 * 3 <= found.flop <= 64 * 9 * 12


@pytest.mark.parametrize(("spec", "ratio"), [("embed.minilm@1", 1.03), ("vec.knn@1", 1.02)])
def test_built_in_kernels_cost_what_their_authors_say(spec: str, ratio: float) -> None:
    found = validated(registry.artifact_bytes(spec), platform="cpu").cost
    assert found.flop / registry.get(spec).flops_per_unit == pytest.approx(ratio, abs=0.02)
    assert not found.unbounded


def test_conventions() -> None:
    def convolve(x: Any, w: Any) -> Any:
        return lax.conv(x, w, (1, 1), "SAME")

    assert cost(convolve, "f32[2,3,8,8]", "f32[5,3,3,3]").flop == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert cost(lambda x: jnp.sum(x), "f32[1000]").flop == 1000
    assert cost(lambda x: x[::2].reshape(25, 2).T, "f32[100]").flop == 0
    there_and_back = cost(lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), "f32[16,1024]").flop
    assert there_and_back == pytest.approx(2 * 16 * 1024 * 2.5 * 10, rel=0.1)
    sort = cost(lambda x: lax.sort(x), "i32[1024]").flop
    assert sort == 1024 * 10  # one comparison a round


def test_an_artifact_reads_its_arguments_and_writes_its_results() -> None:
    assert cost(lambda x: x * 2, "f32[1000]").bytes >= 8000
    assert cost(jnp.matmul, "f32[64,64]", "f32[64,64]").bytes >= 3 * 64 * 64 * 4


def test_a_branch_for_another_platform_is_not_counted() -> None:
    def per_platform(x: Any) -> Any:
        return lax.platform_dependent(x, cpu=lambda v: v + 1, default=lambda v: v @ v @ v)

    assert cost(per_platform, "f32[64,64]", platform="cpu").flop < 64**3
    assert cost(per_platform, "f32[64,64]", platform="cuda").flop >= 2 * 2 * 64**3
    assert cost(per_platform, "f32[64,64]", platform=None).flop >= 2 * 2 * 64**3
