"""The events' channel: order is kept when it is full, and nothing is lost."""

from __future__ import annotations

import trio

from meshnode.overlay.sink import EventSink
from meshnode.protocol.events import Event, PeerDown, PeerUp
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Peer


def test_order_is_kept_through_the_overflow() -> None:
    peer = Peer(bytes(38))

    async def main() -> None:
        sink = EventSink(2)
        emitted: list[Event] = []
        heard: list[Event] = []

        async def link() -> None:
            for turn in range(50):
                up = PeerUp(peer, "lan", (str(turn),), False)
                emitted.append(up)
                await sink.emit(up)
                down = PeerDown(peer, Reason.PEER_DOWN)
                emitted.append(down)
                sink.emit_now(down)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sink.forward)
            nursery.start_soon(link)
            with trio.fail_after(10):
                while len(heard) < 100:
                    await trio.lowlevel.checkpoint()
                    heard.append(await sink.receive.receive())
            nursery.cancel_scope.cancel()
        assert heard == emitted

    trio.run(main)
