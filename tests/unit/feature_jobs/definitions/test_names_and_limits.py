"""Names that differ only in case, and limits that cannot work, are refused when a definition is created."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import ConfigError, DefinitionError
from cluster.settings import FeaturesConfig, OnlineConfig
from feature_jobs.ingest import IngestConfig
from feature_jobs.rebucket import RebucketConfig
from feature_jobs.retain import oldest_kept
from feature_jobs.store import (
    Aggregation,
    Allowed,
    Drift,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    Freshness,
    OnDemandTransform,
    Outlier,
    Range,
    RowCount,
    Unique,
)
from feature_jobs.store.catalog.plan import make_plan
from feature_jobs.store.catalog.recorded import Recorded, RecordedService, RecordedView
from feature_jobs.store.catalog.specifications import Definitions
from feature_jobs.store.definitions.limits import LONGEST, clamp_span_s, subtract_span
from feature_jobs.store.definitions.missing import view_of
from feature_jobs.store.ingestion.ranges import TimeRange, chunks, parse_instant, parse_span
from feature_jobs.stream import KafkaConfig, StreamConfig
from tests.projects.views import define, make_spec, make_view

NOW = datetime(2024, 1, 1, tzinfo=UTC)
HUGE = timedelta.max
FIELDS = [Field("amount", "float64"), Field("count", "int32"), Field("since", "timestamp")]


def view(name: str = "income", **changes: Any) -> FeatureView:
    return make_view(name, **({"schema": FIELDS} | changes))


def same(table: pa.Table) -> pa.Table:
    return table


def on_demand(name: str = "made", **changes: Any) -> OnDemandTransform:
    parts = {"inputs": [Field("asked", "int64")], "schema": [Field("ratio", "float64")], "transform": same}
    return OnDemandTransform(name, **(parts | changes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: view(schema=[Field("Amount", "int64"), Field("amount", "int64")]), ("Amount", "amount")),
        (lambda: view(schema=[Field("Person_ID", "int64")]), ("person_id", "Person_ID")),
        (lambda: view(schema=[Field("Bucket", "int64")]), ("Bucket", "bucket")),
        (lambda: view(schema=[Field("Event_Timestamp", "int64")]), ("Event_Timestamp", "event_timestamp")),
        (lambda: view(schema=[Field("Ingest_seq", "int64")]), ("Ingest_seq", "ingest_seq")),
        (
            lambda: view(entities=[Entity("e", join_keys=["Created_Timestamp"])]),
            ("Created_Timestamp", "created_timestamp"),
        ),
        (lambda: view(entities=[Entity("e", join_keys=["K", "k"])]), ("K", "k")),
        (lambda: FeatureService("s", views=[view("Income"), view("income")]), ("Income", "income")),
        (lambda: FeatureService("s", views=[view("made")], on_demand=[on_demand("Made")]), ("made", "Made")),
        (lambda: on_demand(inputs=[Field("A", "int64"), Field("a", "int64")]), ("A", "a")),
        (lambda: on_demand(inputs=[Field("Bucket", "int64")]), ("Bucket", "bucket")),
        (lambda: on_demand(schema=[Field("R", "int64"), Field("r", "int64")]), ("R", "r")),
        (
            lambda: FeatureService(
                "s",
                views=[view()],
                on_demand=[on_demand(), on_demand("more", inputs=[Field("Asked", "int64")])],
            ),
            ("asked", "Asked"),
        ),
        (
            lambda: view(
                entities=[Entity("e", join_keys=["Amount_Sum_7d"])],
                schema=[Field("id", "string"), *FIELDS],
                event_id="id",
                aggregations=[Aggregation("amount", "sum", windows=[timedelta(days=7)])],
            ),
            ("Amount_Sum_7d", "amount_sum_7d"),
        ),
    ],
)
def test_names_that_differ_only_in_case_are_refused(
    make: Callable[[], object], words: tuple[str, str]
) -> None:
    """The error has both names."""
    with pytest.raises(DefinitionError) as refused:
        make()
    assert all(f"'{word}'" in str(refused.value) for word in words)


def recorded(*views: str, services: tuple[str, ...] = ()) -> Recorded:
    views_recorded = {
        (name, "1"): RecordedView(name=name, version="1", definition=view(name).definition(), module="m")
        for name in views
    }
    services_recorded = {
        (name, "1"): RecordedService(
            name=name, version="1", view_order=[], view_versions={}, module="m", on_demand=[], missing={}
        )
        for name in services
    }
    return Recorded(views=views_recorded, services=services_recorded, uses=[])


def definitions(*views: str, service: str | None = None) -> Definitions:
    made = [view(name) for name in views]
    return define(*made, service=None if service is None else FeatureService(service, views=made))


def test_views_and_services_that_would_share_a_folder_are_refused_when_applied() -> None:
    """Names are compared within a module and with applied names. Names that are applied already stay valid."""
    for module, applied in (
        (definitions("Income", "income"), recorded()),
        (definitions("Income"), recorded("income")),
        (definitions("income", service="Credit"), recorded(services=("credit",))),
    ):
        with pytest.raises(DefinitionError, match="differs only in case"):
            make_plan(module, applied)
    make_plan(definitions("Income", "income"), recorded("Income", "income"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: view(ttl=HUGE), "ttl must be at most"),
        (lambda: view("v" * 201), "at most 200 characters, got 201"),
        (lambda: FeatureService("s" * 201, views=[view()]), "at most 200 characters"),
        (lambda: view(ttl=3600), "ttl must be a timedelta"),
        (lambda: view(retention=HUGE), "retention must be at most"),
        (lambda: view(created_lag=HUGE), "created_lag must be at most 36525 days"),
        (lambda: view(created_lag=None), "created_lag must be a timedelta"),
        (lambda: Aggregation("a", "sum", windows=[HUGE]), "window must be at most"),
        (lambda: Aggregation("a", "sum", windows=[timedelta(0)]), "window must be positive"),
        (lambda: Aggregation("a", "sum", windows=[7]), "window must be a timedelta"),  # type: ignore[list-item]
        (lambda: Aggregation("a", "sum", windows=timedelta(days=1)), "windows must be a list"),  # type: ignore[arg-type]
        (lambda: Freshness(HUGE), "maximum_age must be at most"),
        (lambda: Freshness(5), "maximum_age must be a timedelta"),  # type: ignore[arg-type]
        (lambda: Range("amount", minimum=float("nan")), "minimum must be finite"),
        (lambda: Range("amount", maximum=float("inf")), "maximum must be finite"),
        (lambda: Range("amount", minimum="0"), "minimum must be a number"),  # type: ignore[arg-type]
        (lambda: Range("amount", maximum=2**60), "greater than 2\\^53"),
        (lambda: view(checks=[Range("count", minimum=2**40)]), "can never hold: no int32"),
        (lambda: view(checks=[Range("count", maximum=-1e12)]), "can never hold: no int32"),
        (lambda: view(checks=[Range("count", 0.2, 0.8)]), "can never hold: no int32 is within 0.2..0.8"),
        (lambda: view(checks=[Allowed("count", [2**31])]), "2147483648 is out of range for int32"),
        (lambda: Allowed("count", [1, "a"]), "several types"),
        (lambda: Allowed("sector", "abc"), "must be a list"),
        (lambda: Unique(["amount", "amount"]), "'amount' twice"),
        (lambda: Outlier("amount", fences=float("nan")), "fences must be finite"),
        (lambda: RowCount(factor=float("inf")), "factor must be finite"),
        (lambda: Drift("amount", threshold=float("nan")), "threshold must be finite"),
    ],
)
def test_invalid_limit_is_refused(make: Callable[[], object], words: str) -> None:
    """The definition fails, not a later read or join."""
    with pytest.raises(DefinitionError, match=words):
        make()


def test_the_longest_spans_work_from_definition_to_reading() -> None:
    """No valid span overflows, and a longer span of an older release is read as the longest valid one."""
    longest = view(ttl=LONGEST, retention=LONGEST, checks=[Freshness(LONGEST)])
    assert Freshness.from_definition(longest.checks[0].definition()) == longest.checks[0]
    assert (clamp_span_s(HUGE.total_seconds()), clamp_span_s(None)) == (LONGEST.total_seconds(), None)
    assert subtract_span(NOW, LONGEST) == datetime.min.replace(tzinfo=UTC)
    spec = make_spec("v", ["k"])
    oldest = oldest_kept(replace(spec, retention_s=LONGEST.total_seconds()), NOW)
    assert oldest == datetime.min.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeaturesConfig(max_ahead_s=float("nan")), "features.max_ahead_s"),
        (lambda: FeaturesConfig(max_ahead_s=-1), "features.max_ahead_s"),
        (lambda: OnlineConfig(map_size_gib=float("inf")), "online.map_size_gib"),
        (lambda: KafkaConfig(max_lateness_s=float("inf")), "kafka.max_lateness_s"),
        (lambda: KafkaConfig(linger_s=float("nan")), "kafka.linger_s"),
        (lambda: StreamConfig(interval_s=float("inf")), "interval_s"),
        (lambda: StreamConfig(num_buckets=10**9), "num_buckets"),
        (lambda: IngestConfig(num_buckets=0), "num_buckets"),
        (lambda: RebucketConfig(buckets=0), "^buckets must"),
        (lambda: parse_span("99999999999999d"), "chunk is longer"),
        (lambda: parse_instant("0001-01-01T00:00:00+14:00", name="start"), "start must be"),
        (
            lambda: chunks(TimeRange(NOW, NOW.replace(year=2124)), timedelta(minutes=1), []),
            "more than 10000 chunks",
        ),
    ],
)
def test_invalid_setting_is_refused(make: Callable[[], object], words: str) -> None:
    """The error names the setting."""
    with pytest.raises((ValueError, ConfigError), match=words):
        make()


def test_a_chunk_longer_than_the_range_is_the_range() -> None:
    """This is true even if the chunk would end after the year 9999."""
    late = TimeRange(datetime(9990, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
    assert chunks(late, timedelta(days=100_000), []) == [late]


def test_view_of_a_column_may_end_with_an_underscore() -> None:
    """A feature's name begins with a letter."""
    assert [view_of(name) for name in ("a__b", "a___b", "a__b__c")] == ["a", "a_", "a"]
