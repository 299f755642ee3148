"""What happens if the stored counts are lost while processes run: the access files are read again."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.database import updating
from cluster.records.edge_counts.database import FILE
from cluster.records.edge_counts.refusals import read_refusals
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from serve_apps.rollout.evidence.tables import EVENTS, FILES, READERS, UNITS
from tests.samples.access_records import ROLLOUT_ID, line
from tests.samples.rollout_evidence import Node, evidence, failures

COUNTING = Counting(slow_ms=100)


def delete(file: Path) -> None:
    file.unlink()


def replace_by_an_empty_database(file: Path) -> None:
    with sqlite3.connect(file.with_name("other.db")) as connection:
        connection.execute("CREATE TABLE other (id INTEGER)")
    file.with_name("other.db").rename(file)


def break_it(file: Path) -> None:
    for suffix in ("-wal", "-shm"):
        file.with_name(f"{FILE}{suffix}").unlink(missing_ok=True)
    file.write_bytes(b"no database" * 1000)


@pytest.mark.parametrize("lose", [delete, replace_by_an_empty_database, break_it])
def test_lost_file_is_created_and_the_records_are_read_again(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    """By the processes that run, without a restart and without a new record. Each unit counts once."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    store, node = EvidenceStore(ledger.engine), Node(ledger, tmp_path / "access")
    store.register(ROLLOUT_ID, COUNTING)
    node.write(line(status=500), line(arm="control", status=500, unit_hash="C" * 16))
    node.reader.collect()
    assert (failures(store), evidence(store).watched_units) == ((1, 1), 1)
    lose(tmp_path / FILE)
    for _ in range(3):  # at first, nobody has registered the rollout in the new file
        try:
            node.reader.collect()
        except sa.exc.DatabaseError:
            assert lose is break_it
    store.ensure_registered(ROLLOUT_ID, COUNTING)
    for _ in range(2):
        node.reader.collect()
        assert (failures(store), evidence(store).watched_units) == ((1, 1), 1)
    assert store.requests(ROLLOUT_ID) == {"treatment": 1, "control": 1}


def test_units_of_a_lost_pass_are_stored_again(store: EvidenceStore, node: Node) -> None:
    """PostgreSQL loses the last commits in a crash: the counts, together with the positions."""
    node.write(line())
    node.reader.collect()
    node.write(line(status=500))
    with node.engine.begin() as connection:
        for table in (UNITS, EVENTS, FILES, READERS):
            connection.execute(table.delete())
    node.reader.collect()
    assert (failures(store), evidence(store).watched_units) == ((1, 0), 1)


def test_refused_requests_are_not_counted_again(ledger: Ledger, store: EvidenceStore, node: Node) -> None:
    """The numbers of files that are read again are replaced. Those of removed files stay."""
    for name in ("20270114T080000-a.jsonl", "20270115T080000-a.jsonl"):
        node.write(line(status=422), line(status=422), name=name)
    node.reader.collect()
    (node.folder / "20270114T080000-a.jsonl").unlink()
    node.write(line(status=422))
    node.reader.collect()
    before = read_refusals(ledger.engine, "m")
    assert sum(before.values()) == 5
    store.ensure_registered("another", COUNTING)
    assert node.reader.collect().records == 3
    assert read_refusals(ledger.engine, "m") == before


def test_look_does_not_wait_for_a_held_lock(tmp_path: Path) -> None:
    """An edge's process that was stopped in a transaction must not delay a rollback. Later looks are stored again."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    store, node = EvidenceStore(ledger.engine), Node(ledger, tmp_path / "access")
    store.register(ROLLOUT_ID, COUNTING)
    before = evidence(store)
    node.write(line(status=500))
    node.reader.collect()
    with updating(node.engine):
        assert failures(store) == (1, 0)
        assert store.last_look(ROLLOUT_ID) == before
    assert evidence(store) == store.last_look(ROLLOUT_ID) != before


def test_registering_a_known_rollout_reads_nothing_again(store: EvidenceStore, node: Node) -> None:
    """Each look does it."""
    node.write(line())
    node.reader.collect()
    store.ensure_registered(ROLLOUT_ID, COUNTING)
    assert node.reader.collect().records == 0
