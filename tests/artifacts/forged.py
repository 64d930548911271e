"""The forged corpus: what the validator must say to each, by name. Made by code, not committed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ARTIFACT_BYTES_MAX

from .forge import (
    body,
    forged,
    honest,
    patched,
    with_code,
    with_dimension,
    with_effect,
    with_module,
    with_shared_tree,
)


class Forged(NamedTuple):
    make: Callable[[], bytes]
    reasons: tuple[Reason, ...]  # any of these; which it is depends on who notices first


FORGED: dict[str, Forged] = {}
T = "tensor<4xf32>"


def add(name: str, make: Callable[[], bytes], *reasons: Reason) -> None:
    assert name not in FORGED
    FORGED[name] = Forged(make, reasons)


def code(name: str, lines: str, *reasons: Reason, more: str = "", kind: str = T) -> None:
    """A forged module whose main has `lines`, in an honest header."""
    add(name, lambda: with_code(body(lines, more, kind)), *reasons)


def shape(dims: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def plain() -> bytes:
    return bytes(honest().serialize())


FORMAT, OP, CALL = Reason.ARTIFACT_FORMAT, Reason.ARTIFACT_OP, Reason.ARTIFACT_CALL
SHAPES, LIMITS, SIGNATURE = (
    Reason.ARTIFACT_SHAPES,
    Reason.ARTIFACT_LIMITS,
    Reason.ARTIFACT_SIGNATURE,
)
CONSTANT, EFFECTS = Reason.ARTIFACT_CONSTANT, Reason.ARTIFACT_EFFECTS

# ---- bytes

add("nothing", lambda: b"", LIMITS)
add("zeros", lambda: bytes(4096), FORMAT, Reason.JAX_WINDOW)
add("noise", lambda: os.urandom(4096), FORMAT, Reason.JAX_WINDOW, LIMITS)
add("over 16 MiB", lambda: plain() + bytes(ARTIFACT_BYTES_MAX), LIMITS)
add("cut in half", lambda: plain()[: len(plain()) // 2], FORMAT, LIMITS)
add("last bytes missing", lambda: plain()[:-200], FORMAT, LIMITS, Reason.JAX_WINDOW)

# ---- the header

add(
    "calling convention of the future",
    lambda: forged(calling_convention_version=11),
    Reason.JAX_WINDOW,
)
add(
    "calling convention of the past",
    lambda: forged(calling_convention_version=8),
    Reason.JAX_WINDOW,
)
add(
    "disabled checks",
    lambda: forged(disabled_safety_checks=(jax.export.DisabledSafetyCheck.platform(),)),
    EFFECTS,
)
add("ordered effect", lambda: with_effect("ordered_effects"), EFFECTS)
add("unordered effect", lambda: with_effect("unordered_effects"), EFFECTS)
add("two devices", lambda: forged(nr_devices=2), FORMAT)
add("platform that is none", lambda: forged(platforms=("cpu", "quantum")), Reason.ARTIFACT_PLATFORM)
add("platform twice", lambda: forged(platforms=("cpu", "cpu")), Reason.ARTIFACT_PLATFORM)
add("no platform", lambda: forged(platforms=()), Reason.ARTIFACT_PLATFORM)
add("dimension that never ends", lambda: with_dimension("a^99999999"), SHAPES)
add("dimension with a name", lambda: with_dimension("bbbbbbbbbb"), SHAPES)
add("dimension below zero", lambda: with_dimension("-234567890"), SHAPES)
add("dimension that is a call", lambda: with_dimension("max(a,b,c)"), SHAPES)
add("dimension over 2^31", lambda: with_dimension("9234567890"), SHAPES)
add("results of 2^40 shared leaves", lambda: with_shared_tree(40), LIMITS)
add("results nested 14 deep, 2^14 leaves", lambda: with_shared_tree(14), LIMITS)
add("derivative inside", lambda: bytes(honest().serialize(vjp_order=1)), FORMAT)
add("kept argument that is not there", lambda: forged(module_kept_var_idx=(7,)), FORMAT)
add("kept argument twice", lambda: forged(module_kept_var_idx=(0, 0)), FORMAT)
add("argument dropped", lambda: forged(module_kept_var_idx=()), SIGNATURE)
add("name with an escape", lambda: forged(fun_name="f\x1b[2J"), FORMAT)
add("name of a kilobyte", lambda: forged(fun_name="f" * 1024), FORMAT)
add("no code", lambda: forged(mlir_module_serialized=b""), FORMAT)
add(
    "another shape than main's",
    lambda: bytes(
        dataclasses.replace(
            honest(lambda x: (x,), shape((1 << 20,))),
            mlir_module_serialized=honest(lambda x: (x,)).mlir_module_serialized,
        ).serialize()
    ),
    SIGNATURE,
)
add(
    "another result than main's",
    lambda: with_code(
        "module @m { func.func public @main(%x: tensor<4xf32>) -> tensor<2xf32> {"
        " %r = stablehlo.slice %x [0:2] : (tensor<4xf32>) -> tensor<2xf32>"
        " return %r : tensor<2xf32> } }"
    ),
    SIGNATURE,
)
add(
    "complex argument",
    lambda: bytes(honest(lambda x: (x,), shape((4,), "complex64")).serialize()),
    SHAPES,
)
add(
    "float8 argument",
    lambda: bytes(honest(lambda x: (x,), shape((4,), "float8_e5m2")).serialize()),
    SHAPES,
)
add(
    "65 arguments",
    lambda: bytes(honest(lambda *xs: (xs[0],), *[shape((4,)) for _ in range(65)]).serialize()),
    LIMITS,
)
add(
    "keyword argument",
    lambda: bytes(jax.export.export(jax.jit(lambda *, x: x))(x=shape((4,))).serialize()),
    FORMAT,
)
add(
    "symbolic batch",
    lambda: bytes(
        jax.export.export(jax.jit(jnp.sin))(
            jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), "float32")
        ).serialize()
    ),
    SHAPES,
)

# ---- the bytecode around the code

add(
    "MLIR text for bytecode",
    lambda: with_module(body("%r = stablehlo.abs %x : " + T).encode()),
    FORMAT,
)
add("3,000 regions deep as text", lambda: with_module(deep_text(3000)), FORMAT)
add("code cut short", lambda: with_module(honest().mlir_module_serialized[:-40]), FORMAT)
add("bytecode of the future", lambda: with_module(later_bytecode()), FORMAT)
add(
    "producer that is not StableHLO",
    lambda: with_module(patched(b"StableHLO_v", b"StableHLO-v", honest().mlir_module_serialized)),
    FORMAT,
)
add(
    "code of the LLVM dialect",
    lambda: with_module(patched(b"vhlo", b"llvm", honest().mlir_module_serialized)),
    OP,
)


def deep_text(levels: int) -> bytes:
    head = '%0 = "stablehlo.case"(%i) ({ ' * levels
    tail = f" stablehlo.return %x : {T} }}) : (tensor<i32>) -> {T} stablehlo.return %0 : {T}"
    return body(head + tail * levels + "\n%r = stablehlo.abs %x : " + T).encode()


def later_bytecode() -> bytes:
    module = honest().mlir_module_serialized
    assert module[4] & 1  # a varint of one byte
    return module[:4] + bytes([127 << 1 | 1]) + module[5:]


# ---- calls into native code

ABS = f"%r = stablehlo.abs %x : {T}"


def kept(value: str, kind: str) -> str:
    """A use that StableHLO's serializer does not drop as dead code."""
    return (
        f"stablehlo.custom_call @shape_assertion({value}) {{has_side_effect = true}}"
        f" : ({kind}) -> ()\n{ABS}"
    )


