"""What node, zygote and worker say to each other: frames over socketpairs.

Between executor (`supervisor`, `forks`) and the child processes of `meshnode.worker`; imported by
both sides, so nothing here but the standard library and cbor2, and no jax.

Node <-> worker: u32 body length, u8 kind, body, on a stream socket; open files ride on the first
byte of a frame (SCM_RIGHTS). What a worker says is parsed with fixed structs and exact lengths
only: a worker may run a stranger's code, and a struct has nothing to exploit. Node <-> zygote:
small JSON objects on a SOCK_SEQPACKET socket, one a message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import cbor2

from meshnode.protocol.types import (
    ARGS_MAX,
    ARTIFACT_BYTES_MAX,
    DIMS_MAX,
    LEASE_UNITS_MAX,
    STEPS_MAX,
    ArraySpec,
    Stepped,
)
from meshnode.protocol.types import DTYPE_BYTES as DTYPE_BYTES
from meshnode.protocol.types import array_bytes as array_bytes

# ---- node -> worker
LOAD: Final = 1
RUN: Final = 2
STEPS: Final = 3  # a run of a stepped program
LOOP: Final = 4  # the loop over many units that WANT asked for, as an open file
KEPT: Final = 5  # the last STATE lies in the blob store: its file may be written again
STOP: Final = 6  # the run is to end at the next unit or slice; SIGUSR1 says that it is here
AREA: Final = 7  # shared memory from now on, one open file; see `area`
TAKEN: Final = 8  # the outputs of one UNITS_IN_AREA frame are copied
# ---- worker -> node
READY: Final = 16
LOADED: Final = 17
UNITS: Final = 18
ENDED: Final = 19
PROBED: Final = 20
WANT: Final = 21  # a loop over so many units would pay
COMPILED: Final = 22  # from a compile-only worker: figures, executable
UNUSABLE: Final = 23  # the executable of the LOAD does not load here
STATE: Final = 24  # a checkpoint lies in the run's state file
WATCH: Final = 25  # watched arrays after a slice
UNITS_IN_AREA: Final = 26

UNIT_BYTES_MAX: Final = 64 << 20  # all outputs of one unit
RUN_INLINE_BYTES_MAX: Final = 16 << 20  # inline inputs of one run
EXECUTABLE_BYTES_MAX: Final = 48 << 20  # one compiled program, serialised
STATE_BYTES_MAX: Final = 256 << 20  # all state arrays of a stepped program
LOOP_UNITS_MAX: Final = 64  # units of one XLA call
TEXT_BYTES_MAX: Final = 2048
PROBED_BYTES_MAX: Final = 64 << 10
FLUSH_UNITS: Final = 64
FLUSH_BYTES: Final = 32 << 10
FLUSH_MS: Final = 50
FLUSH_MS_MAX: Final = 500
FLUSH_SHARE: Final = 0.25  # of the run's time so far
AREA_BYTES_LEAST: Final = 64 << 10  # inputs or results of a run that are less travel in frames
AREA_FLUSH_BYTES: Final = 1 << 20
CONTROL_BYTES_MAX: Final = 4096  # one message to or from the zygote
FDS_MAX: Final = ARGS_MAX + 2  # the arguments, a run's state file, the checkpoint it goes on from
ENVIRONMENT_BYTES: Final = 32

HEAD: Final = struct.Struct("!IB")
RUN_HEAD: Final = struct.Struct("!QQIQQ")  # of `RunHead`
STEPS_HEAD: Final = struct.Struct("!IIB")  # of `StepsHead`
AREA_BODY: Final = struct.Struct("!QQ")  # bytes for inputs, bytes for outputs behind them
LOOP_BODY: Final = struct.Struct("!I")  # units
EXEC_BODY: Final = struct.Struct("!Q")  # of KEPT and STOP: exec_id
READY_BODY: Final = struct.Struct(f"!I{ENVIRONMENT_BYTES}s")  # sandbox layers, environment
EXECUTABLE_HEAD: Final = struct.Struct("!8s32sIQI")  # of a file: magic, SHA-256, figures
FIGURES: Final = struct.Struct("!IQI")  # compile_ms, flop per unit, memory_mb
AT_LEAST: Final = 1 << 63  # of that flop: loops whose length is data count once in it
WANT_BODY: Final = LOOP_BODY
UNITS_HEAD: Final = struct.Struct("!QQIIB")  # exec_id, first, units, device_ms, last
UNITS_AREA_AT: Final = struct.Struct("!Q")  # behind UNITS_HEAD: first byte among the outputs
ENDED_HEAD: Final = struct.Struct("!QHI")  # exec_id (0: the load), reason, device_ms
SLICE_HEAD: Final = struct.Struct(
    "!QQII"
)  # of STATE and WATCH: exec_id, unit, steps done, device_ms

# The longest body of a running worker: all results of a run that is too small for the area.
BODY_BYTES_MAX: Final = UNITS_HEAD.size + AREA_BYTES_LEAST
COMPILED_BYTES_MAX: Final = FIGURES.size + EXECUTABLE_BYTES_MAX
LOAD_BYTES_MAX: Final = ARTIFACT_BYTES_MAX + (64 << 10)


class WireError(Exception):
    """The other side broke the frame format."""


# ------------------------------------------------------------------------------------- frames


class FrameReader:
    """Bytes in, whole frames out; a length over the bound is a WireError at its header."""

    def __init__(self, bytes_max: int = BODY_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        buffer = self._buffer
        buffer += chunk
        while len(buffer) >= HEAD.size:
            length, kind = HEAD.unpack_from(buffer)
            if length > self._bytes_max:
                raise WireError(f"frame of {length} bytes")
            end = HEAD.size + length
            if len(buffer) < end:
                return
            body = bytes(memoryview(buffer)[HEAD.size : end])
            del buffer[:end]
            yield kind, body


def frame(kind: int, *parts: bytes) -> bytes:
    return b"".join((HEAD.pack(sum(map(len, parts)), kind), *parts))


@dataclass(frozen=True, slots=True)
class LoadArg:
    mapped: bool
    spec: ArraySpec


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker runs from now on: one program. Constants come as open files, in order, and
    after them the executable, if one is there: then `artifact` may be empty."""

    artifact: bytes
    args: tuple[LoadArg, ...]
    outs: tuple[ArraySpec, ...]
    memory_mb_max: int
    stepped: Stepped | None = None
    loop_units: int = 0  # for a compile-only worker: the loop over so many units; 0 is one unit
    executable: bool = False
    builtin: bool = False  # of the release: may call what a stranger's may not

    @property
    def state(self) -> tuple[ArraySpec, ...]:
        """Arrays of a stepped program's state, in order: what its units begin with."""
        return tuple(arg.spec for arg in self.args if arg.mapped) if self.stepped else ()


