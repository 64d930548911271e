"""The CBOR profile: what may be signed or framed, and the strict accept rule.

Profile (docs/spec/meshnode.md): map keys are unsigned integers, integers lie in [-2^63, 2^63),
strings are definite, there are no floats, no tags, no booleans, no undefined. Inside this profile
the length-first order that cbor2 calls canonical and the bytewise order of RFC 8949 section 4.2.1
are the same order, which they are not in general.

Accept rule: decode, check types with `type(x) is ...` (a bool is not an int), encode again, and
the bytes must be equal. That one comparison refuses non-minimal integers, duplicate keys,
indefinite lengths, trailing bytes and whatever else has two encodings. Tags are refused before
their content is read: with cbor2's own decoders for them 300 bytes of shared references (tags 28
and 29) unfold into 8^12 items, a regular expression is compiled, a big decimal computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NoReturn, TypeAlias, cast

import cbor2

from ..errors import RemoteProtocolError
from .types import CBOR_DEPTH_MAX, FRAME_BYTES_MAX, UINT_MAX, Digest

Cbor: TypeAlias = "int | bytes | str | list[Cbor] | dict[int, Cbor] | None"

_INT_MIN: Final = -UINT_MAX - 1


class _NoTags(Mapping[int, Any]):
    """cbor2 asks it for the decoder of every tag, built-in or not, before it reads the content."""

    def __getitem__(self, tag: int) -> Any:
        return self._refuse

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0

    @staticmethod
    def _refuse(*_: object) -> NoReturn:
        raise RemoteProtocolError("tags are outside the CBOR profile")


_NO_TAGS: Final = _NoTags()


def encode(value: Cbor) -> bytes:
    """Deterministic bytes of a value that is already inside the profile."""
    return cbor2.dumps(value, canonical=True)


def encode_ordered(value: dict[int, Cbor]) -> bytes:
    """The same for a map whose keys, and those of all maps inside, are in ascending order."""
    return cbor2.dumps(value)


def decode(wire: bytes, *, bytes_max: int = FRAME_BYTES_MAX) -> Cbor:
    """The value of `wire`, or RemoteProtocolError if it is not the one encoding of it."""
    if len(wire) > bytes_max:
        raise RemoteProtocolError(f"{len(wire)} bytes of CBOR; at most {bytes_max} are accepted")
    try:
        value = cbor2.loads(
            wire,
            max_depth=CBOR_DEPTH_MAX,
            allow_indefinite=False,
            semantic_decoders=_NO_TAGS,
        )
        _check(value, CBOR_DEPTH_MAX)
        # Keys are in order, so this is the deterministic encoding: cbor2 writes the shortest heads
        # in any case, and its canonical mode only sorts, for three times the price.
        again = cbor2.dumps(value)
    except RemoteProtocolError:
        raise
    except Exception as error:  # cbor2 has no common base for what bad input can make it raise
        raise RemoteProtocolError(f"not CBOR of the profile: {type(error).__name__}") from error
    if again != wire:
        raise RemoteProtocolError("CBOR is not in its deterministic encoding")
    return cast("Cbor", value)


def digest(payload: bytes) -> Digest:
    return Digest(hashlib.sha256(payload).digest())


def digest_of(value: Cbor) -> Digest:
    return digest(encode(value))


def _check(value: object, depth: int) -> None:
    """Types, ranges and the order of keys; what of this lies in a list or map is looked at there,
    because a call for each item would cost more than reading it."""
    kind = type(value)
    if kind is list:
        items: Iterable[object] = cast("list[object]", value)
    elif kind is dict:
        entries = cast("dict[object, object]", value)
        last = -1
        for key in entries:
            if type(key) is not int or not 0 <= key <= UINT_MAX:
                raise RemoteProtocolError("map key is not an unsigned integer")
            if key <= last:
                raise RemoteProtocolError("CBOR is not in its deterministic encoding")
            last = key
        items = entries.values()
    else:
        _check_plain(value)
        return
    if depth == 0:
        raise RemoteProtocolError("CBOR nested too deep")
    for item in items:
        kind = type(item)
        if kind is bytes or kind is str:
            continue
        if kind is list or kind is dict:
            _check(item, depth - 1)
        else:
            _check_plain(item)


def _check_plain(value: object) -> None:
    kind = type(value)
    if kind is int:
        if not _INT_MIN <= cast("int", value) <= UINT_MAX:
            raise RemoteProtocolError("integer outside 64 bits")
    elif kind is not bytes and kind is not str and value is not None:
        raise RemoteProtocolError(f"{kind.__name__} is outside the CBOR profile")
