"""What every test shares: a home of its own, models' real weights, where the network or the cache
has them, and hypothesis with a fixed seed unless it is long.

A test never sees the person's own node, keys or jobs, and never leaves anything in their home.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from jaxkernels import models
from jaxkernels.errors import ModelUnreachable

# Quick: the same examples every time, so that a red run is red again. Long: fresh examples, many
# of them, and the blob that repeats a failure is printed. No deadline: two cores are shared.
settings.register_profile("quick", derandomize=True, database=None, deadline=None, max_examples=50)
settings.register_profile(
    "long",
    database=None,
    deadline=None,
    max_examples=300,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("long" if os.environ.get("MESHNODE_TESTS") == "long" else "quick")

_scratch: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _scratch
    # Short, and not pytest's tmp_path: a unix socket's path holds 107 bytes.
    _scratch = Path(tempfile.mkdtemp(prefix="mn-"))
    for name, folder in (
        ("MESH_HOME", "home"),
        ("XDG_DATA_HOME", "data"),
        ("XDG_CONFIG_HOME", "config"),
        ("XDG_CACHE_HOME", "cache"),
        ("XDG_RUNTIME_DIR", "run"),
    ):
        path = _scratch / folder
        path.mkdir(mode=0o700)
        os.environ[name] = str(path)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch is not None:
        shutil.rmtree(_scratch, ignore_errors=True)


@pytest.fixture(scope="session")
def minilm(request: pytest.FixtureRequest) -> models.Model:
    """84 MB to download, 90 MB on disk."""
    return installed(request, "minilm")


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> models.Model:
    """93 MB to download, 112 MB on disk: for long tests."""
    return installed(request, "smollm2")


def installed(request: pytest.FixtureRequest, name: str) -> models.Model:
    """Installed once, into pytest's cache folder."""
    folder = Path(request.config.cache.mkdir("models"))
    try:
        return models.get(name, folder)
    except ModelUnreachable as error:
        pytest.skip(f"the weights cannot be downloaded here: {error}")
