"""The training set of a service: every entity row, in order, with the values that were known at its time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import TrainingSetError
from cluster.security.keys.access import KeyAccess
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import MissingPolicy
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import assemble, build, event_times, join_in_process
from feature_jobs.training_set import hidden_warning, read_entities
from tests.projects.tables import TIME, commit_rows, feature_rows, pin, target_of
from tests.projects.views import make_spec, service_of

START = datetime(2024, 1, 1, tzinfo=UTC)


def hours(*offsets: float) -> list[datetime]:
    """Return a moment, in hours after the start."""
    return [START + timedelta(hours=hour) for hour in offsets]


def store(
    folder: Path,
    access: KeyAccess,
    spec: ViewSpec,
    event: list[datetime],
    created: list[datetime] | None = None,
    **columns: Any,
) -> Snapshot:
    """Store rows in a feature table. By default a row is created at its event time."""
    rows = feature_rows(event, created=created, **columns)
    target = target_of(f"{folder}/{spec.name}", spec, access, buckets=4)
    commit_rows(target, rows)
    return pin(target)


PERSON = make_spec("person", ["person_id"], age_band="string", amount="float64", seen="timestamp")
COHORT = make_spec("cohort", ["age_band"], ttl_h=10, rate="float64", size="int64")
SERVICE = ServiceSpec(name="credit", version="s1", views=[PERSON, COHORT])


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory, access: KeyAccess) -> dict[str, Snapshot]:
    folder = tmp_path_factory.mktemp("features")
    columns = {"person_id": [1, 2, 1], "age_band": ["young", "old", "old"], "amount": [10.0, None, 11.0]}
    person = store(folder, access, PERSON, hours(1, 1, 5), **columns, seen=pa.array(hours(0, 0, 0), TIME))
    cohort = store(
        folder, access, COHORT, hours(2, 4), age_band=["young", "old"], rate=[0.5, 0.7], size=[3, 4]
    )
    return {"person": person, "cohort": cohort}


def entities(ids: Any, *at: float, **more: Any) -> pa.Table:
    """Return entity rows."""
    return pa.table({"person_id": ids, "event_timestamp": pa.array(hours(*at), TIME), **more})


def built(snapshots: dict[str, Snapshot], rows: pa.Table, service: ServiceSpec = SERVICE) -> pa.Table:
    """Build the training set."""
    return build(service, snapshots, rows, join_parts=join_in_process)


def test_rows_and_columns_of_entities_come_first_in_order(snapshots: dict[str, Snapshot]) -> None:
    """Repeated rows, unknown entities and extra columns of any type are kept."""
    label = pa.array(["a", "b", "a", "c", "b"]).dictionary_encode()
    rows = entities([2, 1, 1, 99, 1], 6, 6, 3, 6, 6, label=label)
    table = built(snapshots, rows)
    assert rows.equals(table.select(rows.column_names))
    assert [*rows.column_names, *SERVICE.columns] == table.column_names
    assert table["person__amount"].to_pylist() == [None, 11.0, 10.0, None, 11.0]


def test_join_key_can_come_from_an_earlier_view(snapshots: dict[str, Snapshot]) -> None:
    """The cohort is the person's band at that time, or that of the entity row. Without a person there is none."""
    table = built(snapshots, entities([1, 1, 2, 99], 3, 6, 6, 6))
    assert table["person__age_band"].to_pylist() == ["young", "old", "old", None]
    assert table["cohort__rate"].to_pylist() == [0.5, 0.7, 0.7, None]
    table = built(snapshots, entities([1], 6, age_band=["young"]))
    assert table["cohort__rate"].to_pylist() == [0.5]


def test_join_key_never_comes_from_a_default(snapshots: dict[str, Snapshot]) -> None:
    """An unknown person has the default band, but the cohort is not looked up with it."""
    defaults: dict[str, Any] = {"person__age_band": "old", "person__amount": -1.0, "cohort__rate": 0.0}
    service = replace(SERVICE, missing=MissingPolicy(defaults=defaults))
    rows = entities([1, 2, 99], 6, 20, 6)
    training_set = assemble(service, snapshots, rows, join_parts=join_in_process)
    table = training_set.table
    assert table["person__age_band"].to_pylist() == ["old", "old", "old"]
    assert table["person__amount"].to_pylist() == [11.0, None, -1.0]
    assert table["cohort__rate"].to_pylist() == [0.7, 0.0, 0.0]
    assert table["cohort__size"].to_pylist() == [4, None, None]
    assert training_set.absent == {"person": 1, "cohort": 2}


def test_ttl_of_the_view_is_applied(snapshots: dict[str, Snapshot]) -> None:
    """The rate is valid up to ten hours after its event."""
    assert built(snapshots, entities([2, 2], 14, 14.1))["cohort__rate"].to_pylist() == [0.7, None]


def test_cutoff_hides_and_counts_later_knowledge(tmp_path: Path, access: KeyAccess) -> None:
    """Without the cutoff only the event time decides."""
    late = make_spec("person", ["person_id"], amount="float64")
    table = store(
        tmp_path, access, late, hours(1, 1), created=hours(1, 5), person_id=[1, 2], amount=[1.0, 2.0]
    )
    service, rows = service_of(late), entities([1, 2, 2, 3], 4, 4, 5, 4)
    with_it, without = (
        assemble(service, {"person": table}, rows, join_parts=join_in_process, cutoff=cutoff)
        for cutoff in (True, False)
    )
    assert with_it.table["person__amount"].to_pylist() == [1.0, None, 2.0, None]
    assert without.table["person__amount"].to_pylist() == [1.0, 2.0, 2.0, None]
    assert (with_it.hidden, without.hidden) == ({"person": 1}, {"person": 0})
    assert hidden_warning({"person": 0.25}) == (
        "warning: entity rows get null because a value was created only after their time: "
        "25.00% of the rows for 'person'. `cutoff=false` ignores created_timestamp."
    )


