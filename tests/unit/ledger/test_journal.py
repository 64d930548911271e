"""The journal as the driver uses it: outcomes in order, what survives, what a full disk does."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import LocalProtocolError, LocalResource
from meshnode.ledger import journal as journal_module
from meshnode.ledger.journal import Journal, open_journal
from meshnode.ledger.load import (
    ENDED_JOBS_MAX,
    ENDED_MS_MAX,
    job_records,
    load,
    read_results,
    signed_objects,
)
from meshnode.ledger.lock import hold_home
from meshnode.ledger.schema import JOBS, LEDGER, open_reader, open_writer
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
from meshnode.protocol.outbox import Restored, RestoredResult
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import BlobRef, Digest, Durability, Peer

PEER = Peer(bytes(38))
PROCESS, POWER = Durability.PROCESS, Durability.POWER


def digest(number: int) -> Digest:
    return Digest(number.to_bytes(32, "big"))


def job(number: int, state: JobState = JobState.RUNNING) -> JobRecord:
    return JobRecord(digest(number), b"spec", b"request", state, 0)


def task(job_number: int, first: int, attempt: int = 0, step: int | None = None) -> TaskRecord:
    """With a checkpoint after `step` steps, if any."""
    state = None if step is None else BlobRef(digest(step), 4_096)
    return TaskRecord(digest(job_number), first, 8, attempt, PEER, first, 8, state, step)


def result(job_number: int, first: int, outputs: bytes = b"out") -> ResultRecord:
    return ResultRecord(digest(job_number), first, 8, 0, PEER, bytes(32), outputs)


def held(attempt: int, expires: int = 2_000) -> HeldRecord:
    return HeldRecord(PEER, b"t" * 16, attempt, 0, 8, b"offer", b"lease", 64, b"out", expires)


def signed(number: int, typ: str = "mesh-receipt/1") -> SignedObject:
    return SignedObject(digest(number), typ, b"sealed %d" % number)


async def outcomes(journal: Journal, count: int) -> list[Persisted | PersistFailed]:
    with trio.fail_after(20):
        return [await journal.events.receive() for _ in range(count)]


def write(home: Path, *records: Record, durability: Durability = PROCESS) -> None:
    """Open, persist, close: the next reader sees a node that was stopped."""

    async def main() -> None:
        async with open_journal(home) as journal:
            journal.persist(Persist(1, records, durability))
            assert await outcomes(journal, 1) == [Persisted(1)]

    trio.run(main)


def test_outcomes_come_in_the_order_of_the_calls(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path) as journal:
            for seq in range(500):
                durability = POWER if seq % 7 == 0 else PROCESS
                journal.persist(Persist(seq, (signed(seq), task(1, seq)), durability))
            assert await outcomes(journal, 500) == [Persisted(seq) for seq in range(500)]

    trio.run(main)
    assert [obj.digest for obj in signed_objects(tmp_path)] == [digest(n) for n in range(500)]


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    records = (
        signed(1, "mesh-agreement/1"),
        signed(2),
        job(1),
        job(2, JobState.DONE),
        task(1, 0, attempt=0),
        task(1, 0, attempt=1),
        task(1, 8, step=40),
        task(1, 8, step=50),
        task(1, 16, step=60),
        task(1, 16, attempt=1),  # which began at the beginning
        task(2, 0),
        result(1, 8, b"b"),
        result(1, 0, b"a"),
        result(1, 0, b"the second acceptance of a unit is no acceptance"),
        result(2, 0),
        held(0),
        held(1),
        held(2, expires=999),
        HeldDropped(PEER, b"t" * 16, 0),
    )
    write(tmp_path, *records)
    restored = load(tmp_path, now_unix_ms=1_000)
    assert restored == Restored(
        signed=(signed(1, "mesh-agreement/1"), signed(2)),
        jobs=(job(1), job(2, JobState.DONE)),
        tasks=(task(1, 0, attempt=1), task(1, 8, step=50), task(1, 16, attempt=1), task(2, 0)),
        results=tuple(
            RestoredResult(digest(number), first, 8, 0, PEER, bytes(32))
            for number, first in ((1, 0), (1, 8), (2, 0))
        ),
        held=(held(1),),
    )
    assert list(read_results(tmp_path, digest(1))) == [(0, 8, b"a"), (8, 8, b"b")]
    assert list(signed_objects(tmp_path, "mesh-receipt/1")) == [signed(2)]
    assert list(job_records(tmp_path)) == [job(1), job(2, JobState.DONE)]


def test_jobs_that_ended_long_ago_stay_on_disk(tmp_path: Path) -> None:
    """Late receipts are checked against lately ended jobs: a day's, and a bounded number."""
    many = [job(number, JobState.DONE) for number in range(2, ENDED_JOBS_MAX + 3)]
    write(tmp_path, job(1), task(1, 0), job(2, JobState.DONE), task(2, 0), result(2, 0), *many)
    now_ms = time.time_ns() // 1_000_000
    late = load(tmp_path, now_ms)
    assert job(1) in late.jobs and len(late.jobs) == 1 + ENDED_JOBS_MAX
    assert load(tmp_path, now_ms + ENDED_MS_MAX + 60_000) == Restored(
        jobs=(job(1),), tasks=(task(1, 0),)
    )


