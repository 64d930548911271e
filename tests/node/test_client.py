"""The client's two APIs against a real node process: jobs, calls, watches, blobs and errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import trio

from jaxkernels import host, registry
from meshnode.client import Foreign, Job, Mesh, Terms, as_completed, connect, imagined, programs
from meshnode.client import aio as client_aio
from meshnode.client.background import connect_or_start
from meshnode.client.imagined import unstored_refs
from meshnode.errors import (
    ArtifactRefused,
    LocalProtocolError,
    LocalResource,
    NoSuitableNode,
    TimedOut,
    Unreachable,
    UsageError,
)
from meshnode.node.home import socket_path
from meshnode.node.wire import CONTROL_FRAME_BYTES_MAX, SOCKET_NAME, FrameBuffer, pack
from meshnode.protocol.types import CHUNK_BYTES, ArraySpec

from .node_kit import KERNEL, make_home

INFO = registry.get(KERNEL)
CALL_S = 90.0  # generous: the first one waits for the car's worker


class Processes:
    """A car process; nodes of further homes join it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.car_home = make_home(folder, "car-0", car=True)
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "meshnode.node", "--role", "testnet-car"]
        self.car = subprocess.Popen(
            [*command, "--home", str(self.car_home), "--ready-fd", str(writing)],
            pass_fds=(writing,),
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert pipe.readline()
        with connect(self.car_home) as mesh:
            self.addrs: list[str] = mesh.status()["addrs"]

    def close(self) -> None:
        self.car.terminate()
        try:
            self.car.wait(timeout=20)
        finally:
            self.car.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a submitter whose background node has joined a car."""
    folder = tmp_path_factory.mktemp("mesh")
    processes = Processes(folder)
    try:
        home = make_home(folder, "submitter", car=False)
        (home / "config.toml").write_text(
            '[node]\ncell = "testnet"\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
            "[limits]\nnobody_ms = 60000\n"  # on a slow machine the two take long to meet
        )
        mesh, started = connect_or_start(home, join=tuple(processes.addrs))
        assert started
        with mesh:
            yield home
            pid = mesh.hello()["pid"]
            mesh.shutdown()
        wait_gone(pid)
    finally:
        processes.close()


def wait_gone(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        import select

        assert select.select([pidfd], [], [], 20)[0]
    finally:
        os.close(pidfd)


@pytest.fixture
def mesh(home: Path) -> Iterator[Mesh]:
    with connect(home) as mesh:
        yield mesh


def rows(units: int) -> host.Array:
    return np.arange(units * 16, dtype=np.float32).reshape(units, 16)


def test_submit_watch_result(mesh: Mesh) -> None:
    prepared = mesh.prepare(KERNEL, rows(500))  # 32 kB: a blob
    job_id = mesh.submit_kernel(INFO, prepared, terms=Terms(label="five hundred"))
    kinds = [notice.kind for notice in mesh.watch(job_id)]
    assert kinds[0] == kinds[-1] == "job"
    (out,) = mesh.result(job_id)
    assert np.array_equal(out, rows(500) + 1)
    assert np.array_equal(mesh.finish(job_id), rows(500) + 1)
    assert mesh.wait(job_id)["state"] == "done"
    assert mesh.find(job_id.hex()[:10]) == job_id
    assert mesh.show(job_id)["label"] == "five hundred"
    assert any(notice.kind == "attempt" for notice in mesh.logs(job_id))


def test_a_call_is_one_request(mesh: Mesh) -> None:
    (out,) = mesh.call(INFO, mesh.prepare(KERNEL, rows(1)), timeout_s=CALL_S)
    assert np.array_equal(out, rows(1) + 1)


def test_large_inputs_and_results_go_by_file(mesh: Mesh) -> None:
    big = rows(40_000)  # 2.5 MB in and out
    job_id = mesh.submit_kernel(INFO, mesh.prepare(KERNEL, big), terms=Terms())
    (out,) = mesh.result(job_id, timeout_s=CALL_S)
    assert np.array_equal(out, big + 1)
    assert list((mesh.home / "tmp").iterdir()) == []


def test_many_threads_share_a_connection(mesh: Mesh) -> None:
    found: list[float] = []

    def work(number: int) -> None:
        (out,) = mesh.call(INFO, mesh.prepare(KERNEL, rows(1) + number), timeout_s=CALL_S)
        found.append(float(out[0, 0]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [number + 1.0 for number in range(8)]


def test_jobs_are_futures(mesh: Mesh) -> None:
    jobs = [mesh.submit_job(INFO, mesh.prepare(KERNEL, rows(4))) for _ in range(3)]
    assert {job.job_id for job in as_completed(jobs)} == {job.job_id for job in jobs}
    assert jobs[0].done()
    assert jobs[0].exception() is None
    assert np.array_equal(jobs[0].result(), rows(4) + 1)


def test_a_job_that_no_car_may_run(mesh: Mesh) -> None:
    terms = Terms(cars=(mesh.hello()["peer"],), deadline_s=0.5)  # only this node, which runs none
    job = Job(mesh, mesh.submit_kernel(INFO, mesh.prepare(KERNEL, rows(1)), terms=terms))
    with pytest.raises(TimedOut):
        job.result(timeout_s=CALL_S)
    assert job.explain()["reasons"]
    terms = Terms(memory_mb_max=1 << 40, deadline_s=0.5, durable=False)
    with pytest.raises((TimedOut, NoSuitableNode)):
        mesh.call(INFO, mesh.prepare(KERNEL, rows(1)), terms=terms, timeout_s=CALL_S)


def test_waiting_has_its_own_time(mesh: Mesh) -> None:
    terms = Terms(cars=(mesh.hello()["peer"],))
    job = mesh.submit_job(INFO, mesh.prepare(KERNEL, rows(1)), terms=terms)
    with pytest.raises(TimedOut):
        job.result(timeout_s=0.2)
    assert job.running()
    assert job.cancel()
    assert job.cancelled()


def test_unknown_jobs_and_bad_input(mesh: Mesh) -> None:
    with pytest.raises(UsageError, match="knows no job"):
        mesh.result(bytes(16))
    with pytest.raises(UsageError, match="no job of this node"):
        mesh.find("zz")
    with pytest.raises(UsageError, match="float32"):
        mesh.prepare(KERNEL, rows(1).astype(np.float64))
    with pytest.raises(UsageError, match="no kernel"):
        mesh.prepare("no.such", rows(1))


def test_a_peer_that_is_no_client_is_hung_up_on(mesh: Mesh, home: Path) -> None:
    for rubbish in (b"\xff" * 64, (CONTROL_FRAME_BYTES_MAX + 1).to_bytes(4, "big"), pack({"a": 1})):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(socket_path(home, SOCKET_NAME)))
            sock.settimeout(10)
            sock.sendall(rubbish)
            assert sock.recv(1) == b""
    assert mesh.hello()["version"] == 1


def test_the_client_loads_neither_trio_nor_libp2p_nor_jax() -> None:
    code = "import sys, meshnode.client, meshnode.client.background; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"trio", "libp2p", "jax"} & set(done.stdout.split())


def test_no_node_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no node runs"):
        connect(tmp_path)


def test_frames_are_bounded_and_whole() -> None:
    frame = pack({"id": 7, "op": "x"})
    buffer = FrameBuffer()
    assert [m for at in range(len(frame)) for m in buffer.feed(frame[at : at + 1])] == [
        {"id": 7, "op": "x"}
    ]
    assert len(buffer.feed(frame * 3)) == 3
    with pytest.raises(LocalProtocolError):
        buffer.feed(b"\xff\xff\xff\xff")


def test_the_trio_twin(home: Path) -> None:
    async def main() -> None:
        with trio.fail_after(120):
            async with client_aio.connect(home) as mesh:
                prepared = host.prepare(KERNEL, rows(500))
                job_id = await mesh.submit_kernel(INFO, prepared)
                notices = [notice async for notice in mesh.watch(job_id)]
                assert notices[-1].fields["state"] == "done"
                (out,) = await mesh.result(job_id)
                assert np.array_equal(out, rows(500) + 1)
                assert np.array_equal(await mesh.finish(job_id), rows(500) + 1)
                peer = (await mesh.hello())["peer"]
                nobody = Terms(cars=(peer,), durable=False)  # only this node, which runs none
                with trio.move_on_after(0.2) as scope:
                    await mesh.call(INFO, host.prepare(KERNEL, rows(1)), terms=nobody)
                assert scope.cancelled_caught
                (out,) = await mesh.call(INFO, host.prepare(KERNEL, rows(1)))
                assert np.array_equal(out, rows(1) + 1)
                with pytest.raises(UsageError):
                    await mesh.wait(bytes(16))

    trio.run(main)


def test_what_a_submission_would_do(home: Path, mesh: Mesh) -> None:
    """Both twins say the same, nothing is stored, and what is in the store already is found."""
    big = mesh.prepare(KERNEL, rows(500))
    refs = unstored_refs(big)
    assert refs.keys() == {0}
    stored = mesh.status()["blob_bytes"]
    found = mesh.would(INFO, big)
    assert (found["units"], found["cars_asked"], found["cars_known"]) == (500, 1, 1)
    assert found["bytes_in_per_unit"] == 64 and found["asked"][0]["car"]["idle"] in (True, False)
    foreign = Foreign.of_function(halve, [(True, ArraySpec("float32", (8,)))])
    rows_of_mine = programs.prepare(foreign, [np.zeros((3, 8), np.float32)])
    own = mesh.would(foreign, rows_of_mine)
    assert own["bytes_once"] == len(foreign.content) and own["kflop_per_unit"] == 0
    assert (own["unit_ms"], own["unit_energy_mwh"]) == (None, None)
    nobody = mesh.would(INFO, big, terms=Terms(memory_mb_max=1 << 40))
    assert nobody["cars_asked"] == 0 and nobody["advice"].startswith("1 car: MEMORY: ")
    with pytest.raises(UsageError, match="prepared for"):
        mesh.would(registry.get("bench.spin@1"), big)

    async def twin() -> dict[str, Any]:
        async with client_aio.connect(home) as other:
            return await other.would(INFO, big)

    again = trio.run(twin)
    assert {**again, "asked": []} == {**found, "asked": []}
    assert mesh.status()["blob_bytes"] == stored
    assert mesh.put(big.args[0].array) == refs[0]
    assert mesh.would(INFO, big)["cars_asked"] == 1


def test_a_file_has_the_reference_that_the_store_gives_it(mesh: Mesh, tmp_path: Path) -> None:
    """Over a chunk's bound, and empty."""
    for size in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1):
        path = tmp_path / f"{size}.bin"
        path.write_bytes(bytes(size))
        assert imagined.file_ref(path) == mesh.put_path(path)
    with pytest.raises(LocalResource, match="cannot be read"):
        imagined.file_ref(tmp_path / "none")


