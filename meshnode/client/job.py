"""Handles on work: a job in the shape of concurrent.futures, and what happened to it.

Made by `blocking.Mesh`; a job goes on without its handle.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from meshnode.errors import MeshError, UsageError
from meshnode.node.failures import error_of_reason
from meshnode.protocol.types import ArraySpec, array_bytes

from .orders import Array, split_outputs

if TYPE_CHECKING:
    from .blocking import Mesh

ENDED: Final = frozenset({"done", "failed", "cancelled"})
JOBS_WAITED_MAX: Final = 32


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that happened to a job.

    kinds: `job` (state, reason, units, done), `attempt` (task, attempt, peer, state, reason, first,
    count, done, step: the one that it goes on from), `units` (first, count, peer, attempt, and
    outputs if asked for), `announced`, `ended` (reason, text, peer): how a car said that its run
    ended; of long jobs `watch` (unit, step, steps, values, peer) and `checkpoint` (task, step,
    peer): its state after so many steps is here.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    unix_ms: int = 0  # when, in `logs`

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        return cls(str(plain["kind"]), dict(plain["fields"]), int(plain.get("unix_ms", 0)))


class Rows:
    """Units as they come, in any order -> each unit's result, in order."""

    def __init__(self, outs: tuple[ArraySpec, ...], units: int) -> None:
        if not units:
            raise UsageError("only a job that was submitted here can be iterated over")
        self._outs = outs
        self._units = units
        self._size = sum(map(array_bytes, outs))
        self._early: dict[int, bytes] = {}
        self._at = 0

    def of(self, notice: Notice) -> Iterator[Any]:
        """Of a watch with outputs: the results that nothing before them keeps back any more."""
        if notice.kind != "units":
            return
        first, outputs = notice.fields["first"], notice.fields["outputs"]
        for index in range(notice.fields["count"]):
            self._early[first + index] = outputs[index * self._size : (index + 1) * self._size]
        while self._at in self._early:
            row = self._row(split_outputs(self._early.pop(self._at), self._outs, 1))
            self._at += 1
            yield row

    def rest(self, arrays: list[Array]) -> Iterator[Any]:
        """What came before the watch did, out of the whole result."""
        for unit in range(self._at, self._units):
            yield self._row([array[unit : unit + 1] for array in arrays])

    @staticmethod
    def _row(arrays: list[Array]) -> Any:
        row = [array[0] for array in arrays]
        return row[0] if len(row) == 1 else tuple(row)


class Job:
    """A job of the node, in the shape of a concurrent.futures.Future."""

    def __init__(
        self, mesh: Mesh, job_id: bytes, outs: tuple[ArraySpec, ...] = (), units: int = 0
    ) -> None:
        self.mesh = mesh
        self.job_id = job_id
        self._outs = outs  # known to whoever submitted it, for iterating over its units
        self._units = units

    def __iter__(self) -> Iterator[Any]:
        """Each unit's result, in order, as soon as it and all before it are here."""
        rows = Rows(self._outs, self._units)
        for notice in self.mesh.watch(self.job_id, outputs=True):
            yield from rows.of(notice)
        yield from rows.rest(self.arrays())  # which also raises what went wrong

    def state(self) -> str:
        """running | done | failed | cancelled"""
        state: str = self.mesh.show(self.job_id)["state"]
        return state

    def done(self) -> bool:
        return self.state() in ENDED

    def running(self) -> bool:
        return not self.done()

    def cancelled(self) -> bool:
        return self.state() == "cancelled"

    def cancel(self) -> bool:
        """True if the job ended by this."""
        self.mesh.cancel(self.job_id)
        return self.cancelled()

    def watch(self) -> Iterator[Notice]:
        return self.mesh.watch(self.job_id)

    def explain(self) -> dict[str, Any]:
        """Why its runs wait or went where they went: `Mesh.explain`."""
        return self.mesh.explain(self.job_id)

    def arrays(self, timeout_s: float | None = None) -> list[Array]:
        """One array [units, *shape] per output."""
        return self.mesh.result(self.job_id, timeout_s)

    def result(self, timeout_s: float | None = None) -> Any:
        """As the kernel's host side presents it."""
        return self.mesh.finish(self.job_id, timeout_s)

    def exception(self, timeout_s: float | None = None) -> MeshError | None:
        """None if the job is done well; TimedOut is raised if it has not ended by then."""
        answer = self.mesh.wait(self.job_id, timeout_s)
        return None if answer["state"] == "done" else error_of_reason(answer["reason"])

    def __repr__(self) -> str:
        return f"<Job {self.job_id.hex()[:8]}>"


def find(jobs: Sequence[dict[str, Any]], prefix: str) -> bytes:
    """The id of the one job whose id in hex starts so; UsageError if none or several do."""
    prefix = prefix.lower()
    found = [job["job_id"] for job in jobs if job["job_id"].hex().startswith(prefix)]
    if len(found) != 1 or not prefix:
        many = "no job" if not found else f"{len(found)} jobs"
        raise UsageError(f"{many} of this node begin with {prefix!r}; see `mesh jobs`")
    job_id: bytes = found[0]
    return job_id


def as_completed(jobs: Sequence[Job]) -> Iterator[Job]:
    """The jobs as they end; one thread waits for each of at most `JOBS_WAITED_MAX` at a time."""
    with concurrent.futures.ThreadPoolExecutor(min(len(jobs), JOBS_WAITED_MAX) or 1) as pool:
        waits = {pool.submit(job.mesh.wait, job.job_id): job for job in jobs}
        for wait in concurrent.futures.as_completed(waits):
            wait.result()
            yield waits[wait]
