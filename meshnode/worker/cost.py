"""What one call of an artifact costs before it runs: FLOP and bytes, with loops counted in full.

XLA's own cost analysis counts a loop's body once (a scan of 100 matrix products: 0.010 of the
truth), so this walks the StableHLO itself and multiplies by trip counts. Called by `validate` on a
module that it has passed: types are plain, calls are acyclic, at most 50,000 operations inlined.

A trip count is an integer bound on an induction variable: a carried integer that the body moves by
a constant, compared with a constant. Constants are followed through calls, conversions, sums and
values that a loop carries unchanged; in `a & (i < n)` the bound alone gives the most trips. Every
other loop runs for as long as its data says: its body counts once and the cost is `unbounded`. Of a
stepped program the cost is of one step: its last argument, the number of steps, is taken to be 1.

Conventions, per element of the result unless said otherwise (integers count like floats, complex
numbers four times):

    arithmetic, comparison, select, conversion to another dtype, exp, log, sin, ...   1
    dot_general         2 k, k the contracted length
    convolution         2 k, k the kernel's elements for one output feature
    reduce              the reducer's cost for each element of the operand
    reduce_window       the reducer's for each element of the window; select_and_scatter likewise
    scatter             the combiner's for each update, at least 1
    sort                the comparator's for each element, ceil(log2 n) times
    fft                 5 log2 n of a transform, half of it where one side is real
    rng_bit_generator   20
    composite           its decomposition's
    case, if            the dearer branch, or the one for this platform
    data movement       0

Bytes are a floor: what products, reductions, sorts, transforms, gathers and slices read and write,
what a loop's body writes back by plain arithmetic, and arguments and results once. Elementwise
work between these is taken to be fused.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from .operations import CALLS

COUNT_MAX: Final = (1 << 63) - 1
RESOLVE_STEPS_MAX: Final = 100_000  # of following constants, over the whole artifact
RESOLVE_DEPTH_MAX: Final = 64
VISITS_MAX: Final = 200_000
RNG_FLOP: Final = 20
COMPLEX_FACTOR: Final = 4

_ELEMENTWISE_NAMES: Final = """
abs add and atan2 cbrt ceil clamp compare convert cosine count_leading_zeros divide exponential
exponential_minus_one floor is_finite log log_plus_one logistic maximum minimum multiply negate not
or popcnt power reduce_precision remainder round_nearest_afz round_nearest_even rsqrt select
shift_left shift_right_arithmetic shift_right_logical sign sine sqrt subtract tan tanh xor
"""
# Read or written as they are by what stands around them.
_FREE_NAMES: Final = """
bitcast_convert broadcast_in_dim complex constant imag iota optimization_barrier real reshape return
"""
_ELEMENTWISE: Final = frozenset("stablehlo." + name for name in _ELEMENTWISE_NAMES.split())
_FUSED: Final = _ELEMENTWISE | frozenset("stablehlo." + name for name in _FREE_NAMES.split())


class Cost(NamedTuple):
    """Of one call. Python ints, capped at 2^63 - 1 by `cost_of`."""

    flop: int
    bytes: int
    unbounded: bool  # a loop's length is data: both figures are for one trip through it

    def plus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(
            self.flop + times * other.flop,
            self.bytes + times * other.bytes,
            self.unbounded or other.unbounded,
        )


_NOTHING: Final = Cost(0, 0, False)


def cost_of(module: ir.Module, platform: int | None = None, *, stepped: bool = False) -> Cost:
    """Cost of one call of `main`; `platform` is the index that jax passes as its first argument.

    `stepped`: the last argument, an int32, is a number of steps; the cost is of one.
    """
    functions = {
        ir.StringAttr(op.operation.attributes["sym_name"]).value: op.operation
        for op in module.body.operations
    }
    walker = _Walker(functions)
    main = functions["main"]
    arguments = main.regions[0].blocks[0].arguments
    several = len(arguments) > 0 and _is_platform_index(main)
    known = [platform if at == 0 and several else None for at in range(len(arguments))]
    if stepped:
        known[-1] = 1
    cost = walker.function("main", known)
    outer = sum(walker.size(value.type).bytes for value in arguments)
    returned = main.regions[0].blocks[0].operations[-1]
    outer += sum(walker.size(value.type).bytes for value in returned.operation.operands)
    return Cost(min(cost.flop, COUNT_MAX), min(cost.bytes + outer, COUNT_MAX), cost.unbounded)


def _is_platform_index(main: Any) -> bool:
    if "arg_attrs" not in main.attributes:
        return False
    first = ir.DictAttr(ir.ArrayAttr(main.attributes["arg_attrs"])[0])
    return "jax.global_constant" in first


class _Size(NamedTuple):
    elements: int
    bytes: int
    factor: int  # what one operation on one element counts


class _Affine(NamedTuple):
    """A carried integer plus a constant: what a body makes of its induction variable."""

    carried: int
    offset: int


_Known = int | _Affine | None


class _Scope:
    """Values that are known in one function or loop; what is not bound is looked up outwards."""

    def __init__(self, bound: dict[Any, _Known], outer: _Scope | None = None) -> None:
        self.bound = bound
        self.outer = outer

    def find(self, value: Any) -> tuple[bool, _Known]:
        scope: _Scope | None = self
        while scope is not None:
            if value in scope.bound:
                return True, scope.bound[value]
            scope = scope.outer
        return False, None


class _Resolver:
    """Follows integer constants backwards, on demand and within a number of steps."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self._functions = functions
        self._steps = self._depth = 0

    def known(self, value: Any, scope: _Scope) -> _Known:
        self._steps += 1
        if self._steps > RESOLVE_STEPS_MAX or self._depth >= RESOLVE_DEPTH_MAX:
            return None
        found, bound = scope.find(value)
        if found:
            return bound
        if isinstance(value.owner, ir.Block):
            return None
        kind = ir.RankedTensorType(value.type)
        if kind.rank or not isinstance(kind.element_type, ir.IntegerType):
            return None
        self._depth += 1
        result = self._made(value, value.owner, scope)
        self._depth -= 1
        if isinstance(result, int) and not _fits(result, kind.element_type):
            result = None  # it wraps around
        scope.bound[value] = result
        return result

    def _made(self, value: Any, op: Any, scope: _Scope) -> _Known:
        name, operands = op.name, op.operands
        match name:
            case "stablehlo.constant":
                return int(ir.DenseIntElementsAttr(op.attributes["value"])[0])
            case "stablehlo.convert" | "stablehlo.reshape" | "stablehlo.broadcast_in_dim":
                return self._same(operands[0], scope)
            case "stablehlo.optimization_barrier":
                return self.known(operands[_index(op, value)], scope)
            case "stablehlo.case":
                return self._case(value, op, scope)
            case "func.call":
                return self._call(value, op, scope)
        if name not in _ARITHMETIC:
            return None
        return _ARITHMETIC[name]([self.known(operand, scope) for operand in operands])

    def _same(self, operand: Any, scope: _Scope) -> _Known:
        kind = ir.RankedTensorType(operand.type)
        if kind.rank and kind.has_static_shape and all(extent == 1 for extent in kind.shape):
            return None  # an element of an array; arrays are not followed
        return self.known(operand, scope)

    def _case(self, value: Any, op: Any, scope: _Scope) -> _Known:
        index = self.known(op.operands[0], scope)
        if not isinstance(index, int):
            return None
        branch = op.regions[_branch(index, len(op.regions))].blocks[0]
        return self.known(branch.operations[-1].operation.operands[_index(op, value)], scope)

    def _call(self, value: Any, op: Any, scope: _Scope) -> _Known:
        callee = self._functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value]
        block = callee.regions[0].blocks[0]
        given = [self.known(operand, scope) for operand in op.operands]
        inner = _Scope(dict(zip(block.arguments, given, strict=True)))
        return self.known(block.operations[-1].operation.operands[_index(op, value)], inner)

    # ---- loops

    def trips(self, op: Any, scope: _Scope) -> int | None:
        """The most trips of a while, or None: its data decides."""
        condition, body = (region.blocks[0] for region in op.regions)
        starts = [self.known(operand, scope) for operand in op.operands]
        moved = self._moves(body, scope)
        bound: dict[Any, _Known] = {}
        for at, argument in enumerate(condition.arguments):
            if moved[at] == _Affine(at, 0):
                bound[argument] = starts[at]  # carried unchanged
            else:
                bound[argument] = _Affine(at, 0)
        inner = _Scope(bound, scope)
        tested = condition.operations[-1].operation.operands[0]
        return self._most(tested, inner, starts, moved)

    def unchanged(self, op: Any, scope: _Scope) -> _Scope:
        """The scope of a while's body: what it carries unchanged is known there, nothing else."""
        body = op.regions[1].blocks[0]
        moved = self._moves(body, scope)
        return _Scope(
            {
                argument: self.known(operand, scope) if moved[at] == _Affine(at, 0) else None
                for at, (argument, operand) in enumerate(
                    zip(body.arguments, op.operands, strict=True)
                )
            },
            scope,
        )

    def _moves(self, body: Any, scope: _Scope) -> list[_Known]:
        """What the body makes of each carried value, as far as it is that value plus a constant."""
        tokens: dict[Any, _Known] = {
            argument: _Affine(at, 0) for at, argument in enumerate(body.arguments)
        }
        inner = _Scope(tokens, scope)
        returned = body.operations[-1].operation.operands
        return [self.known(value, inner) for value in returned]

    def _most(
        self, tested: Any, scope: _Scope, starts: list[_Known], moved: list[_Known]
    ) -> int | None:
        if isinstance(tested.owner, ir.Block):
            return None
        op = tested.owner
        if op.name == "stablehlo.and":  # it ends when either ends
            found = [self._most(operand, scope, starts, moved) for operand in op.operands]
            counts = [count for count in found if count is not None]
            return min(counts) if counts else None
        if op.name == "stablehlo.convert":  # of one truth value to another
            return self._most(op.operands[0], scope, starts, moved)
        if op.name != "stablehlo.compare":
            return None
        left, right = (self.known(operand, scope) for operand in op.operands)
        direction = str(op.attributes["comparison_direction"]).split()[-1].rstrip(">")
        if direction == "NE" and right == 0 and str(op.operands[0].type) == "tensor<i1>":
            return self._most(op.operands[0], scope, starts, moved)  # jax's `bool(x)`
        if isinstance(left, int) and isinstance(right, _Affine):
            left, right, direction = right, left, _MIRRORED[direction]
        if not isinstance(left, _Affine) or not isinstance(right, int):
            return None
        start, move = starts[left.carried], moved[left.carried]
        if not isinstance(start, int) or not isinstance(move, _Affine):
            return None
        if move.carried != left.carried:
            return None
        return _count(start + left.offset, right, move.offset, direction)


