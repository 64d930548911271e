"""COSE_Sign1, closed to one algorithm and three header labels: the envelope of all that is signed.

`sealed = #6.18([protected, {}, payload, signature])` with `protected = {1: -19, 4: kid, 16: typ}`
(RFC 9052; -19 is the fully specified Ed25519 of RFC 9864; typ is label 16 of RFC 9596 and is the
domain separator). external_aad is empty. Everything else is refused, so an auditor in any language
needs Ed25519 and fifteen lines. An object is identified by the SHA-256 of its payload, never of
its envelope: a signature quirk cannot make a second id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from ..errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from .codec import decode, digest, encode_ordered
from .identity import verify
from .rule import decode_map, encode_map
from .types import SEALED_BYTES_MAX, Digest

TAG_18: Final = b"\xd2"  # major type 6, value 18: the first byte of every sealed object
ALG_ED25519: Final = -19
TYP_BYTES_MAX: Final = 32
_ALG, _KID, _TYP = 1, 4, 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sealed:
    """An envelope whose signature has been checked."""

    kid: bytes
    typ: str
    payload: bytes
    wire: bytes

    @property
    def digest(self) -> Digest:
        return digest(self.payload)

    def open(self, rule_class: type[T], typ: str) -> T:
        """The object inside, if it is a `typ`; signed objects refuse unknown keys."""
        if self.typ != typ:
            raise RemoteProtocolError(f"{self.typ} where {typ} belongs")
        return decode_map(rule_class, decode(self.payload), closed=True)


def seal(obj: Any, typ: str, kid: bytes, sign: Callable[[bytes], bytes]) -> Sealed:
    payload = encode_ordered(encode_map(obj))
    protected = _protected(kid, typ)
    signature = sign(_to_be_signed(protected, payload))
    wire = b"".join((TAG_18, b"\x84", _bstr(protected), b"\xa0", _bstr(payload), _bstr(signature)))
    if len(wire) > SEALED_BYTES_MAX:
        raise LocalProtocolError(f"a {typ} of {len(wire)} bytes")
    return Sealed(kid, typ, payload, wire)


def unseal(wire: bytes) -> Sealed:
    """Strict decode and signature check.

    Raises RemoteProtocolError for a wrong form and VerificationFailed for a wrong signature.
    """
    if len(wire) > SEALED_BYTES_MAX or not wire.startswith(TAG_18):
        raise RemoteProtocolError("not a sealed object")
    protected, payload, signature = _parts(wire)
    kid, typ = _header(protected)
    if len(signature) != 64 or not verify(kid, _to_be_signed(protected, payload), signature):
        raise VerificationFailed(f"the signature of a {typ} does not hold")
    return Sealed(kid, typ, payload, wire)


def _to_be_signed(protected: bytes, payload: bytes) -> bytes:
    # RFC 9052 section 4.4: Sig_structure = [context, body_protected, external_aad, payload]
    return b"\x84\x6aSignature1" + _bstr(protected) + b"\x40" + _bstr(payload)


# The envelope has one shape and so one encoding per content: written and read by hand it costs a
# tenth of the general codec (4 against 45 us), and every object on the wire pays it twice.


def _bstr(content: bytes) -> bytes:
    """A byte string in its shortest form (RFC 8949 section 4.2.1)."""
    size = len(content)
    if size < 24:
        return bytes((0x40 | size,)) + content
    if size < 0x100:
        return bytes((0x58, size)) + content
    if size < 0x10000:
        return b"\x59" + size.to_bytes(2, "big") + content
    raise LocalProtocolError(f"a byte string of {size} bytes in an envelope")


def _read_bstr(wire: bytes, at: int) -> tuple[bytes, int]:
    """The byte string at `at` and where it ends; only the shortest form is accepted."""
    head = wire[at]
    if 0x40 <= head < 0x58:
        start, size = at + 1, head - 0x40
    elif head == 0x58 and wire[at + 1] >= 24:
        start, size = at + 2, wire[at + 1]
    elif head == 0x59 and wire[at + 1] > 0:
        start, size = at + 3, int.from_bytes(wire[at + 1 : at + 3], "big")
    else:
        raise RemoteProtocolError("not a COSE_Sign1 of the profile")
    return wire[start : start + size], start + size


def _parts(wire: bytes) -> tuple[bytes, bytes, bytes]:
    """Protected header, payload and signature of `18([bstr, {}, bstr, bstr])`."""
    try:
        protected, at = _read_bstr(wire, 2)
        payload, then = _read_bstr(wire, at + 1)
        signature, end = _read_bstr(wire, then)
        whole = wire[1] == 0x84 and wire[at] == 0xA0 and end == len(wire)
    except IndexError:
        whole = False
    if not whole:
        raise RemoteProtocolError("not a COSE_Sign1 of the profile")
    return protected, payload, signature


@lru_cache(maxsize=1024)  # a peer says the same few headers all the time
def _header(protected: bytes) -> tuple[bytes, str]:
    """kid and typ of a protected header."""
    header = decode(protected)
    if type(header) is not dict or header.keys() != {_ALG, _KID, _TYP}:
        raise RemoteProtocolError("protected header has other labels than alg, kid, typ")
    kid, typ = header[_KID], header[_TYP]
    if (
        header[_ALG] != ALG_ED25519
        or type(kid) is not bytes
        or type(typ) is not str
        or len(typ) > TYP_BYTES_MAX
    ):
        raise RemoteProtocolError("protected header is not Ed25519 (-19) with kid and typ")
    return kid, typ


def _protected(kid: bytes, typ: str) -> bytes:
    """`{1: -19, 4: kid, 16: typ}`; a typ is short."""
    text = typ.encode()
    if len(text) > TYP_BYTES_MAX:
        raise LocalProtocolError(f"a typ of {len(text)} bytes")
    head = bytes((0x60 | len(text),)) if len(text) < 24 else bytes((0x78, len(text)))
    return b"".join((b"\xa3\x01\x32\x04", _bstr(kid), b"\x10", head, text))
