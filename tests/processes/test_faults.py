"""Bad input and faults over real processes: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

from jaxkernels import host, registry
from meshnode.client import Terms, connect
from meshnode.errors import LocalResource, MeshError, NoSuitableNode
from meshnode.ledger.load import signed_objects
from meshnode.node import firstrun
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.identity import KeySigner, peer_text
from meshnode.protocol.objects import T_RECEIPT, Receipt
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import seal, unseal
from testnet import link
from testnet.testnet import SUBMITTER, Testnet

RUN_S_MAX = 60.0
IMPATIENT = "[limits]\nnobody_ms = 4000\n"  # a job without any car is given up sooner than in 15 s


# ---- what the tests share


def mesh(*words: str | Path, module: str = "meshnode.cli.mesh") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        env=link.environment(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def one_line(text: str) -> str:
    """What a person is told: one line that begins with `error:`."""
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return lines[0]


@contextlib.contextmanager
def submitter_home(folder: Path, seed: int, name: str) -> Iterator[Path]:
    """A home of the testnet of `seed`; a background node that a command started ends with it."""
    home = folder / name
    firstrun.init_seeded(home, seed, name, car=False, now_ms=time.time_ns() // 1_000_000)
    (home / "config.toml").write_text(IMPATIENT)
    try:
        yield home
    finally:
        with contextlib.suppress(MeshError), connect(home) as node:
            node.shutdown()


def address(net: Testnet, name: str) -> str:
    node = net.nodes[name]
    addr = str(node["addrs"][0])
    return addr if "/p2p/" in addr else f"{addr}/p2p/{node['peer']}"


# ---- whom one meets


@pytest.mark.long
def test_a_node_of_another_network_is_turned_away_and_told(tmp_path: Path) -> None:
    async def main() -> tuple[int, str]:
        async with Testnet(1, 7) as net:
            with submitter_home(tmp_path, 8, "stranger") as home:
                join = address(net, "car-0")
                code, _, err = await trio.to_thread.run_sync(
                    lambda: mesh("run", "bench.spin@1", "1", "--home", home, "--join", join)
                )
            status = await net.call(lambda mesh: mesh.status(), "car-0")
            assert status["counters"]["blocked_other_network"] >= 1
            # those at home go on as before
            x = np.zeros((8, 16), np.float32)
            noop = registry.get("bench.noop@1")
            (y,) = await net.call(lambda mesh: mesh.call(noop, host.prepare(noop.spec, x)))
            assert np.array_equal(y, x + 1)
            return code, err

    code, err = trio.run(main)
    assert code == 3, err
    assert Reason.OTHER_NETWORK.text in one_line(err)


@pytest.mark.long
def test_a_bootstrap_address_where_nobody_answers(tmp_path: Path) -> None:
    with submitter_home(tmp_path, 7, "alone") as home:
        peer = firstrun.standing(home).node.peer
        with socket.socket() as unheard:  # bound and not listening: nobody else gets the port
            unheard.bind(("127.0.0.1", 0))
            port = unheard.getsockname()[1]
            join = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_text(peer)[:-1]}x"
            code, _, err = mesh("run", "bench.spin@1", "1", "--home", home, "--join", join)
    assert code == 7, err
    assert Reason.UNREACHABLE.text in one_line(err)


@pytest.mark.long
def test_no_consent_no_work_and_the_submitter_hears_it(tmp_path: Path) -> None:
    """The car joins, is seen and computes nothing."""

    async def main() -> None:
        async with Testnet(1, 7, configs={SUBMITTER: IMPATIENT}) as net:
            await net.kill("car-0")
            (net.home("car-0") / firstrun.CONSENT_FILE).unlink()
            await net.restart("car-0")
            await net.wait(partial(seen_idle, net), RUN_S_MAX, "the car is seen and may not work")
            noop = registry.get("bench.noop@1")
            prepared = host.prepare(noop.spec, np.zeros((8, 16), np.float32))
            job_id = await net.call(lambda mesh: mesh.submit_kernel(noop, prepared))
            ended = await net.call(lambda mesh: mesh.wait(job_id, RUN_S_MAX))
            assert ended["state"] == "failed"
            said = await net.call(lambda mesh: mesh.explain(job_id))
            assert Reason.NO_CONSENT in [row["reason"] for row in said["reasons"]], said
            with pytest.raises(NoSuitableNode):
                await net.call(lambda mesh: mesh.result(job_id))
            words = ("result", job_id.hex(), "--home", net.home())
            code, _, err = await trio.to_thread.run_sync(lambda: mesh(*words))
            assert code == 3 and Reason.NO_CONSENT.text in one_line(err), err

    trio.run(main)


async def seen_idle(net: Testnet) -> bool:
    rows = await net.call(lambda mesh: mesh.peers())
    row = next((row for row in rows if row["peer"] == net.peer("car-0")), None)
    return bool(row and row["up"] and row.get("car") and not row["car"]["may_run"])


# ---- one home, one port


@pytest.mark.long
def test_a_second_node_on_the_same_home_and_on_the_same_port(tmp_path: Path) -> None:
    async def main() -> None:
        async with Testnet(1, 7) as net:
            node = net.nodes["car-0"]
            code, err = await trio.to_thread.run_sync(
                second_node, "--home", node["home"], "--listen", "/ip4/127.0.0.1/tcp/0"
            )
            assert code == 8 and str(node["pid"]) in err and node["home"] in err, err

            with submitter_home(tmp_path, 7, "twin") as home:
                listen = address(net, "car-0").partition("/p2p/")[0]
                words = ("--home", str(home), "--listen", listen, "--role", "submitter")
                code, err = await trio.to_thread.run_sync(second_node, *words)
            port = listen.rpartition("/")[2]
            assert code == 8 and port in err, err
            status = await net.call(lambda mesh: mesh.status(), "car-0")
            assert status["pid"] == node["pid"], "the first goes on"

    trio.run(main)


def second_node(*words: str) -> tuple[int, str]:
    """A node that cannot start: its exit code and its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "meshnode.node", *words],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        env=link.environment(),
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr


