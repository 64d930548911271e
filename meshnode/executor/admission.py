"""What can be refused from an `ExecSpec` alone, before any process is spawned.

Called by `supervisor` at `admit` and `start`. The worker checks the same specs again against the
artifact itself; cost before running (operations, energy, time) will stand here too.
"""

from __future__ import annotations

from typing import NamedTuple

from meshnode.protocol.effects import ExecSpec, StartExec
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ARGS_MAX, LEASE_UNITS_MAX, ArraySpec, Digest, Peer

from . import wire


class Program(NamedTuple):
    """What a worker has loaded; equal programs of one submitter share a worker."""

    submitter: Peer
    artifact: Digest
    args: tuple[tuple[bool, ArraySpec, Digest | None], ...]  # blob ids of the constants only
    outs: tuple[ArraySpec, ...]


class Refused(Exception):
    """A typed refusal on its way to becoming an `ExecEnded`."""

    def __init__(self, reason: Reason, text: str = "") -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


def program_of(spec: ExecSpec) -> Program:
    args = tuple(
        (arg.mapped, arg.spec, None if arg.mapped or arg.blob is None else arg.blob.blob_id)
        for arg in spec.args
    )
    return Program(spec.submitter, spec.artifact, args, spec.outs)


class Sizes(NamedTuple):
    """What of a spec is asked for at every run of it."""

    program: Program
    unit_bytes: int  # all outputs of one unit
    inline_bytes: int  # of one unit


def sizes_of(spec: ExecSpec) -> Sizes:
    """Of a spec that `check_sizes` has let through."""
    inline = sum(wire.array_bytes(arg.spec) for arg in spec.args if arg.mapped and not arg.blob)
    return Sizes(program_of(spec), sum(map(wire.array_bytes, spec.outs)), inline)


def memory_mb_least(spec: ExecSpec) -> int:
    """Arguments and results of one unit; temporaries are known only after the compile."""
    arrays = (*(arg.spec for arg in spec.args), *spec.outs)
    return -(-sum(wire.array_bytes(array) for array in arrays) >> 20)


def check_sizes(spec: ExecSpec, memory_mb_max: int) -> None:
    if len(spec.args) > ARGS_MAX or not 1 <= len(spec.outs) <= ARGS_MAX:
        raise Refused(Reason.TOO_LARGE, f"more than {ARGS_MAX} arrays, or no output")
    try:
        unit_bytes = sum(wire.array_bytes(out) for out in spec.outs)
        memory_mb = memory_mb_least(spec)
    except KeyError as error:
        raise Refused(Reason.KERNEL_SPEC, f"dtype {error}") from None
    if not 1 <= unit_bytes <= wire.UNIT_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{unit_bytes} bytes of output a unit")
    if memory_mb > min(spec.memory_mb_max, memory_mb_max):
        raise Refused(Reason.MEMORY, f"its arrays alone are {memory_mb} MB")
    for arg in spec.args:
        if not arg.mapped and arg.blob is None:
            raise Refused(Reason.KERNEL_SPEC, "a constant must be a blob")
        if not arg.mapped and arg.blob and arg.blob.size != wire.array_bytes(arg.spec):
            raise Refused(Reason.KERNEL_SPEC, "a constant's blob is not of its array's size")


def check_run(effect: StartExec, inline_bytes: int) -> None:
    run = effect.run
    if not 1 <= run.count <= LEASE_UNITS_MAX:
        raise Refused(Reason.TOO_LARGE, f"{run.count} units in one run")
    if effect.state is not None:
        raise Refused(Reason.KERNEL_SPEC, "this kernel has no steps to go on from")
    if inline_bytes * run.count != len(effect.inline):
        raise Refused(Reason.KERNEL_SPEC, f"{len(effect.inline)} bytes of inline arguments")
    if len(effect.inline) > wire.RUN_INLINE_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{len(effect.inline)} bytes of inline arguments")
