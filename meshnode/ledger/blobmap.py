"""The map beside a blob's raw file: size, chunk digests, and which chunks are here.

Under `blobs`. One file, `ID.map`: magic 8 | boot id 16 | size u64 | digests 32 each | one byte for
each chunk. A chunk's byte is one write of one byte, so there is nothing that a crash could tear.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from meshnode.protocol.types import BLOB_BYTES_MAX, CHUNK_BYTES, DIGEST_BYTES

ABSENT = 0
PRESENT = 1
SUSPECT = 2  # written under an earlier boot: perhaps the page never reached the disk

_HEAD = struct.Struct(">8s16sQ")
_MAGIC = b"meshmap1"
_BOOT_AT = 8
_ON_DISK = bytes(16)  # instead of a boot id: every chunk was read back after a boot


def chunks_of(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def chunk_bytes(size: int, index: int) -> int:
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


@cache
def boot_id() -> bytes:
    """This boot of the kernel; where there is none to ask, this process, which is only slower."""
    try:
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError):
        return uuid.uuid4().bytes


@dataclass(slots=True)
class BlobMap:
    path: Path
    size: int
    joined: bytes  # all digests
    chunks: bytearray  # ABSENT, PRESENT or SUSPECT
    boot: bytes
    suspects: int = field(init=False)
    absent: int = field(init=False)

    def __post_init__(self) -> None:
        self.suspects = self.chunks.count(SUSPECT)
        self.absent = self.chunks.count(ABSENT)

    @classmethod
    def create(cls, path: Path, size: int, joined: bytes, state: int) -> BlobMap:
        chunks = bytearray([state]) * chunks_of(size)
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, boot_id(), size) + joined + chunks)
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        return cls(path, size, joined, chunks, boot_id())

    @classmethod
    def load(cls, path: Path) -> BlobMap | None:
        """None if the file is no whole map; the caller checks the digests against the id."""
        content = path.read_bytes()
        if len(content) < _HEAD.size:
            return None
        magic, boot, size = _HEAD.unpack_from(content)
        if magic != _MAGIC or size > BLOB_BYTES_MAX:
            return None
        count = chunks_of(size)
        if len(content) != _HEAD.size + count * (DIGEST_BYTES + 1):
            return None
        joined = content[_HEAD.size : _HEAD.size + count * DIGEST_BYTES]
        here = SUSPECT if boot not in (boot_id(), _ON_DISK) else PRESENT
        chunks = bytearray(here if byte == PRESENT else ABSENT for byte in content[-count:])
        return cls(path, size, joined, chunks if count else bytearray(), boot)

    @property
    def count(self) -> int:
        return len(self.chunks)

    @property
    def whole(self) -> bool:
        """Every chunk is here, suspect ones counted: they are hashed before they are used."""
        return self.absent == 0

    def digest(self, index: int) -> bytes:
        return self.joined[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def digests(self) -> tuple[bytes, ...]:
        return tuple(self.digest(index) for index in range(self.count))

    def set(self, index: int, state: int) -> None:
        """PRESENT after the chunk's bytes are written or read back; ABSENT if they are wrong."""
        before = self.chunks[index]
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if before == ABSENT and self.boot != boot_id():
                self._name_boot(fd, boot_id())
                os.fsync(fd)  # before the chunk's byte may reach the disk without it
            if not (before == SUSPECT and state == PRESENT):  # that byte stands already
                os.pwrite(fd, bytes((state,)), _HEAD.size + len(self.joined) + index)
            self.chunks[index] = state
            self.suspects -= before == SUSPECT
            self.absent += (state == ABSENT) - (before == ABSENT)
            if before == SUSPECT and not self.suspects:
                self._name_boot(fd, _ON_DISK)
        finally:
            os.close(fd)

    def _name_boot(self, fd: int, boot: bytes) -> None:
        os.pwrite(fd, boot, _BOOT_AT)
        self.boot = boot
