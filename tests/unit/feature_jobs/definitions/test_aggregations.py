"""Aggregated views: valid declarations, the features they give, and their path through catalog and training set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import DefinitionError
from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess
from feature_jobs.materialize import newest_rows
from feature_jobs.store import Aggregation, Entity, FeatureService, FeatureView, Field, FileSource
from feature_jobs.store.aggregation.tiles import Tiling, WindowState
from feature_jobs.store.catalog.differences import view_changes
from feature_jobs.store.catalog.protection import training_set_protection, view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec
from feature_jobs.store.ingestion.validation import REASON, prepare
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import build, join_in_process
from tests.projects.tables import TIME, commit_rows, feature_rows, pin, target_of
from tests.projects.views import apply_service, make_view

START = datetime(2024, 1, 1, tzinfo=UTC)
HOUR, WEEK = timedelta(hours=1), timedelta(days=7)


def view(**changes: Any) -> FeatureView:
    """A view over payments, with some parts changed."""
    parts: dict[str, Any] = {
        "entities": [Entity("customer", join_keys=["customer_id"])],
        "source": FileSource("payments.parquet", event_timestamp="at"),
        "schema": [
            Field("payment_id", "string"),
            Field("amount", "float64", sensitivity="personal"),  # type: ignore[arg-type]
            Field("shop", "int32", categorical=True, sensitivity="public"),  # type: ignore[arg-type]
        ],
        "event_id": "payment_id",
        "aggregations": [
            Aggregation("amount", "sum", windows=[HOUR, WEEK]),
            Aggregation("shop", "last", windows=[WEEK]),
            Aggregation("*", "count", windows=[timedelta(minutes=90)]),
        ],
    }
    return make_view(**(parts | changes))


def applied(ledger: Ledger) -> ServiceSpec:
    """Apply a service with the view, and return its specification from the ledger."""
    return apply_service(ledger, FeatureService("credit", views=[view()]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"event_id": None}, "belong together"),
        ({"aggregations": []}, "belong together"),
        ({"event_id": "paymentid"}, "Did you mean 'payment_id'"),
        ({"event_id": "amount"}, "text or whole numbers"),
        ({"ttl": WEEK}, "Remove the ttl"),
        ({"retention": HOUR}, "a window reaches back 7 days"),
        ({"aggregations": [Aggregation("amont", "sum", windows=[HOUR])]}, "Did you mean 'amount'"),
        ({"aggregations": [Aggregation("payment_id", "mean", windows=[HOUR])]}, "needs numbers"),
        ({"aggregations": [Aggregation("amount", "sum", windows=[HOUR, HOUR])]}, "'amount_sum_1h'"),
    ],
)
def test_invalid_aggregated_view_is_refused(changes: dict[str, Any], words: str) -> None:
    """The error of the definition says what is wrong."""
    with pytest.raises(DefinitionError, match=words):
        view(**changes)


@pytest.mark.parametrize(
    ("column", "function", "windows", "words"),
    [
        ("amount", "sun", [HOUR], "Did you mean 'sum'"),
        ("*", "sum", [HOUR], "only count"),
        ("amount", "sum", [], "no window"),
    ],
)
def test_invalid_aggregation_is_refused(
    column: str, function: str, windows: list[timedelta], words: str
) -> None:
    """The error of the definition says what is wrong."""
    with pytest.raises(DefinitionError, match=words):
        Aggregation(column, function, windows=windows)


def test_view_without_aggregations_keeps_its_definition() -> None:
    """Its JSON has no key for aggregations, so views of older releases keep their version."""
    plain = view(event_id=None, aggregations=[])
    assert {"event_id", "aggregations"}.isdisjoint(plain.definition())
    assert plain.version != view().version


def test_adding_a_window_is_safe_and_removing_one_breaks() -> None:
    """Readers of an earlier version keep their features, or lose one."""
    wider = view(aggregations=[*view().aggregations, Aggregation("amount", "max", windows=[HOUR])])
    (added,) = view_changes(view().definition(), wider.definition())
    (removed,) = view_changes(wider.definition(), view().definition())
    assert added.text == "+ aggregations amount_max_1h "
    assert (added.impact.breaks, removed.impact.breaks) == (False, True)


def test_features_have_names_dtypes_and_the_sensitivity_of_their_column(ledger: Ledger) -> None:
    """A count of events has the sensitivity of the event id."""
    spec = applied(ledger).views[0]
    assert [(field.name, field.dtype, field.sensitivity, field.categorical) for field in spec.fields] == [
        ("amount_sum_1h", "float64", "personal", False),
        ("amount_sum_7d", "float64", "personal", False),
        ("shop_last_7d", "int32", "public", True),
        ("count_90m", "int64", "internal", False),
    ]
    assert [field.name for field in spec.stored] == ["payment_id", "amount", "shop"]
    classes = [field.column_class for field in view_resources(spec, region="r")]
    assert classes == ["internal", "personal", "public"]


def test_spec_crosses_a_process_boundary(ledger: Ledger) -> None:
    """`from_dict` rebuilds an equal specification from `to_dict`."""
    spec = applied(ledger)
    assert ServiceSpec.from_dict(spec.to_dict()) == spec


def test_feature_keeps_the_key_of_its_column_in_a_training_set(ledger: Ledger) -> None:
    """A principal that may not read the amounts may not read their sums."""
    keys = dict(training_set_protection(applied(ledger)).keys)
    assert keys["income__amount_sum_7d"] == "features/income/personal"
    assert keys["income__shop_last_7d"] is None


def test_event_without_an_id_goes_to_quarantine() -> None:
    """Such an event could not be corrected, and repetitions of it would be counted."""
    at = pa.array([START] * 2, TIME)
    columns = {
        "customer_id": [1, 2],
        "at": at,
        "payment_id": ["a", None],
        "amount": [1.0, 2.0],
        "shop": [1, 2],
    }
    reasons = prepare(pa.table(columns), view(), now=START)[REASON].to_pylist()
    assert reasons == [None, "payment_id is null"]


def test_tombstone_keeps_the_id_of_the_event_it_removes() -> None:
    """The other values of the tombstone are null."""
    deletable = view(source=FileSource("payments.parquet", event_timestamp="at", deleted="gone"))
    columns = {"customer_id": [1], "at": pa.array([START], TIME), "payment_id": ["a"], "amount": [1.0]}
    [row] = prepare(pa.table(columns | {"shop": [1], "gone": [True]}), deletable, now=START).to_pylist()
    assert (row["payment_id"], row["amount"], row[REASON]) == ("a", None, None)


def test_training_set_holds_the_aggregations_of_each_entity_row(
    ledger: Ledger, tmp_path: Path, access: KeyAccess
) -> None:
    """A customer without events has a count of 0, also if the customer's bucket has no file."""
    service = applied(ledger)
    pinned = stored(tmp_path, access, service)
    times = [START + timedelta(hours=hour) for hour in (0.5, 1, 1.5, 200, 1)]
    entities = pa.table(
        {"customer_id": [1, 1, 1, 1, 99], "event_timestamp": pa.array(times, TIME), "label": [0] * 5}
    )
    table = build(service, {"income": pinned}, entities, join_parts=join_in_process)
    assert table.column_names[3:] == service.columns
    assert table.select(service.columns).to_pydict() == {
        "income__amount_sum_1h": [1.0, 6.0, 5.0, None, None],
        "income__amount_sum_7d": [1.0, 6.0, 6.0, None, None],
        "income__shop_last_7d": [7, 9, 9, None, None],
        "income__count_90m": [1, 2, 2, 0, 0],
    }
    assert table.schema.field("income__shop_last_7d").type == pa.int32()


