"""One program, loaded once for its fixed shapes, with its constants on the device.

Used by `main` in a worker process; `runs` and `slices` call it. Its machine code comes from the
node's cache, or from a compile of its own where there is none. The bytes are `jax.export`'s, built
in or not: one code path.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from meshnode.executor import wire
from meshnode.executor.wire import Load, LoadArg, array_bytes
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import ArraySpec

from .compiling import LoadRefused, compiled, loaded
from .runs import Loop

Array = NDArray[Any]


class Unusable(Exception):
    """The node's executable does not load here."""


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


def split(view: memoryview, specs: Sequence[ArraySpec]) -> list[Array]:
    """Arrays that lie one after the other."""
    arrays, at = [], 0
    for spec in specs:
        end = at + array_bytes(spec)
        arrays.append(as_array(view[at:end], spec))
        at = end
    return arrays


class Program:
    """`run_unit(mapped arrays of one unit)` gives the outputs, still on the device."""

    def __init__(self, load: Load, fds: Sequence[int]) -> None:
        executable = [fds[-1]] if load.executable and fds else []
        if len(executable) != load.executable:
            raise wire.WireError("an executable without a file")
        call = _load(executable[0], load) if executable else compiled(load).call
        self.load = load
        self.mapped = tuple(arg for arg in load.args if arg.mapped)
        self.unit_bytes = sum(array_bytes(spec) for spec in load.outs)
        self.mapped_bytes = sum(array_bytes(arg.spec) for arg in self.mapped)
        self.loop_asked = False
        self._constants = _constants(load.args, fds[: len(fds) - len(executable)])
        self._run = _Bound(call, load.args, self._constants)
        self.loop: Loop | None = None

    def run_unit(self, mapped: Sequence[Array]) -> Sequence[jax.Array]:
        return self._run(mapped)

    def step(self, state: Sequence[jax.Array], n: int) -> list[jax.Array]:
        """`n` steps on; `state` is used up."""
        return list(self._run(state, np.int32(n)))

    def take_loop(self, units: int, fd: int) -> None:
        """The loop that `runs` asked for; one that does not load is none."""
        load = wire.Load(
            b"", self.load.args, self.load.outs, self.load.memory_mb_max, loop_units=units
        )
        try:
            call = _Bound(_load(fd, load), load.args, self._constants)
        except Unusable:
            return
        self.loop = Loop(call, units)

    def mapped_arrays(
        self, head: wire.RunHead, inline: memoryview, fds: Sequence[int]
    ) -> list[Array]:
        """The run's slice of each mapped argument, stacked; views, not copies."""
        first, count = head.first, head.units
        arrays, taken, files = [], 0, iter(fds)
        for index, arg in enumerate(self.mapped):
            unit_bytes = array_bytes(arg.spec)
            if head.inline_mask >> index & 1:
                view = inline[taken : taken + count * unit_bytes]
                taken += count * unit_bytes
            else:
                view = map_file(next(files), first * unit_bytes, count * unit_bytes)
            arrays.append(as_array(view, arg.spec, count))
        return arrays


class _Bound:
    """Puts mapped arrays between the constants, in calling order; a count comes last."""

    def __init__(self, call: Any, args: Sequence[LoadArg], constants: Sequence[jax.Array]) -> None:
        self._call = call
        self._places = [index for index, arg in enumerate(args) if arg.mapped]
        rest = iter(constants)
        self._template = [None if arg.mapped else next(rest) for arg in args] if constants else []

    def __call__(self, mapped: Sequence[Any], *count: Any) -> Sequence[jax.Array]:
        if not self._template:
            return self._call(*mapped, *count)  # type: ignore[no-any-return]
        row: list[Any] = self._template.copy()
        for place, array in zip(self._places, mapped, strict=True):
            row[place] = array
        return self._call(*row, *count)  # type: ignore[no-any-return]


def _load(fd: int, load: Load) -> Any:
    size = os.fstat(fd).st_size - wire.EXECUTABLE_HEAD.size
    try:
        return loaded(map_file(fd, wire.EXECUTABLE_HEAD.size, size), load)
    except Exception as error:  # whatever is wrong with it, it can be compiled again
        raise Unusable(str(error)) from error


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
