"""Everything of libp2p 0.8.1 that is changed for the whole process, in one place.

Before the first host. Only what no subclass can reach is patched here; the rest is overridden in
`swarm`, `gossip` and `host`. Each patch names the landmine it closes and what was measured. The
version is checked, because private names are touched.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import time
from collections import OrderedDict
from typing import Any, Final
from weakref import WeakKeyDictionary

from libp2p.kad_dht import kad_dht
from libp2p.network.connection import swarm_connection
from libp2p.pubsub import gossipsub, pubsub, rpc_queue
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.yamux import yamux

from meshnode.errors import LocalResource

from .config import KAD_PROTOCOL
from .express import ExpressStream
from .swarm import MeshConn, MeshYamux

LIBP2P_VERSION: Final = "0.8.1"
STOCK_KAD_PROTOCOL: Final = "/ipfs/kad/1.0.0"
PEER_QUEUE_RPCS: Final = 256
WINDOW_BYTES: Final = 1 << 20
RECORD_FRESH_S: Final = 1_800.0  # a quarter of the two hours for which a record is kept
RECORD_BUILT_S: Final = 5.0  # how late a new address of ours may reach peers this way
RECORDS_SEEN_MAX: Final = 4_096

_patched = False


class _Silent:
    """A logger that `SwarmConn` may call as it likes.

    It logs through the root logger (`logging.debug(...)`), so no level of a "libp2p" logger
    silences it; its messages are also built eagerly.
    """

    def _drop(self, *args: object, **kwargs: object) -> None:
        return None

    debug = info = warning = error = exception = critical = _drop


async def _batched_window_update(self: Any, *, bytes_read: int = 0) -> None:
    """Give credit back in halves of the window instead of after every read.

    Stock answers each read with a WINDOW_UPDATE: 1180 of them for 920 data frames. Batched, the
    round trip of 64 bytes on a long-lived stream went from 1.3-2.2 ms to 0.65 ms and a gossip
    delivery from 4.8 to 3.0 ms of CPU. The window is 1 MiB from the first update on; that takes
    autotuning away, so 1 MiB per round trip is the cap of one stream on a long fat link.
    """
    self._pending_recv_release += bytes_read
    if self._pending_recv_release < self.target_recv_window // 2:
        return
    credit, self._pending_recv_release = self._pending_recv_release, 0
    if self.target_recv_window < WINDOW_BYTES:
        credit += WINDOW_BYTES - self.target_recv_window
        self.target_recv_window = WINDOW_BYTES
    self.recv_window += credit
    await self.send_window_update(credit)


def patch_once() -> None:
    """Apply all process-wide patches; a second call does nothing."""
    global _patched
    if _patched:
        return
    version = importlib.metadata.version("libp2p")
    if version != LIBP2P_VERSION:
        raise LocalResource(
            f"libp2p {version} is installed, meshnode needs exactly {LIBP2P_VERSION}"
        )
    yamux.YamuxStream._auto_tune_and_send_window_update = (  # type: ignore[method-assign]
        _batched_window_update
    )
    # A single DATA frame may be as large as this before its body is read: 16 MiB stock.
    yamux.MAX_WINDOW_SIZE = WINDOW_BYTES
    # Looked up by name where a stream or connection is made; none of them can be injected.
    vars(yamux)["YamuxStream"] = ExpressStream
    vars(muxer_multistream)["Yamux"] = MeshYamux
    vars(swarm_connection)["SwarmConn"] = MeshConn
    vars(swarm_connection)["logging"] = _Silent()
    # Outgoing gossip of one peer: 32 stock, beyond which it is dropped without a word. A burst of
    # 60 messages lost half on the publisher's own side.
    queue_init: Any = rpc_queue.RpcQueue.__init__
    queue_init.__defaults__ = (PEER_QUEUE_RPCS, *queue_init.__defaults__[1:])
    _sender_records()
    _private_kad_prefix()
    _quiet()
    _patched = True


def _sender_records() -> None:
    """Every gossip RPC carries its sender's signed peer record: build it and check it once.

    Stock compares and serialises it for each message out and verifies its signature for each in,
    duplicates too: 1.1 ms of the 4.5 that a delivery cost.
    """
    consume = vars(pubsub)["maybe_consume_signed_record"]
    seen: OrderedDict[Any, tuple[bytes, float]] = OrderedDict()

    def consume_once(rpc: Any, host: Any, peer_id: Any) -> bool:
        record, now = bytes(rpc.senderRecord), time.monotonic()
        key = (id(host), peer_id)
        known = seen.get(key)
        if known is not None and known[0] == record and now - known[1] < RECORD_FRESH_S:
            return True
        if not consume(rpc, host, peer_id):
            return False
        if record:
            seen[key] = (record, now)
            if len(seen) > RECORDS_SEEN_MAX:
                seen.popitem(last=False)
        return True

    build = vars(gossipsub)["env_to_send_in_RPC"]
    built: WeakKeyDictionary[Any, tuple[bytes, float]] = WeakKeyDictionary()

    def build_once(host: Any) -> tuple[bytes, bool]:
        known, now = built.get(host), time.monotonic()
        if known is not None and now - known[1] < RECORD_BUILT_S:
            return known[0], False
        record, fresh = build(host)
        built[host] = (record, now)
        return record, fresh

    vars(pubsub)["maybe_consume_signed_record"] = consume_once
    vars(gossipsub)["maybe_consume_signed_record"] = consume_once
    vars(gossipsub)["env_to_send_in_RPC"] = build_once


def _private_kad_prefix() -> None:
    """KadDHT ignores its protocol_prefix; the constant is copied into every kad module."""
    for name, module in list(sys.modules.items()):
        if name.startswith("libp2p.") and vars(module).get("PROTOCOL_ID") == STOCK_KAD_PROTOCOL:
            vars(module)["PROTOCOL_ID"] = KAD_PROTOCOL
    if vars(kad_dht)["PROTOCOL_ID"] != KAD_PROTOCOL:
        raise LocalResource("the DHT of this libp2p cannot be given a prefix of its own")


def _quiet() -> None:
    """Eight hosts wrote 619 ERROR lines in seconds; what matters comes as events and counters."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    for noisy in ("multiaddr", "multiaddr.transforms", "multiaddr.codecs.cid"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
