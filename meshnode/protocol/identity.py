"""Who signs: node keys named by their libp2p peer id, account keys named by their public key.

The key is in the id, so no resolver is needed: a peer id is the identity multihash
`00 24 08 01 12 20` followed by the Ed25519 key (libp2p specs, peer-ids), an account is the bare
32-byte key. libp2p's own signatures over the same seed are identical to PyNaCl's, and no payload
of ours can be one of libp2p's: COSE's "Signature1" text separates them.
"""

from __future__ import annotations

from functools import lru_cache

import nacl.exceptions
import nacl.signing

from ..errors import RemoteProtocolError
from .types import PEER_BYTES, PEER_PREFIX, Account, Peer

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class KeySigner:
    """A signing key in memory; `peer` and `account` are two names of its public half."""

    def __init__(self, seed: bytes) -> None:
        self._key = nacl.signing.SigningKey(seed)
        public = bytes(self._key.verify_key)
        self.peer = Peer(PEER_PREFIX + public)
        self.account = Account(public)

    def sign(self, message: bytes, /) -> bytes:
        return self._key.sign(message).signature

    def __repr__(self) -> str:
        return f"<KeySigner {peer_text(self.peer)}>"


def public_key(kid: bytes) -> bytes:
    """The Ed25519 key in a `kid`: a peer id or an account."""
    if len(kid) == PEER_BYTES and kid.startswith(PEER_PREFIX):
        return kid[len(PEER_PREFIX) :]
    if len(kid) == 32:
        return kid
    raise RemoteProtocolError("key id is neither a peer id nor an account")


@lru_cache(maxsize=1024)
def _verify_key(kid: bytes) -> nacl.signing.VerifyKey:
    return nacl.signing.VerifyKey(public_key(kid))


def verify(kid: bytes, message: bytes, signature: bytes) -> bool:
    try:
        _verify_key(kid).verify(message, signature)
    except (nacl.exceptions.BadSignatureError, ValueError):
        return False
    return True


def peer_text(peer: Peer) -> str:
    """Base58 as libp2p prints it: `12D3KooW...`."""
    number, text = int.from_bytes(peer, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(peer) - len(peer.lstrip(b"\0"))) + text


def peer_of_text(text: str) -> Peer:
    """The inverse of `peer_text`; RemoteProtocolError if it is no Ed25519 peer id."""
    number = 0
    if not 0 < len(text) <= 64:
        raise RemoteProtocolError("not a peer id")
    for char in text:
        digit = _ALPHABET.find(char)
        if digit < 0:
            raise RemoteProtocolError("not a peer id")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    wire = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    if len(wire) != PEER_BYTES or not wire.startswith(PEER_PREFIX):
        raise RemoteProtocolError("not an Ed25519 peer id")
    return Peer(wire)


def short(ident: bytes) -> str:
    """For people: the last characters of a peer id, the first hex of anything else."""
    return peer_text(Peer(ident))[-8:] if len(ident) == PEER_BYTES else ident.hex()[:8]
