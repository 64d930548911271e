"""One dataclass per CDDL rule: field kinds, and the decorator that joins a class to its map.

`objects` and `messages` declare every rule of docs/spec/meshnode.cddl as a frozen dataclass whose
fields carry `Annotated[type, at(key, kind)]`. This file turns such a class into a CBOR map and
back. A kind checks what came from outside; a wrong type, size or count is a RemoteProtocolError
that names rule and field.

Signed objects refuse unknown keys, frames ignore them: `decode_map(..., closed=)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import (
    Annotated,
    Any,
    Final,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from ..errors import RemoteProtocolError
from .codec import Cbor
from .types import ACCOUNT_BYTES, PEER_BYTES, PEER_PREFIX, TEXT_BYTES_MAX, UINT_MAX

T = TypeVar("T")


class Kind(Protocol):
    """`load` checks and converts what was decoded; `dump` makes it a profile value again."""

    def load(self, value: Any) -> Any: ...
    def dump(self, value: Any) -> Cbor: ...


def _refuse(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(what)


@dataclass(frozen=True, slots=True)
class Uint:
    most: int = UINT_MAX

    def load(self, value: Any) -> int:
        if type(value) is not int or not 0 <= value <= self.most:
            raise _refuse(f"not an unsigned integer up to {self.most}")
        return value

    def dump(self, value: Any) -> Cbor:
        return int(value)


@dataclass(frozen=True, slots=True)
class Int:
    def load(self, value: Any) -> int:
        if type(value) is not int:
            raise _refuse("not an integer")
        return value

    def dump(self, value: Any) -> Cbor:
        return int(value)


@dataclass(frozen=True, slots=True)
class Code:
    """An enumeration; codes that this version does not know are refused."""

    enum: type[IntEnum]

    def load(self, value: Any) -> IntEnum:
        if type(value) is not int:
            raise _refuse("not a code")
        try:
            return self.enum(value)
        except ValueError:
            raise _refuse(f"{value} is no {self.enum.__name__}") from None

    def dump(self, value: Any) -> Cbor:
        return int(value)


@dataclass(frozen=True, slots=True)
class Bstr:
    """Byte string of exactly `size`, or of at most `most`."""

    size: int | None = None
    most: int = 0

    def load(self, value: Any) -> bytes:
        if type(value) is not bytes:
            raise _refuse("not a byte string")
        if self.size is not None:
            if len(value) != self.size:
                raise _refuse(f"{len(value)} bytes where {self.size} belong")
        elif len(value) > self.most:
            raise _refuse(f"{len(value)} bytes; at most {self.most}")
        return value

    def dump(self, value: Any) -> Cbor:
        return bytes(value)


class Kid:
    """Who signs, as the envelope names them: a peer id or an account."""

    def load(self, value: Any) -> bytes:
        if type(value) is not bytes or not (
            len(value) == ACCOUNT_BYTES
            or (len(value) == PEER_BYTES and value.startswith(PEER_PREFIX))
        ):
            raise _refuse("neither a peer id nor an account")
        return value

    def dump(self, value: Any) -> Cbor:
        return bytes(value)


@dataclass(frozen=True, slots=True)
class Tstr:
    """Text of exactly `size`, or of at most `most` bytes of UTF-8, which is what CDDL's `.size`
    counts."""

    most: int = TEXT_BYTES_MAX
    size: int | None = None

    def load(self, value: Any) -> str:
        if type(value) is not str:
            raise _refuse("not a text")
        count = len(value.encode())
        if self.size is not None:
            if count != self.size:
                raise _refuse(f"{count} bytes of text where {self.size} belong")
        elif count > self.most:
            raise _refuse(f"{count} bytes of text; at most {self.most}")
        return value

    def dump(self, value: Any) -> Cbor:
        return str(value)


@dataclass(frozen=True, slots=True)
class Remark(Tstr):
    """Text for a person. Ours is cut to size: an exception's message in any script must not make
    a frame that the peer refuses."""

    def dump(self, value: Any) -> Cbor:
        wire = str(value).encode(errors="replace")
        return wire[: self.most].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class Fixed:
    """One constant: a schema version, an object's name."""

    value: int | str

    def load(self, value: Any) -> int | str:
        if type(value) is not type(self.value) or value != self.value:
            raise _refuse(f"not {self.value!r}")
        return self.value

    def dump(self, value: Any) -> Cbor:
        return self.value


@dataclass(frozen=True, slots=True)
class OrNull:
    kind: Kind

    def load(self, value: Any) -> Any:
        return None if value is None else self.kind.load(value)

    def dump(self, value: Any) -> Cbor:
        return None if value is None else self.kind.dump(value)


