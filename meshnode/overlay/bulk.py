"""Blobs: chunks of content between peers, from several holders at once, each chunk verified.

Under `overlay`; storage is the caller's. A blob's id is the SHA-256 of its manifest, so the first
thing fetched proves what every chunk must be: a holder that lies is found out at its first chunk
and left. Protocol `/meshnode/blob/1`, any number of requests on a stream:

    request   kind u8 (1 manifest, 2 chunks) | blob id 32 | first chunk u32 | count u32
    manifest  status u8 | size u64 | count u32 | count x chunk digest 32
    chunks    count x (status u8 | length u32 | bytes); the first status that is not 0 is the last

Status 0 is here, 1 not here, 2 busy. Integers are big-endian.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Final, Protocol

import cbor2
import trio
from libp2p.abc import INetStream

from meshnode.errors import MeshError
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import (
    BLOB_BYTES_MAX,
    CHUNK_BYTES,
    DIGEST_BYTES,
    BlobRef,
    Digest,
    Peer,
)

from .config import BLOB_PROTOCOL, OverlayConfig
from .guard import log
from .host import MeshHost, peer_of

MANIFEST: Final = 1
CHUNKS: Final = 2
HERE: Final = 0
NOT_HERE: Final = 1
BUSY: Final = 2
PIECE_BYTES: Final = 65_519 - 12
"""One yamux frame and one Noise packet; between two of them control frames get their turn."""
RUN_CHUNKS_MAX: Final = 4
"""Chunks of one request: enough to hide a round trip, few enough to share among holders."""
BUSY_PAUSE_S: Final = 0.1
BUSY_PAUSE_S_MAX: Final = 1.6
"""Before a busy holder is asked again; doubles, and ends with the fetch's deadline."""
REQUEST: Final = struct.Struct(">B32sII")
_MANIFEST_HEAD: Final = struct.Struct(">BQI")
_CHUNK_HEAD: Final = struct.Struct(">BI")


class BlobError(MeshError):
    """A blob could not be fetched."""

    reason: ClassVar[Reason] = Reason.BLOB_MISSING


class BlobMissing(BlobError):
    """No holder gave the blob."""

    exit_code = 7


class BlobCorrupt(BlobError):
    """Every holder gave bytes that do not match their digest."""

    reason = Reason.BLOB_CORRUPT
    exit_code = 5


class BlobLate(BlobError):
    """The deadline passed before the blob was here."""

    reason = Reason.DEADLINE
    exit_code = 4


class BlobDiskFull(BlobError):
    """The disk is full; the blob could not be kept."""

    reason = Reason.DISK_FULL
    exit_code = 8


class ChunkStore(Protocol):
    """Where blobs live. All methods are called from the trio thread and should be quick."""

    def manifest(self, blob_id: Digest) -> tuple[int, tuple[bytes, ...]] | None:
        """Size and chunk digests, if the manifest is known."""

    def missing(self, ref: BlobRef, first_chunk: int, count: int) -> list[int]:
        """Indices of [first_chunk, first_chunk + count) that are not here."""

    def read_chunk(self, blob_id: Digest, index: int) -> bytes | None: ...

    def begin(self, ref: BlobRef, chunk_digests: tuple[bytes, ...]) -> None:
        """Make room for a blob whose manifest has been verified."""

    def write_chunk(self, blob_id: Digest, index: int, chunk: bytes) -> None:
        """Keep a verified chunk; OSError if it cannot."""


def blob_id_of(size: int, chunk_digests: Sequence[bytes]) -> Digest:
    return Digest(hashlib.sha256(cbor2.dumps([size, list(chunk_digests)])).digest())


