"""What can be refused from an `ExecSpec` alone, before any process is spawned.

Called by `programs` and `supervisor` at `admit` and `start`. The worker checks the same specs again
against the artifact itself. Once a program's cost is known, so is whether it can end in time and in
memory; its energy is for `protocol.owner`, which knows what a unit takes on this car.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from meshnode.protocol.effects import ExecSpec, StartExec
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import (
    ARGS_MAX,
    LEASE_UNITS_MAX,
    STEPS_MAX,
    WATCH_BYTES_MAX,
    ArraySpec,
    BlobRef,
    Digest,
    Peer,
    Stepped,
)

from . import wire

# Of the program itself: every worker would say the same.
PROGRAM_REFUSALS: Final = frozenset(
    {
        Reason.KERNEL_SPEC,
        Reason.JAX_WINDOW,
        *(reason for reason in Reason if reason.name.startswith("ARTIFACT_")),
    }
)
# Of one attempt to load it.
LOAD_REFUSALS: Final = PROGRAM_REFUSALS | {Reason.MEMORY, Reason.FAILED_BY_JOB, Reason.SANDBOX}


class Program(NamedTuple):
    """What a worker has loaded; equal programs of one submitter share a worker."""

    submitter: Peer
    artifact: Digest
    args: tuple[tuple[bool, ArraySpec, Digest | None], ...]  # blob ids of the constants only
    outs: tuple[ArraySpec, ...]
    stepped: Stepped | None = None


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
    return Program(spec.submitter, spec.artifact, args, spec.outs, spec.stepped)


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
    except ValueError as error:
        raise Refused(Reason.KERNEL_SPEC, str(error)) from None
    if not 1 <= unit_bytes <= wire.UNIT_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{unit_bytes} bytes of output a unit")
    if memory_mb > min(spec.memory_mb_max, memory_mb_max):
        raise Refused(Reason.MEMORY, f"its arrays alone are {memory_mb} MB")
    for arg in spec.args:
        if not arg.mapped and arg.blob is None:
            raise Refused(Reason.KERNEL_SPEC, "a constant must be a blob")
        if not arg.mapped and arg.blob and arg.blob.size != wire.array_bytes(arg.spec):
            raise Refused(Reason.KERNEL_SPEC, "a constant's blob is not of its array's size")
    if spec.stepped is not None:
        _check_stepped(spec, spec.stepped)


def _check_stepped(spec: ExecSpec, stepped: Stepped) -> None:
    state = [arg.spec for arg in spec.args if arg.mapped]
    if not all(0 <= index < len(state) for index in (*stepped.result, *stepped.watch)):
        raise Refused(Reason.KERNEL_SPEC, "the kernel has no such state arrays")
    if spec.outs != tuple(state[index] for index in stepped.result):
        raise Refused(Reason.KERNEL_SPEC, "the outputs are not the state arrays that it names")
    if not 1 <= spec.steps <= STEPS_MAX:
        raise Refused(Reason.KERNEL_SPEC, f"{spec.steps} steps")
    state_bytes = sum(map(wire.array_bytes, state))
    if not 1 <= state_bytes <= wire.STATE_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{state_bytes} bytes of state")
    watched = sum(wire.array_bytes(state[index]) for index in stepped.watch)
    if len(stepped.watch) > len(state) or watched > WATCH_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{watched} bytes to watch")


def check_run(effect: StartExec, inline_bytes: int) -> None:
    run = effect.run
    if not 1 <= run.count <= LEASE_UNITS_MAX:
        raise Refused(Reason.TOO_LARGE, f"{run.count} units in one run")
    if effect.state is not None:
        _check_checkpoint(effect, effect.state)
    elif effect.step:
        raise Refused(Reason.KERNEL_SPEC, f"step {effect.step} without a checkpoint")
    if inline_bytes * run.count != len(effect.inline):
        raise Refused(Reason.KERNEL_SPEC, f"{len(effect.inline)} bytes of inline arguments")
    if len(effect.inline) > wire.RUN_INLINE_BYTES_MAX:
        raise Refused(Reason.TOO_LARGE, f"{len(effect.inline)} bytes of inline arguments")


def check_time(flop: int, rate_mflops: int, wall_ms_max: int) -> None:
    """WALL_CLOCK if it cannot end in time even at that rate; 0 of either says nothing."""
    least_ms = flop // (rate_mflops * 1000) if rate_mflops else 0
    if least_ms > wall_ms_max:
        text = (
            f"{flop / 1e9:.3g} GFLOP take {least_ms / 1000:.3g} s or more at "
            f"{rate_mflops / 1000:.3g} GFLOP/s, {wall_ms_max / 1000:g} s are allowed"
        )
        raise Refused(Reason.WALL_CLOCK, text)


def check_memory(memory_mb: int, memory_mb_max: int) -> None:
    if memory_mb > memory_mb_max:
        text = f"it needs {memory_mb} MB, {memory_mb_max} MB are allowed"
        raise Refused(Reason.MEMORY, text)


def flop_of_run(effect: StartExec, flop_per_unit: int) -> int:
    """All that is left to do of it; `flop_per_unit` is of a step, if stepped."""
    if effect.spec.stepped is None:
        return flop_per_unit * effect.run.count
    return flop_per_unit * (effect.run.count * effect.spec.steps - effect.step)


def _check_checkpoint(effect: StartExec, state: BlobRef) -> None:
    spec = effect.spec
    if spec.stepped is None:
        raise Refused(Reason.KERNEL_SPEC, "this kernel has no steps to go on from")
    size = sum(wire.array_bytes(arg.spec) for arg in spec.args if arg.mapped)
    if state.size != size or not 0 <= effect.step <= spec.steps:
        raise Refused(Reason.KERNEL_SPEC, "the checkpoint is not one of this kernel")
