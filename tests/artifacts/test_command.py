"""`mesh artifact build|show|check` as a person runs them, and what a crash or a hang becomes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxkernels import registry
from meshnode.artifact.bundle import read_bundle, write_bundle
from meshnode.artifact.checking import check_bytes
from meshnode.cli import frame
from meshnode.cli.mesh import mesh
from meshnode.errors import ArtifactRefused
from meshnode.node import keystore
from meshnode.protocol.objects import ArgRole
from meshnode.protocol.reasons import Reason
from meshnode.worker.check import check_manifest
from meshnode.worker.header import read_header
from tests import json_shape

from . import forged, honest
from .forge import body, with_code

SOURCE = """
import jax
import jax.numpy as jnp

def fn(x, w):
    print("what a module prints is talk")
    return jnp.tanh(x @ w)

def step(k, u, v, n):
    def one(_, s):
        return s[0] + k * s[1], s[1] - k * s[0]
    return jax.lax.fori_loop(0, n, one, (u, v))

def broken(x):
    return x + jnp.ones(3)

def prints(x):
    jax.debug.print("{}", x)
    return x
"""


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = frame.run(mesh, "mesh", ["artifact", *words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Path:
    home = tmp_path / "home"
    assert frame.run(mesh, "mesh", ["init", "--home", str(home), "--new", "lab"]) == 0
    capfd.readouterr()
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(work)
    monkeypatch.setenv("MESH_HOME", str(home))
    return home


def test_a_function_is_built_shown_and_accepted(
    capfd: pytest.CaptureFixture[str], home: Path
) -> None:
    code, out, err = run(
        capfd, "build", "mine:fn", "--spec", "f32[4,8]", "--spec", "const=f32[8,2]", "-o", "a.mesh"
    )
    assert code == 0, err
    assert "talk" in err and "talk" not in out
    bundle = read_bundle(Path("a.mesh").read_bytes())
    assert out.strip() == bundle.manifest.artifact.hex()
    assert [arg.role for arg in bundle.manifest.args] == [ArgRole.MAPPED, ArgRole.CONSTANT]
    account = keystore.load(home, keystore.ACCOUNT)
    assert bundle.manifest.maker == account.account
    code, out, _ = run(capfd, "show", "a.mesh", "--json")
    shown = json_shape.check("artifact-show", out)
    assert code == 0 and shown["outs"] == ["float32[4,2]"] and shown["platforms"][0] == "cpu"
    code, out, _ = run(capfd, "check", "a.mesh", "--json")
    told = json_shape.check("artifact-check", out)
    assert (code, told["accepted"], told["reason"]) == (0, True, "OK")
    assert told["flop"] >= 2 * 4 * 8 * 2 and told["unbounded"] is False
    code, out, _ = run(capfd, "check", "a.mesh")
    assert code == 0 and out.startswith("accepted: ")


def test_a_stepped_function_is_built_and_a_key_on_the_node_alone_signs(
    capfd: pytest.CaptureFixture[str], home: Path
) -> None:
    (home / keystore.ACCOUNT).unlink()  # the account's key lives elsewhere
    words = ["--spec", "const=f32[]", "--spec", "state=f32[16]", "--spec", "state=f32[16]"]
    steps = ["--steps", "500", "--slice", "50", "--result", "1", "--watch", "0"]
    limits = ["--wall-s", "2.5", "--memory-mb", "64", "--tolerance", "1e-6", "--name", "wave"]
    code, out, err = run(
        capfd, "build", "mine:step", *words, *steps, *limits, "-o", "s.mesh", "--json"
    )
    assert code == 0, err
    built = json_shape.check("artifact-build", out)
    assert built["steps"] == {"result": [1], "watch": [0], "unit": 500, "slice": 50}
    assert built["maker"].startswith("12D3Koo") and built["name"] == "wave"
    assert (built["unit_wall_ms_max"], built["memory_mb_max"]) == (2500, 64)
    assert (built["tolerance_nano"], built["result_bytes_max"]) == (1000, 64)
    code, out, _ = run(capfd, "check", "s.mesh", "--json")
    # Its one loop goes from 0 to the number of steps: of one step, all is known.
    assert code == 0 and json.loads(out)["unbounded"] is False
    assert "FLOP a step" in run(capfd, "check", "s.mesh")[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["build", "mine:broken", "--spec", "f32[5]"], 2, "mine.py:15"),
        (["build", "mine:nothing", "--spec", "f32[5]"], 2, "has no nothing"),
        (["build", "nowhere:fn", "--spec", "f32[5]"], 2, "cannot be imported"),
        (["build", "mine:fn", "--spec", "f33[5]"], 2, "'f33[5]'"),
        (["build", "mine:fn", "--spec", "all=f32[5]"], 2, "const, mapped, state"),
        (["build", "mine:fn", "--spec", "f32[5]", "--steps", "3"], 2, "state="),
        (["build", "mine", "--spec", "f32[5]"], 2, "PKG.MOD:FN"),
        (["build", "mine:prints", "--spec", "f32[5]"], 1, "return what you want to see"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else None,
)
def test_what_cannot_be_built_is_one_clear_line(
    capfd: pytest.CaptureFixture[str], home: Path, words: list[str], code: int, said: str
) -> None:
    got, out, err = run(capfd, *words, "-o", "x.mesh")
    assert (got, out) == (code, "")
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("x.mesh").exists()


@pytest.mark.parametrize(
    "name", ["nothing", "noise", "LAPACK with shapes that lie", "2^30 calls", "64 GB"]
)
def test_a_forged_file_is_refused_in_json(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "forged.bin"
    path.write_bytes(forged.FORGED[name].make())
    code, out, err = run(capfd, "check", str(path), "--json")
    told = json_shape.check("artifact-check", out)
    assert (code, told["accepted"], told["exit_code"], err) == (1, False, 1, "")
    assert told["reason"] in {reason.name for reason in forged.FORGED[name].reasons}


def test_bare_bytes_and_built_in_kernels_are_accepted(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bare.bin"
    path.write_bytes(honest.bytes_of("scan_sum"))
    for file in (path, registry.artifact_path("embed.minilm@1")):
        code, out, _ = run(capfd, "check", str(file), "--json")
        assert code == 0 and json.loads(out)["accepted"] is True


def test_a_file_that_is_no_bundle_is_not_shown(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"no bundle")
    code, out, err = run(capfd, "show", str(path), "--json")
    refusal = json_shape.check("refusal", out)
    assert (code, refusal["reason"]) == (1, "ARTIFACT_FORMAT") and "mesh artifact check" in err
    assert run(capfd, "show", str(tmp_path / "none"))[0] == 2


def test_a_manifest_that_lies_about_its_artifact_is_refused(
    capfd: pytest.CaptureFixture[str], home: Path
) -> None:
    specs = ["--spec", "f32[4,8]", "--spec", "f32[8,2]"]
    assert run(capfd, "build", "mine:fn", *specs, "-o", "a.mesh")[0] == 0
    bundle = read_bundle(Path("a.mesh").read_bytes())
    key = keystore.load(home, keystore.ACCOUNT)
    args = bundle.manifest.args
    lies: list[dict[str, Any]] = [
        {"args": args[::-1]},
        {"args": args[:1]},
        {"outs": (args[0].spec,)},
        {"x64": 1},
        {"platforms": ("cpu",)},
        {"calling_convention": 9},
    ]
    for lie in lies:
        manifest = dataclasses.replace(bundle.manifest, **lie)
        with pytest.raises(ArtifactRefused) as refused:
            check_manifest(manifest, read_header(bundle.content))
        assert refused.value.reason is Reason.ARTIFACT_MANIFEST, lie
    verdict = check_bytes(write_bundle(manifest, bundle.content, key))
    assert verdict.reason == "ARTIFACT_MANIFEST"
    hurt = bytearray(Path("a.mesh").read_bytes())
    hurt[80] ^= 1
    assert check_bytes(bytes(hurt)).reason in ("BAD_SIGNATURE", "ARTIFACT_FORMAT")


# ---- whatever the bytes do to the parser


# Found by the fuzzer with jaxlib 0.10.2.
CRASH_AT, CRASH_BYTE = 1147, 57


def slow() -> bytes:
    """Honest bytes that keep the validator busy for about a second."""
    return with_code(body(forged.many_operations(49_000)))


def test_a_hang_is_a_typed_refusal() -> None:
    verdict = check_bytes(slow(), wall_s=0.05)
    assert (verdict.accepted, verdict.reason) == (False, "WALL_CLOCK")


def test_a_crash_is_a_typed_refusal() -> None:
    """One flipped bit in the code: an operand that is none, which MLIR's reader follows."""
    content = bytearray(honest.bytes_of("random_bits_rbg"))
    at = content.index(b"ML\xefR") + CRASH_AT
    assert content[at] == CRASH_BYTE, "jax writes other bytes now: choose another mutant that kills"
    content[at] ^= 16
    verdict = check_bytes(bytes(content))
    assert (verdict.accepted, verdict.reason) == (False, "WORKER_DIED")
    assert "SIGSEGV" in verdict.text
