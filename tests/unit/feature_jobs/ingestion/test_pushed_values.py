"""Values and times of pushed rows and messages are stored without a change, or rejected."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa
import pytest

from cluster.errors import InvalidRequest
from feature_jobs.store import FileSource, KafkaSource, SqlSource
from feature_jobs.store.definitions.sources import Source
from feature_jobs.store.ingestion.message_rows import check_messages
from feature_jobs.store.ingestion.pushed_rows import check_rows, typed_column
from feature_jobs.store.ingestion.quarantine_replay import recheck_rows
from feature_jobs.store.streaming.pushed_view import view_from_definition
from tests.projects.push import INCOME, START, row

NOW = datetime(2025, 1, 1, tzinfo=UTC)


def identity(table: pa.Table) -> pa.Table:
    """A transform that changes nothing."""
    return table


@pytest.mark.parametrize(
    ("dtype", "value", "accepted"),
    [
        ("float64", 2**53, True),
        ("float64", 2**53 + 1, False),
        ("float64", 10**400, False),
        ("float32", 0.1, True),
        ("float32", 2**24 + 1, False),
        ("float32", 1e39, False),
        ("int64", 2**63, False),
        ("timestamp", "2024-01-01T00:00:00.1234560Z", True),
        ("timestamp", "2024-01-01T00:00:00.1234561Z", False),
    ],
)
def test_pushed_value_that_would_change_is_a_bad_row(dtype: str, value: Any, accepted: bool) -> None:
    """Fractions are rounded to their type. Whole numbers and times must be exact."""
    reasons: dict[int, str] = {}
    [stored] = typed_column("x", [value], dtype, reasons).to_pylist()
    assert (stored is not None, reasons) == (accepted, {} if accepted else {0: f"x is no {dtype}"})


def test_pushed_time_follows_the_rules_of_the_source() -> None:
    """It is rounded up. Without a time zone, it has the source's zone."""
    local = replace(INCOME, source=replace(INCOME.source, zone="America/Los_Angeles"))
    for view, text, expected in (
        (INCOME, "2024-01-01T00:00:00.0000001", START + timedelta(microseconds=1)),
        (local, "2024-11-03T01:30:00", datetime(2024, 11, 3, 9, 30, tzinfo=UTC)),
        (local, "2024-01-01T00:00:00Z", START),
    ):
        checked = check_rows([row(1, 0) | {"event_timestamp": text}], view, key_types={}, now=NOW)
        assert checked.good["event_timestamp"].to_pylist() == [expected]
        topic = replace(view, source=KafkaSource("h:1", "t", event_timestamp="at", zone=view.source.zone))
        message = orjson.dumps({"person_id": 1, "amount": 1.0, "sector": "a", "at": text})
        checked = check_messages([message], topic, key_types={}, now=NOW)
        assert checked.good["event_timestamp"].to_pylist() == [expected]


@pytest.mark.parametrize("values", [["a", 1], [1, "a"], [-1, 2**63]])
def test_values_of_several_types_are_refused_for_a_transform(values: list[Any]) -> None:
    """The order of the types does not matter. In a topic, only the message of a wrong type is a bad row."""
    with pytest.raises(InvalidRequest, match="'amount' are not of one type"):
        typed_column("amount", values, None, {})
    topic_view = replace(
        INCOME, transform=identity, source=KafkaSource("h:1", "t", event_timestamp="at"), checks=[]
    )
    text = {"person_id": 1, "amount": "1.0", "sector": "a", "at": START.isoformat()}
    messages = [orjson.dumps(text), orjson.dumps(text | {"amount": 1.0})]
    checked = check_messages(messages, topic_view, key_types={}, now=NOW)
    assert (checked.good["amount"].to_pylist(), checked.bad["__position"].to_pylist()) == ([1.0], [0])


@pytest.mark.parametrize("stored_as", ["gone", "deleted"])
def test_quarantined_tombstone_is_still_a_tombstone_after_replay(stored_as: str) -> None:
    """The column has the source's own name. Earlier releases stored it under the platform's name `deleted`."""
    view = replace(INCOME, source=FileSource("x.parquet", event_timestamp="at", deleted="gone"))
    ahead = (NOW + timedelta(hours=1)).isoformat()
    tombstone = {"keys": {"person_id": 1}, "event_timestamp": ahead, "deleted": True}
    bad = check_rows([tombstone], view, key_types={}, now=NOW).bad
    raw = orjson.loads(bad["raw"][0].as_py())
    assert raw["gone"] is True
    raw[stored_as] = raw.pop("gone")
    file = pa.table({"reason": bad["reason"], "raw": [orjson.dumps(raw).decode()]})
    rechecked = recheck_rows(file, view, now=NOW + timedelta(hours=2), baseline=None)
    assert rechecked.good is not None
    assert rechecked.good["deleted"].to_pylist() == [True]


@pytest.mark.parametrize(
    "source",
    [
        FileSource("x.parquet", event_timestamp="at", zone="Asia/Dubai"),
        SqlSource(url="sqlite:///x.db", table="t", event_timestamp="at", zone="Asia/Dubai"),
        KafkaSource("h:1", "t", event_timestamp="at", zone="Asia/Dubai"),
    ],
    ids=lambda source: type(source).__name__,
)
def test_view_from_the_ledger_has_its_time_zone(source: Source) -> None:
    """Replicas and streams have no module with definitions, so the ledger's record must contain the zone."""
    view = view_from_definition(replace(INCOME, source=source).definition())
    assert view.source.zone == "Asia/Dubai"
