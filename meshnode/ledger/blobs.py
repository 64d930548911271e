"""Blobs on disk: content-addressed, chunk by chunk, resumable, within a quota.

Between the overlay, which brings and serves chunks (it is the overlay's `ChunkStore`), and the
executor, which opens whole blobs for a worker to map. A blob is ONE contiguous file of raw bytes,
`ID.raw`, and beside it `ID.map`: its chunk digests and which chunks are here.

A chunk counts once its byte in the map is set, which happens after its bytes are written: that
survives a SIGKILL. Nothing is fsynced (100 MB would cost more than the network); instead the map
names the boot in which it was written, and what an earlier boot left is hashed again before it is
used. A power loss costs a second of hashing and never a wrong byte.

All methods may be called from any thread and block only for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cbor2

from meshnode.errors import VerificationFailed
from meshnode.protocol.types import BLOB_BYTES_MAX, CHUNK_BYTES, ArraySpec, BlobRef, Digest

from .blobmap import ABSENT, PRESENT, SUSPECT, BlobMap, chunk_bytes, chunks_of

if TYPE_CHECKING:
    import numpy

STORE_BYTES_MAX = 64 << 30  # default quota
TOUCH_S = 60.0  # a use is noted on disk at most so often; it orders eviction after a restart


def blob_id_of(size: int, chunk_digests: tuple[bytes, ...] | list[bytes]) -> Digest:
    return Digest(hashlib.sha256(cbor2.dumps([size, list(chunk_digests)])).digest())


class BlobStore:
    """Owns `folder`; the home's lock keeps a second process out of it."""

    def __init__(self, folder: Path, bytes_max: int = STORE_BYTES_MAX) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._lock = threading.RLock()
        self._maps: dict[Digest, BlobMap] = {}  # least recently used first
        self._pins: dict[Digest, int] = {}
        self._reserved = 0  # bytes of blobs that are being put
        self._touched_s: dict[Digest, float] = {}
        self._names = itertools.count()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._scan()

    # ---- the overlay's ChunkStore

    def manifest(self, blob_id: Digest) -> tuple[int, tuple[bytes, ...]] | None:
        """Size and chunk digests, if a blob of this id is here or has begun to arrive."""
        with self._lock:
            known = self._maps.get(blob_id)
            return None if known is None else (known.size, known.digests())

    def missing(self, ref: BlobRef, first_chunk: int, count: int) -> list[int]:
        """Chunks of [first_chunk, first_chunk + count) that are not here."""
        wanted = range(first_chunk, min(first_chunk + count, chunks_of(ref.size)))
        with self._lock:
            known = self._maps.get(ref.blob_id)
            if known is None:
                return list(wanted)
            return [i for i in wanted if i < known.count and not self._sound(known, i)]

    def read_chunk(self, blob_id: Digest, index: int) -> bytes | None:
        with self._lock:
            known = self._maps.get(blob_id)
            if known is None or not 0 <= index < known.count or not self._sound(known, index):
                return None
            self._touch(known)
            fd = os.open(self._raw(blob_id), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(fd, index * CHUNK_BYTES, chunk_bytes(known.size, index))
        finally:
            os.close(fd)

    def begin(self, ref: BlobRef, chunk_digests: tuple[bytes, ...]) -> None:
        """Make room for a blob; what is here of it stays. OSError (ENOSPC) if there is no room.

        VerificationFailed if the digests are not those of the id.
        """
        fits = 0 <= ref.size <= BLOB_BYTES_MAX and len(chunk_digests) == chunks_of(ref.size)
        if not fits or blob_id_of(ref.size, chunk_digests) != ref.blob_id:
            raise VerificationFailed("the chunk digests are not those of the blob")
        with self._lock:
            if ref.blob_id in self._maps:
                return
            self._make_room(ref.size)
            raw = self._raw(ref.blob_id)
            fd = os.open(raw, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, ref.size)
            finally:
                os.close(fd)
            self._add(ref, chunk_digests, ABSENT)

    def write_chunk(
        self, blob_id: Digest, index: int, chunk: bytes | memoryview, *, verified: bool = False
    ) -> None:
        """Keep a chunk. VerificationFailed if it is another one; OSError if the disk is full.

        `verified` says that the caller has hashed it against the manifest already.
        """
        with self._lock:
            known = self._maps.get(blob_id)
            if known is None:  # evicted while it was being fetched
                raise OSError(errno.ENOENT, "the blob is no longer in the store")
            if not 0 <= index < known.count or len(chunk) != chunk_bytes(known.size, index):
                raise VerificationFailed("the chunk has another size than the manifest says")
        if not verified and hashlib.sha256(chunk).digest() != known.digest(index):
            raise VerificationFailed("the chunk does not match its digest")
        with self._lock:
            if self._maps.get(blob_id) is not known:
                raise OSError(errno.ENOENT, "the blob is no longer in the store")
            for other in range(known.count) if known.suspects else ():
                self._sound(known, other)
            if known.chunks[index] == PRESENT:
                return
            fd = os.open(self._raw(blob_id), os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write(fd, index * CHUNK_BYTES, chunk)
            finally:
                os.close(fd)
            known.set(index, PRESENT)
            self._touch(known)

    # ---- the executor and the client

    def open_blob(self, blob_id: Digest, first_byte: int = 0, byte_count: int | None = None) -> int:
        """A read-only descriptor of the blob's file; the caller closes it. It outlives eviction.

        FileNotFoundError unless these bytes (all, if no count is given) are here: a car fetches of
        a stacked argument only what its run needs.
        """
        with self._lock:
            known = self._maps.get(blob_id)
            count = 0 if known is None else known.count
            end = count if byte_count is None else chunks_of(first_byte + byte_count)
            wanted = range(first_byte // CHUNK_BYTES, end)
            if known is None or end > count or not all(self._sound(known, i) for i in wanted):
                raise FileNotFoundError(errno.ENOENT, "the blob is not here", blob_id.hex())
            self._touch(known)
            return os.open(self._raw(blob_id), os.O_RDONLY | os.O_CLOEXEC)

    def read_range(self, blob_id: Digest, first_byte: int, byte_count: int) -> bytes | None:
        """These bytes, if all chunks that they lie in are here."""
        with self._lock:
            known = self._maps.get(blob_id)
            if known is None or not 0 <= first_byte <= first_byte + byte_count <= known.size:
                return None
            last = -(-(first_byte + byte_count) // CHUNK_BYTES)
            if not all(self._sound(known, i) for i in range(first_byte // CHUNK_BYTES, last)):
                return None
            self._touch(known)
            fd = os.open(self._raw(blob_id), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(fd, first_byte, byte_count)
        finally:
            os.close(fd)

    def held(self) -> tuple[Digest, ...]:
        """Blobs that are here whole, most recently used last."""
        with self._lock:
            return tuple(ident for ident, known in self._maps.items() if known.whole)

    @property
    def bytes_used(self) -> int:
        """What counts against the quota: full sizes, arriving blobs included."""
        with self._lock:
            return self._reserved + sum(known.size for known in self._maps.values())

    def pin(self, blob_id: Digest) -> None:
        """Not to be evicted until as many `unpin`; may come before the blob does."""
        with self._lock:
            self._pins[blob_id] = self._pins.get(blob_id, 0) + 1

    def unpin(self, blob_id: Digest) -> None:
        with self._lock:
            pins = self._pins.pop(blob_id, 0)
            if pins > 1:
                self._pins[blob_id] = pins - 1

    # ---- blobs of our own

    def put_bytes(self, content: bytes | bytearray | memoryview) -> BlobRef:
        flat = memoryview(content)
        flat = flat.cast("B") if flat.nbytes else memoryview(b"")
        pieces = (flat[at : at + CHUNK_BYTES] for at in range(0, len(flat), CHUNK_BYTES))
        return self._put(pieces, len(flat))

    def put_file(self, path: Path) -> BlobRef:
        """Copied chunk by chunk; what is hashed is what is kept, should the file change."""
        with path.open("rb", buffering=0) as source:
            size = os.fstat(source.fileno()).st_size
            return self._put(_pieces(source.fileno()), size)

    def put_open(self, fd: int, size: int) -> BlobRef:
        """The first `size` bytes of an open file, whoever else may write to it meanwhile."""
        return self._put(_pieces(fd, size), size)

    def put_array(self, array: numpy.ndarray[Any, Any]) -> tuple[BlobRef, ArraySpec]:
        """Raw little-endian C-order bytes, and what stands beside them."""
        import numpy

        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        ref = self.put_bytes(numpy.ascontiguousarray(little).reshape(-1).view("u1").data)
        return ref, ArraySpec(array.dtype.name, tuple(array.shape))

    def _put(self, pieces: Iterator[memoryview | bytes], size: int) -> BlobRef:
        with self._lock:
            self._make_room(size)
            self._reserved += size
        draft = self._folder / f"draft-{os.getpid()}-{next(self._names)}"
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                digests, written = [], 0
                for piece in pieces:
                    if written + len(piece) > BLOB_BYTES_MAX:
                        raise OSError(errno.EFBIG, f"a blob holds at most {BLOB_BYTES_MAX} bytes")
                    digests.append(hashlib.sha256(piece).digest())
                    _write(fd, written, piece)
                    written += len(piece)
            finally:
                os.close(fd)
            ref = BlobRef(blob_id_of(written, digests), written)
            with self._lock:
                known = self._maps.get(ref.blob_id)
                if known is None or not known.whole:
                    # A partial blob's file is replaced whole; its open readers keep the old one.
                    self._forget(ref.blob_id)
                    draft.replace(self._raw(ref.blob_id))
                    self._add(ref, tuple(digests), PRESENT)
                self._touch(self._maps[ref.blob_id])
            return ref
        finally:
            draft.unlink(missing_ok=True)
            with self._lock:
                self._reserved -= size

    # ---- the folder; under the lock

    def _raw(self, blob_id: Digest) -> Path:
        return self._folder / f"{blob_id.hex()}.raw"

    def _map(self, blob_id: Digest) -> Path:
        return self._folder / f"{blob_id.hex()}.map"

    def _scan(self) -> None:
        found = []
        for path in self._folder.glob("*.map"):
            known = BlobMap.load(path)
            raw = path.with_suffix(".raw")
            if (
                known is not None
                and path.stem == blob_id_of(known.size, known.digests()).hex()
                and raw.is_file()
                and raw.stat().st_size == known.size
            ):
                found.append((path.stat().st_mtime_ns, Digest(bytes.fromhex(path.stem)), known))
        self._maps = {ident: known for _, ident, known in sorted(found, key=lambda row: row[0])}
        keep = {path(ident) for ident in self._maps for path in (self._raw, self._map)}
        for path in self._folder.iterdir():
            # Drafts and halves: what a crash left between two steps.
            if path not in keep and (
                path.suffix in (".raw", ".map", ".new") or path.name.startswith("draft-")
            ):
                path.unlink(missing_ok=True)

    def _add(self, ref: BlobRef, digests: tuple[bytes, ...], state: int) -> None:
        try:
            self._maps[ref.blob_id] = BlobMap.create(
                self._map(ref.blob_id), ref.size, b"".join(digests), state
            )
        except OSError:
            self._raw(ref.blob_id).unlink(missing_ok=True)
            raise

    def _forget(self, blob_id: Digest) -> None:
        if self._maps.pop(blob_id, None) is not None:
            self._touched_s.pop(blob_id, None)
            self._map(blob_id).unlink(missing_ok=True)
            self._raw(blob_id).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Evict what nobody has pinned, least recently used first; all that is needed or none."""
        over = self.bytes_used + size - self._bytes_max
        victims = []
        for ident, known in self._maps.items():
            if over <= 0:
                break
            if ident not in self._pins:
                victims.append(ident)
                over -= known.size
        if over > 0:
            raise OSError(errno.ENOSPC, "the blob store's quota is used up")
        for ident in victims:
            self._forget(ident)

    def _touch(self, known: BlobMap) -> None:
        blob_id = Digest(bytes.fromhex(known.path.stem))
        if blob_id in self._maps:
            self._maps[blob_id] = self._maps.pop(blob_id)
        now_s = time.monotonic()
        if now_s - self._touched_s.get(blob_id, -TOUCH_S) >= TOUCH_S:
            self._touched_s[blob_id] = now_s
            with contextlib.suppress(OSError):
                os.utime(known.path)

    def _sound(self, known: BlobMap, index: int) -> bool:
        """The chunk is here; one that an earlier boot wrote is hashed first."""
        if known.chunks[index] != SUSPECT:
            return known.chunks[index] == PRESENT
        fd = os.open(known.path.with_suffix(".raw"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunk = _read(fd, index * CHUNK_BYTES, chunk_bytes(known.size, index))
        finally:
            os.close(fd)
        sound = hashlib.sha256(chunk).digest() == known.digest(index)
        known.set(index, PRESENT if sound else ABSENT)
        return sound


def _pieces(fd: int, size: int = BLOB_BYTES_MAX + 1) -> Iterator[bytes]:
    at = 0
    while piece := _read(fd, at, min(CHUNK_BYTES, size - at)):
        yield piece
        at += len(piece)


def _read(fd: int, at: int, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the file."""
    piece = os.pread(fd, count, at)
    if len(piece) in (0, count):
        return piece
    return piece + _read(fd, at + len(piece), count - len(piece))


def _write(fd: int, at: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk)
    while rest:
        done = os.pwrite(fd, rest, at)
        rest, at = rest[done:], at + done