def test_an_empty_home_loads_as_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, 0) == Restored()
    assert list(read_results(tmp_path, digest(1))) == []
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_a_running_node(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path) as journal:
            journal.persist(Persist(1, (signed(1), job(1)), PROCESS))
            await outcomes(journal, 1)
            assert load(tmp_path, 0).jobs == (job(1),)

    trio.run(main)


def test_signed_objects_are_neither_changed_nor_deleted(tmp_path: Path) -> None:
    write(tmp_path, signed(1), durability=POWER)
    ledger = open_writer(tmp_path, LEDGER)
    for statement in (
        "UPDATE signed_object SET bytes = x'00'",
        "DELETE FROM signed_object",
        "REPLACE INTO signed_object SELECT digest, typ, bytes, 0 FROM signed_object",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            ledger.execute(statement)
    ledger.close()
    # Again the same is once; the same payload under another signature is an agreement's other half.
    other = SignedObject(digest(1), "mesh-receipt/1", b"another envelope")
    write(tmp_path, signed(1), other, other)
    assert list(signed_objects(tmp_path)) == [signed(1), other]


def test_levels_of_durability_and_modes(tmp_path: Path) -> None:
    write(tmp_path, signed(1), job(1), durability=POWER)
    for schema, level in ((LEDGER, 2), (JOBS, 1)):
        connection = open_writer(tmp_path, schema)
        assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        version = connection.execute("PRAGMA user_version").fetchone()
        assert version == (len(schema.migrations),)
        for suffix in ("", "-wal", "-shm"):
            mode = (tmp_path / f"{schema.file_name}{suffix}").stat().st_mode
            assert mode & 0o777 == 0o600
        connection.close()


def test_a_full_disk_fails_the_large_record_and_not_its_neighbours(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path, jobs_bytes_max=1 << 20) as journal:
            journal.persist(Persist(1, (job(1),), PROCESS))
            journal.persist(Persist(2, (result(1, 0, bytes(2 << 20)),), PROCESS))
            journal.persist(Persist(3, (signed(1), task(1, 0)), PROCESS))
            assert await outcomes(journal, 3) == [
                Persisted(1),
                PersistFailed(2, Reason.DISK_FULL),
                Persisted(3),
            ]

    trio.run(main)
    restored = load(tmp_path, 0)
    assert (len(restored.jobs), len(restored.tasks), len(restored.results)) == (1, 1, 0)


def test_a_record_that_sqlite_refuses_is_an_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path) as journal:
            journal.persist(Persist(1, (task(1, 1 << 70), job(1)), PROCESS))
            journal.persist(Persist(2, (SignedObject(Digest(b"short"), "t", b""),), POWER))
            journal.persist(Persist(3, (job(2),), PROCESS))
            assert await outcomes(journal, 3) == [
                PersistFailed(1, Reason.STORAGE),
                PersistFailed(2, Reason.STORAGE),
                Persisted(3),
            ]

    trio.run(main)
    assert load(tmp_path, 0).jobs == (job(2),)  # nothing of a failed persist is there


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PENDING_MAX", 4)
    monkeypatch.setattr(journal_module, "REFUSED_MAX", 2)

    async def main() -> None:
        async with open_journal(tmp_path) as journal:
            for seq in range(6):  # no checkpoint of trio in between: nothing is answered yet
                journal.persist(Persist(seq, (job(seq),), PROCESS))
            with pytest.raises(LocalProtocolError, match="not being read"):
                journal.persist(Persist(6, (job(6),), PROCESS))
            got = await outcomes(journal, 6)
            assert [e.seq for e in got if isinstance(e, PersistFailed)] == [4, 5]
            assert [e.seq for e in got if isinstance(e, Persisted)] == [0, 1, 2, 3]
            journal.persist(Persist(7, (job(7),), PROCESS))
            assert await outcomes(journal, 1) == [Persisted(7)]

    trio.run(main)


