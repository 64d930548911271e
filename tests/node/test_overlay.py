"""Two to four real overlays: connections, control streams, gossip, providers, ports, shutdown."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from meshnode.errors import LocalResource, UsageError
from meshnode.overlay import OverlayConfig, mono_ms, open_overlay
from meshnode.overlay.ports import expand_listen, interface_addresses
from meshnode.protocol.events import (
    DialFailed,
    Event,
    FrameIn,
    GossipIn,
    PeerDown,
    PeerUp,
    ProvidersFound,
    RttMeasured,
    SendFailed,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import FRAME_BYTES_MAX, GOSSIP_BYTES_MAX, Digest, Lane, Peer

from .overlay_kit import (
    WAIT_S,
    MemoryChunks,
    config,
    connect,
    frame,
    frames,
    listeners,
    next_event,
    overlays,
    until,
)


def test_frames_arrive_in_order_in_both_directions(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            a.dial(b.peer, b.addrs)
            up = await next_event(a, PeerUp)
            assert (up.peer, up.inbound, up.path) == (b.peer, False, "lan")
            assert b.addrs[0].startswith(up.addrs[0])
            up = await next_event(b, PeerUp)
            assert (up.peer, up.inbound) == (a.peer, True)
            ping = [f"a{index}".encode() * (1 + index % 50) for index in range(300)]
            pong = [f"b{index}".encode() * (1 + index % 50) for index in range(300)]
            for one, other in zip(ping, pong, strict=True):
                a.send(frame(b.peer, one))
                b.send(frame(a.peer, other))
            assert await frames(b, 300) == ping
            assert await frames(a, 300) == pong

    trio.run(main)


def test_largest_frame_passes_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            a.send(frame(b.peer, b"x" * (FRAME_BYTES_MAX + 1), 7))
            failed = await next_event(a, SendFailed)
            assert (failed.send_id, failed.reason) == (7, Reason.TOO_LARGE)
            a.send(frame(b.peer, b"x" * FRAME_BYTES_MAX))
            assert len((await frames(b, 1))[0]) == FRAME_BYTES_MAX

    trio.run(main)


def test_urgent_frames_overtake_queued_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            for index in range(100):
                a.send(frame(b.peer, b"m%d" % index + b"." * 4096, lane=Lane.MONEY))
            a.send(frame(b.peer, b"stop", lane=Lane.URGENT))
            arrived = await frames(b, 101)
            assert arrived.index(b"stop") < 5

    trio.run(main)


def test_frame_that_waited_too_long_is_not_sent(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            a.send(frame(b.peer, b"late", 3, expires_mono_ms=mono_ms() - 1))
            a.send(frame(b.peer, b"in time", 4, expires_mono_ms=mono_ms() + 60_000))
            failed = await next_event(a, SendFailed)
            assert (failed.send_id, failed.reason) == (3, Reason.DEADLINE)
            assert await frames(b, 1) == [b"in time"]

    trio.run(main)


def test_send_to_nobody_and_to_a_full_queue_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path, queue_frames_max=8) as (a, b):
            a.send(frame(b.peer, b"x", 1))
            failed = await next_event(a, SendFailed)
            assert (failed.send_id, failed.reason) == (1, Reason.PEER_DOWN)
            await connect(a, b)
            # No await between these: the writer cannot take any before the queue is full.
            for send_id in range(10, 20):
                a.send(frame(b.peer, b"y", send_id))
            refused = [await next_event(a, SendFailed) for _ in range(2)]
            assert [failed.send_id for failed in refused] == [18, 19]
            assert {failed.reason for failed in refused} == {Reason.QUEUE_FULL}
            assert len(await frames(b, 8)) == 8

    trio.run(main)


def test_many_small_frames_flow(tmp_path: Path) -> None:
    """In order, with 800 of them under way; measured 30,000-50,000 a second in one process."""
    count = 20_000

    async def main() -> None:
        async with overlays("ab", tmp_path, frames_per_s_max=1_000_000) as (a, b):
            await connect(a, b)
            seen = 0

            async def source() -> None:
                for index in range(count):
                    while index - seen > 800:  # noqa: ASYNC110 - the reader is the clock
                        await trio.sleep(0.001)
                    a.send(frame(b.peer, index.to_bytes(64, "big")))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(source)
                while seen < count:
                    arrived = await next_event(b, FrameIn)
                    assert int.from_bytes(arrived.frame, "big") == seen
                    seen += 1

    trio.run(main)


def test_round_trips_are_measured(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path, ping_interval_s=0.05) as (a, b):
            await connect(a, b)
            measured = [(await next_event(a, RttMeasured)).us for _ in range(5)]
            assert 50 < min(measured) < 50_000
            assert (await next_event(b, RttMeasured)).peer == a.peer

    trio.run(main)


def test_dial_of_nobody_fails_and_can_be_repeated_at_once(tmp_path: Path) -> None:
    """Stock refuses a peer for 60 s after one failed dial (L6)."""

    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            async with overlays("b", tmp_path) as (b,):
                addrs, peer = b.addrs, b.peer
            a.dial(peer, addrs)
            failed = await next_event(a, DialFailed)
            assert (failed.peer, failed.reason) == (peer, Reason.UNREACHABLE)
            async with overlays("b", tmp_path) as (b,):
                a.dial(peer, b.addrs)
                assert (await next_event(a, PeerUp)).peer == peer

    trio.run(main)


def test_dial_tries_all_addresses(tmp_path: Path) -> None:
    """Stock takes one address per transport; the first may be another network's."""

    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            a.dial(b.peer, ("/ip4/127.0.0.1/tcp/9", "nonsense", "/ip4/127.0.0.2/tcp/9", *b.addrs))
            assert (await next_event(a, PeerUp)).peer == b.peer

    trio.run(main)


