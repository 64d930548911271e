"""The blocking Python API: a `Mesh` is a connection to one's own node, a `Job` a handle on work.

    with connect(home) as mesh:
        job_id = mesh.submit_kernel(kernel, prepared)           # bytes; returns at once
        for notice in mesh.watch(job_id):                # until the job has ended
            print(notice.kind, notice.fields)
        arrays = mesh.result(job_id)                     # one array [units, *shape] per output
        answer = mesh.finish(job_id)                     # what the kernel's host side makes of them

Used by `meshnode.cli` and by programs; thread-safe, one reader thread per connection. The node
does the work: this side only prepares inputs, stores them as blobs and reads results back. Errors
are those of `meshnode.errors`. Nothing here imports trio, libp2p or jax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from jaxkernels import host
from jaxkernels.models import Model
from jaxkernels.spec import KernelInfo
from meshnode.errors import (
    LocalProtocolError,
    LocalResource,
    MeshError,
    TimedOut,
    Unreachable,
)
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

from .files import read_outputs, remove, write_input
from .imagined import imagined_order, kflop_per_unit, unstored_refs
from .job import Job, Notice, find
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

ANSWER_S: Final = 30.0
"""How long an ordinary request may take; putting blobs and waiting for jobs have their own."""
PUT_S: Final = 600.0
NOTICES_MAX: Final = 65_536
"""Notices of one watch that wait for their reader; more end the watch with an error."""
_RECEIVE_BYTES: Final = 1 << 18


class _Stream:
    """A watch: notices in, until None (its end) or an error."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Notice | MeshError | None] = queue.Queue(NOTICES_MAX + 1)


