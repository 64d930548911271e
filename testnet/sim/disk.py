"""What a simulated node has stored: survives a crash. Part of a `Site`, filled by `Mesh`."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.protocol import effects as fx
from meshnode.protocol.outbox import Restored, RestoredResult
from meshnode.protocol.types import Digest


@dataclass(slots=True)
class Disk:
    """`keeps` False takes everything and forgets it: a fleet in which nobody crashes."""

    keeps: bool = True
    signed: list[fx.SignedObject] = field(default_factory=list)
    jobs: dict[Digest, fx.JobRecord] = field(default_factory=dict)
    tasks: dict[tuple[Digest, int], fx.TaskRecord] = field(default_factory=dict)
    results: list[fx.ResultRecord] = field(default_factory=list)
    held: dict[tuple[bytes, bytes, int], fx.HeldRecord] = field(default_factory=dict)
    blobs: set[Digest] = field(default_factory=set)  # fetched
    full: bool = False
    _sealed: set[bytes] = field(default_factory=set)

    def store(self, record: fx.Record) -> None:
        if not self.keeps:
            return
        match record:
            case fx.SignedObject():
                if record.sealed not in self._sealed:
                    self._sealed.add(record.sealed)
                    self.signed.append(record)
            case fx.JobRecord():
                self.jobs[record.job_digest] = record
            case fx.TaskRecord():
                self.tasks[record.job_digest, record.first] = record
            case fx.ResultRecord():
                self.results.append(record)
            case fx.HeldRecord():
                self.held[record.requester, record.task_id, record.attempt] = record
            case fx.HeldDropped():
                self.held.pop((record.requester, record.task_id, record.attempt), None)

    def restored(self) -> Restored:
        return Restored(
            tuple(self.signed),
            tuple(self.jobs.values()),
            tuple(self.tasks.values()),
            tuple(
                RestoredResult(r.job_digest, r.first, r.count, r.attempt, r.peer, r.digests)
                for r in self.results
            ),
            tuple(self.held.values()),
        )
