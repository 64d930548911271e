"""Others read our vectors: Node's own crypto, and python-cwt in an environment of its own.

`make test` skips a peer that is not there and says so; with MESHNODE_TESTS=long (`make test-long`,
which installs them) a missing peer is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "docs" / "spec" / "vectors"
TIMEOUT_S = 120


def missing(what: str) -> NoReturn:
    if os.environ.get("MESHNODE_TESTS") == "long":
        pytest.fail(what)
    pytest.skip(what)


def counts(*command: str | Path) -> dict[str, int]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def load(name: str) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = json.loads((VECTORS / name).read_text(encoding="ascii"))
    return entries


def test_node_verifies_signatures_digests_and_roots() -> None:
    node = shutil.which("node")
    if node is None:
        missing("node is not installed: apt install nodejs")
    held = counts(node, Path(__file__).with_name("vectors.mjs"), VECTORS)
    bad = [entry for entry in load("bad.json") if entry["as"] in ("cbor", "envelope")]
    assert held["objects"] == len(load("objects.json"))
    assert held["frames"] == len(load("frames.json"))
    assert held["refused"] == len(bad)
    assert held["receipts"] == 2 and held["acceptances"] == 1 and held["trees"] > 8


def test_node_sees_a_changed_byte(tmp_path: Path) -> None:
    """The reader itself can fail."""
    node = shutil.which("node")
    if node is None:
        missing("node is not installed: apt install nodejs")
    shutil.copytree(VECTORS, tmp_path / "vectors")
    path = tmp_path / "vectors" / "objects.json"
    entries = load("objects.json")
    wire = bytearray.fromhex(entries[5]["sealed"])
    wire[-1] ^= 1
    entries[5]["sealed"] = wire.hex()
    path.write_text(json.dumps(entries), encoding="ascii")
    with pytest.raises(AssertionError, match="signature"):
        counts(node, Path(__file__).with_name("vectors.mjs"), tmp_path / "vectors")


def test_cwt_verifies_every_sealed_object() -> None:
    python = Path(os.environ.get("MESHNODE_CWT_PYTHON", ROOT / ".venv-cwt" / "bin" / "python"))
    if not python.exists():
        missing(
            "no cwt: python -m venv .venv-cwt && .venv-cwt/bin/pip install cwt==3.3.0"
            " (or set MESHNODE_CWT_PYTHON)"
        )
    held = counts(python, Path(__file__).with_name("check_cwt.py"), VECTORS)
    assert held["verified"] > len(load("objects.json"))
    assert held["refused"] == 4
