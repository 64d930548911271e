"""The commands against a testnet of real processes: a job's whole life, all JSON by its schema."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from meshnode.cli.frame import read_testnet
from testnet import link
from testnet.testnet import Testnet
from tests import json_shape

NAME = f"cli-{os.getpid()}"
RUN_S_MAX = 60.0


def mesh(*words: str, module: str = "meshnode.cli.mesh") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        env=link.environment(),
    )
    return done.returncode, done.stdout, done.stderr


def good(verb: str, *words: str) -> dict[str, Any]:
    code, out, err = mesh(*words, "--testnet", NAME, "--json")
    assert code == 0, err
    return json_shape.check(verb, out)


@pytest.fixture(scope="module", autouse=True)
def net() -> Iterator[None]:
    code, out, err = mesh("up", "--nodes", "2", "--name", NAME, "--json", module="testnet")
    assert code == 0, err
    assert len(json_shape.check("testnet-up", out)["nodes"]) == 3
    try:
        yield
    finally:
        code, out, _ = mesh("down", "--name", NAME, "--json", module="testnet")
        assert code == 0 and json_shape.check("testnet-down", out)["ended"] == [NAME]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished job with a result; its id."""
    folder = tmp_path_factory.mktemp("job")
    inputs, out = folder / "x.npy", folder / "y.npy"
    array = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    np.save(inputs, array)
    done = good("map", "map", "bench.noop@1", str(inputs), "-o", str(out), "--label", "first")
    assert np.array_equal(np.load(out), array + 1)
    again = folder / "again.npy"
    good("result", "result", done["job_id"][:8], "-o", str(again))
    assert again.read_bytes() == out.read_bytes()
    return str(done["job_id"])


def test_one_job_is_seen_by_every_command(job: str) -> None:
    assert any(
        row["job_id"] == job and row["label"] == "first" for row in good("jobs", "jobs")["jobs"]
    )
    shown = good("show", "show", job)["job"]
    assert shown["state"] == "done" and shown["done"] == 64 and shown["attempts"]
    assert shown["steps"] is None and shown["checkpoints"] == []
    assert good("logs", "logs", job)["events"]
    told = good("explain", "explain", job)["explanation"]
    assert told["state"] == "done" and told["waits"] == [] and told["runs"]
    assert {run["how"] for run in told["runs"]} <= {"token", "offer", "bid"}
    assert good("cancel", "cancel", job)["state"] == "done"
    assert sum(peer["car"] is not None for peer in good("peers", "peers")["peers"]) == 2
    for words in (
        ["jobs"],
        ["show", job],
        ["explain", job],
        ["logs", job],
        ["peers"],
        ["receipts", "list"],
    ):
        code, out, _ = mesh(*words, "--testnet", NAME)
        assert code == 0 and out.strip()


