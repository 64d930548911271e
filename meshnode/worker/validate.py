"""The validator: what a stranger's artifact must be before this process compiles it.

Flow: `program` calls `validated` on the bytes of a LOAD, `check` does so for `mesh artifact check`,
both in a process that may die of it: `header` first, in Python alone; then jax deserialises, MLIR's
C++ reads the module, and every operation, type, attribute and region is held against an allow-list
and a bound. jax checks none of that when it calls an artifact ("must be trusted input"), and its
list of stable custom calls is one of compatibility, not of safety. What it cannot know (an endless
loop, a bug of XLA's) is for the sandbox and the node's wall clock.

Every no is an ArtifactRefused with a code of the one registry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import jax.export
from jax._src.interpreters import mlir
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from ..errors import ArtifactRefused
from ..protocol.reasons import Reason
from ..protocol.types import STEP_COUNT
from .cost import Cost, cost_of
from .header import NAME_CHARS_MAX, SHARDY, Header, read_header
from .operations import (
    ARGUMENT_ATTRIBUTES,
    ATTRIBUTES,
    BUILTIN_ATTRIBUTES,
    CALLS,
    COMPOSITES,
    CONTROL,
    MODULE_ATTRIBUTES,
    RESULT_ATTRIBUTES,
    TARGETS,
)

OPS_MAX: Final = 50_000  # with every call counted as what it calls
DEPTH_MAX: Final = 24  # regions inside regions
CALL_DEPTH_MAX: Final = 96
FUNCTIONS_MAX: Final = 4096
ELEMENTS_MAX: Final = 1 << 28  # of one tensor
RANK_MAX: Final = 16
OPERANDS_MAX: Final = 4096  # of one operation, and its results
CONSTANT_BYTES_MAX: Final = 1 << 20
CONSTANTS_BYTES_MAX: Final = 8 << 20  # all together
ATTRIBUTE_ITEMS_MAX: Final = 64
ATTRIBUTE_DEPTH_MAX: Final = 4
ATTRIBUTE_INT_MAX: Final = 1 << 31  # XLA multiplies and adds these in 64 bits
FLOAT_BITS_MAX: Final = 64  # of reduce_precision

_ELEMENT_BYTES: Final = {
    "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ui8": 1, "ui16": 2, "ui32": 4, "ui64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "complex<f32>": 8, "complex<f64>": 16,
}  # fmt: skip
_ELEMENTS: Final = {
    "bool": "i1", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "ui8",
    "uint16": "ui16", "uint32": "ui32", "uint64": "ui64", "float16": "f16", "bfloat16": "bf16",
    "float32": "f32", "float64": "f64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Validated:
    """An artifact that may be compiled."""

    exported: jax.export.Exported
    header: Header
    cost: Cost  # of one call
    ops: int  # with every call counted as what it calls


def validated(
    content: bytes, *, builtin: bool = False, platform: str | None = None, stepped: bool = False
) -> Validated:
    """Artifact bytes, checked; ArtifactRefused with a reason and a line of text otherwise.

    `builtin` is for digests that a release has signed: they may make any custom call, and nothing
    else is different. `platform` is where it is to run (jax's name: cpu, cuda, rocm, tpu). Of a
    program that is called as a `stepped` one the cost is of one step.
    """
    header = read_header(content, builtin=builtin)
    if platform is not None and platform not in header.platforms:
        text = f"it was exported for {', '.join(header.platforms)}, this is {platform}"
        raise ArtifactRefused(Reason.ARTIFACT_PLATFORM, text)
    try:
        exported = jax.export.deserialize(bytearray(content))
        with_shardy = builtin and SHARDY in header.module
        context = mlir.make_ir_context() if with_shardy else _context()
        with context:
            module = _jax.mlir.deserialize_portable_artifact(header.module)
            if not isinstance(module, ir.Module):
                module = ir.Module.parse(module)
            module.operation.verify()
            walk = _Walk(builtin)
            walk.module(module, header)
            cost = cost_of(
                module,
                header.platforms.index(platform) if platform else None,
                stepped=stepped and _takes_steps(header),
            )
            return Validated(exported, header, cost, walk.inlined)
    except ArtifactRefused:
        raise
    except Exception as error:  # noqa: BLE001 - jax and MLIR have no common base; it is a refusal
        text = f"its code cannot be read: {type(error).__name__}: {_first_line(error)}"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text) from None


def _takes_steps(header: Header) -> bool:
    """The code's last argument is the number of steps."""
    return header.args[-1:] == (STEP_COUNT,) and header.kept[-1:] == (len(header.args) - 1,)


def _context() -> ir.Context:
    """MLIR with StableHLO, CHLO and func, and no thread but this one.

    jax's own context has every dialect of MLIR for a parser of hostile bytes to reach, and costs
    4 to 9 ms where this costs half of one.
    """
    context = ir.Context()
    context.enable_multithreading(False)
    stablehlo.register_dialect(context)
    return context


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ascii(lines[0][:200])[1:-1] if lines else ""


def _refuse(reason: Reason, text: str) -> NoReturn:
    raise ArtifactRefused(reason, text)


@dataclass(slots=True)
class _Function:
    """What is known of one function after its body was walked."""

    ops: int = 0
    scalar: bool = True  # nothing but scalars and no region in it
    calls: list[str] = field(default_factory=list)
    scalar_calls: list[str] = field(default_factory=list)  # out of regions that combine scalars


class _Walk:
    """One pass over a module. Bounds are counted in Python ints: XLA's 64 bits overflow."""

    def __init__(self, builtin: bool) -> None:
        self._builtin = builtin
        self._types: dict[Any, bool] = {}  # a type that passed: whether it is a scalar
        self._passed: set[Any] = set()  # attributes
        self._functions: dict[str, _Function] = {}
        self._now = _Function()
        self._ops = 0
        self._constant_bytes = 0
        self.inlined = 0

    def module(self, module: ir.Module, header: Header) -> None:
        operation = module.operation
        if operation.name != "builtin.module":
            _refuse(Reason.ARTIFACT_FORMAT, f"its code is a {operation.name}")
        self._attributes(operation, MODULE_ATTRIBUTES)
        for name in ("mhlo.num_partitions", "mhlo.num_replicas"):
            if (
                name in operation.attributes
                and ir.IntegerAttr(operation.attributes[name]).value != 1
            ):
                _refuse(Reason.ARTIFACT_FORMAT, "it runs on several devices")
        for op in module.body.operations:
            if op.operation.name != "func.func":
                _refuse(Reason.ARTIFACT_OP, f"{op.operation.name} outside of a function")
            self._function(op.operation)
        if "main" not in self._functions:
            _refuse(Reason.ARTIFACT_SIGNATURE, "its code has no function main")
        self.inlined = _Calls(self._functions).check()
        self._signature(module, header)

    # ---- functions

    def _function(self, op: Any) -> None:
        name = _symbol(op.attributes["sym_name"])
        if len(self._functions) >= FUNCTIONS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"more than {FUNCTIONS_MAX} functions")
        self._attributes(op, ATTRIBUTES["func.func"], skip=("arg_attrs", "res_attrs"))
        for attribute, allowed in (
            ("arg_attrs", ARGUMENT_ATTRIBUTES),
            ("res_attrs", RESULT_ATTRIBUTES),
        ):
            if attribute in op.attributes:
                for item in ir.ArrayAttr(op.attributes[attribute]):
                    _check_dictionary(ir.DictAttr(item), allowed, f"{name} {attribute}")
        visibility = (
            _text(op.attributes["sym_visibility"])
            if ("sym_visibility" in op.attributes)
            else "public"
        )
        if (visibility == "public") != (name == "main"):
            _refuse(Reason.ARTIFACT_FORMAT, f"function {name!a} is {visibility}")
        if len(op.regions[0].blocks) != 1:
            _refuse(Reason.ARTIFACT_OP, f"function {name!a} has no body, or branches in it")
        self._now = self._functions[name] = _Function()
        self._block(op.regions[0].blocks[0], 1, inside=None)

    def _signature(self, module: ir.Module, header: Header) -> None:
        """The header's arguments and results are those of `main`, which XLA will believe."""
        main = next(
            op.operation
            for op in module.body.operations
            if _symbol(op.operation.attributes["sym_name"]) == "main"
        )
        kind_of_main = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        got = [str(kind) for kind in kind_of_main.inputs]
        if len(header.platforms) > 1:  # jax passes the platform's index before all arguments
            if not got or got.pop(0) not in ("tensor<i32>", "tensor<i64>"):
                _refuse(Reason.ARTIFACT_SIGNATURE, "main takes no platform index")
        want = [_tensor(header.args[index]) for index in header.kept]
        _compare("argument", got, want)
        results = [str(kind) for kind in kind_of_main.results]
        _compare("result", results, [_tensor(spec) for spec in header.outs])

    # ---- blocks and operations

    def _block(self, block: Any, depth: int, inside: set[Any] | None) -> None:
        """`inside` is None in code; in a region that combines scalars, the values known there."""
        for argument in block.arguments:
            scalar = self._type(argument.type)
            if not scalar:
                self._now.scalar = False
                if inside is not None:
                    _refuse(Reason.ARTIFACT_OP, "a reducer or comparator of arrays, not scalars")
            if inside is not None:
                inside.add(argument)
        for op in block.operations:
            self._operation(op.operation, depth, inside)

    def _operation(self, op: Any, depth: int, inside: set[Any] | None) -> None:
        name = op.name
        allowed = ATTRIBUTES.get(name)
        if allowed is None and self._builtin:
            allowed = BUILTIN_ATTRIBUTES.get(name)
        if allowed is None or name == "func.func":  # and no function inside a function
            _refuse(Reason.ARTIFACT_OP, f"the operation {name!a}")
        self._ops += 1
        self._now.ops += 1
        if self._ops > OPS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"more than {OPS_MAX} operations")
        results = op.results
        if len(results) > OPERANDS_MAX or len(op.operands) > OPERANDS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"a {name} of more than {OPERANDS_MAX} arrays")
        scalar = True
        for result in results:
            scalar = self._type(result.type) and scalar
        self._now.scalar = self._now.scalar and scalar
        if inside is not None:
            self._scalar_only(op, name, scalar, inside)
        if name == "stablehlo.constant":
            self._attributes(op, allowed, skip=("value",))
            self._constant(op)
        elif name == "stablehlo.custom_call":
            self._custom_call(op, allowed)
        else:
            self._attributes(op, allowed)
            self._special(op, name, inside)
        if regions := op.regions:
            self._now.scalar = False
            self._regions(regions, name, depth + 1)

    def _scalar_only(self, op: Any, name: str, scalar: bool, inside: set[Any]) -> None:
        """XLA compiles a reducer to a function of its own whose values lie on the stack.

        A large one would overflow it, and a value from outside is only there if it is a constant.
        """
        if not scalar or len(op.regions) or name == "stablehlo.custom_call":
            _refuse(Reason.ARTIFACT_OP, f"{name} in a reducer or comparator; it combines scalars")
        for operand in op.operands:
            if operand not in inside:
                owner = operand.owner
                if isinstance(owner, ir.Block) or owner.name != "stablehlo.constant":
                    text = f"{name} in a reducer or comparator uses a value from outside"
                    _refuse(Reason.ARTIFACT_OP, text)
                if not self._type(operand.type):
                    _refuse(Reason.ARTIFACT_OP, "a reducer or comparator of arrays, not scalars")
        inside.update(op.results)

    def _regions(self, regions: Any, name: str, depth: int) -> None:
        if depth > DEPTH_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"regions nested more than {DEPTH_MAX} deep")
        if len(regions) > OPERANDS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"a {name} of {len(regions)} regions")
        control = name in CONTROL
        for region in regions:
            if len(region.blocks) != 1:
                _refuse(Reason.ARTIFACT_OP, f"a region of {name} has not one block")
            self._block(region.blocks[0], depth, None if control else set())

    def _special(self, op: Any, name: str, inside: set[Any] | None) -> None:
        """What only one kind of operation has."""
        symbol = CALLS.get(name)
        if symbol is not None:
            if name == "stablehlo.composite" and _text(op.attributes["name"]) not in COMPOSITES:
                text = f"the composite {_text(op.attributes['name'])[:40]!a}"
                _refuse(Reason.ARTIFACT_OP, f"{text}; call the function itself")
            callee = ir.FlatSymbolRefAttr(op.attributes[symbol]).value
            self._now.calls.append(callee)
            if inside is not None:
                self._now.scalar_calls.append(callee)
            if name == "stablehlo.composite":
                _check_composite(op)
        elif name == "stablehlo.reduce_precision":
            bits = [
                ir.IntegerAttr(op.attributes[n]).value for n in ("exponent_bits", "mantissa_bits")
            ]
            if not 0 < bits[0] <= FLOAT_BITS_MAX or not 0 <= bits[1] <= FLOAT_BITS_MAX:
                _refuse(Reason.ARTIFACT_LIMITS, f"reduce_precision to {bits} bits")

    def _custom_call(self, op: Any, allowed: frozenset[str]) -> None:
        target = _text(op.attributes["call_target_name"])
        if self._builtin:
            return
        if target not in TARGETS:
            text = f"the custom call {target[:60]!a}; write it with jax.lax or jax.numpy"
            _refuse(Reason.ARTIFACT_CALL, text)
        self._attributes(op, allowed)
        for name in ("called_computations", "backend_config"):
            if name in op.attributes and not _empty(op.attributes[name]):
                _refuse(Reason.ARTIFACT_CALL, f"the custom call {target} with a {name}")

    # ---- types, constants, attributes

    def _type(self, kind: Any) -> bool:
        """Whether it is a scalar; refused unless it is a plain array within bounds."""
        known = self._types.get(kind)
        if known is not None:
            return known
        if not isinstance(kind, ir.RankedTensorType):
            _refuse(Reason.ARTIFACT_SHAPES, f"a value of the type {str(kind)[:60]!a}")
        tensor = ir.RankedTensorType(kind)
        if tensor.rank > RANK_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"an array of {tensor.rank} dimensions")
        if tensor.encoding is not None:
            _refuse(Reason.ARTIFACT_SHAPES, f"an array with an encoding: {str(kind)[:60]!a}")
        if not tensor.has_static_shape:
            _refuse(Reason.ARTIFACT_SHAPES, f"an array without a fixed shape: {str(kind)[:60]}")
        if str(tensor.element_type) not in _ELEMENT_BYTES:
            _refuse(Reason.ARTIFACT_SHAPES, f"an array of {str(tensor.element_type)[:40]!a}")
        elements = 1
        for extent in tensor.shape:
            elements *= extent
        if elements > ELEMENTS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"an array of {elements} elements; {str(kind)[:60]}")
        # An array without elements still multiplies its other dimensions somewhere in XLA.
        if any(extent > ELEMENTS_MAX for extent in tensor.shape):
            _refuse(Reason.ARTIFACT_LIMITS, f"a dimension over the bound: {str(kind)[:60]}")
        self._types[kind] = tensor.rank == 0
        return tensor.rank == 0

    def _constant(self, op: Any) -> None:
        tensor = ir.RankedTensorType(op.results[0].type)
        size = _ELEMENT_BYTES[str(tensor.element_type)]
        for extent in tensor.shape:
            size *= extent
        try:
            value = op.attributes["value"]
        except TypeError:  # a complex one has no class in the bindings; its text tells as much
            text = op.get_asm(large_elements_limit=1)
            splat = "__elided__" not in text
        else:
            if not isinstance(value, ir.DenseElementsAttr):
                _refuse(Reason.ARTIFACT_CONSTANT, f"a constant that is a {type(value).__name__}")
            splat = value.is_splat
        if splat:
            return
        self._constant_bytes += size
        if size > CONSTANT_BYTES_MAX or self._constant_bytes > CONSTANTS_BYTES_MAX:
            text = f"a constant of {size} bytes ({str(tensor)[:60]}); pass it as an argument"
            _refuse(Reason.ARTIFACT_CONSTANT, text)

    def _attributes(self, op: Any, allowed: frozenset[str], skip: tuple[str, ...] = ()) -> None:
        attributes = op.attributes
        for name in attributes:
            if name not in allowed:
                _refuse(Reason.ARTIFACT_OP, f"{op.name} with the attribute {name[:60]!a}")
            if name not in skip:
                value = attributes[name]
                if value not in self._passed:  # MLIR keeps equal attributes once
                    _check_attribute(value, ATTRIBUTE_DEPTH_MAX, op.name)
                    self._passed.add(value)


