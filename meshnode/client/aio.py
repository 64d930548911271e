"""The trio-native twin of `blocking`: the same requests, awaited.

    async with connect(home) as mesh:
        job_id = await mesh.submit_kernel(kernel, prepared)
        async for notice in mesh.watch(job_id): ...
        arrays = await mesh.result(job_id)

Cancelling a waiting request tells the node to forget it; the job of a cancelled `call` is cancelled
with it, a submitted job goes on. Input arrays are handed over inline or as files, as in `blocking`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from jaxkernels import host
from jaxkernels.spec import KernelInfo
from meshnode.errors import LocalProtocolError, LocalResource, MeshError, Unreachable, UsageError
from meshnode.node.failures import error_of_answer, error_of_reason
from meshnode.node.home import socket_path
from meshnode.node.wire import (
    CONTROL_VERSION,
    INLINE_RESULT_BYTES_MAX,
    SOCKET_NAME,
    FrameBuffer,
    order_fields,
    pack,
)
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import ArraySpec, BlobRef, Digest

from .blocking import NOTICES_MAX
from .job import Notice
from .orders import Array, Note, Terms, finish, inline_args, make_order, split_outputs

CONNECT_S: Final = 5.0
_RECEIVE_BYTES: Final = 1 << 18

Message = dict[str, Any]


class AsyncMesh:
    """A connection to one's own node; made by `connect`. Method by method as `blocking.Mesh`."""

    def __init__(self, stream: trio.SocketStream, home: Path) -> None:
        self.home = home
        self._stream = stream
        self._ids = itertools.count(1)
        self._sending = trio.Lock()
        self._waiting: dict[int, trio.MemorySendChannel[Message]] = {}
        self._gone: MeshError | None = None

    async def hello(self) -> Message:
        return await self._ask("hello", version=CONTROL_VERSION)

    async def status(self) -> Message:
        answer: Message = (await self._ask("status"))["status"]
        return answer

    async def peers(self) -> list[Message]:
        answer: list[Message] = (await self._ask("peers"))["peers"]
        return answer

    async def drain(self) -> None:
        await self._ask("drain")

    async def shutdown(self) -> None:
        await self._ask("shutdown")

    async def submit_kernel(
        self, kernel: KernelInfo, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> bytes:
        order = await self._order(kernel, prepared, terms or Terms())
        job_id: bytes = (await self._ask("submit", order=order_fields(order)))["job_id"]
        return job_id

    async def call(
        self, kernel: KernelInfo, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> list[Array]:
        order = await self._order(kernel, prepared, terms or Terms(durable=False))
        answer = await self._ask("call", order=order_fields(order))
        return split_outputs(await _outputs(answer), order.outs, order.units)

    async def jobs(self) -> list[Message]:
        answer: list[Message] = (await self._ask("jobs"))["jobs"]
        return answer

    async def show(self, job_id: bytes) -> Message:
        answer: Message = (await self._ask("show", job_id=job_id))["job"]
        return answer

    async def explain(self, job_id: bytes) -> list[Message]:
        answer: list[Message] = (await self._ask("explain", job_id=job_id))["reasons"]
        return answer

    async def logs(self, job_id: bytes) -> list[Notice]:
        answer = await self._ask("logs", job_id=job_id)
        return [Notice.of(plain) for plain in answer["notices"]]

    async def watch(self, job_id: bytes, *, outputs: bool = False) -> AsyncGenerator[Notice, None]:
        async with self._request("watch", job_id=job_id, outputs=outputs) as answers:
            while True:
                message = await self._next(answers)
                if "notice" not in message:
                    return
                yield Notice.of(message["notice"])

    async def wait(self, job_id: bytes) -> Message:
        return await self._ask("wait", job_id=job_id)

    async def result(self, job_id: bytes) -> list[Array]:
        arrays, _ = await self._result(job_id)
        return arrays

    async def finish(self, job_id: bytes) -> Any:
        arrays, note = await self._result(job_id)
        return finish(note, arrays)

    async def cancel(self, job_id: bytes) -> None:
        await self._ask("cancel", job_id=job_id)

    async def put(self, array: Array) -> BlobRef:
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        content = plain.reshape(-1).view(np.uint8)
        if content.nbytes <= INLINE_RESULT_BYTES_MAX:
            answer = await self._ask("put_bytes", bytes=content.tobytes())
            return BlobRef(Digest(answer["blob_id"]), answer["size"])
        path = self.home / "tmp" / f"in-{os.getpid()}-a{next(self._ids)}"
        try:
            await trio.to_thread.run_sync(path.write_bytes, content.data)
        except OSError as error:
            raise LocalResource(f"cannot write {path}: {error.strerror}") from None
        try:
            return await self.put_path(path)
        finally:
            _remove(path)

    async def put_path(self, path: Path) -> BlobRef:
        if not path.is_absolute():
            raise UsageError(f"{path} is not an absolute path")
        answer = await self._ask("put_path", path=str(path))
        return BlobRef(Digest(answer["blob_id"]), answer["size"])

    # ---- inside

    async def _order(self, kernel: KernelInfo, prepared: host.Prepared, terms: Terms) -> JobOrder:
        if kernel.spec != prepared.kernel:
            raise UsageError(f"the input was prepared for {prepared.kernel}, not {kernel.spec}")
        inline = inline_args(prepared)
        blobs: dict[int, BlobRef] = {}
        for number, arg in enumerate(prepared.args):
            if number not in inline:
                put = self.put_path(arg.path) if arg.path else self.put(arg.array)
                blobs[number] = await put
        note = Note(kernel.spec, dict(prepared.context), terms.label, time.time_ns() // 1_000_000)
        return make_order(prepared, blobs, terms, note)

    async def _result(self, job_id: bytes) -> tuple[list[Array], Note]:
        answer = await self._ask("result", job_id=job_id)
        if answer["state"] != "done":
            raise error_of_reason(answer["reason"], answer.get("text", ""))
        outs = [ArraySpec(dtype, tuple(shape)) for dtype, shape in answer["outs"]]
        arrays = split_outputs(await _outputs(answer), outs, answer["units"])
        return arrays, Note.unpack(answer["request"])

    async def _ask(self, op: str, **fields: Any) -> Message:
        async with self._request(op, **fields) as answers:
            return await self._next(answers)

    @asynccontextmanager
    async def _request(
        self, op: str, **fields: Any
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Message]]:
        request_id = next(self._ids)
        send, answers = trio.open_memory_channel[Message](NOTICES_MAX)
        self._waiting[request_id] = send
        try:
            await self._send({"op": op, "id": request_id, **fields})
            yield answers
        finally:
            answers.close()
            if self._waiting.pop(request_id, None) is not None and self._gone is None:
                # Left before the answer: the node need not go on with it.
                with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                    await self._send({"op": "drop", "id": next(self._ids), "drop": request_id})

    async def _next(self, answers: trio.MemoryReceiveChannel[Message]) -> Message:
        try:
            message = await answers.receive()
        except trio.EndOfChannel:
            raise self._gone or LocalResource(
                "this program reads the job's notices too slowly"
            ) from None
        if "error" in message:
            raise error_of_answer(message["error"])
        return message

    async def _send(self, message: Message) -> None:
        if self._gone is not None:
            raise self._gone
        try:
            async with self._sending:
                await self._stream.send_all(pack(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unreachable("the node has gone away") from None

    async def read(self) -> None:
        """Task: answers and notices to those who wait for them."""
        buffer = FrameBuffer()
        try:
            while received := await self._stream.receive_some(_RECEIVE_BYTES):
                for message in buffer.feed(received):
                    self._deliver(message)
            self._gone = Unreachable("the node has gone away; its jobs go on when it is back")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._gone = Unreachable("the connection to the node broke")
        except MeshError as error:
            self._gone = error
        for channel in self._waiting.values():
            channel.close()

    def _deliver(self, message: Message) -> None:
        channel = self._waiting.get(message["id"])
        if channel is None:
            return
        try:
            channel.send_nowait(message)
        except trio.WouldBlock:
            channel.close()
        except trio.BrokenResourceError:
            return
        if "notice" not in message:
            del self._waiting[message["id"]]


@asynccontextmanager
async def connect(home: Path) -> AsyncIterator[AsyncMesh]:
    """Connect to the node that runs on this home; Unreachable if none does."""
    try:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_unix_socket(str(socket_path(home, SOCKET_NAME)))
    except (OSError, trio.TooSlowError) as error:
        why = error.strerror if isinstance(error, OSError) else "no answer"
        raise Unreachable(
            f"no node runs on {home} ({why}); start one with `meshnode run`"
        ) from None
    failure: MeshError | None = None
    async with stream, trio.open_nursery() as nursery:
        mesh = AsyncMesh(stream, home)
        nursery.start_soon(mesh.read)
        try:
            version = (await mesh.hello()).get("version")
            if version != CONTROL_VERSION:
                raise LocalProtocolError(
                    f"the node speaks control version {version}, this program {CONTROL_VERSION}"
                )
            yield mesh
        except MeshError as error:
            failure = error  # out of the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _outputs(answer: Message) -> Any:
    path = answer.get("path")
    if path is None:
        return answer["outputs"]
    try:
        return await trio.to_thread.run_sync(lambda: np.fromfile(path, dtype=np.uint8))
    finally:
        _remove(Path(path))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