def test_connect_is_quick(tmp_path: Path) -> None:
    """Stock waits 250 ms in every dial (L5); measured here 15 ms for both ends in one process."""

    async def main() -> None:
        async with overlays("abcd", tmp_path) as (a, *others):
            took_s = []
            for other in others:
                started_s = time.perf_counter()
                await connect(a, other)
                took_s.append(time.perf_counter() - started_s)
            assert min(took_s) < 0.2

    trio.run(main)


def test_simultaneous_dial_gives_one_link(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path, ping_interval_s=0.1) as (a, b):
            a.dial(b.peer, b.addrs)
            b.dial(a.peer, a.addrs)
            await next_event(a, PeerUp)
            await next_event(b, PeerUp)
            a.send(frame(b.peer, b"one"))
            assert await frames(b, 1) == [b"one"]
            # A second link would have shown as PeerDown and PeerUp by the third pulse.
            seen: list[Event] = []
            with trio.fail_after(WAIT_S):
                while sum(isinstance(event, RttMeasured) for event in seen) < 6:
                    seen.append(await a.events.receive())
            assert not [event for event in seen if isinstance(event, (PeerUp, PeerDown))]

    trio.run(main)


def test_close_is_noticed_at_once_and_exactly_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            async with overlays("b", tmp_path) as (b,):
                await connect(a, b)
                peer = b.peer
            down = await next_event(a, PeerDown)
            assert (down.peer, down.reason) == (peer, Reason.PEER_DOWN)
            a.send(frame(peer, b"x", 5))
            rest: list[Event] = []
            with trio.fail_after(WAIT_S):
                while not rest or not isinstance(rest[-1], SendFailed):
                    rest.append(await a.events.receive())
            assert not [event for event in rest if isinstance(event, PeerDown)]

    trio.run(main)


def test_peer_that_comes_back_with_its_key_is_up_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            for _ in range(3):
                async with overlays("b", tmp_path, bootstrap=a.addrs) as (b,):
                    await next_event(a, PeerUp)
                    await next_event(b, PeerUp)
                    b.send(frame(a.peer, b"hello"))
                    assert await frames(a, 1) == [b"hello"]
                await next_event(a, PeerDown)

    trio.run(main)