# ---- what a person types


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("no.such@1", "4"), 2, "no.such@1"),
        (("bench.noop@1", "missing.npy"), 2, "missing.npy"),
        (("bench.noop@1", "dtype.npy"), 2, "float32"),
        (("bench.noop@1", "shape.npy"), 2, "16"),
        (("bench.noop@1", "broken.npy"), 2, "broken.npy"),
        (("bench.spin@1", "4", "--set", "hurry=1"), 2, "hurry"),
        (("bench.spin@1", "4", "-o", "no/such/folder/y.npy"), 2, "folder"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_input_that_does_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    np.save(tmp_path / "dtype.npy", np.array([["a"] * 16]))
    np.save(tmp_path / "shape.npy", np.zeros((4, 17), np.float32))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    monkeypatch.chdir(tmp_path)
    with submitter_home(tmp_path, 7, "home") as home:
        found, _, err = mesh("map", *words, "--home", home)
        line = one_line(err)
        assert found == code and says in line, err
        found, out, _ = mesh("map", *words, "--home", home, "--json")
        refusal = json.loads(out)
        assert found == code and refusal["accepted"] is False and refusal["text"] in line
        assert not list((home / "blobs").glob("*")), "nothing of it was taken on"


# ---- a ledger that was tampered with


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a submitter with some accepted work, of a testnet that has ended."""
    kept = tmp_path_factory.mktemp("ledger") / "home"

    async def main() -> None:
        async with Testnet(2, 7) as net:
            noop = registry.get("bench.noop@1")
            prepared = host.prepare(noop.spec, np.zeros((200, 16), np.float32))
            terms = Terms(lease_units_max=16)
            job_id = await net.call(lambda mesh: mesh.submit_kernel(noop, prepared, terms=terms))
            await net.call(lambda mesh: mesh.result(job_id))
            home = net.home()
            await net.wait(
                lambda: check_objects(signed_objects(home)).accepted >= 8, RUN_S_MAX, "receipts"
            )
            await net.kill(SUBMITTER, signal.SIGTERM)
            shutil.copytree(home, kept)

    trio.run(main)
    return kept


def test_a_ledger_that_holds(ledger: Path) -> None:
    code, out, err = mesh("receipts", "verify", "--home", ledger, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["holds"] and found["receipts"] >= found["accepted"] >= 8


def resigned(wire: bytes) -> bytes:
    """The same payload under another's signature, whose name it now bears as well."""
    sealed = unseal(wire)
    thief = KeySigner(bytes(range(32)))
    return seal(sealed.open(Receipt, T_RECEIPT), T_RECEIPT, thief.peer, thief.sign).wire


def raised(wire: bytes) -> bytes:
    """A receipt that asks for more, the old signature on it."""
    at = len(wire) - 80  # before the 64 bytes of the signature
    return wire[:at] + bytes([wire[at] ^ 1]) + wire[at + 1 :]


Row = tuple[bytes, str, bytes, int]
TAMPERED: dict[str, Callable[[list[Row]], list[Row]]] = {
    "deleted": lambda rows: rows[:1] + rows[2:],
    "swapped": lambda rows: [
        (rows[0][0], *rows[1][1:]),
        (rows[1][0], *rows[0][1:]),
        *rows[2:],
    ],
    "signed again": lambda rows: [(*rows[0][:2], resigned(rows[0][2]), rows[0][3]), *rows[1:]],
    "flipped": lambda rows: [(*rows[0][:2], raised(rows[0][2]), rows[0][3]), *rows[1:]],
    "a digest flipped": lambda rows: [
        (bytes([rows[0][0][0] ^ 1]) + rows[0][0][1:], *rows[0][1:]),
        *rows[1:],
    ],
    "duplicated": lambda rows: [*rows, rows[0]],
    "duplicated under another digest": lambda rows: [*rows, (bytes(32), *rows[0][1:])],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_receipt_is_found(ledger: Path, tmp_path: Path, how: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(ledger, home)
    with contextlib.closing(sqlite3.connect(home / "ledger.sqlite")) as db, db:
        # as an attacker with the file would: the guards of the schema go first
        for kind in ("trigger", "index"):
            names = db.execute(
                "SELECT name FROM sqlite_schema WHERE type = ? AND name LIKE 'signed%'", (kind,)
            ).fetchall()
            for (name,) in names:
                db.execute(f"DROP {kind} {name}")
        rows = db.execute(
            "SELECT digest, typ, bytes, received_ms FROM signed_object ORDER BY rowid"
        )
        every = rows.fetchall()
        at = [index for index, row in enumerate(every) if row[1] == T_RECEIPT]
        of_one_car = unseal(every[at[0]][2]).kid
        mine = [index for index in at if unseal(every[index][2]).kid == of_one_car]
        changed = TAMPERED[how]([every[index] for index in mine])
        after = [row for index, row in enumerate(every) if index < mine[0] and index not in mine]
        after += changed
        after += [row for index, row in enumerate(every) if index > mine[0] and index not in mine]
        db.execute("DELETE FROM signed_object")
        db.executemany("INSERT INTO signed_object VALUES (?, ?, ?, ?)", after)
    code, out, err = mesh("receipts", "verify", "--home", home, "--json")
    assert code == 5, err
    found = json.loads(out)
    assert not found["holds"] and found["findings"], how
    assert "do not hold" in one_line(err)


# ---- full disks


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """A tmpfs over `folder`, with what was in it: a real disk that can really be full."""
    kept = folder.with_name(f"{folder.name}-before")
    shutil.copytree(folder, kept)
    options = ["-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is left of a small disk."""
    ballast = folder / "ballast"
    left = os.statvfs(folder)
    free = left.f_bavail * left.f_frsize
    assert free < 64 << 20, "not a small disk"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, free)
    return ballast


@pytest.mark.long
def test_a_full_disk_under_blobs_of_the_submitter(tmp_path: Path) -> None:
    async def main() -> None:
        async with Testnet(1, 7) as net:
            await net.kill(SUBMITTER, signal.SIGTERM)
            with small_disk(net.home() / "blobs", 2):
                await net.restart(SUBMITTER)
                big = tmp_path / "big.npy"
                np.save(big, np.zeros((1 << 17, 16), np.float32))  # 8 MiB
                words = ("map", "bench.noop@1", big, "--home", net.home())
                code, _, err = await trio.to_thread.run_sync(lambda: mesh(*words))
                assert code == 8 and "no room" in one_line(err), err
                assert not await net.call(lambda mesh: mesh.jobs()), "no job was taken on"
                await a_job_runs(net)
                await net.kill(SUBMITTER, signal.SIGTERM)

    trio.run(main)


@pytest.mark.long
def test_a_full_disk_under_blobs_of_a_car() -> None:
    """The car gives its lease back with a reason; another car does the work."""

    async def main() -> None:
        async with Testnet(2, 7) as net:
            await net.kill("car-0", signal.SIGTERM)
            with small_disk(net.home("car-0") / "blobs", 1):
                await net.restart("car-0")
                await net.wait(net.all_known, RUN_S_MAX, "both cars are back")
                x = np.arange((1 << 17) * 16, dtype=np.float32).reshape(-1, 16)
                noop = registry.get("bench.noop@1")
                prepared = host.prepare(noop.spec, x)
                job_id = await net.call(lambda mesh: mesh.submit_kernel(noop, prepared))
                (y,) = await net.call(lambda mesh: mesh.result(job_id, RUN_S_MAX))
                assert np.array_equal(y, x + 1)
                await net.kill("car-0", signal.SIGTERM)

    trio.run(main)


@pytest.mark.parametrize("name", [SUBMITTER, "car-0"])
@pytest.mark.long
def test_a_full_disk_under_the_ledger(name: str) -> None:
    """What cannot be stored is not promised; with room again everything goes on and holds."""

    async def main() -> None:
        async with Testnet(2, 7) as net:
            await net.kill(name, signal.SIGTERM)
            with small_disk(net.home(name), 8):
                await net.restart(name)
                await net.wait(net.all_known, RUN_S_MAX, "everybody is back")
                await a_job_runs(net)
                ballast = fill(net.home(name))
                # inline, as blobs have a test of their own
                spin = registry.get("bench.spin@1")
                prepared = host.prepare(spin.spec, np.ones((4_000, 1), np.int32))
                terms = Terms(lease_units_max=8)  # many receipts
                outcome = ("refused", Reason.DISK_FULL)  # a journal may have room for a little yet
                with contextlib.suppress(LocalResource):
                    job_id = await net.call(
                        lambda mesh: mesh.submit_kernel(spin, prepared, terms=terms)
                    )
                    ended = await net.call(lambda mesh: mesh.wait(job_id, RUN_S_MAX))
                    outcome = (ended["state"], ended["reason"])
                if name == SUBMITTER:
                    assert outcome in [(how, Reason.DISK_FULL) for how in ("refused", "failed")]
                else:
                    assert outcome[0] == "done"
                status = await net.call(lambda mesh: mesh.status(), name)
                assert status["counters"]["persist_failed"] > 0, "the disk was full"
                ballast.unlink()
                await net.wait(net.all_known, RUN_S_MAX, "everybody is still there")
                await a_job_runs(net)
                await net.wait(lambda: settled(net), RUN_S_MAX, "all receipts are accepted")
                await net.kill(name)
                await net.restart(name)
                await net.wait(net.all_known, RUN_S_MAX, "everybody is back")
                await a_job_runs(net)
                await net.wait(lambda: settled(net), RUN_S_MAX, "all receipts are accepted")
                for other in net.nodes:
                    checked = check_objects(signed_objects(net.home(other)))
                    assert checked.findings == (), other
                await net.kill(name, signal.SIGTERM)

    trio.run(main)


async def a_job_runs(net: Testnet) -> None:
    x = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    noop = registry.get("bench.noop@1")
    prepared = host.prepare(noop.spec, x)
    job_id = await net.call(lambda mesh: mesh.submit_kernel(noop, prepared))
    (y,) = await net.call(lambda mesh: mesh.result(job_id, RUN_S_MAX))
    assert np.array_equal(y, x + 1)


def settled(net: Testnet) -> bool:
    """Every receipt that a car has signed is accepted, at both ends."""
    mine = {chain.digest: chain for chain in check_objects(signed_objects(net.home())).chains}
    for name in net.cars:
        for chain in check_objects(signed_objects(net.home(name))).chains:
            known = mine.get(chain.digest)
            reached = known.accepted_seq if known is not None else -1
            if not max(chain.receipts, default=-1) <= chain.accepted_seq == reached:
                return False
    return True
