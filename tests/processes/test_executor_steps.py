"""Stepped programs with real workers: slices, what is watched, checkpoints, and the same bits."""

from __future__ import annotations

import errno
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import trio

from jaxkernels import registry
from meshnode.executor import (
    BuiltinArtifacts,
    Executor,
    ExecutorConfig,
    open_executor,
)
from meshnode.ledger.blobs import BlobStore
from meshnode.protocol.effects import Admit, ArgSource, ExecSpec, StartExec, StopExec
from meshnode.protocol.events import (
    Admitted,
    Event,
    ExecEnded,
    Meters,
    Partial,
    SliceDone,
    Started,
    UnitsDone,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import (
    WATCH_BYTES_MAX,
    ArraySpec,
    BlobRef,
    Digest,
    Peer,
    Stepped,
    TaskId,
    UnitRun,
)

from .executor_kit import with_executor, worker_processes
from .test_executor_runs import OwnArtifacts

TEST_S_MAX = 90

EXPORT = """
import sys, jax, jax.numpy as jnp
from jax import export, lax
def s(d, *n): return jax.ShapeDtypeStruct(n, d)
f32, i32, u8 = jnp.float32, jnp.int32, jnp.uint8
def walk(burn, x, count, seen, n):
    def step(_, state):
        x, count, seen = state
        x = lax.fori_loop(0, burn[0], lambda j, v: jnp.sin(v * 1.1) + jnp.roll(v, 1) * 0.5, x)
        return x, count + 1, seen.at[count[0] % 8].add(1)
    return lax.fori_loop(0, n, step, (x, count, seen))
def still(x): return x
shapes = (s(i32, 1), s(f32, 64), s(i32, 1), s(u8, 8), s(i32))
for name, fn, shapes in (("walk", walk, shapes), ("still", still, (s(f32, 64),))):
    made = export.export(jax.jit(fn), platforms=("cpu", "cuda", "tpu"))(*shapes)
    open(f"{sys.argv[1]}/{name}.bin", "wb").write(bytes(made.serialize()))
"""

STATE = (ArraySpec("float32", (64,)), ArraySpec("int32", (1,)), ArraySpec("uint8", (8,)))
STATE_BYTES = 64 * 4 + 4 + 8
STEPPED = Stepped(result=(0, 1), watch=(1, 2))
BURN_SHORT, BURN_LONG = 1, 800  # inner iterations: a step of microseconds, of half a millisecond
ENDLESS = 1_000_000  # steps: more than wall_ms_max allows, so the test ends a run, or time does
MORE = 500  # steps that are left to do after a checkpoint


@dataclass
class House:
    config: ExecutorConfig
    artifacts: OwnArtifacts
    blobs: BlobStore
    exec_ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def spec(self, steps: int, burn: int) -> ExecSpec:
        constant, shape = self.blobs.put_array(np.array([burn], np.int32))
        return ExecSpec(
            submitter=Peer(b"s" * 38),
            job_digest=Digest(b"j" * 32),
            kernel="walk",
            artifact=self.artifacts.digests["walk"],
            args=(
                ArgSource(False, shape, constant),
                *(ArgSource(True, spec, None) for spec in STATE),
            ),
            outs=(STATE[0], STATE[1]),
            wall_ms_max=60_000,
            memory_mb_max=512,
            stepped=STEPPED,
            steps=steps,
        )

    def run(self, steps: int, burn: int = BURN_SHORT, units: int = 1, first: int = 0) -> StartExec:
        starts = np.random.default_rng(3).standard_normal((first + units, 64))[first:]
        inline = starts.astype(np.float32).tobytes() + bytes(units * (4 + 8))
        run = UnitRun(TaskId(b"t" * 16), 0, first, units)
        return StartExec(next(self.exec_ids), self.spec(steps, burn), run, inline)


@dataclass
class Told:
    """All that an executor said of one run."""

    end: ExecEnded
    outputs: list[bytes]
    slices: list[SliceDone]
    partials: list[Partial]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> OwnArtifacts:
    folder = tmp_path_factory.mktemp("artifacts")
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True, timeout=120)
    return OwnArtifacts(folder)