def call(name: str, target: str, attributes: str = "") -> None:
    code(name, f"%r = stablehlo.custom_call @{target}(%x) {{{attributes}}} : ({T}) -> {T}", CALL)


call(
    "Python callback by index",
    "xla_ffi_python_cpu_callback",
    "api_version = 4 : i32, backend_config = {index = 123456789 : ui64}",
)
call("libc's system", "system")
call("libc's abort", "abort", "api_version = 2 : i32")
call("Pallas on a GPU", "mosaic_gpu_v2", "api_version = 4 : i32")
call("TPU code", "tpu_custom_call")
call("TensorFlow function", "tf.call_tf_function")
call("top_k by its old name", "mhlo.topk")
call("allocation without contents", "AllocateBuffer")
call("allowed target with a configuration", "shape_assertion", 'backend_config = "x"')
call("sharding as a call", "Sharding", 'backend_config = ""')
call("Cholesky as a call", "cholesky")
code(
    "LAPACK with shapes that lie",
    "%a = stablehlo.constant dense<1.0> : tensor<2x2xf32>\n"
    "%b = stablehlo.constant dense<1.0> : tensor<512x512xf32>\n"
    "%c = stablehlo.custom_call @lapack_strsm_ffi(%a, %b) {api_version = 4 : i32}"
    " : (tensor<2x2xf32>, tensor<512x512xf32>) -> tensor<512x512xf32>\n"
    + kept("%c", "tensor<512x512xf32>"),
    CALL,
)
code(
    "LAPACK of wrong arity",
    f"%r = stablehlo.custom_call @lapack_spotrf_ffi(%x, %x, %x, %x) : ({T}, {T}, {T}, {T}) -> {T}",
    CALL,
)
add(
    "honest Cholesky",
    lambda: bytes(honest(jnp.linalg.cholesky, shape((4, 4))).serialize()),
    CALL,
)
code(
    "Cholesky as an operation",
    "%m = stablehlo.reshape %x : (tensor<4xf32>) -> tensor<2x2xf32>\n"
    '%c = "stablehlo.cholesky"(%m) <{lower = true}> : (tensor<2x2xf32>) -> tensor<2x2xf32>\n'
    "%r = stablehlo.reshape %c : (tensor<2x2xf32>) -> tensor<4xf32>",
    OP,
)

