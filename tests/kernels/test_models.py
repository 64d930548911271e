"""Models: exact bytes or nothing, and one clear line about what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxkernels import models, registry
from jaxkernels.errors import (
    ModelMissing,
    ModelRefused,
    ModelStorage,
    ModelUnreachable,
    UnknownModel,
)
from jaxkernels.lm_llama_decode.api import Shape
from jaxkernels.models import Lock, Model

from .gguf_file import write_llama

WEIGHTS = b"\x02" + bytes(7) + b"{}" + bytes(1 << 18)
TOKENIZER = b"{}"


def make_wheel(path: Path, weights: bytes = WEIGHTS, tokenizer: bytes | None = TOKENIZER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights", weights)
        if tokenizer is not None:
            archive.writestr("model/tokenizer", tokenizer)
    return path


def make_lock(wheel: Path, weights: bytes = WEIGHTS) -> Lock:
    return Lock(
        kernel="embed_minilm",
        package="a-package",
        version="1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        weights_member="model/weights",
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        weights_bytes=len(weights),
        weights_format="safetensors",
        tokenizer_member="model/tokenizer",
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
        tokenizer_bytes=len(TOKENIZER),
        upstream="someone/something",
        licence="Apache-2.0",
    )


def install(lock: Lock, wheel: Path, target: Path) -> Model:
    return models.install("minilm", lock, wheel, target, lambda stage, done, total: None)


def refuse(lock: Lock, wheel: Path, target: Path, match: str) -> None:
    with pytest.raises(ModelRefused, match=match) as caught:
        install(lock, wheel, target)
    assert "\n" not in str(caught.value)
    assert list(target.iterdir()) == []


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl")
    refuse(models.lock("minilm"), wheel, tmp_path / "models", "nothing was kept")


@pytest.mark.parametrize(
    ("weights", "tokenizer"),
    [
        (WEIGHTS[:-1] + b"\x01", TOKENIZER),  # one bit
        (WEIGHTS + b"\x00", TOKENIZER),  # longer
        (WEIGHTS[:-1], TOKENIZER),  # shorter
        (WEIGHTS, b"[]"),
        (WEIGHTS, None),
    ],
)
def test_other_bytes_in_the_right_wheel_are_refused(
    tmp_path: Path, weights: bytes, tokenizer: bytes | None
) -> None:
    wheel = make_wheel(tmp_path / "a.whl", weights, tokenizer)
    refuse(make_lock(wheel), wheel, tmp_path / "models", "not the file|lacks the files")


def test_weights_without_the_kernels_tensors_are_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl")
    refuse(make_lock(wheel), wheel, tmp_path / "models", "no tensor")


def test_weights_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl")
    lock = dataclasses.replace(make_lock(wheel), weights_format="gguf")
    refuse(lock, wheel, tmp_path / "models", "does not begin with GGUF")


def test_a_gguf_of_another_network_is_refused(tmp_path: Path) -> None:
    weights = write_llama(tmp_path / "small.gguf", Shape(1, 64, 1, 1, 64, 64, 320, 8)).read_bytes()
    wheel = make_wheel(tmp_path / "a.whl", weights, tokenizer=None)
    lock = dataclasses.replace(
        make_lock(wheel, weights),
        kernel="lm_llama_decode",
        weights_format="gguf",
        tokenizer_member="",
    )
    refuse(lock, wheel, tmp_path / "models", "llama.block_count of the weight file is 1, not 30")


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"not a zip")
    refuse(make_lock(wheel), wheel, tmp_path / "models", "lacks the files")


def test_no_room_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A file that may not grow fails in write() as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(ModelStorage, match="cannot be written"):
            install(make_lock(wheel), wheel, tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_bytes(b"")
    with pytest.raises(ModelStorage):
        models.get("minilm", tmp_path / "models" / "below")


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple"),
        ("PIP_EXTRA_INDEX_URL", ""),
        ("PIP_FIND_LINKS", ""),
        ("PIP_NO_CACHE_DIR", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelUnreachable, match="check the network") as caught:
        models.get("minilm", tmp_path)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pips_words_lose_their_addresses() -> None:
    said = "Looking\nERROR: Could not reach http://user:secret@127.0.0.1:9/simple for it\n"
    text = str(models._download_error(models.lock("minilm"), said))
    assert "secret" not in text and "Could not reach (address) for it" in text
    full = models._download_error(models.lock("minilm"), "OSError: No space left on device")
    assert isinstance(full, ModelStorage)


def test_unknown_and_missing_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="minilm"):
        models.get("maxilm", tmp_path)
    with pytest.raises(ModelMissing, match="mesh models get minilm"):
        models.load("minilm", tmp_path)


def test_installed_arrays_are_the_kernels_constants(minilm: Model) -> None:
    constants = [arg for arg in registry.get("embed.minilm@1").args if not arg.mapped]
    assert [(a.name, a.dtype, a.shape) for a in minilm.args] == [
        (a.name, a.dtype, a.shape) for a in constants
    ]
    assert (minilm.licence, minilm.upstream) == (
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    )
    assert not [p.name for p in minilm.folder.parent.iterdir() if p.name.startswith(".minilm-")]
    for arg in minilm.args:
        array = arg.open()
        assert np.isfinite(array).all() and float(np.abs(array).max()) > 0.1


def test_get_is_idempotent_and_sees_damage(minilm: Model, tmp_path: Path) -> None:
    shutil.copytree(minilm.folder, tmp_path / "minilm")
    stages: list[str] = []
    again = models.get("minilm", tmp_path, lambda stage, done, total: stages.append(stage))
    assert (stages, again.folder) == ([], tmp_path / "minilm")
    with (tmp_path / "minilm" / "mix").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(ModelRefused, match="remove it"):
        models.get("minilm", tmp_path)


def test_other_source_bytes_in_the_lock_make_it_old(minilm: Model) -> None:
    newer = dataclasses.replace(models.lock("minilm"), weights_sha256="00" * 32)
    with pytest.raises(ModelRefused, match="damaged or old"):
        models._load("minilm", newer, minilm.folder)
