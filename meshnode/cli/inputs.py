"""From words on a command line to what a kernel's host side takes.

    corpus.txt    one input per line        jobs.jsonl   one JSON value per line
    vectors.npy   an array                  400          a number
    name=FILE     one of several inputs (a table), each of the forms above

Only data is read: .npy without pickles, no code.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from meshnode.errors import LocalResource, UsageError

from . import frame

if TYPE_CHECKING:
    from jaxkernels.models import Model
    from jaxkernels.spec import KernelInfo

TEXT_BYTES_MAX: Final = 1 << 30
MODELS_ENV: Final = "MESH_MODELS"


def read_inputs(words: tuple[str, ...]) -> Any:
    """One plain input, or a table of named ones."""
    named = [_split(word) for word in words]
    if len(named) == 1 and named[0][0] is None:
        return _read(named[0][1])
    if any(name is None for name, _ in named):
        raise UsageError(
            "several inputs need names: mesh map vec.knn@1 queries=q.npy vectors=v.npy"
        )
    table = {str(name): _read(word) for name, word in named}
    if len(table) != len(named):
        raise UsageError("an input is named twice")
    return table


def _split(word: str) -> tuple[str | None, str]:
    name, sign, rest = word.partition("=")
    if sign and name.isidentifier() and not Path(word).exists():
        return name, rest
    return None, word


def _read(word: str) -> Any:
    if word.isdigit():
        return int(word)
    path = Path(word)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        match path.suffix:
            case ".npy":
                return _array(path)
            case ".txt" | ".md" | ".rst" | ".csv":
                return _lines(path)
            case ".jsonl":
                return _values(path)
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
    raise UsageError(f"{path}: inputs are read from .npy, .txt and .jsonl")


def _array(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{path} is no array: {error}") from None


def _text(path: Path) -> str:
    if path.stat().st_size > TEXT_BYTES_MAX:
        raise UsageError(f"{path} is over {TEXT_BYTES_MAX >> 20} MiB; split it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error}") from None


def _lines(path: Path) -> list[str]:
    """One input a line; empty lines carry none."""
    lines = [line.strip() for line in _text(path).split("\n")]
    return [line for line in lines if line]


def _values(path: Path) -> Any:
    """A JSON value a line: a text, a map with `text`, another map, or numbers (made an array)."""
    values = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        values.append(value["text"] if isinstance(value, dict) and "text" in value else value)
    if values and not isinstance(values[0], str | dict):
        import numpy as np

        try:
            array = np.asarray(values)
        except ValueError as error:
            raise UsageError(f"{path}: the lines do not make one array: {error}") from None
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{path}: the lines are not all texts, all maps or all numbers")
        return array.astype(np.float32) if array.dtype == np.float64 else array.astype(np.int32)
    return values


# ---- options and models


def read_options(info: KernelInfo, settings: tuple[str, ...]) -> dict[str, Any]:
    """--set NAME=VALUE, as the type that the option's default has."""
    known = {option.name: option for option in info.options}
    found: dict[str, Any] = {}
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign or name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise UsageError(f"--set {setting}: the options of {info.spec} are: {there}")
        default = known[name].default
        try:
            found[name] = type(default)(text) if isinstance(default, int | float) else text
        except ValueError:
            raise UsageError(f"--set {setting}: not a number") from None
    return found


def models_folder() -> Path:
    """Where weights are kept: $MESH_MODELS, else beside the default home, whatever --home says."""
    import os

    from meshnode.node.home import home_path

    chosen = os.environ.get(MODELS_ENV)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return home_path({key: value for key, value in os.environ.items() if key != "MESH_HOME"}) / (
        "models"
    )


def load_model(info: KernelInfo) -> Model | None:
    if info.model is None:
        return None
    from jaxkernels import models

    return models.load(info.model, models_folder())


def read_cars(
    words: tuple[str, ...], testnet: str | None
) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    """--cars: peers, from peer ids or names of a testnet's cars, and owners: `mine`, `fleet` or
    accounts. `any` is no restriction."""
    from meshnode.errors import RemoteProtocolError
    from meshnode.node.owners import owner_of
    from meshnode.protocol.identity import peer_of_text

    nodes: dict[str, Any] = frame.read_testnet(testnet)["nodes"] if testnet else {}
    peers: list[bytes] = []
    owners: list[str] = []
    for word in ",".join(words).split(","):
        if word in ("", "any"):
            continue
        with suppress(UsageError):
            owner_of(word.lower())
            owners.append(word.lower())
            continue
        text = nodes[word]["peer"] if word in nodes else word
        try:
            peers.append(peer_of_text(text))
        except RemoteProtocolError:
            raise UsageError(
                f"--cars {word}: name cars by their peer ids (`mesh peers --json`), cars of a "
                "--testnet by name, an account by its 64 digits, or say mine, fleet or any"
            ) from None
    return tuple(peers), tuple(owners)