def halve(x: Any) -> Any:
    return jnp.cumsum(x) * 0.5


def scaled(x: Any, w: Any) -> Any:
    return x * w, jnp.sum(x)


def test_the_trio_twin_runs_functions(home: Path) -> None:
    whole = np.arange(320, dtype=np.float32).reshape(40, 8)  # sums of halves are exact
    want = np.cumsum(whole, axis=1) * 0.5
    weights = np.linspace(0, 1, 8, dtype=np.float32)

    async def main() -> None:
        with trio.fail_after(120):
            async with client_aio.connect(home) as mesh:
                one = await mesh.submit(halve, whole[0])
                assert np.array_equal(await one.result(), want[0])
                job = await mesh.map(halve, whole)
                assert np.array_equal(np.stack([row async for row in job]), want)
                assert await job.done() and await job.exception() is None
                again = [row async for row in job]  # all of it came before this watch did
                assert np.array_equal(np.stack(again), want)
                async with aclosing(aiter(await mesh.map(halve, whole))) as rows:
                    assert np.array_equal(await anext(rows), want[0])
                (product, total) = await (
                    await mesh.map(scaled, whole, constants=[weights])
                ).result()
                assert np.array_equal(product, whole * weights)
                assert np.array_equal(total, whole.sum(axis=1))
                assert await mesh.find(job.job_id.hex()) == job.job_id
                with pytest.raises(UsageError, match="one row for each unit"):
                    await mesh.map(halve, np.float32(1))

    trio.run(main)


