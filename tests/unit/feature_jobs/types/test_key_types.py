"""Join keys have one type, declared or set by the first batch, for all writers and readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from cluster.errors import DefinitionError, InvalidRequest, SchemaMismatch, TrainingSetError
from cluster.ledger.events import BatchIngested
from feature_jobs.apply import require_stored_key_types
from feature_jobs.client import keys_of
from feature_jobs.store import Allowed, Entity, FeatureService, Field, FileSource, Range
from feature_jobs.store.catalog.differences import Impact, view_changes
from feature_jobs.store.ingestion.declared_types import column_types, typed_text
from feature_jobs.store.ingestion.message_rows import check_messages
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.quarantine_replay import recheck_rows
from feature_jobs.store.ingestion.validation import REASON, prepare
from feature_jobs.store.offline.training_set import key_column
from feature_jobs.store.streaming.micro_batches import MicroBatch, store_batch
from feature_jobs.store.streaming.pushed_view import view_from_definition
from feature_jobs.store.types.key_types import MAX_KEY, require_declared_types, require_stored_types
from tests.projects.online import reader_of
from tests.projects.push import INCOME, START, PushProject, message, row
from tests.projects.tables import feature_rows
from tests.projects.views import define, make_spec, service_of

NOW = datetime(2024, 2, 1, tzinfo=UTC)
LOWEST = -(2**63)
WHOLE = replace(INCOME, entities=[Entity("person", join_keys={"person_id": "int64"})])
TEXT = replace(INCOME, entities=[Entity("person", join_keys={"person_id": "string"})])


def ingest_text(project: PushProject, *people: str) -> None:
    """Store a first batch with text keys, as from files."""
    count = len(people)
    columns = {"person_id": people, "amount": [5.0] * count, "sector": ["s"] * count}
    good = feature_rows([START] * count, **columns).drop_columns(["ingested_at"])
    bad = pa.table({name: pa.array([], kind) for name, kind in (("reason", "string"), ("raw", "string"))})
    batch = MicroBatch(
        ingest_id="files", rows_in=count, good=good, bad=bad, last_seq=count - 1, positions={"files": 1}
    )
    store_batch(None, batch, project.target(), quarantine=project.quarantine())


def quarantined(project: PushProject) -> pa.Table:
    """Return the quarantine file of the only batch."""
    [event] = [entry.payload for entry in project.ledger.entries(BatchIngested)]
    folder = project.places.quarantine("income")
    return QuarantineFiles(folder=folder, view="income", access=project.access).read(event["ingest_id"])


def test_key_types_are_recorded_only_if_declared() -> None:
    """Older views keep their version. A declared type changes the version."""
    assert INCOME.definition()["entities"] == [{"name": "person", "join_keys": ["person_id"]}]
    assert WHOLE.definition()["entities"][0]["key_types"] == {"person_id": "int64"}
    assert len({INCOME.version, WHOLE.version, TEXT.version}) == 3
    assert view_from_definition(WHOLE.definition()).key_types == {"person_id": "int64"}
    two = Entity("pair", join_keys={"b": "string", "a": "int64"})
    assert (list(two.join_keys), two.key_types) == (["b", "a"], {"b": "string", "a": "int64"})


@pytest.mark.parametrize("dtype", ["int32", "float64", "text", int, None])
def test_a_key_is_whole_numbers_or_text(dtype: Any) -> None:
    """Other key types are refused."""
    with pytest.raises(DefinitionError, match="join key 'k' has the type"):
        Entity("e", join_keys={"k": dtype})


def test_one_key_has_one_type_in_a_service_and_in_its_checks() -> None:
    """An entity row has one value for all views, and a check must fit the key's type."""
    other = replace(TEXT, name="other")
    with pytest.raises(
        DefinitionError, match="'person_id' is int64 in view 'income' and string in view 'other'"
    ):
        FeatureService("s", views=[WHOLE, other])
    with pytest.raises(DefinitionError, match="needs a numeric column"):
        replace(TEXT, checks=[Range("person_id", minimum=0)])
    with pytest.raises(DefinitionError, match="do not fit dtype int64"):
        replace(WHOLE, checks=[Allowed("person_id", ["a"])])


def test_declaring_a_type_is_safe_and_changing_it_is_not() -> None:
    """A declared type must also be the stored one."""
    [declared] = view_changes(INCOME.definition(), WHOLE.definition())
    [changed] = view_changes(WHOLE.definition(), TEXT.definition())
    assert (declared.text, declared.impact) == ("+ join key person_id type int64", Impact.safe)
    assert changed.impact is Impact.incompatible
    require_declared_types("income", {"person_id": "int64"}, {"person_id": "int64"})
    with pytest.raises(DefinitionError, match="declared as string, but its feature table holds int64"):
        require_declared_types("income", {"person_id": "string"}, {"person_id": "int64"})


