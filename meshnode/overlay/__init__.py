"""The overlay: libp2p behind one small interface, and the only importer of libp2p.

`open_overlay(config, chunks)` gives an `Overlay`: calls that never wait, events that come back.
Importing this package loads libp2p (0.4 s, 40 MB); `mesh --help` must not.
"""

from __future__ import annotations

from . import lean as _lean  # noqa: F401

# isort: split
# `lean` first: it decides how much of libp2p is loaded.
from .bulk import (
    BlobCorrupt,
    BlobDiskFull,
    BlobError,
    BlobLate,
    BlobMissing,
    ChunkStore,
    blob_id_of,
    chunks_of,
)
from .config import OverlayConfig
from .overlay import Overlay, open_overlay
from .streams import mono_ms

__all__ = [
    "BlobCorrupt",
    "BlobDiskFull",
    "BlobError",
    "BlobLate",
    "BlobMissing",
    "ChunkStore",
    "Overlay",
    "OverlayConfig",
    "blob_id_of",
    "chunks_of",
    "mono_ms",
    "open_overlay",
]
