"""Machine code on disk: what a compile-only worker made of an artifact, for workers to come.

Used by `compiling`. A file holds the figures of a program and a pickle with native code in it, so
the folder is this user's alone (0700), nothing in it ever comes from or goes to a peer, and only
compile-only workers' words get in. A file is written beside its place and moved there; its SHA-256
stands in its head, so that what a crash or a disk damaged is dropped and compiled again.

All methods may be called from any thread and block only for the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final, NamedTuple

from meshnode.errors import LocalResource

from . import wire

MAGIC: Final = b"meshexe1"
SUFFIX: Final = ".exe"


class Figures(NamedTuple):
    """What compiling a program told."""

    compile_ms: int
    flop_told: int  # as on the wire
    memory_mb: int

    @property
    def flop_per_unit(self) -> int:
        """Of a step, if stepped; the least it can be, if it is not `counted`."""
        return self.flop_told & ~wire.AT_LEAST

    @property
    def counted(self) -> bool:
        """Every loop's length is known: the figure is what a receipt may state."""
        return not self.flop_told & wire.AT_LEAST


class Entry(NamedTuple):
    """An executable; whoever holds it closes `fd`."""

    fd: int
    figures: Figures


class ExecutableCache:
    """Owns `folder`; without one an executable lives as long as its descriptor."""

    def __init__(self, folder: Path | None, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max if folder is not None else 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._names = itertools.count()
        if folder is not None:
            self._scan(folder)

    @property
    def bytes_used(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def open(self, key: bytes) -> Entry | None:
        """The executable of `key`, read-only; None if it is not here or not whole."""
        with self._lock:
            if self._folder is None or key.hex() not in self._sizes:
                return None
            path = self._path(self._folder, key)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                self._forget(key)
                return None
            self._sizes.move_to_end(key.hex())
            with contextlib.suppress(OSError):
                os.utime(fd)  # orders eviction after a restart
        figures = _checked(fd)
        if figures is None:
            os.close(fd)
            self.drop(key)
            return None
        return Entry(fd, figures)

    def put(self, key: bytes, figures: Figures, executable: bytes) -> Entry:
        """Keep an executable, if there is room, and give it back opened."""
        digest = hashlib.sha256(wire.FIGURES.pack(*figures) + executable).digest()
        content = wire.EXECUTABLE_HEAD.pack(MAGIC, digest, *figures) + executable
        if self._folder is not None and len(content) <= self._bytes_max:
            with contextlib.suppress(OSError):  # a full disk costs a compile next time
                return Entry(self._write(self._folder, key, content), figures)
        return Entry(_unnamed(content), figures)

    def drop(self, key: bytes) -> None:
        """Forget what turned out to be of no use."""
        with self._lock:
            self._forget(key)

    # ---- the folder

    @staticmethod
    def _path(folder: Path, key: bytes) -> Path:
        return folder / f"{key.hex()}{SUFFIX}"

    def _scan(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            raise LocalResource(f"cannot make {folder}: {error.strerror}") from None
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not private or found.st_uid != os.geteuid():
            raise LocalResource(f"others may enter {folder}; run `chmod 700 {folder}`")
        rows = []
        for path in folder.iterdir():
            if path.suffix == SUFFIX and len(path.stem) == 64:
                row = path.lstat()
                rows.append((row.st_mtime_ns, path.stem, row.st_size))
            elif path.name.startswith("draft-"):  # what a crash left
                path.unlink(missing_ok=True)
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(rows))
        self._evict(0)

    def _write(self, folder: Path, key: bytes, content: bytes) -> int:
        draft = folder / f"draft-{os.getpid()}-{next(self._names)}"
        try:
            with draft.open("xb") as file:
                os.fchmod(file.fileno(), 0o400)
                file.write(content)
            fd = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with self._lock:
                    self._forget(key)
                    self._evict(len(content))
                    draft.replace(self._path(folder, key))
                    self._sizes[key.hex()] = len(content)
            except OSError:
                os.close(fd)
                raise
            return fd
        finally:
            draft.unlink(missing_ok=True)

    def _evict(self, size: int) -> None:
        while self._sizes and sum(self._sizes.values()) + size > self._bytes_max:
            self._forget(bytes.fromhex(next(iter(self._sizes))))

    def _forget(self, key: bytes) -> None:
        self._sizes.pop(key.hex(), None)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._path(self._folder, key).unlink(missing_ok=True)


def _unnamed(content: bytes) -> int:
    """A file that nobody can write to or find."""
    fd = os.memfd_create("executable", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _checked(fd: int) -> Figures | None:
    """The figures of a whole file."""
    size = os.fstat(fd).st_size
    if (
        not wire.EXECUTABLE_HEAD.size
        <= size
        <= wire.EXECUTABLE_HEAD.size + wire.EXECUTABLE_BYTES_MAX
    ):
        return None
    content = os.pread(fd, size, 0)
    if len(content) != size:
        return None
    magic, digest, *figures = wire.EXECUTABLE_HEAD.unpack_from(content)
    covered = memoryview(content)[wire.EXECUTABLE_HEAD.size - wire.FIGURES.size :]
    if magic != MAGIC or hashlib.sha256(covered).digest() != digest:
        return None
    return Figures(*figures)
