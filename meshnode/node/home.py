"""Where a node lives: the home with keys, databases, blobs; the run directory with its sockets.

Under `meshnode.node` and `meshnode.cli`. The home is data and lasts; the run directory holds only
sockets and may vanish with a reboot. Both are 0700: a socket in them is as private as a key.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from meshnode.errors import LocalResource

BLOBS = "blobs"
EXECUTABLES = "executables"

SOCKET_PATH_BYTES_MAX = 107  # sun_path is 108 with its final zero (unix(7))
RUN_NAME_CHARS = 16
SOCKET_NAME_BYTES_MAX = 32  # of any socket in a run directory


def home_path(environ: Mapping[str, str] = os.environ) -> Path:
    """`$MESH_HOME`, or `meshnode` in the XDG data directory. Nothing is made."""
    if chosen := environ.get("MESH_HOME"):
        return Path(chosen).expanduser().absolute()
    if (data := environ.get("XDG_DATA_HOME")) and Path(data).is_absolute():
        return Path(data) / "meshnode"  # the XDG base directory spec ignores relative paths
    return Path.home() / ".local" / "share" / "meshnode"


def make_home(home: Path) -> Path:
    """Make the home, or check the one that is there. LocalResource if others may enter it."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.stat().st_uid == os.geteuid() and not any(home.iterdir()):
            home.chmod(0o700)  # an empty directory made for us; a full one may serve others too
    except OSError as error:
        raise LocalResource(f"cannot make {home}: {error.strerror}") from None
    check_home(home)
    return home


def check_home(home: Path) -> None:
    """LocalResource unless `home` is a directory that this user alone may enter."""
    try:
        found = home.stat()
    except FileNotFoundError:
        raise LocalResource(f"{home} does not exist; run `meshnode init` or `mesh init`") from None
    except OSError as error:
        raise LocalResource(f"cannot use {home}: {error.strerror}") from None
    _check_private(home, found)


def blobs_path(home: Path) -> Path:
    return home / BLOBS


def executables_path(home: Path) -> Path:
    return home / EXECUTABLES


def run_base(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the run directories of this user's homes are, and the state of testnets."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        wished = Path(runtime) / "meshnode"
        length = len(os.fsencode(wished)) + 1 + RUN_NAME_CHARS + 1 + SOCKET_NAME_BYTES_MAX
        if wished.is_absolute() and wished.parent.is_dir() and length <= SOCKET_PATH_BYTES_MAX:
            return wished
    return Path(f"/tmp/meshnode-{os.geteuid()}")


def run_dir(home: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """A short private directory for the sockets of this home, made if it is not there.

    Named by a hash of the home: the home's own path may be longer than a socket's may be.
    """
    name = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:RUN_NAME_CHARS]
    base = run_base(environ)
    for folder in (base, base / name):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # lstat: in /tmp anyone may have put a link of that name before us.
            found = folder.lstat()
        except OSError as error:
            raise LocalResource(f"cannot make {folder}: {error.strerror}") from None
        _check_private(folder, found)
    return base / name


def socket_path(home: Path, name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """A socket in the run directory of this home."""
    if len(os.fsencode(name)) > SOCKET_NAME_BYTES_MAX or "/" in name:
        raise ValueError(f"socket name {name!r}")
    return run_dir(home, environ) / name


def _check_private(folder: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise LocalResource(f"{folder} is not a directory")
    if found.st_uid != os.geteuid():
        raise LocalResource(f"{folder} belongs to another user")
    if found.st_mode & 0o077:
        raise LocalResource(f"others may enter {folder}; run `chmod 700 {folder}`")
