"""The sandbox from inside, as root and as an ordinary user, and as the executor sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio

from meshnode.executor import Executor, wire
from meshnode.executor.area import Area
from meshnode.executor.forks import Child
from meshnode.executor.link import Link, open_link
from meshnode.protocol import sandbox
from meshnode.protocol.effects import ArgSource, StopExec
from meshnode.protocol.events import Started, WorkerClasses
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sandbox import Layer
from meshnode.protocol.types import Peer
from meshnode.worker import landlock, profile, seccomp
from meshnode.worker.cgroup import Group
from meshnode.worker.privileges import NOBODY

from .executor_kit import (
    House,
    complete,
    true,
    until,
    until_end,
    with_executor,
    worker_processes,
)
from .inside import ACTS, FEW

INSIDE_S_MAX = 180
UNKNOWN = 1 << 15  # a bit that no layer has
REFUSED = {"EPERM", "EACCES", "ENOMEM"}
Outcomes = dict[str, dict[str, str]]

# What works with one layer alone taken away, and so shows what that layer holds.
OPEN_WITHOUT_SYSCALLS = {"fork"}
OPEN_WITHOUT_FILES = {"read the node's key", "list the home"}


# ------------------------------------------------------------------------------------- from inside


def inside(folder: Path, user: str | None) -> Outcomes:
    folder.mkdir(mode=0o700)
    argv = [sys.executable, "-m", "tests.processes.inside", str(folder)]
    if user is not None:
        argv = [sys.executable, "-m", "tests.processes.as_user", user, *argv]
    if user == "nobody":
        os.chown(folder, NOBODY, NOBODY)
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        argv, cwd=root, env=env, stdout=subprocess.PIPE, check=True, timeout=INSIDE_S_MAX
    )
    found: Outcomes = json.loads(done.stdout)
    return found


OTHERS = ("nobody", "root") if os.geteuid() == 0 else ()
USERS = [*(pytest.param(user, marks=pytest.mark.long) for user in OTHERS), None]


@pytest.fixture(scope="module", params=USERS, ids=lambda user: user or "as the tests")
def found(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """As an ordinary user; as root where everybody can read the installation; as this process."""
    # Not pytest's own folder, which another run of the same user closes to others again.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        outcomes = inside(Path(folder) / "home", request.param)
        yield {**outcomes, "user": {"name": request.param or ""}}


def refused(outcome: str) -> bool:
    return outcome in REFUSED or outcome.startswith(
        ("RuntimeError: can't start new thread", "ValueError: not allowed to raise")
    )


@pytest.mark.long
def test_every_act_works_without_the_sandbox(found: Outcomes) -> None:
    assert {name: found["bare"][name] for name in ACTS} == dict.fromkeys(ACTS, "done")


def test_no_act_works_inside_it(found: Outcomes) -> None:
    # Threads are counted in a user namespace of one's own, which a machine may forbid.
    counted = "namespaces" in found["whole"]["layers"]
    acts = [name for name in ACTS if counted or name != "start many threads"]
    assert [f"{name}: {found['whole'][name]}" for name in acts
            if not refused(found["whole"][name])] == []  # fmt: skip
    assert found["whole"]["open a device"] == "EPERM"
    if os.uname().machine == "x86_64":
        assert found["whole"]["other numbers"] == "killed by SIGSYS"


def test_jax_compiles_and_runs_inside_it(found: Outcomes) -> None:
    assert found["whole"]["compute"] == "done"
    assert found["whole"]["small reads"] == "done"


def test_every_layer_that_the_kernel_has_is_there(found: Outcomes) -> None:
    layers = sandbox.of_names(found["whole"]["layers"])
    want = Layer.NO_NEW_PRIVS | Layer.NO_CAPABILITIES | Layer.RLIMITS
    want |= Layer.MEMORY | Layer.NO_DEVICES
    want |= Layer.SYSCALLS if seccomp.available() else Layer(0)
    version = landlock.abi()
    want |= Layer.FILES if version else Layer(0)
    want |= Layer.TCP if landlock.has_net(version) else Layer(0)
    want |= Layer.SCOPE if landlock.has_scope(version) else Layer(0)
    want |= Layer.OTHER_USER if found["user"]["name"] == "root" else Layer(0)
    assert not sandbox.missing(want, layers), sandbox.names(want & ~layers)
    assert not sandbox.missing(sandbox.LEAST, layers)


def test_each_layer_holds_by_itself(found: Outcomes) -> None:
    """With one wall down the other stands, and what then opens is what it alone had closed."""
    opened = {name for name in FEW if found["without syscalls"][name] == "done"}
    assert opened == OPEN_WITHOUT_SYSCALLS
    opened = {name for name in FEW if found["without files"][name] == "done"}
    # The worker of a root whose installation all may read is nobody, to whom the files of root are
    # closed even so.
    nobody = sandbox.of_names(found["whole"]["layers"]) & Layer.OTHER_USER
    assert opened == (set() if nobody else OPEN_WITHOUT_FILES)


def test_a_layer_that_is_not_in_force_ends_the_worker(found: Outcomes) -> None:
    assert "layer files" in found["landlock broken"]["fork"]
    assert "layer syscalls" in found["seccomp broken"]["fork"]
    if "namespaces" in found["whole"]["layers"] or found["user"]["name"] != "nobody":
        assert "layer no_capabilities" in found["privileges kept"]["fork"]


def test_a_device_opens_its_nodes_and_nothing_else(found: Outcomes) -> None:
    device = found["device"]
    assert device["open a device"] == device["ask a device"] == "done"
    assert [name for name in (*FEW, "write over a file") if not refused(device[name])] == []
    layers = sandbox.of_names(device["layers"])
    assert not layers & (Layer.MEMORY | Layer.NO_DEVICES | Layer.OTHER_USER)
    assert not sandbox.missing(sandbox.LEAST, layers)


# ---------------------------------------------------------------------------------------- profiles


def test_the_profile_follows_the_plugin_the_nodes_and_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(profile, "_CUDA_NODES", ("/dev/nul*", "/dev/zer*"))

    def detect(plugin: bool) -> profile.Profile:
        monkeypatch.setattr(profile, "_installed", lambda _: plugin)
        return profile.detect.__wrapped__()

    assert detect(False).name == "cpu" and detect(False).devices == ()
    cuda = detect(True)
    assert cuda.name == "cuda" and {"/dev/null", "/dev/zero"} <= set(cuda.devices)
    assert 0 < float(cuda.memory_fraction) < 1
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert detect(True).name == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(profile, "_CUDA_NODES", ("/dev/no-such-node*",))
    assert detect(True).name == "cpu"


def test_no_readable_folder_is_a_home(tmp_path: Path) -> None:
    readable = [Path(place) for place in profile.detect().readable]
    for home in (Path.home(), tmp_path, Path(__file__).parents[2], Path("/")):
        assert home not in readable


# ------------------------------------------------------------------------------------ the executor


def test_a_worker_below_the_owners_least_runs_nothing(house: House) -> None:
    house.config = replace(house.config, sandbox_least=UNKNOWN | int(Layer.FILES))

    async def body(executor: Executor) -> None:
        got = await complete(executor, house.noop())
        assert got.end.reason is Reason.SANDBOX
        assert "bits 0x8000" in got.end.text and "files" not in got.end.text
        assert worker_processes() == []

    with_executor(house, body)


def test_a_worker_with_less_than_was_advertised_is_refused_and_probed_anew(house: House) -> None:
    cache = house.config.run_dir / "probe.json"
    house.config = replace(house.config, probe_cache=cache)

    async def probe(executor: Executor) -> int:
        executor.probe()
        classes = await until(executor, WorkerClasses)
        assert isinstance(classes, WorkerClasses)
        return classes.sandbox_layers

    async def body(executor: Executor) -> None:
        honest = await probe(executor)
        assert not sandbox.missing(sandbox.LEAST, honest)
        kept = json.loads(cache.read_text())
        kept["answer"]["sandbox_layers"] = honest | UNKNOWN  # of another kernel, say
        cache.write_text(json.dumps(kept))
        assert await probe(executor) == honest | UNKNOWN
        got = await complete(executor, house.noop())
        assert got.end.reason is Reason.SANDBOX
        again = await until(executor, WorkerClasses)
        assert isinstance(again, WorkerClasses) and again.sandbox_layers == honest
        assert (await complete(executor, house.noop())).end.reason is Reason.DONE

    with_executor(house, body)


def test_a_control_group_that_is_none_is_told(house: House, tmp_path: Path) -> None:
    house.config = replace(house.config, cgroup=str(tmp_path))

    async def body(executor: Executor) -> None:
        got = await complete(executor, house.noop())
        assert got.end.reason is Reason.NO_WORKER
        assert "no control group" in got.end.text

    with_executor(house, body)


if "MESHNODE_TEST_CGROUP" in os.environ:  # a group of its own, handed over by whoever tests

    def test_a_worker_in_a_control_group_dies_there_for_want_of_memory() -> None:
        group = Group.make(Path(os.environ["MESHNODE_TEST_CGROUP"]), "meshnode-test", 64 << 20)
        pid = os.fork()
        if not pid:
            group.join()
            bytearray(256 << 20)
            os._exit(0)
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            assert group.ran_out()
        finally:
            group.remove()
        assert not group.path.exists()


def test_threads_are_shared_out_among_slots(house: House) -> None:
    def threads_of(count: int) -> int:
        seen: list[int] = []

        async def body(executor: Executor) -> None:
            await complete(executor, house.noop())
            (worker,) = worker_processes()
            seen.append(worker.num_threads())

        house.config = replace(house.config, threads=count)
        with_executor(house, body)
        return seen[0]

    one, two, four = map(threads_of, (1, 2, 4))
    assert one < two < four


def test_submitters_take_turns_on_an_accelerator(house: House) -> None:
    house.config = replace(house.config, slots=2)
    stuck = house.run(house.spec("forever"), 1, np.zeros(4, np.float32))

    async def body(executor: Executor) -> None:
        executor._exclusive = True  # as after a probe that found one
        await complete(executor, house.noop())
        first = worker_processes()
        got = await complete(executor, house.noop(submitter=Peer(b"o" * 38)))
        assert got.end.reason is Reason.DONE
        (second,) = worker_processes()
        assert second not in first  # the idle one went before the other came
        executor.start(stuck)
        await until(executor, Started)
        waits = house.noop(submitter=Peer(b"o" * 38))
        executor.start(waits)
        assert len(worker_processes()) == 1 and executor.running() == 1  # though a slot is free
        executor.stop(StopExec(stuck.exec_id, Reason.CANCELLED, 0))
        assert (await until_end(executor, waits.exec_id)).end.reason is Reason.DONE

    with_executor(house, body)


def test_how_a_worker_died_is_told_in_words() -> None:
    def words(code: int, ran_out: bool = False) -> str:
        child = Child(1, -1, code=code, ran_out=ran_out)
        child.exited.set()
        return str(trio.run(child.ending))

    assert "system calls" in words(-signal.SIGSYS)
    assert "out of memory" in words(-signal.SIGKILL)
    assert "control group" in words(-signal.SIGKILL, ran_out=True)
    assert "no memory" in words(-signal.SIGABRT)
    assert "processor time" in words(-signal.SIGXCPU)
    assert words(3) == "exit status 3"


def test_nothing_of_a_worker_is_left_in_memory(house: House) -> None:
    """Its process and the shared area go with it; the area's file is in no folder."""

    def areas() -> list[str]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in maps if "meshnode-arrays" in line]

    async def body(executor: Executor) -> None:
        got = await complete(executor, house.run(house.spec("big"), 1, np.zeros(1, np.float32)))
        assert got.end.reason is Reason.DONE
        (worker,) = worker_processes()
        assert len(areas()) == 1
        worker.send_signal(signal.SIGKILL)
        await true(lambda: areas() == [])
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

    with_executor(house, body)


