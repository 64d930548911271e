"""Reads a home back: what the machine starts from, and results for the client's file.

Every function opens its own connection that cannot write, so a CLI command may read beside a
running node. Blocking: call from a thread where a trio loop runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshnode.protocol.effects import HeldRecord, JobRecord, SignedObject, TaskRecord
from meshnode.protocol.job import JobState
from meshnode.protocol.outbox import Restored, RestoredResult
from meshnode.protocol.types import BlobRef, Digest

from .schema import JOBS, LEDGER, open_reader

READ_ROWS = 64  # rows in memory at once while iterating
ENDED_MS_MAX = 86_400_000  # as long as cars keep results that nobody has accepted
ENDED_JOBS_MAX = 32  # the newest; each costs the machine 37 bytes a unit

# Ended jobs of late come back too: receipts for their last units may still be on their way.
_WANTED = """(
    SELECT job_digest FROM job WHERE state = :running UNION ALL
    SELECT job_digest FROM (
        SELECT job_digest FROM job WHERE state <> :running AND ended_ms > :ended_after
        ORDER BY ended_ms DESC LIMIT :ended_max))"""


def load(home: Path, now_unix_ms: int) -> Restored:
    """All signed objects, jobs that run or lately ended with tasks and results (without outputs),
    held results.

    In the order in which they were stored. Held results past their expiry stay out.
    """
    jobs = open_reader(home, JOBS)
    signed = tuple(signed_objects(home))
    if jobs is None:
        return Restored(signed=signed)
    try:
        jobs.execute("BEGIN")  # one snapshot for the four tables
        which = {
            "running": int(JobState.RUNNING),
            "ended_after": now_unix_ms - ENDED_MS_MAX,
            "ended_max": ENDED_JOBS_MAX,
        }
        return Restored(
            signed=signed,
            jobs=tuple(
                JobRecord(*row)
                for row in jobs.execute(
                    "SELECT job_digest, spec, request, state, reason FROM job"
                    f" WHERE job_digest IN {_WANTED} ORDER BY rowid",
                    which,
                )
            ),
            tasks=tuple(
                _task(row)
                for row in jobs.execute(
                    "SELECT job_digest, first, count, attempt, peer, run_first, run_count,"
                    " state_id, state_bytes, step"
                    f" FROM task WHERE job_digest IN {_WANTED} ORDER BY job_digest, first, count",
                    which,
                )
            ),
            results=tuple(
                RestoredResult(*row)
                for row in jobs.execute(
                    "SELECT job_digest, first, count, attempt, peer, digests"
                    f" FROM result WHERE job_digest IN {_WANTED} ORDER BY job_digest, first",
                    which,
                )
            ),
            held=tuple(
                HeldRecord(*row)
                for row in jobs.execute(
                    "SELECT requester, task_id, attempt, first, count, offer, lease, reason,"
                    " outputs, expires_unix_ms FROM held WHERE expires_unix_ms > ? ORDER BY rowid",
                    (now_unix_ms,),
                )
            ),
        )
    finally:
        jobs.close()


def _task(row: tuple[Any, ...]) -> TaskRecord:
    *fields, state_id, state_bytes, step = row
    fields += [None if state_id is None else BlobRef(state_id, state_bytes), step]
    return TaskRecord(*fields)


def signed_objects(home: Path, *typs: str) -> Iterator[SignedObject]:
    """Signed objects of these types (all, if none is named), in the order they were stored."""
    ledger = open_reader(home, LEDGER)
    if ledger is None:
        return
    try:
        where = f"WHERE typ IN ({','.join('?' * len(typs))})" if typs else ""
        cursor = ledger.execute(
            f"SELECT digest, typ, bytes FROM signed_object {where} ORDER BY rowid", typs
        )
        while rows := cursor.fetchmany(READ_ROWS):
            for row in rows:
                yield SignedObject(*row)
    finally:
        ledger.close()


def job_records(home: Path) -> Iterator[JobRecord]:
    """All jobs, ended ones too, oldest first."""
    jobs = open_reader(home, JOBS)
    if jobs is None:
        return
    try:
        cursor = jobs.execute(
            "SELECT job_digest, spec, request, state, reason FROM job ORDER BY rowid"
        )
        while rows := cursor.fetchmany(READ_ROWS):
            for row in rows:
                yield JobRecord(*row)
    finally:
        jobs.close()


def read_results(home: Path, job_digest: Digest) -> Iterator[tuple[int, int, bytes]]:
    """(first, count, outputs) of a job in unit order, a few rows in memory at a time."""
    jobs = open_reader(home, JOBS)
    if jobs is None:
        return
    try:
        cursor = jobs.execute(
            "SELECT first, count, outputs FROM result WHERE job_digest = ? ORDER BY first",
            (job_digest,),
        )
        while rows := cursor.fetchmany(READ_ROWS):
            yield from rows
    finally:
        jobs.close()