# ---- out of the computation

TOKEN = "!stablehlo.token"
code(
    "infeed",
    f"%t = stablehlo.after_all : {TOKEN}\n"
    f'%r, %u = "stablehlo.infeed"(%t) <{{infeed_config = ""}}> : ({TOKEN}) -> ({T}, {TOKEN})',
    OP,
)
code(
    "outfeed",
    f"%t = stablehlo.create_token : {TOKEN}\n"
    f'%u = "stablehlo.outfeed"(%x, %t) <{{outfeed_config = ""}}> : ({T}, {TOKEN}) -> {TOKEN}\n'
    + ABS,
    OP,
)
code(
    "send to the host",
    f"%t = stablehlo.create_token : {TOKEN}\n"
    '%u = "stablehlo.send"(%x, %t) <{channel_handle = #stablehlo.channel_handle<handle = 5,'
    f" type = 2>, is_host_transfer = true}}> : ({T}, {TOKEN}) -> {TOKEN}\n" + ABS,
    OP,
)
code(
    "sum over devices",
    '%r = "stablehlo.all_reduce"(%x) <{replica_groups = dense<0> : tensor<1x1xi64>}> ({\n'
    " ^bb0(%a: tensor<f32>, %b: tensor<f32>):\n"
    "  %s = stablehlo.add %a, %b : tensor<f32>\n  stablehlo.return %s : tensor<f32>\n"
    f"}}) : ({T}) -> {T}",
    OP,
)
code(
    "permutation over devices",
    '%r = "stablehlo.collective_permute"(%x) <{source_target_pairs = dense<[[0, 1]]> :'
    f" tensor<1x2xi64>}}> : ({T}) -> {T}",
    OP,
)
for which in ("partition", "replica"):
    code(
        f"number of the {which}",
        f"%p = stablehlo.{which}_id : tensor<ui32>\n" + kept("%p", "tensor<ui32>"),
        OP,
    )
code(
    "random by the device's own state",
    "%z = stablehlo.constant dense<0.0> : tensor<f32>\n"
    "%s = stablehlo.constant dense<4> : tensor<1xi64>\n"
    "%r = stablehlo.rng %z, %z, %s, distribution = UNIFORM"
    f" : (tensor<f32>, tensor<f32>, tensor<1xi64>) -> {T}",
    OP,
)

# ---- functions and calls


def function(name: str, *callees: str) -> str:
    """A private function that calls others one after another."""
    lines, value = [], "%a"
    for number, callee in enumerate(callees):
        lines.append(f"%v{number} = func.call @{callee}({value}) : ({T}) -> {T}")
        value = f"%v{number}"
    inside = "\n ".join(lines)
    return f"func.func private @{name}(%a: {T}) -> {T} {{ {inside}\n return {value} : {T} }}\n"


def calls(name: str, more: str, *reasons: Reason, callee: str = "f") -> None:
    code(name, f"%r = func.call @{callee}(%x) : ({T}) -> {T}", *reasons, more=more)


