"""From a kernel's prepared input to a job order, and from the units' bytes back to arrays.

Pure: which arguments travel inline and which become blobs is decided here, the blobs themselves
are stored by the caller (`Mesh`, over the control socket, or a test, straight into a store).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from jaxkernels import host, registry
from jaxkernels.errors import KernelError
from jaxkernels.models import Model
from jaxkernels.spec import KernelInfo
from meshnode import errors
from meshnode.errors import LocalProtocolError, MeshError, UsageError
from meshnode.node.owners import owner_of
from meshnode.node.wire import NOTE_BYTES_MAX
from meshnode.protocol.effects import ArgSource
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import (
    INLINE_BYTES_MAX,
    STEPS_MAX,
    ArraySpec,
    BlobRef,
    Digest,
    Peer,
    Stepped,
    array_bytes,
)

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

UNIT_WALL_S: Final = 60.0
FOREIGN: Final = "foreign"  # in the note's context: no kernel of the release, plain arrays
LONG_WALL_S: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How a job is to be run; everything has a default."""

    policy: str = "tokens"
    """`tokens`: ask the cell's rendezvous for idle cars. `adverts`: offer to cars whose adverts
    said idle. Both announce in the cell what finds nobody. `gossip`: always announce."""
    cars: tuple[Peer, ...] = ()
    """Only these cars, or those of `owners`; both empty means any that may."""
    owners: tuple[str, ...] = ()
    """Only cars that settle with these accounts: 64 hexadecimal digits, `mine` for one's own,
    `fleet` for one's own and those that `config.toml` lists as `[node] fleet`."""
    deadline_s: float = 0.0
    """From now; 0 leaves it to the node (24 h). When it passes the job fails (exit code 4)."""
    durable: bool = True
    """Job and results survive a crash of the node. A single low-latency call does without."""
    lease_units_max: int = 0
    """Most units in one lease; 0 leaves it to the guided size."""
    wall_s_max: float = 0.0
    """Of one unit; a car kills its worker when it is over. 0: a minute, of a long job six hours."""
    steps: int = 0
    """Of each unit of a stepped kernel; 0 is what its input asks for."""
    memory_mb_max: int = 2_048
    label: str = ""
    """The person's own word for the job, shown by `mesh jobs`."""
    nonce: bytes = b""
    """16 bytes: the same order with the same nonce is the same job. Empty: a random one."""


