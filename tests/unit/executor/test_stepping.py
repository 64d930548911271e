"""What a worker may say of a stepped run's progress: its own run, forwards, and not too often."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from meshnode.executor import wire
from meshnode.executor.stepping import STATE_S_MIN, WATCH_S_MIN, SteppedRun
from meshnode.ledger.blobs import BlobStore
from meshnode.protocol.effects import ArgSource, ExecSpec, StartExec
from meshnode.protocol.events import Meters
from meshnode.protocol.types import ArraySpec, BlobRef, Digest, Peer, Stepped, TaskId, UnitRun

STATE = (ArraySpec("float32", (4,)), ArraySpec("int32", (1,)))
SPEC = ExecSpec(
    submitter=Peer(b"s" * 38),
    job_digest=Digest(b"j" * 32),
    kernel="k",
    artifact=Digest(b"a" * 32),
    args=tuple(ArgSource(True, spec, None) for spec in STATE),
    outs=STATE[:1],
    wall_ms_max=1_000,
    memory_mb_max=10,
    stepped=Stepped((0,), (1,)),
    steps=100,
)
EFFECT = StartExec(7, SPEC, UnitRun(TaskId(b"t" * 16), 0, 5, 3), b"")


@pytest.fixture
def stepped(tmp_path: Path) -> Iterator[SteppedRun]:
    run = SteppedRun(EFFECT, BlobStore(tmp_path))
    yield run
    run.close()


def head(exec_id: int = 7, unit: int = 5, step: int = 10) -> bytes:
    return wire.SLICE_HEAD.pack(exec_id, unit, step, 33)


def test_progress_is_that_of_this_run(stepped: SteppedRun) -> None:
    assert stepped.progress(wire.WATCH, head() + b"abcd") == (33, b"abcd")
    assert stepped.progress(wire.STATE, head(step=10)) == (33, b"")
    assert stepped.progress(wire.STATE, head(step=100)) == (33, b"")
    assert stepped.steps_done == 100
    stepped.on_units(1)
    assert stepped.progress(wire.STATE, head(unit=6, step=1)) == (33, b"")
    assert stepped.steps_done == 101


def test_a_checkpoints_steps_are_not_counted_again(tmp_path: Path) -> None:
    state = BlobRef(Digest(b"b" * 32), 20)
    run = SteppedRun(replace(EFFECT, state=state, step=60), BlobStore(tmp_path))
    try:
        assert run.steps_done == 0
        run.progress(wire.STATE, head(step=75))
        assert run.steps_done == 15
        run.on_units(2)
        assert run.steps_done == 140
    finally:
        run.close()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (wire.WATCH, head(exec_id=8) + b"abcd"),
        (wire.WATCH, head(unit=6) + b"abcd"),
        (wire.WATCH, head(step=9) + b"abcd"),
        (wire.WATCH, head(step=101) + b"abcd"),
        (wire.WATCH, head() + b"abc"),
        (wire.WATCH, b""),
        (wire.STATE, head() + b"x"),
        (wire.STATE, head(unit=4)),
    ],
)
def test_what_cannot_be_is_a_wire_error(stepped: SteppedRun, kind: int, body: bytes) -> None:
    stepped.progress(wire.STATE, head())
    with pytest.raises(wire.WireError):
        stepped.progress(kind, body)


def test_the_state_file_keeps_its_size(stepped: SteppedRun) -> None:
    assert os.fstat(stepped.state_fd).st_size == stepped.state_bytes == 20
    for size in (0, 19, 21):
        with pytest.raises(PermissionError):
            os.ftruncate(stepped.state_fd, size)
    assert os.pwrite(stepped.state_fd, bytes(20), 0) == 20


def test_partials_are_thinned_and_checkpoints_too_often_end_the_worker(
    stepped: SteppedRun, tmp_path: Path
) -> None:
    async def main() -> None:
        first = stepped.partial(b"abcd")
        assert first is not None and first.watch == b"abcd"
        assert stepped.partial(b"abcd") is None
        clock.jump(2 * WATCH_S_MIN)
        assert stepped.partial(b"abcd") is not None

        os.pwrite(stepped.state_fd, b"s" * 20, 0)
        stepped.progress(wire.STATE, head())
        kept = await stepped.keep(Meters(), stopping=False)
        assert kept is not None and (kept.unit, kept.step, kept.state.size) == (5, 10, 20)
        assert BlobStore(tmp_path).read_range(kept.state.blob_id, 0, 20) == b"s" * 20
        with pytest.raises(wire.WireError, match="too often"):
            await stepped.keep(Meters(), stopping=False)
        assert await stepped.keep(Meters(), stopping=True) is not None  # the last one is welcome
        clock.jump(2 * STATE_S_MIN)
        assert await stepped.keep(Meters(), stopping=False) is not None

    clock = MockClock()
    trio.run(main, clock=clock)


def test_between_two_checkpoints_on_the_disk_lies_the_owners_interval(
    stepped: SteppedRun,
) -> None:
    async def main() -> None:
        async def kept(*, stopping: bool = False) -> bool:
            meters = Meters(0, 0)
            return await stepped.keep(meters, stopping=stopping, interval_s=60.0) is not None

        clock, found = trio.lowlevel.current_clock(), []
        assert isinstance(clock, trio.testing.MockClock)
        for _ in range(13):
            found.append(await kept())
            clock.jump(10.0)
        assert [at for at, each in enumerate(found) if each] == [0, 6, 12]
        assert await kept(stopping=True), "what it has at its stop is handed on"

    trio.run(main, clock=trio.testing.MockClock())
