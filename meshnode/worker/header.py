"""What an artifact's header says, read before anything of jax or XLA touches the bytes.

An artifact is native-code-grade input: `jax.export.deserialize` hangs on a dimension called
`a^9999999`, recurses over trees whose branches are shared, and hands the module to a C++ parser
that random bytes can crash. So `validate` calls `read_header` first. It walks the flatbuffer with
the very accessors that jax uses later (jax/_src/export/serialization.py), so that both read the
same thing, but counts before it loops; then it walks the sections of the module's MLIR bytecode
(mlir.llvm.org/docs/BytecodeFormat), so that the C++ reader sees VHLO of a StableHLO producer and
no other dialect. What is left for that reader is why all of it runs in a sandbox.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from jax._src.export import serialization_generated as flat

from ..errors import ArtifactRefused
from ..protocol.reasons import Reason
from ..protocol.types import ARGS_MAX, ARTIFACT_BYTES_MAX, DIMS_MAX, ArraySpec

CALLING_CONVENTIONS: Final = (9, 10)  # the least and most that jax 0.10 reads
PLATFORMS: Final = frozenset(("cpu", "cuda", "rocm", "tpu"))
NAME_CHARS_MAX: Final = 256
TREE_NODES_MAX: Final = 512  # of the results; a shared branch counts as often as it is reached
TREE_DEPTH_MAX: Final = 16
DIM_MAX: Final = 1 << 31
STRINGS_MAX: Final = 1 << 17  # of the bytecode's string section
BYTECODE_MAGIC: Final = b"ML\xefR"
BYTECODE_VERSION_MAX: Final = 6
DIALECTS: Final = frozenset((b"builtin", b"vhlo"))
SHARDY: Final = b"sdy"
# Strings, dialects, attributes and types, their offsets, code, resources, properties; no dialect
# versions (7). Resources, which a `dense_resource` constant would point at, are always empty.
SECTIONS: Final = frozenset((0, 1, 2, 3, 4, 5, 6, 8))
RESOURCES: Final = ((5, b""), (6, b"\x01"))  # section, what it holds: no groups

_DIM: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_PRODUCER: Final = re.compile(rb"StableHLO_v[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}")
# What crosses the mesh (meshnode.md, section 4), by the numbers of jax's schema.
_DTYPES: Final = {
    flat.DType.bool: "bool",
    flat.DType.i8: "int8",
    flat.DType.i16: "int16",
    flat.DType.i32: "int32",
    flat.DType.i64: "int64",
    flat.DType.ui8: "uint8",
    flat.DType.ui16: "uint16",
    flat.DType.ui32: "uint32",
    flat.DType.ui64: "uint64",
    flat.DType.f16: "float16",
    flat.DType.bf16: "bfloat16",
    flat.DType.f32: "float32",
    flat.DType.f64: "float64",
}
_DTYPE_NAMES: Final = {code: name for name, code in vars(flat.DType).items() if name[0] != "_"}
# What reading damaged bytes raises in flatbuffers and NumPy.
_DAMAGE: Final = (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Header:
    """An artifact's own words about itself, within bounds; not yet held against its code."""

    name: str
    args: tuple[ArraySpec, ...]
    outs: tuple[ArraySpec, ...]
    kept: tuple[int, ...]  # the arguments that the code takes, rising
    platforms: tuple[str, ...]
    calling_convention: int
    module: bytes

    @property
    def x64(self) -> bool:
        """Whether jax needs its 64-bit mode to call it."""
        return any(spec.dtype in ("int64", "uint64", "float64") for spec in self.args + self.outs)


def read_header(content: bytes, *, builtin: bool = False) -> Header:
    """The header of artifact bytes; ArtifactRefused with the reason for anything else.

    `builtin` bytes, which a release has signed, may have jax's sharding dialect: its LAPACK calls
    carry rules of it.
    """
    if not 64 <= len(content) <= ARTIFACT_BYTES_MAX:
        text = f"{len(content)} bytes; an artifact has 64 to {ARTIFACT_BYTES_MAX}"
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, text)
    try:
        header = _read(bytearray(content))
    except _DAMAGE:
        text = "not what jax.export writes, or damaged at its header"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text) from None
    check_bytecode(header.module, DIALECTS | {SHARDY} if builtin else DIALECTS)
    return header


