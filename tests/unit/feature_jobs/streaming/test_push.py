"""Pushes: on disk before the answer, once for each key, online at once, and in the table exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa

from cluster.errors import DefinitionError, Inconsistent, InvalidRequest, RecordLogCorrupt, ViewRetired
from cluster.ledger.events import BatchIngested, FeatureViewApplied, FeatureViewStateChanged
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from feature_jobs.materialize import newest_rows as materialised
from feature_jobs.store.catalog.protection import quarantine_protection
from feature_jobs.store.offline.tables import open_table
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.streaming import micro_batches
from feature_jobs.store.streaming.push_stream import PushStream
from feature_jobs.store.streaming.push_tables import RECORDS
from feature_jobs.store.streaming.pushed_view import load_pushed_view, view_from_definition
from feature_jobs.store.types.schema import PROVISIONAL
from tests.projects.push import INCOME, START, PushProject, payments_view, row
from tests.unit.feature_jobs.streaming.push_kills import KILLS, require_same_results, run_and_kill


def ingested(project: PushProject) -> list[dict[str, Any]]:
    """Return the `BatchIngested` events."""
    return [entry.payload for entry in project.ledger.entries(BatchIngested)]


def stored_horizon(project: PushProject) -> Horizon:
    """Return what the table has of the log."""
    table = open_table(project.target().uri)
    assert table is not None
    return micro_batches.table_horizon(table)


def test_pushed_row_is_read_at_once_and_streamed_once(project: PushProject) -> None:
    """It is online under its provisional number, stored under the next `ingest_seq`, and then online under that."""
    answer = project.push(row(1, 1, 5.0), row(2, 1, 7.0), key="a")
    assert answer == {"view": "income", "accepted": 2, "quarantined": []}
    assert project.amounts(1, 2, 3) == [5.0, 7.0, None]
    stream = project.stream()
    assert (stream.step(), stream.step()) == (2, 0)
    assert project.table().select("person_id", "amount", "ingest_seq").rows() == [(1, 5.0, 0), (2, 7.0, 1)]
    assert [event["ingest_id"] for event in ingested(project)] == ["push-0-1"]
    project.push(row(1, 1, 6.0), key="b")
    assert project.amounts(1) == [6.0]


def test_repeated_idempotency_key_gets_the_same_answer(project: PushProject) -> None:
    """A client that got no answer repeats the push. It has no second effect."""
    first = project.push(row(1, 1, 5.0), row(2, 1, -1.0), key="a")
    project.push(row(1, 2, 6.0), key="b")
    assert project.push(row(1, 1, 5.0), row(2, 1, -1.0), key="a") == first
    assert project.amounts(1) == [6.0]
    project.stream().step()
    assert project.push(row(1, 1, 5.0), row(2, 1, -1.0), key="a") == first
    assert project.stream().step() == 0
    assert project.table()["amount"].to_list() == [5.0, 6.0]


def test_push_repeated_after_streaming_keeps_its_sequence_number(project: PushProject) -> None:
    """The row keeps its `ingest_seq`, so a later row with the same times still replaces it."""
    project.push(row(1, 1, 5.0), key="a")
    project.stream().step()
    project.push(row(1, 1, 5.0), key="a")
    [stored_row] = project.store.get(project.view.spec, [(1,)])
    assert stored_row is not None
    later = OnlineRow(keys=(1,), event_us=stored_row[0], created_us=stored_row[1], seq=1, values=(6.0, "s"))
    assert project.store.put(project.view.spec, {"person_id": "int64"}, [later]) == 1


def test_idempotency_key_of_another_push_is_refused(project: PushProject) -> None:
    """The stored answer would be wrong, and the new rows would be lost."""
    project.push(row(1, 1, 5.0), key="a")
    with pytest.raises(InvalidRequest, match="used for another push"):
        project.push(row(1, 1, 6.0), key="a")
    assert project.amounts(1) == [5.0]


def test_push_killed_before_online_is_finished(project: PushProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same push again, or the stream, puts the rows online."""
    with monkeypatch.context() as patched:
        patched.setattr(project.store, "put", lambda *_: 0)
        project.push(row(1, 1, 5.0), key="a")
        project.push(row(2, 1, 6.0), key="b")
    assert project.amounts(1, 2) == [None, None]
    project.push(row(1, 1, 5.0), key="a")
    assert project.amounts(1, 2) == [5.0, None]
    project.stream().step()
    assert project.amounts(1, 2) == [5.0, 6.0]


