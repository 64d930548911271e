"""Programs that are not of the release: a function exported on the fly, or a bundle `x.mesh`.

    Foreign.of_function(fn, ...)  needs jax, in the user's own process
    Foreign.of_bundle(path)       reads a file; checks its signature and digest, loads no jax
    Arguments                     what `submit` and `map` were given: arrays -> units
    Exports                       functions exported before
    foreign_order(...)            the order of a job, once code and blobs lie in the node's store

The artifact's bytes go to cars as a blob; each car validates them in a sandbox before it runs them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxkernels.host import Arg, Prepared
from meshnode.errors import LocalResource, UsageError
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import KERNEL_CHARS_MAX, ArraySpec, BlobRef, Digest, Stepped

from .orders import FOREIGN, Array, Note, Program, Terms, make_order

UNITS_MAX: Final = 1 << 20
EXPORTS_KEPT_MAX: Final = 64
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


class Exports:
    """Functions exported before, by shape: tracing takes a good part of a second. Thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[Any, Foreign] = {}
        self._lock = threading.Lock()

    def known(
        self, function: Callable[..., Any] | Foreign, specs: Sequence[tuple[bool, ArraySpec]]
    ) -> Foreign | None:
        """What needs no tracing."""
        if isinstance(function, Foreign):
            return function
        return self._kept.get((function, tuple(specs)))

    def of(
        self, function: Callable[..., Any] | Foreign, specs: Sequence[tuple[bool, ArraySpec]]
    ) -> Foreign:
        """The program of a function; a Foreign is one already. Errors of `Foreign.of_function`."""
        found = self.known(function, specs)
        if found is not None:
            return found
        assert not isinstance(function, Foreign)
        found = Foreign.of_function(function, specs)
        with self._lock:
            self._kept[function, tuple(specs)] = found
            if len(self._kept) > EXPORTS_KEPT_MAX:
                del self._kept[next(iter(self._kept))]
        return found


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arrays of one `submit` or `map`, and what a function is to expect of them."""

    specs: tuple[tuple[bool, ArraySpec], ...]  # mapped?, of one unit
    arrays: tuple[Array, ...]
    single: bool

    @staticmethod
    def of_one(args: Sequence[Any]) -> Arguments:
        """One unit; its results get no unit axis."""
        arrays = tuple(np.asarray(arg) for arg in args)
        specs = tuple((True, spec_of(array, mapped=False)) for array in arrays)
        return Arguments(specs, arrays, single=True)

    @staticmethod
    def of_rows(stacked: Sequence[Any], constants: Sequence[Any]) -> Arguments:
        """A unit for each row; UsageError for what has none."""
        rows = tuple(np.asarray(array) for array in stacked)
        fixed = tuple(np.asarray(array) for array in constants)
        if not rows or any(array.ndim == 0 for array in rows):
            raise UsageError("map takes arrays with one row for each unit; see submit for one unit")
        specs = [(True, spec_of(array, mapped=True)) for array in rows]
        specs += [(False, spec_of(array, mapped=False)) for array in fixed]
        return Arguments(tuple(specs), (*rows, *fixed), single=False)

    def prepare(self, foreign: Foreign) -> Prepared:
        return prepare(foreign, self.arrays, single=self.single)


def foreign_order(
    foreign: Foreign,
    prepared: Prepared,
    code: BlobRef,
    blobs: dict[int, BlobRef],
    terms: Terms,
) -> JobOrder:
    """The order; `code` and `blobs` refer to the artifact and to each argument not inline."""
    if terms.steps and not foreign.stepped:
        raise UsageError(f"{foreign.name} has no steps")
    program = Program(
        foreign.name,
        foreign.artifact,
        foreign.outs,
        code=code,
        stepped=foreign.stepped,
        steps=(terms.steps or foreign.steps) if foreign.stepped else 0,
    )
    terms = replace(
        terms,
        wall_s_max=terms.wall_s_max or foreign.wall_s_max,
        memory_mb_max=foreign.memory_mb_max or terms.memory_mb_max,
    )
    return make_order(prepared, blobs, terms, Note.now(prepared, terms), program)


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
