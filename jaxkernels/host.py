"""The submitter's side of every kernel: a person's input -> units, and outputs -> a result.

Flow: `prepare` before a job is submitted, then `Prepared.args` become blobs and `units` tasks; when
every unit is back, `finish` gets the outputs stacked. In between only `Prepared.context` has to be
kept: plain JSON values, so that a job can be finished after a restart, by another process. No jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from . import registry
from .errors import BadInput, ModelMissing
from .models import Model
from .spec import ArgSpec, KernelInfo

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Context: TypeAlias = Mapping[str, Any]  # JSON values only
Options: TypeAlias = Mapping[str, Any]

UNITS_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument with its content, in the kernel's calling order.

    `shape` is that of one unit; the array of a mapped argument is [units, *shape]. `path` is set
    where the same raw bytes already lie in a file, so that weights need not be copied to become
    blobs.
    """

    name: str
    mapped: bool
    dtype: str
    shape: tuple[int, ...]
    array: Array
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job's worth of input: what cars need, and what `finish` needs."""

    kernel: str
    units: int
    args: tuple[Arg, ...]
    context: Context = field(default_factory=dict)


class Host(Protocol):
    """What each kernel's `host` module offers; `options` come complete and typed."""

    def prepare(self, inputs: Any, options: Options, model: Model | None) -> Prepared: ...

    def finish(self, outputs: Sequence[Array], context: Context) -> Any: ...


class SteppedHost(Host, Protocol):
    """What the `host` module of a stepped kernel may offer beside; none of it must be there.

    `watch` and `previous` are the state arrays of `Stepped.watch` of one unit, now and the last
    time; they come from a car, so whatever is in them must do no harm.
    """

    def steps(self, prepared: Prepared) -> int: ...

    def ended(self, watch: Sequence[Array], context: Context) -> bool: ...

    def stream(
        self, previous: Sequence[Array] | None, watch: Sequence[Array], context: Context
    ) -> str: ...


def prepare(
    spec: str, inputs: Any, options: Options | None = None, model: Model | None = None
) -> Prepared:
    """Cut `inputs` into units of the kernel's fixed shape; `BadInput` says what does not fit."""
    info = registry.get(spec)
    if info.model is not None and model is None:
        raise ModelMissing(
            f"{info.spec} needs the model {info.model}: `mesh models get {info.model}`."
        )
    host = cast(Host, registry.host_module(spec))
    prepared = host.prepare(inputs, _check_options(info, options or {}), model)
    assert tuple(arg.name for arg in prepared.args) == tuple(arg.name for arg in info.args)
    assert 1 <= prepared.units <= UNITS_MAX
    return prepared


def finish(spec: str, outputs: Sequence[Array], context: Context) -> Any:
    """Turn the stacked outputs ([units, *shape] each, in order) into what the person asked for."""
    return cast(Host, registry.host_module(spec)).finish(outputs, context)


def steps(prepared: Prepared) -> int:
    """How many steps each unit of this job needs at most; the kernel's default if it cannot say."""
    stepped = registry.get(prepared.kernel).stepped
    assert stepped is not None
    own = getattr(registry.host_module(prepared.kernel), "steps", None)
    return stepped.steps_default if own is None else int(own(prepared))


def ended(spec: str, watch: Sequence[Array], context: Context) -> bool:
    """Whether a unit's further steps would change nothing, so that none need be asked for."""
    own = getattr(registry.host_module(spec), "ended", None)
    return own is not None and bool(own(watch, context))


def stream(
    spec: str, previous: Sequence[Array] | None, watch: Sequence[Array], context: Context
) -> str:
    """What a unit has to show since `previous` (None: since it began), to print as it is."""
    own = getattr(registry.host_module(spec), "stream", None)
    return "" if own is None else str(own(previous, watch, context))


def _check_options(info: KernelInfo, options: Options) -> Options:
    """Every option of the kernel with a value of its own type; text from a command line is read."""
    known = {option.name: option for option in info.options}
    for name in options:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise BadInput(f"{info.spec} has no option {name!r}; it has: {there}.")
    checked: dict[str, Any] = {}
    for name, option in known.items():
        value, kind = options.get(name, option.default), type(option.default)
        try:
            if isinstance(value, str) or (kind is float and type(value) is int):
                value = kind(value)
            sound = type(value) is kind and not (isinstance(value, float) and not isfinite(value))
        except ValueError:
            sound = False
        if not sound:
            raise BadInput(f"Option {name} of {info.spec} must be {kind.__name__}, not {value!r}.")
        checked[name] = value
    return checked


def make_arg(arg: ArgSpec, array: Array, units: int, path: Path | None = None) -> Arg:
    """Check one array against its spec and make it little-endian and C-ordered."""
    want = (units, *arg.shape) if arg.mapped else arg.shape
    if array.shape != want:
        raise BadInput(f"Argument {arg.name} must have shape {want}, not {array.shape}.")
    if array.dtype != np.dtype(arg.dtype):
        # Silently casting float64 to float32 would change the person's numbers behind their back.
        raise BadInput(f"Argument {arg.name} must be {arg.dtype}, not {array.dtype}.")
    plain = np.ascontiguousarray(array, dtype=np.dtype(arg.dtype).newbyteorder("<"))
    return Arg(arg.name, arg.mapped, arg.dtype, arg.shape, plain, path)


def stack_plain(info: KernelInfo, inputs: Any) -> Prepared:
    """For kernels whose input already is one mapped array: [units, *shape] or one unit's shape."""
    (arg,) = info.args
    try:
        array = np.asarray(inputs)
    except ValueError as error:
        raise BadInput(f"The input is not an array: {error}.") from error
    if array.shape == arg.shape:
        array = array[None]
    if array.ndim != len(arg.shape) + 1 or not 1 <= len(array) <= UNITS_MAX:
        raise BadInput(f"{info.spec} takes 1 to {UNITS_MAX} units of {arg}, not {array.shape}.")
    return Prepared(info.spec, len(array), (make_arg(arg, array, len(array)),), {})
