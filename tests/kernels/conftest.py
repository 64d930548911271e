"""Shared by the kernel tests: models' real weights, where the network or the cache has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxkernels import models
from jaxkernels.errors import ModelUnreachable


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
