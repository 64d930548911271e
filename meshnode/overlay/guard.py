"""The guards: what stands between a stranger's bytes and this process, each one by name.

`hardening`, `swarm`, `gossip` and `host` ask for their guard by the names below. The product
always runs with `ALL_GUARDS`; tests/attack takes one away at a time and shows that the attack
then works. Here are also the small mechanisms the guards are made of.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

import trio

NOISE_ONLY: Final = "noise_only"  # stock accepts /plaintext/2.0.0 and /secio/1.0.0
STREAM_HANDLER: Final = "stream_handler"  # stock: an exception in a handler ends the process
PUSH_MSG: Final = "push_msg"  # stock: a bad key in a gossip message ends the process
INBOUND_SLOT: Final = "inbound_slot"  # stock: deaf after 250 inbound connections, ever
HALF_OPEN: Final = "half_open"  # stock: idle sockets hold all slots until a 10 s timeout
DIAL: Final = "dial"  # stock: 250 ms a dial, one address a peer, 60 s of refusal after a failure
WINDOW_BOUND: Final = "window_bound"  # stock: the receive window is logged, never enforced
FRAME_BOUND: Final = "frame_bound"  # a length prefix is believed only up to FRAME_BYTES_MAX
GOSSIP_BUDGET: Final = "gossip_budget"  # intake per forwarder and source, and size

ALL_GUARDS: Final = frozenset(
    {
        NOISE_ONLY,
        STREAM_HANDLER,
        PUSH_MSG,
        INBOUND_SLOT,
        HALF_OPEN,
        DIAL,
        WINDOW_BOUND,
        FRAME_BOUND,
        GOSSIP_BUDGET,
    }
)

log = logging.getLogger("meshnode.overlay")


def contained(
    function: Callable[..., Awaitable[object]], counters: Counter[str], name: str
) -> Callable[..., Awaitable[None]]:
    """`function`, whose failure is counted and goes no further.

    A stranger's bytes decide whether these functions raise, and libp2p runs them in the nursery
    of the whole host: any exception there is the end of the process.
    """

    async def run(*args: object) -> None:
        try:
            await function(*args)
        except Exception as error:  # noqa: BLE001 - that is the purpose
            counters[f"contained_{name}"] += 1
            log.info("%s failed: %r", name, error)

    return run


class Budget:
    """A token bucket per key; keys that have been full again for long are forgotten."""

    def __init__(self, per_s: float, burst: float, keys_max: int = 4096) -> None:
        self._per_s = per_s
        self._burst = burst
        self._keys_max = keys_max
        self._level: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, key: bytes, now_s: float | None = None) -> bool:
        now = time.monotonic() if now_s is None else now_s
        level, then = self._level.pop(key, (self._burst, now))
        level = min(self._burst, level + (now - then) * self._per_s)
        allowed = level >= 1.0
        self._level[key] = (level - 1.0 if allowed else level, now)
        while len(self._level) > self._keys_max:
            self._level.popitem(last=False)
        return allowed


class HalfOpenGate:
    """Inbound sockets between accept and the end of the handshake.

    At a bound the oldest goes, not the newest: an honest handshake takes 10-20 ms, so an attacker
    would have to open a socket every fraction of a millisecond, for ever, to push it out, and an
    idle socket costs nobody anything. Refusing the newest is what locked stock libp2p.
    """

    def __init__(self, total_max: int, per_ip_max: int, counters: Counter[str]) -> None:
        self._total_max = total_max
        self._per_ip_max = per_ip_max
        self._counters = counters
        self._open: dict[str, OrderedDict[int, trio.CancelScope]] = {}
        self._total = 0

    def enter(self, ip: str) -> trio.CancelScope:
        mine = self._open.setdefault(ip, OrderedDict())
        if len(mine) >= self._per_ip_max:
            self._evict(ip)
        elif self._total >= self._total_max:
            self._evict(max(self._open, key=lambda other: len(self._open[other])))
        scope = trio.CancelScope()
        # An eviction may have emptied and dropped the address's own table.
        self._open.setdefault(ip, OrderedDict())[id(scope)] = scope
        self._total += 1
        return scope

    def leave(self, ip: str, scope: trio.CancelScope) -> None:
        scopes = self._open.get(ip)
        if scopes is not None and scopes.pop(id(scope), None) is not None:
            self._total -= 1
            if not scopes:
                del self._open[ip]

    def __len__(self) -> int:
        return self._total

    def _evict(self, ip: str) -> None:
        _, scope = next(iter(self._open[ip].items()))
        self.leave(ip, scope)
        scope.cancel()
        self._counters["half_open_evicted"] += 1


class WindowExceeded(trio.TooSlowError):
    """A peer sent more than the window it was given.

    A subclass of TooSlowError because that is the one exception on which yamux's read loop closes
    the connection instead of going on (libp2p 0.8.1, Yamux.handle_incoming).
    """


class _BoundedBuffer(bytearray):
    """A stream's receive buffer that refuses to grow past the window the peer was given."""

    table: BoundedBuffers

    def extend(self, chunk: bytes) -> None:  # type: ignore[override]
        if len(self) + len(chunk) > self.table.stream_bytes_max:
            raise WindowExceeded("a stream is over its window")
        super().extend(chunk)
        # The sum is taken only when this stream alone is large enough to matter.
        if len(self) > 65_536 and sum(map(len, self.table.values())) > self.table.conn_bytes_max:
            raise WindowExceeded("a connection buffers too much")


class BoundedBuffers(dict[int, bytearray]):
    """Yamux's table of receive buffers, with the bound that stock only logs about."""

    def __init__(self, stream_bytes_max: int, conn_bytes_max: int) -> None:
        super().__init__()
        self.stream_bytes_max = stream_bytes_max
        self.conn_bytes_max = conn_bytes_max

    def __setitem__(self, stream_id: int, buffer: bytearray) -> None:
        bounded = _BoundedBuffer(buffer)
        bounded.table = self
        super().__setitem__(stream_id, bounded)