def test_bad_rows_are_reported_and_quarantined(project: PushProject, access: KeyAccess) -> None:
    """A failed check, a wrong type, and an invalid or future time. The other rows are accepted."""
    bad = [
        (row(2, 1, -1.0), "amount outside 0..1e+06"),
        (row(3, 1, "much"), "amount is no float64"),
        (row(4, 1) | {"event_timestamp": "yesterday"}, "event_timestamp is no instant"),
        (
            row(5, 1) | {"event_timestamp": "2999-01-01T00:00:00Z"},
            "event_timestamp lies in the future; created_timestamp lies in the future",
        ),
        (row(6, 1) | {"event_timestamp": None}, "event_timestamp is null"),
    ]
    answer = project.push(row(1, 1, 5.0), *(sent for sent, _ in bad), key="a")
    assert answer["accepted"] == 1
    assert answer["quarantined"] == [
        {"row": number, "reason": reason} for number, (_, reason) in enumerate(bad, start=1)
    ]
    assert project.stream().step() == 6
    [event] = ingested(project)
    assert (event["rows_in"], event["rows_stored"], event["rows_quarantined"]) == (6, 1, 5)
    uri = f"{project.places.quarantine('income')}/{event['quarantine']}"
    file = protected_files(access).read(uri, protection=quarantine_protection("income"))
    assert orjson.loads(file["raw"][1].as_py())["amount"] == "much"


def test_push_of_only_bad_rows_moves_the_position(project: PushProject) -> None:
    """No row is stored twice, and no row is skipped."""
    project.push(row(1, 1, -1.0), key="a")
    project.push(row(1, 1, 5.0), key="b")
    stream = project.stream(max_rows=1)
    assert [stream.step(), stream.step(), stream.step()] == [1, 1, 0]
    assert project.table()["amount"].to_list() == [5.0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "1 to 1000"),
        ([row(1, 1) | {"keyz": 1}], r"rows\[0\] must be an object with"),
        ([row(1, 1) | {"keys": {"person": 1}}], r"rows\[0\]\.keys has 'person'.*Did you mean 'person_id'"),
        ([row(1, 1) | {"keys": {}}], "lacks 'person_id'"),
        ([row(1, 1) | {"features": {"amont": 1}}], "has 'amont'.*Did you mean 'amount'"),
        ([row(1, 1), row("2", 1)], r"rows\[1\]\.keys\.person_id must be a whole number"),  # type: ignore[arg-type]
        ([row(2**63, 1)], "64 bits"),
        ([row(1, 1, deleted="yes")], "true or false"),
    ],
)
def test_malformed_request_is_refused_as_a_whole(
    project: PushProject, rows: list[dict[str, Any]], words: str
) -> None:
    """The error is in the request, not in the data."""
    with pytest.raises(InvalidRequest, match=words):
        project.push(*rows, key="a")
    assert project.log.next_number() == 0


def test_key_type_other_than_the_tables_is_refused(project: PushProject) -> None:
    """Such a key would never be found, and it would block the stream."""
    project.push(row(1, 1), key="a")
    with pytest.raises(InvalidRequest, match="must be a whole number"):
        project.push(row("1", 2), key="b")  # type: ignore[arg-type]


def test_online_equals_rebuild_for_late_and_deleted_rows(project: PushProject) -> None:
    """Push, stream and materialisation give the same values as the push alone."""
    project.push(row(1, 5, 5.0), row(2, 5, 5.0), row(3, 5, 5.0), key="a")
    project.push(row(1, 4, 4.0), row(2, 6, deleted=True), key="b")
    project.push(row(2, 5, 6.0), row(3, 5, 7.0, created_timestamp=row(3, 9)["event_timestamp"]), key="c")
    spec, people = project.view.spec, [(1,), (2,), (3,), (4,)]
    pushed = project.store.get(spec, people)
    assert project.amounts(1, 2, 3, 4) == [5.0, None, 7.0, None]
    while project.stream(max_rows=3).step():
        pass
    assert project.store.get(spec, people) == pushed
    known = list(materialised(spec, project.snapshot(), START.replace(year=2025)))
    project.store.replace(spec, {"person_id": "int64"}, known, horizon=stored_horizon(project))
    assert project.store.get(spec, people) == pushed
    assert project.store.put(spec, {"person_id": "int64"}, known) == 0


def test_materialisation_keeps_pushes_that_the_table_lacks(project: PushProject) -> None:
    """Rows that the table has had, but has no more, are dropped."""
    project.push(row(1, 1, 1.0), key="a")
    project.stream().step()
    project.push(row(1, 2, 2.0), key="b")
    project.push(row(2, 2, 2.0), key="c")
    known = stored_horizon(project)
    assert (known.seq, known.offset) == (0, 0)
    assert not known.covers(PROVISIONAL + 1)
    project.store.replace(project.view.spec, {"person_id": "int64"}, [], horizon=known)
    assert project.amounts(1, 2) == [2.0, 2.0]
    project.stream().step()
    project.store.replace(project.view.spec, {"person_id": "int64"}, [], horizon=stored_horizon(project))
    assert project.amounts(1, 2) == [None, None]


def test_concurrent_streams_duplicate_no_rows(project: PushProject) -> None:
    """Of two commits from the same position one is refused. Its retry finds no rows to store."""
    for number in range(6):
        project.push(row(number, 1, float(number)), key=str(number))

    def work(stream: PushStream) -> None:
        while True:
            try:
                if stream.step() == 0:
                    return
            except micro_batches.CommitConflict:
                continue

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [project.stream(max_rows=1) for _ in range(2)]))
    assert project.table().select("amount", "ingest_seq").rows() == [(float(n), n) for n in range(6)]


