"""What the executor may use, what it needs from its node, and every named bound of it.

`ExecutorConfig` is filled by the node from its configuration; `BlobFiles` is the blob store as the
executor sees it. Imported by `supervisor` and `forks`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from meshnode.protocol.types import BlobRef, Digest

RUNS_QUEUED_MAX: Final = 64  # behind the running ones; more are refused with BUSY
EVENTS_QUEUED_MAX: Final = 256  # then workers wait, by the back-pressure of their sockets
EVENTS_LATE_MAX: Final = 4096  # small events that found the channel full
REFUSALS_KEPT_MAX: Final = 64
FIGURES_KEPT_MAX: Final = 64
RECEIVE_BYTES: Final = 64 << 10  # below the size from which malloc maps pages anew each time
ZYGOTE_START_S_MAX: Final = 60.0
FORK_S_MAX: Final = 10.0
EXIT_S_MAX: Final = 2.0  # from SIGKILL to the process gone
CLOSE_S_MAX: Final = 5.0
PROBE_S_MAX: Final = 60.0


class BlobFiles(Protocol):
    def open_blob(self, blob_id: Digest, first_byte: int, byte_count: int, /) -> int:
        """A read-only descriptor of the blob's one contiguous file, of which at least these bytes
        are here: a run needs no more of a mapped argument. KeyError or OSError if they are not."""
        ...

    def put_open(self, fd: int, size: int, /) -> BlobRef:
        """Keep the first `size` bytes of an open file as a blob: a run's checkpoint. Called from a
        thread; OSError if there is no room."""
        ...


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    run_dir: Path
    """Of this node, private (0700); worker messages go to `worker.log` there if `log_workers`."""
    slots: int = 1
    """Runs at a time."""
    zygote_parent: Path | None = None
    """Socket of `python -m meshnode.worker.zygote --listen PATH`; None starts a zygote of one's
    own with the first offer."""
    idle_stop_s: float = 120.0
    """Idle workers, and then the zygote, end after so long."""
    workers_max: int = 4
    """Live workers, loaded and idle ones too; at least `slots`."""
    memory_mb_max: int = 8_192
    """Most memory of one worker's program: arguments, results and temporaries."""
    load_s_max: float = 120.0
    """Longest fork, compile and reading of constants."""
    threads: int = 0
    """Of XLA in each worker; 0 is cores / slots."""
    probe_cache: Path | None = None
    """Where the probe's answer is kept, so that a node restarts without starting jax."""
    executable_cache: Path | None = None
    """Folder of compiled programs, this user's alone; None compiles for each worker anew."""
    executable_bytes_max: int = 1 << 30
    """Of that folder; at the bound the program used longest ago goes."""
    disk_interval_s: float = 0.0
    """Least time between two checkpoints of a run on the disk, but for the one at its stop; BOINC's
    `disk_interval`. A car that is lost takes so much work with it."""
    sandbox_least: int = 0
    """Layers without which no worker runs anything, of the owner's policy: protocol.sandbox."""
    cgroup: str = ""
    """A control group in which each worker gets one of its own; empty: none."""
    share_device: bool = False
    """Let workers of several submitters hold one accelerator at a time. Not of the CPU."""
    log_workers: bool = False
    python: str = sys.executable

    def threads_per_worker(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // max(1, self.slots))
