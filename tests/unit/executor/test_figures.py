"""What compiling tells of a program's cost: a bound for admission, a figure for the meters."""

from __future__ import annotations

import pytest

from meshnode.executor import Artifact, wire
from meshnode.executor.admission import program_of
from meshnode.executor.cache import Figures
from meshnode.executor.programs import Programs
from meshnode.protocol.effects import ArgSource, ExecSpec
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer

F4 = ArraySpec("float32", (4,))
SPEC = ExecSpec(
    Peer(b"p" * 38),
    Digest(b"j" * 32),
    "it",
    Digest(b"a" * 32),
    (ArgSource(True, F4, None),),
    (F4,),
    wall_ms_max=60_000,
    memory_mb_max=64,
)
COUNTED = Figures(100, 9_000, 1)
LEAST = Figures(100, 9_000 | wire.AT_LEAST, 1)


class Source:
    def __init__(self, flop: int) -> None:
        self.flop = flop

    def artifact(self, digest: Digest, code: BlobRef | None = None, /) -> Artifact:
        return Artifact(b"code", self.flop)


@pytest.mark.parametrize(
    ("maker", "figures", "flop", "counted"),
    [
        (0, None, 0, True),  # nobody knows yet
        (0, COUNTED, 9_000, True),
        (0, LEAST, 9_000, False),
        (5_000, LEAST, 5_000, True),  # a release says what its own kernels cost
    ],
)
def test_what_a_loop_may_add_is_no_figure(
    maker: int, figures: Figures | None, flop: int, counted: bool
) -> None:
    programs = Programs(Source(maker), 1_024)
    if figures is not None:
        programs.learn(program_of(SPEC), figures)
    passed = programs.check(SPEC)
    assert (passed.flop_per_unit, passed.counted) == (flop, counted)
