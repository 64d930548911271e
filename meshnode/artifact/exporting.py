"""From a person's function to artifact bytes that cars accept. Needs jax; imported on demand.

Flow: the client calls `export` for `mesh.map(fn, xs)` in the user's own process, the program
`build` does for `mesh artifact build`. The bytes come from jaxkernels.export, as those of the
built-in kernels do, and then pass the very validator that cars run: what would be refused on the
road is refused here, with advice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np

from jaxkernels.export import export_flat, flat, shapes_of

from ..errors import ArtifactRefused
from ..protocol.reasons import Reason
from ..protocol.types import ARGS_MAX, DTYPE_BYTES, ArraySpec
from ..worker.header import read_header
from ..worker.validate import CONSTANT_BYTES_MAX, validated
from .bundle import Exported

_WIDE: Final = ("int64", "uint64", "float64")


def export(
    function: Callable[..., Any], specs: Sequence[ArraySpec], *, x64: bool | None = None
) -> bytes:
    """Artifact bytes of `function` for arguments of exactly these dtypes and shapes.

    The function takes arrays one after another; whatever tree of arrays it returns becomes a flat
    tuple. Exported for cpu, cuda and tpu, without debug information and at a pinned StableHLO
    version, so that equal functions have equal bytes wherever their source lies. `x64` turns on
    jax's 64-bit mode; if not given, it is on when an argument has 64 bits.

    Raises ArtifactRefused with advice for closed-over arrays above 1 MiB, for callbacks and
    prints, and for operations that cars do not run; errors of the function itself go through.
    """
    if len(specs) > ARGS_MAX:
        text = f"{len(specs)} arguments; a unit has at most {ARGS_MAX}"
        raise ArtifactRefused(Reason.ARTIFACT_LIMITS, text)
    for spec in specs:
        if spec.dtype not in DTYPE_BYTES:
            text = f"an argument of {spec.dtype}, which does not cross the mesh"
            raise ArtifactRefused(Reason.ARTIFACT_SHAPES, text)
    wide = any(spec.dtype in _WIDE for spec in specs) if x64 is None else x64
    with jax.enable_x64(wide):
        flattened = jax.jit(flat(function))
        traced = flattened.trace(*shapes_of(specs)).jaxpr
        if traced.effects:
            raise ArtifactRefused(Reason.ARTIFACT_EFFECTS, _advice_on_effects(traced.effects))
        _check_constants(traced.consts)
        try:
            content = export_flat(flattened, specs)
        except (NotImplementedError, ValueError) as error:
            refused = _refusal_of(error)
            if refused is None:
                raise
            raise refused from error
    validated(content)
    return content


def export_program(
    function: Callable[..., Any], specs: Sequence[ArraySpec], *, x64: bool | None = None
) -> tuple[Exported, bytes]:
    """`export`, and what the bytes say of themselves."""
    content = export(function, specs, x64=x64)
    header = read_header(content)
    return (
        Exported(
            header.args,
            header.outs,
            header.x64,
            jax.__version__,
            header.calling_convention,
            header.platforms,
        ),
        content,
    )


def _check_constants(constants: Sequence[Any]) -> None:
    """Weights are arguments: a blob is fetched once and kept, an artifact goes with each job."""
    for constant in constants:
        size = int(getattr(constant, "nbytes", 0))
        if size > CONSTANT_BYTES_MAX:
            kind = f"{np.dtype(constant.dtype).name}[{','.join(map(str, constant.shape))}]"
            text = (
                f"the function closes over an array of {size / 1e6:.1f} MB ({kind}); make it an"
                " argument (--spec const=...), so that cars fetch it once and keep it"
            )
            raise ArtifactRefused(Reason.ARTIFACT_CONSTANT, text)


def _advice_on_effects(effects: Any) -> str:
    names = ", ".join(sorted(str(effect) for effect in effects))
    return (
        f"the function has side effects ({names[:120]}); on a car nobody sees a print or a"
        " callback: return what you want to see"
    )


def _refusal_of(error: Exception) -> ArtifactRefused | None:
    """What jax.export says no to, as ours; None for errors of the function."""
    text = str(error)
    if "callback" in text:
        advice = "the function calls back to Python, which cars do not have; write it in jax.numpy"
        return ArtifactRefused(Reason.ARTIFACT_EFFECTS, advice)
    if "custom call" in text:
        advice = "the function needs native code that cars do not run; write it with jax.numpy"
        return ArtifactRefused(Reason.ARTIFACT_CALL, advice)
    return None
