"""What an attack has to work with: a target, a hostile libp2p host, and honest witnesses.

The hostile host is the overlay's own host without its manners: raw streams, raw yamux frames.
The witnesses are honest overlays; whether the target still serves them decides the verdict.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from meshnode.overlay import Overlay, OverlayConfig, open_overlay
from meshnode.overlay.guard import ALL_GUARDS
from meshnode.overlay.hardening import patch_once
from meshnode.overlay.host import MeshHost, build_host, id_of
from meshnode.protocol.events import DialFailed, PeerDown, PeerUp, RttMeasured
from meshnode.protocol.types import Peer
from tests.node.overlay_kit import MemoryChunks

from .node import TOPIC

START_S = 40.0
PULSE_S = 6.0
FRESH_S = 7.0


@dataclass(frozen=True)
class Target:
    """A running node: anywhere, as long as it can be dialled."""

    addr: str  # without /p2p/
    peer: Peer

    @property
    def endpoint(self) -> tuple[str, int]:
        parts = self.addr.strip("/").split("/")
        return parts[1], int(parts[3])


class Watched(Protocol):
    """A target of this machine, which can be measured and asked."""

    topic: str

    @property
    def dead(self) -> bool: ...

    def rss_mb(self) -> float: ...

    def tell(self, **command: Any) -> None: ...

    async def ask(self, wanted: str, **command: Any) -> Any: ...


def rss_mb_of(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass
class OwnNode:
    """The target when it is ours: a child process that takes commands."""

    process: subprocess.Popen[str]
    topic: str = TOPIC
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def rss_mb(self) -> float:
        return rss_mb_of(self.process.pid)

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    async def ask(self, wanted: str, **command: Any) -> Any:
        """Send a command; the value of the next line that has the wanted field."""
        self.tell(**command)
        return await self.told(wanted)

    async def told(self, wanted: str) -> Any:
        with trio.fail_after(START_S):
            while True:
                line = await trio.to_thread.run_sync(
                    self.process.stdout.readline  # type: ignore[union-attr]
                )
                if not line:
                    raise EOFError("the node has ended")
                told = json.loads(line)
                self.lines.append(told)
                if wanted in told:
                    return told[wanted]


@asynccontextmanager
async def own_node(without: frozenset[str] = frozenset()) -> AsyncIterator[tuple[OwnNode, Target]]:
    """A node in a child process, without the named guards."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as lock_dir:
        command = [sys.executable, "-m", "tests.attack.node", "--lock-dir", lock_dir]
        with subprocess.Popen(  # noqa: ASYNC220 - read through a thread, ended below
            [*command, "--without", ",".join(sorted(without))],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                node = OwnNode(process)
                addr = (await node.told("addr")).partition("/p2p/")[0]
                yield node, Target(addr, Peer(bytes.fromhex(node.lines[-1]["peer"])))
            finally:
                process.kill()


def witness_config(lock_dir: Path, seed: bytes | None = None) -> OverlayConfig:
    return OverlayConfig(
        seed or os.urandom(32),
        ("/ip4/127.0.0.1/tcp/0",),
        (),
        lock_dir,
        dht_server=False,
        ping_interval_s=0.2,
        ping_timeout_s=PULSE_S,
    )


class Scene:
    """One attack on one target."""

    def __init__(
        self, target: Target, node: Watched | None, lock_dir: Path, stack: AsyncExitStack
    ) -> None:
        self.target = target
        self.node = node
        self.lock_dir = lock_dir
        self._stack = stack
        self._witness: Overlay | None = None

    @property
    def topic(self) -> str:
        """The gossip topic that the target has joined."""
        assert self.node is not None
        return self.node.topic

    async def hostile(self) -> MeshHost:
        """A host whose id is smaller than the target's, so that it may open control streams."""
        return await self._stack.enter_async_context(hostile_host(self.lock_dir, self.target.peer))

    async def assault(self, host: MeshHost | None = None) -> Any:
        """A handshaked connection of a hostile host to the target."""
        from multiaddr import Multiaddr

        host = host or await self.hostile()
        return await host.swarm.dial_fresh(id_of(self.target.peer), [Multiaddr(self.target.addr)])

    async def watch(self) -> None:
        """Put an honest peer in place before the attack begins."""
        witness = await self._stack.enter_async_context(
            open_overlay(witness_config(self.lock_dir), MemoryChunks())
        )
        witness.dial(self.target.peer, (self.target.addr,))
        with trio.fail_after(START_S):
            async for event in witness.events:
                if isinstance(event, PeerUp) and event.peer == self.target.peer:
                    break
        self._witness = witness

    async def pulse(self) -> bool:
        """Whether the target answers the honest peer that was there before."""
        assert self._witness is not None
        with suppress(trio.WouldBlock):
            while True:
                if isinstance(self._witness.events.receive_nowait(), PeerDown):
                    return False
        return await answers(self._witness, self.target.peer, PULSE_S)

    async def fresh(self) -> bool:
        """Whether a new honest peer gets in and is answered."""
        async with open_overlay(witness_config(self.lock_dir), MemoryChunks()) as newcomer:
            newcomer.dial(self.target.peer, (self.target.addr,))
            return await answers(newcomer, self.target.peer, FRESH_S)


async def answers(overlay: Overlay, peer: Peer, within_s: float) -> bool:
    with trio.move_on_after(within_s):
        async for event in overlay.events:
            if isinstance(event, RttMeasured) and event.peer == peer:
                return True
            if isinstance(event, (PeerDown, DialFailed)) and event.peer == peer:
                return False
    return False


@asynccontextmanager
async def hostile_host(lock_dir: Path, below: Peer) -> AsyncIterator[MeshHost]:
    from libp2p.tools.anyio_service import background_trio_service

    patch_once()
    while True:
        config = OverlayConfig(os.urandom(32), (), (), lock_dir)
        host = build_host(config, ALL_GUARDS, Counter())
        if host.get_id().to_bytes() < bytes(below):
            break
    async with background_trio_service(host.get_network()):
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.close_all(1.0)


@asynccontextmanager
async def scene(target: Target, node: Watched | None = None) -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory() as lock_dir:
        async with AsyncExitStack() as stack:
            yield Scene(target, node, Path(lock_dir), stack)
