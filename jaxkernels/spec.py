"""How a kernel is described: shapes, cost and numerics, in plain values without jax.

Flow: each kernel's `api` makes one `KernelInfo`, `registry` collects them, `build` exports exactly
these shapes, and the submitter and the contract test read them. An array is raw little-endian
C-order bytes everywhere; its dtype (a NumPy name) and shape stand here.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

# Names of dtypes that cross the mesh, and the bytes of one element.
DTYPE_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "float32": 4,
    "float64": 8,
}


class NumericsClass(enum.Enum):
    """How two honest cars may differ on one unit.

    Inside one platform class (device kind, jaxlib, flags) results are bitwise equal for each; the
    class says what holds across platform classes.
    """

    EXACT = "exact"
    F32_HIGHEST = "f32-highest"  # 1e-5 of the largest output, unless the kernel says otherwise
    TF32 = "tf32"  # 3e-3
    BF16 = "bf16"  # 2e-2


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of one unit. A mapped array travels stacked: [units, *shape]."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.dtype in DTYPE_BYTES and all(d > 0 for d in self.shape)

    @property
    def unit_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class ArgSpec(ArraySpec):
    """One argument of the kernel, in calling order: mapped (one slice a unit) or constant."""

    mapped: bool = True


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """An option of `prepare`, as `mesh map -o name=value` would offer it."""

    name: str
    default: int | float | str  # a value given must be of the same type
    description: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """A long job: the artifact is `step(constants..., state..., n) -> state...`.

    Its mapped arguments are the state that a unit begins with; `n`, an int32 scalar after them, is
    how many steps one call does, and is no `ArgSpec`. The outputs of the artifact are the state in
    the same order and shapes, so one call's result is the next one's argument. Steps a, then b,
    must give the bits of a + b: a unit may go on from its state on another car. Cost figures of
    such a kernel are those of a unit of `steps_default` steps.
    """

    result: tuple[int, ...]  # which state arrays are a unit's outputs, in the order of `outs`
    watch: tuple[int, ...] = ()  # which (small) ones the submitter gets as the unit goes on
    steps_default: int = 100  # of a unit, if the person says nothing
    slice_steps_hint: int = 10  # a first guess of what takes half a second


# The last argument of a stepped artifact: how many steps this call does.
STEPS = ArgSpec("n", "int32", (), mapped=False)


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """Everything that is known of a kernel without running it."""

    name: str
    version: int
    package: str  # the folder in jaxkernels that holds api, reference, kernel, bench and host
    description: str
    args: tuple[ArgSpec, ...]
    outs: tuple[ArraySpec, ...]
    numerics: NumericsClass
    tolerance: float  # largest error against the reference, as the kernel's `reference` counts it
    flops_per_unit: int  # analytic, multiply and add count as two
    unit_ms_hint: float  # measured, one process on 2 cores of a Zen 4; a first guess, never a bill
    model: str | None = None
    options: tuple[OptionSpec, ...] = ()
    stepped: Stepped | None = None

    def __post_init__(self) -> None:
        if self.stepped is not None:
            assert all(arg.mapped for arg in self.args[len(self.args) - len(self.state) :])
            got = [(out.dtype, out.shape) for out in self.outs]
            want = [(self.state[i].dtype, self.state[i].shape) for i in self.stepped.result]
            assert got == want, f"{self.name}: outs are not the state arrays of `result`"

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def state(self) -> tuple[ArgSpec, ...]:
        """A stepped kernel's state: its mapped arguments, which come last."""
        return tuple(arg for arg in self.args if arg.mapped) if self.stepped else ()

    @property
    def artifact_args(self) -> tuple[ArgSpec, ...]:
        """What the artifact is called with: the arguments, and of a stepped kernel also `n`."""
        return (*self.args, STEPS) if self.stepped else self.args

    @property
    def artifact_outs(self) -> tuple[ArraySpec, ...]:
        """What the artifact gives: the outputs, or of a stepped kernel the whole state."""
        return self.state if self.stepped else self.outs

    @property
    def mapped_bytes_per_unit(self) -> int:
        return sum(arg.unit_bytes for arg in self.args if arg.mapped)

    @property
    def constant_bytes(self) -> int:
        return sum(arg.unit_bytes for arg in self.args if not arg.mapped)

    @property
    def out_bytes_per_unit(self) -> int:
        return sum(out.unit_bytes for out in self.outs)
