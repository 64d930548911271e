"""A program's machine code, from the cache or from a compile-only worker.

Asked by `supervisor` before it loads a program into a worker, and when a worker wants a loop over
many units. A compile-only worker is forked for one artifact, executes nothing, says one frame and
is killed: so the cache holds no word of a process that ran anybody's code. It has validated what
it compiled, so machine code out of the cache needs no second look. It does parse hostile bytes,
confined like any worker, so an entry counts for the artifact that it was made of and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import cbor2
import trio

from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest

from . import wire
from .admission import LOAD_REFUSALS, Refused
from .bounds import ExecutorConfig
from .cache import Entry, ExecutableCache, Figures
from .forks import Zygote
from .link import Link, open_link

_REASONS: Final = {int(reason): reason for reason in LOAD_REFUSALS}


class Compiler:
    """One per executor."""

    def __init__(
        self,
        config: ExecutorConfig,
        cache: ExecutableCache,
        zygote: Callable[[], Awaitable[Zygote]],
        check_layers: Callable[[int], None],
    ) -> None:
        """`check_layers`: Refused if a worker with these sandbox layers may not run here."""
        self._config = config
        self._cache = cache
        self._zygote = zygote
        self._check_layers = check_layers
        self._locks: dict[bytes, tuple[trio.Lock, int]] = {}
        self.compiles = 0
        """Compile-only workers started so far."""

    async def executable(
        self, artifact: Digest, load: wire.Load, environment: bytes
    ) -> tuple[Entry | None, Figures]:
        """The executable (the caller closes it) and its figures; without one where the backend
        cannot serialise. Refused if the program is refused; ZygoteLost."""
        key = key_of(artifact, load, environment)
        lock, users = self._locks.get(key, (trio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:  # two workers with one program: one compile
                entry = await trio.to_thread.run_sync(self._cache.open, key)
                if entry is not None:
                    return entry, entry.figures
                figures, executable = await self._compile(load)
                if not executable:
                    return None, figures
                entry = await trio.to_thread.run_sync(self._cache.put, key, figures, executable)
                return entry, figures
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = lock, users - 1

    async def drop(self, artifact: Digest, load: wire.Load, environment: bytes) -> None:
        await trio.to_thread.run_sync(self._cache.drop, key_of(artifact, load, environment))

    async def _compile(self, load: wire.Load) -> tuple[Figures, bytes]:
        zygote = await self._zygote()
        link, theirs = open_link(wire.COMPILED_BYTES_MAX)
        with contextlib.closing(link):
            with theirs:
                child = await zygote.fork(
                    "compile",
                    theirs,
                    self._config.threads_per_worker(),
                    load.memory_mb_max,
                    self._config.cgroup,
                )
            self.compiles += 1
            try:
                return await self._ask(link, load)
            except (OSError, wire.WireError) as error:
                text = str(error) if isinstance(error, wire.WireError) else await child.ending()
                raise Refused(Reason.WORKER_DIED, f"compiling: {text}") from error
            finally:
                with trio.CancelScope(shield=True):
                    await child.gone()
                os.close(child.pidfd)

    async def _ask(self, link: Link, load: wire.Load) -> tuple[Figures, bytes]:
        ready = False
        while True:
            for kind, body in await link.receive():
                if kind == wire.READY and len(body) == wire.READY_BODY.size and not ready:
                    self._check_layers(wire.READY_BODY.unpack(body)[0])
                    ready = True
                    await link.send(wire.encode_load(load))
                elif kind == wire.COMPILED and ready and len(body) >= wire.FIGURES.size:
                    figures = Figures(*wire.FIGURES.unpack_from(body))
                    return figures, body[wire.FIGURES.size :]
                elif kind == wire.ENDED:
                    _, code, _, text = wire.decode_ended(body)
                    if code not in _REASONS:
                        raise wire.WireError(f"reason {code}")
                    raise Refused(_REASONS[code], text)
                else:
                    raise wire.WireError(f"frame {kind}")


def key_of(artifact: Digest, load: wire.Load, environment: bytes) -> bytes:
    """SHA-256 over everything that the machine code depends on, the artifact first."""
    plain = replace(load, artifact=b"", memory_mb_max=0, executable=False)
    return hashlib.sha256(cbor2.dumps([artifact, wire.encode_load(plain), environment])).digest()
