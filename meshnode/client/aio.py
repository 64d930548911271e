"""The trio-native twin of `blocking`: the same requests, awaited.

    async with connect(home) as mesh:
        job = await mesh.map(fn, rows)                   # an `AsyncJob`
        async for row in job: ...                        # in order, as they come
        job_id = await mesh.submit_kernel(kernel, prepared)
        async for notice in mesh.watch(job_id): ...
        arrays = await mesh.result(job_id)

Method by method as there, without their `timeout_s`: trio has scopes for that. Cancelling a waiting
request tells the node to forget it; the job of a cancelled `call` is cancelled with it, a submitted
job goes on. Tracing, preparing inputs and files are work for a thread; the loop goes on meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from jaxkernels import host
from jaxkernels.models import Model
from jaxkernels.spec import KernelInfo
from meshnode.errors import LocalProtocolError, LocalResource, MeshError, Unreachable
from meshnode.node.failures import error_of_answer, error_of_reason
from meshnode.node.home import home_path, socket_path
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

from .background import connect_or_start as connect_or_start_blocking
from .blocking import NOTICES_MAX
from .files import read_outputs, remove, write_input
from .imagined import imagined_order, kflop_per_unit, unstored_refs
from .job import ENDED, Notice, Rows, find
from .orders import (
    Array,
    Note,
    Terms,
    check_kernel,
    finish,
    inline_args,
    make_order,
    plain_bytes,
    prepare,
    split_outputs,
)
from .programs import Arguments, Exports, Foreign, foreign_order

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
        self._exports = Exports()
        self._tracing = trio.CapacityLimiter(1)  # in Python: two threads would not be faster

    # ---- about the node

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

    async def mode(self, kind: str, until_ms: int | None = None) -> dict[str, Any] | None:
        """Let the car work by its policy (`auto`), not at all (`never`), or also in hours that its
        policy keeps free (`always`), until a unix time; None if this node runs nobody's work."""
        answer = await self._ask("mode", mode=kind, until_ms=until_ms)
        found: dict[str, Any] | None = answer["mode"]
        return found

    async def terms(self, papers: Sequence[bytes]) -> bool:
        """Put the owner's signed papers in force, or withdraw the consent (none of them); whether
        the node must be started again before it computes."""
        restart: bool = (await self._ask("terms", papers=list(papers)))["restart"]
        return restart

    async def fleet(self, terms: bytes | None) -> None:
        """Put the operator's signed terms in force, which narrow the policy, or take them away."""
        await self._ask("fleet", terms=terms)

    async def shutdown(self) -> None:
        await self._ask("shutdown")

    # ---- jobs

    async def prepare(
        self,
        kernel: str,
        inputs: Any,
        options: dict[str, Any] | None = None,
        model: Model | None = None,
    ) -> host.Prepared:
        """A person's input -> units of the kernel's fixed shape. UsageError if it does not fit."""
        return await trio.to_thread.run_sync(prepare, kernel, inputs, options, model)

    async def submit_kernel(
        self,
        kernel: KernelInfo,
        prepared: host.Prepared,
        *,
        terms: Terms | None = None,
        args: dict[int, BlobRef] | None = None,
    ) -> bytes:
        """Hand a job to the node; its id (16 bytes). Returns once the node owns the job.

        `args` has references of arguments that are blobs in the node's store already.
        """
        order = await self._order(kernel, prepared, terms or Terms(), args or {})
        return await self._submit(order)

    async def submit_job(
        self, kernel: KernelInfo, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> AsyncJob:
        """As `submit_kernel`, with a handle."""
        return AsyncJob(self, await self.submit_kernel(kernel, prepared, terms=terms))

    # ---- functions and bundles

    async def submit(
        self, function: Callable[..., Any] | Foreign, *args: Any, terms: Terms | None = None
    ) -> AsyncJob:
        """Run a JAX function once on a car: `await (await mesh.submit(fn, x)).result()`.

        The function is exported in a thread here, under jax's process-wide settings, and validated
        there; its arguments are arrays. Also for a bundle: `mesh.submit(Foreign.of_bundle(path),
        x)`. The result has no unit axis. ArtifactRefused for what cars would not run.
        """
        return await self._submit_function(function, Arguments.of_one(args), terms)

    async def map(
        self,
        function: Callable[..., Any] | Foreign,
        *stacked: Any,
        constants: Sequence[Any] = (),
        terms: Terms | None = None,
    ) -> AsyncJob:
        """Run a JAX function for each row of the arrays: `async for row in await mesh.map(fn, xs)`.

        `constants` come after the rows, the same for every unit; cars fetch them once. Errors as
        of `submit`; UsageError for arrays that have no rows.
        """
        return await self._submit_function(function, Arguments.of_rows(stacked, constants), terms)

    async def submit_foreign(
        self, foreign: Foreign, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> AsyncJob:
        """Hand over a job of a program that is not of the release."""
        order = await self._foreign_order(foreign, prepared, terms or Terms())
        return AsyncJob(self, await self._submit(order), order.outs, order.units)

    # ---- one call

    async def call(
        self, kernel: KernelInfo, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> list[Array]:
        """Submit, wait, results: one round trip to the node, nothing written to disk.

        For work where latency counts; it is lost if the node dies. Arrays as `result` gives them.
        """
        return await self._call(
            await self._order(kernel, prepared, terms or Terms(durable=False), {})
        )

    async def call_foreign(
        self, foreign: Foreign, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> list[Array]:
        """As `call`, for a program that is not of the release."""
        return await self._call(
            await self._foreign_order(foreign, prepared, terms or Terms(durable=False))
        )

    async def jobs(self) -> list[Message]:
        answer: list[Message] = (await self._ask("jobs"))["jobs"]
        return answer

    async def show(self, job_id: bytes) -> Message:
        answer: Message = (await self._ask("show", job_id=job_id))["job"]
        return answer

    async def explain(self, job_id: bytes) -> Message:
        answer: Message = (await self._ask("explain", job_id=job_id))["explanation"]
        return answer

    async def would(
        self,
        program: KernelInfo | Foreign,
        prepared: host.Prepared,
        *,
        terms: Terms | None = None,
    ) -> Message:
        refs = await trio.to_thread.run_sync(unstored_refs, prepared)
        order = imagined_order(program, prepared, refs, terms or Terms())
        kflop = kflop_per_unit(program, order)
        asked = await self._ask("would", order=order_fields(order), kflop_per_unit=kflop)
        answer: Message = asked["would"]
        return answer

    async def logs(self, job_id: bytes) -> list[Notice]:
        answer = await self._ask("logs", job_id=job_id)
        return [Notice.of(plain) for plain in answer["notices"]]

    async def find(self, prefix: str) -> bytes:
        """The id of the one job whose id in hex starts so; UsageError if none or several do."""
        return find(await self.jobs(), prefix)

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
        """Store an array as a blob of raw little-endian C-order bytes."""
        return await self._put(plain_bytes(array))

    async def put_path(self, path: Path) -> BlobRef:
        """Store a file's bytes as a blob; the file stays where it is."""
        answer = await self._ask("put_path", path=_absolute(path))
        return BlobRef(Digest(answer["blob_id"]), answer["size"])

    # ---- inside

    async def _submit_function(
        self, function: Callable[..., Any] | Foreign, given: Arguments, terms: Terms | None
    ) -> AsyncJob:
        foreign = self._exports.known(function, given.specs)
        if foreign is None:
            foreign = await self._traced(function, given)
        return await self.submit_foreign(foreign, given.prepare(foreign), terms=terms)

    async def _traced(self, function: Callable[..., Any] | Foreign, given: Arguments) -> Foreign:
        """In a thread, which a cancelled caller leaves behind: nothing stops a trace, and the next
        call may use it."""
        left: dict[str, Any] = {"abandon_on_cancel": True}  # trio-typing's stubs know it not yet
        return await trio.to_thread.run_sync(
            self._exports.of, function, given.specs, limiter=self._tracing, **left
        )

    async def _submit(self, order: JobOrder) -> bytes:
        job_id: bytes = (await self._ask("submit", order=order_fields(order)))["job_id"]
        return job_id

    async def _call(self, order: JobOrder) -> list[Array]:
        answer = await self._ask("call", order=order_fields(order))
        return split_outputs(await _outputs(answer), order.outs, order.units)

    async def _order(
        self,
        kernel: KernelInfo,
        prepared: host.Prepared,
        terms: Terms,
        known: dict[int, BlobRef],
    ) -> JobOrder:
        check_kernel(kernel, prepared)
        note = Note.now(prepared, terms)
        return make_order(prepared, await self._blobs_of(prepared, known), terms, note)

    async def _foreign_order(
        self, foreign: Foreign, prepared: host.Prepared, terms: Terms
    ) -> JobOrder:
        code = await self._put(memoryview(foreign.content))
        return foreign_order(foreign, prepared, code, await self._blobs_of(prepared, {}), terms)

    async def _blobs_of(
        self, prepared: host.Prepared, known: dict[int, BlobRef]
    ) -> dict[int, BlobRef]:
        """References of the arguments that do not travel in frames; stored where they are not."""
        inline = inline_args(prepared)
        blobs = dict(known)
        for number, arg in enumerate(prepared.args):
            if number not in inline and number not in blobs:
                put = self.put_path(arg.path) if arg.path else self.put(arg.array)
                blobs[number] = await put
        return blobs

    async def _put(self, content: memoryview) -> BlobRef:
        if content.nbytes <= INLINE_RESULT_BYTES_MAX:
            answer = await self._ask("put_bytes", bytes=bytes(content))
            return BlobRef(Digest(answer["blob_id"]), answer["size"])
        path = await trio.to_thread.run_sync(write_input, self.home, content)
        try:
            return await self.put_path(path)
        finally:
            remove(path)

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


class AsyncJob:
    """A job of the node: `blocking`'s `Job`, awaited. It goes on without its handle."""

    def __init__(
        self, mesh: AsyncMesh, job_id: bytes, outs: tuple[ArraySpec, ...] = (), units: int = 0
    ) -> None:
        self.mesh = mesh
        self.job_id = job_id
        self._outs = outs  # known to whoever submitted it, for iterating over its units
        self._units = units

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        """Each unit's result, in order, as soon as it and all before it are here."""
        rows = Rows(self._outs, self._units)
        async with aclosing(self.watch(outputs=True)) as notices:
            async for notice in notices:
                for row in rows.of(notice):
                    yield row
        for row in rows.rest(await self.arrays()):  # which also raises what went wrong
            yield row

    async def state(self) -> str:
        """running | done | failed | cancelled"""
        state: str = (await self.mesh.show(self.job_id))["state"]
        return state

    async def done(self) -> bool:
        return await self.state() in ENDED

    async def running(self) -> bool:
        return not await self.done()

    async def cancelled(self) -> bool:
        return await self.state() == "cancelled"

    async def cancel(self) -> bool:
        """True if the job ended by this."""
        await self.mesh.cancel(self.job_id)
        return await self.cancelled()

    def watch(self, *, outputs: bool = False) -> AsyncGenerator[Notice, None]:
        return self.mesh.watch(self.job_id, outputs=outputs)

    async def explain(self) -> Message:
        return await self.mesh.explain(self.job_id)

    async def arrays(self) -> list[Array]:
        """One array [units, *shape] per output."""
        return await self.mesh.result(self.job_id)

    async def result(self) -> Any:
        """As the kernel's host side presents it."""
        return await self.mesh.finish(self.job_id)

    async def exception(self) -> MeshError | None:
        """None if the job is done well. Waits for its end."""
        answer = await self.mesh.wait(self.job_id)
        return None if answer["state"] == "done" else error_of_reason(answer["reason"])

    def __repr__(self) -> str:
        return f"<AsyncJob {self.job_id.hex()[:8]}>"


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
    failure: Exception | None = None
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
        except Exception as error:  # noqa: BLE001 - out of the nursery, which would wrap it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def connect_or_start(
    home: Path | None = None, *, join: tuple[str, ...] = ()
) -> AsyncIterator[AsyncMesh]:
    """As `meshnode.connect`: a submitter node is started in the background where none runs.

    `home` as `mesh --home` has it. Raises Unreachable, or UsageError for a home that `mesh init`
    has not made.
    """
    chosen = home_path() if home is None else home

    def start() -> None:
        mesh, _ = connect_or_start_blocking(chosen, join=join)
        mesh.close()

    await trio.to_thread.run_sync(start)
    async with connect(chosen) as mesh:
        yield mesh


async def _outputs(answer: Message) -> bytes | Array:
    if answer.get("path") is None:
        return read_outputs(answer)
    return await trio.to_thread.run_sync(read_outputs, answer)


def _absolute(path: Path) -> str:
    return str(path.absolute())