class Mesh:
    """A connection to one's own node. Made by `connect`; a context manager."""

    def __init__(self, sock: socket.socket, home: Path) -> None:
        self.home = home
        self._sock = sock
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # of _waiting, _streams and the sending side
        self._waiting: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._streams: dict[int, _Stream] = {}
        self._gone: MeshError | None = None
        self._exports = Exports()
        self._reader = threading.Thread(target=self._read, name="mesh-reader", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Jobs go on without this connection."""
        self._end(Unreachable("the connection to the node was closed"))
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._sock.close()

    # ---- about the node

    def hello(self) -> dict[str, Any]:
        """Who answers: version, pid, peer, network, cell."""
        return self._ask("hello", version=CONTROL_VERSION)

    def status(self) -> dict[str, Any]:
        """The node in one map: identity, uptime, addresses, peers, slots, budget, counters."""
        answer: dict[str, Any] = self._ask("status")["status"]
        return answer

    def peers(self) -> list[dict[str, Any]]:
        """Cars and nodes in reach: peer (bytes), up, rtt_us, and the advert's content."""
        answer: list[dict[str, Any]] = self._ask("peers")["peers"]
        return answer

    def drain(self) -> None:
        """Take no new work; what runs goes on."""
        self._ask("drain")

    def mode(self, kind: str, until_ms: int | None = None) -> dict[str, Any] | None:
        """Let the car work by its policy (`auto`), not at all (`never`), or also in hours that its
        policy keeps free (`always`), until a unix time; None if this node runs nobody's work."""
        answer = self._ask("mode", mode=kind, until_ms=until_ms)
        found: dict[str, Any] | None = answer["mode"]
        return found

    def terms(self, papers: Sequence[bytes]) -> bool:
        """Put the owner's signed papers in force, or withdraw the consent (none of them); whether
        the node must be started again before it computes."""
        restart: bool = (self._ask("terms", papers=list(papers)))["restart"]
        return restart

    def fleet(self, terms: bytes | None) -> None:
        """Put the operator's signed terms in force, which narrow the policy, or take them away."""
        self._ask("fleet", terms=terms)

    def shutdown(self) -> None:
        """Ask the node to drain and end."""
        self._ask("shutdown")

    # ---- jobs

    def prepare(
        self,
        kernel: str,
        inputs: Any,
        options: dict[str, Any] | None = None,
        model: Model | None = None,
    ) -> host.Prepared:
        """A person's input -> units of the kernel's fixed shape. UsageError if it does not fit."""
        return prepare(kernel, inputs, options, model)

    def submit_kernel(
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
        order = self._order(kernel, prepared, terms or Terms(), args or {})
        job_id: bytes = self._ask("submit", order=order_fields(order), timeout_s=PUT_S)["job_id"]
        return job_id

    def submit_job(
        self, kernel: KernelInfo, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> Job:
        """As `submit_kernel`, with a handle in the shape of concurrent.futures."""
        return Job(self, self.submit_kernel(kernel, prepared, terms=terms))

    # ---- functions and bundles

    def submit(
        self,
        function: Callable[..., Any] | Foreign,
        *args: Any,
        terms: Terms | None = None,
    ) -> Job:
        """Run a JAX function once on a car of the mesh: `mesh.submit(fn, x).result()`.

        The function is exported here and validated there; its arguments are arrays. Also for a
        bundle: `mesh.submit(Foreign.of_bundle(path), x)`. The result has no unit axis.
        """
        return self._submit(function, Arguments.of_one(args), terms)

    def map(
        self,
        function: Callable[..., Any] | Foreign,
        *stacked: Any,
        constants: Sequence[Any] = (),
        terms: Terms | None = None,
    ) -> Job:
        """Run a JAX function for each row of the arrays: `mesh.map(fn, xs).result()`.

        `constants` come after the rows, the same for every unit; cars fetch them once. Iterating
        over the job gives the rows' results in order, as they come.
        """
        return self._submit(function, Arguments.of_rows(stacked, constants), terms)

    def _submit(
        self, function: Callable[..., Any] | Foreign, given: Arguments, terms: Terms | None
    ) -> Job:
        foreign = self._exports.of(function, given.specs)
        return self.submit_foreign(foreign, given.prepare(foreign), terms=terms)

    def submit_foreign(
        self, foreign: Foreign, prepared: host.Prepared, *, terms: Terms | None = None
    ) -> Job:
        """Hand over a job of a program that is not of the release."""
        order = self._foreign_order(foreign, prepared, terms or Terms())
        answer = self._ask("submit", order=order_fields(order), timeout_s=PUT_S)
        return Job(self, answer["job_id"], order.outs, order.units)

    def call_foreign(
        self,
        foreign: Foreign,
        prepared: host.Prepared,
        *,
        terms: Terms | None = None,
        timeout_s: float | None = None,
    ) -> list[Array]:
        """As `call`, for a program that is not of the release."""
        order = self._foreign_order(foreign, prepared, terms or Terms(durable=False))
        answer = self._ask("call", order=order_fields(order), timeout_s=timeout_s or _forever())
        return split_outputs(read_outputs(answer), order.outs, order.units)

    def _foreign_order(self, foreign: Foreign, prepared: host.Prepared, terms: Terms) -> JobOrder:
        code = self._put(memoryview(foreign.content))
        return foreign_order(foreign, prepared, code, self._blobs_of(prepared, {}), terms)

    # ---- one call

    def call(
        self,
        kernel: KernelInfo,
        prepared: host.Prepared,
        *,
        terms: Terms | None = None,
        timeout_s: float | None = None,
    ) -> list[Array]:
        """Submit, wait, results: one round trip to the node, nothing written to disk.

        For work where latency counts; it is lost if the node dies. Arrays as `result` gives them.
        """
        terms = terms or Terms(durable=False)
        order = self._order(kernel, prepared, terms, {})
        answer = self._ask("call", order=order_fields(order), timeout_s=timeout_s or _forever())
        return split_outputs(read_outputs(answer), order.outs, order.units)

    def put(self, array: Array) -> BlobRef:
        """Store an array as a blob of raw little-endian C-order bytes."""
        return self._put(plain_bytes(array))

    def put_path(self, path: Path) -> BlobRef:
        """Store a file's bytes as a blob; the file stays where it is."""
        answer = self._ask("put_path", path=str(path.absolute()), timeout_s=PUT_S)
        return BlobRef(Digest(answer["blob_id"]), answer["size"])

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs of this node, oldest first: job_id, kernel, label, state, reason, units, done,
        submitted_unix_ms."""
        answer: list[dict[str, Any]] = self._ask("jobs")["jobs"]
        return answer

    def show(self, job_id: bytes) -> dict[str, Any]:
        """One job whole: as in `jobs`, and its tasks, attempts (with their cars) and receipts."""
        answer: dict[str, Any] = self._ask("show", job_id=job_id)["job"]
        return answer

    def explain(self, job_id: bytes) -> dict[str, Any]:
        """Why a job's runs wait or went where they went, as `mesh explain --json` has it.

        `stands`: cars that get no run now, by reason, with examples; `waits`: units, by what they
        wait for; `runs`: where each went and what its car was chosen by; `reasons`: how often each
        refusal or end came, the commonest first; `advice`: one line, or empty.
        """
        answer: dict[str, Any] = self._ask("explain", job_id=job_id)["explanation"]
        return answer

    def would(
        self,
        program: KernelInfo | Foreign,
        prepared: host.Prepared,
        *,
        terms: Terms | None = None,
    ) -> dict[str, Any]:
        """What submitting this would do now: which cars would be asked, why the others not, what
        a unit costs. As `mesh submit --dry-run --json` has it. No job is made, nothing is stored
        or sent; raises what the submission would raise at once.
        """
        terms = terms or Terms()
        refs = unstored_refs(prepared)
        order = imagined_order(program, prepared, refs, terms)
        kflop = kflop_per_unit(program, order)
        answer: dict[str, Any]
        answer = self._ask("would", order=order_fields(order), kflop_per_unit=kflop)["would"]
        return answer

    def logs(self, job_id: bytes) -> list[Notice]:
        """The newest notices of a job; a bounded number is kept, in memory only."""
        answer = self._ask("logs", job_id=job_id)
        return [Notice.of(notice) for notice in answer["notices"]]

    def find(self, prefix: str) -> bytes:
        """The id of the one job whose id in hex starts so; UsageError if none or several do."""
        return find(self.jobs(), prefix)

    def watch(self, job_id: bytes, *, outputs: bool = False) -> Iterator[Notice]:
        """What happens to a job from now on, after its present state; ends when the job has."""
        stream = _Stream()
        request_id = self._start(stream, "watch", job_id=job_id, outputs=outputs)
        try:
            while (notice := stream.queue.get()) is not None:
                if isinstance(notice, MeshError):
                    raise notice
                yield notice
        finally:
            with self._lock:
                known = self._streams.pop(request_id, None)
            if known is not None and self._gone is None:
                self._send(self._message("drop", drop=request_id))

    def wait(self, job_id: bytes, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the end of a job: state, reason, units, done. TimedOut leaves it running."""
        return self._ask("wait", job_id=job_id, timeout_s=timeout_s or _forever())

    def result(self, job_id: bytes, timeout_s: float | None = None) -> list[Array]:
        """One array [units, *shape] per output of the kernel. Waits for the job if it runs.

        A job that failed raises the error of its reason: NoSuitableNode, TaskFailed, TimedOut...
        """
        arrays, _ = self._result(job_id, timeout_s)
        return arrays

    def finish(self, job_id: bytes, timeout_s: float | None = None) -> Any:
        """The result as the kernel's host side presents it: what `mesh result` writes."""
        arrays, note = self._result(job_id, timeout_s)
        return finish(note, arrays)

    def cancel(self, job_id: bytes) -> None:
        """Stop a job; units already done stay. Of a job that has ended nothing changes."""
        self._ask("cancel", job_id=job_id)

    # ---- inside: orders, blobs, results

    def _order(
        self,
        kernel: KernelInfo,
        prepared: host.Prepared,
        terms: Terms,
        known: dict[int, BlobRef],
    ) -> JobOrder:
        check_kernel(kernel, prepared)
        note = Note.now(prepared, terms)
        return make_order(prepared, self._blobs_of(prepared, known), terms, note)

    def _blobs_of(self, prepared: host.Prepared, known: dict[int, BlobRef]) -> dict[int, BlobRef]:
        """References of the arguments that do not travel in frames; stored where they are not."""
        inline = inline_args(prepared)
        blobs = dict(known)
        for number, arg in enumerate(prepared.args):
            if number not in inline and number not in blobs:
                blobs[number] = self.put_path(arg.path) if arg.path else self.put(arg.array)
        return blobs

    def _put(self, content: memoryview) -> BlobRef:
        if content.nbytes <= INLINE_RESULT_BYTES_MAX:
            answer = self._ask("put_bytes", bytes=bytes(content), timeout_s=PUT_S)
        else:
            path = write_input(self.home, content)
            try:
                answer = self._ask("put_path", path=str(path), timeout_s=PUT_S)
            finally:
                remove(path)
        return BlobRef(Digest(answer["blob_id"]), answer["size"])

    def _result(self, job_id: bytes, timeout_s: float | None) -> tuple[list[Array], Note]:
        answer = self._ask("result", job_id=job_id, timeout_s=timeout_s or _forever())
        if answer["state"] != "done":
            raise error_of_reason(answer["reason"], answer.get("text", ""))
        outs = [ArraySpec(dtype, tuple(shape)) for dtype, shape in answer["outs"]]
        arrays = split_outputs(read_outputs(answer), outs, answer["units"])
        return arrays, Note.unpack(answer["request"])

    # ---- inside: the connection

    def _message(self, op: str, **fields: Any) -> dict[str, Any]:
        return {"op": op, "id": next(self._ids), **fields}

    def _send(self, message: dict[str, Any]) -> None:
        frame = pack(message)
        try:
            with self._lock:
                self._sock.sendall(frame)
        except OSError:
            raise self._gone or Unreachable("the node has gone away") from None

    def _ask(self, op: str, *, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        message = self._message(op, **fields)
        future: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        with self._lock:
            if self._gone is not None:
                raise self._gone
            self._waiting[message["id"]] = future
        self._send(message)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            with self._lock:
                self._waiting.pop(message["id"], None)
            with contextlib.suppress(MeshError):
                self._send(self._message("drop", drop=message["id"]))
            raise TimedOut(f"no answer within {timeout_s:g} s; the job, if any, goes on") from None

    def _start(self, stream: _Stream, op: str, **fields: Any) -> int:
        message = self._message(op, **fields)
        with self._lock:
            if self._gone is not None:
                raise self._gone
            self._streams[message["id"]] = stream
        self._send(message)
        request_id: int = message["id"]
        return request_id

    def _read(self) -> None:
        """The reader thread: answers to their futures, notices to their streams."""
        buffer = FrameBuffer()
        try:
            while received := self._sock.recv(_RECEIVE_BYTES):
                for message in buffer.feed(received):
                    self._deliver(message)
            error: MeshError = Unreachable("the node has gone away; its jobs go on when it is back")
        except OSError as failure:
            error = Unreachable(f"the connection to the node broke: {failure.strerror}")
        except MeshError as failure:
            error = failure
        self._end(error)

    def _deliver(self, message: dict[str, Any]) -> None:
        request_id = message["id"]
        with self._lock:
            future = self._waiting.get(request_id)
            stream = self._streams.get(request_id)
            if "notice" not in message:
                self._waiting.pop(request_id, None)
                self._streams.pop(request_id, None)
        error = error_of_answer(message["error"]) if "error" in message else None
        if future is not None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(message)
        elif stream is not None:
            self._push(request_id, stream, message, error)

    def _push(
        self, request_id: int, stream: _Stream, message: dict[str, Any], error: MeshError | None
    ) -> None:
        if "notice" not in message:
            item: Notice | MeshError | None = error
        elif stream.queue.qsize() < NOTICES_MAX:
            item = Notice.of(message["notice"])
        else:
            item = LocalResource("this program reads the job's notices too slowly")
            with self._lock:
                self._streams.pop(request_id, None)
        with contextlib.suppress(queue.Full):
            stream.queue.put_nowait(item)

    def _end(self, error: MeshError) -> None:
        """Nobody waits for ever on a connection that has ended."""
        with self._lock:
            self._gone = self._gone or error
            waiting, self._waiting = self._waiting, {}
            streams, self._streams = self._streams, {}
        for future in waiting.values():
            future.set_exception(self._gone)
        for stream in streams.values():
            with contextlib.suppress(queue.Full):
                stream.queue.put_nowait(self._gone)


def connect(home: Path, *, timeout_s: float = 5.0) -> Mesh:
    """Connect to the node that runs on this home. Unreachable if none does.

    `client.background.connect_or_start(home)` starts one where there is none.
    """
    path = socket_path(home, SOCKET_NAME)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.settimeout(None)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise Unreachable(
            f"no node runs on {home} ({why}); start one with `meshnode run`"
        ) from None
    mesh = Mesh(sock, home)
    try:
        version = mesh.hello().get("version")
        if version != CONTROL_VERSION:
            raise LocalProtocolError(
                f"the node speaks control version {version}, this program {CONTROL_VERSION}: "
                "restart the node after an upgrade"
            )
    except BaseException:
        mesh.close()
        raise
    return mesh


def _forever() -> float:
    """No job lasts longer than its deadline, and the node says when it has passed."""
    return threading.TIMEOUT_MAX / 2
