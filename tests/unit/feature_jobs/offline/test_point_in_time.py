"""The point-in-time join compared with DuckDB as an independent oracle, and on cases that naive joins get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.store.offline.point_in_time import join_features, latest_rows
from tests.samples.pit_oracle import START, TIME, connect, expected, hidden

KEYS = {"person": pl.Int64, "place": pl.String}
FEATURES = KEYS | {
    "event_timestamp": TIME,
    "created_timestamp": TIME,
    "ingest_seq": pl.Int64,
    "amount": pl.Float64,
    "sector": pl.String,
    "deleted": pl.Boolean,
}

hours = st.integers(0, 12).map(lambda hour: START + timedelta(hours=hour))
people = st.integers(1, 3)
places = st.sampled_from(["n", "s"])
amounts = st.none() | st.integers(0, 9).map(float)
sectors = st.none() | st.sampled_from(["a", "b", "c"])
ends = st.sampled_from([False, False, False, True])


@st.composite
def feature_frames(draw: st.DrawFn) -> pl.DataFrame:
    """Draw rows with few keys and few moments, so that ties, corrections and late rows are frequent."""
    rows = draw(st.lists(st.tuples(people, places, hours, hours, amounts, sectors, ends), max_size=25))
    order = draw(st.permutations(range(len(rows))))
    data = [(*row[:4], seq, *row[4:]) for row, seq in zip(rows, order, strict=True)]
    return pl.DataFrame(data, schema=FEATURES, orient="row")


entity_frames = st.lists(
    st.tuples(st.none() | st.integers(1, 4), st.none() | places, hours), max_size=15
).map(lambda rows: pl.DataFrame(rows, schema=KEYS | {"event_timestamp": TIME}, orient="row"))


@pytest.fixture(scope="module")
def oracle() -> duckdb.DuckDBPyConnection:
    return connect()


@settings(max_examples=4 * settings.default.max_examples, deadline=None)
@given(features=feature_frames(), entities=entity_frames, ttl_h=st.none() | st.integers(1, 12))
def test_join_agrees_with_the_definition_in_sql(
    oracle: duckdb.DuckDBPyConnection, features: pl.DataFrame, entities: pl.DataFrame, ttl_h: int | None
) -> None:
    """The join and its hidden rows equal the definition.

    Ties, late corrections, tombstones, null values and keys, and both edges of the TTL are drawn, with and without the
    cutoff.
    """
    ttl = None if ttl_h is None else timedelta(hours=ttl_h)
    columns, keys = ["amount", "sector"], list(KEYS)
    known, all_of_it = expected(oracle, entities, features, keys=keys, columns=columns, ttl=ttl)
    for cutoff, rows, count in ((True, known, hidden(known, all_of_it)), (False, all_of_it, 0)):
        actual = join_features(entities, features, keys=keys, columns=columns, ttl=ttl, cutoff=cutoff)
        assert [row[:2] for row in rows] == actual.columns.rows()
        assert count == actual.hidden
        assert [not row[2] for row in rows] == actual.absent.to_list()


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(features=feature_frames(), as_of=hours)
def test_latest_is_the_join_at_one_moment(features: pl.DataFrame, as_of: datetime) -> None:
    """`latest_rows` returns the rows that a training set would have at that moment."""
    rows = latest_rows(features, keys=list(KEYS), as_of=as_of)
    requests = (
        features.select(list(KEYS))
        .unique(maintain_order=True)
        .with_columns(pl.lit(as_of).cast(TIME).alias("event_timestamp"))
    )
    joined = join_features(requests, features, keys=list(KEYS), columns=["ingest_seq"], ttl=None).columns
    assert sorted(joined["ingest_seq"].drop_nulls()) == sorted(rows["ingest_seq"])


def rows(*values: tuple[int, int, float | None], deleted: Sequence[int] = ()) -> pl.DataFrame:
    """Return feature rows of one person from (event hour, created hour, amount).

    `deleted` has the indices of tombstones.
    """
    data: list[tuple[Any, ...]] = [
        (
            1,
            "n",
            START + timedelta(hours=event),
            START + timedelta(hours=created),
            seq,
            amount,
            None,
            seq in deleted,
        )
        for seq, (event, created, amount) in enumerate(values)
    ]
    return pl.DataFrame(data, schema=FEATURES, orient="row")


def amounts_at(features: pl.DataFrame, *hours_asked: int, ttl: timedelta | None = None) -> list[float | None]:
    """Return the amounts that are known at some hours."""
    data = [(1, "n", START + timedelta(hours=hour)) for hour in hours_asked]
    entities = pl.DataFrame(data, schema=KEYS | {"event_timestamp": TIME}, orient="row")
    joined = join_features(entities, features, keys=list(KEYS), columns=["amount"], ttl=ttl)
    return joined.columns["amount"].to_list()


def test_late_event_never_overwrites_newer_value() -> None:
    """A correction of an old event that arrives last changes nothing."""
    assert amounts_at(rows((1, 1, 1.0), (5, 5, 2.0), (1, 8, 9.0)), 10) == [2.0]


def test_correction_counts_from_its_created_time() -> None:
    """Before its created time the first value counts, from then on the corrected one."""
    assert amounts_at(rows((1, 1, 1.0), (1, 8, 9.0)), 7, 8) == [1.0, 9.0]


def test_row_is_hidden_before_its_event() -> None:
    """A value that was created before its event is not used before the event."""
    assert amounts_at(rows((5, 2, 1.0)), 4, 5) == [None, 1.0]


def test_last_ingested_wins_a_full_tie() -> None:
    """Of two rows with the same event and created time, the one that was stored later counts."""
    assert amounts_at(rows((1, 1, 1.0), (1, 1, 2.0)), 3) == [2.0]


def test_null_value_hides_the_older_one() -> None:
    """A newer null replaces an older value."""
    assert amounts_at(rows((1, 1, 1.0), (2, 2, None)), 3) == [None]


def test_ttl_includes_its_edge_and_uses_no_older_row() -> None:
    """An age equal to the TTL counts. One microsecond more does not, and no older row replaces the value."""
    features = rows((1, 1, 1.0), (4, 4, 2.0))
    assert amounts_at(features, 6, 7, ttl=timedelta(hours=2)) == [2.0, None]


def test_expired_newer_event_is_not_replaced_by_correction_of_older_event() -> None:
    """The TTL is applied to the joined row, not to the candidates."""
    assert amounts_at(rows((3, 3, 1.0), (1, 9, 5.0)), 10, ttl=timedelta(hours=6)) == [None]


def test_tombstone_hides_values_until_a_newer_row() -> None:
    """A tombstone counts from its availability, like any other row, and no older row returns."""
    features = rows((1, 1, 1.0), (3, 5, 7.0), (6, 6, 2.0), deleted=[1])
    assert amounts_at(features, 4, 5, 6) == [1.0, None, 2.0]


def test_late_row_from_before_a_tombstone_changes_nothing() -> None:
    """A deleted entity stays deleted."""
    assert amounts_at(rows((3, 3, 0.0), (2, 4, 9.0), deleted=[0]), 5) == [None]


def test_latest_omits_deleted_entities_or_returns_their_tombstones() -> None:
    """By default a deleted entity has no row. On request its tombstone is returned."""
    features = rows((1, 1, 1.0), (3, 3, 7.0), deleted=[1])
    at = START + timedelta(hours=4)
    assert latest_rows(features, keys=list(KEYS), as_of=at).is_empty()
    tombstone = latest_rows(features, keys=list(KEYS), as_of=at, tombstones=True)
    assert tombstone["event_timestamp"].to_list() == [START + timedelta(hours=3)]


def test_ordered_rows_need_no_sequence_numbers() -> None:
    """The rows of one bucket file are sorted already."""
    features = rows((1, 1, 1.0), (1, 1, 2.0), (5, 5, 3.0), (2, 8, 4.0)).drop("ingest_seq")
    entities = rows((4, 4, None), (9, 9, None)).select(*KEYS, "event_timestamp")
    joined = join_features(entities, features, keys=list(KEYS), columns=["amount"], ttl=None, ordered=True)
    assert joined.columns["amount"].to_list() == [2.0, 3.0]


def test_rows_keep_order_and_repetitions() -> None:
    """The result has one row for each entity row, in the same order."""
    assert amounts_at(rows((1, 1, 1.0), (4, 4, 2.0)), 5, 2, 5, 0) == [2.0, 1.0, 2.0, None]


def test_no_features_give_nulls() -> None:
    """An empty bucket is not an error."""
    assert amounts_at(rows(), 1, 2) == [None, None]