@pytest.fixture
def house(tmp_path: Path, artifacts: OwnArtifacts) -> House:
    config = ExecutorConfig(run_dir=tmp_path, executable_cache=tmp_path / "executables")
    return House(config, artifacts, BlobStore(tmp_path / "blobs"))


async def told(
    executor: Executor, effect: StartExec, on: Callable[[Event], None] = lambda _: None
) -> Told:
    executor.start(effect)
    outputs: list[bytes] = []
    slices: list[SliceDone] = []
    partials: list[Partial] = []
    while True:
        event = await executor.events.receive()
        on(event)
        if isinstance(event, UnitsDone):
            outputs += event.outputs
        elif isinstance(event, SliceDone):
            slices.append(event)
        elif isinstance(event, Partial):
            partials.append(event)
        elif isinstance(event, ExecEnded) and event.exec_id == effect.exec_id:
            return Told(event, outputs, slices, partials)


def state_of(house: House, ref: BlobRef) -> tuple[np.ndarray, int, np.ndarray]:
    content = house.blobs.read_range(ref.blob_id, 0, ref.size)
    assert content is not None and len(content) == STATE_BYTES
    x = np.frombuffer(content[:256], np.float32)
    return x, int(np.frombuffer(content[256:260], np.int32)[0]), np.frombuffer(content[260:], "u1")


def counted(output: bytes) -> int:
    """Steps that a unit has done, as its own state says."""
    return int(np.frombuffer(output[256:], np.int32)[0])


def is_of_its_step(partial: Partial) -> bool:
    """Both watched arrays count steps: one as a number, the other in bytes that may overflow."""
    count, seen = np.frombuffer(partial.watch[:4], np.int32)[0], partial.watch[4:]
    return bool(count == partial.step) and len(seen) == 8 and sum(seen) % 256 == partial.step % 256


# ------------------------------------------------------------------------------------ right bytes


@pytest.mark.long
def test_units_of_a_run_begin_with_their_own_state_and_do_all_steps(house: House) -> None:
    async def body(executor: Executor) -> None:
        got = await told(executor, house.run(500, units=3))
        assert got.end.reason is Reason.DONE, got.end
        assert [counted(output) for output in got.outputs] == [500] * 3
        for unit in range(3):
            alone = await told(executor, house.run(500, first=unit))
            assert alone.outputs == [got.outputs[unit]]
        assert len(set(got.outputs)) == 3
        assert len(worker_processes()) == 1

    with_executor(house, body)


def test_a_run_that_is_stopped_goes_on_from_its_checkpoint_with_the_same_bits(
    house: House,
) -> None:
    async def body(executor: Executor) -> None:
        effect = house.run(ENDLESS, BURN_LONG)

        def stop(event: Event) -> None:
            if isinstance(event, Partial) and event.step > 20:
                executor.stop(StopExec(effect.exec_id, Reason.STOPPED_BY_OWNER, 20_000))

        left = await told(executor, effect, stop)
        assert left.end.reason is Reason.STOPPED_BY_OWNER and left.outputs == []
        last = left.slices[-1]
        assert (last.unit, last.state.size) == (0, STATE_BYTES) and 20 < last.step < ENDLESS
        _, count, seen = state_of(house, last.state)
        assert count == last.step and sum(seen.tolist()) % 256 == last.step % 256
        # The last slices may have come too soon behind one another to be shown.
        assert left.partials[-1].step <= last.step
        assert all(map(is_of_its_step, left.partials))
        steps = last.step + MORE
        whole = await told(executor, house.run(steps, BURN_LONG))
        assert whole.end.reason is Reason.DONE and counted(whole.outputs[0]) == steps
        # In the same worker and, as on another car, in a new one.
        for who in (b"s", b"o"):
            again = house.run(steps, BURN_LONG)
            spec = replace(again.spec, submitter=Peer(who * 38))
            again = replace(again, spec=spec, state=last.state, step=last.step)
            rest = await told(executor, again)
            assert rest.end.reason is Reason.DONE, rest.end
            assert rest.outputs == whole.outputs
            assert all(partial.step > last.step for partial in rest.partials)

    with_executor(house, body)


