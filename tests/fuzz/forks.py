"""Judges artifact bytes in a forked child with limits and a clock, and names what became of it.

The process that forks has imported jax and started no backend, as a car's zygote: it has one
thread, so a fork is safe and costs milliseconds. A child may end in three ways that are fine:
it accepts the bytes, it refuses them with a reason of the registry, or it dies alone.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from meshnode.worker import check
from meshnode.worker.zygote import import_jax, thread_count

MEMORY_BYTES_MAX: Final = 4 << 30
CPU_S_MAX: Final = 30
ANSWER_BYTES_MAX: Final = 1 << 16


class Outcome(NamedTuple):
    """`kind`: accepted, refused (`what` is the reason), died (the signal), hung, or escaped: an
    exception that is no refusal, which is the bug that is looked for."""

    kind: str
    what: str
    text: str
    seconds: float

    @property
    def fine(self) -> bool:
        return self.kind in ("accepted", "refused", "died", "hung")

    def __str__(self) -> str:
        return f"{self.kind} {self.what}".strip()


def ready() -> None:
    """Import what children need; fails if there is a second thread."""
    import_jax()
    assert thread_count() == 1


def judge(content: bytes, *, wall_s: float, compiled: bool = False) -> Outcome:
    """What became of a child that validated `content`, and if `compiled` and it was accepted, had
    XLA compile it."""
    reader, writer = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            _in_child(content, writer, compiled)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    answer = _read(reader, began + wall_s)
    os.close(reader)
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - began
    if answer is None:
        return Outcome("hung", "", f"no answer in {wall_s} s", seconds)
    if answer.endswith(b"\n"):
        told: dict[str, Any] = json.loads(answer)
        kind = "accepted" if told["accepted"] else told.get("kind", "refused")
        return Outcome(kind, told["reason"], told["text"], seconds)
    if status < 0:
        return Outcome("died", signal.Signals(-status).name, "", seconds)
    return Outcome("escaped", f"exit {status}", "", seconds)


def _read(fd: int, deadline: float) -> bytes | None:
    """All that the child says until it ends or has said a line; None at the deadline."""
    got = b""
    while not got.endswith(b"\n") and len(got) < ANSWER_BYTES_MAX:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        piece = os.read(fd, 65536)
        if not piece:
            break
        got += piece
    return got


def _in_child(content: bytes, writer: int, compiled: bool) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # MLIR says on it what it thinks of the bytes
    for which, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES_MAX),
        (resource.RLIMIT_CPU, CPU_S_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))
    try:
        answer = check.judge(content, builtin=False, manifest=None)
        if compiled and answer["accepted"]:
            answer = _compile(content, answer)
    except BaseException as error:  # noqa: BLE001 - what escapes the validator is what is looked for
        answer = {"accepted": False, "kind": "escaped", "reason": type(error).__name__}
        answer["text"] = str(error)[:200]
    os.write(writer, json.dumps(answer).encode() + b"\n")


def _compile(content: bytes, answer: dict[str, Any]) -> dict[str, Any]:
    """XLA's word on accepted bytes: an error is as good as a refusal, a crash is this child's."""
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(content))
    wide = any(aval.dtype.itemsize == 8 for aval in (*exported.in_avals, *exported.out_avals))
    try:
        with jax.enable_x64(wide):
            jax.jit(exported.call).lower(*exported.in_avals).compile()
    except Exception as error:  # noqa: BLE001 - jax and XLA have no common base
        return {"accepted": False, "reason": "FAILED_BY_JOB", "text": str(error)[:200]}
    return answer


def judge_folder(folder: Path, *, wall_s: float, compiled: bool = False) -> dict[str, Outcome]:
    """The outcome of every file of a folder, by name."""
    return {
        path.name: judge(path.read_bytes(), wall_s=wall_s, compiled=compiled)
        for path in sorted(folder.iterdir())
    }
