"""`async with Testnet(nodes=8, seed=7) as net`: the object that tests, demo and benches share.

Nodes are real processes: `submitter`, which computes nothing, and cars `car-0` and up. They end
with the block, and also if this process is killed: the warden holds the other end of a pipe.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import trio

from meshnode.errors import LocalResource, TimedOut, UsageError

from . import driving, link
from .warden import NODES_MAX, PROBE_FILE

if TYPE_CHECKING:
    from meshnode.client import Mesh

SUBMITTER: Final = "submitter"
START_S_MAX: Final = 60.0
"""Until a node is ready, on a busy machine."""
MEET_S_MAX: Final = 90.0
"""Until the submitter has heard every car's advert: the first run compiles a probe."""
DIAL_S_MAX: Final = 5.0
"""After it knows every car a submitter gets so long to be connected to each."""
POLL_S: Final = 0.05

T = TypeVar("T")


def car_name(number: int) -> str:
    return f"car-{number}"


class Testnet:
    """`nodes` cars and a submitter. Two testnets of one process need two names."""

    __test__ = False  # not a test case, whatever pytest makes of its name

    def __init__(
        self,
        nodes: int = 8,
        seed: int = 7,
        name: str | None = None,
        *,
        folder: Path | None = None,
        arguments: Sequence[str] = (),
        config: str = "",
        configs: Mapping[str, str] | None = None,
        submitter: bool = True,
        meet: bool = True,
    ) -> None:
        """`config` is the config.toml of every car, `configs` of single nodes; `arguments` are
        passed to every car's `python -m meshnode.node`. With `meet` the block starts when the
        submitter knows every car."""
        if not 0 <= nodes < NODES_MAX:
            raise UsageError(f"a testnet has at most {NODES_MAX - 1} cars")
        self.cars = [car_name(number) for number in range(nodes)]
        self.seed = seed
        self.name = name or f"{os.getpid()}-{seed}-{next(_COUNT)}"
        self.nodes: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._arguments = list(arguments)
        self._config = config
        self._configs = dict(configs or {})
        self._submitter = submitter
        self._meet = meet
        self._link: link.Link | None = None
        self._lifeline = -1
        self._lock = trio.Lock()
        self._known_s: float | None = None  # since when the submitter knows every car

    # ---- life

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, trio.Cancelled):
            self._tell_logs()
        with trio.CancelScope(shield=True):
            await self._end()

    async def up(self) -> None:
        """Start a testnet that outlives this process, until `mesh testnet down`."""
        try:
            start = partial(link.start_warden, self.name, self.seed, self._folder)
            self._link = await trio.to_thread.run_sync(start)
            await self.start_all()
        except BaseException:
            # Only what was started here: a testnet of that name that runs already stays.
            if self._link is not None:
                with trio.CancelScope(shield=True):
                    await self._end()
            raise
        self._link.close()
        self._link = None

    async def _start(self) -> None:
        read_end, self._lifeline = os.pipe2(os.O_CLOEXEC)
        try:
            start = partial(
                link.start_warden, self.name, self.seed, self._folder, lifeline=read_end
            )
            self._link = await trio.to_thread.run_sync(start)
        finally:
            os.close(read_end)
        await self.start_all()

    async def start_all(self) -> None:
        """car-0 first: the others join it, and take over what it has measured of the machine
        (each on its own, eight cars took six seconds longer on two cores). Then all at once."""
        names = [*self.cars, *([SUBMITTER] if self._submitter else [])]
        for name in names[:1]:
            await self._begin(name)
            await self._until_ready([name])
        if len(self.cars) > 1:
            probe = self.home(self.cars[0]) / PROBE_FILE
            await self.wait(probe.exists, MEET_S_MAX, "car-0 has measured this machine")
        for name in names[1:]:
            await self._begin(name)
        await self._until_ready(names[1:])
        if self._meet and self._submitter and self.cars:
            await self.wait(self._all_there, MEET_S_MAX, "the submitter knows every car")

    async def _end(self) -> None:
        started, self._link = self._link, None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if started is not None:
            await trio.to_thread.run_sync(link.down, self.name)
            await trio.to_thread.run_sync(started.reap)

    def _tell_logs(self) -> None:
        """A test has failed: what the nodes said last is the first thing one wants to know."""
        for name, node in self.nodes.items():
            with contextlib.suppress(OSError):
                lines = Path(node["log"]).read_text(errors="replace").splitlines()[-8:]
                for line in lines:
                    print(f"{name}: {line}", file=sys.stderr)

    # ---- nodes

    async def ask(self, op: str, timeout_s: float = link.ANSWER_S, **fields: Any) -> dict[str, Any]:
        if self._link is None:
            raise LocalResource(f"the testnet {self.name} does not run")
        async with self._lock:
            call = partial(self._link.ask, op, timeout_s, **fields)
            return await trio.to_thread.run_sync(call)

    async def _begin(self, name: str) -> None:
        role = "submitter" if name == SUBMITTER else "car"
        config = self._configs.get(name, self._config if role == "car" else "")
        arguments = self._arguments if role == "car" else []
        await self._take("start", name=name, role=role, arguments=arguments, config=config)

    async def _take(self, op: str, **fields: Any) -> dict[str, Any]:
        node: dict[str, Any] = (await self.ask(op, **fields))["node"]
        self.nodes[node["name"]] = node
        return node

    async def _until_ready(self, names: Sequence[str]) -> None:
        if names:
            answer = await self.ask("await", START_S_MAX, names=list(names))
            self.nodes.update(answer["nodes"])

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to a node's process; its worker processes die with it."""
        await self._take("kill", name=name, signal=int(number))
        if number in (signal.SIGKILL, signal.SIGTERM):
            await self.wait(partial(self._ended, name), START_S_MAX, f"{name} has ended")

    async def _ended(self, name: str) -> bool:
        await self.refresh()
        return bool(self.nodes[name]["state"] == "ended")

    async def freeze(self, name: str) -> None:
        await self.kill(name, signal.SIGSTOP)

    async def thaw(self, name: str) -> None:
        await self.kill(name, signal.SIGCONT)

    async def change(self, name: str, readings: Mapping[str, Any]) -> None:
        """What the car's vehicle reads from now on (`driving` has the words for it)."""
        await trio.to_thread.run_sync(driving.change, self.home(name), dict(readings))

    async def drive_away(self, name: str, *, silent: bool = False) -> None:
        """The driver is back. `silent`: out of reach at once, so nothing can be handed on."""
        if silent:
            await self.freeze(name)
        else:
            await self.change(name, driving.DRIVES_AWAY)

    async def restart(self, name: str) -> None:
        """Start a node that has ended, in its old home and on its old port."""
        await self._take("start", name=name)
        await self._until_ready([name])

    async def add_car(self) -> str:
        name = car_name(len(self.cars))
        self.cars.append(name)
        await self._begin(name)
        await self._until_ready([name])
        return name

    async def refresh(self) -> dict[str, dict[str, Any]]:
        self.nodes = (await self.ask("status"))["nodes"]
        return self.nodes

    # ---- what tests ask

    def home(self, name: str = SUBMITTER) -> Path:
        return Path(self.nodes[name]["home"])

    def peer(self, name: str) -> bytes:
        """The peer id of a node, as the control socket has it."""
        from meshnode.protocol.identity import peer_of_text

        return peer_of_text(str(self.nodes[name]["peer"]))

    def name_of(self, peer: bytes) -> str:
        from meshnode.protocol.identity import peer_text
        from meshnode.protocol.types import Peer

        text = peer_text(Peer(peer))
        return next((name for name, node in self.nodes.items() if node["peer"] == text), text)

    def client(self, name: str = SUBMITTER) -> Mesh:
        """A blocking connection to a node; call it from a thread, close it by `with`."""
        from meshnode.client import connect

        return connect(self.home(name))

    async def call(self, function: Callable[[Mesh], T], name: str = SUBMITTER) -> T:
        """`function(mesh)` in a thread, with a connection of its own."""

        def called() -> T:
            with self.client(name) as mesh:
                return function(mesh)

        return await trio.to_thread.run_sync(called)

    async def all_met(self) -> bool:
        """Is the submitter connected to every car that runs, and has its advert, ready to work?"""
        ready = {row["peer"] for row in await self._ready() if row["up"]}
        wanted = [name for name in self.cars if self.nodes[name]["state"] == "ready"]
        return all(self.peer(name) in ready for name in wanted)

    async def _all_there(self) -> bool:
        """Every car is known, and connected or, for a while, not: of many cars a submitter
        dials those that it has work for; in some starts it had met none of sixteen by itself."""
        if not await self.all_known():
            return False
        if self._known_s is None:
            self._known_s = trio.current_time()
        return await self.all_met() or trio.current_time() - self._known_s > DIAL_S_MAX

    async def all_known(self) -> bool:
        """Has the submitter an advert of every car, ready to work? It dials when it has work."""
        ready = {row["peer"] for row in await self._ready()}
        return all(self.peer(name) in ready for name in self.cars)

    async def _ready(self) -> list[dict[str, Any]]:
        """What the submitter knows of cars that may run, connected or not."""
        found = await self.call(lambda mesh: mesh.peers())
        return [row for row in found if row.get("car") and row["car"]["may_run"]]

    async def wait(
        self,
        condition: Callable[[], Any] | Callable[[], Awaitable[Any]],
        timeout_s: float,
        what: str = "",
    ) -> Any:
        """Until `condition()` is true, asked every 50 ms; its value. TimedOut says `what`."""
        try:
            with trio.fail_after(timeout_s):
                while True:
                    found = condition()
                    if inspect.isawaitable(found):
                        found = await found
                    if found:
                        return found
                    await trio.sleep(POLL_S)
        except trio.TooSlowError:
            said = what or getattr(condition, "__name__", "the condition")
            raise TimedOut(f"not so within {timeout_s:g} s: {said}") from None


_COUNT: Final = itertools.count()