def test_columns_without_values_have_the_declared_types(snapshots: dict[str, Snapshot]) -> None:
    """A training set of unknown entities has the same schema as any other."""
    known, unknown = (built(snapshots, entities([person], 6)) for person in (1, 99))
    assert known.schema.equals(unknown.schema)
    assert pa.int64() == known.schema.field("cohort__size").type
    assert known.schema.field("person__seen").type == TIME


def test_key_encoding_does_not_matter(snapshots: dict[str, Snapshot]) -> None:
    """int32 or int64, dictionary or plain text: it is the same entity."""
    expected = built(snapshots, entities([1, 2], 6, 6, age_band=["young", "old"]))["cohort__rate"]
    coded = pa.array(["young", "old"]).dictionary_encode()
    rows = entities(pa.array([1, 2], pa.int32()), 6, 6, age_band=coded)
    assert expected.equals(built(snapshots, rows)["cohort__rate"])


def test_times_are_converted_from_other_zones_and_units(snapshots: dict[str, Snapshot]) -> None:
    """pandas writes nanoseconds. A time without a zone is UTC."""
    at = hours(3)
    for kind in (pa.timestamp("ns", "UTC"), pa.timestamp("ms"), pa.timestamp("us", "Asia/Dubai")):
        values = at if kind.tz else [at[0].replace(tzinfo=None)]
        rows = pa.table({"person_id": [1], "event_timestamp": pa.array(values, kind)})
        assert built(snapshots, rows)["person__amount"].to_pylist() == [10.0]


@pytest.mark.parametrize(("nanoseconds", "amount"), [(1, 10.0), (0, 10.0), (-1, None)])
def test_time_of_an_entity_row_is_rounded_down(
    snapshots: dict[str, Snapshot], nanoseconds: int, amount: float | None
) -> None:
    """A feature that is one nanosecond later is not seen."""
    at = pa.array([int(hours(1)[0].timestamp()) * 10**9 + nanoseconds], pa.timestamp("ns", "UTC"))
    rows = pa.table({"person_id": [1], "event_timestamp": at})
    assert built(snapshots, rows)["person__amount"].to_pylist() == [amount]


@pytest.mark.parametrize(
    ("time", "rounded"),
    [
        (pa.array([-1], pa.timestamp("ns")), -1),
        (pa.array([253_402_300_799], pa.timestamp("s")), 253_402_300_799_000_000),
        (pa.array([10**16], pa.timestamp("s")), (2**63 - 1) // 10**6 * 10**6),
    ],
)
def test_time_of_an_entity_row_never_wraps(time: pa.Array, rounded: int) -> None:
    """A time before 1970 is rounded down too. A time beyond the range of microseconds becomes the last one in range."""
    assert event_times(pa.table({"event_timestamp": time})).cast(pa.int64()).to_pylist() == [rounded]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (entities([1], 1).drop_columns(["event_timestamp"]), "event_timestamp"),
        (entities([1], 1).drop_columns(["person_id"]), "person_id"),
        (entities(["one"], 1), "person_id"),
        (entities(pa.array(["1"], pa.large_string()), 1), "person_id"),
        (entities([1.5], 1), "person_id"),
        (entities([1], 1, person__amount=[2.0]), "person__amount"),
        (entities([1], 1, age_band=[3]), "age_band"),
        (pa.table({"person_id": [1], "event_timestamp": ["2024-01-01"]}), "event_timestamp"),
        (pa.table({"person_id": [1], "event_timestamp": pa.array([None], TIME)}), "event_timestamp"),
    ],
)
def test_entities_that_cannot_be_joined_are_refused_by_column(
    snapshots: dict[str, Snapshot], rows: pa.Table, words: str
) -> None:
    """The error names the column that is missing, null, of the wrong type, or named like a feature."""
    with pytest.raises(TrainingSetError, match=words):
        built(snapshots, rows)


def test_row_hash_does_not_depend_on_storage(tmp_path: Path) -> None:
    """Parquet, chunks and dictionaries do not change the row hash."""
    table = pa.table({"t": ["a", None, "b"], "n": [1.5, None, float("nan")], "b": [True, None, False]})
    pq.write_table(table, tmp_path / "t.parquet")
    coded = table.set_column(0, "t", table["t"].combine_chunks().dictionary_encode())
    wide = table.set_column(0, "t", table["t"].cast(pa.large_string()))
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    same = [pq.read_table(tmp_path / "t.parquet"), coded, wide, chunked, pl.DataFrame(table).to_arrow()]
    assert {row_hash(table)} == {row_hash(one) for one in same}


@pytest.mark.parametrize(
    "other",
    [
        {"t": ["a", "b"], "n": [1, 2]},
        {"t": ["a", None], "n": [2, 1]},
        {"t": ["a", ""], "n": [1, 2]},
        {"t": ["a", None], "m": [1, 2]},
        {"n": [1, 2], "t": ["a", None]},
        {"t": ["a", None], "n": [1.0, 2.0]},
    ],
)
def test_row_hash_sees_every_difference(other: dict[str, list[Any]]) -> None:
    """Other values, nulls, order, names or types give another row hash."""
    assert row_hash(pa.table({"t": ["a", None], "n": [1, 2]})) != row_hash(pa.table(other))


def test_a_folder_of_entity_rows_is_refused(tmp_path: Path) -> None:
    """The error names the folder. Spark writes its output as a folder."""
    with pytest.raises(TrainingSetError, match=f"{tmp_path} is a folder. Give one Parquet file"):
        read_entities(str(tmp_path))