def encode_load(load: Load) -> bytes:
    stepped = load.stepped
    body = cbor2.dumps(
        [
            load.artifact,
            [[arg.mapped, arg.spec.dtype, list(arg.spec.shape)] for arg in load.args],
            [[spec.dtype, list(spec.shape)] for spec in load.outs],
            load.memory_mb_max,
            stepped and [list(stepped.result), list(stepped.watch)],
            load.loop_units,
            load.executable,
            load.builtin,
        ]
    )
    return frame(LOAD, body)


def _stepped(fields: Any, state: int) -> Stepped | None:
    if fields is None:
        return None
    result, watch = fields
    for index in (*result, *watch):
        if type(index) is not int or not 0 <= index < state:
            raise WireError("stepped")
    return Stepped(tuple(result), tuple(watch))


def _spec(dtype: Any, shape: Any) -> ArraySpec:
    if dtype not in DTYPE_BYTES or type(shape) is not list or len(shape) > DIMS_MAX:
        raise WireError("array spec")
    if any(type(n) is not int or n < 0 for n in shape):
        raise WireError("shape")
    return ArraySpec(dtype, tuple(shape))


def decode_load(body: bytes) -> Load:
    try:
        artifact, args, outs, memory_mb_max, stepped, loop_units, *flags = cbor2.loads(body)
        executable, builtin = flags
        if type(artifact) is not bytes or type(memory_mb_max) is not int:
            raise WireError("load")
        if len(args) > ARGS_MAX or len(outs) > ARGS_MAX:
            raise WireError("too many arrays")
        if type(loop_units) is not int or not 0 <= loop_units <= LOOP_UNITS_MAX:
            raise WireError("loop")
        return Load(
            artifact,
            tuple(LoadArg(mapped is True, _spec(dtype, shape)) for mapped, dtype, shape in args),
            tuple(_spec(dtype, shape) for dtype, shape in outs),
            memory_mb_max,
            _stepped(stepped, sum(mapped is True for mapped, _, _ in args)),
            loop_units,
            executable is True,
            builtin is True,
        )
    except (cbor2.CBORDecodeError, ValueError, TypeError) as error:
        raise WireError("load") from error


