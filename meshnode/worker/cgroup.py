"""A control group for each worker, where the operator has given the node a folder to make them in.

Made and removed by `zygote`, joined by the child before it gives anything up. Both hierarchies:
version 2 (`memory.max`, `pids.max`) and version 1's memory controller (`memory.limit_in_bytes`).
Never looked for by itself: a group of the machine's own is not ours to divide.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TASKS_MAX: Final = 4096  # threads of one worker; XLA starts about six a core


@dataclass(frozen=True, slots=True)
class Group:
    path: Path
    version: int

    @classmethod
    def make(cls, parent: Path, name: str, memory_bytes: int) -> Group:
        """OSError if `parent` is no control group whose memory may be limited from here."""
        version = 2 if (parent / "cgroup.controllers").exists() else 1
        if version == 2:
            (parent / "cgroup.subtree_control").write_text("+memory")
            with contextlib.suppress(OSError):  # of use, not needed
                (parent / "cgroup.subtree_control").write_text("+pids")
        made = cls(parent / name, version)
        made.path.mkdir()
        try:
            made._limit(memory_bytes)
        except OSError:
            made.remove()
            raise
        return made

    def _limit(self, memory_bytes: int) -> None:
        limit = self.path / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")
        if not limit.exists():  # the kernel makes it with the folder, and nobody else
            raise OSError(f"{self.path.parent} is no control group that bounds memory")
        limit.write_text(str(memory_bytes))
        if self.version == 1:
            return
        for name, value in (("memory.swap.max", "0"), ("pids.max", str(TASKS_MAX))):
            with contextlib.suppress(OSError):  # no swap accounting, no pids controller
                (self.path / name).write_text(value)

    def join(self) -> None:
        """The calling process, and what it will start."""
        (self.path / "cgroup.procs").write_text("0")

    def holds_me(self) -> bool:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return any(line.endswith(f"/{self.path.name}") for line in lines)

    def ran_out(self) -> bool:
        """Whether the kernel killed in it for want of memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            counts = dict(line.split() for line in (self.path / name).read_text().splitlines())
        except (OSError, ValueError):
            return False
        return int(counts.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Once its process is reaped."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
