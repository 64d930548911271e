"""Every attack that the research found, each as one function on a `Scene`.

An attack returns what it saw with its own eyes ("wedged", "breached") or None; whether the
target still lives and serves is judged afterwards by `trial`. `guards` are what must be removed
for it to succeed; an attack without any is one that libp2p itself survives, kept here so that it
stays so.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio

from meshnode.overlay import open_overlay
from meshnode.overlay.config import CTL_PROTOCOL, GOSSIP_PROTOCOL, KAD_PROTOCOL
from meshnode.overlay.guard import (
    DIAL,
    FRAME_BOUND,
    GOSSIP_BUDGET,
    HALF_OPEN,
    INBOUND_SLOT,
    NOISE_ONLY,
    PUSH_MSG,
    STREAM_HANDLER,
    WINDOW_BOUND,
)
from meshnode.overlay.host import MeshHost
from meshnode.protocol.types import FRAME_BYTES_MAX, GOSSIP_BYTES_MAX
from tests.node.overlay_kit import MemoryChunks

from .node import BOOM, SLEEPY
from .scene import Scene, answers, witness_config

MEMORY_MB: Final = 40.0
"""Growth of the target's resident memory that counts as a breach."""
FLOOD_BYTES: Final = 96 << 20
TAG_18: Final = b"\xd2"
"""How a signed object begins: a real node counts gossip that begins so and is none."""
MULTISTREAM: Final = b"\x13/multistream/1.0.0\n"
PULSES_UNHEARD: Final = 40
"""Pings that the target answers, and has heard of no message: it will hear of none."""
PULSES_STILL: Final = 10
"""Once it has heard of some, so many without another: it has heard of all that it will."""

Run = Callable[[Scene], Awaitable[str | None]]


@dataclass(frozen=True)
class Attack:
    run: Run
    guards: frozenset[str]
    measured: bool  # needs a node of this machine, to look at its memory or at what it heard
    hooks: bool  # needs the tests' own node
    slow: bool

    @property
    def name(self) -> str:
        return self.run.__name__


ATTACKS: Final[list[Attack]] = []


def attack(
    *guards: str, measured: bool = False, hooks: bool = False, slow: bool = False
) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        ATTACKS.append(Attack(run, frozenset(guards), measured or hooks, hooks, slow))
        return run

    return register


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


async def raw_stream(scene: Scene, opening: bytes) -> Any:
    """A yamux stream on a fresh hostile connection, with some bytes in it."""
    conn = await scene.assault()
    stream = await conn.new_stream()
    with suppress(Exception):
        await stream.muxed_stream.write(opening)
    await trio.sleep(0.3)  # the target reads; nothing is answered that could be waited for
    return stream


async def spoken(scene: Scene, protocol: str, body: bytes) -> Any:
    """As `raw_stream`, but after a proper negotiation of the protocol."""
    host = await scene.hostile()
    conn = await scene.assault(host)
    stream = await host.open_on(conn, protocol)
    with suppress(Exception):
        await stream.muxed_stream.write(body)  # type: ignore[attr-defined]
    await trio.sleep(0.3)
    return stream


# ---- one frame kills


@attack(STREAM_HANDLER)
async def protocol_name_not_utf8(scene: Scene) -> str | None:
    """L2a: UnicodeDecodeError in multistream, from any handshaked peer."""
    await raw_stream(scene, MULTISTREAM + b"\x05\xff\xfe\xfd\xfc\n")
    return None


@attack(STREAM_HANDLER)
async def gossip_rpc_not_protobuf(scene: Scene) -> str | None:
    """L2b: DecodeError in the pubsub stream handler."""
    await spoken(scene, GOSSIP_PROTOCOL, varint(20) + b"\xff" * 20)
    return None


@attack(STREAM_HANDLER, hooks=True)
async def handler_that_raises(scene: Scene) -> str | None:
    """L1: any exception in any stream handler ends the host."""
    await spoken(scene, BOOM, b"")
    return None


