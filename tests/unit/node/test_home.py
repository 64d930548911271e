"""Homes, run directories and keys: where they are, and that nobody else may read them."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import LocalResource
from meshnode.node import keystore
from meshnode.node.home import (
    SOCKET_NAME_BYTES_MAX,
    SOCKET_PATH_BYTES_MAX,
    check_home,
    home_path,
    make_home,
    run_dir,
    socket_path,
)
from meshnode.protocol.identity import verify


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_where_a_home_is() -> None:
    assert home_path({"MESH_HOME": "/a/b", "XDG_DATA_HOME": "/x"}) == Path("/a/b")
    assert home_path({"XDG_DATA_HOME": "/x"}) == Path("/x/meshnode")
    assert home_path({"XDG_DATA_HOME": "x", "MESH_HOME": ""}).is_relative_to(Path.home())
    assert home_path({"MESH_HOME": "b"}) == Path.cwd() / "b"


def test_a_home_is_private(tmp_path: Path) -> None:
    home = make_home(tmp_path / "deep" / "home")
    assert mode(home) == 0o700
    assert make_home(home) == home
    home.chmod(0o755)
    make_home(home)  # it is empty: made for us by somebody with a usual umask
    assert mode(home) == 0o700
    (home / "file").touch()
    home.chmod(0o750)
    with pytest.raises(LocalResource, match=f"chmod 700 {home}"):
        make_home(home)
    with pytest.raises(LocalResource, match="init"):
        check_home(tmp_path / "nowhere")
    with pytest.raises(LocalResource, match="cannot make"):
        make_home(home / "file" / "below")
    with pytest.raises(LocalResource, match="not a directory"):
        check_home(home / "file")


def test_run_directories_are_short_private_and_one_for_each_home(tmp_path: Path) -> None:
    runtime = Path(os.environ["XDG_RUNTIME_DIR"])
    environ = {"XDG_RUNTIME_DIR": str(runtime)}
    long_home = make_home(tmp_path / ("h" * 200))
    folder = run_dir(long_home, environ)
    assert folder.is_relative_to(runtime / "meshnode")
    assert mode(folder) == mode(folder.parent) == 0o700
    assert folder == run_dir(long_home, environ)
    assert folder != run_dir(tmp_path, environ)
    (tmp_path / "link").symlink_to(long_home)
    assert folder == run_dir(tmp_path / "link", environ)
    longest = socket_path(long_home, "s" * SOCKET_NAME_BYTES_MAX, environ)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(longest))
    longest.unlink()
    with pytest.raises(ValueError, match="socket name"):
        socket_path(long_home, "s" * (SOCKET_NAME_BYTES_MAX + 1), environ)


@given(st.integers(1, 300))
def test_no_runtime_directory_is_too_long(tmp_path_factory: pytest.TempPathFactory, n: int) -> None:
    base = tmp_path_factory.getbasetemp()
    runtime = base / ("r" * min(n, 200))
    runtime.mkdir(exist_ok=True)
    path = socket_path(base, "control.sock", {"XDG_RUNTIME_DIR": str(runtime)})
    assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX


def test_a_run_directory_that_others_made_is_refused(tmp_path: Path) -> None:
    runtime = Path(os.environ["XDG_RUNTIME_DIR"]) / "r"
    runtime.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(runtime)}
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (runtime / "meshnode").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LocalResource, match="not a directory"):
        run_dir(tmp_path, environ)
    (runtime / "meshnode").unlink()
    (runtime / "meshnode").mkdir(mode=0o700)
    (runtime / "meshnode").chmod(0o777)
    with pytest.raises(LocalResource, match="chmod 700"):
        run_dir(tmp_path, environ)
    (runtime / "meshnode").chmod(0o700)
    if os.geteuid() == 0:
        os.chown(runtime / "meshnode", 65534, -1)
        with pytest.raises(LocalResource, match="another user"):
            run_dir(tmp_path, environ)


def test_keys_are_private_whatever_the_umask_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = keystore.make(tmp_path, keystore.NODE)
    finally:
        os.umask(old)
    path = tmp_path / keystore.NODE
    assert mode(path) == 0o600
    assert keystore.make(tmp_path, keystore.NODE).peer == made.peer
    with pytest.raises(LocalResource, match="another key"):
        keystore.make(tmp_path, keystore.NODE, bytes(32))
    signer = keystore.load(tmp_path, keystore.NODE)
    assert verify(signer.peer, b"message", signer.sign(b"message"))
    assert [found.name for found in tmp_path.iterdir()] == [keystore.NODE]
    for wide in (0o640, 0o604, 0o620):
        path.chmod(wide)
        with pytest.raises(LocalResource, match="chmod 600"):
            keystore.load(tmp_path, keystore.NODE)
    path.chmod(0o600)
    for content in (b"", bytes(32), b"00" * 31, b"00" * 33):
        path.write_bytes(content)
        with pytest.raises(LocalResource, match="damaged"):
            keystore.load(tmp_path, keystore.NODE)