class _Calls:
    """The call graph: no cycle, nothing unknown, and how many operations it is when inlined."""

    def __init__(self, functions: dict[str, _Function]) -> None:
        self._functions = functions
        self._inlined: dict[str, int] = {}
        self._scalars: set[str] = set()

    def check(self) -> int:
        total = self._count("main", ())
        for name in self._functions:  # unreachable ones are merged and compiled all the same
            self._count(name, ())
            for callee in self._functions[name].scalar_calls:
                self._scalar(callee)
        return total

    def _count(self, name: str, above: tuple[str, ...]) -> int:
        if name in self._inlined:
            return self._inlined[name]
        if name in above:
            _refuse(Reason.ARTIFACT_OP, f"function {name[:60]!a} calls itself")
        if len(above) >= CALL_DEPTH_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"calls nested more than {CALL_DEPTH_MAX} deep")
        function = self._functions.get(name)
        if function is None:
            _refuse(Reason.ARTIFACT_OP, f"a call of {name[:60]!a}, which is not there")
        below = (*above, name)
        total = function.ops + sum(self._count(callee, below) for callee in function.calls)
        if total > OPS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"{total} operations with all calls inlined")
        self._inlined[name] = total
        return total

    def _scalar(self, name: str) -> None:
        """Acyclic by now, so this ends; depth is bounded by the same."""
        if name in self._scalars:
            return
        self._scalars.add(name)
        function = self._functions[name]
        if not function.scalar:
            text = f"function {name[:60]!a} of arrays in a reducer or comparator"
            _refuse(Reason.ARTIFACT_OP, text)
        for callee in function.calls:
            self._scalar(callee)


