"""A TCP proxy on loopback that delays every byte, each way: distance without root.

Kernel delay needs netem, which many kernels lack; a relay in user space delays what a path would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

CHUNK_BYTES = 16 * 1024
IN_FLIGHT_MAX = 1024


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, delay_s: float) -> None:
    entry, exit_ = trio.open_memory_channel[tuple[float, bytes]](IN_FLIGHT_MAX)

    async def read() -> None:
        async with entry:
            while chunk := await source.receive_some(CHUNK_BYTES):
                await entry.send((trio.current_time() + delay_s, bytes(chunk)))

    async def write() -> None:
        async for due, chunk in exit_:
            await trio.sleep_until(due)
            await sink.send_all(chunk)
        await sink.send_eof()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
    except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        pass  # one side hung up: so does the other


@asynccontextmanager
async def delayed(host: str, port: int, delay_s: float) -> AsyncIterator[int]:
    """The port of a proxy to host:port whose every byte is `delay_s` late in each direction."""

    async def relay(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream(host, port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(_pump, near, far, delay_s)
            nursery.start_soon(_pump, far, near, delay_s)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay, listeners)
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()
