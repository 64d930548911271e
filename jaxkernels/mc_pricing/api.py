"""mc.pricing@1: Monte-Carlo price of a European or arithmetic Asian option, 2^20 paths a unit.

    S(t_i) = spot * exp(i * drift + vol * (z_1 + ... + z_i)),   i = 1 .. dates
    payoff = discount * max(sign * (mean of S(t_i) - strike), 0)

The law of S at the dates is exact (geometric Brownian motion), so a European option is one date.
Each of the 2^19 lanes makes two paths, one with z and one with -z, and counts as one sample: their
mean. Random numbers are counter-based (Threefry-2x32, 20 rounds; Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): the key is (seed, unit), the counter (date, lane), so a
unit's numbers depend on nothing but its arguments, and no two units share any.

A unit gives the means of the sample and of its square over 128 groups of 4,096 lanes, each summed
in float32 with compensation (Kahan), so that the error of a sum does not grow with its length;
`host.finish` takes them together in float64.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec

LANES = 1 << 19
PATHS = 2 * LANES
GROUPS = 128
DATES_MAX = 4096
KINDS = ("european-call", "european-put", "asian-call", "asian-put")

# Of one lane at one date: 20 rounds, Box-Muller, two exponentials. Integer operations count too.
_DRAW = 115 + 45
_PATHS = 2 * 25

INFO = KernelInfo(
    name="mc.pricing",
    version=1,
    package="mc_pricing",
    description="Monte-Carlo prices of European and arithmetic Asian options, with their errors.",
    args=(
        # spot, strike / spot, drift a date, volatility a date, discount, +1 call or -1 put
        ArgSpec("terms", "float32", (6,)),
        # dates, seed, number of the unit
        ArgSpec("draw", "int32", (3,)),
    ),
    outs=(
        ArraySpec("mean", "float32", (GROUPS,)),
        ArraySpec("square", "float32", (GROUPS,)),
    ),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=1e-5,
    flops_per_unit=LANES * (_DRAW + _PATHS),  # of one date
    unit_ms_hint=3.5,  # of one date; about 1.7 for each more
    options=(
        OptionSpec("kind", KINDS[0], f"one of: {', '.join(KINDS)}"),
        OptionSpec("spot", 100.0, "price of the underlying now"),
        OptionSpec("strike", 100.0, "what the holder may buy or sell at"),
        OptionSpec("rate", 0.03, "riskless rate a year, continuously compounded"),
        OptionSpec("dividend", 0.0, "dividend yield a year, continuously compounded"),
        OptionSpec("volatility", 0.2, "of the underlying, a year"),
        OptionSpec("years", 1.0, "until the option expires"),
        OptionSpec("dates", 12, f"equally spaced dates of an Asian mean, 1 to {DATES_MAX}"),
        OptionSpec("paths", 16 * PATHS, f"of each option; rounded up to units of {PATHS}"),
        OptionSpec("seed", 0, "of the random numbers, a 32-bit integer"),
    ),
)
