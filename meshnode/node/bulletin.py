"""What the machine notifies, on its way to people and clients: subscribers now, a log for later.

`driver` posts, `running` and `control` subscribe. Posting calls the subscribers there and then: a
task switch per notice would be most of the latency of a short call. A subscriber that cannot keep
up is dropped with an error of its own; nobody else waits for it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import trio

from meshnode.errors import LocalResource
from meshnode.protocol.effects import Notice

LOGGED_JOBS_MAX: Final = 256
LOGGED_NOTICES_MAX: Final = 1024
"""Of one job, and of the node itself; the oldest go."""
WATCH_NOTICES_MAX: Final = 16_384
WATCH_BYTES_MAX: Final = 64 << 20
SUBSCRIBERS_MAX: Final = 4_096
ANSWERS: Final = frozenset({"submitted", "refused"})
ENDED_STATES: Final = frozenset({"done", "failed", "cancelled"})

Push: TypeAlias = Callable[[Notice], None]
Answer: TypeAlias = Callable[[bytes, Notice], None]  # subject: the job's id


def field_of(notice: Notice, name: str) -> Any:
    """The value of a field, None if there is none of that name."""
    for key, value in notice.fields:
        if key == name:
            return value
    return None


def has_ended(notice: Notice) -> bool:
    return notice.kind == "job" and field_of(notice, "state") in ENDED_STATES


@dataclass(frozen=True, slots=True)
class Logged:
    unix_ms: int
    notice: Notice


class Bulletin:
    """By subject: a job id, a peer, or b"" for the node itself."""

    def __init__(self) -> None:
        self._subscribers: dict[bytes, list[Push]] = {}
        self._subscribed = 0
        self._logs: OrderedDict[bytes, deque[Logged]] = OrderedDict()
        self._last_job: OrderedDict[bytes, Notice] = OrderedDict()
        self.asked: dict[int, Answer] = {}
        """Who is told, once, what the machine says to a `Submit`, by request id."""

    def post(self, subject: bytes, notice: Notice) -> None:
        if notice.kind in ANSWERS:
            answer = self.asked.pop(field_of(notice, "request_id"), None)
            if answer is not None:
                answer(subject, notice)
            return
        self._log(subject, notice)
        pushes = self._subscribers.get(subject)
        if pushes:
            for push in tuple(pushes):
                push(notice)

    @contextmanager
    def subscribed(self, subject: bytes, push: Push) -> Iterator[None]:
        if self._subscribed >= SUBSCRIBERS_MAX:
            raise LocalResource(f"{SUBSCRIBERS_MAX} watchers follow this node's jobs already")
        pushes = self._subscribers.setdefault(subject, [])
        pushes.append(push)
        self._subscribed += 1
        try:
            yield
        finally:
            pushes.remove(push)
            self._subscribed -= 1
            if not pushes and self._subscribers.get(subject) is pushes:
                del self._subscribers[subject]

    def log(self, subject: bytes) -> tuple[Logged, ...]:
        return tuple(self._logs.get(subject, ()))

    def job_notice(self, job_id: bytes) -> Notice | None:
        """The newest `job` notice, if this process has seen one."""
        return self._last_job.get(job_id)

    def _log(self, subject: bytes, notice: Notice) -> None:
        log = self._logs.get(subject)
        if log is None:
            log = self._logs[subject] = deque(maxlen=LOGGED_NOTICES_MAX)
            while len(self._logs) > LOGGED_JOBS_MAX:
                del self._logs[next(key for key in self._logs if key)]
        if notice.kind == "units":  # results are kept by the ledger or not at all
            plain = tuple(pair for pair in notice.fields if pair[0] != "outputs")
            log.append(Logged(time.time_ns() // 1_000_000, Notice(notice.kind, plain)))
            return
        if notice.kind == "watch":  # ten a second, and each replaces the one before
            return
        if notice.kind == "job":
            self._last_job[subject] = notice
            while len(self._last_job) > LOGGED_JOBS_MAX:
                self._last_job.popitem(last=False)
            if log and log[-1].notice == notice:
                return
        log.append(Logged(time.time_ns() // 1_000_000, notice))


class Watch:
    """A bounded queue of notices for one reader; iterate it until the job has ended."""

    def __init__(self) -> None:
        self._queue: deque[Notice] = deque()
        self._bytes = 0
        self._wake = trio.Event()
        self._lost = False
        self._ended = False

    def push(self, notice: Notice) -> None:
        if self._lost or self._ended:
            return
        size = sum(len(value) for _, value in notice.fields if isinstance(value, bytes))
        if len(self._queue) >= WATCH_NOTICES_MAX or self._bytes + size > WATCH_BYTES_MAX:
            self._lost = True
            self._queue.clear()
        else:
            self._queue.append(notice)
            self._bytes += size
            self._ended = has_ended(notice)
        self._wake.set()

    async def notices(self) -> AsyncGenerator[Notice, None]:
        while True:
            while self._queue:
                notice = self._queue.popleft()
                self._bytes -= sum(len(v) for _, v in notice.fields if isinstance(v, bytes))
                yield notice
                if has_ended(notice):
                    return
            if self._lost:
                raise LocalResource(
                    "the job's notices were read too slowly, this watch is over; watch again"
                )
            self._wake = trio.Event()
            await self._wake.wait()
