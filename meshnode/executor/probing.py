"""What this machine can compute: asked of a throw-away child once, then read from disk.

Called by `supervisor`; the measuring is `meshnode.worker.probe`. A kept answer holds while jaxlib,
the CPU and the accelerator's driver are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from meshnode.protocol.events import WorkerClass, WorkerClasses
from meshnode.protocol.types import CLASSES_MAX

from . import wire
from .bounds import PROBE_S_MAX, ExecutorConfig
from .forks import Zygote, ZygoteLost
from .link import open_link

_NOTHING = WorkerClasses((), "", (0, 0), 0, 0)


async def probe(config: ExecutorConfig, zygote: Callable[[], Awaitable[Zygote]]) -> WorkerClasses:
    """The kept answer or a fresh one; without any class if it cannot be had."""
    kept = _read_kept(config)
    if kept is not None and (answer := _parse(kept, config.slots)) is not None:
        return answer
    try:
        body = await _ask(config, await zygote())
    except (ZygoteLost, wire.WireError, OSError, trio.TooSlowError):
        return _NOTHING
    answer = _parse(body, config.slots)
    if answer is None:
        return _NOTHING
    if config.probe_cache is not None:
        _keep(config, config.probe_cache, body)
    return answer


async def _ask(config: ExecutorConfig, zygote: Zygote) -> bytes:
    link, theirs = open_link(wire.PROBED_BYTES_MAX)
    with contextlib.closing(link):
        with theirs:
            child = await zygote.fork("probe", theirs, 0, config.memory_mb_max, config.cgroup)
        try:
            with trio.fail_after(PROBE_S_MAX):
                kind, body = (await link.receive())[0]
            if kind != wire.PROBED:
                raise wire.WireError(f"frame {kind}")
            return body
        finally:
            with trio.CancelScope(shield=True):
                await child.gone()
            os.close(child.pidfd)


def _parse(body: bytes, slots: int) -> WorkerClasses | None:
    try:
        fields: Any = json.loads(body)
        classes = tuple(
            WorkerClass(
                str(row["platform"]),
                str(row["kind"]),
                int(row["memory_mb"]),
                int(row["rate_mflops"]),
                bytes.fromhex(row["class_digest"]),
            )
            for row in fields["classes"][:CLASSES_MAX]
        )
        lowest, highest = fields["jax_window"]
        return WorkerClasses(
            classes,
            str(fields["jaxlib"]),
            (int(lowest), int(highest)),
            int(fields["sandbox_layers"]),
            slots,
        )
    except (ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------- kept


def _machine(config: ExecutorConfig) -> str:
    """Changes when the answer may: jaxlib, CPU, accelerator driver, XLA's flags, and what the
    sandbox depends on: kernel, user and control group."""
    parts = [
        platform.machine(),
        platform.release(),
        str(os.geteuid()),
        config.cgroup,
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("JAX_PLATFORMS", ""),
    ]
    for package in ("jaxlib", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(importlib.metadata.version(package))
    for path in ("/proc/driver/nvidia/version", "/proc/cpuinfo"):
        with contextlib.suppress(OSError):
            lines = Path(path).read_text().splitlines()
            parts += [x for x in lines if not x.startswith(("cpu MHz", "bogomips"))][:32]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def _read_kept(config: ExecutorConfig) -> bytes | None:
    if config.probe_cache is None:
        return None
    try:
        kept = json.loads(config.probe_cache.read_bytes())
        if kept["machine"] != _machine(config):
            return None
        return json.dumps(kept["answer"]).encode()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(config: ExecutorConfig) -> None:
    """A worker was found to be otherwise than the kept answer says."""
    if config.probe_cache is not None:
        config.probe_cache.unlink(missing_ok=True)


def _keep(config: ExecutorConfig, path: Path, body: bytes) -> None:
    kept = {"machine": _machine(config), "answer": json.loads(body)}
    fresh = path.with_suffix(".new")
    with contextlib.suppress(OSError):  # it is measured again next time
        fresh.write_text(json.dumps(kept))
        fresh.replace(path)
