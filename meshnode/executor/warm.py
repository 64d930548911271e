"""The executor's zygote: started for whoever needs it first, and ended when nobody has for a while.

Used by `supervisor`, which counts as a user each worker, each probe and each offer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .bounds import ExecutorConfig
from .forks import Zygote, open_zygote


class WarmZygote:
    def __init__(self, config: ExecutorConfig, nursery: trio.Nursery) -> None:
        self._config = config
        self._nursery = nursery
        self._zygote: Zygote | None = None
        self._scope: trio.CancelScope | None = None
        self._lock = trio.Lock()
        self._users = 0
        self._used_s = trio.current_time()

    @property
    def ready(self) -> bool:
        """Who asks now waits for no import of jax."""
        return self._zygote is not None

    @property
    def cold(self) -> bool:
        """Nobody has asked for one."""
        return self._zygote is None and not self._lock.locked()

    async def get(self) -> Zygote:
        """ZygoteLost if there is none to be had."""
        async with self._lock:
            scope = self._scope
            if self._zygote is None or self._zygote.lost or (scope and scope.cancel_called):
                self._zygote = await open_zygote(self._config)
                self._scope = trio.CancelScope()
                self._nursery.start_soon(self._tend, self._zygote, self._scope)
            assert self._scope is not None
            self._scope.deadline = float("inf")
            return self._zygote

    @contextmanager
    def use(self) -> Iterator[None]:
        """It stays for the block, and then until it has been idle for long enough."""
        self._users += 1
        self.touch()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users and self._scope is not None:
                self._scope.deadline = self._used_s + self._config.idle_stop_s

    def touch(self) -> None:
        self._used_s = trio.current_time()

    async def _tend(self, zygote: Zygote, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await zygote.tend()
        finally:
            zygote.abandon()
            if self._zygote is zygote:
                self._zygote = None
            with trio.CancelScope(shield=True):
                await zygote.close()
