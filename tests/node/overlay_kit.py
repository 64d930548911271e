"""Real overlays on 127.0.0.1 in one process, and the waiting that tests of them need."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from meshnode.overlay import Overlay, OverlayConfig, blob_id_of, chunks_of, open_overlay
from meshnode.protocol.effects import Send
from meshnode.protocol.events import Event, FrameIn
from meshnode.protocol.types import CHUNK_BYTES, BlobRef, Digest, Lane, Peer

E = TypeVar("E")
WAIT_S = 15.0


class MemoryChunks:
    """A chunk store of its own: dictionaries instead of files."""

    def __init__(self) -> None:
        self.manifests: dict[Digest, tuple[int, tuple[bytes, ...]]] = {}
        self.chunks: dict[tuple[Digest, int], bytes] = {}
        self.room = 1 << 40
        self.reads = 0
        self.on_read: Callable[[int], None] = lambda _: None

    def add(self, content: bytes) -> BlobRef:
        parts = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        digests = tuple(hashlib.sha256(part).digest() for part in parts)
        blob_id = blob_id_of(len(content), digests)
        self.manifests[blob_id] = (len(content), digests)
        self.chunks.update({(blob_id, index): part for index, part in enumerate(parts)})
        return BlobRef(blob_id, len(content))

    def content(self, ref: BlobRef) -> bytes:
        return b"".join(self.chunks[ref.blob_id, index] for index in range(chunks_of(ref.size)))

    def manifest(self, blob_id: Digest) -> tuple[int, tuple[bytes, ...]] | None:
        return self.manifests.get(blob_id)

    def missing(self, ref: BlobRef, first_chunk: int, count: int) -> list[int]:
        wanted = range(first_chunk, first_chunk + count)
        return [index for index in wanted if (ref.blob_id, index) not in self.chunks]

    def read_chunk(self, blob_id: Digest, index: int) -> bytes | None:
        self.reads += 1
        self.on_read(self.reads)
        return self.chunks.get((blob_id, index))

    def begin(self, ref: BlobRef, chunk_digests: tuple[bytes, ...]) -> None:
        self.manifests[ref.blob_id] = (ref.size, chunk_digests)

    def write_chunk(self, blob_id: Digest, index: int, chunk: bytes) -> None:
        self.room -= len(chunk)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        self.chunks[blob_id, index] = chunk


def config(name: str, lock_dir: Path, **changes: Any) -> OverlayConfig:
    seed = hashlib.sha256(name.encode()).digest()
    settings: dict[str, Any] = {"listen": ("/ip4/127.0.0.1/tcp/0",), "bootstrap": ()}
    return OverlayConfig(key_seed=seed, lock_dir=lock_dir, **(settings | changes))


@asynccontextmanager
async def overlays(names: str, lock_dir: Path, **changes: Any) -> AsyncIterator[list[Overlay]]:
    """One overlay per letter of `names`."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                open_overlay(config(name, lock_dir, **changes), MemoryChunks())
            )
            for name in names
        ]


async def next_event(
    overlay: Overlay, kind: type[E], matches: Callable[[E], bool] = lambda _: True
) -> E:
    """The next event of a kind; others on the way are dropped."""
    with trio.fail_after(WAIT_S):
        while True:
            event: Event = await overlay.events.receive()
            if isinstance(event, kind) and matches(event):
                return event


async def connect(one: Overlay, other: Overlay) -> None:
    """Both ends up, and what was said about it read.

    By state, not by event: the DHT's walk may have connected the two already.
    """
    one.dial(other.peer, other.addrs)
    await until(lambda: other.peer in one.links and one.peer in other.links)
    for overlay in (one, other):
        try:
            while True:
                overlay.events.receive_nowait()
        except trio.WouldBlock:
            pass


def frame(
    peer: Peer, body: bytes, send_id: int = 0, lane: Lane = Lane.CONTROL, **more: Any
) -> Send:
    return Send(send_id, peer, lane, body, **more)


async def frames(overlay: Overlay, count: int) -> list[bytes]:
    return [(await next_event(overlay, FrameIn)).frame for _ in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.01)


def listeners(overlay: Overlay, topic: str) -> int:
    """How many peers this overlay would send a message of the topic to."""
    pubsub = overlay.gossip.pubsub
    return len([peer for peer in pubsub.peer_topics.get(topic, ()) if peer in pubsub.peers])
