"""Artifacts are a function of the source alone: same bytes from any folder, and drift is seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxkernels import build, registry

ROOT = Path(registry.__file__).parents[1]


def run_build(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxkernels.build", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a copy of the sources in another folder builds, comment lines moved."""
    home = tmp_path_factory.mktemp("elsewhere") / "quite" / "another" / "place"
    ignored = shutil.ignore_patterns("__pycache__", "artifacts")
    shutil.copytree(ROOT / "jaxkernels", home / "jaxkernels", ignore=ignored)
    for kernel in home.glob("jaxkernels/*/kernel.py"):
        text = kernel.read_text("utf-8")
        kernel.write_text(text.replace("import jax\n", "import jax\n\n# moved\n\n", 1), "utf-8")
    done = run_build(home, "--out", str(home / "out"))
    assert done.returncode == 0, done.stderr
    return home / "out"


@pytest.mark.long
def test_another_folder_builds_the_committed_bytes(built: Path) -> None:
    committed = registry.artifact_folder()
    for name in [registry.DIGESTS_FILE, *(f"{spec}.bin" for spec in registry.KERNELS)]:
        assert (built / name).read_bytes() == (committed / name).read_bytes(), name


def test_check_passes_on_what_is_committed() -> None:
    done = run_build(ROOT, "--check")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.long
def test_check_sees_a_changed_byte(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "artifacts"))
    target = folder / "bench.noop@1.bin"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    done = run_build(ROOT, "--check", "--out", str(folder))
    assert done.returncode == 1
    assert "bench.noop@1" in done.stdout and "vec.knn@1" not in done.stdout


def test_drift_names_lists_that_differ(built: Path, tmp_path: Path) -> None:
    digests = json.loads((built / registry.DIGESTS_FILE).read_bytes())
    contents = {spec: (built / f"{spec}.bin").read_bytes() for spec in digests["kernels"]}
    assert build.drift(built, digests, contents) == []
    changed = digests | {"jax": "0.0.1"}
    assert build.drift(built, changed, contents) == [f"jax: committed {digests['jax']}, here 0.0.1"]
    del contents["bench.spin@1"]
    assert build.drift(built, digests, contents) == ["bench.spin@1: only committed"]
    assert build.drift(tmp_path, digests, contents)[0].startswith("digests.json: ")
