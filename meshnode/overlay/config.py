"""What an overlay is opened with: identity, addresses and every named bound.

First in the overlay's flow: `meshnode.node` fills one `OverlayConfig` and hands it to
`open_overlay`. Each bound says what it protects; none of them may be infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.protocol.types import FRAME_BYTES_MAX, GOSSIP_BYTES_MAX

CTL_PROTOCOL: Final = "/meshnode/ctl/1"
BLOB_PROTOCOL: Final = "/meshnode/blob/1"
KAD_PROTOCOL: Final = "/meshnode/kad/1.0.0"
GOSSIP_PROTOCOL: Final = "/meshsub/1.1.0"


@dataclass(frozen=True, slots=True)
class OverlayConfig:
    """Everything the overlay needs; frozen, so that no part can change another's bounds."""

    key_seed: bytes
    """32-byte Ed25519 seed of the node key."""
    listen: tuple[str, ...]
    """Multiaddrs with an explicit IP; 0.0.0.0 stands for every interface's own address."""
    bootstrap: tuple[str, ...]
    """Multiaddrs ending in /p2p/ID; redialled as long as the node is alone."""
    lock_dir: Path
    """Where port lock files live; the same for all nodes of a user on a machine."""
    dht_server: bool = True
    met: tuple[str, ...] = ()
    """Multiaddrs ending in /p2p/ID of peers met in an earlier life, the newest first; dialled when
    the machine asks for one of them, or when nobody of `bootstrap` answers."""

    # ---- peers and connections
    peers_max: int = 640
    """As the machine's own limit; a few more are let in, so that it can choose who goes."""
    connections_max: int = 768
    connections_per_peer_max: int = 3
    """More than one while two peers dial each other at the same moment."""
    half_open_max: int = 384
    """Inbound sockets that have not finished the handshake; beyond, the oldest goes."""
    half_open_per_ip_max: int = 256
    """A fleet behind one NAT, or a testnet on one machine, starts all at once."""
    upgrade_timeout_s: float = 4.0
    dial_timeout_s: float = 5.0
    dial_stagger_s: float = 0.1
    """Next address of a peer is tried this long after the last one, or at once if that failed."""
    dials_pending_max: int = 256
    link_timeout_s: float = 8.0
    """From a connection to a usable control stream."""
    close_timeout_s: float = 2.0

    # ---- streams
    streams_per_peer_max: int = 64
    """Inbound streams of one connection that live at once; more are reset."""
    negotiate_timeout_s: int = 5
    stream_window_bytes: int = 1 << 20
    conn_buffer_bytes_max: int = 8 << 20
    """Unread bytes of one connection, all streams together; more closes it."""

    # ---- control streams
    frame_bytes_max: int = FRAME_BYTES_MAX
    queue_frames_max: int = 1024
    """Per peer and lane."""
    queue_bytes_max: int = 4 << 20
    """Per peer and lane."""
    frame_timeout_s: float = 10.0
    """From the first byte of a frame to its last."""
    write_stall_s: float = 5.0
    """A peer that takes nothing for so long is dropped."""
    ping_interval_s: float = 5.0
    """How often each side of a control stream pings the other."""
    ping_timeout_s: float = 4.0
    """A silent peer is noticed within interval + timeout, 9 s."""
    frames_per_s_max: int = 20_000
    """Intake of one peer; beyond, its stream is read more slowly."""
    events_max: int = 1024

    # ---- gossip
    gossip_bytes_max: int = GOSSIP_BYTES_MAX
    gossip_topics_max: int = 64
    gossip_queue_max: int = 256
    """Messages of one topic that wait for the driver."""
    gossip_per_forwarder_per_s: float = 50.0
    """Intake of messages that one peer forwards; beyond, they are dropped."""
    gossip_per_forwarder_burst: float = 200.0
    gossip_per_source_per_s: float = 20.0
    """Intake of messages that one peer has signed; beyond, they are dropped."""
    gossip_per_source_burst: float = 60.0
    gossip_heartbeat_s: int = 1

    # ---- DHT
    provided_keys_max: int = 4096
    provider_records_max: int = 65_536
    dht_queries_max: int = 16
    dht_timeout_s: float = 15.0

    # ---- bulk
    blob_serves_max: int = 16
    """Blob streams served at once; one more is told busy."""
    blob_serves_per_peer_max: int = 4
    """The same, of one peer."""
    blob_holders_max: int = 4
    """Holders that one fetch reads from at once."""
    blob_stall_s: float = 4.0
    """A holder that sends nothing for so long is left for another."""

    def __post_init__(self) -> None:
        if len(self.key_seed) != 32:
            raise ValueError("key_seed must be 32 bytes")