def _read(buffer: bytearray) -> Header:
    table = flat.Exported.GetRootAs(buffer, 0)
    version = table.CallingConventionVersion()
    least, most = CALLING_CONVENTIONS
    if not least <= version <= most:
        text = f"calling convention {version}; this release reads {least} to {most}"
        raise ArtifactRefused(Reason.JAX_WINDOW, text)
    _check_plain(table)
    seen: dict[int, ArraySpec] = {}
    args = _avals(table, "In", "argument", seen)
    outs = _avals(table, "Out", "result", seen)
    _check_trees(table, len(args), len(outs))
    return Header(
        name=_name(table.FunctionName()),
        args=args,
        outs=outs,
        kept=_kept(table, len(args)),
        platforms=_platforms(table),
        calling_convention=version,
        module=_module(table),
    )


def _check_plain(table: Any) -> None:
    """No effects, no disabled checks, one device, no shardings, no derivative: a plain function."""
    if table.OrderedEffectsLength() or table.UnorderedEffectsLength():
        text = "it has side effects (a print or a callback); return what you want to see"
        raise ArtifactRefused(Reason.ARTIFACT_EFFECTS, text)
    if table.DisabledChecksLength():
        text = "it was exported with disabled_checks; export it without"
        raise ArtifactRefused(Reason.ARTIFACT_EFFECTS, text)
    if (table.NrDevices() or table.NrDevicesShort()) != 1:
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "it was exported for several devices")
    if table.UniqueAbstractMeshesLength() or table.UniqueNamedShardingsLength():
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "it has shardings; a unit runs on one device")
    for length, item in (
        (table.InShardingsLength(), table.InShardings),
        (table.OutShardingsLength(), table.OutShardings),
    ):
        _count("shardings", length)
        for index in range(length):
            sharding = item(index)
            if sharding.NamedSharding() is not None or not sharding.HloShardingProtoIsNone():
                text = "it has shardings; a unit runs on one device"
                raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
    for length, at in (
        (table.InShardingsIdxsLength(), table.InShardingsIdxs),
        (table.OutShardingsIdxsLength(), table.OutShardingsIdxs),
    ):
        _count("shardings", length)
        if any(at(index) != 0 for index in range(length)):
            raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "it names a sharding that is not there")
    if table.Vjp() is not None:
        text = "it carries its derivative; serialize it with vjp_order=0"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)


def _count(what: str, count: int, most: int = ARGS_MAX) -> int:
    if not 0 <= count <= most:
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, f"{count} {what}; at most {most}")
    return count


def _avals(table: Any, side: str, what: str, seen: dict[int, ArraySpec]) -> tuple[ArraySpec, ...]:
    """Arguments (`In`) or results (`Out`): by index into the unique avals, else as they stand.

    A new artifact holds both, for older readers; jax believes the indices, and so does this, but
    each aval that either reaches is checked.
    """
    length = _count(f"{what}s", getattr(table, f"{side}AvalsLength")())
    written = [getattr(table, f"{side}Avals")(index) for index in range(length)]
    indexed = _count(f"{what}s", getattr(table, f"{side}AvalsIdxsLength")())
    unique = _count("distinct arrays", table.UniqueAvalsLength(), 2 * ARGS_MAX)
    for index in range(unique):
        _aval(table.UniqueAvals(index), what, seen)
    specs = tuple(_aval(aval, f"{what} {at}", seen) for at, aval in enumerate(written))
    if not indexed:
        return specs
    at = [getattr(table, f"{side}AvalsIdxs")(index) for index in range(indexed)]
    if any(index >= unique for index in at):
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, f"a {what} that is not there")
    believed = tuple(_aval(table.UniqueAvals(index), what, seen) for index in at)
    if specs and specs != believed:
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, f"two lists of {what}s that differ")
    return believed


