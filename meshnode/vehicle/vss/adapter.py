"""The vehicle adapter `vss`: what an Eclipse KUKSA databroker says about this car, as states.

Between `client` (the broker) with `signals` (the meaning) and `node.vehicle_watch`.

The broker pushes every change, and each is told at once. Besides, motion and ignition are asked for
at every look. An answer proves that the broker lives, and makes all readings fresh: had one of them
changed, the same connection would have brought it. A broker that does not answer is lost, and the
car's readings with it.

The source whose life counts is the broker. The time stamps of the values are not used: a car that
stands for a week has an ignition that was last published a week ago, as providers publish changes.
So a provider that dies while the broker lives is not noticed; KUKSA goes on showing its last values
and does not say that they are orphans. Whoever runs the providers must keep them running.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from meshnode.errors import LocalResource, UsageError
from meshnode.vehicle.state import Pace, Source, Tell, VehicleLost, VehicleState

from .signals import MOTION, PATHS, PROVIDES, Value, has_our_unit, matched, readings

if TYPE_CHECKING:
    from .client import Client

DEFAULT_ADDRESS: Final = "127.0.0.1:55555"  # where KUKSA listens if nobody says otherwise
CONNECT_TIMEOUT_S: Final = 5.0  # to reach the broker and hear of its signals; then for their values
LOOK_TIMEOUT_S: Final = 2.0  # with a look every 2 s, a silent broker is lost in less than 5 s
FILE_BYTES_MAX: Final = 64 << 10  # of a token or of certificates
TOKEN_CHARACTERS_MAX: Final = 7_000  # grpc takes 8 KiB of headers
# A look may make the broker wait a second for a provider, and nothing is pushed meanwhile (KUKSA
# 0.6.0 to 0.7.0 hold a lock). So looks take at most a quarter of the time.
REST_TO_LOOK: Final = 3
_HOST_PORT: Final = re.compile(
    r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):[0-9]{1,5}"
)


class VssVehicle:
    """`source.address` is `HOST:PORT` or `grpc://HOST:PORT` (plain), `grpcs://HOST:PORT` (TLS) or
    `unix:/PATH`; if it is empty, KUKSA's own port on this machine. `source.token_file` holds a JWT.
    The option `ca_file` names the authorities (PEM) that the broker's certificate is checked with.

    UsageError for what is written wrongly, and for a token that would leave this machine in the
    clear: whoever hears it can read the car, or more. LocalResource for a file that cannot be read.
    """

    name = "vss"
    provides = PROVIDES

    def __init__(self, source: Source) -> None:
        unknown = set(source.options) - {"ca_file"}
        if unknown:
            raise UsageError(f"vehicle.options: {min(unknown)} is no option of vss; ca_file is")
        self._address = source.address or DEFAULT_ADDRESS
        self._target, self._tls, at_home = _parsed(self._address)
        self._token_file = source.token_file
        self._ca_file: Path | None = None
        if "ca_file" in source.options:
            if not self._tls:
                raise UsageError("vehicle.options: ca_file needs an address with grpcs://")
            self._ca_file = Path(source.options["ca_file"]).expanduser()
        if self._token_file is not None and not (self._tls or at_home):
            raise UsageError(f"a token to {self._address} would go in the clear; use grpcs://")
        self._secrets()  # a bad file is said at the start

    def __str__(self) -> str:
        return f"the KUKSA databroker at {self._address}"

    async def run(self, tell: Tell, pace: Pace) -> None:
        """Task of `VehicleAdapter`: until cancelled, or VehicleLost."""
        client = await trio.to_thread.run_sync(self._client)  # loads grpc
        try:
            await _Watch(client, tell, pace).run(str(self))
        finally:
            client.close()

    def _client(self) -> Client:
        # What goes wrong is told by an error; grpc would write it on stderr too.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from .client import Client

        try:
            token, roots = self._secrets()
        except LocalResource as error:
            raise VehicleLost(str(error)) from None
        return Client(self._target, str(self), token=token, roots=roots)

    def _secrets(self) -> tuple[str | None, bytes | None]:
        """Token and authorities, read at every start: both are renewed by others."""
        token = None
        if self._token_file is not None:
            token = _read(self._token_file).decode("ascii", "replace").strip()
            printable = token.isascii() and token.isprintable() and " " not in token
            if not token or not printable or len(token) > TOKEN_CHARACTERS_MAX:
                raise LocalResource(f"{self._token_file} holds no token")
        if not self._tls:
            return token, None
        return token, b"" if self._ca_file is None else _read(self._ca_file)


class _Watch:
    """One connection's life: the newest values, by a task that is told and a task that asks."""

    def __init__(self, client: Client, tell: Tell, pace: Pace) -> None:
        self._client = client
        self._tell = tell
        self._pace = pace
        self._paths: frozenset[str] = frozenset()  # that this broker has, in our units
        self._values: dict[str, Value] = {}
        self._updates: Counter[str] = Counter()  # how often a path was pushed
        self._told: dict[str, Any] | None = None
        self._first = trio.Event()
        self._lost: VehicleLost | None = None

    async def run(self, source: str) -> None:
        units = await self._client.units(CONNECT_TIMEOUT_S)
        known = PATHS & units.keys()
        self._paths = frozenset(path for path in known if has_our_unit(path, units[path]))
        if not self._paths:
            raise VehicleLost(f"{source} has none of the signals that tell of a car")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, nursery.cancel_scope)
            with trio.move_on_after(CONNECT_TIMEOUT_S) as scope:
                await self._first.wait()
            if scope.cancelled_caught:
                self._lose(VehicleLost(f"{source} sends no values"), nursery.cancel_scope)
            else:
                await self._look_again(nursery.cancel_scope)
        assert self._lost is not None
        raise self._lost

    def _lose(self, lost: VehicleLost, scope: trio.CancelScope) -> None:
        """Out of the nursery as one error, and not as a group of them."""
        self._lost = self._lost or lost
        scope.cancel()

    async def _follow(self, scope: trio.CancelScope) -> None:
        try:
            await self._client.follow(self._paths, self._got)
        except VehicleLost as lost:
            self._lose(lost, scope)

    def _got(self, update: dict[str, Value]) -> None:
        ours = self._paths & update.keys()
        if not ours:
            return  # KUKSA's first one is empty where the token allows nothing
        for path in ours:
            self._values[path] = update[path]
            self._updates[path] += 1
        self._first.set()
        self._say(age_ms=0, unchanged=False)

    async def _look_again(self, scope: trio.CancelScope) -> None:
        # A path that was not among the first values is one that our token may not read, and a
        # broker refuses to look at all if it may not look at one.
        paths = sorted(MOTION.keys() & self._values) or sorted(self._values)[:1]
        while True:
            await self._pace.rest()
            before, began = self._updates.copy(), trio.current_time()
            try:
                answer = await self._client.look(paths, LOOK_TIMEOUT_S)
            except VehicleLost as lost:
                return self._lose(lost, scope)
            took_s = trio.current_time() - began
            for path, value in matched(paths, answer).items():
                # What was pushed while the answer was on its way may be the newer of the two.
                if self._updates[path] == before[path]:
                    self._values[path] = value
            self._say(age_ms=round(took_s * 1000), unchanged=True)
            await trio.sleep(max(0.0, REST_TO_LOOK * took_s - self._pace.period_s))

    def _say(self, *, age_ms: int, unchanged: bool) -> None:
        """Tell the state; where nothing has changed only if it may be told `unchanged`."""
        now_ms = time.time_ns() // 1_000_000
        known = readings(self._values, now_ms)
        if unchanged or known != self._told:
            self._told = known
            self._tell(VehicleState(at_ms=now_ms, ages_ms=dict.fromkeys(known, age_ms), **known))


def _parsed(address: str) -> tuple[str, bool, bool]:
    """grpc's target, whether it is TLS, and whether it stays on this machine."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise UsageError(f"vehicle.address: {address!r} is not unix:/PATH")
        return f"unix:{path}", False, True
    # Only HOST:PORT: no user, no path, nothing that urlsplit would silently drop.
    scheme, _, rest = address.rpartition("://")
    found = _HOST_PORT.fullmatch(rest)
    if scheme not in ("", "grpc", "grpcs") or found is None:
        raise UsageError(f"vehicle.address: {address!r} is not HOST:PORT or grpcs://HOST:PORT")
    host = found["six"] or found["host"]
    try:
        at_home = ipaddress.ip_address(host).is_loopback
    except ValueError:
        at_home = host == "localhost"
    # `dns:` says that the host's name is no scheme of grpc's.
    return f"dns:{rest}", scheme == "grpcs", at_home


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise LocalResource(f"cannot read {path}: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise LocalResource(f"{path} is longer than {FILE_BYTES_MAX} bytes")
    return content
