"""`python -m tests.processes.as_user nobody|root PROGRAM ...`: run it as a user, from root.

An installation below root's own home is out of nobody's reach; so that tests of ordinary users run
there too, it is shown at its own path in a mount namespace of the program's own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from meshnode.worker import kernel
from meshnode.worker.privileges import NOBODY

CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
OTHERS_ENTER = 0o001

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [text.encode() or None for text in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {target}: {os.strerror(code)}")


def closed_above(path: Path) -> Path | None:
    """The topmost folder on the way to `path` that others may not enter."""
    for above in reversed([path, *path.parents]):
        if not above.stat().st_mode & OTHERS_ENTER:
            return above
    return None


def show(paths: set[Path]) -> None:
    """Folders that hide one of `paths` become empty ones that show only those."""
    hiding = {path: above for path in paths if (above := closed_above(path)) is not None}
    if not hiding:
        return
    kernel.call("unshare", CLONE_NEWNS)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    hidden: dict[Path, list[tuple[Path, int]]] = {}
    for path, above in hiding.items():
        hidden.setdefault(above, []).append((path, os.open(path, os.O_PATH)))
    for above, shown in hidden.items():
        mount("tmpfs", str(above), "tmpfs", 0, "mode=755")
        for path, fd in shown:
            path.mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", str(path), "", MS_BIND)


def main() -> None:
    user, *argv = sys.argv[1:]
    here = Path(__file__).resolve().parents[2]
    show({Path(place).resolve() for place in (sys.prefix, sys.base_prefix, here)})
    if user == "nobody":
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
