"""Which operations a stranger's artifact may use, and with which attributes: the allow-list.

Read by `validate` and by `cost`. Every operation here is a pure function of its operands. Not here,
on purpose: whatever reaches another device or the host (collectives, send, recv, infeed, outfeed,
tokens), whatever makes a shape at run time (`dynamic_reshape` and its kin, `set_dimension_size`:
unit shapes are fixed, and XLA trusts the sizes it is told), tuples, quantised arithmetic, and
`cholesky` and `triangular_solve`, which jax turns into LAPACK calls anyway.
"""

from __future__ import annotations

from typing import Final

# One line per operation: its name and the attributes of its own that it may carry (StableHLO's
# spec.md). An attribute that is not named here is refused, whichever dialect it is of.
_TABLE: Final = """
abs
add
and
atan2
bitcast_convert
broadcast_in_dim broadcast_dimensions
case
cbrt result_accuracy
ceil
clamp
compare comparison_direction compare_type
complex
composite name composite_attributes decomposition version
concatenate dimension
constant value
convert
convolution batch_group_count dimension_numbers feature_group_count lhs_dilation padding \
precision_config rhs_dilation window_reversal window_strides
cosine result_accuracy
count_leading_zeros
custom_call api_version backend_config call_target_name called_computations error_message \
has_side_effect
divide
dot_general algorithm dot_dimension_numbers precision_config
dynamic_slice slice_sizes
dynamic_update_slice
exponential result_accuracy
exponential_minus_one result_accuracy
fft fft_length fft_type
floor
gather dimension_numbers indices_are_sorted slice_sizes
if
imag
iota iota_dimension
is_finite
log result_accuracy
log_plus_one result_accuracy
logistic result_accuracy
map dimensions
maximum
minimum
multiply
negate
not
optimization_barrier
or
pad edge_padding_high edge_padding_low interior_padding
popcnt
power
real
reduce dimensions
reduce_precision exponent_bits mantissa_bits
reduce_window base_dilations padding window_dilations window_dimensions window_strides
remainder
reshape
return
reverse dimensions
rng_bit_generator rng_algorithm
round_nearest_afz
round_nearest_even
rsqrt result_accuracy
scatter indices_are_sorted scatter_dimension_numbers unique_indices
select
select_and_scatter padding window_dimensions window_strides
shift_left
shift_right_arithmetic
shift_right_logical
sign
sine result_accuracy
slice limit_indices start_indices strides
sort dimension is_stable
sqrt result_accuracy
subtract
tan result_accuracy
tanh result_accuracy
transpose permutation
while
xor
"""

ATTRIBUTES: Final[dict[str, frozenset[str]]] = {
    f"stablehlo.{name}": frozenset(attributes)
    for name, *attributes in (line.split() for line in _TABLE.strip().splitlines())
} | {
    "func.func": frozenset(
        ("arg_attrs", "function_type", "no_inline", "res_attrs", "sym_name", "sym_visibility")
    ),
    "func.call": frozenset(("callee", "no_inline", "arg_attrs", "res_attrs")),
    "func.return": frozenset(),
}

# For digests that a release has signed, which may call LAPACK: what its TPU branch does instead.
BUILTIN_ATTRIBUTES: Final[dict[str, frozenset[str]]] = {
    "stablehlo.cholesky": frozenset(("lower",)),
    "stablehlo.triangular_solve": frozenset(("left_side", "lower", "transpose_a", "unit_diagonal")),
}

# What jax writes on the module, on arguments and on results, and nothing else: shardings, layouts,
# donations and frontend attributes steer XLA beyond the computation.
MODULE_ATTRIBUTES: Final = frozenset(
    ("sym_name", "jax.uses_shape_polymorphism", "mhlo.num_partitions", "mhlo.num_replicas")
)
ARGUMENT_ATTRIBUTES: Final = frozenset(("jax.global_constant",))
RESULT_ATTRIBUTES: Final = frozenset(("jax.result_info",))

# Their regions are code like any other; all other regions combine scalars.
CONTROL: Final = frozenset(("stablehlo.while", "stablehlo.case", "stablehlo.if"))
CALLS: Final = {"func.call": "callee", "stablehlo.composite": "decomposition"}

# Known to every jaxlib, pure, and checked by XLA against their operands. LAPACK's targets are in
# jax's own list of stable ones and read past the end of arrays whose shapes are forged.
TARGETS: Final = frozenset(
    ("shape_assertion", "stablehlo.dynamic_top_k", "stablehlo.dynamic_reduce_window")
)

# CHLO operations, which an artifact carries as composites beside their own decomposition. XLA knows
# them by name and may run code of its own for them, so others are not taken for them.
_CHLO: Final = """
acos acosh asin asinh atan atanh bessel_i1e conj cosh digamma erf erf_inv erfc is_inf is_neg_inf
is_pos_inf lgamma mulhi next_after polygamma sinh square tan top_k zeta
"""
COMPOSITES: Final = frozenset("chlo." + name for name in _CHLO.split())