_CHILD = """
import sys, trio
from pathlib import Path
from tests.node.overlay_kit import config, MemoryChunks
from meshnode.overlay import open_overlay
async def main():
    settings = config("child", Path(sys.argv[1]), bootstrap=(sys.argv[2],))
    async with open_overlay(settings, MemoryChunks()):
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_death_of_a_process_is_noticed(tmp_path: Path, how: int) -> None:
    """A FIN at once; silence within ping interval and timeout, here 0.5 + 1 s.

    10 s for either: time for a slow machine, and far from TCP's own time-outs.
    """
    root = Path(__file__).parents[2]

    async def main() -> None:
        async with overlays("a", tmp_path, ping_interval_s=0.5, ping_timeout_s=1.0) as (a,):
            child = subprocess.Popen(  # noqa: ASYNC220 - it is signalled, not waited for
                [sys.executable, "-c", _CHILD, str(tmp_path), a.addrs[0]],
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root)},
            )
            try:
                with trio.fail_after(60):
                    while not isinstance(await a.events.receive(), PeerUp):
                        pass
                child.send_signal(how)
                started_s = time.monotonic()
                assert (await next_event(a, PeerDown)).reason == Reason.PEER_DOWN
                assert time.monotonic() - started_s < 10.0
            finally:
                child.kill()
                child.wait()

    trio.run(main)


def test_blocked_peer_is_dropped_and_refused_both_ways(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            a.block(b.peer, mono_ms() + 600_000)
            assert (await next_event(a, PeerDown)).reason == Reason.BLOCKED
            await next_event(b, PeerDown)
            a.dial(b.peer, b.addrs)
            assert (await next_event(a, DialFailed)).reason == Reason.BLOCKED
            b.dial(a.peer, a.addrs)
            assert (await next_event(b, DialFailed)).peer == a.peer
            assert a.counters["connections_refused"] >= 1
            a.block(b.peer, mono_ms())  # until now, that is no longer
            a.dial(b.peer, b.addrs)
            assert (await next_event(a, PeerUp)).peer == b.peer

    trio.run(main)


# ---- gossip


def test_gossip_reaches_all_who_joined(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("abcd", tmp_path) as nodes:
            a, b, c, d = nodes
            for one, other in ((a, b), (b, c), (c, d)):  # a chain: messages are forwarded
                await connect(one, other)
            for node in nodes[:3]:
                node.join("cell/x")
            await until(lambda: listeners(b, "cell/x") == 2 and listeners(a, "cell/x") == 1)
            a.publish("cell/x", b"advert")
            for node in (b, c):
                heard = await next_event(node, GossipIn)
                assert (heard.topic, heard.source, heard.frame) == ("cell/x", a.peer, b"advert")
            b.leave("cell/x")
            await until(lambda: listeners(a, "cell/x") == 0)
            assert "cell/x" not in b.gossip.pubsub.topic_ids

    trio.run(main)


def test_gossip_survives_a_restart_of_its_source(tmp_path: Path) -> None:
    """Stock counts sequence numbers in seconds: after a restart its messages are "seen"."""

    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            a.join("t")
            for turn in range(3):
                async with overlays("b", tmp_path) as (b,):
                    await connect(b, a)
                    b.join("t")
                    await until(lambda: listeners(b, "t") == 1)
                    for index in range(5):
                        b.publish("t", b"%d.%d" % (turn, index))
                        assert (await next_event(a, GossipIn)).frame == b"%d.%d" % (turn, index)

    trio.run(main)


def test_gossip_bounds_size_and_queue_and_counts_what_it_drops(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("ab", tmp_path, gossip_queue_max=4, events_max=1) as (a, b):
            await connect(a, b)
            a.join("t")
            b.join("t")
            await until(lambda: listeners(a, "t") == 1)
            a.publish("t", b"x" * (GOSSIP_BYTES_MAX + 1))
            assert a.counters["gossip_refused_size"] == 1
            for index in range(6):
                a.publish("t", b"%d" % index)  # four fit into the outbox
            assert a.counters["gossip_dropped_outbox"] == 2
            # b's driver reads nothing: one in its channel, one on the way, four wait.
            for index in range(6, 20):
                await until(lambda: not a.gossip._outbox)
                a.publish("t", b"%d" % index)
            await until(lambda: b.counters["gossip_dropped_queue"] > 0)
            last = b"0"
            while last != b"19":
                last = (await next_event(b, GossipIn)).frame

    trio.run(main)


def test_gossip_over_budget_is_refused_and_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays(
            "ab", tmp_path, gossip_per_source_per_s=1.0, gossip_per_source_burst=10.0
        ) as (a, b):
            await connect(a, b)
            a.join("t")
            b.join("t")
            await until(lambda: listeners(a, "t") == 1)
            for index in range(60):
                a.publish("t", b"%d" % index)
            await until(lambda: b.counters["gossip_refused_source"] >= 45)

    trio.run(main)


# ---- DHT


def test_provider_records_are_found_by_all(tmp_path: Path) -> None:
    key = Digest(b"k" * 32)

    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):  # noqa: SIM117 - the first is the bootstrap
            async with overlays("bcd", tmp_path, bootstrap=a.addrs) as (b, c, d):
                await until(lambda: all(n.dht.kad.routing_table.size() >= 2 for n in (a, b, c, d)))
                b.provide(key, 3600)
                c.provide(key, 3600)

                async def holders(node: object, query_id: int) -> set[Peer]:
                    node.find_providers(query_id, key)  # type: ignore[attr-defined]
                    found = await next_event(node, ProvidersFound)  # type: ignore[arg-type]
                    assert found.query_id == query_id
                    assert all(addrs for _, addrs in found.peers)
                    return {peer for peer, _ in found.peers}

                with trio.fail_after(WAIT_S):
                    query_id = 1
                    while await holders(d, query_id) != {b.peer, c.peer}:
                        query_id += 1
                # A provider itself must still learn of the others; stock stops at its own record.
                assert c.peer in await holders(b, 99)
                d.find_providers(100, Digest(b"n" * 32))
                assert (await next_event(d, ProvidersFound)).peers == ()

    trio.run(main)


def test_what_was_provided_alone_is_announced_when_peers_come(tmp_path: Path) -> None:
    key = Digest(b"k" * 32)

    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            a.provide(key, 3600)
            async with overlays("b", tmp_path, bootstrap=a.addrs) as (b,):
                await until(lambda: key in a.dht._announced)
                b.find_providers(1, key)
                found = await next_event(b, ProvidersFound)
                assert [peer for peer, _ in found.peers] == [a.peer]

    trio.run(main)


def test_dead_peer_leaves_the_routing_table(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            async with overlays("b", tmp_path, bootstrap=a.addrs):
                await until(lambda: a.dht.kad.routing_table.size() == 1)
            await next_event(a, PeerDown)
            await until(lambda: a.dht.kad.routing_table.size() == 0)

    trio.run(main)


# ---- ports, addresses, shutdown


def test_second_process_on_a_port_is_refused_with_one_line(tmp_path: Path) -> None:
    """libp2p binds with SO_REUSEPORT: the second would steal half of the dials (L11)."""

    async def main() -> None:
        async with overlays("a", tmp_path) as (a,):
            address = a.addrs[0].split("/p2p/")[0]
            for lock_dir in (tmp_path, tmp_path / "other"):  # by the lock, and without it
                with pytest.raises(LocalResource) as caught:
                    async with open_overlay(
                        config("b", lock_dir, listen=(address,)), MemoryChunks()
                    ):
                        raise AssertionError("two nodes on one port")
                assert "\n" not in str(caught.value)
                assert address.split("/")[-1] in str(caught.value)
        async with overlays("a", tmp_path, listen=(address,)) as (a,):  # free again
            assert a.addrs[0].startswith(address)

    trio.run(main)


def test_wildcard_stands_for_own_addresses(tmp_path: Path) -> None:
    assert "127.0.0.1" in interface_addresses()
    expanded = expand_listen(("/ip4/0.0.0.0/tcp/4001", "/ip4/127.0.0.1/tcp/4001"))
    assert expanded.count("/ip4/127.0.0.1/tcp/4001") == 1
    assert not [address for address in expanded if "0.0.0.0" in address]
    for bad in (
        "",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/1.2.3.4/tcp/70000",
    ):
        with pytest.raises(UsageError):
            expand_listen((bad,))

    async def main() -> None:
        async with overlays("a", tmp_path, listen=("/ip4/0.0.0.0/tcp/0",)) as (a,):
            assert a.addrs
            assert not [address for address in a.addrs if "0.0.0.0" in address]

    trio.run(main)


def test_bad_bootstrap_address_is_a_usage_error(tmp_path: Path) -> None:
    async def main() -> None:
        for bad in ("/ip4/127.0.0.1/tcp/1", "junk", "/ip4/127.0.0.1/tcp/1/p2p/junk"):
            with pytest.raises(UsageError):
                async with overlays("a", tmp_path, bootstrap=(bad,)):
                    pass

    trio.run(main)


def test_seed_must_be_32_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        OverlayConfig(b"short", (), (), tmp_path)


def test_error_in_the_scope_comes_out_as_it_is(tmp_path: Path) -> None:
    """Not wrapped into an ExceptionGroup per service (L15)."""

    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        trio.run(main)


def test_nothing_is_left_when_the_scope_ends(tmp_path: Path) -> None:
    """Tasks, sockets and locks: libp2p starts system tasks, which outlive what started them."""

    async def main() -> None:
        async with overlays("w", tmp_path) as (_,):
            pass  # first use opens what stays open: caches, the entropy pool
        gc.collect()
        tasks = trio.lowlevel.current_statistics().tasks_living
        files = _open_files()
        for _ in range(2):
            async with overlays("abc", tmp_path) as (a, b, c):
                await connect(a, b)
                await connect(b, c)
                await connect(a, c)
                a.join("t")
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
        gc.collect()
        await until(lambda: _open_files() <= files)

    trio.run(main)


def test_shutdown_with_peers_is_quick(tmp_path: Path) -> None:
    """Stock closes one connection after the other, 0.2 s each (L10); here 0.4 s for all eight."""

    async def main() -> None:
        async with overlays("abcdefgh", tmp_path) as (a, *others):
            async with overlays("z", tmp_path) as (z,):
                for other in (a, *others):
                    await connect(z, other)
                started_s = time.monotonic()
            assert time.monotonic() - started_s < 4.0

    trio.run(main)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