calls("a function that calls itself", function("f", "f"), OP)
calls("two functions that call each other", function("f", "g") + function("g", "f"), OP)
code("recursion that nobody calls", ABS, OP, more=function("f", "f"))
chain = "".join(function(f"f{i}", f"f{i - 1}") for i in range(1, 201)) + function("f0")
bomb = "".join(function(f"f{i}", f"f{i - 1}", f"f{i - 1}") for i in range(1, 31)) + function("f0")
calls("2^30 calls", bomb, LIMITS, callee="f30")
calls("a chain of 200 calls", chain, LIMITS, callee="f200")
calls("a function without a body", f"func.func private @f({T}) -> {T}", OP)
calls("a function named by control characters", function('"\\0A\\1B"'), FORMAT, callee='"\\0A\\1B"')
code("a function with a name of 2 kB", ABS, FORMAT, more=function("f" * 2048))
code("a second entry", ABS, FORMAT, more=function("other").replace("private", "public"))


def edited(name: str, old: str, new: str, *reasons: Reason) -> None:
    """A forged module: the plain one with one text for another."""
    text = body(ABS)
    assert old in text
    add(name, lambda: with_code(text.replace(old, new)), *reasons)


edited("no main", "@main", "@start", FORMAT, SIGNATURE)
edited("main that is private", "public", "private", FORMAT)
edited("an argument more than the header's", f"%x: {T}", f"%x: {T}, %y: {T}", SIGNATURE)

# ---- sizes


def iota(name: str, kind: str, *reasons: Reason) -> None:
    code(name, f"%i = stablehlo.iota dim = 0 : {kind}\n" + kept("%i", kind), *reasons)


iota("iota of 2^64 elements", "tensor<4611686018427387904x4xf32>", LIMITS, FORMAT)
iota("64 GB", "tensor<17179869184xf32>", LIMITS)
iota("no element and 2^62 rows", "tensor<0x4611686018427387904xf32>", LIMITS, FORMAT)
iota("17 dimensions", f"tensor<{'1x' * 17}f32>", LIMITS)
HUGE = "tensor<1099511627776xf32>"
code(
    "broadcast to 2^40",
    "%z = stablehlo.reduce_precision %x, format = e5m2 : tensor<4xf32>\n"
    "%s = stablehlo.slice %z [0:1] : (tensor<4xf32>) -> tensor<1xf32>\n"
    f"%i = stablehlo.broadcast_in_dim %s, dims = [0] : (tensor<1xf32>) -> {HUGE}\n"
    + kept("%i", HUGE),
    LIMITS,
)
code(
    "constant of one value and 2^40 elements",
    f"%i = stablehlo.constant dense<0.0> : {HUGE}\n" + kept("%i", HUGE),
    LIMITS,
)
code(
    "padding that overflows",
    "%z = stablehlo.constant dense<0.0> : tensor<f32>\n"
    "%r = stablehlo.pad %x, %z, low = [4611686018427387904], high = [-4611686018427387904],"
    f" interior = [0] : ({T}, tensor<f32>) -> {T}",
    LIMITS,
    FORMAT,
)


def nested(levels: int) -> str:
    """Cases inside cases, by an index that is data."""
    inside = f"stablehlo.return %x : {T}"
    for level in range(levels):
        case = f'%v{level} = "stablehlo.case"(%i) ({{ {inside} }}) : (tensor<i32>) -> {T}\n'
        inside = case + f"stablehlo.return %v{level} : {T}"
    return (
        f"%s = stablehlo.slice %x [0:1] : ({T}) -> tensor<1xf32>\n"
        "%q = stablehlo.reshape %s : (tensor<1xf32>) -> tensor<f32>\n"
        f"%i = stablehlo.convert %q : (tensor<f32>) -> tensor<i32>\n{case}"
        f"%r = stablehlo.abs %v{levels - 1} : {T}"
    )


add("200 cases inside each other", lambda: with_code(body(nested(200))), LIMITS)


def many_operations(count: int) -> str:
    lines = [f"%a{i} = stablehlo.sine %a{i - 1} : {T}" for i in range(1, count)]
    first = f"%a0 = stablehlo.sine %x : {T}"
    return "\n".join([first, *lines, f"%r = stablehlo.sine %a{count - 1} : {T}"])


add("50,001 operations", lambda: with_code(body(many_operations(50_000))), LIMITS)


def wide(count: int) -> str:
    kind = f"tensor<{4 * count}xf32>"
    types = ", ".join([T] * count)
    line = f"%c = stablehlo.concatenate {', '.join(['%x'] * count)}, dim = 0 : ({types}) -> {kind}"
    return f"{line}\n{kept('%c', kind)}"


