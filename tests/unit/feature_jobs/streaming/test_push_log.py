"""The push log in SQLite and PostgreSQL, and the import of a log that an older release wrote."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sa

from cluster.errors import Inconsistent, InvalidRequest, RecordLogCorrupt
from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess, key_store
from feature_jobs.store.streaming import push_log, push_tables
from feature_jobs.store.streaming.push_log import PushLog, PushLogFull, PushLogUnavailable, PushRecord
from feature_jobs.store.streaming.push_tables import KEYS, RECORDS, import_lmdb_log, import_lmdb_logs
from tests.projects.push import PushProject, row
from tests.samples import lmdb_push_log
from tests.servers.postgresql import new_database

NO_ROWS = pa.table({"amount": pa.array([], pa.float64())})


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/ledger.db"
    else:
        url = new_database(request.getfixturevalue("server"), secrets.token_hex(4))
    opened = Ledger(url)
    yield opened
    opened.close()


@pytest.fixture
def log(ledger: Ledger, access: KeyAccess) -> PushLog:
    """An empty log."""
    return PushLog(ledger, "income", key_store(access))


def record(rows: int = 1, *, first: int = -1, amount: float = 1.0) -> PushRecord:
    """Return a push of equal rows."""
    good = pa.table({"amount": [amount] * rows})
    return PushRecord(first=first, rows=rows, view_version="v", good=good, bad=NO_ROWS)


def append(log: PushLog, key: str, rows: int = 1, *, amount: float = 1.0) -> int:
    """Append a push, and return its number."""
    digest = hashlib.sha256(key.encode()).digest()
    return log.append(key, digest, record(rows, amount=amount), {"key": key}).first


def test_rows_are_numbered_without_gaps(log: PushLog) -> None:
    """Readers get whole records in the order of their numbers."""
    assert [append(log, key, rows, amount=rows) for key, rows in (("a", 2), ("b", 1), ("c", 3))] == [0, 2, 3]
    assert log.next_number() == 6
    read = list(log.records(-1))
    assert [(found.first, found.last, found.good["amount"].to_pylist()) for found in read] == [
        (0, 1, [2.0, 2.0]),
        (2, 2, [1.0]),
        (3, 5, [3.0, 3.0, 3.0]),
    ]
    assert [found.first for found in log.records(2)] == [3]


def test_repeated_key_appends_nothing(log: PushLog) -> None:
    """The first answer is returned. The key with another push is refused."""
    append(log, "a")
    again = log.append("a", hashlib.sha256(b"a").digest(), record(), {"other": True})
    assert (again.repeated, again.first, again.answer) == (True, 0, {"key": "a"})
    with pytest.raises(InvalidRequest, match="was used for another push"):
        log.append("a", b"another digest", record(), {})
    assert log.next_number() == 1


def test_trimmed_records_are_removed_and_their_numbers_are_not_used_again(log: PushLog) -> None:
    """Keys that no record needs are removed too. A key in use stays, and is stored again when it is needed."""
    append(log, "a")
    append(log, "b")
    log.trim(0)
    assert (log.contains(0), log.contains(1)) == (False, True)
    log.trim(1)
    with log._engine.connect() as connection:
        assert connection.execute(sa.select(KEYS)).all() == []
    assert append(log, "c") == 2
    assert [found.first for found in log.records(-1)] == [2]
    assert append(log, "a") == 0  # a trimmed push still has its answer


def test_expired_answers_are_removed(log: PushLog, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, "a")
    monkeypatch.setattr(push_log, "REMEMBERED_S", -1)
    log.trim(0)
    assert append(log, "a") == 1


def test_logs_of_several_processes_share_one_order(ledger: Ledger, access: KeyAccess, log: PushLog) -> None:
    """Two objects, as in two processes, append at the same time."""
    other = PushLog(ledger, "income", key_store(access))

    def work(number: int) -> int:
        return append((log, other)[number % 2], str(number), 1 + number % 3)

    with ThreadPoolExecutor(4) as pool:
        numbers = sorted(pool.map(work, range(40)))
    read = list(log.records(-1))
    assert [found.first for found in read] == numbers
    assert [found.last + 1 for found in read] == [*numbers[1:], other.next_number()]


def test_views_have_logs_of_their_own(ledger: Ledger, access: KeyAccess, log: PushLog) -> None:
    append(log, "a")
    other = PushLog(ledger, "person", key_store(access))
    assert (other.next_number(), list(other.records(-1))) == (0, [])


def test_reader_sees_one_state_while_a_stream_trims(log: PushLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that are removed during the read are not reported as lost."""
    monkeypatch.setattr(push_log, "_PAGE_BYTES", 1)
    monkeypatch.setattr(push_log, "_LISTED", 2)
    for number in range(4):
        append(log, str(number))
    reading = log.records(-1)
    assert next(reading).first == 0
    log.trim(2)
    assert [found.first for found in reading] == [1, 2, 3]


