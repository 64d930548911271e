"""The cache of executables: what is whole comes back, the rest is dropped, and it stays small."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from meshnode.errors import LocalResource
from meshnode.executor import wire
from meshnode.executor.cache import Entry, ExecutableCache, Figures

FIGURES = Figures(1_200, 7_000_000, 90)
HEAD = wire.EXECUTABLE_HEAD.size


def key(number: int) -> bytes:
    return bytes([number]) * 32


def content(entry: Entry | None) -> bytes | None:
    if entry is None:
        return None
    with os.fdopen(entry.fd, "rb") as file:
        return file.read()[HEAD:]


def put(cache: ExecutableCache, number: int, executable: bytes) -> None:
    assert content(cache.put(key(number), FIGURES, executable)) == executable


def test_what_was_put_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "executables"
    cache = ExecutableCache(folder, 1 << 20)
    assert cache.open(key(1)) is None
    put(cache, 1, b"code" * 1000)
    for again in (cache, ExecutableCache(folder, 1 << 20)):
        entry = again.open(key(1))
        assert entry is not None and entry.figures == FIGURES
        assert content(entry) == b"code" * 1000
        assert again.bytes_used == HEAD + 4000
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_entry_is_opened_for_reading_only(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "x", 1 << 20)
    for entry in (cache.put(key(1), FIGURES, b"code"), cache.open(key(1))):
        assert entry is not None
        with os.fdopen(entry.fd, "rb"), pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(entry.fd, b"evil", HEAD)


@pytest.mark.parametrize("at", [0, 8, HEAD - 1, HEAD, HEAD + 3])
def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path: Path, at: int) -> None:
    cache = ExecutableCache(tmp_path / "x", 1 << 20)
    put(cache, 1, b"code")
    (path,) = (tmp_path / "x").iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(damaged)
    assert cache.open(key(1)) is None
    assert not path.exists() and cache.bytes_used == 0
    put(cache, 1, b"code")
    assert content(cache.open(key(1))) == b"code"


@pytest.mark.parametrize("length", [0, 5, HEAD, HEAD + 2])
def test_a_short_file_is_noticed(tmp_path: Path, length: int) -> None:
    cache = ExecutableCache(tmp_path / "x", 1 << 20)
    put(cache, 1, b"code")
    (path,) = (tmp_path / "x").iterdir()
    os.truncate(path, length)
    assert ExecutableCache(tmp_path / "x", 1 << 20).open(key(1)) is None
    assert not path.exists()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "x", 3 * (HEAD + 100))
    for number in (1, 2, 3):
        put(cache, number, bytes(100))
        os.utime(tmp_path / "x" / f"{key(number).hex()}.exe", ns=(number, number))
    assert content(cache.open(key(1))) == bytes(100)
    put(cache, 4, bytes(100))
    assert cache.open(key(2)) is None
    # After a restart the files' times say the same, under a smaller bound too.
    again = ExecutableCache(tmp_path / "x", 2 * (HEAD + 100))
    assert again.open(key(3)) is None
    assert content(again.open(key(1))) == content(again.open(key(4))) == bytes(100)


def test_what_does_not_fit_lives_as_long_as_its_descriptor(tmp_path: Path) -> None:
    for cache in (ExecutableCache(None, 1 << 20), ExecutableCache(tmp_path / "x", HEAD + 3)):
        put(cache, 1, b"code")
        assert cache.open(key(1)) is None and cache.bytes_used == 0
    assert list((tmp_path / "x").iterdir()) == []


def test_a_full_disk_costs_a_compile_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExecutableCache(tmp_path / "x", 1 << 20)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        put(cache, 1, b"code")
    assert cache.open(key(1)) is None
    assert list((tmp_path / "x").iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(LocalResource, match="chmod 700"):
        ExecutableCache(folder, 1 << 20)
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(LocalResource):
        ExecutableCache(tmp_path / "link", 1 << 20)


def test_what_a_crash_left_is_swept_and_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    put(ExecutableCache(folder, 1 << 20), 1, b"code")
    (folder / "draft-1-0").write_bytes(b"half")
    (folder / f"{key(2).hex()}.exe").symlink_to(folder / f"{key(1).hex()}.exe")
    cache = ExecutableCache(folder, 1 << 20)
    assert not (folder / "draft-1-0").exists()
    assert cache.open(key(2)) is None
    assert content(cache.open(key(1))) == b"code"


def test_threads_may_use_it_at_once(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "x", 4 * (HEAD + 1000))
    wrong: list[int] = []

    def use(seed: int) -> None:
        for step in range(60):
            number = (seed * 7 + step * 3) % 8
            executable = bytes([number]) * 1000
            if content(cache.put(key(number), FIGURES, executable)) != executable:
                wrong.append(number)
            if content(cache.open(key(number))) not in (None, executable):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.bytes_used <= 4 * (HEAD + 1000)