def test_applying_a_type_that_the_table_does_not_have_is_refused(project: PushProject) -> None:
    """The error comes before anything is recorded. The stored type may be declared at any time."""
    require_stored_key_types(define(TEXT), project.places)
    project.push(row(1, 1), key="a")
    assert project.stream().step() == 1
    require_stored_key_types(define(WHOLE), project.places)
    with pytest.raises(DefinitionError, match="View 'income': join key 'person_id' is declared as string"):
        require_stored_key_types(define(TEXT), project.places)


def test_files_must_have_the_declared_key_type() -> None:
    """The error names the key. Text that looks like numbers stays text."""
    times = pa.array([START, START], pa.timestamp("us", "UTC"))
    rest = {"amount": [1.0, 1.0], "sector": ["a", "b"], "at": times, "known_at": times}
    with pytest.raises(
        SchemaMismatch, match="Join key 'person_id' is declared as int64, the source has string"
    ):
        prepare(pa.table({"person_id": ["1", "2"], **rest}), WHOLE, now=NOW)
    with pytest.raises(SchemaMismatch, match="declared as string, the source has int32"):
        prepare(pa.table({"person_id": pa.array([1, 2], pa.int32()), **rest}), TEXT, now=NOW)
    stored = prepare(pa.table({"person_id": ["1", "2"], **rest}), INCOME, now=NOW)
    require_stored_types("income", stored.schema, {"person_id": "string"})
    with pytest.raises(
        SchemaMismatch, match="'person_id' of view 'income' is stored as int64, the source has"
    ):
        require_stored_types("income", stored.schema, {"person_id": "int64"})
    head = pa.table({"person_id": ["7", "8"]})
    types = column_types(TEXT, head, {})
    assert typed_text(head, {"person_id": types["person_id"]})["person_id"].to_pylist() == ["7", "8"]
    assert column_types(INCOME, head, {})["person_id"] == "int64"


def test_the_range_of_keys_is_the_same_everywhere(project: PushProject) -> None:
    """-(2^63 - 1) to 2^63 - 1 in pushes, messages, files, entity rows and reads."""
    with pytest.raises(InvalidRequest, match=r"rows\[0\]\.keys\.person_id must be .* -\(2\^63 - 1\)"):
        project.push(row(LOWEST, 1), key="a")
    project.push(row(-MAX_KEY, 1, 3.0), row(MAX_KEY, 1, 4.0), key="b")
    assert project.amounts(-MAX_KEY, MAX_KEY) == [3.0, 4.0]
    assert keys_of([{"person_id": np.int64(7), "place": np.str_("a")}]) == [{"person_id": 7, "place": "a"}]
    for person in (LOWEST, 1.5, True):
        with pytest.raises(InvalidRequest, match=r"entities\[0\]\.person_id must be"):
            keys_of([{"person_id": person}])
    with pytest.raises(InvalidRequest, match=r"entities\[1\]\.person_id must be"):
        project.amounts(1, 1.5)  # type: ignore[arg-type]
    view = replace(INCOME, source=FileSource("x", event_timestamp="at"))
    checked = check_messages([orjson.dumps(message(LOWEST, 1))], view, key_types={}, now=NOW)
    assert checked.bad["reason"].to_pylist() == ["person_id is no key"]
    block = pa.table(
        {"person_id": [LOWEST, 1], "amount": [1.0] * 2, "sector": ["s"] * 2, "at": pa.array([START] * 2)}
    )
    outside = "person_id is outside -(2^63 - 1) to 2^63 - 1"
    assert prepare(block, view, now=NOW)[REASON].to_pylist() == [outside, None]


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("int64", pa.array([LOWEST])),
        ("int64", pa.array(["1"])),
        ("int64", pa.array([True])),
        ("int64", pa.array([1.5])),
        ("string", pa.array([1])),
    ],
)
def test_entity_rows_must_have_the_stored_key_type(kind: str, column: pa.Array) -> None:
    """The error comes before the join."""
    view = make_spec("income", ["person_id"])
    with pytest.raises(TrainingSetError, match="Join key 'person_id'"):
        key_column("person_id", kind, view, service_of(view), pa.table({"person_id": column}))


def test_declared_key_type_holds_before_the_first_row(open_project: Callable[..., PushProject]) -> None:
    """Reads, pushes and messages of another type are refused."""
    project = open_project(TEXT)
    with pytest.raises(InvalidRequest, match="person_id must be text"):
        project.amounts(1)
    with pytest.raises(InvalidRequest, match=r"rows\[0\]\.keys\.person_id must be text"):
        project.push(row(7, 1), key="a")
    assert project.log.next_number() == 0
    sent = [orjson.dumps(message(7, 1)), orjson.dumps(message("a", 1))]  # type: ignore[arg-type]
    checked = check_messages(sent, TEXT, key_types={}, now=NOW)
    assert checked.bad["reason"].to_pylist() == ["person_id is no string"]
    assert checked.good["person_id"].to_pylist() == ["a"]


