"""Which kernels there are: name@version -> KernelInfo, and the committed bytes of each.

Flow: read by the CLI (`mesh kernels`), by the submitter (artifact digest, shapes) and by the car
(which digests are the release's own). Imports no jax, so asking is cheap everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType

from .bench_noop.api import INFO as BENCH_NOOP
from .bench_spin.api import INFO as BENCH_SPIN
from .embed_minilm.api import INFO as EMBED_MINILM
from .errors import ArtifactDamaged, UnknownKernel
from .linalg_matmul.api import INFO as LINALG_MATMUL
from .lm_llama_decode.api import INFO as LM_LLAMA_DECODE
from .mc_pricing.api import INFO as MC_PRICING
from .md_lj.api import INFO as MD_LJ
from .render_sdf.api import INFO as RENDER_SDF
from .spec import KernelInfo
from .vec_knn.api import INFO as VEC_KNN

KERNELS: dict[str, KernelInfo] = {
    info.spec: info
    for info in (
        BENCH_NOOP,
        BENCH_SPIN,
        EMBED_MINILM,
        LINALG_MATMUL,
        LM_LLAMA_DECODE,
        MC_PRICING,
        MD_LJ,
        RENDER_SDF,
        VEC_KNN,
    )
}

ARTIFACT_BYTES_MAX = 16 << 20
DIGESTS_FILE = "digests.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One row of the digest list: what a release's kernel bytes must be."""

    spec: str
    digest: bytes  # SHA-256 of the file
    size_bytes: int
    file: str


def get(spec: str) -> KernelInfo:
    """The kernel called `name@version`; a bare `name` means its newest version."""
    if spec in KERNELS:
        return KERNELS[spec]
    versions = [info for info in KERNELS.values() if info.name == spec]
    if versions:
        return max(versions, key=lambda info: info.version)
    raise UnknownKernel(f"There is no kernel {spec!r}; there are: {', '.join(sorted(KERNELS))}.")


def artifact_folder() -> Path:
    return Path(str(resources.files(__package__) / "artifacts"))


@cache
def artifacts() -> dict[str, Artifact]:
    """The digest list of this release, by name@version."""
    path = artifact_folder() / DIGESTS_FILE
    try:
        rows = json.loads(path.read_bytes())["kernels"]
        return {
            spec: Artifact(spec, bytes.fromhex(row["sha256"]), row["size_bytes"], row["file"])
            for spec, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"The kernels' digest list cannot be read: {error}.") from error


def artifact(spec: str) -> Artifact:
    """The digest-list row of a kernel."""
    info = get(spec)
    row = artifacts().get(info.spec)
    if row is None:
        raise ArtifactDamaged(f"{info.spec} is not in the digest list; run `make kernels`.")
    return row


def by_digest(digest: bytes) -> KernelInfo | None:
    """The built-in kernel whose bytes have this SHA-256, or None: a stranger's code."""
    for row in artifacts().values():
        if row.digest == digest:
            return KERNELS.get(row.spec)
    return None


def artifact_path(spec: str) -> Path:
    return artifact_folder() / artifact(spec).file


def artifact_bytes(spec: str) -> bytes:
    """A kernel's `jax.export` bytes, checked against the digest list."""
    row = artifact(spec)
    try:
        content = artifact_path(spec).read_bytes()
    except OSError as error:
        raise ArtifactDamaged(f"The bytes of {row.spec} cannot be read: {error}.") from error
    if len(content) != row.size_bytes or hashlib.sha256(content).digest() != row.digest:
        raise ArtifactDamaged(f"The bytes of {row.spec} are not those of the release.")
    return content


def host_module(spec: str) -> ModuleType:
    """The kernel's host side (`prepare` and `finish`), imported on demand."""
    return importlib.import_module(f"{__package__}.{get(spec).package}.host")
