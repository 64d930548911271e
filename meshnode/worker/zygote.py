"""The single-threaded process that has imported jax and forks workers from itself.

Started by the executor (`--fd`, one end of a socketpair) or once for a whole testnet
(`--listen PATH`), where each connection gets a child zygote of its own, so that all cars of one
machine share jax's pages. No backend is ever started here: a backend starts threads, and a fork
of a threaded process deadlocks. A fork costs 10 ms where an import costs 700.

Requests and reports are JSON messages on a SOCK_SEQPACKET socket: `worker`, `compile` and `probe`
bring the child's socket along; `forked` answers with a pidfd, by which the node kills without any
race on pid reuse; `exit` reports how a child ended. End of file on the socket ends the zygote, and
the zygote's end kills its children (SIGKILL from here, PDEATHSIG if it was itself killed).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from meshnode.executor import wire

from . import confine
from .cgroup import Group
from .profile import detect

CHILDREN_MAX: Final = 512  # workers of a car, or cars of a testnet
BACKLOG: Final = 128
_UCRED = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED, unix(7)


@dataclass(slots=True)
class _Child:
    request_id: int
    pid: int
    group: Group | None = None


class _Children:
    """Forks and reaps; one pidfd a child in the poll set, so no signal handler is needed."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self._children: dict[int, _Child] = {}

    def fork(
        self, request_id: int, body: Callable[[], None], group: Group | None = None
    ) -> tuple[int, int]:
        """(pid, pidfd). The child runs `body` and never comes back."""
        if len(self._children) >= CHILDREN_MAX:
            raise OSError(f"more than {CHILDREN_MAX} children")
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                confine.die_with(parent)
                body()
                status = 0
            except BaseException:  # noqa: BLE001 - a fork must not return into its parent's frames
                traceback.print_exc()
            finally:
                os._exit(status)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(request_id, pid, group)
        self.poll.register(pidfd, select.POLLIN)
        return pid, pidfd

    def reap(self, pidfd: int) -> tuple[int, int, bool] | None:
        """(request id, wait status, whether its group ran out of memory) of a child that ended;
        None if the fd is none of ours."""
        child = self._children.pop(pidfd, None)
        if child is None:
            return None
        self.poll.unregister(pidfd)
        os.close(pidfd)
        status, ran_out = os.waitpid(child.pid, 0)[1], False
        if child.group is not None:
            ran_out = child.group.ran_out()
            child.group.remove()
        return child.request_id, status, ran_out

    def kill_all(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
        for pidfd in list(self._children):
            self.reap(pidfd)


def import_jax() -> None:
    """All that a worker's first load would import, and nothing that starts a thread."""
    import concurrent.futures  # noqa: F401

    # The compiler's LAPACK table pulls scipy in at the first compile: 340 ms if each worker did.
    import jax
    import jax._src.export.serialization
    import jax.experimental.serialize_executable
    import jax.export
    import jax.numpy  # noqa: F401
    import jaxlib.mlir.dialects.builtin
    import jaxlib.mlir.dialects.mhlo  # noqa: F401
    import numpy  # noqa: F401
    from jaxlib.cpu import _lapack

    with contextlib.suppress(ImportError):
        importlib.import_module("scipy.linalg.cython_blas")
        importlib.import_module("scipy.linalg.cython_lapack")
        # jax does this where it lowers a call; machine code out of the cache is not lowered.
        _lapack.initialize()

    from . import compiling, main, probe  # noqa: F401

    compiling.cpu_features()  # read once, for all

    detect()
    # jax warns at every fork; this process has one thread and no backend, which is checked.
    warnings.filterwarnings("ignore", message=".*os.fork.*", category=RuntimeWarning)
    threads = thread_count()
    if threads != 1:
        raise RuntimeError(f"{threads} threads after importing jax; a fork would not be safe")
    gc.collect()
    gc.freeze()  # the collector would write to, and so unshare, every page of jax's objects


def thread_count() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no thread count")


def serve(control: socket.socket) -> None:
    """Fork what the node asks for until it hangs up."""
    children = _Children()
    children.poll.register(control.fileno(), select.POLLIN)
    with contextlib.suppress(BrokenPipeError):
        control.send(wire.encode_control(op="ready", pid=os.getpid()))
    try:
        while True:
            for fd, _ in children.poll.poll():
                if fd != control.fileno():
                    _report_exit(control, children, fd)
                elif not _serve_one(control, children):
                    return
    except (BrokenPipeError, ConnectionResetError):
        return
    finally:
        children.kill_all()


def _report_exit(control: socket.socket, children: _Children, pidfd: int) -> None:
    ended = children.reap(pidfd)
    if ended is None:
        return
    request_id, status, ran_out = ended
    code = os.waitstatus_to_exitcode(status)
    control.send(wire.encode_control(op="exit", id=request_id, code=code, oom=int(ran_out)))


def _serve_one(control: socket.socket, children: _Children) -> bool:
    message, fds, _, _ = socket.recv_fds(control, wire.CONTROL_BYTES_MAX, 1)
    if not message:
        return False
    request = wire.decode_control(message)
    request_id, group = request["id"], None
    try:
        group = _group_of(request)
        pid, pidfd = children.fork(request_id, _child_body(request, fds, group), group)
    except OSError as error:
        if group is not None:
            group.remove()
        control.send(wire.encode_control(op="failed", id=request_id, text=str(error)))
    else:
        answer = wire.encode_control(op="forked", id=request_id, pid=pid)
        socket.send_fds(control, [answer], [pidfd])
    finally:
        for fd in fds:
            os.close(fd)
    return True


def _group_of(request: dict[str, object]) -> Group | None:
    parent = request.get("cgroup")
    if not parent:
        return None
    name = f"worker-{os.getpid()}-{request['id']}"
    limit = confine.Terms(_whole(request, "memory_mb"), detect()).limit_bytes
    return Group.make(Path(str(parent)), name, limit)


def _whole(request: dict[str, object], name: str) -> int:
    value = request.get(name, 0)
    if not isinstance(value, int) or value < 0:
        raise wire.WireError(f"request: {name}")
    return value


def _child_body(
    request: dict[str, object], fds: list[int], group: Group | None
) -> Callable[[], None]:
    op, threads = request["op"], _whole(request, "threads")
    if op not in ("worker", "compile", "probe") or len(fds) != 1:
        raise wire.WireError("request")
    terms = confine.Terms(_whole(request, "memory_mb"), detect(), group)

    def body() -> None:
        confine.keep_only(fds[0])
        if threads:
            os.environ["NPROC"] = str(threads)  # what XLA's CPU client sizes its pools by
        with socket.socket(fileno=fds[0]) as sock:
            if op == "probe":
                from . import probe

                probe.serve(sock, terms)
            else:
                from . import main

                main.serve(sock, terms) if op == "worker" else main.compile_only(sock, terms)

    return body


def listen(path: Path, lifeline: int | None) -> None:
    """One parent for many cars: each connection is served by a zygote forked for it."""
    children = _Children()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        os.umask(0o077)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(BACKLOG)  # before the import: cars may connect and wait for `ready`
        try:
            import_jax()
            print("ready", flush=True)
            children.poll.register(listener.fileno(), select.POLLIN)
            if lifeline is not None:
                children.poll.register(lifeline, select.POLLIN)
            while True:
                for fd, _ in children.poll.poll():
                    if fd == lifeline:
                        return
                    if fd == listener.fileno():
                        _accept(listener, children)
                    else:
                        children.reap(fd)
        finally:
            path.unlink(missing_ok=True)
            children.kill_all()


def _accept(listener: socket.socket, children: _Children) -> None:
    connection, _ = listener.accept()
    with connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        if _UCRED.unpack(credentials)[1] != os.geteuid():
            return

        def body() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            confine.keep_only(connection.fileno())
            serve(connection)

        with contextlib.suppress(OSError):  # over the bound: the car sees its connection closed
            children.fork(0, body)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m meshnode.worker.zygote", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="control socket, inherited")
    where.add_argument("--listen", type=Path, help="path of a unix socket to make")
    parser.add_argument("--lifeline", type=int, help="end when this inherited file says so")
    options = parser.parse_args()
    # Before numpy is imported: OpenBLAS starts its threads at import.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to handle
    signal.signal(signal.SIGTERM, _terminate)
    if options.listen is not None:
        listen(options.listen, options.lifeline)
        return
    with socket.socket(fileno=options.fd) as control:
        try:
            import_jax()
        except Exception as error:  # noqa: BLE001 - becomes the node's NO_WORKER
            text = wire.one_line(f"{type(error).__name__}: {error}")
            control.send(wire.encode_control(op="broken", text=text))
            sys.exit(1)
        serve(control)


if __name__ == "__main__":
    main()
