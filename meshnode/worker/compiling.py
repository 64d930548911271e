"""From artifact bytes to machine code: lower, compile, serialise, and load what was serialised.

Used by `main` in a compile-only worker, which executes nothing, and by `program` in a running one.
Three shapes of the same artifact: one unit, a loop over many units, and a slice of a stepped
program, whose state is donated from call to call. Artifact bytes are parsed by `validated` alone,
and what it refuses is not compiled. Matmul precision and the like are in the artifact: nothing here
changes what it computes.

A serialised executable is a pickle with machine code in it. It is loaded only from a file that the
node opened in its own cache, where only compile-only workers' words are kept.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import jax
import jax.export
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import lax
from jax.experimental import serialize_executable

from meshnode.executor.wire import AT_LEAST, FIGURES, Load
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import STEP_COUNT, ArraySpec

from .validate import validated

RECIPE: Final = b"3"
"""Changes with the functions below and with what `validated` lets through: what older ones compiled
is then validated and compiled again."""

Flat = Callable[..., Sequence[jax.Array]]


class LoadRefused(Exception):
    """The program cannot be run here; `reason` says why."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Compiled:
    """`call(arguments in order)`; loop and stepped programs take a count, an int32, after them."""

    call: Any
    compile_ms: int = 0
    flop_per_unit: int = 0  # of a step, if stepped; loops whose length is data count once,
    unbounded: bool = False  # and this says that there are such
    memory_mb: int = 0

    def figures(self) -> bytes:
        """As the node is told them."""
        flop = self.flop_per_unit | (AT_LEAST if self.unbounded else 0)
        return FIGURES.pack(self.compile_ms, flop, self.memory_mb)


def compiled(load: Load) -> Compiled:
    """Validate, lower and compile; ArtifactRefused, or LoadRefused if the artifact is not what the
    job says."""
    started = time.perf_counter()
    passed = validated(
        load.artifact,
        builtin=load.builtin,
        platform=_platform(),
        stepped=load.stepped is not None,
    )
    exported = passed.exported
    _check_specs(exported, load)
    widen(load)

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        # An artifact may give one array bare: iterating over that would be over its rows.
        return jax.tree.leaves(exported.call(*arrays))

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
    if load.loop_units:
        function, shapes = _loop(flat, load, shapes, exported.out_avals)
        made = jax.jit(function).lower(*shapes).compile()
    else:
        # A slice's result takes the place of the state that it was made from.
        donated = [i for i, arg in enumerate(load.args) if arg.mapped] if load.stepped else []
        made = jax.jit(flat, donate_argnums=donated).lower(*shapes).compile()
    return Compiled(
        made,
        round((time.perf_counter() - started) * 1000),
        passed.cost.flop,
        passed.cost.unbounded,
        _memory_mb(made.memory_analysis()),
    )


def serialized(made: Compiled) -> bytes:
    """Machine code for `loaded`; b"" where the backend cannot serialise it."""
    try:
        return bytes(serialize_executable.serialize(made.call)[0])
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
        return b""


def loaded(executable: memoryview, load: Load) -> Any:
    """The compiled program out of `serialized` bytes, without lowering: 3 to 30 ms."""
    widen(load)
    args = len(load.args) + bool(load.loop_units or load.stepped)
    outs = len(load.state or load.outs)
    return serialize_executable.deserialize_and_load(
        executable,
        jax.tree.structure(((0,) * args, {})),
        jax.tree.structure([0] * outs),
    )


def widen(load: Load) -> None:
    if any(np.dtype(spec.dtype).itemsize == 8 for spec in (*_arg_specs(load), *load.outs)):
        jax.config.update("jax_enable_x64", True)  # one program a process: nobody else sees it


def environment() -> bytes:
    """SHA-256 of all that machine code depends on beside its artifact; needs the backend."""
    device = jax.devices()[0]
    parts = (
        RECIPE.decode(),
        device.platform,
        device.device_kind,
        str(device.client.platform_version),
        cpu_features(),
        platform.machine(),
        platform.python_version(),
        jax.__version__,
        jaxlib.version.__version__,
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("NPROC", ""),
    )
    return hashlib.sha256("\x00".join(parts).encode()).digest()


@cache
def cpu_features() -> str:
    """Instruction sets, as the kernel lists them: XLA's code, and so the bits, depend on them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return platform.machine()


# ------------------------------------------------------------------------------------------ shapes


def _loop(
    flat: Flat, load: Load, shapes: Sequence[Any], out_avals: Sequence[Any]
) -> tuple[Callable[..., list[jax.Array]], list[Any]]:
    """The first `n` of `loop_units` units, one after the other in one XLA call.

    Mapped arguments come stacked. As `lax.map` does it, but with the count as an argument: one
    compiled loop serves runs of every length, at 0.05 us a unit more.
    """
    units = load.loop_units
    mapped = [index for index, arg in enumerate(load.args) if arg.mapped]

    def loop(*arrays: jax.Array) -> list[jax.Array]:
        *stacked, n = arrays

        def body(index: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
            row = list(stacked)
            for place in mapped:
                row[place] = lax.dynamic_index_in_dim(row[place], index, 0, keepdims=False)
            return [
                lax.dynamic_update_index_in_dim(out, made, index, 0)
                for out, made in zip(outs, flat(*row), strict=True)
            ]

        outs = [jnp.zeros((units, *aval.shape), aval.dtype) for aval in out_avals]
        return list(lax.fori_loop(0, n, body, outs))

    stacked = [
        jax.ShapeDtypeStruct((units, *shape.shape), shape.dtype) if index in mapped else shape
        for index, shape in enumerate(shapes)
    ]
    return loop, [*stacked, jax.ShapeDtypeStruct((), np.int32)]


# ------------------------------------------------------------------------------------------ checks


def _platform() -> str:
    """As jax.export names it."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _arg_specs(load: Load) -> list[ArraySpec]:
    specs = [arg.spec for arg in load.args]
    return [*specs, STEP_COUNT] if load.stepped else specs


def _check_specs(exported: jax.export.Exported, load: Load) -> None:
    pairs = (
        ("argument", exported.in_avals, _arg_specs(load)),
        ("output", exported.out_avals, list(load.state or load.outs)),
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


def _memory_mb(stats: Any) -> int:
    """Arguments, results and temporaries; what is donated is counted once."""
    if stats is None:
        return 0
    total = int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )
    return max(0, min(-(-total >> 20), (1 << 32) - 1))
