"""What is kept of whom a node has met: written once for many, read whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.node.peerstore import _BYTES_MAX, PAUSE_S, PEERSTORE_FILE, Peerstore, read_peerstore
from meshnode.protocol.effects import Notice
from meshnode.protocol.types import Peer

A = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWA"
B = "/ip6/2001:db8::1/tcp/4001/p2p/12D3KooWB"


def test_it_is_written_when_somebody_has_come_and_once_for_all_who_come(tmp_path: Path) -> None:
    met: list[str] = []
    asked = 0

    def tell() -> tuple[str, ...]:
        nonlocal asked
        asked += 1
        return tuple(met)

    async def main() -> None:
        written = trio.Event()

        class Told(Peerstore):
            """Says when the file is there."""

            def _write(self, met: tuple[str, ...]) -> None:
                super()._write(met)
                trio.from_thread.run_sync(written.set)

        store = Told(tmp_path, tell, lambda _: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            await trio.testing.wait_all_tasks_blocked()
            assert read_peerstore(tmp_path) == ()
            for each in (A, B):
                met.insert(0, each)
                store.changed()
            with trio.fail_after(30 * PAUSE_S):
                await written.wait()
            assert read_peerstore(tmp_path) == (B, A) and asked == 1
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_has_said_hello_is_remembered_and_nobody_else(tmp_path: Path) -> None:
    remembered: list[Peer] = []
    store = Peerstore(tmp_path, tuple, remembered.append)
    store.heard(Notice("other_network", (("peer", b"x"),)))
    store.heard(Notice("peer_up", (("peer", b"y"), ("path", "lan"))))
    assert remembered == [b"y"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\n\n\n", "/dns4/\u00fc.de".encode()])
def test_a_file_that_makes_no_sense_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PEERSTORE_FILE).write_bytes(content)
    assert read_peerstore(tmp_path) == ()


def test_no_more_of_it_is_read_than_a_node_writes(tmp_path: Path) -> None:
    (tmp_path / PEERSTORE_FILE).write_bytes(f"{A}\n".encode() * 100_000)
    assert sum(map(len, read_peerstore(tmp_path))) < _BYTES_MAX