def _aval(aval: Any, what: str, seen: dict[int, ArraySpec]) -> ArraySpec:
    """`seen` holds what was checked, by its place in the buffer: most are reached three times."""
    place = int(aval._tab.Pos)
    if place in seen:
        return seen[place]
    if aval.Kind() != flat.AbstractValueKind.shapedArray:
        raise ArtifactRefused(Reason.ARTIFACT_SHAPES, f"{what} is no array")
    if aval.MemorySpace() not in (flat.MemorySpace.Missing, flat.MemorySpace.Device):
        raise ArtifactRefused(Reason.ARTIFACT_SHAPES, f"{what} is to lie in host memory")
    dtype = _DTYPES.get(aval.Dtype())
    if dtype is None:
        name = _DTYPE_NAMES.get(aval.Dtype(), "an unknown dtype")
        raise ArtifactRefused(Reason.ARTIFACT_SHAPES, f"{what} is {name}; it cannot cross the mesh")
    rank = aval.ShapeLength()
    if not 0 <= rank <= DIMS_MAX:
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, f"{what} has {rank} dimensions")
    shape = []
    for axis in range(rank):
        text = bytes(aval.Shape(axis))[:NAME_CHARS_MAX].decode("utf-8", "replace")
        if not _DIM.fullmatch(text) or int(text) >= DIM_MAX:
            shown = ascii(text[:40])
            raise ArtifactRefused(
                Reason.ARTIFACT_SHAPES, f"{what} has the dimension {shown}; unit shapes are fixed"
            )
        shape.append(int(text))
    spec = seen[place] = ArraySpec(dtype, tuple(shape))
    return spec


def _kept(table: Any, args: int) -> tuple[int, ...]:
    count = _count("kept arguments", table.ModuleKeptVarIdxLength())
    kept = tuple(int(table.ModuleKeptVarIdx(index)) for index in range(count))
    if any(b <= a for a, b in pairwise(kept)) or (kept and kept[-1] >= args):
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "kept arguments are out of order or missing")
    return kept


def _platforms(table: Any) -> tuple[str, ...]:
    count = _count("platforms", table.PlatformsLength(), len(PLATFORMS))
    found = tuple(bytes(table.Platforms(i))[:16].decode("utf-8", "replace") for i in range(count))
    if not found or len(set(found)) != count or not PLATFORMS.issuperset(found):
        raise ArtifactRefused(Reason.ARTIFACT_PLATFORM, f"platforms {found!a}")
    return found


def _module(table: Any) -> bytes:
    if table.MlirModuleSerializedIsNone() or not table.MlirModuleSerializedLength():
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "it holds no code")
    return bytes(table.MlirModuleSerializedAsNumpy().tobytes())


def _name(raw: bytes | None) -> str:
    """The function's name, which becomes a symbol and stands in messages."""
    name = bytes(raw or b"").decode("utf-8")
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, f"the function is called {name[:40]!a}")
    return name


# ---- trees: how arguments and results were nested in Python


def _check_trees(table: Any, args: int, outs: int) -> None:
    """Arguments one after another and no keywords; results in any tree of plain containers."""
    given = table.InTree()
    kind = flat.PyTreeDefKind
    if given is None or given.Kind() != kind.tuple or given.ChildrenLength() != 2:
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "the arguments are no tuple")
    positional, keywords = given.Children(0), given.Children(1)
    if keywords.Kind() != kind.dict or keywords.ChildrenLength() != 0:
        text = "it takes keyword arguments; a unit's arguments have an order and no names"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
    if (
        positional.Kind() != kind.tuple
        or positional.ChildrenLength() != args
        or any(
            positional.Children(i).Kind() != kind.leaf or positional.Children(i).ChildrenLength()
            for i in range(args)
        )
    ):
        text = "an argument is no plain array; pass arrays one after another"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
    returned = table.OutTree()
    if returned is None or _Leaves().count(returned, TREE_DEPTH_MAX) != outs:
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "the results' tree has other leaves")


class _Leaves:
    """Counts the leaves of a tree, node by node, so that shared branches cannot unfold."""

    def __init__(self) -> None:
        self._nodes = 0

    def count(self, node: Any, depth: int) -> int:
        self._nodes += 1
        if self._nodes > TREE_NODES_MAX or depth == 0:
            raise ArtifactRefused(Reason.ARTIFACT_LIMITS, "the results are nested too deep")
        kind, children = node.Kind(), node.ChildrenLength()
        _count("results in one container", children, TREE_NODES_MAX)
        if kind in (flat.PyTreeDefKind.leaf, flat.PyTreeDefKind.none):
            if children:
                raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "a leaf of the results has children")
            return int(kind == flat.PyTreeDefKind.leaf)
        if kind not in (
            flat.PyTreeDefKind.tuple,
            flat.PyTreeDefKind.list,
            flat.PyTreeDefKind.dict,
        ):
            text = "the results are of a class of their own; return tuples, lists and dicts"
            raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
        if kind == flat.PyTreeDefKind.dict:
            if node.ChildrenNamesLength() != children:
                raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "a result has no name")
            names = [bytes(node.ChildrenNames(i)).decode("utf-8") for i in range(children)]
            if len(set(names)) != children or any(len(n) > NAME_CHARS_MAX for n in names):
                raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "two results have one name")
        return sum(self.count(node.Children(i), depth - 1) for i in range(children))