add("5,000 operands", lambda: with_code(body(wide(5000))), LIMITS)


def constants(size: int, count: int) -> str:
    kind = f"tensor<{size}xi8>"
    lines = []
    for number in range(count):
        values = bytes((number + i) % 251 for i in range(size)).hex()
        lines.append(f'%c{number} = stablehlo.constant dense<"0x{values}"> : {kind}')
        lines.append(f"stablehlo.custom_call @shape_assertion(%c{number})")
        lines[-1] += f" {{has_side_effect = true}} : ({kind}) -> ()"
    return "\n".join([*lines, ABS])


add("constant of 2 MB", lambda: with_code(body(constants(2 << 20, 1))), CONSTANT)
add("nine constants of 1 MiB", lambda: with_code(body(constants(1 << 20, 9))), CONSTANT)

# ---- types

INTS = "tensor<1xi32>"
code(
    "a shape that is not fixed",
    f"%d = stablehlo.convert %x : ({T}) -> tensor<?xf32>\n"
    f"%r = stablehlo.convert %d : (tensor<?xf32>) -> {T}",
    SHAPES,
)
BOUNDED = "tensor<?xf32, #stablehlo.bounds<4>>"
code(
    "a bounded shape",
    "%n = stablehlo.constant dense<2> : tensor<i32>\n"
    f"%d = stablehlo.set_dimension_size %x, %n, dim = 0 : ({T}, tensor<i32>) -> {BOUNDED}\n"
    + kept("%d", BOUNDED),
    OP,
    SHAPES,
)
SHAPE = f"%s = stablehlo.constant dense<0> : {INTS}\n%e = stablehlo.constant dense<4> : {INTS}\n"
code(
    "reshape by data",
    SHAPE + f"%r = stablehlo.dynamic_reshape %x, %e : ({T}, {INTS}) -> {T}",
    OP,
)
code(
    "pad by data",
    SHAPE + "%z = stablehlo.constant dense<0.0> : tensor<f32>\n"
    f"%r = stablehlo.dynamic_pad %x, %z, %s, %s, %s : ({T}, tensor<f32>, {INTS}, {INTS}, {INTS})"
    f" -> {T}",
    OP,
)
code(
    "slice by data",
    SHAPE
    + f"%r = stablehlo.real_dynamic_slice %x, %s, %e, %e : ({T}, {INTS}, {INTS}, {INTS}) -> {T}",
    OP,
)
code(
    "tuple",
    f"%t = stablehlo.tuple %x, %x : tuple<{T}, {T}>\n"
    f"%r = stablehlo.get_tuple_element %t[0] : (tuple<{T}, {T}>) -> {T}",
    OP,
)
code("token", f"%t = stablehlo.create_token : {TOKEN}\n" + kept("%t", TOKEN), OP)
code(
    "token of a call",
    "%t = stablehlo.custom_call @shape_assertion() {has_side_effect = true} : () -> "
    f"{TOKEN}\n{ABS}",
    SHAPES,
)


def through(name: str, kind: str, *reasons: Reason) -> None:
    code(
        name,
        f"%q = stablehlo.convert %x : ({T}) -> tensor<4x{kind}>\n"
        f"%r = stablehlo.convert %q : (tensor<4x{kind}>) -> {T}",
        *reasons,
    )


through("float8 inside", "f8E4M3FN", SHAPES)
through("int4 inside", "i4", SHAPES)
through("float4 inside", "f4E2M1FN", SHAPES)
# ---- attributes