@pytest.mark.long
def test_a_killed_worker_leaves_its_last_checkpoint(house: House) -> None:
    async def body(executor: Executor) -> None:
        def kill(event: Event) -> None:
            if isinstance(event, SliceDone):
                worker_processes()[0].send_signal(signal.SIGKILL)

        left = await told(executor, house.run(ENDLESS, BURN_LONG), kill)
        assert left.end.reason is Reason.WORKER_DIED
        last = left.slices[-1]
        assert state_of(house, last.state)[1] == last.step < ENDLESS
        steps = last.step + MORE
        again = replace(house.run(steps, BURN_LONG), state=last.state, step=last.step)
        rest = await told(executor, again)
        assert rest.end.reason is Reason.DONE and counted(rest.outputs[0]) == steps
        whole = await told(executor, house.run(steps, BURN_LONG))
        assert rest.outputs == whole.outputs
        # What was done before the checkpoint is not done again, nor counted.
        left_share = MORE / steps
        assert abs(rest.end.meters.kflop - whole.end.meters.kflop * left_share) <= 1

    with_executor(house, body)


def test_what_is_watched_comes_as_the_run_goes_on(house: House) -> None:
    async def body(executor: Executor) -> None:
        effect = house.run(ENDLESS, BURN_LONG)
        seen = 0

        def stop_after_three(event: Event) -> None:
            nonlocal seen
            seen += isinstance(event, Partial)
            if seen == 3:
                executor.stop(StopExec(effect.exec_id, Reason.STOPPED_BY_OWNER, 20_000))

        got = await told(executor, effect, stop_after_three)
        steps = [partial.step for partial in got.partials]
        assert len(steps) >= 3 and steps == sorted(set(steps))
        assert all(map(is_of_its_step, got.partials))
        assert got.slices and got.slices[0].meters.device_ms > 0
        # A checkpoint a second, not one a slice.
        assert len(got.slices) <= len(steps)

    with_executor(house, body)


@pytest.mark.long
def test_a_checkpoint_with_nothing_left_to_do_is_the_result(house: House) -> None:
    async def body(executor: Executor) -> None:
        whole = await told(executor, house.run(50))
        x = np.arange(64, dtype=np.float32)
        state = x.tobytes() + np.int32(50).tobytes() + bytes(8)
        ref = house.blobs.put_bytes(state)
        got = await told(executor, replace(house.run(50), state=ref, step=50))
        assert got.end.reason is Reason.DONE and got.outputs == [state[:260]] != whole.outputs

    with_executor(house, body)


@pytest.mark.long
def test_a_checkpoint_counts_for_the_first_unit_of_a_run_only(house: House) -> None:
    async def body(executor: Executor) -> None:
        whole = await told(executor, house.run(100, units=2))
        half = await told(executor, house.run(40))
        content = half.outputs[0] + bytes([5] * 8)
        again = replace(house.run(100, units=2), state=house.blobs.put_bytes(content), step=40)
        got = await told(executor, again)
        assert got.outputs == whole.outputs

    with_executor(house, body)


# ---------------------------------------------------------------------------------- ends, refusals


class FullStore(BlobStore):
    asked = 0

    def put_open(self, fd: int, size: int) -> BlobRef:
        self.asked += 1
        raise OSError(errno.ENOSPC, "the blob store's quota is used up")


@pytest.mark.long
def test_a_full_store_costs_the_checkpoints_and_not_the_run(house: House, tmp_path: Path) -> None:
    house.blobs = store = FullStore(tmp_path / "full")

    async def body(executor: Executor) -> None:
        effect = house.run(ENDLESS, BURN_LONG)

        def stop(event: Event) -> None:
            if isinstance(event, Partial) and store.asked >= 2:  # the run went on after the first
                executor.stop(StopExec(effect.exec_id, Reason.STOPPED_BY_OWNER, 20_000))

        got = await told(executor, effect, stop)
        assert got.end.reason is Reason.STOPPED_BY_OWNER
        assert got.slices == [] and got.partials

    with_executor(house, body)