@pytest.mark.parametrize("cancelled", [False, True])
def test_leaving_writes_what_waits(tmp_path: Path, cancelled: bool) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            async with open_journal(tmp_path) as journal:
                for seq in range(100):
                    journal.persist(Persist(seq, (job(seq),), PROCESS))
                if cancelled:
                    scope.cancel()
                    await trio.sleep_forever()
        with pytest.raises(LocalProtocolError):
            journal.persist(Persist(100, (job(100),), PROCESS))
        assert await outcomes(journal, 100) == [Persisted(seq) for seq in range(100)]
        with pytest.raises(trio.EndOfChannel):
            await journal.events.receive()

    trio.run(main)
    assert len(load(tmp_path, 0).jobs) == 100


KILLED = """
import os, sys, trio
from pathlib import Path
from meshnode.ledger.journal import open_journal
from meshnode.protocol.effects import JobRecord, Persist
from meshnode.protocol.types import Digest, Durability

async def main():
    async with open_journal(Path(sys.argv[1])) as journal:
        for seq in range(1_000_000):
            record = JobRecord(Digest(seq.to_bytes(32, "big")), b"s", b"r", 0, 0)
            journal.persist(Persist(seq, (record,), Durability.PROCESS))
            os.write(1, b"%d\\n" % (await journal.events.receive()).seq)

trio.run(main)
"""


def test_what_was_persisted_survives_a_sigkill_and_the_lock_does_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(200):
            last = int(process.stdout.readline())
        with pytest.raises(LocalResource, match=f"process {process.pid}"), hold_home(tmp_path):
            pass
        process.kill()
        said = [last, *(int(line) for line in process.stdout if line.endswith(b"\n"))]
    stored = {record.job_digest for record in load(tmp_path, 0).jobs}
    assert stored >= {digest(seq) for seq in range(said[-1] + 1)}
    write(tmp_path, job(1 << 40))


def test_a_second_journal_on_a_home_names_the_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path):
            with pytest.raises(LocalResource, match=f"process {os.getpid()}"):
                async with open_journal(tmp_path):
                    pass

    trio.run(main)


def test_a_newer_or_broken_database_is_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path, job(1))
    connection = open_writer(tmp_path, JOBS)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(LocalResource, match="newer meshnode"):
        load(tmp_path, 0)
    (tmp_path / JOBS.file_name).write_bytes(b"not a database" * 1000)
    with pytest.raises(LocalResource, match=r"cannot open .*jobs\.sqlite"):
        write(tmp_path, job(1))
    with pytest.raises(LocalResource, match="cannot use"):
        write(tmp_path / "nowhere", job(1))


def test_a_home_from_before_checkpoints_were_stored_goes_on(tmp_path: Path) -> None:
    old = open_writer(tmp_path, replace(JOBS, migrations=JOBS.migrations[:1]))
    assert old.execute("PRAGMA user_version").fetchone() == (1,)
    old.execute("INSERT INTO job VALUES(?,0,0,NULL,x'01',x'02')", (digest(1),))
    for first in (0, 8):
        old.execute("INSERT INTO task VALUES(?,?,8,3,?,?,8)", (digest(1), first, PEER, first))
    old.close()
    write(tmp_path, task(1, 8, attempt=4, step=70))
    restored = load(tmp_path, 0)
    assert restored.jobs == (JobRecord(digest(1), b"\1", b"\2", JobState.RUNNING, 0),)
    assert restored.tasks == (task(1, 0, attempt=3), task(1, 8, attempt=4, step=70))