@attack(PUSH_MSG, GOSSIP_BUDGET, measured=True)
async def gossip_key_malformed(scene: Scene) -> str | None:
    """L2c: a message whose key is none raises in the signature check.

    Two guards stand in the way: a source that is no Ed25519 peer is refused before the check.
    """
    from libp2p.pubsub.pb import rpc_pb2

    message = rpc_pb2.Message(
        data=b"x", topicIDs=[scene.topic], from_id=b"\x12\x20" + bytes(32), seqno=bytes(8)
    )
    message.key = b"\xff\xff\xff"
    message.signature = bytes(64)
    rpc = rpc_pb2.RPC(publish=[message]).SerializeToString()
    await spoken(scene, GOSSIP_PROTOCOL, varint(len(rpc)) + rpc)
    return None


# ---- connections


@attack(INBOUND_SLOT, HALF_OPEN, slow=True)
async def inbound_slots_used_up(scene: Scene) -> str | None:
    """L3: after 250 inbound connections, all of them closed again, stock is deaf for ever."""
    entered = 0
    for _ in range(10):
        host = await scene.hostile()
        for _ in range(27):
            with suppress(Exception):
                conn = await scene.assault(host)
                entered += 1
                await conn.muxed_conn.abort()
    await trio.sleep(1.0)
    return None if entered > 250 and await scene.fresh() else "wedged"


@attack(INBOUND_SLOT, HALF_OPEN, slow=True)
async def idle_sockets(scene: Scene) -> str | None:
    """400 sockets that say nothing, from the address of the honest newcomer."""
    sockets = [await raw_socket(scene) for _ in range(400)]
    try:
        return None if await scene.fresh() else "wedged"
    finally:
        for sock in sockets:
            sock.close()


@attack()
async def half_handshakes(scene: Scene) -> str | None:
    """100 sockets that stop in the middle of the Noise handshake."""
    sockets = [await raw_socket(scene) for _ in range(100)]
    for sock in sockets:
        with suppress(OSError):
            sock.send(MULTISTREAM + b"\x07/noise\n" + b"\x00\x20" + os.urandom(20))
    try:
        return None if await scene.fresh() else "wedged"
    finally:
        for sock in sockets:
            sock.close()


@attack()
async def resets(scene: Scene) -> str | None:
    """200 connections cut with RST, half of them after some bytes."""
    for index in range(200):
        sock = await raw_socket(scene)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with suppress(OSError):
            if index % 2:
                sock.send(MULTISTREAM)
        sock.close()
    return None


@attack()
async def garbage_on_the_socket(scene: Scene) -> str | None:
    for index in range(60):
        sock = await raw_socket(scene)
        with suppress(OSError):
            sock.send(
                (os.urandom(2000), b"\xff" * 9 + b"\x01", b"GET / HTTP/1.1\r\n\r\n")[index % 3]
            )
        sock.close()
    return None


@attack(NOISE_ONLY)
async def plaintext_accepted(scene: Scene) -> str | None:
    """L4: stock's default host speaks /plaintext/2.0.0 and /secio/1.0.0 to who asks."""
    for protocol in (b"/plaintext/2.0.0\n", b"/secio/1.0.0\n", b"/tls/1.0.0\n"):
        stream = await trio.open_tcp_stream(*scene.target.endpoint)
        async with stream:
            await stream.send_all(MULTISTREAM + bytes([len(protocol)]) + protocol)
            heard = b""
            with trio.move_on_after(10.0), suppress(trio.BrokenResourceError):
                while b"\x03na\n" not in heard and protocol not in heard:
                    chunk = await stream.receive_some(4096)
                    if not chunk:
                        break
                    heard += chunk
            if protocol in heard:
                return "breached"
    return None