def test_a_long_job_shows_where_its_attempts_began(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text("1")
    words = ["md.lj@1", "1", "--steps", "20", "-o", str(tmp_path / "md.npz")]
    job = str(good("map", "map", *words)["job_id"])
    shown = good("show", "show", job)["job"]
    assert shown["steps"] == 20 and shown["checkpoints"] == []
    had = [each for each in shown["attempts"] if each["state"] == "returned"]
    assert [each["from_step"] for each in had] == [0]
    code, out, _ = mesh("show", job, "--testnet", NAME)
    assert code == 0 and "FROM STEP" in out


def test_kernels_models_testnets_as_json() -> None:
    for verb, words, module in (
        ("kernels", ["kernels"], "meshnode.cli.mesh"),
        ("models-list", ["models", "list"], "meshnode.cli.mesh"),
        ("testnet-ls", ["ls"], "testnet"),
        ("testnet-status", ["status", "--name", NAME], "testnet"),
        ("testnet-logs", ["logs", "warden", "--name", NAME], "testnet"),
        ("testnet-node", ["freeze", "car-1", "--name", NAME], "testnet"),
        ("testnet-node", ["thaw", "car-1", "--name", NAME], "testnet"),
    ):
        code, out, err = mesh(*words, "--json", module=module)
        assert code == 0, err
        json_shape.check(verb, out)


def test_a_call_prints_its_result_and_a_submission_its_id() -> None:
    code, out, _ = mesh("run", "bench.spin@1", "2", "--set", "ms=1", "--testnet", NAME)
    assert code == 0 and len(out.splitlines()) == 2
    good("run", "run", "bench.spin@1", "1", "--policy", "gossip")
    handed = good("submit", "submit", "bench.spin@1", "8")
    assert good("result", "result", handed["job_id"])["units"] == 8


def test_a_dry_run_says_what_a_submission_would_do_and_does_nothing(tmp_path: Path) -> None:
    before = good("jobs", "jobs")["jobs"]
    for verb in ("submit", "map", "run"):
        found = good("dry-run", verb, "bench.spin@1", "8", "--set", "ms=1", "--dry-run")["would"]
        assert (found["units"], found["cars_asked"], found["advice"]) == (8, 2, "")
        assert found["kflop_per_unit"] > 0 and found["unit_ms"] > 0 and found["unit_energy_mwh"] > 0
    # Large inputs are named as they would be stored, and are not.
    big = tmp_path / "big.npy"
    np.save(big, np.zeros((4_096, 16), np.float32))
    blobs = good_status()["blob_bytes"]
    assert good("dry-run", "submit", "bench.noop@1", str(big), "--dry-run")["would"]["asked"]
    assert good_status()["blob_bytes"] == blobs
    submitter = read_testnet(NAME)["nodes"]["submitter"]["peer"]
    words = ["run", "bench.spin@1", "1", "--cars", submitter, "--dry-run", "--testnet", NAME]
    code, out, err = mesh(*words, "--json")
    found = json_shape.check("dry-run", out)["would"]
    assert code == 3 and found["cars_asked"] == 0 and found["stands"][0]["cars"] == 2
    assert "no car would be asked" in err
    code, out, err = mesh(*words)
    assert code == 3 and "NOT_NAMED" in out and err.count("\n") == 1
    assert good("jobs", "jobs")["jobs"] == before
    code, out, err = mesh("explain", "ffff", "--testnet", NAME)
    assert (code, out) == (2, "") and "mesh jobs" in err


def good_status() -> dict[str, Any]:
    home = read_testnet(NAME)["nodes"]["submitter"]["home"]
    code, out, err = mesh("status", "--home", home, "--json", module="meshnode.cli.car")
    assert code == 0, err
    found: dict[str, Any] = json_shape.check("status", out)["node"]
    return found


def test_a_car_says_how_long_it_expects_to_stay() -> None:
    home = read_testnet(NAME)["nodes"]["car-0"]["home"]
    code, out, err = mesh("status", "--home", home, "--json", module="meshnode.cli.car")
    assert code == 0, err
    budget = json_shape.check("status", out)["node"]["budget"]
    assert 0 < budget["lease_s_max"] <= budget["stay_s"]
    code, out, _ = mesh("status", "--home", home, module="meshnode.cli.car")
    assert code == 0 and "expects to stay" in out


def test_ctrl_c_leaves_the_job_running_and_says_how_to_return() -> None:
    command = [sys.executable, "-m", "meshnode.cli.mesh", "map", "bench.spin@1", "4000"]
    command += ["--set", "ms=20", "--testnet", NAME]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=link.environment(),
        start_new_session=True,
        # As a terminal has it: what a shell runs in the background inherits that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    line = child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, rest = child.communicate(timeout=RUN_S_MAX)
    assert child.returncode == 130, rest
    job_id = line.split()[1].rstrip(":")
    assert f"return: mesh result {job_id} --testnet {NAME}" in rest
    assert good("cancel", "cancel", job_id)["state"] == "cancelled"


@pytest.mark.long
def test_a_deadline_is_exit_4_and_no_car_is_exit_3() -> None:
    words = ["map", "bench.spin@1", "400", "--set", "ms=50", "--testnet", NAME]
    code, _, err = mesh(*words, "--deadline", "0.5")
    assert code == 4, err
    submitter = read_testnet(NAME)["nodes"]["submitter"]["peer"]
    code, out, err = mesh(*words, "--cars", submitter, "--deadline", "30", "--json")
    assert code in (3, 4), err
    json_shape.check("refusal", out)


# ---- receipts


@pytest.fixture(scope="module")
def ledger(job: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the submitter's home once every receipt is accepted."""
    home = Path(read_testnet(NAME)["nodes"]["submitter"]["home"])

    async def settled() -> None:
        def so() -> bool:
            listed = json.loads(mesh("receipts", "list", "--testnet", NAME, "--json")[1])[
                "receipts"
            ]
            mine = [row for row in listed if row["job_id"] == job]
            return bool(sum(row["units"] for row in mine if row["accepted"]) == 64)

        await Testnet(1, 7, NAME).wait(so, 20.0, "receipts for all units are accepted")

    trio.run(settled)
    copy = tmp_path_factory.mktemp("ledger") / "home"
    copy.mkdir(mode=0o700)
    for name in ("genesis.mesh",):
        shutil.copy(home / name, copy / name)
    with (
        sqlite3.connect(home / "ledger.sqlite") as source,
        sqlite3.connect(copy / "ledger.sqlite") as to,
    ):
        source.backup(to)
    source.close()
    to.close()
    return copy


def test_receipts_hold_and_show(ledger: Path, job: str) -> None:
    verified = good("receipts-verify", "receipts", "verify")
    assert verified["holds"] and verified["accepted"] >= 1
    listed = good("receipts-list", "receipts", "list", "--job", job)["receipts"]
    assert sum(row["units"] for row in listed) == 64
    shown = good("receipts-show", "receipts", "show", listed[0]["digest"])["receipt"]
    assert shown["meters"]["wall_ms"] >= 0 and shown["findings"] == []
    code, out, _ = mesh("receipts", "verify", "--home", str(ledger), "--json")
    assert code == 0 and json_shape.check("receipts-verify", out)["holds"]


RECEIPTS = "SELECT rowid FROM signed_object WHERE typ = 'mesh-receipt/1' ORDER BY rowid"
TAMPERINGS = {
    "deleted": ("DELETE FROM signed_object WHERE rowid = {a}", {"GAP"}),
    "swapped": (
        "CREATE TEMP TABLE t AS SELECT * FROM signed_object WHERE rowid IN ({a}, {b});"
        "DELETE FROM signed_object WHERE rowid IN ({a}, {b});"
        "INSERT INTO signed_object SELECT x.digest, x.typ, y.bytes, x.received_ms FROM t x, t y"
        " WHERE x.digest != y.digest",
        {"MISMATCH"},
    ),
    "duplicated": (
        "DROP INDEX signed_object_once;"
        "INSERT INTO signed_object SELECT * FROM signed_object WHERE rowid = {a}",
        {"DUPLICATE"},
    ),
    "flipped": (
        "UPDATE signed_object SET bytes ="
        " CAST(substr(bytes, 1, 200) || x'ff' || substr(bytes, 202) AS BLOB) WHERE rowid = {a}",
        {"BAD_SIGNATURE", "BAD_FRAME", "MISMATCH"},
    ),
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_a_touched_receipt_is_exit_5_with_the_reason(
    ledger: Path, how: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(ledger, home)
    statements, reasons = TAMPERINGS[how]
    database = sqlite3.connect(home / "ledger.sqlite")
    for trigger in ("signed_object_no_update", "signed_object_no_delete"):
        database.execute(f"DROP TRIGGER {trigger}")
    rows = [row[0] for row in database.execute(RECEIPTS)]
    database.executescript(statements.format(a=rows[0], b=rows[1]))
    database.commit()
    database.close()
    code, out, err = mesh("receipts", "verify", "--home", str(home), "--json")
    report = json_shape.check("receipts-verify", out)
    assert code == 5 and not report["holds"]
    assert reasons & {finding["reason"] for finding in report["findings"]}, report
    assert "do not hold" in err
