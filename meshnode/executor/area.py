"""Memory that node and worker share, for arrays that are too large for their socket.

One memfd a worker, made by the node and mapped on both sides: inputs first, then outputs. Its size
is sealed before the worker sees it, so a worker cannot shrink it under the node's feet (SIGBUS);
what a worker writes, it can go on writing, so the node copies an output once and then looks at the
copy alone. Through a socket 4 MB cost 5-15 ms each way, through here a copy.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from .wire import AREA_BYTES_LEAST

OUTPUT_BYTES: Final = 16 << 20  # or one unit, if that is more; then the worker waits for `TAKEN`
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def output_bytes(unit_bytes: int, count: int) -> int:
    """Room for the outputs of a run; 0 if they travel in frames."""
    whole = unit_bytes * count
    if whole <= AREA_BYTES_LEAST:
        return 0
    return min(whole, max(unit_bytes, OUTPUT_BYTES))


class Area:
    """`fd` goes to the worker; the node keeps the mapping until `close`."""

    def __init__(self, input_bytes: int, output_bytes: int) -> None:
        self.input_bytes = _pages(input_bytes)
        self.output_bytes = _pages(output_bytes)
        self.fd = os.memfd_create("meshnode-arrays", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.input_bytes + self.output_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, self.input_bytes + self.output_bytes)
        except BaseException:
            os.close(self.fd)
            raise

    def fits(self, input_bytes: int, output_bytes: int) -> bool:
        return input_bytes <= self.input_bytes and output_bytes <= self.output_bytes

    def put_inputs(self, content: bytes) -> None:
        self._map[: len(content)] = content

    def take(self, first_byte: int, count: int, size: int) -> tuple[bytes, ...] | None:
        """Copies of `count` outputs of `size` bytes each; None if they do not lie inside."""
        if first_byte + count * size > self.output_bytes:
            return None
        start = self.input_bytes + first_byte
        return tuple(self._map[at : at + size] for at in range(start, start + count * size, size))

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