def test_materialised_state_has_the_events_known_at_its_time(
    ledger: Ledger, tmp_path: Path, access: KeyAccess
) -> None:
    """A read at a later instant equals the training set without corrections that came after the materialisation."""
    service = applied(ledger)
    spec = service.views[0]
    assert spec.windows is not None
    pinned = stored(tmp_path, access, service)
    at_us = int(START.timestamp() * 1e6) + 5_400_000_000
    results = {}
    for hours in (0.5, 1):
        (row,) = newest_rows(spec, pinned, START + timedelta(hours=hours))
        state = WindowState.unpack(Tiling(spec.windows), row.values[0])
        results[hours] = row.keys, state.values(at_us)
    assert results == {0.5: ((1,), [None, 1.0, 7, 1]), 1: ((1,), [5.0, 6.0, 9, 2])}


def stored(folder: Path, access: KeyAccess, service: ServiceSpec) -> Snapshot:
    """Store two payments of customer 1, at 0:30 and 1:00, and a correction of the second one."""
    spec = service.views[0]
    times = [START + timedelta(hours=hour) for hour in (0.5, 1, 1)]
    columns = {"customer_id": [1, 1, 1], "payment_id": ["a", "b", "b"], "amount": [1.0, 4.0, 5.0]}
    events = feature_rows(times, **columns, shop=pa.array([7, 8, 9], pa.int32()))
    target = target_of(f"{folder}/income", spec, access, buckets=4)
    commit_rows(target, events)
    return pin(target)