# ---------------------------------------------------------------------------------- shared memory


def test_large_arrays_pass_through_shared_memory_unchanged(house: House) -> None:
    rng = np.random.default_rng(11)

    async def body(executor: Executor) -> None:
        for count in (1, 3, 16, 40, 2):  # 1 MB a unit: within the area, full, over it, back
            x = rng.standard_normal((count, 1 << 18)).astype(np.float32)
            if x.nbytes > wire.RUN_INLINE_BYTES_MAX:
                blob = house.blobs.put(x)
                (arg,) = house.spec("plus").args
                args = (ArgSource(True, arg.spec, blob),)
                effect = house.run(house.spec("plus", args), count)
            else:
                effect = house.run(house.spec("plus"), count, x)
            got = await complete(executor, effect)
            assert got.end.reason is Reason.DONE, got.end
            assert got.outputs == [(row + 1).tobytes() for row in x]

    with_executor(house, body)


def test_outputs_that_do_not_fit_the_area_wait_for_the_node(house: House) -> None:
    async def body(executor: Executor) -> None:
        x = np.arange(12, dtype=np.float32)  # 48 MB through 16
        got = await complete(executor, house.run(house.spec("big"), 12, x))
        assert got.end.reason is Reason.DONE, got.end
        assert got.outputs == [np.full(1 << 20, i, np.float32).tobytes() for i in range(12)]
        small = await complete(executor, house.run(house.spec("big"), 1, x[:1]))
        assert small.end.reason is Reason.DONE

    with_executor(house, body)


