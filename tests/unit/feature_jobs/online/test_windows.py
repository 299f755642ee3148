"""Aggregated views online: at every instant since the horizon the values equal those of a training set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import polars as pl
import pytest
from hypothesis import given, settings

from feature_jobs.store.catalog.specifications import ViewSpec, aggregated_fields
from feature_jobs.store.definitions.aggregations import Aggregation, WindowSpec, window_spec
from feature_jobs.store.offline.window_values import aggregate
from feature_jobs.store.online.reader import FeatureReader, OnlineStore
from feature_jobs.store.online.window_rows import entity_states
from feature_jobs.store.online.window_states import stored_view
from tests.projects.online import online_keys, open_store, reader_of
from tests.projects.views import make_spec, service_of
from tests.unit.feature_jobs.aggregation.event_frames import (
    COLUMNS,
    KEYS,
    SPEC,
    START,
    TIME,
    WINDOWS_H,
    event_frames,
)

CLASSES = {"amount": "personal", "sector": "public"}


def view_of(windows: WindowSpec) -> ViewSpec:
    """Return a view over the events of the tests."""
    columns = {name: f"{dtype}/{CLASSES.get(name, 'internal')}" for name, dtype in COLUMNS.items()}
    stored = tuple(make_spec("visits", [], **columns).fields)
    return ViewSpec(
        name="visits",
        version="v1",
        join_keys=list(KEYS),
        fields=aggregated_fields(windows, stored),
        ttl_s=None,
        windows=windows,
        event_fields=stored,
    )


VIEW = view_of(SPEC)
SERVICE = service_of(VIEW)
AS_OF = START + timedelta(hours=9)
TYPES = {"person": "int64", "place": "string"}
EVERYONE = [{"person": person, "place": place} for person in (1, 2, 9) for place in ("n", "s")]

EVENT = pl.DataFrame(
    [(1, "n", START, START, 0, False, "a", 1.0)],
    schema=KEYS
    | {"event_timestamp": TIME, "created_timestamp": TIME, "ingest_seq": pl.Int64}
    | {"deleted": pl.Boolean, "event_id": pl.String, "amount": pl.Float64},
    orient="row",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnlineStore]:
    folder = tmp_path_factory.mktemp("online")
    with contextlib.closing(open_store(folder, online_keys(folder, "visits"))) as opened:
        yield opened


def offline_columns(frame: pl.DataFrame, hour: int) -> dict[str, list[object]]:
    """Return the training set of all entities at an hour, with timestamps as microseconds."""
    at = START + timedelta(hours=hour)
    entities = pl.DataFrame(EVERYONE, schema=KEYS).with_columns(
        pl.lit(at).cast(TIME).alias("event_timestamp")
    )
    columns = aggregate(entities, frame, keys=list(KEYS), windows=SPEC).columns
    times = [pl.col(name).dt.epoch("us") for name, dtype in columns.schema.items() if dtype == TIME]
    values = columns.with_columns(*times).to_dict(as_series=False)
    return {f"visits__{name}": column for name, column in values.items()}


@settings(max_examples=max(settings.default.max_examples // 3, 1), deadline=None)
@given(frame=event_frames())
def test_online_equals_offline_after_materialisation(store: OnlineStore, frame: pl.DataFrame) -> None:
    """At its instant, before it by up to the longest window, and after it; for unknown entities too."""
    store.replace(stored_view(VIEW), TYPES, entity_states(frame, list(KEYS), SPEC, AS_OF))
    reader = FeatureReader(SERVICE, store)
    known = frame.filter(pl.max_horizontal("event_timestamp", "created_timestamp") <= AS_OF)
    for hour in (9 - max(WINDOWS_H), 7, 9, 12):
        assert reader.read(EVERYONE, START + timedelta(hours=hour)).columns == offline_columns(known, hour)


def test_status_of_values_without_events(store: OnlineStore) -> None:
    """A count of no events is present, a sum of none is null.

    For a missing key all values are missing, before the horizon they are newer.
    """
    frame = frame_of(EVENT).with_columns(person=pl.lit(2, pl.Int64))
    late = START + timedelta(days=9)
    store.replace(stored_view(VIEW), TYPES, entity_states(frame, list(KEYS), SPEC, late))
    reader = FeatureReader(SERVICE, store)
    forgotten = [{"person": 2, "place": "n"}]
    assert reader.read(forgotten, late).columns["visits__count_2h"] == [0]
    assert reader.read(forgotten, START).status["visits__count_2h"] == ["newer"]
    status = reader.read([EVERYONE[0]], AS_OF).status
    assert (status["visits__count_2h"], status["visits__amount_sum_2h"]) == (["present"], ["null"])
    assert set(reader.read([{"person": None, "place": "n"}], AS_OF).status["visits__count_2h"]) == {"missing"}


def test_view_that_was_not_materialised_is_missing(store: OnlineStore) -> None:
    """Its values are not zero."""
    other = replace(VIEW, name="others")
    assert set(reader_of(store, other).read([EVERYONE[0]], AS_OF).status["others__count_2h"]) == {"missing"}


def test_state_made_for_other_windows_is_missing(store: OnlineStore) -> None:
    """It may lack events that the longer window needs. The next materialisation makes a new state."""
    day = Aggregation("amount", "sum", windows=[timedelta(days=1)])
    windows = window_spec("event_id", day.definition(), COLUMNS)
    longer = replace(view_of(windows), version="v2")
    reader = reader_of(store, longer)
    store.replace(stored_view(VIEW), TYPES, entity_states(frame_of(EVENT), list(KEYS), SPEC, AS_OF))
    assert reader.read([EVERYONE[0]], AS_OF).status == {"visits__amount_sum_1d": ["missing"]}
    store.replace(stored_view(longer), TYPES, entity_states(EVENT, list(KEYS), windows, AS_OF))
    assert reader_of(store, longer).read([EVERYONE[0]], AS_OF).columns == {"visits__amount_sum_1d": [1.0]}


def frame_of(event: pl.DataFrame) -> pl.DataFrame:
    """Return one event with all columns of the tests' events."""
    others = {"size": pl.Int64, "sector": pl.String, "seen": TIME, "flag": pl.Boolean}
    return event.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in others.items())


def test_state_has_the_most_sensitive_class_of_its_columns() -> None:
    """A reader without access to one of the columns cannot read the state."""
    (state,) = stored_view(VIEW).fields
    assert state.sensitivity == "personal"