@pytest.mark.long
def test_many_units_of_steps_pass_through_shared_memory_unchanged(house: House) -> None:
    units = 400  # their states and their results are over 64 kB

    async def body(executor: Executor) -> None:
        whole = await told(executor, house.run(3, units=units))
        assert whole.end.reason is Reason.DONE and len(whole.outputs) == units
        for unit in (0, 1, 255, units - 1):
            alone = await told(executor, house.run(3, first=unit))
            assert alone.outputs == [whole.outputs[unit]]

    with_executor(house, body)


@pytest.mark.long
def test_a_stop_without_grace_kills(house: House) -> None:
    async def body(executor: Executor) -> None:
        effect = house.run(1_000_000, BURN_LONG)

        def stop(event: Event) -> None:
            if isinstance(event, Started):
                executor.stop(StopExec(effect.exec_id, Reason.STOPPED_BY_OWNER, 0))

        got = await told(executor, effect, stop)
        assert got.end.reason is Reason.STOPPED_BY_OWNER and got.slices == []
        assert worker_processes() == []

    with_executor(house, body)


def test_a_stop_right_behind_the_start_is_heard(house: House) -> None:
    """Before the worker has read the run, while it reads it, and after."""

    async def body(executor: Executor) -> None:
        await told(executor, house.run(1, BURN_LONG))
        (worker,) = worker_processes()
        for turns in range(20):
            effect = house.run(1_000_000, BURN_LONG)
            executor.start(effect)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            executor.stop(StopExec(effect.exec_id, Reason.CANCELLED, 20_000))
            while True:
                event = await executor.events.receive()
                if isinstance(event, ExecEnded):
                    break
            assert event.reason is Reason.CANCELLED and event.meters.wall_ms < 10_000
        assert worker_processes() == [worker]

    with_executor(house, body)


@pytest.mark.long
def test_what_is_no_stepped_run_is_refused(house: House) -> None:
    good = house.run(10)
    state = house.blobs.put_bytes(bytes(STATE_BYTES))
    huge = ArraySpec("uint8", (WATCH_BYTES_MAX + 1,))
    wrong_here = {
        "steps": replace(good, spec=replace(good.spec, steps=0)),
        "steps over int32": replace(good, spec=replace(good.spec, steps=1 << 31)),
        "result": replace(good, spec=replace(good.spec, stepped=Stepped((0, 3), ()))),
        "outs": replace(good, spec=replace(good.spec, outs=(STATE[1], STATE[0]))),
        "watch": replace(good, spec=replace(good.spec, stepped=Stepped((0, 1), (-1,)))),
        "watch often": replace(good, spec=replace(good.spec, stepped=Stepped((0, 1), (1,) * 9))),
        "step": replace(good, step=3),
        "far": replace(good, state=state, step=11),
        "short": replace(good, state=house.blobs.put_bytes(bytes(STATE_BYTES - 1)), step=3),
        "plain": replace(good, spec=replace(good.spec, stepped=None), state=state),
        "wide": replace(
            good,
            spec=replace(
                good.spec,
                args=(*good.spec.args[:3], ArgSource(True, huge, None)),
                stepped=Stepped((0, 1), (2,)),
            ),
        ),
    }
    still = replace(
        good.spec,
        artifact=house.artifacts.digests["still"],
        args=(ArgSource(True, STATE[0], None),),
        outs=(STATE[0],),
        stepped=Stepped((0,), ()),
    )

    async def body(executor: Executor) -> None:
        for number, (what, effect) in enumerate(wrong_here.items()):
            got = await told(executor, replace(effect, exec_id=1_000 + number))
            assert got.end.reason in (Reason.KERNEL_SPEC, Reason.TOO_LARGE), what
        assert worker_processes() == []
        # A kernel that takes no count is found out where it is read.
        got = await told(executor, replace(good, exec_id=2_000, spec=still, inline=bytes(256)))
        assert got.end.reason is Reason.KERNEL_SPEC and "1 arguments" in got.end.text
        missing = BlobRef(Digest(b"n" * 32), STATE_BYTES)
        got = await told(executor, replace(house.run(10), state=missing, step=3))
        assert got.end.reason is Reason.BLOB_MISSING

    with_executor(house, body)