def chunks_of(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def _chunk_size(size: int, index: int) -> int:
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


class _Pipe:
    """Exact reads and bounded writes on a stream, with the stall bound on both."""

    def __init__(self, stream: INetStream, stall_s: float) -> None:
        self.stream = stream
        self._muxed: Any = stream.muxed_stream  # type: ignore[attr-defined]
        self._stall_s = stall_s
        self._buffer = bytearray()

    async def read(self, size: int, patience_s: float | None = None) -> bytes:
        """libp2p's own read_exactly gives up after 101 reads, 6.6 MB (L8)."""
        buffer = self._buffer
        while len(buffer) < size:
            with trio.fail_after(self._stall_s if patience_s is None else patience_s):
                chunk = await self._muxed.read(max(65_536, size - len(buffer)))
            if not chunk:
                raise EOFError
            buffer += chunk
        taken = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        return taken

    async def write(self, blob: bytes) -> None:
        for at in range(0, len(blob), PIECE_BYTES):
            with trio.fail_after(self._stall_s):
                await self._muxed.write(blob[at : at + PIECE_BYTES])


class BlobServer:
    """Gives what the store holds to whoever is connected; who may connect is decided elsewhere."""

    IDLE_S: Final = 30.0

    def __init__(self, host: MeshHost, config: OverlayConfig, chunks: ChunkStore) -> None:
        self._config = config
        self._chunks = chunks
        self._counters = host.counters
        self._serving: Counter[Peer | None] = Counter()
        host.set_stream_handler(BLOB_PROTOCOL, self._on_stream)  # type: ignore[arg-type]

    async def _on_stream(self, stream: INetStream) -> None:
        peer = peer_of(stream.muxed_conn.peer_id)
        busy = (
            self._serving.total() >= self._config.blob_serves_max
            or self._serving[peer] >= self._config.blob_serves_per_peer_max
        )
        self._serving[peer] += 1
        pipe = _Pipe(stream, self._config.blob_stall_s)
        try:
            while True:
                request = await pipe.read(REQUEST.size, self.IDLE_S)
                if busy:
                    self._counters["blob_busy"] += 1
                    await pipe.write(bytes((BUSY,)))
                    break
                await self._answer(pipe, *REQUEST.unpack(request))
        except (EOFError, trio.TooSlowError):
            pass
        except Exception as error:  # noqa: BLE001 - libp2p's stream errors have no base class
            log.debug("blob stream ended: %r", error)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
        await stream.close()

    async def _answer(self, pipe: _Pipe, kind: int, blob_id: bytes, first: int, count: int) -> None:
        manifest = self._chunks.manifest(Digest(blob_id))
        if manifest is None or kind not in (MANIFEST, CHUNKS):
            await pipe.write(bytes((NOT_HERE,)))
            return
        size, digests = manifest
        if kind == MANIFEST:
            head = _MANIFEST_HEAD.pack(HERE, size, len(digests))
            await pipe.write(head + b"".join(digests))
            return
        for index in range(first, first + min(count, RUN_CHUNKS_MAX)):
            chunk = None
            if index < len(digests):
                chunk = self._chunks.read_chunk(Digest(blob_id), index)
            if chunk is None:
                await pipe.write(bytes((NOT_HERE,)))
                return
            await pipe.write(_CHUNK_HEAD.pack(HERE, len(chunk)) + chunk)
            self._counters["blob_bytes_served"] += len(chunk)


class _Gone(Exception):
    """This holder does not have it, or not now."""


class _Busy(Exception):
    """This holder serves as many as it may; it has not said that it lacks the blob."""


class _Liar(Exception):
    """This holder's bytes do not match their digest."""


class _NoRoom(Exception):
    """The store could not keep a chunk: no holder can help."""


class Fetch:
    """One call of fetch_blob: a queue of missing chunks and a worker for each holder."""

    def __init__(
        self,
        open_stream: Callable[[Peer], Awaitable[INetStream]],
        config: OverlayConfig,
        chunks: ChunkStore,
        counters: Counter[str],
        ref: BlobRef,
    ) -> None:
        self._open_stream = open_stream
        self._config = config
        self._chunks = chunks
        self._counters = counters
        self._ref = ref
        self._queue: deque[int] = deque()
        self._in_work = 0
        self._moved = trio.Event()
        self._lied = False
        self._disk: str | None = None
        self._pause_s = BUSY_PAUSE_S
        self.bytes_fetched = 0

    async def run(
        self, first_byte: int, byte_count: int, holders: Sequence[Peer], deadline_mono_ms: int
    ) -> int:
        """Bytes that came over the network. Raises BlobError."""
        if not 0 <= self._ref.size <= BLOB_BYTES_MAX:
            raise BlobCorrupt
        first = max(0, first_byte) // CHUNK_BYTES
        last_byte = min(self._ref.size, first_byte + byte_count)
        count = max(0, chunks_of(last_byte) - first)
        left_s = deadline_mono_ms / 1000 - time.monotonic()
        with trio.move_on_after(max(0.0, left_s)) as scope:
            await self._fetch(first, count, tuple(dict.fromkeys(holders)))
        if scope.cancelled_caught and (
            self._chunks.manifest(self._ref.blob_id) is None
            or self._chunks.missing(self._ref, first, count)
        ):
            raise BlobLate
        return self.bytes_fetched

    async def _fetch(self, first: int, count: int, holders: tuple[Peer, ...]) -> None:
        waiting = deque(holders)
        if self._chunks.manifest(self._ref.blob_id) is None:
            await self._fetch_manifest(waiting)
        self._queue.extend(self._chunks.missing(self._ref, first, count))
        if not self._queue:
            return
        async with trio.open_nursery() as nursery:
            for _ in range(min(self._config.blob_holders_max, len(waiting))):
                nursery.start_soon(self._worker, waiting)
        if self._disk is not None:
            raise BlobDiskFull(f"the blob could not be kept: {self._disk}")
        if self._chunks.missing(self._ref, first, count):
            raise BlobCorrupt if self._lied else BlobMissing

    async def _fetch_manifest(self, waiting: deque[Peer]) -> None:
        """From the nearest holder that has it; one that lied about it is not asked again."""
        busy = True
        while busy:
            busy = False
            for holder in list(waiting):
                try:
                    pipe = await self._open(holder)
                    try:
                        digests = await self._read_manifest(pipe)
                    finally:
                        await _close(pipe)
                except _Liar:
                    self._lied = True
                    waiting.remove(holder)
                    continue
                except _Busy:
                    busy = True
                    continue
                except Exception as error:  # noqa: BLE001 - the next holder may do better
                    log.info("no manifest: %r", error)
                    continue
                self._begin(digests)
                return
            if busy:
                await self._pause()
        raise BlobCorrupt if self._lied else BlobMissing

    def _begin(self, digests: tuple[bytes, ...]) -> None:
        try:
            self._chunks.begin(self._ref, digests)
        except OSError as error:
            raise BlobDiskFull(f"the blob could not be kept: {error.strerror}") from None

    async def _pause(self) -> None:
        """Many cars that start on one job ask its submitter at once: most of them must wait."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, BUSY_PAUSE_S_MAX)
        await trio.sleep(pause_s)

    async def _read_manifest(self, pipe: _Pipe) -> tuple[bytes, ...]:
        await pipe.write(REQUEST.pack(MANIFEST, self._ref.blob_id, 0, 0))
        status = (await pipe.read(1))[0]
        if status != HERE:
            raise _Busy if status == BUSY else _Gone
        rest = await pipe.read(_MANIFEST_HEAD.size - 1)
        _, size, count = _MANIFEST_HEAD.unpack(b"\0" + rest)
        if size != self._ref.size or count != chunks_of(size):
            raise _Liar
        raw = await pipe.read(count * DIGEST_BYTES)
        digests = tuple(raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES))
        if blob_id_of(size, digests) != self._ref.blob_id:
            raise _Liar
        return digests

    # ---- workers

    async def _worker(self, waiting: deque[Peer]) -> None:
        """Serve from one holder until it fails, then from the next that nobody uses."""
        while self._unfinished() and waiting:
            holder = waiting.popleft()
            try:
                pipe = await self._open(holder)
                try:
                    await self._drain(pipe)
                finally:
                    await _close(pipe)
            except _Liar:
                self._lied = True
                self._counters["blob_liars"] += 1
                log.warning("a holder's chunk does not match its digest")
            except _Busy:
                await self._pause()
                waiting.append(holder)
            except _NoRoom as error:
                self._disk = str(error)
                self._queue.clear()
            except Exception as error:  # noqa: BLE001 - gone, slow or broken: the next holder
                log.info("holder left: %r", error)

    def _unfinished(self) -> bool:
        return bool(self._queue) or self._in_work > 0

    async def _drain(self, pipe: _Pipe) -> None:
        absent: set[int] = set()  # chunks that this holder does not have
        while True:
            run = self._take_run(absent)
            if not run:
                if not self._in_work:
                    return
                await self._moved.wait()  # a failing holder may give chunks back
                continue
            try:
                if not await self._read_run(pipe, run):
                    absent.add(run[0])
            finally:
                # What is left of the run goes back to the front, for whoever is next.
                if self._disk is None:
                    self._queue.extendleft(reversed(run))
                self._in_work -= 1
                self._moved.set()
                self._moved = trio.Event()

    def _take_run(self, absent: set[int]) -> list[int]:
        """Neighbouring chunks from the front of the queue, none of them absent."""
        at = next((at for at, index in enumerate(self._queue) if index not in absent), None)
        if at is None:
            return []
        share = max(1, min(RUN_CHUNKS_MAX, len(self._queue) // 4))
        run = [self._queue[at]]
        del self._queue[at]
        while (
            at < len(self._queue)
            and len(run) < share
            and self._queue[at] == run[-1] + 1
            and self._queue[at] not in absent
        ):
            run.append(self._queue[at])
            del self._queue[at]
        self._in_work += 1
        return run

    async def _read_run(self, pipe: _Pipe, run: list[int]) -> bool:
        """Chunks leave `run` as they are verified and kept; False if the first left is absent."""
        manifest = self._chunks.manifest(self._ref.blob_id)
        assert manifest is not None
        size, digests = manifest
        await pipe.write(REQUEST.pack(CHUNKS, self._ref.blob_id, run[0], len(run)))
        while run:
            status = (await pipe.read(1))[0]
            if status == NOT_HERE:
                return False
            if status != HERE:
                raise _Busy if status == BUSY else _Gone
            (length,) = struct.unpack(">I", await pipe.read(4))
            if length != _chunk_size(size, run[0]):
                raise _Liar
            chunk = await pipe.read(length)
            if hashlib.sha256(chunk).digest() != digests[run[0]]:
                raise _Liar
            try:
                self._chunks.write_chunk(self._ref.blob_id, run[0], chunk)
            except OSError as error:
                raise _NoRoom(error.strerror) from None
            self.bytes_fetched += length
            run.pop(0)
        return True

    async def _open(self, holder: Peer) -> _Pipe:
        with trio.fail_after(self._config.dial_timeout_s):
            stream = await self._open_stream(holder)
        return _Pipe(stream, self._config.blob_stall_s)


async def _close(pipe: _Pipe) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1.0):
        try:
            await pipe.stream.reset()
        except Exception as error:  # noqa: BLE001 - it is already gone
            log.debug("closing a blob stream: %r", error)
