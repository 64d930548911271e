"""Whom this node has met and where: kept in the home, so that it finds them again by itself.

    hello of a peer > overlay.remember > Peerstore > peerstore.txt > OverlayConfig.met

A car that comes back from a crash may have receipts that nobody has accepted yet; their requester
is perhaps in no routing table, and has no reason to call. And who was started with one bootstrap
address finds its mesh though that is gone. Bitcoin Core's peers.dat and anchors.dat do the same.
What stands here is a hint: nothing depends on it, and a file that makes no sense is an empty one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from meshnode.protocol.effects import Notice
from meshnode.protocol.types import Peer

from .bulletin import field_of

PEERSTORE_FILE: Final = "peerstore.txt"
PAUSE_S: Final = 1.0
"""Peers come in groups; the file is written once for all of them."""
_BYTES_MAX: Final = 1 << 20

log = logging.getLogger("meshnode.node")


def read_peerstore(home: Path) -> tuple[str, ...]:
    """Multiaddrs ending in /p2p/ID, the newest first."""
    try:
        with (home / PEERSTORE_FILE).open("rb") as file:
            text = file.read(_BYTES_MAX).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(line for line in text.split("\n") if line)


class Peerstore:
    """Writes what the overlay knows when it has met somebody new."""

    def __init__(
        self,
        home: Path,
        met: Callable[[], tuple[str, ...]],
        remember: Callable[[Peer], None],
    ) -> None:
        self._home = home
        self._remember = remember
        self._met = met
        self._new = trio.Event()

    def heard(self, notice: Notice) -> None:
        """Of the node: who has said hello, and belongs to our network, is worth remembering."""
        if notice.kind == "peer_up":
            self._remember(field_of(notice, "peer"))

    def changed(self) -> None:
        self._new.set()

    async def run(self) -> None:
        """Task: at most one write a second, and none while nobody comes."""
        while True:
            await self._new.wait()
            await trio.sleep(PAUSE_S)
            self._new = trio.Event()
            try:
                await trio.to_thread.run_sync(self._write, self._met())
            except OSError as error:  # a full disk, perhaps: the next one that comes tries again
                log.warning("%s cannot be written: %s", self._home / PEERSTORE_FILE, error.strerror)

    def _write(self, met: tuple[str, ...]) -> None:
        """Thread. In one step: whoever reads it has the old one or the new one."""
        draft = self._home / f".{PEERSTORE_FILE}.new"
        draft.write_bytes("".join(f"{address}\n" for address in met).encode("ascii"))
        os.replace(draft, self._home / PEERSTORE_FILE)