# ---- the module's bytecode


class _Cursor:
    """Reads MLIR's prefix varints and strings; IndexError past the end."""

    def __init__(self, content: bytes, at: int, end: int) -> None:
        self.content = content
        self.at = at
        self.end = end

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > self.end:
            raise IndexError
        self.at += count
        return self.content[self.at - count : self.at]

    def rest(self) -> bytes:
        return self.content[self.at : self.end]

    def varint(self) -> int:
        """1 to 9 bytes: as many more as the first has trailing zero bits."""
        first = self.take(1)[0]
        if first & 1:
            return first >> 1
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        more = (first & -first).bit_length() - 1
        rest = int.from_bytes(self.take(more), "little")
        return (rest << 8 | first) >> (more + 1)


def check_bytecode(module: bytes, dialects: frozenset[bytes] = DIALECTS) -> None:
    """ArtifactRefused unless `module` is bytecode of a StableHLO producer, of these dialects."""
    if not module.startswith(BYTECODE_MAGIC):
        # MLIR would parse anything else as text, whose parser recurses until the stack ends.
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "its code is no MLIR bytecode")
    try:
        cursor = _Cursor(module, len(BYTECODE_MAGIC), len(module))
        version = cursor.varint()
        end = module.index(b"\0", cursor.at, cursor.at + 64)
        producer = cursor.take(end - cursor.at)
        cursor.take(1)
        if version > BYTECODE_VERSION_MAX or not _PRODUCER.fullmatch(producer):
            text = f"bytecode version {version} by {producer.decode('latin-1')!a}"
            raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
        sections = _sections(cursor)
        unknown = sections.keys() - SECTIONS
        if unknown or not sections.keys() >= {0, 1, 2, 3, 4}:
            text = f"its bytecode has the sections {sorted(sections)}"
            raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
        for kind, nothing in RESOURCES:
            if kind in sections and sections[kind].rest() != nothing:
                text = "its bytecode has resources; constants stand in the code"
                raise ArtifactRefused(Reason.ARTIFACT_CONSTANT, text)
        names = _dialects(sections[1], _strings(sections[0]))
    except (IndexError, ValueError, OverflowError):
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, "its bytecode is cut or damaged") from None
    if SHARDY in names - dialects:
        text = "it has shardings, or linear algebra in native code; write it with jax.lax"
        raise ArtifactRefused(Reason.ARTIFACT_CALL, text)
    if not names <= dialects:
        strange = ascii(sorted(names - dialects)[0][:40].decode("latin-1"))
        raise ArtifactRefused(Reason.ARTIFACT_OP, f"its code is of the dialect {strange}")


def _sections(cursor: _Cursor) -> dict[int, _Cursor]:
    sections: dict[int, _Cursor] = {}
    while cursor.at < cursor.end:
        kind = cursor.take(1)[0]
        length = cursor.varint()
        if kind & 0x80:
            alignment = cursor.varint()
            if not 0 < alignment <= 64 or alignment & (alignment - 1):
                raise ValueError
            # Padding is counted from the start of the file, which jax hands over aligned.
            cursor.take(-cursor.at % alignment)
        start = cursor.at
        cursor.take(length)
        if kind & 0x7F in sections:
            raise ValueError
        sections[kind & 0x7F] = _Cursor(cursor.content, start, cursor.at)
    return sections


def _strings(section: _Cursor) -> Callable[[int], bytes]:
    """String i of the section: lengths stand in reverse order, the strings at its end in order."""
    count = section.varint()
    if count > STRINGS_MAX:
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, f"{count} strings in its code")
    lengths = [section.varint() for _ in range(count)][::-1]
    starts, at = [], section.at
    for length in lengths:
        starts.append(at)
        at += length
    if at != section.end or any(length == 0 for length in lengths):
        raise ValueError

    def string(index: int) -> bytes:
        return section.content[starts[index] : starts[index] + lengths[index] - 1]

    return string


def _dialects(section: _Cursor, string: Callable[[int], bytes]) -> set[bytes]:
    names = set()
    count = section.varint()
    if count > len(DIALECTS) + 8:
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, f"{count} dialects in its code")
    for _ in range(count):
        head = section.varint()
        if head & 1:  # a version of the dialect's own, which VHLO does not write
            raise ValueError
        names.add(string(head >> 1))
    return names