@pytest.mark.long
def test_work_is_counted_in_steps(house: House) -> None:
    async def body(executor: Executor) -> None:
        few = (await told(executor, house.run(1_000))).end.meters
        many = (await told(executor, house.run(5_000, units=2))).end.meters
        assert few.kflop > 0 and abs(many.kflop - 10 * few.kflop) <= 10
        executor.admit(Admit(7, house.spec(5_000, BURN_SHORT)))
        admitted = await executor.events.receive()
        assert isinstance(admitted, Admitted)
        assert abs(admitted.kflop_per_unit - 5 * few.kflop) <= 5
        assert isinstance(few, Meters)

    with_executor(house, body)


# ---------------------------------------------------------------------------- the release's kernels


def released(house: House, kernel: str, inline: bytes, steps: int) -> StartExec:
    info = registry.get(kernel)
    assert info.stepped is not None
    rng = np.random.default_rng(1)
    sources = []
    for arg in info.args:
        shape = ArraySpec(arg.dtype, arg.shape)
        if arg.mapped:
            sources.append(ArgSource(True, shape, None))
        else:
            constant = rng.uniform(2.5, 9.0, arg.shape).astype(arg.dtype)
            sources.append(ArgSource(False, shape, house.blobs.put_array(constant)[0]))
    spec = replace(
        house.spec(steps, BURN_SHORT),
        kernel=kernel,
        artifact=Digest(registry.artifact(kernel).digest),
        args=tuple(sources),
        outs=tuple(ArraySpec(out.dtype, out.shape) for out in info.outs),
        stepped=Stepped(info.stepped.result, info.stepped.watch),
    )
    run = UnitRun(TaskId(b"t" * 16), 0, 0, 1)
    return StartExec(next(house.exec_ids), spec, run, inline)


@pytest.mark.parametrize(
    "kernel",
    [spec for spec, info in registry.KERNELS.items() if info.stepped and info.model is None],
)
@pytest.mark.long
def test_a_released_kernel_goes_on_with_the_same_bits(house: House, kernel: str) -> None:
    """Whatever numbers the state holds: random ones do, as long as none is too large."""
    rng = np.random.default_rng(2)
    state = [arg for arg in registry.get(kernel).args if arg.mapped]
    inline = b"".join(
        (rng.uniform(0, 9, arg.shape) * (arg.dtype == "float32")).astype(arg.dtype).tobytes()
        for arg in state
    )

    async def body(executor: Executor) -> None:
        effect = released(house, kernel, inline, ENDLESS)

        def stop(event: Event) -> None:
            if isinstance(event, Partial):  # after the first slice, of one step
                executor.stop(StopExec(effect.exec_id, Reason.STOPPED_BY_OWNER, 20_000))

        left = await told(executor, effect, stop)
        assert left.end.reason is Reason.STOPPED_BY_OWNER and left.outputs == []
        last = left.slices[-1]
        assert 0 < last.step < ENDLESS
        steps = last.step + 100
        whole = await told(executor, released(house, kernel, inline, steps))
        assert whole.end.reason is Reason.DONE, whole.end
        again = replace(released(house, kernel, inline, steps), state=last.state, step=last.step)
        rest = await told(executor, again)
        assert rest.end.reason is Reason.DONE and rest.outputs == whole.outputs

    async def main() -> None:
        with trio.fail_after(TEST_S_MAX):
            async with open_executor(house.config, house.blobs, BuiltinArtifacts()) as executor:
                await body(executor)

    trio.run(main)
