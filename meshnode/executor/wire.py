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
from typing import Any, Final

import cbor2

from meshnode.protocol.types import ARGS_MAX, DIMS_MAX, LEASE_UNITS_MAX, ArraySpec

# ---- node -> worker
LOAD: Final = 1
RUN: Final = 2
AREA: Final = 7  # shared memory from now on, one open file; see `area`
TAKEN: Final = 8  # the outputs of one UNITS_IN_AREA frame are copied
# ---- worker -> node
READY: Final = 16
LOADED: Final = 17
UNITS: Final = 18
ENDED: Final = 19
PROBED: Final = 20
UNITS_IN_AREA: Final = 26

ARTIFACT_BYTES_MAX: Final = 16 << 20
UNIT_BYTES_MAX: Final = 64 << 20  # all outputs of one unit
RUN_INLINE_BYTES_MAX: Final = 16 << 20  # inline inputs of one run
TEXT_BYTES_MAX: Final = 2048
PROBED_BYTES_MAX: Final = 64 << 10
FLUSH_UNITS: Final = 64
FLUSH_BYTES: Final = 32 << 10
FLUSH_MS: Final = 20
CONTROL_BYTES_MAX: Final = 4096  # one message to or from the zygote
FDS_MAX: Final = ARGS_MAX

HEAD: Final = struct.Struct("!IB")
# exec_id, first, count, bit i: mapped arg i is inline, inline bytes that are in the area
RUN_HEAD: Final = struct.Struct("!QQIQQ")
AREA_BODY: Final = struct.Struct("!QQ")  # bytes for inputs, bytes for outputs behind them
READY_BODY: Final = struct.Struct("!I")  # sandbox layers in force
LOADED_BODY: Final = struct.Struct("!IQI")  # compile_ms, flop per unit, memory_mb
UNITS_HEAD: Final = struct.Struct("!QQIIB")  # exec_id, first, units, device_ms, last
UNITS_AREA_AT: Final = struct.Struct("!Q")  # behind UNITS_HEAD: first byte among the outputs
ENDED_HEAD: Final = struct.Struct("!QHI")  # exec_id (0: the load), reason, device_ms

# The longest body a worker may send: a flush is sent once it is over FLUSH_BYTES, so it holds at
# most that plus one unit.
BODY_BYTES_MAX: Final = UNITS_HEAD.size + FLUSH_BYTES + UNIT_BYTES_MAX
LOAD_BYTES_MAX: Final = ARTIFACT_BYTES_MAX + (64 << 10)

DTYPE_BYTES: Final = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}


class WireError(Exception):
    """The other side broke the frame format."""


def array_bytes(spec: ArraySpec) -> int:
    """Size of one array, in Python ints so that no shape can overflow; KeyError: unknown dtype."""
    size = DTYPE_BYTES[spec.dtype]
    for length in spec.shape:
        size *= length
    return size


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
    """What a worker runs from now on: one program. Constants come as open files, in order."""

    artifact: bytes
    args: tuple[LoadArg, ...]
    outs: tuple[ArraySpec, ...]
    memory_mb_max: int


def encode_load(load: Load) -> bytes:
    body = cbor2.dumps(
        [
            load.artifact,
            [[arg.mapped, arg.spec.dtype, list(arg.spec.shape)] for arg in load.args],
            [[spec.dtype, list(spec.shape)] for spec in load.outs],
            load.memory_mb_max,
        ]
    )
    return frame(LOAD, body)


def _spec(dtype: Any, shape: Any) -> ArraySpec:
    if dtype not in DTYPE_BYTES or type(shape) is not list or len(shape) > DIMS_MAX:
        raise WireError("array spec")
    if any(type(n) is not int or n < 0 for n in shape):
        raise WireError("shape")
    return ArraySpec(dtype, tuple(shape))


def decode_load(body: bytes) -> Load:
    try:
        artifact, args, outs, memory_mb_max = cbor2.loads(body)
        if type(artifact) is not bytes or type(memory_mb_max) is not int:
            raise WireError("load")
        if len(args) > ARGS_MAX or len(outs) > ARGS_MAX:
            raise WireError("too many arrays")
        return Load(
            artifact,
            tuple(LoadArg(mapped is True, _spec(dtype, shape)) for mapped, dtype, shape in args),
            tuple(_spec(dtype, shape) for dtype, shape in outs),
            memory_mb_max,
        )
    except (cbor2.CBORDecodeError, ValueError, TypeError) as error:
        raise WireError("load") from error


def encode_run_head(
    exec_id: int, first: int, count: int, inline_mask: int, inline_bytes: int, area_bytes: int = 0
) -> bytes:
    """Header of a RUN frame; `inline_bytes` bytes follow, `area_bytes` are in the area."""
    head = HEAD.pack(RUN_HEAD.size + inline_bytes, RUN)
    return head + RUN_HEAD.pack(exec_id, first, count, inline_mask, area_bytes)


def decode_run(body: bytes) -> tuple[int, int, int, int, int, memoryview]:
    """(exec_id, first, count, inline_mask, area_bytes, inline)."""
    if len(body) < RUN_HEAD.size:
        raise WireError("run")
    exec_id, first, count, mask, area_bytes = RUN_HEAD.unpack_from(body)
    if not 1 <= count <= LEASE_UNITS_MAX:
        raise WireError("count")
    return exec_id, first, count, mask, area_bytes, memoryview(body)[RUN_HEAD.size :]


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
