"""Registry, host sides and models load neither jax nor the mesh: a submitter starts at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jaxkernels import registry

LOAD = """
import importlib, sys
from jaxkernels import errors, gguf, host, models, registry, safetensors, spec
for info in registry.KERNELS.values():
    registry.artifact_bytes(info.spec)
    for part in ("api", "host", "reference"):
        importlib.import_module(f"jaxkernels.{info.package}.{part}")
    if info.model:
        importlib.import_module(f"jaxkernels.{info.package}.weights")
heavy = {"jax", "jaxlib", "tokenizers", "meshnode", "libp2p", "torch"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_no_jax_on_the_submitters_side() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=Path(registry.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