def test_a_worker_can_neither_shrink_nor_grow_the_area() -> None:
    area = Area(4096, 8192)
    try:
        for size in (0, 4096, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(area.fd, size)
    finally:
        area.close()


def area_frame(first_byte: int) -> bytes:
    return wire.UNITS_HEAD.pack(1, 0, 1, 0, 1) + wire.UNITS_AREA_AT.pack(first_byte)


def linked(act: Callable[[Link], None]) -> None:
    async def main() -> None:
        link, theirs = open_link()
        with theirs, contextlib.closing(link):
            act(link)

    trio.run(main)


def test_outputs_outside_the_area_are_a_broken_protocol() -> None:
    def act(link: Link) -> None:
        assert link.outputs_in_area(area_frame(0), 1, 16) is None  # there is none yet
        link._make_area(0, 1 << 16)
        assert link.outputs_in_area(area_frame(0), 1, 1 << 16) == (bytes(1 << 16),)
        for first, units, size in ((1, 1, 1 << 16), ((1 << 64) - 1, 1, 16), (0, 2, 1 << 16)):
            assert link.outputs_in_area(area_frame(first), units, size) is None
        assert link.outputs_in_area(area_frame(0)[:-1], 1, 16) is None
        assert link.outputs_in_area(area_frame(0) + b"x", 1, 16) is None

    linked(act)


def test_what_a_worker_writes_later_does_not_change_what_was_taken() -> None:
    def act(link: Link) -> None:
        link._make_area(0, 4096)
        assert link._area is not None
        worker = os.dup(link._area.fd)
        try:
            os.pwrite(worker, b"honest", 0)
            (taken,) = link.outputs_in_area(area_frame(0), 1, 6) or (b"",)
            os.pwrite(worker, b"forged", 0)
            assert taken == b"honest"
        finally:
            os.close(worker)

    linked(act)


def test_files_that_a_worker_sends_are_not_kept() -> None:
    """The node reads without room for them, and the kernel closes what has none."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null") as null:
        socket.send_fds(theirs, [b"x"], [null.fileno()] * 8)
        assert ours.recv(64) == b"x"
        assert len(os.listdir("/proc/self/fd")) == before + 3
