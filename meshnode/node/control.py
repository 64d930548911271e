"""The control socket: the node's own user talks to the node. Frames are those of `wire`.

    client --{"op", "id", ...}--> Control --RunningNode--> driver
    client <--{"id", "ok"|"error"|"notice"}--

A unix socket, 0600 in a 0700 directory, and the peer's uid is checked besides: whoever reaches it
may spend the owner's credit. Everything is bounded: clients, requests of a client, bytes that wait
for a slow one. Ordinary requests are answered in the task that reads them, and a call's outputs go
into the socket in the task in which its last unit arrives: a switch fewer each.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.errors import LocalProtocolError, LocalResource, MeshError, UsageError
from meshnode.protocol.types import JobId

from . import wire
from .collector import Packed
from .mode import KINDS, Mode, is_time
from .running import TMP_NAME, RunningNode

OUT_BYTES_MAX: Final = 64 << 20
"""Answers and notices that wait for one client; one that reads more slowly is hung up on."""
_RECEIVE_BYTES: Final = 1 << 18

Reply = dict[str, Any]


class _Client:
    """One connection; its tasks end with it, the jobs it has submitted do not."""

    def __init__(self, node: RunningNode, sock: socket.socket) -> None:
        self._node = node
        self._sock = sock
        self._out: list[memoryview] = []
        self._out_bytes = 0
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._drops: dict[int, Callable[[], None]] = {}
        self._at_once: dict[str, Callable[[Reply], Reply | None]] = {
            "hello": self._hello,
            "status": lambda _: {"status": node.status()},
            "peers": lambda _: {"peers": node.peers()},
            "logs": self._logs,
            "call": self._call,
            "cancel": self._cancel,
            "drain": self._drain,
            "mode": self._mode,
            "shutdown": self._shutdown,
            "drop": self._drop,
        }
        self._in_task: dict[str, Callable[[Reply], Awaitable[Reply]]] = {
            "put_bytes": self._put_bytes,
            "put_path": self._put_path,
            "submit": self._submit,
            "terms": self._terms,
            "fleet": self._fleet,
            "jobs": self._jobs,
            "show": self._show,
            "explain": self._explain,
            "would": self._would,
            "watch": self._watch,
            "wait": self._wait,
            "result": self._result,
        }

    async def serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._write)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        finally:
            for drop in list(self._drops.values()):
                drop()

    async def _read(self, nursery: trio.Nursery) -> None:
        """Until the client hangs up, or turns out to be none."""
        buffer = wire.FrameBuffer()
        while True:
            try:
                received = self._sock.recv(_RECEIVE_BYTES)
                requests = buffer.feed(received)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock.fileno())
                continue
            except (OSError, LocalProtocolError):
                return
            if not received:
                return
            for request in requests:
                self._take(request, nursery)

    # ---- requests

    def _take(self, request: Reply, nursery: trio.Nursery) -> None:
        op, request_id = request.get("op"), request["id"]
        handle = self._at_once.get(str(op))
        if handle is not None:
            try:
                answer = handle(request)
            except MeshError as error:
                self._fail(request_id, error)
            else:
                if answer is not None:
                    self._say({"id": request_id, "ok": True, **answer})
            return
        work = self._in_task.get(str(op))
        if work is None:
            self._fail(request_id, UsageError(f"the node knows no request {op!r}"))
        elif len(self._drops) >= wire.REQUESTS_MAX:
            self._fail(request_id, LocalResource(f"{wire.REQUESTS_MAX} requests wait already"))
        else:
            scope = trio.CancelScope()
            self._drops[request_id] = scope.cancel
            nursery.start_soon(self._run, work, request, scope)

    async def _run(
        self, work: Callable[[Reply], Awaitable[Reply]], request: Reply, scope: trio.CancelScope
    ) -> None:
        request_id = request["id"]
        try:
            with scope:
                answer = await work(request)
                self._say({"id": request_id, "ok": True, **answer})
        except MeshError as error:
            self._fail(request_id, error)
        finally:
            self._drops.pop(request_id, None)

    def _hello(self, request: Reply) -> Reply:
        node = self._node
        return {
            "version": wire.CONTROL_VERSION,
            "pid": os.getpid(),
            "peer": node.peer,
            "network": node.network,
            "provides": node.config.node.provides,
        }

    def _logs(self, request: Reply) -> Reply:
        logged = self._node.logs(_bytes(request, "job_id"))
        return {
            "notices": [
                {**wire.notice_fields(one.notice, outputs=False), "unix_ms": one.unix_ms}
                for one in logged
            ]
        }

    async def _would(self, request: Reply) -> Reply:
        order = wire.order_of(_map(request, "order"))
        kflop_per_unit = request.get("kflop_per_unit")
        if not isinstance(kflop_per_unit, int) or kflop_per_unit < 0:
            raise LocalProtocolError("a request has no kflop_per_unit")
        return {"would": await self._node.would(order, kflop_per_unit)}

    def _cancel(self, request: Reply) -> Reply:
        self._node.cancel(_job_id(request))
        return {}

    def _drain(self, request: Reply) -> Reply:
        self._node.drain()
        return {}

    async def _terms(self, request: Reply) -> Reply:
        papers = request.get("papers")
        if not isinstance(papers, list) or not all(isinstance(each, bytes) for each in papers):
            raise LocalProtocolError("papers are a list of sealed objects")
        return {"restart": await self._node.word.set_terms(tuple(papers))}

    async def _fleet(self, request: Reply) -> Reply:
        fleet = request.get("terms")
        if fleet is not None and not isinstance(fleet, bytes):
            raise LocalProtocolError("fleet terms are one sealed object, or none")
        await self._node.word.set_fleet(fleet)
        return {}

    def _mode(self, request: Reply) -> Reply:
        kind, until_ms = request.get("mode"), request.get("until_ms")
        if kind not in KINDS or not is_time(until_ms):
            raise LocalProtocolError("a mode is one of " + ", ".join(KINDS))
        return {"mode": self._node.set_mode(Mode(kind, until_ms))}

    def _shutdown(self, request: Reply) -> Reply:
        self._node.stop()
        return {}

    def _drop(self, request: Reply) -> None:
        """The client no longer waits; it gets no answer to either request."""
        drop = self._drops.pop(int(request.get("drop", 0)), None)
        if drop is not None:
            drop()

    def _call(self, request: Reply) -> None:
        request_id = request["id"]

        def on_end(outcome: Packed | MeshError) -> None:
            self._drops.pop(request_id, None)
            if isinstance(outcome, MeshError):
                self._fail(request_id, outcome)
            else:
                self._say({"id": request_id, "ok": True, **self._packed(outcome)})

        if len(self._drops) >= wire.REQUESTS_MAX:
            raise LocalResource(f"{wire.REQUESTS_MAX} requests wait already")
        self._drops[request_id] = _nothing_to_drop
        try:
            call = self._node.start_call(wire.order_of(_map(request, "order")), on_end)
        except BaseException:
            self._drops.pop(request_id, None)
            raise
        if request_id in self._drops:
            self._drops[request_id] = call.close

    def _packed(self, packed: Packed) -> Reply:
        if len(packed) <= wire.INLINE_RESULT_BYTES_MAX:
            return {"outputs": bytes(packed)}
        # Page cache, no disk: at a few hundred MB this holds the loop for some 10 ms a 100 MB.
        path = self._node.home / TMP_NAME / f"call-{os.getpid()}-{id(packed):x}"
        try:
            path.write_bytes(packed)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise LocalResource(f"cannot write results: {error.strerror}") from None
        return {"path": str(path)}

    async def _put_bytes(self, request: Reply) -> Reply:
        ref = await self._node.put_bytes(_bytes(request, "bytes"))
        return {"blob_id": ref.blob_id, "size": ref.size}

    async def _put_path(self, request: Reply) -> Reply:
        path = Path(str(request.get("path")))
        if not path.is_absolute():
            raise UsageError(f"{path} is not an absolute path")
        ref = await self._node.put_path(path)
        return {"blob_id": ref.blob_id, "size": ref.size}

    async def _submit(self, request: Reply) -> Reply:
        return {"job_id": await self._node.submit(wire.order_of(_map(request, "order")))}

    async def _jobs(self, request: Reply) -> Reply:
        return {"jobs": await self._node.jobs()}

    async def _show(self, request: Reply) -> Reply:
        return {"job": await self._node.show(_job_id(request))}

    async def _explain(self, request: Reply) -> Reply:
        return {"explanation": await self._node.explain(_job_id(request))}

    async def _watch(self, request: Reply) -> Reply:
        outputs = bool(request.get("outputs"))
        async with aclosing(self._node.watch(_job_id(request))) as notices:
            async for notice in notices:
                plain = wire.notice_fields(notice, outputs=outputs)
                self._say({"id": request["id"], "notice": plain})
        return {}

    async def _wait(self, request: Reply) -> Reply:
        ended = await self._node.wait(_job_id(request))
        return {
            "state": ended.state,
            "reason": ended.reason,
            "units": ended.units,
            "done": ended.done,
        }

    async def _result(self, request: Reply) -> Reply:
        result = await self._node.result(
            _job_id(request), inline_bytes_max=wire.INLINE_RESULT_BYTES_MAX
        )
        ended, order = result.ended, result.order
        where = (
            {"outputs": bytes(result.packed)} if result.path is None else {"path": str(result.path)}
        )
        return {
            "state": ended.state,
            "reason": ended.reason,
            "units": order.units,
            "outs": [[out.dtype, list(out.shape)] for out in order.outs],
            "request": order.request,
            **where,
        }

    # ---- answers

    def _fail(self, request_id: int, error: MeshError) -> None:
        plain = {"kind": type(error).__name__, "text": str(error)}
        self._say({"id": request_id, "error": plain})

    def _say(self, message: Reply) -> None:
        """Into the socket now, as far as it takes it; the rest is the writer's."""
        frame = memoryview(wire.pack(message))
        if not self._out:
            try:
                frame = frame[self._sock.send(frame) :]
            except BlockingIOError:
                pass
            except OSError:
                self._scope.cancel()
                return
            if not frame:
                return
        self._out_bytes += len(frame)
        if self._out_bytes > OUT_BYTES_MAX:
            self._scope.cancel()
            return
        self._out.append(frame)
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._out:
                try:
                    sent = self._sock.send(self._out[0])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock.fileno())
                    continue
                except OSError:
                    self._scope.cancel()
                    return
                self._out_bytes -= sent
                if sent < len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                else:
                    self._out.pop(0)


