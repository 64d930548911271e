"""One exported kernel, compiled once for its fixed shapes, with its constants on the device.

Used by `main` in a worker process. The bytes are `jax.export`'s, built in or not: one code path.
Matmul precision and the like are in the artifact; nothing here changes what it computes.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from numpy.typing import NDArray

from meshnode.executor.wire import Load, LoadArg, array_bytes
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec

Array = NDArray[Any]


class LoadRefused(Exception):
    """The program cannot be run here; `reason` says why."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def map_file(fd: int, first_byte: int, count: int) -> memoryview:
    """Bytes of an open file without a copy. A short file is an error here, not a SIGBUS later."""
    if count == 0:
        return memoryview(b"")
    if os.fstat(fd).st_size < first_byte + count:
        raise ValueError("a blob is shorter than the arguments say")
    start = first_byte - first_byte % mmap.ALLOCATIONGRANULARITY
    view = mmap.mmap(fd, first_byte + count - start, prot=mmap.PROT_READ, offset=start)
    return memoryview(view)[first_byte - start :]


def as_array(view: memoryview, spec: ArraySpec, units: int | None = None) -> Array:
    shape = spec.shape if units is None else (units, *spec.shape)
    return np.frombuffer(view, dtype=np.dtype(spec.dtype).newbyteorder("<")).reshape(shape)


class Program:
    """`run_unit(mapped arrays of one unit)` gives the outputs, still on the device."""

    def __init__(self, load: Load, const_fds: Sequence[int]) -> None:
        started = time.perf_counter()
        exported = _deserialize(load.artifact)
        _check_specs(exported, load)
        if any(np.dtype(a.dtype).itemsize == 8 for a in (*exported.in_avals, *exported.out_avals)):
            # One program a process: nobody else sees it.
            jax.config.update("jax_enable_x64", True)

        def flat(*arrays: jax.Array) -> list[jax.Array]:
            # An artifact may give one array bare: iterating over that would be over its rows.
            return jax.tree.leaves(exported.call(*arrays))

        compiled = jax.jit(flat).lower(*exported.in_avals).compile()
        self.flop_per_unit = _flop(compiled.cost_analysis())
        self.memory_mb = _memory_mb(compiled.memory_analysis())
        if self.memory_mb > load.memory_mb_max:
            text = f"it needs {self.memory_mb} MB, {load.memory_mb_max} MB are allowed"
            raise LoadRefused(Reason.MEMORY, text)
        self.mapped = tuple(arg for arg in load.args if arg.mapped)
        self.outs = load.outs
        self.out_bytes = sum(array_bytes(spec) for spec in load.outs)
        self.run_unit = _bind(compiled, load.args, _constants(load.args, const_fds))
        self.compile_ms = round((time.perf_counter() - started) * 1000)

    def mapped_arrays(
        self, first: int, count: int, inline_mask: int, inline: memoryview, fds: Sequence[int]
    ) -> list[Array]:
        """The run's slice of each mapped argument, stacked; views, not copies."""
        arrays, taken, files = [], 0, iter(fds)
        for index, arg in enumerate(self.mapped):
            unit_bytes = array_bytes(arg.spec)
            if inline_mask >> index & 1:
                view = inline[taken : taken + count * unit_bytes]
                taken += count * unit_bytes
            else:
                view = map_file(next(files), first * unit_bytes, count * unit_bytes)
            arrays.append(as_array(view, arg.spec, count))
        return arrays


def _deserialize(artifact: bytes) -> jax.export.Exported:
    try:
        exported = jax.export.deserialize(bytearray(artifact))
    except Exception as error:  # whatever the parser makes of it, it is a refusal
        raise LoadRefused(Reason.FAILED_BY_JOB, f"the artifact cannot be read: {error}") from error
    version = exported.calling_convention_version
    lowest = jax.export.minimum_supported_calling_convention_version
    highest = jax.export.maximum_supported_calling_convention_version
    if not lowest <= version <= highest:
        text = f"calling convention {version}, this car has {lowest} to {highest}"
        raise LoadRefused(Reason.JAX_WINDOW, text)
    return exported


def _check_specs(exported: jax.export.Exported, load: Load) -> None:
    pairs = (
        ("argument", exported.in_avals, [arg.spec for arg in load.args]),
        ("output", exported.out_avals, list(load.outs)),
    )
    for what, avals, specs in pairs:
        if len(avals) != len(specs):
            text = f"the kernel has {len(avals)} {what}s, the job says {len(specs)}"
            raise LoadRefused(Reason.KERNEL_SPEC, text)
        for index, (aval, spec) in enumerate(zip(avals, specs, strict=True)):
            # A symbolic dimension is no int and never equal: unit shapes are fixed.
            if tuple(aval.shape) != spec.shape or np.dtype(aval.dtype).name != spec.dtype:
                ours = f"{np.dtype(aval.dtype).name}{list(aval.shape)}"
                text = f"{what} {index} is {ours}, the job says {spec.dtype}{list(spec.shape)}"
                raise LoadRefused(Reason.KERNEL_SPEC, text)


def _constants(args: Sequence[LoadArg], fds: Sequence[int]) -> list[jax.Array]:
    specs = [arg.spec for arg in args if not arg.mapped]
    if len(specs) != len(fds):
        raise LoadRefused(Reason.KERNEL_SPEC, "constants and files differ in number")
    arrays: list[jax.Array] = []
    for spec, fd in zip(specs, fds, strict=True):
        # On CPU a page-aligned mapping is used as it lies: the blob's pages are the weights.
        arrays.append(jax.device_put(as_array(map_file(fd, 0, array_bytes(spec)), spec)))
    for array in arrays:
        array.block_until_ready()
    return arrays


def _bind(
    compiled: Any, args: Sequence[LoadArg], constants: Sequence[jax.Array]
) -> Callable[[Sequence[Array]], Sequence[jax.Array]]:
    """Puts a unit's mapped arrays between the constants, in the kernel's calling order."""
    if not constants:
        return lambda mapped: compiled(*mapped)
    template: list[Any] = [None] * len(args)
    places = []
    rest = iter(constants)
    for index, arg in enumerate(args):
        if arg.mapped:
            places.append(index)
        else:
            template[index] = next(rest)

    def run_unit(mapped: Sequence[Array]) -> Sequence[jax.Array]:
        row = template.copy()
        for place, array in zip(places, mapped, strict=True):
            row[place] = array
        return compiled(*row)  # type: ignore[no-any-return]

    return run_unit


def _flop(analysis: Any) -> int:
    """XLA counts a loop's body once: a floor, not a bill."""
    flop = (analysis or {}).get("flops", 0.0)
    return max(0, min(int(flop), (1 << 63) - 1))


def _memory_mb(stats: Any) -> int:
    if stats is None:
        return 0
    total = int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )
    return max(0, min(-(-total >> 20), (1 << 32) - 1))