_MIRRORED: Final = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


def _count(start: int, end: int, step: int, direction: str) -> int | None:
    """Trips of `for (i = start; i DIRECTION end; i += step)`; None if it may not end."""
    if direction in ("LE", "GE"):
        end += 1 if direction == "LE" else -1
    if direction in ("LT", "LE"):
        return None if step <= 0 else max(0, -(-(end - start) // step))
    if direction in ("GT", "GE"):
        return None if step >= 0 else max(0, -(-(start - end) // -step))
    if direction == "NE" and step and (end - start) % step == 0 and (end - start) // step >= 0:
        return (end - start) // step
    return None


def _sum(values: list[_Known]) -> _Known:
    left, right = values
    if isinstance(left, int) and isinstance(right, _Affine):
        left, right = right, left
    if isinstance(right, int):
        if isinstance(left, int):
            return left + right
        if isinstance(left, _Affine):
            return _Affine(left.carried, left.offset + right)
    return None


def _difference(values: list[_Known]) -> _Known:
    left, right = values
    return _sum([left, -right]) if isinstance(right, int) else None


def _of_ints(values: list[_Known]) -> list[int] | None:
    ints = [value for value in values if isinstance(value, int)]
    return ints if len(ints) == len(values) else None


def _product(values: list[_Known]) -> _Known:
    ints = _of_ints(values)
    return math.prod(ints) if ints is not None else None


def _least(values: list[_Known]) -> _Known:
    ints = _of_ints(values)
    return min(ints) if ints is not None else None


def _greatest(values: list[_Known]) -> _Known:
    ints = _of_ints(values)
    return max(ints) if ints is not None else None


def _clamped(values: list[_Known]) -> _Known:
    ints = _of_ints(values)
    return min(max(ints[1], ints[0]), ints[2]) if ints is not None else None


_ARITHMETIC: Final = {
    "stablehlo.add": _sum,
    "stablehlo.subtract": _difference,
    "stablehlo.multiply": _product,
    "stablehlo.minimum": _least,
    "stablehlo.maximum": _greatest,
    "stablehlo.clamp": _clamped,
}


class _Walker:
    def __init__(self, functions: dict[str, Any]) -> None:
        self._functions = functions
        self._resolver = _Resolver(functions)
        self._costs: dict[tuple[str, tuple[int | None, ...]], Cost] = {}
        # Functions with no loop and no branch: what they are called with makes no difference.
        self._straight: dict[str, Cost] = {}
        self._controls = 0  # loops and branches met so far
        self._sizes: dict[Any, _Size] = {}
        self._visits = 0

    def size(self, kind: Any) -> _Size:
        found = self._sizes.get(kind)
        if found is None:
            tensor = ir.RankedTensorType(kind)
            elements = math.prod(tensor.shape)
            name = str(tensor.element_type)
            bits = int("".join(filter(str.isdigit, name)))
            wide = 2 if name.startswith("complex") else 1
            size = wide * max(1, bits // 8)
            found = _Size(elements, elements * size, COMPLEX_FACTOR if wide == 2 else 1)
            self._sizes[kind] = found
        return found

    def function(self, name: str, known: list[int | None]) -> Cost:
        key = (name, tuple(known))
        if key not in self._costs:
            block = self._functions[name].regions[0].blocks[0]
            scope = _Scope(
                {a: k for a, k in zip(block.arguments, known, strict=True) if k is not None}
            )
            before = self._controls
            self._costs[key] = cost = self._block(block, scope)
            if self._controls == before:
                self._straight[name] = cost
        else:
            self._controls += 1  # it has some, else it were among the straight ones
        return self._costs[key]

    def _block(self, block: Any, scope: _Scope) -> Cost:
        flop = traffic = 0
        unbounded = False
        for op in block.operations:
            self._visits += 1
            if self._visits > VISITS_MAX:
                return Cost(flop, traffic, True)
            op = op.operation
            name = op.name  # each look crosses into MLIR
            if name in _FUSED:
                if name in _ELEMENTWISE:
                    size = self.size(op.results[0].type)
                    flop += size.elements * size.factor
                continue
            cost = self._operation(op, scope)
            flop, traffic = flop + cost.flop, traffic + cost.bytes
            unbounded = unbounded or cost.unbounded
        return Cost(flop, traffic, unbounded)

    def _operation(self, op: Any, scope: _Scope) -> Cost:
        name = op.name
        if name in CALLS:
            callee = ir.FlatSymbolRefAttr(op.attributes[CALLS[name]]).value
            if callee in self._straight:
                return self._straight[callee]
            found = [self._resolver.known(operand, scope) for operand in op.operands]
            return self.function(callee, [k if isinstance(k, int) else None for k in found])
        if name == "stablehlo.while":
            return self._while(op, scope)
        if name in ("stablehlo.case", "stablehlo.if"):
            return self._branches(op, scope)
        given = sum(self.size(operand.type).bytes for operand in op.operands)
        made = [self.size(result.type) for result in op.results]
        written = sum(size.bytes for size in made)
        if name in ("stablehlo.slice", "stablehlo.dynamic_slice", "stablehlo.gather"):
            return Cost(0, 2 * written, False)
        if name == "stablehlo.dynamic_update_slice":
            return Cost(0, 2 * self.size(op.operands[1].type).bytes, False)
        if name == "stablehlo.scatter":
            return self._scatter(op, scope)
        inner = self._combiners(op, scope)
        flop = _FLOP[name](op, self.size, inner) if name in _FLOP else 0
        return Cost(flop, given + written, inner.unbounded)

    def _combiners(self, op: Any, scope: _Scope) -> Cost:
        """Of one application of each region: a reducer, a comparator, or a select and a scatter."""
        cost = _NOTHING
        for region in op.regions:
            cost = cost.plus(self._block(region.blocks[0], _Scope({}, scope)))
        return cost

    def _scatter(self, op: Any, scope: _Scope) -> Cost:
        inputs = len(op.results)
        indices, *updates = list(op.operands)[inputs:]
        once = max(1, self._combiners(op, scope).flop)
        elements = self.size(updates[0].type).elements
        moved = 3 * sum(self.size(update.type).bytes for update in updates)
        return Cost(once * elements, moved + self.size(indices.type).bytes, False)

    def _while(self, op: Any, scope: _Scope) -> Cost:
        self._controls += 1
        trips = self._resolver.trips(op, scope)
        inner = self._resolver.unchanged(op, scope)
        body = op.regions[1].blocks[0]
        cost = self._block(body, inner)
        stored = sum(
            2 * self.size(value.type).bytes
            for value in body.operations[-1].operation.operands
            if not isinstance(value.owner, ir.Block) and value.owner.name in _ELEMENTWISE
        )
        cost = cost.plus(Cost(0, stored, False))
        condition = self._block(op.regions[0].blocks[0], _Scope({}, scope))
        count = 1 if trips is None else trips
        total = _NOTHING.plus(cost, count).plus(condition, count + 1)
        return Cost(total.flop, total.bytes, total.unbounded or trips is None)

    def _branches(self, op: Any, scope: _Scope) -> Cost:
        self._controls += 1
        index = self._resolver.known(op.operands[0], scope)
        regions = list(op.regions)
        if op.name == "stablehlo.case" and isinstance(index, int):
            regions = [regions[_branch(index, len(regions))]]
        costs = [self._block(region.blocks[0], _Scope({}, scope)) for region in regions]
        return Cost(
            max(cost.flop for cost in costs),
            max(cost.bytes for cost in costs),
            any(cost.unbounded for cost in costs),
        )


def _branch(index: int, count: int) -> int:
    """An index that is out of range takes the last branch (StableHLO's spec of case)."""
    return index if 0 <= index < count else count - 1


def _index(op: Any, value: Any) -> int:
    return next(at for at, result in enumerate(op.results) if result == value)


def _fits(value: int, kind: ir.IntegerType) -> bool:
    if kind.is_unsigned:
        return 0 <= value < 1 << kind.width
    return -(1 << kind.width - 1) <= value < 1 << max(kind.width - 1, 1)


# ---- operations with a cost of their own: (operation, size of a type, combiner's cost) -> FLOP


def _dot(op: Any, size: Any, _: Cost) -> int:
    numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    left = ir.RankedTensorType(op.operands[0].type).shape
    contracted = math.prod(left[at] for at in numbers.lhs_contracting_dimensions)
    made = size(op.results[0].type)
    flop: int = 2 * made.elements * made.factor * contracted
    return flop


def _convolution(op: Any, size: Any, _: Cost) -> int:
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    kernel = ir.RankedTensorType(op.operands[1].type).shape
    features = max(1, kernel[numbers.kernel_output_feature_dimension])
    made = size(op.results[0].type)
    flop: int = 2 * made.elements * made.factor * (math.prod(kernel) // features)
    return flop


def _reduce(op: Any, size: Any, inner: Cost) -> int:
    return int(size(op.operands[0].type).elements * inner.flop)


def _window(op: Any, size: Any, inner: Cost) -> int:
    window = math.prod(ir.DenseI64ArrayAttr(op.attributes["window_dimensions"]))
    return int(size(op.results[0].type).elements * window * inner.flop)


def _select_and_scatter(op: Any, size: Any, inner: Cost) -> int:
    window = 1
    if "window_dimensions" in op.attributes:
        window = math.prod(ir.DenseI64ArrayAttr(op.attributes["window_dimensions"]))
    return int(size(op.operands[1].type).elements * window * inner.flop)


def _sort(op: Any, size: Any, inner: Cost) -> int:
    shape = ir.RankedTensorType(op.operands[0].type).shape
    axis = ir.IntegerAttr(op.attributes["dimension"]).value if "dimension" in op.attributes else -1
    length = shape[axis] if shape else 1
    rounds = max(0, length - 1).bit_length()
    return int(size(op.operands[0].type).elements * rounds * max(1, inner.flop))


def _fft(op: Any, size: Any, _: Cost) -> int:
    lengths = list(ir.DenseI64ArrayAttr(op.attributes["fft_length"]))
    points = math.prod(lengths)
    given, made = size(op.operands[0].type), size(op.results[0].type)
    real = given.factor == 1 or made.factor == 1
    elements = max(given.elements, made.elements)  # of the real side, where there is one
    flop: int = math.ceil((2.5 if real else 5) * elements * math.log2(max(points, 2)))
    return flop


def _map(op: Any, size: Any, inner: Cost) -> int:
    return int(size(op.results[0].type).elements * inner.flop)


def _rng(op: Any, size: Any, _: Cost) -> int:
    return RNG_FLOP * int(sum(size(result.type).elements for result in op.results))


_FLOP: Final = {
    "stablehlo.dot_general": _dot,
    "stablehlo.convolution": _convolution,
    "stablehlo.reduce": _reduce,
    "stablehlo.reduce_window": _window,
    "stablehlo.select_and_scatter": _select_and_scatter,
    "stablehlo.sort": _sort,
    "stablehlo.fft": _fft,
    "stablehlo.map": _map,
    "stablehlo.rng_bit_generator": _rng,
}
