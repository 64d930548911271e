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
from typing import Any, Final, TypeVar, cast

from ..errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from .codec import decode, digest, encode
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
    payload = encode(encode_map(obj))
    protected = encode({_ALG: ALG_ED25519, _KID: kid, _TYP: typ})
    signature = sign(_to_be_signed(protected, payload))
    wire = TAG_18 + encode([protected, {}, payload, signature])
    if len(wire) > SEALED_BYTES_MAX:
        raise LocalProtocolError(f"a {typ} of {len(wire)} bytes")
    return Sealed(kid, typ, payload, wire)


def unseal(wire: bytes) -> Sealed:
    """Strict decode and signature check.

    Raises RemoteProtocolError for a wrong form and VerificationFailed for a wrong signature.
    """
    if len(wire) > SEALED_BYTES_MAX or not wire.startswith(TAG_18):
        raise RemoteProtocolError("not a sealed object")
    parts = decode(wire[1:], bytes_max=SEALED_BYTES_MAX)
    if type(parts) is not list or len(parts) != 4 or parts[1] != {}:
        raise RemoteProtocolError("not a COSE_Sign1 of the profile")
    protected, payload, signature = parts[0], parts[2], parts[3]
    if type(protected) is not bytes or type(payload) is not bytes or type(signature) is not bytes:
        raise RemoteProtocolError("not a COSE_Sign1 of the profile")
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
    if len(signature) != 64 or not verify(kid, _to_be_signed(protected, payload), signature):
        raise VerificationFailed(f"the signature of a {typ} does not hold")
    return Sealed(kid, typ, payload, wire)


def _to_be_signed(protected: bytes, payload: bytes) -> bytes:
    # RFC 9052 section 4.4: Sig_structure = [context, body_protected, external_aad, payload]
    return encode(cast("Any", ["Signature1", protected, b"", payload]))