@attack(DIAL, hooks=True, slow=True)
async def failed_dial_remembered(scene: Scene) -> str | None:
    """L6: one failed dial, and a peer that is back is refused for a minute."""
    assert scene.node is not None
    seed = os.urandom(32)
    config = witness_config(scene.lock_dir, seed)
    async with open_overlay(config, MemoryChunks()) as friend:
        addrs, peer = [friend.addrs[0].partition("/p2p/")[0]], friend.peer
    asked = {"do": "dial", "peer": peer.hex(), "addrs": addrs}
    await scene.node.ask("dial_failed", **asked)
    back = witness_config(scene.lock_dir, seed)
    async with open_overlay(_listening(back, addrs[0]), MemoryChunks()) as friend:
        scene.node.tell(**asked)
        return None if await answers(friend, scene.target.peer, 5.0) else "wedged"


# ---- memory


@attack(WINDOW_BOUND, hooks=True)
async def window_ignored(scene: Scene) -> str | None:
    """Yamux's receive window is only logged about: 96 MB into a stream nobody reads."""
    host = await scene.hostile()
    conn = await scene.assault(host)
    stream: Any = await host.open_on(conn, SLEEPY)
    sid = stream.muxed_stream.stream_id
    return await flood(
        scene,
        lambda chunk: conn.muxed_conn._write_frame(
            struct.pack("!BBHII", 0, 0, 0, sid, len(chunk)) + chunk
        ),
    )


@attack(FRAME_BOUND, measured=True)
async def frame_without_end(scene: Scene) -> str | None:
    """A control frame that says it is 4 GB long, and then 96 MB of it."""
    stream = await spoken(scene, CTL_PROTOCOL, b"\xff\xff\xff\xff")
    return await flood(scene, stream.muxed_stream.write)


async def flood(scene: Scene, write: Callable[[bytes], Awaitable[None]]) -> str | None:
    assert scene.node is not None
    before = scene.node.rss_mb()
    sent = 0
    with trio.move_on_after(20.0), suppress(Exception):
        while sent < FLOOD_BYTES:
            await write(bytes(60_000))
            sent += 60_000
    await trio.sleep(0.5)
    if scene.node.dead:
        return None
    return "breached" if scene.node.rss_mb() - before > MEMORY_MB else None


# ---- control streams


@attack()
async def torn_frames(scene: Scene) -> str | None:
    """Frames that end in the middle, by FIN, by RST and by silence."""
    for how in ("close", "reset", "silence"):
        stream = await spoken(scene, CTL_PROTOCOL, (500).to_bytes(4, "big") + b"half")
        if how != "silence":
            await getattr(stream, how)()
    return None


@attack()
async def frame_over_the_bound(scene: Scene) -> str | None:
    await spoken(
        scene, CTL_PROTOCOL, (FRAME_BYTES_MAX + 1).to_bytes(4, "big") + bytes(FRAME_BYTES_MAX + 1)
    )
    return None


@attack()
async def echo_of_no_kind(scene: Scene) -> str | None:
    await spoken(scene, CTL_PROTOCOL, bytes(4) + b"\x09" + bytes(8))
    return None


@attack()
async def slow_reader(scene: Scene) -> str | None:
    """L7: asks for much and reads nothing; the target's queue and buffers must stay bounded."""
    stream = await spoken(scene, CTL_PROTOCOL, b"")
    question = (4096).to_bytes(4, "big") + bytes(4096)
    with trio.move_on_after(8.0), suppress(Exception):
        for _ in range(5_000):
            # Written past our own window as well, so that only the target's patience limits it.
            await stream.muxed_stream.write(question)
    return None if await scene.pulse() else "wedged"