def test_full_log_refuses_pushes_until_it_is_trimmed(log: PushLog, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, "a")
    monkeypatch.setattr(push_log, "MAX_BYTES", 1)
    with pytest.raises(PushLogFull, match=r"is full\. Run .*source=push view=income"):
        append(log, "b")
    monkeypatch.undo()
    log.trim(0)
    with log._engine.connect() as connection:
        assert connection.execute(sa.select(push_tables.LOGS.c.bytes)).scalar_one() == 0
    assert append(log, "b") == 1


def test_removed_record_is_reported(log: PushLog) -> None:
    for number in range(3):
        append(log, str(number))
    with log._engine.begin() as connection:
        connection.execute(RECORDS.delete().where(RECORDS.c.first == 1))
    with pytest.raises(RecordLogCorrupt, match="lacks the records before number 2"):
        list(log.records(-1))


def test_unreachable_database_is_reported(log: PushLog) -> None:
    """Nobody can say whether the push is stored, so the client repeats it under its key."""
    with log._engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE push_answers"))
    with pytest.raises(PushLogUnavailable, match="repeat it with the same idempotency_key"):
        append(log, "a")
    assert log.next_number() == 0


def write_old_log(folder: Path, access: KeyAccess) -> None:
    """Write a log of an older release, whose first pushes were trimmed."""
    keys = key_store(access)
    for first, key in ((4, "a"), (6, "b")):
        lmdb_push_log.append(folder, "income", keys, key, record(2, first=first, amount=first), {"key": key})


def test_log_of_an_older_release_is_imported(ledger: Ledger, access: KeyAccess, tmp_path: Path) -> None:
    """Records, numbers and answers stay. The folder goes."""
    folder = tmp_path / "push" / "income"
    write_old_log(folder, access)
    import_lmdb_log(ledger, "income", folder)
    assert not folder.exists()
    log = PushLog(ledger, "income", key_store(access))
    assert [(found.first, found.good["amount"].to_pylist()) for found in log.records(-1)] == [
        (4, [4.0, 4.0]),
        (6, [6.0, 6.0]),
    ]
    assert log.append("a", hashlib.sha256(b"a").digest(), record(), {}).first == 4
    assert append(log, "c") == 8


def test_killed_import_is_repeated(
    ledger: Ledger, access: KeyAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its commit nothing is imported. After its commit only the folder is left, which may even be used twice."""
    folder = tmp_path / "push" / "income"
    write_old_log(folder, access)
    with monkeypatch.context() as patched:
        patched.setattr(push_tables.struct, "unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_lmdb_log(ledger, "income", folder)
    assert folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr(push_tables.shutil, "rmtree", lambda *_, **__: None)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: import_lmdb_log(ledger, "income", folder), range(2)))
    log = PushLog(ledger, "income", key_store(access))
    log.trim(7)
    import_lmdb_log(ledger, "income", folder)
    assert not folder.exists()
    assert (list(log.records(-1)), log.next_number()) == ([], 8)


def test_old_log_beside_another_log_is_kept(
    ledger: Ledger, access: KeyAccess, log: PushLog, tmp_path: Path
) -> None:
    """Pushes that went into the database first would have the same numbers, so nobody may choose between the logs."""
    append(log, "z")
    folder = tmp_path / "push" / "income"
    write_old_log(folder, access)
    for _ in range(2):
        with pytest.raises(Inconsistent, match="Nothing was changed; keep the folder"):
            import_lmdb_logs(ledger, folder.parent)
    assert folder.exists()
    assert log.next_number() == 1


def test_pushes_of_an_older_release_are_streamed(tmp_path: Path, access: KeyAccess) -> None:
    """A project opened by this release continues the numbers of the old log."""
    with contextlib.closing(PushProject(tmp_path, access)) as project:
        project.push(row(1, 1), key="a")
        first = next(project.log.records(-1))
        folder = Path(project.places.push("income"))
        with project.ledger.writing() as connection:
            push_tables.METADATA.drop_all(connection)
    lmdb_push_log.append(folder, "income", key_store(access), "a", first, {"view": "income"})
    with contextlib.closing(PushProject(tmp_path, access)) as project:
        assert project.stream().step() == 1
        project.push(row(2, 1, 7.0), key="b")
        assert project.stream().step() == 1
        assert project.amounts(1, 2) == [1.0, 7.0]
