"""Shared by the kernel tests: the real MiniLM weights, where the network or the cache has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxkernels import models
from jaxkernels.errors import ModelUnreachable


@pytest.fixture(scope="session")
def minilm(request: pytest.FixtureRequest) -> models.Model:
    """Installed once into pytest's cache folder (84 MB to download, 90 MB on disk)."""
    folder = Path(request.config.cache.mkdir("models"))
    try:
        return models.get("minilm", folder)
    except ModelUnreachable as error:
        pytest.skip(f"the weights cannot be downloaded here: {error}")