@attack()
async def frame_flood(scene: Scene) -> str | None:
    """Small frames as fast as they go, until others have been served fifteen times."""
    stream = await spoken(scene, CTL_PROTOCOL, b"")
    small = (1).to_bytes(4, "big") + b"x"
    served: list[bool] = []

    async def drain() -> None:
        with suppress(Exception):
            while True:
                await stream.muxed_stream.read(65_536)

    async def flood() -> None:
        with suppress(Exception):
            while True:
                await stream.muxed_stream.write(small * 2_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        nursery.start_soon(flood)
        while len(served) < 15 and all(served):  # about three seconds: a ping is due every 0.2 s
            served.append(await scene.pulse())
        nursery.cancel_scope.cancel()
    return None if all(served) else "wedged"


@attack()
async def stream_flood(scene: Scene) -> str | None:
    """2,000 streams on one connection, none of which says what it wants."""
    conn = await scene.assault()
    muxed = conn.muxed_conn
    with trio.move_on_after(10.0), suppress(Exception):
        for index in range(2_000):
            await muxed._write_frame(struct.pack("!BBHII", 0, 1, 1, 1001 + 2 * index, 0))
    return None if await scene.pulse() else "wedged"


@attack()
async def yamux_garbage(scene: Scene) -> str | None:
    for body in (os.urandom(4096), b"\x00" * 4096, b"\x00\x00\x00\x01" + b"\xff" * 8):
        conn = await scene.assault()
        with suppress(Exception):
            await conn.muxed_conn._write_frame(body)
        await trio.sleep(0.2)
    return None


@attack()
async def protocol_garbage(scene: Scene) -> str | None:
    """Identify, identify push, ping and Kademlia with bytes that are none."""
    for protocol in ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0", KAD_PROTOCOL):
        for body in (varint(1 << 40), varint(64) + os.urandom(64), b"\xff" * 64):
            with suppress(Exception):
                await spoken(scene, protocol, body)
    return None


# ---- gossip


@attack(GOSSIP_BUDGET, measured=True)
async def gossip_flood(scene: Scene) -> str | None:
    """3,000 properly signed messages at once from one peer."""
    heard = await gossip(scene, [TAG_18 + b"%d" % index for index in range(3_000)])
    if heard == 0:
        return "missed"  # not the topic of the target: nothing would be shown
    return "breached" if heard > 1_000 else None


@attack(GOSSIP_BUDGET, measured=True)
async def gossip_oversize(scene: Scene) -> str | None:
    heard = await gossip(scene, [TAG_18 + bytes(GOSSIP_BYTES_MAX)])
    return "breached" if heard else None


async def gossip(scene: Scene, bodies: list[bytes]) -> int:
    """Signed messages on the target's topic; how many of them reached the target's driver."""
    assert scene.node is not None
    from libp2p.pubsub.pb import rpc_pb2
    from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX

    before = await scene.node.ask("heard", do="heard")
    host: MeshHost = await scene.hostile()
    conn = await scene.assault(host)
    stream: Any = await host.open_on(conn, GOSSIP_PROTOCOL)
    with trio.move_on_after(15.0), suppress(Exception):
        for index, body in enumerate(bodies):
            message = rpc_pb2.Message(
                data=body,
                topicIDs=[scene.topic],
                from_id=host.get_id().to_bytes(),
                seqno=index.to_bytes(8, "big"),
            )
            signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
            message.signature = host.get_private_key().sign(signed)
            message.key = host.get_public_key().serialize()
            rpc = rpc_pb2.RPC(publish=[message]).SerializeToString()
            await stream.muxed_stream.write(varint(len(rpc)) + rpc)
    heard, still = before, 0
    # Counted in the target's own answers: a slow machine takes longer over both.
    while still < (PULSES_UNHEARD if heard == before else PULSES_STILL):
        await scene.pulse()
        now = await scene.node.ask("heard", do="heard")
        still = still + 1 if now == heard else 0
        heard = now
    return int(heard - before)


# ---- small tools


async def raw_socket(scene: Scene) -> socket.socket:
    """A connected socket and nothing more; a few at a time, the backlog is 128."""
    sock = socket.socket()
    sock.settimeout(15.0)
    await trio.to_thread.run_sync(sock.connect, scene.target.endpoint)
    sock.setblocking(False)
    return sock


def _listening(config: Any, addr: str) -> Any:
    import dataclasses

    return dataclasses.replace(config, listen=(addr,))
