"""The node's end of its zygote: start or join one, ask it for children, hear how they ended.

Used by `supervisor` alone. The zygote is `meshnode.worker.zygote`, spawned here or forked from a
shared parent; both speak `wire`'s control messages. End of file is the only stop signal, in both
directions: no pid is ever guessed, children are held by pidfd.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

import meshnode

from . import wire
from .bounds import CLOSE_S_MAX, EXIT_S_MAX, FORK_S_MAX, ZYGOTE_START_S_MAX, ExecutorConfig

# A worker runs strangers' code: of the node's environment it sees what jax needs, no more.
_ENVIRONMENT_KEPT = (
    "PATH",
    "LANG",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "VIRTUAL_ENV",
    "PYTHONHOME",
    "PYTHONPATH",
    "COVERAGE_PROCESS_START",
)


# What a signal that nobody here sent says of a worker.
_MEANING = {
    int(signal.SIGKILL): "from outside, as the kernel does when the machine runs out of memory",
    int(signal.SIGSYS): "it made system calls of another architecture, which the sandbox forbids",
    int(signal.SIGABRT): "it gave up, as XLA does when it gets no memory",
    int(signal.SIGXCPU): "it has used its limit of processor time",
    int(signal.SIGSEGV): "it used memory that is not its own",
    int(signal.SIGBUS): "it used memory that is not there",
    int(signal.SIGILL): "it ran what is no instruction of this processor",
}


class ZygoteLost(Exception):
    """No zygote, or it ended; the text says what is known."""


@dataclass(eq=False, slots=True)
class Child:
    """A process forked by the zygote; kill it by pidfd, hear its end by `exited`."""

    pid: int
    pidfd: int
    exited: trio.Event = field(default_factory=trio.Event)
    code: int | None = None  # as subprocess has it: negative is a signal
    ran_out: bool = False  # of the memory of its control group

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    @property
    def ended(self) -> bool:
        """Whether it is no more, reaped or not; asks the kernel, 2 us."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def gone(self) -> None:
        """SIGKILL, and wait until the process is no more; call shielded."""
        self.signal(signal.SIGKILL)
        with trio.move_on_after(EXIT_S_MAX):
            await trio.lowlevel.wait_readable(self.pidfd)

    async def ending(self) -> str:
        """How a child ended that nobody killed, in words."""
        with trio.move_on_after(EXIT_S_MAX):
            await self.exited.wait()
        if self.code is None:
            return "how it ended is not known"
        if self.code >= 0:
            return f"exit status {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = f"signal {-self.code}"
        why = "its control group ran out of memory" if self.ran_out else _MEANING.get(-self.code)
        return f"killed by {name}" + (f": {why}" if why else "")


@dataclass(eq=False, slots=True)
class _Request:
    answered: trio.Event = field(default_factory=trio.Event)
    child: Child | None = None
    text: str = ""
    abandoned: bool = False