def test_pruning_takes_ended_jobs_and_expired_results_and_gives_space_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_journal(tmp_path) as journal:
            rows = [result(1, first, bytes(40_000)) for first in range(0, 8 * 150, 8)]
            ended: tuple[Record, ...] = (
                job(1, JobState.DONE),
                task(1, 0, step=30),
                *rows,
                held(0, expires=1),
            )
            running = (job(2), task(2, 0, step=20), result(2, 0))
            journal.persist(Persist(1, (*ended, *running, signed(1)), PROCESS))
            await outcomes(journal, 1)
            journal.prune(ended_before_unix_ms=1)  # nothing ended so early
            journal.persist(Persist(2, (job(3),), PROCESS))
            await outcomes(journal, 1)
            assert len(list(read_results(tmp_path, digest(1)))) == 150
            journal.prune(ended_before_unix_ms=1 << 60)
            with trio.fail_after(20):
                # The database is the only witness of a prune: it has no event.
                while free_pages(tmp_path) or job(1, JobState.DONE) in job_records(tmp_path):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            journal.persist(Persist(3, (job(4),), PROCESS))
            assert await outcomes(journal, 1) == [Persisted(3)]

    trio.run(main)
    assert list(job_records(tmp_path)) == [job(2), job(3), job(4)]
    assert list(read_results(tmp_path, digest(1))) == []
    assert list(read_results(tmp_path, digest(2))) == [(0, 8, b"out")]
    assert (load(tmp_path, 0).tasks, load(tmp_path, 0).held) == ((task(2, 0, step=20),), ())
    assert rows_of_tasks(tmp_path) == 1
    assert list(signed_objects(tmp_path)) == [signed(1)]
    assert (tmp_path / JOBS.file_name).stat().st_size < 1 << 20


def rows_of_tasks(home: Path) -> int:
    reader = open_reader(home, JOBS)
    assert reader is not None
    count = int(reader.execute("SELECT count(*) FROM task").fetchone()[0])
    reader.close()
    return count


def free_pages(home: Path) -> int:
    reader = open_reader(home, JOBS)
    assert reader is not None
    free = int(reader.execute("PRAGMA freelist_count").fetchone()[0])
    reader.close()
    return free


@given(
    st.lists(
        st.one_of(
            st.builds(job, st.integers(0, 3), st.sampled_from(JobState)),
            st.builds(
                task,
                st.integers(0, 3),
                st.integers(0, 3),
                st.integers(0, 3),
                st.none() | st.integers(1, 9),
            ),
            st.builds(result, st.integers(0, 3), st.integers(0, 3), st.binary(max_size=9)),
            st.builds(held, st.integers(0, 3)),
            st.builds(lambda n: HeldDropped(PEER, b"t" * 16, n), st.integers(0, 3)),
            st.builds(signed, st.integers(0, 9)),
        ),
        max_size=40,
    )
)
def test_any_sequence_of_records_loads_as_a_plain_model_says(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    home = tmp_path_factory.mktemp("home")
    jobs: dict[Digest, JobRecord] = {}
    tasks: dict[tuple[Digest, int], TaskRecord] = {}
    results: dict[tuple[Digest, int], ResultRecord] = {}
    kept: dict[int, HeldRecord] = {}
    objects: dict[tuple[Digest, bytes], SignedObject] = {}
    for record in records:
        match record:
            case JobRecord():
                jobs[record.job_digest] = record
            case TaskRecord():
                tasks[record.job_digest, record.first] = record
            case ResultRecord():
                results.setdefault((record.job_digest, record.first), record)
            case HeldRecord():
                kept[record.attempt] = record
            case HeldDropped():
                kept.pop(record.attempt, None)
            case SignedObject():
                objects.setdefault((record.digest, record.sealed), record)
    write(home, *records)
    restored = load(home, 0)
    assert {record.job_digest: record for record in restored.jobs} == jobs
    assert set(restored.tasks) == {t for t in tasks.values() if t.job_digest in jobs}
    assert {(r.job_digest, r.first) for r in restored.results} == {
        key for key in results if key[0] in jobs
    }
    assert {record.attempt: record for record in restored.held} == kept
    assert restored.signed == tuple(objects.values())
    for number in range(4):
        assert list(read_results(home, digest(number))) == sorted(
            (r.first, r.count, r.outputs)
            for r in results.values()
            if r.job_digest == digest(number)
        )