def test_the_trio_twin_traces_beside_its_loop(home: Path) -> None:
    """The trace waits for the loop, which could not go on if it waited for the trace."""
    traced, left = threading.Event(), threading.Event()

    def waits(x: Any) -> Any:
        traced.set()
        assert left.wait(30)
        return x + 1

    async def main() -> None:
        with trio.fail_after(60):
            async with client_aio.connect(home) as mesh:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(mesh.submit, waits, np.zeros(2, np.float32))
                    await trio.to_thread.run_sync(traced.wait)
                    assert (await mesh.hello())["version"] == 1
                    nursery.cancel_scope.cancel()  # leaves the thread behind
                left.set()
                job = await mesh.submit(waits, np.zeros(2, np.float32))
                assert np.array_equal(await job.result(), np.ones(2, np.float32))

    trio.run(main)


def test_errors_leave_the_trio_twin_as_they_are(home: Path) -> None:
    def prints(x: Any) -> Any:
        import jax

        jax.debug.print("{x}", x=x)
        return x

    def wrong(x: Any) -> Any:
        raise KeyError("mine")

    async def main(function: Any) -> None:
        async with client_aio.connect_or_start(home) as mesh:  # one runs: that one
            await mesh.submit(function, np.zeros(2, np.float32))

    with pytest.raises(ArtifactRefused, match="side effects"):
        trio.run(main, prints)
    with pytest.raises(KeyError, match="mine"):
        trio.run(main, wrong)


@pytest.mark.parametrize(
    ("blocking", "twin", "without"),
    [(Mesh, client_aio.AsyncMesh, {"close"}), (Job, client_aio.AsyncJob, set())],
)
def test_the_twins_have_the_same_surface(blocking: type, twin: type, without: set[str]) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(blocking) - without == public(twin) - {"read"}


def test_bfloat16_crosses_the_mesh(mesh: Mesh) -> None:
    """Sizes are told by one table on the client, the node, the car and in the worker."""
    halves = np.asarray(jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4) / 2)
    weights = np.full((4,), 2, halves.dtype)
    product, total = mesh.map(scaled, halves, constants=[weights]).result(60)
    assert product.dtype == total.dtype == halves.dtype
    assert np.array_equal(product, halves * 2) and np.array_equal(total, halves.sum(axis=1))