code("sharding", f'%r = stablehlo.abs %x {{mhlo.sharding = "{{replicated}}"}} : {T}', OP)
code(
    "frontend attribute",
    f'%r = stablehlo.abs %x {{mhlo.frontend_attributes = {{_xla_compute_type = "host"}}}} : {T}',
    OP,
)
edited("eight partitions", "@m {", "@m attributes {mhlo.num_partitions = 8 : i32} {", FORMAT)
edited("layout of the module", "@m {", "@m attributes {mhlo.xla_entry_tiles = []} {", OP)
edited("donated argument", f"%x: {T}", f"%x: {T} {{tf.aliasing_output = 0 : i32}}", OP)
edited("donated buffer", f"%x: {T}", f"%x: {T} {{jax.buffer_donor = true}}", OP)
edited("layout of an argument", f"%x: {T}", f'%x: {T} {{mhlo.layout_mode = "{{0}}"}}', OP)
edited(
    "thread of a function", f"-> ({T}) {{", f'-> ({T}) attributes {{execution_thread = "h"}} {{', OP
)
code(
    "precision of 1,000 bits",
    f"%r = stablehlo.reduce_precision %x, format = e1000m1000 : {T}",
    LIMITS,
)
code(
    "unknown composite",
    f'%r = stablehlo.composite "my.own" %x {{decomposition = @f}} : ({T}) -> {T}',
    OP,
    more=function("f"),
)
code(
    "composite with a library of attributes",
    '%r = stablehlo.composite "chlo.erf" %x {composite_attributes = {'
    + ", ".join(f"a{i} = {i} : i64" for i in range(100))
    + f"}}, decomposition = @f}} : ({T}) -> {T}",
    LIMITS,
    more=function("f"),
)
code(
    "top_k of more than there is",
    '%v, %j = stablehlo.composite "chlo.top_k" %x {composite_attributes = {k = 1000 : i64},'
    f" decomposition = @f}} : ({T}) -> (tensor<1000xf32>, tensor<1000xi32>)\n"
    + kept("%v", "tensor<1000xf32>"),
    SHAPES,
    more=f"func.func private @f(%a: {T}) -> (tensor<1000xf32>, tensor<1000xi32>) {{"
    " %v = stablehlo.constant dense<0.0> : tensor<1000xf32>\n"
    " %j = stablehlo.constant dense<0> : tensor<1000xi32>\n"
    " return %v, %j : tensor<1000xf32>, tensor<1000xi32> }",
)

# ---- reducers and comparators

BIG = "tensor<67108864xf32>"


def reducer(name: str, lines: str, before: str = "", more: str = "") -> None:
    """A sum over %x whose reducer is `lines`, from %a and %b to %c."""
    code(
        name,
        f"{before}%z = stablehlo.constant dense<0.0> : tensor<f32>\n"
        '%s = "stablehlo.reduce"(%x, %z) <{dimensions = array<i64: 0>}> ({\n'
        f"^bb0(%a: tensor<f32>, %b: tensor<f32>):\n{lines}\n"
        f"stablehlo.return %c : tensor<f32>\n}}) : ({T}, tensor<f32>) -> tensor<f32>\n"
        f"%r = stablehlo.broadcast_in_dim %s, dims = [] : (tensor<f32>) -> {T}",
        OP,
        more=more,
    )


reducer(
    "reducer with 256 MB on its stack",
    f"%i = stablehlo.iota dim = 0 : {BIG}\n"
    f"%e = stablehlo.slice %i [7:8] : ({BIG}) -> tensor<1xf32>\n"
    "%f = stablehlo.reshape %e : (tensor<1xf32>) -> tensor<f32>\n"
    "%c = stablehlo.add %a, %f : tensor<f32>",
)
reducer(
    "reducer that calls for arrays",
    "%c = func.call @f(%a) : (tensor<f32>) -> tensor<f32>",
    more=f"func.func private @f(%a: tensor<f32>) -> tensor<f32> {{ %i = stablehlo.iota dim = 0 :"
    f" {BIG}\n %e = stablehlo.slice %i [7:8] : ({BIG}) -> tensor<1xf32>\n"
    " %f = stablehlo.reshape %e : (tensor<1xf32>) -> tensor<f32>\n return %f : tensor<f32> }",
)
reducer(
    "reducer with a loop",
    "%c = stablehlo.while(%v = %a) : tensor<f32>\n"
    " cond { %t = stablehlo.constant dense<true> : tensor<i1>\n"
    " stablehlo.return %t : tensor<i1> } do { stablehlo.return %v : tensor<f32> }",
)
reducer(
    "reducer that looks outside",
    "%c = stablehlo.add %a, %q : tensor<f32>",
    before=f"%o = stablehlo.slice %x [0:1] : ({T}) -> tensor<1xf32>\n"
    "%q = stablehlo.reshape %o : (tensor<1xf32>) -> tensor<f32>\n",
)
code(
    "comparator with a custom call",
    '%r = "stablehlo.sort"(%x) ({\n^bb0(%a: tensor<f32>, %b: tensor<f32>):\n'
    "%c = stablehlo.custom_call @shape_assertion(%a) : (tensor<f32>) -> tensor<i1>\n"
    f"stablehlo.return %c : tensor<i1>\n}}) : ({T}) -> {T}",
    OP,
)
