"""Sealed objects as text files: what a person mails, commits or keeps in a home.

A file holds blocks, each a header line `TYP sha256:HEX` (the digest of the payload) and one line of
base64; empty lines and lines that start with `#` are skipped. A draft, which an account is asked to
sign, is a block whose typ starts with `draft:` and whose base64 is the bare payload.

Flow: `firstrun` and the CLI read and write these; the bytes inside are those that cross the wire.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import LocalResource, MeshError, UsageError, VerificationFailed
from ..protocol.codec import digest
from ..protocol.sealed import Sealed, unseal
from ..protocol.types import SEALED_BYTES_MAX, Digest

DRAFT: Final = "draft:"
BLOCKS_MAX: Final = 16
FILE_BYTES_MAX: Final = BLOCKS_MAX * (SEALED_BYTES_MAX * 4 // 3 + 256)


@dataclass(frozen=True, slots=True)
class Block:
    typ: str
    digest: Digest  # of the payload
    content: bytes  # the sealed bytes, or the bare payload of a draft


def block_of(sealed: Sealed) -> Block:
    return Block(sealed.typ, sealed.digest, sealed.wire)


def draft_of(typ: str, payload: bytes) -> Block:
    return Block(DRAFT + typ, digest(payload), payload)


def armor(blocks: list[Block], comment: str = "") -> str:
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    for block in blocks:
        lines.append(f"{block.typ} sha256:{block.digest.hex()}")
        lines.append(base64.b64encode(block.content).decode("ascii"))
    return "\n".join(lines) + "\n"


def read_blocks(text: str, where: str) -> list[Block]:
    """All blocks of `text`; what does not decode is named with its place."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or len(lines) % 2 or len(lines) > 2 * BLOCKS_MAX:
        raise UsageError(f"{where} is no file of mesh objects")
    blocks = []
    for header, body in zip(lines[::2], lines[1::2], strict=True):
        typ, _, name = header.partition(" sha256:")
        try:
            content = base64.b64decode(body, validate=True)
            named = Digest(bytes.fromhex(name))
        except (binascii.Error, ValueError):
            raise UsageError(f"{where} is no file of mesh objects") from None
        if typ.startswith(DRAFT) and digest(content) != named:
            raise VerificationFailed(f"{where}: the digest of the {typ} does not match")
        blocks.append(Block(typ, named, content))
    return blocks


def open_block(block: Block, typ: str, where: str) -> Sealed:
    """The sealed object of a block: typ, signature and digest hold."""
    if block.typ != typ:
        raise UsageError(f"{where} holds a {block.typ} where a {typ} belongs")
    try:
        sealed = unseal(block.content)
    except VerificationFailed as error:
        raise VerificationFailed(f"{where}: {error}") from None
    except MeshError as error:
        raise VerificationFailed(f"{where} is damaged: {error}") from None
    if sealed.typ != typ or sealed.digest != block.digest:
        raise VerificationFailed(f"{where}: header and content do not belong together")
    return sealed


def read_file(path: Path) -> list[Block]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise UsageError(f"{path} is no file of mesh objects")
    try:
        return read_blocks(content.decode("ascii"), str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no file of mesh objects") from None


def read_one(path: Path, typ: str) -> Sealed:
    blocks = read_file(path)
    if len(blocks) != 1:
        raise UsageError(f"{path} holds {len(blocks)} objects where one {typ} belongs")
    return open_block(blocks[0], typ, str(path))


def write_file(path: Path, blocks: list[Block], comment: str = "", mode: int = 0o644) -> None:
    """Whole or not at all, also over a power loss: what is replaced may be the only mandate."""
    content = armor(blocks, comment).encode("ascii")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LocalResource(f"{path} cannot be written: {error.strerror}") from None
