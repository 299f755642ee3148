"""The point-in-time join compared with DuckDB as an independent oracle, and on cases that naive joins get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.store.offline.point_in_time import latest_rows
from tests.samples.frame_join import join_features
from tests.samples.pit_oracle import START, TIME, TIMES, expected, hidden, random_entities, random_features

KEYS = {"person": pl.Int64, "place": pl.String}
FEATURES = KEYS | {
    "event_timestamp": TIME,
    "created_timestamp": TIME,
    "ingest_seq": pl.Int64,
    "amount": pl.Float64,
    "sector": pl.String,
    "deleted": pl.Boolean,
}

moments = st.integers(0, 12).map(lambda hour: START + timedelta(hours=hour))
people = st.integers(1, 3)
places = st.sampled_from(["n", "s"])
amounts = st.none() | st.integers(0, 9).map(float)
sectors = st.none() | st.sampled_from(["a", "b", "c"])
ends = st.sampled_from([False, False, False, True])


@st.composite
def feature_frames(draw: st.DrawFn) -> pl.DataFrame:
    """Draw rows with few keys and few moments, so that ties, corrections and late rows are frequent."""
    rows = draw(st.lists(st.tuples(people, places, moments, moments, amounts, sectors, ends), max_size=25))
    order = draw(st.permutations(range(len(rows))))
    data = [(*row[:4], seq, *row[4:]) for row, seq in zip(rows, order, strict=True)]
    return pl.DataFrame(data, schema=FEATURES, orient="row")


entity_frames = st.lists(
    st.tuples(st.none() | st.integers(1, 4), st.none() | places, moments), max_size=15
).map(lambda rows: pl.DataFrame(rows, schema=KEYS | {"event_timestamp": TIME}, orient="row"))


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


@pytest.mark.parametrize("spread", [1, 2**55], ids=["small keys", "keys of all sizes"])
@pytest.mark.parametrize("hour", [timedelta(hours=1), timedelta(days=40000)], ids=["hours", "centuries"])
def test_join_agrees_with_sql_for_whole_numbers_as_keys(
    oracle: duckdb.DuckDBPyConnection, spread: int, hour: timedelta
) -> None:
    """The join packs keys and times into 64 bits. The result is the same if they are too large for that."""
    draw = np.random.default_rng(5)
    persons = [spread * number for number in range(-100, 100)]
    features = random_features(draw, 3000, {"person": persons, "amount": [None, 1.0, 2.0]})
    entities = random_entities(draw, 400, {"person": [*persons, 2**62]})
    times = [name for name in TIMES if name.endswith("timestamp")]
    later = {name: START + (pl.col(name) - START) * (hour // timedelta(hours=1)) for name in times}
    features = features.with_columns(**later)
    entities = entities.with_columns(event_timestamp=later["event_timestamp"])
    ttl = 3 * hour
    known, all_of_it = expected(
        oracle, entities, features, keys=["person"], columns=["amount", "ingest_seq"], ttl=ttl
    )
    columns = ["amount", "ingest_seq"]
    joined = join_features(entities, features, keys=["person"], columns=columns, ttl=ttl)
    assert [row[:2] for row in known] == joined.columns.rows()
    assert hidden(known, all_of_it) == joined.hidden > 0


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(features=feature_frames(), as_of=moments)
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


def at(hour: int) -> datetime:
    return START + timedelta(hours=hour)


def rows(*values: tuple[int, int, float | None], deleted: Sequence[int] = ()) -> pl.DataFrame:
    """Return feature rows of one person from (event hour, created hour, amount).

    `deleted` has the indices of tombstones.
    """
    data: list[tuple[Any, ...]] = [
        (1, "n", at(event), at(created), seq, amount, None, seq in deleted)
        for seq, (event, created, amount) in enumerate(values)
    ]
    return pl.DataFrame(data, schema=FEATURES, orient="row")


def amounts_at(features: pl.DataFrame, *hours_asked: int, ttl: timedelta | None = None) -> list[float | None]:
    """Return the amounts that are known at some hours."""
    data = [(1, "n", at(hour)) for hour in hours_asked]
    entities = pl.DataFrame(data, schema=KEYS | {"event_timestamp": TIME}, orient="row")
    joined = join_features(entities, features, keys=list(KEYS), columns=["amount"], ttl=ttl)
    return joined.columns["amount"].to_list()


@pytest.mark.parametrize(
    ("values", "hours", "expected"),
    [
        pytest.param([(1, 1, 1.0), (5, 5, 2.0), (1, 8, 9.0)], [10], [2.0], id="late event"),
        pytest.param([(1, 1, 1.0), (1, 8, 9.0)], [7, 8], [1.0, 9.0], id="correction"),
        pytest.param([(5, 2, 1.0)], [4, 5], [None, 1.0], id="created before its event"),
        pytest.param([(1, 1, 1.0), (1, 1, 2.0)], [3], [2.0], id="last ingested of equal times"),
        pytest.param([(1, 1, 1.0), (2, 2, None)], [3], [None], id="newer null"),
        pytest.param([(1, 1, 1.0), (4, 4, 2.0)], [5, 2, 5, 0], [2.0, 1.0, 2.0, None], id="order of entities"),
        pytest.param([], [1, 2], [None, None], id="empty bucket"),
    ],
)
def test_newest_known_value_is_joined(
    values: list[tuple[int, int, float | None]], hours: list[int], expected: list[float | None]
) -> None:
    """A late event never overwrites a newer value, and a correction counts from its created time."""
    assert amounts_at(rows(*values), *hours) == expected


@pytest.mark.parametrize(
    ("values", "hours", "ttl_h", "expected"),
    [
        pytest.param([(1, 1, 1.0), (4, 4, 2.0)], [6, 7], 2, [2.0, None], id="edge of the TTL"),
        pytest.param([(3, 3, 1.0), (1, 9, 5.0)], [10], 6, [None], id="correction of an older event"),
    ],
)
def test_no_older_row_replaces_an_expired_one(
    values: list[tuple[int, int, float | None]], hours: list[int], ttl_h: int, expected: list[float | None]
) -> None:
    """The TTL is applied to the joined row, not to the candidates. An age equal to the TTL counts."""
    assert amounts_at(rows(*values), *hours, ttl=timedelta(hours=ttl_h)) == expected


def test_tombstone_hides_values_until_a_newer_row() -> None:
    """A tombstone counts from its availability, and no older row returns, not even one that arrives later."""
    features = rows((1, 1, 1.0), (3, 5, 7.0), (6, 6, 2.0), deleted=[1])
    assert amounts_at(features, 4, 5, 6) == [1.0, None, 2.0]
    assert amounts_at(rows((3, 3, 0.0), (2, 4, 9.0), deleted=[0]), 5) == [None]


def test_latest_omits_deleted_entities_or_returns_their_tombstones() -> None:
    """By default a deleted entity has no row. On request its tombstone is returned."""
    features = rows((1, 1, 1.0), (3, 3, 7.0), deleted=[1])
    assert latest_rows(features, keys=list(KEYS), as_of=at(4)).is_empty()
    tombstone = latest_rows(features, keys=list(KEYS), as_of=at(4), tombstones=True)
    assert tombstone["event_timestamp"].to_list() == [at(3)]


def test_ordered_rows_need_no_sequence_numbers() -> None:
    """The rows of one bucket file are sorted already."""
    features = rows((1, 1, 1.0), (1, 1, 2.0), (5, 5, 3.0), (2, 8, 4.0)).drop("ingest_seq")
    entities = rows((4, 4, None), (9, 9, None)).select(*KEYS, "event_timestamp")
    joined = join_features(entities, features, keys=list(KEYS), columns=["amount"], ttl=None, ordered=True)
    assert joined.columns["amount"].to_list() == [2.0, 3.0]
