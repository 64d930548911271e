"""Writes the records of many `Persist` effects as one transaction per database.

Called by the journal's writer thread alone; synchronous, knows no trio. What a record means is
the machine's affair: here it becomes a row, and a failure becomes `PersistFailed`.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from meshnode.protocol.effects import (
    HeldDropped,
    HeldRecord,
    JobRecord,
    Persist,
    Record,
    ResultRecord,
    SignedObject,
    TaskRecord,
)
from meshnode.protocol.events import Persisted, PersistFailed
from meshnode.protocol.job import JobState
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Durability

from .checkpoint import checkpoint
from .schema import JOBS, JOBS_BYTES_MAX, LEDGER, WAL_BYTES_MAX, open_writer

CHECKPOINT_BYTES = 8 << 20  # written between two checkpoints of a busy node
PRUNE_ROWS = 64  # result rows deleted in one step, so that a commit never waits long behind it
VACUUM_PAGES = 256  # freed pages given back to the file system in one step
FREE_BYTES_MIN = 1 << 20  # an I/O error with less than this free is a full disk

_SIGNED = "INSERT INTO signed_object(digest,typ,bytes,received_ms) VALUES(?,?,?,?)" + (
    " ON CONFLICT(digest, substr(bytes, -64)) DO NOTHING"  # one object of one signer is kept once
)
_JOB = (
    "INSERT INTO job(job_digest,state,reason,ended_ms,spec,request) VALUES(?,?,?,?,?,?)"
    " ON CONFLICT(job_digest) DO UPDATE SET state=excluded.state, reason=excluded.reason,"
    " ended_ms=coalesce(ended_ms,excluded.ended_ms), spec=excluded.spec, request=excluded.request"
)
_TASK = "INSERT OR REPLACE INTO task VALUES(?,?,?,?,?,?,?,?,?,?)"
# A unit is accepted once, whoever ran it: the first outputs stay.
_RESULT = "INSERT INTO result VALUES(?,?,?,?,?,?,?) ON CONFLICT(job_digest,first) DO NOTHING"
_HELD = "INSERT OR REPLACE INTO held VALUES(?,?,?,?,?,?,?,?,?,?)"
_HELD_DROPPED = "DELETE FROM held WHERE requester=? AND task_id=? AND attempt=?"

Outcome = Persisted | PersistFailed


class Store:
    """The two writing connections of a home. The home must be locked by the caller."""

    def __init__(self, home: Path, jobs_bytes_max: int = JOBS_BYTES_MAX) -> None:
        self._home = home
        self._ledger = open_writer(home, LEDGER)
        try:
            self._jobs = open_writer(home, JOBS, jobs_bytes_max)
        except BaseException:
            self._ledger.close()
            raise
        self._jobs_durability = Durability.PROCESS
        self._unchecked_bytes = 0  # written since the last checkpoint, about

    def close(self) -> None:
        """A clean close checkpoints and removes the WAL files."""
        self._ledger.close()
        self._jobs.close()

    def commit(self, batch: Sequence[Persist]) -> list[Outcome]:
        """All of the batch together, or, if that fails, each alone; outcomes in batch order."""
        error = self._write(batch)
        if error is None:
            return [Persisted(persist.seq) for persist in batch]
        if len(batch) == 1:
            return [PersistFailed(batch[0].seq, self._reason(error))]
        # One record too large for a nearly full disk must not take its neighbours along.
        return [outcome for persist in batch for outcome in self.commit((persist,))]

    def _write(self, batch: Sequence[Persist]) -> Exception | None:
        received_ms = time.time_ns() // 1_000_000
        signed: list[tuple[str, tuple[object, ...]]] = []
        jobs: list[tuple[str, tuple[object, ...]]] = []
        durability = Durability.PROCESS
        for persist in batch:
            before = len(jobs)
            for record in persist.records:
                rows = signed if isinstance(record, SignedObject) else jobs
                rows.append(_row(record, received_ms))
            if len(jobs) > before:
                durability = max(durability, persist.durability)
        try:
            # Signed objects first: a failure between the two leaves an object that nobody was
            # promised, which is harmless; the other way round a job would cite what is not there.
            _transact(self._ledger, signed)
            if jobs and durability is not self._jobs_durability:
                level = "FULL" if durability is Durability.POWER else "NORMAL"
                self._jobs.execute(f"PRAGMA synchronous={level}")
                self._jobs_durability = durability
            _transact(self._jobs, jobs)
        except (sqlite3.Error, OverflowError) as error:
            return error
        self._unchecked_bytes += sum(_size(row) for _, row in signed)
        self._unchecked_bytes += sum(_size(row) for _, row in jobs)
        return None

    def _reason(self, error: Exception) -> Reason:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return Reason.DISK_FULL
        if code == sqlite3.SQLITE_IOERR:
            # Growing the -shm file on a full disk reports IOERR_SHMSIZE and not FULL.
            room = os.statvfs(self._home)
            if room.f_bavail * room.f_frsize < FREE_BYTES_MIN:
                return Reason.DISK_FULL
        return Reason.STORAGE

    # ---- chores, while nothing waits

    def checkpoint_due(self, idle: bool) -> bool:
        """True once after every CHECKPOINT_BYTES written, when idle after any byte."""
        due = self._unchecked_bytes > (0 if idle else CHECKPOINT_BYTES)
        if due:
            self._unchecked_bytes = 0
        return due

    @property
    def dirty(self) -> bool:
        """Something was written since the last checkpoint was due."""
        return self._unchecked_bytes > 0

    def checkpoint_if_swollen(self) -> None:
        """Checkpoint here, in the way of commits, if the other thread does not keep up."""
        for schema, connection in ((LEDGER, self._ledger), (JOBS, self._jobs)):
            path = self._home / f"{schema.file_name}-wal"
            if path.exists() and path.stat().st_size > WAL_BYTES_MAX:
                checkpoint(connection)

    def prune_step(self, ended_before_unix_ms: int, now_unix_ms: int) -> bool:
        """Delete a bounded piece of the oldest ended job or of expired held results.

        False when nothing is left to delete. Signed objects are never pruned.
        """
        try:
            return self._prune_step(ended_before_unix_ms, now_unix_ms)
        except sqlite3.Error:
            if self._jobs.in_transaction:
                self._jobs.execute("ROLLBACK")
            return False  # a later prune tries again

    def _prune_step(self, ended_before_unix_ms: int, now_unix_ms: int) -> bool:
        held = self._jobs.execute(
            "DELETE FROM held WHERE rowid IN"
            " (SELECT rowid FROM held WHERE expires_unix_ms <= ? LIMIT ?)",
            (now_unix_ms, PRUNE_ROWS),
        ).rowcount
        oldest = self._jobs.execute(
            "SELECT job_digest FROM job WHERE ended_ms < ? ORDER BY ended_ms LIMIT 1",
            (ended_before_unix_ms,),
        ).fetchone()
        if oldest is not None:
            deleted = self._jobs.execute(
                "DELETE FROM result WHERE rowid IN"
                " (SELECT rowid FROM result WHERE job_digest = ? LIMIT ?)",
                (oldest[0], PRUNE_ROWS),
            ).rowcount
            if deleted < PRUNE_ROWS:
                # The job row last: a crash in between leaves it to be found again.
                rows = [("DELETE FROM task WHERE job_digest = ?", oldest)]
                _transact(self._jobs, [*rows, ("DELETE FROM job WHERE job_digest = ?", oldest)])
        free = self._jobs.execute("PRAGMA freelist_count").fetchone()[0]
        if free:
            self._jobs.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
        self._unchecked_bytes += 1
        return bool(held or oldest or free)


def _transact(connection: sqlite3.Connection, rows: Sequence[tuple[str, Sequence[object]]]) -> None:
    """All rows or none. Each statement hands the GIL over twice, so a lone row is one statement."""
    if not rows:
        return
    if len(rows) == 1:
        connection.execute(rows[0][0], rows[0][1])
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement, row in rows:
            connection.execute(statement, row)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # sqlite rolls back by itself on some errors
            connection.execute("ROLLBACK")
        raise


def _size(row: Sequence[object]) -> int:
    return 64 + sum(len(value) for value in row if isinstance(value, bytes))


def _row(record: Record, received_ms: int) -> tuple[str, tuple[object, ...]]:
    match record:
        case SignedObject():
            return _SIGNED, (record.digest, record.typ, record.sealed, received_ms)
        case JobRecord():
            ended_ms = None if record.state == JobState.RUNNING else received_ms
            return _JOB, (
                record.job_digest,
                int(record.state),
                int(record.reason),
                ended_ms,
                record.spec,
                record.request,
            )
        case TaskRecord():
            return _TASK, (
                record.job_digest,
                record.first,
                record.count,
                record.attempt,
                record.peer,
                record.run_first,
                record.run_count,
                None if record.state is None else record.state.blob_id,
                None if record.state is None else record.state.size,
                record.step,
            )
        case ResultRecord():
            return _RESULT, (
                record.job_digest,
                record.first,
                record.count,
                record.attempt,
                record.peer,
                record.digests,
                record.outputs,
            )
        case HeldRecord():
            return _HELD, (
                record.requester,
                record.task_id,
                record.attempt,
                record.first,
                record.count,
                record.expires_unix_ms,
                int(record.reason),
                record.offer,
                record.lease,
                record.outputs,
            )
        case HeldDropped():
            return _HELD_DROPPED, (record.requester, record.task_id, record.attempt)