class RunHead(NamedTuple):
    """Of a RUN or STEPS frame."""

    exec_id: int
    first: int
    units: int
    inline_mask: int
    """Bit i: the i-th mapped argument is inline."""
    area_bytes: int
    """Inline bytes that lie in the area; the others follow in the frame."""


def encode_run_head(head: RunHead, inline_bytes: int) -> bytes:
    """Header of a RUN frame; `inline_bytes` bytes follow."""
    return HEAD.pack(RUN_HEAD.size + inline_bytes, RUN) + RUN_HEAD.pack(*head)


def decode_run(body: bytes) -> tuple[RunHead, memoryview]:
    """(head, what follows it)."""
    if len(body) < RUN_HEAD.size:
        raise WireError("run")
    head = RunHead(*RUN_HEAD.unpack_from(body))
    if not 1 <= head.units <= LEASE_UNITS_MAX:
        raise WireError("count")
    return head, memoryview(body)[RUN_HEAD.size :]


class StepsHead(NamedTuple):
    """After the RunHead of a STEPS frame."""

    steps: int
    step: int
    """Steps that are done."""
    goes_on: bool
    """From a checkpoint, in the last file that came along."""


def encode_steps_head(head: RunHead, steps: StepsHead, inline_bytes: int) -> bytes:
    """Header of a STEPS frame; `inline_bytes` bytes follow."""
    length = RUN_HEAD.size + STEPS_HEAD.size + inline_bytes
    return HEAD.pack(length, STEPS) + RUN_HEAD.pack(*head) + STEPS_HEAD.pack(*steps)


def decode_steps(body: bytes) -> tuple[RunHead, StepsHead, memoryview]:
    head, rest = decode_run(body)
    if len(rest) < STEPS_HEAD.size:
        raise WireError("steps")
    steps, step, goes_on = STEPS_HEAD.unpack_from(rest)
    if not (1 <= steps <= STEPS_MAX and 0 <= step <= steps):
        raise WireError("steps")
    return head, StepsHead(steps, step, bool(goes_on)), rest[STEPS_HEAD.size :]


def encode_ended(exec_id: int, reason: int, device_ms: int, text: str) -> bytes:
    line = text.encode("utf-8", "replace")[:TEXT_BYTES_MAX]
    return frame(ENDED, ENDED_HEAD.pack(exec_id, reason, device_ms), line)


def decode_ended(body: bytes) -> tuple[int, int, int, str]:
    """(exec_id, reason, device_ms, text); the text is one printable line."""
    if not ENDED_HEAD.size <= len(body) <= ENDED_HEAD.size + TEXT_BYTES_MAX:
        raise WireError("ended")
    exec_id, reason, device_ms = ENDED_HEAD.unpack_from(body)
    return exec_id, reason, device_ms, one_line(body[ENDED_HEAD.size :].decode("utf-8", "replace"))


def one_line(text: str, chars_max: int = 400) -> str:
    """First line that says something, printable: a worker's words end up on a terminal."""
    for line in text.splitlines():
        if line.strip():
            return "".join(c if c.isprintable() else "?" for c in line.strip())[:chars_max]
    return ""


# ------------------------------------------------------------------------------------- zygote


def encode_control(**fields: int | str) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()[:CONTROL_BYTES_MAX]


def decode_control(message: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(message)
    except ValueError as error:
        raise WireError("control message") from error
    if type(fields) is not dict:
        raise WireError("control message")
    return fields
