"""bench.spin@1: keeps one core busy for as many iterations as it is told, and no longer.

state <- state * 1664525 + 1013904223 (mod 2^32), from 0; the value is state >> 8. Integers, so the
bits are the same on every platform; every step needs the one before and their number is an
argument, so no compiler shortens it; and the value depends on the number of steps, so nobody can
answer without either spinning or knowing the trick that `reference` uses to check it in no time.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec

# Numerical Recipes' "quick and dirty" generator: full period 2^32.
MULTIPLIER = 1664525
INCREMENT = 1013904223

ITERATIONS_MAX = (1 << 31) - 1
# 3.2 ns a step on a Zen 4. A first guess only: `host.calibrate` measures the machine at hand.
ITERATIONS_PER_MS_HINT = 310_000
MS_DEFAULT = 10.0

INFO = KernelInfo(
    name="bench.spin",
    version=1,
    package="bench_spin",
    description="Spins for a given number of iterations: measures scheduling at a known length.",
    args=(ArgSpec("iterations", "int32", (1,)),),
    outs=(ArraySpec("value", "float32", (1,)),),
    numerics=NumericsClass.EXACT,
    tolerance=0.0,
    flops_per_unit=int(2 * ITERATIONS_PER_MS_HINT * MS_DEFAULT),
    unit_ms_hint=MS_DEFAULT,
    options=(
        OptionSpec("ms", MS_DEFAULT, "about how long each unit spins"),
        OptionSpec(
            "iterations_per_ms", float(ITERATIONS_PER_MS_HINT), "as `calibrate` measured it"
        ),
    ),
)