class Zygote:
    """One zygote, from `open_zygote` until `close`; `tend` must run beside it."""

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self._control = control
        self._process = process
        self._requests: dict[int, _Request] = {}
        self._children: dict[int, Child] = {}
        self._ids = 0
        self.lost = False
        self.pid = 0

    # -------------------------------------------------------------------------------- requests

    async def fork(
        self, op: str, end: socket.socket, threads: int, memory_mb: int, cgroup: str = ""
    ) -> Child:
        """A new child that holds `end`, which the caller closes. Its pidfd is the caller's."""
        self._ids += 1
        request_id, request = self._ids, _Request()
        message = wire.encode_control(
            op=op, id=request_id, threads=threads, memory_mb=memory_mb, cgroup=cgroup
        )
        self._requests[request_id] = request
        try:
            with trio.fail_after(FORK_S_MAX):
                while True:
                    if self.lost:
                        raise ZygoteLost("the zygote ended")
                    try:
                        socket.send_fds(self._control, [message], [end.fileno()])
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._control.fileno())
                await request.answered.wait()
        except BaseException as error:
            # The zygote may still fork it: `tend` then kills what nobody holds.
            request.abandoned = True
            if request.child is not None:
                request.child.signal(signal.SIGKILL)
                os.close(request.child.pidfd)
            if isinstance(error, trio.TooSlowError | OSError):
                raise ZygoteLost(f"the zygote does not answer: {error}") from error
            raise
        if request.child is None:
            raise ZygoteLost(request.text or "the zygote ended")
        return request.child

    async def ready(self) -> None:
        """Wait for the import of jax to be over."""
        try:
            with trio.fail_after(ZYGOTE_START_S_MAX):
                fields, _ = await self._receive()
        except trio.TooSlowError as error:
            raise ZygoteLost("the zygote did not start in time") from error
        if fields.get("op") != "ready":
            raise ZygoteLost(wire.one_line(str(fields.get("text", "the zygote did not start"))))
        self.pid = int(fields["pid"])

    # ----------------------------------------------------------------------------------- reader

    async def tend(self) -> None:
        """Read reports until the zygote ends."""
        with contextlib.suppress(ZygoteLost, wire.WireError, OSError):
            while True:
                fields, fds = await self._receive()
                self._on_report(fields, fds)

    def abandon(self) -> None:
        """Nobody reads reports any more: whoever waits must not."""
        self.lost = True
        for request in self._requests.values():
            request.answered.set()
        for child in self._children.values():
            child.exited.set()
        self._requests.clear()
        self._children.clear()

    async def _receive(self) -> tuple[dict[str, Any], list[int]]:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, wire.CONTROL_BYTES_MAX, 1)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._control.fileno())
                continue
            if not message:
                raise ZygoteLost("the zygote ended")
            return wire.decode_control(message), list(fds)

    def _on_report(self, fields: dict[str, Any], fds: list[int]) -> None:
        op, request_id = fields.get("op"), int(fields.get("id", 0))
        if op == "exit":
            child = self._children.pop(request_id, None)
            if child is not None:
                child.code = int(fields["code"])
                child.ran_out = bool(fields.get("oom", 0))
                child.exited.set()
            return
        request = self._requests.pop(request_id, None)
        if op == "forked" and len(fds) == 1:
            child = Child(int(fields["pid"]), fds[0])
            self._children[request_id] = child
            if request is None or request.abandoned:
                child.signal(signal.SIGKILL)
                os.close(child.pidfd)
                return
            request.child = child
        elif request is not None:
            request.text = wire.one_line(str(fields.get("text", "")))
        if request is not None:
            request.answered.set()

    # ------------------------------------------------------------------------------------ close

    async def close(self) -> None:
        """Hang up and wait until the zygote, and so its children, are gone; call shielded."""
        self.abandon()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        with trio.move_on_after(CLOSE_S_MAX), contextlib.suppress(ZygoteLost, OSError):
            while True:
                with contextlib.suppress(wire.WireError):
                    for fd in (await self._receive())[1]:
                        os.close(fd)
        self._control.close()
        if self._process is None:
            return
        pidfd = os.pidfd_open(self._process.pid)  # not reaped yet, so the pid is its own
        try:
            with trio.move_on_after(CLOSE_S_MAX):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        self._process.kill()
        self._process.wait()


# ------------------------------------------------------------------------------------------ start


async def open_zygote(config: ExecutorConfig) -> Zygote:
    """A zygote that is ready to fork, of one's own or from the shared parent; ZygoteLost if not."""
    zygote = await (_join(config.zygote_parent) if config.zygote_parent else _spawn(config))
    try:
        await zygote.ready()
    except BaseException:
        with trio.CancelScope(shield=True):
            await zygote.close()
        raise
    return zygote


async def _join(path: Path) -> Zygote:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        control.setblocking(False)
        with trio.fail_after(ZYGOTE_START_S_MAX):
            while True:
                try:
                    control.connect(str(path))
                    return Zygote(control, None)
                except BlockingIOError:  # the backlog is full: other cars start at the same time
                    await trio.sleep(0.02)
    except (OSError, trio.TooSlowError) as error:
        control.close()
        raise ZygoteLost(f"no zygote at {path}: {error}") from error
    except BaseException:
        control.close()
        raise


async def _spawn(config: ExecutorConfig) -> Zygote:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    try:
        with theirs:
            # In a thread, because a spawn takes milliseconds. The zygote lives by its socket and
            # not by PDEATHSIG, which fires when the *thread* that spawned it ends.
            process = await trio.to_thread.run_sync(_popen, config, theirs.fileno())
    except OSError as error:
        ours.close()
        raise ZygoteLost(f"cannot start {config.python}: {error}") from error
    except BaseException:
        ours.close()
        raise
    return Zygote(ours, process)


def _popen(config: ExecutorConfig, control_fd: int) -> subprocess.Popen[bytes]:
    log_path = str(config.run_dir / "worker.log") if config.log_workers else os.devnull
    with open(log_path, "ab") as log:
        return subprocess.Popen(
            # -P: the folder that the node was started in is nobody's code path.
            [config.python, "-P", "-m", "meshnode.worker.zygote", "--fd", str(control_fd)],
            pass_fds=(control_fd,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(),
        )


def _environment() -> dict[str, str]:
    env = {name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ}
    source = str(Path(meshnode.__path__[0]).parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (source, env.get("PYTHONPATH"))))
    return env
