"""Programs that are not of the release: a function exported on the fly, or a bundle `x.mesh`.

    Foreign.of_function(fn, ...)  needs jax, in the user's own process
    Foreign.of_bundle(path)       reads a file; checks its signature and digest, loads no jax
    prepare(foreign, arrays)      arrays -> units, as a kernel's host side does

The artifact's bytes go to cars as a blob; each car validates them in a sandbox before it runs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxkernels.host import Arg, Prepared
from meshnode.errors import LocalResource, UsageError
from meshnode.protocol.types import KERNEL_CHARS_MAX, ArraySpec, Digest, Stepped

from .orders import FOREIGN, Array

UNITS_MAX: Final = 1 << 20
SINGLE: Final = "single"  # in the note of a job: one unit, whose outputs have no unit axis


@dataclass(frozen=True, slots=True)
class Foreign:
    """An artifact and how it is called."""

    name: str
    artifact: Digest
    content: bytes
    args: tuple[tuple[bool, ArraySpec], ...]  # mapped?, of one unit; without a stepped one's `n`
    outs: tuple[ArraySpec, ...]  # of one unit
    stepped: Stepped | None = None
    steps: int = 0  # of one unit, if stepped and nothing else is said
    wall_s_max: float = 0.0  # of one unit; 0: its maker sets none
    memory_mb_max: int = 0

    @staticmethod
    def of_function(
        function: Callable[..., Any], specs: Sequence[tuple[bool, ArraySpec]]
    ) -> Foreign:
        """`function` for arguments of exactly these shapes.

        ArtifactRefused with advice for what cars would refuse; errors of the function go through.
        """
        from meshnode.artifact.exporting import export_program

        exported, content = export_program(function, [spec for _, spec in specs])
        name = getattr(function, "__qualname__", type(function).__name__)
        name = f"{getattr(function, '__module__', '')}:{name}"
        digest = Digest(hashlib.sha256(content).digest())
        return Foreign(
            name.encode()[:KERNEL_CHARS_MAX].decode(errors="ignore"),
            digest,
            content,
            tuple(specs),
            exported.outs,
        )

    @staticmethod
    def of_bundle(path: Path) -> Foreign:
        """A file of `mesh artifact build`; errors of `read_bundle` for one that is damaged."""
        from meshnode.artifact.bundle import BUNDLE_BYTES_MAX, read_bundle
        from meshnode.protocol.objects import ArgRole

        try:
            with path.open("rb") as file:
                wire = file.read(BUNDLE_BYTES_MAX + 1)
        except OSError as error:
            raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
        bundle = read_bundle(wire)
        manifest = bundle.manifest
        outs, stepped, steps = manifest.outs, None, 0
        if manifest.steps is not None:
            stepped = Stepped(manifest.steps.result, manifest.steps.watch)
            outs, steps = tuple(outs[index] for index in stepped.result), manifest.steps.unit
        return Foreign(
            manifest.name,
            manifest.artifact,
            bundle.content,
            tuple((arg.role is not ArgRole.CONSTANT, arg.spec) for arg in manifest.args),
            outs,
            stepped,
            steps,
            manifest.unit_wall_ms_max / 1000,
            manifest.memory_mb_max,
        )


def spec_of(array: Array, *, mapped: bool) -> ArraySpec:
    """The shape of one unit of it."""
    shape = array.shape[1:] if mapped else array.shape
    return ArraySpec(array.dtype.name, tuple(int(extent) for extent in shape))


def prepare(foreign: Foreign, arrays: Sequence[Array], *, single: bool = False) -> Prepared:
    """Units of the program's arguments; UsageError says what does not fit.

    A mapped argument is stacked, [units, *shape], or is one unit's; a constant is as it is.
    """
    if len(arrays) != len(foreign.args):
        raise UsageError(f"{foreign.name} takes {len(foreign.args)} arguments, not {len(arrays)}")
    units: int | None = None
    args: list[Arg] = []
    for number, ((mapped, spec), given) in enumerate(zip(foreign.args, arrays, strict=True)):
        array = np.asarray(given)
        if array.dtype.name != spec.dtype:
            raise UsageError(f"argument {number} must be {spec.dtype}, not {array.dtype.name}")
        if mapped and array.shape == spec.shape and (single or array.ndim == len(spec.shape)):
            array = array[None]
        want = ("units", *spec.shape) if mapped else spec.shape
        if (array.shape[1:] if mapped and array.ndim else array.shape) != spec.shape:
            shape = ", ".join(map(str, want))
            raise UsageError(f"argument {number} must have shape ({shape}), not {array.shape}")
        if mapped:
            if units is not None and len(array) != units:
                raise UsageError(f"argument {number} has {len(array)} units, others {units}")
            units = len(array)
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        args.append(Arg(f"arg{number}", mapped, spec.dtype, spec.shape, plain))
    if units is None:
        units = 1
    if not 1 <= units <= UNITS_MAX:
        raise UsageError(f"{units} units; a job has 1 to {UNITS_MAX}")
    return Prepared(foreign.name, units, tuple(args), {FOREIGN: True, SINGLE: single})
