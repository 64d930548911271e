"""What tests with a real executor begin with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.executor import ExecutorConfig

from .executor_kit import EXPORT, FolderBlobs, House, MadeArtifacts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeArtifacts:
    folder = tmp_path_factory.mktemp("artifacts")
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True, timeout=120)
    return MadeArtifacts(folder)


@pytest.fixture
def house(tmp_path: Path, made: MadeArtifacts) -> House:
    (tmp_path / "blobs").mkdir()
    return House(ExecutorConfig(run_dir=tmp_path), made, FolderBlobs(tmp_path / "blobs"))
