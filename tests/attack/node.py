"""The node under attack: an overlay in a process of its own, with all guards or with some removed.

`python -m tests.attack.node --lock-dir DIR [--without a,b]` prints its address as one JSON line
and then answers commands on stdin, one JSON object a line, until stdin ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import trio

from meshnode.overlay import Overlay, OverlayConfig
from meshnode.overlay.guard import ALL_GUARDS
from meshnode.overlay.overlay import open_with_guards
from meshnode.protocol.effects import Send
from meshnode.protocol.events import DialFailed, FrameIn, GossipIn, PeerUp
from meshnode.protocol.types import Lane, Peer
from tests.node.overlay_kit import MemoryChunks

TOPIC = "attack"
BOOM = "/attack/boom"
SLEEPY = "/attack/sleepy"


def say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def boom(stream: Any) -> None:
    """A handler with a bug, which any peer can reach."""
    raise ZeroDivisionError


async def sleepy(stream: Any) -> None:
    """A handler that is busy with something else and does not read for now."""
    await trio.sleep_forever()


async def serve_events(overlay: Overlay, heard: list[int]) -> None:
    """Echo every frame; count gossip; tell how dials went."""
    async for event in overlay.events:
        if isinstance(event, FrameIn):
            overlay.send(Send(0, event.peer, Lane.CONTROL, event.frame))
        elif isinstance(event, GossipIn):
            heard[0] += 1
        elif isinstance(event, PeerUp):
            say(up=event.peer.hex())
        elif isinstance(event, DialFailed):
            say(dial_failed=event.peer.hex())


async def serve_commands(overlay: Overlay, heard: list[int]) -> None:
    # Not through a thread: one that waits for a line keeps a dying process alive.
    pending = b""
    async for chunk in trio.lowlevel.FdStream(os.dup(0)):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if command["do"] == "dial":
                overlay.dial(Peer(bytes.fromhex(command["peer"])), command["addrs"])
            elif command["do"] == "heard":
                say(heard=heard[0])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock-dir", type=Path, required=True)
    parser.add_argument("--without", default="")
    args = parser.parse_args()
    removed = frozenset(filter(None, args.without.split(",")))
    if removed - ALL_GUARDS:
        raise SystemExit(f"no such guards: {sorted(removed - ALL_GUARDS)}")
    seed = hashlib.sha256(b"under attack").digest()
    config = OverlayConfig(seed, ("/ip4/127.0.0.1/tcp/0",), (), args.lock_dir)
    heard = [0]  # gossip messages
    async with open_with_guards(config, MemoryChunks(), ALL_GUARDS - removed) as overlay:
        host = overlay._host
        host.set_stream_handler(BOOM, boom)  # type: ignore[arg-type]
        host.set_stream_handler(SLEEPY, sleepy)  # type: ignore[arg-type]
        overlay.join(TOPIC)
        say(addr=overlay.addrs[0], peer=overlay.peer.hex())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_events, overlay, heard)
            await serve_commands(overlay, heard)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
