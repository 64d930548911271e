"""The private keys of a home: `node.key` speaks for this machine, `account.key` settles.

A key is its 32-byte Ed25519 seed in hex, in a file of mode 0600 that is made once and never
written again. Read by `firstrun` and by the node, which hands the seed to the overlay: libp2p's
peer id is the same key. Where the account key lives elsewhere there is no `account.key`.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from ..errors import LocalResource
from ..protocol.identity import KeySigner

NODE: Final = "node.key"
ACCOUNT: Final = "account.key"
SEED_BYTES: Final = 32


def make(home: Path, name: str, seed: bytes | None = None) -> KeySigner:
    """The key `name` of the home; made if it is missing, from `seed` (a testnet's) or at random."""
    found = read_seed(home, name)
    if found is None:
        found = seed or secrets.token_bytes(SEED_BYTES)
        _write(home / name, found)
    elif seed is not None and seed != found:
        raise LocalResource(f"{home / name} is another key than the one asked for")
    return KeySigner(found)


def load(home: Path, name: str) -> KeySigner:
    """The key; LocalResource if it is missing."""
    found = read_seed(home, name)
    if found is None:
        raise LocalResource(f"{home / name} is missing; restore it or make a new home")
    return KeySigner(found)


def find(home: Path, name: str) -> KeySigner | None:
    found = read_seed(home, name)
    return None if found is None else KeySigner(found)


def read_seed(home: Path, name: str) -> bytes | None:
    """The 32 bytes, or None if there is no such key. A file that others may read is refused."""
    path = home / name
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(2 * SEED_BYTES + 2)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LocalResource(f"{path} can be read by others; run: chmod 600 {path}")
    try:
        seed = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        seed = b""
    if len(seed) != SEED_BYTES:
        raise LocalResource(f"{path} is damaged: it is no key")
    return seed


def _write(path: Path, seed: bytes) -> None:
    # Written aside and linked: a crash leaves no half key, and a key that is there is never lost.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(seed.hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LocalResource(f"{path} cannot be written: {error.strerror}") from None
