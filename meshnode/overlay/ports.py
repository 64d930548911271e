"""Where this node listens: explicit addresses, and one process per port.

Before the host starts. libp2p binds with SO_REUSEPORT, so a second process on the same port gets
no error and steals half of the dials; and it advertises a bound 0.0.0.0 literally, whereupon
peers dial themselves. Both end here (net.md landmine 7, libp2p.md L11).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from meshnode.errors import LocalResource, UsageError

_SIOCGIFADDR: Final = 0x8915
LISTEN_MAX: Final = 16


def interface_addresses() -> list[str]:
    """The IPv4 address of every interface that is up, loopback last."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # no IPv4 address on it
            found.append(socket.inet_ntoa(reply[20:24]))
    return sorted(set(found), key=lambda ip: ip_address(ip).is_loopback)


def parse_listen(address: str) -> tuple[str, str, int]:
    """("ip4", "127.0.0.1", 4001) of "/ip4/127.0.0.1/tcp/4001"."""
    parts = address.strip("/").split("/")
    if len(parts) != 4 or parts[0] not in ("ip4", "ip6") or parts[2] != "tcp":
        raise UsageError(f"cannot listen on {address!r}: write /ip4/ADDRESS/tcp/PORT")
    try:
        ip = ip_address(parts[1])
        port = int(parts[3])
    except ValueError:
        raise UsageError(f"cannot listen on {address!r}: write /ip4/ADDRESS/tcp/PORT") from None
    if not 0 <= port <= 65_535 or f"ip{ip.version}" != parts[0]:
        raise UsageError(f"cannot listen on {address!r}: no such address or port")
    return parts[0], str(ip), port


def expand_listen(listen: Sequence[str]) -> tuple[str, ...]:
    """`listen` with 0.0.0.0 replaced by the interfaces' own addresses."""
    expanded: list[str] = []
    for address in listen:
        family, ip, port = parse_listen(address)
        if ip == "0.0.0.0":
            expanded += [f"/ip4/{own}/tcp/{port}" for own in interface_addresses()]
        elif ip == "::":
            raise UsageError("cannot listen on ::, name the IPv6 address")
        else:
            expanded.append(f"/{family}/{ip}/tcp/{port}")
    unique = tuple(dict.fromkeys(expanded))
    if len(unique) > LISTEN_MAX:
        raise UsageError(f"{len(unique)} listen addresses are over the bound of {LISTEN_MAX}")
    return unique


class PortLocks:
    """Lock files of the ports this process listens on, held until the scope ends."""

    def __init__(self, lock_dir: Path, stack: ExitStack) -> None:
        self._lock_dir = lock_dir
        self._stack = stack
        self._held: set[tuple[str, int]] = set()

    def take(self, ip: str, port: int) -> None:
        """Own the port or raise LocalResource; port 0 is taken after the bind, by its number."""
        if port == 0 or (ip, port) in self._held:
            return
        self._lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._lock_dir / f"tcp-{ip.replace(':', '_')}-{port}.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            raise LocalResource(
                f"port {port} on {ip} belongs to another meshnode process (pid {owner})"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._held.add((ip, port))

    def probe(self, ip: str, port: int) -> None:
        """Whether someone listens there already: a bind without SO_REUSEPORT would tell."""
        if port == 0:
            return
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            # Without it a connection in TIME_WAIT looks like a listener.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((ip, port))
            except OSError as error:
                raise LocalResource(
                    f"cannot listen on {ip} port {port}: {error.strerror or error}"
                ) from None


@contextmanager
def port_locks(lock_dir: Path) -> Iterator[PortLocks]:
    with ExitStack() as stack:
        yield PortLocks(lock_dir, stack)
