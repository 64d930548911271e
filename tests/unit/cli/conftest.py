"""A car's home, made as its owner makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.car import meshnode

from .test_commands import run


@pytest.fixture
def home(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "home"
    words = ("init", "--new", "garage", "--accept-notice", "--home", str(path))
    assert run(capfd, *words, group=meshnode)[0] == 0
    return path
