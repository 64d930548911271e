"""Judges artifact bytes in a process of its own: whatever they do to a parser is a typed refusal.

Used by `mesh artifact check` and by tests; loads no jax. The child is meshnode/worker/check.py. It
has a clock from when it has imported jax: a hang in native code ends by SIGKILL, by nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ArtifactRefused, LocalResource, RemoteProtocolError, VerificationFailed
from ..protocol.codec import encode
from ..protocol.objects import Manifest
from ..protocol.reasons import Reason
from ..protocol.rule import encode_map
from .bundle import BUNDLE_BYTES_MAX, is_bundle, read_bundle

START_S_MAX: Final = 120.0  # importing jax on a busy machine
WALL_S: Final = 20.0
ANSWER_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one file: accepted, or refused with a reason of the registry and a line of text."""

    accepted: bool
    reason: str
    text: str
    manifest: Manifest | None = None
    figures: dict[str, Any] | None = None  # operations, flop, bytes, unbounded; if accepted


def check_bytes(wire: bytes, *, builtin: bool = False, wall_s: float = WALL_S) -> Verdict:
    """The verdict on a bundle or on bare `jax.export` bytes. Raises LocalResource only."""
    manifest, content = None, wire
    if len(wire) > BUNDLE_BYTES_MAX:
        text = f"{len(wire)} bytes; a bundle has at most {BUNDLE_BYTES_MAX}"
        return _refused(Reason.ARTIFACT_LIMITS, text)
    if is_bundle(wire):
        try:
            bundle = read_bundle(wire)
        except VerificationFailed as error:
            return _refused(Reason.BAD_SIGNATURE, str(error))
        except RemoteProtocolError as error:
            return _refused(Reason.ARTIFACT_FORMAT, f"the bundle is damaged: {error}")
        except ArtifactRefused as error:
            return Verdict(False, error.reason.name, str(error))
        manifest, content = bundle.manifest, bundle.content
    answer = _ask(content, builtin=builtin, manifest=manifest, wall_s=wall_s)
    figures = {k: v for k, v in answer.items() if k not in ("accepted", "reason", "text")}
    return Verdict(answer["accepted"], answer["reason"], answer["text"], manifest, figures or None)


def _refused(reason: Reason, text: str) -> Verdict:
    return Verdict(False, reason.name, text)


def _ask(content: bytes, *, builtin: bool, manifest: Manifest | None, wall_s: float) -> Any:
    payload = None if manifest is None else encode(encode_map(manifest)).hex()
    head = json.dumps({"builtin": builtin, "manifest": payload}).encode() + b"\n"
    child = subprocess.Popen(
        [sys.executable, "-m", "meshnode.worker.check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # MLIR and XLA say on it what they think of the bytes
        start_new_session=True,
        env=_environment(),
    )
    try:
        assert child.stdin is not None and child.stdout is not None
        if _read(child.stdout.fileno(), 1, START_S_MAX) != b"R":
            raise LocalResource(
                "the process that checks artifacts did not start; is jax installed?"
            )
        deadline = time.monotonic() + wall_s
        try:
            child.stdin.write(head + content)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died of something else; its exit status says so below
        line = _read(child.stdout.fileno(), ANSWER_BYTES_MAX, deadline - time.monotonic(), b"\n")
        if line.endswith(b"\n"):
            return json.loads(line)
        return _death(child, deadline, wall_s)
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def _environment() -> dict[str, str]:
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME")
    threads = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    return {k: v for k, v in os.environ.items() if k in kept} | threads | {"JAX_PLATFORMS": "cpu"}


def _read(fd: int, most: int, seconds: float, until: bytes = b"") -> bytes:
    """Up to `most` bytes, to `until`, to the end of file or to the deadline, whichever is first."""
    deadline, got = time.monotonic() + seconds, b""
    while len(got) < most and not (until and got.endswith(until)):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, min(65536, most - len(got)))
        if not piece:
            break
        got += piece
    return got


def _death(child: subprocess.Popen[bytes], deadline: float, wall_s: float) -> dict[str, Any]:
    try:
        code = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        text = f"reading the artifact took longer than {wall_s:.0f} s and was ended"
        return {"accepted": False, "reason": Reason.WALL_CLOCK.name, "text": text}
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    text = f"the artifact ended the process that read it ({how}); no car would run it"
    return {"accepted": False, "reason": Reason.WORKER_DIED.name, "text": text}
