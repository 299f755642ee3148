"""A row with a time in the future is quarantined, whichever source it comes from, so that online and offline agree."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa

from feature_jobs.store import FileSource
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.message_rows import check_messages
from feature_jobs.store.ingestion.pushed_rows import check_rows
from feature_jobs.store.ingestion.quarantine_replay import recheck_rows
from feature_jobs.store.ingestion.validation import REASON, prepare
from tests.projects.push import INCOME, PushProject

NOW = datetime(2024, 1, 1, tzinfo=UTC)
EVENT, CREATED = "event_timestamp lies in the future", "created_timestamp lies in the future"
BY_LAG = "created_timestamp (event_timestamp + created_lag) lies in the future"
LAGGED = replace(
    INCOME, source=FileSource("x.parquet", event_timestamp="at"), created_lag=timedelta(minutes=5)
)


def row(ahead_s: float, **more: Any) -> dict[str, Any]:
    """Return a row to push, with an event time that is `ahead_s` seconds ahead of the clock."""
    at = (NOW + timedelta(seconds=ahead_s)).isoformat()
    return {"keys": {"person_id": 1}, "features": {"amount": 1.0}, "event_timestamp": at} | more


def pushed(*rows: dict[str, Any], ahead: FutureLimit | None = None, view: Any = INCOME) -> list[Any]:
    """Return the indices and reasons of a push's bad rows."""
    arguments = {} if ahead is None else {"ahead": ahead}
    checked = check_rows(list(rows), view, key_types={}, now=NOW, **arguments)
    return [(bad["row"], bad["reason"]) for bad in checked.reasons]


def streamed(*ahead_s: float, view: Any = INCOME) -> list[Any]:
    """Return the indices and reasons of bad messages."""
    messages = [
        orjson.dumps({"person_id": 1, "amount": 1.0, "at": (NOW + timedelta(seconds=ahead)).isoformat()})
        for ahead in ahead_s
    ]
    bad = check_messages(messages, view, key_types={}, now=NOW).bad
    return list(zip(bad["__position"].to_pylist(), bad["reason"].to_pylist(), strict=True))


def ingested(*ahead_s: float, created_s: float | None = None, view: Any = INCOME) -> list[str | None]:
    """Return the reasons of a file's rows; None for a good row."""
    times = pa.array([NOW + timedelta(seconds=ahead) for ahead in ahead_s], pa.timestamp("us", "UTC"))
    created = times if created_s is None else pa.array([NOW + timedelta(seconds=created_s)] * len(ahead_s))
    count = len(ahead_s)
    columns = {"person_id": [1] * count, "amount": [1.0] * count, "sector": ["s"] * count, "at": times}
    block = pa.table(columns | ({"known_at": created} if view is INCOME else {}))
    reasons: list[str | None] = prepare(block, view, now=NOW)[REASON].to_pylist()
    return reasons


def test_times_more_than_a_minute_ahead_are_rejected_from_every_source() -> None:
    """The reason names the event time or the created time."""
    assert pushed(row(60), row(61)) == [(1, f"{EVENT}; {CREATED}")]
    assert pushed(row(0, created_timestamp=(NOW + timedelta(seconds=61)).isoformat())) == [(0, CREATED)]
    assert streamed(60, 61) == [(1, f"{EVENT}; {CREATED}")]
    assert ingested(60, 61) == [None, EVENT]
    assert ingested(0, created_s=61) == [CREATED]
    assert ingested(-86_400 * 3650, created_s=-86_400 * 3650) == [None]


def test_limit_is_a_setting() -> None:
    """The setting is `features.max_ahead_s`."""
    assert pushed(row(3600), row(3601), ahead=FutureLimit.of(3600, online_at_once=True)) == [
        (1, f"{EVENT}; {CREATED}")
    ]
    assert pushed(row(1), ahead=FutureLimit.of(0, online_at_once=True)) == [(0, f"{EVENT}; {CREATED}")]


def test_computed_created_time_may_be_ahead_only_if_rows_go_online_later() -> None:
    """A materialisation takes only what is known by then. A push would hide the previous value."""
    assert ingested(0, 61, view=LAGGED) == [None, EVENT]
    assert pushed(row(0), view=LAGGED) == [(0, BY_LAG)]
    assert pushed(row(-240), row(0, created_timestamp=NOW.isoformat()), view=LAGGED) == []
    assert streamed(-240, 0, view=LAGGED) == [(1, BY_LAG)]


def test_future_row_never_hides_the_current_value(project: PushProject) -> None:
    """Online still gives the same value as offline. The future row is in quarantine."""
    now = datetime.now(UTC)
    rows = [
        {"keys": {"person_id": 1}, "features": {"amount": amount}, "event_timestamp": at.isoformat()}
        for amount, at in ((5.0, now - timedelta(hours=1)), (6.0, now + timedelta(hours=1)))
    ]
    answer = project.push(*rows, key="a")
    assert (answer["accepted"], [bad["row"] for bad in answer["quarantined"]]) == (1, [1])
    hours = (now - datetime(2024, 1, 1, tzinfo=UTC)) / timedelta(hours=1)
    assert project.amounts(1, hour=hours) == [5.0]
    assert project.stream().step() == 2
    assert project.table()["amount"].to_list() == [5.0]
    assert project.amounts(1, hour=hours) == [5.0]


def test_quarantined_future_row_is_good_once_its_time_is_past() -> None:
    """The replay compares with its own time, which it reads once for the batch."""
    raw = orjson.dumps({"person_id": 1, "amount": 1.0, "at": NOW.isoformat()}).decode()
    file = pa.table({"reason": [EVENT], "raw": [raw]})
    early = recheck_rows(file, LAGGED, now=NOW - timedelta(seconds=61), baseline=None)
    later = recheck_rows(file, LAGGED, now=NOW, baseline=None)
    assert (early.good, early.reasons.to_pylist()) == (None, [EVENT])
    assert later.reasons.to_pylist() == [None]