@dataclass(frozen=True, slots=True)
class Many:
    """Array of one kind, at least `least` and at most `most` items; a tuple in Python."""

    kind: Kind
    most: int
    least: int = 0

    def load(self, value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not self.least <= len(value) <= self.most:
            raise _refuse(f"not an array of {self.least} to {self.most} items")
        return tuple(self.kind.load(item) for item in value)

    def dump(self, value: Any) -> Cbor:
        return [self.kind.dump(item) for item in value]


class Row:
    """Array of fixed kinds, as a NamedTuple `make` (or a plain tuple)."""

    def __init__(self, make: Callable[..., tuple[Any, ...]] | None, *kinds: Kind) -> None:
        self.make = make
        self.kinds = kinds

    def load(self, value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(self.kinds):
            raise _refuse(f"not an array of {len(self.kinds)} items")
        items = tuple(k.load(v) for k, v in zip(self.kinds, value, strict=True))
        return items if self.make is None else self.make(*items)

    def dump(self, value: Any) -> Cbor:
        return [k.dump(v) for k, v in zip(self.kinds, value, strict=True)]


class Nested:
    """Another rule inside; closed, because what is nested is part of something signed."""

    def __init__(self, rule_class: type) -> None:
        self.rule_class = rule_class

    def load(self, value: Any) -> Any:
        return decode_map(self.rule_class, value, closed=True)

    def dump(self, value: Any) -> Cbor:
        return encode_map(value)


@dataclass(frozen=True, slots=True)
class At:
    key: int
    kind: Kind
    optional: bool


def at(key: int, kind: Kind, *, optional: bool = False) -> At:
    return At(key, kind, optional)


class Layout:
    """The table of one rule class, made once when the class is."""

    def __init__(self, rule_class: type) -> None:
        hints = get_type_hints(rule_class, include_extras=True)
        self.places: list[tuple[str, At]] = []
        for field in fields(rule_class):
            hint = hints[field.name]
            assert get_origin(hint) is Annotated, f"{rule_class.__name__}.{field.name} has no at()"
            place = next(extra for extra in get_args(hint) if isinstance(extra, At))
            self.places.append((field.name, place))
        self.keys = frozenset(place.key for _, place in self.places)
        # The deterministic encoding has the keys in order; made in order they need no sorting.
        self.ordered = sorted(self.places, key=lambda item: item[1].key)
        self.dumps = [(n, p.key, _dump_of(p.kind), p.optional) for n, p in self.ordered]
        self.loads = [(name, p.key, p.kind.load, p.optional) for name, p in self.places]
        assert len(self.keys) == len(self.places), f"{rule_class.__name__} uses a key twice"


_BUILT_IN: Final[dict[type, Callable[[Any], Cbor]]] = {
    Uint: int,
    Int: int,
    Code: int,
    Bstr: bytes,
    Kid: bytes,
    Tstr: str,
}


def _dump_of(kind: Kind) -> Callable[[Any], Cbor]:
    """What `dump` does, without a Python frame for each field where a built-in does it."""
    return _BUILT_IN.get(type(kind), kind.dump)


_LAYOUTS: Final[dict[type, Layout]] = {}


def rule(rule_class: type[T]) -> type[T]:
    """Class decorator, above `@dataclass(frozen=True, slots=True)`."""
    _LAYOUTS[rule_class] = Layout(rule_class)
    return rule_class


def rules() -> dict[str, Layout]:
    """All rules by class name, for the tests that hold them against the CDDL."""
    return {rule_class.__name__: layout for rule_class, layout in _LAYOUTS.items()}


def encode_map(value: Any) -> dict[int, Cbor]:
    """Keys in ascending order, for `codec.encode_ordered`."""
    out: dict[int, Cbor] = {}
    for name, key, dump, optional in _LAYOUTS[type(value)].dumps:
        item = getattr(value, name)
        if item is None and optional:
            continue
        out[key] = dump(item)
    return out


def decode_map(rule_class: type[T], value: Any, *, closed: bool) -> T:
    layout = _LAYOUTS[rule_class]
    if type(value) is not dict:
        raise _refuse(f"{rule_class.__name__}: not a map")
    if closed and not value.keys() <= layout.keys:
        raise _refuse(f"{rule_class.__name__}: unknown key {min(value.keys() - layout.keys)}")
    made: list[Any] = []  # in the order of the fields
    for name, key, load, optional in layout.loads:
        if key not in value:
            if optional:
                made.append(None)
                continue
            raise _refuse(f"{rule_class.__name__}: {name} is missing")
        try:
            made.append(load(value[key]))
        except RemoteProtocolError as error:
            raise _refuse(f"{rule_class.__name__}.{name}: {error}") from None
    try:
        return rule_class(*made)
    except ValueError as error:  # a rule's own __post_init__
        raise _refuse(f"{rule_class.__name__}: {error}") from None