def test_push_with_another_key_type_than_the_table_goes_to_quarantine(project: PushProject) -> None:
    """It came before the table had a type. Other rows are stored, and later pushes must have the table's type."""
    project.push(row(7, 1), key="early")
    ingest_text(project, "a")
    project.push(row("b", 2, 6.0), key="later")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"keys\.person_id must be text"):
        project.push(row(8, 2), key="wrong")
    reader = reader_of(project.store, project.view.spec)
    stream = project.stream()
    assert [stream.step(), stream.step()] == [2, 0]
    assert (stream.tally.stored, stream.tally.quarantined) == (1, 1)
    assert project.table()["person_id"].to_list() == ["a", "b"]
    at = START.replace(day=2)
    assert reader.read([{"person_id": "b"}], at).columns["income__amount"] == [6.0]
    [event] = [entry.payload for entry in project.ledger.entries(BatchIngested)]
    reason = "person_id is int64, the feature table holds string"
    assert (event["rows_stored"], event["reasons"]) == (1, {reason: 1})
    file = quarantined(project)
    assert orjson.loads(file["raw"][0].as_py()) == {
        "person_id": 7,
        "amount": 1.0,
        "sector": "s7",
        "at": "2024-01-01 01:00:00+00:00",
        "known_at": "2024-01-01 01:00:00+00:00",
    }
    replayed = recheck_rows(
        file, project.view.view, now=NOW, baseline=None, key_types={"person_id": "string"}
    )
    assert (replayed.good, replayed.reasons.to_pylist()) == (None, ["person_id is no string"])


def test_pushes_before_a_declaration_are_stored_if_they_fit(open_project: Callable[..., PushProject]) -> None:
    """The declared type sets the table's type, although the first pushes have another one."""
    project = open_project()
    project.push(row(7, 1), key="a")
    project.close()
    project = open_project(TEXT)
    project.push(row("b", 2, 6.0), key="b")  # type: ignore[arg-type]
    stream = project.stream(max_rows=1)
    assert [stream.step(), stream.step(), stream.step()] == [1, 1, 0]
    assert project.snapshot().key_types == {"person_id": "string"}
    assert project.table()["person_id"].to_list() == ["b"]
    assert project.amounts("b") == [6.0]  # type: ignore[arg-type]


def test_rows_in_quarantine_stay_there_after_a_kill_behind_the_commit(
    project: PushProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start finishes the remaining work of the same rows."""
    project.push(row(7, 1), key="early")
    ingest_text(project, "a")
    project.push(row("b", 2, 6.0), key="later")  # type: ignore[arg-type]
    stream = project.stream()
    with monkeypatch.context() as patched:
        patched.setattr(type(stream), "_assign_sequence", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream.step()
    assert project.stream().step() == 0
    assert project.table()["person_id"].to_list() == ["a", "b"]
    assert len(list(project.log.records(-1))) == 0


def test_push_with_another_feature_type_than_the_table_goes_to_quarantine(
    open_project: Callable[..., PushProject],
) -> None:
    """A changed definition does not block later rows."""
    project = open_project()
    project.push(row(1, 1), key="a")
    assert project.stream().step() == 1
    project.close()
    schema = [Field("amount", "string"), Field("sector", "string")]
    project = open_project(replace(INCOME, schema=schema, checks=[]))
    project.push(row(1, 2, "much"), key="b")
    stream = project.stream()
    assert (stream.step(), stream.tally.quarantined) == (1, 1)
    assert list(stream.tally.reasons) == ["amount is string, the feature table holds double"]


def test_quarantined_bytes_and_deletions_can_be_replayed(open_project: Callable[..., PushProject]) -> None:
    """Quarantine holds bytes as base64, and a deletion under the source's column name."""
    source = FileSource("x.parquet", event_timestamp="at", deleted="gone")
    view = replace(INCOME, schema=[Field("amount", "bytes")], source=source, checks=[])
    project = open_project(view)
    sent = [row(7, 1) | {"features": {"amount": "AAEC"}}, row(7, 2) | {"features": {}, "deleted": True}]
    project.push(*sent, key="early")
    ingest_text(project, "a")
    assert project.stream().step() == 2
    file = quarantined(project)
    replayed = recheck_rows(file, view, now=NOW, baseline=None)
    assert replayed.good is not None
    assert replayed.good.select(["amount", "deleted"]).to_pylist() == [
        {"amount": b"\0\1\2", "deleted": False},
        {"amount": None, "deleted": True},
    ]
