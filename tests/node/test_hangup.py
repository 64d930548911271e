"""Hanging up over real connections: in good order, refused to nobody, and in time for the next."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from meshnode.overlay import Overlay, mono_ms, open_overlay
from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.acceptances import NoAudit
from meshnode.protocol.events import FrameIn, PeerDown, PeerUp
from meshnode.protocol.node import Node
from meshnode.protocol.outbox import Restored
from meshnode.protocol.placement import AdvertPlacement
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import TAG_18
from meshnode.protocol.types import Limits, Now, Peer
from testnet.sim.counting import SmallRandom
from testnet.sim.site import EPOCH_MS, NETWORK, PROVIDE, REQUEST, identity_of

from .overlay_kit import MemoryChunks, config, connect, frame, frames, next_event, overlays, until

FEW = 8


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_queued_goes_out_first_and_both_may_dial_again(tmp_path: Path, first: int) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as pair:
            one, other = pair[first], pair[1 - first]  # whichever opens the stream
            await connect(one, other)
            said = [b"%d" % number + b"." * 10_000 for number in range(100)]
            for each in said:
                one.send(frame(other.peer, each))
            one.hang_up(other.peer)
            assert other.peer not in one.links, "a dial from now on is a new one"
            assert await frames(other, 100) == said
            for overlay, peer in ((one, other.peer), (other, one.peer)):
                assert (await next_event(overlay, PeerDown)).reason is Reason.PEER_DOWN
                assert peer not in overlay.links

    trio.run(main)


def test_a_dial_while_the_old_connection_ends_brings_a_new_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            for one, other in ((a, b), (b, a)):
                await connect(one, other)
                one.hang_up(other.peer)
                one.dial(other.peer, other.addrs)
                assert (await next_event(one, PeerUp)).peer == other.peer
                await until(lambda one=one, other=other: one.peer in other.links)  # type: ignore[misc]
                one.send(frame(other.peer, b"here"))
                assert await frames(other, 1) == [b"here"]

    trio.run(main)


class Center:
    """One machine on one real overlay; its disk is always ready."""

    def __init__(self, overlay: Overlay, number: int) -> None:
        identity, signer = identity_of(number, PROVIDE)
        self.overlay = overlay
        self.limits = replace(Limits(), peers_max=FEW)
        self.node = Node(
            identity,
            self.limits,
            signer,
            AdvertPlacement(),
            NoAudit(),
            SmallRandom("center"),
            Restored(),
        )
        self.most = 0

    async def run(self) -> None:
        self._carry(self.node.start(self._now()))
        self._feed(ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 7_200, 0))
        worker = ev.WorkerClass("cpu", "test", 4_096, 100_000, b"someclas")
        self._feed(ev.WorkerClasses((worker,), "0.0", (9, 10), 0, 1))
        while True:
            self._feed(await self.overlay.events.receive())
            self.most = max(self.most, len(self.node.peers))

    def _now(self) -> Now:
        return Now(mono_ms(), EPOCH_MS + 1_000)

    def _feed(self, event: ev.Event) -> None:
        self._carry(self.node.handle(event, self._now()))

    def _carry(self, effects: list[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send():
                    self.overlay.send(effect)
                case fx.Dial():
                    self.overlay.dial(effect.peer, effect.addrs)
                case fx.Block():
                    self.overlay.block(effect.peer, effect.until_mono_ms)
                case fx.Hangup():
                    self.overlay.hang_up(effect.peer)
                case fx.Persist():
                    self._feed(ev.Persisted(effect.seq))


async def served(peer: Overlay, center: Overlay, hello: bytes) -> None:
    """It calls, says hello, asks for terms with its mandate, and has an answer."""
    identity, _ = identity_of(number_of[peer.peer], REQUEST)
    peer.dial(center.peer, center.addrs)
    await next_event(peer, PeerUp)
    request = messages.TermsRequest(identity.mandate)
    peer.send(frame(center.peer, hello))
    peer.send(frame(center.peer, messages.pack(request)))
    await next_event(
        peer,
        FrameIn,
        lambda e: (
            not e.frame.startswith(TAG_18) and isinstance(messages.unpack(e.frame), messages.Terms)
        ),
    )


number_of: dict[Peer, int] = {}


def test_a_node_of_eight_connections_serves_twelve_peers_and_the_first_again(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            found = []
            for number in range(1, 14):
                settings = config(
                    "",
                    tmp_path,
                    peers_max=FEW if number == 1 else 512,
                )
                settings = replace(settings, key_seed=number.to_bytes(32, "big"))
                overlay = await stack.enter_async_context(open_overlay(settings, MemoryChunks()))
                number_of[overlay.peer] = number
                found.append(overlay)
            middle, *others = found
            async with trio.open_nursery() as nursery:
                center = Center(middle, 1)
                nursery.start_soon(center.run)
                hello = messages.pack(messages.Hello((1,), 0, NETWORK, None, 0, EPOCH_MS))
                for each in others:
                    await served(each, middle, hello)
                assert center.most == FEW
                first = others[0]
                assert (await next_event(first, PeerDown)).reason is Reason.PEER_DOWN
                await until(lambda: sum(middle.peer in each.links for each in others) == FEW)
                assert middle.counters["peers_refused"] == 0
                await served(first, middle, hello)
                assert first.peer in center.node.peers
                nursery.cancel_scope.cancel()

    trio.run(main)