def test_altered_or_replaced_log_is_refused(project: PushProject, tmp_path: Path) -> None:
    """The rows of another log would be stored as those after the table's position."""
    project.push(row(1, 1), key="a")
    with project.ledger.writing() as connection:
        sealed = connection.execute(sa.select(RECORDS.c.sealed)).scalar_one()
        connection.execute(RECORDS.update().values(sealed=sealed[:-1] + b"!"))
    with pytest.raises(RecordLogCorrupt, match="altered at number 0"):
        project.stream().step()
    project.log.trim(0)
    project.push(row(1, 1), key="b")
    with pytest.raises(Inconsistent, match="begins at number 1, the table ends at -1"):
        project.stream().step()


def test_pushed_values_are_encrypted_everywhere(project: PushProject, tmp_path: Path) -> None:
    """Values and keys are encrypted in log, table and quarantine."""
    secret = row(1, 1) | {"features": {"amount": 5.0, "sector": "very-secret"}}
    project.push(secret, row(2, 1, "hidden-raw"), key="known-to-alice")
    project.stream().step()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            for word in (b"very-secret", b"hidden-raw", b"known-to-alice"):
                assert word not in path.read_bytes(), path


def test_view_without_a_transform_needs_no_module() -> None:
    """Its definition in the ledger is enough to check rows."""
    again = view_from_definition(INCOME.definition())
    for name in ("checks", "join_keys", "created_lag"):
        assert getattr(again, name) == getattr(INCOME, name)
    types = [[(field.name, field.dtype) for field in view.schema] for view in (again, INCOME)]
    assert types[0] == types[1]
    assert view_from_definition(payments_view().definition()).windows == payments_view().windows


def test_missing_or_changed_code_is_refused(project: PushProject) -> None:
    """The error names the module, or the version that was not applied."""
    definition = INCOME.definition() | {"transform": {"name": "nowhere.views:f", "sha256": "0"}}
    event = FeatureViewApplied(view="income", version="abc", definition=definition)
    project.ledger.append(event, actor="test")
    with pytest.raises(
        DefinitionError, match=r"transform, and its code cannot be imported.*'nowhere\.views'"
    ):
        load_pushed_view(project.ledger, "income")
    elsewhere = definition | {"transform": {"name": "tests.projects.push:row", "sha256": "0"}}
    event = FeatureViewApplied(view="income", version="abc", definition=elsewhere)
    project.ledger.append(event, actor="test")
    with pytest.raises(DefinitionError, match="applied as version abc"):
        load_pushed_view(project.ledger, "income")


def test_retired_view_accepts_no_pushes(project: PushProject) -> None:
    """Earlier pushes are still stored in its table."""
    project.push(row(1, 1, 5.0), key="a")
    event = FeatureViewStateChanged(view="income", state="retired", previous="active", reason="old")
    project.ledger.append(event, actor="test")
    with pytest.raises(ViewRetired, match="No new rows are taken"):
        load_pushed_view(project.ledger, "income")
    assert project.stream().step() == 1


def pushes(count: int) -> list[dict[str, Any]]:
    """Draw pushes of few persons with times in any order, corrections, deletions and bad rows."""
    draw = random.Random(0)

    def draw_row(number: int) -> dict[str, Any]:
        amount = draw.choice([1.0, -1.0, float(number)])
        return row(draw.randrange(4), draw.randrange(6), amount, deleted=draw.random() < 0.2)

    return [
        {"key": f"k{number}", "rows": [draw_row(number) for _ in range(draw.randrange(1, 4))]}
        for number in range(count)
    ]


def test_killed_server_and_stream_lose_and_duplicate_no_pushes(
    tmp_path: Path, access: KeyAccess, open_project: Callable[..., PushProject]
) -> None:
    """Killed at random points and repeated with the same keys.

    Table, quarantine and online store are the same as without kills.
    """
    sent = pushes(5 * (KILLS + 1))
    (tmp_path / "killed").mkdir()
    whole = open_project(folder="whole")
    for push in sent:
        whole.push(*push["rows"], key=push["key"])
    while whole.stream(max_rows=5).step():
        pass
    waiting = [step for push in sent for step in (push, "stream")]
    draw, kills = random.Random(), 0
    while waiting:
        kill_after_s = draw.uniform(0.0, 0.3) if kills < KILLS else None
        kills += kill_after_s is not None
        waiting = waiting[run_and_kill(tmp_path / "killed", access, waiting, kill_after_s) :]
    assert kills == KILLS
    killed = open_project(folder="killed")
    columns = ["person_id", "event_timestamp", "amount", "sector", "deleted", "ingest_seq"]
    assert killed.table().select(columns).equals(whole.table().select(columns))
    require_same_results(killed, whole)
