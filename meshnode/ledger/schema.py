"""The two databases of a home: their tables, their migrations, and how a connection is opened.

`ledger.sqlite` holds the one table of signed objects; every commit is fsynced (WAL,
synchronous=FULL) and triggers refuse UPDATE and DELETE. `jobs.sqlite` holds what a node needs to
go on after a SIGKILL (WAL, synchronous=NORMAL: a commit is in the page cache, not on the platter).
Under `store`, which writes, and `load`, which reads.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from meshnode.errors import LocalResource

JOBS_BYTES_MAX = 16 << 30  # of jobs.sqlite; a commit past it fails like a full disk
WAL_BYTES_KEPT = 32 << 20  # a WAL file is cut back to this when it starts anew
WAL_BYTES_MAX = 256 << 20  # past it the writer itself checkpoints, in the way of commits
BUSY_MS = 5_000  # readers never hold a write lock; this bounds a stray sqlite3 shell

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Schema:
    """`migrations[n]` brings a database from `user_version` n to n + 1."""

    file_name: str
    synchronous: str
    page_bytes: int
    migrations: tuple[str, ...]


# Both sides sign the same bytes of an agreement: one digest, two envelopes, and both are needed.
# The signature is the last 64 bytes of an envelope.
LEDGER = Schema(
    "ledger.sqlite",
    "FULL",
    4096,
    (
        """
        CREATE TABLE signed_object(
            digest BLOB NOT NULL CHECK(length(digest) = 32),
            typ TEXT NOT NULL,
            bytes BLOB NOT NULL,
            received_ms INTEGER NOT NULL
        ) STRICT;
        CREATE UNIQUE INDEX signed_object_once ON signed_object(digest, substr(bytes, -64));
        CREATE INDEX signed_object_typ ON signed_object(typ);
        CREATE TRIGGER signed_object_no_update BEFORE UPDATE ON signed_object
            BEGIN SELECT RAISE(ABORT, 'signed objects are never changed'); END;
        CREATE TRIGGER signed_object_no_delete BEFORE DELETE ON signed_object
            BEGIN SELECT RAISE(ABORT, 'signed objects are never deleted'); END;
        """,
    ),
)

# Outputs stand last in their row, so that reading the other columns leaves the overflow pages
# alone. `count` and `first` are no reserved words.
JOBS = Schema(
    "jobs.sqlite",
    "NORMAL",
    8192,
    (
        """
        CREATE TABLE job(
            job_digest BLOB PRIMARY KEY NOT NULL,
            state INTEGER NOT NULL,
            reason INTEGER NOT NULL,
            ended_ms INTEGER,
            spec BLOB NOT NULL,
            request BLOB NOT NULL
        ) STRICT;
        CREATE TABLE task(
            job_digest BLOB NOT NULL,
            first INTEGER NOT NULL,
            count INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            peer BLOB,
            run_first INTEGER NOT NULL,
            run_count INTEGER NOT NULL,
            PRIMARY KEY(job_digest, first, count)
        ) STRICT;
        CREATE TABLE result(
            job_digest BLOB NOT NULL,
            first INTEGER NOT NULL,
            count INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            peer BLOB NOT NULL,
            digests BLOB NOT NULL,
            outputs BLOB NOT NULL,
            PRIMARY KEY(job_digest, first)
        ) STRICT;
        CREATE TABLE held(
            requester BLOB NOT NULL,
            task_id BLOB NOT NULL,
            attempt INTEGER NOT NULL,
            first INTEGER NOT NULL,
            count INTEGER NOT NULL,
            expires_unix_ms INTEGER NOT NULL,
            reason INTEGER NOT NULL,
            offer BLOB NOT NULL,
            lease BLOB NOT NULL,
            outputs BLOB NOT NULL,
            PRIMARY KEY(requester, task_id, attempt, first)
        ) STRICT;
        """,
        # The newest checkpoint of a long job's task; NULL where there is none.
        """
        ALTER TABLE task ADD COLUMN state_id BLOB;
        ALTER TABLE task ADD COLUMN state_bytes INTEGER;
        ALTER TABLE task ADD COLUMN step INTEGER;
        """,
    ),
)


def open_writer(home: Path, schema: Schema, bytes_max: int | None = None) -> sqlite3.Connection:
    """The writing connection, migrated; LocalResource with one clear line if it cannot be."""
    path = home / schema.file_name

    def opened() -> sqlite3.Connection:
        # Made with 0600 before sqlite opens it: the -wal and -shm files take over its mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute(f"PRAGMA page_size={schema.page_bytes}")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={schema.synchronous}")
            # Checkpoints run in a thread of their own: an automatic one would fsync in a commit.
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES_KEPT}")
            # Without it REPLACE deletes past the trigger (sqlite.org/lang_conflict).
            connection.execute("PRAGMA recursive_triggers=ON")
            _migrate(connection, path, schema)
            if bytes_max is not None:
                pages = max(1, bytes_max // schema.page_bytes)
                connection.execute(f"PRAGMA max_page_count={pages}")
        except BaseException:
            connection.close()
            raise
        return connection

    return _clearly(path, opened)


def open_reader(home: Path, schema: Schema) -> sqlite3.Connection | None:
    """A connection that cannot write, also beside a running node; None if nothing is there yet.

    Opened read-write with `query_only`: a read-only one cannot make the -shm file that WAL needs.
    """
    path = home / schema.file_name

    def opened() -> sqlite3.Connection | None:
        if not path.exists() or path.stat().st_size == 0:
            return None
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=rw",
            timeout=BUSY_MS / 1000,
            isolation_level=None,
            uri=True,
            check_same_thread=False,
        )
        try:
            version = _version(connection, path, schema)
            connection.execute("PRAGMA query_only=ON")
        except BaseException:
            connection.close()
            raise
        if version == 0:
            connection.close()
            return None
        return connection

    return _clearly(path, opened)


def _clearly(path: Path, opened: Callable[[], _T]) -> _T:
    try:
        return opened()
    except sqlite3.Error as error:
        raise LocalResource(f"cannot open {path}: {error}") from None
    except OSError as error:
        raise LocalResource(f"cannot open {path}: {error.strerror}") from None


def _version(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(schema.migrations):
        raise LocalResource(f"{path} was written by a newer meshnode; update this one")
    return version


def _migrate(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    for number in range(_version(connection, path, schema), len(schema.migrations)):
        # One transaction a step, its number inside: a crash leaves either version whole.
        connection.executescript(
            f"BEGIN IMMEDIATE;{schema.migrations[number]};PRAGMA user_version={number + 1};COMMIT;"
        )
