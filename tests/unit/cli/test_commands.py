"""The commands without a network: help, exit codes, JSON, first run; and what they do not load."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

from meshnode.cli import frame
from meshnode.cli.car import meshnode
from meshnode.cli.inputs import read_inputs, read_options
from meshnode.cli.mesh import mesh
from meshnode.errors import UsageError
from meshnode.node import founding, keystore
from testnet import command as testnet_command
from tests import json_shape

HEAVY = ("libp2p", "jax", "jaxlib", "numpy", "trio", "rich", "cryptography", "nacl", "cbor2")


def run(
    capfd: pytest.CaptureFixture[str], *words: str, group: click.Group = mesh
) -> tuple[int, str, str]:
    name = group.name or "mesh"
    code = frame.run(group, name, words)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "job.mesh"
    path.write_bytes(b"no bundle")
    return path


# ---- help


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{context.command_path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, click.Context(command, info_name=name, parent=context))


@pytest.mark.parametrize(
    "group", [mesh, meshnode, testnet_command.testnet], ids=["mesh", "meshnode", "testnet"]
)
def test_every_command_has_help_and_an_example(group: click.Group) -> None:
    root = click.Context(group, info_name=group.name)
    found = dict(commands(group, root))
    assert found
    for path, command in found.items():
        assert command.help, path
        assert (command.epilog or "").startswith("Example: "), path
        assert command.get_short_help_str(), path


@pytest.mark.parametrize("group", [mesh, meshnode], ids=lambda g: g.name)
def test_the_list_of_commands_says_what_their_help_says(group: click.Group) -> None:
    assert isinstance(group, frame.LateGroup)
    for name, late in group._late.items():
        command = group.get_command(click.Context(group), name)
        assert command is not None and command.name == name
        assert late.help.endswith(".") and len(late.help) < 60


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom meshnode.cli import frame\nfrom meshnode.cli.mesh import mesh\n"
        "frame.run(mesh, 'mesh', ['--help'])\n"
        "print(' '.join(sorted(m.split('.')[0] for m in sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & set(HEAVY)
    assert "Commands:" in done.stdout


# ---- how a command ends


def test_exit_codes_and_one_clear_line(
    capfd: pytest.CaptureFixture[str], home: Path, damaged: Path
) -> None:
    for words, code, said in (
        (["nope"], 2, "No such command 'nope'"),
        (["map"], 2, "Missing argument"),
        (["map", "nope@1", "4", "--home", str(home)], 2, "There is no kernel 'nope@1'"),
        (["map", "bench.noop@1", "none.npy", "--home", str(home)], 2, "there is no file none.npy"),
        (["map", "bench.spin@1", "4", "--set", "x=1", "--home", str(home)], 2, "--set x=1"),
        (["map", "bench.spin@1", "4", "-o", "out.xyz"], 2, ".npy, .npz"),
        (["map", "bench.spin@1", "4", "--cars", "car-1", "--home", str(home)], 2, "--cars car-1"),
        (["jobs", "--home", str(home)], 2, "is no home"),
        (["explain", "3f", "--home", str(home)], 2, "is no home"),
        (["explain"], 2, "Missing argument"),
        (["map", "bench.spin@1", "--dry-run", "--home", str(home)], 2, "give INPUT"),
        (["init", "--home", str(home)], 2, "which network?"),
        (["peers", "--testnet", "none"], 2, "there is no testnet 'none'"),
        (["peers", "--testnet", "../x"], 2, "is no name of a testnet"),
        (["run", "job.mesh", "1", "--home", str(home)], 2, "there is no file job.mesh"),
        (["run", str(damaged), "1", "--home", str(home)], 1, "is no bundle"),
        (["run", "bench.noop@1", "--home", str(home)], 2, "give INPUT"),
        (["run", "bench.spin@1", "4", "--steps", "3", "--home", str(home)], 2, "has no steps"),
    ):
        got, out, err = run(capfd, *words)
        assert (got, out) == (code, ""), words
        assert said in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_refusal_in_json_is_an_object_and_an_exit_code(
    capfd: pytest.CaptureFixture[str], home: Path, damaged: Path
) -> None:
    code, out, _ = run(capfd, "run", str(damaged), "1", "--home", str(home), "--json")
    refusal = json_shape.check("refusal", out)
    assert code == 1 and refusal["accepted"] is False and refusal["exit_code"] == 1


def test_ctrl_c_prints_the_way_back_and_exits_130(capfd: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def slow() -> None:
        frame.face().return_line = "the job goes on; return: mesh result 3f2a"
        raise KeyboardInterrupt

    assert frame.run(slow, "slow", []) == 130
    assert capfd.readouterr().err.strip() == "the job goes on; return: mesh result 3f2a"


def test_an_exit_code_that_a_command_asks_for_is_the_process_s() -> None:
    @click.command()
    def found() -> None:
        raise click.exceptions.Exit(5)

    assert frame.run(found, "found", []) == 5


def test_a_bug_is_not_passed_off_as_a_refusal() -> None:
    @click.command()
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        frame.run(broken, "broken", [])


# ---- first run


def test_init_of_a_car_a_submitter_and_of_another_network(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    car, me = tmp_path / "car", tmp_path / "me"
    words = ["init", "--home", str(car), "--new", "garage", "--accept-notice", "--json"]
    code, out, _ = run(capfd, *words, "--listen", "/ip4/127.0.0.1/tcp/0", group=meshnode)
    made = json_shape.check("init", out)
    assert code == 0 and made["car"] and made["consent_until_ms"] and made["kind"] == "home"
    assert 'listen = ["/ip4/127.0.0.1/tcp/0"]' in (car / "config.toml").read_text()

    genesis = str(car / "genesis.mesh")
    code, out, _ = run(capfd, "init", "--home", str(me), "--genesis", genesis, "--json")
    joined = json_shape.check("init", out)
    assert joined["network"] == made["network"] and not joined["car"]
    code, out, _ = run(capfd, "receipts", "verify", "--home", str(me), "--json")
    assert code == 0 and json_shape.check("receipts-verify", out)["holds"]
    code, out, _ = run(capfd, "account", "show", "--home", str(me), "--json")
    assert json_shape.check("account-show", out)["account"] == joined["account"]
    code, out, _ = run(capfd, "status", "--home", str(car), "--json", group=meshnode)
    assert code == 0 and json_shape.check("status", out)["running"] is False

    other = founding.seeded_genesis(3)
    founding.save_genesis(tmp_path / "t.mesh", other)
    words = ["init", "--home", str(me), "--genesis", str(tmp_path / "t.mesh")]
    code, _, err = run(capfd, *words)
    assert code == 1 and "--allow-test" in err
    code, _, err = run(capfd, *words, "--allow-test")
    assert code == 2 and "belongs to the network garage" in err


def test_without_a_person_there_is_no_consent(
    capfd: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, out, err = run(capfd, "init", "--home", str(home), "--new", "g", "--json", group=meshnode)
    assert code == 0 and json.loads(out)["consent_until_ms"] is None
    assert "computes nothing" in err and "What you agree to" in err


def test_consent_by_an_account_that_lives_elsewhere(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    owner, car = str(tmp_path / "owner"), str(tmp_path / "car")
    request, answer = str(tmp_path / "request.mesh"), str(tmp_path / "answer.mesh")
    assert run(capfd, "init", "--home", owner, "--new", "garage")[0] == 0
    account = run(capfd, "account", "show", "--home", owner)[1].strip()
    genesis = f"{owner}/genesis.mesh"
    words = ["init", "--home", car, "--genesis", genesis, "--account", account]
    code, _, err = run(capfd, *words, group=meshnode)
    assert code == 0 and "meshnode consent request" in err
    assert not (Path(car) / keystore.ACCOUNT).exists()
    words = ["consent", "request", "--home", car, "-o", request, "--accept-notice"]
    assert run(capfd, *words, "--soc-floor", "40", group=meshnode)[0] == 0
    words = ["account", "sign", request, "--home", owner, "-o", answer, "--accept-notice"]
    code, _, err = run(capfd, *words)
    assert code == 0 and "charge floor 40 %" in err
    words = ["consent", "install", answer, "--home", car, "--json"]
    code, out, _ = run(capfd, *words, group=meshnode)
    stands = json_shape.check("init", out)
    assert code == 0 and stands["account"] == account and stands["consent_until_ms"]


# ---- words to inputs


def test_inputs_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n"y"\n')
    (tmp_path / "n.jsonl").write_text("[1.5, 2]\n[3, 4]\n")
    (tmp_path / "m.jsonl").write_text('{"strike": 90}\n{}\n')
    (tmp_path / "mixed.jsonl").write_text('1\n{"strike": 90}\n')
    np.save(tmp_path / "v.npy", np.ones((2, 3), np.float32))
    assert read_inputs(("400",)) == 400
    assert read_inputs((str(tmp_path / "a.txt"),)) == ["one", "two"]
    assert read_inputs((str(tmp_path / "a.jsonl"),)) == ["x", "y"]
    assert read_inputs((str(tmp_path / "m.jsonl"),)) == [{"strike": 90}, {}]
    numbers = read_inputs((str(tmp_path / "n.jsonl"),))
    assert numbers.dtype == np.float32 and numbers.tolist() == [[1.5, 2], [3, 4]]
    table = read_inputs((f"queries={tmp_path}/v.npy", f"vectors={tmp_path}/v.npy"))
    assert set(table) == {"queries", "vectors"} and table["queries"].shape == (2, 3)
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "bin.txt").write_bytes(b"\xff\xfe")
    for words in (
        ("evil.npy",),
        ("bad.jsonl",),
        ("mixed.jsonl",),
        ("bin.txt",),
        ("a.txt", "a.jsonl"),
        ("x.pkl",),
    ):
        with pytest.raises(UsageError):
            read_inputs(tuple(str(tmp_path / word) for word in words))


def test_options_take_the_type_of_their_default() -> None:
    from jaxkernels import registry

    assert read_options(registry.get("vec.knn@1"), ("top=3",)) == {"top": 3}
    with pytest.raises(UsageError, match="not a number"):
        read_options(registry.get("vec.knn@1"), ("top=many",))


def test_every_schema_is_of_the_kind_that_is_checked() -> None:
    for path in json_shape.SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        assert schema["properties"]["version"] == {"const": 1} and "version" in schema["required"]
        assert not [p for p in json_shape.problems({}, schema) if "the schema uses" in p]


def test_the_testnet_may_stand_before_the_command_too(capfd: pytest.CaptureFixture[str]) -> None:
    before = run(capfd, "--testnet", "nowhere", "peers")
    after = run(capfd, "peers", "--testnet", "nowhere")
    assert before == after
    assert "there is no testnet 'nowhere'" in before[2]
