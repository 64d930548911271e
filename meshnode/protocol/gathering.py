"""What a lease needs before it can run: blobs from whoever holds them, inline inputs from its
requester.

`provider` starts it with a lease, and starts the run when nothing is missing any more.
"""

from __future__ import annotations

from collections import OrderedDict

from .advert import AdvertBook
from .effects import FetchBlob
from .events import BlobFailed, BlobReady
from .job import inline_size, input_root
from .lease import FETCH_MS_MAX, Granted
from .messages import Inputs
from .outbox import Outbox, remember
from .reasons import Reason
from .types import CHUNK_BYTES, BlobRef, Digest

CHUNKS_KNOWN_MAX = 1 << 16
HOLDERS_MAX = 8  # of a blob that are asked, its requester first


class Gathering:
    def __init__(self, outbox: Outbox, book: AdvertBook) -> None:
        self._out = outbox
        self._book = book
        self._by_fetch: dict[int, tuple[Granted, BlobRef, int, int]] = {}
        self._chunks: OrderedDict[tuple[Digest, int], None] = OrderedDict()  # that are here

    def begin(self, granted: Granted) -> None:
        job, run = granted.offer.job, granted.offer.run
        if job.code is not None:
            self._fetch(granted, job.code, 0, job.code.size)
        for arg in job.args:
            if arg.inline:
                continue
            unit = arg.size // job.units if arg.mapped else 0
            first = run.first * unit if arg.mapped else 0
            count = run.size * unit if arg.mapped else arg.size
            self._fetch(granted, BlobRef(arg.ident, arg.size), first, count)
        if granted.offer.state is not None:
            self._fetch(granted, granted.offer.state, 0, granted.offer.state.size)

    def _fetch(self, granted: Granted, ref: BlobRef, first: int, count: int) -> None:
        chunks = _chunks(first, count)
        if all((ref.blob_id, chunk) in self._chunks for chunk in chunks):
            return
        fetch_id = self._out.mint()
        granted.fetches.add(fetch_id)
        self._by_fetch[fetch_id] = (granted, ref, first, count)
        others = [p for p in self._book.holders(ref.blob_id[:8]) if p != self._out.identity.peer]
        holders = (granted.requester, *others[: HOLDERS_MAX - 1])
        deadline = self._out.now.mono_ms + FETCH_MS_MAX
        self._out.add(FetchBlob(ref, first, count, holders, deadline, fetch_id))

    def on_blob_ready(self, event: BlobReady) -> Granted | None:
        """The lease that it was for."""
        entry = self._by_fetch.pop(event.fetch_id, None)
        if entry is None:
            return None
        granted, ref, first, count = entry
        for chunk in _chunks(first, count):
            remember(self._chunks, (ref.blob_id, chunk), None, CHUNKS_KNOWN_MAX)
        granted.fetches.discard(event.fetch_id)
        granted.bytes_in += event.bytes_fetched
        return granted

    def on_blob_failed(self, event: BlobFailed) -> Granted | None:
        """The lease that it was for."""
        entry = self._by_fetch.pop(event.fetch_id, None)
        if entry is None:
            return None
        entry[0].fetches.discard(event.fetch_id)
        return entry[0]

    def take(self, granted: Granted, inputs: Inputs) -> Reason:
        """Its inline inputs, if they are those that the offer cites."""
        job, run = granted.offer.job, granted.offer.run
        root = input_root(job, granted.job_digest, inputs.values, run.first, run.size)
        if len(inputs.values) != inline_size(job, run.size) or root != granted.offer.input_root:
            return Reason.KERNEL_SPEC
        granted.inline = inputs.values
        granted.bytes_in += len(inputs.values)
        return Reason.OK

    def forget(self, granted: Granted) -> None:
        """It is over: what still comes for it is only kept."""
        for fetch_id in granted.fetches:
            self._by_fetch.pop(fetch_id, None)

    def lost(self) -> None:
        """The store has evicted something that we believed to have."""
        self._chunks.clear()


def _chunks(first: int, count: int) -> range:
    return range(first // CHUNK_BYTES, (first + max(count, 1) - 1) // CHUNK_BYTES + 1)