@dataclass(frozen=True, slots=True)
class Note:
    """What of a request is kept with its job, so that another process can finish it later."""

    kernel: str
    context: dict[str, Any]
    label: str = ""
    submitted_unix_ms: int = 0

    @staticmethod
    def now(prepared: host.Prepared, terms: Terms) -> Note:
        unix_ms = time.time_ns() // 1_000_000
        return Note(prepared.kernel, dict(prepared.context), terms.label, unix_ms)

    def pack(self) -> bytes:
        fields = {
            "kernel": self.kernel,
            "context": self.context,
            "label": self.label,
            "submitted_unix_ms": self.submitted_unix_ms,
        }
        packed = json.dumps(fields, separators=(",", ":")).encode()
        if len(packed) > NOTE_BYTES_MAX:
            raise UsageError(
                f"what {self.kernel} must remember of its input is {len(packed)} bytes, over the "
                f"bound of {NOTE_BYTES_MAX}; split the input"
            )
        return packed

    @staticmethod
    def unpack(packed: bytes) -> Note:
        try:
            fields = json.loads(packed)
            return Note(
                str(fields["kernel"]),
                dict(fields["context"]),
                str(fields["label"]),
                int(fields["submitted_unix_ms"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise LocalProtocolError(f"the note kept with the job is damaged: {error!r}") from None


def prepare(
    kernel: str, inputs: Any, options: dict[str, Any] | None = None, model: Model | None = None
) -> host.Prepared:
    """A person's input -> units of the kernel's fixed shape. UsageError if it does not fit."""
    try:
        return host.prepare(kernel, inputs, options, model)
    except KernelError as error:
        raise of_kernel_error(error) from error


def check_kernel(kernel: KernelInfo, prepared: host.Prepared) -> None:
    """UsageError if the input is another kernel's."""
    if kernel.spec != prepared.kernel:
        raise UsageError(f"the input was prepared for {prepared.kernel}, not {kernel.spec}")


def inline_args(prepared: host.Prepared) -> frozenset[int]:
    """Which arguments travel in frames: the smallest mapped ones, as long as all stay small.

    A constant is a blob, however small: a worker reads it once, for all runs.
    """
    chosen: set[int] = set()
    total = 0
    mapped = [(number, arg) for number, arg in enumerate(prepared.args) if arg.mapped]
    for number, arg in sorted(mapped, key=lambda pair: pair[1].array.nbytes):
        total += arg.array.nbytes
        if total > INLINE_BYTES_MAX:
            break
        chosen.add(number)
    return frozenset(chosen)


@dataclass(frozen=True, slots=True)
class Program:
    """What a job runs, whoever made it."""

    kernel: str  # the name that people see
    artifact: Digest
    outs: tuple[ArraySpec, ...]
    unit_ms_hint: float = 0.0
    code: BlobRef | None = None  # the artifact's bytes, unless each car has them
    stepped: Stepped | None = None
    steps: int = 0


def builtin(prepared: host.Prepared, steps: int = 0) -> Program:
    """A kernel of the release; `steps` 0 is what the prepared input asks for."""
    info = registry.get(prepared.kernel)
    stepped = None
    if info.stepped is not None:
        stepped = Stepped(info.stepped.result, info.stepped.watch)
        steps = steps or host.steps(prepared)
    elif steps:
        raise UsageError(f"{info.spec} has no steps")
    if not 0 <= steps <= STEPS_MAX:
        raise UsageError(f"{steps} steps; a unit has at most {STEPS_MAX}")
    return Program(
        info.spec,
        Digest(registry.artifact(info.spec).digest),
        tuple(ArraySpec(out.dtype, out.shape) for out in info.outs),
        float(info.unit_ms_hint),
        stepped=stepped,
        steps=steps,
    )


def make_order(
    prepared: host.Prepared,
    blobs: dict[int, BlobRef],
    terms: Terms,
    note: Note,
    program: Program | None = None,
) -> JobOrder:
    """The order; `blobs` has a reference for each argument that is not inline."""
    program = program or builtin(prepared, terms.steps)
    wall_s = terms.wall_s_max or (LONG_WALL_S if program.stepped else UNIT_WALL_S)
    inline: list[bytes] = []
    sources: list[ArgSource] = []
    for number, arg in enumerate(prepared.args):
        blob = blobs.get(number)
        sources.append(ArgSource(arg.mapped, ArraySpec(arg.dtype, arg.shape), blob))
        if blob is None:
            inline.append(arg.array.tobytes())
    return JobOrder(
        program.kernel,
        program.artifact,
        tuple(sources),
        program.outs,
        prepared.units,
        terms.nonce or secrets.token_bytes(16),
        inline=b"".join(inline),
        unit_ms_hint=program.unit_ms_hint,
        wall_ms_max=int(wall_s * 1000),
        memory_mb_max=terms.memory_mb_max,
        lease_units_max=terms.lease_units_max,
        policy=terms.policy,
        cars=terms.cars,
        owners=tuple(map(owner_of, terms.owners)),
        deadline_ms=int(terms.deadline_s * 1000),
        durable=terms.durable,
        request=note.pack(),
        code=program.code,
        steps=program.steps,
        stepped=program.stepped,
    )


def dtype_of(spec: ArraySpec) -> np.dtype[Any]:
    """As it lies on the wire: little-endian."""
    if spec.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 - which numpy has bfloat16 from; a part of any jax

    return np.dtype(spec.dtype).newbyteorder("<")


def plain_bytes(array: Array) -> memoryview:
    """Little-endian C-order bytes of an array: its own memory, where it lies so."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def split_outputs(packed: Any, outs: Sequence[ArraySpec], units: int) -> list[Array]:
    """Bytes of all units, each unit's outputs side by side -> one array [units, *shape] per output.

    `packed` is anything with the buffer interface; a single output is a view of it, not a copy.
    """
    sizes = [array_bytes(out) for out in outs]
    flat = np.frombuffer(packed, dtype=np.uint8)
    if flat.nbytes != units * sum(sizes):
        raise LocalProtocolError(f"a result has {flat.nbytes} bytes, not {units * sum(sizes)}")
    rows = flat.reshape(units, sum(sizes))
    arrays: list[Array] = []
    offset = 0
    for out, size in zip(outs, sizes, strict=True):
        column = np.ascontiguousarray(rows[:, offset : offset + size])
        arrays.append(column.view(dtype_of(out)).reshape(units, *out.shape))
        offset += size
    return arrays


def finish(note: Note, arrays: Sequence[Array]) -> Any:
    """What the person asked for, by the kernel's own host side."""
    if note.context.get(FOREIGN):
        plain = [array[0] for array in arrays] if note.context.get("single") else list(arrays)
        return plain[0] if len(plain) == 1 else tuple(plain)
    try:
        return host.finish(note.kernel, arrays, note.context)
    except KernelError as error:
        raise of_kernel_error(error) from error


def of_kernel_error(error: KernelError) -> MeshError:
    """jaxkernels does not import meshnode: its errors join the one tree here."""
    by_code: dict[int, type[MeshError]] = {
        1: errors.TaskFailed,
        2: errors.UsageError,
        5: errors.VerificationFailed,
        7: errors.Unreachable,
        8: errors.LocalResource,
    }
    return by_code.get(error.exit_code, MeshError)(str(error))