@asynccontextmanager
async def open_control(node: RunningNode, path: Path) -> AsyncIterator[Path]:
    """The control socket, for the length of the block."""
    listener = _listen(path)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, listener, node)
            yield path
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - a socket's name, no disk


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The home is locked: a socket that lies here is that of a node which was killed.
        path.unlink(missing_ok=True)
        listener.setblocking(False)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(wire.CLIENTS_MAX)
    except OSError as error:
        listener.close()
        raise LocalResource(f"cannot make the control socket {path}: {error.strerror}") from None
    return listener


async def _accept(listener: socket.socket, node: RunningNode) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(listener.fileno())
                continue
            except OSError:  # out of descriptors: those of clients that leave come back
                await trio.sleep(0.1)
                continue
            nursery.start_soon(_serve, sock, node)


async def _serve(sock: socket.socket, node: RunningNode) -> None:
    node.clients += 1
    try:
        with sock:
            sock.setblocking(False)
            if not _is_own_user(sock) or node.clients > wire.CLIENTS_MAX:
                return
            await _Client(node, sock).serve()
    finally:
        node.clients -= 1


def _is_own_user(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (os.getuid(), 0)


# ---- reading requests


def _bytes(request: Reply, name: str) -> bytes:
    value = request.get(name)
    if not isinstance(value, bytes):
        raise LocalProtocolError(f"a request has no {name}")
    return value


def _map(request: Reply, name: str) -> dict[str, Any]:
    value = request.get(name)
    if not isinstance(value, dict):
        raise LocalProtocolError(f"a request has no {name}")
    return value


def _job_id(request: Reply) -> JobId:
    return JobId(_bytes(request, "job_id"))


def _nothing_to_drop() -> None:
    return None