def _empty(attribute: Any) -> bool:
    text = isinstance(attribute, ir.StringAttr)
    return not (attribute.value if text else len(attribute))


def _symbol(attribute: Any) -> str:
    name = _text(attribute)
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        _refuse(Reason.ARTIFACT_FORMAT, f"a function called {name[:40]!a}")
    return name


def _text(attribute: Any) -> str:
    return str(ir.StringAttr(attribute).value)


def _check_attribute(attribute: Any, depth: int, where: str) -> None:
    """Sizes and integers of one attribute; StableHLO's verifier has checked its kind."""
    if depth == 0:
        _refuse(Reason.ARTIFACT_LIMITS, f"{where} with attributes nested too deep")
    kind = type(attribute)
    if kind in (ir.BoolAttr, ir.FlatSymbolRefAttr, ir.TypeAttr, ir.UnitAttr, ir.FloatAttr):
        return
    if kind is ir.IntegerAttr:
        _check_integers((attribute.value,), where)
    elif kind is ir.StringAttr:
        if len(attribute.value) > NAME_CHARS_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"{where} with a text of {len(attribute.value)}")
    elif kind in (ir.DenseI64ArrayAttr, ir.DenseBoolArrayAttr, ir.DenseIntElementsAttr):
        _check_items(len(attribute), where)
        _check_integers(attribute, where)
    elif kind is ir.ArrayAttr:
        _check_items(len(attribute), where)
        for item in attribute:
            _check_attribute(item, depth - 1, where)
    elif kind is ir.DictAttr:
        _check_dictionary(attribute, None, where)
    elif kind is ir.Attribute and (text := str(attribute)).startswith("#stablehlo"):
        # Enumerations and dimension numbers, whose lists are no longer than an array has axes.
        _check_items(text.count(","), where)
    else:
        _refuse(Reason.ARTIFACT_OP, f"{where} with an attribute that is a {kind.__name__}")


