"""What a node knows of programs between runs: what passed, what was refused, what it costs.

Asked by `supervisor` at every `admit` and `start`, before anything is spawned, and told by it what
compile-only workers found. Bounded; what is forgotten is found again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple, TypeVar

from meshnode.protocol.effects import ExecSpec
from meshnode.protocol.reasons import Reason

from . import wire
from .admission import (
    PROGRAM_REFUSALS,
    Program,
    Refused,
    check_memory,
    check_sizes,
    memory_mb_least,
    program_of,
)
from .artifacts import Artifact, ArtifactSource
from .bounds import FIGURES_KEPT_MAX, REFUSALS_KEPT_MAX
from .cache import Figures

_K = TypeVar("_K")
_V = TypeVar("_V")


class Passed(NamedTuple):
    """What of a spec that may run is asked for at every run of it."""

    program: Program
    unit_bytes: int  # all outputs of one unit
    inline_bytes: int  # of one unit
    flop_per_unit: int  # of a step, if stepped; 0: not known yet
    counted: bool  # else loops whose length is data count once in it
    memory_mb: int  # least, until it is known


class Programs:
    def __init__(self, artifacts: ArtifactSource, memory_mb_max: int) -> None:
        self._artifacts = artifacts
        self._memory_mb_max = memory_mb_max
        self._figures: OrderedDict[Program, Figures] = OrderedDict()
        self._refused: OrderedDict[Program, tuple[Reason, str]] = OrderedDict()
        self._passed: OrderedDict[Hashable, Passed] = OrderedDict()

    def check(self, spec: ExecSpec) -> Passed:
        """Refused if no worker need be asked. Remembered: a requester's short calls are all of one
        program."""
        key = (
            *(spec.submitter, spec.artifact, spec.args, spec.outs),
            *(spec.stepped, spec.steps, spec.memory_mb_max),
        )
        known = self._passed.get(key)
        if known is None:
            known = self._check(spec)
            _keep(self._passed, key, known, FIGURES_KEPT_MAX)
        return known

    def memory_mb_max(self, spec: ExecSpec) -> int:
        return min(spec.memory_mb_max, self._memory_mb_max)

    def load(self, spec: ExecSpec) -> wire.Load:
        """What a worker is told of the program, artifact included."""
        artifact = self._artifact(spec)
        return wire.Load(
            artifact.exported,
            _load_args(spec),
            spec.outs,
            self.memory_mb_max(spec),
            spec.stepped,
            builtin=artifact.builtin,
        )

    def learn(self, program: Program, figures: Figures) -> None:
        """From a compile-only worker."""
        _keep(self._figures, program, figures, FIGURES_KEPT_MAX)
        self._passed.clear()  # they passed without these figures

    def refuse(self, program: Program, refused: Refused) -> None:
        """Remembered if no other run of the program will fare better."""
        if refused.reason in PROGRAM_REFUSALS:
            _keep(self._refused, program, (refused.reason, refused.text), REFUSALS_KEPT_MAX)
            self._passed.clear()

    # ---- the first time

    def _artifact(self, spec: ExecSpec) -> Artifact:
        try:
            return self._artifacts.artifact(spec.artifact, spec.code)
        except KeyError:
            raise Refused(Reason.UNKNOWN_ARTIFACT) from None

    def _check(self, spec: ExecSpec) -> Passed:
        artifact = self._artifact(spec)
        check_sizes(spec, self._memory_mb_max)
        if artifact.args is not None:
            if artifact.args != _load_args(spec):
                raise Refused(Reason.KERNEL_SPEC, f"the arguments are not those of {spec.kernel}")
            if artifact.outs != spec.outs or artifact.stepped != spec.stepped:
                raise Refused(Reason.KERNEL_SPEC, f"the outputs are not those of {spec.kernel}")
        program = program_of(spec)
        if known := self._refused.get(program):
            raise Refused(*known)
        inline = [arg.spec for arg in spec.args if arg.mapped and not arg.blob]
        flop, counted, memory_mb = artifact.flop_per_unit, True, memory_mb_least(spec)
        if figures := self._figures.get(program):
            memory_mb = figures.memory_mb
            if not flop:
                flop, counted = figures.flop_per_unit, figures.counted
            check_memory(memory_mb, self.memory_mb_max(spec))
        return Passed(
            program,
            sum(map(wire.array_bytes, spec.outs)),
            sum(map(wire.array_bytes, inline)),
            flop,
            counted,
            memory_mb,
        )


def _load_args(spec: ExecSpec) -> tuple[wire.LoadArg, ...]:
    return tuple(wire.LoadArg(arg.mapped, arg.spec) for arg in spec.args)


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V, count_max: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > count_max:
        kept.popitem(last=False)
