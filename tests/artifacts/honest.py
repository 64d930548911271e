"""Ordinary JAX programs, as strangers write them: the validator must accept each of them.

A validator that refuses everything is safe and useless, so this corpus holds the other end. Each
entry is a function and its argument specs; `bytes_of` exports them as a submitter would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from meshnode.artifact.exporting import export
from meshnode.artifact.specs import parse_spec


class Honest(NamedTuple):
    function: Callable[..., Any]
    specs: tuple[str, ...]


def affine_mlp(x: Any, w1: Any, b1: Any, w2: Any) -> Any:
    return jax.nn.gelu(x @ w1 + b1) @ w2


def scan_sum(x: Any) -> Any:
    return lax.scan(lambda carry, row: (carry + row, carry * 2), x[0], x)


def fori_power(x: Any) -> Any:
    return lax.fori_loop(0, 25, lambda i, y: y @ x / 4, x)


def newton_while(x: Any) -> Any:
    def unfinished(state: tuple[Any, Any]) -> Any:
        return jnp.any(jnp.abs(state[0] ** 2 - x) > 1e-4) & (state[1] < 64)

    return lax.while_loop(unfinished, lambda s: ((s[0] + x / s[0]) / 2, s[1] + 1), (x, 0))[0]


def sort_pairs(x: Any, y: Any) -> Any:
    return lax.sort((x, y), num_keys=1), jnp.argsort(x, descending=True)


def spectrum(x: Any) -> Any:
    return jnp.abs(jnp.fft.rfft(x)), jnp.fft.irfft(jnp.fft.rfft(x) * 2)


def complex_fft(x: Any) -> Any:
    z = lax.complex(x, x[::-1])
    return jnp.real(jnp.fft.ifft(jnp.fft.fft(z) * jnp.conj(z)))


def convolution(x: Any, kernel: Any) -> Any:
    y = lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def random_numbers(seed: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(7), seed)
    one, two, three = jax.random.split(key, 3)
    return (
        jax.random.normal(one, (64,)),
        jax.random.uniform(two, (8, 8)),
        jax.random.randint(three, (16,), 0, 1000),
        jax.random.permutation(one, 32),
    )


def random_bits_rbg(seed: Any) -> Any:
    return jax.random.uniform(jax.random.key(seed, impl="rbg"), (32,))


def gather_scatter(table: Any, rows: Any, values: Any) -> Any:
    return (
        table[rows],
        table.at[rows].add(values),
        table.at[rows].set(values),
        table.at[rows].max(values),
    )


def running_totals(x: Any) -> Any:
    return (
        jnp.cumsum(x, axis=0),
        jnp.cumprod(x, axis=1),
        lax.cummax(x),
        lax.associative_scan(jnp.add, x),
    )


def extremes(x: Any) -> Any:
    return jnp.argmax(x, axis=1), jnp.argmin(x), lax.top_k(x, 3), jnp.median(x), jnp.nanmax(x)


def contractions(a: Any, b: Any) -> Any:
    return jnp.einsum("bij,bjk->bik", a, b, precision="highest"), jnp.einsum("bij,bjk->", a, b)


def vmapped_solve(a: Any, b: Any) -> Any:
    """Gauss-Jordan without pivots, one loop, mapped over a batch: no LAPACK."""

    def one(m: Any, v: Any) -> Any:
        n = m.shape[0]

        def eliminate(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            mat, vec = state
            row, value = mat[i] / mat[i, i], vec[i] / mat[i, i]
            factor = jnp.where(jnp.arange(n) == i, 0.0, mat[:, i])
            mat = (mat - factor[:, None] * row[None]).at[i].set(row)
            return mat, (vec - factor * value).at[i].set(value)

        return lax.fori_loop(0, n, eliminate, (m, v))[1]

    return jax.vmap(one)(a, b)


def attention(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("hqd,hkd->hqk", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ v


def special_functions(x: Any) -> Any:
    from jax.scipy import special

    return (
        special.erf(x), special.erfc(x), special.erfinv(x), special.gammaln(x), special.digamma(x),
        special.i0e(x), special.i1e(x), special.gammainc(x, x), special.betainc(x, x, x),
        special.zeta(x + 2, x + 1), special.polygamma(1, x), special.logsumexp(x), special.ndtri(x),
        special.xlogy(x, x),
    )  # fmt: skip


def trigonometry(x: Any) -> Any:
    y = jnp.sin(x) + jnp.cos(x) * jnp.tan(x) + jnp.arcsin(x) + jnp.arccos(x) + jnp.arctan2(x, x + 1)
    z = (
        jnp.sinh(x)
        + jnp.cosh(x)
        + jnp.tanh(x)
        + jnp.arcsinh(x)
        + jnp.arccosh(x + 2)
        + jnp.arctanh(x)
    )
    return y, z, jnp.cbrt(x), jnp.expm1(x), jnp.log1p(x), jnp.exp2(x), jnp.hypot(x, x), jnp.sinc(x)


def integers(x: Any, y: Any) -> Any:
    return (
        x // jnp.maximum(y, 1), x % jnp.maximum(y, 1), x & y, x | y, x ^ y, ~x, x << 2, x >> 1,
        lax.population_count(x), lax.clz(x), jnp.sign(x), jnp.bitwise_count(y), jnp.gcd(x, y),
        lax.shift_right_logical(x, 3), x.astype(jnp.uint8).astype(jnp.int16),
    )  # fmt: skip


def masks(x: Any, keep: Any) -> Any:
    chosen = jnp.where(keep & (x > 0), x, jnp.nan)
    return (
        chosen,
        jnp.any(keep, axis=0),
        jnp.all(keep),
        jnp.logical_xor(keep, x > 1),
        jnp.isnan(chosen),
    )


def double_precision(x: Any, n: Any) -> Any:
    return jnp.cumsum(jnp.sin(x)) / n.astype(jnp.float64), n * 2**40


def sliding(x: Any, at: Any) -> Any:
    window = lax.dynamic_slice(x, (at[0], at[1]), (3, 4))
    return lax.dynamic_update_slice(x, window * 2, (at[1], at[0])), jnp.roll(x, 2), x[::-1, ::2]


def branches(which: Any, x: Any) -> Any:
    y = lax.switch(which, [jnp.sin, jnp.cos, lambda v: v * 2, lambda v: jnp.sort(v)], x)
    return lax.cond(which > 1, lambda v: v + 1, lambda v: -v, y)


def householder_qr(a: Any) -> Any:
    rows, columns = a.shape

    def reflect(j: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        q, r = state
        below = jnp.where(jnp.arange(rows) >= j, r[:, j], 0.0)
        v = below.at[j].add(jnp.where(below[j] < 0, -1.0, 1.0) * jnp.linalg.norm(below))
        v = v / jnp.maximum(jnp.linalg.norm(v), 1e-20)
        return q - 2 * jnp.outer(q @ v, v), r - 2 * jnp.outer(v, v @ r)

    return lax.fori_loop(0, columns, reflect, (jnp.eye(rows), a))


def gradient_step(w: Any, x: Any, y: Any) -> Any:
    def loss(weights: Any) -> Any:
        return jnp.mean((jax.nn.relu(x @ weights) - y) ** 2)

    value, slope = jax.value_and_grad(loss)(w)
    return w - 0.1 * slope, value


def convolution_gradient(x: Any, kernel: Any) -> Any:
    def total(k: Any) -> Any:
        y = lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"))

    return jax.grad(total)(kernel)


def checkpointed_layers(x: Any, weights: Any) -> Any:
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jax.grad(lambda ws: jnp.sum(lax.scan(layer, x, ws)[0]))(weights)


def half_precision(x: Any, y: Any) -> Any:
    product = jnp.matmul(
        x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    return product, x.astype(jnp.float16) * 2, lax.reduce_precision(x, 5, 10)


def histogram(x: Any) -> Any:
    return (
        jnp.bincount(x, length=16),
        jax.ops.segment_sum(x, x % 4, num_segments=4),
        jnp.searchsorted(jnp.sort(x), x),
    )


def heat_step(state: Any, n: Any) -> Any:
    def step(_: Any, u: Any) -> Any:
        return u + 0.1 * (jnp.roll(u, 1) + jnp.roll(u, -1) - 2 * u)

    return lax.fori_loop(0, n, step, state)


def padded_blocks(x: Any) -> Any:
    y = jnp.pad(x, ((1, 2), (3, 0)), mode="reflect")
    tiles = jnp.tile(x, (2, 1)).reshape(-1, 2).transpose(1, 0)
    return (
        y,
        tiles,
        jnp.concatenate([x, x], 1),
        jnp.stack([x, -x]),
        jnp.repeat(x, 3, axis=0),
        jnp.kron(x, x),
    )


def mandelbrot(re: Any, im: Any) -> Any:
    c = lax.complex(re, im)

    def step(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        z, count = state
        inside = jnp.abs(z) <= 2
        return jnp.where(inside, z * z + c, z), count + inside.astype(jnp.int32)

    return lax.fori_loop(0, 50, step, (jnp.zeros_like(c), jnp.zeros(re.shape, jnp.int32)))[1]


def empty_arrays(x: Any) -> Any:
    nothing = x[:0]
    total = jnp.sum(nothing) + jnp.sum(jnp.fft.fft(x[:1]).real)
    return jnp.sort(nothing), jnp.concatenate([nothing, x]), total


PROGRAMS: dict[str, Honest] = {
    "affine_mlp": Honest(affine_mlp, ("f32[8,16]", "f32[16,32]", "f32[32]", "f32[32,4]")),
    "scan_sum": Honest(scan_sum, ("f32[10,7]",)),
    "fori_power": Honest(fori_power, ("f32[6,6]",)),
    "newton_while": Honest(newton_while, ("f32[9]",)),
    "sort_pairs": Honest(sort_pairs, ("f32[50]", "i32[50]")),
    "spectrum": Honest(spectrum, ("f32[4,64]",)),
    "complex_fft": Honest(complex_fft, ("f32[128]",)),
    "convolution": Honest(convolution, ("f32[2,16,16,3]", "f32[3,3,3,8]")),
    "random_numbers": Honest(random_numbers, ("i32[]",)),
    "random_bits_rbg": Honest(random_bits_rbg, ("i32[]",)),
    "gather_scatter": Honest(gather_scatter, ("f32[20,4]", "i32[6]", "f32[6,4]")),
    "running_totals": Honest(running_totals, ("f32[12,5]",)),
    "extremes": Honest(extremes, ("f32[6,30]",)),
    "contractions": Honest(contractions, ("f32[3,4,5]", "f32[3,5,6]")),
    "vmapped_solve": Honest(vmapped_solve, ("f32[4,8,8]", "f32[4,8]")),
    "attention": Honest(attention, ("f32[4,16,8]", "f32[4,16,8]", "f32[4,16,8]")),
    "special_functions": Honest(special_functions, ("f32[16]",)),
    "trigonometry": Honest(trigonometry, ("f32[16]",)),
    "integers": Honest(integers, ("i32[16]", "i32[16]")),
    "masks": Honest(masks, ("f32[4,6]", "bool[4,6]")),
    "double_precision": Honest(double_precision, ("f64[16]", "i64[]")),
    "sliding": Honest(sliding, ("f32[10,10]", "i32[2]")),
    "branches": Honest(branches, ("i32[]", "f32[8]")),
    "householder_qr": Honest(householder_qr, ("f32[8,6]",)),
    "gradient_step": Honest(gradient_step, ("f32[5,3]", "f32[20,5]", "f32[20,3]")),
    "convolution_gradient": Honest(convolution_gradient, ("f32[1,8,8,2]", "f32[3,3,2,4]")),
    "checkpointed_layers": Honest(checkpointed_layers, ("f32[4,8]", "f32[3,8,8]")),
    "half_precision": Honest(half_precision, ("f32[8,8]", "f32[8,8]")),
    "histogram": Honest(histogram, ("i32[40]",)),
    "heat_step": Honest(heat_step, ("f32[64]", "i32[]")),
    "padded_blocks": Honest(padded_blocks, ("f32[4,6]",)),
    "empty_arrays": Honest(empty_arrays, ("f32[5]",)),
    "mandelbrot": Honest(mandelbrot, ("f32[16,16]", "f32[16,16]")),
}


@cache
def bytes_of(name: str) -> bytes:
    honest = PROGRAMS[name]
    return export(honest.function, [parse_spec(spec) for spec in honest.specs])