def _check_dictionary(attribute: Any, allowed: frozenset[str] | None, where: str) -> None:
    _check_items(len(attribute), where)
    for named in attribute:
        if allowed is not None and named.name not in allowed:
            _refuse(Reason.ARTIFACT_OP, f"{where[:80]!a} with {named.name[:60]!a}")
        _check_attribute(named.attr, ATTRIBUTE_DEPTH_MAX - 1, where)


def _check_items(count: int, where: str) -> None:
    if count > ATTRIBUTE_ITEMS_MAX:
        _refuse(Reason.ARTIFACT_LIMITS, f"{where} with an attribute of {count} items")


def _check_integers(values: Any, where: str) -> None:
    for value in values:
        if not -ATTRIBUTE_INT_MAX <= int(value) < ATTRIBUTE_INT_MAX:
            _refuse(Reason.ARTIFACT_LIMITS, f"{where} with {int(value)} in an attribute")


def _check_composite(op: Any) -> None:
    """A known composite has the shapes of its operation, which is what XLA may run for it."""
    name = _text(op.attributes["name"])
    given = [list(ir.RankedTensorType(operand.type).shape) for operand in op.operands]
    made = [list(ir.RankedTensorType(result.type).shape) for result in op.results]
    if name == "chlo.top_k":
        most = ir.DictAttr(op.attributes["composite_attributes"])
        k = ir.IntegerAttr(most["k"]).value
        whole = len(given) == 1 and len(given[0]) > 0 and 0 <= k <= given[0][-1]
        fits = whole and made == [[*given[0][:-1], k]] * 2
    else:
        fits = len(given) > 0 and len(made) == 1 and all(shape == made[0] for shape in given)
    if not fits:
        _refuse(Reason.ARTIFACT_SHAPES, f"the composite {name} from {given} to {made}")


def _tensor(spec: Any) -> str:
    return f"tensor<{''.join(f'{extent}x' for extent in spec.shape)}{_ELEMENTS[spec.dtype]}>"


def _compare(what: str, got: list[str], want: list[str]) -> None:
    if len(got) != len(want):
        text = f"main has {len(got)} {what}s, the header says {len(want)}"
        _refuse(Reason.ARTIFACT_SIGNATURE, text)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if ours != theirs:
            text = f"{what} {index} of main is {ours[:60]}, the header says {theirs}"
            _refuse(Reason.ARTIFACT_SIGNATURE, text)
