"""The demo, cut to a size for every day: a car dies in the middle, and all its checks hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxkernels import models
from jaxkernels.errors import ModelUnreachable
from testnet import link

DEMO_S_MAX = 900.0


@pytest.mark.long
def test_the_demo_with_three_cars(request: pytest.FixtureRequest) -> None:
    folder = Path(request.config.cache.mkdir("models"))
    try:
        models.get("minilm", folder)
    except ModelUnreachable as error:
        pytest.skip(f"the weights cannot be downloaded here: {error}")
    # With fewer units, leases of more than one are over before the demo kills a car that holds one.
    done = subprocess.run(
        [sys.executable, "-m", "testnet.demo", "--cars", "3", "--units", "96", "--no-search"],
        capture_output=True,
        text=True,
        timeout=DEMO_S_MAX,
        env={**link.environment(), "MESH_MODELS": str(folder)},
        cwd=os.getcwd(),
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL to car-" in done.stderr and "FAIL" not in done.stderr
